//! Counts the experts whose weights a forward pass reads.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use moerun_dispatch::{DispatchError, ExpertBackend, ExpertRequest, PendingExperts};
use moerun_kernels::Activations;
use moerun_routing::Routing;
use moerun_types::LayerId;
use ndarray::Array2;

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

impl CountedExperts {
    fn count(&self, routing: &Routing) {
        let mut chosen: Vec<u16> = routing.expert_ids.iter().map(|expert| expert.0).collect();
        chosen.sort_unstable();
        chosen.dedup();
        self.read.fetch_add(chosen.len() as u64, Relaxed);
        self.layers.fetch_add(1, Relaxed);
    }
}

/// Counts, and otherwise is the experts that it is around: whatever decides how a step runs is theirs.
impl ExpertBackend for CountedExperts {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        self.count(&request.routing);
        self.inner.submit(request)
    }

    fn run_here(
        &self,
        layer: LayerId,
        activations: &Activations,
        routing: &Routing,
        output: &mut Array2<f32>,
    ) -> Option<Result<(), DispatchError>> {
        let ran = self.inner.run_here(layer, activations, routing, output);
        if ran.is_some() {
            self.count(routing);
        }
        ran
    }

    fn computes_elsewhere(&self) -> bool {
        self.inner.computes_elsewhere()
    }
}

#[cfg(test)]
mod tests {
    use moerun_types::{ActivationFormat, ExpertId};

    use super::*;

    #[derive(Debug)]
    struct Nowhere;

    impl ExpertBackend for Nowhere {
        fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
            Err(DispatchError::NotMoe { layer: request.layer })
        }

        fn computes_elsewhere(&self) -> bool {
            true
        }
    }

    /// Experts that run on the caller's threads, and give nothing.
    #[derive(Debug)]
    struct Here;

    impl ExpertBackend for Here {
        fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
            Nowhere.submit(request)
        }

        fn run_here(
            &self,
            _: LayerId,
            _: &Activations,
            _: &Routing,
            _: &mut Array2<f32>,
        ) -> Option<Result<(), DispatchError>> {
            Some(Ok(()))
        }
    }

    #[test]
    fn how_a_step_runs_is_decided_by_the_experts_inside() {
        let elsewhere = CountedExperts::new(Arc::new(Nowhere));
        assert!(elsewhere.computes_elsewhere());
        let here = CountedExperts::new(Arc::new(Here));
        assert!(!here.computes_elsewhere());
        let activations = Activations::empty(ActivationFormat::F32);
        let routing = Routing {
            top_k: 2,
            expert_ids: [5, 6].map(ExpertId).to_vec(),
            routing_weights: vec![0.5; 2],
        };
        let mut output = Array2::zeros((0, 4));
        for (counted, experts) in [(elsewhere, 0), (here, 2)] {
            let ran = counted.run_here(LayerId(0), &activations, &routing, &mut output);
            assert_eq!(ran.is_some(), experts > 0);
            assert_eq!(counted.counts().experts, experts);
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
