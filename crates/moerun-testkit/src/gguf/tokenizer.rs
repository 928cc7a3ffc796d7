//! The tokenizer as the converter writes it into the metadata.

use serde_json::Value;

use super::{GgufValue, metadata};

/// A byte-level tokenizer with the pre-tokenizer of GPT-2. Ids that the tokenizer does not use are written as unused,
/// as the converter does.
pub(super) fn entries(json: &Value, config: &Value) -> Vec<(String, GgufValue)> {
    const NORMAL: i32 = 1;
    const CONTROL: i32 = 3;
    const UNUSED: i32 = 5;
    let size = metadata::size(config, "vocab_size").unwrap_or(0) as usize;
    let mut tokens: Vec<(String, i32)> = (0..size).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        if let Some(slot) = id.as_u64().and_then(|id| tokens.get_mut(id as usize)) {
            *slot = (token.clone(), NORMAL);
        }
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let slot = added["id"].as_u64().and_then(|id| tokens.get_mut(id as usize));
        if let (Some(slot), Some(content)) = (slot, added["content"].as_str()) {
            *slot = (content.to_owned(), CONTROL);
        }
    }
    let merges = json["model"]["merges"].as_array().into_iter().flatten().map(|merge| {
        let parts = merge.as_array().into_iter().flatten().filter_map(Value::as_str);
        let joined = parts.collect::<Vec<_>>().join(" ");
        merge.as_str().map_or(joined, str::to_owned)
    });
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let text = |text: &str| GgufValue::Text(text.to_owned());
    let mut entries = vec![
        (key("model"), text("gpt2")),
        (key("pre"), text("gpt-2")),
        (key("merges"), GgufValue::Texts(merges.collect())),
        (key("add_bos_token"), GgufValue::Flag(false)),
    ];
    for (ours, theirs) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        let id = config[format!("{ours}_token_id")].as_u64();
        entries.extend(id.map(|id| (key(&format!("{theirs}_token_id")), GgufValue::U32(id as u32))));
    }
    let (tokens, types) = tokens.into_iter().unzip();
    entries.push((key("tokens"), GgufValue::Texts(tokens)));
    entries.push((key("token_type"), GgufValue::Ints(types)));
    entries
}
