//! Rows as the inner loop reads them: a few rows side by side, word after word.

use moerun_types::{ActivationFormat, NumberFormat, QUANTIZED_BLOCK};

use crate::{
    ActivationRows, Isa, Workspace,
    disjoint::Disjoint,
    panels::{WORDS_PER_BLOCK, code_bias},
};

/// Rows that are computed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowBlock {
    /// Index of the first.
    pub(crate) first: usize,
    /// How many: one of [`Isa::tile_rows`].
    pub(crate) rows: usize,
}

/// `[rows, cols]` for weights of one format, cut into [`RowBlock`]s, one after another, each `[words][block rows]`.
///
/// A word is an f32, a pair of bfloat16 with the even column in the upper half, or four 8-bit codes, the first in the
/// lowest byte. The last pair or block of a row is filled up with zeroes. Codes have a scale and an offset, where the
/// integer sum starts, for each block of 32 columns, `[blocks][block rows]`.
#[derive(Debug)]
pub(crate) struct InterleavedRows<'a> {
    isa: Isa,
    format: NumberFormat,
    rows: usize,
    cols: usize,
    blocks: &'a [RowBlock],
    words: &'a mut [u32],
    scales: &'a mut [f32],
    offsets: &'a mut [i32],
}

/// Some columns of one block of `T` rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowTile<'a, const T: usize> {
    pub(crate) words: &'a [[u32; T]],
    pub(crate) scales: &'a [[f32; T]],
    pub(crate) offsets: &'a [[i32; T]],
}

/// All rows, to be written by several tasks.
#[derive(Debug)]
pub(crate) struct RowsToWrite<'a> {
    isa: Isa,
    format: NumberFormat,
    cols: usize,
    words: Disjoint<'a, u32>,
    scales: Disjoint<'a, f32>,
    offsets: Disjoint<'a, i32>,
}

impl<'a> InterleavedRows<'a> {
    /// Zeroes, to meet weights of `format`.
    pub(crate) fn zeroed(
        isa: Isa,
        workspace: &'a Workspace<'_>,
        format: NumberFormat,
        rows: usize,
        cols: usize,
    ) -> Self {
        let blocks = rows * scale_blocks(format, cols);
        Self {
            isa,
            format,
            rows,
            cols,
            blocks: workspace.collect(row_blocks(isa, format, rows)),
            words: workspace.filled(rows * words(format, cols), 0),
            scales: workspace.filled(blocks, 0.0),
            offsets: workspace.filled(blocks, 0),
        }
    }

    /// The rows `selection` of `x` in that order, or all of them, to meet weights of `format`. Panics if one is out of
    /// range or the activations are not those of the format.
    pub(crate) fn from_activations(
        isa: Isa,
        workspace: &'a Workspace<'_>,
        format: NumberFormat,
        x: ActivationRows<'_>,
        selection: Option<&[u32]>,
    ) -> Self {
        assert_eq!(x.format(), format.activations(), "format of the activations");
        let mut interleaved = Self::zeroed(
            isa,
            workspace,
            format,
            selection.map_or(x.rows(), <[u32]>::len),
            x.cols(),
        );
        let (writer, blocks) = interleaved.writer();
        let row = |index: usize| selection.map_or(index, |rows| rows[index] as usize);
        let work = x.cols() * blocks.iter().map(|block| block.rows).sum::<usize>();
        workspace.pool().run_sized(blocks.len(), work, &|index| {
            let block = blocks[index];
            match x {
                ActivationRows::F32 { data, .. } => {
                    let (values, _) = data.as_chunks::<1>();
                    writer.put_rows(block, values, |&[value]| value.to_bits(), row);
                }
                ActivationRows::Bf16 { cols, data, .. } if cols.is_multiple_of(2) => {
                    let (pairs, _) = data.as_chunks::<2>();
                    writer.put_rows(block, pairs, |pair| bf16_pair(pair), row);
                }
                ActivationRows::Bf16 { cols, data, .. } => {
                    for t in 0..block.rows {
                        let first = row(block.first + t) * cols;
                        writer.put_words(block, t, 0, data[first..first + cols].chunks(2).map(bf16_pair));
                    }
                }
                ActivationRows::Int8 { codes, scales, .. } => {
                    let (quads, _) = codes.as_flattened().as_chunks::<4>();
                    let word = |quad: &[i8; 4]| u32::from_le_bytes(quad.map(i8::cast_unsigned));
                    writer.put_rows(block, quads, word, row);
                    let blocks = scale_blocks(format, x.cols());
                    for t in 0..block.rows {
                        let first = row(block.first + t) * blocks;
                        let codes = &codes[first..first + blocks];
                        for (index, (codes, &scale)) in codes.iter().zip(&scales[first..first + blocks]).enumerate() {
                            writer.put_scale(block, t, index, codes, scale);
                        }
                    }
                }
            }
        });
        interleaved
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn blocks(&self) -> &[RowBlock] {
        self.blocks
    }

    /// The columns from `first` (a multiple of the format's column unit) to `end` of the block of `T` rows that starts
    /// with `first_row`.
    #[inline(always)]
    pub(crate) fn tile<const T: usize>(&self, first_row: usize, first: usize, end: usize) -> RowTile<'_, T> {
        let in_block = |len: usize| first_row * len..(first_row + T) * len;
        let words_of = words(self.format, first)..words(self.format, end);
        let blocks_of = scale_blocks(self.format, first)..scale_blocks(self.format, end);
        let words = &self.words[in_block(words(self.format, self.cols))];
        let blocks = in_block(scale_blocks(self.format, self.cols));
        RowTile {
            words: &words.as_chunks().0[words_of],
            scales: &self.scales[blocks.clone()].as_chunks().0[blocks_of.clone()],
            offsets: &self.offsets[blocks].as_chunks().0[blocks_of],
        }
    }

