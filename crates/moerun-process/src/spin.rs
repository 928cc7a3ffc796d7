//! Whether to look for an answer for a while before the thread sleeps: a wake-up across cores costs about 13 µs.

use std::{
    fmt,
    future::poll_fn,
    pin::pin,
    str::FromStr,
    task::Poll,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::task::yield_now;

/// How long to look before sleeping.
const SPIN: Duration = Duration::from_micros(50);

/// Whether threads that wait for the network look for what comes before they sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Spin {
    /// If the host has a core for every thread that computes on it, as far as this process knows.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Spin {
    /// How long to look, where `computing_threads` of this and other processes share `cores`; zero = not at all.
    pub fn patience(self, computing_threads: usize, cores: usize) -> Duration {
        match self {
            Spin::On => SPIN,
            Spin::Auto if computing_threads <= cores => SPIN,
            Spin::Auto | Spin::Off => Duration::ZERO,
        }
    }
}

impl fmt::Display for Spin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Spin::Auto => "auto",
            Spin::On => "on",
            Spin::Off => "off",
        })
    }
}

impl FromStr for Spin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Spin::Auto),
            "on" => Ok(Spin::On),
            "off" => Ok(Spin::Off),
            other => Err(format!("wanted auto, on or off, found {other:?}")),
        }
    }
}

/// Waits for `future`: for `patience` by asking again and again, each time letting the runtime look at its sockets, then
/// asleep.
pub async fn spin_then_wait<F: Future>(patience: Duration, future: F) -> F::Output {
    let mut future = pin!(future);
    if !patience.is_zero() {
        let begun = Instant::now();
        while begun.elapsed() < patience {
            let polled = poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await;
            if let Poll::Ready(output) = polled {
                return output;
            }
            yield_now().await;
        }
    }
    future.await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_spins_where_cores_are_free_unless_told_otherwise() {
        for (spin, threads, wanted) in [
            (Spin::Auto, 2, true),
            (Spin::Auto, 3, false),
            (Spin::On, 3, true),
            (Spin::Off, 1, false),
        ] {
            assert_eq!(!spin.patience(threads, 2).is_zero(), wanted, "{spin} {threads}");
            assert_eq!(spin.to_string().parse(), Ok(spin));
        }
        assert!("maybe".parse::<Spin>().unwrap_err().contains("\"maybe\""));
    }

    #[tokio::test]
    async fn what_comes_while_spinning_or_asleep_is_returned() {
        for patience in [Duration::ZERO, SPIN, Duration::from_millis(20)] {
            for delay in [Duration::ZERO, Duration::from_millis(2)] {
                let coming = tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    7
                });
                assert_eq!(spin_then_wait(patience, coming).await.unwrap(), 7);
            }
        }
    }
}
