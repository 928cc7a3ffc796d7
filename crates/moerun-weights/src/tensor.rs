//! One tensor of a checkpoint, read row by row as f32.

mod keys_and_values;
mod pack;
mod row_blocks;
mod transfer;

use std::ops::Range;

use keys_and_values::KeysAndValues;
pub use row_blocks::{ROW_BLOCK, RowBlock, RowBlockFormat, RowBlocks};
pub use transfer::MatrixForm;

use crate::{
    blocks::{BlockType, MAX_BLOCK},
    elements::{Bf16, E2M1, E4M3, Element, F16, F32, e8m0},
};

/// Element types that a checkpoint may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    /// fp8 with 4 exponent and 3 mantissa bits, scaled per block.
    F8E4M3,
    /// Packed codes or exponents.
    U8,
    /// Blocks of GGUF.
    Block(BlockType),
}

impl Dtype {
    /// Its name in a safetensors header or in llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::F8E4M3 => "F8_E4M3",
            Dtype::U8 => "U8",
            Dtype::Block(block) => block.name(),
        }
    }

    /// The type of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        let plain = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F8E4M3, Dtype::U8];
        let blocks = BlockType::ALL.into_iter().map(Dtype::Block);
        plain.into_iter().chain(blocks).find(|dtype| dtype.name() == name)
    }

    /// Elements and bytes of the smallest piece that can be read: of one element, or of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Dtype::F32 => (1, 4),
            Dtype::F16 | Dtype::Bf16 => (1, 2),
            Dtype::F8E4M3 | Dtype::U8 => (1, 1),
            Dtype::Block(block) => (block.elements(), block.bytes()),
        }
    }

    /// Elements in so many bytes.
    pub(crate) fn elements(self, bytes: usize) -> usize {
        let (elements, size) = self.block();
        bytes / size * elements
    }
}

/// Codes of MXFP4 that share an exponent.
pub(crate) const MXFP4_GROUP: usize = 32;
const MXFP4_GROUP_BYTES: usize = MXFP4_GROUP / 2;

/// A matrix `[rows, cols]` (output features, input features) of a mapped checkpoint, in our orientation whatever the
/// one on disk; dequantised when read.
///
/// Dequantised values are products in single precision: fp8 code × block scale, and 4-bit code × power of two. Codes
/// and exponents that stand for NaN are read as NaN: finding them would mean to read the whole checkpoint beforehand,
/// and the first row that they touch is refused by the gate or by the exact combine.
#[derive(Debug, Clone)]
pub struct MatrixSource<'a> {
    rows: usize,
    cols: usize,
    stored: Stored<'a>,
    /// Width of a head whose rows are stored in pairs, one of its first half and one of its second.
    paired_head: Option<usize>,
}

#[derive(Debug, Clone)]
enum Stored<'a> {
    Plain(Plain<'a>),
    Fp8(Fp8<'a>),
    Mxfp4(Mxfp4<'a>),
    Blocks(Blocks<'a>),
    KeysAndValues(Box<KeysAndValues<'a>>),
}

/// Element `(row, col)` is number `first + row * row_stride + col * col_stride` of `bytes`.
#[derive(Debug, Clone)]
struct Plain<'a> {
    dtype: Dtype,
    bytes: &'a [u8],
    first: usize,
    row_stride: usize,
    col_stride: usize,
}

#[derive(Debug, Clone)]
struct Fp8<'a> {
    /// `[rows, cols]`.
    codes: &'a [u8],
    /// `[ceil(rows / block_rows), ceil(cols / block_cols)]`.
    scales: Plain<'a>,
    block_rows: usize,
    block_cols: usize,
}

/// Row `r` is number `first_row + r * row_step` of the stored ones.
#[derive(Debug, Clone)]
struct Mxfp4<'a> {
    /// `[stored rows, cols / 32, 16]`: two codes a byte, the lower half first.
    codes: &'a [u8],
    /// `[stored rows, cols / 32]`.
    exponents: &'a [u8],
    first_row: usize,
    row_step: usize,
}

/// Row-major blocks; a row is a whole number of them.
#[derive(Debug, Clone)]
struct Blocks<'a> {
    block: BlockType,
    bytes: &'a [u8],
}

