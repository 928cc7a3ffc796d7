//! GGUF files made from the golden checkpoints: the same config, the same tensors bit for bit.

use std::{fs, path::PathBuf};

use moerun_testkit::{GgufValue, RawGguf};
use moerun_types::{ExpertId, Family, ModelConfig, RopeScaling, StoredDtype};
use moerun_weights::{Checkpoint, Dtype, MatrixSource, ModelPart, Needs, WeightsError, expected_tensors};
use serde_json::{Value, json};

use crate::{
    directories::{change_config, copy_of, golden},
    quantised::mxfp4_checkpoint,
};

/// Families that the writer and the reader know, with what of their golden configs a GGUF file cannot say: gpt-oss files
/// are of models with a limit of 7, llama4 files of models with chunks of 8192, and V2's groups are taken in another way
/// by llama.cpp. llama's rotary scaling becomes a tensor and is tested apart.
fn families() -> Vec<(Family, Value)> {
    let plain = [
        Family::Mixtral,
        Family::Qwen2Moe,
        Family::Qwen3Moe,
        Family::Olmoe,
        Family::GraniteMoe,
        Family::Qwen3,
        Family::DeepseekV3,
        Family::Glm4Moe,
        Family::Ernie45Moe,
    ];
    let mut families = plain.map(|family| (family, json!({}))).to_vec();
    families.push((Family::GptOss, json!({ "swiglu_limit": 7.0 })));
    families.push((Family::DeepseekV2, one_group()));
    families.push((
        Family::Llama4Text,
        json!({ "attention_chunk_size": 8192, "floor_scale": 8192 }),
    ));
    families
}

fn one_group() -> Value {
    json!({ "topk_method": "greedy", "n_group": 1, "topk_group": 1 })
}

/// A copy of a golden checkpoint with its tokenizer and another config.
fn changed(family: Family, changes: Value) -> tempfile::TempDir {
    let dir = copy_of(family);
    change_config(dir.path(), changes);
    add_tokenizer(&dir);
    dir
}

fn add_tokenizer(dir: &tempfile::TempDir) {
    const NAME: &str = "tokenizer.json";
    fs::copy(golden(Family::GptOss).join(NAME), dir.path().join(NAME)).unwrap();
}

fn write(gguf: &RawGguf) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, gguf.to_bytes()).unwrap();
    (folder, path)
}

fn open(gguf: &RawGguf) -> Result<Checkpoint, WeightsError> {
    let (_folder, path) = write(gguf);
    Checkpoint::open(&path, Needs::All)
}

fn bits(source: &MatrixSource<'_>) -> Vec<u32> {
    let mut values = vec![0.0; source.rows() * source.cols()];
    source.read_rows(0, &mut values);
    values.iter().map(|value| value.to_bits()).collect()
}

/// What only a directory, or only a GGUF file, says of the model.
fn without_origin(config: &ModelConfig) -> ModelConfig {
    ModelConfig {
        stored_dtype: Some(StoredDtype::F32),
        ..config.clone()
    }
}

fn assert_same_tensors(family: Family, directory: &Checkpoint, gguf: &Checkpoint) {
    for tensor in expected_tensors(directory.config()) {
        let ModelPart::Dense(role) = tensor.part else { continue };
        if tensor.shape.len() == 2 && tensor.shape[0] > 1 {
            let (wanted, found) = (directory.matrix(role).unwrap(), gguf.matrix(role).unwrap());
            assert_eq!(bits(&found), bits(&wanted), "{family:?} {role:?}");
            let (first, end) = (wanted.cols() / 3, wanted.cols() - 1);
            let [mut part, mut whole] = [vec![0.0; end - first], vec![0.0; wanted.cols()]];
            for row in 0..wanted.rows() {
                found.read_row_part(row, first, &mut part);
                wanted.read_row(row, &mut whole);
                assert_eq!(part, whole[first..end], "{family:?} {role:?} row {row}");
            }
        } else {
            let (wanted, found) = (directory.vector(role).unwrap(), gguf.vector(role).unwrap());
            assert_eq!(found, wanted, "{family:?} {role:?}");
        }
    }
    let experts = directory.config().moe.as_ref().map_or(0, |moe| moe.num_experts);
    for layer in directory.config().moe_layers() {
        for expert in (0..experts as u16).map(ExpertId) {
            let wanted = directory.expert(layer, expert).unwrap();
            let found = gguf.expert(layer, expert).unwrap();
            assert_eq!(bits(&found.gate_proj), bits(&wanted.gate_proj), "{family:?}");
            assert_eq!(bits(&found.up_proj), bits(&wanted.up_proj), "{family:?}");
            assert_eq!(bits(&found.down_proj), bits(&wanted.down_proj), "{family:?}");
            assert_eq!(found.gate_bias, wanted.gate_bias, "{family:?}");
            assert_eq!(found.up_bias, wanted.up_bias, "{family:?}");
            assert_eq!(found.down_bias, wanted.down_bias, "{family:?}");
        }
    }
}

