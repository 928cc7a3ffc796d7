//! What a plan is asked for, checked once.

use moerun_types::{ExpertSlice, LayerId};

use super::{CostModel, ExpertLoads, Layout, PlannerError};

/// One worker, as the planner sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerSpec {
    /// Unique among the workers; the present plan is matched by it.
    pub name: String,
    /// Bytes that experts may take.
    pub memory_bytes: u64,
    /// Bytes of weights that it reads per second: load is shared out in proportion, so a scale common to all workers
    /// changes the cost model's seconds and nothing else.
    pub bandwidth: f64,
    /// Seconds of an empty round trip between gateway and worker.
    pub round_trip_seconds: f64,
    /// What fails together, such as a rack; `None` is a domain of its own.
    pub domain: Option<String>,
}

/// Bytes of the runs of blocks of one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSize(Vec<u64>);

impl ExpertSize {
    /// `bytes[n - 1]`: most that `n` neighbouring blocks take; the last is the whole expert, so the length is the number
    /// of blocks.
    pub fn new(bytes: Vec<u64>) -> Self {
        Self(bytes)
    }

    /// Combine blocks of an expert.
    pub fn num_blocks(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap_or(u16::MAX)
    }

    /// Most bytes of `blocks` neighbouring blocks.
    pub fn bytes(&self, blocks: usize) -> u64 {
        blocks.checked_sub(1).map_or(0, |index| self.0[index])
    }
}

/// What a plan is asked for.
#[derive(Debug, Clone)]
pub struct PlanRequest {
    /// Layers that have experts, ascending.
    pub moe_layers: Vec<LayerId>,
    /// Experts of each of them.
    pub num_experts: usize,
    /// Experts that a token chooses.
    pub top_k: usize,
    /// Size of an expert.
    pub size: ExpertSize,
    /// How often each is chosen.
    pub loads: ExpertLoads,
    /// Who may hold them.
    pub workers: Vec<WorkerSpec>,
    /// Holders of every block of every expert.
    pub replicas: usize,
    /// Holders beyond those in each layer: they go to the busiest pieces.
    pub extra_holders: usize,
    /// How experts are cut; `None` leaves it to the cost model.
    pub layout: Option<Layout>,
    /// What the workers hold now, by name. It is kept but where moving gains enough; empty plans from nothing.
    pub present: Vec<(String, Vec<ExpertSlice>)>,
    /// How much better (as a fraction of time) a layer must become for all of it to be moved; for a part of it, the same
    /// part of that.
    pub stability: f64,
    /// Ties, and which layers share which workers, follow it.
    pub seed: u64,
    /// What a step costs.
    pub cost: CostModel,
}

impl PlanRequest {
    /// Names the first thing that makes no sense.
    pub(super) fn check(&self) -> Result<(), PlannerError> {
        if self.moe_layers.is_empty() || self.num_experts == 0 || self.size.0.is_empty() {
            return Err(PlannerError::NoExperts);
        }
        if self.workers.is_empty() {
            return Err(PlannerError::NoWorkers);
        }
        for (index, worker) in self.workers.iter().enumerate() {
            if self.workers[..index].iter().any(|other| other.name == worker.name) {
                return Err(PlannerError::DuplicateWorker {
                    name: worker.name.clone(),
                });
            }
            positive(&worker.name, "bandwidth", worker.bandwidth)?;
            not_negative(&worker.name, "round trip", worker.round_trip_seconds)?;
        }
        not_negative("plan", "stability", self.stability)?;
        self.cost.check()?;
        if self.replicas == 0 || self.replicas > self.workers.len() {
            return Err(PlannerError::Replicas {
                replicas: self.replicas,
                workers: self.workers.len(),
            });
        }
        if let Some(layout) = self.layout {
            self.check_layout(layout)?;
        }
        Ok(())
    }

    fn check_layout(&self, layout: Layout) -> Result<(), PlannerError> {
        let num_blocks = self.size.num_blocks();
        if (1..=num_blocks).contains(&layout.most_slices()) && usize::from(layout.busiest()) <= self.num_experts {
            return Ok(());
        }
        Err(PlannerError::Layout {
            layout,
            num_experts: self.num_experts,
            num_blocks,
        })
    }

    /// What each worker holds now, in the order of the workers.
    pub(super) fn present_by_worker(&self) -> Vec<&[ExpertSlice]> {
        let of = |worker: &WorkerSpec| {
            self.present
                .iter()
                .find(|(name, _)| *name == worker.name)
                .map_or(&[][..], |(_, held)| held)
        };
        self.workers.iter().map(of).collect()
    }

    /// Bandwidths, scaled to a mean of 1.
    pub(super) fn speeds(&self) -> Vec<f64> {
        let largest = self.workers.iter().map(|worker| worker.bandwidth).fold(0.0, f64::max);
        let scaled: Vec<f64> = self.workers.iter().map(|worker| worker.bandwidth / largest).collect();
        let mean = scaled.iter().sum::<f64>() / scaled.len() as f64;
        scaled.iter().map(|speed| speed / mean).collect()
    }
}

pub(super) fn positive(whose: &str, what: &'static str, found: f64) -> Result<(), PlannerError> {
    if found.is_finite() && found > 0.0 {
        return Ok(());
    }
    Err(PlannerError::BadNumber {
        whose: whose.to_owned(),
        what,
        wanted: "a number above 0",
        found,
    })
}

pub(super) fn not_negative(whose: &str, what: &'static str, found: f64) -> Result<(), PlannerError> {
    if found.is_finite() && found >= 0.0 {
        return Ok(());
    }
    Err(PlannerError::BadNumber {
        whose: whose.to_owned(),
        what,
        wanted: "0 or more",
        found,
    })
}
