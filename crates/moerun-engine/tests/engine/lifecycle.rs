//! Refusal, cancellation, drain and stop.

use moerun_engine::{EngineError, ForwardRequest, MoeLayerRequest, TokenEvent};
use moerun_types::LayerId;
use ndarray::Array2;

use crate::faulty::Behaviour;
use crate::fixture::{CONFIG, Fixture, PATIENCE, Sizes, collect, generate, greedy, ids, next, until, until_idle};

#[tokio::test]
async fn a_client_that_goes_away_frees_its_pages_at_the_next_step() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(CONFIG);
    let handle = engine.handle();
    let prompt = fixture.prompt(0);
    let prefill = 2 * prompt.len().div_ceil(CONFIG.max_batch_tokens); // two layers with experts
    fixture.experts.set(Behaviour::HangsAfter(prefill));
    let mut events = handle.generate(greedy(prompt, 200)).expect("accepted");
    assert!(matches!(next(&mut events).await, Some(TokenEvent::Token { .. })));
    let waiting = handle.generate(greedy(fixture.prompt(1), 200)).expect("accepted");
    until(&handle, |stats| stats.pages_used > 0).await;
    let asked = fixture.experts.requests();
    drop((events, waiting));
    fixture.experts.set(Behaviour::Works);
    until_idle(&handle).await;
    let steps = (fixture.experts.requests() - asked).div_ceil(2); // two layers with experts
    assert!(steps <= 4, "{steps} steps for clients that are gone");
    generate(&handle, greedy(fixture.prompt(0), 1)).await;
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(Sizes { max_queue: 2, ..CONFIG });
    let handle = engine.handle();
    let request = || greedy(fixture.prompt(2), 24);
    fixture.experts.set(Behaviour::Hangs);
    let mut accepted = vec![handle.generate(request()).expect("accepted")];
    until(&handle, |stats| stats.waiting == 0).await; // it started, and hangs
    accepted.push(handle.generate(request()).expect("accepted"));
    accepted.push(handle.generate(request()).expect("accepted"));
    assert!(matches!(
        handle.generate(request()),
        Err(EngineError::QueueFull { limit: 2 })
    ));
    let logits = ForwardRequest {
        token_ids: vec![1],
        positions: vec![0],
    };
    assert!(matches!(
        handle.forward(logits),
        Err(EngineError::QueueFull { limit: 2 })
    ));
    assert_eq!(handle.stats().waiting, 2);
    fixture.experts.set(Behaviour::Works);
    for events in accepted {
        assert_eq!(
            collect(events).await.expect("completed").ids,
            ids(&fixture.golden["greedy"][2])
        );
    }
    until_idle(&handle).await;
    handle.generate(request()).expect("there is room again");
}

#[tokio::test]
async fn drain_ends_what_was_accepted_and_refuses_the_rest() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(Sizes {
        max_batch_tokens: 2,
        ..CONFIG
    }); // one runs, the others wait
    let handle = engine.handle();
    fixture.experts.set(Behaviour::Hangs);
    let accepted: Vec<_> = (0..3)
        .map(|index| handle.generate(greedy(fixture.prompt(index), 24)).expect("accepted"))
        .collect();
    let mut drained = handle.drain();
    assert!(matches!(
        handle.generate(greedy(vec![1], 1)),
        Err(EngineError::Stopping)
    ));
    assert!(drained.try_recv().is_err(), "three requests are open");
    fixture.experts.set(Behaviour::Works);
    for (index, events) in accepted.into_iter().enumerate() {
        assert_eq!(
            collect(events).await.expect("completed").ids,
            ids(&fixture.golden["greedy"][index])
        );
    }
    tokio::time::timeout(PATIENCE, drained)
        .await
        .expect("in time")
        .expect("drained");
    tokio::time::timeout(PATIENCE, handle.drain())
        .await
        .expect("in time")
        .expect("drained still");
}

