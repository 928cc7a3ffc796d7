//! The header of a safetensors file: eight bytes of length, then JSON that names each tensor's type, shape and place.
//!
//! A header may have at most [`MAX_HEADER_BYTES`] (the largest released ones have under 10 MiB) and
//! [`MAX_TENSORS`] tensors with names of at most [`MAX_NAME_BYTES`]; the data must be covered without gap or overlap.

use std::{collections::HashSet, ops::Range, path::Path};

use serde::{Deserialize, de::DeserializeSeed};
use serde_json::Value;

use crate::{
    Dtype, WeightsError,
    entries::{AtMost, Entries},
};

/// Longest header.
pub(crate) const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Most tensors in one file, and in one checkpoint.
pub(crate) const MAX_TENSORS: usize = 200_000;
/// Longest name of a tensor.
pub(crate) const MAX_NAME_BYTES: usize = 512;
const MAX_RANK: usize = 8;
const LENGTH_BYTES: usize = 8;

/// Type of a tensor's elements as a header names it; only some can be read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ElementType {
    /// Its name in the header.
    pub(crate) name: &'static str,
    /// Bytes of one element, or of a block.
    bytes: u64,
    /// What it is here, if it can be read.
    pub(crate) dtype: Option<Dtype>,
}

impl From<Dtype> for ElementType {
    fn from(dtype: Dtype) -> Self {
        ElementType {
            name: dtype.name(),
            bytes: dtype.block().1 as u64,
            dtype: Some(dtype),
        }
    }
}

const ELEMENT_TYPES: [ElementType; 17] = {
    const fn other(name: &'static str, bytes: u64) -> ElementType {
        ElementType {
            name,
            bytes,
            dtype: None,
        }
    }
    const fn known(name: &'static str, bytes: u64, dtype: Dtype) -> ElementType {
        ElementType {
            name,
            bytes,
            dtype: Some(dtype),
        }
    }
    [
        known("F32", 4, Dtype::F32),
        known("F16", 2, Dtype::F16),
        known("BF16", 2, Dtype::Bf16),
        known("F8_E4M3", 1, Dtype::F8E4M3),
        known("U8", 1, Dtype::U8),
        other("F64", 8),
        other("I64", 8),
        other("U64", 8),
        other("C64", 8),
        other("I32", 4),
        other("U32", 4),
        other("I16", 2),
        other("U16", 2),
        other("I8", 1),
        other("BOOL", 1),
        other("F8_E5M2", 1),
        other("F8_E8M0", 1),
    ]
};

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeaderTensor {
    pub(crate) name: String,
    pub(crate) element: ElementType,
    pub(crate) shape: Vec<usize>,
    /// Bytes of the file.
    pub(crate) bytes: Range<usize>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// What a header says.
#[derive(Debug)]
pub(crate) struct Header {
    /// In the order of their data.
    pub(crate) tensors: Vec<HeaderTensor>,
    /// What stands under `__metadata__`, unchecked.
    pub(crate) metadata: Option<Value>,
}

/// The key that names no tensor.
pub(crate) const METADATA: &str = "__metadata__";

/// Reads and checks the header of `file`, which is at `path`.
pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Header, WeightsError> {
    let json = header_json(path, file)?;
    let data_start = LENGTH_BYTES + json.len();
    let (entries, metadata) = entries(path, json)?;
    let mut names = HashSet::with_capacity(entries.len());
    let mut unplaced = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        if name.len() > MAX_NAME_BYTES {
            let reason = format!(
                "wanted names of at most {MAX_NAME_BYTES} bytes, found one of {}",
                name.len()
            );
            return Err(WeightsError::Header {
                path: path.to_owned(),
                reason,
            });
        }
        if !names.insert(name.clone()) {
            let file = path.display().to_string();
            return Err(WeightsError::Duplicate {
                tensor: name,
                first: file.clone(),
                second: file,
            });
        }
        let (element, shape) = check_entry(path, &name, &entry)?;
        unplaced.push((name, element, shape, entry.data_offsets));
    }
    let data_end = unplaced.iter().map(|(.., [_, end])| *end).max().unwrap_or(0);
    let wanted = data_end.saturating_add(data_start as u64);
    if wanted > file.len() as u64 {
        return Err(WeightsError::Truncated {
            path: path.to_owned(),
            wanted,
            found: file.len() as u64,
        });
    }
    // Every offset is now within the file, whose length is a usize.
    let place = |[begin, end]: [u64; 2]| data_start + begin as usize..data_start + end as usize;
    let mut tensors: Vec<HeaderTensor> = unplaced
        .into_iter()
        .map(|(name, element, shape, offsets)| HeaderTensor {
            name,
            element,
            shape,
            bytes: place(offsets),
        })
        .collect();
    tensors.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    check_coverage(path, &tensors, data_start, file.len())?;
    Ok(Header { tensors, metadata })
}

