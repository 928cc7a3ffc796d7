//! What checkpoints store in blocks, against the values that other implementations give it.

use std::{fs, path::Path};

use moerun_testkit::{GgufRawTensor, GgufValue, RawFile, RawGguf, RawTensor};
use moerun_tests::{golden_dir, run_python};
use moerun_types::{ExpertId, LayerId};
use moerun_weights::{Checkpoint, LayerTensor, MatrixSource, Needs, TensorRole};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The files that the script writes.
struct Reference(TempDir);

impl Reference {
    fn compute() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        run_python(
            "formats",
            "stored_values.py",
            &[folder.path().to_str().expect("a plain path")],
        );
        Reference(folder)
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.0.path().join(file)).expect("the script wrote it")
    }

    fn stored(&self, name: &str) -> Vec<u8> {
        self.bytes(&format!("{name}.stored"))
    }

    fn values(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(&format!("{name}.values"));
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect()
    }
}

fn values(matrix: &MatrixSource<'_>) -> Vec<f32> {
    let mut values = vec![0.0; matrix.rows() * matrix.cols()];
    matrix.read_rows(0, &mut values);
    values
}

#[track_caller]
fn assert_same(what: &str, found: &[f32], wanted: &[f32]) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let both_nan = found.is_nan() && wanted.is_nan();
        assert!(
            both_nan || found.to_bits() == wanted.to_bits(),
            "{what} {index}: wanted {wanted:e}, found {found:e}"
        );
    }
}

/// A dense model of width 256 whose embedding is `data`, all else zero.
fn with_embedding(type_code: u32, rows: usize, data: Vec<u8>) -> RawGguf {
    const WIDTH: u64 = 256;
    let size = |name: &str, size: u32| (format!("llama.{name}"), GgufValue::U32(size));
    let metadata = vec![
        ("general.architecture".to_owned(), GgufValue::Text("llama".to_owned())),
        size("context_length", 64),
        size("embedding_length", WIDTH as u32),
        size("block_count", 1),
        size("feed_forward_length", 32),
        size("attention.head_count", 4),
        (
            "llama.attention.layer_norm_rms_epsilon".to_owned(),
            GgufValue::F32(1e-5),
        ),
    ];
    let mut tensors = vec![GgufRawTensor {
        name: "token_embd.weight".to_owned(),
        type_code,
        dims: vec![WIDTH, rows as u64],
        data,
    }];
    let square = ["attn_q", "attn_k", "attn_v", "attn_output"].map(|name| (name, vec![WIDTH, WIDTH]));
    let norms = ["attn_norm", "ffn_norm"].map(|name| (name, vec![WIDTH]));
    let feed_forward = [
        ("ffn_gate", vec![WIDTH, 32]),
        ("ffn_up", vec![WIDTH, 32]),
        ("ffn_down", vec![32, WIDTH]),
    ];
    let in_layer = square.into_iter().chain(norms).chain(feed_forward);
    let zeros = in_layer
        .map(|(name, dims)| (format!("blk.0.{name}.weight"), dims))
        .chain([("output_norm.weight".to_owned(), vec![WIDTH])]);
    tensors.extend(zeros.map(|(name, dims)| GgufRawTensor {
        name,
        type_code: 0,
        data: vec![0; 4 * dims.iter().product::<u64>() as usize],
        dims,
    }));
    RawGguf { metadata, tensors }
}

#[test]
fn blocks_of_gguf_have_the_values_of_its_python_package() {
    let reference = Reference::compute();
    let codes = [
        ("Q8_0", 8),
        ("Q4_0", 2),
        ("Q4_K", 12),
        ("Q5_K", 13),
        ("Q6_K", 14),
        ("MXFP4", 39),
    ];
    for (name, type_code) in codes {
        // The package's codes are integers, so it has no negative zero; ours keep the sign of MXFP4's.
        let without_sign = |values: Vec<f32>| values.iter().map(|value| value + 0.0).collect::<Vec<f32>>();
        let wanted = without_sign(reference.values(name));
        let gguf = with_embedding(type_code, wanted.len() / 256, reference.stored(name));
        let path = reference.0.path().join(format!("{name}.gguf"));
        fs::write(&path, gguf.to_bytes()).expect("a temporary folder");
        let checkpoint = Checkpoint::open(&path, Needs::All).expect("a whole model");
        let embedding = checkpoint.matrix(TensorRole::Embedding).expect("it was checked");
        assert_eq!(embedding.dtype().name(), name);
        assert_same(name, &without_sign(values(&embedding)), &wanted);
        if let Some(blocks) = embedding.row_blocks(embedding.rows() - 1) {
            let found = blocks.flat_map(|block| block.values()).collect();
            assert_same(name, &without_sign(found), &wanted[wanted.len() - 256..]);
        }
    }
}

