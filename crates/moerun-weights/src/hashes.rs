//! What two processes compare to know that they hold the same model. No hash depends on how tensors are sharded.

use blake3::Hasher;
use moerun_types::{BlockRange, ExpertId, LayerId, NumberFormat};

use crate::{
    Checkpoint, LayerTensor, MatrixSource, TensorRole, WeightsError,
    expected::{ExpectedTensor, ModelPart, expected_in, scale_name},
    expert::ExpertParts,
    packed::{HASHES, packed_tensors},
    store::StoredTensor,
};

/// Bytes of a hash of a block.
pub(crate) const HASH_BYTES: usize = 16;

/// Columns of the intermediate dimension that are hashed together where the combine block is a multiple of them: what a
/// packed checkpoint keeps.
pub(crate) const UNIT: usize = 32;

/// Hash of a unit or of a block.
pub(crate) type BlockHash = [u8; HASH_BYTES];

/// Units of an expert, the last one may be short.
pub(crate) fn num_units(intermediate: usize) -> usize {
    intermediate.div_ceil(UNIT)
}

impl Checkpoint {
    /// Hashes of the combine blocks of an expert, of the elements as stored before anything was packed: 16 bytes per
    /// block of `blocks`.
    ///
    /// The columns of the intermediate dimension are hashed in units of 32, or of the greatest common divisor of 32 and
    /// the combine block: BLAKE3 over the gate and up rows, the down columns and the gate and up biases of the unit, and
    /// over the down bias for unit 0. Groups of quantised codes that reach into a unit are hashed whole, with their
    /// scales. A block's hash is BLAKE3 over those of its units.
    ///
    /// # Errors
    /// If the expert is not there, or has no such blocks, or the checkpoint is packed and the combine block is no
    /// multiple of 32.
    pub fn expert_block_hashes(
        &self,
        layer: LayerId,
        expert: ExpertId,
        blocks: BlockRange,
        combine_block: usize,
    ) -> Result<Vec<BlockHash>, WeightsError> {
        let intermediate = self.config.moe.as_ref().map_or(0, |moe| moe.intermediate);
        if self.packed.is_some() {
            let kept = self.kept_unit_hashes(layer, expert)?;
            let num_blocks = match combine_block {
                0 => 0,
                length => intermediate.div_ceil(length),
            };
            if usize::from(blocks.end) > num_blocks {
                return Err(WeightsError::Blocks {
                    found: blocks,
                    combine_block,
                    num_blocks,
                });
            }
            if !combine_block.is_multiple_of(UNIT) {
                return Err(WeightsError::PackedHashes {
                    dir: self.dir().to_owned(),
                    unit: UNIT,
                    combine_block,
                });
            }
            let per_block = combine_block / UNIT;
            let units = |block: u16| kept.chunks(per_block).nth(usize::from(block)).unwrap_or_default();
            return Ok((blocks.first..blocks.end).map(|block| join(units(block))).collect());
        }
        block_hashes(&self.expert_parts(layer, expert)?, intermediate, blocks, combine_block)
    }

    /// The hashes of all units of an expert, for a packed checkpoint to keep.
    pub(crate) fn expert_unit_hashes(&self, layer: LayerId, expert: ExpertId) -> Result<Vec<BlockHash>, WeightsError> {
        let parts = self.expert_parts(layer, expert)?;
        let first_columns = (0..parts.gate.rows()).step_by(UNIT);
        Ok(first_columns.map(|at| unit_hash(&parts, at, UNIT)).collect())
    }

    fn kept_unit_hashes(&self, layer: LayerId, expert: ExpertId) -> Result<&[BlockHash], WeightsError> {
        let none = || WeightsError::NoExpert { layer, expert };
        let moe = self.config.moe.as_ref().ok_or_else(none)?;
        let position = self.config.moe_layers().binary_search(&layer).map_err(|_| none())?;
        let stored = self.store.get(HASHES).ok_or_else(none)?;
        if !self.has_expert(layer, expert) {
            return Err(none());
        }
        let units = num_units(moe.intermediate);
        let first = (position * moe.num_experts + usize::from(expert.0)) * units;
        let hashes = self.store.bytes(stored).as_chunks::<HASH_BYTES>().0;
        hashes.get(first..first + units).ok_or_else(none)
    }

    /// BLAKE3 (hex) of the canonical form of the parsed config: equal for both spellings of one model.
    pub fn config_hash(&self) -> String {
        let canonical = serde_json::to_vec(&self.config).expect("a config of numbers, strings and lists is JSON");
        blake3::hash(&canonical).to_hex().to_string()
    }

