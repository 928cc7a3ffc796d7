//! The blocks of 32 in which a checkpoint stores a row, as they are: for formats that compute with the stored codes.

use half::f16;

use super::{Blocks, MXFP4_GROUP, MXFP4_GROUP_BYTES, MatrixSource, Mxfp4, Stored};
use crate::{BlockType, elements::E2M1, elements::e8m0};

/// Columns of a block.
pub const ROW_BLOCK: usize = 32;

/// How all rows of a matrix are stored whose blocks can be had undequantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum RowBlockFormat {
    Q8_0,
    Q4_0,
    Mxfp4,
}

/// 32 neighbouring columns of a row, codes in ascending column order whatever the order on disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RowBlock {
    /// Value = code · scale.
    Q8_0 {
        /// −128 to 127.
        codes: [i8; ROW_BLOCK],
        /// As stored: not finite in a damaged file.
        scale: f16,
    },
    /// Value = (code − 8) · scale.
    Q4_0 {
        /// 0 to 15.
        codes: [u8; ROW_BLOCK],
        /// As stored: not finite in a damaged file.
        scale: f16,
    },
    /// Value = e2m1(code) · 2^(exponent − 127).
    Mxfp4 {
        /// 0 to 15: a sign, two exponent bits, one mantissa bit.
        codes: [u8; ROW_BLOCK],
        /// 255 stands for NaN.
        exponent: u8,
    },
}

impl RowBlock {
    /// The values, with the bits that [`MatrixSource::read_row`] gives.
    pub fn values(&self) -> [f32; ROW_BLOCK] {
        match self {
            RowBlock::Q8_0 { codes, scale } => codes.map(|code| f32::from(code) * scale.to_f32()),
            RowBlock::Q4_0 { codes, scale } => codes.map(|code| (f32::from(code) - 8.0) * scale.to_f32()),
            RowBlock::Mxfp4 { codes, exponent } => codes.map(|code| E2M1[usize::from(code)] * e8m0(*exponent)),
        }
    }
}

/// The blocks of one row in ascending column order; nothing is allocated, and `nth` and `skip` cost nothing.
#[derive(Debug, Clone)]
pub struct RowBlocks<'a> {
    row: StoredRow<'a>,
    next: usize,
    end: usize,
}

/// Bytes of one row.
#[derive(Debug, Clone)]
enum StoredRow<'a> {
    /// Scale and codes of each block together; in 4 bits the lower halves of the bytes are the first 16 columns.
    Ggml { format: RowBlockFormat, bytes: &'a [u8] },
    /// Codes and exponents apart; the lower half of a byte is the column before the upper half.
    HuggingFace { codes: &'a [u8], exponents: &'a [u8] },
}

impl Iterator for RowBlocks<'_> {
    type Item = RowBlock;

    fn next(&mut self) -> Option<RowBlock> {
        self.nth(0)
    }

    fn nth(&mut self, skipped: usize) -> Option<RowBlock> {
        let index = self.next.saturating_add(skipped);
        self.next = index.saturating_add(1).min(self.end);
        (index < self.end).then(|| self.row.block(index))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.end - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for RowBlocks<'_> {}

impl StoredRow<'_> {
    fn block(&self, index: usize) -> RowBlock {
        match self {
            StoredRow::Ggml { format, bytes } => {
                let size = block_type(*format).bytes();
                let block = &bytes[index * size..][..size];
                match format {
                    RowBlockFormat::Q8_0 => RowBlock::Q8_0 {
                        codes: std::array::from_fn(|col| block[2 + col] as i8),
                        scale: f16::from_le_bytes([block[0], block[1]]),
                    },
                    RowBlockFormat::Q4_0 => RowBlock::Q4_0 {
                        codes: halves(&block[2..]),
                        scale: f16::from_le_bytes([block[0], block[1]]),
                    },
                    RowBlockFormat::Mxfp4 => RowBlock::Mxfp4 {
                        codes: halves(&block[1..]),
                        exponent: block[0],
                    },
                }
            }
            StoredRow::HuggingFace { codes, exponents } => {
                let codes = &codes[index * MXFP4_GROUP_BYTES..][..MXFP4_GROUP_BYTES];
                RowBlock::Mxfp4 {
                    codes: std::array::from_fn(|col| codes[col / 2] >> (col % 2 * 4) & 15),
                    exponent: exponents[index],
                }
            }
        }
    }
}

fn halves(codes: &[u8]) -> [u8; ROW_BLOCK] {
    const HALF: usize = ROW_BLOCK / 2;
    std::array::from_fn(|col| codes[col % HALF] >> (col / HALF * 4) & 15)
}

fn block_type(format: RowBlockFormat) -> BlockType {
    match format {
        RowBlockFormat::Q8_0 => BlockType::Q8_0,
        RowBlockFormat::Q4_0 => BlockType::Q4_0,
        RowBlockFormat::Mxfp4 => BlockType::Mxfp4,
    }
}

impl<'a> MatrixSource<'a> {
    /// How the rows are stored, if their blocks can be had as they are.
    pub fn row_block_format(&self) -> Option<RowBlockFormat> {
        match &self.stored {
            Stored::Mxfp4(_) => Some(RowBlockFormat::Mxfp4),
            Stored::Blocks(blocks) => match blocks.block {
                BlockType::Q8_0 => Some(RowBlockFormat::Q8_0),
                BlockType::Q4_0 => Some(RowBlockFormat::Q4_0),
                BlockType::Mxfp4 => Some(RowBlockFormat::Mxfp4),
                BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => None,
            },
            _ => None,
        }
    }