/// A copy of a golden checkpoint with `quantization_config`, and tensors replaced.
fn quantised(family: &str, quantization: Value, change: impl FnOnce(&mut Vec<RawTensor>)) -> TempDir {
    let (golden, copy) = (golden_dir(family), TempDir::new().expect("a temporary folder"));
    let text = fs::read_to_string(golden.join("config.json")).expect("a golden checkpoint");
    let mut config: Value = serde_json::from_str(&text).expect("a config is JSON");
    config["quantization_config"] = quantization;
    fs::write(copy.path().join("config.json"), config.to_string()).expect("a temporary folder");
    let mut weights = RawFile::read(&golden.join("model.safetensors")).expect("a golden checkpoint");
    change(&mut weights.tensors);
    weights
        .write(&copy.path().join("model.safetensors"))
        .expect("a temporary folder");
    copy
}

fn open(dir: &Path) -> Checkpoint {
    Checkpoint::open(dir, Needs::All).expect("a whole model")
}

fn raw(name: &str, dtype: &str, shape: &[usize], data: Vec<u8>) -> RawTensor {
    RawTensor {
        name: name.to_owned(),
        dtype: dtype.to_owned(),
        shape: shape.to_vec(),
        data,
    }
}

#[test]
fn four_bit_codes_have_the_values_of_ml_dtypes() {
    let reference = Reference::compute();
    let dir = quantised("gpt_oss", json!({ "quant_method": "mxfp4" }), |tensors| {
        tensors.retain(|tensor| !tensor.name.ends_with("_proj") || !tensor.name.contains("experts"));
        for layer in 0..2 {
            for (name, rows) in [("gate_up_proj", 64), ("down_proj", 32)] {
                // A group of 32 codes in each row, one for each exponent but the last.
                let mut codes = reference.stored("fp4");
                let mut exponents: Vec<u8> = (0..255).collect();
                codes.resize(8 * rows * 16, 0);
                exponents.resize(8 * rows, 0);
                let name = |part| format!("model.layers.{layer}.mlp.experts.{name}_{part}");
                tensors.push(raw(&name("blocks"), "U8", &[8, rows, 1, 16], codes));
                tensors.push(raw(&name("scales"), "U8", &[8, rows, 1], exponents));
            }
        }
    });
    let checkpoint = open(dir.path());
    let found: Vec<f32> = (0..8)
        .flat_map(|expert| {
            values(
                &checkpoint
                    .expert(LayerId(1), ExpertId(expert))
                    .expect("an expert")
                    .down_proj,
            )
        })
        .collect();
    assert_same("MXFP4", &found[..255 * 32], &reference.values("fp4"));
}

#[test]
fn fp8_codes_have_the_values_of_ml_dtypes() {
    const NAME: &str = "model.layers.0.self_attn.o_proj.weight";
    // Blocks of 8 rows and 40 columns: all 256 codes under each of four scales, and 64 zeros.
    const BLOCK: usize = 8 * 40;
    let reference = Reference::compute();
    let quantization = json!({ "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 40] });
    let dir = quantised("deepseek_v3", quantization, |tensors| {
        tensors.retain(|tensor| tensor.name != NAME);
        let codes = reference.stored("fp8");
        let padded = codes
            .chunks_exact(256)
            .flat_map(|codes| codes.iter().copied().chain([0; BLOCK - 256]));
        tensors.push(raw(NAME, "F8_E4M3", &[32, 40], padded.collect()));
        tensors.push(raw(
            &format!("{NAME}_scale_inv"),
            "F32",
            &[4, 1],
            reference.bytes("fp8.scales"),
        ));
    });
    let checkpoint = open(dir.path());
    let output = checkpoint.matrix(TensorRole::Layer(LayerId(0), LayerTensor::OProj));
    let found = values(&output.expect("it was checked"));
    let found: Vec<f32> = found
        .chunks_exact(BLOCK)
        .flat_map(|block| &block[..256])
        .copied()
        .collect();
    assert_same("fp8", &found, &reference.values("fp8"));
}
