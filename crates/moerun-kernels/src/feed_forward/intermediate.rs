//! First half of a gated feed-forward: gate and up products, activation, rounding.

use std::ops::Range;

use moerun_types::{Activation, ActivationFormat, QUANTIZED_BLOCK};

use crate::{
    ActivationRows, FeedForward, Isa, Workspace,
    bf16::to_bf16,
    exponential::{gelu, gelu_tanh, logistic, silu},
    interleaved::{InterleavedRows, RowBlock, RowsToWrite, bf16_pair, words},
    isa::Kernel,
    lines::LANES,
    quantize::quantize_activations,
    row_products::panels_per_task,
    simd::Simd,
    tile::{MAX_SUMS_OF_ONE_SEGMENT, Products, panels_together},
};

/// Rows of one feed-forward, and the intermediate columns that are wanted of them.
pub(super) struct Wanted<'a> {
    pub(super) weights: &'a FeedForward,
    /// Rows of the activations; all if `None`.
    pub(super) rows: Option<&'a [u32]>,
    /// A factor per row on the gate and up products.
    pub(super) input_factors: Option<&'a [f32]>,
    pub(super) cols: Range<usize>,
}

/// For each of `wanted`, `[rows, cols.len()]`, rounded for its down projection.
pub(super) fn intermediates<'w>(
    isa: Isa,
    workspace: &'w Workspace<'_>,
    x: ActivationRows<'_>,
    wanted: &[Wanted<'_>],
) -> &'w [InterleavedRows<'w>] {
    let pool = workspace.pool();
    // What only this half reads is given back at its end.
    let own = pool.workspace();
    let inputs =
        own.collect(wanted.iter().map(|wanted| {
            InterleavedRows::from_activations(isa, &own, wanted.weights.gate_proj.format(), x, wanted.rows)
        }));
    let outputs = workspace.collect(wanted.iter().zip(&*inputs).map(|(wanted, input)| {
        let format = wanted.weights.down_proj.format();
        InterleavedRows::zeroed(isa, workspace, format, input.rows(), wanted.cols.len())
    }));
    let all_panels: usize = wanted.iter().map(|wanted| panels_of(&wanted.cols).len()).sum();
    let work_per_panel = |input: &InterleavedRows<'_>| 2 * input.rows() * input.cols() * LANES;
    let work = wanted.iter().zip(&*inputs);
    let work = work.map(|(wanted, input)| work_per_panel(input) * panels_of(&wanted.cols).len());
    let work = work.sum();
    let tasks = wanted
        .iter()
        .zip(&*inputs)
        .enumerate()
        .flat_map(|(index, (wanted, input))| {
            let panels = panels_of(&wanted.cols);
            let chunk = panels_per_task(all_panels, work_per_panel(input), pool.threads());
            let chunks = panels.clone().step_by(chunk);
            chunks.map(move |first| (index, first..panels.end.min(first + chunk)))
        });
    let tasks = own.collect(tasks);
    let parts = own.collect(outputs.iter_mut().map(|rows| rows.writer().0));
    pool.run_sized(tasks.len(), work, &|task| {
        let (index, panels) = tasks[task].clone();
        isa.dispatch(GateUp {
            wanted: &wanted[index],
            x: &inputs[index],
            panels,
            out: &parts[index],
        });
    });
    outputs
}

/// The panels that hold `cols`.
fn panels_of(cols: &Range<usize>) -> Range<usize> {
    if cols.is_empty() {
        0..0
    } else {
        cols.start / LANES..cols.end.div_ceil(LANES)
    }
}

/// A run of panels of one feed-forward's gate and up projections, for all its rows.
struct GateUp<'a> {
    wanted: &'a Wanted<'a>,
    x: &'a InterleavedRows<'a>,
    panels: Range<usize>,
    out: &'a RowsToWrite<'a>,
}

impl Kernel for GateUp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let weights = self.wanted.weights;
        let cols = 0..self.x.cols();
        let together = panels_together(self.x.rows());
        let mut products = [[[0.0; LANES]; MAX_SUMS_OF_ONE_SEGMENT]; 2];
        for first in self.panels.clone().step_by(together) {
            let panels = first..self.panels.end.min(first + together);
            for (index, &block) in self.x.blocks().iter().enumerate() {
                let after_up = match index + 1 < self.x.blocks().len() {
                    true => Some((&weights.gate_proj, first)),
                    false => (panels.end < self.panels.end).then_some((&weights.gate_proj, panels.end)),
                };
                let order = [
                    (&weights.gate_proj, Some((&weights.up_proj, first))),
                    (&weights.up_proj, after_up),
                ];
                for ((weights, next), out) in order.into_iter().zip(&mut products) {
                    let products = Products {
                        weights,
                        x: self.x,
                        first_col: 0,
                        segments: std::slice::from_ref(&cols),
                    };
                    products.sum(simd, panels.clone(), block, 0..1, next, out);
                }
                let [gate, up] = &mut products;
                self.finish(panels.clone(), block, gate.as_flattened_mut(), up.as_flattened_mut());
            }
        }
    }
}

