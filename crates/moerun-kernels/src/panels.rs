//! How the weights of sixteen output rows lie in cache lines, and the inner loop over each layout; lane = output row.

use std::ops::Range;

use moerun_types::{NumberFormat, QUANTIZED_BLOCK};

use crate::{
    interleaved::RowTile,
    lines::{LANES, Line},
    simd::Simd,
};

/// Sums of `T` rows with `P` panels, lane by lane.
pub(crate) type Sums<S, const T: usize, const P: usize> = [[<S as Simd>::F32s; P]; T];

/// Cache lines that a panel is asked for in advance, at most.
const PREFETCH: usize = 128;

/// Panels that are multiplied side by side, and those that come after them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PanelTile<'a, const P: usize> {
    panels: [&'a [Line]; P],
    /// Where lines ahead of a panel's end are: those of the panel that follows it, counted on from its end.
    beyond: [*const Line; P],
    ahead: usize,
}

impl<'a, const P: usize> PanelTile<'a, P> {
    /// `panels`, all equally long, of which each is followed by the one in `next`.
    #[inline(always)]
    pub(crate) fn new(panels: [&'a [Line]; P], next: [&'a [Line]; P]) -> Self {
        let len = panels[0].len();
        let mut beyond = [std::ptr::null(); P];
        for p in 0..P {
            assert_eq!(panels[p].len(), len, "lines of a panel");
            beyond[p] = next[p].as_ptr().wrapping_sub(len);
        }
        Self {
            panels,
            beyond,
            ahead: PREFETCH.min(len),
        }
    }

    /// Line `index` of each panel, to meet `T` rows. Asks for those that are read a little later, across the ends of
    /// panels and pages, where the processor's own prefetching stops. One or two rows wait for memory: they follow the
    /// panels' order, where more rows look straight on, which costs their arithmetic nothing.
    ///
    /// # Safety
    /// The panels must have it.
    #[inline(always)]
    unsafe fn lines<S: Simd, const T: usize>(&self, simd: S, index: usize) -> [&'a Line; P] {
        let ahead = index + if T <= 2 { self.ahead } else { PREFETCH };
        // SAFETY: as the caller promises.
        let mut lines = [unsafe { self.panels[0].get_unchecked(index) }; P];
        for (p, line) in lines.iter_mut().enumerate() {
            // SAFETY: as above.
            *line = unsafe { self.panels[p].get_unchecked(index) };
            let from = if T > 2 || ahead < self.panels[p].len() {
                self.panels[p].as_ptr()
            } else {
                self.beyond[p]
            };
            simd.prefetch(from.wrapping_add(ahead));
        }
        lines
    }

    /// Asserts that the panels have lines `0..end`.
    #[inline(always)]
    fn check(&self, end: usize) {
        for panel in self.panels {
            assert!(panel.len() >= end, "lines of a panel");
        }
    }
}

/// One layout and its inner loop.
pub(crate) trait PanelFormat {
    /// The products of `T` rows with `P` panels over the columns `cols`, whose start is a multiple of the format's
    /// column unit; their end too, or it is the last column. `x` holds exactly those columns.
    fn tile<S: Simd, const T: usize, const P: usize>(
        simd: S,
        panels: PanelTile<'_, P>,
        cols: Range<usize>,
        x: RowTile<'_, T>,
    ) -> Sums<S, T, P>;
}

/// Lines that a panel of `cols` columns takes.
pub(crate) fn lines_per_panel(format: NumberFormat, cols: usize) -> usize {
    let blocks = cols.div_ceil(QUANTIZED_BLOCK);
    match format {
        NumberFormat::F32 => cols,
        NumberFormat::Bf16 => cols.div_ceil(2),
        NumberFormat::Int8 => blocks.div_ceil(Int8Blocks::GROUP) * group_lines::<Int8Blocks>(),
        NumberFormat::Int4 => blocks.div_ceil(Int4Blocks::GROUP) * group_lines::<Int4Blocks>(),
        NumberFormat::Mxfp4 => blocks.div_ceil(Mxfp4Blocks::GROUP) * group_lines::<Mxfp4Blocks>(),
    }
}

/// `[cols][16]` f32: a column per line. One fused multiply-add per column, ascending, from 0.0.
pub(crate) enum F32Panels {}

