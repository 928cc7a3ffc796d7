//! The simulated gateway: the real membership and dispatch, asked again and again.

use std::{sync::Arc, time::Duration};

use moerun_kernels::CpuPool;
use moerun_proto::v1::{self, admin_service_client::AdminServiceClient, get_stats_response::Role};
use moerun_transport::ClientProtection;
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    runtime::Handle,
    task::JoinSet,
    time::{Instant, sleep},
};

use super::{
    faults::Setup,
    network::{channel, connector, worker_address},
    parts::{Case, MEMBERS, numerics, parts},
};
use crate::{
    DispatchError, DispatchStats, OnExpertLoss,
    admission::Admission,
    canary::Canary,
    core::Core,
    dispatch::{Dispatch, Progress},
    local_resort::LocalResort,
    membership::{Membership, endpoints},
    run_plan::RunPlan,
};

/// Who asks at one time.
const CLIENTS: u64 = 2;
/// A dispatch's deadline; that of no call that another holder can answer comes near.
const DEADLINE: Duration = Duration::from_secs(8);
/// Longest that a dispatch may take where another holder lives: a connection that is dead is found in two seconds.
const LONGEST: Duration = Duration::from_secs(4);

/// What a run came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Ended {
    pub(super) violations: Vec<String>,
    /// How long each dispatch took, by client, in order.
    pub(super) trace: Vec<(u64, Duration)>,
    pub(super) longest: Duration,
    pub(super) simulated: Duration,
    pub(super) dispatches: u64,
    pub(super) calls: u64,
    pub(super) retries: u64,
    pub(super) hedges: u64,
    pub(super) connections_lost: u64,
    pub(super) late_answers: u64,
    pub(super) local_assignments: u64,
}

/// What the gateway and whoever breaks things tell each other.
#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    whole: bool,
    is_over: bool,
    members: Option<Vec<String>>,
    ended: Option<Ended>,
}

impl Shared {
    pub(super) fn is_whole(&self) -> bool {
        self.0.lock().whole
    }

    pub(super) fn end(&self) {
        self.0.lock().is_over = true;
    }

    /// The process that told this is gone.
    pub(super) fn forget(&self) {
        self.0.lock().whole = false;
    }

    /// These are the members from now on; whole is what those are.
    pub(super) fn set_members(&self, members: Vec<String>) {
        let mut state = self.0.lock();
        state.members = Some(members);
        state.whole = false;
    }

    pub(super) fn ended(&self) -> Option<Ended> {
        self.0.lock().ended.clone()
    }

    fn is_over(&self) -> bool {
        self.0.lock().is_over
    }
}

/// What one client saw.
#[derive(Debug, Default)]
struct Seen {
    violations: Vec<String>,
    trace: Vec<(u64, Duration)>,
}

/// The gateway's life.
pub(super) async fn run(setup: Setup, shared: Arc<Shared>) -> turmoil::Result {
    let core = core(setup);
    let protection = ClientProtection::default();
    let members: Vec<String> = (0..MEMBERS).map(worker_address).collect();
    let begun = Instant::now();
    let (membership, starting) = Membership::start(
        Arc::clone(&core),
        Canary::new(
            Arc::clone(&parts().checkpoint),
            numerics(),
            num_blocks(&core),
            Duration::from_secs(3600),
            connector(),
        ),
        connector(),
        Handle::current(),
        endpoints(&members, &protection)?,
        false,
    );
    membership.assembled(starting, Duration::from_secs(20)).await?;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        clients.spawn(ask(client, setup.seed, Arc::clone(&core), Arc::clone(&shared)));
    }
    while !shared.is_over() {
        let change = shared.0.lock().members.take();
        if let Some(members) = change {
            membership.replace(endpoints(&members, &protection)?)?;
        }
        let whole = membership.members().iter().all(|member| member.link.is_up());
        {
            let mut state = shared.0.lock();
            state.whole = whole && state.members.is_none();
        }
        sleep(Duration::from_millis(5)).await;
    }
    let mut ended = Ended::default();
    while let Some(seen) = clients.join_next().await {
        let seen = seen?;
        ended.violations.extend(seen.violations);
        ended.trace.extend(seen.trace);
    }
    // Clients end together, in no order.
    ended.trace.sort_by_key(|&(client, _)| client);
    ended.longest = ended.trace.iter().map(|&(_, took)| took).max().unwrap_or_default();
    ended.simulated = begun.elapsed();
    let stats = core.stats();
    ended.judge(&stats);
    ended.count(&stats, &membership);
    shared.0.lock().ended = Some(ended);
    Ok(())
}

