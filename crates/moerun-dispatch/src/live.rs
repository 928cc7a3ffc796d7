//! Placement while it runs: a plan is followed, experts move, workers are drained, and nothing that is under way notices.
//!
//! Every change is made of the same three steps (`moves.rs`): a new holder loads, the plan counts on it, and only when no
//! dispatch counts on the old holder any more does that let go. So each block has a holder at every moment, and an
//! operation that is broken off leaves more copies than were wanted, never less.

mod control;
mod cover;
mod keep;
mod moves;
mod policy;
mod request;
mod status;
mod verdict;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use moerun_proto::HeldNow;
use moerun_routing::{
    merge_slices,
    planner::{PlacementPlan, PlanFile, PlanRequest, PlannerError, Prediction, WorkerSpec, evaluate, plan},
    subtract_slices,
};
use moerun_types::ExpertSlice;
use tokio::{sync::Mutex, task::spawn_blocking, time::Instant};

use crate::{DispatchError, member::Member, membership::Shared};
use cover::{Room, cover};
use moves::Target;
use verdict::{Verdict, judge};

pub use policy::{Follow, PlacementPolicy};
pub use request::{cost_model, expert_size};
pub use status::{DrainReport, PlacementStatus, Promise, RebalanceReport, WorkerMoves, WorkerPlacement};

/// Keeps the placement, and changes it.
#[derive(Debug)]
pub(crate) struct Live {
    shared: Arc<Shared>,
    policy: PlacementPolicy,
    /// Held while a change is made: there is one at a time.
    changing: Mutex<()>,
    /// Most holders that every block has had at once: what is to be had again after a loss.
    replicas_seen: AtomicUsize,
}

/// A worker that experts may be moved to and from.
#[derive(Debug, Clone)]
struct Participant {
    member: Arc<Member>,
    now: HeldNow,
}

impl Participant {
    fn held(&self) -> Vec<ExpertSlice> {
        self.now.held.iter().map(|held| held.slice).collect()
    }

    fn capacity_bytes(&self) -> u64 {
        // Where nobody knows what is free it is not planned with.
        self.now.held_bytes.saturating_add(self.now.free_bytes.unwrap_or(0))
    }
}

/// A plan, and what led to it.
struct Proposal {
    participants: Vec<Participant>,
    request: PlanRequest,
    present: Option<Prediction>,
    plan: PlacementPlan,
}

impl Live {
    pub(crate) fn new(shared: Arc<Shared>, policy: PlacementPolicy) -> Self {
        let live = Self {
            shared,
            policy,
            changing: Mutex::default(),
            replicas_seen: AtomicUsize::new(1),
        };
        live.see_replicas();
        live
    }

    /// Moves off `worker` what it alone holds, and gives it no more calls; it stays a member, and holds what it holds.
    /// Returns when it has answered what it was asked.
    pub(crate) async fn drain(&self, worker: &str) -> Result<DrainReport, DispatchError> {
        let _alone = self.changing.lock().await;
        let member = self.find(worker)?;
        let begun = Instant::now();
        let others = self.participants_but(&member).await?;
        if self.answerers_but(&member).is_empty() {
            return Err(DispatchError::LastWorker {
                worker: worker.to_owned(),
            });
        }
        let held_by_others = self
            .answerers_but(&member)
            .iter()
            .flat_map(|other| other.usable())
            .collect();
        let missing = subtract_slices(&member.held(), &merge_slices(held_by_others));
        let moved_bytes = self.bytes_of(&missing);
        let targets = self.cover(worker, &missing, &others)?;
        moves::carry_out(&self.shared, &targets).await?;
        member.set_drained(true);
        let epoch = self.shared.replan()?;
        self.shared.older_plans_ended().await;
        tracing::info!(worker, epoch, moved = missing.len(), "worker is drained");
        Ok(DrainReport {
            worker: member.address().to_owned(),
            epoch,
            moved_slices: missing.len(),
            moved_bytes,
            in_flight: member.in_flight(),
            took: begun.elapsed(),
        })
    }

    /// Gives `worker` calls again. Returns the epoch of the plan that does.
    pub(crate) async fn resume(&self, worker: &str) -> Result<u64, DispatchError> {
        let _alone = self.changing.lock().await;
        let member = self.find(worker)?;
        member.set_drained(false);
        let epoch = self.shared.replan()?;
        self.shared.changed.notify_one();
        tracing::info!(worker, epoch, "worker gets calls again");
        Ok(epoch)
    }

