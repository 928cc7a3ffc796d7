//! fp8 blocks and MXFP4, against values worked out by hand.

use std::path::Path;

use moerun_types::{BlockRange, ExpertId, Family, LayerId, NumberFormat};
use moerun_weights::{Dtype, LayerTensor, MatrixSource, Needs, TensorRole};
use serde_json::json;

use crate::{
    directories::{assert_refused, change_config, copy_of, open},
    files::{self, RawTensor, RawTensors},
};

fn row(source: &MatrixSource<'_>, row: usize) -> Vec<f32> {
    let mut values = vec![0.0; source.cols()];
    source.read_row(row, &mut values);
    values
}

/// deepseek_v3 with blocks of 16 × 24 (the last ones short), two matrices in fp8.
pub(crate) fn fp8_checkpoint() -> (tempfile::TempDir, RawTensors) {
    let dir = copy_of(Family::DeepseekV3);
    let quantization = json!({ "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [16, 24] });
    change_config(
        dir.path(),
        json!({ "quantization_config": quantization, "dtype": "bfloat16" }),
    );
    let path = dir.path().join("model.safetensors");
    let mut tensors = files::read(&path);
    for (name, shape) in [(EXPERT, [20, 32]), (OUTPUT, [32, 40])] {
        let codes = (0..shape[0] * shape[1]).map(|index| (index % 126) as u8).collect();
        tensors.insert(name.to_owned(), RawTensor::bytes("F8_E4M3", &shape, codes));
        let scales: Vec<f32> = (1..=4).map(|block| block as f32 * 0.5).collect();
        tensors.insert(format!("{name}_scale_inv"), RawTensor::f32(&[2, 2], &scales));
    }
    files::write(&path, &tensors);
    (dir, tensors)
}

const EXPERT: &str = "model.layers.1.mlp.experts.2.gate_proj.weight";
const OUTPUT: &str = "model.layers.0.self_attn.o_proj.weight";

fn rewrite(dir: &Path, tensors: &RawTensors) {
    files::write(&dir.join("model.safetensors"), tensors);
}

/// The format's definition, not the table that the reader uses.
fn e4m3(code: usize) -> f32 {
    let (exponent, mantissa) = (code >> 3, (code & 7) as f32);
    if exponent == 0 {
        mantissa / 512.0
    } else {
        (8.0 + mantissa) * 2f32.powi(exponent as i32 - 10)
    }
}

#[test]
fn fp8_weights_are_codes_times_the_scale_of_their_block() {
    let (dir, _) = fp8_checkpoint();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.default_format(), NumberFormat::Bf16);
    let expert = checkpoint.expert(LayerId(1), ExpertId(2)).unwrap();
    assert_eq!(
        (expert.gate_proj.dtype(), expert.up_proj.dtype()),
        (Dtype::F8E4M3, Dtype::F32)
    );
    let output = checkpoint
        .matrix(TensorRole::Layer(LayerId(0), LayerTensor::OProj))
        .unwrap();
    for source in [&expert.gate_proj, &output] {
        let cols = source.cols();
        for r in 0..source.rows() {
            let wanted: Vec<f32> = (0..cols)
                .map(|c| {
                    let scale = (2 * (r / 16) + c / 24 + 1) as f32 * 0.5;
                    e4m3((r * cols + c) % 126) * scale
                })
                .collect();
            assert_eq!(row(source, r), wanted, "row {r} of {cols} columns");
            let mut part = vec![0.0; 9];
            source.read_row_part(r, 20, &mut part);
            assert_eq!(part, wanted[20..29]);
        }
    }
}

#[test]
fn fp8_scales_of_every_plain_type_are_read() {
    let (dir, mut tensors) = fp8_checkpoint();
    let rows = || {
        let checkpoint = open(dir.path()).unwrap();
        let gate = checkpoint.expert(LayerId(1), ExpertId(2)).unwrap().gate_proj;
        (0..gate.rows()).flat_map(|r| row(&gate, r)).collect::<Vec<_>>()
    };
    let wanted = rows();
    // 0.5, 1, 1.5 and 2, exact in both.
    for (dtype, scales) in [
        ("BF16", [0x3f00u16, 0x3f80, 0x3fc0, 0x4000]),
        ("F16", [0x3800, 0x3c00, 0x3e00, 0x4000]),
    ] {
        let scales = scales.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        tensors.insert(format!("{EXPERT}_scale_inv"), RawTensor::bytes(dtype, &[2, 2], scales));
        rewrite(dir.path(), &tensors);
        assert_eq!(rows(), wanted, "{dtype}");
    }
}

#[test]
fn fp8_scales_belong_to_the_hash_of_every_block_they_reach() {
    let (dir, mut tensors) = fp8_checkpoint();
    let blocks = BlockRange { first: 0, end: 3 };
    let hashes = || {
        open(dir.path())
            .unwrap()
            .expert_block_hashes(LayerId(1), ExpertId(2), blocks, 8)
            .unwrap()
    };
    let before = hashes();
    // Rows 16.. of the gate, which are in combine block 2 of 8.
    tensors.get_mut(&format!("{EXPERT}_scale_inv")).unwrap().data[3 * 4 + 2] ^= 1;
    rewrite(dir.path(), &tensors);
    let after = hashes();
    assert_eq!(before[..2], after[..2]);
    assert_ne!(before[2], after[2]);
}

#[test]
fn fp8_tensors_need_right_scales_beside_them() {
    let scale = format!("{EXPERT}_scale_inv");
    let (dir, tensors) = fp8_checkpoint();
    let mut wrong = tensors.clone();
    wrong.remove(&scale);
    rewrite(dir.path(), &wrong);
    assert_refused(dir.path(), Needs::All, &[&scale, "missing", "[2, 2]"]);

    let mut wrong = tensors.clone();
    wrong.insert(scale.clone(), RawTensor::f32(&[4], &[1.0; 4]));
    rewrite(dir.path(), &wrong);
    assert_refused(dir.path(), Needs::All, &[&scale, "[2, 2]", "[4]"]);

    let mut wrong = tensors.clone();
    for (dtype, bytes) in [("I32", 4), ("F8_E4M3", 1)] {
        wrong.insert(scale.clone(), RawTensor::bytes(dtype, &[2, 2], vec![0; 4 * bytes]));
        rewrite(dir.path(), &wrong);
        assert_refused(dir.path(), Needs::All, &[&scale, "F32", "BF16", dtype]);
    }

    let mut wrong = tensors.clone();
    wrong.insert(format!("{OUTPUT}_scale"), RawTensor::f32(&[1], &[1.0]));
    rewrite(dir.path(), &wrong);
    assert_refused(dir.path(), Needs::All, &["o_proj.weight_scale", "unexpected"]);

    let mut wrong = tensors.clone();
    wrong.insert(
        "model.norm.weight".to_owned(),
        RawTensor::bytes("F8_E4M3", &[32], vec![0; 32]),
    );
    rewrite(dir.path(), &wrong);
    assert_refused(dir.path(), Needs::All, &["model.norm.weight", "F8_E4M3"]);

    rewrite(dir.path(), &tensors);
    change_config(dir.path(), json!({ "quantization_config": null }));
    assert_refused(dir.path(), Needs::All, &["F32, F16 or BF16", "F8_E4M3"]);
}

const MXFP4_EXPERTS: &str = "model.layers.0.mlp.experts";

/// gpt_oss with 64-wide experts (so that down has two groups a row) in 4 bits.
pub(crate) fn mxfp4_checkpoint() -> tempfile::TempDir {
    let dir = copy_of(Family::GptOss);
    let changes = json!({ "quantization_config": { "quant_method": "mxfp4" }, "intermediate_size": 64 });
    change_config(dir.path(), changes);
    let path = dir.path().join("model.safetensors");
    let mut tensors = files::read(&path);
    for layer in 0..2 {
        let experts = format!("model.layers.{layer}.mlp.experts");
        for (name, shape) in [("gate_up_proj", [8, 128, 1]), ("down_proj", [8, 32, 2])] {
            tensors.remove(&format!("{experts}.{name}"));
            let groups: usize = shape.iter().product();
            let codes = (0..groups * 16).map(|byte| (byte * 7 % 256) as u8).collect();
            let exponents = (0..groups).map(|group| 120 + (group % 10) as u8).collect();
            let shape_of_codes = [shape[0], shape[1], shape[2], 16];
            tensors.insert(
                format!("{experts}.{name}_blocks"),
                RawTensor::bytes("U8", &shape_of_codes, codes),
            );
            tensors.insert(
                format!("{experts}.{name}_scales"),
                RawTensor::bytes("U8", &shape, exponents),
            );
        }
        let biases: Vec<f32> = (0..8 * 128).map(|index| index as f32).collect();
        tensors.insert(
            format!("{experts}.gate_up_proj_bias"),
            RawTensor::f32(&[8, 128], &biases),
        );
    }
    files::write(&path, &tensors);
    dir
}

/// Element `index` of group `group` of the tensors above.
fn mxfp4(group: usize, index: usize) -> f32 {
    let byte = (group * 16 + index / 2) * 7 % 256;
    let code = if index.is_multiple_of(2) { byte % 16 } else { byte / 16 };
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][code % 8];
    let sign = if code < 8 { 1.0 } else { -1.0 };
    sign * magnitude * 2f32.powi(120 + (group % 10) as i32 - 127)
}

