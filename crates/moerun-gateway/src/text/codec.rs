//! A checkpoint's tokenizer and chat template.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use tokenizers::{Encoding, Tokenizer};

use super::{
    chat_template::{ChatMessage, ChatTemplate},
    detokenizer::{Detokenizer, Joining},
    gguf,
    tokenizer_config::{TokenizerConfig, read_optional},
};
use crate::GatewayError;

/// Text to token ids and back, as the checkpoint's `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`
/// say. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TextCodec {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    tokenizer: Tokenizer,
    joining: Joining,
    prepend: Option<u32>,
    append: Option<u32>,
    chat: Chat,
}

/// What became of the chat template. One that does not compile is an error of chats only.
#[derive(Debug)]
enum Chat {
    Template(Box<ChatTemplate>),
    Absent { dir: PathBuf },
    Broken { path: PathBuf, reason: String },
}

impl TextCodec {
    /// Reads the tokenizer and the chat template of a checkpoint directory or of a GGUF file. Padding and truncation that the file may
    /// ask for are switched off: no prompt is ever cut or filled up.
    ///
    /// An error if `tokenizer.json` is missing or malformed, or if a token that the config wants added is unknown.
    pub fn load(dir: &Path) -> Result<Self, GatewayError> {
        if dir.is_file() {
            return Self::load_gguf(dir);
        }
        let tokenizer = read_tokenizer(&dir.join("tokenizer.json"))?;
        let config_path = dir.join("tokenizer_config.json");
        let config = TokenizerConfig::read(&config_path)?;
        let chat = read_chat_template(dir, &config)?;
        Self::new(tokenizer, &config, config_path, chat)
    }

    /// The tokenizer in a GGUF file's metadata.
    fn load_gguf(path: &Path) -> Result<Self, GatewayError> {
        let malformed = |error: serde_json::Error| GatewayError::Malformed {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let text = gguf::read(path)?;
        let tokenizer = parse_tokenizer(path, text.tokenizer.to_string())?;
        let config: TokenizerConfig = serde_json::from_value(text.config).map_err(malformed)?;
        let chat = match config.chat_template() {
            Some(source) => compile_chat_template(path.to_owned(), source, &config),
            None => Chat::Absent { dir: path.to_owned() },
        };
        Self::new(tokenizer, &config, path.to_owned(), chat)
    }

    fn new(
        tokenizer: Tokenizer,
        config: &TokenizerConfig,
        config_path: PathBuf,
        chat: Chat,
    ) -> Result<Self, GatewayError> {
        // What the post-processor adds to an empty text it adds to every text.
        let frame = encode(&tokenizer, "")?;
        let wanted = |asked: bool, name: &str, token: Option<&str>| -> Result<Option<u32>, GatewayError> {
            if !asked {
                return Ok(None);
            }
            let malformed = |reason| GatewayError::Malformed {
                path: config_path.clone(),
                reason,
            };
            let token = token.ok_or_else(|| malformed(format!("add_{name} is true but {name} is not given")))?;
            let unknown = || malformed(format!("{name} {token:?} is not in the tokenizer"));
            tokenizer.token_to_id(token).ok_or_else(unknown).map(Some)
        };
        let bos = wanted(config.adds_bos(), "bos_token", config.bos_token())?;
        let eos = wanted(config.adds_eos(), "eos_token", config.eos_token())?;
        let inner = Inner {
            joining: Joining::of(tokenizer.get_decoder()),
            prepend: bos.filter(|id| frame.get_ids().first() != Some(id)),
            append: eos.filter(|id| frame.get_ids().last() != Some(id)),
            chat,
            tokenizer,
        };
        Ok(TextCodec { inner: Arc::new(inner) })
    }

    /// Ids of a prompt: what tokenizer.json gives with its post-processor, and the begin-of-sequence token (or, where a
    /// checkpoint wants that, the end-of-sequence token) if `tokenizer_config.json` asks for it and it is not there yet.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, GatewayError> {
        let encoding = encode(&self.inner.tokenizer, text)?;
        let ids = self
            .inner
            .prepend
            .into_iter()
            .chain(encoding.get_ids().iter().copied())
            .chain(self.inner.append);
        Ok(ids.collect())
    }

