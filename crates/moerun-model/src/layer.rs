//! One decoder layer: norm, attention, norm, feed-forward or gate.

use moerun_kernels::FeedForward;
use moerun_types::{FeedForwardKind, LayerId};
use moerun_weights::LayerTensor;

use crate::{
    ModelError,
    attention::Attention,
    feed_forward::{self, SharedExperts},
    gate::Gate,
    loader::Loader,
    norm::Norm,
};

/// The weights of one layer that are not routed experts.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: Norm,
    pub(crate) attention: Attention,
    pub(crate) feed_forward_norm: Norm,
    pub(crate) feed_forward: LayerFeedForward,
}

/// What follows attention.
#[derive(Debug)]
pub(crate) enum LayerFeedForward {
    Dense(FeedForward),
    Moe {
        gate: Gate,
        shared: Option<Box<SharedExperts>>,
    },
}

impl Layer {
    pub(crate) fn load(loader: &mut Loader<'_>, layer: LayerId, kind: FeedForwardKind) -> Result<Self, ModelError> {
        let mut loader = loader.layer(layer);
        let attention_norm = Norm::load(&mut loader, LayerTensor::AttentionNorm, LayerTensor::AttentionNormBias)?;
        let attention = Attention::load(&mut loader)?;
        let feed_forward_norm = Norm::load(
            &mut loader,
            LayerTensor::FeedForwardNorm,
            LayerTensor::FeedForwardNormBias,
        )?;
        let feed_forward = match kind {
            FeedForwardKind::Dense { .. } => LayerFeedForward::Dense(feed_forward::load_dense(&mut loader)?),
            FeedForwardKind::Moe => {
                let moe = loader
                    .config()
                    .moe
                    .as_ref()
                    .expect("a checked config with a MoE layer describes its experts");
                let gate = Gate::load(&mut loader, moe)?;
                let shared = moe
                    .shared
                    .map(|shared| SharedExperts::load(&mut loader, shared).map(Box::new))
                    .transpose()?;
                LayerFeedForward::Moe { gate, shared }
            }
        };
        Ok(Layer {
            attention_norm,
            attention,
            feed_forward_norm,
            feed_forward,
        })
    }
}
