//! One worker as a member: its connection, its health, its counters, and a log line at each change of state.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use moerun_proto::{HeldExpert, HeldNow, v1};
use moerun_routing::subtract_slices;
use moerun_types::ExpertSlice;
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep},
};
use tonic::{Streaming, transport::Channel};

use crate::{
    health::{Health, SizeClass, Standing},
    link::{Addressee, Link, Waiter},
    session::{Session, describe},
    stats::{FailureReason, WorkerCounters, WorkerStats},
};

/// Between two probes of a suspect worker: the first pause, doubled up to the last.
const FIRST_PROBE_PAUSE: Duration = Duration::from_millis(50);
const LAST_PROBE_PAUSE: Duration = Duration::from_secs(1);

/// The way to change what a worker holds, and what it says of that; empty while there is no connection.
#[derive(Debug, Default)]
struct Control {
    channel: Option<Channel>,
    told: Option<HeldNow>,
    changing: bool,
    build: String,
    protocol_version: u32,
}

/// A worker, for as long as it is a member.
#[derive(Debug)]
pub(crate) struct Member {
    address: String,
    /// Its connection.
    pub(crate) link: Link,
    health: Mutex<Health>,
    /// What happened so far.
    pub(crate) counters: WorkerCounters,
    /// What it announced last.
    announced: Mutex<Option<Arc<[HeldExpert]>>>,
    /// What it is not asked for any more, though it holds it still.
    retiring: Mutex<Vec<ExpertSlice>>,
    /// Whether it gets no calls though it is a member: the operator said so.
    drained: AtomicBool,
    /// The way to change what it holds, while it is connected.
    control: Mutex<Control>,
    became_suspect: Notify,
    /// Counts the slices that known inputs were sent to.
    canary_turn: AtomicUsize,
    /// Whether it is there but still loads.
    loading: AtomicBool,
    /// Why its connection is to be ended, if it is.
    cut: Mutex<Option<String>>,
    cut_asked: Notify,
}

impl Member {
    pub(crate) fn new(address: String) -> Self {
        Self {
            address,
            link: Link::new(),
            health: Mutex::new(Health::new(Instant::now())),
            counters: WorkerCounters::default(),
            announced: Mutex::new(None),
            retiring: Mutex::default(),
            drained: AtomicBool::new(false),
            control: Mutex::default(),
            became_suspect: Notify::new(),
            canary_turn: AtomicUsize::new(0),
            loading: AtomicBool::new(false),
            cut: Mutex::new(None),
            cut_asked: Notify::new(),
        }
    }

    /// Its address.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// What it announced last; `None` before it was admitted.
    pub(crate) fn announced(&self) -> Option<Arc<[HeldExpert]>> {
        self.announced.lock().clone()
    }

    /// It says that it holds this.
    pub(crate) fn announce(&self, held: Vec<HeldExpert>) {
        *self.announced.lock() = Some(held.into());
    }

    /// Whether it is there but still loads.
    pub(crate) fn is_loading(&self) -> bool {
        self.loading.load(Relaxed)
    }

    pub(crate) fn set_loading(&self, loading: bool) {
        self.loading.store(loading, Relaxed);
    }

    /// Assignments that it was asked for and that are waited for.
    pub(crate) fn in_flight(&self) -> u64 {
        self.health.lock().in_flight()
    }

    /// Of what is held, the slice whose turn it is to be asked with a known input.
    pub(crate) fn canary_slice(&self, held: &[HeldExpert]) -> Option<ExpertSlice> {
        let turn = self.canary_turn.load(Relaxed).checked_rem(held.len())?;
        Some(held[turn].slice)
    }

    /// The next slice's turn.
    pub(crate) fn next_canary(&self) {
        self.canary_turn.fetch_add(1, Relaxed);
    }

    /// What it holds; nothing before it is admitted.
    pub(crate) fn held(&self) -> Vec<ExpertSlice> {
        let announced = self.announced();
        announced.map_or_else(Vec::new, |held| held.iter().map(|held| held.slice).collect())
    }

    /// What it may be asked for: what it holds, but for what it is about to let go; nothing while it is drained.
    pub(crate) fn usable(&self) -> Vec<ExpertSlice> {
        if self.is_drained() {
            return Vec::new();
        }
        let (held, retiring) = (self.held(), self.retiring.lock());
        if retiring.is_empty() {
            return held;
        }
        subtract_slices(&held, &retiring)
    }

    /// From the next plan on it is not asked for `slices`.
    pub(crate) fn retire(&self, slices: &[ExpertSlice]) {
        self.retiring.lock().extend_from_slice(slices);
    }

    /// From the next plan on it is asked for all that it holds. Whether there was anything that it was not asked for.
    pub(crate) fn retire_nothing(&self) -> bool {
        !std::mem::take(&mut *self.retiring.lock()).is_empty()
    }

