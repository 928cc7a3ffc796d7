//! The part of the transformer that the gateway holds.

use moerun_kernels::{Activations, CpuPool};
use moerun_routing::Routing;
use moerun_types::{LayerId, ModelConfig, NumberFormat};
use moerun_weights::Checkpoint;
use ndarray::Array2;

use crate::{
    KvCache, ModelError, Step,
    attention::AttentionContext,
    embedding::Embedding,
    feed_forward,
    head::Head,
    layer::{Layer, LayerFeedForward},
    loader::Loader,
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

/// What a layer's feed-forward is given.
#[derive(Debug)]
pub enum Routed {
    /// A dense layer: the normed rows, `[tokens, hidden]`.
    Dense(Array2<f32>),
    /// A MoE layer.
    Moe(MoeInput),
}

/// The input of a MoE block and the gate's decision on it.
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

    /// `[tokens]` → `[tokens, hidden]`. Ids must be below the vocabulary's size (checked by the caller).
    pub fn embed(&self, token_ids: &[u32]) -> Array2<f32> {
        self.embedding.forward(token_ids)
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
        let rows = step.rows();
        let context = AttentionContext {
            pool,
            layer: &self.config.layers[index],
            rope: &self.rope,
            rows: &rows,
            kv: &mut kv.layers[index],
        };
        let normed = weights.attention_norm.forward_parallel(pool, hidden_states);
        let output = weights.attention.forward(context, &normed);
        self.add_branch(hidden_states, &output);
    }

    /// Norm before the feed-forward, and the gate where the layer has one.
    pub fn route(&self, pool: &CpuPool, layer: LayerId, hidden_states: &Array2<f32>) -> Result<Routed, ModelError> {
        let weights = &self.layers[layer.0 as usize];
        let normed = weights.feed_forward_norm.forward_parallel(pool, hidden_states);
        match weights.feed_forward {
            LayerFeedForward::Dense(_) => Ok(Routed::Dense(normed)),
            LayerFeedForward::Moe { .. } => self.route_moe_input(pool, layer, normed).map(Routed::Moe),
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
        let Some(LayerFeedForward::Moe { gate, .. }) = self.feed_forward(layer) else {
            return Err(ModelError::NotMoe {
                layer,
                moe_layers: self.config.moe_layers(),
            });
        };
        let (router_logits, routing) = gate
            .forward(pool, &moe_input)
            .map_err(|source| ModelError::Gate { layer, source })?;
        let activations = Activations::round(self.format.activations(), moe_input.view());
        Ok(MoeInput {
            hidden_states: moe_input,
            router_logits,
            activations,
            routing,
        })
    }

    /// Output of the dense feed-forward of a layer, `[tokens, hidden]`; panics if the layer is not dense.
    pub fn dense_output(&self, pool: &CpuPool, layer: LayerId, normed: &Array2<f32>) -> Array2<f32> {
        match self.feed_forward(layer) {
            Some(LayerFeedForward::Dense(weights)) => feed_forward::run(pool, weights, normed),
            _ => panic!("layer {layer} is not dense"),
        }
    }

    /// The shared experts' contribution to a MoE block, `[tokens, hidden]` → `[tokens, hidden]`, or `None` if the layer
    /// has none. `moe_input` is [`MoeInput::hidden_states`]. May run while the routed experts are being waited for.
    pub fn shared_output(&self, pool: &CpuPool, layer: LayerId, moe_input: &Array2<f32>) -> Option<Array2<f32>> {
        match self.feed_forward(layer) {
            Some(LayerFeedForward::Moe {
                shared: Some(shared), ..
            }) => Some(shared.forward(pool, moe_input)),
            _ => None,
        }
    }

    /// Output of a MoE block: the routed experts' combined sum, plus the shared experts'.
    pub fn moe_output(&self, combined: Array2<f32>, shared: Option<Array2<f32>>) -> Array2<f32> {
        match shared {
            Some(shared) => combined + shared,
            None => combined,
        }
    }

    /// Adds the feed-forward's output to the residual stream.
    pub fn finish(&self, hidden_states: &mut Array2<f32>, feed_forward_output: &Array2<f32>) {
        self.add_branch(hidden_states, feed_forward_output);
    }

    /// Final norm, `[rows, hidden]` → `[rows, hidden]`.
    pub fn final_norm(&self, hidden_states: &Array2<f32>) -> Array2<f32> {
        self.final_norm.forward(hidden_states)
    }

    /// Logits of rows that went through [`Model::final_norm`], `[rows, hidden]` → `[rows, vocab]`.
    pub fn logits(&self, pool: &CpuPool, normed: &Array2<f32>) -> Array2<f32> {
        self.head.forward(pool, normed)
    }

    fn feed_forward(&self, layer: LayerId) -> Option<&LayerFeedForward> {
        self.layers.get(layer.0 as usize).map(|layer| &layer.feed_forward)
    }

    /// `hidden_states += branch * residual_multiplier`.
    fn add_branch(&self, hidden_states: &mut Array2<f32>, branch: &Array2<f32>) {
        let multiplier = self.config.residual_multiplier;
        hidden_states.zip_mut_with(branch, |value, branch| *value += branch * multiplier);
    }
}
