//! A golden checkpoint loaded with local experts, and prompts run through it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use moerun_dispatch::{ExpertBackend, ExpertRequest, LocalExperts};
use moerun_engine::{Capture, Forward, ForwardMemory};
use moerun_kernels::{CpuPool, KV_PAGE_TOKENS};
use moerun_model::{ExpertBank, KvCache, Model, MoeInput, Step, StepSequence};
use moerun_routing::Routing;
use moerun_types::{
    BlockRange, CombineMode, ExpertId, ExpertSlice, KvFormat, LayerId, ModelConfig, NumberFormat, Numerics,
};
use moerun_weights::{Checkpoint, MemoryNeed, Needs};
use ndarray::{Array2, Axis, concatenate};

/// Small, so that every tiny expert has several blocks and a short last one.
const COMBINE_BLOCK: usize = 8;

/// Most tokens of a test sequence: the longest prompt and its continuation.
const MAX_TOKENS: usize = 128;

/// The spelling of `config.json`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Spelling {
    /// As written by transformers 5.
    Transformers5,
    /// As most checkpoints on the Hub have it.
    Hub,
}

/// A model with its experts in this process.
pub(crate) struct Fixture {
    pub(crate) model: Model,
    pool: Arc<CpuPool>,
    experts: LocalExperts,
}

/// Keys and values of some sequences, and how far each has come.
pub(crate) struct Session {
    kv: KvCache,
    pages: Vec<Vec<u32>>,
    lengths: Vec<usize>,
    memory: ForwardMemory,
}

/// What a forward pass computed, rows of all sequences one after another.
#[derive(Default)]
pub(crate) struct Captured {
    /// Residual stream after each layer.
    pub(crate) layers: Vec<Array2<f32>>,
    /// Input and output of each MoE block.
    pub(crate) moe: Vec<(LayerId, MoeInput, Array2<f32>)>,
}

pub(crate) fn family_dir(family: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden")).join(family)
}

impl Fixture {
    pub(crate) fn load(family: &str, spelling: Spelling, format: NumberFormat) -> Self {
        let dir = family_dir(family);
        match spelling {
            Spelling::Transformers5 => Self::load_dir(&dir, format),
            Spelling::Hub => {
                let copy = tempfile::tempdir().expect("a temporary directory");
                for file in fs::read_dir(&dir).expect("the golden directory") {
                    let file = file.expect("a file of the golden directory");
                    if file.file_name() != "golden.safetensors" {
                        fs::copy(file.path(), copy.path().join(file.file_name())).expect("a copy");
                    }
                }
                fs::copy(dir.join("config.hub.json"), copy.path().join("config.json")).expect("a copy");
                Self::load_dir(copy.path(), format)
            }
        }
    }