    /// The rows to be written, and how they are cut.
    pub(crate) fn writer(&mut self) -> (RowsToWrite<'_>, &[RowBlock]) {
        let writer = RowsToWrite {
            isa: self.isa,
            format: self.format,
            cols: self.cols,
            words: Disjoint::new(self.words),
            scales: Disjoint::new(self.scales),
            offsets: Disjoint::new(self.offsets),
        };
        (writer, self.blocks)
    }
}

impl RowsToWrite<'_> {
    /// Writes all words of `block`: each is `word` of one of `elements`, `[rows, words]`, of which row `row(i)` goes to
    /// row `i`.
    fn put_rows<E>(&self, block: RowBlock, elements: &[E], word: impl Fn(&E) -> u32, row: impl Fn(usize) -> usize) {
        let words = words(self.format, self.cols);
        let rows = |t: usize| &elements[row(block.first + t) * words..][..words];
        // SAFETY: a task writes whole blocks of rows, and does not keep this part.
        #[allow(unsafe_code)]
        let out = unsafe { self.words.part(block.first * words..(block.first + block.rows) * words) };
        match block.rows {
            1 => side_by_side::<E, 1>(out, rows, word),
            2 => side_by_side::<E, 2>(out, rows, word),
            4 => side_by_side::<E, 4>(out, rows, word),
            6 => side_by_side::<E, 6>(out, rows, word),
            8 => side_by_side::<E, 8>(out, rows, word),
            12 => side_by_side::<E, 12>(out, rows, word),
            rows => unreachable!("a block of {rows} rows"),
        }
    }

    /// Writes words of row `t` of `block`, from word `first` on.
    #[inline(always)]
    pub(crate) fn put_words(
        &self,
        block: RowBlock,
        t: usize,
        first: usize,
        values: impl ExactSizeIterator<Item = u32>,
    ) {
        let start = block.first * words(self.format, self.cols) + first * block.rows;
        // SAFETY: a task writes whole blocks of rows or its own columns of them, and does not keep this part.
        #[allow(unsafe_code)]
        let out = unsafe { self.words.part(start..start + values.len() * block.rows) };
        out.iter_mut()
            .skip(t)
            .step_by(block.rows)
            .zip(values)
            .for_each(|(out, value)| *out = value);
    }

    /// Writes block `index` of 32 columns of row `t` of `block`.
    #[inline(always)]
    pub(crate) fn put_block(&self, block: RowBlock, t: usize, index: usize, codes: &[i8; QUANTIZED_BLOCK], scale: f32) {
        let (quads, _) = codes.as_chunks::<4>();
        let quads = quads.iter().map(|quad| u32::from_le_bytes(quad.map(i8::cast_unsigned)));
        self.put_words(block, t, index * WORDS_PER_BLOCK, quads);
        self.put_scale(block, t, index, codes, scale);
    }

    /// The scale and the offset of such a block.
    #[inline(always)]
    fn put_scale(&self, block: RowBlock, t: usize, index: usize, codes: &[i8; QUANTIZED_BLOCK], scale: f32) {
        let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
        let place = block.first * scale_blocks(self.format, self.cols) + index * block.rows + t;
        // The values of 4-bit floats are held doubled.
        let scale = if self.format == NumberFormat::Mxfp4 {
            0.5 * scale
        } else {
            scale
        };
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            self.scales.part(place..place + 1)[0] = scale;
            self.offsets.part(place..place + 1)[0] = -code_bias(self.isa, self.format) * sum;
        }
    }
}

