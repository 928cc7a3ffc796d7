//! The part of the transformer that the gateway holds.

use moerun_kernels::{Activations, CpuPool, Workspace};
use moerun_routing::{GateMemory, Routing};
use moerun_types::{ActivationFormat, LayerId, ModelConfig, NumberFormat};
use moerun_weights::Checkpoint;
use ndarray::{Array2, ArrayView2, ArrayViewMut2};

use crate::{
    KvCache, ModelError, Step,
    attention::AttentionContext,
    embedding::Embedding,
    feed_forward,
    head::Head,
    layer::{Layer, LayerFeedForward},
    loader::Loader,
    memory::reshape,
    norm::Norm,
    rope::RotaryEmbedding,
};

/// Everything of the transformer but the experts.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    /// Of the experts.
    format: NumberFormat,
    embedding: Embedding,
    rope: RotaryEmbedding,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Head,
}

/// What follows a layer's attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routed {
    /// A dense feed-forward.
    Dense,
    /// A MoE block, and the gate has chosen.
    Moe,
}

/// The input of a layer's feed-forward and, if that is a MoE block, the gate's decision on it. What was said of one
/// layer makes room for the next.
#[derive(Debug, Clone)]
pub struct MoeInput {
    /// The normed rows, `[tokens, hidden]`.
    pub hidden_states: Array2<f32>,
    /// Raw output of the router, `[tokens, num_experts]`.
    pub router_logits: Array2<f32>,
    /// The rows rounded for the experts: what goes on the wire, or to the local experts.
    pub activations: Activations,
    /// Experts and final weights.
    pub routing: Routing,
    gate_memory: GateMemory,
}

impl Default for MoeInput {
    /// No rows.
    fn default() -> Self {
        Self {
            hidden_states: Array2::default((0, 0)),
            router_logits: Array2::default((0, 0)),
            activations: Activations::empty(ActivationFormat::F32),
            routing: Routing::default(),
            gate_memory: GateMemory::default(),
        }
    }
}

impl Model {
    /// Loads all tensors outside the experts for a run with experts in `format`: matrices packed in
    /// [`NumberFormat::for_dense`], embedding and head in [`NumberFormat::for_vocabulary`]; norms, routers and biases
    /// stay f32.
    /// `progress(done_bytes, total_bytes)` is called as it goes.
    pub fn load(
        checkpoint: &Checkpoint,
        format: NumberFormat,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config().clone();
        let mut loader = Loader::new(checkpoint, format, progress);
        let embedding = Embedding::load(&mut loader)?;
        let layers = (0..)
            .map(LayerId)
            .zip(&config.layers)
            .map(|(id, layer)| Layer::load(&mut loader, id, layer.feed_forward))
            .collect::<Result<Vec<_>, _>>()?;
        let final_norm = Norm::load_final(&mut loader)?;
        let head = Head::load(&mut loader, &embedding)?;
        loader.finish();
        let rope = RotaryEmbedding::new(&config.rope, config.max_position_embeddings);
        Ok(Model {
            config,
            format,
            embedding,
            rope,
            layers,
            final_norm,
            head,
        })
    }

    /// The config.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number format of the experts that the model is run with.
    pub fn format(&self) -> NumberFormat {
        self.format
    }

    /// `[tokens]` → `[tokens, hidden]`, into `hidden_states`. Ids must be below the vocabulary's size (checked by the
    /// caller).
    pub fn embed(&self, token_ids: &[u32], hidden_states: &mut Array2<f32>) {
        self.embedding.forward(token_ids, hidden_states);
    }

    /// Attention of one layer with its residual add: `hidden_states`, `[tokens, hidden]`, is changed in place, and the
    /// rows' keys and values are written to `kv`.
    pub fn attend(
        &self,
        pool: &CpuPool,
        layer: LayerId,
        step: &Step<'_>,
        kv: &mut KvCache,
        hidden_states: &mut Array2<f32>,
    ) {
        let index = layer.0 as usize;
        let weights = &self.layers[index];
        let workspace = pool.workspace();
        let context = AttentionContext {
            workspace: &workspace,
            layer: &self.config.layers[index],
            rope: &self.rope,
            rows: workspace.collect(step.rows()),
            kv: &mut kv.layers[index],
        };
        let normed = weights.attention_norm.forward(&workspace, hidden_states.view());
        let output = weights.attention.forward(context, normed.view());
        self.add_branch(hidden_states, output.view());
    }

    /// Norm before the feed-forward, and the gate where the layer has one, into `input`.
    pub fn route(
        &self,
        pool: &CpuPool,
        layer: LayerId,
        hidden_states: &Array2<f32>,
        input: &mut MoeInput,
    ) -> Result<Routed, ModelError> {
        let weights = &self.layers[layer.0 as usize];
        let normed = &mut input.hidden_states;
        reshape(normed, hidden_states.nrows(), hidden_states.ncols());
        weights
            .feed_forward_norm
            .forward_into(pool, hidden_states.view(), normed.view_mut());
        match weights.feed_forward {
            LayerFeedForward::Dense(_) => Ok(Routed::Dense),
            LayerFeedForward::Moe { .. } => self.choose(pool, layer, input).map(|()| Routed::Moe),
        }
    }

