//! Every number format: a run is that of the rounded weights but for the rounding of activations.

use moerun_routing::Routing;
use moerun_testkit::TinyCheckpoint;
use moerun_types::{ActivationFormat, NumberFormat};
use ndarray::{Array2, Axis};

use crate::{
    fixture::{Captured, Fixture, Spelling, family_dir},
    golden_file::GoldenFile,
    prompts,
    rounded::write_rounded,
    tokens,
};

/// How far the output of one MoE block may be from that of unrounded activations, over its own size.
///
/// bf16 rounds to 2^-9 of a value, 8-bit codes to 1/254 of the largest of 32, once before gate and up and once before
/// down.
fn block_tolerance(format: NumberFormat) -> f32 {
    match format.activations() {
        ActivationFormat::F32 => 0.0,
        ActivationFormat::Bf16 => 0.004,
        ActivationFormat::Int8 => 0.016,
    }
}

/// The same for the logits of a whole model, where the roundings of all layers add up and a routing weight may pass one
/// of phimoe's thresholds.
fn logits_tolerance(format: NumberFormat) -> f32 {
    match format.activations() {
        ActivationFormat::F32 => 0.0,
        ActivationFormat::Bf16 => 0.035,
        ActivationFormat::Int8 => 0.08,
    }
}

/// A random checkpoint whose rows are several blocks long, the last block short, and whose experts are really sliced.
pub(crate) fn wide_checkpoint(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let family = moerun_testkit::ALL_FAMILIES
        .into_iter()
        .find(|known| moerun_testkit::golden_dir(*known).ends_with(family))
        .expect("a family");
    TinyCheckpoint::wide(family, 5)
        .write(dir.path())
        .expect("a tiny checkpoint");
    dir
}

/// Prompts for [`wide_checkpoint`].
pub(crate) fn wide_prompts() -> Vec<Vec<u32>> {
    [19, 33, 4]
        .map(|length| {
            (0..length)
                .map(|index| (index * index * 31 + length * 7) % 320)
                .collect()
        })
        .to_vec()
}

/// A run in `format` has the bits of one on weights that are rounded beforehand, and comes as near to an f32 run on
/// those as the rounding of activations allows.
pub(crate) fn check_rounded_weights(family: &str, format: NumberFormat) {
    let golden = family_dir(family);
    let original = Fixture::load(family, Spelling::Transformers5, NumberFormat::F32);
    let (folder, wide) = (
        tempfile::tempdir().expect("a temporary directory"),
        wide_checkpoint(family),
    );
    let wide_original = Fixture::load_dir(wide.path(), NumberFormat::F32);
    let mut compared_tokens = 0;
    for (name, dir, original, prompts) in [
        ("golden", &*golden, original, prompts(&GoldenFile::open(&golden))),
        ("wide", wide.path(), wide_original, wide_prompts()),
    ] {
        let what = format!("{family} {name} {format}");
        let rounded_dir = folder.path().join(name);
        write_rounded(dir, &rounded_dir, original.model.config(), format);
        let found = Run::of(&Fixture::load_dir(dir, format), &prompts);
        let rounded_before = Run::of(&Fixture::load_dir(&rounded_dir, format), &prompts);
        assert!(found.logits == rounded_before.logits, "{what}: other weights are held");

        let reference = Fixture::load_dir(&rounded_dir, NumberFormat::F32);
        compare_blocks(&found, &reference, &original, format, &what);
        compared_tokens += compare_logits(&found, &Run::of(&reference, &prompts), &prompts, format, &what);
    }
    assert!(
        compared_tokens > 10,
        "{family} {format}: logits of {compared_tokens} tokens were compared"
    );
}

/// Every MoE block, given the rows that it had in the run.
fn compare_blocks(found: &Run, reference: &Fixture, original: &Fixture, format: NumberFormat, what: &str) {
    for (layer, input, output) in &found.captured.moe {
        let (wanted, routing) = reference.moe_block(*layer, &input.hidden_states);
        assert_eq!(routing, input.routing, "{what}: routers are not rounded");
        let error = distance(output, &wanted);
        assert!(error <= block_tolerance(format), "{what}, layer {layer}: {error}");
        if matches!(format, NumberFormat::Int4 | NumberFormat::Mxfp4) {
            // What is measured above is not lost in the rounding of the weights.
            let (unrounded, _) = original.moe_block(*layer, &input.hidden_states);
            let of_weights = distance(&unrounded, &wanted);
            assert!(
                of_weights > 2.0 * block_tolerance(format),
                "{what}, layer {layer}: {of_weights}"
            );
        }
    }
}

/// Logits of each prompt up to the first token for which the runs took different experts: after it other values are
/// attended to.
///
/// Returns how many those were: a golden checkpoint may have a near tie at the first token already.
fn compare_logits(found: &Run, wanted: &Run, prompts: &[Vec<u32>], format: NumberFormat, what: &str) -> usize {
    let mut first_row = 0;
    let mut rows = Vec::new();
    for prompt in prompts {
        rows.extend(
            (first_row..first_row + prompt.len()).take_while(|&row| found.experts(row).eq(wanted.experts(row))),
        );
        first_row += prompt.len();
    }
    let [found, wanted] = [found, wanted].map(|run| run.logits.select(Axis(0), &rows));
    let error = distance(&found, &wanted);
    assert!(
        rows.is_empty() || error <= logits_tolerance(format),
        "{what}, logits: {error}"
    );
    rows.len()
}

/// What one forward pass over some prompts gave.
struct Run {
    captured: Captured,
    /// `[tokens, vocab]`.
    logits: Array2<f32>,
}

impl Run {
    fn of(fixture: &Fixture, prompts: &[Vec<u32>]) -> Self {
        let mut captured = Captured::default();
        let hidden_final = fixture.forward(
            &mut fixture.session(prompts.len()),
            &tokens(prompts),
            Some(&mut captured),
        );
        Run {
            captured,
            logits: fixture.logits(&hidden_final),
        }
    }

    /// The experts of a row in every MoE block.
    fn experts(&self, row: usize) -> impl Iterator<Item = u16> {
        let of_block = move |routing: &Routing| {
            let mut ids: Vec<u16> = routing.expert_ids[row * routing.top_k..][..routing.top_k]
                .iter()
                .map(|expert| expert.0)
                .collect();
            ids.sort_unstable();
            ids
        };
        self.captured
            .moe
            .iter()
            .flat_map(move |(_, input, _)| of_block(&input.routing))
    }
}

/// Length of the difference over the length of `wanted`.
fn distance(found: &Array2<f32>, wanted: &Array2<f32>) -> f32 {
    let length =
        |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    let difference = length(&mut found.iter().zip(wanted).map(|(found, wanted)| found - wanted));
    (difference / length(&mut wanted.iter().copied())) as f32
}
