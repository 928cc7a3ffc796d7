//! Workers that go away, stay silent or talk nonsense.

use std::time::{Duration, Instant};

use moerun_dispatch::{DispatchError, RemoteConfig, RemoteExperts};
use moerun_proto::{ExecuteFailure, encode_failure, v1};
use moerun_routing::ShardSpec;
use moerun_types::{ExpertId, NumberFormat};
use moerun_weights::Needs;

use crate::{
    cluster::{config, connect, golden, local, numerics, open, request, run, start, start_all, wait_for},
    puppet::{Act, Puppet},
};

const FAMILY: &str = "qwen3_moe";

/// What a gateway sees of a worker with this script, and how long it took.
fn dispatch_to(
    deadline: Duration,
    script: impl Fn(v1::ExecuteRequest) -> Act + Send + Sync + 'static,
) -> (String, DispatchError, Duration) {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let puppet = Puppet::start(&golden(FAMILY), numerics, script);
    let mut config = RemoteConfig::new(vec![puppet.address.to_string()]);
    config.dispatch_deadline = deadline;
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 2, 1);
    let remote = RemoteExperts::connect(config, checkpoint, numerics).unwrap();
    let begun = Instant::now();
    let error = run(&remote, &request).unwrap_err();
    (puppet.address.to_string(), error, begun.elapsed())
}

#[test]
fn a_silent_worker_is_given_up_at_the_deadline() {
    let (worker, error, took) = dispatch_to(Duration::from_millis(200), |_| Act::Silence);
    let layer = open(&golden(FAMILY), Needs::All).config().moe_layers()[0];
    assert_eq!(
        error.to_string(),
        format!("worker {worker} gave no answer for layer {layer} within 200ms")
    );
    assert!(
        took >= Duration::from_millis(200) && took < Duration::from_secs(2),
        "{took:?}"
    );
}

