//! The key-value part of a GGUF header.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::cursor::Cursor;
use crate::WeightsError;

/// Most metadata entries: real files have under a hundred.
pub(super) const MAX_ENTRIES: usize = 1 << 16;
/// Length of a name, a type and one byte of value.
pub(super) const MIN_ENTRY_BYTES: usize = 8 + 4 + 1;
const MAX_KEY_BYTES: usize = 1 << 10;
/// A chat template has a few kilobytes, a token under one.
const MAX_STRING_BYTES: usize = 16 << 20;
/// No vocabulary is larger.
const MAX_ARRAY_LENGTH: usize = 1 << 24;

/// Metadata of a GGUF file by key. Integers, floats and flags keep their kind, not their width.
#[derive(Debug)]
pub struct GgufMetadata {
    path: PathBuf,
    entries: BTreeMap<String, Value>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Flags(Vec<bool>),
    Texts(Vec<String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Flag,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn read(cursor: &mut Cursor<'_>, what: &str) -> Result<Self, WeightsError> {
        const KINDS: [Kind; 13] = [
            Kind::U8,
            Kind::I8,
            Kind::U16,
            Kind::I16,
            Kind::U32,
            Kind::I32,
            Kind::F32,
            Kind::Flag,
            Kind::Text,
            Kind::Array,
            Kind::U64,
            Kind::I64,
            Kind::F64,
        ];
        let found = cursor.u32(what)?;
        let kind = usize::try_from(found).ok().and_then(|index| KINDS.get(index));
        kind.copied()
            .ok_or_else(|| cursor.refuse(format!("the type of {what}"), "0 to 12", found))
    }

    /// Bytes that a value has at least.
    fn min_bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Flag => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::Text | Kind::U64 | Kind::I64 | Kind::F64 => 8,
            Kind::Array => 12,
        }
    }
}

