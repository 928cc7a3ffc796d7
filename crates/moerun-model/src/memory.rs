//! Matrices whose memory is used again.

use ndarray::Array2;

/// Makes `matrix` a row-major `[rows, cols]` of unspecified numbers, in the memory that it has if that is enough.
pub(crate) fn reshape(matrix: &mut Array2<f32>, rows: usize, cols: usize) {
    if matrix.dim() == (rows, cols) && matrix.is_standard_layout() {
        return;
    }
    let (mut data, _) = std::mem::take(matrix).into_raw_vec_and_offset();
    data.resize(rows * cols, 0.0);
    *matrix = Array2::from_shape_vec((rows, cols), data).expect("rows * cols elements");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_that_was_larger_once_keeps_its_memory() {
        let mut matrix = Array2::zeros((5, 7));
        let place = matrix.as_ptr();
        for (rows, cols) in [(2, 7), (1, 1), (0, 9), (5, 7), (7, 5)] {
            reshape(&mut matrix, rows, cols);
            assert_eq!((matrix.dim(), matrix.as_ptr()), ((rows, cols), place));
        }
        reshape(&mut matrix, 8, 8);
        assert_eq!(matrix.dim(), (8, 8));
    }
}
