//! Violations planted in what clients and operators are told: `flipped-token`, `lost-terminal`, `hidden-fault`. Tests only.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use futures::{Stream, StreamExt};
use moerun_dispatch::WorkerStatus;
use moerun_proto::v1::{FinishReason, GenerateResponse};
use tonic::Status;

/// Of this many messages, or answers, one is spoilt.
const ONE_MESSAGE_IN: u64 = 300;
const ONE_ANSWER_IN: u64 = 15;

static MESSAGES: AtomicU64 = AtomicU64::new(0);
static ANSWERS: AtomicU64 = AtomicU64::new(0);

fn planted(name: &str) -> bool {
    std::env::var("MOERUN_PLANT").as_deref() == Ok(name)
}

/// An answer as clients see it.
pub(super) fn answer(
    responses: impl Stream<Item = Result<GenerateResponse, Status>> + Send + 'static,
) -> impl Stream<Item = Result<GenerateResponse, Status>> + Send + 'static {
    let (flips, loses) = (planted("flipped-token"), planted("lost-terminal"));
    responses.filter_map(move |response| {
        std::future::ready(match response {
            Ok(response) if loses && is_end(&response) && is_nth(&ANSWERS, ONE_ANSWER_IN) => None,
            Ok(mut response) if flips && is_nth(&MESSAGES, ONE_MESSAGE_IN) => {
                response.token_ids.iter_mut().for_each(|id| *id ^= 1);
                Some(Ok(response))
            }
            other => Some(other),
        })
    })
}

/// A worker as operators see it.
pub(super) fn status(worker: WorkerStatus) -> WorkerStatus {
    match planted("hidden-fault") {
        true => WorkerStatus { down: None, ..worker },
        false => worker,
    }
}

/// A count of what went wrong with a worker, as operators see it.
pub(super) fn count(counted: u64) -> u64 {
    if planted("hidden-fault") { 0 } else { counted }
}

fn is_end(response: &GenerateResponse) -> bool {
    response.finish_reason() != FinishReason::Unspecified
}

fn is_nth(count: &AtomicU64, n: u64) -> bool {
    count.fetch_add(1, Relaxed) % n == n - 1
}
