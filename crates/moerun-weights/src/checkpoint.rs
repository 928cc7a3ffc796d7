//! A checkpoint directory: config, mapped shards, and the tensors in them.

use std::{
    collections::{HashMap, HashSet},
    path::{Path, PathBuf},
};

use moerun_types::{ExpertId, FeedForwardKind, LayerId, ModelConfig, NumberFormat, StoredDtype, WeightQuantization};

use crate::{
    BlockType, Dtype, ExpertSource, GenerationConfig, Load, MatrixSource, TensorRole, WeightsError,
    dense_tensors::dense_tensors,
    directory::Directory,
    expected::{ExpectedTensor, ModelPart, expected_in, expected_tensors},
    expert::{self, ExpertParts},
    gguf::{self, Arrangement, GgufFile},
    index::{self, Layout},
    packed::{self, HASHES, PackedMetadata, expert_name, packed_tensors},
    store::TensorStore,
    tensor, tensor_names,
    verify::verify,
};

/// Longest `config.json` and `generation_config.json`: real ones have a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Which tensors a process is going to read, and so must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Everything: gateway with local experts.
    All,
    /// All but the experts: gateway with workers. Expert tensors may be absent; those that are there must be right.
    GatewayOnly,
    /// The experts: a worker. Other tensors may be absent; those that are there must be right.
    ExpertsOnly,
    /// The config alone: a worker that is given experts while it runs. Tensors that are there must be right.
    Nothing,
}

/// A mapped checkpoint directory whose tensors all have the names, shapes and types that its config asks for.
///
/// The files stay mapped as long as this lives and must not be changed meanwhile: a truncated file ends the process.
#[derive(Debug)]
pub struct Checkpoint {
    pub(crate) config: ModelConfig,
    generation_config: GenerationConfig,
    dir: PathBuf,
    pub(crate) store: TensorStore,
    /// Tensors outside the experts that are there, with their shapes on disk (packed: the shapes they had).
    pub(crate) dense: HashMap<TensorRole, (String, Vec<usize>)>,
    /// What a packed checkpoint says of itself.
    pub(crate) packed: Option<PackedMetadata>,
    pub(crate) load: Load,
}

impl Checkpoint {
    /// Reads the config and the headers of all shards, maps the shards, and checks every tensor against the config.
    /// No tensor data is read.
    ///
    /// `dir` may also be a GGUF file, which holds config, tensors and tokenizer in one, or a directory that `convert` or
    /// `synthesize` wrote packed weights into.
    ///
    /// Weights are `model.safetensors`, or the shards that `model.safetensors.index.json` names. Shards that hold
    /// nothing but tensors which `needs` allows to be absent may be absent themselves.
    ///
    /// # Errors
    /// Whatever is wrong is named with what was wanted and what was found.
    pub fn open(dir: &Path, needs: Needs) -> Result<Self, WeightsError> {
        if dir.is_file() {
            return Self::open_gguf(dir, needs);
        }
        let directory = Directory::open(dir)?;
        let config = read_config(&directory)?;
        let generation_config = match directory.read_text("generation_config.json", MAX_CONFIG_BYTES)? {
            Some(text) => GenerationConfig::from_json(&text, config.vocab_size)?,
            None => GenerationConfig::default(),
        };
        if let Some(layout) = index::find_packed(&directory)? {
            return Self::open_packed(&directory, &layout, config, generation_config, needs);
        }
        let expected = expected_tensors(&config);
        let needed: HashSet<&str> = expected
            .iter()
            .filter(|tensor| !needs.allow_absence(tensor.part))
            .map(|tensor| tensor.name.as_str())
            .collect();
        let may_be_absent = |name: &str| !needed.contains(name.strip_prefix("language_model.").unwrap_or(name));
        let store = match TensorStore::open(&directory, config.family, &may_be_absent) {
            Err(WeightsError::NoWeights { .. }) if needs == Needs::Nothing => TensorStore::empty(),
            opened => opened?,
        };
        Self::of_store(dir, config, generation_config, store, expected, needs)
    }

    /// A GGUF file: config and tensors come from its header.
    fn open_gguf(path: &Path, needs: Needs) -> Result<Self, WeightsError> {
        let file = GgufFile::open(path)?;
        let config = ModelConfig::from_json(&gguf::config_json(&file)?)?;
        let store = TensorStore::of_gguf(file, &config)?;
        let expected = expected_in(&config, store.expert_layout(&config));
        Self::of_store(path, config, GenerationConfig::default(), store, expected, needs)
    }

