//! Engines over golden checkpoints with experts in this process, and clients that wait with a limit.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use moerun_dispatch::{ExpertBackend, LocalExperts};
use moerun_engine::{
    Engine, EngineConfig, EngineError, EngineHandle, EngineStats, FinishReason, ForwardRequest, GenerateRequest,
    LogprobEntry, SamplingParams, TokenEvent,
};
use moerun_kernels::{CpuPool, KV_PAGE_TOKENS};
use moerun_model::{ExpertBank, KvCache, Model};
use moerun_routing::ShardSpec;
use moerun_types::{CombineMode, KvFormat, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use safetensors::SafeTensors;
use tokio::sync::mpsc;

use crate::faulty::FaultyExperts;

/// Longer than any test takes; a hang fails instead of staying.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Small, so that every tiny expert has several blocks.
const COMBINE_BLOCK: usize = 8;

pub(crate) const GREEDY: SamplingParams = SamplingParams {
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    seed: 0,
};

pub(crate) const CONFIG: Sizes = Sizes {
    pages: 64,
    max_context: 256,
    max_batch_tokens: 32,
    max_queue: 64,
    prefix_cache: true,
    speculate: 0,
    kv_format: KvFormat::F32,
};

/// Nothing is shared and nothing guessed: what every other engine must equal.
pub(crate) const PLAIN: Sizes = Sizes {
    prefix_cache: false,
    ..CONFIG
};

/// [`EngineConfig`] with the cache counted in pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) pages: u64,
    pub(crate) max_context: usize,
    pub(crate) max_batch_tokens: usize,
    pub(crate) max_queue: usize,
    pub(crate) prefix_cache: bool,
    pub(crate) speculate: usize,
    pub(crate) kv_format: KvFormat,
}

/// A loaded golden checkpoint.
pub(crate) struct Fixture {
    pub(crate) dir: PathBuf,
    pub(crate) golden: serde_json::Value,
    pub(crate) experts: Arc<FaultyExperts>,
    model: Arc<Model>,
    pool: Arc<CpuPool>,
}

/// What a client got.
#[derive(Debug, Clone)]
pub(crate) struct Completion {
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<Option<Vec<LogprobEntry>>>,
    pub(crate) finish: FinishReason,
    pub(crate) cached_tokens: usize,
    pub(crate) degraded: bool,
}

/// Equal answers, bit for bit, whatever of them was computed anew.
impl PartialEq for Completion {
    fn eq(&self, other: &Self) -> bool {
        let bits = |completion: &Completion| -> Vec<Option<Vec<(u32, u32)>>> {
            let entry = |entry: &LogprobEntry| (entry.id, entry.logprob.to_bits());
            let logprobs = completion.logprobs.iter();
            logprobs
                .map(|entries| entries.as_ref().map(|entries| entries.iter().map(entry).collect()))
                .collect()
        };
        (&self.ids, self.finish, bits(self)) == (&other.ids, other.finish, bits(other))
    }
}

impl Fixture {
    pub(crate) fn load(family: &str) -> Self {
        let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(family);
        let golden = std::fs::read_to_string(dir.join("golden.json")).expect("golden.json");
        let golden = serde_json::from_str(&golden).expect("golden.json is json");
        let checkpoint = Checkpoint::open(&dir, Needs::All).expect("a golden checkpoint");
        let format = NumberFormat::F32;
        let numerics = Numerics {
            format,
            combine: CombineMode::Exact,
            combine_block: COMBINE_BLOCK,
        };
        let slices = ShardSpec::All
            .resolve(checkpoint.config(), &numerics)
            .expect("the whole model");
        let bank = ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| {}).expect("the experts load");
        let model = Model::load(&checkpoint, format, &mut |_, _| {}).expect("the model loads");
        let pool = Arc::new(CpuPool::new(2));
        let local: Arc<dyn ExpertBackend> = Arc::new(LocalExperts::new(Arc::new(bank), Arc::clone(&pool)));
        Fixture {
            dir,
            golden,
            experts: Arc::new(FaultyExperts::new(local)),
            model: Arc::new(model),
            pool,
        }
    }

    pub(crate) fn start(&self, sizes: Sizes) -> Engine {
        self.try_start(sizes).expect("the engine starts")
    }

    pub(crate) fn try_start(&self, sizes: Sizes) -> Result<Engine, EngineError> {
        let Sizes {
            pages,
            max_context,
            max_batch_tokens,
            max_queue,
            prefix_cache,
            speculate,
            kv_format,
        } = sizes;
        let kv_memory_bytes = pages * KvCache::page_bytes(self.model.config(), kv_format) as u64;
        let config = EngineConfig {
            kv_memory_bytes,
            kv_format,
            max_context,
            max_batch_tokens,
            max_queue,
            prefix_cache,
            speculate,
        };
        let experts: Arc<dyn ExpertBackend> = Arc::clone(&self.experts) as _;
        Engine::start(Arc::clone(&self.model), experts, Arc::clone(&self.pool), config)
    }

    /// Prompt `index` of the golden file.
    pub(crate) fn prompt(&self, index: usize) -> Vec<u32> {
        ids(&self.golden["prompts"][index])
    }

    /// The golden prompts one after another, over and over.
    pub(crate) fn long_prompt(&self, tokens: usize) -> Vec<u32> {
        (0..3)
            .flat_map(|index| self.prompt(index))
            .cycle()
            .take(tokens)
            .collect()
    }

    /// A golden tensor as f32 with its shape.
    pub(crate) fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let bytes = std::fs::read(self.dir.join("golden.safetensors")).expect("golden.safetensors");
        let tensors = SafeTensors::deserialize(&bytes).expect("golden.safetensors is well formed");
        let tensor = tensors.tensor(name).expect("a golden tensor");
        let values = tensor
            .data()
            .chunks_exact(4)
            .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4 bytes")));
        (tensor.shape().to_vec(), values.collect())
    }
}