    /// Whether it gets no calls though it is a member.
    pub(crate) fn is_drained(&self) -> bool {
        self.drained.load(Relaxed)
    }

    /// From the next plan on it gets no calls, or again.
    pub(crate) fn set_drained(&self, drained: bool) {
        self.drained.store(drained, Relaxed);
    }

    /// The channel over which what it holds is changed, if it is connected.
    pub(crate) fn channel(&self) -> Option<Channel> {
        self.control.lock().channel.clone()
    }

    /// Version of its binary and its protocol; empty and 0 while there is no connection.
    pub(crate) fn version(&self) -> (String, u32) {
        let control = self.control.lock();
        (control.build.clone(), control.protocol_version)
    }

    /// What it said last of what it holds, and of its memory.
    pub(crate) fn told(&self) -> Option<HeldNow> {
        self.control.lock().told.clone()
    }

    /// It says this; what is older than what it said before is left out.
    pub(crate) fn tells(&self, told: HeldNow) {
        let mut control = self.control.lock();
        if control.told.as_ref().is_none_or(|before| before.epoch <= told.epoch) {
            control.told = Some(told);
        }
    }

    /// Whether this gateway is changing what it holds: what it says meanwhile is taken when that is done.
    pub(crate) fn is_changing(&self) -> bool {
        self.control.lock().changing
    }

    pub(crate) fn set_changing(&self, changing: bool) {
        self.control.lock().changing = changing;
    }

    /// Whether it is to be asked; `None` if there is no connection.
    pub(crate) fn standing(&self, now: Instant) -> Option<Standing> {
        if !self.link.is_up() {
            return None;
        }
        let mut health = self.health.lock();
        if health.came_back(now) {
            tracing::info!(worker = self.address, "worker is asked again, on trial");
        }
        Some(health.standing(now))
    }

    /// What a call of `class` is expected to take, in seconds, the assignments of a usual call, and those in flight.
    pub(crate) fn load(&self, now: Instant, class: SizeClass) -> (f64, f64, u64) {
        let health = self.health.lock();
        (health.cost(now, class), health.usual_call(), health.in_flight())
    }

    /// A call was sent. Returns how long to wait for it before another holder is asked too, and before it is overdue.
    pub(crate) fn sent(&self, class: SizeClass, assignments: usize, ceiling: Duration) -> (Duration, Duration) {
        self.counters.calls.add(1);
        self.counters.assignments.add(assignments);
        let mut health = self.health.lock();
        health.sent(assignments);
        (health.hedge_after(class), health.overdue_after(class, ceiling))
    }

    /// From when a call that was sent at `sent` is timed.
    pub(crate) fn timed_from(&self, sent: Instant) -> Instant {
        self.health.lock().timed_from(sent)
    }

    /// A call is not waited for any more, for a reason that is not the worker's.
    pub(crate) fn dropped(&self, assignments: usize) {
        self.health.lock().closed(assignments);
    }

    /// A call was answered well.
    pub(crate) fn succeeded(&self, now: Instant, class: SizeClass, took: Duration, assignments: usize) {
        self.counters.latency.add(took);
        let mut health = self.health.lock();
        health.closed(assignments);
        health.succeeded(now, class, took);
    }

    /// A call failed.
    pub(crate) fn failed(&self, now: Instant, reason: FailureReason, assignments: usize) {
        self.counters.failures[reason as usize].add(1);
        let ejected = {
            let mut health = self.health.lock();
            health.closed(assignments);
            if reason.is_the_workers() {
                health.failed(now)
            } else {
                None
            }
        };
        if reason.is_alarming() {
            tracing::warn!(worker = self.address, reason = reason.name(), "a call failed");
        } else {
            tracing::debug!(worker = self.address, reason = reason.name(), "a call failed");
        }
        if let Some(length) = ejected {
            self.counters.ejections.add(1);
            tracing::warn!(
                worker = self.address,
                reason = reason.name(),
                "worker is ejected for {length:?}"
            );
        }
    }

    /// A call was given up unanswered after `waited`: a failure, and the worker is suspect until it says something.
    pub(crate) fn overdue(
        &self,
        now: Instant,
        reason: FailureReason,
        class: SizeClass,
        waited: Duration,
        assignments: usize,
    ) {
        if self.health.lock().overdue(now, class, waited) {
            self.counters.suspicions.add(1);
            tracing::info!(
                worker = self.address,
                reason = reason.name(),
                "worker is suspect: no answer for {waited:?}"
            );
            self.became_suspect.notify_one();
        }
        self.failed(now, reason, assignments);
    }

    /// Ends the connection, for the reason given; it is then dialled and admitted anew.
    pub(crate) fn cut(&self, reason: String) {
        *self.cut.lock() = Some(reason);
        self.cut_asked.notify_one();
    }

