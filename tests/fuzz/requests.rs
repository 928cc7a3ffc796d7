//! Requests of clients, given to the services as the door gives them.

use std::sync::Arc;

use futures::StreamExt;
use moerun_dispatch::LocalExperts;
use moerun_engine::{Engine, EngineConfig};
use moerun_gateway::{
    Gateway, GatewayParts, TextCodec,
    grpc::{AdminDoor, InferenceDoor, MoeLayerDoor},
};
use moerun_kernels::CpuPool;
use moerun_model::{ExpertBank, Model};
use moerun_proto::v1::{
    self, admin_service_server::AdminService, generate_request::Prompt, inference_service_server::InferenceService,
    moe_layer_service_server::MoeLayerService,
};
use moerun_routing::ShardSpec;
use moerun_tests::golden_dir;
use moerun_types::{CombineMode, KvFormat, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use prost::Message;
use tokio::runtime::Runtime;
use tonic::Request;

use crate::{Form, Target};

/// Messages of an answer that are waited for before the client goes away.
const MESSAGES: usize = 2;

/// A gateway over a tiny model, with experts of its own.
struct Served {
    gateway: Arc<Gateway>,
    runtime: Runtime,
    _engine: Engine,
}

pub(crate) fn targets() -> Vec<Target> {
    let served = Arc::new(Served::start());
    vec![
        generate(&served),
        forward(&served),
        tokenize(&served),
        layers(&served),
        admin(&served),
    ]
}

impl Served {
    fn start() -> Self {
        let dir = golden_dir("qwen3_moe");
        let checkpoint = Checkpoint::open(&dir, Needs::All).expect("a golden checkpoint");
        let numerics = Numerics {
            format: NumberFormat::F32,
            combine: CombineMode::Exact,
            combine_block: 8,
        };
        let (config, pool) = (checkpoint.config().clone(), Arc::new(CpuPool::new(1)));
        let model = Model::load(&checkpoint, numerics.format, &mut |_, _| ()).expect("it loads");
        let slices = ShardSpec::All.resolve(&config, &numerics).expect("the whole model");
        let bank = ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| ()).expect("it loads");
        let experts = Arc::new(LocalExperts::new(Arc::new(bank), Arc::clone(&pool)));
        let bounds = EngineConfig {
            kv_memory_bytes: 8 << 20,
            kv_format: KvFormat::F32,
            max_context: 200,
            max_batch_tokens: 64,
            max_queue: 64,
            prefix_cache: true,
            speculate: 2,
        };
        let max_context = bounds.max_context;
        let engine = Engine::start(Arc::new(model), experts, pool, bounds).expect("it starts");
        let gateway = Arc::new(Gateway::new(GatewayParts {
            engine: engine.handle(),
            codec: TextCodec::load(&dir).expect("a golden tokenizer"),
            config,
            generation: checkpoint.generation_config().clone(),
            numerics,
            config_hash: checkpoint.config_hash(),
            served_name: "tiny".to_owned(),
            max_context,
            max_answer_tokens: None,
            workers: None,
        }));
        Self {
            gateway,
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime"),
            _engine: engine,
        }
    }
}

