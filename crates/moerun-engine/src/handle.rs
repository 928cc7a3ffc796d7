//! The engine as its clients see it: requests are checked and counted here, then travel over a bounded channel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SendError, SyncSender, TrySendError};

use moerun_dispatch::Combined;
use moerun_types::SequenceId;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use crate::limits::Limits;
use crate::moe_layer::MoeLayerJob;
use crate::reply::QueuePlace;
use crate::sequence::Sequence;
use crate::{EngineError, EngineStats, ForwardRequest, GenerateRequest, LogitsRow, MoeLayerRequest, TokenEvent};

/// Room in the command channel for what is not a request, beside `max_queue` requests.
pub(crate) const CONTROL_PLACES: usize = 32;

/// Everything that can change the engine's state; its thread alone owns sequences, pages and cache.
#[derive(Debug)]
pub(crate) enum Command {
    /// Queue a sequence.
    Start(Box<Sequence>),
    /// Queue rows for one MoE block.
    MoeLayer(Box<MoeLayerJob>),
    /// Refuse requests from now on, and say when the last one has ended.
    Drain {
        /// Whom to tell.
        done: oneshot::Sender<()>,
    },
    /// Look at the flags.
    Wake,
}

/// The little that handles and thread both see.
#[derive(Debug)]
pub(crate) struct Shared {
    limits: Limits,
    /// Requests that were accepted and have not started.
    waiting: Arc<AtomicUsize>,
    refusing: AtomicBool,
    stopping: AtomicBool,
    next_id: AtomicU64,
    /// As of the last step; `waiting` counts preempted sequences alone.
    stats: Mutex<EngineStats>,
}

impl Shared {
    /// Nothing waits.
    pub(crate) fn new(limits: Limits) -> Self {
        let stats = EngineStats {
            pages_total: limits.num_pages as usize,
            ..EngineStats::default()
        };
        Self {
            limits,
            waiting: Arc::default(),
            refusing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            stats: Mutex::new(stats),
        }
    }

    /// Whether the thread is asked to stop.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Replaces the counts.
    pub(crate) fn publish(&self, stats: EngineStats) {
        *self.stats.lock() = stats;
    }
}

/// Talks to an engine; cheap to clone. No call waits for a step. After the engine was dropped or drained, requests are
/// refused with [`EngineError::Stopping`].
#[derive(Debug, Clone)]
pub struct EngineHandle {
    commands: SyncSender<Command>,
    shared: Arc<Shared>,
}

impl EngineHandle {
    pub(crate) fn new(commands: SyncSender<Command>, shared: Arc<Shared>) -> Self {
        Self { commands, shared }
    }

    /// Queues a sequence. Events come on the returned channel, at least one, the last with `finish` set or
    /// [`TokenEvent::Failed`]; dropping the receiver cancels the sequence and frees its pages at the next step. The
    /// channel has room for every event of the request, so the engine never waits for a slow reader.
    ///
    /// `max_tokens` is lowered to what context and cache leave after the prompt. Errors: [`EngineError::Invalid`]
    /// naming the field, [`EngineError::PromptTooLong`], [`EngineError::QueueFull`], [`EngineError::Stopping`].
    pub fn generate(&self, mut request: GenerateRequest) -> Result<mpsc::Receiver<TokenEvent>, EngineError> {
        self.shared.limits.check_generate(&mut request)?;
        let place = self.take_place()?;
        let (sequence, events) = Sequence::generate(self.next_id(), request, place);
        self.send(Command::Start(Box::new(sequence)))?;
        Ok(events)
    }

    /// Logits of a prompt: rows come in the order of `positions`; an error ends the channel. At most
    /// 1 GiB of logits in one request. Errors as for [`EngineHandle::generate`].
    pub fn forward(
        &self,
        request: ForwardRequest,
    ) -> Result<mpsc::Receiver<Result<LogitsRow, EngineError>>, EngineError> {
        self.shared.limits.check_forward(&request)?;
        let place = self.take_place()?;
        let (sequence, rows) = Sequence::forward(self.next_id(), request, place);
        self.send(Command::Start(Box::new(sequence)))?;
        Ok(rows)
    }

    /// Runs one MoE block on rows, shared experts included, `[rows, hidden]` in and out. Errors as for
    /// [`EngineHandle::generate`]; a layer without experts is refused naming those that have.
    pub fn moe_layer(
        &self,
        request: MoeLayerRequest,
    ) -> Result<oneshot::Receiver<Result<Combined, EngineError>>, EngineError> {
        self.shared.limits.check_moe_layer(&request)?;
        let (job, rows) = MoeLayerJob::new(request, self.take_place()?);
        self.send(Command::MoeLayer(Box::new(job)))?;
        Ok(rows)
    }

    /// Counts, as of the last step; `waiting` is as of now.
    pub fn stats(&self) -> EngineStats {
        let mut stats = *self.shared.stats.lock();
        stats.waiting += self.shared.waiting.load(Ordering::Acquire);
        stats
    }

    /// Refuses new requests from now on; the receiver is told when the last one that was accepted has ended (an error
    /// on it means that the engine was stopped before).
    pub fn drain(&self) -> oneshot::Receiver<()> {
        self.shared.refusing.store(true, Ordering::Release);
        let (done, drained) = oneshot::channel();
        // Waits for room only when dozens of drains come within one step.
        if let Err(SendError(Command::Drain { done })) = self.commands.send(Command::Drain { done }) {
            let _ = done.send(()); // the thread has ended, and with it all requests
        }
        drained
    }

    /// Asks the thread to stop after the step under way.
    pub(crate) fn stop(&self) {
        self.shared.refusing.store(true, Ordering::Release);
        self.shared.stopping.store(true, Ordering::Release);
        // A full channel means that the thread is awake, and it looks at the flag before each step.
        let _ = self.commands.try_send(Command::Wake);
    }

    fn take_place(&self) -> Result<QueuePlace, EngineError> {
        if self.shared.refusing.load(Ordering::Acquire) {
            return Err(EngineError::Stopping);
        }
        QueuePlace::take(&self.shared.waiting, self.shared.limits.max_queue)
    }

    fn next_id(&self) -> SequenceId {
        SequenceId(self.shared.next_id.fetch_add(1, Ordering::Relaxed))
    }

    fn send(&self, command: Command) -> Result<(), EngineError> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => EngineError::QueueFull {
                limit: self.shared.limits.max_queue,
            },
            TrySendError::Disconnected(_) => EngineError::Stopping,
        })
    }
}