#[tokio::test]
async fn blocks_under_way_count_as_waiting_until_they_are_answered() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(Sizes {
        max_queue: 2,
        max_batch_tokens: 1,
        ..CONFIG
    });
    let handle = engine.handle();
    let request = || MoeLayerRequest {
        layer: LayerId(0),
        hidden_states: Array2::from_elem((64, 32), 0.5),
    };
    fixture.experts.set(Behaviour::Hangs);
    let accepted = [(); 2].map(|()| handle.moe_layer(request()).expect("accepted"));
    while fixture.experts.requests() == 0 {
        tokio::task::yield_now().await; // until the first piece of the first is under way
    }
    let error = handle.moe_layer(request()).expect_err("two are under way");
    assert!(matches!(error, EngineError::QueueFull { limit: 2 }), "{error}");
    fixture.experts.set(Behaviour::Works);
    for reply in accepted {
        let rows = tokio::time::timeout(PATIENCE, reply).await.unwrap().unwrap();
        assert_eq!(rows.expect("rows").hidden_states.nrows(), 64);
        // Whoever has an answer may ask again at once.
        drop(handle.moe_layer(request()).expect("there is room again"));
    }
    until_idle(&handle).await;
}

#[tokio::test]
async fn a_dropped_engine_tells_every_open_request_and_refuses_new_ones() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(Sizes {
        max_batch_tokens: 2,
        ..CONFIG
    });
    let handle = engine.handle();
    fixture.experts.set(Behaviour::Hangs);
    let open: Vec<_> = (0..3)
        .map(|index| handle.generate(greedy(fixture.prompt(index), 24)).expect("accepted"))
        .collect();
    until(&handle, |stats| stats.waiting == 2).await;
    let dropping = tokio::task::spawn_blocking(move || drop(engine));
    while !matches!(handle.generate(greedy(vec![1], 1)), Err(EngineError::Stopping)) {
        tokio::task::yield_now().await;
    }
    fixture.experts.set(Behaviour::Works);
    tokio::time::timeout(PATIENCE, dropping)
        .await
        .expect("in time")
        .expect("dropped");
    for events in open {
        assert!(matches!(collect(events).await, Err(EngineError::Stopping)));
    }
    assert!(matches!(
        handle.generate(greedy(vec![1], 1)),
        Err(EngineError::Stopping)
    ));
    tokio::time::timeout(PATIENCE, handle.drain())
        .await
        .expect("in time")
        .expect("nothing runs");
    until_idle(&handle).await;
}

#[tokio::test]
async fn what_can_never_run_is_refused_before_it_is_queued() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(Sizes {
        pages: 4,
        max_context: 256,
        ..CONFIG
    });
    let long = engine.handle().generate(greedy(fixture.long_prompt(65), 1));
    assert!(
        matches!(
            long,
            Err(EngineError::PromptTooLong {
                prompt_tokens: 65,
                max_context: 65
            })
        ),
        "{long:?}"
    );
    generate(&engine.handle(), greedy(fixture.long_prompt(64), 1)).await;
    let unknown = engine.handle().generate(greedy(vec![1, 320], 1));
    assert!(
        matches!(
            unknown,
            Err(EngineError::Invalid {
                field: "prompt_ids",
                ..
            })
        ),
        "{unknown:?}"
    );
    for (field, sizes) in [
        ("kv_memory_bytes", Sizes { pages: 0, ..CONFIG }),
        (
            "max_context",
            Sizes {
                max_context: 1,
                ..CONFIG
            },
        ),
        (
            "max_context",
            Sizes {
                max_context: 257, // more positions than the checkpoint has
                ..CONFIG
            },
        ),
        (
            "max_batch_tokens",
            Sizes {
                max_batch_tokens: 0,
                ..CONFIG
            },
        ),
        ("max_queue", Sizes { max_queue: 0, ..CONFIG }),
    ] {
        match fixture.try_start(sizes) {
            Err(EngineError::Invalid { field: found, .. }) => assert_eq!(found, field),
            other => panic!("{field}: wanted a refusal, found {other:?}"),
        }
    }
}