    /// Packed weights: tensors have the names of the family's plain ones, and their sizes follow from config and format.
    fn open_packed(
        directory: &Directory,
        layout: &Layout,
        config: ModelConfig,
        generation_config: GenerationConfig,
        needs: Needs,
    ) -> Result<Self, WeightsError> {
        // Names do not depend on the format, which stands in the files.
        let named = packed_tensors(&config, NumberFormat::F32);
        let needed: HashSet<&str> = named
            .iter()
            .filter(|tensor| !needs.allow_absence(tensor.part()))
            .map(|tensor| tensor.name.as_str())
            .collect();
        let store = TensorStore::of_files(directory, layout, &|name| !needed.contains(name))?;
        let packed = PackedMetadata::read(directory, &store)?;
        packed::verify(&store, &packed_tensors(&config, packed.format), needs)?;
        store.advise_huge_pages();
        let dense = dense_tensors(&config)
            .into_iter()
            .map(|(role, shape)| (role, (tensor_names::name(config.family, role), shape)))
            .filter(|(_, (name, _))| store.get(name).is_some())
            .collect();
        Ok(Checkpoint {
            config,
            generation_config,
            dir: directory.path().to_owned(),
            store,
            dense,
            packed: Some(packed),
            load: Load::default(),
        })
    }

    fn of_store(
        dir: &Path,
        config: ModelConfig,
        generation_config: GenerationConfig,
        store: TensorStore,
        expected: Vec<ExpectedTensor>,
        needs: Needs,
    ) -> Result<Self, WeightsError> {
        verify(&store, &config, &expected, needs)?;
        let dense = expected
            .into_iter()
            .filter(|tensor| store.get(&tensor.name).is_some())
            .filter_map(|ExpectedTensor { name, shape, part, .. }| match part {
                ModelPart::Dense(role) => Some((role, (name, shape))),
                ModelPart::Experts(_) => None,
            })
            .collect();
        Ok(Checkpoint {
            config,
            generation_config,
            dir: dir.to_owned(),
            store,
            dense,
            packed: None,
            load: Load::default(),
        })
    }

    /// The parsed config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// `generation_config.json`, or its defaults where there is none.
    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation_config
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether this checkpoint holds all tensors of `layer`'s expert `expert`.
    pub fn has_expert(&self, layer: LayerId, expert: ExpertId) -> bool {
        if self.packed.is_some() {
            return [&*expert_name(layer, expert), HASHES]
                .iter()
                .all(|name| self.store.get(name).is_some());
        }
        self.expert_parts(layer, expert).is_ok()
    }

    /// Whether a tensor outside the experts is there.
    pub fn has(&self, role: TensorRole) -> bool {
        self.dense.contains_key(&role)
    }

