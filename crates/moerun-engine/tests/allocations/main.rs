//! What a decode step asks the allocator for. A process of its own, because it counts for all threads of the process.

use std::alloc::System;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use moerun_dispatch::{DispatchError, ExpertBackend, ExpertRequest, LocalExperts, PendingExperts};
use moerun_engine::{Engine, EngineConfig, GenerateRequest, SamplingParams};
use moerun_kernels::{Activations, CpuPool, KV_PAGE_TOKENS};
use moerun_model::{ExpertBank, KvCache, Model};
use moerun_routing::{Routing, ShardSpec};
use moerun_testkit::{Family, TinyCheckpoint};
use moerun_types::{CombineMode, KvFormat, LayerId, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use ndarray::Array2;
use parking_lot::Mutex;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Sequences that decode together.
const BATCH: usize = 3;
const PROMPT_TOKENS: usize = 20;
const GEN_TOKENS: usize = 140;
/// Longer than it takes; a hang fails instead of staying.
const PATIENCE: Duration = Duration::from_secs(60);

/// Experts in this process that write down, at the first layer of each step, how often memory was asked for so far.
#[derive(Debug)]
struct Counting {
    experts: LocalExperts,
    first_layer: LayerId,
    counts: Mutex<Counts>,
}

#[derive(Debug)]
struct Counts {
    /// At the beginning of each step: rows and requests for memory so far.
    steps: Vec<(usize, usize)>,
    done: Sender<()>,
}

fn requests_so_far() -> usize {
    let stats = ALLOCATOR.stats();
    stats.allocations + stats.reallocations
}

impl ExpertBackend for Counting {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        self.experts.submit(request)
    }

    fn run_here(
        &self,
        layer: LayerId,
        activations: &Activations,
        routing: &Routing,
        output: &mut Array2<f32>,
    ) -> Option<Result<(), DispatchError>> {
        if layer == self.first_layer {
            let mut counts = self.counts.lock();
            // There is room from the start: to count asks for nothing.
            counts.steps.push((activations.rows(), requests_so_far()));
            if counts.steps.len() == GEN_TOKENS {
                counts.done.send(()).expect("the test waits");
            }
        }
        self.experts.run_here(layer, activations, routing, output)
    }
}

/// Requests for memory of each step, from its first experts to those of the next step.
fn requests_of_each_step(family: Family, format: NumberFormat, kv_format: KvFormat) -> Vec<usize> {
    let dir = tempfile::tempdir().expect("a folder");
    // Wide enough for products, attention and norms to be shared out among the threads.
    let checkpoint = TinyCheckpoint {
        vocab: 1000,
        layers: 3,
        ..TinyCheckpoint::wide(family, 7)
    };
    checkpoint.write(dir.path()).expect("a checkpoint");
    let checkpoint = Checkpoint::open(dir.path(), Needs::All).expect("a checkpoint");
    let numerics = Numerics {
        format,
        combine: CombineMode::Exact,
        combine_block: 32,
    };
    let slices = ShardSpec::All
        .resolve(checkpoint.config(), &numerics)
        .expect("the whole model");
    let bank = ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| {}).expect("the experts load");
    let model = Arc::new(Model::load(&checkpoint, format, &mut |_, _| {}).expect("the model loads"));
    let pool = Arc::new(CpuPool::new(2));
    let (done, all_done) = channel();
    let counting = Arc::new(Counting {
        experts: LocalExperts::new(Arc::new(bank), Arc::clone(&pool)),
        first_layer: model.config().moe_layers()[0],
        counts: Mutex::new(Counts {
            steps: Vec::with_capacity(2 * GEN_TOKENS),
            done,
        }),
    });
    let config = EngineConfig {
        kv_memory_bytes: 64 * KvCache::page_bytes(model.config(), kv_format) as u64,
        kv_format,
        max_context: 200,
        max_batch_tokens: 128,
        max_queue: BATCH,
        prefix_cache: true,
        speculate: 0,
    };
    let engine = Engine::start(model, Arc::clone(&counting) as _, pool, config).expect("the engine starts");
    let events: Vec<_> = (0..BATCH)
        .map(|sequence| {
            let request = GenerateRequest {
                prompt_ids: (0..PROMPT_TOKENS)
                    .map(|token| (100 * sequence + token) as u32)
                    .collect(),
                max_tokens: GEN_TOKENS,
                stop_token_ids: Vec::new(),
                sampling: SamplingParams {
                    temperature: [0.0, 0.7, 1.0][sequence],
                    top_k: 0,
                    top_p: [1.0, 0.9, 1.0][sequence],
                    min_p: 0.0,
                    repetition_penalty: [1.0, 1.0, 1.1][sequence],
                    seed: 5,
                },
                logprobs: None,
            };
            engine.handle().generate(request).expect("accepted")
        })
        .collect();
    all_done.recv_timeout(PATIENCE).expect("all steps in time");
    drop(engine);
    drop(events);
    let steps = &counting.counts.lock().steps;
    steps
        .array_windows()
        .filter(|[(rows, _), (next_rows, _)]| (*rows, *next_rows) == (BATCH, BATCH))
        .map(|[(_, before), (_, after)]| after - before)
        .collect()
}

/// Within a page the sequences need nothing new: neither a number for a page, nor a name, nor room for tokens. What
/// grows, grows by blocks: 32 events in a channel, powers of two of tokens, pages and names.
#[test]
fn a_decode_step_that_begins_no_page_asks_for_no_memory() {
    for (family, format, kv_format) in [
        (Family::GraniteMoe, NumberFormat::Bf16, KvFormat::F32),
        (Family::Olmoe, NumberFormat::Int8, KvFormat::Int8),
        (Family::DeepseekV3, NumberFormat::Int4, KvFormat::Bf16),
        (Family::GptOss, NumberFormat::F32, KvFormat::F32),
    ] {
        let requests = requests_of_each_step(family, format, kv_format);
        let context = format!("{family:?} {format} {kv_format:?}: {requests:?}");
        let longest_run = requests.split(|&count| count > 0).map(<[usize]>::len).max();
        // The sequences begin their pages within a few steps of one another.
        let wanted = KV_PAGE_TOKENS - BATCH - 1;
        assert!(
            longest_run >= Some(wanted),
            "no {wanted} steps without a request: {context}"
        );
        let settled = &requests[requests.len() - 4 * KV_PAGE_TOKENS..];
        let most = 4 * BATCH * 3; // by sequence and page
        assert!(
            settled.iter().sum::<usize>() <= most,
            "more than {most} requests in four pages: {context}"
        );
    }
}
