//! Experts in this process: the same bank and the same combine that a worker runs.

use std::sync::Arc;

use moerun_kernels::CpuPool;
use moerun_model::ExpertBank;
use moerun_routing::whole_assignments;

use crate::{Combined, DispatchError, ExpertBackend, ExpertRequest, PendingExperts};

/// All experts of the model, in this process.
#[derive(Debug)]
pub struct LocalExperts {
    bank: Arc<ExpertBank>,
    pool: Arc<CpuPool>,
}

/// A request that runs when it is waited for: the threads that would run it are busy with the caller's own work.
struct LocalPending {
    bank: Arc<ExpertBank>,
    pool: Arc<CpuPool>,
    request: ExpertRequest,
}

impl LocalExperts {
    /// `bank` must hold every expert whole.
    pub fn new(bank: Arc<ExpertBank>, pool: Arc<CpuPool>) -> Self {
        LocalExperts { bank, pool }
    }
}

impl ExpertBackend for LocalExperts {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        Ok(Box::new(LocalPending {
            bank: Arc::clone(&self.bank),
            pool: Arc::clone(&self.pool),
            request,
        }))
    }
}

impl PendingExperts for LocalPending {
    fn wait(self: Box<Self>) -> Result<Combined, DispatchError> {
        let ExpertRequest {
            layer,
            activations,
            routing,
        } = self.request;
        let intermediate = self.bank.config().moe.as_ref().map_or(0, |moe| moe.intermediate);
        let num_blocks = self.bank.numerics().num_blocks(intermediate);
        let sums = self.bank.execute(
            &self.pool,
            layer,
            &activations,
            &whole_assignments(&routing, num_blocks),
        )?;
        Ok(Combined::whole(sums.to_f32()))
    }
}