impl PanelFormat for F32Panels {
    #[inline(always)]
    fn tile<S: Simd, const T: usize, const P: usize>(
        simd: S,
        panels: PanelTile<'_, P>,
        cols: Range<usize>,
        x: RowTile<'_, T>,
    ) -> Sums<S, T, P> {
        panels.check(cols.end);
        assert_eq!(x.words.len(), cols.len(), "columns of the rows");
        let mut sums = [[simd.splat(0.0); P]; T];
        for col in cols.clone() {
            // SAFETY: the panels and `x` were just seen to have this column.
            let (lines, x) = unsafe { (panels.lines::<S, T>(simd, col), x.words.get_unchecked(col - cols.start)) };
            let mut weights = [simd.splat(0.0); P];
            for p in 0..P {
                weights[p] = simd.load_bits(lines[p]);
            }
            for t in 0..T {
                let x = simd.splat(f32::from_bits(x[t]));
                for p in 0..P {
                    sums[t][p] = simd.mul_add(x, weights[p], sums[t][p]);
                }
            }
        }
        sums
    }
}

/// `[cols / 2][16][2]` bfloat16: two columns per line, the even one in the upper half of each word, which is the one
/// that `vdpbf16ps` takes first. Products are exact in f32 and accumulated in ascending order; of an odd number of
/// columns the last is followed by a product of zeroes.
pub(crate) enum Bf16Panels {}

impl PanelFormat for Bf16Panels {
    #[inline(always)]
    fn tile<S: Simd, const T: usize, const P: usize>(
        simd: S,
        panels: PanelTile<'_, P>,
        cols: Range<usize>,
        x: RowTile<'_, T>,
    ) -> Sums<S, T, P> {
        assert!(cols.start.is_multiple_of(2), "columns come in pairs");
        let pairs = cols.start / 2..cols.end.div_ceil(2);
        panels.check(pairs.end);
        assert_eq!(x.words.len(), pairs.len(), "pairs of columns of the rows");
        let mut sums = [[simd.splat(0.0); P]; T];
        for pair in pairs.clone() {
            // SAFETY: the panels and the words were just seen to have this pair.
            let (lines, x) = unsafe {
                (
                    panels.lines::<S, T>(simd, pair),
                    x.words.get_unchecked(pair - pairs.start),
                )
            };
            let mut weights = [simd.load_bf16_pairs(lines[0]); P];
            for p in 1..P {
                weights[p] = simd.load_bf16_pairs(lines[p]);
            }
            for t in 0..T {
                for p in 0..P {
                    sums[t][p] = simd.dot_bf16(weights[p], x[t], sums[t][p]);
                }
            }
        }
        sums
    }
}

/// Layout of blocks of 32 codes: `GROUP` blocks of `CODE_LINES` lines each, then one line with their scales.
///
/// A block's integer products are summed exactly. Ascending by block, `sum = fma(f32(integers), w_scale * x_scale,
/// sum)`, from 0.0, the product of the scales rounded once.
pub(crate) trait BlockFormat {
    /// Lines with the codes of one block.
    const CODE_LINES: usize;
    /// Blocks that share a line of scales.
    const GROUP: usize;

    /// Adds the products of line `line` of the blocks at `codes` (one per panel) with two (`Int8Blocks`: one) quads of
    /// the rows to the integer sums.
    fn add_line<S: Simd, const T: usize, const P: usize>(
        simd: S,
        codes: [&Line; P],
        line: usize,
        x: &[[u32; T]; WORDS_PER_BLOCK],
        integers: &mut [[S::I32s; P]; T],
    );

    /// The scales of block `index` of a group.
    fn scales<S: Simd>(simd: S, line: &Line, index: usize) -> S::F32s;
}

/// Words of four codes in a block of one row.
pub(crate) const WORDS_PER_BLOCK: usize = QUANTIZED_BLOCK / 4;

const fn group_lines<F: BlockFormat>() -> usize {
    F::GROUP * F::CODE_LINES + 1
}

