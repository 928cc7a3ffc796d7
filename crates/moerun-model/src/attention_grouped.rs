//! Multi-head, grouped-query and multi-query attention.

use moerun_kernels::{ActivationRows, RotaryTable, paged_attention};
use moerun_types::{AttentionTemperature, GroupedAttention, LayerConfig, QkNorm};
use moerun_weights::LayerTensor;
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::{
    ModelError,
    attention::{AttentionContext, elements, elements_mut, store},
    linear::Linear,
    loader::LayerLoader,
    mask::attention_rows,
    norm::{rms_norm_heads, rms_norm_runs},
    parallel,
    rope::RotaryEmbedding,
    step::StepRow,
};

/// Weights of one layer's grouped attention.
#[derive(Debug)]
pub(crate) struct GroupedQueryAttention {
    shape: GroupedAttention,
    /// `[num_heads * head_dim, hidden]`.
    q_proj: Linear,
    /// `[num_kv_heads * head_dim, hidden]`.
    k_proj: Linear,
    /// `[num_kv_heads * head_dim, hidden]`.
    v_proj: Linear,
    /// `[hidden, num_heads * head_dim]`.
    o_proj: Linear,
    /// `[head_dim]`, or the whole projection's width.
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
    norm_epsilon: f32,
    /// `[num_heads]`.
    sinks: Option<Vec<f32>>,
}

/// Some rows' queries, keys and values, each row-major, on their way to the cache.
struct Projections<'a> {
    rows: &'a [StepRow<'a>],
    queries: &'a mut [f32],
    keys: &'a mut [f32],
    values: &'a mut [f32],
}

impl GroupedQueryAttention {
    pub(crate) fn load(loader: &mut LayerLoader<'_, '_>, shape: &GroupedAttention) -> Result<Self, ModelError> {
        let qkv_bias = |bias| shape.qkv_bias.then_some(bias);
        let has_norm_weights = matches!(shape.qk_norm, QkNorm::PerHead | QkNorm::WholeProjection);
        Ok(GroupedQueryAttention {
            q_proj: loader.linear(LayerTensor::QProj, qkv_bias(LayerTensor::QBias))?,
            k_proj: loader.linear(LayerTensor::KProj, qkv_bias(LayerTensor::KBias))?,
            v_proj: loader.linear(LayerTensor::VProj, qkv_bias(LayerTensor::VBias))?,
            o_proj: loader.linear(LayerTensor::OProj, shape.output_bias.then_some(LayerTensor::OBias))?,
            q_norm: loader.vector_if(has_norm_weights, LayerTensor::QNorm)?,
            k_norm: loader.vector_if(has_norm_weights, LayerTensor::KNorm)?,
            norm_epsilon: loader.config().norm.epsilon,
            sinks: loader.vector_if(shape.sinks, LayerTensor::Sinks)?,
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
        let pool = workspace.pool();
        let format = self.q_proj.weight.format().activations();
        let x = ActivationRows::round(workspace, format, x);
        // [tokens, num_heads * head_dim], and twice [tokens, num_kv_heads * head_dim]
        let [mut queries, mut keys, mut values] =
            Linear::forward_all([&self.q_proj, &self.k_proj, &self.v_proj], workspace, x);

        let (query_width, key_width) = (queries.ncols(), keys.ncols());
        let run = parallel::rows_per_task(pool, rows.len(), query_width);
        let parts = rows
            .chunks(run)
            .zip(elements_mut(&mut queries).chunks_mut(run * query_width))
            .zip(elements_mut(&mut keys).chunks_mut(run * key_width))
            .zip(elements_mut(&mut values).chunks_mut(run * key_width))
            .map(|(((rows, queries), keys), values)| Projections {
                rows,
                queries,
                keys,
                values,
            });
        pool.for_each(workspace.collect(parts), |part| self.prepare(layer, rope, part));
        store(kv, rows, keys.view(), Some(values.view()));

        let mut attended = workspace.matrix(rows.len(), query_width);
        paged_attention(
            pool,
            kv,
            workspace.collect(attention_rows(layer.mask, rows.iter().copied())),
            elements(queries.view()),
            self.shape.num_heads,
            self.shape.scale,
            self.sinks.as_deref(),
            elements_mut(&mut attended),
        );
        let attended = ActivationRows::round(workspace, format, attended.view());
        self.o_proj.forward(workspace, attended)
    }

    /// Everything between the projections and the cache, row by row.
    fn prepare(&self, layer: &LayerConfig, rope: &RotaryEmbedding, part: &mut Projections<'_>) {
        let query_width = self.shape.num_heads * self.shape.head_dim;
        let key_width = self.shape.num_kv_heads * self.shape.head_dim;
        let rows = part
            .queries
            .chunks_exact_mut(query_width)
            .zip(part.keys.chunks_exact_mut(key_width));
        for (row, (queries, keys)) in part.rows.iter().zip(rows) {
            let rotary = layer.rotary.then(|| rope.table(row.sequence.rope_length));
            self.prepare_heads(queries, self.q_norm.as_deref(), rotary, row.position);
            self.prepare_heads(keys, self.k_norm.as_deref(), rotary, row.position);
            if let Some(temperature) = layer.temperature {
                let factor = temperature_factor(temperature, row.position);
                queries.iter_mut().for_each(|value| *value *= factor);
            }
        }
        self.clip(part.values);
    }

    /// Norm, clamp and rotation of one row's queries or keys.
    fn prepare_heads(&self, heads: &mut [f32], norm: Option<&[f32]>, rotary: Option<&RotaryTable>, position: usize) {
        if let Some(weight) = norm {
            // The weight's length says whether a head or the whole projection is normalised.
            rms_norm_runs(heads, weight, self.norm_epsilon);
        }
        self.clip(heads);
        if let Some(table) = rotary {
            table.apply(heads, self.shape.head_dim, position);
            if self.shape.qk_norm == QkNorm::WeightlessAfterRotary {
                rms_norm_heads(heads, self.shape.head_dim, self.norm_epsilon);
            }
        }
    }

    fn clip(&self, values: &mut [f32]) {
        if let Some(limit) = self.shape.clip_qkv {
            values.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
        }
    }
}

/// `1 + scale * ln(1 + floor((position + 1) / floor_scale))`, rounded to f32 at the end.
fn temperature_factor(temperature: AttentionTemperature, position: usize) -> f32 {
    let steps = ((position + 1) as f64 / f64::from(temperature.floor_scale)).floor();
    (1.0 + f64::from(temperature.scale) * steps.ln_1p()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperature_is_one_below_the_first_step_and_grows_with_the_logarithm() {
        let temperature = AttentionTemperature {
            scale: 0.1,
            floor_scale: 8.0,
        };
        assert_eq!(temperature_factor(temperature, 6), 1.0);
        assert!((temperature_factor(temperature, 7) - (1.0 + 0.1 * 2f32.ln())).abs() < 1e-6);
        assert!((temperature_factor(temperature, 23) - (1.0 + 0.1 * 4f32.ln())).abs() < 1e-6);
    }
}
