//! What is read of `tokenizer_config.json`: special tokens and the chat template.

use std::{fs, io::ErrorKind, path::Path};

use serde::{Deserialize, de::DeserializeOwned};

use crate::GatewayError;

/// `tokenizer_config.json`, as far as it decides anything here.
#[derive(Debug, Default, Deserialize)]
pub(super) struct TokenizerConfig {
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    bos_token: Option<TokenText>,
    eos_token: Option<TokenText>,
    unk_token: Option<TokenText>,
    pad_token: Option<TokenText>,
    chat_template: Option<TemplateText>,
}

/// A token as plain text or as the older `{"content": …}`.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenText {
    Plain(String),
    Object { content: String },
}

/// One template, or several with names.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TemplateText {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Debug, Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl TokenizerConfig {
    /// Reads `path`; a missing file is an empty config.
    pub(super) fn read(path: &Path) -> Result<Self, GatewayError> {
        Ok(read_json(path)?.unwrap_or_default())
    }

    pub(super) fn adds_bos(&self) -> bool {
        self.add_bos_token.unwrap_or(false)
    }

    pub(super) fn adds_eos(&self) -> bool {
        self.add_eos_token.unwrap_or(false)
    }

    pub(super) fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_ref().map(TokenText::text)
    }

    pub(super) fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_ref().map(TokenText::text)
    }

    /// The special tokens that templates may name, as (variable, text).
    pub(super) fn template_variables(&self) -> Vec<(&'static str, String)> {
        let tokens = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("unk_token", &self.unk_token),
            ("pad_token", &self.pad_token),
        ];
        tokens
            .into_iter()
            .filter_map(|(name, token)| Some((name, token.as_ref()?.text().to_owned())))
            .collect()
    }

    /// The chat template: of several, the one named `default`.
    pub(super) fn chat_template(&self) -> Option<&str> {
        match self.chat_template.as_ref()? {
            TemplateText::One(template) => Some(template),
            TemplateText::Named(templates) => templates
                .iter()
                .find(|named| named.name == "default")
                .map(|named| named.template.as_str()),
        }
    }
}

impl TokenText {
    fn text(&self) -> &str {
        match self {
            TokenText::Plain(text) | TokenText::Object { content: text } => text,
        }
    }
}

/// The text of a file, or `None` if there is no such file.
pub(super) fn read_optional(path: &Path) -> Result<Option<String>, GatewayError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(GatewayError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, GatewayError> {
    let malformed = |error: serde_json::Error| GatewayError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    read_optional(path)?
        .map(|text| serde_json::from_str(&text).map_err(malformed))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> TokenizerConfig {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn tokens_may_be_text_or_objects() {
        let config = parse(r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>"}"#);
        assert_eq!((config.bos_token(), config.eos_token()), (Some("<s>"), Some("</s>")));
        assert_eq!(
            config.template_variables(),
            [("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())]
        );
    }

    #[test]
    fn nothing_is_added_unless_the_config_says_so() {
        let config = parse(r#"{"bos_token": null, "add_bos_token": null}"#);
        assert!(!config.adds_bos() && !config.adds_eos() && config.bos_token().is_none());
        assert!(parse(r#"{"add_bos_token": true}"#).adds_bos());
    }

    #[test]
    fn of_several_templates_the_default_is_taken() {
        let config = parse(
            r#"{"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]}"#,
        );
        assert_eq!(config.chat_template(), Some("b"));
        assert_eq!(parse(r#"{"chat_template": "c"}"#).chat_template(), Some("c"));
        assert_eq!(parse("{}").chat_template(), None);
    }

    #[test]
    fn a_malformed_config_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer_config.json");
        fs::write(&path, "{\"bos_token\": 7}").unwrap();
        let error = TokenizerConfig::read(&path).unwrap_err();
        assert!(
            matches!(&error, GatewayError::Malformed { path: named, .. } if *named == path),
            "{error}"
        );
    }
}
