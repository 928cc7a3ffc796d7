//! Why experts gave no answer, or workers were not taken.

use std::{sync::Arc, time::Duration};

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId};

/// Why experts gave no answer, or workers were not taken. A worker is named by its address.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DispatchError {
    /// The experts of this process refused or failed.
    #[error(transparent)]
    Local(#[from] moerun_model::ExpertError),
    /// No answer in time.
    #[error("worker {worker} gave no answer for layer {layer} within {deadline:?}")]
    DeadlineExceeded {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// What was allowed.
        deadline: Duration,
    },
    /// The connection ended while an answer was awaited.
    #[error("worker {worker} is gone: {reason}")]
    WorkerGone {
        /// Its address.
        worker: String,
        /// What was seen.
        reason: String,
    },
    /// There is no connection to a worker that is needed, so nothing was sent.
    #[error("layer {layer} needs worker {worker}, which is down: {reason}")]
    WorkerDown {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// Why it is down.
        reason: String,
    },
    /// No holder of an expert is left that could be asked.
    #[error("no live worker holds layer {layer} expert {expert} blocks {blocks}: {reason}")]
    ExpertUnavailable {
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// The blocks.
        blocks: BlockRange,
        /// Who held it, and why each is not there.
        reason: String,
    },
    /// A message was changed on its way.
    #[error("worker {worker}, layer {layer}: {what} was corrupted on its way")]
    Corrupted {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// The request or the answer.
        what: &'static str,
    },
    /// A message of a worker cannot be what it says it is.
    #[error("worker {worker} sent a malformed answer: {source}")]
    Malformed {
        /// Its address.
        worker: String,
        /// The field, what was wanted and what was found.
        source: moerun_proto::WireError,
    },
    /// A worker says that the request does not fit its model.
    #[error("worker {worker} refused a request for layer {layer}: {message}")]
    Invalid {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// Its words.
        message: String,
    },
    /// A worker does not hold what it said it holds.
    #[error("worker {worker} does not hold layer {layer} expert {expert} block {block:?}")]
    NotHeld {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// First block asked for.
        block: Option<u16>,
    },
    /// A term was not finite or too large for the exact combine.
    #[error("worker {worker}, layer {layer} expert {expert} block {block:?}: {message}")]
    TermOutOfRange {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Combine block; `None` for the down bias.
        block: Option<u16>,
        /// The worker's words, with the term and its limit.
        message: String,
    },
    /// A worker's queue is full.
    #[error("worker {worker} is overloaded (layer {layer})")]
    Overloaded {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
    },
    /// A worker is stopping.
    #[error("worker {worker} is stopping and takes no more work (layer {layer})")]
    Draining {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
    },
    /// Something that should not happen, in a worker.
    #[error("worker {worker} failed on layer {layer}: {message}")]
    Internal {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// Its words.
        message: String,
    },
    /// The layer has no experts.
    #[error("layer {layer} has no experts")]
    NotMoe {
        /// Model layer.
        layer: LayerId,
    },
    /// The list of workers makes no sense.
    #[error("worker address {worker:?}: {reason}")]
    Address {
        /// As given.
        worker: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A worker could not be reached by the end of start-up.
    #[error("worker {worker} could not be reached within {waited:?}: {reason}")]
    Unreachable {
        /// Its address.
        worker: String,
        /// What was allowed.
        waited: Duration,
        /// The last attempt's failure.
        reason: String,
    },
    /// A worker serves another model, or the same in another way.
    #[error("worker {worker} is refused: its {what} is {found}, the gateway's is {wanted}")]
    Mismatch {
        /// Its address.
        worker: String,
        /// What differs.
        what: &'static str,
        /// The gateway's.
        wanted: String,
        /// The worker's.
        found: String,
    },
    /// A worker refused the gateway.
    #[error("worker {worker} refuses this gateway: {message}")]
    RefusedByWorker {
        /// Its address.
        worker: String,
        /// Its words.
        message: String,
    },
    /// The worker, or this gateway, is not whom the other may talk to.
    #[error("worker {worker}: {refusal}")]
    Untrusted {
        /// Its address.
        worker: String,
        /// Who turned whom away, and why.
        refusal: moerun_transport::Refusal,
    },
    /// Two workers hold different contents for one block.
    #[error(
        "workers {first_worker} and {second_worker} differ in layer {layer} expert {expert} block {block}: \
         {first_hash} and {second_hash}"
    )]
    HoldersDisagree {
        /// Address of the one.
        first_worker: String,
        /// Address of the other.
        second_worker: String,
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Combine block.
        block: u16,
        /// Hash of the one, in hex.
        first_hash: String,
        /// Hash of the other, in hex.
        second_hash: String,
    },
    /// A worker's content differs from what is expected: from the gateway's own checkpoint, or from before it restarted.
    #[error(
        "worker {worker} is refused: layer {layer} expert {expert} block {block} hashes to {found} there, \
         wanted {wanted}"
    )]
    ContentDiffers {
        /// Its address.
        worker: String,
        /// Model layer.
        layer: LayerId,
        /// Expert.
        expert: ExpertId,
        /// Combine block.
        block: u16,
        /// Wanted, in hex.
        wanted: String,
        /// The worker's, in hex.
        found: String,
    },
    /// A worker gave another answer to a known input than it should.
    #[error("worker {worker} is refused: it answered a known input on {slice} wrongly")]
    WrongAnswer {
        /// Its address.
        worker: String,
        /// What it was asked for.
        slice: ExpertSlice,
    },
    /// The workers do not hold the whole model between them.
    #[error("{0}")]
    Placement(Arc<moerun_routing::PlanError>),
    /// The gateway's own copy of an expert could not be hashed.
    #[error("hash an expert of the gateway's own checkpoint: {reason}")]
    OwnCheckpoint {
        /// Why.
        reason: String,
    },
    /// A worker that was named is none of this gateway's.
    #[error("no worker {worker:?}: this gateway has {known}")]
    UnknownWorker {
        /// As named.
        worker: String,
        /// The addresses that it has.
        known: String,
    },
    /// Nobody would be left to ask.
    #[error("worker {worker} cannot be drained: no other worker is connected that is not drained")]
    LastWorker {
        /// Its address.
        worker: String,
    },
    /// What a worker alone holds does not fit into the others.
    #[error(
        "worker {worker} cannot be drained: it alone holds {slices} expert slices of {needed_bytes} bytes, and {unplaced} \
         of them find no room with the others: {room}"
    )]
    NoRoomElsewhere {
        /// Its address.
        worker: String,
        /// Slices that nobody else holds.
        slices: usize,
        /// Bytes that they take.
        needed_bytes: u64,
        /// Those that find no room.
        unplaced: usize,
        /// What room each of the others has.
        room: String,
    },
    /// A worker has no room for experts that it was to hold.
    #[error("worker {worker} has no room: {message}")]
    NoRoom {
        /// Its address.
        worker: String,
        /// Its words, with the arithmetic.
        message: String,
    },
    /// A worker could not change what it holds.
    #[error("worker {worker} cannot change what it holds: {message}")]
    CannotHold {
        /// Its address.
        worker: String,
        /// Its words, or what became of the call.
        message: String,
    },
    /// There is no plan for what is wanted.
    #[error("{0}")]
    Unplanned(Arc<moerun_routing::planner::PlannerError>),
    /// Nobody has announced an expert that is to be moved, so its content is not known.
    #[error("{slice} cannot be moved: no worker has announced its content")]
    UnknownContent {
        /// What was to be moved.
        slice: ExpertSlice,
    },
    /// A thread or runtime could not be started.
    #[error("start the data plane: {reason}")]
    Start {
        /// What the system said.
        reason: String,
    },
}
