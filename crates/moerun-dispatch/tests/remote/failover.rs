//! What a worker fails to answer is answered all the same, with the same bits, and only that is asked again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use moerun_dispatch::{
    DispatchError, DispatchStats, ExpertBackend, ExpertRequest, FailureReason, LocalConfig, OnExpertLoss, RemoteConfig,
    RemoteExperts,
};
use moerun_kernels::CpuPool;
use moerun_proto::{ExecuteFailure, encode_failure, v1};
use moerun_routing::ShardSpec;
use moerun_types::{CombineMode, ExpertId, LayerId, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, Needs};
use moerun_worker::Worker;
use tokio::sync::Notify;

use crate::{
    cluster::{golden, local, numerics, open, request, run, start, wait_for},
    puppet::{Act, Puppet},
};

const FAMILY: &str = "qwen3_moe";

/// A puppet and a real worker that both hold everything, and a gateway over them.
struct Pair {
    puppet: Puppet,
    _worker: Worker,
    remote: RemoteExperts,
    checkpoint: Arc<Checkpoint>,
    layer: LayerId,
    numerics: Numerics,
}

impl Pair {
    fn start(script: impl Fn(v1::ExecuteRequest) -> Act + Send + Sync + 'static) -> Self {
        Self::start_with(numerics(NumberFormat::F32), script)
    }

    fn start_with(numerics: Numerics, script: impl Fn(v1::ExecuteRequest) -> Act + Send + Sync + 'static) -> Self {
        let checkpoint = open(&golden(FAMILY), Needs::All);
        let puppet = Puppet::start(&golden(FAMILY), numerics, script);
        let worker = start(&checkpoint, &ShardSpec::All, numerics, "127.0.0.1:0");
        let mut config = RemoteConfig::new(vec![puppet.address.to_string(), worker.address().to_string()]);
        config.dispatch_deadline = Duration::from_secs(20);
        let remote = RemoteExperts::connect(config, Arc::clone(&checkpoint), numerics).unwrap();
        Self {
            puppet,
            _worker: worker,
            remote,
            layer: checkpoint.config().moe_layers()[0],
            checkpoint,
            numerics,
        }
    }

    fn request(&self, tokens: usize, seed: u64) -> ExpertRequest {
        request(self.checkpoint.config(), NumberFormat::F32, self.layer, tokens, seed)
    }

    /// Runs requests until the puppet has failed, each with the bits of local experts.
    fn run_until_failure(&self, reason: FailureReason) -> DispatchStats {
        let local = local(&self.checkpoint, self.numerics);
        for seed in 0..50 {
            let request = self.request(6, seed);
            assert!(
                run(&self.remote, &request).unwrap() == run(&local, &request).unwrap(),
                "seed {seed}"
            );
            let stats = self.remote.stats();
            if stats.workers[0].failures_by(reason) > 0 {
                return stats;
            }
        }
        panic!("the puppet was never asked: {:?}", self.remote.stats());
    }
}

fn fails_once(failure: ExecuteFailure) -> impl Fn(v1::ExecuteRequest) -> Act + Send + Sync {
    let first = AtomicBool::new(true);
    move |request| {
        if first.swap(false, SeqCst) {
            Act::Answer(encode_failure(request.request_id, failure.clone()))
        } else {
            Act::Right
        }
    }
}

#[test]
fn the_rows_of_a_stream_that_ends_are_sent_to_another_holder_and_no_others() {
    let asked_rows = Arc::new(AtomicUsize::new(0));
    let rows = Arc::clone(&asked_rows);
    let pair = Pair::start(move |request| {
        rows.fetch_add(request.rows as usize, SeqCst);
        Act::Leave
    });
    let stats = pair.run_until_failure(FailureReason::ConnectionLost);
    assert_eq!(
        stats.workers[0].failures_by(FailureReason::ConnectionLost),
        1,
        "{stats:?}"
    );
    assert_eq!(stats.retries, 1, "{stats:?}");
    assert_eq!(stats.retried_rows, asked_rows.load(SeqCst) as u64, "{stats:?}");
    assert_eq!(stats.workers[1].failures, [], "{stats:?}");
    assert_eq!((stats.local_assignments, stats.skipped_assignments), (0, 0));
}

