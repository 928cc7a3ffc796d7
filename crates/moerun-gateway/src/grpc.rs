//! The gRPC doors: services of `proto/moerun/v1` over a [`crate::Gateway`].

mod admin;
mod convert;
mod inference;
mod key_check;
mod moe_layer;
mod placement;
#[cfg(feature = "planted-violations")]
mod planted;
mod serve;
mod status;

pub use admin::{AdminDoor, serve_admin};
pub use inference::{InferenceDoor, LogPrompts};
pub use key_check::KeyCheck;
pub use moe_layer::MoeLayerDoor;
pub use serve::{ServeSettings, serve};
pub use status::to_status;

/// Response metadata of everything that ran experts: `exact` or `fast`.
pub const COMBINE_MODE_METADATA: &str = "moerun-combine-mode";