impl<F: BlockFormat> PanelFormat for F {
    #[inline(always)]
    fn tile<S: Simd, const T: usize, const P: usize>(
        simd: S,
        panels: PanelTile<'_, P>,
        cols: Range<usize>,
        x: RowTile<'_, T>,
    ) -> Sums<S, T, P> {
        assert!(cols.start.is_multiple_of(QUANTIZED_BLOCK), "columns come in blocks");
        let blocks = cols.start / QUANTIZED_BLOCK..cols.end.div_ceil(QUANTIZED_BLOCK);
        let x_words = x.words.as_chunks::<WORDS_PER_BLOCK>().0;
        assert!(
            x_words.len() == blocks.len() && x.scales.len() == blocks.len() && x.offsets.len() == blocks.len(),
            "blocks of the rows"
        );
        panels.check(blocks.end.div_ceil(F::GROUP) * group_lines::<F>());
        let mut sums = [[simd.splat(0.0); P]; T];
        for block in blocks.clone() {
            let index = block - blocks.start;
            let group = block / F::GROUP * group_lines::<F>();
            let first = group + block % F::GROUP * F::CODE_LINES;
            // SAFETY: as long as was just asserted.
            let (x_words, x_scales, x_offsets) = unsafe {
                (
                    x_words.get_unchecked(index),
                    x.scales.get_unchecked(index),
                    x.offsets.get_unchecked(index),
                )
            };
            let mut integers = [[simd.splat_i32(0); P]; T];
            for t in 0..T {
                integers[t] = [simd.splat_i32(x_offsets[t]); P];
            }
            for line in 0..F::CODE_LINES {
                // SAFETY: a panel has all lines of its groups, as was just asserted.
                let codes = unsafe { panels.lines::<S, T>(simd, first + line) };
                F::add_line(simd, codes, line, x_words, &mut integers);
            }
            // SAFETY: as above.
            let scale_lines = unsafe { panels.lines::<S, T>(simd, group + F::GROUP * F::CODE_LINES) };
            let mut scales = [simd.splat(0.0); P];
            for p in 0..P {
                scales[p] = F::scales(simd, scale_lines[p], block % F::GROUP);
            }
            for t in 0..T {
                let x_scale = simd.splat(x_scales[t]);
                for p in 0..P {
                    let scale = simd.mul(scales[p], x_scale);
                    sums[t][p] = simd.mul_add(simd.to_f32(integers[t][p]), scale, sums[t][p]);
                }
            }
        }
        sums
    }
}

/// Signed 8-bit codes, stored with 128 added: a line has four columns of every row.
pub(crate) enum Int8Blocks {}

impl BlockFormat for Int8Blocks {
    const CODE_LINES: usize = 8;
    const GROUP: usize = 2;

    #[inline(always)]
    fn add_line<S: Simd, const T: usize, const P: usize>(
        simd: S,
        codes: [&Line; P],
        line: usize,
        x: &[[u32; T]; WORDS_PER_BLOCK],
        integers: &mut [[S::I32s; P]; T],
    ) {
        let mut weights = [simd.load_i8_quads(codes[0]); P];
        for p in 1..P {
            weights[p] = simd.load_i8_quads(codes[p]);
        }
        for t in 0..T {
            for p in 0..P {
                integers[t][p] = simd.dot_i8(weights[p], x[line][t], integers[t][p]);
            }
        }
    }

    #[inline(always)]
    fn scales<S: Simd>(simd: S, line: &Line, index: usize) -> S::F32s {
        simd.load_f16(line, index)
    }
}

/// 4-bit codes: a line has eight columns of every row, the first four in the lower halves of the bytes.
pub(crate) enum Int4Blocks {}

impl BlockFormat for Int4Blocks {
    const CODE_LINES: usize = 4;
    const GROUP: usize = 2;

    #[inline(always)]
    fn add_line<S: Simd, const T: usize, const P: usize>(
        simd: S,
        codes: [&Line; P],
        line: usize,
        x: &[[u32; T]; WORDS_PER_BLOCK],
        integers: &mut [[S::I32s; P]; T],
    ) {
        add_nibbles(simd, codes, line, x, integers, None);
    }

    #[inline(always)]
    fn scales<S: Simd>(simd: S, line: &Line, index: usize) -> S::F32s {
        simd.load_f16(line, index)
    }
}

/// 4-bit floats: codes as in [`Int4Blocks`], their doubled values from a table, a power of two per block.
pub(crate) enum Mxfp4Blocks {}

/// What is added to the doubled values so that none is negative.
const MXFP4_BIAS: u8 = 12;

const MXFP4_TABLE: [u8; 16] = {
    let mut table = [0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = crate::quantize::MXFP4_DOUBLED[code].wrapping_add_unsigned(MXFP4_BIAS) as u8;
        code += 1;
    }
    table
};

impl BlockFormat for Mxfp4Blocks {
    const CODE_LINES: usize = 4;
    const GROUP: usize = 4;

    #[inline(always)]
    fn add_line<S: Simd, const T: usize, const P: usize>(
        simd: S,
        codes: [&Line; P],
        line: usize,
        x: &[[u32; T]; WORDS_PER_BLOCK],
        integers: &mut [[S::I32s; P]; T],
    ) {
        add_nibbles(simd, codes, line, x, integers, Some(&MXFP4_TABLE));
    }