    /// The blocks of row `row`, `cols / 32` of them; `None` where [`Self::row_block_format`] is.
    ///
    /// # Panics
    /// If the matrix has no such row.
    pub fn row_blocks(&self, row: usize) -> Option<RowBlocks<'a>> {
        self.check(row..row + 1, 0..self.cols);
        let (format, row) = (self.row_block_format()?, self.stored_row(row));
        let blocks = self.cols / ROW_BLOCK;
        let row = match self.stored {
            Stored::Blocks(Blocks { block, bytes }) => {
                let size = blocks * block.bytes();
                StoredRow::Ggml {
                    format,
                    bytes: &bytes[row * size..][..size],
                }
            }
            Stored::Mxfp4(Mxfp4 {
                codes,
                exponents,
                first_row,
                row_step,
            }) => {
                const { assert!(MXFP4_GROUP == ROW_BLOCK) };
                let first = (first_row + row * row_step) * blocks;
                StoredRow::HuggingFace {
                    codes: &codes[first * MXFP4_GROUP_BYTES..][..blocks * MXFP4_GROUP_BYTES],
                    exponents: &exponents[first..][..blocks],
                }
            }
            _ => return None,
        };
        Some(RowBlocks {
            row,
            next: 0,
            end: blocks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that repeat late and hold every code.
    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|index| (index * 37 + index / 256 * 11) as u8).collect()
    }

    fn assert_blocks_are_the_values(matrix: &MatrixSource<'_>, format: RowBlockFormat) {
        assert_eq!(matrix.row_block_format(), Some(format));
        let mut wanted = vec![0.0; matrix.cols()];
        for row in 0..matrix.rows() {
            matrix.read_row(row, &mut wanted);
            let blocks = matrix.row_blocks(row).unwrap();
            assert_eq!(blocks.len(), matrix.cols() / ROW_BLOCK);
            let found: Vec<u32> = blocks
                .clone()
                .flat_map(|block| block.values().map(f32::to_bits))
                .collect();
            assert_eq!(
                found,
                wanted.iter().map(|value| value.to_bits()).collect::<Vec<_>>(),
                "{format:?} row {row}"
            );
            let second = blocks.clone().nth(1).unwrap();
            assert_eq!(second.values().map(f32::to_bits)[..], found[ROW_BLOCK..2 * ROW_BLOCK]);
            assert_eq!(blocks.skip(1).len(), matrix.cols() / ROW_BLOCK - 1);
        }
    }

    #[test]
    fn blocks_of_ggml_are_those_of_the_dequantised_row() {
        for (format, scale) in [
            (RowBlockFormat::Q8_0, 0x3801u16),
            (RowBlockFormat::Q4_0, 0xb4ff),
            (RowBlockFormat::Mxfp4, 0),
        ] {
            let block = block_type(format);
            let mut stored = bytes(8 * 3 * block.bytes());
            for (index, stored) in stored.chunks_exact_mut(block.bytes()).enumerate() {
                match format {
                    RowBlockFormat::Mxfp4 => stored[0] = 110 + index as u8,
                    _ => stored[..2].copy_from_slice(&(scale + index as u16).to_le_bytes()),
                }
            }
            let matrix = MatrixSource::blocks(block, &stored, [8, 96]);
            assert_blocks_are_the_values(&matrix, format);
            assert_blocks_are_the_values(&matrix.with_paired_head(4), format);
        }
    }

    #[test]
    fn blocks_of_hugging_face_are_those_of_the_dequantised_row() {
        let (codes, exponents) = (bytes(6 * 3 * 16), (0..18).map(|group| 100 + group).collect::<Vec<u8>>());
        for first in [0, 1] {
            let matrix = MatrixSource::mxfp4(&codes, &exponents, [3, 96], first, 2);
            assert_blocks_are_the_values(&matrix, RowBlockFormat::Mxfp4);
        }
    }

    #[test]
    fn codes_are_in_the_order_of_the_columns() {
        let codes: Vec<u8> = (0..16).map(|low: u8| low | (15 - low) << 4).collect();
        let ggml = [&[127][..], &codes].concat();
        let column = |index: usize| {
            RowBlock::values(&RowBlock::Mxfp4 {
                codes: [index as u8; 32],
                exponent: 127,
            })[0]
        };
        let block = |matrix: MatrixSource<'_>| matrix.row_blocks(0).unwrap().next().unwrap();
        let RowBlock::Mxfp4 { codes: found, exponent } = block(MatrixSource::blocks(BlockType::Mxfp4, &ggml, [1, 32]))
        else {
            panic!("another format")
        };
        assert_eq!(exponent, 127);
        assert_eq!(
            found,
            std::array::from_fn(|col| if col < 16 { col as u8 } else { 31 - col as u8 })
        );
        assert_eq!(column(7), 6.0);
        let RowBlock::Mxfp4 { codes: found, .. } = block(MatrixSource::mxfp4(&codes, &[127], [1, 32], 0, 1)) else {
            panic!("another format")
        };
        let wanted = |col: usize| if col.is_multiple_of(2) { col / 2 } else { 15 - col / 2 };
        assert_eq!(found, std::array::from_fn(|col| wanted(col) as u8));
    }

    #[test]
    fn other_storage_has_no_such_blocks() {
        let stored = bytes(2 * 144);
        assert!(
            MatrixSource::blocks(BlockType::Q4K, &stored, [2, 256])
                .row_blocks(1)
                .is_none()
        );
        assert!(
            MatrixSource::row_major(crate::Dtype::F16, &stored, [2, 64])
                .row_blocks(0)
                .is_none()
        );
    }
}
