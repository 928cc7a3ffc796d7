//! The tensor part of a GGUF header: names, shapes, types and places.

use std::{collections::HashSet, ops::Range};

use super::{cursor::Cursor, metadata::GgufMetadata};
use crate::{Dtype, WeightsError, blocks::BlockType};

/// Most tensors: the same as in other checkpoints.
pub(super) const MAX_TENSORS: usize = crate::header::MAX_TENSORS;
/// Length of a name, rank, no dimension, type, offset.
pub(super) const MIN_INFO_BYTES: usize = 8 + 4 + 4 + 8;
const MAX_NAME_BYTES: usize = crate::header::MAX_NAME_BYTES;
const MAX_RANK: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

/// One tensor, its data within the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Outermost dimension first, as everywhere here; GGUF has them the other way round.
    pub(crate) shape: Vec<usize>,
    /// Bytes of the file.
    pub(crate) bytes: Range<usize>,
}

/// A tensor's entry before it is known where the data begins.
struct Info<'a> {
    name: &'a str,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    length: u64,
}

/// Reads `count` entries and checks where their data lies; tensors are in the order of their data.
pub(super) fn parse(
    cursor: &mut Cursor<'_>,
    count: usize,
    metadata: &GgufMetadata,
) -> Result<Vec<GgufTensor>, WeightsError> {
    let alignment = alignment(metadata)?;
    let mut names = HashSet::new();
    let mut infos = Vec::new();
    for _ in 0..count {
        let info = info(cursor)?;
        if !names.insert(info.name) {
            return Err(cursor.refuse(format!("tensor {}", info.name), "it once", "it twice"));
        }
        infos.push(info);
    }
    infos.sort_by_key(|info| (info.offset, info.length));
    let data_start = (cursor.position() as u64).next_multiple_of(alignment);
    let file_bytes = cursor.file_bytes() as u64;
    let mut next = 0;
    let mut tensors = Vec::with_capacity(infos.len());
    for info in infos {
        let what = format!("tensor {}", info.name);
        // The format leaves no room between tensors but the padding: anything else is a lie about some size.
        if info.offset != next {
            return Err(cursor.refuse(
                what,
                format!("data from byte {next}, where that before it ends"),
                info.offset,
            ));
        }
        let end = info.offset.checked_add(info.length);
        let end_in_file = end.and_then(|end| end.checked_add(data_start));
        let Some((end, end_in_file)) = end.zip(end_in_file).filter(|(_, end)| *end <= file_bytes) else {
            return Err(cursor.refuse(
                what,
                format!("{} bytes of data from byte {data_start} + {}", info.length, info.offset),
                format!("a file of {file_bytes}"),
            ));
        };
        next = end.checked_next_multiple_of(alignment).unwrap_or(u64::MAX);
        // Both are at most the file's length, which is a usize.
        let bytes = (data_start + info.offset) as usize..end_in_file as usize;
        tensors.push(GgufTensor {
            name: info.name.to_owned(),
            dtype: info.dtype,
            shape: info.shape,
            bytes,
        });
    }
    if file_bytes > data_start.saturating_add(next) {
        let wanted = format!("at most {} bytes for the tensors named", data_start + next);
        return Err(cursor.refuse("the file", wanted, file_bytes));
    }
    Ok(tensors)
}

fn alignment(metadata: &GgufMetadata) -> Result<u64, WeightsError> {
    const KEY: &str = "general.alignment";
    let alignment = metadata.unsigned(KEY)?.unwrap_or(DEFAULT_ALIGNMENT);
    if alignment.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&alignment) {
        return Ok(alignment);
    }
    Err(metadata.refuse(KEY, format!("a power of two from 8 to {MAX_ALIGNMENT}"), alignment))
}

fn info<'a>(cursor: &mut Cursor<'a>) -> Result<Info<'a>, WeightsError> {
    let name = cursor.text("a tensor's name", MAX_NAME_BYTES)?;
    let what = || format!("tensor {name}");
    let rank = cursor.u32(name)?;
    if !(1..=MAX_RANK).contains(&rank) {
        return Err(cursor.refuse(what(), format!("1 to {MAX_RANK} dimensions"), rank));
    }
    let mut shape = Vec::new();
    let mut elements = 1u64;
    for _ in 0..rank {
        let dim = cursor.u64(name)?;
        let product = elements.checked_mul(dim).filter(|product| *product > 0);
        let Some((product, dim)) = product.zip(usize::try_from(dim).ok()) else {
            return Err(cursor.refuse(what(), "dimensions from 1 that multiply to less than 2^64", dim));
        };
        elements = product;
        shape.push(dim);
    }
    let innermost = shape[0] as u64;
    shape.reverse();
    let code = cursor.u32(name)?;
    let dtype = dtype(code).ok_or_else(|| {
        let wanted =
            "type 0 (F32), 1 (F16), 30 (BF16), 8 (Q8_0), 2 (Q4_0), 12 (Q4_K), 13 (Q5_K), 14 (Q6_K) or 39 (MXFP4)";
        cursor.refuse(what(), wanted, code)
    })?;
    let (block_elements, block_bytes) = dtype.block();
    if !innermost.is_multiple_of(block_elements as u64) {
        let wanted = format!("rows of whole blocks of {block_elements} in {dtype}");
        return Err(cursor.refuse(what(), wanted, format!("rows of {innermost}")));
    }
    let length = (elements / block_elements as u64).checked_mul(block_bytes as u64);
    let length = length.ok_or_else(|| cursor.refuse(what(), "fewer than 2^64 bytes", format!("{shape:?}")))?;
    Ok(Info {
        name,
        dtype,
        shape,
        offset: cursor.u64(name)?,
        length,
    })
}

/// Types by their number in `ggml_type`.
fn dtype(code: u32) -> Option<Dtype> {
    Some(match code {
        0 => Dtype::F32,
        1 => Dtype::F16,
        30 => Dtype::Bf16,
        2 => Dtype::Block(BlockType::Q4_0),
        8 => Dtype::Block(BlockType::Q8_0),
        12 => Dtype::Block(BlockType::Q4K),
        13 => Dtype::Block(BlockType::Q5K),
        14 => Dtype::Block(BlockType::Q6K),
        39 => Dtype::Block(BlockType::Mxfp4),
        _ => return None,
    })
}
