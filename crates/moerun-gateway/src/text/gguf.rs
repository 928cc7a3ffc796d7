//! The tokenizer in a GGUF file's metadata, as the `tokenizer.json` and `tokenizer_config.json` that it came from.
//!
//! What the file does not say follows llama.cpp (`llama-vocab.cpp`): which pre-tokenizer a name stands for, and whether
//! the begin-of-sequence token is added. It names no normaliser and llama.cpp has none, so text is not normalised.

mod pre_tokenizers;

use std::{cmp::Reverse, collections::HashMap, path::Path};

use moerun_weights::{GgufMetadata, WeightsError};
use pre_tokenizers::{PRE_TOKENIZERS, byte_level_step};
use serde_json::{Map, Value, json};

use crate::GatewayError;

/// What a checkpoint directory holds in two files.
pub(super) struct GgufText {
    /// As `tokenizer.json`.
    pub(super) tokenizer: Value,
    /// As `tokenizer_config.json`.
    pub(super) config: Value,
}

/// What `tokenizer.ggml.token_type` says of a token.
mod token_type {
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
    pub(super) const UNUSED: i64 = 5;
}

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const MODEL: &str = "tokenizer.ggml.model";
const PRE_TOKENIZER: &str = "tokenizer.ggml.pre";

/// Reads the tokenizer of a GGUF file.
///
/// # Errors
/// If the file has none, or one of a kind that is not known here.
pub(super) fn read(path: &Path) -> Result<GgufText, GatewayError> {
    Ok(convert(&GgufMetadata::read(path)?)?)
}

/// The tokenizer of a GGUF file as the text files of a checkpoint directory, by name.
///
/// # Errors
/// If the file has none, or one of a kind that is not known here.
pub fn gguf_text_files(path: &Path) -> Result<Vec<(String, String)>, GatewayError> {
    let GgufText { tokenizer, config } = read(path)?;
    Ok([("tokenizer.json", tokenizer), ("tokenizer_config.json", config)]
        .map(|(name, value)| (name.to_owned(), value.to_string()))
        .to_vec())
}

fn convert(metadata: &GgufMetadata) -> Result<GgufText, WeightsError> {
    let vocabulary = Vocabulary::read(metadata)?;
    let model = required(metadata, MODEL, metadata.text(MODEL)?)?;
    let (tokenizer, adds_bos) = match model {
        "gpt2" => byte_level(metadata, &vocabulary)?,
        "llama" => (sentence_piece(metadata, &vocabulary)?, true),
        other => return Err(metadata.refuse(MODEL, "gpt2 or llama", format!("{other:?}"))),
    };
    let flag = |name: &str| metadata.flag(&format!("tokenizer.ggml.{name}"));
    let mut config = Map::new();
    config.insert(
        "add_bos_token".to_owned(),
        json!(flag("add_bos_token")?.unwrap_or(adds_bos)),
    );
    config.insert(
        "add_eos_token".to_owned(),
        json!(flag("add_eos_token")?.unwrap_or(false)),
    );
    for (ours, theirs) in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")] {
        let key = format!("tokenizer.ggml.{theirs}_token_id");
        let Some(id) = metadata.token_id(&key)? else { continue };
        let wanted = || metadata.refuse(&key, format!("an id below {}", vocabulary.tokens.len()), id);
        let token = vocabulary.tokens.get(id as usize).ok_or_else(wanted)?;
        config.insert(format!("{ours}_token"), json!(token));
    }
    if let Some(template) = metadata.text("tokenizer.chat_template")? {
        config.insert("chat_template".to_owned(), json!(template));
    }
    Ok(GgufText {
        tokenizer,
        config: Value::Object(config),
    })
}

/// Tokens by id, with their types.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i64>,
    /// Ids of the tokens that are in use.
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a GgufMetadata) -> Result<Self, WeightsError> {
        const NORMAL: i64 = 1;
        let tokens = required(metadata, TOKENS, metadata.texts(TOKENS)?)?;
        let types = match metadata.integers(TYPES)? {
            Some(types) => types.to_vec(),
            None => vec![NORMAL; tokens.len()],
        };
        same_length(metadata, TYPES, types.len(), tokens.len())?;
        let mut ids = HashMap::with_capacity(tokens.len());
        for ((id, token), &kind) in (0..).zip(tokens).zip(&types) {
            if kind == token_type::UNUSED {
                continue;
            }
            if let Some(first) = ids.insert(token.as_str(), id) {
                return Err(metadata.refuse(TOKENS, "different tokens", format!("one at {first} and at {id}")));
            }
        }
        Ok(Vocabulary { tokens, types, ids })
    }

    /// Tokens that are found in text before anything else.
    fn added(&self) -> Vec<Value> {
        let added = |kind: i64| {
            matches!(
                kind,
                token_type::UNKNOWN | token_type::CONTROL | token_type::USER_DEFINED
            )
        };
        self.tokens
            .iter()
            .zip(&self.types)
            .enumerate()
            .filter(|(_, (_, kind))| added(**kind))
            .map(|(id, (content, &kind))| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": kind != token_type::USER_DEFINED,
                })
            })
            .collect()
    }
}

