//! Row 13: experts that do not fit in memory.

use std::{
    fs::{self, File},
    io::Write,
    time::{Duration, Instant},
};

use moerun_tests::run_for;
use serde_json::{Map, json};
use tempfile::TempDir;

use super::{figure, path};

const LAYERS: usize = 64;
const EXPERTS: usize = 16;
const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 14336;

#[test]
fn row_13_experts_that_do_not_fit_are_refused_with_the_arithmetic_before_anything_is_read() {
    let folder = TempDir::new().expect("a temporary folder");
    let config = json!({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "vocab_size": 32000,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "hidden_act": "silu",
        "tie_word_embeddings": false, "torch_dtype": "float32",
    });
    fs::write(folder.path().join("config.json"), config.to_string()).expect("writable");
    let mut header = Map::new();
    let mut end = 0;
    for layer in 0..LAYERS {
        for expert in 0..EXPERTS {
            for (name, shape) in [
                ("w1", [INTERMEDIATE, HIDDEN]),
                ("w2", [HIDDEN, INTERMEDIATE]),
                ("w3", [INTERMEDIATE, HIDDEN]),
            ] {
                let begin = end;
                end += 4 * HIDDEN * INTERMEDIATE;
                header.insert(
                    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"),
                    json!({ "dtype": "F32", "shape": shape, "data_offsets": [begin, end] }),
                );
            }
        }
    }
    let header = serde_json::to_vec(&header).expect("JSON");
    let mut file = File::create(folder.path().join("model.safetensors")).expect("writable");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("writable");
    file.write_all(&header).expect("writable");
    // A hole: it takes no room on the disk.
    file.set_len((8 + header.len() + end) as u64)
        .expect("a file with a hole");

    let begun = Instant::now();
    let args = ["worker", "--model", path(folder.path()), "--listen", "127.0.0.1:0"];
    let error = run_for(&args, Duration::from_secs(20)).failed(1);
    let took = begun.elapsed();
    // What they take, all and one, and what there is.
    let whole = 4 * 3 * HIDDEN * INTERMEDIATE;
    for words in [
        end.to_string(),
        whole.to_string(),
        "bytes of memory are available".to_owned(),
    ] {
        assert!(error.contains(&words), "{words:?} is not in: {error}");
    }
    let said = error.lines().last().unwrap_or_default();
    figure(
        13,
        format!(
            "a worker refuses experts of {} GiB in {:.0} ms with exit code 1: {said}",
            end >> 30,
            took.as_secs_f64() * 1e3
        ),
    );
}