/// Where a plain matrix lies within a larger tensor, counted in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strides {
    pub(crate) first: usize,
    pub(crate) row: usize,
    pub(crate) col: usize,
}

impl<'a> MatrixSource<'a> {
    /// A matrix within a plain tensor. The strides must stay within `bytes`: the last element is checked here.
    pub(crate) fn plain(dtype: Dtype, bytes: &'a [u8], [rows, cols]: [usize; 2], strides: Strides) -> Self {
        debug_assert!(matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16));
        let last = strides.first + (rows.max(1) - 1) * strides.row + (cols.max(1) - 1) * strides.col;
        assert!(
            (last + 1) * dtype.block().1 <= bytes.len(),
            "a matrix lies within its tensor"
        );
        let plain = Plain {
            dtype,
            bytes,
            first: strides.first,
            row_stride: strides.row,
            col_stride: strides.col,
        };
        Self::whole([rows, cols], Stored::Plain(plain))
    }

    /// A whole plain tensor `[rows, cols]`.
    pub(crate) fn row_major(dtype: Dtype, bytes: &'a [u8], [rows, cols]: [usize; 2]) -> Self {
        Self::plain(
            dtype,
            bytes,
            [rows, cols],
            Strides {
                first: 0,
                row: cols,
                col: 1,
            },
        )
    }

    /// fp8 codes `[rows, cols]` with a scale per block, of a plain type.
    pub(crate) fn fp8(
        codes: &'a [u8],
        (scale_dtype, scales): (Dtype, &'a [u8]),
        [rows, cols]: [usize; 2],
        [block_rows, block_cols]: [usize; 2],
    ) -> Self {
        debug_assert!(matches!(scale_dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16));
        assert_eq!(codes.len(), rows * cols, "one code per element");
        let scales_per_row = cols.div_ceil(block_cols);
        assert_eq!(
            scales.len(),
            scale_dtype.block().1 * rows.div_ceil(block_rows) * scales_per_row,
            "one scale per block"
        );
        let fp8 = Fp8 {
            codes,
            scales: Plain {
                dtype: scale_dtype,
                bytes: scales,
                first: 0,
                row_stride: scales_per_row,
                col_stride: 1,
            },
            block_rows,
            block_cols,
        };
        Self::whole([rows, cols], Stored::Fp8(fp8))
    }

    /// Every `row_step`-th row, from `first_row`, of 4-bit codes `[stored rows, cols / 32, 16]` with their exponents.
    pub(crate) fn mxfp4(
        codes: &'a [u8],
        exponents: &'a [u8],
        [rows, cols]: [usize; 2],
        first_row: usize,
        row_step: usize,
    ) -> Self {
        let end = first_row + (rows.max(1) - 1) * row_step + 1;
        assert!(cols.is_multiple_of(MXFP4_GROUP), "whole groups");
        assert!(
            codes.len() >= end * cols / 2 && exponents.len() >= end * cols / MXFP4_GROUP,
            "rows within the tensor"
        );
        let mxfp4 = Mxfp4 {
            codes,
            exponents,
            first_row,
            row_step,
        };
        Self::whole([rows, cols], Stored::Mxfp4(mxfp4))
    }

    /// A whole tensor `[rows, cols]` of blocks.
    pub(crate) fn blocks(block: BlockType, bytes: &'a [u8], [rows, cols]: [usize; 2]) -> Self {
        assert!(cols.is_multiple_of(block.elements()), "whole blocks");
        assert_eq!(
            bytes.len(),
            rows * cols / block.elements() * block.bytes(),
            "all blocks"
        );
        Self::whole([rows, cols], Stored::Blocks(Blocks { block, bytes }))
    }

    fn whole([rows, cols]: [usize; 2], stored: Stored<'a>) -> Self {
        MatrixSource {
            rows,
            cols,
            stored,
            paired_head: None,
        }
    }

    /// The same matrix where the rows of each head of width `head` are stored in pairs: row 0, row head/2, row 1, …
    pub(crate) fn with_paired_head(self, head: usize) -> Self {
        assert!(
            head >= 2 && head.is_multiple_of(2) && self.rows.is_multiple_of(head),
            "whole heads of pairs"
        );
        MatrixSource {
            paired_head: Some(head),
            ..self
        }
    }

    /// Where row `row` is stored.
    fn stored_row(&self, row: usize) -> usize {
        self.paired_head.map_or(row, |head| paired(head, row))
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Type of the stored elements.
    pub fn dtype(&self) -> Dtype {
        match &self.stored {
            Stored::Plain(plain) => plain.dtype,
            Stored::Fp8(_) => Dtype::F8E4M3,
            Stored::Mxfp4(_) => Dtype::U8,
            Stored::Blocks(blocks) => Dtype::Block(blocks.block),
            Stored::KeysAndValues(both) => both.keys.dtype(),
        }
    }

    /// Writes row `row` as f32 into `out`, `[cols]`.
    ///
    /// # Panics
    /// If the matrix has no such row or `out` is not a row of it.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(
            out.len(),
            self.cols,
            "a row has as many elements as the matrix has columns"
        );
        self.read_row_part(row, 0, out);
    }

    /// Writes the columns `first..first + out.len()` of row `row` into `out` (a slice of a down projection).
    ///
    /// # Panics
    /// If the matrix has no such row or columns.
    pub fn read_row_part(&self, row: usize, first: usize, out: &mut [f32]) {
        self.check(row..row + 1, first..first + out.len());
        let row = self.stored_row(row);
        match &self.stored {
            Stored::Plain(plain) => plain.read(row, first, out),
            Stored::Fp8(fp8) => fp8.read(row, first, self.cols, out),
            Stored::Mxfp4(mxfp4) => mxfp4.read(row, first, self.cols, out),
            Stored::Blocks(blocks) => blocks.read(row, first, self.cols, out),
            Stored::KeysAndValues(both) => both.read(row, first, out),
        }
    }

    /// Writes rows `first..first + out.len() / cols` into `out`, `[rows, cols]`. Where the stored matrix is transposed
    /// this reads it in its own order, several times as fast as row by row.
    ///
    /// # Panics
    /// If the matrix has no such rows or `out` is not a whole number of rows.
    pub fn read_rows(&self, first: usize, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.cols), "whole rows");
        let count = out.len() / self.cols;
        self.check(first..first + count, 0..self.cols);
        match &self.stored {
            Stored::Plain(plain) if plain.row_stride < plain.col_stride && self.paired_head.is_none() => {
                plain.read_by_columns(first, self.cols, out)
            }
            _ => (first..)
                .zip(out.chunks_exact_mut(self.cols))
                .for_each(|(row, out)| self.read_row(row, out)),
        }
    }

    fn check(&self, rows: Range<usize>, cols: Range<usize>) {
        assert!(
            rows.end <= self.rows && cols.end <= self.cols,
            "rows {rows:?}, columns {cols:?} of a matrix of {} x {}",
            self.rows,
            self.cols
        );
    }

    /// Feeds the stored bytes of a part to `sink`, in an order that depends on the layout of the tensor alone. Groups
    /// that a part touches are fed whole, with their exponents; blocks of fp8 scales that it touches likewise.
    pub(crate) fn stored_bytes(&self, rows: Range<usize>, cols: Range<usize>, sink: &mut dyn FnMut(&[u8])) {
        self.check(rows.clone(), cols.clone());
        if self.paired_head.is_some() {
            for row in rows {
                let row = self.stored_row(row);
                self.stored_rows(row..row + 1, cols.clone(), sink);
            }
            return;
        }
        self.stored_rows(rows, cols, sink);
    }

    /// As [`Self::stored_bytes`], of rows by their place on disk.
    fn stored_rows(&self, rows: Range<usize>, cols: Range<usize>, sink: &mut dyn FnMut(&[u8])) {
        match &self.stored {
            Stored::Plain(plain) => plain.stored_bytes(rows, cols, sink),
            Stored::Fp8(fp8) => fp8.stored_bytes(rows, cols, self.cols, sink),
            Stored::Mxfp4(mxfp4) => mxfp4.stored_bytes(rows, cols, self.cols, sink),
            Stored::Blocks(blocks) => blocks.stored_bytes(rows, cols, self.cols, sink),
            Stored::KeysAndValues(both) => both.stored_bytes(rows, cols, sink),
        }
    }
}

