//! The engine over real checkpoints: what requests do to each other (nothing), and what failures do to the engine.
#![allow(clippy::unwrap_used)]

mod degraded;
mod failures;
mod faulty;
mod fixture;
mod lifecycle;
mod logits;
mod reuse;
mod sameness;