    /// BLAKE3 (hex) over the sorted (name, type, shape) of all expert tensors; `None` if any expert tensor is absent.
    pub fn expert_header_hash(&self) -> Option<String> {
        if let Some(packed) = &self.packed {
            let has_all = self.has_all_packed(|part| matches!(part, ModelPart::Experts(_)));
            return packed.expert_header_hash.clone().filter(|_| has_all);
        }
        self.header_hash(|part| matches!(part, ModelPart::Experts(_)))
    }

    /// BLAKE3 (hex) over the sorted (name, type, shape) of all other tensors; `None` if any of them is absent.
    pub fn dense_header_hash(&self) -> Option<String> {
        if let Some(packed) = &self.packed {
            let has_all = self.has_all_packed(|part| matches!(part, ModelPart::Dense(_)));
            return packed.dense_header_hash.clone().filter(|_| has_all);
        }
        self.header_hash(|part| matches!(part, ModelPart::Dense(_)))
    }

    /// BLAKE3 (hex) of the stored bytes of all routers in layer order: small, and different for two trainings of one
    /// architecture. `None` if any is absent or there are none.
    pub fn router_hash(&self) -> Option<String> {
        let layers = self.config.moe_layers();
        if layers.is_empty() {
            return None;
        }
        let routers = || {
            layers
                .iter()
                .map(|&layer| TensorRole::Layer(layer, LayerTensor::Router))
        };
        if let Some(packed) = &self.packed {
            let has_all = routers().all(|router| self.has(router));
            return packed.router_hash.clone().filter(|_| has_all);
        }
        let mut hasher = Hasher::new();
        for router in routers() {
            let router = self.matrix(router).ok()?;
            hash_part(&mut hasher, "router", &router, 0..router.rows(), 0..router.cols());
        }
        Some(hasher.finalize().to_hex().to_string())
    }

    fn has_all_packed(&self, belongs: impl Fn(ModelPart) -> bool) -> bool {
        packed_tensors(&self.config, NumberFormat::F32)
            .iter()
            .all(|tensor| !belongs(tensor.part()) || self.store.get(&tensor.name).is_some())
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

/// Hashes of the combine blocks of an expert, of the elements as they are stored.
pub(crate) fn block_hashes(
    parts: &ExpertParts<'_>,
    intermediate: usize,
    blocks: BlockRange,
    combine_block: usize,
) -> Result<Vec<BlockHash>, WeightsError> {
    let num_blocks = match combine_block {
        0 => 0,
        length => intermediate.div_ceil(length),
    };
    if usize::from(blocks.end) > num_blocks {
        return Err(WeightsError::Blocks {
            found: blocks,
            combine_block,
            num_blocks,
        });
    }
    let unit = greatest_common_divisor(combine_block, UNIT);
    let block_hash = |block: u16| {
        let first = usize::from(block) * combine_block;
        let end = (first + combine_block).min(intermediate);
        let units: Vec<BlockHash> = (first..end)
            .step_by(unit)
            .map(|at| unit_hash(parts, at, unit))
            .collect();
        join(&units)
    };
    Ok((blocks.first..blocks.end).map(block_hash).collect())
}

fn header_line(name: &str, stored: &StoredTensor) -> String {
    format!("{name} {} {:?}\n", stored.element.name, stored.shape)
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// The hash of a block from those of its units.
fn join(units: &[BlockHash]) -> BlockHash {
    cut(blake3::hash(units.as_flattened()))
}

fn cut(hash: blake3::Hash) -> BlockHash {
    let mut cut = [0; HASH_BYTES];
    cut.copy_from_slice(&hash.as_bytes()[..HASH_BYTES]);
    cut
}

/// The hash of the columns `first..first + unit` of an expert, the last of which may be missing.
fn unit_hash(parts: &ExpertParts<'_>, first: usize, unit: usize) -> BlockHash {
    let (width, hidden) = (parts.gate.rows(), parts.gate.cols());
    let inner = first..(first + unit).min(width);
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
    if let Some(bias) = parts.down_bias.as_ref().filter(|_| first == 0) {
        hash_part(&mut hasher, "down bias", bias, 0..1, 0..hidden);
    }
    cut(hasher.finalize())
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
    // Together: pieces of a few bytes would keep the hash from working on several chunks at once.
    let mut stored = Vec::new();
    source.stored_bytes(rows, cols, &mut |bytes| stored.extend_from_slice(bytes));
    hasher.update(&stored);
}