/// Where element `index` of a sequence of heads is stored whose halves are interleaved.
pub(crate) fn paired(head: usize, index: usize) -> usize {
    let (start, within) = (index / head * head, index % head);
    let (half, place) = (within / (head / 2), within % (head / 2));
    start + 2 * place + half
}

impl Blocks<'_> {
    fn read(&self, row: usize, first: usize, cols: usize, out: &mut [f32]) {
        let (elements, bytes) = (self.block.elements(), self.block.bytes());
        let row_start = row * (cols / elements);
        let mut values = [0.0; MAX_BLOCK];
        let mut done = 0;
        while done < out.len() {
            let (block, skipped) = ((first + done) / elements, (first + done) % elements);
            let stored = &self.bytes[(row_start + block) * bytes..][..bytes];
            let end = (done + elements - skipped).min(out.len());
            if end - done == elements {
                self.block.read(stored, &mut out[done..end]);
            } else {
                self.block.read(stored, &mut values[..elements]);
                out[done..end].copy_from_slice(&values[skipped..][..end - done]);
            }
            done = end;
        }
    }

    fn stored_bytes(&self, rows: Range<usize>, cols: Range<usize>, width: usize, sink: &mut dyn FnMut(&[u8])) {
        let (elements, bytes) = (self.block.elements(), self.block.bytes());
        let blocks = cols.start / elements..cols.end.div_ceil(elements);
        for row in rows {
            let row_start = row * (width / elements);
            sink(&self.bytes[(row_start + blocks.start) * bytes..(row_start + blocks.end) * bytes]);
        }
    }
}

