//! Configs that are not JSON, lack fields, or describe no model.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{Lie, Stage};
use crate::{Family, TestkitError, edit_json};

const FILE: &str = "config.json";

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
    lie("the config is missing", Family::Mixtral, &[FILE], |dir| {
        fs::remove_file(dir.join(FILE)).map_err(TestkitError::io(dir))
    }),
    lie("the config is empty", Family::Mixtral, &[FILE], |dir| write(dir, "")),
    lie("the config is not JSON", Family::Mixtral, &[FILE], |dir| {
        write(dir, "hidden_size = 32\n")
    }),
    lie("the config is a list", Family::Mixtral, &[FILE], |dir| write(dir, "[]")),
    lie("the config nests without end", Family::Mixtral, &[FILE], |dir| {
        write(dir, &"[".repeat(100_000))
    }),
    lie("no model type", Family::Mixtral, &["model_type"], |dir| {
        remove(dir, "model_type")
    }),
    lie(
        "an unknown model type",
        Family::Mixtral,
        &["model_type", "mamba"],
        |dir| set(dir, "model_type", json!("mamba")),
    ),
    lie("no hidden size", Family::Mixtral, &["hidden_size"], |dir| {
        remove(dir, "hidden_size")
    }),
    lie("hidden size null", Family::Mixtral, &["hidden_size"], |dir| {
        set(dir, "hidden_size", Value::Null)
    }),
    lie("hidden size zero", Family::Mixtral, &["hidden_size"], |dir| {
        set(dir, "hidden_size", json!(0))
    }),
    lie(
        "hidden size negative",
        Family::Mixtral,
        &["hidden_size", "-32"],
        |dir| set(dir, "hidden_size", json!(-32)),
    ),
    lie("hidden size text", Family::Mixtral, &["hidden_size"], |dir| {
        set(dir, "hidden_size", json!("32"))
    }),
    lie("hidden size broken", Family::Mixtral, &["hidden_size", "32.5"], |dir| {
        set(dir, "hidden_size", json!(32.5))
    }),
    lie(
        "hidden size beyond all memory",
        Family::Mixtral,
        &["hidden_size"],
        |dir| set(dir, "hidden_size", json!(1u64 << 62)),
    ),
    lie("hidden size of another model", Family::Mixtral, &["32", "40"], |dir| {
        set(dir, "hidden_size", json!(40))
    }),
    lie(
        "vocabulary of another model",
        Family::Mixtral,
        &["[320, 32]", "[400, 32]"],
        |dir| set(dir, "vocab_size", json!(400)),
    ),
    lie("no layers", Family::Mixtral, &["num_hidden_layers"], |dir| {
        set(dir, "num_hidden_layers", json!(0))
    }),
    lie(
        "a thousand million layers",
        Family::Mixtral,
        &["num_hidden_layers"],
        |dir| set(dir, "num_hidden_layers", json!(1_000_000_000)),
    ),
    lie(
        "a layer that is not there",
        Family::Mixtral,
        &["model.layers.2"],
        |dir| set(dir, "num_hidden_layers", json!(3)),
    ),
    lie("no attention heads", Family::Mixtral, &["num_attention_heads"], |dir| {
        set(dir, "num_attention_heads", json!(0))
    }),
    lie(
        "heads that key heads do not divide",
        Family::Mixtral,
        &["num_key_value_heads", "3", "4"],
        |dir| set(dir, "num_key_value_heads", json!(3)),
    ),
    lie("no key heads", Family::Mixtral, &["num_key_value_heads"], |dir| {
        set(dir, "num_key_value_heads", json!(0))
    }),
    lie("an odd head dimension", Family::Qwen3Moe, &["15"], |dir| {
        set(dir, "head_dim", json!(15))
    }),
    lie("no experts", Family::Mixtral, &["experts"], |dir| {
        set(dir, "num_local_experts", json!(0))
    }),
    lie(
        "more experts per token than experts",
        Family::Mixtral,
        &["num_experts_per_tok", "9", "8"],
        |dir| set(dir, "num_experts_per_tok", json!(9)),
    ),
    lie(
        "no experts per token",
        Family::Mixtral,
        &["num_experts_per_tok"],
        |dir| set(dir, "num_experts_per_tok", json!(0)),
    ),
    lie(
        "three experts for the sparse mixer",
        Family::PhiMoe,
        &["num_experts_per_tok", "3"],
        |dir| set(dir, "num_experts_per_tok", json!(3)),
    ),
    lie(
        "experts of no width",
        Family::Qwen3Moe,
        &["moe_intermediate_size"],
        |dir| set(dir, "moe_intermediate_size", json!(0)),
    ),
    lie(
        "groups that do not divide the experts",
        Family::DeepseekV3,
        &["n_group", "3"],
        |dir| set(dir, "n_group", json!(3)),
    ),
    lie(
        "more groups kept than there are",
        Family::DeepseekV3,
        &["topk_group", "5"],
        |dir| set(dir, "topk_group", json!(5)),
    ),
    lie(
        "groups too small for the experts per token",
        Family::DeepseekV3,
        &["num_experts_per_tok"],
        |dir| set(dir, "topk_group", json!(1)),
    ),
    lie(
        "an unknown choice of experts",
        Family::DeepseekV2,
        &["topk_method", "coin_toss"],
        |dir| set(dir, "topk_method", json!("coin_toss")),
    ),
    lie(
        "latent values of no width",
        Family::DeepseekV3,
        &["v_head_dim"],
        |dir| set(dir, "v_head_dim", json!(0)),
    ),
    lie("an odd rotary part", Family::DeepseekV3, &["rotated", "7"], |dir| {
        set(dir, "qk_rope_head_dim", json!(7))
    }),
    lie(
        "an unknown activation",
        Family::Mixtral,
        &["hidden_act", "sine"],
        |dir| set(dir, "hidden_act", json!("sine")),
    ),
    lie("an unknown rope type", Family::Mixtral, &["rope", "spiral"], |dir| {
        edit_json(dir, FILE, |config| {
            config["rope_parameters"]["rope_type"] = json!("spiral")
        })
    }),
    lie(
        "rope parameters that are a number",
        Family::Mixtral,
        &["rope_parameters"],
        |dir| set(dir, "rope_parameters", json!(1)),
    ),
    lie("a rope base of zero", Family::Mixtral, &["rope_theta"], |dir| {
        edit_json(dir, FILE, |config| config["rope_parameters"]["rope_theta"] = json!(0.0))
    }),
    lie("a negative yarn factor", Family::DeepseekV2, &["factor", "-4"], |dir| {
        edit_json(dir, FILE, |config| config["rope_parameters"]["factor"] = json!(-4.0))
    }),
    lie(
        "longrope with too few factors",
        Family::PhiMoe,
        &["short_factor"],
        |dir| {
            edit_json(dir, FILE, |config| {
                config["rope_parameters"]["short_factor"] = json!([1.0, 1.1])
            })
        },
    ),
    lie("an epsilon that is not a number", Family::Mixtral, &[FILE], |dir| {
        let text = fs::read_to_string(dir.join(FILE)).map_err(TestkitError::io(dir))?;
        write(dir, &text.replace("1e-05", "NaN").replace("1e-5", "NaN"))
    }),
    lie("a negative epsilon", Family::Mixtral, &["rms_norm_eps"], |dir| {
        set(dir, "rms_norm_eps", json!(-1e-5))
    }),
    lie("an epsilon of text", Family::Mixtral, &["rms_norm_eps"], |dir| {
        set(dir, "rms_norm_eps", json!("small"))
    }),
    lie(
        "an unknown layer type",
        Family::GptOss,
        &["layer_types", "telepathy"],
        |dir| set(dir, "layer_types", json!(["telepathy", "full_attention"])),
    ),
    lie("too few layer types", Family::GptOss, &["layer_types"], |dir| {
        set(dir, "layer_types", json!(["full_attention"]))
    }),
    lie(
        "a sliding window of nothing",
        Family::GptOss,
        &["sliding_window"],
        |dir| set(dir, "sliding_window", json!(0)),
    ),
    lie(
        "a chunk of nothing",
        Family::Llama4Text,
        &["attention_chunk_size"],
        |dir| set(dir, "attention_chunk_size", json!(0)),
    ),
    lie(
        "a MoE layer beyond the last",
        Family::Llama4Text,
        &["moe_layers", "9"],
        |dir| set(dir, "moe_layers", json!([1, 9])),
    ),
    lie("an unknown quantisation", Family::Mixtral, &["quant", "gptq"], |dir| {
        set(dir, "quantization_config", json!({ "quant_method": "gptq", "bits": 4 }))
    }),
    lie("a fraction of the end", Family::Mixtral, &["eos_token_id"], |dir| {
        set(dir, "eos_token_id", json!(2.5))
    }),
    lie(
        "an end beyond the vocabulary",
        Family::Mixtral,
        &["eos_token_id", "320"],
        |dir| set(dir, "eos_token_id", json!(320)),
    ),
];

fn write(dir: &Path, text: &str) -> Result<(), TestkitError> {
    fs::write(dir.join(FILE), text).map_err(TestkitError::io(dir))
}

fn set(dir: &Path, field: &str, value: Value) -> Result<(), TestkitError> {
    edit_json(dir, FILE, |config| config[field] = value)
}

fn remove(dir: &Path, field: &str) -> Result<(), TestkitError> {
    edit_json(dir, FILE, |config| {
        if let Some(config) = config.as_object_mut() {
            config.remove(field);
        }
    })
}
