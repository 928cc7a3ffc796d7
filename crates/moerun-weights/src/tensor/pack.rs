//! Stored matrix → packed matrix: blocks that the checkpoint holds in the format asked for are taken as they are.

use std::ops::Range;

use moerun_kernels::{PackError, PackedMatrix, QuantizedRow};
use moerun_types::{NumberFormat, QUANTIZED_BLOCK};
use moerun_weights::{MatrixSource, ROW_BLOCK, RowBlock, RowBlockFormat};

/// Packs some of a matrix' rows, `[rows, cols]`.
pub(crate) fn rows(
    format: NumberFormat,
    source: &MatrixSource<'_>,
    rows: Range<usize>,
) -> Result<PackedMatrix, PackError> {
    part(format, source, rows, 0..source.cols())
}

/// Packs a part of a matrix. Values that are not stored as `format` holds them are dequantised and rounded to it.
pub(crate) fn part(
    format: NumberFormat,
    source: &MatrixSource<'_>,
    rows: Range<usize>,
    cols: Range<usize>,
) -> Result<PackedMatrix, PackError> {
    let whole_blocks = cols.start.is_multiple_of(ROW_BLOCK) && cols.end.is_multiple_of(ROW_BLOCK);
    if whole_blocks && source.row_block_format().map(held_as) == Some(format) {
        return PackedMatrix::from_quantized(format, rows.len(), cols.len(), |row| {
            stored_row(source, rows.start + row, &cols)
        });
    }
    PackedMatrix::pack(format, rows.len(), cols.len(), |row, out| {
        source.read_row_part(rows.start + row, cols.start, out);
    })
}

/// Packs some of a matrix' rows, transposed: `[cols, rows]`. Blocks run along the other dimension than the stored ones,
/// so none can be taken as it is.
pub(crate) fn transposed(
    format: NumberFormat,
    source: &MatrixSource<'_>,
    rows: Range<usize>,
) -> Result<PackedMatrix, PackError> {
    let cols = source.cols();
    let mut values = vec![0.0; rows.len() * cols];
    for (row, out) in rows.clone().zip(values.chunks_mut(cols.max(1))) {
        source.read_row(row, out);
    }
    PackedMatrix::pack(format, cols, rows.len(), |col, out| {
        for (index, out) in out.iter_mut().enumerate() {
            *out = values[index * cols + col];
        }
    })
}

/// The number format whose packed blocks hold the same codes and scales.
fn held_as(stored: RowBlockFormat) -> NumberFormat {
    match stored {
        RowBlockFormat::Q8_0 => NumberFormat::Int8,
        RowBlockFormat::Q4_0 => NumberFormat::Int4,
        RowBlockFormat::Mxfp4 => NumberFormat::Mxfp4,
    }
}

fn stored_row(source: &MatrixSource<'_>, row: usize, cols: &Range<usize>) -> QuantizedRow {
    const { assert!(ROW_BLOCK == QUANTIZED_BLOCK) };
    let blocks = source.row_blocks(row).expect("the format of its blocks was seen");
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
