//! Who the workers are: each is dialled, admitted, watched and dialled again; the plan follows.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use moerun_proto::HeldExpert;
use moerun_transport::ClientProtection;
use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    DispatchError, OnExpertLoss,
    admission::{check_agreement, check_unchanged},
    canary::Canary,
    connector::Connector,
    core::Core,
    held_watch,
    member::Member,
    run_plan::RunPlan,
    session::{Endpoint, Session, SessionError, endpoint, open},
};

/// Between attempts to reach a worker: the first pause, doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// … and the last while the gateway waits for it to start.
const START_PAUSE: Duration = Duration::from_millis(100);
/// The start waits so long for workers that are not needed.
const SPARE_GRACE: Duration = Duration::from_secs(2);
/// … and so long for workers whose experts this process could compute.
const LOCAL_GRACE: Duration = Duration::from_secs(10);
/// Workers that may have something to tell before the start has heard it.
const NEWS_QUEUE: usize = 64;
/// How often a worker that is leaving, or a plan that was replaced, is looked at.
const LEAVING_LOOK: Duration = Duration::from_millis(10);

/// The workers of a gateway. Dropping it ends all connections, and so tells whoever still waits on one.
#[derive(Debug)]
pub(crate) struct Membership {
    shared: Arc<Shared>,
    runtime: Handle,
    end: CancellationToken,
    _end_with_this: DropGuard,
}

/// What the tasks of a membership share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) core: Arc<Core>,
    connector: Connector,
    pub(crate) canary: Canary,
    roster: Mutex<Roster>,
    /// Whether the first plan has been made; from then on newcomers change it themselves.
    started: AtomicBool,
    /// Plans that were replaced and may still have dispatches under way.
    older: Mutex<Vec<Weak<RunPlan>>>,
    /// Told when somebody comes, goes or holds something else.
    pub(crate) changed: Notify,
    /// Whether the workers are those given, or are found out while the gateway waits for them.
    found_later: bool,
    /// What the start waits for; nobody hears it afterwards.
    news: mpsc::Sender<News>,
}

#[derive(Debug, Default)]
struct Roster {
    /// In the order given.
    keepers: Vec<Keeper>,
}

/// A member, and what ends the task that keeps it connected.
#[derive(Debug)]
struct Keeper {
    member: Arc<Member>,
    end: CancellationToken,
}

/// What the start waits for.
#[derive(Debug)]
pub(crate) enum News {
    Admitted,
    Refused(DispatchError),
    /// It is there and still loads, or not.
    Loading,
}

/// Checks a list of addresses.
pub(crate) fn endpoints(
    workers: &[String],
    protection: &ClientProtection,
) -> Result<Vec<(String, Endpoint)>, DispatchError> {
    let mut endpoints: Vec<(String, Endpoint)> = Vec::with_capacity(workers.len());
    for worker in workers {
        if endpoints.iter().any(|(other, _)| other == worker) {
            let reason = "given twice".to_owned();
            return Err(DispatchError::Address {
                worker: worker.clone(),
                reason,
            });
        }
        endpoints.push((worker.clone(), endpoint(worker, protection)?));
    }
    Ok(endpoints)
}

impl Membership {
    /// Dials all workers. The plan is made by [`Membership::assembled`], which wants the other thing returned.
    pub(crate) fn start(
        core: Arc<Core>,
        canary: Canary,
        connector: Connector,
        runtime: Handle,
        endpoints: Vec<(String, Endpoint)>,
        found_later: bool,
    ) -> (Self, mpsc::Receiver<News>) {
        let end = CancellationToken::new();
        // Each tells one thing at a time, and waits until it is heard.
        let (news, heard) = mpsc::channel(NEWS_QUEUE);
        let shared = Arc::new(Shared {
            core,
            connector,
            canary,
            roster: Mutex::default(),
            started: AtomicBool::new(false),
            older: Mutex::default(),
            changed: Notify::new(),
            found_later,
            news,
        });
        let membership = Self {
            shared,
            runtime,
            _end_with_this: end.clone().drop_guard(),
            end,
        };
        for (worker, endpoint) in endpoints {
            let keeper = membership.keeper(worker);
            let (member, end) = (Arc::clone(&keeper.member), keeper.end.clone());
            membership.shared.roster.lock().keepers.push(keeper);
            membership.keep(member, &end, endpoint);
        }
        (membership, heard)
    }