/// Looks, after so long, whether each worker has the stream of one gateway and nothing under way.
pub(super) async fn nothing_is_left(after: Duration) -> turmoil::Result {
    sleep(after).await;
    for index in 0..MEMBERS {
        let mut client = AdminServiceClient::new(channel(index).await?);
        let response = client.get_stats(v1::GetStatsRequest {}).await?.into_inner();
        let Some(Role::Worker(worker)) = response.role else {
            return Err("not the figures of a worker".into());
        };
        if (worker.streams, worker.outstanding_requests) != (1, 0) {
            return Err(format!("something is left: {worker:?}").into());
        }
    }
    Ok(())
}

fn core(setup: Setup) -> Arc<Core> {
    let checkpoint = Arc::clone(&parts().checkpoint);
    let admission = Arc::new(Admission::new(Arc::clone(&checkpoint), numerics()));
    let num_blocks = admission.limits().num_blocks;
    let nobody = RunPlan::new(0, admission.config(), num_blocks, Vec::new()).unwrap();
    let (on_loss, local) = match setup.holders {
        1 => {
            let pool = Arc::new(CpuPool::new(1));
            let local = LocalResort::new(checkpoint, numerics(), num_blocks, pool, 1 << 24);
            (OnExpertLoss::Local, Some(Arc::new(local)))
        }
        _ => (OnExpertLoss::Fail, None),
    };
    Arc::new(Core::new(admission, nobody, setup.seed, DEADLINE, on_loss, local))
}

fn num_blocks(core: &Core) -> usize {
    core.admission.limits().num_blocks
}

/// Asks cases as they are drawn, with pauses, until it is over.
async fn ask(client: u64, seed: u64, core: Arc<Core>, shared: Arc<Shared>) -> Seen {
    let mut random = StdRng::seed_from_u64(seed << 8 | client);
    let (cases, mut seen) = (&parts().cases, Seen::default());
    while !shared.is_over() {
        sleep(Duration::from_millis(random.random_range(5..60))).await;
        let case = random.random_range(0..cases.len());
        let begun = Instant::now();
        let violation = match dispatch(&core, &cases[case]).await {
            Ok(bits) if bits == cases[case].bits => None,
            Ok(_) => Some("other bits".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        let took = begun.elapsed();
        let late = || (took > LONGEST).then(|| "too long".to_owned());
        if let Some(violation) = violation.or_else(late) {
            let number = seen.trace.len();
            let told = format!("client {client} dispatch {number} case {case} took {took:?}: {violation}");
            seen.violations.push(told);
        }
        seen.trace.push((client, took));
    }
    seen
}

/// One dispatch, as the façade drives it.
async fn dispatch(core: &Arc<Core>, case: &Case) -> Result<Vec<u32>, DispatchError> {
    let mut dispatch = Dispatch::begin(core, case.request.clone())?;
    loop {
        match dispatch.advance(Duration::ZERO).await? {
            Progress::Done => {
                let combined = dispatch.combined();
                return Ok(combined.hidden_states.iter().map(|value| value.to_bits()).collect());
            }
            Progress::Local(work) => {
                let local = core
                    .local
                    .as_ref()
                    .expect("work comes here only if there is somebody to compute it");
                let sums = local.run(dispatch.layer(), dispatch.activations(), &work)?;
                dispatch.add_local(&work, &sums)?;
            }
        }
    }
}

impl Ended {
    /// Budgets are kept and nothing is left under way.
    fn judge(&mut self, stats: &DispatchStats) {
        let DispatchStats {
            calls, retries, hedges, ..
        } = *stats;
        let seconds = self.simulated.as_secs_f64();
        let allowed = 100.0 + 0.2 * calls as f64 + 10.0 * seconds;
        if retries as f64 > allowed {
            self.violations.push(format!(
                "{retries} retries of {calls} calls in {seconds} s, wanted {allowed} at most"
            ));
        }
        let allowed = 4.0 + 0.05 * calls as f64;
        if hedges as f64 > allowed {
            self.violations
                .push(format!("{hedges} hedges of {calls} calls, wanted {allowed} at most"));
        }
        for worker in stats.workers.iter().filter(|worker| worker.assignments_in_flight > 0) {
            let left = worker.assignments_in_flight;
            self.violations
                .push(format!("{}: {left} assignments are left in flight", worker.address));
        }
    }

    fn count(&mut self, stats: &DispatchStats, membership: &Membership) {
        self.dispatches = stats.dispatches;
        self.calls = stats.calls;
        self.retries = stats.retries;
        self.hedges = stats.hedges;
        self.local_assignments = stats.local_assignments;
        self.late_answers = stats.workers.iter().map(|worker| worker.late_answers).sum();
        self.connections_lost = membership
            .members()
            .iter()
            .map(|member| member.counters.disconnections.get())
            .sum();
    }
}
