//! Figures of a run: rates, latencies, gaps between tokens. All are reckoned from the history.
//!
//! TTFT and end-to-end times count from the *intended* send time. A gap is the time between two tokens of one request
//! that did not come in one message; its first token has none.

use std::collections::HashMap;

use serde::Serialize;

use crate::{History, Micros, Outcome, RequestRecord};

/// Requests that were to be sent in a stretch of time, and what came of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Window {
    /// How long it is, in seconds.
    pub seconds: f64,
    /// Requests.
    pub requests: usize,
    /// Those that finished.
    pub finished: usize,
    /// Tokens asked for.
    pub tokens_asked: usize,
    /// Tokens of answers that finished.
    pub tokens_delivered: usize,
    /// Tokens that came in the stretch, of whatever request, per second.
    pub tokens_per_second: f64,
}

impl Window {
    /// Requests intended from `from` to before `to`.
    pub fn of(history: &History, stretch: (Micros, Micros)) -> Self {
        Self::of_those(history, stretch, |_| true)
    }

    /// Of them those that `counts` says.
    pub(crate) fn of_those(
        history: &History,
        (from, to): (Micros, Micros),
        counts: impl Fn(&RequestRecord) -> bool,
    ) -> Self {
        let seconds = to.saturating_sub(from) as f64 / 1e6;
        let asked: HashMap<usize, usize> = history.references.iter().map(|it| (it.case, it.tokens.len())).collect();
        let mut window = Window {
            seconds,
            ..Window::default()
        };
        let mut arrived = 0;
        for request in &history.requests {
            arrived += request
                .tokens
                .iter()
                .filter(|&&(_, at)| (from..to).contains(&at))
                .count();
            if !(from..to).contains(&request.intended) || !counts(request) {
                continue;
            }
            window.requests += 1;
            window.tokens_asked += asked.get(&request.case).copied().unwrap_or(0);
            if finished(request) {
                window.finished += 1;
                window.tokens_delivered += request.tokens.len();
            }
        }
        if seconds > 0.0 {
            window.tokens_per_second = arrived as f64 / seconds;
        }
        window
    }

    /// Share of the tokens asked for that were delivered; 0 where none were asked for.
    pub fn delivered_share(&self) -> f64 {
        if self.tokens_asked == 0 {
            return 0.0;
        }
        self.tokens_delivered as f64 / self.tokens_asked as f64
    }
}

/// Quantiles in milliseconds; zero where there is nothing to tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latencies {
    /// Half are at most this.
    pub p50_ms: f64,
    /// 90 in 100.
    pub p90_ms: f64,
    /// 99 in 100.
    pub p99_ms: f64,
    /// The longest.
    pub max_ms: f64,
}

impl Latencies {
    /// Of these times, in any order.
    pub fn of(mut times: Vec<Micros>) -> Self {
        times.sort_unstable();
        let Some(&longest) = times.last() else {
            return Self::default();
        };
        // The least time that the share of all times does not exceed.
        let at = |share: f64| {
            let rank = (share * times.len() as f64).ceil() as usize;
            times[rank.clamp(1, times.len()) - 1] as f64 / 1e3
        };
        Self {
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            max_ms: longest as f64 / 1e3,
        }
    }
}

/// Pauses between tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Gaps {
    /// All pauses.
    pub all: Latencies,
    /// Longest, and the request that had it.
    pub longest_ms: f64,
    /// Request of the longest.
    pub longest_in_request: u64,
}

/// Figures of a whole run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RunFigures {
    /// Requests of the schedule.
    pub requests: usize,
    /// Those that finished.
    pub finished: usize,
    /// Those that ended otherwise, by how they ended.
    pub ended_otherwise: std::collections::BTreeMap<String, usize>,
    /// Finished or not: those with a token that the undisturbed run does not have there, and no mark that says so.
    pub differing: usize,
    /// Those that are marked: an expert was left out.
    pub degraded: usize,
    /// Actual after intended send time.
    pub send_lag: Latencies,
    /// First token after the intended send time.
    pub ttft: Latencies,
    /// Last token after the intended send time, of what finished.
    pub end_to_end: Latencies,
    /// Pauses between tokens.
    pub gaps: Gaps,
}

