//! Whole experts, slices, and mixes of them: into which pieces the experts are cut.

use std::{fmt, str::FromStr};

use moerun_types::BlockRange;

/// Into how many slices the experts of every layer are cut. A slice is a whole number of combine blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Every expert in one piece.
    Whole,
    /// Every expert in this many slices.
    Slices(u16),
    /// The busiest experts of each layer in slices, the others whole.
    Mix {
        /// How many experts of a layer are cut.
        busiest: u16,
        /// Slices of each of them.
        slices: u16,
    },
}

impl Layout {
    /// Slices of each expert of a layer, whose load shares are given; equally busy experts go by their number.
    pub(crate) fn slices(self, shares: &[f64]) -> Vec<u16> {
        match self {
            Layout::Whole => vec![1; shares.len()],
            Layout::Slices(slices) => vec![slices; shares.len()],
            Layout::Mix { busiest, slices } => {
                let mut order: Vec<usize> = (0..shares.len()).collect();
                order.sort_by(|&a, &b| shares[b].total_cmp(&shares[a]).then(a.cmp(&b)));
                let mut counts = vec![1; shares.len()];
                for &expert in order.iter().take(usize::from(busiest)) {
                    counts[expert] = slices;
                }
                counts
            }
        }
    }

    /// Most slices of an expert.
    pub(crate) fn most_slices(self) -> u16 {
        match self {
            Layout::Whole => 1,
            Layout::Slices(slices) | Layout::Mix { slices, .. } => slices,
        }
    }

    /// Experts of a layer that are cut at all must be in the layer.
    pub(crate) fn busiest(self) -> u16 {
        match self {
            Layout::Mix { busiest, .. } => busiest,
            Layout::Whole | Layout::Slices(_) => 0,
        }
    }
}

/// The blocks of slice `index` of `count`: the same borders as `--shard slice:INDEX/COUNT` has.
pub(crate) fn slice_blocks(index: u16, count: u16, num_blocks: u16) -> BlockRange {
    let border = |index: u16| (u32::from(index) * u32::from(num_blocks) / u32::from(count)) as u16;
    BlockRange {
        first: border(index),
        end: border(index + 1),
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Layout::Whole => f.write_str("whole"),
            Layout::Slices(slices) => write!(f, "slices:{slices}"),
            Layout::Mix { busiest, slices } => write!(f, "mix:{busiest}:{slices}"),
        }
    }
}

impl FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("wanted whole, slices:N or mix:BUSIEST:N with N from 2, found {text:?}");
        let number = |text: &str| match text.parse::<u16>() {
            Ok(number) if number > 0 && !text.starts_with('+') => Ok(number),
            _ => Err(refused()),
        };
        let slices = |text: &str| number(text).and_then(|slices| if slices > 1 { Ok(slices) } else { Err(refused()) });
        match text.split(':').collect::<Vec<_>>().as_slice() {
            ["whole"] => Ok(Layout::Whole),
            ["slices", count] => Ok(Layout::Slices(slices(count)?)),
            ["mix", busiest, count] => Ok(Layout::Mix {
                busiest: number(busiest)?,
                slices: slices(count)?,
            }),
            _ => Err(refused()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read_as_they_are_written() {
        for layout in [Layout::Whole, Layout::Slices(4), Layout::Mix { busiest: 3, slices: 2 }] {
            assert_eq!(layout.to_string().parse(), Ok(layout));
        }
        for text in [
            "",
            "slices",
            "slices:0",
            "slices:1",
            "slices:+2",
            "mix:0:2",
            "mix:2",
            "whole:1",
            "slices:70000",
        ] {
            let error = text.parse::<Layout>().unwrap_err();
            assert!(error.contains("wanted whole") && error.contains(text), "{error}");
        }
    }

    #[test]
    fn slices_cover_every_block_once_and_the_busiest_are_cut() {
        for num_blocks in 1..20 {
            for count in 1..=num_blocks {
                let blocks: Vec<u16> = (0..count)
                    .flat_map(|index| {
                        let range = slice_blocks(index, count, num_blocks);
                        assert!(!range.is_empty());
                        range.first..range.end
                    })
                    .collect();
                assert_eq!(blocks, (0..num_blocks).collect::<Vec<_>>());
            }
        }
        let mix = Layout::Mix { busiest: 2, slices: 3 };
        assert_eq!(mix.slices(&[0.1, 0.4, 0.1, 0.4, 0.0]), [1, 3, 1, 3, 1]);
    }
}