    /// Waits until the model is covered.
    ///
    /// That is when all workers are admitted; or, a little later, when those that are do hold the whole model; or, later
    /// still, when what they lack can be computed here and nobody who could bring it is loading. A worker that differs is
    /// refused at once, and ends the start. Where workers are found out, others may always come: then what is held decides
    /// until the time is up, and a worker that differs is left out.
    pub(crate) fn assembled(
        &self,
        mut heard: mpsc::Receiver<News>,
        startup_timeout: Duration,
    ) -> impl Future<Output = Result<(), DispatchError>> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move { shared.assemble(&mut heard, startup_timeout).await }
    }

    /// Replaces the workers: newcomers are dialled, and are asked once they are admitted; those that are not in the list
    /// any more get no new work, and are let go when they have answered. Returns the epoch of the new plan.
    pub(crate) fn replace(&self, endpoints: Vec<(String, Endpoint)>) -> Result<u64, DispatchError> {
        // In one piece: nobody is to see the list half made.
        let (before, newcomers) = {
            let mut roster = self.shared.roster.lock();
            let mut before = std::mem::take(&mut roster.keepers);
            let mut newcomers = Vec::new();
            for (worker, endpoint) in endpoints {
                match before.iter().position(|keeper| keeper.member.address() == worker) {
                    Some(stays) => roster.keepers.push(before.swap_remove(stays)),
                    None => {
                        let keeper = self.keeper(worker);
                        newcomers.push((Arc::clone(&keeper.member), keeper.end.clone(), endpoint));
                        roster.keepers.push(keeper);
                    }
                }
            }
            (before, newcomers)
        };
        for (member, end, endpoint) in newcomers {
            self.keep(member, &end, endpoint);
        }
        let epoch = self.shared.replan()?;
        for keeper in before {
            let patience = self.shared.core.dispatch_deadline;
            let leaving = async move {
                let until = Instant::now() + patience;
                while keeper.member.in_flight() > 0 && Instant::now() < until {
                    sleep(LEAVING_LOOK).await;
                }
                tracing::info!(worker = keeper.member.address(), "worker has left");
                keeper.end.cancel();
            };
            self.runtime.spawn(self.end.clone().run_until_cancelled_owned(leaving));
        }
        Ok(epoch)
    }

    /// The members, in the order given.
    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        self.shared.members()
    }

    /// What its tasks share.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Runs a task of the membership until that ends.
    pub(crate) fn run(&self, task: impl Future<Output = ()> + Send + 'static) {
        let running = self.end.clone().run_until_cancelled_owned(task);
        self.runtime.spawn(running);
    }

    fn keeper(&self, worker: String) -> Keeper {
        Keeper {
            member: Arc::new(Member::new(worker)),
            end: self.end.child_token(),
        }
    }

    /// Starts the task that keeps one worker connected.
    fn keep(&self, member: Arc<Member>, end: &CancellationToken, endpoint: Endpoint) {
        let keeping = Arc::clone(&self.shared).keep_connected(member, endpoint);
        self.runtime.spawn(end.clone().run_until_cancelled_owned(keeping));
    }
}

impl Shared {
    /// The members, in the order given.
    pub(crate) fn members(&self) -> Vec<Arc<Member>> {
        let roster = self.roster.lock();
        roster.keepers.iter().map(|keeper| Arc::clone(&keeper.member)).collect()
    }

