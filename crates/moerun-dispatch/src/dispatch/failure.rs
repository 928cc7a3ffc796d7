//! What a worker's failure means: a reason to count, and an error for whoever asked if nobody else can answer.

use moerun_proto::{ExecuteFailure, WireError};
use moerun_types::LayerId;

use crate::{DispatchError, stats::FailureReason};

/// Why a call failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: FailureReason,
    pub(super) error: DispatchError,
}

impl Failure {
    pub(super) fn gone(worker: String, why: String) -> Self {
        Self {
            reason: FailureReason::ConnectionLost,
            error: DispatchError::WorkerGone { worker, reason: why },
        }
    }

    pub(super) fn corrupted_answer(worker: String, layer: LayerId) -> Self {
        Self {
            reason: FailureReason::CorruptedAnswer,
            error: DispatchError::Corrupted {
                worker,
                layer,
                what: "the answer",
            },
        }
    }

    pub(super) fn malformed(worker: String, source: WireError) -> Self {
        Self {
            reason: FailureReason::Malformed,
            error: DispatchError::Malformed { worker, source },
        }
    }

    /// What `worker` said of a request for `layer`, for which `deadline` was allowed.
    pub(super) fn of(worker: String, layer: LayerId, deadline: std::time::Duration, failure: ExecuteFailure) -> Self {
        let (reason, error) = match failure {
            ExecuteFailure::Invalid { message } => (
                FailureReason::Invalid,
                DispatchError::Invalid { worker, layer, message },
            ),
            ExecuteFailure::NotHeld {
                layer, expert, block, ..
            } => (
                FailureReason::NotHeld,
                DispatchError::NotHeld {
                    worker,
                    layer,
                    expert,
                    block,
                },
            ),
            ExecuteFailure::TermOutOfRange {
                layer,
                expert,
                block,
                message,
            } => (
                FailureReason::TermOutOfRange,
                DispatchError::TermOutOfRange {
                    worker,
                    layer,
                    expert,
                    block,
                    message,
                },
            ),
            ExecuteFailure::Overloaded => (FailureReason::Overloaded, DispatchError::Overloaded { worker, layer }),
            ExecuteFailure::Draining => (FailureReason::Draining, DispatchError::Draining { worker, layer }),
            ExecuteFailure::DeadlineExceeded => (
                FailureReason::Overdue,
                DispatchError::DeadlineExceeded {
                    worker,
                    layer,
                    deadline,
                },
            ),
            ExecuteFailure::Corrupted => (
                FailureReason::CorruptedRequest,
                DispatchError::Corrupted {
                    worker,
                    layer,
                    what: "the request",
                },
            ),
            ExecuteFailure::Internal { message } => (
                FailureReason::Internal,
                DispatchError::Internal { worker, layer, message },
            ),
        };
        Self { reason, error }
    }
}