#[test]
fn the_end_of_a_stream_fails_what_waits_on_it_at_once() {
    let (worker, error, took) = dispatch_to(Duration::from_secs(30), |_| Act::Leave);
    assert_eq!(
        error.to_string(),
        format!("worker {worker} is gone: the worker ended the stream")
    );
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[test]
fn malformed_answers_name_the_worker_and_the_field() {
    type Lie = (&'static str, fn(&mut v1::ExecuteResponse));
    let lies: [Lie; 4] = [
        ("status", |answer| answer.status = 77),
        ("row_widths", |answer| answer.row_widths = vec![0].into()),
        ("row_widths", |answer| answer.row_widths = vec![0, 9].into()),
        ("partial_sums", |answer| answer.partial_sums = vec![0].into()),
    ];
    for (field, lie) in lies {
        let (worker, error, _) = dispatch_to(Duration::from_secs(10), move |request| {
            let mut answer = v1::ExecuteResponse {
                request_id: request.request_id,
                status: v1::ExecuteStatus::Ok.into(),
                row_widths: vec![0; request.rows as usize].into(),
                ..Default::default()
            };
            lie(&mut answer);
            Act::Answer(answer)
        });
        let wanted = format!("worker {worker} sent a malformed answer: {field}: wanted ");
        assert!(error.to_string().starts_with(&wanted), "{error}");
    }
}

#[test]
fn an_answer_that_nobody_asked_for_ends_the_connection() {
    let (worker, error, _) = dispatch_to(Duration::from_secs(10), |request| {
        Act::Answer(v1::ExecuteResponse {
            request_id: request.request_id + 1,
            ..Default::default()
        })
    });
    assert_eq!(
        error.to_string(),
        format!("worker {worker} is gone: it answered request 3, which was never sent")
    );
}

#[test]
fn a_workers_failures_come_back_typed() {
    let layer = open(&golden(FAMILY), Needs::All).config().moe_layers()[0];
    let fails = |failure: ExecuteFailure| {
        dispatch_to(Duration::from_secs(10), move |request| {
            Act::Answer(encode_failure(request.request_id, failure.clone()))
        })
        .1
    };
    let (expert, message) = (ExpertId(4), "in words".to_owned());
    let error = fails(ExecuteFailure::TermOutOfRange {
        layer,
        expert,
        block: Some(2),
        message: message.clone(),
    });
    assert!(
        matches!(
            error,
            DispatchError::TermOutOfRange {
                expert: ExpertId(4),
                block: Some(2),
                ..
            }
        ),
        "{error}"
    );
    let error = fails(ExecuteFailure::NotHeld {
        layer,
        expert,
        block: Some(0),
        message: message.clone(),
    });
    assert!(
        matches!(
            error,
            DispatchError::NotHeld {
                expert: ExpertId(4),
                ..
            }
        ),
        "{error}"
    );
    assert!(matches!(
        fails(ExecuteFailure::Invalid { message }),
        DispatchError::Invalid { .. }
    ));
    assert!(matches!(
        fails(ExecuteFailure::Overloaded),
        DispatchError::Overloaded { .. }
    ));
    assert!(matches!(
        fails(ExecuteFailure::Draining),
        DispatchError::Draining { .. }
    ));
}

#[test]
fn an_overflowing_term_is_named_by_a_real_worker() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let workers = start_all(&checkpoint, &[ShardSpec::All], numerics);
    let remote = connect(&workers, &checkpoint, numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let mut request = request(checkpoint.config(), NumberFormat::F32, layer, 3, 2);
    request.routing.routing_weights[0] = 1e30;
    let error = run(&remote, &request).unwrap_err();
    let DispatchError::TermOutOfRange {
        layer: named, expert, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((*named, *expert), (layer, request.routing.expert_ids[0]));
    request.routing.routing_weights[0] = f32::NAN;
    let error = run(&remote, &request).unwrap_err();
    assert!(matches!(error, DispatchError::Invalid { .. }), "{error}");
    request.routing.routing_weights[0] = 0.5;
    run(&remote, &request).unwrap();
}

#[test]
fn a_dead_worker_fails_at_once_and_serves_again_once_restarted() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let shards = [
        ShardSpec::Experts { index: 0, count: 2 },
        ShardSpec::Experts { index: 1, count: 2 },
    ];
    let mut workers = start_all(&checkpoint, &shards, numerics);
    let remote = RemoteExperts::connect(config(&workers), checkpoint.clone(), numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 4, 9);
    let wanted = run(&local(&checkpoint, numerics), &request).unwrap();
    assert!(run(&remote, &request).unwrap() == wanted);

    let address = workers[1].address().to_string();
    drop(workers.pop());
    let begun = Instant::now();
    let error = run(&remote, &request).unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(error.to_string().contains(&address), "{error}");
    // The stream's end may be seen after the first failed dispatch, but not much later.
    let down = wait_for(|| remote.workers()[1].down.is_some());
    assert!(down, "{:?}", remote.workers());
    let error = run(&remote, &request).unwrap_err();
    let wanted_error = format!("layer {layer} needs worker {address}, which is down: ");
    assert!(error.to_string().starts_with(&wanted_error), "{error}");

    // Whoever comes back with other experts is taken for these; nobody holds the former ones then.
    let other = start(&checkpoint, &shards[0], numerics, &address);
    assert!(
        wait_for(|| remote.workers()[1].down.is_none()),
        "{:?}",
        remote.workers()
    );
    assert_eq!(remote.workers()[1].held, remote.workers()[0].held);
    let error = run(&remote, &request).unwrap_err();
    assert!(matches!(error, DispatchError::ExpertUnavailable { .. }), "{error}");
    drop(other);

    let _restarted = start(&checkpoint, &shards[1], numerics, &address);
    assert!(
        wait_for(|| remote.workers()[1].down.is_none()),
        "{:?}",
        remote.workers()
    );
    assert!(run(&remote, &request).unwrap() == wanted);
}

#[test]
fn a_gateway_that_ends_fails_what_it_waits_for() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let puppet = Puppet::start(&golden(FAMILY), numerics, |_| Act::Silence);
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 2, 1);
    let config = RemoteConfig::new(vec![puppet.address.to_string()]);
    let remote = RemoteExperts::connect(config, checkpoint, numerics).unwrap();
    let pending = moerun_dispatch::ExpertBackend::submit(&remote, request).unwrap();
    drop(remote);
    let begun = Instant::now();
    let error = pending.wait().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("worker {} is gone: the gateway is stopping", puppet.address)
    );
    assert!(begun.elapsed() < Duration::from_secs(2));
}
