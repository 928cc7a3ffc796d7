//! When requests are sent: fixed before the first one, whatever the server does.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

/// How the pauses between requests are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrivals {
    /// All alike.
    Constant,
    /// Exponential, as of many clients that know nothing of each other.
    Poisson,
}

/// Send times from the start, ascending, all within `duration`, `per_second` on average; the same for the same seed.
/// None where `per_second` is not a positive number.
pub fn send_times(arrivals: Arrivals, per_second: f64, duration: Duration, seed: u64) -> Vec<Duration> {
    if !(per_second.is_finite() && per_second > 0.0) {
        return Vec::new();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut times = Vec::new();
    let mut at = 0.0;
    loop {
        let pause = match arrivals {
            Arrivals::Constant => 1.0,
            // 1 - u lies in (0, 1], whose logarithm is finite.
            Arrivals::Poisson => -(1.0 - rng.random::<f64>()).ln(),
        };
        at += pause / per_second;
        if at >= duration.as_secs_f64() {
            return times;
        }
        times.push(Duration::from_secs_f64(at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn constant_arrivals_keep_their_pause() {
        let times = send_times(Arrivals::Constant, 10.0, MINUTE, 1);
        assert_eq!(times.len(), 599);
        assert!(
            times
                .windows(2)
                .all(|pair| (pair[1] - pair[0]).abs_diff(Duration::from_millis(100)) < Duration::from_micros(1))
        );
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_spread_of_their_law() {
        for seed in 0..20 {
            let times = send_times(Arrivals::Poisson, 50.0, MINUTE, seed);
            // 3000 expected, standard deviation 55.
            assert!((2700..3300).contains(&times.len()), "seed {seed}: {}", times.len());
            let pauses: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
            let mean = pauses.iter().sum::<f64>() / pauses.len() as f64;
            let variance = pauses.iter().map(|pause| (pause - mean).powi(2)).sum::<f64>() / pauses.len() as f64;
            // An exponential law's deviation is its mean.
            let ratio = variance.sqrt() / mean;
            assert!((0.85..1.15).contains(&ratio), "seed {seed}: {ratio}");
            assert_eq!(times, send_times(Arrivals::Poisson, 50.0, MINUTE, seed));
        }
    }

    #[test]
    fn no_rate_sends_nothing() {
        for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(send_times(Arrivals::Poisson, rate, MINUTE, 1).is_empty());
        }
    }
}
