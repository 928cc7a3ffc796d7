//! A dispatch under way: its parts, and the sum of what has come back.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use moerun_process::{DataPlane, spin_then_wait};
use moerun_proto::{ExecuteFailure, decode_response};
use moerun_routing::PartialSums;
use moerun_types::{CombineMode, LayerId};
use ndarray::Array2;
use tokio::{sync::mpsc::Receiver, time::timeout};

use crate::{
    DispatchError, PendingExperts,
    link::{Arrival, Link},
};

/// One message of a dispatch.
#[derive(Debug)]
pub(crate) struct Part {
    /// To whom it went.
    pub(crate) link: Arc<Link>,
    /// Its id on that link.
    pub(crate) request_id: u64,
    /// Rows of the layer's activations that it carried.
    pub(crate) rows: Vec<u32>,
    /// Whether its answer has come.
    pub(crate) answered: bool,
}

/// A dispatch whose messages have all been sent.
#[derive(Debug)]
pub(crate) struct PendingRemote {
    /// Model layer.
    pub(crate) layer: LayerId,
    /// Rows of the layer's activations.
    pub(crate) tokens: usize,
    /// Length of a row.
    pub(crate) hidden: usize,
    /// How partial sums are added.
    pub(crate) mode: CombineMode,
    /// When it was begun.
    pub(crate) begun: Instant,
    /// How long it may take.
    pub(crate) deadline: Duration,
    /// Its messages.
    pub(crate) parts: Vec<Part>,
    /// Where answers come.
    pub(crate) arrivals: Receiver<Arrival>,
    /// Moves the messages.
    pub(crate) data_plane: Arc<DataPlane>,
    /// Who drives it while the answers are waited for.
    pub(crate) driver: Driver,
    /// How long to look for an answer before sleeping.
    pub(crate) patience: Duration,
}

/// Who writes and reads the sockets of a dispatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Driver {
    /// The thread that dispatches: no other is woken. For messages that are written at once.
    Caller,
    /// The data plane's own thread, while the caller computes or adds up what has come.
    DataPlane,
}

impl PendingExperts for PendingRemote {
    fn wait(mut self: Box<Self>) -> Result<Array2<f32>, DispatchError> {
        let mut sums = PartialSums::zeros(self.mode, self.tokens, self.hidden);
        for _ in 0..self.parts.len() {
            let arrival = self.next_arrival()?;
            let partial = self.accept(arrival)?;
            // Wrapping 64-bit sums: the order of arrival cannot change the text, so a reply is added as it comes.
            sums.add_rows(&self.parts[partial.0].rows, &partial.1)
                .map_err(|error| self.malformed(partial.0, &error))?;
        }
        Ok(sums.to_f32())
    }
}

impl PendingRemote {
    /// How long it may still take.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.saturating_sub(self.begun.elapsed())
    }

    pub(crate) fn deadline_exceeded(&self, part: usize) -> DispatchError {
        DispatchError::DeadlineExceeded {
            worker: self.worker(part),
            layer: self.layer,
            deadline: self.deadline,
        }
    }

    fn next_arrival(&mut self) -> Result<Arrival, DispatchError> {
        let (remaining, patience) = (self.remaining(), self.patience);
        let arrivals = &mut self.arrivals;
        let receiving = async { timeout(remaining, spin_then_wait(patience, arrivals.recv())).await };
        let received = match self.driver {
            Driver::Caller => self.data_plane.drive(receiving),
            Driver::DataPlane => {
                // Another dispatch may have been driven meanwhile.
                self.data_plane.hand_back();
                self.data_plane.handle().block_on(receiving)
            }
        };
        let late = || self.parts.iter().position(|part| !part.answered).unwrap_or(0);
        match received {
            Ok(Some(arrival)) => Ok(arrival),
            Ok(None) => Err(DispatchError::WorkerGone {
                worker: self.worker(late()),
                reason: "the connection was dropped".to_owned(),
            }),
            Err(_) => Err(self.deadline_exceeded(late())),
        }
    }

    /// The part that was answered and its partial sums, `[rows of the part, hidden]`.
    fn accept(&mut self, arrival: Arrival) -> Result<(usize, PartialSums), DispatchError> {
        let Arrival { part, outcome } = arrival;
        self.parts[part].answered = true;
        let worker = self.worker(part);
        let response = match outcome {
            Ok(response) => response,
            Err(reason) => return Err(DispatchError::WorkerGone { worker, reason }),
        };
        let rows = self.parts[part].rows.len();
        match decode_response(&response, self.mode, rows, self.hidden) {
            Err(source) => Err(DispatchError::Malformed { worker, source }),
            Ok(reply) => match reply.outcome {
                Ok(sums) => Ok((part, sums)),
                Err(failure) => Err(self.failure(worker, failure)),
            },
        }
    }

    fn failure(&self, worker: String, failure: ExecuteFailure) -> DispatchError {
        let layer = self.layer;
        match failure {
            ExecuteFailure::Invalid { message } => DispatchError::Invalid { worker, layer, message },
            ExecuteFailure::NotHeld {
                layer, expert, block, ..
            } => DispatchError::NotHeld {
                worker,
                layer,
                expert,
                block,
            },
            ExecuteFailure::TermOutOfRange {
                layer,
                expert,
                block,
                message,
            } => DispatchError::TermOutOfRange {
                worker,
                layer,
                expert,
                block,
                message,
            },
            ExecuteFailure::Overloaded => DispatchError::Overloaded { worker, layer },
            ExecuteFailure::Draining => DispatchError::Draining { worker, layer },
            ExecuteFailure::DeadlineExceeded => DispatchError::DeadlineExceeded {
                worker,
                layer,
                deadline: self.deadline,
            },
            ExecuteFailure::Internal { message } => DispatchError::Internal { worker, layer, message },
        }
    }

    fn malformed(&self, part: usize, error: &moerun_routing::CombineError) -> DispatchError {
        let wanted = format!("{} rows x {}", self.parts[part].rows.len(), self.hidden);
        let source = moerun_proto::WireError::new("partial_sums", wanted, error);
        DispatchError::Malformed {
            worker: self.worker(part),
            source,
        }
    }

    fn worker(&self, part: usize) -> String {
        self.parts
            .get(part)
            .map(|part| part.link.worker().to_owned())
            .unwrap_or_default()
    }
}

impl Drop for PendingRemote {
    fn drop(&mut self) {
        for part in self.parts.iter().filter(|part| !part.answered) {
            part.link.forget(part.request_id);
        }
    }
}
