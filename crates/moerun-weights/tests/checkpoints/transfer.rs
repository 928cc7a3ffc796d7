//! Experts that go from one process to another: the same hashes and the same packed bits, and nothing else is taken.

use std::path::Path;

use moerun_kernels::FeedForward;
use moerun_types::{BlockRange, ExpertId, Family, LayerId, NumberFormat};
use moerun_weights::{Checkpoint, ExpertTensorName, MatrixForm, Needs, ReceivedExpert};

use crate::{
    directories::golden,
    quantised::{fp8_checkpoint, mxfp4_checkpoint},
};

/// Short, so that slices begin within groups of codes and blocks of scales.
const COMBINE_BLOCK: usize = 8;

fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, Needs::ExpertsOnly).unwrap()
}

fn forms(checkpoint: &Checkpoint, layer: LayerId, expert: ExpertId) -> Vec<(ExpertTensorName, MatrixForm)> {
    checkpoint.export_expert(layer, expert).unwrap().forms().collect()
}

/// What arrives of an expert that is sent in pieces of 100 bytes.
fn sent(checkpoint: &Checkpoint, layer: LayerId, expert: ExpertId) -> ReceivedExpert {
    let export = checkpoint.export_expert(layer, expert).unwrap();
    let mut received = ReceivedExpert::new(checkpoint.config(), &forms(checkpoint, layer, expert)).unwrap();
    for tensor in export.tensors() {
        tensor.chunks(100).for_each(|piece| received.push(piece).unwrap());
    }
    received
}

fn bits(weights: &FeedForward) -> impl PartialEq + std::fmt::Debug {
    let matrices = [&weights.gate_proj, &weights.up_proj, &weights.down_proj];
    let biases = [&weights.gate_bias, &weights.up_bias, &weights.down_bias];
    (
        matrices.map(|matrix| matrix.as_bytes().to_vec()),
        biases.map(|bias| {
            bias.clone()
                .map(|bias| bias.iter().map(|it| it.to_bits()).collect::<Vec<_>>())
        }),
    )
}

fn assert_arrives(checkpoint: &Checkpoint, what: &str) {
    let config = checkpoint.config();
    let intermediate = config.moe.as_ref().unwrap().intermediate;
    let num_blocks = intermediate.div_ceil(COMBINE_BLOCK) as u16;
    for layer in config.moe_layers() {
        for expert in [0, 2].map(ExpertId) {
            let received = sent(checkpoint, layer, expert);
            for blocks in [
                BlockRange {
                    first: 0,
                    end: num_blocks,
                },
                BlockRange { first: 1, end: 2 },
            ] {
                let wanted = checkpoint
                    .expert_block_hashes(layer, expert, blocks, COMBINE_BLOCK)
                    .unwrap();
                let found = received.block_hashes(config, blocks, COMBINE_BLOCK).unwrap();
                assert_eq!(found, wanted, "{what} layer {layer} expert {expert} blocks {blocks}");
                let columns = usize::from(blocks.first) * COMBINE_BLOCK
                    ..(usize::from(blocks.end) * COMBINE_BLOCK).min(intermediate);
                let load = |format| {
                    let here = received.load(config, (layer, expert), format, columns.clone()).unwrap();
                    let there = checkpoint.load_expert(layer, expert, format, columns.clone()).unwrap();
                    assert!(
                        bits(&here) == bits(&there),
                        "{what} layer {layer} expert {expert} {format}"
                    );
                };
                load(NumberFormat::F32);
                load(NumberFormat::Bf16);
            }
        }
    }
}

#[test]
fn an_expert_arrives_with_the_hashes_and_the_bits_of_its_owner() {
    for family in [
        Family::Mixtral,
        Family::Qwen3Moe,
        Family::GraniteMoe,
        Family::Llama4Text,
        Family::GptOss,
        Family::DeepseekV3,
    ] {
        assert_arrives(&open(&golden(family)), &format!("{family:?}"));
    }
    assert_arrives(&open(fp8_checkpoint().0.path()), "fp8");
    assert_arrives(&open(mxfp4_checkpoint().path()), "mxfp4");
}

#[test]
fn what_is_no_expert_of_the_model_is_refused_before_it_is_taken_in() {
    let checkpoint = open(&golden(Family::GptOss));
    let (layer, expert) = (checkpoint.config().moe_layers()[0], ExpertId(0));
    let good = forms(&checkpoint, layer, expert);
    let refused = |forms: &[(ExpertTensorName, MatrixForm)]| {
        let error = ReceivedExpert::new(checkpoint.config(), forms).unwrap_err();
        error.to_string()
    };
    assert!(refused(&[]).contains("wanted tensor gate"), "{}", refused(&[]));
    assert!(refused(&good[..3]).contains("tensor gate_bias"));
    let more = [&good[..], &good[..1]].concat();
    assert!(refused(&more).contains("another, gate"), "{}", refused(&more));
    let mut large = good.clone();
    large[0].1.rows = usize::MAX;
    assert!(refused(&large).contains(&usize::MAX.to_string()), "{}", refused(&large));
    let mut scaled = good.clone();
    scaled[1].1.scales = Some(([1, 1], scaled[1].1.dtype));
    assert!(
        refused(&scaled).contains("elements that it cannot have"),
        "{}",
        refused(&scaled)
    );

    let mut received = ReceivedExpert::new(checkpoint.config(), &good).unwrap();
    assert!(received.check_complete().is_err());
    let all: Vec<u8> = checkpoint
        .export_expert(layer, expert)
        .unwrap()
        .tensors()
        .flatten()
        .collect();
    received.push(&all).unwrap();
    received.check_complete().unwrap();
    assert!(received.push(&[0]).unwrap_err().to_string().contains("found more"));
}

#[test]
fn a_config_alone_is_enough_for_a_process_that_needs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        golden(Family::Mixtral).join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(folder.path(), Needs::Nothing).unwrap();
    assert_eq!(checkpoint.config_hash(), open(&golden(Family::Mixtral)).config_hash());
    assert!(!checkpoint.has_expert(LayerId(0), ExpertId(0)));
    assert!(checkpoint.expert_header_hash().is_none());
    assert!(Checkpoint::open(folder.path(), Needs::ExpertsOnly).is_err());
}
