//! Activations as a kernel eats them: rounded once, to what the weights they will meet ask for.

mod rows;

use moerun_types::{ActivationFormat, QUANTIZED_BLOCK};
use ndarray::{Array2, ArrayView2};

pub use self::rows::ActivationRows;
use self::rows::{round_bf16, round_int8};
use crate::bf16::from_bf16;

/// Rows of activations, `[rows, cols]`, row-major, rounded to a number format.
#[derive(Debug, Clone, PartialEq)]
pub enum Activations {
    /// Not rounded.
    F32 {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        cols: usize,
        /// `[rows, cols]`.
        data: Vec<f32>,
    },
    /// Rounded to bfloat16, nearest even.
    Bf16 {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        cols: usize,
        /// `[rows, cols]`, bfloat16 bits.
        data: Vec<u16>,
    },
    /// Rounded in blocks of 32 along the row: codes in -127..=127 and the scale max|x| / 127. A block with a value that
    /// is not finite has the scale NaN.
    Int8 {
        /// Number of rows.
        rows: usize,
        /// Length of a row.
        cols: usize,
        /// `[rows, blocks][32]`, zeroes behind the last column.
        codes: Vec<[i8; QUANTIZED_BLOCK]>,
        /// `[rows, blocks]`.
        scales: Vec<f32>,
    },
}

/// Bytes that cannot be activations.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ActivationsError {
    /// The length does not fit.
    #[error("activations of {rows} x {cols} in {format} take {wanted} bytes, found {found}")]
    Length {
        rows: usize,
        cols: usize,
        format: ActivationFormat,
        wanted: usize,
        found: usize,
    },
    /// A code that no rounding gives.
    #[error("the 8-bit code of row {row}, column {col} is -128: wanted -127 to 127")]
    Code { row: usize, col: usize },
}

impl Activations {
    /// No rows, in `format`.
    pub fn empty(format: ActivationFormat) -> Self {
        let (rows, cols) = (0, 0);
        match format {
            ActivationFormat::F32 => Activations::F32 {
                rows,
                cols,
                data: Vec::new(),
            },
            ActivationFormat::Bf16 => Activations::Bf16 {
                rows,
                cols,
                data: Vec::new(),
            },
            ActivationFormat::Int8 => Activations::Int8 {
                rows,
                cols,
                codes: Vec::new(),
                scales: Vec::new(),
            },
        }
    }

    /// Rounds `x`, `[rows, cols]`, to `format`. A NaN stays a NaN.
    pub fn round(format: ActivationFormat, x: ArrayView2<'_, f32>) -> Self {
        let mut rounded = Activations::empty(format);
        rounded.replace(x);
        rounded
    }