    #[inline(always)]
    fn scales<S: Simd>(simd: S, line: &Line, index: usize) -> S::F32s {
        simd.load_e8m0(line, index)
    }
}

/// Adds one line of 4-bit codes: the codes themselves, or what `table` has for them.
#[inline(always)]
fn add_nibbles<S: Simd, const T: usize, const P: usize>(
    simd: S,
    codes: [&Line; P],
    line: usize,
    x: &[[u32; T]; WORDS_PER_BLOCK],
    integers: &mut [[S::I32s; P]; T],
    table: Option<&[u8; 16]>,
) {
    for half in 0..2 {
        let mut weights = [simd.load_low_nibbles(codes[0]); P];
        for p in 0..P {
            let codes = if half == 0 {
                simd.load_low_nibbles(codes[p])
            } else {
                simd.load_high_nibbles(codes[p])
            };
            weights[p] = match table {
                Some(table) => simd.look_up(table, codes),
                None => codes,
            };
        }
        for t in 0..T {
            for p in 0..P {
                integers[t][p] = simd.dot_u8(weights[p], x[2 * line + half][t], integers[t][p]);
            }
        }
    }
}

/// What the kernels of `format` add to each weight's code (its doubled value with [`NumberFormat::Mxfp4`]): the
/// integer sums start from that times the sum of the row's codes, negated.
pub(crate) fn code_bias(isa: crate::Isa, format: NumberFormat) -> i32 {
    match format {
        NumberFormat::F32 | NumberFormat::Bf16 => 0,
        NumberFormat::Int8 => isa.i8_bias(),
        NumberFormat::Int4 => 8,
        NumberFormat::Mxfp4 => i32::from(MXFP4_BIAS),
    }
}

/// Where a code lies: the line of a panel, the bit in the lane's word.
pub(crate) struct CodePlace {
    pub(crate) line: usize,
    pub(crate) shift: usize,
}

/// Where a scale lies: the line of a panel, the word, its lowest bit there and the bits it has.
pub(crate) struct ScalePlace {
    pub(crate) line: usize,
    pub(crate) word: usize,
    pub(crate) shift: usize,
    pub(crate) mask: u32,
}

/// The place of a code of a quantised format.
pub(crate) fn code_place(format: NumberFormat, col: usize) -> CodePlace {
    let (block, col) = (col / QUANTIZED_BLOCK, col % QUANTIZED_BLOCK);
    let (group, lines, code_lines) = block_layout(format);
    let first = block / group * lines + block % group * code_lines;
    if format == NumberFormat::Int8 {
        CodePlace {
            line: first + col / 4,
            shift: 8 * (col % 4),
        }
    } else {
        CodePlace {
            line: first + col / 8,
            shift: 8 * (col % 4) + 4 * (col / 4 % 2),
        }
    }
}

/// The place of the scale of block `block` of row `lane`.
pub(crate) fn scale_place(format: NumberFormat, block: usize, lane: usize) -> ScalePlace {
    let (group, lines, _) = block_layout(format);
    let line = block / group * lines + lines - 1;
    let index = block % group;
    if format == NumberFormat::Mxfp4 {
        ScalePlace {
            line,
            word: 4 * index + lane / 4,
            shift: 8 * (lane % 4),
            mask: 0xff,
        }
    } else {
        ScalePlace {
            line,
            word: 8 * index + lane / 2,
            shift: 16 * (lane % 2),
            mask: 0xffff,
        }
    }
}

/// Blocks of a group, lines of a group, lines of a block.
fn block_layout(format: NumberFormat) -> (usize, usize, usize) {
    match format {
        NumberFormat::Int8 => (Int8Blocks::GROUP, group_lines::<Int8Blocks>(), Int8Blocks::CODE_LINES),
        NumberFormat::Int4 => (Int4Blocks::GROUP, group_lines::<Int4Blocks>(), Int4Blocks::CODE_LINES),
        NumberFormat::Mxfp4 => (
            Mxfp4Blocks::GROUP,
            group_lines::<Mxfp4Blocks>(),
            Mxfp4Blocks::CODE_LINES,
        ),
        NumberFormat::F32 | NumberFormat::Bf16 => unreachable!("{format} has no blocks"),
    }
}

const _: () = assert!(LANES == 16, "the layouts are for sixteen rows");
