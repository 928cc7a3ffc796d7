//! What time brings about: others are asked too, or a call is given up.

use std::time::Duration;

use tokio::time::Instant;

use super::{Dispatch, failure::Failure};
use crate::{DispatchError, stats::FailureReason};

/// How soon a queue that was full is looked at again.
const QUEUE_RETRY: Duration = Duration::from_millis(1);
/// How soon an overdue call is looked at again that could not be given up.
const OVERDUE_RETRY: Duration = Duration::from_millis(100);

impl Dispatch {
    /// When something is next to be done if nothing comes.
    pub(super) fn next_wake(&self) -> Instant {
        let mut wake = self.deadline();
        if !self.outgoing.is_empty() {
            wake = wake.min(Instant::now() + QUEUE_RETRY);
        }
        for call in self.calls.iter().filter(|call| call.open) {
            wake = wake.min(call.next_wake());
        }
        wake
    }

    /// Hedges what takes long and gives up what is overdue.
    pub(super) fn look_at_the_clock(&mut self) -> Result<(), DispatchError> {
        let now = Instant::now();
        if now >= self.deadline() {
            let late = self.calls.iter().find(|call| call.open);
            return Err(DispatchError::DeadlineExceeded {
                worker: late.map(|call| call.member.address().to_owned()).unwrap_or_default(),
                layer: self.layer,
                deadline: self.core.dispatch_deadline,
            });
        }
        for call in 0..self.calls.len() {
            if !self.calls[call].open {
                continue;
            }
            let waited = now.saturating_duration_since(self.calls[call].timed_from());
            if waited >= self.calls[call].overdue_after {
                self.overdue(call, now)?;
            } else if self.calls[call].hedge_after.is_some_and(|after| waited >= after) {
                self.calls[call].hedge_after = None;
                self.hedge(call, now);
            }
        }
        Ok(())
    }

    /// Gives an overdue call up if somebody else can answer; the last resort is waited for until the deadline.
    pub(super) fn overdue(&mut self, call: usize, now: Instant) -> Result<(), DispatchError> {
        let unit = self.calls[call].unit;
        if !self.has_alternative(unit) {
            self.calls[call].overdue_after += OVERDUE_RETRY;
            return Ok(());
        }
        self.give_up(call, now, FailureReason::Overdue);
        let call = &self.calls[call];
        let error = DispatchError::DeadlineExceeded {
            worker: call.member.address().to_owned(),
            layer: self.layer,
            deadline: call.overdue_after,
        };
        let reason = FailureReason::Overdue;
        self.failed(unit, Failure { reason, error })
    }

    /// Waits no more for a call, which counts against its worker.
    pub(super) fn give_up(&mut self, call: usize, now: Instant, reason: FailureReason) {
        let call = &mut self.calls[call];
        call.open = false;
        call.member.link.forget(call.request_id);
        let waited = now.saturating_duration_since(call.timed_from());
        call.member.overdue(now, reason, call.class, waited, call.assignments);
    }

    /// Waits no more for a call, for a reason that is not its worker's.
    pub(super) fn drop_call(&mut self, call: usize) {
        let call = &mut self.calls[call];
        if std::mem::replace(&mut call.open, false) {
            call.member.link.forget(call.request_id);
            call.member.dropped(call.assignments);
        }
    }
}