    /// Plans anew over the loads so far, or takes the plan that is followed, and moves experts as it says, unless only
    /// asked what would be done.
    pub(crate) async fn rebalance(&self, dry_run: bool) -> Result<RebalanceReport, DispatchError> {
        let _alone = self.changing.lock().await;
        if let Follow::Plan(file) = &self.policy.follow {
            let participants = self.participants().await?;
            let targets = self.targets_of(file, &participants)?;
            let mut report = self.report_of(file, &targets);
            if !dry_run {
                moves::carry_out(&self.shared, &targets).await?;
                report.carried_out = true;
            }
            report.epoch = self.epoch();
            return Ok(report);
        }
        let proposal = self.propose().await?;
        let verdict = self.judge(&proposal);
        self.finish(proposal, verdict, dry_run).await
    }

    async fn finish(
        &self,
        proposal: Proposal,
        verdict: Verdict,
        dry_run: bool,
    ) -> Result<RebalanceReport, DispatchError> {
        let targets = proposal.targets();
        let mut report = proposal.report(&targets, verdict, &|slices| self.bytes_of(slices));
        if !dry_run {
            moves::carry_out(&self.shared, &targets).await?;
            report.carried_out = true;
            self.see_replicas();
        }
        report.epoch = self.epoch();
        Ok(report)
    }

    /// How the placement is.
    pub(crate) fn status(&self) -> PlacementStatus {
        status::status(&self.shared, &self.policy)
    }

    fn find(&self, worker: &str) -> Result<Arc<Member>, DispatchError> {
        let members = self.shared.members();
        let found = members.iter().find(|member| member.address() == worker);
        found.cloned().ok_or_else(|| {
            let known: Vec<&str> = members.iter().map(|member| member.address()).collect();
            DispatchError::UnknownWorker {
                worker: worker.to_owned(),
                known: known.join(", "),
            }
        })
    }

    /// Members that are connected and get calls, whether or not they can change what they hold.
    fn answerers(&self) -> Vec<Arc<Member>> {
        let mut members = self.shared.members();
        members.retain(|member| member.link.is_up() && !member.is_drained());
        members
    }

    fn answerers_but(&self, but: &Arc<Member>) -> Vec<Arc<Member>> {
        let mut others = self.answerers();
        others.retain(|member| !Arc::ptr_eq(member, but));
        others
    }

    /// Those of them that can, with what they hold as of now.
    async fn participants(&self) -> Result<Vec<Participant>, DispatchError> {
        self.participants_of(self.answerers()).await
    }

    async fn participants_but(&self, but: &Arc<Member>) -> Result<Vec<Participant>, DispatchError> {
        self.participants_of(self.answerers_but(but)).await
    }

    async fn participants_of(&self, members: Vec<Arc<Member>>) -> Result<Vec<Participant>, DispatchError> {
        let mut participants = Vec::with_capacity(members.len());
        for member in members {
            match control::held_now(&member, self.shared.core.admission.limits()).await {
                Ok(now) => {
                    self.shared.take(&member, &now.held)?;
                    member.tells(now.clone());
                    participants.push(Participant { member, now });
                }
                Err(error) => tracing::debug!("left as it is: {error}"),
            }
        }
        Ok(participants)
    }

    fn bytes_of(&self, slices: &[ExpertSlice]) -> u64 {
        let admission = &self.shared.core.admission;
        let size = |slice: &ExpertSlice| request::slice_bytes(admission.config(), &admission.numerics(), *slice);
        slices.iter().map(size).fold(0, u64::saturating_add)
    }

    fn cover(
        &self,
        worker: &str,
        missing: &[ExpertSlice],
        others: &[Participant],
    ) -> Result<Vec<Target>, DispatchError> {
        let mut rooms: Vec<Room> = others
            .iter()
            .map(|other| Room {
                held_bytes: other.now.held_bytes,
                free_bytes: other.now.free_bytes.unwrap_or(0),
            })
            .collect();
        let sizes: Vec<u64> = missing.iter().map(|&slice| self.bytes_of(&[slice])).collect();
        match cover(&sizes, &mut rooms) {
            Ok(given) => Ok(others
                .iter()
                .enumerate()
                .map(|(index, other)| {
                    let more = given.iter().zip(missing).filter(|(to, _)| **to == index);
                    let wanted = other.held().into_iter().chain(more.map(|(_, &slice)| slice)).collect();
                    Target::new(Arc::clone(&other.member), wanted)
                })
                .collect()),
            Err(unplaced) => {
                let room = others
                    .iter()
                    .zip(&rooms)
                    .map(|(other, room)| format!("{} has {} bytes left", other.member.address(), room.free_bytes));
                Err(DispatchError::NoRoomElsewhere {
                    worker: worker.to_owned(),
                    slices: missing.len(),
                    needed_bytes: sizes.iter().sum(),
                    unplaced,
                    room: room.collect::<Vec<_>>().join(", "),
                })
            }
        }
    }

    async fn propose(&self) -> Result<Proposal, DispatchError> {
        self.propose_among(self.participants().await?).await
    }

