//! Checkpoint → memory: matrices in the number format asked for, mapped where the checkpoint has them packed.

use std::{fmt, ops::Range, str::FromStr, sync::Arc};

use memmap2::Mmap;
use moerun_kernels::{FeedForward, MappedError, PackedMatrix};
use moerun_types::{ExpertId, LayerId, ModelConfig, NumberFormat};
use serde::{Deserialize, Serialize};

use crate::{
    Checkpoint, ExpertSource, TensorRole, WeightsError,
    packed::{ExpertForm, Part, dense_parts, expert_name, places},
    store::StoredTensor,
};

/// How the weights of a packed checkpoint come into memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Load {
    /// Used where the file is mapped: nothing is read before it is needed, and a model may be larger than memory.
    #[default]
    Map,
    /// Read at once into memory of the process, on huge pages where the kernel allows.
    Copy,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Load::Map => "map",
            Load::Copy => "copy",
        })
    }
}

impl FromStr for Load {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "map" => Ok(Load::Map),
            "copy" => Ok(Load::Copy),
            other => Err(format!("unknown way to load {other:?}: wanted map or copy")),
        }
    }
}

impl Checkpoint {
    /// The same checkpoint, its packed weights loaded as `load` says.
    pub fn loading(mut self, load: Load) -> Self {
        self.load = load;
        self
    }

    /// The number format of a packed checkpoint.
    pub fn packed_format(&self) -> Option<NumberFormat> {
        self.packed.as_ref().map(|packed| packed.format)
    }

    /// Whether weights are used where their files are mapped, so that they need not fit in memory.
    pub fn is_mapped(&self) -> bool {
        self.packed.is_some() && self.load == Load::Map
    }

    /// A matrix outside the experts as a model with experts in `format` holds it; the up projection of latent attention
    /// as two matrices per head.
    ///
    /// # Errors
    /// If it is not there or no matrix, if it has a value that the number format cannot hold, or if the checkpoint is
    /// packed in another format.
    pub fn load_matrices(&self, role: TensorRole, format: NumberFormat) -> Result<Vec<PackedMatrix>, WeightsError> {
        let (_, shape) = self.dense.get(&role).ok_or(WeightsError::NoTensor { role })?;
        let parts = dense_parts(&self.config, role, shape, format);
        let matrices: Vec<(NumberFormat, usize, usize)> = parts
            .iter()
            .map(|part| match *part {
                Part::Matrix { format, rows, cols } => Ok((format, rows, cols)),
                Part::Vector { .. } => Err(WeightsError::Rank {
                    role,
                    wanted: "a matrix",
                    found: shape.clone(),
                }),
            })
            .collect::<Result<_, _>>()?;
        if let Some(stored) = self.packed_tensor(role, format)? {
            let (map, place) = self.store.place(stored);
            return matrices
                .into_iter()
                .zip(places(place.start, &parts))
                .map(|((format, rows, cols), place)| {
                    let mut matrix = PackedMatrix::from_mapped(format, rows, cols, map, place)?;
                    if self.load == Load::Copy {
                        self.gather(&mut [&mut matrix])?;
                    }
                    Ok(matrix)
                })
                .collect();
        }
        let source = self.matrix(role)?;
        let packed = |source| WeightsError::Pack { role, source };
        if let [(format, rows, cols)] = matrices[..] {
            return Ok(vec![source.pack(format, 0..rows, 0..cols).map_err(packed)?]);
        }
        // A key half, which is packed transposed, and a value half for each head, one after another.
        let mut first = 0;
        matrices
            .chunks_exact(2)
            .flat_map(|head| [(head[0], true), (head[1], false)])
            .map(|((format, rows, cols), transposed)| {
                let taken = first..first + if transposed { cols } else { rows };
                first = taken.end;
                let matrix = if transposed {
                    source.pack_transposed(format, taken)
                } else {
                    source.pack(format, taken, 0..cols)
                };
                matrix.map_err(packed)
            })
            .collect()
    }

    /// A tensor of a packed checkpoint that holds `format`; `None` if the checkpoint is not packed.
    fn packed_tensor(&self, role: TensorRole, format: NumberFormat) -> Result<Option<&StoredTensor>, WeightsError> {
        self.check_format(format)?;
        if self.packed.is_none() {
            return Ok(None);
        }
        let (name, _) = self.dense.get(&role).ok_or(WeightsError::NoTensor { role })?;
        let stored = self.store.get(name).ok_or(WeightsError::NoTensor { role })?;
        Ok(Some(stored))
    }

    /// That weights can be loaded in `wanted`: packed ones in their own format alone.
    pub fn check_format(&self, wanted: NumberFormat) -> Result<(), WeightsError> {
        match self.packed_format() {
            Some(stored) if stored != wanted => Err(WeightsError::PackedFormat {
                dir: self.dir().to_owned(),
                stored,
                wanted,
            }),
            _ => Ok(()),
        }
    }

