//! Every decoder family against what transformers computed from the same checkpoint.

mod fixture;
mod formats;
mod golden_file;
mod rounded;

use fixture::{Captured, Fixture, Spelling, family_dir};
use golden_file::{GoldenFile, GoldenTensor};
use moerun_types::NumberFormat;
use ndarray::Array2;

/// Tokens of each prompt of the padded batch, without the padding.
fn prompts(golden: &GoldenFile) -> Vec<Vec<u32>> {
    let (ids, mask) = (golden.i64("input_ids"), golden.i64("attention_mask"));
    let length = ids.shape[1];
    let valid = |(&id, &seen): (&i64, &i64)| (seen == 1).then(|| u32::try_from(id).expect("a token id"));
    ids.values
        .chunks_exact(length)
        .zip(mask.values.chunks_exact(length))
        .map(|(ids, mask)| ids.iter().zip(mask).filter_map(valid).collect())
        .collect()
}

/// How close a tensor must be: `|found - wanted| <= absolute + relative * |wanted|`.
#[derive(Clone, Copy)]
struct Tolerance {
    absolute: f32,
    relative: f32,
}

const HIDDEN_STATES: Tolerance = Tolerance {
    absolute: 1e-4,
    relative: 1e-4,
};
const ROUTING_WEIGHTS: Tolerance = Tolerance {
    absolute: 1e-5,
    relative: 0.0,
};

fn assert_row_close(name: &str, place: (usize, usize), found: &[f32], wanted: &[f32], tolerance: Tolerance) {
    assert_eq!(found.len(), wanted.len(), "{name}");
    for (column, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let bound = tolerance.absolute + tolerance.relative * wanted.abs();
        assert!(
            (found - wanted).abs() <= bound,
            "{name}: sequence {}, position {}, column {column}: wanted {wanted}, found {found}",
            place.0,
            place.1,
        );
    }
}

/// Compares rows, those of all prompts one after another, with a golden tensor `[batch, length, width]`.
fn assert_close(golden: &GoldenTensor<f32>, prompts: &[Vec<u32>], found: &Array2<f32>) {
    for (row, place) in places(prompts).enumerate() {
        let found = found.row(row).to_vec();
        assert_row_close(&golden.name, place, &found, golden.row(place.0, place.1), HIDDEN_STATES);
    }
}

/// (sequence, position) of every row of a batch of whole prompts.
fn places(prompts: &[Vec<u32>]) -> impl Iterator<Item = (usize, usize)> {
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    lengths
        .into_iter()
        .enumerate()
        .flat_map(|(sequence, length)| (0..length).map(move |position| (sequence, position)))
}

fn tokens(prompts: &[Vec<u32>]) -> Vec<&[u32]> {
    prompts.iter().map(Vec::as_slice).collect()
}

/// One forward pass over all prompts gives every tensor that the golden file has.
fn check_forward(family: &str, spelling: Spelling) {
    let golden = GoldenFile::open(&family_dir(family));
    let fixture = Fixture::load(family, spelling, NumberFormat::F32);
    let prompts = prompts(&golden);
    let mut captured = Captured::default();
    let hidden_final = fixture.forward(
        &mut fixture.session(prompts.len()),
        &tokens(&prompts),
        Some(&mut captured),
    );

    for (layer, output) in captured.layers.iter().enumerate() {
        assert_close(&golden.f32(&format!("layer.{layer}.output")), &prompts, output);
    }
    let moe_blocks = golden.names().iter().filter(|name| name.ends_with(".topk_ids")).count();
    assert_eq!(captured.moe.len(), moe_blocks, "MoE blocks");
    for (block, (layer, input, output)) in captured.moe.iter().enumerate() {
        assert_eq!(*layer, fixture.model.config().moe_layers()[block]);
        let tensor = |what: &str| golden.f32(&format!("moe.{block}.{what}"));
        assert_close(&tensor("input"), &prompts, &input.hidden_states);
        assert_close(&tensor("router_logits"), &prompts, &input.router_logits);
        check_routing(&golden, block, &prompts, input);
        assert_close(&tensor("output"), &prompts, output);
    }
    assert_close(&golden.f32("hidden_final"), &prompts, &hidden_final);
    assert_close(&golden.f32("logits"), &prompts, &fixture.logits(&hidden_final));
}

/// The same experts, and their weights; the golden file sorts them by id.
fn check_routing(golden: &GoldenFile, block: usize, prompts: &[Vec<u32>], input: &moerun_model::MoeInput) {
    let ids = golden.i64(&format!("moe.{block}.topk_ids"));
    let weights = golden.f32(&format!("moe.{block}.topk_weights"));
    let routing = &input.routing;
    let chosen = routing
        .expert_ids
        .chunks_exact(routing.top_k)
        .zip(routing.routing_weights.chunks_exact(routing.top_k));
    for (place, (experts, found_weights)) in places(prompts).zip(chosen) {
        let mut pairs: Vec<_> = experts
            .iter()
            .map(|expert| i64::from(expert.0))
            .zip(found_weights.iter().copied())
            .collect();
        pairs.sort_by_key(|&(expert, _)| expert);
        let (found_ids, found_weights): (Vec<i64>, Vec<f32>) = pairs.into_iter().unzip();
        assert_eq!(found_ids, ids.row(place.0, place.1), "{}: {place:?}", ids.name);
        assert_row_close(
            &weights.name,
            place,
            &found_weights,
            weights.row(place.0, place.1),
            ROUTING_WEIGHTS,
        );
    }
}