impl GgufMetadata {
    pub(super) fn parse(cursor: &mut Cursor<'_>, count: usize) -> Result<Self, WeightsError> {
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let key = cursor.text("a metadata key", MAX_KEY_BYTES)?;
            let kind = Kind::read(cursor, key)?;
            let value = value(cursor, key, kind)?;
            if entries.insert(key.to_owned(), value).is_some() {
                return Err(cursor.refuse(format!("metadata key {key:?}"), "it once", "it twice"));
            }
        }
        Ok(GgufMetadata {
            path: cursor.path().to_owned(),
            entries,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// A string, if the key is there; an error if it holds something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>, WeightsError> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A non-negative integer of any width.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, WeightsError> {
        self.typed(key, "a non-negative integer", |value| match value {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A token id.
    pub fn token_id(&self, key: &str) -> Result<Option<u32>, WeightsError> {
        self.typed(key, "a token id", |value| match value {
            Value::Unsigned(number) => u32::try_from(*number).ok(),
            Value::Signed(number) => u32::try_from(*number).ok(),
            _ => None,
        })
    }

    /// A floating-point number.
    pub fn float(&self, key: &str) -> Result<Option<f64>, WeightsError> {
        self.typed(key, "a finite floating-point number", |value| match value {
            Value::Float(number) => number.is_finite().then_some(*number),
            _ => None,
        })
    }

    /// A flag.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, WeightsError> {
        self.typed(key, "true or false", |value| match value {
            Value::Flag(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>, WeightsError> {
        self.typed(key, "a list of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    /// A list of integers.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>, WeightsError> {
        self.typed(key, "a list of integers", |value| match value {
            Value::Integers(integers) => Some(integers.as_slice()),
            _ => None,
        })
    }

    /// A list of single-precision numbers.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>, WeightsError> {
        self.typed(key, "a list of floating-point numbers", |value| match value {
            Value::Floats(floats) => Some(floats.as_slice()),
            _ => None,
        })
    }

    /// An error about the value of `key`.
    pub fn refuse(&self, key: &str, wanted: impl Into<String>, found: impl ToString) -> WeightsError {
        WeightsError::Gguf {
            path: self.path.clone(),
            what: key.to_owned(),
            wanted: wanted.into(),
            found: found.to_string(),
        }
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, WeightsError> {
        let Some(value) = self.entries.get(key) else {
            return Ok(None);
        };
        read(value)
            .map(Some)
            .ok_or_else(|| self.refuse(key, wanted, value.shortened()))
    }
}

impl Value {
    /// The value as an error says it, of one line whatever it is.
    fn shortened(&self) -> String {
        const LONGEST: usize = 64;
        match self {
            Value::Unsigned(number) => number.to_string(),
            Value::Signed(number) => number.to_string(),
            Value::Float(number) => format!("{number:?}"),
            Value::Flag(flag) => flag.to_string(),
            Value::Text(text) => format!("{:?}", text.chars().take(LONGEST).collect::<String>()),
            Value::Integers(list) => format!("a list of {} integers", list.len()),
            Value::Floats(list) => format!("a list of {} floating-point numbers", list.len()),
            Value::Flags(list) => format!("a list of {} flags", list.len()),
            Value::Texts(list) => format!("a list of {} strings", list.len()),
        }
    }
}

fn value(cursor: &mut Cursor<'_>, key: &str, kind: Kind) -> Result<Value, WeightsError> {
    Ok(match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Unsigned(unsigned(cursor, key, kind)?),
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => Value::Signed(signed(cursor, key, kind)?),
        Kind::F32 => Value::Float(f64::from(cursor.array(key).map(f32::from_le_bytes)?)),
        Kind::F64 => Value::Float(cursor.array(key).map(f64::from_le_bytes)?),
        Kind::Flag => Value::Flag(flag(cursor, key)?),
        Kind::Text => Value::Text(cursor.text(key, MAX_STRING_BYTES)?.to_owned()),
        Kind::Array => {
            let kind = Kind::read(cursor, key)?;
            let count = cursor.count(key, MAX_ARRAY_LENGTH, kind.min_bytes())?;
            array(cursor, key, kind, count)?
        }
    })
}

/// `count` values, for which the file has room.
fn array(cursor: &mut Cursor<'_>, key: &str, kind: Kind, count: usize) -> Result<Value, WeightsError> {
    let values = 0..count;
    Ok(match kind {
        Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Integers(
            values
                .map(|_| {
                    let number = unsigned(cursor, key, kind)?;
                    i64::try_from(number).map_err(|_| cursor.refuse(key, "integers below 2^63", number))
                })
                .collect::<Result<_, _>>()?,
        ),
        Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64 => {
            Value::Integers(values.map(|_| signed(cursor, key, kind)).collect::<Result<_, _>>()?)
        }
        Kind::F32 => Value::Floats(
            values
                .map(|_| cursor.array(key).map(f32::from_le_bytes))
                .collect::<Result<_, _>>()?,
        ),
        Kind::Flag => Value::Flags(values.map(|_| flag(cursor, key)).collect::<Result<_, _>>()?),
        Kind::Text => Value::Texts(
            values
                .map(|_| cursor.text(key, MAX_STRING_BYTES).map(str::to_owned))
                .collect::<Result<_, _>>()?,
        ),
        // No key that llama.cpp writes has these.
        Kind::F64 => return Err(cursor.refuse(key, "no list of double-precision numbers", count)),
        Kind::Array => return Err(cursor.refuse(key, "no list of lists", count)),
    })
}

fn unsigned(cursor: &mut Cursor<'_>, key: &str, kind: Kind) -> Result<u64, WeightsError> {
    match kind {
        Kind::U8 => cursor.array(key).map(|[byte]| u64::from(byte)),
        Kind::U16 => cursor.array(key).map(|bytes| u64::from(u16::from_le_bytes(bytes))),
        Kind::U32 => cursor.u32(key).map(u64::from),
        _ => cursor.u64(key),
    }
}

fn signed(cursor: &mut Cursor<'_>, key: &str, kind: Kind) -> Result<i64, WeightsError> {
    match kind {
        Kind::I8 => cursor.array(key).map(|bytes| i64::from(i8::from_le_bytes(bytes))),
        Kind::I16 => cursor.array(key).map(|bytes| i64::from(i16::from_le_bytes(bytes))),
        Kind::I32 => cursor.array(key).map(|bytes| i64::from(i32::from_le_bytes(bytes))),
        _ => cursor.array(key).map(i64::from_le_bytes),
    }
}

fn flag(cursor: &mut Cursor<'_>, key: &str) -> Result<bool, WeightsError> {
    match cursor.array(key)? {
        [0] => Ok(false),
        [1] => Ok(true),
        [other] => Err(cursor.refuse(key, "0 or 1", other)),
    }
}
