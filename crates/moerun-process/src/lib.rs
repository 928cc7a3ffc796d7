//! What each process needs: telemetry, shutdown, progress while loading, the data plane's runtime, thread counts, exit
//! codes. Knows nothing of models.
#![forbid(unsafe_code)]

mod data_plane;
mod exit;
mod progress;
mod shutdown;
mod telemetry;
mod threads;

pub use data_plane::DataPlane;
pub use exit::Exit;
pub use progress::{LoadProgress, WARNINGS_AND_PROGRESS};
pub use shutdown::Shutdown;
pub use telemetry::{LogFormat, TelemetryError, init_telemetry};
pub use threads::{available_threads, threads_per_worker};
