//! Recorded outputs, and equal bits however the experts are cut and dealt.

use moerun_kernels::Activations;
use moerun_routing::{PartialSums, ShardSpec, whole_assignments};
use moerun_types::{
    ActivationFormat, BlockRange, CombineMode, ExpertSlice, NumberFormat, Numerics, RoutingWeightTarget,
};
use ndarray::Array2;

use super::{EXACT, Golden, assert_close, pool};
use crate::ExpertBank;

#[test]
fn experts_give_the_recorded_outputs() {
    for family in ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss"] {
        for block in 0..2 {
            let golden = Golden::open(family, block);
            for combine_block in [8, 128] {
                for combine in [CombineMode::Exact, CombineMode::Fast] {
                    let numerics = Numerics {
                        combine_block,
                        combine,
                        ..EXACT
                    };
                    let what = format!("{family} block {block} {}", numerics.id());
                    assert_close(&golden.whole_result(numerics).to_f32(), &golden.output, 1e-4, &what);
                }
            }
        }
    }
}

#[test]
fn bf16_experts_come_near_the_recorded_outputs() {
    for family in ["qwen3_moe", "gpt_oss"] {
        let golden = Golden::open(family, 0);
        let numerics = Numerics {
            format: NumberFormat::Bf16,
            ..EXACT
        };
        assert_close(&golden.whole_result(numerics).to_f32(), &golden.output, 0.1, family);
    }
}

#[test]
fn any_sharding_gives_the_bits_of_whole_experts() {
    for family in [
        "qwen3_moe",
        "gpt_oss",
        "llama4_text",
        "granitemoe",
        "qwen2_moe",
        "deepseek_v3",
    ] {
        let golden = Golden::open(family, 1);
        for format in NumberFormat::ALL {
            // 16 leaves a short last block where the intermediate dimension is 24.
            for combine_block in if format.is_quantized() { [32, 64] } else { [8, 16] } {
                let numerics = Numerics {
                    format,
                    combine_block,
                    ..EXACT
                };
                let whole = golden.whole_result(numerics);
                assert!(whole.to_f32().iter().any(|value| *value != 0.0), "{family}");
                for count in 1..=4 {
                    let sliced = |index| golden.shard(&ShardSpec::Slices { index, count }, numerics);
                    let dealt = |index| golden.shard(&ShardSpec::Experts { index, count }, numerics);
                    let (sliced, dealt): (Vec<_>, Vec<_>) = (0..count).map(|i| (sliced(i), dealt(i))).unzip();
                    let what = format!("{family} {} over {count}", numerics.id());
                    assert_eq!(golden.distributed_result(&sliced, numerics), whole, "{what}, slices");
                    assert_eq!(golden.distributed_result(&dealt, numerics), whole, "{what}, experts");
                    let mixed: Vec<ExpertBank> = sliced.into_iter().chain(dealt).collect();
                    assert_eq!(
                        golden.distributed_result(&mixed, numerics),
                        whole,
                        "{what}, both at once"
                    );
                }
            }
        }
    }
}

#[test]
fn several_runs_of_one_expert_serve_their_own_blocks() {
    for family in ["qwen3_moe", "gpt_oss"] {
        let golden = Golden::open(family, 0);
        // Every other block: each expert is held in runs that do not touch.
        let every_other = |parity: u16| -> Vec<ExpertSlice> {
            let whole = ShardSpec::All.resolve(golden.checkpoint.config(), &EXACT).unwrap();
            let blocks = |slice: ExpertSlice| (parity..slice.blocks.end).step_by(2).map(move |first| (slice, first));
            let one = |(slice, first)| ExpertSlice {
                blocks: BlockRange { first, end: first + 1 },
                ..slice
            };
            whole.into_iter().flat_map(blocks).map(one).collect()
        };
        let banks = [0, 1].map(|parity| golden.bank(&every_other(parity), EXACT));
        assert!(
            banks[0].held().len() > golden.checkpoint.config().moe_layers().len() * 8,
            "{family}"
        );
        assert_eq!(
            golden.distributed_result(&banks, EXACT),
            golden.whole_result(EXACT),
            "{family}"
        );
    }
}

#[test]
fn the_order_of_assignments_changes_no_bit() {
    let golden = Golden::open("granitemoe", 0);
    let bank = golden.shard(&ShardSpec::All, EXACT);
    let (x, mut assignments) = (
        golden.activations(EXACT),
        whole_assignments(&golden.routing, golden.num_blocks(EXACT)).collect::<Vec<_>>(),
    );
    let in_order = bank.execute(&pool(), golden.layer, &x, &assignments).unwrap();
    assignments.reverse();
    assert_eq!(bank.execute(&pool(), golden.layer, &x, &assignments).unwrap(), in_order);
    assignments.sort_by_key(|assignment| (assignment.row * 7919 + u32::from(assignment.expert.0)) % 101);
    assert_eq!(bank.execute(&pool(), golden.layer, &x, &assignments).unwrap(), in_order);
}

#[test]
fn the_routing_weight_scales_the_input_where_the_model_says_so() {
    let golden = Golden::open("llama4_text", 0);
    let moe = golden.checkpoint.config().moe.clone().unwrap();
    assert_eq!(moe.weight_target, RoutingWeightTarget::Input);
    // The same experts on inputs that are scaled beforehand, at weight 1.
    let mut scaled = Golden::open("llama4_text", 0);
    for (mut row, weight) in scaled.input.outer_iter_mut().zip(&mut scaled.routing.routing_weights) {
        row *= *weight;
        *weight = 1.0;
    }
    let found = golden.whole_result(EXACT).to_f32();
    assert_close(&found, &scaled.whole_result(EXACT).to_f32(), 1e-5, "llama4_text");
}

#[test]
fn loading_reports_its_progress_up_to_the_end() {
    let golden = Golden::open("qwen3_moe", 0);
    let slices = ShardSpec::All.resolve(golden.checkpoint.config(), &EXACT).unwrap();
    let mut reports = Vec::new();
    let bank = ExpertBank::load(&golden.checkpoint, &slices, EXACT, &mut |done, total| {
        reports.push((done, total))
    })
    .unwrap();
    assert_eq!(bank.held(), slices);
    assert_eq!(reports.len(), slices.len() + 1);
    assert!(reports.is_sorted() && reports[0].0 == 0, "{reports:?}");
    let &(done, total) = reports.last().unwrap();
    assert_eq!((done, total), (bank.memory_bytes(), bank.memory_bytes()));
    let empty = golden.bank(&[], EXACT);
    assert_eq!((empty.held(), empty.memory_bytes()), (&[][..], 0));
}

#[test]
fn nothing_to_do_sums_to_zero() {
    let golden = Golden::open("qwen3_moe", 0);
    let bank = golden.shard(&ShardSpec::Experts { index: 0, count: 2 }, EXACT);
    let x = golden.activations(EXACT);
    let sums = bank.execute(&pool(), golden.layer, &x, &[]).unwrap();
    assert_eq!(sums, PartialSums::zeros(CombineMode::Exact, x.rows(), x.cols()));
    let no_rows = Activations::round(ActivationFormat::F32, Array2::zeros((0, 32)).view());
    let sums = bank.execute(&pool(), golden.layer, &no_rows, &[]).unwrap();
    assert_eq!(sums.to_f32().dim(), (0, 32));
}
