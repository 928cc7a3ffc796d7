//! What each process needs: telemetry, shutdown, progress while loading, addresses, the data plane's runtime, thread
//! counts, exit codes. Knows nothing of models.
#![forbid(unsafe_code)]

mod address;
mod data_plane;
mod exit;
mod listener;
mod own_figures;
mod progress;
mod shutdown;
mod socket_folder;
mod spin;
mod supervision;
mod telemetry;
mod threads;

pub use address::Address;
pub use data_plane::DataPlane;
pub use exit::Exit;
pub use listener::{Listener, SocketFile, bind_admin};
pub use own_figures::{OwnFigures, count_panics};
pub use progress::{LoadProgress, WARNINGS_AND_PROGRESS};
pub use shutdown::Shutdown;
pub use socket_folder::SocketFolder;
pub use spin::{Spin, spin_then_wait};
pub use supervision::Supervision;
pub use telemetry::{LogFormat, TelemetryError, init_telemetry};
pub use threads::{available_threads, threads_per_worker};
