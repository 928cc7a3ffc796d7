//! Experts on their way from one process to another: tensors as they are stored, so that whoever gets them can hash them as
//! their owner did, and packs them to the same bits.

use std::ops::Range;

use moerun_kernels::FeedForward;
use moerun_types::{BlockRange, ExpertId, LayerId, ModelConfig, NumberFormat};

use crate::{
    Checkpoint, MatrixForm, MatrixSource, WeightsError,
    checkpoint::fp8_block,
    expert::{ExpertParts, ExpertSource},
    hashes::{BlockHash, block_hashes},
    load::pack_expert,
};

/// Which of an expert's tensors; they travel in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum ExpertTensorName {
    Gate,
    Up,
    Down,
    GateBias,
    UpBias,
    DownBias,
}

impl ExpertTensorName {
    /// All of them.
    pub const ALL: [ExpertTensorName; 6] = [
        ExpertTensorName::Gate,
        ExpertTensorName::Up,
        ExpertTensorName::Down,
        ExpertTensorName::GateBias,
        ExpertTensorName::UpBias,
        ExpertTensorName::DownBias,
    ];

    /// In snake case.
    pub fn name(self) -> &'static str {
        match self {
            ExpertTensorName::Gate => "gate",
            ExpertTensorName::Up => "up",
            ExpertTensorName::Down => "down",
            ExpertTensorName::GateBias => "gate_bias",
            ExpertTensorName::UpBias => "up_bias",
            ExpertTensorName::DownBias => "down_bias",
        }
    }
}

/// One expert of a checkpoint, as it is stored.
pub struct ExpertExport<'a> {
    parts: Vec<(ExpertTensorName, MatrixForm, MatrixSource<'a>)>,
}

impl Checkpoint {
    /// One expert to be sent to another process; an error if it is not there, or if the checkpoint is packed: what it was
    /// packed from cannot be hashed any more.
    pub fn export_expert(&self, layer: LayerId, expert: ExpertId) -> Result<ExpertExport<'_>, WeightsError> {
        let none = || WeightsError::NoExpert { layer, expert };
        let parts = self.expert_parts(layer, expert)?;
        let sources = [
            Some(parts.gate),
            Some(parts.up),
            Some(parts.down),
            parts.gate_bias,
            parts.up_bias,
            parts.down_bias,
        ];
        let named = ExpertTensorName::ALL.into_iter().zip(sources);
        let parts = named
            .filter_map(|(name, source)| source.map(|source| (name, source)))
            .map(|(name, source)| Ok((name, source.form().ok_or_else(none)?, source)))
            .collect::<Result<_, WeightsError>>()?;
        Ok(ExpertExport { parts })
    }
}

impl ExpertExport<'_> {
    /// Its tensors, in order.
    pub fn forms(&self) -> impl Iterator<Item = (ExpertTensorName, MatrixForm)> + '_ {
        self.parts.iter().map(|&(name, form, _)| (name, form))
    }

    /// The bytes of each tensor, in order: elements, then what they are scaled by.
    pub fn tensors(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        self.parts.iter().map(|(_, form, source)| {
            let (elements, scales) = form.bytes().unwrap_or_default();
            let mut bytes = Vec::with_capacity(elements + scales);
            source.export(&mut bytes);
            bytes
        })
    }
}

/// One expert that comes from another process.
#[derive(Debug)]
pub struct ReceivedExpert {
    parts: Vec<(ExpertTensorName, MatrixForm, Range<usize>)>,
    bytes: Vec<u8>,
    wanted_bytes: usize,
}

