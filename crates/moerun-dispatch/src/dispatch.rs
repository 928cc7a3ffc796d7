//! One layer's dispatch, as a state machine: what was asked of whom, what came back, what is asked again.
//!
//! It does not know who drives it: [`Dispatch::begin`] and [`Dispatch::flush`] never wait, [`Dispatch::advance`] waits for
//! answers and for tokio's time. The sockets are moved by whoever runs the runtime.

mod answer;
mod clock;
mod failure;
mod hedge;
mod resort;
mod unit;

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use moerun_kernels::Activations;
use moerun_process::spin_then_wait;
use moerun_proto::{MAX_EXECUTE_BYTES, encode_request, request_cost_bytes, seal_request, speaks_checksums, v1};
use moerun_routing::{Assignment, PartialSums, Routing, WorkerBatch, whole_assignments};
use moerun_types::{ExpertId, LayerId};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    task::yield_now,
    time::{Instant, timeout_at},
};

use crate::{
    Combined, DispatchError, ExpertRequest,
    core::{Core, Whom},
    health::SizeClass,
    link::{Arrival, Waiter},
    run_plan::RunPlan,
    stats::FailureReason,
};
use failure::Failure;
use unit::{Call, Role, State, Unit};

/// Most messages that carry one row's work, one after another.
const MAX_ATTEMPTS: u32 = 3;

/// One layer's dispatch under way.
#[derive(Debug)]
pub(crate) struct Dispatch {
    core: Arc<Core>,
    plan: Arc<RunPlan>,
    layer: LayerId,
    activations: Activations,
    routing: Routing,
    begun: Instant,
    sums: PartialSums,
    units: Vec<Unit>,
    calls: Vec<Call>,
    /// Units that are not hedges and have no answer yet.
    open: usize,
    outgoing: VecDeque<Outgoing>,
    /// Work for this process.
    local: Vec<Assignment>,
    /// Whether it has been handed out and not come back.
    local_under_way: bool,
    /// Experts that are left out.
    lost: BTreeSet<ExpertId>,
    arrive: mpsc::Sender<Arrival>,
    arrivals: mpsc::Receiver<Arrival>,
}

/// A request that waits for room in its connection's queue.
#[derive(Debug)]
struct Outgoing {
    call: usize,
    requests: mpsc::Sender<v1::ExecuteRequest>,
    request: v1::ExecuteRequest,
}

/// What a dispatch needs next.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Nothing: all is there.
    Done,
    /// That its caller computes this work, ascending by row, and gives the sums to [`Dispatch::add_local`].
    Local(Vec<Assignment>),
}

impl Dispatch {
    /// Plans the layer and prepares its messages; [`Dispatch::flush`] sends them.
    pub(crate) fn begin(core: &Arc<Core>, request: ExpertRequest) -> Result<Self, DispatchError> {
        let ExpertRequest {
            layer,
            activations,
            routing,
        } = request;
        if !core.admission.limits().is_moe_layer(layer) {
            return Err(DispatchError::NotMoe { layer });
        }
        // Each assignment is sent at most `MAX_ATTEMPTS` times and hedged as often, each time with one answer; the same
        // again each time that experts are left out. The channel allocates only what is used.
        let most_calls = 2 * (MAX_ATTEMPTS as usize + 1) * (routing.expert_ids.len() + 1) * (routing.top_k + 1);
        let (arrive, arrivals) = mpsc::channel(most_calls);
        let mut dispatch = Self {
            plan: core.plan.load_full(),
            core: Arc::clone(core),
            layer,
            sums: PartialSums::zeros(core.numerics.combine, activations.rows(), activations.cols()),
            activations,
            routing,
            begun: Instant::now(),
            units: Vec::new(),
            calls: Vec::new(),
            open: 0,
            outgoing: VecDeque::new(),
            local: Vec::new(),
            local_under_way: false,
            lost: BTreeSet::new(),
            arrive,
            arrivals,
        };
        core.totals.dispatches.add(1);
        core.loads.lock().record(dispatch.begun, layer, &dispatch.routing);
        dispatch.place(dispatch.wanted(), &[], 1, None)?;
        core.retries.lock().earn(dispatch.calls.len());
        core.hedges.lock().earn(dispatch.calls.len());
        Ok(dispatch)
    }

    /// Bytes of rows that wait to be sent.
    pub(crate) fn outgoing_bytes(&self) -> usize {
        self.outgoing.iter().map(|it| it.request.hidden_states.len()).sum()
    }

