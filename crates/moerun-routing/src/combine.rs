//! The combine: partial sums of many holders become one result, the same bits whatever their number.

mod error;
mod packing;
#[cfg(test)]
mod tests;

use moerun_types::{COMBINE_FRACTION_BITS, CombineMode, MoeConfig, Numerics};
use ndarray::Array2;

pub use error::CombineError;

/// Partial sums of one holder (or of all of them), `[rows, hidden]`.
#[derive(Debug, Clone, PartialEq)]
pub enum PartialSums {
    /// Fixed point with [`moerun_types::COMBINE_FRACTION_BITS`] fraction bits; addition wraps and associates.
    Exact {
        /// Length of a row.
        hidden: usize,
        /// `[rows, hidden]`.
        sums: Vec<i64>,
    },
    /// f32 sums; closeness only.
    Fast {
        /// Length of a row.
        hidden: usize,
        /// `[rows, hidden]`.
        sums: Vec<f32>,
    },
}

impl PartialSums {
    /// Zeros.
    pub fn zeros(mode: CombineMode, rows: usize, hidden: usize) -> Self {
        match mode {
            CombineMode::Exact => PartialSums::Exact {
                hidden,
                sums: vec![0; rows * hidden],
            },
            CombineMode::Fast => PartialSums::Fast {
                hidden,
                sums: vec![0.0; rows * hidden],
            },
        }
    }

    /// Becomes zeros of these rows, in the memory that it has if that is enough and the mode is the same.
    pub fn reset(&mut self, mode: CombineMode, rows: usize, hidden: usize) {
        match (&mut *self, mode) {
            (PartialSums::Exact { hidden: width, sums }, CombineMode::Exact) => {
                *width = hidden;
                sums.clear();
                sums.resize(rows * hidden, 0);
            }
            (PartialSums::Fast { hidden: width, sums }, CombineMode::Fast) => {
                *width = hidden;
                sums.clear();
                sums.resize(rows * hidden, 0.0);
            }
            _ => *self = PartialSums::zeros(mode, rows, hidden),
        }
    }

    /// How these sums are added.
    pub fn mode(&self) -> CombineMode {
        match self {
            PartialSums::Exact { .. } => CombineMode::Exact,
            PartialSums::Fast { .. } => CombineMode::Fast,
        }
    }

