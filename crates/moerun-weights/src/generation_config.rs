//! `generation_config.json`: what the checkpoint's author thinks good defaults are.

use serde_json::{Map, Value};

use crate::WeightsError;

/// Sampling defaults and stop ids of a checkpoint.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationConfig {
    /// Ids that end a sequence; empty = those of `config.json`.
    pub eos_token_ids: Vec<u32>,
    /// Whether to sample (`false` or absent = greedy).
    pub do_sample: bool,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Keep the k likeliest tokens.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens whose probabilities reach p.
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the best.
    pub min_p: Option<f32>,
    /// Divides (multiplies, if negative) logits of tokens already seen.
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// Parses and checks the text of a `generation_config.json` of a model with `vocab_size` tokens. Absent fields and
    /// nulls are no defaults; a `top_k` of 0 means no limit, as upstream; unknown fields are ignored.
    ///
    /// # Errors
    /// A field of the wrong type or out of range is named with what was wanted and what was found.
    pub fn from_json(text: &str, vocab_size: usize) -> Result<Self, WeightsError> {
        let refuse = |reason| WeightsError::GenerationJson { reason };
        let map = match serde_json::from_str(text).map_err(|error| refuse(error.to_string()))? {
            Value::Object(map) => map,
            other => return Err(refuse(format!("wanted an object, found {}", short(&other)))),
        };
        let positive = f64::from(f32::MIN_POSITIVE)..=1e6;
        Ok(GenerationConfig {
            eos_token_ids: eos_token_ids(&map, vocab_size)?,
            do_sample: flag(&map, "do_sample")?,
            temperature: number(&map, "temperature", 0.0..=1e6)?,
            top_k: integer(&map, "top_k", 0)?.filter(|&k| k > 0),
            top_p: number(&map, "top_p", 0.0..=1.0)?,
            min_p: number(&map, "min_p", 0.0..=1.0)?,
            repetition_penalty: number(&map, "repetition_penalty", positive)?,
            max_new_tokens: integer(&map, "max_new_tokens", 1)?,
        })
    }
}

fn get<'a>(map: &'a Map<String, Value>, field: &str) -> Option<&'a Value> {
    map.get(field).filter(|value| !value.is_null())
}

fn invalid(field: &'static str, wanted: impl Into<String>, found: &Value) -> WeightsError {
    WeightsError::GenerationField {
        field,
        wanted: wanted.into(),
        found: short(found),
    }
}

fn short(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

fn eos_token_ids(map: &Map<String, Value>, vocab_size: usize) -> Result<Vec<u32>, WeightsError> {
    const FIELD: &str = "eos_token_id";
    let ids = match get(map, FIELD) {
        None => return Ok(Vec::new()),
        Some(Value::Array(ids)) => ids.as_slice(),
        Some(id) => std::slice::from_ref(id),
    };
    ids.iter()
        .map(|id| {
            id.as_u64()
                .filter(|&id| id < vocab_size as u64)
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| invalid(FIELD, format!("ids below the vocabulary's size, {vocab_size}"), id))
        })
        .collect()
}

fn flag(map: &Map<String, Value>, field: &'static str) -> Result<bool, WeightsError> {
    match get(map, field) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(invalid(field, "true or false", other)),
    }
}

fn number(
    map: &Map<String, Value>,
    field: &'static str,
    range: std::ops::RangeInclusive<f64>,
) -> Result<Option<f32>, WeightsError> {
    let Some(value) = get(map, field) else { return Ok(None) };
    match value.as_f64() {
        Some(number) if range.contains(&number) => Ok(Some(number as f32)),
        _ => Err(invalid(
            field,
            format!("a number from {:e} to {:e}", range.start(), range.end()),
            value,
        )),
    }
}

fn integer(map: &Map<String, Value>, field: &'static str, least: u32) -> Result<Option<u32>, WeightsError> {
    let Some(value) = get(map, field) else { return Ok(None) };
    match value.as_u64().and_then(|number| u32::try_from(number).ok()) {
        Some(number) if number >= least => Ok(Some(number)),
        _ => Err(invalid(
            field,
            format!("an integer from {least} to {}", u32::MAX),
            value,
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_a_released_file_are_read() {
        let text = r#"{"bos_token_id": 1, "do_sample": true, "eos_token_id": [7, 2], "temperature": 0.6, "top_k": 20,
            "top_p": 0.95, "min_p": null, "repetition_penalty": 1.05, "max_new_tokens": 128, "pad_token_id": 0}"#;
        let wanted = GenerationConfig {
            eos_token_ids: vec![7, 2],
            do_sample: true,
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            min_p: None,
            repetition_penalty: Some(1.05),
            max_new_tokens: Some(128),
        };
        assert_eq!(GenerationConfig::from_json(text, 320).unwrap(), wanted);
        assert_eq!(
            GenerationConfig::from_json("{}", 320).unwrap(),
            GenerationConfig::default()
        );
        assert_eq!(GenerationConfig::from_json(r#"{"top_k": 0}"#, 320).unwrap().top_k, None);
        assert_eq!(
            GenerationConfig::from_json(r#"{"eos_token_id": 3}"#, 320)
                .unwrap()
                .eos_token_ids,
            [3]
        );
    }

    #[test]
    fn every_bad_field_is_named() {
        for (text, field, found) in [
            (r#"{"eos_token_id": 320}"#, "eos_token_id", "320"),
            (r#"{"eos_token_id": [1, -1]}"#, "eos_token_id", "-1"),
            (r#"{"do_sample": 1}"#, "do_sample", "1"),
            (r#"{"temperature": -0.5}"#, "temperature", "-0.5"),
            (r#"{"temperature": "hot"}"#, "temperature", "hot"),
            (r#"{"top_k": -1}"#, "top_k", "-1"),
            (r#"{"top_p": 1.5}"#, "top_p", "1.5"),
            (r#"{"min_p": 2}"#, "min_p", "2"),
            (r#"{"repetition_penalty": 0}"#, "repetition_penalty", "0"),
            (r#"{"max_new_tokens": 0}"#, "max_new_tokens", "0"),
            ("[]", "object", "[]"),
        ] {
            let message = GenerationConfig::from_json(text, 320).unwrap_err().to_string();
            assert!(message.contains(field) && message.contains(found), "{text}: {message}");
        }
    }
}