    /// Waits until the connection is to be ended; returns why.
    async fn is_cut(&self) -> String {
        loop {
            self.cut_asked.notified().await;
            // None: what was meant was a connection before this one.
            if let Some(reason) = self.cut.lock().take() {
                return reason;
            }
        }
    }

    /// Brings the link up.
    pub(crate) fn connect(self: &Arc<Self>, session: Session) -> Connected {
        let Session {
            requests,
            replies,
            identity,
            channel,
        } = session;
        self.health.lock().reconnected(Instant::now());
        *self.cut.lock() = None;
        *self.control.lock() = Control {
            channel: Some(channel),
            build: identity.build,
            protocol_version: identity.protocol_version,
            ..Control::default()
        };
        self.link.up(requests, identity.protocol_version);
        Connected {
            member: Arc::clone(self),
            replies,
            reason: "the gateway is stopping".to_owned(),
        }
    }

    fn deliver(&self, response: v1::ExecuteResponse) -> Result<(), String> {
        let addressee = self.link.addressee(response.request_id)?;
        let now = Instant::now();
        let (previous, was_suspect) = self.health.lock().answered(now);
        if was_suspect {
            tracing::info!(worker = self.address, "worker is suspect no more: it answered");
        }
        match addressee {
            Addressee::Waiting(waiter) => waiter.arrive(now, previous, Ok(response)),
            Addressee::Nobody => {
                if response.status() == v1::ExecuteStatus::Ok {
                    self.health.lock().answered_late();
                }
                self.counters.late_answers.add(1);
                tracing::debug!(
                    worker = self.address,
                    request_id = response.request_id,
                    "a late answer was dropped"
                );
            }
        }
        Ok(())
    }

    /// Whenever the worker is suspect, asks it for a sign of life, again and again; any answer clears it.
    async fn probe(&self) -> std::convert::Infallible {
        loop {
            self.became_suspect.notified().await;
            let mut pause = FIRST_PROBE_PAUSE;
            while self.health.lock().is_suspect() {
                self.send_probe();
                sleep(pause).await;
                pause = (pause * 2).min(LAST_PROBE_PAUSE);
            }
        }
    }

    fn send_probe(&self) {
        let (arrivals, _) = mpsc::channel(1);
        let Ok(registered) = self.link.register(Waiter { call: 0, arrivals }) else {
            return;
        };
        let probe = v1::ExecuteRequest {
            request_id: registered.request_id,
            echo: vec![1].into(),
            ..Default::default()
        };
        if registered.requests.try_send(probe).is_err() {
            self.link.forget(registered.request_id);
        }
    }

    /// As plain numbers.
    pub(crate) fn stats(&self, now: Instant) -> WorkerStats {
        let counters = &self.counters;
        let health = self.health.lock();
        let small = health.latency(SizeClass::Small);
        let failures = FailureReason::ALL.into_iter().zip(&counters.failures);
        WorkerStats {
            address: self.address.clone(),
            down: self.link.down_reason(),
            suspect: health.is_suspect(),
            ejected: health.standing(now) == Standing::Ejected,
            calls: counters.calls.get(),
            assignments: counters.assignments.get(),
            latency: counters.latency.get(),
            failures: failures
                .map(|(reason, count)| (reason, count.get()))
                .filter(|&(_, count)| count > 0)
                .collect(),
            late_answers: counters.late_answers.get(),
            ejections: counters.ejections.get(),
            suspicions: counters.suspicions.get(),
            disconnections: counters.disconnections.get(),
            canary_failures: counters.canary_failures.get(),
            assignments_in_flight: health.in_flight(),
            ewma: small.average_secs(now).map(Duration::from_secs_f64),
            p50: small.median(),
            p95: small.p95(),
        }
    }
}

/// A link that is up. However this ends, the link is then down and all that waited on it have been told.
#[derive(Debug)]
pub(crate) struct Connected {
    member: Arc<Member>,
    replies: Streaming<v1::ExecuteResponse>,
    reason: String,
}

impl Connected {
    /// Hands out answers until the stream ends; returns why it did.
    pub(crate) async fn run(mut self) -> String {
        let member = Arc::clone(&self.member);
        self.reason = tokio::select! {
            biased;
            reason = self.deliver_all() => reason,
            reason = member.is_cut() => reason,
            never = member.probe() => match never {},
        };
        self.reason.clone()
    }

    async fn deliver_all(&mut self) -> String {
        loop {
            match self.replies.message().await {
                Ok(Some(response)) => {
                    if let Err(reason) = self.member.deliver(response) {
                        return reason;
                    }
                }
                Ok(None) => return "the worker ended the stream".to_owned(),
                Err(status) => return describe(&status),
            }
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.member.counters.disconnections.add(1);
        let now = Instant::now();
        *self.member.control.lock() = Control::default();
        for waiter in self.member.link.down(&self.reason) {
            waiter.arrive(now, None, Err(self.reason.clone()));
        }
    }
}