    /// Length of a row.
    pub fn hidden(&self) -> usize {
        match self {
            PartialSums::Exact { hidden, .. } | PartialSums::Fast { hidden, .. } => *hidden,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.len().checked_div(self.hidden()).unwrap_or(0)
    }

    /// Number of elements.
    fn len(&self) -> usize {
        match self {
            PartialSums::Exact { sums, .. } => sums.len(),
            PartialSums::Fast { sums, .. } => sums.len(),
        }
    }

    /// The first sum that is not finite, if any; fixed point always is.
    pub fn first_not_finite(&self) -> Option<f32> {
        match self {
            PartialSums::Exact { .. } => None,
            PartialSums::Fast { sums, .. } => sums.iter().copied().find(|sum| !sum.is_finite()),
        }
    }

    /// The first `rows[0]` rows, the following `rows[1]`, and so on: all of them. Panics if they are another number.
    pub fn split(self, rows: &[usize]) -> Vec<PartialSums> {
        assert_eq!(rows.iter().sum::<usize>(), self.rows(), "rows of all parts");
        fn cut<T: Copy>(sums: &[T], hidden: usize, rows: &[usize]) -> Vec<Vec<T>> {
            let mut rest = sums;
            let mut parts = Vec::with_capacity(rows.len());
            for &rows in rows {
                let (part, others) = rest.split_at(rows * hidden);
                parts.push(part.to_vec());
                rest = others;
            }
            parts
        }
        match self {
            PartialSums::Exact { hidden, sums } => cut(&sums, hidden, rows)
                .into_iter()
                .map(|sums| PartialSums::Exact { hidden, sums })
                .collect(),
            PartialSums::Fast { hidden, sums } => cut(&sums, hidden, rows)
                .into_iter()
                .map(|sums| PartialSums::Fast { hidden, sums })
                .collect(),
        }
    }

    /// Adds row `i` of `other` to row `rows[i]` of `self`. In exact mode the order of such calls cannot change a bit.
    ///
    /// Errors: another mode or row length, another number of rows than `rows` names, a row beyond the last. `self` is
    /// unchanged then.
    pub fn add_rows(&mut self, rows: &[u32], other: &PartialSums) -> Result<(), CombineError> {
        self.check_addend(rows, other)?;
        match (self, other) {
            (PartialSums::Exact { hidden, sums }, PartialSums::Exact { sums: addend, .. }) => {
                add_to_rows(sums, *hidden, rows, addend, i64::wrapping_add);
            }
            (PartialSums::Fast { hidden, sums }, PartialSums::Fast { sums: addend, .. }) => {
                add_to_rows(sums, *hidden, rows, addend, |a, b| a + b);
            }
            (PartialSums::Exact { .. }, PartialSums::Fast { .. })
            | (PartialSums::Fast { .. }, PartialSums::Exact { .. }) => unreachable!("check_addend compared the modes"),
        }
        Ok(())
    }

    fn check_addend(&self, rows: &[u32], other: &PartialSums) -> Result<(), CombineError> {
        let mismatch = |wanted, found| Err(CombineError::Mismatch { wanted, found });
        if (self.mode(), self.hidden()) != (other.mode(), other.hidden()) {
            return mismatch(
                format!("{} sums of length {}", self.mode(), self.hidden()),
                format!("{} sums of length {}", other.mode(), other.hidden()),
            );
        }
        if rows.len().checked_mul(other.hidden()) != Some(other.len()) {
            return mismatch(
                format!("{} rows x {}", rows.len(), other.hidden()),
                format!("{} elements", other.len()),
            );
        }
        match rows.iter().find(|&&row| row as usize >= self.rows()) {
            Some(row) if self.hidden() > 0 => mismatch(format!("rows below {}", self.rows()), format!("row {row}")),
            _ => Ok(()),
        }
    }

    /// The combined values, `[rows, hidden]`: exact sums are converted once, to nearest even, times 2^-40.
    pub fn to_f32(&self) -> Array2<f32> {
        let mut values = Array2::default((0, 0));
        self.write_to(&mut values);
        values
    }

    /// [`PartialSums::to_f32`] into `values`, whatever that was, in its memory if that is enough.
    pub fn write_to(&self, values: &mut Array2<f32>) {
        let (mut data, _) = std::mem::take(values).into_raw_vec_and_offset();
        data.clear();
        let len = self.rows() * self.hidden();
        let scale = 1.0 / (1u64 << COMBINE_FRACTION_BITS) as f32;
        match self {
            PartialSums::Exact { sums, .. } => data.extend(sums[..len].iter().map(|&sum| sum as f32 * scale)),
            PartialSums::Fast { sums, .. } => data.extend_from_slice(&sums[..len]),
        }
        *values = Array2::from_shape_vec((self.rows(), self.hidden()), data).expect("rows * hidden values were taken");
    }
}

fn add_to_rows<T: Copy>(sums: &mut [T], hidden: usize, rows: &[u32], addend: &[T], add: impl Fn(T, T) -> T) {
    if hidden == 0 {
        return;
    }
    for (&row, addend) in rows.iter().zip(addend.chunks_exact(hidden)) {
        let start = row as usize * hidden;
        for (sum, &term) in sums[start..start + hidden].iter_mut().zip(addend) {
            *sum = add(*sum, term);
        }
    }
}

/// Most terms that one element of the result can have: `top_k * (blocks + 1 if there is a down bias)`.
pub fn terms_per_element(moe: &MoeConfig, numerics: &Numerics) -> usize {
    moe.top_k * (numerics.num_blocks(moe.intermediate) + usize::from(moe.down_bias))
}

/// Bound on a term's magnitude: `2^23 / next_power_of_two(terms_per_element)`, so that no sum can overflow and the
/// error does not depend on the grouping.
pub fn term_limit(terms_per_element: usize) -> f32 {
    const SUM_LIMIT: f32 = (1u32 << (63 - COMBINE_FRACTION_BITS)) as f32;
    terms_per_element
        .checked_next_power_of_two()
        .map_or(0.0, |terms| SUM_LIMIT / terms as f32)
}
