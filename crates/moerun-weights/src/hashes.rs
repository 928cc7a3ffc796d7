//! What two processes compare to know that they hold the same model. No hash depends on how tensors are sharded.

use blake3::Hasher;
use moerun_types::{BlockRange, ExpertId, LayerId};

use crate::{
    Checkpoint, LayerTensor, MatrixSource, TensorRole, WeightsError,
    expected::{ExpectedTensor, ModelPart, expected_in, scale_name},
    expert::ExpertParts,
    store::StoredTensor,
};

impl Checkpoint {
    /// BLAKE3 of each combine block of an expert, of the elements as stored: one 16-byte hash per block of `blocks`.
    ///
    /// A block's hash is over the gate and up rows, the down columns and the gate and up biases of the block, and over
    /// the down bias for block 0. Groups of quantised codes that reach into a block are hashed whole, with their scales.
    ///
    /// # Errors
    /// If the expert is not there, or has no such blocks.
    pub fn expert_block_hashes(
        &self,
        layer: LayerId,
        expert: ExpertId,
        blocks: BlockRange,
        combine_block: usize,
    ) -> Result<Vec<[u8; 16]>, WeightsError> {
        let parts = self.expert_parts(layer, expert)?;
        let num_blocks = if combine_block == 0 {
            0
        } else {
            parts.gate.rows().div_ceil(combine_block)
        };
        if usize::from(blocks.end) > num_blocks {
            return Err(WeightsError::Blocks {
                found: blocks,
                combine_block,
                num_blocks,
            });
        }
        Ok((blocks.first..blocks.end)
            .map(|block| block_hash(&parts, usize::from(block), combine_block))
            .collect())
    }

    /// BLAKE3 (hex) of the canonical form of the parsed config: equal for both spellings of one model.
    pub fn config_hash(&self) -> String {
        let canonical = serde_json::to_vec(&self.config).expect("a config of numbers, strings and lists is JSON");
        blake3::hash(&canonical).to_hex().to_string()
    }

    /// BLAKE3 (hex) over the sorted (name, type, shape) of all expert tensors; `None` if any expert tensor is absent.
    pub fn expert_header_hash(&self) -> Option<String> {
        self.header_hash(|part| matches!(part, ModelPart::Experts(_)))
    }

    /// BLAKE3 (hex) over the sorted (name, type, shape) of all other tensors; `None` if any of them is absent.
    pub fn dense_header_hash(&self) -> Option<String> {
        self.header_hash(|part| matches!(part, ModelPart::Dense(_)))
    }

    /// BLAKE3 (hex) of the stored bytes of all routers in layer order: small, and different for two trainings of one
    /// architecture. `None` if any is absent or there are none.
    pub fn router_hash(&self) -> Option<String> {
        let layers = self.config.moe_layers();
        if layers.is_empty() {
            return None;
        }
        let mut hasher = Hasher::new();
        for layer in layers {
            let router = self.matrix(TensorRole::Layer(layer, LayerTensor::Router)).ok()?;
            hash_part(&mut hasher, "router", &router, 0..router.rows(), 0..router.cols());
        }
        Some(hasher.finalize().to_hex().to_string())
    }

    fn header_hash(&self, belongs: impl Fn(ModelPart) -> bool) -> Option<String> {
        let mut lines = Vec::new();
        for ExpectedTensor { name, part, .. } in expected_in(&self.config, self.store.expert_layout(&self.config)) {
            if !belongs(part) {
                continue;
            }
            lines.push(header_line(&name, self.store.get(&name)?));
            let scales = scale_name(&name);
            if let Some(stored) = self.store.get(&scales) {
                lines.push(header_line(&scales, stored));
            }
        }
        lines.sort_unstable();
        let mut hasher = Hasher::new();
        for line in lines {
            hasher.update(line.as_bytes());
        }
        Some(hasher.finalize().to_hex().to_string())
    }
}

fn header_line(name: &str, stored: &StoredTensor) -> String {
    format!("{name} {} {:?}\n", stored.element.name, stored.shape)
}

fn block_hash(parts: &ExpertParts<'_>, block: usize, combine_block: usize) -> [u8; 16] {
    let (width, hidden) = (parts.gate.rows(), parts.gate.cols());
    let inner = block * combine_block..((block + 1) * combine_block).min(width);
    let mut hasher = Hasher::new();
    hash_part(&mut hasher, "gate", &parts.gate, inner.clone(), 0..hidden);
    hash_part(&mut hasher, "up", &parts.up, inner.clone(), 0..hidden);
    hash_part(&mut hasher, "down", &parts.down, 0..hidden, inner.clone());
    if let Some(bias) = &parts.gate_bias {
        hash_part(&mut hasher, "gate bias", bias, 0..1, inner.clone());
    }
    if let Some(bias) = &parts.up_bias {
        hash_part(&mut hasher, "up bias", bias, 0..1, inner);
    }
    if let Some(bias) = parts.down_bias.as_ref().filter(|_| block == 0) {
        hash_part(&mut hasher, "down bias", bias, 0..1, 0..hidden);
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hash
}

/// Label, type and sizes go first, so that no two parts with equal bytes can stand for each other.
fn hash_part(
    hasher: &mut Hasher,
    label: &str,
    source: &MatrixSource<'_>,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
) {
    hasher.update(format!("{label} {} {} {}\n", source.dtype(), rows.len(), cols.len()).as_bytes());
    source.stored_bytes(rows, cols, &mut |bytes| {
        hasher.update(bytes);
    });
}
