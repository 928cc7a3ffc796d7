//! A packed checkpoint drawn directly: codes with the distribution of a plain one's weights, without weights ever made.

use moerun_kernels::PackedMatrix;
use moerun_types::{ModelConfig, NumberFormat};

use super::{
    SynthesizeError,
    element::Element,
    random::{TensorValues, drawn_codes, hash_of},
};
use crate::{
    dense_tensors::dense_tensors,
    hashes::{HASH_BYTES, num_units},
    packed::{Content, PackedMetadata, PackedTensor, Part, Piece, dense_parts, expert_parts},
};

/// What the files say of a model that was never stored otherwise: hashes that follow from all that its weights follow
/// from.
pub(super) fn metadata(config_json: &str, seed: u64, format: NumberFormat) -> PackedMetadata {
    let hash = |what: &str| {
        let made_of = format!("{what} {seed} {format} {config_json}");
        Some(blake3::hash(made_of.as_bytes()).to_hex().to_string())
    };
    PackedMetadata {
        format,
        expert_header_hash: hash("experts"),
        dense_header_hash: hash("dense"),
        router_hash: hash("routers"),
    }
}

/// What one tensor holds: a function of seed, name, format and shape.
pub(super) fn make(
    config: &ModelConfig,
    format: NumberFormat,
    seed: u64,
    tensor: &PackedTensor,
) -> Result<Vec<Piece>, SynthesizeError> {
    let parts = match tensor.content {
        Content::Dense(role) => dense_tensors(config)
            .into_iter()
            .find(|(of, _)| *of == role)
            .map_or_else(Vec::new, |(_, shape)| dense_parts(config, role, &shape, format)),
        Content::Expert { .. } => config
            .moe
            .as_ref()
            .map_or_else(Vec::new, |moe| expert_parts(config, moe, format, 0..moe.intermediate)),
        Content::Hashes { .. } => return Ok(vec![Piece::Bytes(hashes(config, format, seed))]),
    };
    let pieces = parts.into_iter().enumerate().map(|(index, part)| {
        let name = format!("{index} {}", tensor.name);
        match part {
            Part::Vector { len } => {
                let mut bytes = vec![0; 4 * len];
                TensorValues::new(seed, &name, Element::F32).fill(0, &mut bytes);
                Piece::Bytes(bytes)
            }
            Part::Matrix { format, rows, cols } => Piece::Matrix(matrix(seed, &name, format, rows, cols)),
        }
    });
    Ok(pieces.collect())
}

fn matrix(seed: u64, name: &str, format: NumberFormat, rows: usize, cols: usize) -> PackedMatrix {
    if format.is_quantized() {
        let (mut codes, mut scale) = drawn_codes(seed, name, format);
        return PackedMatrix::draw(format, rows, cols, &mut codes, &mut scale);
    }
    let values = TensorValues::new(seed, name, Element::F32);
    // A row begins at an even element, as the values want.
    let row_elements = cols.next_multiple_of(2);
    let mut bytes = vec![0; 4 * row_elements];
    let packed = PackedMatrix::pack(format, rows, cols, |row, out| {
        values.fill(row * row_elements, &mut bytes);
        for (out, &value) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(value);
        }
    });
    packed.expect("plain formats hold every value")
}

/// Hashes of the experts' units: of all that their weights follow from, not of the weights.
fn hashes(config: &ModelConfig, format: NumberFormat, seed: u64) -> Vec<u8> {
    let Some(moe) = &config.moe else { return Vec::new() };
    let units = num_units(moe.intermediate);
    let sizes = format!("{format} {} {}", config.hidden, moe.intermediate);
    let layers = config.moe_layers();
    let mut hashes = Vec::with_capacity(layers.len() * moe.num_experts * units * HASH_BYTES);
    for layer in layers {
        for expert in 0..moe.num_experts {
            for unit in 0..units {
                let hash = hash_of(seed, &format!("{sizes} {layer} {expert} {unit}"));
                hashes.extend_from_slice(&hash.as_bytes()[..HASH_BYTES]);
            }
        }
    }
    hashes
}