#[test]
fn every_failure_but_our_own_is_answered_by_another_holder() {
    let layer = open(&golden(FAMILY), Needs::All).config().moe_layers()[0];
    let (expert, message) = (ExpertId(0), "in words".to_owned());
    let failures = [
        (ExecuteFailure::Overloaded, FailureReason::Overloaded),
        (ExecuteFailure::Draining, FailureReason::Draining),
        (ExecuteFailure::Corrupted, FailureReason::CorruptedRequest),
        (
            ExecuteFailure::Internal {
                message: message.clone(),
            },
            FailureReason::Internal,
        ),
        (
            ExecuteFailure::NotHeld {
                layer,
                expert,
                block: None,
                message: message.clone(),
            },
            FailureReason::NotHeld,
        ),
        (
            ExecuteFailure::TermOutOfRange {
                layer,
                expert,
                block: None,
                message: message.clone(),
            },
            FailureReason::TermOutOfRange,
        ),
    ];
    for (failure, reason) in failures {
        let stats = Pair::start(fails_once(failure)).run_until_failure(reason);
        assert_eq!(stats.retries, 1, "{reason:?}: {stats:?}");
    }
    let pair = Pair::start(fails_once(ExecuteFailure::Invalid { message }));
    let error = (0..50).find_map(|seed| run(&pair.remote, &pair.request(6, seed)).err());
    assert!(matches!(error, Some(DispatchError::Invalid { .. })), "{error:?}");
    assert_eq!(pair.remote.stats().retries, 0);
}

#[test]
fn an_answer_that_was_changed_on_its_way_is_not_believed() {
    let changes: [fn(&mut v1::ExecuteResponse); 4] = [
        |answer| {
            let mut sums = answer.partial_sums.to_vec();
            sums[0] ^= 1;
            answer.partial_sums = sums.into();
        },
        |answer| answer.row_widths = vec![0; answer.row_widths.len()].into(),
        |answer| answer.checksum = None,
        |answer| answer.status = v1::ExecuteStatus::Internal.into(),
    ];
    for change in changes {
        let first = AtomicBool::new(true);
        let pair = Pair::start(move |_| match first.swap(false, SeqCst) {
            true => Act::Corrupted(change),
            false => Act::Right,
        });
        let stats = pair.run_until_failure(FailureReason::CorruptedAnswer);
        assert_eq!(stats.retries, 1, "{stats:?}");
    }
}

