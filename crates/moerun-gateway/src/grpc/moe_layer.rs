//! `moerun.v1.MoeLayerService`.

use std::sync::Arc;

use moerun_proto::v1::{self, moe_layer_service_server::MoeLayerService};
use tonic::{Request, Response, Status};

use super::{convert, inference::with_combine_mode, to_status};
use crate::Gateway;

/// Answers `MoeLayerService` from a gateway.
#[derive(Debug, Clone)]
pub struct MoeLayerDoor {
    gateway: Arc<Gateway>,
}

impl MoeLayerDoor {
    /// Over this gateway.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        MoeLayerDoor { gateway }
    }
}

#[tonic::async_trait]
impl MoeLayerService for MoeLayerDoor {
    async fn run_layer(&self, request: Request<v1::RunLayerRequest>) -> Result<Response<v1::RunLayerResponse>, Status> {
        let message = request.into_inner();
        let output = async {
            self.gateway.check_model(&message.model)?;
            let hidden = self.gateway.model().config.hidden;
            let rows = convert::layer_rows(message.rows, hidden, &message.hidden_states)?;
            self.gateway.run_moe_layer(message.layer, rows).await
        };
        let output = output.await.map_err(|error| to_status(&error))?;
        let response = v1::RunLayerResponse {
            hidden_states: convert::row_bytes(&output.hidden_states),
            degraded_rows: output.degraded_rows,
        };
        Ok(with_combine_mode(&self.gateway, response))
    }
}
