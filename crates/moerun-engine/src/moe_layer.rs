//! Rows through one MoE block, for someone else's transformer: run between steps, in pieces no larger than a step, so
//! that sequences go on meanwhile.

use std::panic::AssertUnwindSafe;

use moerun_dispatch::Combined;
use moerun_types::LayerId;
use ndarray::{Array2, Axis, Slice};
use tokio::sync::oneshot;

use crate::reply::{QueuePlace, RowsReply};
use crate::step::{Compute, guarded};
use crate::{EngineError, MoeLayerRequest};

/// A request for one block, and how far it is.
#[derive(Debug)]
pub(crate) struct MoeLayerJob {
    layer: LayerId,
    /// `[rows, hidden]`: inputs, replaced by outputs up to `rows_done`.
    rows: Array2<f32>,
    rows_done: usize,
    /// Of those done: an expert was left out.
    degraded_rows: Vec<u32>,
    /// Kept to the end: jobs take turns, so all that were accepted may be under way, each with its rows.
    place: QueuePlace,
    reply: RowsReply,
}

impl MoeLayerJob {
    /// A job whose request was checked.
    pub(crate) fn new(
        request: MoeLayerRequest,
        place: QueuePlace,
    ) -> (Self, oneshot::Receiver<Result<Combined, EngineError>>) {
        let (reply, receiver) = RowsReply::new();
        let MoeLayerRequest { layer, hidden_states } = request;
        (
            Self {
                layer,
                rows: hidden_states,
                rows_done: 0,
                degraded_rows: Vec::new(),
                place,
                reply,
            },
            receiver,
        )
    }

    /// Runs the next `max_rows` rows, and answers after the last or on an error. Returns the job if there is more.
    pub(crate) fn run_piece(mut self, compute: &Compute, max_rows: usize) -> Option<Self> {
        let piece = self.rows_done..self.rows.nrows().min(self.rows_done + max_rows);
        let input = self.rows.slice_axis(Axis(0), Slice::from(piece.clone())).to_owned();
        match guarded(AssertUnwindSafe(|| self.run_rows(compute, input))) {
            Ok(output) => {
                let rows = Slice::from(piece.clone());
                self.rows.slice_axis_mut(Axis(0), rows).assign(&output.hidden_states);
                let degraded = output.degraded_rows.iter().map(|row| piece.start as u32 + row);
                self.degraded_rows.extend(degraded);
            }
            Err(error) => {
                tracing::warn!(layer = %self.layer, %error, "a request for a MoE block failed");
                self.answer(Err(error));
                return None;
            }
        }
        self.rows_done = piece.end;
        if self.rows_done < self.rows.nrows() {
            return Some(self);
        }
        let combined = Combined {
            hidden_states: std::mem::take(&mut self.rows),
            degraded_rows: std::mem::take(&mut self.degraded_rows),
        };
        self.answer(Ok(combined));
        None
    }

    /// The place is free before the client knows: it may ask for the next layer at once.
    fn answer(self, rows: Result<Combined, EngineError>) {
        drop(self.place);
        self.reply.send(rows);
    }

    fn run_rows(&self, compute: &Compute, input: Array2<f32>) -> Result<Combined, EngineError> {
        let mut input = compute
            .model
            .route_moe_input(&compute.pool, self.layer, input)
            .map_err(|error| EngineError::Model(error.to_string()))?;
        compute.as_forward().moe_block(self.layer, &mut input)
    }

    /// Whether the client went away.
    pub(crate) fn is_over(&self) -> bool {
        self.reply.is_over()
    }
}
