//! What comes back: opened, checked, added up.

use moerun_proto::{WireError, answer_is_intact, decode_response, v1};
use moerun_routing::PartialSums;

use super::{
    Dispatch,
    failure::Failure,
    unit::{Role, State},
};
use crate::{DispatchError, link::Arrival};

impl Dispatch {
    pub(super) fn accept(&mut self, arrival: Arrival) -> Result<(), DispatchError> {
        let call = &mut self.calls[arrival.call];
        if !call.open {
            return Ok(());
        }
        call.open = false;
        let unit = call.unit;
        let answer = match arrival.outcome {
            Err(reason) => Err(Failure::gone(call.member.address().to_owned(), reason)),
            Ok(response) => self.open_answer(arrival.call, &response),
        };
        let call = &self.calls[arrival.call];
        match answer {
            Ok(sums) => {
                let from = arrival.previous.map_or(call.sent, |previous| previous.max(call.sent));
                let took = arrival.at.saturating_duration_since(from);
                call.member.succeeded(arrival.at, call.class, took, call.assignments);
                self.answered(unit, sums)
            }
            Err(failure) => {
                call.member.failed(arrival.at, failure.reason, call.assignments);
                self.failed(unit, failure)
            }
        }
    }

    /// The partial sums in an answer, `[rows of the call, hidden]`, or what is wrong with it.
    pub(super) fn open_answer(&self, call: usize, response: &v1::ExecuteResponse) -> Result<PartialSums, Failure> {
        let call = &self.calls[call];
        let worker = || call.member.address().to_owned();
        if call.sealed && !answer_is_intact(response) {
            return Err(Failure::corrupted_answer(worker(), self.layer));
        }
        let (mode, rows) = (self.core.numerics.combine, self.units[call.unit].batch.rows.len());
        let reply = decode_response(response, mode, rows, self.activations.cols())
            .map_err(|source| Failure::malformed(worker(), source))?;
        let sums = reply
            .outcome
            .map_err(|failure| Failure::of(worker(), self.layer, self.core.dispatch_deadline, failure))?;
        match sums.first_not_finite() {
            None => Ok(sums),
            Some(value) => Err(Failure::malformed(
                worker(),
                WireError::new("partial_sums", "finite sums", value),
            )),
        }
    }

    pub(super) fn answered(&mut self, unit: usize, sums: PartialSums) -> Result<(), DispatchError> {
        match self.units[unit].role {
            Role::HedgeOf(first) => {
                self.units[unit].state = State::Kept(sums);
                self.settle_hedge(first)
            }
            Role::Own => {
                self.abandon_hedges(unit);
                self.close(unit);
                let rows = std::mem::take(&mut self.units[unit].batch.rows);
                self.add(&rows, &sums, "a worker")
            }
        }
    }

    /// Wrapping 64-bit sums: the order of arrival cannot change the text, so a reply is added as it comes.
    pub(super) fn add(&mut self, rows: &[u32], sums: &PartialSums, whose: &str) -> Result<(), DispatchError> {
        self.sums.add_rows(rows, sums).map_err(|error| {
            let wanted = format!("{} rows x {}", rows.len(), self.activations.cols());
            DispatchError::Malformed {
                worker: whose.to_owned(),
                source: WireError::new("partial_sums", wanted, error),
            }
        })
    }
}
