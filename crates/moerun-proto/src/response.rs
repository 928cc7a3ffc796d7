//! Partial sums and failures ↔ [`v1::ExecuteResponse`].

use std::time::Duration;

use moerun_routing::PartialSums;
use moerun_types::{CombineMode, ExpertId, LayerId};

use crate::{
    WireError,
    packed::{byte_len, check_len},
    v1,
};

/// Longest explanation that a failure carries.
const MAX_MESSAGE_CHARS: usize = 500;

/// Why a worker did not run a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecuteFailure {
    /// The message does not fit the model.
    Invalid {
        /// What was wrong.
        message: String,
    },
    /// An expert or block is not held there.
    NotHeld {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// First block asked for.
        block: Option<u16>,
        /// In words.
        message: String,
    },
    /// A term was not finite or too large for the exact combine.
    TermOutOfRange {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Block; `None` for the down bias.
        block: Option<u16>,
        /// In words, with the term and its limit.
        message: String,
    },
    /// The queue is full.
    Overloaded,
    /// The worker is stopping.
    Draining,
    /// The deadline passed before the computation began.
    DeadlineExceeded,
    /// The request's checksum does not fit.
    Corrupted,
    /// Something that should not happen.
    Internal {
        /// What was seen.
        message: String,
    },
}

/// What came of one request.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecuteReply {
    /// Of the request.
    pub request_id: u64,
    /// `[rows, hidden]`, or why not.
    pub outcome: Result<PartialSums, ExecuteFailure>,
    /// From the message's arrival to the start of the computation.
    pub queued: Duration,
    /// Of the computation.
    pub computed: Duration,
}

/// Packs partial sums.
pub fn encode_response(
    request_id: u64,
    sums: &PartialSums,
    queued: Duration,
    computed: Duration,
) -> v1::ExecuteResponse {
    let (row_widths, partial_sums) = sums.pack();
    v1::ExecuteResponse {
        request_id,
        status: v1::ExecuteStatus::Ok.into(),
        row_widths: row_widths.into(),
        partial_sums: partial_sums.into(),
        queue_micros: micros(queued),
        compute_micros: micros(computed),
        ..Default::default()
    }
}

/// Gives back what [`v1::ExecuteRequest::echo`] carried, without a copy.
pub fn encode_echo(request: &v1::ExecuteRequest) -> v1::ExecuteResponse {
    v1::ExecuteResponse {
        request_id: request.request_id,
        status: v1::ExecuteStatus::Ok.into(),
        echo: request.echo.clone(),
        ..Default::default()
    }
}

/// Names a failure.
pub fn encode_failure(request_id: u64, failure: ExecuteFailure) -> v1::ExecuteResponse {
    let (status, place, message) = match failure {
        ExecuteFailure::Invalid { message } => (v1::ExecuteStatus::Invalid, None, message),
        ExecuteFailure::NotHeld {
            layer,
            expert,
            block,
            message,
        } => (v1::ExecuteStatus::NotHeld, Some((layer, expert, block)), message),
        ExecuteFailure::TermOutOfRange {
            layer,
            expert,
            block,
            message,
        } => (v1::ExecuteStatus::TermOutOfRange, Some((layer, expert, block)), message),
        ExecuteFailure::Overloaded => (v1::ExecuteStatus::Overloaded, None, "the queue is full".to_owned()),
        ExecuteFailure::Draining => (v1::ExecuteStatus::Draining, None, "the worker is stopping".to_owned()),
        ExecuteFailure::DeadlineExceeded => (
            v1::ExecuteStatus::DeadlineExceeded,
            None,
            "the deadline passed in the queue".to_owned(),
        ),
        ExecuteFailure::Corrupted => (
            v1::ExecuteStatus::Corrupted,
            None,
            "the request's checksum does not fit".to_owned(),
        ),
        ExecuteFailure::Internal { message } => (v1::ExecuteStatus::Internal, None, message),
    };
    let mut response = v1::ExecuteResponse {
        request_id,
        status: status.into(),
        message: message.chars().take(MAX_MESSAGE_CHARS).collect(),
        ..Default::default()
    };
    if let Some((layer, expert, block)) = place {
        response.layer = layer.0;
        response.expert = expert.0.into();
        response.block = block.map(u32::from);
    }
    response
}