impl RunFigures {
    /// Of this history.
    pub fn of(history: &History) -> Self {
        let references: HashMap<usize, &[u32]> = history
            .references
            .iter()
            .map(|it| (it.case, it.tokens.as_slice()))
            .collect();
        let mut figures = RunFigures::default();
        let (mut lags, mut firsts, mut ends, mut gaps) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for request in &history.requests {
            figures.requests += 1;
            if finished(request) {
                figures.finished += 1;
                ends.extend(
                    request
                        .tokens
                        .last()
                        .map(|&(_, at)| at.saturating_sub(request.intended)),
                );
            } else {
                *figures.ended_otherwise.entry(how_it_ended(request)).or_default() += 1;
            }
            let reference = references.get(&request.case).copied().unwrap_or_default();
            let differs = |(at, &(id, _)): (usize, &(u32, Micros))| reference.get(at) != Some(&id);
            let exact = request.degraded_from.unwrap_or(usize::MAX);
            figures.differing += usize::from(request.tokens.iter().enumerate().take(exact).any(differs));
            figures.degraded += usize::from(request.degraded_from.is_some());
            lags.push(request.sent.saturating_sub(request.intended));
            firsts.extend(
                request
                    .tokens
                    .first()
                    .map(|&(_, at)| at.saturating_sub(request.intended)),
            );
            for pair in request.tokens.windows(2) {
                let gap = pair[1].1.saturating_sub(pair[0].1);
                if gap == 0 {
                    continue; // of one message
                }
                gaps.push(gap);
                if gap as f64 / 1e3 > figures.gaps.longest_ms {
                    figures.gaps.longest_ms = gap as f64 / 1e3;
                    figures.gaps.longest_in_request = request.id;
                }
            }
        }
        figures.send_lag = Latencies::of(lags);
        figures.ttft = Latencies::of(firsts);
        figures.end_to_end = Latencies::of(ends);
        figures.gaps.all = Latencies::of(gaps);
        figures
    }
}

fn finished(request: &RequestRecord) -> bool {
    matches!(request.terminals.as_slice(), [terminal] if matches!(terminal.outcome, Outcome::Finished(_)))
}

fn how_it_ended(request: &RequestRecord) -> String {
    match request.terminals.as_slice() {
        [] => "no end".to_owned(),
        [terminal] => match &terminal.outcome {
            Outcome::Finished(_) => "finished".to_owned(),
            Outcome::Error { code, reason, .. } => format!("{code} {reason}"),
            Outcome::Disconnected(_) => "disconnected".to_owned(),
            Outcome::NotSent => "not sent".to_owned(),
        },
        _ => "several ends".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_times() {
        let times: Vec<Micros> = (1..=1000).rev().map(|at| at * 1000).collect();
        let found = Latencies::of(times);
        assert_eq!(
            (found.p50_ms, found.p90_ms, found.p99_ms, found.max_ms),
            (500.0, 900.0, 990.0, 1000.0)
        );
        assert_eq!(Latencies::of(vec![7000]).p50_ms, 7.0);
        assert_eq!(Latencies::of(Vec::new()), Latencies::default());
    }

    #[test]
    fn the_longest_gap_is_told_with_its_request() {
        let history = crate::check::tests::healthy();
        let figures = RunFigures::of(&history);
        assert_eq!(
            (figures.requests, figures.finished, figures.differing),
            (history.requests.len(), figures.requests, 0)
        );
        let mut slow = history;
        for token in &mut slow.requests[5].tokens[2..] {
            token.1 += 70_000;
        }
        let gaps = RunFigures::of(&slow).gaps;
        assert_eq!((gaps.longest_in_request, gaps.longest_ms), (5, 80.0));
    }
}