impl Plain<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        match self.dtype {
            Dtype::F32 => self.read_as::<F32>(row, first, out),
            Dtype::F16 => self.read_as::<F16>(row, first, out),
            _ => self.read_as::<Bf16>(row, first, out),
        }
    }

    fn read_as<E: Element>(&self, row: usize, first: usize, out: &mut [f32]) {
        let Some(last) = out.len().checked_sub(1) else { return };
        let start = self.first + row * self.row_stride + first * self.col_stride;
        let bytes = &self.bytes[start * E::BYTES..(start + last * self.col_stride + 1) * E::BYTES];
        if self.col_stride == 1 {
            for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(E::BYTES)) {
                *out = E::read(bytes);
            }
        } else {
            for (out, bytes) in out.iter_mut().zip(bytes.chunks(self.col_stride * E::BYTES)) {
                *out = E::read(bytes);
            }
        }
    }

    fn read_by_columns(&self, first: usize, cols: usize, out: &mut [f32]) {
        match self.dtype {
            Dtype::F32 => self.read_by_columns_as::<F32>(first, cols, out),
            Dtype::F16 => self.read_by_columns_as::<F16>(first, cols, out),
            _ => self.read_by_columns_as::<Bf16>(first, cols, out),
        }
    }

    fn read_by_columns_as<E: Element>(&self, first: usize, cols: usize, out: &mut [f32]) {
        for col in 0..cols {
            let start = self.first + first * self.row_stride + col * self.col_stride;
            let bytes = &self.bytes[start * E::BYTES..];
            for (out, bytes) in out[col..]
                .iter_mut()
                .step_by(cols)
                .zip(bytes.chunks(self.row_stride * E::BYTES))
            {
                *out = E::read(bytes);
            }
        }
    }

    fn stored_bytes(&self, rows: Range<usize>, cols: Range<usize>, sink: &mut dyn FnMut(&[u8])) {
        // The axis along which elements lie closer together is the inner one.
        let (outer, outer_stride, inner, inner_stride) = if self.col_stride <= self.row_stride {
            (rows, self.row_stride, cols, self.col_stride)
        } else {
            (cols, self.col_stride, rows, self.row_stride)
        };
        let (_, size) = self.dtype.block();
        let mut gathered = Vec::new();
        for outer_index in outer {
            let start = (self.first + outer_index * outer_stride + inner.start * inner_stride) * size;
            if inner_stride == 1 {
                sink(&self.bytes[start..start + inner.len() * size]);
                continue;
            }
            gathered.clear();
            for index in 0..inner.len() {
                let at = start + index * inner_stride * size;
                gathered.extend_from_slice(&self.bytes[at..at + size]);
            }
            sink(&gathered);
        }
    }
}

