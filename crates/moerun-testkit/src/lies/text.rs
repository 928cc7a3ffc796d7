//! Tokenizers, templates and generation defaults that are broken or belong to another model.

use std::{fs, path::Path};

use serde_json::json;

use super::{LIE_PROMPT, Lie, Stage};
use crate::{Family, TestkitError, edit_json};

const fn lie(name: &'static str, words: &'static [&'static str], apply: fn(&Path) -> Result<(), TestkitError>) -> Lie {
    Lie {
        name,
        family: Family::Mixtral,
        stage: Stage::Text,
        words,
        apply,
    }
}

/// A lie about generation defaults, which whoever opens the checkpoint reads.
const fn generation_lie(
    name: &'static str,
    words: &'static [&'static str],
    apply: fn(&Path) -> Result<(), TestkitError>,
) -> Lie {
    Lie {
        name,
        family: Family::Mixtral,
        stage: Stage::Weights,
        words,
        apply,
    }
}

pub(super) const LIES: &[Lie] = &[
    lie("the tokenizer is missing", &["tokenizer.json"], |dir| {
        fs::remove_file(dir.join("tokenizer.json")).map_err(TestkitError::io(dir))
    }),
    lie("the tokenizer is not JSON", &["tokenizer.json"], |dir| {
        write(dir, "tokenizer.json", "not a tokenizer")
    }),
    lie("the tokenizer is an empty object", &["tokenizer.json"], |dir| {
        write(dir, "tokenizer.json", "{}")
    }),
    lie("the tokenizer's model is unknown", &["tokenizer.json"], |dir| {
        edit_json(dir, "tokenizer.json", |tokenizer| {
            tokenizer["model"] = json!({ "type": "Abacus" })
        })
    }),
    lie("a token beyond the vocabulary", &["5000", "320"], |dir| {
        edit_json(dir, "tokenizer.json", |tokenizer| {
            tokenizer["model"]["vocab"][LIE_PROMPT] = json!(5000)
        })
    }),
    lie("the tokenizer config is not JSON", &["tokenizer_config.json"], |dir| {
        write(dir, "tokenizer_config.json", "{")
    }),
    Lie {
        name: "the chat template does not parse",
        family: Family::Mixtral,
        stage: Stage::Chat,
        words: &["chat template", "tokenizer_config.json"],
        apply: |dir| {
            edit_json(dir, "tokenizer_config.json", |config| {
                config["chat_template"] = json!("{% for message in messages %}{{ message.content }");
            })
        },
    },
    generation_lie(
        "the generation config is not JSON",
        &["generation_config.json"],
        |dir| write(dir, "generation_config.json", "eos: 2"),
    ),
    generation_lie(
        "a temperature of text",
        &["generation_config.json", "temperature"],
        |dir| {
            edit_json(dir, "generation_config.json", |config| {
                config["temperature"] = json!("hot")
            })
        },
    ),
    generation_lie(
        "an end of generation beyond the vocabulary",
        &["generation_config.json", "eos_token_id"],
        |dir| {
            edit_json(dir, "generation_config.json", |config| {
                config["eos_token_id"] = json!([2, 99_999])
            })
        },
    ),
];

fn write(dir: &Path, file: &str, text: &str) -> Result<(), TestkitError> {
    fs::write(dir.join(file), text).map_err(TestkitError::io(dir))
}
