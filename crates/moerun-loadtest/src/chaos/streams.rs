//! So many answers at any time: each client asks again when it has been answered.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::timeout};

use crate::{
    Attempt, Case, GrpcTarget, History, Latencies, Micros, Reference, RequestRecord, RunClock, RunInfo, Target,
};

/// How long an answer may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Clients at work.
#[derive(Debug)]
pub(super) struct Streams {
    end: Arc<AtomicBool>,
    tasks: JoinSet<Vec<RequestRecord>>,
    references: Vec<Reference>,
}

impl Streams {
    /// `count` clients that ask the cases by turns.
    pub(super) fn start(
        target: &Arc<GrpcTarget>,
        (cases, references): (&[Case], &[Reference]),
        count: usize,
        clock: RunClock,
    ) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (next, cases): (Arc<AtomicU64>, Arc<[Case]>) = (Arc::default(), cases.into());
        let mut tasks = JoinSet::new();
        for _ in 0..count {
            let (end, target, next, cases) = (end.clone(), target.clone(), next.clone(), cases.clone());
            tasks.spawn(async move {
                let mut records = Vec::new();
                while !end.load(Relaxed) {
                    let id = next.fetch_add(1, Relaxed);
                    let case = id as usize % cases.len();
                    let mut attempt = Attempt::new(clock, id, case, clock.now());
                    let asking = target.ask(&cases[case], DEADLINE, &mut attempt);
                    // An end that never came is for whoever reads the records to find.
                    let _ = timeout(DEADLINE + Duration::from_secs(1), asking).await;
                    records.push(attempt.close());
                }
                records
            });
        }
        Self {
            end,
            tasks,
            references: references.to_vec(),
        }
    }

    /// Waits for the answers under way; none is asked for any more.
    pub(super) async fn history(mut self) -> History {
        self.end.store(true, Relaxed);
        let mut history = History {
            references: self.references,
            run: RunInfo {
                deadline: crate::clock::micros(DEADLINE),
                ..RunInfo::default()
            },
            ..History::default()
        };
        while let Some(records) = self.tasks.join_next().await {
            history.requests.extend(records.unwrap_or_default()); // nothing in it panics
        }
        history.requests.sort_by_key(|request| request.id);
        history
    }
}

/// Pauses between tokens of one answer that ended in a stretch of time.
pub(super) fn gaps_in(history: &History, (from, to): (Micros, Micros)) -> Latencies {
    let pairs = history.requests.iter().flat_map(|request| request.tokens.windows(2));
    let ended = pairs.filter(|pair| (from..to).contains(&pair[1].1));
    Latencies::of(
        ended
            .map(|pair| pair[1].1.saturating_sub(pair[0].1))
            .filter(|&gap| gap > 0)
            .collect(),
    )
}
