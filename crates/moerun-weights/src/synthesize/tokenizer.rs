//! A byte-level tokenizer for any vocabulary: every text can be encoded, every id can be decoded.
//!
//! Text becomes one token per byte. The ids that bytes and special tokens leave over get made-up words, which no text
//! encodes to, so that a random model's output reads as words rather than as nothing.

use std::collections::BTreeMap;

use moerun_types::ModelConfig;
use serde_json::{Value, json};

use super::SynthesizeError;

const CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\
    {{ message['content'] | trim }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";

/// A file of text that a checkpoint comes with.
pub(super) struct TextFile {
    pub(super) name: &'static str,
    pub(super) text: String,
}

/// Special tokens by id.
struct Specials {
    names: BTreeMap<u32, String>,
    turn_end: u32,
}

/// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.
pub(super) fn files(config: &ModelConfig) -> Result<Vec<TextFile>, SynthesizeError> {
    let specials = specials(config)?;
    let file = |name, value: Value| TextFile {
        name,
        text: format!("{value:#}\n"),
    };
    Ok(vec![
        file("tokenizer.json", tokenizer(config.vocab_size, &specials)),
        file("tokenizer_config.json", tokenizer_config(config, &specials)),
        file("generation_config.json", generation_config(config, &specials)),
    ])
}

/// The ids that the config names, and the two of the chat template at the lowest ids that are free.
fn specials(config: &ModelConfig) -> Result<Specials, SynthesizeError> {
    let mut names: BTreeMap<u32, String> = BTreeMap::new();
    for (i, &id) in config.eos_token_ids.iter().enumerate() {
        names
            .entry(id)
            .or_insert_with(|| if i == 0 { "</s>".to_owned() } else { format!("</s{i}>") });
    }
    for (id, name) in [(config.bos_token_id, "<s>"), (config.pad_token_id, "<pad>")] {
        if let Some(id) = id {
            names.entry(id).or_insert_with(|| name.to_owned());
        }
    }
    let wanted = names.len() + 2 + 256;
    if wanted > config.vocab_size {
        return Err(SynthesizeError::Vocabulary {
            wanted,
            found: config.vocab_size,
        });
    }
    let mut turn_end = 0;
    for name in [TURN_START, TURN_END] {
        turn_end = free_ids(&names).next().unwrap_or_default();
        names.insert(turn_end, name.to_owned());
    }
    Ok(Specials { names, turn_end })
}

fn free_ids(taken: &BTreeMap<u32, String>) -> impl Iterator<Item = u32> {
    (0..u32::MAX).filter(|id| !taken.contains_key(id))
}

fn tokenizer(vocab_size: usize, specials: &Specials) -> Value {
    let words = (0..).map(made_up_word);
    let others = (0..=u8::MAX).map(|byte| byte_character(byte).to_string()).chain(words);
    let mut vocabulary: BTreeMap<String, u32> = specials.names.iter().map(|(&id, name)| (name.clone(), id)).collect();
    let free = free_ids(&specials.names).take_while(|&id| (id as usize) < vocab_size);
    vocabulary.extend(free.zip(others).map(|(id, token)| (token, id)));
    let added_tokens: Vec<Value> = specials
        .names
        .iter()
        .map(|(id, content)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": [],
        },
    })
}

/// The character that stands for a byte in byte-level vocabularies: itself where it is printable and no space,
/// otherwise the next one from U+0100 on.
fn byte_character(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&other| !printable(other)).count() as u32;
    // At most 67 bytes are not printable, and U+0100..U+0143 are all characters.
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// A space and two or more syllables, different for every number.
fn made_up_word(number: usize) -> String {
    const CONSONANTS: &[u8] = b"bdfghklmnprstvwz";
    const VOWELS: &[u8] = b"aeiou";
    const SYLLABLES: usize = CONSONANTS.len() * VOWELS.len();
    let mut word = String::from(byte_character(b' '));
    let mut rest = number;
    let mut syllables = 0;
    while rest > 0 || syllables < 2 {
        let syllable = rest % SYLLABLES;
        word.push(char::from(CONSONANTS[syllable / VOWELS.len()]));
        word.push(char::from(VOWELS[syllable % VOWELS.len()]));
        rest /= SYLLABLES;
        syllables += 1;
    }
    word
}

fn tokenizer_config(config: &ModelConfig, specials: &Specials) -> Value {
    let name = |id: Option<u32>| id.and_then(|id| specials.names.get(&id));
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(config.bos_token_id),
        "eos_token": name(config.eos_token_ids.first().copied()).map_or(TURN_END, String::as_str),
        "pad_token": name(config.pad_token_id),
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    })
}

fn generation_config(config: &ModelConfig, specials: &Specials) -> Value {
    let mut ends = config.eos_token_ids.clone();
    ends.push(specials.turn_end);
    json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": config.pad_token_id,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn byte_characters_are_distinct_and_a_space_has_its_usual_one() {
        let characters: HashSet<char> = (0..=u8::MAX).map(byte_character).collect();
        assert_eq!(characters.len(), 256);
        assert_eq!(byte_character(b' '), 'Ġ');
        assert_eq!(byte_character(b'\n'), 'Ċ');
        assert_eq!(byte_character(b'a'), 'a');
    }

    #[test]
    fn made_up_words_are_distinct() {
        let words: HashSet<String> = (0..50_000).map(made_up_word).collect();
        assert_eq!(words.len(), 50_000);
        assert!(words.contains("Ġbaba"));
    }
}
