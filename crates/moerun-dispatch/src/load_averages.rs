//! How often each expert is chosen: counts that fade, so that what was long ago weighs less.

use std::time::Duration;

use moerun_routing::{Routing, planner::ExpertLoads};
use moerun_types::{LayerId, ModelConfig};
use tokio::time::Instant;

/// After so long without requests a load counts half.
pub(crate) const HALF_LIFE: Duration = Duration::from_secs(60);
/// Loads fade by steps of this length: to fade them at each dispatch would cost more than to count.
const STEP: Duration = Duration::from_secs(1);

/// Moving averages of the loads of all experts, and of how many dispatches there are.
#[derive(Debug)]
pub(crate) struct LoadAverages {
    loads: ExpertLoads,
    /// Dispatches, faded likewise.
    dispatches: f64,
    faded: Instant,
}

impl LoadAverages {
    /// No expert has been chosen yet.
    pub(crate) fn new(config: &ModelConfig, now: Instant) -> Self {
        let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
        Self {
            loads: ExpertLoads::new(&config.moe_layers(), num_experts),
            dispatches: 0.0,
            faded: now,
        }
    }

    /// Counts one dispatch.
    pub(crate) fn record(&mut self, now: Instant, layer: LayerId, routing: &Routing) {
        self.fade(now);
        self.loads.record(layer, routing);
        self.dispatches += 1.0;
    }

    /// The loads as of now.
    pub(crate) fn at(&mut self, now: Instant) -> ExpertLoads {
        self.fade(now);
        self.loads.clone()
    }

    /// Dispatches a second, as an average.
    pub(crate) fn dispatches_per_second(&mut self, now: Instant) -> f64 {
        self.fade(now);
        // A steady rate adds up to rate × half-life / ln 2.
        self.dispatches * std::f64::consts::LN_2 / HALF_LIFE.as_secs_f64()
    }

    fn fade(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.faded);
        if passed < STEP {
            return;
        }
        let factor = 0.5f64.powf(passed.as_secs_f64() / HALF_LIFE.as_secs_f64());
        self.loads.fade(factor);
        self.dispatches *= factor;
        self.faded = now;
    }
}

#[cfg(test)]
mod tests {
    use moerun_types::ExpertId;

    use super::*;

    fn config() -> ModelConfig {
        let text = include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/qwen3_moe/config.json"
        ));
        ModelConfig::from_json(text).unwrap()
    }

    fn chose(expert: u16) -> Routing {
        Routing {
            top_k: 1,
            expert_ids: vec![ExpertId(expert)],
            routing_weights: vec![1.0],
        }
    }

    #[test]
    fn what_was_chosen_a_half_life_ago_counts_half() {
        let begun = Instant::now();
        let mut averages = LoadAverages::new(&config(), begun);
        for _ in 0..8 {
            averages.record(begun, LayerId(0), &chose(1));
        }
        averages.record(begun + HALF_LIFE, LayerId(0), &chose(3));
        let loads = averages.at(begun + HALF_LIFE);
        let of = loads.of(LayerId(0)).unwrap();
        assert!((of[1] - 4.0).abs() < 1e-9 && (of[3] - 1.0).abs() < 1e-9, "{of:?}");
    }

    #[test]
    fn a_steady_rate_is_found_after_some_half_lives() {
        let begun = Instant::now();
        let mut averages = LoadAverages::new(&config(), begun);
        let mut now = begun;
        for _ in 0..6000 {
            now += Duration::from_millis(100);
            averages.record(now, LayerId(0), &chose(0));
        }
        let rate = averages.dispatches_per_second(now);
        assert!((9.0..11.0).contains(&rate), "{rate}");
    }
}
