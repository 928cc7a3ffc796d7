//! Experts that are left out mark the answers that they are missing from, and nothing else is touched by it.

use moerun_engine::MoeLayerRequest;
use moerun_types::LayerId;
use ndarray::Array2;

use crate::faulty::Behaviour;
use crate::fixture::{CONFIG, Fixture, PATIENCE, PLAIN, Sizes, collect, generate, greedy, until, until_idle};

#[tokio::test]
async fn an_answer_without_an_expert_is_marked_to_its_end_and_leaves_nothing_for_others() {
    let fixture = Fixture::load("qwen3_moe");
    let (prompt, other) = (fixture.long_prompt(40), fixture.prompt(1));
    let plain = fixture.start(PLAIN);
    let undisturbed = generate(&plain.handle(), greedy(prompt.clone(), 8)).await;
    let beside = generate(&plain.handle(), greedy(other.clone(), 2)).await;
    assert!(!undisturbed.degraded && !beside.degraded);
    drop(plain);

    let engine = fixture.start(Sizes {
        max_batch_tokens: 100,
        ..CONFIG
    });
    let handle = engine.handle();
    fixture.experts.set(Behaviour::Hangs);
    let marked = handle.generate(greedy(prompt.clone(), 8)).expect("accepted");
    until(&handle, |stats| stats.waiting == 0).await;
    // From the next step on they share batches, of which the first row is the first one's; and this one is shorter.
    let shared = handle.generate(greedy(other, 2)).expect("accepted");
    fixture.experts.set(Behaviour::LeavesOutFirstRow);
    let marked = collect(marked).await.expect("completed");
    assert!(marked.degraded);
    let shared = collect(shared).await.expect("completed");
    assert!(!shared.degraded);
    assert_eq!(shared.ids, beside.ids, "rows beside a degraded one keep their bits");
    until_idle(&handle).await;
    assert_eq!(handle.stats().degraded_sequences, 1);

    fixture.experts.set(Behaviour::Works);
    for cached_tokens in [0, 32] {
        let again = generate(&handle, greedy(prompt.clone(), 8)).await;
        assert_eq!(
            again.cached_tokens, cached_tokens,
            "only pages of whole answers are kept"
        );
        assert!(!again.degraded);
        assert_eq!(again.ids, undisturbed.ids);
    }
}

#[tokio::test]
async fn logits_and_rows_of_a_block_are_marked_too() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(CONFIG);
    fixture.experts.set(Behaviour::LeavesOutFirstRow);
    let request = moerun_engine::ForwardRequest {
        token_ids: fixture.prompt(0),
        positions: vec![0, 1],
    };
    let mut rows = engine.handle().forward(request).expect("accepted");
    for _ in 0..2 {
        let row = tokio::time::timeout(PATIENCE, rows.recv()).await.unwrap();
        assert!(row.expect("a row").expect("logits").degraded);
    }
    // Run in pieces of 32 rows, of which the first of each is left out.
    let block = MoeLayerRequest {
        layer: LayerId(1),
        hidden_states: Array2::ones((40, 32)),
    };
    let block = engine.handle().moe_layer(block).expect("accepted");
    let output = tokio::time::timeout(PATIENCE, block)
        .await
        .unwrap()
        .unwrap()
        .expect("rows");
    assert_eq!(output.degraded_rows, [0, 32]);
}
