//! Products of rows with a matrix, summed into an output in f32 or in fixed point.

use std::{ops::Range, sync::Mutex};

use moerun_types::COMBINE_FRACTION_BITS;

use crate::{
    CpuPool, Isa, Workspace,
    disjoint::Disjoint,
    isa::Kernel,
    lines::LANES,
    simd::Simd,
    tile::{EMPTY_SUMS, Products, SegmentSums, Sink},
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

/// Runs each of `parts` into an output of its own, `[rows, rows of its matrix]`, replacing what that holds: all at once, so
/// that small ones fill the threads together.
pub(crate) fn sum_f32_apart(isa: Isa, workspace: &Workspace<'_>, parts: &[RowProducts<'_>], outs: &mut [&mut [f32]]) {
    let pool = workspace.pool();
    let width = |part: &RowProducts<'_>| part.products.weights.rows();
    let all_panels: usize = parts.iter().map(|part| width(part).div_ceil(LANES)).sum();
    let work = parts
        .iter()
        .map(|part| part.work_per_panel() * width(part).div_ceil(LANES));
    let work = work.sum();
    let tasks = parts.iter().enumerate().flat_map(|(index, part)| {
        let panels = width(part).div_ceil(LANES);
        let stripe = panels_per_task(all_panels, part.work_per_panel(), pool.threads());
        let stripes = (0..panels).step_by(stripe);
        stripes.map(move |first| (index, first..panels.min(first + stripe)))
    });
    let tasks = workspace.collect(tasks);
    let outs = workspace.collect(outs.iter_mut().map(|out| Disjoint::new(out)));
    pool.run_sized(tasks.len(), work, &|task| {
        let (index, panels) = tasks[task].clone();
        isa.dispatch(F32Stripe {
            parts: std::slice::from_ref(&parts[index]),
            panels,
            store: Store::Replace,
            width: width(&parts[index]),
            out: &outs[index],
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
        let mut buffer = EMPTY_SUMS;
        for part in parts {
            part.products.run(
                simd,
                panels.clone(),
                None,
                &mut buffer,
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
    fn put<S: Simd>(&mut self, _simd: S, row: usize, panels: Range<usize>, sums: SegmentSums<'_>) {
        let start = self.part.out_row(row) * self.width;
        let cols = panels.start * LANES..self.width.min(panels.end * LANES);
        // SAFETY: a stripe's columns are written by one task, which does not keep this part.
        #[allow(unsafe_code)]
        let out = unsafe { self.out.part(start + cols.start..start + cols.end) };
        for (panel, out) in out.chunks_mut(LANES).enumerate() {
            for sums in sums.of_panel(panel) {
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
        let mut buffer = EMPTY_SUMS;
        for (part_index, part) in parts.iter().enumerate() {
            let mut sink = ExactSink {
                part_index,
                part,
                limit,
                width,
                sums,
                failure: None,
            };
            let next = parts
                .get(part_index + 1)
                .map(|part| (part.products.weights, panels.start));
            part.products.run(simd, panels.clone(), next, &mut buffer, &mut sink);
            if let Some(bias) = part.bias {
                for row in 0..part.products.x.rows() {
                    for panel in panels.clone() {
                        let bias = &bias[panel * LANES..width.min((panel + 1) * LANES)];
                        let mut values = [0.0; LANES];
                        values[..bias.len()].copy_from_slice(bias);
                        sink.add(simd, None, row, panel..panel + 1, SegmentSums::one(&values));
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
    fn put<S: Simd>(&mut self, simd: S, row: usize, panels: Range<usize>, sums: SegmentSums<'_>) {
        self.add(simd, Some(sums.first), row, panels, sums);
    }
}

impl ExactSink<'_> {
    /// Adds the terms of `values`, of the segments from `segment` on, or of the bias.
    ///
    /// A term is `value * factor`; that times 2^40 is `value * (factor * 2^40)` to the bit, since a power of two moves
    /// no rounding (what it lifts out of the denormals is below 2^-41, which is 0 either way).
    #[inline(always)]
    fn add<S: Simd>(
        &mut self,
        simd: S,
        segment: Option<usize>,
        row: usize,
        panels: Range<usize>,
        values: SegmentSums<'_>,
    ) {
        const SCALE: f32 = (1_u64 << COMBINE_FRACTION_BITS) as f32;
        let factor = self.part.factors.map_or(1.0, |factors| factors[row]);
        let (scaled_factor, scaled_limit) = (simd.splat(factor * SCALE), simd.splat(self.limit * SCALE));
        let cols = panels.start * LANES..self.width.min(panels.end * LANES);
        let start = self.part.out_row(row) * self.width;
        // SAFETY: a stripe's columns are written by one task, which does not keep this part.
        #[allow(unsafe_code)]
        let sums = unsafe { self.sums.part(start + cols.start..start + cols.end) };
        let (whole, rest) = sums.as_chunks_mut::<LANES>();
        for (index, sums) in whole.iter_mut().enumerate() {
            let mut largest = simd.splat(0.0);
            let mut added = simd.zero_i64();
            for values in values.of_panel(index) {
                let terms = simd.mul(simd.load(values), scaled_factor);
                largest = simd.larger_magnitude(largest, terms);
                added = simd.add_rounded(added, terms);
            }
            if simd.all_below(largest, scaled_limit) {
                simd.add_to(added, sums);
            } else {
                let first = cols.start + index * LANES;
                self.fail(segment, row, first..first + LANES, values.of_panel(index));
            }
        }
        if !rest.is_empty() {
            let mut largest = simd.splat(0.0);
            let mut added = simd.zero_i64();
            for values in values.of_panel(whole.len()) {
                // Lanes beyond the last column are products with the padding, and not looked at.
                let mut kept = [0.0; LANES];
                kept[..rest.len()].copy_from_slice(&values[..rest.len()]);
                let terms = simd.mul(simd.load(&kept), scaled_factor);
                largest = simd.larger_magnitude(largest, terms);
                added = simd.add_rounded(added, terms);
            }
            if simd.all_below(largest, scaled_limit) {
                let mut padded = [0; LANES];
                padded[..rest.len()].copy_from_slice(rest);
                simd.add_to(added, &mut padded);
                rest.copy_from_slice(&padded[..rest.len()]);
            } else {
                let first = cols.end - rest.len();
                self.fail(segment, row, first..cols.end, values.of_panel(whole.len()));
            }
        }
    }

    #[cold]
    fn fail<'a>(
        &mut self,
        first_segment: Option<usize>,
        row: usize,
        cols: Range<usize>,
        values: impl Iterator<Item = &'a [f32; LANES]>,
    ) {
        for (index, values) in values.enumerate() {
            for (col, &value) in cols.clone().zip(values) {
                let term = self.part.term(row, value);
                if term.is_nan() || term.abs() >= self.limit {
                    let failure = TermFailure {
                        part: self.part_index,
                        segment: first_segment.map(|first| first + index),
                        row,
                        col,
                        term,
                    };
                    TermFailure::keep_lower(&mut self.failure, failure);
                }
            }
        }
    }
}
