//! Experts in this process: the same bank and the same combine that a worker runs.

use std::sync::Arc;

use moerun_kernels::{Activations, CpuPool};
use moerun_model::ExpertBank;
use moerun_routing::{PartialSums, Routing};
use moerun_types::LayerId;
use ndarray::Array2;
use parking_lot::Mutex;

use crate::{Combined, DispatchError, ExpertBackend, ExpertRequest, PendingExperts};

/// All experts of the model, in this process.
#[derive(Debug, Clone)]
pub struct LocalExperts {
    bank: Arc<ExpertBank>,
    pool: Arc<CpuPool>,
    /// Memory of the last call.
    sums: Arc<Mutex<PartialSums>>,
}

/// A request that runs when it is waited for: the threads that would run it are busy with the caller's own work.
struct LocalPending {
    experts: LocalExperts,
    request: ExpertRequest,
}

impl LocalExperts {
    /// `bank` must hold every expert whole.
    pub fn new(bank: Arc<ExpertBank>, pool: Arc<CpuPool>) -> Self {
        let sums = PartialSums::zeros(bank.numerics().combine, 0, bank.config().hidden);
        LocalExperts {
            bank,
            pool,
            sums: Arc::new(Mutex::new(sums)),
        }
    }

    fn run(
        &self,
        layer: LayerId,
        activations: &Activations,
        routing: &Routing,
        output: &mut Array2<f32>,
    ) -> Result<(), DispatchError> {
        let mut sums = self.sums.lock();
        self.bank
            .execute_whole(&self.pool, layer, activations, routing, &mut sums)?;
        sums.write_to(output);
        Ok(())
    }
}

impl ExpertBackend for LocalExperts {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        Ok(Box::new(LocalPending {
            experts: self.clone(),
            request,
        }))
    }

    fn run_here(
        &self,
        layer: LayerId,
        activations: &Activations,
        routing: &Routing,
        output: &mut Array2<f32>,
    ) -> Option<Result<(), DispatchError>> {
        Some(self.run(layer, activations, routing, output))
    }
}

impl PendingExperts for LocalPending {
    fn wait(self: Box<Self>) -> Result<Combined, DispatchError> {
        let ExpertRequest {
            layer,
            activations,
            routing,
        } = &self.request;
        let mut output = Array2::default((0, 0));
        self.experts.run(*layer, activations, routing, &mut output)?;
        Ok(Combined::whole(output))
    }
}
