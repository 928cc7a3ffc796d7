//! Median and extremes of a few measurements.

use serde::Serialize;

/// Of several measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Of at least one value; of an even number the median is the mean of the middle two.
    pub(super) fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self {
            median: (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0,
            min: sorted[0],
            max: sorted[sorted.len() - 1],
        }
    }

    /// Each value times `factor`, which is positive.
    pub(super) fn scaled(self, factor: f64) -> Self {
        Self {
            median: self.median * factor,
            min: self.min * factor,
            max: self.max * factor,
        }
    }
}

/// The value below which a share of `sorted` lies, by the nearest rank from above.
pub(super) fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).ceil() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_lies_in_the_middle() {
        for (values, median) in [
            (&[3.0][..], 3.0),
            (&[4.0, 2.0], 3.0),
            (&[9.0, 1.0, 2.0], 2.0),
            (&[1.0, 2.0, 4.0, 9.0], 3.0),
        ] {
            let spread = Spread::of(values);
            assert_eq!(spread.median, median, "{values:?}");
            assert!(spread.min <= median && median <= spread.max);
        }
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.99), 3.0);
        assert_eq!(
            Spread::of(&[1.0, 3.0]).scaled(2.0),
            Spread {
                median: 4.0,
                min: 2.0,
                max: 6.0
            }
        );
    }
}
