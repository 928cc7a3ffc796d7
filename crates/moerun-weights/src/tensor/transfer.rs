//! Matrices on their way to another process: elements as they are stored, and what is needed to read them.

use super::{Dtype, MXFP4_GROUP, MXFP4_GROUP_BYTES, MatrixSource, Stored, Strides};

/// How the elements of a whole matrix follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixForm {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Type of the elements; [`Dtype::U8`] are 4-bit codes with an exponent for every 32 of a row.
    pub dtype: Dtype,
    /// Whether the elements of a column, not those of a row, lie side by side.
    pub by_columns: bool,
    /// Of fp8: rows and columns that share a scale, and the type of the scales.
    pub scales: Option<([usize; 2], Dtype)>,
}

impl MatrixForm {
    /// Bytes of the elements and of what they are scaled by; `None` if there is no such matrix, or none that large.
    pub fn bytes(&self) -> Option<(usize, usize)> {
        let elements = self.rows.checked_mul(self.cols)?;
        match (self.dtype, self.scales) {
            (Dtype::F32 | Dtype::F16 | Dtype::Bf16, None) => Some((elements.checked_mul(self.dtype.block().1)?, 0)),
            (Dtype::F8E4M3, Some(([rows, cols], dtype @ (Dtype::F32 | Dtype::F16 | Dtype::Bf16))))
                if rows > 0 && cols > 0 && !self.by_columns =>
            {
                let scales = self.rows.div_ceil(rows).checked_mul(self.cols.div_ceil(cols))?;
                Some((elements, scales.checked_mul(dtype.block().1)?))
            }
            (Dtype::U8, None) if self.cols.is_multiple_of(MXFP4_GROUP) && !self.by_columns => {
                Some((elements / 2, elements / MXFP4_GROUP))
            }
            (Dtype::Block(block), None) if self.cols.is_multiple_of(block.elements()) && !self.by_columns => {
                Some(((elements / block.elements()).checked_mul(block.bytes())?, 0))
            }
            _ => None,
        }
    }
}

impl<'a> MatrixSource<'a> {
    /// How [`MatrixSource::export`] writes it; `None` for matrices that no expert has.
    pub(crate) fn form(&self) -> Option<MatrixForm> {
        let form = MatrixForm {
            rows: self.rows,
            cols: self.cols,
            dtype: self.dtype(),
            by_columns: false,
            scales: None,
        };
        match &self.stored {
            _ if self.paired_head.is_some() => None,
            Stored::Plain(plain) => Some(MatrixForm {
                by_columns: plain.col_stride > plain.row_stride,
                ..form
            }),
            Stored::Fp8(fp8) => Some(MatrixForm {
                scales: Some(([fp8.block_rows, fp8.block_cols], fp8.scales.dtype)),
                ..form
            }),
            Stored::Mxfp4(_) | Stored::Blocks(_) => Some(form),
            Stored::KeysAndValues(_) => None,
        }
    }

    /// All elements as they are stored, in the order of [`MatrixSource::form`], then their scales or exponents.
    pub(crate) fn export(&self, out: &mut Vec<u8>) {
        match &self.stored {
            Stored::Fp8(fp8) => {
                out.extend_from_slice(fp8.codes);
                let (rows, cols) = (self.rows.div_ceil(fp8.block_rows), self.cols.div_ceil(fp8.block_cols));
                fp8.scales
                    .stored_bytes(0..rows, 0..cols, &mut |bytes| out.extend_from_slice(bytes));
            }
            Stored::Mxfp4(mxfp4) => {
                let groups = self.cols / MXFP4_GROUP;
                let stored_rows = || (0..self.rows).map(|row| (mxfp4.first_row + row * mxfp4.row_step) * groups);
                for first in stored_rows() {
                    out.extend_from_slice(
                        &mxfp4.codes[first * MXFP4_GROUP_BYTES..(first + groups) * MXFP4_GROUP_BYTES],
                    );
                }
                for first in stored_rows() {
                    out.extend_from_slice(&mxfp4.exponents[first..first + groups]);
                }
            }
            Stored::Plain(_) | Stored::Blocks(_) | Stored::KeysAndValues(_) => {
                self.stored_bytes(0..self.rows, 0..self.cols, &mut |bytes| out.extend_from_slice(bytes));
            }
        }
    }

    /// The matrix of that form whose elements and scales are these.
    ///
    /// # Panics
    /// If they are not as long as the form says.
    pub(crate) fn import(form: &MatrixForm, bytes: &'a [u8]) -> Self {
        let (elements, scales) = form.bytes().expect("the form was checked when it came");
        assert_eq!(bytes.len(), elements + scales, "all of the matrix");
        let (elements, scales) = bytes.split_at(elements);
        let shape = [form.rows, form.cols];
        match (form.dtype, form.scales) {
            (Dtype::F8E4M3, Some((block, dtype))) => Self::fp8(elements, (dtype, scales), shape, block),
            (Dtype::U8, _) => Self::mxfp4(elements, scales, shape, 0, 1),
            (Dtype::Block(block), _) => Self::blocks(block, elements, shape),
            (dtype, _) if form.by_columns => {
                let strides = Strides {
                    first: 0,
                    row: 1,
                    col: form.rows,
                };
                Self::plain(dtype, elements, shape, strides)
            }
            (dtype, _) => Self::row_major(dtype, elements, shape),
        }
    }
}
