//! When no holder is left: this process computes, the expert is left out, or the dispatch fails.

use std::collections::BTreeSet;

use moerun_routing::{Assignment, PartialSums};
use moerun_types::ExpertSlice;
use tokio::time::Instant;

use super::{Dispatch, MAX_ATTEMPTS, unit::State};
use crate::{DispatchError, OnExpertLoss, core::Whom};

/// What became of work that no holder takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// This process computes it.
    Here,
    /// Its experts are left out: the dispatch has begun anew.
    Anew,
}

impl Dispatch {
    /// Takes work for which no holder is left; `cause` is what the last one failed with.
    pub(super) fn resort(
        &mut self,
        work: Vec<Assignment>,
        cause: Option<&DispatchError>,
    ) -> Result<Taken, DispatchError> {
        if self.can_compute(&work) {
            tracing::debug!(
                layer = self.layer.0,
                assignments = work.len(),
                "computed here for want of a holder"
            );
            self.local.extend(work);
            return Ok(Taken::Here);
        }
        if self.core.on_loss == OnExpertLoss::Skip {
            self.lost.extend(work.iter().map(|work| work.expert));
            self.begin_anew()?;
            return Ok(Taken::Anew);
        }
        Err(match (cause, work.first()) {
            (Some(cause), _) => cause.clone(),
            (None, Some(work)) => self.unavailable(work),
            (None, None) => DispatchError::NotMoe { layer: self.layer },
        })
    }

    /// Whether the work of `unit` could be done by somebody who has not been asked for it yet.
    pub(super) fn has_alternative(&self, unit: usize) -> bool {
        let unit = &self.units[unit];
        if !unit.hedges.is_empty() {
            return true;
        }
        let tried = [&unit.tried[..], &[unit.batch.worker]].concat();
        let work = unit.batch.work();
        let may_retry = unit.attempt < MAX_ATTEMPTS && self.core.retries.lock().allows_one(Instant::now());
        let unheld = if may_retry {
            self.core
                .give_out(&self.plan, self.layer, &work, &tried, Whom::AnyLive)
                .unheld
        } else {
            work
        };
        unheld.is_empty() || self.can_compute(&unheld) || self.core.on_loss == OnExpertLoss::Skip
    }

    fn can_compute(&self, work: &[Assignment]) -> bool {
        match &self.core.local {
            Some(local) if self.core.on_loss == OnExpertLoss::Local => {
                work.iter().all(|work| local.has(self.layer, work.expert))
            }
            _ => false,
        }
    }

    /// The work of lost experts may be divided among several workers, so all is asked again without them.
    fn begin_anew(&mut self) -> Result<(), DispatchError> {
        for call in 0..self.calls.len() {
            self.drop_call(call);
        }
        for unit in &mut self.units {
            unit.state = State::Closed;
        }
        self.open = 0;
        self.outgoing.clear();
        self.local.clear();
        self.local_under_way = false;
        self.sums = PartialSums::zeros(self.sums.mode(), self.activations.rows(), self.activations.cols());
        self.place(self.wanted(), &[], 1, None)
    }

    /// Rows that lost an expert, ascending; counts what they lost.
    pub(super) fn count_skipped(&self) -> Vec<u32> {
        if self.lost.is_empty() {
            return Vec::new();
        }
        let choices = self.routing.expert_ids.iter().enumerate();
        let skipped = choices.filter(|(_, expert)| self.lost.contains(expert));
        let rows: Vec<u32> = skipped.map(|(index, _)| (index / self.routing.top_k) as u32).collect();
        self.core.totals.skipped_assignments.add(rows.len());
        tracing::debug!(layer = self.layer.0, experts = ?self.lost, rows = rows.len(), "experts were left out");
        rows.into_iter().collect::<BTreeSet<u32>>().into_iter().collect()
    }

    /// Why nobody could be asked for `work` in the first place.
    fn unavailable(&self, work: &Assignment) -> DispatchError {
        let slice = ExpertSlice {
            layer: self.layer,
            expert: work.expert,
            blocks: work.blocks,
        };
        let holders = self.plan.placement.holders_of(slice);
        let down = holders.iter().map(|&holder| {
            let member = &self.plan.members[holder];
            let reason = member.link.down_reason();
            (
                member.address(),
                reason.unwrap_or_else(|| "it has just come back".to_owned()),
            )
        });
        match &down.collect::<Vec<_>>()[..] {
            [(worker, reason)] => DispatchError::WorkerDown {
                worker: (*worker).to_owned(),
                layer: self.layer,
                reason: reason.clone(),
            },
            several => {
                let each: Vec<String> = several
                    .iter()
                    .map(|(worker, reason)| format!("worker {worker} is down: {reason}"))
                    .collect();
                DispatchError::ExpertUnavailable {
                    layer: self.layer,
                    expert: work.expert,
                    blocks: work.blocks,
                    reason: if each.is_empty() {
                        "no worker was given it".to_owned()
                    } else {
                        each.join("; ")
                    },
                }
            }
        }
    }
}
