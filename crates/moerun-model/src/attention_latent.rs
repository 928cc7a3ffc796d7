//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed at every position.
//!
//! Keys and values of all heads are linear in one latent vector per token, so the cache holds the latent (and the one
//! rotary key) alone: a head's query goes through the key half of `kv_b` before it meets the latents, and the weighted
//! sum of latents goes through the value half after. The latent is held once, as the start of its key. Prefill does the same as decode, so that a prompt gives the same
//! bits however it is cut into chunks.

use moerun_kernels::{ActivationRows, PackedMatrix, Workspace, paged_attention};
use moerun_types::{LatentAttention, LayerConfig};
use moerun_weights::LayerTensor;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};

use crate::{
    ModelError,
    attention::{AttentionContext, elements, elements_mut, row_of, store},
    linear::Linear,
    loader::LayerLoader,
    mask::attention_rows,
    norm::Norm,
    parallel,
    rope::RotaryEmbedding,
    step::StepRow,
};

/// Upstream gives the norms of the latents this constant, whatever `rms_norm_eps` says.
const LATENT_NORM_EPSILON: f32 = 1e-6;

/// Weights of one layer's latent attention.
#[derive(Debug)]
pub(crate) struct MultiHeadLatentAttention {
    shape: LatentAttention,
    queries: QueryProjection,
    /// `[kv_lora_rank + rope, hidden]`.
    kv_a_proj: Linear,
    /// Over the latent, `[kv_lora_rank]`.
    kv_a_norm: Norm,
    heads: Vec<Head>,
    /// `[hidden, num_heads * v]`.
    o_proj: Linear,
}

/// Rows → queries, `[tokens, num_heads * (nope + rope)]`.
#[derive(Debug)]
enum QueryProjection {
    /// `[num_heads * (nope + rope), hidden]`.
    Plain(Linear),
    /// Through a latent of its own.
    LowRank {
        /// `[q_lora_rank, hidden]`.
        down: Linear,
        norm: Norm,
        /// `[num_heads * (nope + rope), q_lora_rank]`.
        up: Linear,
    },
}

/// One head's share of `kv_b`.
#[derive(Debug)]
struct Head {
    /// Key half, transposed: `[kv_lora_rank, nope]`.
    absorb_query: PackedMatrix,
    /// Value half: `[v, kv_lora_rank]`.
    value: PackedMatrix,
}

impl MultiHeadLatentAttention {
    pub(crate) fn load(loader: &mut LayerLoader<'_, '_>, shape: &LatentAttention) -> Result<Self, ModelError> {
        let bias = |bias| shape.bias.then_some(bias);
        let queries = match shape.q_lora_rank {
            None => QueryProjection::Plain(loader.linear(LayerTensor::QProj, None)?),
            Some(_) => QueryProjection::LowRank {
                down: loader.linear(LayerTensor::QAProj, bias(LayerTensor::QABias))?,
                norm: Norm::rms(loader.vector(LayerTensor::QANorm)?, LATENT_NORM_EPSILON),
                up: loader.linear(LayerTensor::QBProj, None)?,
            },
        };
        Ok(MultiHeadLatentAttention {
            queries,
            kv_a_proj: loader.linear(LayerTensor::KvAProj, bias(LayerTensor::KvABias))?,
            kv_a_norm: Norm::rms(loader.vector(LayerTensor::KvANorm)?, LATENT_NORM_EPSILON),
            heads: load_heads(loader)?,
            o_proj: loader.linear(LayerTensor::OProj, bias(LayerTensor::OBias))?,
            shape: shape.clone(),
        })
    }

    /// `[tokens, hidden]` → `[tokens, hidden]`.
    pub(crate) fn forward<'a>(&self, context: AttentionContext<'a>, x: ArrayView2<'a, f32>) -> ArrayViewMut2<'a, f32> {
        let AttentionContext {
            workspace,
            layer,
            rope,
            rows,
            kv,
        } = context;
        let rotation = Rotation { layer, rope };
        let x = ActivationRows::round(workspace, self.o_proj.weight.format().activations(), x);
        let keys = self.keys(workspace, rotation, rows, x);
        let queries = self.absorbed_queries(workspace, rotation, rows, x);
        store(kv, rows, keys.view(), None);

        let mut attended = workspace.matrix(rows.len(), self.shape.num_heads * self.shape.kv_lora_rank);
        paged_attention(
            workspace.pool(),
            kv,
            workspace.collect(attention_rows(layer.mask, rows.iter().copied())),
            elements(queries.view()),
            self.shape.num_heads,
            self.shape.scale,
            None,
            elements_mut(&mut attended),
        );
        let values = self.values(workspace, attended.view());
        let values = ActivationRows::round(workspace, self.o_proj.weight.format().activations(), values.view());
        self.o_proj.forward(workspace, values)
    }

