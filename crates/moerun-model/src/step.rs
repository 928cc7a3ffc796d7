//! The rows of one forward pass and where each stands in its sequence.

use std::ops::Range;

/// The rows of one forward pass: one or more tokens of one or more sequences, in this order.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Sequences; their `rows` tile `0..tokens` in order.
    pub sequences: &'a [StepSequence<'a>],
}

/// One sequence's share of a forward pass.
#[derive(Debug, Clone)]
pub struct StepSequence<'a> {
    /// Its rows of the batch.
    pub rows: Range<usize>,
    /// Absolute position of its first row; the following rows are at the following positions.
    pub first_position: usize,
    /// Lowest position that is visible at all (0, unless the sequence was padded on the left).
    pub start_position: usize,
    /// Its pages of the cache: position `p` is in `pages[p / KV_PAGE_TOKENS]`, up to its last row.
    pub pages: &'a [u32],
    /// Length that decides which longrope factors apply: that of the whole sequence known when its cache was begun
    /// (see ARCHITECTURE.md), not of this chunk.
    pub rope_length: usize,
}

/// One row of a step: its sequence and its absolute position there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepRow<'a> {
    pub(crate) sequence: &'a StepSequence<'a>,
    pub(crate) position: usize,
}

impl<'a> Step<'a> {
    /// Number of rows of all sequences.
    pub fn tokens(&self) -> usize {
        self.sequences.last().map_or(0, |sequence| sequence.rows.end)
    }

    /// The sequences of `rows`, their rows counted from the first of those: a sequence may be cut. Parts that follow one
    /// another, run in this order layer by layer, compute what the whole would.
    pub fn part(&self, rows: Range<usize>) -> impl Iterator<Item = StepSequence<'a>> {
        self.sequences.iter().filter_map(move |sequence| {
            let Range { start, end } = sequence.rows;
            let (first, end) = (start.clamp(rows.start, rows.end), end.clamp(rows.start, rows.end));
            (first < end).then(|| StepSequence {
                rows: first - rows.start..end - rows.start,
                first_position: sequence.first_position + first - start,
                ..sequence.clone()
            })
        })
    }

    /// Every row in order.
    pub(crate) fn rows(&self) -> impl Iterator<Item = StepRow<'a>> {
        let place = |sequence: &'a StepSequence<'a>| {
            (0..sequence.rows.len()).map(move |offset| StepRow {
                sequence,
                position: sequence.first_position + offset,
            })
        };
        self.sequences.iter().flat_map(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_all_sequences_come_in_order_with_their_positions() {
        let sequences = [
            StepSequence {
                rows: 0..2,
                first_position: 5,
                start_position: 0,
                pages: &[],
                rope_length: 7,
            },
            StepSequence {
                rows: 2..3,
                first_position: 0,
                start_position: 0,
                pages: &[],
                rope_length: 1,
            },
        ];
        let step = Step { sequences: &sequences };
        let positions: Vec<usize> = step.rows().map(|row| row.position).collect();
        assert_eq!(step.tokens(), 3);
        assert_eq!(positions, [5, 6, 0]);
    }

    #[test]
    fn parts_have_the_rows_of_the_whole() {
        let sequence = |rows: Range<usize>, first_position| StepSequence {
            rows,
            first_position,
            start_position: 0,
            pages: &[],
            rope_length: 9,
        };
        let sequences = [sequence(0..3, 5), sequence(3..4, 0), sequence(4..9, 70)];
        let whole = Step { sequences: &sequences };
        let positions = |sequences: &[StepSequence<'_>]| -> Vec<usize> {
            Step { sequences }.rows().map(|row| row.position).collect()
        };
        for at in 0..=9 {
            let (first, second): (Vec<_>, Vec<_>) = (whole.part(0..at).collect(), whole.part(at..9).collect());
            let together = [positions(&first), positions(&second)].concat();
            assert_eq!(together, positions(&sequences), "cut at {at}");
            for (part, tokens) in [(&first, at), (&second, 9 - at)] {
                assert_eq!(Step { sequences: part }.tokens(), tokens);
                let starts = part.iter().map(|sequence| sequence.rows.start);
                let ends = part.iter().map(|sequence| sequence.rows.end);
                assert!(
                    starts.eq(std::iter::once(0).chain(ends).take(part.len())),
                    "cut at {at}"
                );
            }
        }
    }
}
