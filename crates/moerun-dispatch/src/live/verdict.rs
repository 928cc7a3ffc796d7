//! Whether a plan is worth its moves.

use moerun_routing::planner::Prediction;

/// A plan must make a dispatch faster by this part at least: predictions are not better than that.
const LEAST_GAIN: f64 = 0.05;
/// Loads are taken to stay as they are for so long.
const HORIZON_SECONDS: f64 = 300.0;

/// Whether a plan is worth its moves, and why.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Verdict {
    /// Whether it is.
    pub(super) worthwhile: bool,
    /// Why, in words with the numbers.
    pub(super) reason: String,
}

/// Compares what a plan gains at `dispatches_per_second` with the time that its bytes take.
pub(super) fn judge(
    present: Option<&Prediction>,
    planned: &Prediction,
    dispatches_per_second: f64,
    link_bytes_per_second: f64,
) -> Verdict {
    let Some(present) = present else {
        return Verdict {
            worthwhile: true,
            reason: "some expert has no live holder that can be asked to share it".to_owned(),
        };
    };
    let (before, after) = (present.cost.seconds, planned.cost.seconds);
    let gained = (before - after) * dispatches_per_second * HORIZON_SECONDS;
    let spent = planned.moved_bytes as f64 / link_bytes_per_second;
    let reason = format!(
        "a layer's experts take {:.1} µs instead of {:.1} µs and balance is {:.3} instead of {:.3}: {gained:.3} s gained in \
         {HORIZON_SECONDS} s at {dispatches_per_second:.1} layers a second, {spent:.3} s to move {} bytes",
        after * 1e6,
        before * 1e6,
        planned.balance,
        present.balance,
        planned.moved_bytes
    );
    Verdict {
        worthwhile: before - after >= LEAST_GAIN * before && gained > spent,
        reason,
    }
}

#[cfg(test)]
mod tests {
    use moerun_routing::planner::StepCost;

    use super::*;

    fn predicted(seconds: f64, moved_bytes: u64) -> Prediction {
        Prediction {
            balance: 0.9,
            after_worst_death: None,
            layers: Vec::new(),
            workers: Vec::new(),
            cost: StepCost {
                seconds,
                read_seconds: seconds,
                compute_seconds: 0.0,
                hop_seconds: 0.0,
                distinct_experts: 1.0,
                workers_per_token: 1.0,
            },
            moved_bytes,
        }
    }

    #[test]
    fn a_plan_must_gain_more_than_its_moves_cost() {
        let judged =
            |after, bytes, rate| judge(Some(&predicted(1e-3, 0)), &predicted(after, bytes), rate, 1e9).worthwhile;
        // 0.2 ms × 100 a second × 300 s = 6 s.
        assert!(judged(0.8e-3, 5_900_000_000, 100.0));
        assert!(!judged(0.8e-3, 6_100_000_000, 100.0));
        assert!(!judged(0.8e-3, 1, 0.0), "nobody asks");
    }

    #[test]
    fn a_small_gain_moves_nothing_however_often_it_is_had() {
        let judged = |after| judge(Some(&predicted(1e-3, 0)), &predicted(after, 1), 1e6, 1e9).worthwhile;
        assert!(!judged(0.96e-3));
        assert!(judged(0.94e-3));
        assert!(!judged(1.1e-3));
    }

    #[test]
    fn what_nobody_holds_is_worth_any_move() {
        assert!(judge(None, &predicted(1.0, u64::MAX), 0.0, 1.0).worthwhile);
    }
}