    /// A matrix outside the experts as it is stored; an error if it is not there or the checkpoint is packed.
    pub fn matrix(&self, role: TensorRole) -> Result<MatrixSource<'_>, WeightsError> {
        self.refuse_packed()?;
        let (name, shape) = self.dense.get(&role).ok_or(WeightsError::NoTensor { role })?;
        let &[rows, cols] = &shape[..] else {
            return Err(WeightsError::Rank {
                role,
                wanted: "a matrix",
                found: shape.clone(),
            });
        };
        expert::whole_matrix(&self.store, name, [rows, cols], fp8_block(&self.config))
            .ok_or(WeightsError::NoTensor { role })
    }

    /// A vector outside the experts, as f32.
    pub fn vector(&self, role: TensorRole) -> Result<Vec<f32>, WeightsError> {
        let (name, shape) = self.dense.get(&role).ok_or(WeightsError::NoTensor { role })?;
        let (&[length] | &[1, length]) = &shape[..] else {
            return Err(WeightsError::Rank {
                role,
                wanted: "a vector",
                found: shape.clone(),
            });
        };
        if self.packed.is_some() {
            return self.packed_vector(role, length);
        }
        let source =
            expert::whole_matrix(&self.store, name, [1, length], None).ok_or(WeightsError::NoTensor { role })?;
        let stored = expert::read_vector(&source);
        Ok(match self.store.get(name).map(|stored| &stored.arrangement) {
            Some(Arrangement::PairedHead(head)) => {
                (0..length).map(|index| stored[tensor::paired(*head, index)]).collect()
            }
            _ => stored,
        })
    }

    fn refuse_packed(&self) -> Result<(), WeightsError> {
        match &self.packed {
            Some(packed) => Err(WeightsError::IsPacked {
                dir: self.dir.clone(),
                stored: packed.format,
            }),
            None => Ok(()),
        }
    }

    /// One expert's matrices and biases as they are stored; an error if it is not there or the checkpoint is packed.
    pub fn expert(&self, layer: LayerId, expert: ExpertId) -> Result<ExpertSource<'_>, WeightsError> {
        self.expert_parts(layer, expert).map(ExpertSource::from)
    }

    /// The number format that is used unless another is asked for: that of packed weights; that in which most of the experts' weights (of a model
    /// without experts: all weights) are stored where they are MXFP4, or GGUF's `Q8_0` or `Q4_0`. Otherwise that of most
    /// of the weights that are there, f16 counting as f32 and other blocks of GGUF as bf16; for fp8 that of the config,
    /// bf16 unless it says f32.
    pub fn default_format(&self) -> NumberFormat {
        if let Some(packed) = &self.packed {
            return packed.format;
        }
        let configured = || match self.config.stored_dtype {
            Some(StoredDtype::F32) => NumberFormat::F32,
            _ => NumberFormat::Bf16,
        };
        match self.config.quantization {
            WeightQuantization::None => {}
            // Said by the config, so that a gateway's copy without experts says the same.
            WeightQuantization::Mxfp4 => return NumberFormat::Mxfp4,
            WeightQuantization::Fp8Block { .. } => return configured(),
        }
        let all = self.stored_elements(|_| true);
        let experts = self.stored_elements(|part| matches!(part, ModelPart::Experts(_)));
        let deciding = if experts.is_empty() { &all } else { &experts };
        let total: u64 = deciding.values().sum();
        for (block, format) in [
            (BlockType::Q8_0, NumberFormat::Int8),
            (BlockType::Q4_0, NumberFormat::Int4),
            (BlockType::Mxfp4, NumberFormat::Mxfp4),
        ] {
            if deciding
                .get(&Dtype::Block(block))
                .is_some_and(|&elements| 2 * elements > total)
            {
                return format;
            }
        }
        let (mut wide, mut narrow) = (0u64, 0u64);
        for (dtype, elements) in all {
            match dtype {
                Dtype::Bf16 | Dtype::Block(_) => narrow += elements,
                _ => wide += elements,
            }
        }
        match (wide, narrow) {
            (0, 0) => configured(),
            _ if narrow > wide => NumberFormat::Bf16,
            _ => NumberFormat::F32,
        }
    }

    /// Elements of the matrices that are there, by their type, of the parts that `counts`.
    fn stored_elements(&self, counts: impl Fn(ModelPart) -> bool) -> HashMap<Dtype, u64> {
        let mut elements = HashMap::new();
        for tensor in expected_in(&self.config, self.store.expert_layout(&self.config)) {
            let Some(stored) = self.store.get(&tensor.name) else {
                continue;
            };
            if tensor.shape.len() > 1 && counts(tensor.part) {
                *elements.entry(expert::known_dtype(stored)).or_insert(0) +=
                    stored.shape.iter().map(|&dim| dim as u64).product::<u64>();
            }
        }
        elements
    }

    pub(crate) fn expert_parts(&self, layer: LayerId, expert: ExpertId) -> Result<ExpertParts<'_>, WeightsError> {
        self.refuse_packed()?;
        let is_moe = |layer: &moerun_types::LayerConfig| layer.feed_forward == FeedForwardKind::Moe;
        self.config
            .moe
            .as_ref()
            .filter(|_| self.config.layers.get(layer.0 as usize).is_some_and(is_moe))
            .and_then(|moe| expert::find(&self.store, &self.config, moe, layer, expert))
            .ok_or(WeightsError::NoExpert { layer, expert })
    }
}

fn read_config(directory: &Directory) -> Result<ModelConfig, WeightsError> {
    const NAME: &str = "config.json";
    let text = directory
        .read_text(NAME, MAX_CONFIG_BYTES)?
        .ok_or_else(|| WeightsError::Io {
            path: directory.path().join(NAME),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
    Ok(ModelConfig::from_json(&text)?)
}

/// Length of the blocks that share a scale in fp8 checkpoints.
pub(crate) fn fp8_block(config: &ModelConfig) -> Option<[usize; 2]> {
    match config.quantization {
        WeightQuantization::Fp8Block { rows, cols } => Some([rows, cols]),
        WeightQuantization::None | WeightQuantization::Mxfp4 => None,
    }
}
