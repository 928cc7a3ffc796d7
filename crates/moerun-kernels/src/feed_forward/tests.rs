//! Grouped feed-forwards against their definition, and one set of bits however the work is cut.

mod terms;

use moerun_types::{ActivationFormat, NumberFormat};
use ndarray::{Array2, s};

use super::*;
use crate::{
    Activations,
    row_products::MAX_TERM_LIMIT,
    test_data::{Rng, pack_array, product_by_definition, rounded_rows, rounded_weights},
};

/// Experts, their plain weights and a routing, from a seed.
struct Case {
    seed: u64,
    format: NumberFormat,
    hidden: usize,
    intermediate: usize,
    combine_block: usize,
    x: Array2<f32>,
    experts: Vec<Plain>,
    /// Per expert, rows and routing weights.
    routing: Vec<(Vec<u32>, Vec<f32>)>,
    weight_on_input: bool,
}

/// Weights of one expert, rounded, as arrays.
#[derive(Clone)]
struct Plain {
    gate: Array2<f32>,
    up: Array2<f32>,
    down: Array2<f32>,
    biases: Option<[Vec<f32>; 3]>,
    activation: Activation,
}

impl Plain {
    fn random(rng: &mut Rng, format: NumberFormat, hidden: usize, intermediate: usize) -> Self {
        let activation = [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Relu,
            Activation::ClampedSwiglu {
                alpha: 1.702,
                limit: 0.8,
            },
        ][rng.below(5)];
        let mut weights = |rows, cols| rounded_weights(format, &rng.array(rows, cols));
        let (gate, up) = (weights(intermediate, hidden), weights(intermediate, hidden));
        let down = weights(hidden, intermediate);
        let biases = (rng.below(2) == 0).then(|| [rng.vec(intermediate), rng.vec(intermediate), rng.vec(hidden)]);
        Self {
            gate,
            up,
            down,
            biases,
            activation,
        }
    }

    /// The columns `cols` of the intermediate dimension, packed.
    fn pack(&self, format: NumberFormat, cols: Range<usize>) -> FeedForward {
        let bias = |index: usize| self.biases.as_ref().map(|biases| biases[index][cols.clone()].to_vec());
        FeedForward {
            gate_proj: pack_array(format, &self.gate.slice(s![cols.clone(), ..]).to_owned()),
            up_proj: pack_array(format, &self.up.slice(s![cols.clone(), ..]).to_owned()),
            down_proj: pack_array(format, &self.down.slice(s![.., cols.clone()]).to_owned()),
            gate_bias: bias(0),
            up_bias: bias(1),
            down_bias: self.biases.as_ref().map(|biases| biases[2].clone()),
            activation: self.activation,
        }
    }

    /// The intermediate values of one row in f64, before rounding.
    fn intermediate(&self, x: &[f32], input_factor: f32) -> Vec<f64> {
        let product = |weights: &Array2<f32>, bias: usize, col: usize| {
            let sum: f64 = weights
                .row(col)
                .iter()
                .zip(x)
                .map(|(&w, &x)| f64::from(w) * f64::from(x))
                .sum();
            let bias = self.biases.as_ref().map_or(0.0, |biases| f64::from(biases[bias][col]));
            (sum + bias) * f64::from(input_factor)
        };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        (0..self.gate.nrows())
            .map(|col| {
                let (gate, up) = (product(&self.gate, 0, col), product(&self.up, 1, col));
                match self.activation {
                    Activation::Silu => gate * sigmoid(gate) * up,
                    Activation::Gelu => 0.5 * gate * (1.0 + erf(gate / std::f64::consts::SQRT_2)) * up,
                    Activation::GeluTanh => {
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                        0.5 * gate * (1.0 + inner.tanh()) * up
                    }
                    Activation::Relu => gate.max(0.0) * up,
                    Activation::ClampedSwiglu { alpha, limit } => {
                        let (gate, limit) = (gate.min(f64::from(limit)), f64::from(limit));
                        (up.clamp(-limit, limit) + 1.0) * gate * sigmoid(f64::from(alpha) * gate)
                    }
                }
            })
            .collect()
    }

