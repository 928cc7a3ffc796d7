//! Sets of expert slices, as sorted disjoint runs.

use moerun_types::{BlockRange, ExpertSlice};

/// The same blocks as sorted, disjoint, non-empty runs: runs that overlap or touch become one.
pub fn merge_slices(mut slices: Vec<ExpertSlice>) -> Vec<ExpertSlice> {
    slices.retain(|slice| !slice.blocks.is_empty());
    slices.sort_unstable();
    slices.dedup_by(|next, kept| {
        let joins = (next.layer, next.expert) == (kept.layer, kept.expert) && next.blocks.first <= kept.blocks.end;
        if joins {
            kept.blocks.end = kept.blocks.end.max(next.blocks.end);
        }
        joins
    });
    slices
}

/// The blocks of `from` that are not in `taken`, as sorted, disjoint, non-empty runs.
pub fn subtract_slices(from: &[ExpertSlice], taken: &[ExpertSlice]) -> Vec<ExpertSlice> {
    let taken = merge_slices(taken.to_vec());
    let mut left = Vec::new();
    for slice in merge_slices(from.to_vec()) {
        let key = (slice.layer, slice.expert);
        let start = taken.partition_point(|other| (other.layer, other.expert) < key);
        let of_expert = taken[start..]
            .iter()
            .take_while(|other| (other.layer, other.expert) == key);
        let mut first = slice.blocks.first;
        for other in of_expert {
            let end = other.blocks.first.min(slice.blocks.end);
            push(&mut left, slice, first, end);
            first = first.max(other.blocks.end);
        }
        push(&mut left, slice, first, slice.blocks.end);
    }
    left
}

fn push(slices: &mut Vec<ExpertSlice>, of: ExpertSlice, first: u16, end: u16) {
    if first < end {
        let blocks = BlockRange { first, end };
        slices.push(ExpertSlice { blocks, ..of });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use moerun_types::{ExpertId, LayerId};
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn slices()(picked in prop::collection::vec((0..2u32, 0..3u16, 0..8u16, 0..8u16), 0..8)) -> Vec<ExpertSlice> {
            let slice = |(layer, expert, first, len)| ExpertSlice {
                layer: LayerId(layer),
                expert: ExpertId(expert),
                blocks: BlockRange { first, end: first + len },
            };
            picked.into_iter().map(slice).collect()
        }
    }

    fn blocks(slices: &[ExpertSlice]) -> BTreeSet<(u32, u16, u16)> {
        let of = |slice: &ExpertSlice| {
            let (layer, expert) = (slice.layer.0, slice.expert.0);
            (slice.blocks.first..slice.blocks.end).map(move |block| (layer, expert, block))
        };
        slices.iter().flat_map(of).collect()
    }

    proptest! {
        #[test]
        fn what_is_left_is_what_was_not_taken(from in slices(), taken in slices()) {
            let left = subtract_slices(&from, &taken);
            let wanted = &blocks(&from) - &blocks(&taken);
            prop_assert_eq!(blocks(&left), wanted);
            prop_assert_eq!(merge_slices(left.clone()), left);
        }
    }
}