impl Fp8<'_> {
    fn read(&self, row: usize, first: usize, cols: usize, out: &mut [f32]) {
        let (values, codes) = (&*E4M3, &self.codes[row * cols + first..][..out.len()]);
        let mut done = 0;
        while done < out.len() {
            let block = (first + done) / self.block_cols;
            let end = ((block + 1) * self.block_cols - first).min(out.len());
            let mut scale = [0.0];
            self.scales.read(row / self.block_rows, block, &mut scale);
            for (out, &code) in out[done..end].iter_mut().zip(&codes[done..end]) {
                *out = values[usize::from(code)] * scale[0];
            }
            done = end;
        }
    }

    fn stored_bytes(&self, rows: Range<usize>, cols: Range<usize>, width: usize, sink: &mut dyn FnMut(&[u8])) {
        let block_cols = cols.start / self.block_cols..cols.end.div_ceil(self.block_cols);
        for block_row in rows.start / self.block_rows..rows.end.div_ceil(self.block_rows) {
            self.scales
                .stored_bytes(block_row..block_row + 1, block_cols.clone(), sink);
        }
        for row in rows {
            sink(&self.codes[row * width + cols.start..row * width + cols.end]);
        }
    }
}

impl Mxfp4<'_> {
    fn read(&self, row: usize, first: usize, cols: usize, out: &mut [f32]) {
        let first_group = (self.first_row + row * self.row_step) * cols / MXFP4_GROUP;
        let mut done = 0;
        while done < out.len() {
            let (group, skipped) = ((first + done) / MXFP4_GROUP, (first + done) % MXFP4_GROUP);
            let scale = e8m0(self.exponents[first_group + group]);
            let codes = &self.codes[(first_group + group) * MXFP4_GROUP_BYTES..][..MXFP4_GROUP_BYTES];
            let end = (done + MXFP4_GROUP - skipped).min(out.len());
            for (out, index) in out[done..end].iter_mut().zip(skipped..) {
                let code = codes[index / 2] >> (index % 2 * 4) & 15;
                *out = E2M1[usize::from(code)] * scale;
            }
            done = end;
        }
    }

    fn stored_bytes(&self, rows: Range<usize>, cols: Range<usize>, width: usize, sink: &mut dyn FnMut(&[u8])) {
        let groups = cols.start / MXFP4_GROUP..cols.end.div_ceil(MXFP4_GROUP);
        for row in rows {
            let row_start = (self.first_row + row * self.row_step) * width / MXFP4_GROUP;
            let (start, end) = (row_start + groups.start, row_start + groups.end);
            sink(&self.exponents[start..end]);
            sink(&self.codes[start * MXFP4_GROUP_BYTES..end * MXFP4_GROUP_BYTES]);
        }
    }
}
