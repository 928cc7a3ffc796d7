//! `MoeLayerService`: someone else's transformer can use our experts.

use moerun_proto::v1;

use crate::harness::{Golden, assert_close, bytes_of, floats, ids, start};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_gives_the_references_output_shared_experts_included() {
    for family in ["qwen2_moe", "qwen3_moe"] {
        let golden = Golden::open(family);
        let served = start(&golden.dir).await;
        for (block, layer) in ids(&golden.json["moe_layers"]).into_iter().enumerate() {
            let (shape, input) = golden.tensor(&format!("moe.{block}.input"));
            let (_, wanted) = golden.tensor(&format!("moe.{block}.output"));
            let mask = mask(&golden);
            let hidden = shape[2];
            let rows: Vec<usize> = (0..shape[0] * shape[1]).filter(|&row| mask[row]).collect();
            let of = |values: &[f32]| -> Vec<f32> {
                rows.iter()
                    .flat_map(|row| values[row * hidden..(row + 1) * hidden].to_vec())
                    .collect()
            };
            let request = v1::RunLayerRequest {
                model: "tiny".to_owned(),
                layer,
                rows: rows.len() as u32,
                hidden_states: bytes_of(&of(&input)).into(),
            };
            let response = served.moe_layer().run_layer(request).await.unwrap();
            assert_eq!(response.metadata().get("moerun-combine-mode").unwrap(), "exact");
            let output = floats(&response.into_inner().hidden_states);
            assert_close(&output, &of(&wanted), &format!("{family}, layer {layer}"));
        }
    }
}

/// Which rows of the padded batch belong to a prompt.
fn mask(golden: &Golden) -> Vec<bool> {
    let (shape, _) = golden.tensor("hidden_final");
    let prompts = golden.prompts();
    (0..shape[0] * shape[1])
        .map(|row| row % shape[1] < prompts[row / shape[1]].len())
        .collect()
}