fn generate(served: &Arc<Served>) -> Target {
    let sampling = v1::SamplingParams {
        temperature: Some(0.7),
        top_k: Some(5),
        top_p: Some(0.9),
        min_p: Some(0.01),
        repetition_penalty: Some(1.1),
        seed: Some(7),
    };
    let text = v1::GenerateRequest {
        model: "tiny".to_owned(),
        prompt: Some(Prompt::Text("In the beginning".to_owned())),
        max_tokens: 4,
        sampling: Some(sampling),
        stop: vec!["the".to_owned()],
        stop_token_ids: vec![3],
        ignore_eos: true,
        logprobs: Some(2),
    };
    let ids = v1::GenerateRequest {
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: vec![1, 2, 3] })),
        ..text.clone()
    };
    let message = v1::ChatMessage {
        role: "user".to_owned(),
        content: "What is a river?".to_owned(),
    };
    let chat = v1::GenerateRequest {
        prompt: Some(Prompt::Chat(v1::Chat {
            messages: vec![message],
        })),
        ..text.clone()
    };
    let inputs = [text, ids, chat].map(|request| request.encode_to_vec()).to_vec();
    let (served, door) = (Arc::clone(served), InferenceDoor::new(Arc::clone(&served.gateway)));
    Target::new("GenerateRequest", Form::Proto, inputs, move |bytes| {
        let Ok(request) = v1::GenerateRequest::decode(bytes) else {
            return;
        };
        served.runtime.block_on(async {
            if let Ok(answer) = door.generate(Request::new(request)).await {
                let _ = answer.into_inner().take(MESSAGES).collect::<Vec<_>>().await;
            }
        });
    })
}

fn forward(served: &Arc<Served>) -> Target {
    let request = v1::ForwardRequest {
        token_ids: vec![1, 2, 3],
        positions: vec![0, 2],
        ..v1::ForwardRequest::default()
    };
    let (served, door) = (Arc::clone(served), InferenceDoor::new(Arc::clone(&served.gateway)));
    Target::new(
        "ForwardRequest",
        Form::Proto,
        vec![request.encode_to_vec()],
        move |bytes| {
            let Ok(request) = v1::ForwardRequest::decode(bytes) else {
                return;
            };
            served.runtime.block_on(async {
                if let Ok(answer) = door.forward(Request::new(request)).await {
                    let _ = answer.into_inner().take(MESSAGES).collect::<Vec<_>>().await;
                }
            });
        },
    )
}

fn tokenize(served: &Arc<Served>) -> Target {
    let request = v1::TokenizeRequest {
        input: Some(v1::tokenize_request::Input::Text("In the beginning".to_owned())),
        ..v1::TokenizeRequest::default()
    };
    let back = v1::DetokenizeRequest {
        token_ids: vec![1, 2, 3],
        ..v1::DetokenizeRequest::default()
    };
    let inputs = vec![request.encode_to_vec(), back.encode_to_vec()];
    let (served, door) = (Arc::clone(served), InferenceDoor::new(Arc::clone(&served.gateway)));
    Target::new("TokenizeRequest", Form::Proto, inputs, move |bytes| {
        served.runtime.block_on(async {
            if let Ok(request) = v1::TokenizeRequest::decode(bytes) {
                let _ = door.tokenize(Request::new(request)).await;
            }
            if let Ok(request) = v1::DetokenizeRequest::decode(bytes) {
                let _ = door.detokenize(Request::new(request)).await;
            }
        });
    })
}

fn layers(served: &Arc<Served>) -> Target {
    let hidden = served.gateway.model().config.hidden;
    let request = v1::RunLayerRequest {
        layer: 0,
        rows: 2,
        hidden_states: vec![0; 2 * 4 * hidden].into(),
        ..v1::RunLayerRequest::default()
    };
    let (served, door) = (Arc::clone(served), MoeLayerDoor::new(Arc::clone(&served.gateway)));
    Target::new(
        "RunLayerRequest",
        Form::Proto,
        vec![request.encode_to_vec()],
        move |bytes| {
            let Ok(request) = v1::RunLayerRequest::decode(bytes) else {
                return;
            };
            let _ = served.runtime.block_on(door.run_layer(Request::new(request)));
        },
    )
}

fn admin(served: &Arc<Served>) -> Target {
    let (served, door) = (Arc::clone(served), AdminDoor::new(Arc::clone(&served.gateway)));
    Target::new("GetStatsRequest", Form::Proto, vec![Vec::new()], move |bytes| {
        let Ok(request) = v1::GetStatsRequest::decode(bytes) else {
            return;
        };
        let _ = served.runtime.block_on(door.get_stats(Request::new(request)));
    })
}