/// Word after word, those of `T` rows side by side.
fn side_by_side<'a, E: 'a, const T: usize>(out: &mut [u32], rows: impl Fn(usize) -> &'a [E], word: impl Fn(&E) -> u32) {
    let rows: [&[E]; T] = std::array::from_fn(rows);
    for (index, out) in out.as_chunks_mut::<T>().0.iter_mut().enumerate() {
        for t in 0..T {
            out[t] = word(&rows[t][index]);
        }
    }
}

/// A pair of bfloat16, the first in the upper half; the second is 0 if there is none.
#[inline(always)]
pub(crate) fn bf16_pair(pair: &[u16]) -> u32 {
    u32::from(pair[0]) << 16 | u32::from(pair.get(1).copied().unwrap_or(0))
}

/// Words that `cols` columns of a row take.
#[inline(always)]
pub(crate) fn words(format: NumberFormat, cols: usize) -> usize {
    match format.activations() {
        ActivationFormat::F32 => cols,
        ActivationFormat::Bf16 => cols.div_ceil(2),
        ActivationFormat::Int8 => cols.div_ceil(QUANTIZED_BLOCK) * WORDS_PER_BLOCK,
    }
}

/// Blocks with a scale in `cols` columns.
#[inline(always)]
fn scale_blocks(format: NumberFormat, cols: usize) -> usize {
    if format.is_quantized() {
        cols.div_ceil(QUANTIZED_BLOCK)
    } else {
        0
    }
}

/// Cuts `rows` rows into blocks, the largest first.
pub(crate) fn row_blocks(isa: Isa, format: NumberFormat, rows: usize) -> impl Iterator<Item = RowBlock> {
    let sizes = isa.tile_rows(format);
    let mut first = 0;
    std::iter::from_fn(move || {
        let size = sizes.iter().copied().find(|&size| size <= rows - first)?;
        let block = RowBlock { first, rows: size };
        first += size;
        Some(block)
    })
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::{Activations, CpuPool, bf16::from_bf16};

    #[test]
    fn blocks_cover_all_rows_in_order() {
        for isa in Isa::all_available() {
            for format in NumberFormat::ALL {
                for rows in 0..100 {
                    let mut next = 0;
                    for block in row_blocks(isa, format, rows) {
                        assert_eq!(block.first, next, "{isa} {rows}");
                        assert!(isa.tile_rows(format).contains(&block.rows));
                        next += block.rows;
                    }
                    assert_eq!(next, rows);
                }
            }
        }
    }

    /// Element `col` of row `t` of a block, read back from where the inner loop reads it.
    fn value(rows: &InterleavedRows<'_>, block: RowBlock, t: usize, col: usize) -> f32 {
        let format = rows.format;
        let word = |index: usize| rows.words[block.first * words(format, rows.cols) + index * block.rows + t];
        match format {
            NumberFormat::F32 => f32::from_bits(word(col)),
            NumberFormat::Bf16 => from_bf16((word(col / 2) >> (16 * (1 - col % 2))) as u16),
            _ => {
                let code = (word(col / 4) >> (8 * (col % 4))) as u8 as i8;
                let blocks = scale_blocks(format, rows.cols);
                let scale = rows.scales[block.first * blocks + col / QUANTIZED_BLOCK * block.rows + t];
                f32::from(code) * scale * if format == NumberFormat::Mxfp4 { 2.0 } else { 1.0 }
            }
        }
    }

    #[test]
    fn selected_rows_are_found_where_the_inner_loop_reads_them() {
        let x = Array2::from_shape_fn((20, 45), |(row, col)| (row * 5 + col) as f32);
        let selection: Vec<u32> = (0..20).filter(|row| row % 3 != 0).collect();
        let pool = CpuPool::new(1);
        for isa in Isa::all_available() {
            for format in NumberFormat::ALL {
                let rounded = Activations::round(format.activations(), x.view());
                let values = rounded.to_f32();
                let workspace = pool.workspace();
                let rows =
                    InterleavedRows::from_activations(isa, &workspace, format, (&rounded).into(), Some(&selection));
                for &block in rows.blocks() {
                    for t in 0..block.rows {
                        for col in 0..45 {
                            let wanted = values[[selection[block.first + t] as usize, col]];
                            assert_eq!(value(&rows, block, t, col), wanted, "{isa} {format}");
                        }
                    }
                }
            }
        }
    }
}
