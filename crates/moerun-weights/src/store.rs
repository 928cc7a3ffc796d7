//! All tensors of a checkpoint by name, in the shards that hold them.

use std::{collections::HashMap, fs::File, io, ops::Range, os::unix::fs::FileExt, sync::Arc};

use memmap2::Mmap;
use moerun_types::{Family, ModelConfig};
use serde_json::Value;

use crate::{
    WeightsError,
    directory::{self, Directory, Found},
    expert_tensors::ExpertLayout,
    gguf::{self, Arrangement, GgufFile},
    header::{self, ElementType, MAX_TENSORS},
    index::{self, Layout, Shards},
};

/// A tensor on disk.
#[derive(Debug)]
pub(crate) struct StoredTensor {
    pub(crate) element: ElementType,
    pub(crate) shape: Vec<usize>,
    shard: usize,
    bytes: Range<usize>,
    /// How its rows are stored (GGUF).
    pub(crate) arrangement: Arrangement,
}

/// All tensors of a checkpoint by name. Names are those of the plain family: a prefix common to all is taken off.
#[derive(Debug)]
pub(crate) struct TensorStore {
    shards: Vec<Shard>,
    tensors: HashMap<String, StoredTensor>,
    /// Where the experts are not in the layout of their family.
    expert_layout: Option<ExpertLayout>,
}

#[derive(Debug)]
struct Shard {
    name: String,
    map: Arc<Mmap>,
    /// What is mapped, to be read instead where all of it is wanted at once.
    file: Option<File>,
    /// What stands under `__metadata__`, unchecked.
    metadata: Option<Value>,
}

impl TensorStore {
    /// Maps all shards and reads their headers. A shard that is not there is an error unless `may_be_absent` holds for
    /// every tensor that the index says is in it.
    pub(crate) fn open(
        directory: &Directory,
        family: Family,
        may_be_absent: &dyn Fn(&str) -> bool,
    ) -> Result<Self, WeightsError> {
        let mut store = Self::of_files(directory, &index::find(directory)?, may_be_absent)?;
        if family == Family::Llama4Text {
            store.strip_common_prefix("language_model.");
        }
        Ok(store)
    }

    /// No tensors at all.
    pub(crate) fn empty() -> Self {
        TensorStore {
            shards: Vec::new(),
            tensors: HashMap::new(),
            expert_layout: None,
        }
    }

    /// As [`TensorStore::open`], of files that were found.
    pub(crate) fn of_files(
        directory: &Directory,
        layout: &Layout,
        may_be_absent: &dyn Fn(&str) -> bool,
    ) -> Result<Self, WeightsError> {
        let mut store = Self::empty();
        match layout {
            Layout::Single(name) => {
                store.add_shard(directory, name, None)?;
            }
            Layout::Sharded(shards) => store.add_shards(directory, shards, may_be_absent)?,
        }
        Ok(store)
    }

    /// The tensors of a GGUF file under the names of the config's family.
    pub(crate) fn of_gguf(file: GgufFile, config: &ModelConfig) -> Result<Self, WeightsError> {
        let name = file.path.display().to_string();
        let mut tensors = HashMap::new();
        for found in gguf::named_tensors(&file, config) {
            let stored = StoredTensor {
                element: found.dtype.into(),
                shape: found.shape,
                shard: 0,
                bytes: found.bytes,
                arrangement: found.arrangement,
            };
            if tensors.len() == MAX_TENSORS {
                let reason = format!("wanted at most {MAX_TENSORS} tensors in a checkpoint, found more");
                return Err(WeightsError::Header {
                    path: file.path,
                    reason,
                });
            }
            if tensors.insert(found.name.clone(), stored).is_some() {
                return Err(WeightsError::Duplicate {
                    tensor: found.name,
                    first: name.clone(),
                    second: name,
                });
            }
        }
        Ok(TensorStore {
            shards: vec![Shard {
                name,
                map: Arc::new(file.map),
                file: None,
                metadata: None,
            }],
            tensors,
            expert_layout: Some(ExpertLayout::GGUF),
        })
    }

