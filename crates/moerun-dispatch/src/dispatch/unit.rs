//! What a dispatch is made of: units of work, and the calls that carry them.

use std::{sync::Arc, time::Duration};

use moerun_routing::{PartialSums, WorkerBatch};
use tokio::time::Instant;

use crate::{health::SizeClass, member::Member};

/// Work that one message carries.
#[derive(Debug)]
pub(super) struct Unit {
    /// The work and to whom it went, by position in the plan.
    pub(super) batch: WorkerBatch,
    /// Members that failed on it before.
    pub(super) tried: Vec<usize>,
    /// From 1.
    pub(super) attempt: u32,
    pub(super) role: Role,
    /// Its message.
    pub(super) call: usize,
    /// Units that together do the same work, asked of others because this takes long.
    pub(super) hedges: Vec<usize>,
    pub(super) state: State,
}

/// Whose answer counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Its own.
    Own,
    /// Only together with the other hedges of that unit, and only if they are all there before its answer.
    HedgeOf(usize),
}

/// How far a unit is.
#[derive(Debug)]
pub(super) enum State {
    /// Its answer is waited for.
    Open,
    /// A hedge's answer, kept until the others are there.
    Kept(PartialSums),
    /// Answered and added, or given up.
    Closed,
}

/// One message to one worker.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) unit: usize,
    pub(super) member: Arc<Member>,
    /// On the member's link.
    pub(super) request_id: u64,
    pub(super) sent: Instant,
    pub(super) class: SizeClass,
    pub(super) assignments: usize,
    /// Whether its answer has a checksum.
    pub(super) sealed: bool,
    /// Whether its answer is waited for.
    pub(super) open: bool,
    /// When others are asked too; `None` if they are not, or have been.
    pub(super) hedge_after: Option<Duration>,
    /// When it is given up.
    pub(super) overdue_after: Duration,
}

impl Call {
    /// From when it is timed.
    pub(super) fn timed_from(&self) -> Instant {
        self.member.timed_from(self.sent)
    }

    /// When it is next to be looked at.
    pub(super) fn next_wake(&self) -> Instant {
        let after = self
            .hedge_after
            .map_or(self.overdue_after, |hedge| hedge.min(self.overdue_after));
        self.timed_from() + after
    }
}
