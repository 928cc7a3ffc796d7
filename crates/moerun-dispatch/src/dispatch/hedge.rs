//! Asking others too while a call takes long: whoever is there first counts.

use tokio::time::Instant;

use super::{
    Dispatch,
    unit::{Role, State},
};
use crate::{DispatchError, core::Whom, stats::FailureReason};

impl Dispatch {
    /// Asks good holders for the work of a call that takes long, if there are any and the budget allows.
    pub(super) fn hedge(&mut self, call: usize, now: Instant) {
        let unit = self.calls[call].unit;
        if self.units[unit].role != Role::Own || !self.units[unit].hedges.is_empty() {
            return;
        }
        let batch = &self.units[unit].batch;
        let tried = [&self.units[unit].tried[..], &[batch.worker]].concat();
        let given = self
            .core
            .give_out(&self.plan, self.layer, &batch.work(), &tried, Whom::OnlyGood);
        let parts = self.cut(given.batches);
        if !given.unheld.is_empty() || !self.core.hedges.lock().spend(parts.len(), now) {
            return;
        }
        let attempt = self.units[unit].attempt + 1;
        for part in parts {
            let hedge = self.units.len();
            if self.ask(part, &tried, attempt, Role::HedgeOf(unit)).is_err() {
                // Without this part the others are no use.
                self.abandon_hedges(unit);
                return;
            }
            self.core.totals.hedges.add(1);
            self.units[unit].hedges.push(hedge);
        }
        tracing::debug!(
            worker = self.calls[call].member.address(),
            layer = self.layer.0,
            "an answer takes long: others are asked too"
        );
    }

    /// If all hedges of `unit` are answered, they take its place, and its own call has lost.
    pub(super) fn settle_hedge(&mut self, unit: usize) -> Result<(), DispatchError> {
        let kept = |&hedge: &usize| matches!(self.units[hedge].state, State::Kept(_));
        if !self.units[unit].hedges.iter().all(kept) {
            return Ok(());
        }
        self.core.totals.hedges_won.add(1);
        self.give_up(self.units[unit].call, Instant::now(), FailureReason::LostToHedge);
        self.close(unit);
        for hedge in std::mem::take(&mut self.units[unit].hedges) {
            self.add_kept(hedge)?;
        }
        Ok(())
    }

    /// The call of `unit` has failed while hedges were under way: they go on as work of their own.
    pub(super) fn promote_hedges(&mut self, unit: usize) -> Result<(), DispatchError> {
        self.close(unit);
        for hedge in std::mem::take(&mut self.units[unit].hedges) {
            self.units[hedge].role = Role::Own;
            match self.units[hedge].state {
                State::Open => self.open += 1,
                State::Kept(_) => self.add_kept(hedge)?,
                State::Closed => {}
            }
        }
        Ok(())
    }

    /// The hedges of `unit` are not wanted any more.
    pub(super) fn abandon_hedges(&mut self, unit: usize) {
        for hedge in std::mem::take(&mut self.units[unit].hedges) {
            self.units[hedge].state = State::Closed;
            self.drop_call(self.units[hedge].call);
        }
    }

    fn add_kept(&mut self, hedge: usize) -> Result<(), DispatchError> {
        let unit = &mut self.units[hedge];
        let rows = std::mem::take(&mut unit.batch.rows);
        match std::mem::replace(&mut unit.state, State::Closed) {
            State::Kept(sums) => self.add(&rows, &sums, "a worker"),
            State::Open | State::Closed => Ok(()),
        }
    }
}
