//! Malformed checkpoints: a golden one with one lie told about it.

mod config;
mod files;
mod index;
mod tensors;
mod text;

use std::path::Path;

use crate::{Family, TestkitError, copy_checkpoint, golden_dir};

/// When a lie must be found out at the latest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// When the directory is opened by someone who needs all of it: `forward`, `serve`, `generate`.
    Weights,
    /// When the text [`LIE_PROMPT`] is to be continued: `generate --prompt`.
    Text,
    /// When a conversation that says [`LIE_PROMPT`] is: `generate --chat`.
    Chat,
}

/// The prompt on which lies about text show.
pub const LIE_PROMPT: &str = "x";

/// One way in which a checkpoint can be wrong.
#[derive(Clone, Copy)]
pub struct Lie {
    /// What is wrong, as a name for a directory and a message.
    pub name: &'static str,
    /// Golden checkpoint that it is told about.
    pub family: Family,
    /// Who has to notice.
    pub stage: Stage,
    /// What the error message must contain, all of it, in any case of letters.
    pub words: &'static [&'static str],
    apply: fn(&Path) -> Result<(), TestkitError>,
}

impl std::fmt::Debug for Lie {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}): {:?}", self.name, self.family.model_type(), self.words)
    }
}

impl Lie {
    /// Writes the golden checkpoint into `dir`, which is created, and tells the lie. A lie about links leaves a file
    /// beside `dir`, so give it a folder of its own.
    pub fn write(&self, dir: &Path) -> Result<(), TestkitError> {
        copy_checkpoint(&golden_dir(self.family), dir)?;
        (self.apply)(dir)
    }

    /// The words that an error message lacks.
    pub fn missing_words(&self, message: &str) -> Vec<&'static str> {
        let message = message.to_lowercase();
        self.words
            .iter()
            .copied()
            .filter(|word| !message.contains(&word.to_lowercase()))
            .collect()
    }
}

/// All lies, each with a name of its own.
pub fn lies() -> Vec<Lie> {
    [tensors::LIES, files::LIES, index::LIES, config::LIES, text::LIES].concat()
}
