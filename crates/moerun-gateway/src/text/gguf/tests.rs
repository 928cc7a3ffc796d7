use std::fs;

use moerun_testkit::{GgufValue, RawGguf};
use serde_json::Value;

use crate::{
    ChatMessage, GatewayError, TextCodec,
    test_checkpoints::{golden_dir, ids_of, read_json, texts_of, tiny_bible},
};

fn codec(gguf: &RawGguf) -> Result<TextCodec, GatewayError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, gguf.to_bytes()).unwrap();
    TextCodec::load(&path)
}

fn with(gguf: &RawGguf, name: &str, value: GgufValue) -> RawGguf {
    let key = format!("tokenizer.{name}");
    let mut gguf = gguf.clone();
    gguf.metadata.retain(|(known, _)| *known != key);
    gguf.metadata.push((key, value));
    gguf
}

fn text(text: &str) -> GgufValue {
    GgufValue::Text(text.to_owned())
}

const TEXTS: [&str; 5] = [
    "In the beginning God created the heaven and the earth.",
    " two  spaces\nand lines\r\n\n  it's 1234 o'clock!?",
    "Ünïcödé 你好 🦀 <|im_end|> after",
    "",
    "x",
];

#[test]
fn a_byte_level_tokenizer_gives_the_ids_of_its_own_file() {
    let mut dirs = ["mixtral", "qwen3_moe", "olmoe"].map(golden_dir).to_vec();
    dirs.push(tiny_bible());
    for dir in dirs {
        let wanted = TextCodec::load(&dir).unwrap();
        let found = codec(&RawGguf::from_checkpoint(&dir).unwrap()).unwrap();
        for text in TEXTS {
            let ids = found.encode(text).unwrap();
            assert_eq!(ids, wanted.encode(text).unwrap(), "{}: {text}", dir.display());
            assert_eq!(found.decode(&ids, true).unwrap(), wanted.decode(&ids, true).unwrap());
        }
    }
    let found = codec(&RawGguf::from_checkpoint(&golden_dir("mixtral")).unwrap()).unwrap();
    let golden = read_json(&golden_dir("mixtral").join("golden.json"));
    for (ids, text) in golden["greedy"]
        .as_array()
        .unwrap()
        .iter()
        .zip(texts_of(&golden["greedy_text"]))
    {
        assert_eq!(found.decode(&ids_of(ids), true).unwrap(), text);
    }
}

#[test]
fn the_chat_template_and_the_first_token_are_the_files() {
    let base = RawGguf::from_checkpoint(&golden_dir("mixtral")).unwrap();
    let plain = codec(&base).unwrap();
    assert!(matches!(
        plain.render_chat(&[]),
        Err(GatewayError::NoChatTemplate { .. })
    ));
    let with_bos = with(&base, "ggml.add_bos_token", GgufValue::Flag(true));
    let with_bos = with(
        &with_bos,
        "chat_template",
        text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"),
    );
    let codec = codec(&with_bos).unwrap();
    let ids = codec.encode("light").unwrap();
    assert_eq!((ids[0], &ids[1..]), (1, &plain.encode("light").unwrap()[..]));
    let message = ChatMessage {
        role: "user".to_owned(),
        content: "hi".to_owned(),
    };
    assert_eq!(codec.render_chat(&[message]).unwrap(), "<s>hi</s>");
}

/// A SentencePiece vocabulary: unknown, two control tokens, all bytes, pieces with scores.
fn sentence_piece() -> RawGguf {
    let mut tokens: Vec<(String, f32, i32)> = vec![
        ("<unk>".to_owned(), 0.0, 2),
        ("<s>".to_owned(), 0.0, 3),
        ("</s>".to_owned(), 0.0, 3),
    ];
    tokens.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    let pieces = [
        "he", "▁t", "▁the", "er", "▁there", "re", "▁a", "▁", "t", "h", "e", "r", "a",
    ];
    tokens.extend(
        pieces
            .iter()
            .zip(1u8..)
            .map(|(piece, rank)| ((*piece).to_owned(), -f32::from(rank), 1)),
    );
    let mut gguf = RawGguf::default();
    for (key, value) in [
        ("model", text("llama")),
        (
            "tokens",
            GgufValue::Texts(tokens.iter().map(|token| token.0.clone()).collect()),
        ),
        (
            "scores",
            GgufValue::Floats(tokens.iter().map(|token| token.1).collect()),
        ),
        (
            "token_type",
            GgufValue::Ints(tokens.iter().map(|token| token.2).collect()),
        ),
        ("bos_token_id", GgufValue::U32(1)),
        ("eos_token_id", GgufValue::U32(2)),
        ("unknown_token_id", GgufValue::U32(0)),
    ] {
        gguf.metadata.push((format!("tokenizer.ggml.{key}"), value));
    }
    gguf
}