    /// Values of a vector of a packed checkpoint.
    pub(crate) fn packed_vector(&self, role: TensorRole, length: usize) -> Result<Vec<f32>, WeightsError> {
        let (name, _) = self.dense.get(&role).ok_or(WeightsError::NoTensor { role })?;
        let stored = self.store.get(name).ok_or(WeightsError::NoTensor { role })?;
        Ok(values(&self.store.bytes(stored)[..4 * length]))
    }

    /// The columns `held` of the intermediate dimension of one expert in `format`: rows of gate and up, columns of down,
    /// their biases, and the bias of down for the holder of column 0. Of a packed checkpoint whole panels stay where they
    /// are mapped, whatever [`Load`] says.
    ///
    /// # Errors
    /// If the expert is not there, if it has a value that the number format cannot hold, or if the checkpoint is packed
    /// in another format.
    ///
    /// # Panics
    /// If the expert has no such columns, or they are not whole column units of `format`.
    pub fn load_expert(
        &self,
        layer: LayerId,
        expert: ExpertId,
        format: NumberFormat,
        held: Range<usize>,
    ) -> Result<FeedForward, WeightsError> {
        let none = WeightsError::NoExpert { layer, expert };
        let Some(moe) = &self.config.moe else { return Err(none) };
        self.check_format(format)?;
        if self.packed.is_some() {
            if !self.has_expert(layer, expert) {
                return Err(none);
            }
            let stored = self.store.get(&expert_name(layer, expert)).ok_or(none)?;
            return self.mapped_expert(stored, moe, format, held);
        }
        pack_expert(self.expert(layer, expert)?, &self.config, (layer, expert), format, held)
    }

    /// Moves matrices into one piece of memory of this process, on huge pages where the kernel allows; mapped ones are
    /// read from their file.
    pub fn gather(&self, matrices: &mut [&mut PackedMatrix]) -> Result<(), WeightsError> {
        let read = &mut |map: &Arc<Mmap>, start: usize, out: &mut [u8]| self.store.read_at(map, start, out);
        PackedMatrix::gather(matrices, read).map_err(|source| WeightsError::Io {
            path: self.dir().to_owned(),
            source,
        })
    }

    fn mapped_expert(
        &self,
        stored: &StoredTensor,
        moe: &moerun_types::MoeConfig,
        format: NumberFormat,
        held: Range<usize>,
    ) -> Result<FeedForward, WeightsError> {
        let (map, place) = self.store.place(stored);
        let (hidden, width) = (self.config.hidden, moe.intermediate);
        let form = ExpertForm::at(place.start, &self.config, moe, format);
        let matrix = |rows, cols, place| PackedMatrix::from_mapped(format, rows, cols, map, place);
        let bias = |place: Option<Range<usize>>| place.map(|place| values(&map[place]));
        let cut = |place| bias(place).map(|bias| bias[held.clone()].to_vec());
        Ok(FeedForward {
            gate_proj: matrix(width, hidden, form.gate)?.part(held.clone(), 0..hidden),
            up_proj: matrix(width, hidden, form.up)?.part(held.clone(), 0..hidden),
            down_proj: matrix(hidden, width, form.down)?.part(0..hidden, held.clone()),
            gate_bias: cut(form.gate_bias),
            up_bias: cut(form.up_bias),
            down_bias: bias(form.down_bias).filter(|_| held.start == 0),
            activation: moe.activation,
        })
    }
}

/// The columns `held` of the intermediate dimension of an expert that is read as it is stored.
pub(crate) fn pack_expert(
    source: ExpertSource<'_>,
    config: &ModelConfig,
    (layer, expert): (LayerId, ExpertId),
    format: NumberFormat,
    held: Range<usize>,
) -> Result<FeedForward, WeightsError> {
    let Some(moe) = &config.moe else {
        return Err(WeightsError::NoExpert { layer, expert });
    };
    let (hidden, whole) = (config.hidden, 0..config.hidden);
    let named = |matrix: &'static str| {
        move |source| WeightsError::PackExpert {
            layer,
            expert,
            matrix,
            source,
        }
    };
    let (gate, up, down) = (&source.gate_proj, &source.up_proj, &source.down_proj);
    Ok(FeedForward {
        gate_proj: gate
            .pack(format, held.clone(), whole.clone())
            .map_err(named("gate_proj"))?,
        up_proj: up.pack(format, held.clone(), whole).map_err(named("up_proj"))?,
        down_proj: down.pack(format, 0..hidden, held.clone()).map_err(named("down_proj"))?,
        gate_bias: source.gate_bias.map(|bias| bias[held.clone()].to_vec()),
        up_bias: source.up_bias.map(|bias| bias[held.clone()].to_vec()),
        down_bias: source.down_bias.filter(|_| held.start == 0),
        activation: moe.activation,
    })
}

fn values(bytes: &[u8]) -> Vec<f32> {
    let values = bytes.as_chunks::<4>().0;
    values.iter().map(|&value| f32::from_le_bytes(value)).collect()
}

impl From<MappedError> for WeightsError {
    fn from(source: MappedError) -> Self {
        WeightsError::Mapped { source }
    }
}
