//! Refuses a shard that cannot fit, with the arithmetic, before anything is read.

use moerun_types::{BlockRange, ExpertSlice, ModelConfig, Numerics};
use moerun_weights::{Checkpoint, MemoryNeed, available_memory_bytes};

use crate::WorkerError;

/// That `slices` fit in `max_expert_bytes` if that is given, and in the memory that is left; always so where that is not
/// known. Weights that stay mapped need not fit the latter.
pub(crate) fn check_fits(
    checkpoint: &Checkpoint,
    slices: &[ExpertSlice],
    numerics: Numerics,
    max_expert_bytes: Option<u64>,
) -> Result<(), WorkerError> {
    if let Some(most) = max_expert_bytes {
        fits(checkpoint.config(), slices, numerics, MemoryNeed::of_slice, most)?;
    }
    let of_slice = if checkpoint.is_mapped() {
        MemoryNeed::of_mapped_slice
    } else {
        MemoryNeed::of_slice
    };
    match available_memory_bytes() {
        Some(available_bytes) => fits(checkpoint.config(), slices, numerics, of_slice, available_bytes),
        None => Ok(()),
    }
}

fn fits(
    config: &ModelConfig,
    slices: &[ExpertSlice],
    numerics: Numerics,
    of_slice: fn(&ModelConfig, &Numerics, BlockRange) -> u64,
    available_bytes: u64,
) -> Result<(), WorkerError> {
    let needed_bytes = slices
        .iter()
        .map(|slice| of_slice(config, &numerics, slice.blocks))
        .fold(0, u64::saturating_add);
    if needed_bytes <= available_bytes {
        return Ok(());
    }
    Err(WorkerError::OutOfMemory {
        slices: slices.len(),
        format: numerics.format,
        expert_bytes: MemoryNeed::of(config, numerics.format).expert_bytes,
        needed_bytes,
        available_bytes,
    })
}

#[cfg(test)]
mod tests {
    use moerun_routing::ShardSpec;
    use moerun_types::{CombineMode, NumberFormat};

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
        let expert_bytes = 4 * 3 * 48 * 32;
        let needed = expert_bytes * half.len() as u64;
        fits(&config, &half, numerics, MemoryNeed::of_slice, needed).unwrap();
        let error = fits(&config, &half, numerics, MemoryNeed::of_slice, needed - 1).unwrap_err();
        let wanted = format!(
            "{} expert slices in f32 take {needed} bytes ({expert_bytes} a whole expert), but only {} bytes of memory are available",
            half.len(),
            needed - 1
        );
        assert_eq!(error.to_string(), wanted);
    }

    #[test]
    fn mapped_slices_take_what_is_cut_out_of_them() {
        let text = include_str!(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/golden/olmoe/config.json"
        ));
        let config = ModelConfig::from_json(text).unwrap();
        let numerics = Numerics {
            format: NumberFormat::F32,
            combine: CombineMode::Exact,
            combine_block: 8,
        };
        let needed = |first, end| MemoryNeed::of_mapped_slice(&config, &numerics, BlockRange { first, end });
        // Width 32 and hidden 32, no biases.
        assert_eq!(needed(0, 4), 0);
        assert_eq!(needed(0, 2), 4 * 32 * 16);
        assert_eq!(
            needed(1, 2),
            MemoryNeed::of_slice(&config, &numerics, BlockRange { first: 1, end: 2 })
        );
    }
}