    /// Text of a conversation with the assistant's turn opened, as the model's chat template renders it.
    pub fn render_chat(&self, messages: &[ChatMessage]) -> Result<String, GatewayError> {
        match &self.inner.chat {
            Chat::Template(template) => template.render(messages),
            Chat::Absent { dir } => Err(GatewayError::NoChatTemplate { dir: dir.clone() }),
            Chat::Broken { path, reason } => Err(GatewayError::BrokenChatTemplate {
                path: path.clone(),
                reason: reason.clone(),
            }),
        }
    }

    /// Ids of a rendered conversation: the template has written all special tokens, so none is added.
    pub fn encode_rendered(&self, rendered: &str) -> Result<Vec<u32>, GatewayError> {
        let encoding = self
            .inner
            .tokenizer
            .encode_fast(rendered, false)
            .map_err(|error| tokenizer_error(&*error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of token ids. Ids that the tokenizer does not know have no text: a model's vocabulary may be padded.
    pub fn decode(&self, token_ids: &[u32], skip_special_tokens: bool) -> Result<String, GatewayError> {
        self.inner
            .tokenizer
            .decode(token_ids, skip_special_tokens)
            .map_err(|error| tokenizer_error(&*error))
    }

    /// A token as it stands in the vocabulary (`Ġthe`, `▁the`, `<0x0A>`).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.tokenizer.id_to_token(id)
    }

    /// A token's text where it follows others, special tokens included; U+FFFD where it is no whole character.
    pub fn token_text(&self, id: u32) -> String {
        // Some decoders strip the space before a text's first token: the token is its own predecessor here.
        let alone = self.decode(&[id], false).unwrap_or_default();
        let twice = self.decode(&[id, id], false).unwrap_or_default();
        twice.strip_prefix(alone.as_str()).map_or(alone.clone(), str::to_owned)
    }

    /// Joins tokens to text as they come; special tokens have no text.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.clone())
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    pub(super) fn joining(&self) -> Joining {
        self.inner.joining
    }
}

/// A panic in a tokenizer that a checkpoint brought along is an error of that text. What it says may quote the text, so it is
/// not passed on.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Encoding, GatewayError> {
    catch_unwind(AssertUnwindSafe(|| tokenizer.encode_fast(text, true)))
        .map_err(|_| GatewayError::Tokenizer {
            reason: "it panicked on this input".to_owned(),
        })?
        .map_err(|error| tokenizer_error(&*error))
}

fn read_tokenizer(path: &Path) -> Result<Tokenizer, GatewayError> {
    let text = std::fs::read(path).map_err(|source| GatewayError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse_tokenizer(path, text)
}

fn parse_tokenizer(path: &Path, text: impl AsRef<[u8]>) -> Result<Tokenizer, GatewayError> {
    let malformed = |reason: String| GatewayError::Malformed {
        path: path.to_owned(),
        reason,
    };
    // The tokenizer's own reader panics on some syntax errors, and on some values.
    serde_json::from_slice::<serde::de::IgnoredAny>(text.as_ref()).map_err(|error| malformed(error.to_string()))?;
    let read = catch_unwind(AssertUnwindSafe(|| Tokenizer::from_bytes(text)));
    let read = read.map_err(|_| malformed("the tokenizer panicked while it read this".to_owned()))?;
    let mut tokenizer = read.map_err(|error| malformed(error.to_string()))?;
    tokenizer.with_padding(None);
    tokenizer
        .with_truncation(None)
        .map_err(|error| malformed(error.to_string()))?;
    Ok(tokenizer)
}

/// `chat_template.jinja` is the newer place and wins over `tokenizer_config.json`.
fn read_chat_template(dir: &Path, config: &TokenizerConfig) -> Result<Chat, GatewayError> {
    let jinja = dir.join("chat_template.jinja");
    let (path, source) = match (read_optional(&jinja)?, config.chat_template()) {
        (Some(source), _) => (jinja, source),
        (None, Some(source)) => (dir.join("tokenizer_config.json"), source.to_owned()),
        (None, None) => return Ok(Chat::Absent { dir: dir.to_owned() }),
    };
    Ok(compile_chat_template(path, &source, config))
}

fn compile_chat_template(path: PathBuf, source: &str, config: &TokenizerConfig) -> Chat {
    match ChatTemplate::compile(source, config.template_variables()) {
        Ok(template) => Chat::Template(Box::new(template)),
        Err(reason) => {
            tracing::warn!(path = %path.display(), reason, "the chat template does not compile; chats will be refused");
            Chat::Broken { path, reason }
        }
    }
}

fn tokenizer_error(error: &(dyn std::error::Error + Send + Sync + 'static)) -> GatewayError {
    GatewayError::Tokenizer {
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Value, json};

    use super::*;
    use crate::test_checkpoints::{golden_dir, ids_of, read_json, texts_of, tiny_bible};

    fn codec(family: &str) -> TextCodec {
        TextCodec::load(&golden_dir(family)).unwrap()
    }

    /// A copy of a golden tokenizer with other files beside it.
    fn altered(tokenizer: impl FnOnce(&mut Value), config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut json = read_json(&golden_dir("mixtral").join("tokenizer.json"));
        tokenizer(&mut json);
        fs::write(dir.path().join("tokenizer.json"), json.to_string()).unwrap();
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn chats_render_and_tokenise_as_the_reference_did() {
        for family in ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"] {
            let codec = codec(family);
            let chat = &read_json(&golden_dir(family).join("golden.json"))["chat"];
            let messages: Vec<ChatMessage> = chat["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|message| ChatMessage {
                    role: message["role"].as_str().unwrap().to_owned(),
                    content: message["content"].as_str().unwrap().to_owned(),
                })
                .collect();
            let rendered = codec.render_chat(&messages).unwrap();
            assert_eq!(rendered, chat["rendered"].as_str().unwrap(), "{family}");
            assert_eq!(
                codec.encode_rendered(&rendered).unwrap(),
                ids_of(&chat["ids"]),
                "{family}"
            );
        }
    }

    #[test]
    fn prompts_tokenise_as_the_reference_did() {
        // Decoders: the reference put the begin-of-sequence id before what tokenizer.json gives.
        for (family, bos) in [
            ("mixtral", Some(1)),
            ("qwen3_moe", Some(1)),
            ("gpt_oss", Some(1)),
            ("llama4_text", Some(1)),
            ("switch_transformers", None),
            ("nllb_moe", None),
        ] {
            let codec = codec(family);
            let golden = read_json(&golden_dir(family).join("golden.json"));
            for (text, prompt) in texts_of(&golden["texts"])
                .iter()
                .zip(golden["prompts"].as_array().unwrap())
            {
                let ids: Vec<u32> = bos.into_iter().chain(codec.encode(text).unwrap()).collect();
                assert_eq!(ids, ids_of(prompt), "{family}: {text}");
            }
        }
    }

    #[test]
    fn generated_text_is_the_references_text() {
        for family in [
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "gpt_oss",
            "olmoe",
            "deepseek_v3",
            "llama",
        ] {
            let codec = codec(family);
            let golden = read_json(&golden_dir(family).join("golden.json"));
            for (ids, text) in golden["greedy"]
                .as_array()
                .unwrap()
                .iter()
                .zip(texts_of(&golden["greedy_text"]))
            {
                let ids = ids_of(ids);
                assert_eq!(codec.decode(&ids, true).unwrap(), text, "{family}");
                let mut detokenizer = codec.detokenizer();
                let mut streamed: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
                streamed.push_str(&detokenizer.finish());
                assert_eq!(streamed, text, "{family}");
            }
        }
    }

    #[test]
    fn the_trained_models_prompts_and_texts_are_the_references() {
        let codec = TextCodec::load(&tiny_bible()).unwrap();
        let golden = read_json(&tiny_bible().join("golden.json"));
        for case in golden["prompts"].as_array().unwrap() {
            let mut ids = vec![0];
            ids.extend(codec.encode(case["prompt"].as_str().unwrap()).unwrap());
            assert_eq!(ids, ids_of(&case["ids"]));
            assert_eq!(
                codec.decode(&ids_of(&case["greedy"]), true).unwrap(),
                case["text"].as_str().unwrap()
            );
        }
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = TextCodec::load(dir.path()).unwrap_err();
        assert!(
            matches!(&error, GatewayError::Read { path, .. } if path.ends_with("tokenizer.json")),
            "{error}"
        );
        fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        let error = TextCodec::load(dir.path()).unwrap_err();
        assert!(
            matches!(&error, GatewayError::Malformed { path, .. } if path.ends_with("tokenizer.json")),
            "{error}"
        );
    }

    #[test]
    fn a_chat_without_a_template_is_a_typed_error() {
        let error = codec("olmoe").render_chat(&[]).unwrap_err();
        assert!(matches!(error, GatewayError::NoChatTemplate { .. }), "{error}");
        let dir = altered(|_| (), &json!({"chat_template": "{% if %}"}));
        let error = TextCodec::load(dir.path()).unwrap().render_chat(&[]).unwrap_err();
        assert!(matches!(error, GatewayError::BrokenChatTemplate { .. }), "{error}");
    }

    #[test]
    fn the_jinja_file_wins_over_the_config() {
        let dir = altered(|_| (), &json!({"chat_template": "config"}));
        fs::write(dir.path().join("chat_template.jinja"), "file\n").unwrap();
        assert_eq!(TextCodec::load(dir.path()).unwrap().render_chat(&[]).unwrap(), "file");
    }

    #[test]
    fn bos_is_added_only_if_asked_for_and_only_once() {
        let plain = TextCodec::load(altered(|_| (), &json!({"bos_token": "<s>"})).path()).unwrap();
        let bare = plain.encode("light").unwrap();
        assert_ne!(bare[0], 1);

        let asked =
            json!({"bos_token": {"content": "<s>"}, "add_bos_token": true, "eos_token": "</s>", "add_eos_token": true});
        let adding = TextCodec::load(altered(|_| (), &asked).path()).unwrap();
        let framed: Vec<u32> = [1].into_iter().chain(bare.clone()).chain([2]).collect();
        assert_eq!(adding.encode("light").unwrap(), framed);
        assert_eq!(adding.encode_rendered("light").unwrap(), bare);

        let post_processor = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        });
        let dir = altered(
            |json| json["post_processor"] = post_processor,
            &json!({"bos_token": "<s>", "add_bos_token": true}),
        );
        let once: Vec<u32> = [1].into_iter().chain(bare).collect();
        assert_eq!(TextCodec::load(dir.path()).unwrap().encode("light").unwrap(), once);
    }

