//! Requests for logits and for single MoE blocks.

use moerun_engine::{EngineError, MoeLayerRequest};
use moerun_types::LayerId;
use ndarray::Array2;

use crate::fixture::{CONFIG, Fixture, PATIENCE, Sizes, logits, until_idle};

fn assert_close(found: &[f32], wanted: &[f32], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert!(
            (found - wanted).abs() <= 1e-4 + 1e-4 * wanted.abs(),
            "{what} at {index}: {found}, wanted {wanted}"
        );
    }
}

#[tokio::test]
async fn logits_are_the_golden_ones_and_do_not_depend_on_chunks() {
    let fixture = Fixture::load("qwen3_moe");
    let (shape, golden) = fixture.tensor("logits"); // [batch, sequence, vocab]
    let whole = fixture.start(Sizes {
        max_batch_tokens: 256,
        ..CONFIG
    });
    let chunked = fixture.start(Sizes {
        max_batch_tokens: 5,
        ..CONFIG
    });
    for index in 0..3 {
        let prompt = fixture.prompt(index);
        let positions: Vec<usize> = (0..prompt.len()).collect();
        let rows = logits(&whole.handle(), prompt.clone(), positions.clone()).await;
        assert_eq!(rows.len(), prompt.len());
        for (position, row) in rows.iter().enumerate() {
            let first = (index * shape[1] + position) * shape[2];
            assert_close(
                row,
                &golden[first..first + shape[2]],
                &format!("prompt {index}, position {position}"),
            );
        }
        assert!(
            logits(&chunked.handle(), prompt.clone(), positions).await == rows,
            "prompt {index}, chunked"
        );
        let some = logits(&chunked.handle(), prompt, vec![1, 4, 7, 11]).await;
        assert!(
            some == [1, 4, 7, 11].map(|position| rows[position].clone()),
            "prompt {index}, some positions"
        );
    }
    until_idle(&chunked.handle()).await;
}

#[tokio::test]
async fn a_moe_block_gives_the_golden_output_in_pieces_of_any_size() {
    let fixture = Fixture::load("qwen2_moe");
    let layers: Vec<u64> = fixture.golden["moe_layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|l| l.as_u64().unwrap())
        .collect();
    for (block, &layer) in layers.iter().enumerate() {
        let (shape, input) = fixture.tensor(&format!("moe.{block}.input"));
        let (_, golden) = fixture.tensor(&format!("moe.{block}.output"));
        let input = Array2::from_shape_vec((shape[0] * shape[1], shape[2]), input).unwrap();
        let mut outputs = Vec::new();
        for max_batch_tokens in [7, 512] {
            let engine = fixture.start(Sizes {
                max_batch_tokens,
                ..CONFIG
            });
            let layer = LayerId(u32::try_from(layer).unwrap());
            let request = MoeLayerRequest {
                layer,
                hidden_states: input.clone(),
            };
            let reply = engine.handle().moe_layer(request).expect("accepted");
            let output = tokio::time::timeout(PATIENCE, reply)
                .await
                .unwrap()
                .unwrap()
                .expect("rows");
            assert_eq!(output.degraded_rows, [0u32; 0]);
            let output = output.hidden_states;
            assert_close(output.as_slice().unwrap(), &golden, &format!("block {block}"));
            outputs.push(output);
            until_idle(&engine.handle()).await;
        }
        assert_eq!(outputs[0], outputs[1], "block {block}: pieces change bits");
    }
}

#[tokio::test]
async fn rows_that_no_gate_can_take_are_an_error() {
    let fixture = Fixture::load("qwen3_moe");
    let engine = fixture.start(CONFIG);
    let mut hidden_states = Array2::zeros((3, 32));
    hidden_states[[1, 4]] = f32::NAN;
    let reply = engine
        .handle()
        .moe_layer(MoeLayerRequest {
            layer: LayerId(0),
            hidden_states,
        })
        .expect("accepted");
    let output = tokio::time::timeout(PATIENCE, reply).await.unwrap().unwrap();
    assert!(matches!(output, Err(EngineError::Model(_))), "{output:?}");

    let refused = MoeLayerRequest {
        layer: LayerId(7),
        hidden_states: Array2::zeros((3, 32)),
    };
    let error = engine
        .handle()
        .moe_layer(refused)
        .expect_err("there is no such layer")
        .to_string();
    assert_eq!(error, "layer: wanted a layer with experts, one of [0, 1], found 7");
}
