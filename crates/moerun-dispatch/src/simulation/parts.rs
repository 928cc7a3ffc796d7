//! What the simulated processes hold, loaded once for all seeds; and what they are asked, with the answers of experts in one
//! process.

use std::{
    path::Path,
    sync::{Arc, OnceLock},
};

use moerun_kernels::{Activations, CpuPool};
use moerun_model::ExpertBank;
use moerun_proto::WorkerIdentity;
use moerun_routing::{Routing, ShardSpec};
use moerun_types::{CombineMode, ExpertId, LayerId, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use moerun_worker::identify;
use ndarray::Array2;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{faults::Schedule, network::WORKERS};
use crate::{ExpertBackend, ExpertRequest, LocalExperts};

/// Workers that hold the model between them; one more, which holds all of it, may join.
pub(super) const MEMBERS: usize = WORKERS - 1;

/// Short blocks, so that the small model is really cut.
const NUMERICS: Numerics = Numerics {
    format: NumberFormat::F32,
    combine: CombineMode::Exact,
    combine_block: 8,
};

/// A worker's experts.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) bank: Arc<ExpertBank>,
    pub(super) identity: WorkerIdentity,
}

/// Something to ask, and the right answer.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) request: ExpertRequest,
    pub(super) bits: Vec<u32>,
}

/// All that seeds share.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) checkpoint: Arc<Checkpoint>,
    pub(super) cases: Vec<Case>,
    /// By number of holders less one, then by worker.
    members: [Vec<Holder>; 2],
    whole: Holder,
}

pub(super) fn numerics() -> Numerics {
    NUMERICS
}

pub(super) fn parts() -> &'static Parts {
    static PARTS: OnceLock<Parts> = OnceLock::new();
    PARTS.get_or_init(Parts::load)
}

/// What worker `index` of a schedule holds.
pub(super) fn holder(schedule: &Schedule, index: usize) -> &'static Holder {
    let parts = parts();
    parts.members[schedule.setup.holders - 1]
        .get(index)
        .unwrap_or(&parts.whole)
}

impl Parts {
    fn load() -> Self {
        let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/qwen3_moe"));
        let checkpoint = Arc::new(Checkpoint::open(dir, Needs::All).unwrap());
        let experts = checkpoint.config().moe.as_ref().unwrap().num_experts;
        let hold = |shard: &ShardSpec| {
            let slices = shard.resolve(checkpoint.config(), &NUMERICS).unwrap();
            let bank = ExpertBank::load(&checkpoint, &slices, NUMERICS, &mut |_, _| {}).unwrap();
            Holder {
                identity: identify(&checkpoint, &slices, NUMERICS, &mut |_, _| {}).unwrap(),
                bank: Arc::new(bank),
            }
        };
        // Neighbours share experts, so that each member shares with each other.
        let member = |holders: usize, index: usize| {
            let held = (0..experts).filter(|expert| (0..holders).any(|replica| (expert + replica) % MEMBERS == index));
            let list: Vec<String> = held.map(|expert| format!("*:{expert}")).collect();
            hold(&ShardSpec::parse_experts(&list.join(",")).unwrap())
        };
        let whole = hold(&ShardSpec::All);
        let local = LocalExperts::new(Arc::clone(&whole.bank), Arc::new(CpuPool::new(1)));
        Self {
            cases: (0..24).map(|seed| case(&checkpoint, &local, seed)).collect(),
            members: [1, 2].map(|holders| (0..MEMBERS).map(|index| member(holders, index)).collect()),
            whole,
            checkpoint,
        }
    }
}

fn case(checkpoint: &Checkpoint, local: &LocalExperts, seed: u64) -> Case {
    let (model, layers) = (checkpoint.config(), checkpoint.config().moe_layers());
    let moe = model.moe.as_ref().unwrap();
    let mut random = StdRng::seed_from_u64(seed);
    let tokens = random.random_range(1..=6);
    let rows = Array2::from_shape_simple_fn((tokens, model.hidden), || random.random_range(-2.0f32..2.0));
    let mut expert_ids = Vec::new();
    for _ in 0..tokens {
        let first = random.random_range(0..moe.num_experts);
        expert_ids.extend((0..moe.top_k).map(|k| ExpertId(((first + k) % moe.num_experts) as u16)));
    }
    let routing_weights = expert_ids.iter().map(|_| random.random_range(0.05f32..0.9)).collect();
    let layer: LayerId = layers[seed as usize % layers.len()];
    let request = ExpertRequest {
        layer,
        activations: Activations::round(NUMERICS.format.activations(), rows.view()),
        routing: Routing {
            top_k: moe.top_k,
            expert_ids,
            routing_weights,
        },
    };
    let combined = local.submit(request.clone()).unwrap().wait().unwrap();
    Case {
        request,
        bits: combined.hidden_states.iter().map(|value| value.to_bits()).collect(),
    }
}
