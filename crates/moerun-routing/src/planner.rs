//! Who should hold what: a placement of experts, whole or in slices, that is even before and after any one worker's
//! death.
//!
//! [`plan`] is a pure function: the same request gives the same plan on every machine. Its steps:
//!
//! 1. **Layout** (`layout.rs`, `cost.rs`): the operator's, or the one for which a step costs least.
//! 2. **Places** (`places.rs`): how many pieces each worker holds in each layer; refuses what does not fit.
//! 3. **Fill** (`fill.rs`): the heaviest pieces first, each to workers that share least with its other holders. What is
//!    held already is kept.
//! 4. **Spread** (`spread.rs`): exchanges by a smooth measure of load and of what pairs of workers share.
//! 5. **Refine** (`refine.rs`): exchanges by the exact best division of load (`split.rs`), now and after every death,
//!    against the bytes that they would move.

mod apart;
mod arrangement;
mod cost;
mod eplb;
mod error;
mod evaluate;
mod file;
mod fill;
mod frame;
mod layout;
mod loads;
mod places;
mod predict;
mod random;
mod refine;
mod request;
mod split;
mod spread;
#[cfg(test)]
mod tests;

use moerun_types::ExpertSlice;

use crate::slices::merge_slices;
use apart::Domains;
use arrangement::Arrangement;
use cost::{CostedLayer, Costing};
use frame::Frame;
use predict::{predict, slice_of};

pub use cost::{CostModel, StepCost};
pub use eplb::{EplbPlan, eplb_global, eplb_hierarchical};
pub use error::{PlannerError, Shortage};
pub use evaluate::evaluate;
pub use file::{PlanFile, PlanIdentity, PlannedWorker, expert_list};
pub use layout::Layout;
pub use loads::ExpertLoads;
pub use predict::{Death, LayerPrediction, PieceShares, Prediction, WorkerPrediction};
pub use request::{ExpertSize, PlanRequest, WorkerSpec};

/// Layers that the cost model looks at.
const COSTED_LAYERS: usize = 4;

/// Who holds what, and what that promises.
#[derive(Debug, Clone, PartialEq)]
pub struct PlacementPlan {
    /// How experts are cut.
    pub layout: Layout,
    /// What each worker holds, sorted, runs of blocks merged; in the order of the request's workers.
    pub held: Vec<Vec<ExpertSlice>>,
    /// The best division of every piece's load over its holders, ascending by layer, expert and block.
    pub shares: Vec<PieceShares>,
    /// What to expect.
    pub prediction: Prediction,
    /// What a step costs in each layout that was considered and fits, cheapest first.
    pub considered: Vec<(Layout, StepCost)>,
}

/// Plans who holds what. Errors: a request that makes no sense, experts that do not fit.
pub fn plan(request: &PlanRequest) -> Result<PlacementPlan, PlannerError> {
    request.check()?;
    let shares = request.loads.shares(&request.moe_layers, request.num_experts)?;
    let speeds = request.speeds();
    let domains = Domains::new(&request.workers);
    let present = request.present_by_worker();
    let planner = Planner {
        request,
        shares: &shares,
        speeds: &speeds,
        domains: &domains,
    };
    let (frame, considered) = planner.choose(&present)?;
    let arrangements = frame.arrange(&present)?;
    let looked_at = COSTED_LAYERS.min(arrangements.len());
    let layers = (0..looked_at).map(|index| index * arrangements.len() / looked_at);
    let cost = planner.cost(layers.map(|layer| (layer, &arrangements[layer])));
    let (prediction, divided) = predict(request, &arrangements, &speeds, cost);
    Ok(PlacementPlan {
        layout: frame.layout,
        held: (0..speeds.len())
            .map(|worker| held_by(request, &arrangements, worker))
            .collect(),
        shares: divided,
        prediction,
        considered,
    })
}