    /// The gate on rows that are already normed: the input of a MoE block as the golden files record it.
    ///
    /// A layer without experts, rows of another width than `hidden`, and router logits that are not finite are errors.
    pub fn route_moe_input(
        &self,
        pool: &CpuPool,
        layer: LayerId,
        moe_input: Array2<f32>,
    ) -> Result<MoeInput, ModelError> {
        let (wanted, found) = (self.config.hidden, moe_input.ncols());
        if found != wanted {
            return Err(ModelError::Width { layer, wanted, found });
        }
        let mut input = MoeInput {
            hidden_states: moe_input,
            ..MoeInput::default()
        };
        self.choose(pool, layer, &mut input)?;
        Ok(input)
    }

    /// Fills in what follows from the normed rows.
    fn choose(&self, pool: &CpuPool, layer: LayerId, input: &mut MoeInput) -> Result<(), ModelError> {
        let Some(LayerFeedForward::Moe { gate, .. }) = self.feed_forward(layer) else {
            return Err(ModelError::NotMoe {
                layer,
                moe_layers: self.config.moe_layers(),
            });
        };
        let MoeInput {
            hidden_states,
            router_logits,
            activations,
            routing,
            gate_memory,
        } = input;
        gate.forward(pool, hidden_states, router_logits, gate_memory, routing)
            .map_err(|source| ModelError::Gate { layer, source })?;
        let format = self.format.activations();
        if activations.format() != format {
            *activations = Activations::empty(format);
        }
        activations.replace(hidden_states.view());
        Ok(())
    }

    /// Output of the dense feed-forward of a layer, `[tokens, hidden]`, into `output`; panics if the layer is not dense.
    pub fn dense_output(&self, pool: &CpuPool, layer: LayerId, normed: &Array2<f32>, output: &mut Array2<f32>) {
        match self.feed_forward(layer) {
            Some(LayerFeedForward::Dense(weights)) => feed_forward::run(pool, weights, normed, output),
            _ => panic!("layer {layer} is not dense"),
        }
    }

    /// Whether a layer has shared experts: a MoE block's output is then the routed experts' combined sum and, added to
    /// that, [`Model::shared_output`].
    pub fn has_shared_experts(&self, layer: LayerId) -> bool {
        matches!(
            self.feed_forward(layer),
            Some(LayerFeedForward::Moe { shared: Some(_), .. })
        )
    }

    /// The shared experts' contribution to a MoE block, `[tokens, hidden]` → `[tokens, hidden]`, into `output`; panics
    /// if the layer has none. `moe_input` is [`MoeInput::hidden_states`]. May run while the routed experts are being
    /// waited for.
    pub fn shared_output(&self, pool: &CpuPool, layer: LayerId, moe_input: &Array2<f32>, output: &mut Array2<f32>) {
        match self.feed_forward(layer) {
            Some(LayerFeedForward::Moe {
                shared: Some(shared), ..
            }) => shared.forward(pool, moe_input, output),
            _ => panic!("layer {layer} has no shared experts"),
        }
    }

    /// Adds the feed-forward's output to the residual stream.
    pub fn finish(&self, hidden_states: &mut Array2<f32>, feed_forward_output: &Array2<f32>) {
        self.add_branch(hidden_states, feed_forward_output.view());
    }

    /// Final norm, `[rows, hidden]` → `[rows, hidden]`.
    pub fn final_norm(&self, pool: &CpuPool, hidden_states: &Array2<f32>) -> Array2<f32> {
        let mut normed = Array2::zeros(hidden_states.raw_dim());
        self.final_norm
            .forward_into(pool, hidden_states.view(), normed.view_mut());
        normed
    }

    /// Logits of rows that went through [`Model::final_norm`], `[rows, hidden]` → `[rows, vocab]`.
    pub fn logits(&self, pool: &CpuPool, normed: &Array2<f32>) -> Array2<f32> {
        self.head.forward(&pool.workspace(), normed.view()).to_owned()
    }

    /// Final norm and logits of some rows of the residual stream, `[tokens, hidden]` → `[rows.len(), vocab]`.
    pub fn logits_of_rows<'w>(
        &self,
        workspace: &'w Workspace<'_>,
        hidden_states: &Array2<f32>,
        rows: impl ExactSizeIterator<Item = usize>,
    ) -> ArrayViewMut2<'w, f32> {
        let mut selected = workspace.matrix(rows.len(), hidden_states.ncols());
        for (row, mut selected) in rows.zip(selected.rows_mut()) {
            selected.assign(&hidden_states.row(row));
        }
        let mut normed = workspace.matrix(selected.nrows(), selected.ncols());
        self.final_norm
            .forward_into(workspace.pool(), selected.view(), normed.view_mut());
        self.head.forward(workspace, normed.view())
    }

    fn feed_forward(&self, layer: LayerId) -> Option<&LayerFeedForward> {
        self.layers.get(layer.0 as usize).map(|layer| &layer.feed_forward)
    }

    /// `hidden_states += branch * residual_multiplier`.
    fn add_branch(&self, hidden_states: &mut Array2<f32>, branch: ArrayView2<'_, f32>) {
        let multiplier = self.config.residual_multiplier;
        hidden_states.zip_mut_with(&branch, |value, branch| *value += branch * multiplier);
    }
}
