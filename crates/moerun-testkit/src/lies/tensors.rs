//! Well-formed files whose tensors are not those of the config.

use std::path::Path;

use super::{Lie, Stage};
use crate::{Element, Family, RawTensor, TestkitError, edit_tensor, edit_tensors};

const ATTENTION: &str = "model.layers.0.self_attn.q_proj.weight";
const EXPERT: &str = "model.layers.1.block_sparse_moe.experts.3.w2.weight";
const ROUTER: &str = "model.layers.0.block_sparse_moe.gate.weight";
const NORM: &str = "model.layers.1.input_layernorm.weight";

const fn lie(
    name: &'static str,
    family: Family,
    words: &'static [&'static str],
    apply: fn(&Path) -> Result<(), TestkitError>,
) -> Lie {
    Lie {
        name,
        family,
        stage: Stage::Weights,
        words,
        apply,
    }
}

pub(super) const LIES: &[Lie] = &[
    lie("an expert matrix is missing", Family::Mixtral, &[EXPERT], |dir| {
        drop_tensor(dir, EXPERT)
    }),
    lie("a router is missing", Family::Mixtral, &[ROUTER], |dir| {
        drop_tensor(dir, ROUTER)
    }),
    lie(
        "the embedding is missing",
        Family::Mixtral,
        &["model.embed_tokens.weight"],
        |dir| drop_tensor(dir, "model.embed_tokens.weight"),
    ),
    lie("an untied head is missing", Family::Qwen3, &["lm_head.weight"], |dir| {
        drop_tensor(dir, "lm_head.weight")
    }),
    lie(
        "a query bias is missing",
        Family::Qwen2Moe,
        &["model.layers.0.self_attn.q_proj.bias"],
        |dir| drop_tensor(dir, "model.layers.0.self_attn.q_proj.bias"),
    ),
    lie(
        "the sinks are missing",
        Family::GptOss,
        &["model.layers.1.self_attn.sinks"],
        |dir| drop_tensor(dir, "model.layers.1.self_attn.sinks"),
    ),
    lie(
        "a correction bias is missing",
        Family::DeepseekV3,
        &["model.layers.1.mlp.gate.e_score_correction_bias"],
        |dir| drop_tensor(dir, "model.layers.1.mlp.gate.e_score_correction_bias"),
    ),
    lie(
        "a shared expert is missing",
        Family::Glm4Moe,
        &["model.layers.2.mlp.shared_experts.up_proj.weight"],
        |dir| drop_tensor(dir, "model.layers.2.mlp.shared_experts.up_proj.weight"),
    ),
    lie(
        "an unknown tensor is there",
        Family::Mixtral,
        &["model.layers.0.self_attn.surprise.weight"],
        |dir| add_tensor(dir, "model.layers.0.self_attn.surprise.weight", &[32]),
    ),
    lie(
        "a layer too many",
        Family::Mixtral,
        &["model.layers.2.input_layernorm.weight"],
        |dir| add_tensor(dir, "model.layers.2.input_layernorm.weight", &[32]),
    ),
    lie(
        "an expert too many",
        Family::Mixtral,
        &["model.layers.0.block_sparse_moe.experts.8.w1.weight"],
        |dir| add_tensor(dir, "model.layers.0.block_sparse_moe.experts.8.w1.weight", &[48, 32]),
    ),
    lie(
        "a bias that the config denies",
        Family::Llama,
        &["model.layers.0.self_attn.q_proj.bias"],
        |dir| add_tensor(dir, "model.layers.0.self_attn.q_proj.bias", &[32]),
    ),
    lie(
        "a tensor of another family's name",
        Family::Mixtral,
        &["model.layers.1.mlp.gate.weight"],
        |dir| {
            edit_tensor(dir, "model.layers.1.block_sparse_moe.gate.weight", |tensor| {
                tensor.name = "model.layers.1.mlp.gate.weight".to_owned();
            })
        },
    ),
    lie(
        "an expert matrix is transposed",
        Family::Mixtral,
        &[EXPERT, "[48, 32]", "[32, 48]"],
        |dir| edit_tensor(dir, EXPERT, |tensor| tensor.shape.reverse()),
    ),
    lie(
        "a matrix is flat",
        Family::Mixtral,
        &[ATTENTION, "[1024]", "[32, 32]"],
        |dir| edit_tensor(dir, ATTENTION, |tensor| tensor.shape = vec![1024]),
    ),
    lie(
        "a matrix has a third dimension",
        Family::Qwen3Moe,
        &[ATTENTION, "[1, 64, 32]", "[64, 32]"],
        |dir| edit_tensor(dir, ATTENTION, |tensor| tensor.shape.insert(0, 1)),
    ),
    lie("a norm is too long", Family::Mixtral, &[NORM, "[33]", "[32]"], |dir| {
        edit_tensor(dir, NORM, |tensor| *tensor = zeros(NORM, &[33]))
    }),
    lie("a norm is empty", Family::Mixtral, &[NORM, "[0]", "[32]"], |dir| {
        edit_tensor(dir, NORM, |tensor| *tensor = zeros(NORM, &[0]))
    }),
    lie(
        "a stack lacks an expert",
        Family::GraniteMoe,
        &[
            "model.layers.0.block_sparse_moe.input_linear.weight",
            "[7, 64, 32]",
            "[8, 64, 32]",
        ],
        |dir| {
            let name = "model.layers.0.block_sparse_moe.input_linear.weight";
            edit_tensor(dir, name, |tensor| *tensor = zeros(name, &[7, 64, 32]))
        },
    ),
    lie("integers for a matrix", Family::Mixtral, &[ATTENTION, "I64"], |dir| {
        retype(dir, ATTENTION, "I64", 8)
    }),
    lie("doubles for a matrix", Family::Mixtral, &[ATTENTION, "F64"], |dir| {
        retype(dir, ATTENTION, "F64", 8)
    }),
    lie("truth values for a norm", Family::Mixtral, &[NORM, "BOOL"], |dir| {
        retype(dir, NORM, "BOOL", 1)
    }),
    lie("bytes for an expert", Family::Mixtral, &[EXPERT, "U8"], |dir| {
        retype(dir, EXPERT, "U8", 1)
    }),
    lie(
        "fp8 without scales",
        Family::DeepseekV3,
        &["model.layers.0.mlp.up_proj.weight", "F8_E4M3"],
        |dir| retype(dir, "model.layers.0.mlp.up_proj.weight", "F8_E4M3", 1),
    ),
];

fn drop_tensor(dir: &Path, name: &str) -> Result<(), TestkitError> {
    let mut found = false;
    edit_tensors(dir, |tensors| {
        let before = tensors.len();
        tensors.retain(|tensor| tensor.name != name);
        found |= tensors.len() < before;
    })?;
    if found {
        Ok(())
    } else {
        Err(TestkitError::MissingTensor { name: name.to_owned() })
    }
}

fn add_tensor(dir: &Path, name: &str, shape: &[usize]) -> Result<(), TestkitError> {
    edit_tensors(dir, |tensors| tensors.push(zeros(name, shape)))
}

fn zeros(name: &str, shape: &[usize]) -> RawTensor {
    RawTensor::new(name, Element::F32, shape, &vec![0.0; shape.iter().product()])
}

fn retype(dir: &Path, name: &str, dtype: &str, bytes: usize) -> Result<(), TestkitError> {
    edit_tensor(dir, name, |tensor| {
        tensor.dtype = dtype.to_owned();
        tensor.data = vec![0; tensor.shape.iter().product::<usize>() * bytes];
    })
}