fn held_by(request: &PlanRequest, arrangements: &[Arrangement], worker: usize) -> Vec<ExpertSlice> {
    let layers = request.moe_layers.iter().zip(arrangements);
    let slices = layers.flat_map(|(&layer, arrangement)| {
        arrangement.held_by(worker).iter().map(move |&slot| {
            let piece = arrangement.pieces[arrangement.piece_of(slot as usize)];
            slice_of(layer, piece.expert, piece.blocks)
        })
    });
    merge_slices(slices.collect())
}

struct Planner<'a> {
    request: &'a PlanRequest,
    shares: &'a [Vec<f64>],
    speeds: &'a [f64],
    domains: &'a Domains,
}

impl<'a> Planner<'a> {
    fn frame(&self, layout: Layout) -> Result<Frame<'a>, PlannerError> {
        Frame::new(self.request, layout, self.shares, self.domains, self.speeds)
    }

    /// The layout asked for, or the cheapest that fits; the present one while nothing else is cheaper by more than the
    /// stability asked for.
    fn choose(&self, present: &[&[ExpertSlice]]) -> Result<(Frame<'a>, Vec<(Layout, StepCost)>), PlannerError> {
        let layouts = self
            .request
            .layout
            .map_or_else(|| self.candidates(), |layout| vec![layout]);
        let mut fitting = Vec::new();
        let mut refused = None;
        for layout in layouts {
            match self.costed(layout) {
                Ok(costed) => fitting.push(costed),
                Err(error) => _ = refused.get_or_insert(error),
            }
        }
        fitting.sort_by(|(_, a), (_, b)| a.seconds.total_cmp(&b.seconds));
        let considered = fitting.iter().map(|(frame, cost)| (frame.layout, *cost)).collect();
        let least = fitting.first().map_or(f64::INFINITY, |(_, cost)| cost.seconds);
        let stays = fitting.iter().position(|(frame, cost)| {
            cost.seconds <= least * (1.0 + self.request.stability) && frame.fits_present(present)
        });
        match (fitting.is_empty(), refused) {
            (true, Some(error)) => Err(error),
            (true, None) => Err(PlannerError::NoExperts),
            (false, _) => Ok((fitting.swap_remove(stays.unwrap_or(0)).0, considered)),
        }
    }

    /// Whole experts, 2, 4, 8, … slices and as many as there are workers, and slices of the busiest eighth only.
    fn candidates(&self) -> Vec<Layout> {
        let most = self
            .request
            .size
            .num_blocks()
            .min(u16::try_from(self.request.workers.len()).unwrap_or(u16::MAX));
        let mut counts: Vec<u16> = (1..16)
            .map(|power| 1u16 << power)
            .filter(|&count| count < most)
            .collect();
        counts.extend((most > 1).then_some(most));
        let busiest = u16::try_from(self.request.num_experts / 8).unwrap_or(u16::MAX);
        let mix = (busiest > 0 && most > 1).then_some(Layout::Mix { busiest, slices: most });
        std::iter::once(Layout::Whole)
            .chain(counts.into_iter().map(Layout::Slices))
            .chain(mix)
            .collect()
    }

    fn costed(&self, layout: Layout) -> Result<(Frame<'a>, StepCost), PlannerError> {
        let frame = self.frame(layout)?;
        let sketch = frame.sketch(COSTED_LAYERS)?;
        let cost = self.cost(sketch.iter().map(|(layer, arrangement)| (*layer, arrangement)));
        Ok((frame, cost))
    }

    fn cost<'l>(&self, layers: impl Iterator<Item = (usize, &'l Arrangement)>) -> StepCost {
        let costing = Costing {
            model: &self.request.cost,
            workers: &self.request.workers,
            top_k: self.request.top_k,
            bytes: &|blocks| self.request.size.bytes(blocks),
            num_blocks: usize::from(self.request.size.num_blocks()),
        };
        let layers: Vec<CostedLayer<'_>> = layers
            .map(|(layer, arrangement)| CostedLayer {
                arrangement,
                shares: &self.shares[layer],
            })
            .collect();
        costing.mean(&layers, self.request.seed)
    }
}
