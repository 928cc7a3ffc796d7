//! What a worker is and holds ↔ [`v1::HandshakeResponse`].

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId};

use crate::{ModelLimits, WireError, packed::check_len, v1};

/// BLAKE3 of one combine block's elements as stored, cut to 16 bytes.
pub type BlockHash = [u8; 16];

/// Longest text of a handshake: hashes are 64 characters, a numerics id about 20.
const MAX_TEXT_BYTES: usize = 256;

/// A slice that a worker holds, and the content of its blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldExpert {
    /// What is held; never empty.
    pub slice: ExpertSlice,
    /// One hash per block of the slice.
    pub block_hashes: Vec<BlockHash>,
}

/// What a worker is and holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerIdentity {
    /// Major × 1000 + minor.
    pub protocol_version: u32,
    /// Version of the binary, for people.
    pub build: String,
    /// Of the canonical form of the model's config.
    pub config_hash: String,
    /// Over name, type and shape of all expert tensors; `None` if the worker's checkpoint lacks any.
    pub expert_header_hash: Option<String>,
    /// The same over all other tensors.
    pub dense_header_hash: Option<String>,
    /// Of the routers' stored bytes; `None` if the worker's checkpoint lacks any.
    pub router_hash: Option<String>,
    /// Equal exactly when the bits will be.
    pub numerics_id: String,
    /// What it holds.
    pub held: Vec<HeldExpert>,
}

/// The worker's side.
pub fn encode_handshake(identity: &WorkerIdentity) -> v1::HandshakeResponse {
    v1::HandshakeResponse {
        protocol_version: identity.protocol_version,
        build: identity.build.clone(),
        config_hash: identity.config_hash.clone(),
        expert_header_hash: identity.expert_header_hash.clone().unwrap_or_default(),
        dense_header_hash: identity.dense_header_hash.clone().unwrap_or_default(),
        router_hash: identity.router_hash.clone().unwrap_or_default(),
        numerics_id: identity.numerics_id.clone(),
        held: identity.held.iter().map(HeldExpert::encode).collect(),
        host: None, // as of the moment in which it is asked for
    }
}

/// The gateway's side. What is held is read by [`HeldExpert::decode`], which wants the limits of a model that is known
/// to be the same; here `limits` is `None` as long as it is not.
pub fn decode_handshake(
    response: &v1::HandshakeResponse,
    limits: Option<&ModelLimits>,
) -> Result<WorkerIdentity, WireError> {
    let text = |field, text: &String| {
        if text.len() <= MAX_TEXT_BYTES {
            Ok(text.clone())
        } else {
            Err(WireError::new(
                field,
                format!("at most {MAX_TEXT_BYTES} bytes"),
                format!("{} bytes", text.len()),
            ))
        }
    };
    let optional = |field, value| Ok(Some(text(field, value)?).filter(|value| !value.is_empty()));
    let held = match limits {
        None => Vec::new(),
        Some(limits) => decode_held(&response.held, limits)?,
    };
    Ok(WorkerIdentity {
        protocol_version: response.protocol_version,
        build: text("build", &response.build)?,
        config_hash: text("config_hash", &response.config_hash)?,
        expert_header_hash: optional("expert_header_hash", &response.expert_header_hash)?,
        dense_header_hash: optional("dense_header_hash", &response.dense_header_hash)?,
        router_hash: optional("router_hash", &response.router_hash)?,
        numerics_id: text("numerics_id", &response.numerics_id)?,
        held,
    })
}

/// Slices in order, each within the model.
pub(crate) fn decode_held(held: &[v1::HeldSlice], limits: &ModelLimits) -> Result<Vec<HeldExpert>, WireError> {
    let decoded = held
        .iter()
        .map(|held| HeldExpert::decode(held, limits))
        .collect::<Result<Vec<_>, _>>()?;
    // Sorted and disjoint, so that each block is held once.
    for pair in decoded.windows(2) {
        let (before, after) = (pair[0].slice, pair[1].slice);
        let same_expert = (before.layer, before.expert) == (after.layer, after.expert);
        let ordered = if same_expert {
            before.blocks.end <= after.blocks.first
        } else {
            (before.layer, before.expert) < (after.layer, after.expert)
        };
        if !ordered {
            return Err(WireError::new("held", format!("slices in order after {before}"), after));
        }
    }
    Ok(decoded)
}

impl HeldExpert {
    /// As a message.
    pub fn encode(&self) -> v1::HeldSlice {
        v1::HeldSlice {
            layer: self.slice.layer.0,
            expert: self.slice.expert.0.into(),
            first_block: self.slice.blocks.first.into(),
            end_block: self.slice.blocks.end.into(),
            block_hashes: self.block_hashes.concat().into(),
        }
    }

    /// Checks one slice against the model.
    pub fn decode(held: &v1::HeldSlice, limits: &ModelLimits) -> Result<Self, WireError> {
        let slice = decode_slice(held.layer, held.expert, (held.first_block, held.end_block), limits)?;
        check_len(
            "held.block_hashes",
            &held.block_hashes,
            slice.blocks.len() * size_of::<BlockHash>(),
        )?;
        let block_hashes = held.block_hashes.as_chunks().0.to_vec();
        Ok(Self { slice, block_hashes })
    }
}

/// The run of blocks `first..end` of an expert, if the model has it.
pub(crate) fn decode_slice(
    layer: u32,
    expert: u32,
    (first, end): (u32, u32),
    limits: &ModelLimits,
) -> Result<ExpertSlice, WireError> {
    let layer = LayerId(layer);
    if !limits.is_moe_layer(layer) {
        return Err(WireError::new("held.layer", "a layer with experts", layer));
    }
    let known = u16::try_from(expert).ok();
    let known = known.filter(|&expert| usize::from(expert) < limits.num_experts);
    let expert = known.ok_or_else(|| WireError::new("held.expert", format!("below {}", limits.num_experts), expert))?;
    match (u16::try_from(first), u16::try_from(end)) {
        (Ok(first), Ok(end)) if first < end && usize::from(end) <= limits.num_blocks => Ok(ExpertSlice {
            layer,
            expert: ExpertId(expert),
            blocks: BlockRange { first, end },
        }),
        _ => {
            let wanted = format!("a run of blocks within 0..{}", limits.num_blocks);
            Err(WireError::new("held.end_block", wanted, format!("{first}..{end}")))
        }
    }
}

#[cfg(test)]
mod tests;
