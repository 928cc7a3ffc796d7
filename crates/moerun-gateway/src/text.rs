//! Text on one side, token ids on the other.

mod chat_template;
mod clock;
mod codec;
mod detokenizer;
mod gguf;
mod json_filter;
mod stop_strings;
mod tokenizer_config;

pub use chat_template::ChatMessage;
pub use codec::TextCodec;
pub use detokenizer::Detokenizer;
pub use gguf::gguf_text_files;
pub use stop_strings::{Checked, MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS, StopStrings};
