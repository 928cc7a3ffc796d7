//! Row 15: weights that are not numbers. What they spoil is a typed error, never a token.

use moerun_loadtest::Outcome;
use moerun_testkit::{copy_checkpoint, edit_tensors};
use moerun_tests::Golden;
use tempfile::TempDir;

use super::{Load, assert_exact, figure, finished, gateway, worker};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_15_what_is_not_finite_reaches_no_sampler() {
    let golden = Golden::read("qwen3_moe");
    let folder = TempDir::new().expect("a temporary folder");
    let spoilt = folder.path().join("spoilt");
    copy_checkpoint(&golden.dir, &spoilt).expect("a copy");
    let spoil = "model.layers.1.mlp.experts.3.down_proj.weight";
    edit_tensors(&spoilt, |tensors| {
        let tensor = tensors
            .iter_mut()
            .find(|tensor| tensor.name == spoil)
            .expect("it is there");
        tensor.data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    })
    .expect("it is edited");
    let workers = [worker(&spoilt, &[]), worker(&spoilt, &[])];
    let gateway = gateway(&spoilt, &[&workers[0].addr, &workers[1].addr]);
    let history = Load::start(&gateway.addr, &golden, 40, 2).history().await;
    // Whose tokens did not need that expert has the right ones; an error is typed.
    assert_exact(&history);
    let failed: Vec<_> = history.requests.iter().filter(|it| !finished(it)).collect();
    assert!(!failed.is_empty(), "no prompt met the spoilt expert");
    for request in &failed {
        match &request.terminals[0].outcome {
            Outcome::Error { message, .. } => {
                assert!(message.contains("layer 1 expert 3"), "{message}");
            }
            other => panic!("not an error of the gateway: {other:?}"),
        }
    }
    figure(
        15,
        format!(
            "a weight that is NaN: {} of {} requests met it, each a typed error that names layer and expert; 0 other tokens",
            failed.len(),
            history.requests.len()
        ),
    );
}
