//! Known inputs: whether a worker that answers also answers rightly.
//!
//! Two rows that follow from layer and expert go to one held slice at a time, by turns. What they should give is computed
//! from the gateway's own checkpoint where that has the expert, else asked of other holders.

use std::{sync::Arc, time::Duration};

use moerun_kernels::{Activations, CpuPool};
use moerun_proto::{decode_response, encode_request, seal_request, speaks_checksums, v1};
use moerun_routing::{Assignment, PartialSums};
use moerun_types::{ExpertSlice, Numerics};
use moerun_weights::Checkpoint;
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::{
    Connector, DispatchError,
    core::Core,
    link::Waiter,
    local_resort::LocalResort,
    member::Member,
    session::{Session, SessionError},
};

/// Rows of a known input.
const ROWS: usize = 2;
/// Their routing weight.
const WEIGHT: f32 = 0.5;
/// How long an answer may take. A late one is not a wrong one.
const PATIENCE: Duration = Duration::from_secs(10);
/// In fast mode sums need only be close.
const FAST_TOLERANCE: f32 = 1e-3;

/// Compares answers to known inputs with what they should be.
#[derive(Debug)]
pub(crate) struct Canary {
    reference: Arc<LocalResort>,
    numerics: Numerics,
    hidden: usize,
    interval: Duration,
    connector: Connector,
}

impl Canary {
    /// Asks each worker once every `interval`.
    pub(crate) fn new(
        checkpoint: Arc<Checkpoint>,
        numerics: Numerics,
        num_blocks: usize,
        interval: Duration,
        connector: Connector,
    ) -> Self {
        let hidden = checkpoint.config().hidden;
        // One thread and no memory of experts: it is not to be noticed.
        let pool = Arc::new(CpuPool::new(1));
        Self {
            reference: Arc::new(LocalResort::new(checkpoint, numerics, num_blocks, pool, 0)),
            numerics,
            hidden,
            interval,
            connector,
        }
    }

    /// Asks a worker that is about to be admitted, on its new stream, for the slice whose turn it is.
    pub(crate) async fn admit(&self, core: &Core, member: &Member, session: &mut Session) -> Result<(), SessionError> {
        let Some(slice) = member.canary_slice(&session.identity.held) else {
            return Ok(());
        };
        let request_id = member.link.reserve_id();
        let request = self.request(request_id, slice, session.identity.protocol_version);
        let asking = async {
            session.requests.send(request).await.ok()?;
            session.replies.message().await.ok()?
        };
        let answer = match timeout(PATIENCE, asking).await {
            Ok(Some(answer)) if answer.request_id == request_id => answer,
            _ => return Err(SessionError::NotYet(format!("no answer to a known input on {slice}"))),
        };
        core.totals.canaries.add(1);
        if self.is_wrong(core, member, slice, &answer).await {
            self.count(core, member, slice);
            return Err(SessionError::Refused(DispatchError::WrongAnswer {
                worker: member.address().to_owned(),
                slice,
            }));
        }
        Ok(())
    }

    /// Asks a connected worker again and again, and ends its connection when it answers wrongly: it is admitted anew only
    /// once it answers rightly.
    pub(crate) async fn watch(&self, core: &Core, member: &Member) -> std::convert::Infallible {
        loop {
            sleep(self.interval).await;
            if member.is_drained() {
                continue; // it gets no calls
            }
            let held = member.announced().unwrap_or_default();
            member.next_canary();
            let Some(slice) = member.canary_slice(&held) else {
                continue;
            };
            let Some(answer) = self.ask(member, slice).await else {
                continue;
            };
            core.totals.canaries.add(1);
            if self.is_wrong(core, member, slice, &answer).await {
                self.count(core, member, slice);
                member.cut(format!("it answered a known input on {slice} wrongly"));
            }
        }
    }

    /// Asks a connected worker for something that it has just come to hold, before anybody else does.
    pub(crate) async fn check(&self, core: &Core, member: &Member, slice: ExpertSlice) -> Result<(), DispatchError> {
        let Some(answer) = self.ask(member, slice).await else {
            return Err(DispatchError::CannotHold {
                worker: member.address().to_owned(),
                message: format!("no answer to a known input on {slice}"),
            });
        };
        core.totals.canaries.add(1);
        if !self.is_wrong(core, member, slice, &answer).await {
            return Ok(());
        }
        self.count(core, member, slice);
        member.cut(format!("it answered a known input on {slice} wrongly"));
        Err(DispatchError::WrongAnswer {
            worker: member.address().to_owned(),
            slice,
        })
    }