    async fn assemble(&self, news: &mut mpsc::Receiver<News>, startup_timeout: Duration) -> Result<(), DispatchError> {
        let begun = Instant::now();
        let checks = [SPARE_GRACE, LOCAL_GRACE, startup_timeout].map(|after| begun + after.min(startup_timeout));
        loop {
            // Before the plan: who announces in between is in it, and not missed.
            let missing = self.members().into_iter().find(|member| member.announced().is_none());
            let plan = self.plan(0)?;
            let members = &plan.members;
            let waited = begun.elapsed();
            let uncovered = plan.placement.uncovered(|worker| members[worker].link.is_up());
            let can_compute = self.can_compute(&uncovered);
            let is_loading = members.iter().any(|member| member.is_loading());
            let covered = match &missing {
                _ if self.found_later && !uncovered.is_empty() => can_compute && waited >= startup_timeout,
                None => true,
                Some(_) if uncovered.is_empty() => waited >= SPARE_GRACE.min(startup_timeout),
                Some(_) if can_compute && !is_loading => waited >= LOCAL_GRACE.min(startup_timeout),
                Some(_) => can_compute && waited >= startup_timeout,
            };
            if covered {
                return self.begin(&plan, can_compute);
            }
            if self.found_later && waited >= startup_timeout {
                let held = plan.placement.check_covered(|worker| members[worker].link.is_up());
                held.map_err(|error| DispatchError::Placement(Arc::new(error)))?;
                continue; // the last one came just now
            }
            if let Some(missing) = missing.filter(|_| waited >= startup_timeout) {
                return Err(DispatchError::Unreachable {
                    worker: missing.address().to_owned(),
                    waited: startup_timeout,
                    reason: missing.link.down_reason().unwrap_or_default(),
                });
            }
            let next = checks.into_iter().find(|&check| check > Instant::now());
            let wake = next.unwrap_or_else(|| Instant::now() + START_PAUSE);
            match timeout_at(wake, news.recv()).await {
                Ok(Some(News::Refused(error))) if !self.found_later => return Err(error),
                _ => {}
            }
        }
    }

    fn can_compute(&self, slices: &[moerun_types::ExpertSlice]) -> bool {
        match &self.core.local {
            Some(local) if self.core.on_loss == OnExpertLoss::Local => {
                slices.iter().all(|slice| local.has(slice.layer, slice.expert))
            }
            _ => false,
        }
    }

    /// The end of the start: from now on newcomers are compared with who is there, and change the plan.
    fn begin(&self, plan: &RunPlan, can_compute: bool) -> Result<(), DispatchError> {
        {
            let roster = self.roster.lock();
            let announced: Vec<(&str, Arc<[HeldExpert]>)> = roster
                .keepers
                .iter()
                .filter_map(|keeper| Some((keeper.member.address(), keeper.member.announced()?)))
                .collect();
            check_agreement(announced.iter().map(|(worker, held)| (*worker, &held[..])))?;
            self.started.store(true, SeqCst);
        }
        if let Err(error) = plan.placement.check_covered(|_| true) {
            if !can_compute {
                return Err(DispatchError::Placement(Arc::new(error)));
            }
            tracing::warn!("{error}: this process computes them");
        }
        for member in self.members() {
            if let Some(reason) = member.link.down_reason() {
                tracing::warn!(worker = member.address(), "started without it: {reason}");
            }
        }
        self.replan().map(|_| ())
    }

    fn plan(&self, epoch: u64) -> Result<RunPlan, DispatchError> {
        let admission = &self.core.admission;
        RunPlan::new(epoch, admission.config(), admission.limits().num_blocks, self.members())
            .map_err(|error| DispatchError::Placement(Arc::new(error)))
    }

    /// Puts a plan over what the members have announced in place of the present one. Dispatches under way keep theirs.
    pub(crate) fn replan(&self) -> Result<u64, DispatchError> {
        // Two at once must not put the older one last.
        let roster = self.roster.lock();
        let members = roster.keepers.iter().map(|keeper| Arc::clone(&keeper.member)).collect();
        let admission = &self.core.admission;
        let epoch = self.core.plan.load().epoch + 1;
        let plan = RunPlan::new(epoch, admission.config(), admission.limits().num_blocks, members)
            .map_err(|error| DispatchError::Placement(Arc::new(error)))?;
        let before = self.core.plan.swap(Arc::new(plan));
        let mut older = self.older.lock();
        older.retain(|plan| plan.strong_count() > 0);
        older.push(Arc::downgrade(&before));
        Ok(epoch)
    }