    /// Becomes `x`, `[rows, cols]`, rounded to the format that it has, in the memory that it has if that is enough.
    pub fn replace(&mut self, x: ArrayView2<'_, f32>) {
        match self {
            Activations::F32 { rows, cols, data } => {
                (*rows, *cols) = x.dim();
                data.clear();
                match x.as_slice() {
                    Some(x) => data.extend_from_slice(x),
                    None => data.extend(x.iter()),
                }
            }
            Activations::Bf16 { rows, cols, data } => {
                (*rows, *cols) = x.dim();
                data.resize(x.len(), 0);
                round_bf16(x, data);
            }
            Activations::Int8 {
                rows,
                cols,
                codes,
                scales,
            } => {
                (*rows, *cols) = x.dim();
                let blocks = *rows * cols.div_ceil(QUANTIZED_BLOCK);
                codes.clear();
                codes.resize(blocks, [0; QUANTIZED_BLOCK]);
                scales.resize(blocks, 0.0);
                round_int8(x, codes, scales);
            }
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        match self {
            Activations::F32 { rows, .. } | Activations::Bf16 { rows, .. } | Activations::Int8 { rows, .. } => *rows,
        }
    }

    /// Length of a row.
    pub fn cols(&self) -> usize {
        match self {
            Activations::F32 { cols, .. } | Activations::Bf16 { cols, .. } | Activations::Int8 { cols, .. } => *cols,
        }
    }

    /// The format the rows are rounded to.
    pub fn format(&self) -> ActivationFormat {
        match self {
            Activations::F32 { .. } => ActivationFormat::F32,
            Activations::Bf16 { .. } => ActivationFormat::Bf16,
            Activations::Int8 { .. } => ActivationFormat::Int8,
        }
    }

    /// The rows named by `rows`, in that order; panics if one is out of range.
    pub fn select_rows(&self, rows: &[u32]) -> Self {
        match self {
            Activations::F32 { cols, data, .. } => Activations::F32 {
                rows: rows.len(),
                cols: *cols,
                data: select(data, *cols, rows),
            },
            Activations::Bf16 { cols, data, .. } => Activations::Bf16 {
                rows: rows.len(),
                cols: *cols,
                data: select(data, *cols, rows),
            },
            Activations::Int8 {
                cols, codes, scales, ..
            } => {
                let blocks = cols.div_ceil(QUANTIZED_BLOCK);
                Activations::Int8 {
                    rows: rows.len(),
                    cols: *cols,
                    codes: select(codes, blocks, rows),
                    scales: select(scales, blocks, rows),
                }
            }
        }
    }

    /// The rows of all `parts`, one after another. Panics if there are none, or formats or widths differ.
    pub fn concatenate(parts: &[&Activations]) -> Self {
        let (format, cols) = (parts[0].format(), parts[0].cols());
        assert!(
            parts.iter().all(|part| part.format() == format && part.cols() == cols),
            "parts of one format and width"
        );
        let mut all = Activations::empty(format);
        let total = parts.iter().map(|part| part.rows()).sum();
        for part in parts {
            match (&mut all, part) {
                (Activations::F32 { data: all, .. }, Activations::F32 { data, .. }) => all.extend_from_slice(data),
                (Activations::Bf16 { data: all, .. }, Activations::Bf16 { data, .. }) => all.extend_from_slice(data),
                (
                    Activations::Int8 {
                        codes: all_codes,
                        scales: all_scales,
                        ..
                    },
                    Activations::Int8 { codes, scales, .. },
                ) => {
                    all_codes.extend_from_slice(codes);
                    all_scales.extend_from_slice(scales);
                }
                _ => unreachable!("the formats are equal"),
            }
        }
        match &mut all {
            Activations::F32 { rows, cols: width, .. }
            | Activations::Bf16 { rows, cols: width, .. }
            | Activations::Int8 { rows, cols: width, .. } => (*rows, *width) = (total, cols),
        }
        all
    }

    /// Appends the rows named by `rows` to `out`, little-endian: what goes on the wire. A row of 8-bit codes is its
    /// `cols` codes, then its scales as f32. Panics if one is out of range.
    pub fn append_rows_le(&self, rows: &[u32], out: &mut Vec<u8>) {
        out.reserve(rows.len() * self.format().row_bytes(self.cols()));
        for &row in rows {
            match self {
                Activations::F32 { cols, data, .. } => {
                    let row = row_of(data, *cols, row);
                    if cfg!(target_endian = "little") {
                        out.extend_from_slice(bytemuck::cast_slice(row));
                    } else {
                        out.extend(row.iter().flat_map(|value| value.to_le_bytes()));
                    }
                }
                Activations::Bf16 { cols, data, .. } => {
                    let row = row_of(data, *cols, row);
                    if cfg!(target_endian = "little") {
                        out.extend_from_slice(bytemuck::cast_slice(row));
                    } else {
                        out.extend(row.iter().flat_map(|bits| bits.to_le_bytes()));
                    }
                }
                Activations::Int8 {
                    cols, codes, scales, ..
                } => {
                    let blocks = cols.div_ceil(QUANTIZED_BLOCK);
                    let codes = row_of(codes, blocks, row).as_flattened();
                    out.extend_from_slice(bytemuck::cast_slice(&codes[..*cols]));
                    out.extend(row_of(scales, blocks, row).iter().flat_map(|scale| scale.to_le_bytes()));
                }
            }
        }
    }

    /// Reads `[rows, cols]` from little-endian bytes of any alignment. A length that does not fit is an error; a size
    /// beyond the address space is reported as wanting `usize::MAX` bytes.
    pub fn from_le_bytes(
        format: ActivationFormat,
        rows: usize,
        cols: usize,
        bytes: &[u8],
    ) -> Result<Self, ActivationsError> {
        let wanted = rows.saturating_mul(format.row_bytes(cols));
        if wanted != bytes.len() {
            return Err(ActivationsError::Length {
                rows,
                cols,
                format,
                wanted,
                found: bytes.len(),
            });
        }
        Ok(match format {
            ActivationFormat::F32 => {
                let data = bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&value| f32::from_le_bytes(value))
                    .collect();
                Activations::F32 { rows, cols, data }
            }
            ActivationFormat::Bf16 => {
                let data = bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bits| u16::from_le_bytes(bits))
                    .collect();
                Activations::Bf16 { rows, cols, data }
            }
            ActivationFormat::Int8 => {
                let blocks = cols.div_ceil(QUANTIZED_BLOCK);
                let mut codes = vec![[0; QUANTIZED_BLOCK]; rows * blocks];
                let mut scales = Vec::with_capacity(rows * blocks);
                for row in 0..rows {
                    let bytes = &bytes[row * format.row_bytes(cols)..][..format.row_bytes(cols)];
                    let (row_codes, row_scales) = bytes.split_at(cols);
                    let row_codes: &[i8] = bytemuck::cast_slice(row_codes);
                    if let Some(col) = row_codes.iter().position(|&code| code == -128) {
                        return Err(ActivationsError::Code { row, col });
                    }
                    codes[row * blocks..(row + 1) * blocks].as_flattened_mut()[..cols].copy_from_slice(row_codes);
                    scales.extend(row_scales.as_chunks().0.iter().map(|&scale| f32::from_le_bytes(scale)));
                }
                Activations::Int8 {
                    rows,
                    cols,
                    codes,
                    scales,
                }
            }
        })
    }

    /// The rounded values as f32, `[rows, cols]`.
    pub fn to_f32(&self) -> Array2<f32> {
        let values = match self {
            Activations::F32 { data, .. } => data.clone(),
            Activations::Bf16 { data, .. } => data.iter().map(|&bits| from_bf16(bits)).collect(),
            Activations::Int8 {
                cols, codes, scales, ..
            } => {
                let blocks = cols.div_ceil(QUANTIZED_BLOCK).max(1);
                let rows = codes.chunks(blocks).zip(scales.chunks(blocks));
                rows.flat_map(|(codes, scales)| {
                    let values = codes.as_flattened()[..*cols].iter().enumerate();
                    values.map(|(col, &code)| f32::from(code) * scales[col / QUANTIZED_BLOCK])
                })
                .collect()
            }
        };
        Array2::from_shape_vec((self.rows(), self.cols()), values).expect("data is rows x cols")
    }
}

