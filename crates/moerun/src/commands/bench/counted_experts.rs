//! Counts the experts whose weights a forward pass reads.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use moerun_dispatch::{DispatchError, ExpertBackend, ExpertRequest, PendingExperts};

/// Experts, wherever they are, and how many were read so far: in each layer of each step those that any row chose, once.
#[derive(Debug)]
pub(super) struct CountedExperts {
    inner: Arc<dyn ExpertBackend>,
    read: AtomicU64,
    layers: AtomicU64,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct ReadCounts {
    /// Experts read.
    pub(super) experts: u64,
    /// Layers run, each step counted anew.
    pub(super) layers: u64,
}

impl CountedExperts {
    pub(super) fn new(inner: Arc<dyn ExpertBackend>) -> Self {
        Self {
            inner,
            read: AtomicU64::new(0),
            layers: AtomicU64::new(0),
        }
    }

    /// What was read so far.
    pub(super) fn counts(&self) -> ReadCounts {
        ReadCounts {
            experts: self.read.load(Relaxed),
            layers: self.layers.load(Relaxed),
        }
    }
}

impl ExpertBackend for CountedExperts {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        let mut chosen: Vec<u16> = request.routing.expert_ids.iter().map(|expert| expert.0).collect();
        chosen.sort_unstable();
        chosen.dedup();
        self.read.fetch_add(chosen.len() as u64, Relaxed);
        self.layers.fetch_add(1, Relaxed);
        self.inner.submit(request)
    }
}

#[cfg(test)]
mod tests {
    use moerun_kernels::Activations;
    use moerun_routing::Routing;
    use moerun_types::{ActivationFormat, ExpertId, LayerId};
    use ndarray::Array2;

    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    impl ExpertBackend for Nowhere {
        fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
            Err(DispatchError::NotMoe { layer: request.layer })
        }
    }

    #[test]
    fn an_expert_that_several_rows_chose_is_read_once_a_step() {
        let counted = CountedExperts::new(Arc::new(Nowhere));
        let request = ExpertRequest {
            layer: LayerId(0),
            activations: Activations::round(ActivationFormat::F32, Array2::zeros((2, 4)).view()),
            routing: Routing {
                top_k: 2,
                expert_ids: [3, 1, 1, 7].map(ExpertId).to_vec(),
                routing_weights: vec![0.5; 4],
            },
        };
        for layers in [1, 2] {
            assert!(counted.submit(request.clone()).is_err(), "the answer is passed on");
            let experts = 3 * layers;
            assert_eq!(counted.counts(), ReadCounts { experts, layers });
        }
    }
}
