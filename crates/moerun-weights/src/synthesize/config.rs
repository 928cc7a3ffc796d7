//! The config of the checkpoint to be made: cut to fewer layers, in the number format that is written.

use moerun_types::{ConfigError, ModelConfig};
use serde_json::{Map, Value, json};

use super::{SynthesizeError, element::Element};

/// Parses and checks `text`, cuts it to `layers`, and gives the config with the text to be written.
pub(super) fn prepare(
    text: &str,
    layers: Option<usize>,
    dtype: Element,
) -> Result<(ModelConfig, String), SynthesizeError> {
    let whole = ModelConfig::from_json(text)?;
    let mut fields: Map<String, Value> = serde_json::from_str(text).map_err(ConfigError::from)?;
    if let Some(wanted) = layers {
        let available = whole.layers.len();
        if !(1..=available).contains(&wanted) {
            return Err(SynthesizeError::Layers { wanted, available });
        }
        cut_layers(&mut fields, wanted);
    }
    set_dtype(&mut fields, dtype);
    let text = format!("{:#}\n", Value::Object(fields));
    Ok((ModelConfig::from_json(&text)?, text))
}

/// Keeps the first `layers` layers in every field that speaks of layers.
fn cut_layers(fields: &mut Map<String, Value>, layers: usize) {
    fields.insert("num_hidden_layers".to_owned(), json!(layers));
    for per_layer in ["layer_types", "no_rope_layers"] {
        if let Some(Value::Array(entries)) = fields.get_mut(per_layer) {
            entries.truncate(layers);
        }
    }
    for of_indices in ["mlp_only_layers", "moe_layers"] {
        if let Some(Value::Array(entries)) = fields.get_mut(of_indices) {
            entries.retain(|entry| entry.as_u64().is_some_and(|index| index < layers as u64));
        }
    }
    // An index may not lie beyond the last layer, so that no layer has experts is said by an interval without multiple.
    if fields
        .get("moe_layer_start_index")
        .and_then(Value::as_u64)
        .is_some_and(|start| start >= layers as u64)
    {
        fields.insert("moe_layer_interval".to_owned(), json!(layers + 1));
    }
    for (of_position, highest) in [
        ("first_k_dense_replace", layers),
        ("moe_layer_start_index", layers - 1),
        ("moe_layer_end_index", layers - 1),
    ] {
        if let Some(value) = fields.get_mut(of_position)
            && value.as_u64().is_some_and(|position| position > highest as u64)
        {
            *value = json!(highest);
        }
    }
}

/// Names the format in the field that the config has for it, and drops what described another.
fn set_dtype(fields: &mut Map<String, Value>, dtype: Element) {
    let name = match dtype {
        Element::F32 => "float32",
        Element::Bf16 => "bfloat16",
    };
    fields.remove("quantization_config");
    let newer = fields.contains_key("dtype");
    if newer {
        fields.remove("torch_dtype");
    }
    fields.insert(if newer { "dtype" } else { "torch_dtype" }.to_owned(), json!(name));
}
