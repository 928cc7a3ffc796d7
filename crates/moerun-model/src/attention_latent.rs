//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), absorbed at every position.
//!
//! Keys and values of all heads are linear in one latent vector per token, so the cache holds the latent (and the one
//! rotary key) alone: a head's query goes through the key half of `kv_b` before it meets the latents, and the weighted
//! sum of latents goes through the value half after. The latent is held once, as the start of its key. Prefill does the same as decode, so that a prompt gives the same
//! bits however it is cut into chunks.

use moerun_kernels::{Activations, CpuPool, PackedMatrix, paged_attention};
use moerun_types::LatentAttention;
use moerun_weights::LayerTensor;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};

use crate::{
    ModelError,
    attention::{AttentionContext, elements, elements_mut, store},
    linear::Linear,
    loader::LayerLoader,
    mask::attention_rows,
    norm::Norm,
    parallel,
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
    pub(crate) fn forward(&self, context: AttentionContext<'_>, x: &Array2<f32>) -> Array2<f32> {
        let format = self.o_proj.weight.format().activations();
        let x = Activations::round(format, x.view());

        let keys = self.keys(&context, &x);
        let queries = self.absorbed_queries(&context, &x);
        let AttentionContext {
            pool, layer, rows, kv, ..
        } = context;
        store(kv, rows, &keys, None);

        let mut attended = Array2::zeros((rows.len(), self.shape.num_heads * self.shape.kv_lora_rank));
        paged_attention(
            pool,
            kv,
            &attention_rows(layer.mask, rows),
            elements(&queries),
            self.shape.num_heads,
            self.shape.scale,
            None,
            elements_mut(&mut attended),
        );
        let values = self.values(pool, &attended);
        self.o_proj.forward(pool, &Activations::round(format, values.view()))
    }

    /// The one key of each row, `[tokens, kv_lora_rank + rope]`: its latent, which is also its value, and the rotary key.
    fn keys(&self, context: &AttentionContext<'_>, x: &Activations) -> Array2<f32> {
        let rank = self.shape.kv_lora_rank;
        let mut keys = self.kv_a_proj.forward(context.pool, x);
        let latents = self
            .kv_a_norm
            .forward_parallel(context.pool, &keys.slice(s![.., ..rank]).to_owned());
        keys.slice_mut(s![.., ..rank]).assign(&latents);
        self.rotate(context, keys.slice_mut(s![.., rank..]));
        keys
    }

    /// Queries as the cached keys want them, `[tokens, num_heads * (kv_lora_rank + rope)]`.
    fn absorbed_queries(&self, context: &AttentionContext<'_>, x: &Activations) -> Array2<f32> {
        let LatentAttention {
            kv_lora_rank: rank,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            ..
        } = self.shape;
        let queries = self.queries.forward(context.pool, x); // [tokens, num_heads * (nope + rope)]
        let mut absorbed = Array2::zeros((queries.nrows(), self.heads.len() * (rank + rope)));
        let heads: Vec<_> = self
            .heads
            .iter()
            .zip(queries.axis_chunks_iter(Axis(1), nope + rope))
            .zip(absorbed.axis_chunks_iter_mut(Axis(1), rank + rope))
            .collect();
        parallel::for_each(context.pool, heads, |((head, query), mut absorbed)| {
            let latent = project(context.pool, &head.absorb_query, query.slice(s![.., ..nope]));
            absorbed.slice_mut(s![.., ..rank]).assign(&latent);
            absorbed.slice_mut(s![.., rank..]).assign(&query.slice(s![.., nope..]));
            self.rotate(context, absorbed.slice_mut(s![.., rank..]));
        });
        absorbed
    }

    /// Weighted sums of latents, `[tokens, num_heads * kv_lora_rank]` → head outputs, `[tokens, num_heads * v]`.
    fn values(&self, pool: &CpuPool, attended: &Array2<f32>) -> Array2<f32> {
        let mut values = Array2::zeros((attended.nrows(), self.heads.len() * self.shape.v_head_dim));
        let heads: Vec<_> = self
            .heads
            .iter()
            .zip(attended.axis_chunks_iter(Axis(1), self.shape.kv_lora_rank))
            .zip(values.axis_chunks_iter_mut(Axis(1), self.shape.v_head_dim))
            .collect();
        parallel::for_each(pool, heads, |((head, attended), mut values)| {
            values.assign(&project(pool, &head.value, attended));
        });
        values
    }

    /// Rotates one rotary part of each row, `[tokens, rope]`.
    fn rotate(&self, context: &AttentionContext<'_>, mut parts: ArrayViewMut2<'_, f32>) {
        if !context.layer.rotary {
            return;
        }
        let rotate_row = |row: &StepRow<'_>, part: &mut [f32]| {
            context
                .rope
                .table(row.sequence.rope_length)
                .apply(part, self.shape.qk_rope_head_dim, row.position);
        };
        for (row, mut part) in context.rows.iter().zip(parts.rows_mut()) {
            rotate_row(row, part.as_slice_mut().expect("elements of a row are adjacent"));
        }
    }
}

impl QueryProjection {
    fn forward(&self, pool: &CpuPool, x: &Activations) -> Array2<f32> {
        match self {
            QueryProjection::Plain(linear) => linear.forward(pool, x),
            QueryProjection::LowRank { down, norm, up } => {
                let latent = norm.forward_parallel(pool, &down.forward(pool, x));
                up.forward(
                    pool,
                    &Activations::round(up.weight.format().activations(), latent.view()),
                )
            }
        }
    }
}

/// `x · Wᵀ`, `[tokens, in]` → `[tokens, out]`; called from inside a task, where the pool runs it serially.
fn project(pool: &CpuPool, weight: &PackedMatrix, x: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut out = Array2::zeros((x.nrows(), weight.rows()));
    weight.matmul(
        pool,
        &Activations::round(weight.format().activations(), x),
        out.view_mut(),
    );
    out
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
