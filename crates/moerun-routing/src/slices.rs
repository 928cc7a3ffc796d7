//! Sets of expert slices, as sorted disjoint runs.

use moerun_types::ExpertSlice;

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
