//! `moerun.v1.RegistryService`.

use std::{sync::Arc, time::Duration};

use moerun_proto::{
    PROTOCOL_VERSION, speaks_same_major,
    v1::{self, registry_service_server::RegistryService},
};
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};
use tonic::{Request, Response, Status};

use super::leases::{Leases, MAX_REGISTERED, Registered};
use crate::known::check_address;

/// Takes registrations. Who connects has shown a certificate where there are any.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    pub(crate) leases: Arc<Mutex<Leases>>,
    /// Told when somebody came or left.
    pub(crate) changed: Arc<Notify>,
    pub(crate) lease: Duration,
}

#[tonic::async_trait]
impl RegistryService for Door {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let v1::RegisterRequest {
            protocol_version,
            address,
            instance,
        } = request.into_inner();
        if !speaks_same_major(protocol_version) {
            let message = format!("protocol version: wanted major of {PROTOCOL_VERSION}, found {protocol_version}");
            return Err(Status::failed_precondition(message));
        }
        check_address(&address).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let registered = self.leases.lock().register(Instant::now(), &address, instance);
        match registered {
            Registered::Full => {
                let message = format!("registrations: wanted at most {MAX_REGISTERED}, found one more");
                return Err(Status::resource_exhausted(message));
            }
            Registered::New => {
                tracing::info!(worker = address, "a worker has registered");
                self.changed.notify_one();
            }
            Registered::Again => {}
        }
        Ok(Response::new(v1::RegisterResponse {
            lease_millis: u32::try_from(self.lease.as_millis()).unwrap_or(u32::MAX),
        }))
    }

    async fn deregister(
        &self,
        request: Request<v1::DeregisterRequest>,
    ) -> Result<Response<v1::DeregisterResponse>, Status> {
        let v1::DeregisterRequest { address, instance } = request.into_inner();
        if self.leases.lock().deregister(&address, instance) {
            tracing::info!(worker = address, "a registered worker is leaving");
            self.changed.notify_one();
        }
        Ok(Response::new(v1::DeregisterResponse {}))
    }
}
