//! Experts that fail take their requests down, not the engine, and not the requests beside them.

use moerun_dispatch::DispatchError;
use moerun_engine::{EngineError, ForwardRequest, MoeLayerRequest};
use moerun_types::LayerId;
use ndarray::Array2;

use crate::faulty::Behaviour;
use crate::fixture::{CONFIG, Fixture, PATIENCE, Sizes, collect, generate, greedy, ids, until, until_idle};

#[tokio::test]
async fn a_failing_backend_fails_its_requests_and_the_engine_lives_on() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(CONFIG);
    let handle = engine.handle();
    for behaviour in [
        Behaviour::WorkerGone,
        Behaviour::MissesDeadline,
        Behaviour::PanicsInSubmit,
        Behaviour::PanicsInWait,
    ] {
        fixture.experts.set(behaviour);
        let events: Vec<_> = (0..3)
            .map(|index| handle.generate(greedy(fixture.prompt(index), 5)).expect("accepted"))
            .collect();
        let mut rows = handle
            .forward(ForwardRequest {
                token_ids: vec![1, 2],
                positions: vec![1],
            })
            .expect("accepted");
        let block = MoeLayerRequest {
            layer: LayerId(1),
            hidden_states: Array2::ones((2, 32)),
        };
        let block = handle.moe_layer(block).expect("accepted");
        let mut errors = vec![
            tokio::time::timeout(PATIENCE, rows.recv())
                .await
                .unwrap()
                .expect("an answer")
                .expect_err("a failure"),
            tokio::time::timeout(PATIENCE, block)
                .await
                .unwrap()
                .expect("an answer")
                .expect_err("a failure"),
        ];
        for events in events {
            errors.push(collect(events).await.expect_err("a failure"));
        }
        for error in errors {
            let fits = match behaviour {
                Behaviour::WorkerGone => matches!(error, EngineError::Dispatch(DispatchError::WorkerGone { .. })),
                Behaviour::MissesDeadline => {
                    matches!(error, EngineError::Dispatch(DispatchError::DeadlineExceeded { .. }))
                }
                _ => matches!(&error, EngineError::Panicked(text) if text == "the fake was told to panic"),
            };
            assert!(fits, "{behaviour:?}: {error:?}");
        }
        until_idle(&handle).await;
        fixture.experts.set(Behaviour::Works);
        let completion = generate(&handle, greedy(fixture.prompt(0), 24)).await;
        assert_eq!(completion.ids, ids(&fixture.golden["greedy"][0]), "after {behaviour:?}");
    }
}

#[tokio::test]
async fn a_hanging_backend_holds_up_nobody_who_asks() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(CONFIG);
    fixture.experts.set(Behaviour::Hangs);
    let stuck = engine
        .handle()
        .generate(greedy(fixture.prompt(0), 5))
        .expect("accepted");
    until(&engine.handle(), |stats| stats.waiting == 0).await;
    let later = engine
        .handle()
        .generate(greedy(fixture.prompt(1), 24))
        .expect("accepted at once");
    fixture.experts.set(Behaviour::MissesDeadline);
    assert!(matches!(
        collect(stuck).await,
        Err(EngineError::Dispatch(DispatchError::DeadlineExceeded { .. }))
    ));
    // It may have started before the experts were well again; then it fails like the first.
    fixture.experts.set(Behaviour::Works);
    match collect(later).await {
        Ok(completion) => assert_eq!(completion.ids, ids(&fixture.golden["greedy"][1])),
        Err(error) => assert!(matches!(error, EngineError::Dispatch(_)), "{error:?}"),
    }
    until_idle(&engine.handle()).await;
}

#[tokio::test]
async fn a_request_that_spoils_its_step_fails_alone() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(Sizes {
        max_batch_tokens: 200,
        ..CONFIG
    });
    fixture.experts.set(Behaviour::Hangs);
    let first = engine
        .handle()
        .generate(greedy(fixture.prompt(2), 24))
        .expect("accepted");
    until(&engine.handle(), |stats| stats.waiting == 0).await;
    // These two share the next step with the first: 60 + 31 + 1 rows, and the experts refuse more than 50.
    let spoilt = engine
        .handle()
        .generate(greedy(fixture.long_prompt(60), 5))
        .expect("accepted");
    let beside = engine
        .handle()
        .generate(greedy(fixture.prompt(1), 24))
        .expect("accepted");
    fixture.experts.set(Behaviour::RefusesRowsAbove(50));
    assert!(matches!(
        collect(spoilt).await,
        Err(EngineError::Dispatch(DispatchError::Local(_)))
    ));
    assert_eq!(
        collect(beside).await.expect("completed").ids,
        ids(&fixture.golden["greedy"][1])
    );
    assert_eq!(
        collect(first).await.expect("completed").ids,
        ids(&fixture.golden["greedy"][2])
    );
    until_idle(&engine.handle()).await;
}