    /// Hands messages to their connections as far as there is room.
    pub(crate) fn flush(&mut self) {
        let waiting = self.outgoing.len();
        for _ in 0..waiting {
            let Some(Outgoing {
                call,
                requests,
                request,
            }) = self.outgoing.pop_front()
            else {
                return;
            };
            if !self.calls[call].open {
                continue;
            }
            // Closed: when the connection has just ended, the waiter has been told, or is being told, why.
            if let Err(TrySendError::Full(request)) = requests.try_send(request) {
                self.outgoing.push_back(Outgoing {
                    call,
                    requests,
                    request,
                });
            }
        }
    }

    /// Waits until all answers are there, or something is to be computed here. Asks again what failed or takes long.
    /// Never waits beyond the dispatch's deadline. `patience` is how long to look for an answer before sleeping.
    pub(crate) async fn advance(&mut self, patience: Duration) -> Result<Progress, DispatchError> {
        loop {
            self.flush();
            if !self.local.is_empty() {
                self.local_under_way = true;
                let mut work = std::mem::take(&mut self.local);
                work.sort_by_key(|work| (work.row, work.expert, work.blocks));
                return Ok(Progress::Local(work));
            }
            if self.open == 0 && !self.local_under_way {
                return Ok(Progress::Done);
            }
            let wake = self.next_wake();
            let receiving = timeout_at(wake, spin_then_wait(patience, self.arrivals.recv()));
            match receiving.await {
                Ok(Some(arrival)) => self.accept(arrival)?,
                Ok(None) => unreachable!("the dispatch holds a sender itself"),
                Err(_) => {
                    if !self.read_what_came().await? {
                        self.look_at_the_clock()?;
                    }
                }
            }
        }
    }

    /// Takes the sums of work that [`Progress::Local`] handed out, `[rows of the layer, hidden]`.
    pub(crate) fn add_local(&mut self, work: &[Assignment], sums: &PartialSums) -> Result<(), DispatchError> {
        if !self.local_under_way {
            return Ok(()); // the dispatch began anew meanwhile
        }
        self.local_under_way = false;
        self.core.totals.local_assignments.add(work.len());
        let rows: Vec<u32> = (0..self.activations.rows() as u32).collect();
        self.add(&rows, sums, "this process")
    }

    /// Model layer.
    pub(crate) fn layer(&self) -> LayerId {
        self.layer
    }

    /// Rounded rows, `[tokens, hidden]`.
    pub(crate) fn activations(&self) -> &Activations {
        &self.activations
    }

    /// The result, once [`Progress::Done`] has been told.
    pub(crate) fn combined(&self) -> Combined {
        Combined {
            hidden_states: self.sums.to_f32(),
            degraded_rows: self.count_skipped(),
        }
    }

    /// While nobody looked, the runtime may not have turned: lets it read its sockets before anything is called late.
    async fn read_what_came(&mut self) -> Result<bool, DispatchError> {
        for _ in 0..3 {
            yield_now().await;
        }
        let mut any = false;
        while let Ok(arrival) = self.arrivals.try_recv() {
            self.accept(arrival)?;
            any = true;
        }
        Ok(any)
    }

    /// Sends work (ascending by row, which counts within the layer) to live holders that are not in `tried`; what they do
    /// not take goes to the next resort, for which `cause` says what led here.
    fn place(
        &mut self,
        work: Vec<Assignment>,
        tried: &[usize],
        attempt: u32,
        cause: Option<&DispatchError>,
    ) -> Result<(), DispatchError> {
        let mut waiting = vec![(work, tried.to_vec())];
        while let Some((work, tried)) = waiting.pop() {
            let given = self.core.give_out(&self.plan, self.layer, &work, &tried, Whom::AnyLive);
            let parts = self.cut(given.batches);
            if attempt > 1 && !parts.is_empty() && !self.core.retries.lock().spend(parts.len(), Instant::now()) {
                self.core.totals.retry_budget_exhausted.add(1);
                tracing::warn!(layer = self.layer.0, "the budget for retries is used up");
                self.resort(work, cause)?;
                return Ok(());
            }
            if !given.unheld.is_empty() && self.resort(given.unheld, cause)? == resort::Taken::Anew {
                return Ok(());
            }
            for part in parts {
                let rows = part.rows.len();
                match self.ask(part, &tried, attempt, Role::Own) {
                    Ok(()) if attempt > 1 => {
                        self.core.totals.retries.add(1);
                        self.core.totals.retried_rows.add(rows);
                    }
                    Ok(()) => self.core.totals.calls.add(1),
                    // It went down between the choice and now.
                    Err(part) => waiting.push((part.work(), [&tried[..], &[part.worker]].concat())),
                }
            }
        }
        Ok(())
    }

