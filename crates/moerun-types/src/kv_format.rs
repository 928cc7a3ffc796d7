//! How keys and values are held in the cache.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How keys and values are held in the cache. Every query reads them as they are held, its own chunk's included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// IEEE single precision, as they were computed.
    #[default]
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// A byte each, with one scale in f32 per token, head and side (key or value).
    Int8,
}

impl KvFormat {
    /// All formats, the widest first.
    pub const ALL: [KvFormat; 3] = [KvFormat::F32, KvFormat::Bf16, KvFormat::Int8];
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvFormat::F32 => "f32",
            KvFormat::Bf16 => "bf16",
            KvFormat::Int8 => "int8",
        })
    }
}

impl FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        KvFormat::ALL
            .into_iter()
            .find(|format| format.to_string() == text)
            .ok_or_else(|| format!("unknown format of keys and values {text:?}: wanted f32, bf16 or int8"))
    }
}