    #[test]
    fn a_config_that_wants_an_unknown_token_added_is_refused() {
        for config in [
            json!({"add_bos_token": true}),
            json!({"add_bos_token": true, "bos_token": "<nowhere>"}),
        ] {
            let error = TextCodec::load(altered(|_| (), &config).path()).unwrap_err();
            assert!(matches!(error, GatewayError::Malformed { .. }), "{error}");
        }
    }

    #[test]
    fn truncation_and_padding_of_the_file_are_ignored() {
        let dir = altered(
            |json| {
                json["truncation"] =
                    json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
                json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                                         "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"});
            },
            &json!({}),
        );
        let text = "In the beginning God created the heaven and the earth.";
        let altered = TextCodec::load(dir.path()).unwrap().encode(text).unwrap();
        assert_eq!(altered, codec("mixtral").encode(text).unwrap());
        assert!(altered.len() > 2);
    }

    #[test]
    fn a_tokens_own_text_keeps_its_leading_space() {
        let unigram = codec("switch_transformers");
        let id = (0..184)
            .find(|&id| unigram.token(id).is_some_and(|t| t.starts_with('▁') && t.len() > 4))
            .unwrap();
        assert_eq!(unigram.token_text(id), unigram.token(id).unwrap().replace('▁', " "));
        assert_eq!(codec("mixtral").token_text(269), " the");
    }
}
