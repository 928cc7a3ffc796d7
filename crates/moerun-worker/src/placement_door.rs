//! [`v1::placement_service_server::PlacementService`]: what is held, told and changed while batches run.

use std::sync::{Arc, OnceLock};

use moerun_process::Shutdown;
use moerun_proto::{
    HeldExpert, WireError, decode_expert, decode_load, decode_unload,
    v1::{self, placement_service_server::PlacementService},
};
use tokio::{
    sync::{Semaphore, mpsc},
    task::spawn_blocking,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::{
    HoldingError,
    holdings::{Held, Holdings, Received},
    service::Loaded,
    transfer::{Holder, send},
};

/// Most experts that are handed over at a time.
pub(crate) const MAX_HANDED_OVER: usize = 4;

/// The service; it is there before the experts are.
#[derive(Debug, Clone)]
pub(crate) struct PlacementDoor {
    /// Filled when the experts are loaded.
    pub(crate) loaded: Arc<OnceLock<Loaded>>,
    /// When draining, nothing is changed any more.
    pub(crate) shutdown: Shutdown,
    /// When cancelled, streams end.
    pub(crate) closing: CancellationToken,
    /// Bounds the experts that are handed over at a time, each of which takes memory.
    pub(crate) handing_over: Arc<Semaphore>,
}

impl PlacementDoor {
    fn loaded(&self) -> Result<&Loaded, Status> {
        if self.shutdown.is_draining() {
            return Err(Status::unavailable("the worker is stopping"));
        }
        self.loaded
            .get()
            .ok_or_else(|| Status::unavailable("the worker is still loading its experts"))
    }

    /// Changes what is held, one change at a time; goes on to its end though nobody waits for it.
    async fn change(
        &self,
        change: impl Future<Output = Result<Arc<Held>, HoldingError>> + Send + 'static,
    ) -> Result<Response<v1::HeldResponse>, Status> {
        let holdings = Arc::clone(&self.loaded()?.holdings);
        let alone = Arc::clone(&holdings.changing).lock_owned().await;
        let changing = tokio::spawn(async move {
            let changed = change.await;
            drop(alone);
            let held = changed.map_err(|error| {
                tracing::warn!("asked to hold something else: {error}");
                error.to_status()
            })?;
            Ok(holdings.describe(&held).encode())
        });
        match changing.await {
            Ok(changed) => changed.map(Response::new),
            Err(error) => Err(Status::internal(error.to_string())),
        }
    }
}

/// Off the data plane's thread: reads the disk, packs, hashes.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HoldingError> + Send + 'static,
) -> Result<T, HoldingError> {
    spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(HoldingError::Panicked {
            reason: error.to_string(),
        })
    })
}

/// Holds `wanted` too; what the checkpoint lacks comes from `holder`.
async fn load(holdings: Arc<Holdings>, wanted: Vec<HeldExpert>, holder: String) -> Result<Arc<Held>, HoldingError> {
    let preparing = Arc::clone(&holdings);
    let Some(change) = blocking(move || preparing.prepare(&wanted)).await? else {
        return Ok(holdings.now());
    };
    let mut received = Received::new();
    let lacking = change.lacking();
    if let Some(&(layer, expert)) = lacking.first() {
        if holder.is_empty() {
            return Err(HoldingError::NowhereToBeHad { layer, expert });
        }
        let mut from = Holder::connect(&holder, &holdings.dial()).await?;
        for expert in lacking {
            received.insert(expert, from.fetch(change.config(), expert).await?);
        }
    }
    blocking(move || holdings.load(&change, &received)).await
}

fn invalid(error: WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl PlacementService for PlacementDoor {
    type WatchHeldStream = ReceiverStream<Result<v1::HeldResponse, Status>>;
    type FetchExpertStream = ReceiverStream<Result<v1::ExpertChunk, Status>>;

    async fn watch_held(
        &self,
        _request: Request<v1::WatchHeldRequest>,
    ) -> Result<Response<Self::WatchHeldStream>, Status> {
        let holdings = Arc::clone(&self.loaded()?.holdings);
        let (sender, receiver) = mpsc::channel(1);
        let closing = self.closing.clone();
        // Ends with the caller, or with `closing`; the runtime's end awaits it.
        tokio::spawn(async move {
            let mut changes = holdings.watch();
            loop {
                let held = Arc::clone(&changes.borrow_and_update());
                let told = sender.send(Ok(holdings.describe(&held).encode()));
                let ended = tokio::select! {
                    () = closing.cancelled() => true,
                    told = told => told.is_err(),
                };
                if ended {
                    return;
                }
                tokio::select! {
                    () = closing.cancelled() => return,
                    () = sender.closed() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn load_experts(
        &self,
        request: Request<v1::LoadExpertsRequest>,
    ) -> Result<Response<v1::HeldResponse>, Status> {
        let wanted = decode_load(request.get_ref(), &self.loaded()?.limits).map_err(invalid)?;
        let holdings = Arc::clone(&self.loaded()?.holdings);
        self.change(load(holdings, wanted, request.into_inner().holder)).await
    }

    async fn unload_experts(
        &self,
        request: Request<v1::UnloadExpertsRequest>,
    ) -> Result<Response<v1::HeldResponse>, Status> {
        let slices = decode_unload(request.get_ref(), &self.loaded()?.limits).map_err(invalid)?;
        let holdings = Arc::clone(&self.loaded()?.holdings);
        self.change(blocking(move || holdings.unload(&slices))).await
    }

    async fn fetch_expert(
        &self,
        request: Request<v1::FetchExpertRequest>,
    ) -> Result<Response<Self::FetchExpertStream>, Status> {
        let loaded = self.loaded()?;
        let &v1::FetchExpertRequest { layer, expert } = request.get_ref();
        let named = decode_expert(layer, expert, &loaded.limits).map_err(invalid)?;
        let holdings = Arc::clone(&loaded.holdings);
        let permit = Arc::clone(&self.handing_over).try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted("it hands over as many experts as it can"))?;
        let (sender, receiver) = mpsc::channel(2);
        // Ends when all is sent, or with the caller; never blocks for long: a caller that is gone closes the channel.
        spawn_blocking(move || {
            let _permit = permit;
            let sending = holdings
                .open_source()
                .and_then(|checkpoint| Ok(send(&checkpoint, named, &sender)?));
            if let Err(error) = sending {
                let _ = sender.blocking_send(Err(error.to_status())); // fails only if nobody listens
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