    /// Waits until no dispatch is under way that began on a plan before the present one.
    pub(crate) async fn older_plans_ended(&self) {
        // No dispatch lasts longer.
        let until = Instant::now() + self.core.dispatch_deadline;
        loop {
            {
                let mut older = self.older.lock();
                older.retain(|plan| plan.strong_count() > 0);
                if older.is_empty() || Instant::now() > until {
                    return;
                }
            }
            sleep(LEAVING_LOOK).await;
        }
    }

    /// Dials a worker, admits it, runs its connection, and dials again, for as long as it is a member.
    async fn keep_connected(self: Arc<Self>, member: Arc<Member>, endpoint: Endpoint) {
        let news = self.news.clone();
        let mut pause = FIRST_PAUSE;
        let mut last_refusal = String::new();
        loop {
            let opened = open(member.address(), &endpoint, &self.connector, &self.core.admission).await;
            let admitted = match opened {
                Ok(session) => self.admit(&member, session).await,
                Err(error) => Err(error),
            };
            member.set_loading(matches!(admitted, Err(SessionError::Loading(_))));
            match admitted {
                Ok(session) => {
                    let connected = member.connect(session);
                    tracing::info!(worker = member.address(), "worker is connected");
                    self.changed.notify_one();
                    let _ = news.send(News::Admitted).await; // fails once the start is over
                    let reason = tokio::select! {
                        biased;
                        reason = connected.run() => reason,
                        never = self.canary.watch(&self.core, &member) => match never {},
                        never = held_watch::follow(&self, &member) => match never {},
                    };
                    tracing::warn!(worker = member.address(), "worker is gone: {reason}");
                    self.changed.notify_one();
                    pause = FIRST_PAUSE;
                }
                Err(SessionError::NotYet(reason) | SessionError::Loading(reason)) => {
                    if !self.started.load(SeqCst) && member.link.down_reason().as_ref() != Some(&reason) {
                        tracing::info!(worker = member.address(), "waiting for it: {reason}");
                    }
                    member.link.still_down(reason);
                    let _ = news.send(News::Loading).await;
                }
                Err(SessionError::Refused(error)) => {
                    let refusal = error.to_string();
                    member.link.still_down(refusal.clone());
                    let _ = news.send(News::Refused(error)).await;
                    if (self.found_later || self.started.load(SeqCst)) && refusal != last_refusal {
                        tracing::error!(worker = member.address(), "worker is not taken: {refusal}");
                        last_refusal = refusal;
                    }
                }
            }
            sleep(pause).await;
            let last = if self.started.load(SeqCst) {
                LAST_PAUSE
            } else {
                START_PAUSE
            };
            pause = (pause * 2).min(last);
        }
    }

    async fn admit(&self, member: &Arc<Member>, mut session: Session) -> Result<Session, SessionError> {
        self.canary.admit(&self.core, member, &mut session).await?;
        self.take(member, &session.identity.held)
            .map_err(SessionError::Refused)?;
        Ok(session)
    }

    /// Takes what a worker says it holds: no block may be another than it held before, or than others hold. A plan that
    /// has more or less of it takes the place of the present one.
    pub(crate) fn take(&self, member: &Arc<Member>, held: &[HeldExpert]) -> Result<(), DispatchError> {
        {
            let roster = self.roster.lock();
            let before = member.announced();
            if before.as_deref() == Some(held) {
                return Ok(());
            }
            if let Some(before) = &before {
                check_unchanged(member.address(), before, held)?;
            }
            if self.found_later || self.started.load(SeqCst) {
                let others = roster.keepers.iter().map(|keeper| &keeper.member);
                let others = others.filter(|other| !Arc::ptr_eq(other, member));
                let mut announced: Vec<(&str, Arc<[HeldExpert]>)> = others
                    .filter_map(|other| Some((other.address(), other.announced()?)))
                    .collect();
                announced.push((member.address(), held.into()));
                check_agreement(announced.iter().map(|(worker, held)| (*worker, &held[..])))?;
            }
            if let Some(before) = before {
                tracing::info!(
                    worker = member.address(),
                    before = before.len(),
                    now = held.len(),
                    "worker holds something else"
                );
            }
            member.announce(held.to_vec());
        }
        if self.started.load(SeqCst) {
            self.replan()?;
            self.changed.notify_one();
        }
        Ok(())
    }
}
