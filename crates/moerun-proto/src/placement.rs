//! What a worker holds and is to hold ↔ messages of `placement.proto`.

use moerun_types::{ExpertId, ExpertSlice, LayerId};

use crate::{HeldExpert, ModelLimits, WireError, handshake::decode_held, v1};

/// What a worker holds at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldNow {
    /// Counts the changes since the worker started.
    pub epoch: u64,
    /// All that it holds, sorted and disjoint.
    pub held: Vec<HeldExpert>,
    /// Bytes that it takes in memory.
    pub held_bytes: u64,
    /// Bytes that more may take; `None` where nobody knows.
    pub free_bytes: Option<u64>,
}

impl HeldNow {
    /// The worker's side.
    pub fn encode(&self) -> v1::HeldResponse {
        v1::HeldResponse {
            epoch: self.epoch,
            held: self.held.iter().map(HeldExpert::encode).collect(),
            held_bytes: self.held_bytes,
            free_bytes: self.free_bytes,
        }
    }

    /// The gateway's side: every number within the model, slices in order.
    pub fn decode(response: &v1::HeldResponse, limits: &ModelLimits) -> Result<Self, WireError> {
        Ok(Self {
            epoch: response.epoch,
            held: decode_held(&response.held, limits)?,
            held_bytes: response.held_bytes,
            free_bytes: response.free_bytes,
        })
    }
}

/// Asks for slices with these contents.
pub fn encode_load(slices: &[HeldExpert], holder: &str) -> v1::LoadExpertsRequest {
    v1::LoadExpertsRequest {
        slices: slices.iter().map(HeldExpert::encode).collect(),
        holder: holder.to_owned(),
    }
}

/// The expert that is asked for, if the model has it.
pub fn decode_expert(layer: u32, expert: u32, limits: &ModelLimits) -> Result<(LayerId, ExpertId), WireError> {
    let slice = crate::handshake::decode_slice(layer, expert, (0, 1), limits)?;
    Ok((slice.layer, slice.expert))
}

/// What is asked for: at least one slice, in order.
pub fn decode_load(request: &v1::LoadExpertsRequest, limits: &ModelLimits) -> Result<Vec<HeldExpert>, WireError> {
    if request.slices.is_empty() {
        return Err(WireError::new("slices", "at least one", "none"));
    }
    decode_held(&request.slices, limits)
}

/// Asks to let go of slices.
pub fn encode_unload(slices: &[ExpertSlice]) -> v1::UnloadExpertsRequest {
    let name = |slice: &ExpertSlice| v1::SliceName {
        layer: slice.layer.0,
        expert: slice.expert.0.into(),
        first_block: slice.blocks.first.into(),
        end_block: slice.blocks.end.into(),
    };
    v1::UnloadExpertsRequest {
        slices: slices.iter().map(name).collect(),
    }
}

/// What is to be let go: every number within the model.
pub fn decode_unload(request: &v1::UnloadExpertsRequest, limits: &ModelLimits) -> Result<Vec<ExpertSlice>, WireError> {
    let named = |name: &v1::SliceName| {
        crate::handshake::decode_slice(name.layer, name.expert, (name.first_block, name.end_block), limits)
    };
    request.slices.iter().map(named).collect()
}

#[cfg(test)]
mod tests {
    use moerun_types::{BlockRange, CombineMode, NumberFormat, Numerics};

    use super::*;

    fn limits() -> ModelLimits {
        ModelLimits {
            hidden: 8,
            num_experts: 4,
            top_k: 2,
            num_blocks: 3,
            moe_layers: vec![false, true],
            numerics: Numerics {
                format: NumberFormat::F32,
                combine: CombineMode::Exact,
                combine_block: 8,
            },
            max_rows: 8,
        }
    }

    fn held(expert: u16, first: u16, end: u16) -> HeldExpert {
        HeldExpert {
            slice: ExpertSlice {
                layer: LayerId(1),
                expert: ExpertId(expert),
                blocks: BlockRange { first, end },
            },
            block_hashes: (first..end).map(|block| [block as u8; 16]).collect(),
        }
    }

    #[test]
    fn what_is_held_is_read_as_it_was_written() {
        let now = HeldNow {
            epoch: 7,
            held: vec![held(0, 1, 3), held(2, 0, 1), held(2, 2, 3)],
            held_bytes: 11,
            free_bytes: None,
        };
        assert_eq!(HeldNow::decode(&now.encode(), &limits()), Ok(now.clone()));
        assert_eq!(
            decode_load(&encode_load(&now.held, "a:1"), &limits()),
            Ok(now.held.clone())
        );
        let slices: Vec<ExpertSlice> = now.held.iter().map(|held| held.slice).collect();
        assert_eq!(decode_unload(&encode_unload(&slices), &limits()), Ok(slices));
    }

    #[test]
    fn what_the_model_does_not_have_is_refused_by_field() {
        let refused = |change: fn(&mut v1::HeldSlice)| {
            let mut request = encode_load(&[held(1, 0, 2)], "");
            change(&mut request.slices[0]);
            decode_load(&request, &limits()).unwrap_err().to_string()
        };
        for (error, words) in [
            (refused(|slice| slice.layer = 0), "held.layer"),
            (refused(|slice| slice.layer = u32::MAX), "held.layer"),
            (refused(|slice| slice.expert = 4), "held.expert"),
            (refused(|slice| slice.end_block = 4), "held.end_block"),
            (refused(|slice| slice.first_block = 2), "held.end_block"),
            (
                refused(|slice| slice.block_hashes = vec![0; 31].into()),
                "held.block_hashes",
            ),
        ] {
            assert!(error.starts_with(words), "{error}");
        }
        let twice = encode_load(&[held(1, 0, 2), held(1, 1, 3)], "");
        assert!(decode_load(&twice, &limits()).is_err());
        assert!(decode_load(&encode_load(&[], ""), &limits()).is_err());
        let mut unload = encode_unload(&[held(1, 0, 2).slice]);
        unload.slices[0].expert = 1 << 16;
        assert!(decode_unload(&unload, &limits()).is_err());
    }
}
