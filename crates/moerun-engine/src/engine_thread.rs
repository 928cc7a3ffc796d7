//! The engine's thread: takes commands, runs steps, tells clients.

use std::collections::VecDeque;
use std::slice;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use moerun_kernels::flush_denormals;
use moerun_model::KvCache;
use tokio::sync::oneshot;

use crate::chunk::Chunk;
use crate::handle::{Command, Shared};
use crate::moe_layer::MoeLayerJob;
use crate::scheduler::Scheduler;
use crate::step::{Compute, StepMemory, may_be_one_sequences_fault};
use crate::{EngineError, EngineStats};

/// The one owner of sequences, pages and cache.
#[derive(Debug)]
pub(crate) struct EngineThread {
    compute: Compute,
    step_memory: StepMemory,
    /// The step under way.
    chunks: Vec<Chunk>,
    scheduler: Scheduler,
    kv: KvCache,
    moe_jobs: VecDeque<MoeLayerJob>,
    /// Who waits for the last request to end; once there is one, requests are refused.
    drains: Vec<oneshot::Sender<()>>,
    draining: bool,
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    max_batch_tokens: usize,
}

impl EngineThread {
    /// An engine without requests.
    pub(crate) fn new(
        compute: Compute,
        scheduler: Scheduler,
        kv: KvCache,
        commands: Receiver<Command>,
        shared: Arc<Shared>,
        max_batch_tokens: usize,
    ) -> Self {
        let (moe_jobs, drains) = (VecDeque::new(), Vec::new());
        Self {
            compute,
            step_memory: StepMemory::default(),
            chunks: Vec::new(),
            scheduler,
            kv,
            moe_jobs,
            drains,
            draining: false,
            commands,
            shared,
            max_batch_tokens,
        }
    }

    /// Runs until it is asked to stop, or everybody who could ask for anything is gone. Requests that are still open
    /// are told so when they are dropped.
    pub(crate) fn run(mut self) {
        flush_denormals();
        while !self.shared.is_stopping() && self.receive() {
            self.remove_ended();
            self.run_moe_piece();
            let mut chunks = std::mem::take(&mut self.chunks);
            self.scheduler.plan(&mut chunks);
            self.run_chunks(&chunks);
            self.chunks = chunks;
            self.remove_ended();
            self.publish();
            self.tell_drained();
        }
        let shared = Arc::clone(&self.shared);
        let stats = EngineStats {
            running: 0,
            waiting: 0,
            pages_used: 0,
            pages_cached: 0,
            ..self.scheduler.stats()
        };
        drop(self);
        shared.publish(stats);
    }

    /// Takes all commands that have come; waits for one if there is nothing else to do. Returns false if there never
    /// will be one again and nothing is left to do.
    fn receive(&mut self) -> bool {
        if self.is_idle() {
            let Ok(command) = self.commands.recv() else {
                return false;
            };
            self.take(command);
        }
        while let Ok(command) = self.commands.try_recv() {
            self.take(command);
        }
        true
    }

    fn take(&mut self, command: Command) {
        match command {
            // Accepted by a handle that did not yet know; dropping a request tells its client.
            Command::Start(_) | Command::MoeLayer(_) if self.draining => {}
            Command::Start(sequence) => self.scheduler.push(*sequence),
            Command::MoeLayer(job) => self.moe_jobs.push_back(*job),
            Command::Drain { done } => {
                self.draining = true;
                self.drains.push(done);
            }
            Command::Wake => {}
        }
    }

    fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.moe_jobs.is_empty()
    }

    fn remove_ended(&mut self) {
        self.scheduler.remove_ended();
        self.moe_jobs.retain(|job| !job.is_over());
    }

    /// One piece of the first job, then it queues again behind the others.
    fn run_moe_piece(&mut self) {
        let Some(job) = self.moe_jobs.pop_front() else { return };
        if let Some(unfinished) = job.run_piece(&self.compute, self.max_batch_tokens) {
            self.moe_jobs.push_back(unfinished);
        }
    }

    /// Runs chunks as one step. Where one sequence may have spoilt the step for the others, each runs alone, and where
    /// a draft may have spoilt it for its own sequence, that runs without: what becomes of a request depends neither on
    /// which others shared its batch nor on what was guessed of it.
    fn run_chunks(&mut self, chunks: &[Chunk]) {
        if chunks.is_empty() {
            return;
        }
        let running = self.scheduler.running();
        let answers = self.compute.run(&mut self.step_memory, running, chunks, &mut self.kv);
        match (answers, chunks) {
            (Ok(()), _) => self.apply(chunks),
            (Err(error), [chunk]) if !chunk.draft.is_empty() && may_be_one_sequences_fault(&error) => {
                tracing::warn!(%error, drafted = chunk.draft.len(), "a step failed; running it without its draft");
                self.run_chunks(&[chunk.without_draft()]);
            }
            (Err(error), [_, _, ..]) if may_be_one_sequences_fault(&error) => {
                tracing::warn!(%error, sequences = chunks.len(), "a step failed; running its sequences one by one");
                for chunk in chunks {
                    self.run_chunks(slice::from_ref(chunk));
                }
            }
            (Err(error), _) => {
                for chunk in chunks {
                    self.fail(chunk.sequence, error.clone());
                }
            }
        }
    }

    /// Hands the answers of the last step to the sequences of `chunks`, which it ran.
    fn apply(&mut self, chunks: &[Chunk]) {
        for (index, chunk) in chunks.iter().enumerate() {
            let degraded = self.step_memory.is_degraded(index);
            let answers = self.step_memory.answers_of(index);
            if let Err(error) = self.scheduler.take_in(chunk, degraded, answers) {
                self.fail(chunk.sequence, error);
            }
        }
    }

    fn fail(&mut self, index: usize, error: EngineError) {
        let sequence = self.scheduler.running_mut(index);
        tracing::warn!(sequence = %sequence.id, %error, "a sequence failed");
        sequence.fail(error);
    }

    fn publish(&self) {
        self.shared.publish(self.scheduler.stats());
    }

    fn tell_drained(&mut self) {
        if self.is_idle() {
            for done in self.drains.drain(..) {
                let _ = done.send(()); // nobody waits any more: fine
            }
        }
    }
}