#[test]
fn mxfp4_weights_are_codes_times_powers_of_two() {
    let dir = mxfp4_checkpoint();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.default_format(), NumberFormat::Mxfp4);
    for expert in [0, 5] {
        let source = checkpoint.expert(LayerId(0), ExpertId(expert as u16)).unwrap();
        for r in 0..64 {
            let wanted = |half| {
                (0..32)
                    .map(|c| mxfp4(expert * 128 + 2 * r + half, c))
                    .collect::<Vec<f32>>()
            };
            assert_eq!(row(&source.gate_proj, r), wanted(0), "expert {expert} row {r}");
            assert_eq!(row(&source.up_proj, r), wanted(1), "expert {expert} row {r}");
        }
        for r in 0..32 {
            let wanted: Vec<f32> = (0..64).map(|c| mxfp4((expert * 32 + r) * 2 + c / 32, c % 32)).collect();
            assert_eq!(row(&source.down_proj, r), wanted, "expert {expert} row {r}");
            for (first, length) in [(0, 1), (5, 40), (31, 2), (33, 31), (63, 1)] {
                let mut part = vec![0.0; length];
                source.down_proj.read_row_part(r, first, &mut part);
                assert_eq!(part, wanted[first..first + length], "columns {first}..");
            }
        }
        assert_eq!(source.gate_bias.unwrap()[3], (expert * 128 + 6) as f32);
        assert_eq!(source.up_bias.unwrap()[3], (expert * 128 + 7) as f32);
    }
}