    /// Cuts what each worker is asked into messages; one of each worker first, so that none waits for another's long one.
    fn cut(&self, batches: Vec<WorkerBatch>) -> Vec<WorkerBatch> {
        let mut parts: Vec<(usize, WorkerBatch)> = Vec::with_capacity(batches.len());
        for batch in batches {
            let mut most_assignments = 0;
            for same_row in batch.assignments.chunk_by(|one, next| one.row == next.row) {
                most_assignments = most_assignments.max(same_row.len());
            }
            let row_bytes = request_cost_bytes(self.activations.format(), self.activations.cols(), most_assignments);
            let max_rows = (MAX_EXECUTE_BYTES / row_bytes.max(1)).clamp(1, self.core.admission.limits().max_rows);
            parts.extend(batch.split(max_rows).into_iter().enumerate());
        }
        parts.sort_by_key(|&(turn, _)| turn);
        parts.into_iter().map(|(_, part)| part).collect()
    }

    /// Prepares one message; gives the work back if its worker is down.
    fn ask(&mut self, batch: WorkerBatch, tried: &[usize], attempt: u32, role: Role) -> Result<(), WorkerBatch> {
        let member = Arc::clone(&self.plan.members[batch.worker]);
        let (call, unit) = (self.calls.len(), self.units.len());
        let waiter = Waiter {
            call,
            arrivals: self.arrive.clone(),
        };
        let Ok(registered) = member.link.register(waiter) else {
            return Err(batch);
        };
        let (request_id, assignments) = (registered.request_id, batch.assignments.len());
        let class = SizeClass::of(assignments);
        let mut request = encode_request(
            request_id,
            self.layer,
            &self.activations,
            &batch.rows,
            &batch.assignments,
            self.deadline().saturating_duration_since(Instant::now()),
        );
        let sealed = speaks_checksums(registered.protocol_version);
        if sealed {
            seal_request(&mut request);
        }
        let (hedge_after, overdue_after) = member.sent(class, assignments, self.core.dispatch_deadline);
        self.calls.push(Call {
            unit,
            member,
            request_id,
            sent: Instant::now(),
            class,
            assignments,
            sealed,
            open: true,
            hedge_after: matches!(role, Role::Own).then_some(hedge_after),
            overdue_after,
        });
        self.open += usize::from(matches!(role, Role::Own));
        self.units.push(Unit {
            batch,
            tried: tried.to_vec(),
            attempt,
            role,
            call,
            hedges: Vec::new(),
            state: State::Open,
        });
        self.outgoing.push_back(Outgoing {
            call,
            requests: registered.requests,
            request,
        });
        Ok(())
    }

    fn deadline(&self) -> Instant {
        self.begun + self.core.dispatch_deadline
    }

    fn close(&mut self, unit: usize) {
        let unit = &mut self.units[unit];
        if matches!(unit.state, State::Open) && matches!(unit.role, Role::Own) {
            self.open -= 1;
        }
        unit.state = State::Closed;
    }

    /// The call of `unit` has failed: a hedge that is under way takes its place, or its work is sent to others.
    fn failed(&mut self, unit: usize, failure: Failure) -> Result<(), DispatchError> {
        if let Role::HedgeOf(first) = self.units[unit].role {
            self.abandon_hedges(first);
            return Ok(());
        }
        if !self.units[unit].hedges.is_empty() {
            return self.promote_hedges(unit);
        }
        self.close(unit);
        let Unit {
            batch, tried, attempt, ..
        } = &self.units[unit];
        let (work, attempt) = (batch.work(), *attempt);
        let tried = [&tried[..], &[batch.worker]].concat();
        let Failure { reason, error } = failure;
        let most = match reason {
            FailureReason::Invalid => return Err(error), // our own fault: others would say the same
            // If two say so, it is the rows.
            FailureReason::TermOutOfRange => 2,
            _ => MAX_ATTEMPTS,
        };
        if attempt < most {
            self.place(work, &tried, attempt + 1, Some(&error))
        } else {
            self.resort(work, Some(&error)).map(|_| ())
        }
    }

    /// All work of the layer but that of lost experts, whose weight goes to the others of the row.
    fn wanted(&self) -> Vec<Assignment> {
        let num_blocks = self.plan.placement.num_blocks().into();
        let mut work: Vec<Assignment> = whole_assignments(&self.routing, num_blocks).collect();
        if self.lost.is_empty() {
            return work;
        }
        for of_row in work.chunk_by_mut(|one, next| one.row == next.row) {
            let kept = |work: &&Assignment| !self.lost.contains(&work.expert);
            let all: f32 = of_row.iter().map(|work| work.weight).sum();
            let left: f32 = of_row.iter().filter(kept).map(|work| work.weight).sum();
            if left != 0.0 && left != all {
                of_row.iter_mut().for_each(|work| work.weight *= all / left);
            }
        }
        work.retain(|work| !self.lost.contains(&work.expert));
        work
    }
}

impl Drop for Dispatch {
    fn drop(&mut self) {
        for call in 0..self.calls.len() {
            self.drop_call(call);
        }
    }
}