/// Byte-level BPE, and whether its pre-tokenizer's models begin with a token of their own.
fn byte_level(metadata: &GgufMetadata, vocabulary: &Vocabulary<'_>) -> Result<(Value, bool), WeightsError> {
    let name = required(metadata, PRE_TOKENIZER, metadata.text(PRE_TOKENIZER)?)?;
    let pre_tokenizer = PRE_TOKENIZERS
        .iter()
        .find(|known| known.names.contains(&name))
        .ok_or_else(|| {
            let known: Vec<&str> = PRE_TOKENIZERS.iter().flat_map(|known| known.names).copied().collect();
            metadata.refuse(
                PRE_TOKENIZER,
                format!("one of {}", known.join(", ")),
                format!("{name:?}"),
            )
        })?;
    let merges = required(metadata, MERGES, metadata.texts(MERGES)?)?;
    let merges: Vec<[&str; 2]> = merges
        .iter()
        .map(|merge| {
            let parts = merge
                .split_once(' ')
                .filter(|(left, right)| !left.is_empty() && !right.is_empty());
            let (left, right) = parts.ok_or_else(|| {
                let found: String = merge.chars().take(64).collect();
                metadata.refuse(MERGES, "two parts with a space between", format!("{found:?}"))
            })?;
            for part in [left, right, &format!("{left}{right}")] {
                if !vocabulary.ids.contains_key(part) {
                    let found: String = part.chars().take(64).collect();
                    return Err(metadata.refuse(
                        MERGES,
                        format!("parts and wholes among {TOKENS}"),
                        format!("{found:?}"),
                    ));
                }
            }
            Ok([left, right])
        })
        .collect::<Result<_, WeightsError>>()?;
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": vocabulary.added(),
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": (pre_tokenizer.steps)() },
        "post_processor": null,
        "decoder": byte_level_step(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre_tokenizer.ignore_merges, "vocab": vocabulary.ids, "merges": merges,
        },
    });
    Ok((tokenizer, pre_tokenizer.adds_bos))
}

/// SentencePiece with scores as BPE with byte fallback, as transformers converts it: every way to cut a token into two
/// others is a merge, ranked by the token's score.
fn sentence_piece(metadata: &GgufMetadata, vocabulary: &Vocabulary<'_>) -> Result<Value, WeightsError> {
    let scores = required(metadata, SCORES, metadata.floats(SCORES)?)?;
    same_length(metadata, SCORES, scores.len(), vocabulary.tokens.len())?;
    let space_first = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let unknown = metadata.token_id("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let unknown = vocabulary.tokens.get(unknown as usize);
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let mut normalizers = vec![replace];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if space_first {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added(),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.ids, "merges": merges_by_score(vocabulary, scores),
        },
    }))
}

/// All merges, the best score first; of equal scores longer parts first, then lower ids.
fn merges_by_score<'a>(vocabulary: &Vocabulary<'a>, scores: &[f32]) -> Vec<[&'a str; 2]> {
    // A token of a hundred characters is no word; its many cuts would cost more than they could ever give.
    const LONGEST_BYTES: usize = 512;
    let mut merges = Vec::new();
    for (&token, &id) in &vocabulary.ids {
        let (whole, score) = (vocabulary.tokens[id as usize].as_str(), scores[id as usize]);
        if token.len() > LONGEST_BYTES || score.is_nan() {
            continue;
        }
        for (at, _) in whole.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (vocabulary.ids.get(left), vocabulary.ids.get(right)) {
                let lengths = (left.chars().count(), right.chars().count());
                merges.push((score, lengths, id, left_id, right_id, [left, right]));
            }
        }
    }
    merges.sort_by(|a, b| {
        let key = |m: &(f32, (usize, usize), u32, u32, u32, [&str; 2])| (Reverse(m.1), m.2, m.3, m.4);
        b.0.total_cmp(&a.0).then_with(|| key(a).cmp(&key(b)))
    });
    merges.into_iter().map(|(.., parts)| parts).collect()
}

fn required<T>(metadata: &GgufMetadata, key: &str, value: Option<T>) -> Result<T, WeightsError> {
    value.ok_or_else(|| metadata.refuse(key, "a tokenizer in the file's metadata", "nothing"))
}

fn same_length(metadata: &GgufMetadata, key: &str, found: usize, wanted: usize) -> Result<(), WeightsError> {
    if found == wanted {
        return Ok(());
    }
    Err(metadata.refuse(key, format!("{wanted} entries, one per token"), found))
}

#[cfg(test)]
mod tests;
