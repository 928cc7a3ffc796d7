//! Stored matrix → packed matrix: blocks that the checkpoint holds in the format asked for are taken as they are.

use std::ops::Range;

use moerun_kernels::{PackError, PackedMatrix, QuantizedRow};
use moerun_types::{NumberFormat, QUANTIZED_BLOCK};

use super::{MatrixSource, ROW_BLOCK, RowBlock, RowBlockFormat};

impl MatrixSource<'_> {
    /// Packs some of the rows and columns. Values that are not stored as `format` holds them are dequantised and rounded
    /// to it.
    pub fn pack(
        &self,
        format: NumberFormat,
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> Result<PackedMatrix, PackError> {
        let whole_blocks = cols.start.is_multiple_of(ROW_BLOCK) && cols.end.is_multiple_of(ROW_BLOCK);
        if whole_blocks && self.row_block_format().map(held_as) == Some(format) {
            return PackedMatrix::from_quantized(format, rows.len(), cols.len(), |row| {
                self.stored_blocks(rows.start + row, &cols)
            });
        }
        PackedMatrix::pack(format, rows.len(), cols.len(), |row, out| {
            self.read_row_part(rows.start + row, cols.start, out);
        })
    }

    /// Packs some of the rows, transposed: `[cols, rows]`. Blocks run along the other dimension than the stored ones, so
    /// none can be taken as it is.
    pub fn pack_transposed(&self, format: NumberFormat, rows: Range<usize>) -> Result<PackedMatrix, PackError> {
        let cols = self.cols();
        let mut values = vec![0.0; rows.len() * cols];
        for (row, out) in rows.clone().zip(values.chunks_mut(cols.max(1))) {
            self.read_row(row, out);
        }
        PackedMatrix::pack(format, cols, rows.len(), |col, out| {
            for (index, out) in out.iter_mut().enumerate() {
                *out = values[index * cols + col];
            }
        })
    }

    fn stored_blocks(&self, row: usize, cols: &Range<usize>) -> QuantizedRow {
        const { assert!(ROW_BLOCK == QUANTIZED_BLOCK) };
        let blocks = self.row_blocks(row).expect("the format of its blocks was seen");
        let (codes, scales) = blocks
            .skip(cols.start / ROW_BLOCK)
            .take(cols.len() / ROW_BLOCK)
            .map(|block| match block {
                RowBlock::Q8_0 { codes, scale } => (codes.map(i8::cast_unsigned), scale.to_bits()),
                RowBlock::Q4_0 { codes, scale } => (codes, scale.to_bits()),
                RowBlock::Mxfp4 { codes, exponent } => (codes, u16::from(exponent)),
            })
            .unzip();
        QuantizedRow { codes, scales }
    }
}

/// The number format whose packed blocks hold the same codes and scales.
fn held_as(stored: RowBlockFormat) -> NumberFormat {
    match stored {
        RowBlockFormat::Q8_0 => NumberFormat::Int8,
        RowBlockFormat::Q4_0 => NumberFormat::Int4,
        RowBlockFormat::Mxfp4 => NumberFormat::Mxfp4,
    }
}