    /// How the experts are stored here.
    pub(crate) fn expert_layout(&self, config: &ModelConfig) -> ExpertLayout {
        self.expert_layout.unwrap_or_else(|| ExpertLayout::of(config))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// Bytes of a tensor; touching them may read the disk.
    pub(crate) fn bytes(&self, tensor: &StoredTensor) -> &[u8] {
        &self.shards[tensor.shard].map[tensor.bytes.clone()]
    }

    /// Other bytes of the shard that holds a tensor.
    pub(crate) fn beside(&self, tensor: &StoredTensor, bytes: Range<usize>) -> &[u8] {
        &self.shards[tensor.shard].map[bytes]
    }

    /// The mapping that holds a tensor, and where.
    pub(crate) fn place(&self, tensor: &StoredTensor) -> (&Arc<Mmap>, Range<usize>) {
        (&self.shards[tensor.shard].map, tensor.bytes.clone())
    }

    /// Reads a part of a mapping, from the file where the mapping is one of ours.
    pub(crate) fn read_at(&self, map: &Arc<Mmap>, start: usize, out: &mut [u8]) -> io::Result<()> {
        let shard = self.shards.iter().find(|shard| Arc::ptr_eq(&shard.map, map));
        match shard.and_then(|shard| shard.file.as_ref()) {
            Some(file) => file.read_exact_at(out, start as u64),
            None => {
                out.copy_from_slice(&map[start..start + out.len()]);
                Ok(())
            }
        }
    }

    /// Names of the shards, and what stands in each under `__metadata__`.
    pub(crate) fn metadata(&self) -> impl Iterator<Item = (&str, Option<&Value>)> {
        self.shards
            .iter()
            .map(|shard| (shard.name.as_str(), shard.metadata.as_ref()))
    }

    /// Asks for huge pages: a kernel without them for files goes on with small ones.
    pub(crate) fn advise_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        for shard in &self.shards {
            let _ = shard.map.advise(memmap2::Advice::HugePage);
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// File name of the shard that holds a tensor.
    pub(crate) fn shard_name(&self, tensor: &StoredTensor) -> &str {
        &self.shards[tensor.shard].name
    }

    fn add_shards(
        &mut self,
        directory: &Directory,
        shards: &Shards,
        may_be_absent: &dyn Fn(&str) -> bool,
    ) -> Result<(), WeightsError> {
        for (shard, tensors) in &shards.tensors_by_shard {
            if self.add_shard(directory, shard, Some(shards))? {
                continue;
            }
            match tensors.iter().find(|tensor| !may_be_absent(tensor)) {
                Some(tensor) => {
                    return Err(WeightsError::MissingShard {
                        shard: shard.clone(),
                        tensor: tensor.clone(),
                    });
                }
                None => tracing::info!(%shard, tensors = tensors.len(), "shard is absent and not needed"),
            }
        }
        for (shard, tensors) in &shards.tensors_by_shard {
            let Some(position) = self.shards.iter().position(|open| open.name == *shard) else {
                continue;
            };
            for tensor in tensors {
                if self.tensors.get(tensor).is_none_or(|stored| stored.shard != position) {
                    return Err(WeightsError::Misplaced {
                        tensor: tensor.clone(),
                        wanted: shard.clone(),
                        found: "no shard".to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Adds the tensors of one file; `false` if there is no such file.
    fn add_shard(&mut self, directory: &Directory, name: &str, index: Option<&Shards>) -> Result<bool, WeightsError> {
        let Found::File(target) = directory.find(name)? else {
            return Ok(false);
        };
        let path = directory.path().join(name);
        let (map, file) = directory::map(&target)?;
        let shard = self.shards.len();
        let header = header::parse(&path, &map)?;
        for found in header.tensors {
            let tensor = found.name;
            if let Some(first) = self.tensors.get(&tensor) {
                let first = self.shard_name(first).to_owned();
                return Err(WeightsError::Duplicate {
                    tensor,
                    first,
                    second: name.to_owned(),
                });
            }
            if let Some(index) = index {
                let wanted = index.shard_by_tensor.get(&tensor);
                if wanted.is_none_or(|wanted| wanted != name) {
                    let wanted = wanted.cloned().unwrap_or_else(|| "no shard".to_owned());
                    return Err(WeightsError::Misplaced {
                        tensor,
                        wanted,
                        found: name.to_owned(),
                    });
                }
            }
            if self.tensors.len() == MAX_TENSORS {
                let reason = format!("wanted at most {MAX_TENSORS} tensors in a checkpoint, found more");
                return Err(WeightsError::Header { path, reason });
            }
            let stored = StoredTensor {
                element: found.element,
                shape: found.shape,
                shard,
                bytes: found.bytes,
                arrangement: Arrangement::AsTrained,
            };
            self.tensors.insert(tensor, stored);
        }
        self.shards.push(Shard {
            name: name.to_owned(),
            map: Arc::new(map),
            file: Some(file),
            metadata: header.metadata,
        });
        Ok(true)
    }

    /// The language model of a multimodal checkpoint, saved alone, may keep the prefix it had there.
    fn strip_common_prefix(&mut self, prefix: &str) {
        if self.tensors.is_empty() || !self.tensors.keys().all(|name| name.starts_with(prefix)) {
            return;
        }
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors = tensors
            .into_iter()
            .map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor))
            .collect();
    }
}
