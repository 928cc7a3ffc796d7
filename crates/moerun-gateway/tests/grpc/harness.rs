//! A server on a port of its own, its client, and golden tensors to compare with.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use moerun_dispatch::{DispatchError, ExpertBackend, ExpertRequest, LocalExperts, PendingExperts};
use moerun_engine::{Engine, EngineConfig};
use moerun_gateway::{
    Gateway, GatewayError, GatewayParts, TextCodec,
    grpc::{ServeSettings, serve},
};
use moerun_kernels::CpuPool;
use moerun_model::{ExpertBank, Model};
use moerun_process::{Address, Listener};
use moerun_proto::v1::{
    self, inference_service_client::InferenceServiceClient, moe_layer_service_client::MoeLayerServiceClient,
};
use moerun_routing::ShardSpec;
use moerun_testkit::RawFile;
use moerun_types::{CombineMode, KvFormat, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use serde_json::Value;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};

pub(crate) const MAX_CONTEXT: usize = 200;
pub(crate) const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// A running server; dropping it cuts everything off.
pub(crate) struct Served {
    /// `host:port`.
    pub(crate) address: String,
    pub(crate) channel: Channel,
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) experts: Arc<GatedExperts>,
    pub(crate) shutdown: CancellationToken,
    pub(crate) server: JoinHandle<Result<(), GatewayError>>,
    _engine: Engine,
}

impl Drop for Served {
    fn drop(&mut self) {
        // The engine waits for the step under way when it is dropped, and that step may wait at the gate.
        self.experts.open();
        self.server.abort();
    }
}

/// Local experts behind a gate that a test can close, so that a step waits exactly as long as the test wants.
#[derive(Debug)]
pub(crate) struct GatedExperts {
    experts: LocalExperts,
    /// How many layers may ask for experts.
    allowed: Mutex<usize>,
    more_allowed: Condvar,
    submitted: AtomicUsize,
}

impl GatedExperts {
    /// Lets layers through until this many have asked since the start.
    pub(crate) fn allow(&self, layers: usize) {
        *self.allowed.lock().unwrap() = layers;
        self.more_allowed.notify_all();
    }

    pub(crate) fn close(&self) {
        self.allow(0);
    }

    pub(crate) fn open(&self) {
        self.allow(usize::MAX);
    }

    /// How many layers have asked for experts so far.
    pub(crate) fn submitted(&self) -> usize {
        self.submitted.load(Ordering::SeqCst)
    }
}

impl ExpertBackend for GatedExperts {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        let asked = self.submitted.fetch_add(1, Ordering::SeqCst) + 1;
        let allowed = self.allowed.lock().unwrap();
        drop(
            self.more_allowed
                .wait_while(allowed, |allowed| asked > *allowed)
                .unwrap(),
        );
        self.experts.submit(request)
    }
}

/// Serves the checkpoint in `dir` under the name "tiny".
pub(crate) async fn start(dir: &Path) -> Served {
    start_with(dir, |_| ()).await
}

pub(crate) async fn start_with(dir: &Path, change: impl FnOnce(&mut EngineConfig)) -> Served {
    let checkpoint = Checkpoint::open(dir, Needs::All).unwrap();
    let numerics = Numerics {
        format: NumberFormat::F32,
        combine: CombineMode::Exact,
        combine_block: 8,
    };
    let config = checkpoint.config().clone();
    let pool = Arc::new(CpuPool::new(1));
    let model = Arc::new(Model::load(&checkpoint, numerics.format, &mut |_, _| ()).unwrap());
    let slices = ShardSpec::All.resolve(&config, &numerics).unwrap();
    let bank = Arc::new(ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| ()).unwrap());
    let experts = Arc::new(GatedExperts {
        experts: LocalExperts::new(bank, pool.clone()),
        allowed: Mutex::new(usize::MAX),
        more_allowed: Condvar::new(),
        submitted: AtomicUsize::new(0),
    });
    let mut engine_config = EngineConfig {
        kv_memory_bytes: 64 << 20,
        kv_format: KvFormat::F32,
        max_context: MAX_CONTEXT,
        max_batch_tokens: 64,
        max_queue: 64,
        prefix_cache: true,
        speculate: 0,
    };
    change(&mut engine_config);
    let max_context = engine_config.max_context;
    let engine = Engine::start(model, experts.clone(), pool, engine_config).unwrap();
    let gateway = Arc::new(Gateway::new(GatewayParts {
        engine: engine.handle(),
        codec: TextCodec::load(dir).unwrap(),
        config,
        generation: checkpoint.generation_config().clone(),
        numerics,
        config_hash: checkpoint.config_hash(),
        served_name: "tiny".to_owned(),
        max_context,
        max_answer_tokens: None,
        workers: None,
    }));
    let listener = Listener::bind(&Address::parse("127.0.0.1:0").unwrap()).unwrap();
    let address = listener.address().unwrap().to_string();
    let shutdown = CancellationToken::new();
    let settings = ServeSettings {
        max_message_bytes: MAX_MESSAGE_BYTES,
        drain_timeout: Duration::from_secs(20),
        with_admin: true,
        ..ServeSettings::default()
    };
    let server = tokio::spawn(serve(listener, gateway.clone(), settings, shutdown.clone()));
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect().await.unwrap();
    Served {
        address,
        channel,
        gateway,
        experts,
        shutdown,
        server,
        _engine: engine,
    }
}

