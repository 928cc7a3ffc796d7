//! What may be absent for whom.

use std::fs;

use moerun_types::{ExpertId, Family, LayerId};
use moerun_weights::{Checkpoint, Needs, TensorRole};

use crate::{
    directories::{assert_refused, copy_of, golden, open},
    files,
};

fn is_expert(name: &str) -> bool {
    name.contains(".experts.") || name.contains("input_linear") || name.contains("output_linear")
}

/// Takes the tensors out of `model.safetensors` for which `keep` does not hold.
fn keep(dir: &std::path::Path, keep: impl Fn(&str) -> bool) {
    let path = dir.join("model.safetensors");
    let mut tensors = files::read(&path);
    tensors.retain(|name, _| keep(name));
    files::write(&path, &tensors);
}

#[test]
fn a_gateway_needs_no_experts_and_a_worker_nothing_else() {
    for family in Family::ALL
        .into_iter()
        .filter(|family| !matches!(family, Family::Llama | Family::Qwen3))
    {
        let whole = open(&golden(family)).unwrap();
        let layer = whole.config().moe_layers()[0];

        let dir = copy_of(family);
        keep(dir.path(), |name| !is_expert(name));
        let gateway = Checkpoint::open(dir.path(), Needs::GatewayOnly).unwrap_or_else(|e| panic!("{family:?}: {e}"));
        assert!(!gateway.has_expert(layer, ExpertId(0)) && gateway.expert(layer, ExpertId(0)).is_err());
        assert_eq!(gateway.expert_header_hash(), None);
        assert_eq!(gateway.dense_header_hash(), whole.dense_header_hash());
        assert_eq!(gateway.router_hash(), whole.router_hash());
        for needs in [Needs::All, Needs::ExpertsOnly] {
            assert_refused(dir.path(), needs, &["missing", &format!("model.layers.{layer}.")]);
        }

        let dir = copy_of(family);
        keep(dir.path(), is_expert);
        let worker = Checkpoint::open(dir.path(), Needs::ExpertsOnly).unwrap_or_else(|e| panic!("{family:?}: {e}"));
        assert!(worker.has_expert(layer, ExpertId(0)) && !worker.has(TensorRole::Embedding));
        assert_eq!(worker.expert_header_hash(), whole.expert_header_hash());
        assert_eq!((worker.dense_header_hash(), worker.router_hash()), (None, None));
        assert!(worker.vector(TensorRole::FinalNorm).is_err());
        for needs in [Needs::All, Needs::GatewayOnly] {
            assert_refused(dir.path(), needs, &["missing", "model.embed_tokens.weight"]);
        }
    }
}

#[test]
fn an_expert_without_one_of_its_matrices_is_not_there() {
    let dir = copy_of(Family::Mixtral);
    keep(dir.path(), |name| {
        !name.contains("layers.1.block_sparse_moe.experts.5.w2")
    });
    let gateway = Checkpoint::open(dir.path(), Needs::GatewayOnly).unwrap();
    assert!(!gateway.has_expert(LayerId(1), ExpertId(5)));
    assert!(gateway.has_expert(LayerId(1), ExpertId(4)) && gateway.has_expert(LayerId(0), ExpertId(5)));
    assert_eq!(gateway.expert_header_hash(), None);
}

#[test]
fn what_is_there_without_need_must_still_be_right() {
    let dir = copy_of(Family::Mixtral);
    let path = dir.path().join("model.safetensors");
    let mut tensors = files::read(&path);
    let name = "model.layers.1.block_sparse_moe.experts.5.w2.weight";
    tensors.get_mut(name).unwrap().shape = vec![48, 32];
    files::write(&path, &tensors);
    assert_refused(dir.path(), Needs::GatewayOnly, &[name, "[32, 48]", "[48, 32]"]);
}

#[test]
fn a_shard_of_experts_alone_may_be_absent_for_a_gateway() {
    let dir = copy_of(Family::Olmoe);
    files::shard(dir.path(), |name| usize::from(is_expert(name)));
    fs::remove_file(dir.path().join(files::shard_name(1))).unwrap();
    Checkpoint::open(dir.path(), Needs::GatewayOnly).unwrap();
    assert_refused(dir.path(), Needs::All, &[&files::shard_name(1), "mlp.experts."]);
    fs::remove_file(dir.path().join(files::shard_name(0))).unwrap();
    assert_refused(dir.path(), Needs::GatewayOnly, &[&files::shard_name(0), "not there"]);
}