/// The JSON of the header, after checks of its length.
fn header_json<'a>(path: &Path, file: &'a [u8]) -> Result<&'a [u8], WeightsError> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let found = file.len() as u64;
        return Err(WeightsError::Truncated {
            path: path.to_owned(),
            wanted: LENGTH_BYTES as u64,
            found,
        });
    };
    // Pickles begin with 0x80 and a protocol number, torch's later ones are zip files.
    let magic = matches!(file, [0x80, 2..=5, ..] | [b'P', b'K', 3, 4, ..]);
    if magic && rest.first() != Some(&b'{') {
        return Err(WeightsError::Pickle { path: path.to_owned() });
    }
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(WeightsError::HeaderTooLong {
            path: path.to_owned(),
            found: length,
            limit: MAX_HEADER_BYTES,
        });
    }
    rest.get(..length as usize).ok_or_else(|| WeightsError::Truncated {
        path: path.to_owned(),
        wanted: LENGTH_BYTES as u64 + length,
        found: file.len() as u64,
    })
}

/// Names and entries of the tensors, and the metadata.
type HeaderEntries = (Vec<(String, Entry)>, Option<Value>);

fn entries(path: &Path, json: &[u8]) -> Result<HeaderEntries, WeightsError> {
    let refuse = |reason: String| WeightsError::Header {
        path: path.to_owned(),
        reason,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let Entries(raw) = AtMost::<Value>::new(MAX_TENSORS + 1)
        .deserialize(&mut deserializer)
        .and_then(|entries| deserializer.end().map(|()| entries))
        .map_err(|error| refuse(error.to_string()))?;
    let (metadata, tensors): (Vec<_>, Vec<_>) = raw.into_iter().partition(|(name, _)| name == METADATA);
    let tensors = tensors
        .into_iter()
        .map(|(name, raw)| match serde_json::from_value(raw) {
            Ok(entry) => Ok((name, entry)),
            Err(error) => Err(refuse(format!("tensor {name}: {error}"))),
        })
        .collect::<Result<_, _>>()?;
    Ok((tensors, metadata.into_iter().next_back().map(|(_, value)| value)))
}

/// Type and shape of an entry whose data has the length that they ask for.
fn check_entry(path: &Path, name: &str, entry: &Entry) -> Result<(ElementType, Vec<usize>), WeightsError> {
    let refuse = |wanted: String, found: String| WeightsError::HeaderTensor {
        path: path.to_owned(),
        tensor: name.to_owned(),
        wanted,
        found,
    };
    let Some(&element) = ELEMENT_TYPES.iter().find(|element| element.name == entry.dtype) else {
        return Err(refuse("a known type".to_owned(), format!("{:?}", entry.dtype)));
    };
    if entry.shape.len() > MAX_RANK {
        return Err(refuse(
            format!("at most {MAX_RANK} dimensions"),
            format!("{}", entry.shape.len()),
        ));
    }
    let size = entry
        .shape
        .iter()
        .try_fold(element.bytes, |product, &dim| product.checked_mul(dim));
    let [begin, end] = entry.data_offsets;
    let length = end.checked_sub(begin).ok_or_else(|| {
        refuse(
            "an end of its data after the beginning".to_owned(),
            format!("{begin}..{end}"),
        )
    })?;
    if size != Some(length) {
        let size = size.map_or_else(
            || "more bytes than can be counted".to_owned(),
            |size| format!("{size} bytes"),
        );
        return Err(refuse(
            format!("{size} for {} {:?}", entry.dtype, entry.shape),
            format!("{length} bytes"),
        ));
    }
    // A dimension is at most its tensor's size, unless the tensor is empty.
    Ok((
        element,
        entry
            .shape
            .iter()
            .map(|&dim| usize::try_from(dim).unwrap_or(usize::MAX))
            .collect(),
    ))
}

/// The format allows no byte between tensors, none that two share, and none after the last.
fn check_coverage(
    path: &Path,
    tensors: &[HeaderTensor],
    data_start: usize,
    file_bytes: usize,
) -> Result<(), WeightsError> {
    let mut end = data_start;
    for tensor in tensors {
        if tensor.bytes.start != end {
            return Err(WeightsError::HeaderTensor {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                wanted: format!("data from byte {}, where the tensor before it ends", end - data_start),
                found: format!("byte {}", tensor.bytes.start - data_start),
            });
        }
        end = tensor.bytes.end;
    }
    if end != file_bytes {
        let reason = format!("wanted {end} bytes in the file for the tensors named, found {file_bytes}");
        return Err(WeightsError::Header {
            path: path.to_owned(),
            reason,
        });
    }
    Ok(())
}