#[test]
fn sums_that_are_not_finite_are_not_believed_in_fast_mode() {
    let fast = Numerics {
        combine: CombineMode::Fast,
        ..numerics(NumberFormat::F32)
    };
    let pair = Pair::start_with(fast, |_| {
        Act::Wrong(|answer| {
            let mut sums = answer.partial_sums.to_vec();
            sums[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            answer.partial_sums = sums.into();
        })
    });
    for seed in 0..50 {
        let found = run(&pair.remote, &pair.request(6, seed)).unwrap();
        assert!(found.iter().all(|&bits| f32::from_bits(bits).is_finite()));
    }
    let stats = pair.remote.stats();
    let malformed = stats.workers[0].failures_by(FailureReason::Malformed);
    assert!(malformed > 0 && stats.retries == malformed, "{stats:?}");
}

#[test]
fn a_holder_that_takes_long_is_outrun_and_its_late_answer_is_dropped() {
    let told = Arc::new(Notify::new());
    let later = Arc::clone(&told);
    let first = AtomicBool::new(true);
    // Silent to probes too, as a stopped process is.
    let silent = Arc::new(AtomicBool::new(true));
    let answers_probes = Arc::clone(&silent);
    let pair = Pair::start(move |request| {
        if !request.echo.is_empty() && answers_probes.load(SeqCst) {
            Act::Silence
        } else if request.echo.is_empty() && first.swap(false, SeqCst) {
            Act::RightLater(Arc::clone(&later))
        } else {
            Act::Right
        }
    });
    let stats = pair.run_until_failure(FailureReason::LostToHedge);
    assert_eq!((stats.hedges, stats.hedges_won, stats.retries), (1, 1, 0), "{stats:?}");
    assert!(stats.workers[0].suspect, "{stats:?}");
    assert_eq!(stats.workers[0].suspicions, 1);

    let local = local(&pair.checkpoint, pair.numerics);
    let asked = pair.puppet.requests();
    for seed in 100..110 {
        let request = pair.request(6, seed);
        assert!(run(&pair.remote, &request).unwrap() == run(&local, &request).unwrap());
    }
    assert_eq!(
        pair.puppet.requests(),
        asked,
        "a suspect is not asked while another holder lives"
    );

    told.notify_one();
    let stats = || pair.remote.stats().workers[0].clone();
    assert!(wait_for(|| stats().late_answers == 1), "{:?}", stats());
    assert!(!stats().suspect, "it answered");
    for seed in 200..250 {
        let request = pair.request(6, seed);
        assert!(run(&pair.remote, &request).unwrap() == run(&local, &request).unwrap());
    }
    assert!(pair.puppet.requests() > asked, "it is asked again");
    assert_eq!(stats().assignments_in_flight, 0);
}

#[test]
fn a_suspect_that_answers_a_probe_is_asked_again() {
    let first = AtomicBool::new(true);
    let pair = Pair::start(
        move |request| match request.echo.is_empty() && first.swap(false, SeqCst) {
            true => Act::Silence,
            false => Act::Right,
        },
    );
    let stats = pair.run_until_failure(FailureReason::LostToHedge);
    assert_eq!(stats.workers[0].suspicions, 1);
    let is_suspect = || pair.remote.stats().workers[0].suspect;
    assert!(wait_for(|| !is_suspect()), "{:?}", pair.remote.stats());
}

#[test]
fn the_last_holder_is_never_ejected() {
    let checkpoint = open(&golden(FAMILY), Needs::All);
    let numerics = numerics(NumberFormat::F32);
    let puppet = Puppet::start(&golden(FAMILY), numerics, |request| {
        let message = "told to".to_owned();
        Act::Answer(encode_failure(request.request_id, ExecuteFailure::Internal { message }))
    });
    let config = RemoteConfig::new(vec![puppet.address.to_string()]);
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 2, 1);
    let remote = RemoteExperts::connect(config, checkpoint, numerics).unwrap();
    for asked in 1..=8 {
        let error = run(&remote, &request).unwrap_err();
        assert!(matches!(error, DispatchError::Internal { .. }), "{error}");
        assert_eq!(puppet.requests(), asked);
    }
    let stats = remote.stats();
    assert_eq!(stats.workers[0].failures_by(FailureReason::Internal), 8, "{stats:?}");
    assert!(stats.workers[0].ejections > 0, "{stats:?}");
}

#[test]
fn a_holder_that_always_fails_is_ejected_while_another_lives() {
    let pair = Pair::start(|request| {
        let message = "told to".to_owned();
        Act::Answer(encode_failure(request.request_id, ExecuteFailure::Internal { message }))
    });
    let local = local(&pair.checkpoint, pair.numerics);
    for seed in 0..60 {
        let request = pair.request(6, seed);
        assert!(run(&pair.remote, &request).unwrap() == run(&local, &request).unwrap());
    }
    let stats = pair.remote.stats();
    let failures = stats.workers[0].failures_by(FailureReason::Internal);
    assert!(stats.workers[0].ejections > 0 && failures < 60, "{stats:?}");
    assert_eq!(stats.retries, failures, "{stats:?}");
}

#[test]
fn retries_keep_to_their_budget() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let overloaded =
        |request: v1::ExecuteRequest| Act::Answer(encode_failure(request.request_id, ExecuteFailure::Overloaded));
    let puppets = [0, 1].map(|_| Puppet::start(&golden(FAMILY), numerics, overloaded));
    let config = RemoteConfig::new(puppets.iter().map(|puppet| puppet.address.to_string()).collect());
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 1, 1);
    let remote = RemoteExperts::connect(config, checkpoint, numerics).unwrap();
    let begun = Instant::now();
    for _ in 0..300 {
        let error = run(&remote, &request).unwrap_err();
        assert!(matches!(error, DispatchError::Overloaded { .. }), "{error}");
    }
    let (stats, seconds) = (remote.stats(), begun.elapsed().as_secs_f64());
    let allowed = 100.0 + 0.2 * stats.calls as f64 + 10.0 * seconds;
    assert!(
        stats.retries >= 100 && stats.retries as f64 <= allowed,
        "{stats:?} in {seconds} s"
    );
    assert!(stats.retry_budget_exhausted > 0, "{stats:?}");
}

