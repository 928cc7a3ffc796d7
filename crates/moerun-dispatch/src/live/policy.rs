//! What a gateway is told of placement.

use moerun_routing::planner::{Layout, PlanFile};

/// What a gateway is told of placement.
#[derive(Debug, Clone)]
pub struct PlacementPolicy {
    /// Whose word counts.
    pub follow: Follow,
    /// Holders that every block is to have; `None` = as many as every block had at the start, or later.
    pub replicas: Option<usize>,
    /// How experts are cut; `None` = as they are, unless something else is cheaper.
    pub layout: Option<Layout>,
    /// Bytes per second at which experts reach a worker, from its disk or from another.
    pub link_bytes_per_second: f64,
}

/// Whose word counts.
#[derive(Debug, Clone, Default)]
pub enum Follow {
    /// Each worker's own: experts move only when the operator asks for it.
    #[default]
    AsHeld,
    /// The planner's, over the loads that this gateway sees: experts move where that gains more than it costs, to a worker
    /// that comes with none, and after a loss.
    Auto,
    /// A plan's, whose workers are named by the addresses that this gateway has.
    Plan(Box<PlanFile>),
}

impl Default for PlacementPolicy {
    fn default() -> Self {
        Self {
            follow: Follow::default(),
            replicas: None,
            layout: None,
            link_bytes_per_second: 1.25e9,
        }
    }
}