impl ReceivedExpert {
    /// Begins with what its tensors are said to be: an error, before anything is allocated, unless they are those of an
    /// expert of `config`.
    pub fn new(config: &ModelConfig, forms: &[(ExpertTensorName, MatrixForm)]) -> Result<Self, WeightsError> {
        let refused = |wanted: String, found: String| WeightsError::Received { wanted, found };
        let Some(moe) = &config.moe else {
            return Err(refused("a model with experts".to_owned(), "a dense one".to_owned()));
        };
        let (hidden, width) = (config.hidden, moe.intermediate);
        let mut wanted = vec![
            (ExpertTensorName::Gate, [width, hidden]),
            (ExpertTensorName::Up, [width, hidden]),
            (ExpertTensorName::Down, [hidden, width]),
        ];
        if moe.gate_up_bias {
            wanted.extend([
                (ExpertTensorName::GateBias, [1, width]),
                (ExpertTensorName::UpBias, [1, width]),
            ]);
        }
        if moe.down_bias {
            wanted.push((ExpertTensorName::DownBias, [1, hidden]));
        }
        let (mut parts, mut end) = (Vec::with_capacity(wanted.len()), 0usize);
        for (index, (name, shape)) in wanted.iter().enumerate() {
            let as_wanted = || format!("tensor {} of shape {shape:?}", name.name());
            let Some((found, form)) = forms.get(index) else {
                return Err(refused(as_wanted(), "nothing".to_owned()));
            };
            if found != name || [form.rows, form.cols] != *shape {
                let found = format!("tensor {} of shape [{}, {}]", found.name(), form.rows, form.cols);
                return Err(refused(as_wanted(), found));
            }
            let is_of_config = form.scales.is_none_or(|(block, _)| fp8_block(config) == Some(block));
            let bytes = form.bytes().filter(|_| is_of_config);
            let (elements, scales) =
                bytes.ok_or_else(|| refused(as_wanted(), format!("elements that it cannot have: {form:?}")))?;
            let start = end;
            end = elements
                .checked_add(scales)
                .and_then(|bytes| start.checked_add(bytes))
                .unwrap_or(usize::MAX);
            parts.push((*name, *form, start..end));
        }
        if forms.len() > wanted.len() {
            let found = forms[wanted.len()].0.name();
            return Err(refused(
                format!("{} tensors", wanted.len()),
                format!("another, {found}"),
            ));
        }
        Ok(Self {
            parts,
            bytes: Vec::new(),
            wanted_bytes: end,
        })
    }

    /// Takes bytes that come next; more than there are to be is an error.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), WeightsError> {
        if bytes.len() > self.wanted_bytes - self.bytes.len() {
            return Err(WeightsError::Received {
                wanted: format!("{} bytes", self.wanted_bytes),
                found: "more".to_owned(),
            });
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// That all has come.
    pub fn check_complete(&self) -> Result<(), WeightsError> {
        if self.bytes.len() == self.wanted_bytes {
            return Ok(());
        }
        Err(WeightsError::Received {
            wanted: format!("{} bytes", self.wanted_bytes),
            found: format!("{} bytes", self.bytes.len()),
        })
    }

    /// As [`Checkpoint::expert_block_hashes`] of its owner. Errors: not all has come, or no such blocks.
    pub fn block_hashes(
        &self,
        config: &ModelConfig,
        blocks: BlockRange,
        combine_block: usize,
    ) -> Result<Vec<BlockHash>, WeightsError> {
        self.check_complete()?;
        let intermediate = config.moe.as_ref().map_or(0, |moe| moe.intermediate);
        block_hashes(&self.expert_parts()?, intermediate, blocks, combine_block)
    }

    /// As [`Checkpoint::load_expert`] of its owner, of `layer`'s `expert`.
    ///
    /// # Panics
    /// As that does.
    pub fn load(
        &self,
        config: &ModelConfig,
        (layer, expert): (LayerId, ExpertId),
        format: NumberFormat,
        held: Range<usize>,
    ) -> Result<FeedForward, WeightsError> {
        self.check_complete()?;
        pack_expert(
            ExpertSource::from(self.expert_parts()?),
            config,
            (layer, expert),
            format,
            held,
        )
    }

    fn expert_parts(&self) -> Result<ExpertParts<'_>, WeightsError> {
        let part = |name: ExpertTensorName| {
            let (_, form, place) = self.parts.iter().find(|(found, ..)| *found == name)?;
            Some(MatrixSource::import(form, &self.bytes[place.clone()]))
        };
        let matrix = |name: ExpertTensorName| {
            part(name).ok_or_else(|| WeightsError::Received {
                wanted: format!("tensor {}", name.name()),
                found: "nothing".to_owned(),
            })
        };
        Ok(ExpertParts {
            gate: matrix(ExpertTensorName::Gate)?,
            up: matrix(ExpertTensorName::Up)?,
            down: matrix(ExpertTensorName::Down)?,
            gate_bias: part(ExpertTensorName::GateBias),
            up_bias: part(ExpertTensorName::UpBias),
            down_bias: part(ExpertTensorName::DownBias),
        })
    }
}
