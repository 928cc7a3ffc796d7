//! Banks of real checkpoints, and what was recorded of their MoE blocks.

mod changed;
mod parity;
mod refusals;
mod stored_blocks;

use std::path::PathBuf;

use moerun_kernels::{Activations, CpuPool};
use moerun_routing::{PartialSums, Placement, Routing, ShardSpec, whole_assignments};
use moerun_types::{CombineMode, ExpertId, ExpertSlice, LayerId, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use ndarray::Array2;
use safetensors::SafeTensors;

use super::ExpertBank;

const EXACT: Numerics = Numerics {
    format: NumberFormat::F32,
    combine: CombineMode::Exact,
    combine_block: 8,
};

/// A golden checkpoint, and what was recorded of one of its MoE blocks for the tokens that are not padding.
struct Golden {
    checkpoint: Checkpoint,
    layer: LayerId,
    /// `[tokens, hidden]`.
    input: Array2<f32>,
    /// `[tokens, hidden]`, shared experts included.
    output: Array2<f32>,
    routing: Routing,
}

impl Golden {
    fn open(family: &str, block: usize) -> Self {
        let dir: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../../tests/golden", family]
            .iter()
            .collect();
        let checkpoint = Checkpoint::open(&dir, Needs::ExpertsOnly).unwrap_or_else(|error| panic!("{family}: {error}"));
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let recorded = SafeTensors::deserialize(&bytes).unwrap();
        let mask = i64s(&recorded, "attention_mask");
        let valid: Vec<usize> = (0..mask.len()).filter(|&token| mask[token] == 1).collect();
        let rows = |name: &str| {
            let values = f32s(&recorded, &format!("moe.{block}.{name}"));
            let width = values.len() / mask.len();
            let all = Array2::from_shape_vec((mask.len(), width), values).unwrap();
            all.select(ndarray::Axis(0), &valid)
        };
        let ids = i64s(&recorded, &format!("moe.{block}.topk_ids"));
        let top_k = ids.len() / mask.len();
        let chosen = valid.iter().flat_map(|token| &ids[token * top_k..(token + 1) * top_k]);
        Self {
            layer: checkpoint.config().moe_layers()[block],
            input: rows("input"),
            output: rows("output"),
            routing: Routing {
                top_k,
                expert_ids: chosen.map(|&id| ExpertId(id as u16)).collect(),
                routing_weights: rows("topk_weights").into_iter().collect(),
            },
            checkpoint,
        }
    }

    fn num_blocks(&self, numerics: Numerics) -> usize {
        numerics.num_blocks(self.checkpoint.config().moe.as_ref().unwrap().intermediate)
    }

    fn bank(&self, slices: &[ExpertSlice], numerics: Numerics) -> ExpertBank {
        ExpertBank::load(&self.checkpoint, slices, numerics, &mut |_, _| {}).unwrap()
    }

    fn shard(&self, spec: &ShardSpec, numerics: Numerics) -> ExpertBank {
        self.bank(&spec.resolve(self.checkpoint.config(), &numerics).unwrap(), numerics)
    }

    fn activations(&self, numerics: Numerics) -> Activations {
        Activations::round(numerics.format.activations(), self.input.view())
    }

    fn whole_result(&self, numerics: Numerics) -> PartialSums {
        let assignments: Vec<_> = whole_assignments(&self.routing, self.num_blocks(numerics)).collect();
        let bank = self.shard(&ShardSpec::All, numerics);
        bank.execute(&pool(), self.layer, &self.activations(numerics), &assignments)
            .unwrap()
    }

    /// The sum of what each of `banks` gives for its part of the plan.
    fn distributed_result(&self, banks: &[ExpertBank], numerics: Numerics) -> PartialSums {
        let held: Vec<Vec<ExpertSlice>> = banks.iter().map(|bank| bank.held().to_vec()).collect();
        let placement = Placement::new(self.checkpoint.config(), self.num_blocks(numerics), &held).unwrap();
        let x = self.activations(numerics);
        let mut sums = PartialSums::zeros(numerics.combine, x.rows(), x.cols());
        let work: Vec<_> = whole_assignments(&self.routing, self.num_blocks(numerics)).collect();
        let plan = placement.plan_layer(self.layer, &work, &mut |run| run.holders.first().map(|&it| it as usize));
        assert_eq!(plan.unheld, []);
        for part in plan.batches.into_iter().flat_map(|batch| batch.split(7)) {
            let bank = &banks[part.worker];
            let answer = bank
                .execute(&pool(), self.layer, &x.select_rows(&part.rows), &part.assignments)
                .unwrap();
            sums.add_rows(&part.rows, &answer).unwrap();
        }
        sums
    }
}

fn pool() -> CpuPool {
    CpuPool::new(2)
}

fn f32s(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let (elements, _) = tensors.tensor(name).unwrap().data().as_chunks();
    elements.iter().map(|&element| f32::from_le_bytes(element)).collect()
}

fn i64s(tensors: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let (elements, _) = tensors.tensor(name).unwrap().data().as_chunks();
    elements.iter().map(|&element| i64::from_le_bytes(element)).collect()
}

fn assert_close(found: &Array2<f32>, wanted: &Array2<f32>, tolerance: f32, what: &str) {
    assert_eq!(found.dim(), wanted.dim(), "{what}");
    for ((place, found), wanted) in found.indexed_iter().zip(wanted) {
        let close = (found - wanted).abs() <= tolerance + tolerance * wanted.abs();
        assert!(close, "{what} at {place:?}: {found}, recorded {wanted}");
    }
}
