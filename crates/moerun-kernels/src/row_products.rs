//! Products of rows with a matrix, summed into an output in f32 or in fixed point.

use std::{ops::Range, sync::Mutex};

use moerun_types::COMBINE_FRACTION_BITS;

use crate::{
    CpuPool, Isa,
    disjoint::Disjoint,
    isa::Kernel,
    lines::LANES,
    simd::Simd,
    tile::{Products, Sink},
};

/// Products and where they go: one output row per row of `x`, as wide as the matrix has rows.
#[derive(Debug)]
pub(crate) struct RowProducts<'a> {
    pub(crate) products: Products<'a>,
    /// The output row of each row of `x`, without repetition; in order if `None`.
    pub(crate) out_rows: Option<&'a [u32]>,
    /// A factor per row of `x` on the sum of each segment, and on the bias.
    pub(crate) factors: Option<&'a [f32]>,
    /// Added to each output row after the products.
    pub(crate) bias: Option<&'a [f32]>,
}

impl RowProducts<'_> {
    /// The output row of row `row` of `x`.
    #[inline(always)]
    fn out_row(&self, row: usize) -> usize {
        self.out_rows.map_or(row, |rows| rows[row] as usize)
    }

    /// `value` times the factor of row `row`, if there is one.
    #[inline(always)]
    fn term(&self, row: usize, value: f32) -> f32 {
        self.factors.map_or(value, |factors| value * factors[row])
    }

    /// Multiply-adds per panel.
    fn work_per_panel(&self) -> usize {
        self.products.segments.iter().map(|cols| cols.len()).sum::<usize>() * self.products.x.rows() * LANES
    }
}

/// How sums meet what the output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// They replace it.
    Replace,
    /// They are added to it.
    Add,
}

/// Cuts the `width` output columns into runs of panels and calls `task` for each, in parallel.
fn for_each_stripe(pool: &CpuPool, width: usize, parts: &[RowProducts<'_>], task: &(dyn Fn(Range<usize>) + Sync)) {
    let panels = width.div_ceil(LANES);
    let work_per_panel = parts.iter().map(RowProducts::work_per_panel).sum();
    let stripe = panels_per_task(panels, work_per_panel, pool.threads());
    pool.run_sized(panels.div_ceil(stripe), work_per_panel * panels, &|index| {
        task(index * stripe..panels.min((index + 1) * stripe));
    });
}

/// Panels that one task takes: few enough that all threads end together, enough that taking a task costs nothing.
pub(crate) fn panels_per_task(panels: usize, work_per_panel: usize, threads: usize) -> usize {
    const TASKS_PER_THREAD: usize = 16;
    const MIN_TASK_WORK: usize = 1 << 17;
    let even = panels / (threads * TASKS_PER_THREAD);
    even.max(MIN_TASK_WORK / work_per_panel.max(1))
        .next_multiple_of(4)
        .max(4)
}

/// Runs `parts` one after another into `out`, `[rows, width]`, in f32.
pub(crate) fn sum_f32(
    isa: Isa,
    pool: &CpuPool,
    parts: &[RowProducts<'_>],
    store: Store,
    width: usize,
    out: &mut [f32],
) {
    let out = Disjoint::new(out);
    for_each_stripe(pool, width, parts, &|panels| {
        isa.dispatch(F32Stripe {
            parts,
            panels,
            store,
            width,
            out: &out,
        });
    });
}

struct F32Stripe<'a> {
    parts: &'a [RowProducts<'a>],
    panels: Range<usize>,
    store: Store,
    width: usize,
    out: &'a Disjoint<'a, f32>,
}

impl Kernel for F32Stripe<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self {
            parts,
            panels,
            store,
            width,
            out,
        } = self;
        let cols = panels.start * LANES..width.min(panels.end * LANES);
        for part in parts {
            part.products.run(
                simd,
                panels.clone(),
                &mut F32Sink {
                    part,
                    store,
                    width,
                    out,
                },
            );
            let Some(bias) = part.bias else { continue };
            for row in 0..part.products.x.rows() {
                let start = part.out_row(row) * width;
                // SAFETY: a stripe's columns are written by one task.
                #[allow(unsafe_code)]
                let out = unsafe { out.part(start + cols.start..start + cols.end) };
                for (out, &bias) in out.iter_mut().zip(&bias[cols.clone()]) {
                    *out += part.term(row, bias);
                }
            }
        }
    }
}

