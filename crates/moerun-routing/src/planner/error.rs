use std::fmt;

use moerun_types::{ExpertSlice, LayerId};

use super::Layout;
use crate::ShardError;

/// Why there is no plan.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum PlannerError {
    /// A dense model.
    #[error("the model has no experts to place")]
    NoExperts,
    /// Nobody to hold anything.
    #[error("no workers: wanted at least 1")]
    NoWorkers,
    /// Two workers of one name could not be told apart.
    #[error("worker {name:?} is named twice")]
    DuplicateWorker {
        /// The name.
        name: String,
    },
    /// A bandwidth, round trip or rate that makes no sense.
    #[error("{whose}: {what}: wanted {wanted}, found {found}")]
    BadNumber {
        /// A worker's name, or `cost model`.
        whose: String,
        /// Which number.
        what: &'static str,
        /// What it must be.
        wanted: &'static str,
        /// What it is.
        found: f64,
    },
    /// Replicas of an expert never share a worker.
    #[error("{replicas} holders of every expert: wanted 1 to the number of workers, {workers}")]
    Replicas {
        /// Holders asked for.
        replicas: usize,
        /// Workers given.
        workers: usize,
    },
    /// More slices than blocks, or more experts cut than there are.
    #[error("layout {layout}: the model has {num_experts} experts a layer of {num_blocks} combine blocks each")]
    Layout {
        /// Layout asked for.
        layout: Layout,
        /// Experts of a layer.
        num_experts: usize,
        /// Blocks of an expert.
        num_blocks: u16,
    },
    /// Not enough memory, with the arithmetic.
    #[error("{0}")]
    DoesNotFit(Box<Shortage>),
    /// There is room, but not in a way that keeps replicas of every expert apart.
    #[error(
        "no arrangement was found that keeps the holders of {slice} apart: {replicas} on different workers, at most \
         {per_domain} in one failure domain; give workers more memory, or fewer failure domains"
    )]
    Apart {
        /// The slice that found no holder.
        slice: ExpertSlice,
        /// Holders wanted.
        replicas: usize,
        /// Most holders in one domain.
        per_domain: usize,
    },
    /// Loads that are not of the form.
    #[error("expert loads: {reason}")]
    LoadsSyntax {
        /// What is wrong.
        reason: String,
    },
    /// No loads of a layer that has experts.
    #[error("expert loads: layer {layer} is missing")]
    LoadsMissing {
        /// The layer.
        layer: LayerId,
    },
    /// Loads of another model.
    #[error("expert loads of layer {layer}: wanted {wanted} experts, found {found}")]
    LoadsLength {
        /// The layer.
        layer: LayerId,
        /// Experts of the model.
        wanted: usize,
        /// Experts of the loads.
        found: usize,
    },
    /// A load that is none.
    #[error("expert loads: layer {layer} expert {expert}: wanted a load of 0 or more, found {load}")]
    BadLoad {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: usize,
        /// What was found.
        load: f64,
    },
    /// A plan file that is not of the form.
    #[error("plan: {reason}")]
    PlanSyntax {
        /// What is wrong.
        reason: String,
    },
    /// A plan for something else.
    #[error("plan: {what}: wanted {wanted}, found {found}")]
    PlanMismatch {
        /// Which field.
        what: &'static str,
        /// That of the model and settings.
        wanted: String,
        /// That of the plan.
        found: String,
    },
    /// A worker's list of experts is none of this model.
    #[error("plan: worker {worker:?}: {error}")]
    PlanExperts {
        /// The worker's name.
        worker: String,
        /// What is wrong with its list.
        error: ShardError,
    },
    /// A plan without a holder for something.
    #[error("plan: no worker holds {missing}")]
    PlanUncovered {
        /// The first that is missing.
        missing: ExpertSlice,
    },
}

/// Why a plan does not fit, in bytes and in places for pieces.
#[derive(Debug, PartialEq)]
pub struct Shortage {
    /// Holders of every piece.
    pub replicas: usize,
    /// Pieces of this size in the model.
    pub pieces: usize,
    /// Holders beyond `replicas` that were asked for, in all layers.
    pub extra: usize,
    /// Bytes of one piece.
    pub piece_bytes: u64,
    /// Places that all workers together have for them.
    pub places: usize,
    /// Each worker's name, memory that is left for these pieces, and places that it gives.
    pub workers: Vec<(String, u64, usize)>,
    /// Failure domains that could give more places if replicas might share them: name and most places.
    pub domains: Vec<(String, usize)>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wanted = self.pieces * self.replicas + self.extra;
        let bytes = |places: usize| Bytes(self.piece_bytes.saturating_mul(places as u64));
        write!(
            f,
            "the experts do not fit: {} pieces of {} with {} ",
            self.pieces,
            Bytes(self.piece_bytes),
            self.replicas
        )?;
        f.write_str(if self.replicas == 1 { "holder" } else { "holders each" })?;
        if self.extra > 0 {
            write!(f, " and {} more holders", self.extra)?;
        }
        write!(
            f,
            " need {wanted} places = {}, but there are {} = {}: ",
            bytes(wanted),
            self.places,
            bytes(self.places)
        )?;
        for (index, (name, memory, places)) in self.workers.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name} has {places} in {}", Bytes(*memory))?;
        }
        for (name, most) in &self.domains {
            write!(
                f,
                "; failure domain {name} takes at most {most}, since replicas stay apart"
            )?;
        }
        Ok(())
    }
}

/// A number of bytes as people read it.
struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1024 => write!(f, "{} B", self.0),
            1024..0x10_0000 => write!(f, "{:.1} KiB", bytes / 1024.0),
            0x10_0000..0x4000_0000 => write!(f, "{:.1} MiB", bytes / (1u64 << 20) as f64),
            _ => write!(f, "{:.2} GiB", bytes / (1u64 << 30) as f64),
        }
    }
}