fn row_of<T>(data: &[T], cols: usize, row: u32) -> &[T] {
    &data[row as usize * cols..(row as usize + 1) * cols]
}

fn select<T: Copy>(data: &[T], cols: usize, rows: &[u32]) -> Vec<T> {
    let mut selected = Vec::with_capacity(rows.len() * cols);
    for &row in rows {
        selected.extend_from_slice(row_of(data, cols, row));
    }
    selected
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;

    fn sample() -> Array2<f32> {
        Array2::from_shape_fn((5, 7), |(row, col)| (row as f32 - 2.3) * 1.7_f32.powi(col as i32))
    }

    #[test]
    fn rounding_is_to_the_nearest_bfloat16_whatever_the_layout_of_the_input() {
        let x = sample();
        let expected = x.mapv(|value| half::bf16::from_f32(value).to_f32());
        assert_eq!(Activations::round(ActivationFormat::Bf16, x.view()).to_f32(), expected);
        assert_eq!(Activations::round(ActivationFormat::Bf16, x.t()).to_f32(), expected.t());
        assert_eq!(
            Activations::round(ActivationFormat::F32, x.slice(s![..;2, 1..])).to_f32(),
            x.slice(s![..;2, 1..])
        );
    }

    #[test]
    fn a_nan_stays_a_nan() {
        let x = Array2::from_elem((1, 1), f32::from_bits(0x7f80_0001));
        assert!(Activations::round(ActivationFormat::Bf16, x.view()).to_f32()[[0, 0]].is_nan());
    }

    #[test]
    fn parts_one_after_another_are_the_whole() {
        for format in [ActivationFormat::F32, ActivationFormat::Bf16, ActivationFormat::Int8] {
            let whole = Activations::round(format, sample().view());
            let parts = [
                whole.select_rows(&[0, 1]),
                whole.select_rows(&[]),
                whole.select_rows(&[2, 3, 4]),
            ];
            assert_eq!(Activations::concatenate(&parts.each_ref()), whole);
        }
    }

    #[test]
    fn rows_survive_the_wire_at_any_alignment() {
        for format in [ActivationFormat::F32, ActivationFormat::Bf16, ActivationFormat::Int8] {
            let x = Activations::round(format, sample().view());
            for offset in 0..4 {
                let mut bytes = vec![0xee; offset];
                x.append_rows_le(&[4, 0, 4], &mut bytes);
                let read = Activations::from_le_bytes(format, 3, 7, &bytes[offset..]);
                assert_eq!(read, Ok(x.select_rows(&[4, 0, 4])));
            }
        }
    }

    #[test]
    fn a_wrong_length_is_refused_with_both_numbers() {
        let error =
            Activations::from_le_bytes(ActivationFormat::Bf16, 2, 3, &[0; 13]).expect_err("13 bytes are not 12");
        assert_eq!(
            error.to_string(),
            "activations of 2 x 3 in bf16 take 12 bytes, found 13"
        );
        let huge = Activations::from_le_bytes(ActivationFormat::F32, usize::MAX, 2, &[]).expect_err("too large");
        assert!(matches!(huge, ActivationsError::Length { wanted: usize::MAX, .. }));
        let mut bytes = vec![1; 2 * (33 + 8)];
        bytes[41 + 32] = 0x80;
        assert_eq!(
            Activations::from_le_bytes(ActivationFormat::Int8, 2, 33, &bytes),
            Err(ActivationsError::Code { row: 1, col: 32 })
        );
        assert!(Activations::from_le_bytes(ActivationFormat::F32, 0, 9, &[]).is_ok());
    }
}