struct F32Sink<'a> {
    part: &'a RowProducts<'a>,
    store: Store,
    width: usize,
    out: &'a Disjoint<'a, f32>,
}

impl Sink for F32Sink<'_> {
    #[inline(always)]
    fn put(&mut self, _segment: usize, row: usize, panel: usize, sums: &[f32; LANES]) {
        let start = self.part.out_row(row) * self.width;
        let cols = panel * LANES..self.width.min((panel + 1) * LANES);
        // SAFETY: a stripe's columns are written by one task, which does not keep this part.
        #[allow(unsafe_code)]
        let out = unsafe { self.out.part(start + cols.start..start + cols.end) };
        match self.store {
            Store::Replace => out
                .iter_mut()
                .zip(sums)
                .for_each(|(out, &sum)| *out = self.part.term(row, sum)),
            Store::Add => out
                .iter_mut()
                .zip(sums)
                .for_each(|(out, &sum)| *out += self.part.term(row, sum)),
        }
    }
}

/// A term that fixed point cannot take, ordered as failures are reported: by part, then segment, the bias last, then
/// row and column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct TermFailure {
    pub(crate) part: usize,
    /// `None` for the bias.
    pub(crate) segment: Option<usize>,
    row: usize,
    col: usize,
    pub(crate) term: f32,
}

impl TermFailure {
    fn key(&self) -> (usize, usize, usize, usize) {
        (self.part, self.segment.unwrap_or(usize::MAX), self.row, self.col)
    }

    fn keep_lower(kept: &mut Option<TermFailure>, other: TermFailure) {
        if kept.is_none_or(|kept| other.key() < kept.key()) {
            *kept = Some(other);
        }
    }
}

/// Largest bound on a term: times 2^40 it is 2^63.
pub(crate) const MAX_TERM_LIMIT: f32 = (1_u64 << (63 - COMBINE_FRACTION_BITS)) as f32;

/// Runs `parts` one after another into `sums`, `[rows, width]`, in fixed point: each segment's sum, times its row's
/// factor, is a term. The lowest failure is reported, whatever the threads did; `sums` is then meaningless.
pub(crate) fn sum_exact(
    isa: Isa,
    pool: &CpuPool,
    parts: &[RowProducts<'_>],
    limit: f32,
    width: usize,
    sums: &mut [i64],
) -> Result<(), TermFailure> {
    assert!(
        limit <= MAX_TERM_LIMIT,
        "a term limit of {limit}: at most {MAX_TERM_LIMIT} fits fixed point"
    );
    let sums = Disjoint::new(sums);
    let failure = Mutex::new(None);
    for_each_stripe(pool, width, parts, &|panels| {
        let failed = isa.dispatch(ExactStripe {
            parts,
            panels,
            limit,
            width,
            sums: &sums,
        });
        if let Some(failed) = failed {
            let mut failure = failure.lock().expect("nothing panics while it holds this lock");
            TermFailure::keep_lower(&mut failure, failed);
        }
    });
    match failure.into_inner().expect("nothing panics while it holds this lock") {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

struct ExactStripe<'a> {
    parts: &'a [RowProducts<'a>],
    panels: Range<usize>,
    limit: f32,
    width: usize,
    sums: &'a Disjoint<'a, i64>,
}

impl Kernel for ExactStripe<'_> {
    type Output = Option<TermFailure>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Option<TermFailure> {
        let Self {
            parts,
            panels,
            limit,
            width,
            sums,
        } = self;
        for (part_index, part) in parts.iter().enumerate() {
            let mut sink = ExactSink {
                part_index,
                part,
                limit,
                width,
                sums,
                failure: None,
            };
            part.products.run(simd, panels.clone(), &mut sink);
            if let Some(bias) = part.bias {
                for row in 0..part.products.x.rows() {
                    for panel in panels.clone() {
                        let bias = &bias[panel * LANES..width.min((panel + 1) * LANES)];
                        let mut values = [0.0; LANES];
                        values[..bias.len()].copy_from_slice(bias);
                        sink.add(None, row, panel, &values);
                    }
                }
            }
            // A later part of this stripe cannot hold a lower failure.
            if sink.failure.is_some() {
                return sink.failure;
            }
        }
        None
    }
}

struct ExactSink<'a> {
    part_index: usize,
    part: &'a RowProducts<'a>,
    limit: f32,
    width: usize,
    sums: &'a Disjoint<'a, i64>,
    failure: Option<TermFailure>,
}

