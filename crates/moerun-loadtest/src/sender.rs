//! The open-loop sender: each request goes out at its time, whether or not earlier ones have been answered.

use std::{sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use crate::{Case, Entry, Micros, Outcome, RequestRecord, RunClock, Terminal, Workload};

/// How much later than a request's deadline its end may come before the client stops listening.
const LISTENING_GRACE: Duration = Duration::from_secs(1);

/// Something that answers requests.
pub trait Target: Send + Sync + 'static {
    /// Asks `case`, and notes in `attempt` all that comes back until the stream ends.
    fn ask(&self, case: &Case, deadline: Duration, attempt: &mut Attempt) -> impl Future<Output = ()> + Send;
}

/// One request under way: what has come back so far.
#[derive(Debug)]
pub struct Attempt {
    clock: RunClock,
    record: RequestRecord,
}

impl Attempt {
    /// A request that is being sent now, to be noted with the times of `clock`.
    pub fn new(clock: RunClock, id: u64, case: usize, intended: Micros) -> Self {
        let record = RequestRecord {
            id,
            case,
            intended,
            sent: clock.now(),
            ..RequestRecord::default()
        };
        Self { clock, record }
    }

    /// Tokens have come.
    pub fn tokens(&mut self, ids: &[u32]) {
        let at = self.clock.now();
        self.record.tokens.extend(ids.iter().map(|&id| (id, at)));
    }

    /// Something says that the answer has ended.
    pub fn ended(&mut self, outcome: Outcome) {
        let at = self.clock.now();
        self.record.terminals.push(Terminal { at, outcome });
    }

    /// What comes from here on is marked: an expert was left out.
    pub fn degraded(&mut self) {
        self.record.degraded_from.get_or_insert(self.record.tokens.len());
    }

    /// The server says how many tokens it sent.
    pub fn reported(&mut self, tokens: u64) {
        self.record.reported_tokens = Some(tokens);
    }

    /// What came of it; nobody listens any more.
    pub fn close(mut self) -> RequestRecord {
        self.record.closed = self.clock.now();
        self.record
    }
}

/// Sends the workload, each request at its time from now on by `clock`, and tells `records` of each that has ended.
/// Returns when the last has: at most the deadline and a second after the last was sent.
pub async fn send<T: Target>(workload: Workload, target: Arc<T>, clock: RunClock, records: mpsc::Sender<Entry>) {
    let begun = clock.now();
    let cases: Arc<[Case]> = workload.cases.into();
    let mut under_way = JoinSet::new();
    for (id, (at, case)) in (0u64..).zip(workload.sends) {
        let intended = begun.saturating_add(crate::clock::micros(at));
        tokio::time::sleep_until(clock.instant(Duration::from_micros(intended)).into()).await;
        while under_way.try_join_next().is_some() {}
        let mut attempt = Attempt::new(clock, id, case, intended);
        if under_way.len() >= workload.max_outstanding {
            attempt.ended(Outcome::NotSent);
            tell(&records, attempt).await;
            continue;
        }
        let (target, cases, records, deadline) = (target.clone(), cases.clone(), records.clone(), workload.deadline);
        under_way.spawn(async move {
            let asking = target.ask(&cases[case], deadline, &mut attempt);
            // Whatever has been noted by then stays; an end that never came is for the checker to find.
            let _ = timeout(deadline + LISTENING_GRACE, asking).await;
            tell(&records, attempt).await;
        });
    }
    while under_way.join_next().await.is_some() {}
}

async fn tell(records: &mpsc::Sender<Entry>, attempt: Attempt) {
    // Fails only where nobody wants the records.
    let _ = records.send(Entry::Request(attempt.close())).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each request after a fixed time, but for a pause in which it answers none.
    struct Stalling {
        clock: RunClock,
        pause: (Micros, Micros),
    }

    impl Target for Stalling {
        async fn ask(&self, case: &Case, _: Duration, attempt: &mut Attempt) {
            let now = self.clock.now();
            let rest = if (self.pause.0..self.pause.1).contains(&now) {
                self.pause.1 - now
            } else {
                0
            };
            tokio::time::sleep(Duration::from_micros(rest + 1000)).await;
            attempt.tokens(&case.prompt);
            attempt.ended(Outcome::Finished("length".to_owned()));
        }
    }

    fn workload(sends: usize, every: Duration) -> Workload {
        Workload {
            cases: vec![Case {
                prompt: vec![7],
                max_tokens: 1,
            }],
            sends: (0..sends as u32).map(|index| (every * index, 0)).collect(),
            deadline: Duration::from_secs(5),
            max_outstanding: 1000,
        }
    }

    async fn records(workload: Workload, target: Arc<impl Target>, clock: RunClock) -> Vec<RequestRecord> {
        let (sender, mut receiver) = mpsc::channel(64);
        let sending = tokio::spawn(send(workload, target, clock, sender));
        let mut records = Vec::new();
        while let Some(entry) = receiver.recv().await {
            if let Entry::Request(record) = entry {
                records.push(record);
            }
        }
        sending.await.expect("sending does not panic");
        records.sort_by_key(|record| record.id);
        records
    }

    #[tokio::test]
    async fn a_pause_of_the_server_is_in_the_times_of_every_request_that_met_it() {
        let clock = RunClock::start();
        let pause = (50_000, 250_000);
        let target = Arc::new(Stalling { clock, pause });
        let found = records(workload(100, Duration::from_millis(2)), target, clock).await;
        assert_eq!(found.len(), 100);
        // A closed loop would have one slow request. Here each that was due in the pause waited for the rest of it.
        for record in found.iter().filter(|it| (60_000..200_000).contains(&it.intended)) {
            let took = record.closed - record.intended;
            assert!(took >= pause.1 - record.intended, "{record:?}");
        }
        let slow = found.iter().filter(|it| it.closed - it.intended > 50_000).count();
        assert!(slow >= 60, "only {slow} of 100 requests show the pause");
    }

    #[tokio::test]
    async fn what_a_full_client_does_not_send_is_noted() {
        let clock = RunClock::start();
        let target = Arc::new(Stalling {
            clock,
            pause: (0, 100_000),
        });
        let few = Workload {
            max_outstanding: 3,
            ..workload(10, Duration::ZERO)
        };
        let found = records(few, target, clock).await;
        let not_sent = |it: &&RequestRecord| it.terminals[0].outcome == Outcome::NotSent;
        assert_eq!((found.len(), found.iter().filter(not_sent).count()), (10, 7));
    }
}