    /// The one key of each row, `[tokens, kv_lora_rank + rope]`: its latent, which is also its value, and the rotary key.
    fn keys<'a>(
        &self,
        workspace: &'a Workspace<'_>,
        rotation: Rotation<'_>,
        rows: &[StepRow<'_>],
        x: ActivationRows<'_>,
    ) -> ArrayViewMut2<'a, f32> {
        let rank = self.shape.kv_lora_rank;
        let mut keys = self.kv_a_proj.forward(workspace, x);
        let latents = self.kv_a_norm.forward(workspace, keys.slice(s![.., ..rank]));
        keys.slice_mut(s![.., ..rank]).assign(&latents);
        let width = keys.ncols();
        for (row, key) in rows.iter().zip(elements_mut(&mut keys).chunks_mut(width)) {
            rotation.apply(row, &mut key[rank..]);
        }
        keys
    }

    /// Queries as the cached keys want them, `[tokens, num_heads * (kv_lora_rank + rope)]`.
    fn absorbed_queries<'a>(
        &self,
        workspace: &'a Workspace<'_>,
        rotation: Rotation<'_>,
        rows: &[StepRow<'_>],
        x: ActivationRows<'a>,
    ) -> ArrayViewMut2<'a, f32> {
        let LatentAttention {
            kv_lora_rank: rank,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            ..
        } = self.shape;
        let queries = self.queries.forward(workspace, x); // [tokens, num_heads * (nope + rope)]
        let queries = queries.view();
        let own = |head: usize| queries.slice_move(s![.., head * (nope + rope)..head * (nope + rope) + nope]);
        let latents = self.of_each_head(workspace, |head| &head.absorb_query, own);

        let mut absorbed = workspace.matrix(rows.len(), self.heads.len() * (rank + rope));
        let width = absorbed.ncols();
        let run = parallel::rows_per_task(workspace.pool(), rows.len(), width);
        let parts = elements_mut(&mut absorbed).chunks_mut(run * width).enumerate();
        workspace.pool().for_each(workspace.collect(parts), |(part, absorbed)| {
            for (row, absorbed) in (*part * run..).zip(absorbed.chunks_mut(width)) {
                let heads = absorbed.chunks_mut(rank + rope).zip(&*latents);
                let queries = row_of(&queries, row).chunks(nope + rope);
                for ((absorbed, latents), query) in heads.zip(queries) {
                    absorbed[..rank].copy_from_slice(row_of(latents, row));
                    absorbed[rank..].copy_from_slice(&query[nope..]);
                    rotation.apply(&rows[row], &mut absorbed[rank..]);
                }
            }
        });
        absorbed
    }

    /// Weighted sums of latents, `[tokens, num_heads * kv_lora_rank]` → head outputs, `[tokens, num_heads * v]`.
    fn values<'a>(&self, workspace: &'a Workspace<'_>, attended: ArrayView2<'a, f32>) -> ArrayViewMut2<'a, f32> {
        let (rank, value_dim) = (self.shape.kv_lora_rank, self.shape.v_head_dim);
        let own = |head: usize| attended.slice_move(s![.., head * rank..(head + 1) * rank]);
        let of_heads = self.of_each_head(workspace, |head| &head.value, own);
        let mut values = workspace.matrix(attended.nrows(), self.heads.len() * value_dim);
        for (of_head, mut values) in of_heads.iter().zip(values.axis_chunks_iter_mut(Axis(1), value_dim)) {
            values.assign(of_head);
        }
        values
    }

    /// `x · Wᵀ` of every head at once, with its own rows `[tokens, in]` and its own matrix: `[tokens, out]` each.
    fn of_each_head<'a>(
        &self,
        workspace: &'a Workspace<'_>,
        matrix: impl Fn(&Head) -> &PackedMatrix,
        x: impl Fn(usize) -> ArrayView2<'a, f32>,
    ) -> &'a [ArrayView2<'a, f32>] {
        let own = workspace.pool().workspace();
        let products = self.heads.iter().enumerate().map(|(index, head)| {
            let matrix = matrix(head);
            let x = ActivationRows::round(workspace, matrix.format().activations(), x(index));
            (matrix, x)
        });
        let products = own.collect(products);
        let shape = |(matrix, x): &(&PackedMatrix, ActivationRows<'_>)| (x.rows(), matrix.rows());
        let outs = own.collect(products.iter().map(|product| {
            let (rows, cols) = shape(product);
            workspace.filled(rows * cols, 0.0)
        }));
        PackedMatrix::matmul_all(workspace.pool(), products, outs);
        let outs = products.iter().zip(outs).map(|(product, out)| {
            let out: &'a mut [f32] = std::mem::take(out);
            ArrayView2::from_shape(shape(product), &*out).expect("rows * cols elements were taken")
        });
        workspace.collect(outs)
    }
}

/// How rotary parts are turned in one layer.
#[derive(Clone, Copy)]
struct Rotation<'a> {
    layer: &'a LayerConfig,
    rope: &'a RotaryEmbedding,
}

impl Rotation<'_> {
    /// Turns one rotary part of `row`, `[rope]`.
    fn apply(self, row: &StepRow<'_>, part: &mut [f32]) {
        if self.layer.rotary && !part.is_empty() {
            let table = self.rope.table(row.sequence.rope_length);
            table.apply(part, part.len(), row.position);
        }
    }
}

impl QueryProjection {
    fn forward<'a>(&self, workspace: &'a Workspace<'_>, x: ActivationRows<'_>) -> ArrayViewMut2<'a, f32> {
        match self {
            QueryProjection::Plain(linear) => linear.forward(workspace, x),
            QueryProjection::LowRank { down, norm, up } => {
                let latent = down.forward(workspace, x);
                let normed = norm.forward(workspace, latent.view());
                let format = up.weight.format().activations();
                up.forward(workspace, ActivationRows::round(workspace, format, normed.view()))
            }
        }
    }
}

/// The heads of `kv_b`, `[num_heads * (nope + v), kv_lora_rank]`, each loaded as its two halves.
fn load_heads(loader: &mut LayerLoader<'_, '_>) -> Result<Vec<Head>, ModelError> {
    let mut halves = loader.matrices(LayerTensor::KvBProj)?.into_iter();
    let next_head = || {
        Some(Head {
            absorb_query: halves.next()?,
            value: halves.next()?,
        })
    };
    Ok(std::iter::from_fn(next_head).collect())
}