    async fn propose_among(&self, participants: Vec<Participant>) -> Result<Proposal, DispatchError> {
        let admission = &self.shared.core.admission;
        let loads = self.shared.core.loads.lock().at(Instant::now());
        let present: Vec<(String, Vec<ExpertSlice>)> = participants
            .iter()
            .map(|it| (it.member.address().to_owned(), it.held()))
            .collect();
        let request = request::plan_request(
            admission.config(),
            &admission.numerics(),
            &self.policy,
            participants.iter().map(|it| self.spec(it)).collect(),
            request::Wanted {
                loads,
                present,
                replicas: self.replicas(participants.len()),
            },
        );
        let planning = spawn_blocking(move || {
            let held: Vec<Vec<ExpertSlice>> = request.present.iter().map(|(_, held)| held.clone()).collect();
            let present = evaluate(&request, &held)?;
            let plan = plan(&request)?;
            Ok::<_, PlannerError>((request, present, plan))
        });
        let planned = planning.await.map_err(|error| DispatchError::Start {
            reason: format!("planning: {error}"),
        })?;
        let (request, present, plan) = planned.map_err(|error| DispatchError::Unplanned(Arc::new(error)))?;
        Ok(Proposal {
            participants,
            request,
            present,
            plan,
        })
    }

    fn spec(&self, participant: &Participant) -> WorkerSpec {
        request::spec(participant.member.address(), participant.capacity_bytes())
    }

    fn judge(&self, proposal: &Proposal) -> Verdict {
        let rate = self.shared.core.loads.lock().dispatches_per_second(Instant::now());
        judge(
            proposal.present.as_ref(),
            &proposal.plan.prediction,
            rate,
            self.policy.link_bytes_per_second,
        )
    }

    /// Holders that every block is to have.
    fn replicas(&self, workers: usize) -> usize {
        let wanted = self.policy.replicas.unwrap_or_else(|| self.replicas_seen.load(Relaxed));
        wanted.clamp(1, workers.max(1))
    }

    /// Live holders of the block that has fewest.
    fn fewest_holders(&self) -> usize {
        let plan = self.shared.core.plan.load();
        plan.placement
            .fewest_holders(|worker| plan.members[worker].link.is_up())
    }

    fn see_replicas(&self) {
        self.replicas_seen.fetch_max(self.fewest_holders(), Relaxed);
    }

    fn epoch(&self) -> u64 {
        self.shared.core.plan.load().epoch
    }

    /// What those of the workers that `file` names are to hold. The others keep what they hold.
    fn targets_of(&self, file: &PlanFile, participants: &[Participant]) -> Result<Vec<Target>, DispatchError> {
        let wanted = self.shared.core.admission.resolve(file)?;
        // Those that are not there are to hold their part too: nobody lets go of it before they do.
        let absent = wanted
            .iter()
            .filter(|(name, _)| !participants.iter().any(|it| it.member.address() == name));
        let owed: Vec<ExpertSlice> = absent.flat_map(|(_, slices)| slices.clone()).collect();
        let named = participants.iter().filter_map(|participant| {
            let (_, slices) = wanted.iter().find(|(name, _)| name == participant.member.address())?;
            Some(Target::new(Arc::clone(&participant.member), slices.clone()).owing(&owed))
        });
        Ok(named.collect())
    }

    fn report_of(&self, file: &PlanFile, targets: &[Target]) -> RebalanceReport {
        RebalanceReport {
            epoch: self.epoch(),
            carried_out: false,
            worthwhile: true,
            reason: format!("as the plan of epoch {} says", file.epoch),
            layout: file.layout.clone(),
            replicas: file.replicas,
            present: None,
            planned: Promise {
                balance: file.balance,
                after_worst_death: file.balance_after_worst_death,
                dispatch_seconds: None,
            },
            workers: targets
                .iter()
                .map(|target| target.moves(&|slices| self.bytes_of(slices)))
                .collect(),
        }
    }
}

impl Proposal {
    fn targets(&self) -> Vec<Target> {
        let planned = self.participants.iter().zip(&self.plan.held);
        planned
            .map(|(participant, held)| Target::new(Arc::clone(&participant.member), held.clone()))
            .collect()
    }

    fn report(&self, targets: &[Target], verdict: Verdict, bytes: &dyn Fn(&[ExpertSlice]) -> u64) -> RebalanceReport {
        RebalanceReport {
            epoch: 0,
            carried_out: false,
            worthwhile: verdict.worthwhile,
            reason: verdict.reason,
            layout: self.plan.layout.to_string(),
            replicas: self.request.replicas,
            present: self.present.as_ref().map(Promise::of),
            planned: Promise::of(&self.plan.prediction),
            workers: targets.iter().map(|target| target.moves(bytes)).collect(),
        }
    }
}