pub(crate) fn ids(value: &serde_json::Value) -> Vec<u32> {
    let ids = value.as_array().expect("a list of ids");
    ids.iter()
        .map(|id| u32::try_from(id.as_u64().expect("an id")).expect("a small id"))
        .collect()
}

pub(crate) fn greedy(prompt_ids: Vec<u32>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt_ids,
        max_tokens,
        stop_token_ids: Vec::new(),
        sampling: GREEDY,
        logprobs: None,
    }
}

/// The next event; `None` at the end of the channel.
pub(crate) async fn next(events: &mut mpsc::Receiver<TokenEvent>) -> Option<TokenEvent> {
    tokio::time::timeout(PATIENCE, events.recv())
        .await
        .expect("an event in time")
}

/// All events of a request; checks that the last one, and only that, is an end.
pub(crate) async fn collect(mut events: mpsc::Receiver<TokenEvent>) -> Result<Completion, EngineError> {
    let mut completion = Completion {
        ids: Vec::new(),
        logprobs: Vec::new(),
        finish: FinishReason::Length,
        cached_tokens: 0,
        degraded: false,
    };
    loop {
        match next(&mut events).await.expect("an end before the channel closes") {
            TokenEvent::Failed(error) => {
                assert!(next(&mut events).await.is_none(), "something after a failure");
                return Err(error);
            }
            TokenEvent::Token {
                id,
                logprobs,
                cached_tokens,
                degraded,
                finish,
            } => {
                let first = completion.ids.is_empty();
                assert!(
                    first || completion.cached_tokens == cached_tokens,
                    "another count of cached tokens"
                );
                completion.cached_tokens = cached_tokens;
                assert!(degraded || !completion.degraded, "a mark that did not stay");
                completion.degraded = degraded;
                completion.ids.push(id);
                completion.logprobs.push(logprobs);
                if let Some(finish) = finish {
                    completion.finish = finish;
                    assert!(next(&mut events).await.is_none(), "something after the end");
                    return Ok(completion);
                }
            }
        }
    }
}

pub(crate) async fn generate(handle: &EngineHandle, request: GenerateRequest) -> Completion {
    collect(handle.generate(request).expect("accepted"))
        .await
        .expect("completed")
}

/// Rows of logits of a prompt.
pub(crate) async fn logits(handle: &EngineHandle, token_ids: Vec<u32>, positions: Vec<usize>) -> Vec<Vec<f32>> {
    let mut receiver = handle
        .forward(ForwardRequest { token_ids, positions })
        .expect("accepted");
    let mut rows = Vec::new();
    while let Some(row) = tokio::time::timeout(PATIENCE, receiver.recv())
        .await
        .expect("a row in time")
    {
        rows.push(row.expect("logits").logits);
    }
    rows
}

/// Waits until the counts are as `wanted` says.
pub(crate) async fn until(handle: &EngineHandle, wanted: impl Fn(EngineStats) -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !wanted(handle.stats()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    assert!(waited.await.is_ok(), "the counts stay at {:?}", handle.stats());
}

/// Waits until nothing runs, waits or holds a page.
pub(crate) async fn until_idle(handle: &EngineHandle) {
    until(handle, |stats| {
        (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    })
    .await;
}

pub(crate) fn pages_of(tokens: usize) -> u64 {
    tokens.div_ceil(KV_PAGE_TOKENS) as u64
}