    fn count(&self, core: &Core, member: &Member, slice: ExpertSlice) {
        core.totals.canary_failures.add(1);
        member.counters.canary_failures.add(1);
        tracing::error!(
            worker = member.address(),
            "worker is quarantined: it answered a known input on {slice} wrongly"
        );
    }

    /// The answer of a connected worker; `None` if there is none.
    async fn ask(&self, member: &Member, slice: ExpertSlice) -> Option<v1::ExecuteResponse> {
        let (arrivals, mut arrived) = mpsc::channel(1);
        let registered = member.link.register(Waiter { call: 0, arrivals }).ok()?;
        let request = self.request(registered.request_id, slice, registered.protocol_version);
        let asking = async {
            registered.requests.send(request).await.ok()?;
            arrived.recv().await
        };
        match timeout(PATIENCE, asking).await {
            Ok(arrival) => arrival?.outcome.ok(),
            Err(_) => {
                member.link.forget(registered.request_id);
                None
            }
        }
    }

    /// Whether the answer differs from what is known to be right. Where nobody can tell, it does not.
    async fn is_wrong(&self, core: &Core, member: &Member, slice: ExpertSlice, answer: &v1::ExecuteResponse) -> bool {
        let Some(found) = self.sums(answer) else {
            return false; // a failure, which says so itself
        };
        if self.reference.has(slice.layer, slice.expert) {
            let (reference, activations, work) = (Arc::clone(&self.reference), self.input(slice), work(slice));
            let expected = self
                .connector
                .aside(move || reference.run(slice.layer, &activations, &work))
                .await;
            return match expected {
                Ok(Ok(expected)) => !agree(&found, &expected),
                Ok(Err(_)) | Err(_) => false,
            };
        }
        self.is_outvoted(core, member, slice, &found).await
    }

    /// Whether other holders agree with each other against `found`. One other alone is believed only against a newcomer:
    /// between two of equal standing nobody can tell.
    async fn is_outvoted(&self, core: &Core, member: &Member, slice: ExpertSlice, found: &PartialSums) -> bool {
        let plan = core.plan.load_full();
        let mut against: Option<PartialSums> = None;
        for holder in plan.placement.holders_of(slice) {
            let other = &plan.members[holder];
            if other.address() == member.address() {
                continue;
            }
            let Some(theirs) = self.ask(other, slice).await.and_then(|answer| self.sums(&answer)) else {
                continue;
            };
            if agree(found, &theirs) {
                return false;
            }
            match &against {
                Some(before) if agree(before, &theirs) => return true,
                Some(_) => {}
                None => against = Some(theirs),
            }
        }
        if against.is_some() && member.link.is_up() {
            core.totals.canary_failures.add(1);
            tracing::error!(
                worker = member.address(),
                "holders differ on a known input on {slice}, and nobody can tell who is right"
            );
            return false;
        }
        against.is_some()
    }

    fn request(&self, request_id: u64, slice: ExpertSlice, protocol_version: u32) -> v1::ExecuteRequest {
        let rows: Vec<u32> = (0..ROWS as u32).collect();
        let mut request = encode_request(
            request_id,
            slice.layer,
            &self.input(slice),
            &rows,
            &work(slice),
            PATIENCE,
        );
        if speaks_checksums(protocol_version) {
            seal_request(&mut request);
        }
        request
    }

    /// Two rows that follow from layer and expert.
    fn input(&self, slice: ExpertSlice) -> Activations {
        let seed = u64::from(slice.layer.0) << 16 | u64::from(slice.expert.0);
        let mut random = StdRng::seed_from_u64(seed);
        let rows = Array2::from_shape_simple_fn((ROWS, self.hidden), || random.random_range(-1.0f32..1.0));
        Activations::round(self.numerics.format.activations(), rows.view())
    }

    fn sums(&self, answer: &v1::ExecuteResponse) -> Option<PartialSums> {
        decode_response(answer, self.numerics.combine, ROWS, self.hidden)
            .ok()?
            .outcome
            .ok()
    }
}

fn work(slice: ExpertSlice) -> Vec<Assignment> {
    let assignment = |row| Assignment {
        row,
        expert: slice.expert,
        blocks: slice.blocks,
        weight: WEIGHT,
    };
    (0..ROWS as u32).map(assignment).collect()
}

fn agree(one: &PartialSums, other: &PartialSums) -> bool {
    match (one, other) {
        (PartialSums::Fast { sums: one, .. }, PartialSums::Fast { sums: other, .. }) => {
            let close = |(one, other): (&f32, &f32)| (one - other).abs() <= FAST_TOLERANCE * (1.0 + other.abs());
            one.len() == other.len() && one.iter().zip(other).all(close)
        }
        _ => one == other,
    }
}
