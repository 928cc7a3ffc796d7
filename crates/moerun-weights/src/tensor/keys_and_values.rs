//! The up projection of latent attention, which llama.cpp stores in two tensors, the keys' part transposed.

use std::{ops::Range, slice};

use super::{MatrixSource, Stored};

/// Rows of a head: `key_width` of keys, then those of values.
#[derive(Debug, Clone)]
pub(super) struct KeysAndValues<'a> {
    /// `[heads * latent, nope]`: the columns of a head are rows of the whole.
    pub(super) keys: MatrixSource<'a>,
    /// `[heads * v, latent]`.
    values: MatrixSource<'a>,
    latent: usize,
    key_width: usize,
    value_width: usize,
}

impl<'a> MatrixSource<'a> {
    /// `[heads * (nope + v), latent]` from keys `[heads * latent, nope]` and values `[heads * v, latent]`.
    pub(crate) fn keys_and_values(keys: MatrixSource<'a>, values: MatrixSource<'a>, heads: usize) -> Self {
        let latent = values.cols();
        assert!(
            keys.rows() == heads * latent && values.rows().is_multiple_of(heads),
            "a part of keys and one of values per head"
        );
        let both = KeysAndValues {
            latent,
            key_width: keys.cols(),
            value_width: values.rows() / heads,
            keys,
            values,
        };
        let rows = heads * (both.key_width + both.value_width);
        Self::whole([rows, latent], Stored::KeysAndValues(Box::new(both)))
    }
}

/// Where a row comes from.
enum Place {
    /// This column of the keys, from this row on.
    Key { first_row: usize, col: usize },
    /// This row of the values.
    Value { row: usize },
}

impl KeysAndValues<'_> {
    fn place(&self, row: usize) -> Place {
        let width = self.key_width + self.value_width;
        let (head, within) = (row / width, row % width);
        match within.checked_sub(self.key_width) {
            None => Place::Key {
                first_row: head * self.latent,
                col: within,
            },
            Some(value) => Place::Value {
                row: head * self.value_width + value,
            },
        }
    }

    pub(super) fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        match self.place(row) {
            Place::Key { first_row, col } => {
                for (key_row, out) in (first_row + first..).zip(out) {
                    self.keys.read_row_part(key_row, col, slice::from_mut(out));
                }
            }
            Place::Value { row } => self.values.read_row_part(row, first, out),
        }
    }

    pub(super) fn stored_bytes(&self, rows: Range<usize>, cols: Range<usize>, sink: &mut dyn FnMut(&[u8])) {
        for row in rows {
            match self.place(row) {
                Place::Key { first_row, col } => {
                    let key_rows = first_row + cols.start..first_row + cols.end;
                    self.keys.stored_bytes(key_rows, col..col + 1, sink);
                }
                Place::Value { row } => self.values.stored_bytes(row..row + 1, cols.clone(), sink),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn rows_of_keys_are_columns_and_rows_of_values_are_rows() {
        // Two heads, latent 3, keys of 2 and values of 1: the whole has the value 10 · row + column.
        let whole = |row: usize, col: usize| (10 * row + col) as f32;
        let mut keys = Vec::new();
        let mut values = Vec::new();
        for head in [0, 3] {
            keys.extend((0..3).flat_map(|col| [whole(head, col), whole(head + 1, col)]));
            values.extend((0..3).map(|col| whole(head + 2, col)));
        }
        let (keys, values) = (bytes_of(&keys), bytes_of(&values));
        let matrix = MatrixSource::keys_and_values(
            MatrixSource::row_major(Dtype::F32, &keys, [6, 2]),
            MatrixSource::row_major(Dtype::F32, &values, [2, 3]),
            2,
        );
        assert_eq!((matrix.rows(), matrix.cols()), (6, 3));
        for row in 0..6 {
            let (mut found, mut part) = ([0.0; 3], [0.0; 2]);
            matrix.read_row(row, &mut found);
            matrix.read_row_part(row, 1, &mut part);
            assert_eq!(found, [0, 1, 2].map(|col| whole(row, col)));
            assert_eq!(part, found[1..]);
            let mut fed = Vec::new();
            matrix.stored_bytes(row..row + 1, 1..3, &mut |bytes| fed.extend_from_slice(bytes));
            assert_eq!(fed, bytes_of(&part));
        }
    }

    fn bytes_of(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }
}