/// Prefill of all prompts and step-by-step decode, all sequences in one batch, give the golden tokens.
fn check_greedy(family: &str) {
    let golden = GoldenFile::open(&family_dir(family));
    let fixture = Fixture::load(family, Spelling::Transformers5, NumberFormat::F32);
    let prompts = prompts(&golden);
    let wanted = golden.i64("greedy_ids"); // [batch, steps]
    let steps = wanted.shape[1];

    let mut session = fixture.session(prompts.len());
    let hidden_final = fixture.forward(&mut session, &tokens(&prompts), None);
    let ends = prompts.iter().scan(0, |end, prompt| {
        *end += prompt.len();
        Some(*end)
    });
    let last_rows: Vec<usize> = ends.map(|end| end - 1).collect();
    let mut next = argmax_rows(&fixture.logits(&hidden_final.select(ndarray::Axis(0), &last_rows)));
    for step in 0..steps {
        let wanted: Vec<i64> = (0..prompts.len())
            .map(|sequence| wanted.values[sequence * steps + step])
            .collect();
        assert_eq!(
            next.iter().map(|&id| i64::from(id)).collect::<Vec<_>>(),
            wanted,
            "step {step}"
        );
        let one_each: Vec<&[u32]> = next.chunks(1).collect();
        let hidden_final = fixture.forward(&mut session, &one_each, None);
        next = argmax_rows(&fixture.logits(&hidden_final));
    }
}

/// The likeliest token of each row, the lower id if two are equal.
fn argmax_rows(logits: &Array2<f32>) -> Vec<u32> {
    let best = |row: ndarray::ArrayView1<'_, f32>| {
        let better = |best: usize, id: usize| if row[id] > row[best] { id } else { best };
        u32::try_from((0..row.len()).fold(0, better)).expect("a token id")
    };
    logits.rows().into_iter().map(best).collect()
}

/// A prompt gives the same bits whole, in chunks, and in a batch with others.
fn check_invariance(fixture: &Fixture, prompts: &[Vec<u32>], what: &str) {
    let batched = fixture.forward(&mut fixture.session(prompts.len()), &tokens(prompts), None);
    let mut first_row = 0;
    for (sequence, prompt) in prompts.iter().enumerate() {
        let in_batch = batched.slice(ndarray::s![first_row..first_row + prompt.len(), ..]);
        assert!(in_batch.iter().all(|value| value.is_finite()));
        for chunk in [prompt.len(), 7, 1] {
            let alone = fixture.forward_in_chunks(prompt, chunk);
            let bits = |value: &f32| value.to_bits();
            assert!(
                in_batch.iter().map(bits).eq(alone.iter().map(bits)),
                "{what}: sequence {sequence} in chunks of {chunk} differs from the batch"
            );
        }
        first_row += prompt.len();
    }
}

/// [`check_invariance`] of the golden checkpoint and of one whose rows are several blocks long.
fn check_invariance_of_family(family: &str, format: NumberFormat) {
    let fixture = Fixture::load(family, Spelling::Transformers5, format);
    let prompts = prompts(&GoldenFile::open(&family_dir(family)));
    check_invariance(&fixture, &prompts, &format!("{format}"));

    let wide = formats::wide_checkpoint(family);
    let fixture = Fixture::load_dir(wide.path(), format);
    check_invariance(&fixture, &formats::wide_prompts(), &format!("wide, {format}"));
}

macro_rules! decoder_families {
    ($($family:ident)*) => {$(
        mod $family {
            use super::*;

            const FAMILY: &str = stringify!($family);

            #[test]
            fn forward_gives_the_golden_tensors() {
                check_forward(FAMILY, Spelling::Transformers5);
            }

            #[test]
            fn forward_gives_the_golden_tensors_from_the_hub_spelling_of_the_config() {
                check_forward(FAMILY, Spelling::Hub);
            }

            #[test]
            fn decode_gives_the_golden_tokens() {
                check_greedy(FAMILY);
            }

            #[test]
            fn bits_do_not_depend_on_chunks_or_batch_in_any_format() {
                for format in NumberFormat::ALL {
                    check_invariance_of_family(FAMILY, format);
                }
            }

            #[test]
            fn every_format_computes_with_its_rounded_weights() {
                for format in NumberFormat::ALL {
                    formats::check_rounded_weights(FAMILY, format);
                }
            }
        }
    )*};
}

decoder_families! {
    mixtral qwen2_moe qwen3_moe olmoe granitemoe phimoe deepseek_v2 deepseek_v3 gpt_oss glm4_moe ernie4_5_moe llama4_text
    llama qwen3
}