impl GateUp<'_> {
    /// Biases, input factor, activation and rounding of `[block rows][panels * 16]`.
    #[inline(always)]
    fn finish(&self, panels: Range<usize>, block: RowBlock, gate: &mut [f32], up: &mut [f32]) {
        let Wanted {
            weights,
            input_factors,
            cols,
            ..
        } = self.wanted;
        let width = panels.len() * LANES;
        let first_col = panels.start * LANES;
        let kept = cols.start.max(first_col)..cols.end.min(first_col + width);
        let first = kept.start - cols.start;
        let in_row = |t: usize| t * width + kept.start - first_col..t * width + kept.end - first_col;
        for t in 0..block.rows {
            for (values, bias) in [(&mut *gate, &weights.gate_bias), (&mut *up, &weights.up_bias)] {
                let values = &mut values[in_row(t)];
                if let Some(bias) = bias {
                    values
                        .iter_mut()
                        .zip(&bias[kept.clone()])
                        .for_each(|(value, bias)| *value += bias);
                }
                if let Some(factors) = input_factors {
                    let factor = factors[block.first + t];
                    values.iter_mut().for_each(|value| *value *= factor);
                }
            }
        }
        // All rows at once, whatever of them is kept: a long loop hides the latency of the exponentials.
        let all = block.rows * width;
        activate(weights.activation, &mut gate[..all], &up[..all]);
        let format = weights.down_proj.format();
        let first_word = words(format, first);
        for t in 0..block.rows {
            let values = &gate[in_row(t)];
            match format.activations() {
                ActivationFormat::F32 => {
                    let bits = values.iter().map(|value| value.to_bits());
                    self.out.put_words(block, t, first_word, bits);
                }
                ActivationFormat::Bf16 => {
                    let pairs = values.chunks(2).map(|pair| match *pair {
                        [even, odd] => bf16_pair(&[to_bf16(even), to_bf16(odd)]),
                        _ => bf16_pair(&[to_bf16(pair[0])]),
                    });
                    self.out.put_words(block, t, first_word, pairs);
                }
                ActivationFormat::Int8 => {
                    let put = |index: usize, values: &[f32; QUANTIZED_BLOCK]| {
                        let mut codes = [0; QUANTIZED_BLOCK];
                        let scale = quantize_activations(values, &mut codes);
                        self.out
                            .put_block(block, t, first / QUANTIZED_BLOCK + index, &codes, scale);
                    };
                    let (whole, rest) = values.as_chunks();
                    for (index, values) in whole.iter().enumerate() {
                        put(index, values);
                    }
                    if !rest.is_empty() {
                        let mut padded = [0.0; QUANTIZED_BLOCK];
                        padded[..rest.len()].copy_from_slice(rest);
                        put(whole.len(), &padded);
                    }
                }
            }
        }
    }
}

/// `gate = activation(gate) * up`, or what the activation makes of the two. A NaN stays a NaN.
#[inline(always)]
fn activate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    let pairs = gate.iter_mut().zip(up);
    match activation {
        Activation::Silu => pairs.for_each(|(gate, up)| *gate = silu(*gate) * up),
        Activation::Gelu => pairs.for_each(|(gate, up)| *gate = gelu(*gate) * up),
        Activation::GeluTanh => pairs.for_each(|(gate, up)| *gate = gelu_tanh(*gate) * up),
        Activation::Relu => pairs.for_each(|(gate, up)| *gate = if *gate < 0.0 { 0.0 } else { *gate } * up),
        Activation::ClampedSwiglu { alpha, limit } => pairs.for_each(|(gate, &up)| {
            let clamped = if *gate > limit { limit } else { *gate };
            let up = if up > limit { limit } else { up };
            let up = if up < -limit { -limit } else { up };
            *gate = (up + 1.0) * clamped * logistic(alpha * clamped);
        }),
    }
}
