//! The engine as its owner sees it: configuration, start, stop.

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use moerun_dispatch::ExpertBackend;
use moerun_kernels::CpuPool;
use moerun_model::{KvCache, Model};
use moerun_types::{KvFormat, RopeScaling};

use crate::EngineError;
use crate::engine_thread::EngineThread;
use crate::handle::{CONTROL_PLACES, EngineHandle, Shared};
use crate::limits::Limits;
use crate::scheduler::{Scheduler, SchedulerConfig};
use crate::step::Compute;

/// Bounds of an engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Most bytes of keys and values; at least one page.
    pub kv_memory_bytes: u64,
    /// How keys and values are held. A query reads them as they are held, so it changes bits, but the same ones however
    /// a prompt is cut.
    pub kv_format: KvFormat,
    /// Longest sequence, prompt and output together; at least 2.
    pub max_context: usize,
    /// Most rows in one forward pass, prefill and decode together; at least 1. About three quarters of it is also the
    /// most sequences that run at one time.
    pub max_batch_tokens: usize,
    /// Most requests that wait to start, at least 1; one more is refused. Requests for a MoE block count until they are
    /// answered.
    pub max_queue: usize,
    /// Whether full pages are kept and shared between requests that begin with the same tokens. Changes no bit of any
    /// answer.
    pub prefix_cache: bool,
    /// Most tokens drafted from a sequence's own text and verified in one of its steps; 0 = none. Changes no bit of any
    /// answer.
    pub speculate: usize,
}

/// Counts that an operator wants to see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences with pages in the cache.
    pub running: usize,
    /// Requests that wait, preempted ones included.
    pub waiting: usize,
    /// Pages in use.
    pub pages_used: usize,
    /// Pages that nobody uses, kept because a request may begin with what they hold; given up when room is needed.
    pub pages_cached: usize,
    /// Pages there are.
    pub pages_total: usize,
    /// How often a running sequence had to give its pages to an older one, since the start.
    pub preemptions: u64,
    /// Tokens of sequences when they started or started again, looked up in the prefix cache, since the start.
    pub prefix_queried_tokens: u64,
    /// Those of them whose keys and values were there, since the start.
    pub prefix_hit_tokens: u64,
    /// Tokens drafted and computed, since the start.
    pub drafted_tokens: u64,
    /// Those of them that turned out to be the text's next tokens, since the start.
    pub accepted_tokens: u64,
    /// Sequences for which an expert was left out, since the start.
    pub degraded_sequences: u64,
}

/// Owns the engine's thread.
///
/// Dropping it stops the thread after the step under way and waits for that; all open requests are told
/// [`EngineError::Stopping`].
#[derive(Debug)]
pub struct Engine {
    handle: EngineHandle,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts the engine's thread. An error if a bound is out of range or memory does not hold one page.
    pub fn start(
        model: Arc<Model>,
        experts: Arc<dyn ExpertBackend>,
        pool: Arc<CpuPool>,
        config: EngineConfig,
    ) -> Result<Self, EngineError> {
        let limits = Limits::new(&model, &config)?;
        let scheduler = Scheduler::new(SchedulerConfig {
            max_batch_tokens: config.max_batch_tokens,
            num_pages: limits.num_pages,
            prefix_cache: config.prefix_cache,
            speculate: config.speculate,
            long_rope_above: match &model.config().rope.scaling {
                RopeScaling::LongRope {
                    original_max_position, ..
                } => Some(*original_max_position),
                _ => None,
            },
        });
        let kv = KvCache::new(model.config(), config.kv_format, limits.num_pages as usize);
        let (commands, receiver) = sync_channel(limits.max_queue + CONTROL_PLACES);
        let shared = Arc::new(Shared::new(limits));
        let compute = Compute { model, experts, pool };
        let engine_thread = EngineThread::new(
            compute,
            scheduler,
            kv,
            receiver,
            Arc::clone(&shared),
            config.max_batch_tokens,
        );
        let thread = std::thread::Builder::new()
            .name("moerun-engine".into())
            .spawn(move || engine_thread.run())
            .map_err(|error| EngineError::Start(error.to_string()))?;
        Ok(Self {
            handle: EngineHandle::new(commands, shared),
            thread: Some(thread),
        })
    }

    /// A handle to it.
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread panicked; its requests were told that it stopped");
        }
    }
}