#[test]
fn a_gguf_file_is_the_checkpoint_it_was_made_from() {
    for (family, changes) in families() {
        let dir = changed(family, changes);
        let directory = Checkpoint::open(dir.path(), Needs::All).unwrap();
        let gguf =
            open(&RawGguf::from_checkpoint(dir.path()).unwrap()).unwrap_or_else(|error| panic!("{family:?}: {error}"));
        assert_eq!(
            without_origin(gguf.config()),
            without_origin(directory.config()),
            "{family:?}"
        );
        assert_same_tensors(family, &directory, &gguf);
    }
}

#[test]
fn four_bit_experts_keep_their_codes() {
    let dir = mxfp4_checkpoint();
    change_config(dir.path(), json!({ "swiglu_limit": 7.0 }));
    add_tokenizer(&dir);
    let directory = Checkpoint::open(dir.path(), Needs::All).unwrap();
    let gguf = open(&RawGguf::from_checkpoint(dir.path()).unwrap()).unwrap();
    assert_same_tensors(Family::GptOss, &directory, &gguf);
    let layer = directory.config().moe_layers()[0];
    let [wanted, found] = [&directory, &gguf].map(|checkpoint| checkpoint.expert(layer, ExpertId(3)).unwrap());
    for (wanted, found) in [
        (&wanted.gate_proj, &found.gate_proj),
        (&wanted.up_proj, &found.up_proj),
        (&wanted.down_proj, &found.down_proj),
    ] {
        for row in 0..wanted.rows() {
            let [wanted, found] = [wanted, found].map(|matrix| matrix.row_blocks(row).unwrap().collect::<Vec<_>>());
            assert_eq!(found, wanted, "row {row}");
        }
    }
}

#[test]
fn layers_that_predict_further_tokens_are_skipped() {
    let dir = golden(Family::Glm4Moe);
    let mut gguf = RawGguf::from_checkpoint(&dir).unwrap();
    let layers = Checkpoint::open(&dir, Needs::All).unwrap().config().layers.len();
    let mut further: Vec<_> = gguf
        .tensors
        .iter()
        .filter(|tensor| tensor.name.starts_with("blk.1."))
        .cloned()
        .collect();
    let mut head = gguf.tensors[0].clone();
    head.name = "blk.1.nextn.eh_proj.weight".to_owned();
    further.push(head);
    for tensor in &mut further {
        tensor.name = tensor.name.replace("blk.1.", &format!("blk.{layers}."));
    }
    gguf.tensors.extend(further);
    for (name, value) in [("block_count", layers as u32 + 1), ("nextn_predict_layers", 1)] {
        let key = format!("glm4moe.{name}");
        gguf.metadata.retain(|(known, _)| *known != key);
        gguf.metadata.push((key, GgufValue::U32(value)));
    }
    let found = open(&gguf).unwrap();
    assert_eq!(found.config().layers.len(), layers);
    assert_same_tensors(Family::Glm4Moe, &Checkpoint::open(&dir, Needs::All).unwrap(), &found);
}

#[test]
fn rotary_factors_of_a_tensor_divide_the_frequencies_at_any_length() {
    let dir = golden(Family::Llama);
    let mut gguf = RawGguf::from_checkpoint(&dir).unwrap();
    let factors = gguf
        .tensors
        .iter_mut()
        .find(|tensor| tensor.name == "rope_freqs.weight");
    let factors = factors.expect("the golden checkpoint has llama3 scaling");
    factors.data = [1.0f32, 2.0, 4.0, 8.0]
        .iter()
        .flat_map(|factor| factor.to_le_bytes())
        .collect();
    let found = open(&gguf).unwrap();
    let RopeScaling::LongRope {
        short_factor,
        long_factor,
        long_attention_factor,
        ..
    } = &found.config().rope.scaling
    else {
        panic!("{:?}", found.config().rope)
    };
    assert_eq!((short_factor, short_factor), (long_factor, &vec![1.0, 2.0, 4.0, 8.0]));
    assert_eq!(*long_attention_factor, 1.0);
    assert_same_tensors(Family::Llama, &Checkpoint::open(&dir, Needs::All).unwrap(), &found);
}