    pub(crate) fn load_dir(dir: &Path, format: NumberFormat) -> Self {
        let checkpoint = Checkpoint::open(dir, Needs::All).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let numerics = Numerics {
            format,
            combine: CombineMode::Exact,
            combine_block: COMBINE_BLOCK.max(format.column_unit()),
        };
        let mut reports = Vec::new();
        let model =
            Model::load(&checkpoint, format, &mut |done, total| reports.push((done, total))).expect("the model loads");
        // The last tensor makes the estimate full, and no tensor before it: the estimate is exact.
        let (done, total): (Vec<u64>, Vec<u64>) = reports.into_iter().unzip();
        let first_full = done.iter().position(|done| *done == total[0]);
        assert!(
            done.is_sorted() && total.iter().all(|one| *one == total[0]),
            "{done:?} of {total:?}"
        );
        assert_eq!(first_full, Some(done.len() - 2), "{done:?} of {}", total[0]);
        let slices = all_experts(checkpoint.config(), numerics);
        let bank = ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| {}).expect("the experts load");
        let need = MemoryNeed::of(checkpoint.config(), format).all_experts_bytes;
        assert_eq!(bank.memory_bytes(), need, "{format}: bytes of the experts");
        let pool = Arc::new(CpuPool::new(2));
        let experts = LocalExperts::new(Arc::new(bank), Arc::clone(&pool));
        Fixture { model, pool, experts }
    }

    /// Room for `num_sequences` sequences, whose pages alternate.
    pub(crate) fn session(&self, num_sequences: usize) -> Session {
        let pages_each = MAX_TOKENS.div_ceil(KV_PAGE_TOKENS);
        let kv = KvCache::new(self.model.config(), KvFormat::F32, pages_each * num_sequences);
        let page = |sequence: usize, index: usize| u32::try_from(index * num_sequences + sequence).expect("few pages");
        let pages = (0..num_sequences).map(|sequence| (0..pages_each).map(|index| page(sequence, index)).collect());
        Session {
            kv,
            pages: pages.collect(),
            lengths: vec![0; num_sequences],
            memory: ForwardMemory::default(),
        }
    }

    /// Appends `tokens[i]` to sequence `i`; returns the final hidden states (after the last norm) of those tokens.
    pub(crate) fn forward(
        &self,
        session: &mut Session,
        tokens: &[&[u32]],
        capture: Option<&mut dyn Capture>,
    ) -> Array2<f32> {
        let mut first_row = 0;
        let mut sequences = Vec::new();
        for ((pages, &first_position), tokens) in session.pages.iter().zip(&session.lengths).zip(tokens) {
            sequences.push(StepSequence {
                rows: first_row..first_row + tokens.len(),
                first_position,
                start_position: 0,
                pages,
                rope_length: first_position + tokens.len(),
            });
            first_row += tokens.len();
        }
        let step = Step { sequences: &sequences };
        let ids = tokens.concat();
        let forward = Forward {
            pool: &self.pool,
            model: &self.model,
            experts: &self.experts,
        };
        let hidden = forward
            .run(&mut session.memory, &ids, &step, &mut session.kv, capture)
            .expect("a step");
        session
            .lengths
            .iter_mut()
            .zip(tokens)
            .for_each(|(length, tokens)| *length += tokens.len());
        self.model.final_norm(&self.pool, hidden)
    }

    /// Runs one sequence alone, `chunk` tokens at a time.
    pub(crate) fn forward_in_chunks(&self, tokens: &[u32], chunk: usize) -> Array2<f32> {
        let mut session = self.session(1);
        let parts: Vec<_> = tokens
            .chunks(chunk)
            .map(|part| self.forward(&mut session, &[part], None))
            .collect();
        let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
        concatenate(Axis(0), &views).expect("rows of one width")
    }

    /// The output of one MoE block, shared experts included, for rows that are normed already; and the gate's choice.
    pub(crate) fn moe_block(&self, layer: LayerId, rows: &Array2<f32>) -> (Array2<f32>, Routing) {
        let input = self
            .model
            .route_moe_input(&self.pool, layer, rows.clone())
            .expect("finite rows");
        let pending = self.experts.submit(ExpertRequest {
            layer,
            activations: input.activations,
            routing: input.routing.clone(),
        });
        let mut output = pending
            .and_then(|pending| pending.wait())
            .expect("local experts")
            .hidden_states;
        if self.model.has_shared_experts(layer) {
            let mut shared = Array2::zeros((0, 0));
            self.model.shared_output(&self.pool, layer, rows, &mut shared);
            output += &shared;
        }
        (output, input.routing)
    }

    pub(crate) fn logits(&self, hidden_final: &Array2<f32>) -> Array2<f32> {
        self.model.logits(&self.pool, hidden_final)
    }
}

impl Capture for Captured {
    fn moe(&mut self, layer: LayerId, input: &MoeInput, output: &Array2<f32>) {
        self.moe.push((layer, input.clone(), output.clone()));
    }

    fn layer_output(&mut self, layer: LayerId, hidden_states: &Array2<f32>) {
        assert_eq!(layer.0 as usize, self.layers.len(), "layers come in order");
        self.layers.push(hidden_states.clone());
    }
}

fn all_experts(config: &ModelConfig, numerics: Numerics) -> Vec<ExpertSlice> {
    let Some(moe) = &config.moe else { return Vec::new() };
    let end = u16::try_from(numerics.num_blocks(moe.intermediate)).expect("few blocks");
    let num_experts = u16::try_from(moe.num_experts).expect("few experts");
    let experts = |layer| {
        (0..num_experts).map(ExpertId).map(move |expert| ExpertSlice {
            layer,
            expert,
            blocks: BlockRange { first: 0, end },
        })
    };
    config.moe_layers().into_iter().flat_map(experts).collect()
}
