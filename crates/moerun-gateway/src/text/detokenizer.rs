//! Tokens to text as they come.

use std::sync::LazyLock;

use tokenizers::DecoderWrapper;

use super::TextCodec;

/// Joins tokens to text as they come: the pieces, one after another, are the text of all tokens together (special
/// tokens left out), no piece ends within a character that may still be completed, and a token costs the same however
/// long the text already is.
#[derive(Debug)]
pub struct Detokenizer {
    codec: TextCodec,
    state: State,
}

/// How a tokenizer's decoder makes text of tokens; decides what must be kept until the text is certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Joining {
    /// Byte-level BPE: tokens are bytes, and the text is their UTF-8.
    Bytes,
    /// Tokens are text that depends on the few tokens before (a space that is stripped or added).
    Tokens {
        /// `<0xNN>` tokens stand for bytes: a run of them becomes text as a whole, when it ends.
        byte_fallback: bool,
    },
    /// Byte-level among other decoders: text that ends in U+FFFD may be incomplete.
    Mixed,
}

#[derive(Debug)]
enum State {
    /// The first one to three bytes of a character.
    Bytes(Vec<u8>),
    Tokens {
        /// Tokens whose text is out, before the first of `pending`.
        before: Vec<u32>,
        /// Tokens whose text is not out yet.
        pending: Vec<u32>,
    },
}

/// How many tokens whose text is out are decoded again, so that the next one's text is that of a token that follows
/// others. More than any decoder strips from the start of a text.
const CONTEXT_TOKENS: usize = 4;

/// With [`Joining::Mixed`], how many tokens may wait for a character to be completed: it has at most four bytes.
const MAX_WAITING_TOKENS: usize = 8;

impl Joining {
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Joining::Bytes,
            Some(DecoderWrapper::Sequence(sequence)) => {
                let parts = || sequence.get_decoders().iter();
                let byte_level = parts().any(|part| matches!(part, DecoderWrapper::ByteLevel(_)));
                if byte_level
                    && parts().all(|part| matches!(part, DecoderWrapper::ByteLevel(_) | DecoderWrapper::Fuse(_)))
                {
                    Joining::Bytes
                } else if byte_level {
                    Joining::Mixed
                } else {
                    Joining::Tokens {
                        byte_fallback: parts().any(|part| matches!(part, DecoderWrapper::ByteFallback(_))),
                    }
                }
            }
            Some(DecoderWrapper::ByteFallback(_)) => Joining::Tokens { byte_fallback: true },
            _ => Joining::Tokens { byte_fallback: false },
        }
    }
}

impl Detokenizer {
    pub(super) fn new(codec: TextCodec) -> Self {
        let state = match codec.joining() {
            Joining::Bytes => State::Bytes(Vec::new()),
            Joining::Tokens { .. } | Joining::Mixed => State::Tokens {
                before: Vec::new(),
                pending: Vec::new(),
            },
        };
        Detokenizer { codec, state }
    }

    /// The text that this token completes; empty if it is special, unknown, or the beginning of something.
    pub fn push(&mut self, id: u32) -> String {
        let tokenizer = self.codec.tokenizer();
        let Some(token) = tokenizer.id_to_token(id) else {
            return String::new();
        };
        if tokenizer.get_added_vocabulary().is_special_token(&token) {
            return String::new();
        }
        match &mut self.state {
            State::Bytes(tail) => {
                append_token_bytes(&token, tail);
                take_characters(tail)
            }
            State::Tokens { before, pending } => {
                pending.push(id);
                let waits = match self.codec.joining() {
                    Joining::Tokens { byte_fallback } => byte_fallback && is_byte_token(&token),
                    Joining::Bytes | Joining::Mixed => {
                        pending.len() < MAX_WAITING_TOKENS
                            && text_after(&self.codec, before, pending).ends_with('\u{fffd}')
                    }
                };
                if waits {
                    String::new()
                } else {
                    take_tokens(&self.codec, before, pending)
                }
            }
        }
    }

    /// The text of what was kept back; nothing may be pushed afterwards.
    pub fn finish(&mut self) -> String {
        match &mut self.state {
            State::Bytes(tail) => String::from_utf8_lossy(&std::mem::take(tail)).into_owned(),
            State::Tokens { before, pending } => take_tokens(&self.codec, before, pending),
        }
    }
}

