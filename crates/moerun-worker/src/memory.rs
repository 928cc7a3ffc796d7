//! Refuses a shard that cannot fit, with the arithmetic, before anything is read.

use moerun_types::{ExpertSlice, ModelConfig, Numerics};
use moerun_weights::{MemoryNeed, available_memory_bytes};

use crate::WorkerError;

/// That `slices` fit in the memory that is left; always so where that is not known.
pub(crate) fn check_fits(config: &ModelConfig, slices: &[ExpertSlice], numerics: Numerics) -> Result<(), WorkerError> {
    let expert_bytes = MemoryNeed::of(config, numerics.format).expert_bytes;
    match available_memory_bytes() {
        Some(available_bytes) => fits(config, slices, numerics, expert_bytes, available_bytes),
        None => Ok(()),
    }
}

fn fits(
    config: &ModelConfig,
    slices: &[ExpertSlice],
    numerics: Numerics,
    expert_bytes: u64,
    available_bytes: u64,
) -> Result<(), WorkerError> {
    let intermediate = config.moe.as_ref().map_or(0, |moe| moe.intermediate);
    let columns: u128 = slices
        .iter()
        .map(|slice| columns(slice, numerics.combine_block, intermediate) as u128)
        .sum();
    let needed = columns * u128::from(expert_bytes) / (intermediate.max(1) as u128);
    let needed_bytes = u64::try_from(needed).unwrap_or(u64::MAX);
    if needed_bytes <= available_bytes {
        return Ok(());
    }
    let (slices, format) = (slices.len(), numerics.format);
    Err(WorkerError::OutOfMemory {
        slices,
        format,
        expert_bytes,
        needed_bytes,
        available_bytes,
    })
}

/// Elements of the intermediate dimension that a slice covers; the last block may be short.
fn columns(slice: &ExpertSlice, combine_block: usize, intermediate: usize) -> usize {
    let end = usize::from(slice.blocks.end)
        .saturating_mul(combine_block)
        .min(intermediate);
    end.saturating_sub(usize::from(slice.blocks.first).saturating_mul(combine_block))
}

#[cfg(test)]
mod tests {
    use moerun_routing::ShardSpec;
    use moerun_types::{BlockRange, CombineMode, ExpertId, LayerId, NumberFormat};

    use super::*;

    #[test]
    fn a_shard_that_does_not_fit_is_refused_with_the_arithmetic() {
        let text = include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/mixtral/config.json"
        ));
        let config = ModelConfig::from_json(text).unwrap();
        let numerics = Numerics {
            format: NumberFormat::F32,
            combine: CombineMode::Exact,
            combine_block: 8,
        };
        let half = ShardSpec::Experts { index: 0, count: 2 }
            .resolve(&config, &numerics)
            .unwrap();
        let needed = 1000 * half.len() as u64;
        fits(&config, &half, numerics, 1000, needed).unwrap();
        let error = fits(&config, &half, numerics, 1000, needed - 1).unwrap_err();
        let wanted = format!(
            "{} expert slices in f32 take {needed} bytes (1000 a whole expert), but only {} bytes of memory are available",
            half.len(),
            needed - 1
        );
        assert_eq!(error.to_string(), wanted);
    }

    #[test]
    fn the_last_block_of_a_slice_may_be_short() {
        let slice = |first, end| ExpertSlice {
            layer: LayerId(0),
            expert: ExpertId(0),
            blocks: BlockRange { first, end },
        };
        assert_eq!(columns(&slice(0, 2), 8, 20), 16);
        assert_eq!(columns(&slice(2, 3), 8, 20), 4);
        assert_eq!(columns(&slice(0, 3), 8, 20), 20);
    }
}