/// Checks an answer to a request of `rows` rows and takes it apart.
pub fn decode_response(
    response: &v1::ExecuteResponse,
    mode: CombineMode,
    rows: usize,
    hidden: usize,
) -> Result<ExecuteReply, WireError> {
    let outcome = match v1::ExecuteStatus::try_from(response.status) {
        Ok(v1::ExecuteStatus::Ok) => Ok(decode_sums(response, mode, rows, hidden)?),
        Ok(status) => Err(decode_failure(response, status)?),
        Err(_) => return Err(WireError::new("status", "a known status", response.status)),
    };
    Ok(ExecuteReply {
        request_id: response.request_id,
        outcome,
        queued: Duration::from_micros(response.queue_micros.into()),
        computed: Duration::from_micros(response.compute_micros.into()),
    })
}

fn decode_sums(
    response: &v1::ExecuteResponse,
    mode: CombineMode,
    rows: usize,
    hidden: usize,
) -> Result<PartialSums, WireError> {
    let (widths, sums) = (&response.row_widths, &response.partial_sums);
    match mode {
        CombineMode::Exact => {
            check_len("row_widths", widths, rows)?;
            if let Some(&width) = widths.iter().find(|&&width| width > 8) {
                return Err(WireError::new("row_widths", "0 to 8 bytes an element", width));
            }
            let row_bytes: usize = widths.iter().map(|&width| usize::from(width)).sum();
            check_len("partial_sums", sums, byte_len("partial_sums", &[row_bytes, hidden])?)?;
        }
        CombineMode::Fast => {
            check_len("row_widths", widths, 0)?;
            check_len("partial_sums", sums, byte_len("partial_sums", &[rows, hidden, 4])?)?;
        }
    }
    PartialSums::unpack(mode, rows, hidden, widths, sums)
        .map_err(|error| WireError::new("partial_sums", format!("{rows} rows x {hidden}"), error))
}

fn decode_failure(response: &v1::ExecuteResponse, status: v1::ExecuteStatus) -> Result<ExecuteFailure, WireError> {
    let message = response.message.chars().take(MAX_MESSAGE_CHARS).collect();
    let place = || -> Result<(LayerId, ExpertId, Option<u16>), WireError> {
        let expert =
            u16::try_from(response.expert).map_err(|_| WireError::new("expert", "at most 65535", response.expert))?;
        let block = response
            .block
            .map(|block| u16::try_from(block).map_err(|_| WireError::new("block", "at most 65535", block)))
            .transpose()?;
        Ok((LayerId(response.layer), ExpertId(expert), block))
    };
    Ok(match status {
        v1::ExecuteStatus::Invalid => ExecuteFailure::Invalid { message },
        v1::ExecuteStatus::NotHeld => {
            let (layer, expert, block) = place()?;
            ExecuteFailure::NotHeld {
                layer,
                expert,
                block,
                message,
            }
        }
        v1::ExecuteStatus::TermOutOfRange => {
            let (layer, expert, block) = place()?;
            ExecuteFailure::TermOutOfRange {
                layer,
                expert,
                block,
                message,
            }
        }
        v1::ExecuteStatus::Overloaded => ExecuteFailure::Overloaded,
        v1::ExecuteStatus::Draining => ExecuteFailure::Draining,
        v1::ExecuteStatus::DeadlineExceeded => ExecuteFailure::DeadlineExceeded,
        v1::ExecuteStatus::Corrupted => ExecuteFailure::Corrupted,
        v1::ExecuteStatus::Internal => ExecuteFailure::Internal { message },
        v1::ExecuteStatus::Unspecified | v1::ExecuteStatus::Ok => {
            return Err(WireError::new("status", "a failure", status.as_str_name()));
        }
    })
}

fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