#[test]
fn quantised_blocks_are_read_whole_and_in_part() {
    let mut gguf = RawGguf::from_checkpoint(&golden(Family::Qwen3Moe)).unwrap();
    let name = "blk.0.ffn_gate_exps.weight";
    let tensor = gguf.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
    // Q8_0: one block of 32 a row, scale 0.5, code = row + column.
    let rows = tensor.dims[1..].iter().product::<u64>();
    tensor.type_code = 8;
    tensor.data = (0..rows)
        .flat_map(|row| {
            [0x00, 0x38]
                .into_iter()
                .chain((0..32).map(move |col| (row + col) as u8))
        })
        .collect();
    let checkpoint = open(&gguf).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let gate = checkpoint.expert(layer, ExpertId(1)).unwrap().gate_proj;
    assert_eq!(gate.dtype().name(), "Q8_0");
    assert!(matches!(gate.dtype(), Dtype::Block(_)));
    let mut part = [0.0; 5];
    gate.read_row_part(3, 7, &mut part);
    let first = gate.rows() as f32 + 3.0 + 7.0;
    assert_eq!(part, [0.0, 1.0, 2.0, 3.0, 4.0].map(|col| 0.5 * (first + col)));
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let base = RawGguf::from_checkpoint(&golden(Family::Qwen3Moe)).unwrap();
    let set = |key: &str, value: GgufValue| {
        let mut gguf = base.clone();
        gguf.metadata.retain(|(known, _)| known != key);
        gguf.metadata.push((key.to_owned(), value));
        open(&gguf).unwrap_err().to_string()
    };
    let text = |text: &str| GgufValue::Text(text.to_owned());
    for (key, value) in [
        ("general.architecture", text("mamba")),
        ("general.architecture", GgufValue::U32(3)),
        ("qwen3moe.attention.sliding_window", GgufValue::U32(64)),
        ("qwen3moe.rope.scaling.type", text("dynamic")),
        ("qwen3moe.attention.head_count", GgufValue::Ints(vec![4, 4])),
        ("qwen3moe.rope.dimension_count", GgufValue::U32(8)),
        ("qwen3moe.attention.layer_norm_rms_epsilon", GgufValue::F32(f32::NAN)),
        ("split.count", GgufValue::U32(2)),
        ("general.alignment", GgufValue::U32(48)),
    ] {
        let error = set(key, value);
        assert!(error.contains(key) && error.contains("wanted"), "{key}: {error}");
    }
    let few = GgufValue::Texts(vec!["a".to_owned(), "b".to_owned()]);
    let error = set("tokenizer.ggml.tokens", few);
    assert!(
        error.ends_with("tokenizer.ggml.tokens: wanted 320 tokens, one per row of token_embd.weight, found 2"),
        "{error}"
    );
    let of = |family: Family, changes: Value, key: &str, value: GgufValue| {
        let dir = changed(family, changes);
        let mut gguf = RawGguf::from_checkpoint(dir.path()).unwrap();
        gguf.metadata.retain(|(known, _)| known != key);
        gguf.metadata.push((key.to_owned(), value));
        let error = open(&gguf).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("wanted"), "{key}: {error}");
    };
    let deepseek = |key: &str, value| of(Family::DeepseekV2, one_group(), &format!("deepseek2.{key}"), value);
    deepseek("expert_group_count", GgufValue::U32(4)); // llama.cpp scores groups in another way than the model
    deepseek("expert_gating_func", GgufValue::U32(4));
    deepseek("rope.scaling.yarn_beta_fast", GgufValue::F32(16.0)); // llama.cpp does not read it
    deepseek("rope.scaling.yarn_log_multiplier", GgufValue::F32(0.0));
    deepseek("attention.key_length", GgufValue::U32(20));
    deepseek("attention.key_length_mla", GgufValue::U32(8));
    deepseek("attention.head_count_kv", GgufValue::U32(4));
    let glm = |key: &str, value| of(Family::Glm4Moe, json!({}), &format!("glm4moe.{key}"), value);
    glm("nextn_predict_layers", GgufValue::U32(3));
    glm("expert_gating_func", GgufValue::U32(1));
    glm("rope.scaling.type", text("yarn"));
    let shared = "ernie4_5-moe.expert_shared_feed_forward_length";
    of(Family::Ernie45Moe, json!({}), shared, GgufValue::U32(21));
    let mut renamed = base.clone();
    renamed.tensors[3].name = "blk.0.surprise.weight".to_owned();
    let error = open(&renamed).unwrap_err().to_string();
    assert!(error.contains("blk.0.surprise.weight"), "{error}");
}