#[test]
fn sentence_pieces_merge_by_score_and_fall_back_to_bytes() {
    let codec = codec(&sentence_piece()).unwrap();
    let tokens = |text: &str| -> Vec<String> {
        let ids = codec.encode(text).unwrap();
        ids.iter().map(|&id| codec.token(id).unwrap()).collect()
    };
    assert_eq!(tokens("the"), ["<s>", "▁the"]);
    assert_eq!(tokens("there"), ["<s>", "▁there"]);
    assert_eq!(tokens("a there"), ["<s>", "▁a", "▁there"]);
    // "he" has the best score, so "r" is left over where "er" might have been.
    assert_eq!(tokens("her"), ["<s>", "▁", "he", "r"]);
    assert_eq!(tokens("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    for text in ["there a the", "é the  a", "a"] {
        assert_eq!(codec.decode(&codec.encode(text).unwrap(), true).unwrap(), text);
    }
}

#[test]
fn tokenizers_that_are_not_known_are_refused_by_name() {
    let base = RawGguf::from_checkpoint(&golden_dir("mixtral")).unwrap();
    for (name, value) in [
        ("ggml.model", text("bert")),
        ("ggml.pre", text("default")),
        ("ggml.merges", GgufValue::Texts(vec!["alone".to_owned()])),
        ("ggml.token_type", GgufValue::Ints(vec![1])),
        ("ggml.tokens", GgufValue::U32(1)),
        ("ggml.bos_token_id", GgufValue::U32(1 << 20)),
    ] {
        let error = codec(&with(&base, name, value)).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("wanted"), "{name}: {error}");
    }
    // Neither a part nor the whole of a merge may be a token that is not there.
    for (merge, missing) in [("nowhere a", "nowhere"), ("a nothing", "nothing"), ("z 0", "z0")] {
        let merges = GgufValue::Texts(vec![merge.to_owned()]);
        let error = codec(&with(&base, "ggml.merges", merges)).unwrap_err().to_string();
        let wanted =
            format!("tokenizer.ggml.merges: wanted parts and wholes among tokenizer.ggml.tokens, found {missing:?}");
        assert!(error.ends_with(&wanted), "{merge}: {error}");
    }
    assert!(
        codec(&RawGguf::default())
            .unwrap_err()
            .to_string()
            .contains("tokenizer.ggml.tokens")
    );
}

/// Ids that llama.cpp gives under each pre-tokenizer, with a vocabulary whose merges cross every boundary
/// (`tests/gguf/record_token_ids.py`).
#[test]
fn pre_tokenizers_cut_as_llama_cpp_does() {
    let recorded: Value = serde_json::from_str(include_str!("token_ids.json")).unwrap();
    let tokens = texts_of(&recorded["tokens"]);
    let texts = texts_of(&recorded["texts"]);
    let mut gguf = RawGguf::default();
    for (key, value) in [
        ("model", text("gpt2")),
        ("token_type", GgufValue::Ints(vec![1; tokens.len()])),
        ("tokens", GgufValue::Texts(tokens)),
        ("merges", GgufValue::Texts(texts_of(&recorded["merges"]))),
        ("add_bos_token", GgufValue::Flag(false)),
    ] {
        gguf.metadata.push((format!("tokenizer.ggml.{key}"), value));
    }
    let by_name = recorded["ids"].as_object().unwrap();
    for (name, ids) in by_name {
        let codec = codec(&with(&gguf, "ggml.pre", text(name))).unwrap();
        for (text, wanted) in texts.iter().zip(ids.as_array().unwrap()) {
            let found = codec.encode(text).unwrap();
            assert_eq!(found, ids_of(wanted), "{name}: {text}");
            assert_eq!(codec.decode(&found, false).unwrap(), *text, "{name}");
        }
    }
    assert_eq!(by_name.len(), 11);
}
