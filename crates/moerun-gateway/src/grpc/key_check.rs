//! The API key of a gRPC call, checked before its message is read.

use std::sync::Arc;

use tonic::{Request, Status, service::Interceptor};

use super::to_status;
use crate::auth::Authenticator;

/// Lets calls through whose `authorization` is good, and notes whose they are: the [`crate::auth::Client`] is an extension
/// of the request.
#[derive(Debug, Clone)]
pub struct KeyCheck {
    auth: Arc<Authenticator>,
}

impl KeyCheck {
    /// By these keys.
    pub fn new(auth: Arc<Authenticator>) -> Self {
        KeyCheck { auth }
    }
}

impl Interceptor for KeyCheck {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let authorization = request.metadata().get("authorization").map(|value| value.as_bytes());
        match self.auth.authenticate(authorization) {
            Ok(client) => {
                request.extensions_mut().insert(client);
                Ok(request)
            }
            Err(error) => {
                tracing::debug!("a call is refused: {error}");
                Err(to_status(&error.into()))
            }
        }
    }
}