/// Workers that hold the even and the odd experts, of which the second leaves when it is asked.
fn without_odd_experts(dir: &std::path::Path, on_expert_loss: OnExpertLoss) -> (RemoteExperts, Worker, Puppet) {
    let (checkpoint, numerics) = (open(dir, Needs::GatewayOnly), numerics(NumberFormat::F32));
    let full = open(&golden(FAMILY), Needs::All);
    let [even, odd] = [0, 1].map(|index| ShardSpec::Experts { index, count: 2 });
    let worker = start(&full, &even, numerics, "127.0.0.1:0");
    let puppet = Puppet::start_as(&golden(FAMILY), numerics, &odd, |_| (), |_| Act::Leave);
    let mut config = RemoteConfig::new(vec![worker.address().to_string(), puppet.address.to_string()]);
    config.on_expert_loss = on_expert_loss;
    config.local = Some(LocalConfig {
        pool: Arc::new(CpuPool::new(1)),
        max_bytes: 1 << 20,
    });
    let remote = RemoteExperts::connect(config, checkpoint, numerics).unwrap();
    (remote, worker, puppet)
}

#[test]
fn what_nobody_holds_any_more_is_computed_by_the_gateway_to_the_bit() {
    let (remote, _worker, _puppet) = without_odd_experts(&golden(FAMILY), OnExpertLoss::Local);
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let local = local(&checkpoint, numerics);
    let mut odd_assignments = 0;
    for layer in checkpoint.config().moe_layers() {
        for (tokens, seed) in [(1, 3), (9, 4), (40, 5)] {
            let request = request(checkpoint.config(), NumberFormat::F32, layer, tokens, seed);
            odd_assignments += request
                .routing
                .expert_ids
                .iter()
                .filter(|expert| expert.0 % 2 == 1)
                .count();
            assert!(run(&remote, &request).unwrap() == run(&local, &request).unwrap());
        }
    }
    assert_eq!(remote.stats().local_assignments, odd_assignments as u64);
}

#[test]
fn without_a_checkpoint_of_its_own_the_gateway_says_what_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    moerun_testkit::copy_without_experts(&golden(FAMILY), dir.path()).unwrap();
    for policy in [OnExpertLoss::Local, OnExpertLoss::Fail] {
        let (remote, _worker, puppet) = without_odd_experts(dir.path(), policy);
        let config = open(&golden(FAMILY), Needs::All).config().clone();
        let request = request(&config, NumberFormat::F32, config.moe_layers()[0], 4, 1);
        let error = run(&remote, &request).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("worker {} is gone: the worker ended the stream", puppet.address)
        );
    }
}

#[test]
fn experts_may_be_left_out_where_that_is_allowed_and_the_rows_are_told() {
    let (remote, _worker, _puppet) = without_odd_experts(&golden(FAMILY), OnExpertLoss::Skip);
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 7, 6);
    let combined = remote.submit(request.clone()).unwrap().wait().unwrap();

    let top_k = request.routing.top_k;
    let mut kept = request.clone();
    let mut degraded = Vec::new();
    let choices = request.routing.expert_ids.chunks(top_k);
    for (row, (experts, weights)) in choices.zip(kept.routing.routing_weights.chunks_mut(top_k)).enumerate() {
        let all: f32 = weights.iter().sum();
        let is_kept = |expert: &ExpertId| expert.0.is_multiple_of(2);
        let of_kept = experts.iter().zip(weights.iter()).filter(|(expert, _)| is_kept(expert));
        let left: f32 = of_kept.map(|(_, weight)| weight).sum();
        if experts.iter().all(is_kept) {
            continue;
        }
        degraded.push(row as u32);
        for (expert, weight) in experts.iter().zip(weights.iter_mut()) {
            *weight = if is_kept(expert) { *weight * (all / left) } else { 0.0 };
        }
    }
    assert!(!degraded.is_empty());
    assert_eq!(combined.degraded_rows, degraded);
    let wanted = run(&local(&checkpoint, numerics), &kept).unwrap();
    let found: Vec<u32> = combined.hidden_states.iter().map(|value| value.to_bits()).collect();
    assert!(found == wanted);
    let odd = request
        .routing
        .expert_ids
        .iter()
        .filter(|expert| expert.0 % 2 == 1)
        .count();
    assert_eq!(remote.stats().skipped_assignments, odd as u64);
}
