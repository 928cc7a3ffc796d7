//! Which keys each row of a step sees.

use moerun_kernels::AttentionRow;
use moerun_types::AttentionMask;

use crate::step::StepRow;

/// First key that the row sees under `mask`; the last is always its own.
fn first_key(mask: AttentionMask, row: &StepRow<'_>) -> usize {
    let position = row.position;
    let first = match mask {
        AttentionMask::Full => 0,
        AttentionMask::SlidingWindow { window } => (position + 1).saturating_sub(window),
        AttentionMask::Chunked { size } => position / size * size,
    };
    // A row of left padding lies before the first visible position; like every row it still sees itself.
    first.max(row.sequence.start_position).min(position)
}

/// The keys that every row of a step sees under `mask`.
pub(crate) fn attention_rows<'a>(
    mask: AttentionMask,
    rows: impl IntoIterator<Item = StepRow<'a>>,
) -> impl Iterator<Item = AttentionRow<'a>> {
    rows.into_iter().map(move |row| AttentionRow {
        pages: row.sequence.pages,
        first_key: first_key(mask, &row),
        end_key: row.position + 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Step, StepSequence};

    fn ranges(mask: AttentionMask, first_position: usize, tokens: usize, start_position: usize) -> Vec<(usize, usize)> {
        let sequences = [StepSequence {
            rows: 0..tokens,
            first_position,
            start_position,
            pages: &[],
            rope_length: 0,
        }];
        attention_rows(mask, Step { sequences: &sequences }.rows())
            .map(|row| (row.first_key, row.end_key))
            .collect()
    }

    #[test]
    fn full_attention_sees_everything_up_to_itself() {
        assert_eq!(ranges(AttentionMask::Full, 3, 2, 0), [(0, 4), (0, 5)]);
    }

    #[test]
    fn a_window_counts_the_token_itself() {
        let mask = AttentionMask::SlidingWindow { window: 2 };
        assert_eq!(ranges(mask, 0, 4, 0), [(0, 1), (0, 2), (1, 3), (2, 4)]);
    }

    #[test]
    fn a_chunk_starts_at_a_multiple_of_its_size() {
        let mask = AttentionMask::Chunked { size: 3 };
        assert_eq!(ranges(mask, 1, 4, 0), [(0, 2), (0, 3), (3, 4), (3, 5)]);
    }

    #[test]
    fn left_padding_is_not_seen_but_a_row_always_sees_itself() {
        assert_eq!(ranges(AttentionMask::Full, 0, 4, 2), [(0, 1), (1, 2), (2, 3), (2, 4)]);
    }
}