/// Moves `pending` to `before`, of which a few stay, and returns its text.
fn take_tokens(codec: &TextCodec, before: &mut Vec<u32>, pending: &mut Vec<u32>) -> String {
    if pending.is_empty() {
        return String::new();
    }
    let text = text_after(codec, before, pending);
    before.append(pending);
    before.drain(..before.len().saturating_sub(CONTEXT_TOKENS));
    text
}

/// Text of `pending` where it follows `before`.
fn text_after(codec: &TextCodec, before: &[u32], pending: &[u32]) -> String {
    // The decoders at hand fail on no list of known tokens; an exotic one that does has no text to show.
    let decode = |ids: &[u32]| codec.decode(ids, true).unwrap_or_default();
    if before.is_empty() {
        return decode(pending);
    }
    let known = decode(before);
    let mut text = decode(&[before, pending].concat());
    // A decoder may change the end of what is out (by stripping, say): what is out stays out.
    let common = known
        .char_indices()
        .zip(text.chars())
        .find(|((_, a), b)| a != b)
        .map(|((at, _), _)| at);
    text.drain(..common.unwrap_or(known.len().min(text.len())));
    text
}

/// `<0xNN>`, with the laxness of the decoder itself.
fn is_byte_token(token: &str) -> bool {
    token.len() == 6
        && token.starts_with("<0x")
        && token.ends_with('>')
        && token
            .get(3..5)
            .is_some_and(|digits| u8::from_str_radix(digits, 16).is_ok())
}