impl Served {
    pub(crate) fn inference(&self) -> InferenceServiceClient<Channel> {
        InferenceServiceClient::new(self.channel.clone())
    }

    pub(crate) fn moe_layer(&self) -> MoeLayerServiceClient<Channel> {
        MoeLayerServiceClient::new(self.channel.clone())
    }

    /// All messages of an answer.
    pub(crate) async fn generate(&self, request: v1::GenerateRequest) -> Result<Answer, Status> {
        let mut stream = self.inference().generate(request).await?.into_inner();
        let mut messages = Vec::new();
        while let Some(message) = stream.message().await? {
            messages.push(message);
        }
        Ok(Answer { messages })
    }

    /// Waits until the engine runs nothing.
    pub(crate) async fn idle(&self) {
        for _ in 0..2_000 {
            let stats = self.gateway.stats();
            if stats.running == 0 && stats.waiting == 0 {
                assert_eq!(stats.pages_used, 0, "an idle engine holds no pages");
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the engine is not idle: {:?}", self.gateway.stats());
    }
}

pub(crate) struct Answer {
    pub(crate) messages: Vec<v1::GenerateResponse>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        self.messages
            .iter()
            .map(|message| message.text_delta.as_str())
            .collect()
    }

    pub(crate) fn token_ids(&self) -> Vec<u32> {
        self.messages
            .iter()
            .flat_map(|message| message.token_ids.clone())
            .collect()
    }

    pub(crate) fn last(&self) -> &v1::GenerateResponse {
        self.messages.last().unwrap()
    }
}

/// A greedy request for `max_tokens` tokens whatever comes.
pub(crate) fn greedy(prompt_ids: &[u32], max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        model: "tiny".to_owned(),
        prompt: Some(token_prompt(prompt_ids)),
        max_tokens,
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.0),
            ..Default::default()
        }),
        ignore_eos: true,
        ..Default::default()
    }
}

pub(crate) fn token_prompt(ids: &[u32]) -> v1::generate_request::Prompt {
    v1::generate_request::Prompt::TokenIds(v1::TokenIds { ids: ids.to_vec() })
}

/// A golden checkpoint and what the reference computed from it.
pub(crate) struct Golden {
    pub(crate) dir: PathBuf,
    pub(crate) json: Value,
    tensors: RawFile,
}

impl Golden {
    pub(crate) fn open(family: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/golden")
            .join(family);
        let json = serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
        let tensors = RawFile::read(&dir.join("golden.safetensors")).unwrap();
        Golden { dir, json, tensors }
    }

    /// Shape and values of an f32 tensor.
    pub(crate) fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensor = self.tensors.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        (tensor.shape.clone(), floats(&tensor.data))
    }

    pub(crate) fn prompts(&self) -> Vec<Vec<u32>> {
        self.json["prompts"].as_array().unwrap().iter().map(ids).collect()
    }

    pub(crate) fn greedy(&self) -> Vec<Vec<u32>> {
        self.json["greedy"].as_array().unwrap().iter().map(ids).collect()
    }

    pub(crate) fn greedy_texts(&self) -> Vec<String> {
        let texts = self.json["greedy_text"].as_array().unwrap();
        texts.iter().map(|text| text.as_str().unwrap().to_owned()).collect()
    }
}

pub(crate) fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

/// Little-endian f32.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect()
}

pub(crate) fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The tolerance of the golden files.
pub(crate) fn assert_close(found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (at, (&found, &wanted)) in found.iter().zip(wanted).enumerate() {
        assert!(
            (found - wanted).abs() <= 1e-4 + 1e-4 * wanted.abs(),
            "{what}[{at}]: wanted {wanted}, found {found}"
        );
    }
}