impl Sink for ExactSink<'_> {
    #[inline(always)]
    fn put(&mut self, segment: usize, row: usize, panel: usize, sums: &[f32; LANES]) {
        self.add(Some(segment), row, panel, sums);
    }
}

impl ExactSink<'_> {
    #[inline(always)]
    fn add(&mut self, segment: Option<usize>, row: usize, panel: usize, values: &[f32; LANES]) {
        let mut terms = *values;
        if let Some(factors) = self.part.factors {
            let factor = factors[row];
            for term in &mut terms {
                *term *= factor;
            }
        }
        let cols = panel * LANES..self.width.min((panel + 1) * LANES);
        // Lanes beyond the last column are products with the padding, and not looked at.
        let terms = &terms[..cols.len()];
        let start = self.part.out_row(row) * self.width;
        // SAFETY: a stripe's columns are written by one task, which does not keep this part.
        #[allow(unsafe_code)]
        let sums = unsafe { self.sums.part(start + cols.start..start + cols.end) };
        let in_range = match (sums.as_mut_array::<LANES>(), terms.as_array::<LANES>()) {
            // The same with a length that the compiler knows.
            (Some(sums), Some(terms)) => add_terms(sums, terms, self.limit),
            _ => add_terms(sums, terms, self.limit),
        };
        if !in_range {
            self.fail(segment, row, cols.start, terms);
        }
    }

    #[cold]
    fn fail(&mut self, segment: Option<usize>, row: usize, first_col: usize, terms: &[f32]) {
        for (lane, &term) in terms.iter().enumerate() {
            if term.is_nan() || term.abs() >= self.limit {
                let failure = TermFailure {
                    part: self.part_index,
                    segment,
                    row,
                    col: first_col + lane,
                    term,
                };
                TermFailure::keep_lower(&mut self.failure, failure);
            }
        }
    }
}

/// Adds each term to its sum if all of them are below `limit` in magnitude; whether they are.
#[inline(always)]
fn add_terms(sums: &mut [i64], terms: &[f32], limit: f32) -> bool {
    let mut in_range = true;
    for term in terms {
        in_range &= term.abs() < limit;
    }
    if in_range {
        for (sum, &term) in sums.iter_mut().zip(terms) {
            *sum = sum.wrapping_add(to_fixed(term));
        }
    }
    in_range
}

/// `term * 2^40` to the nearest integer, ties to even, for `|term| < 2^23`.
///
/// In two halves, because not every instruction set converts f64 to i64: the multiple of 2^32 nearest to the product,
/// and the rest, which is exact and at most 2^31. Adding 1.5 * 2^52 to an f64 leaves the nearest integer, ties to
/// even, in its low bits; the multiple of 2^32 is even, so the tie goes the same way as that of the whole.
#[inline(always)]
fn to_fixed(term: f32) -> i64 {
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const TWO_32: f64 = (1_u64 << 32) as f64;
    const UPPER_SCALE: f64 = (1_u64 << COMBINE_FRACTION_BITS) as f64 / TWO_32;
    let term = f64::from(term);
    let upper_shifted = term * UPPER_SCALE + ROUND;
    let upper = upper_shifted - ROUND;
    let lower_shifted = (term * (UPPER_SCALE * TWO_32) - upper * TWO_32) + ROUND;
    let upper = (upper_shifted.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
    let lower = (lower_shifted.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
    (upper << 32).wrapping_add(lower)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::Rng;

    #[test]
    fn fixed_point_is_the_nearest_integer_with_ties_to_even() {
        let wanted = |term: f32| (f64::from(term) * (1_u64 << 40) as f64).round_ties_even() as i64;
        let two_minus_41 = 2.0_f32.powi(-41);
        let mut rng = Rng::new(1);
        let special = [
            0.0,
            two_minus_41,
            3.0 * two_minus_41,
            5.0 * two_minus_41,
            2.0_f32.powi(-8),
            1.0,
        ];
        let largest = MAX_TERM_LIMIT.next_down();
        let scaled = (0..200_000).map(|_| rng.value() * 2.0_f32.powi(rng.below(75) as i32 - 52));
        for term in scaled.chain(special).chain([largest, 0.5 * largest]) {
            for term in [term, -term] {
                assert_eq!(to_fixed(term), wanted(term), "{term:e}");
            }
        }
        assert_eq!((to_fixed(two_minus_41), to_fixed(3.0 * two_minus_41)), (0, 2));
    }
}
