//! What the header of every packed file says beside its tensors.

use moerun_types::NumberFormat;
use serde_json::{Map, Value};

use crate::{WeightsError, directory::Directory, store::TensorStore};

/// Counts changes of the panels' layout and of the tensors' names and order.
const VERSION: &str = "1";

const KIND: &str = "moerun_packed";
const WEIGHTS: &str = "weights";
const EXPERT_HEADERS: &str = "expert_header_hash";
const DENSE_HEADERS: &str = "dense_header_hash";
const ROUTERS: &str = "router_hash";

/// Number format, and what a process on the original checkpoint would say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackedMetadata {
    pub(crate) format: NumberFormat,
    pub(crate) expert_header_hash: Option<String>,
    pub(crate) dense_header_hash: Option<String>,
    pub(crate) router_hash: Option<String>,
}

impl PackedMetadata {
    /// As it stands under `__metadata__`.
    pub(crate) fn to_json(&self) -> Value {
        let mut entries = Map::new();
        let mut say = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                entries.insert(name.to_owned(), Value::String(value));
            }
        };
        say(KIND, Some(VERSION.to_owned()));
        say(WEIGHTS, Some(self.format.to_string()));
        say(EXPERT_HEADERS, self.expert_header_hash.clone());
        say(DENSE_HEADERS, self.dense_header_hash.clone());
        say(ROUTERS, self.router_hash.clone());
        Value::Object(entries)
    }

    /// Reads and checks what the files of a checkpoint say, which must be the same in all of them.
    pub(crate) fn read(directory: &Directory, store: &TensorStore) -> Result<Self, WeightsError> {
        let mut all: Option<PackedMetadata> = None;
        for (file, value) in store.metadata() {
            let found = Self::parse(directory, file, value)?;
            match &all {
                None => all = Some(found),
                Some(first) if *first == found => {}
                Some(first) => {
                    let (wanted, found) = (first.to_json().to_string(), found.to_json().to_string());
                    return Err(refuse(directory, file, "__metadata__", wanted, found));
                }
            }
        }
        all.ok_or_else(|| WeightsError::NoWeights {
            dir: directory.path().to_owned(),
        })
    }

    fn parse(directory: &Directory, file: &str, value: Option<&Value>) -> Result<Self, WeightsError> {
        let text = |name: &str| match value.and_then(|value| value.get(name)) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(refuse(directory, file, name, "a string".to_owned(), other.to_string())),
        };
        let required = |name: &str, wanted: &str| {
            let nothing = || refuse(directory, file, name, wanted.to_owned(), "nothing".to_owned());
            text(name)?.ok_or_else(nothing)
        };
        let version = required(KIND, VERSION)?;
        if version != VERSION {
            return Err(refuse(directory, file, KIND, format!("version {VERSION}"), version));
        }
        let weights = required(WEIGHTS, "a number format")?;
        let unknown = |_| {
            let wanted = "f32, bf16, int8, int4 or mxfp4".to_owned();
            refuse(directory, file, WEIGHTS, wanted, weights.clone())
        };
        let format = weights.parse().map_err(unknown)?;
        Ok(PackedMetadata {
            format,
            expert_header_hash: text(EXPERT_HEADERS)?,
            dense_header_hash: text(DENSE_HEADERS)?,
            router_hash: text(ROUTERS)?,
        })
    }
}

fn refuse(directory: &Directory, file: &str, what: &str, wanted: String, found: String) -> WeightsError {
    WeightsError::Packed {
        path: directory.path().join(file),
        what: what.to_owned(),
        wanted,
        found,
    }
}