#[test]
fn mxfp4_groups_belong_to_the_hash_of_every_block_they_reach() {
    let dir = mxfp4_checkpoint();
    let blocks = BlockRange { first: 0, end: 8 };
    let hashes = || {
        open(dir.path())
            .unwrap()
            .expert_block_hashes(LayerId(0), ExpertId(1), blocks, 8)
            .unwrap()
    };
    let before = hashes();
    let path = dir.path().join("model.safetensors");
    let mut tensors = files::read(&path);
    // The second group of a down row: columns 32..64, blocks 4..8.
    tensors
        .get_mut(&format!("{MXFP4_EXPERTS}.down_proj_scales"))
        .unwrap()
        .data[64 + 1] ^= 1;
    files::write(&path, &tensors);
    let after = hashes();
    let changed: Vec<usize> = (0..8).filter(|&block| before[block] != after[block]).collect();
    assert_eq!(changed, [4, 5, 6, 7]);
}

#[test]
fn mxfp4_tensors_have_their_own_types_and_shapes() {
    let dir = mxfp4_checkpoint();
    let path = dir.path().join("model.safetensors");
    let tensors = files::read(&path);
    let name = format!("{MXFP4_EXPERTS}.down_proj_scales");
    let mut wrong = tensors.clone();
    wrong.insert(name.clone(), RawTensor::f32(&[8, 32, 2], &[1.0; 512]));
    files::write(&path, &wrong);
    assert_refused(dir.path(), Needs::All, &[&name, "U8", "F32"]);
    let mut wrong = tensors;
    wrong.insert(name.clone(), RawTensor::bytes("U8", &[8, 32, 1], vec![127; 256]));
    files::write(&path, &wrong);
    assert_refused(dir.path(), Needs::All, &[&name, "[8, 32, 2]", "[8, 32, 1]"]);
}