/// The bytes that a byte-level token stands for: each character is one byte; a token with any other character (an
/// added one) stands for itself.
fn append_token_bytes(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for character in token.chars() {
        match BYTE_OF_CHARACTER.get(character as usize).copied().flatten() {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// GPT-2's printable alphabet for bytes: those that print stand for themselves, the other 68 for U+0100 and up.
static BYTE_OF_CHARACTER: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        if matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
});

/// Takes all text that is certain out of `bytes`, U+FFFD for what can be no character; leaves the beginning of one.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let may_be_completed = taken + invalid.len() == bytes.len()
            && str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if may_be_completed {
            break;
        }
        if !invalid.is_empty() {
            text.push('\u{fffd}');
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use serde_json::{Value, json};

    use super::*;
    use crate::test_checkpoints::{Dice, golden_dir, tiny_bible};

    fn streamed(codec: &TextCodec, ids: &[u32]) -> (Vec<String>, String) {
        let mut detokenizer = codec.detokenizer();
        let pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
        let all = pieces.concat() + &detokenizer.finish();
        (pieces, all)
    }

    /// A tokenizer with a byte fallback, as Llama 2's and Mixtral's are built.
    fn byte_fallback_codec(dir: &Path, decoder: &Value) -> TextCodec {
        let words = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁▁", "s", "▁a", "�", "x▁", "."];
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let vocabulary: serde_json::Map<String, Value> = words
            .into_iter()
            .map(str::to_owned)
            .chain(bytes)
            .enumerate()
            .map(|(id, token)| (token, id.into()))
            .collect();
        let special = |id: u32, content: &str| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                      "vocab": vocabulary, "merges": []}
        });
        fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        TextCodec::load(dir).unwrap()
    }

    fn llama_decoder() -> Value {
        json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
    }

    fn assert_pieces_are_the_text(name: &str, codec: &TextCodec, max_id: u32) {
        for seed in 0..300 {
            let mut dice = Dice::new(seed);
            // Few distinct ids make runs of bytes and of spaces likely.
            let alphabet: Vec<u32> = (0..1 + dice.below(12)).map(|_| dice.below(max_id)).collect();
            let narrow = dice.below(2) == 0;
            let ids: Vec<u32> = (0..dice.below(80))
                .map(|_| {
                    if narrow {
                        alphabet[dice.below(alphabet.len() as u32) as usize]
                    } else {
                        dice.below(max_id)
                    }
                })
                .collect();
            let (_, text) = streamed(codec, &ids);
            assert_eq!(
                text,
                codec.decode(&ids, true).unwrap(),
                "{name}, seed {seed}, ids {ids:?}"
            );
        }
    }

    #[test]
    fn pieces_together_are_the_text_for_any_ids_of_the_bundled_tokenizers() {
        for family in [
            "mixtral",
            "qwen3_moe",
            "switch_transformers",
            "nllb_moe",
            "nomic_moe",
            "bert",
        ] {
            assert_pieces_are_the_text(family, &TextCodec::load(&golden_dir(family)).unwrap(), 330);
        }
        assert_pieces_are_the_text("tiny-bible-moe", &TextCodec::load(&tiny_bible()).unwrap(), 4100);
    }

    #[test]
    fn pieces_together_are_the_text_with_a_byte_fallback() {
        let dir = tempfile::tempdir().unwrap();
        assert_pieces_are_the_text("llama", &byte_fallback_codec(dir.path(), &llama_decoder()), 270);
        let gemma = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]});
        assert_pieces_are_the_text("gemma", &byte_fallback_codec(dir.path(), &gemma), 270);
        let mixed = json!({"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}, {"type": "Fuse"}]});
        assert_pieces_are_the_text("byte level, fused", &byte_fallback_codec(dir.path(), &mixed), 270);
    }

    #[test]
    fn no_piece_ends_within_a_character() {
        let text = "naïve 日本語 🌍🏽 e\u{301} — “quoted” ▁x";
        let dir = tempfile::tempdir().unwrap();
        let codecs = [
            TextCodec::load(&golden_dir("mixtral")).unwrap(),
            TextCodec::load(&tiny_bible()).unwrap(),
            byte_fallback_codec(dir.path(), &llama_decoder()),
        ];
        for codec in codecs {
            let ids = codec.encode(text).unwrap();
            let (pieces, all) = streamed(&codec, &ids);
            assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
            assert_eq!(all, codec.decode(&ids, true).unwrap());
            assert!(all.contains("日本語 🌍🏽"), "{all}");
            assert!(
                pieces.iter().filter(|piece| !piece.is_empty()).count() > 5,
                "text comes as it is made"
            );
        }
    }

    #[test]
    fn half_a_character_is_shown_only_at_the_end() {
        let codec = TextCodec::load(&golden_dir("mixtral")).unwrap();
        let ids = codec.encode("日").unwrap();
        let mut detokenizer = codec.detokenizer();
        assert_eq!(detokenizer.push(ids[0]), "");
        assert_eq!(
            detokenizer.push(1),
            "",
            "a special token in between does not end the character"
        );
        assert_eq!(detokenizer.push(ids[1]), "");
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }

    #[test]
    fn spaces_stay_between_words_and_go_at_the_start() {
        let codec = TextCodec::load(&golden_dir("switch_transformers")).unwrap();
        let ids = codec.encode("and the earth and the light").unwrap();
        let (pieces, all) = streamed(&codec, &ids);
        assert_eq!(all, "and the earth and the light");
        assert!(!pieces[0].starts_with(' '));
    }

    #[test]
    fn what_is_kept_does_not_grow_with_the_text() {
        let dir = tempfile::tempdir().unwrap();
        for codec in [
            TextCodec::load(&golden_dir("mixtral")).unwrap(),
            byte_fallback_codec(dir.path(), &llama_decoder()),
        ] {
            let mut detokenizer = codec.detokenizer();
            for step in 0..5_000 {
                detokenizer.push(if step % 7 == 0 { 3 } else { 4 + step % 6 });
                let kept = match &detokenizer.state {
                    State::Bytes(tail) => tail.len(),
                    State::Tokens { before, pending } => before.len() + pending.len(),
                };
                assert!(kept <= CONTEXT_TOKENS, "step {step}: {kept}");
            }
        }
    }

    #[test]
    fn bytes_that_never_become_a_character_do_not_pile_up() {
        let codec = TextCodec::load(&golden_dir("mixtral")).unwrap();
        let first = codec.encode("日").unwrap()[0]; // e6: begins a character, ends none
        let mut detokenizer = codec.detokenizer();
        let text: String = (0..100).map(|_| detokenizer.push(first)).collect();
        assert_eq!(text, "\u{fffd}".repeat(99));
        assert_eq!(detokenizer.finish(), "\u{fffd}");
    }
}