    /// The output of one row in f64, down bias included, and the largest sum of magnitudes behind it.
    fn output(&self, x: &[f32], input_factor: f32, format: NumberFormat) -> (Vec<f64>, f64) {
        let mut intermediate = self.intermediate(x, input_factor);
        if format != NumberFormat::F32 {
            let row = Array2::from_shape_fn((1, intermediate.len()), |(_, col)| intermediate[col] as f32);
            intermediate = rounded_rows(format, &row).into_iter().map(f64::from).collect();
        }
        let mut magnitude = 0.0_f64;
        let output = (0..self.down.nrows())
            .map(|row| {
                let products = self
                    .down
                    .row(row)
                    .into_iter()
                    .zip(&intermediate)
                    .map(|(&w, h)| f64::from(w) * h);
                magnitude = magnitude.max(products.clone().map(f64::abs).sum());
                products.sum::<f64>() + self.biases.as_ref().map_or(0.0, |biases| f64::from(biases[2][row]))
            })
            .collect();
        (output, magnitude)
    }
}

/// erf by its Taylor series where that converges well; beyond it is 1 as far as f32 can tell.
fn erf(x: f64) -> f64 {
    if x.abs() > 4.5 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        let n = f64::from(n);
        term *= -x * x / n;
        sum += term / (2.0 * n + 1.0);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

impl Case {
    fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let format = NumberFormat::ALL[rng.below(5)];
        let (hidden, intermediate) = (
            1 + rng.below(80),
            1 + rng.below(if format.is_quantized() { 200 } else { 70 }),
        );
        let combine_block = match format.column_unit() {
            1 => [8, 5, 16, 32, 128][rng.below(5)],
            2 => [8, 2, 16, 32, 128][rng.below(5)],
            unit => unit * [1, 1, 2, 3][rng.below(4)],
        };
        let tokens = rng.below(20);
        let x = rounded_rows(format, &rng.array(tokens, hidden));
        let num_experts = 1 + rng.below(4);
        let experts = (0..num_experts)
            .map(|_| Plain::random(&mut rng, format, hidden, intermediate))
            .collect();
        let routing = (0..num_experts)
            .map(|_| {
                let rows: Vec<u32> = (0..tokens as u32).filter(|_| rng.below(3) > 0).collect();
                let weights = rng.vec(rows.len());
                (rows, weights)
            })
            .collect();
        let weight_on_input = rng.below(3) == 0;
        Self {
            seed,
            format,
            hidden,
            intermediate,
            combine_block,
            x,
            experts,
            routing,
            weight_on_input,
        }
    }

    fn activations(&self) -> Activations {
        Activations::round(self.format.activations(), self.x.view())
    }

    fn num_blocks(&self) -> usize {
        self.intermediate.div_ceil(self.combine_block)
    }

    fn whole(&self) -> Vec<FeedForward> {
        self.experts
            .iter()
            .map(|expert| expert.pack(self.format, 0..self.intermediate))
            .collect()
    }

    /// A group per expert with all its rows, running `blocks` of it.
    fn groups<'a>(&'a self, weights: &'a [FeedForward], blocks: Range<usize>, owes_down_bias: bool) -> Vec<Group<'a>> {
        let groups = weights.iter().zip(&self.routing);
        groups
            .map(|(weights, (rows, routing_weights))| Group {
                weights,
                rows,
                routing_weights,
                blocks: blocks.clone(),
                owes_down_bias,
            })
            .collect()
    }

    fn exact(&self, isa: Isa, threads: usize, groups: &[Group<'_>]) -> Vec<i64> {
        let mut sums = vec![0; self.x.nrows() * self.hidden];
        self.add_exact(isa, threads, &self.activations(), groups, &mut sums);
        sums
    }

    fn add_exact(&self, isa: Isa, threads: usize, x: &Activations, groups: &[Group<'_>], sums: &mut [i64]) {
        let pool = CpuPool::new(threads);
        let Case {
            weight_on_input,
            combine_block,
            ..
        } = *self;
        let grouped = Grouped {
            isa,
            workspace: &pool.workspace(),
            x: x.into(),
            groups,
            weight_on_input,
            combine_block,
        };
        grouped
            .exact(1e5, sums)
            .unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
    }

    /// The combined output in f64, and a bound on the error of any f32 computation of it.
    fn truth(&self) -> (Vec<f64>, f64) {
        let mut out = vec![0.0; self.x.nrows() * self.hidden];
        let mut magnitude = 1.0;
        for (expert, (rows, routing_weights)) in self.experts.iter().zip(&self.routing) {
            for (&row, &weight) in rows.iter().zip(routing_weights) {
                let x = self.x.row(row as usize).to_vec();
                let (input_factor, factor) = if self.weight_on_input {
                    (weight, 1.0)
                } else {
                    (1.0, f64::from(weight))
                };
                let (values, sum) = expert.output(&x, input_factor, self.format);
                magnitude += sum;
                let out = &mut out[row as usize * self.hidden..][..self.hidden];
                out.iter_mut()
                    .zip(values)
                    .for_each(|(out, value)| *out += value * factor);
            }
        }
        // A value on the border between two that the format has may be rounded the other way in f64.
        let epsilon = match self.format.activations() {
            ActivationFormat::F32 => 2e-6,
            ActivationFormat::Bf16 => 4e-3,
            ActivationFormat::Int8 => 8e-3,
        };
        (out, magnitude * epsilon)
    }
}

fn from_fixed(sum: i64) -> f64 {
    sum as f64 / (1_u64 << 40) as f64
}

#[test]
fn grouped_sums_agree_with_double_precision() {
    for seed in 0..150 {
        let case = Case::from_seed(seed);
        let weights = case.whole();
        let groups = case.groups(&weights, 0..case.num_blocks(), true);
        let (truth, tolerance) = case.truth();
        let exact = case.exact(Isa::current(), 2, &groups);
        let mut fast = vec![0.0; exact.len()];
        grouped_fast(
            &CpuPool::new(2),
            &case.activations(),
            &groups,
            case.weight_on_input,
            case.combine_block,
            &mut fast,
        );
        for ((&exact, &fast), &truth) in exact.iter().zip(&fast).zip(&truth) {
            let (exact, fast) = (from_fixed(exact), f64::from(fast));
            assert!(
                (exact - truth).abs() <= tolerance,
                "seed {seed}: exact {exact}, not {truth}"
            );
            assert!(
                (fast - truth).abs() <= tolerance,
                "seed {seed}: fast {fast}, not {truth}"
            );
        }
    }
}

#[test]
fn terms_have_the_bits_of_their_definition() {
    for seed in 0..60 {
        let mut case = Case::from_seed(seed);
        case.weight_on_input = false;
        for expert in &mut case.experts {
            expert.activation = Activation::Relu;
        }
        let activations = case.format.activations();
        let weights = case.whole();
        let mut expected = vec![0_i64; case.x.nrows() * case.hidden];
        for ((expert, packed), (rows, routing_weights)) in case.experts.iter().zip(&weights).zip(&case.routing) {
            for (&row, &weight) in rows.iter().zip(routing_weights) {
                let x = case.activations().select_rows(&[row]);
                let biases = expert.biases.as_ref();
                let [gate, up] = [&packed.gate_proj, &packed.up_proj]
                    .map(|projection| product_by_definition(projection, 0..case.hidden, &x));
                let intermediate = Array2::from_shape_fn((1, case.intermediate), |(_, col)| {
                    let bias = |index: usize| biases.map_or(0.0, |biases| biases[index][col]);
                    let (gate, up) = (gate[[0, col]] + bias(0), up[[0, col]] + bias(1));
                    (if gate < 0.0 { 0.0 } else { gate }) * up
                });
                let mut add = |out: usize, term: f32| {
                    let fixed = (f64::from(term) * (1_u64 << 40) as f64).round_ties_even() as i64;
                    let sum = &mut expected[row as usize * case.hidden + out];
                    *sum = sum.wrapping_add(fixed);
                };
                for first in (0..case.intermediate).step_by(case.combine_block) {
                    let block = first..case.intermediate.min(first + case.combine_block);
                    let x = Activations::round(activations, intermediate.slice(s![.., block.clone()]));
                    let sums = product_by_definition(&packed.down_proj, block, &x);
                    (0..case.hidden).for_each(|out| add(out, sums[[0, out]] * weight));
                }
                if let Some(biases) = biases {
                    (0..case.hidden).for_each(|out| add(out, biases[2][out] * weight));
                }
            }
        }
        let groups = case.groups(&weights, 0..case.num_blocks(), true);
        assert_eq!(case.exact(Isa::current(), 2, &groups), expected, "seed {seed}");
    }
}

#[test]
fn all_variants_and_thread_counts_give_the_same_bits() {
    for seed in 0..100 {
        let case = Case::from_seed(seed);
        let weights = case.whole();
        let groups = case.groups(&weights, 0..case.num_blocks(), true);
        let x = case.activations();
        let expected = case.exact(Isa::Portable, 1, &groups);
        let fast = |isa, pool: &CpuPool| {
            let mut sums = vec![0.0; case.x.nrows() * case.hidden];
            let Case {
                weight_on_input,
                combine_block,
                ..
            } = case;
            Grouped {
                isa,
                workspace: &pool.workspace(),
                x: (&x).into(),
                groups: &groups,
                weight_on_input,
                combine_block,
            }
            .fast(&mut sums);
            sums.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let dense = |isa, pool: &CpuPool| {
            let mut out = Array2::from_elem((case.x.nrows(), case.hidden), f32::NAN);
            dense_feed_forward_on(isa, pool, &weights[0], (&x).into(), out.view_mut());
            out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let one = CpuPool::new(1);
        let (expected_fast, expected_dense) = (fast(Isa::Portable, &one), dense(Isa::Portable, &one));
        for isa in Isa::all_available() {
            for threads in [1, 2, 3] {
                let pool = CpuPool::new(threads);
                assert_eq!(
                    case.exact(isa, threads, &groups),
                    expected,
                    "seed {seed}, {isa}, {threads} threads"
                );
                assert_eq!(fast(isa, &pool), expected_fast, "seed {seed}, {isa}, {threads} threads");
                assert_eq!(
                    dense(isa, &pool),
                    expected_dense,
                    "seed {seed}, {isa}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn slices_cut_at_block_borders_sum_to_the_whole_bit_for_bit() {
    for seed in 0..100 {
        let case = Case::from_seed(seed);
        let mut rng = Rng::new(seed ^ 0xabcd);
        let weights = case.whole();
        for isa in Isa::all_available() {
            let whole = case.exact(isa, 2, &case.groups(&weights, 0..case.num_blocks(), true));
            let (mut sliced, mut by_blocks) = (vec![0; whole.len()], vec![0; whole.len()]);
            let mut first = 0;
            while first < case.num_blocks() {
                let end = first + 1 + rng.below(case.num_blocks() - first);
                let cols = first * case.combine_block..case.intermediate.min(end * case.combine_block);
                // Held by a worker as a slice of its own ...
                let slices: Vec<FeedForward> = case
                    .experts
                    .iter()
                    .map(|expert| expert.pack(case.format, cols.clone()))
                    .collect();
                let groups = case.groups(&slices, 0..end - first, first == 0);
                case.add_exact(isa, 2, &case.activations(), &groups, &mut sliced);
                // ... or as some blocks of a whole expert.
                let groups = case.groups(&weights, first..end, first == 0);
                case.add_exact(isa, 2, &case.activations(), &groups, &mut by_blocks);
                first = end;
            }
            assert_eq!(sliced, whole, "seed {seed}, {isa}");
            assert_eq!(by_blocks, whole, "seed {seed}, {isa}");
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_in_a_batch() {
    for seed in 0..60 {
        let case = Case::from_seed(seed);
        let weights = case.whole();
        let batch = case.exact(Isa::current(), 2, &case.groups(&weights, 0..case.num_blocks(), true));
        for row in 0..case.x.nrows() as u32 {
            let mut alone = vec![0; case.hidden];
            let positions: Vec<Option<usize>> = case
                .routing
                .iter()
                .map(|(rows, _)| rows.iter().position(|&other| other == row))
                .collect();
            let groups: Vec<Group<'_>> = case
                .groups(&weights, 0..case.num_blocks(), true)
                .into_iter()
                .zip(&positions)
                .filter_map(|(group, position)| {
                    let position = (*position)?;
                    let routing_weights = &group.routing_weights[position..=position];
                    Some(Group {
                        rows: &[0],
                        routing_weights,
                        ..group
                    })
                })
                .collect();
            case.add_exact(
                Isa::current(),
                1,
                &case.activations().select_rows(&[row]),
                &groups,
                &mut alone,
            );
            assert_eq!(
                alone,
                batch[row as usize * case.hidden..][..case.hidden],
                "seed {seed}, row {row}"
            );
        }
    }
}

#[test]
fn a_dense_feed_forward_agrees_with_double_precision_in_any_layout() {
    for seed in 0..60 {
        let case = Case::from_seed(seed);
        let expert = &case.experts[0];
        let weights = &case.whole()[0];
        let pool = CpuPool::new(2);
        let mut out = Array2::from_elem((case.x.nrows(), case.hidden), f32::NAN);
        dense_feed_forward(&pool, weights, &case.activations(), out.view_mut());
        for (row, out) in out.rows().into_iter().enumerate() {
            let (truth, magnitude) = expert.output(&case.x.row(row).to_vec(), 1.0, case.format);
            let epsilon = if case.format == NumberFormat::F32 { 2e-6 } else { 4e-3 };
            for (&found, truth) in out.iter().zip(truth) {
                let error = (f64::from(found) - truth).abs();
                assert!(
                    error <= (1.0 + magnitude) * epsilon,
                    "seed {seed}: {found}, not {truth}"
                );
            }
        }
        let mut transposed = Array2::zeros((case.hidden, case.x.nrows()));
        dense_feed_forward(
            &pool,
            weights,
            &case.activations(),
            transposed.view_mut().reversed_axes(),
        );
        assert_eq!(transposed.t(), out);
    }
}
