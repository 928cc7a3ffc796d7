//! What a placement that is there promises, as it is: whether a new plan is worth its moves is judged against it.

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId};

use super::{
    COSTED_LAYERS, PlanRequest, Planner, PlannerError, Prediction,
    apart::Domains,
    arrangement::{Arrangement, Piece},
    predict::predict,
};
use crate::slices::merge_slices;

/// Predicts what `held`, in the order of the request's workers, promises under the request's loads; `None` if some block
/// has no holder. Errors: a request that makes no sense.
pub fn evaluate(request: &PlanRequest, held: &[Vec<ExpertSlice>]) -> Result<Option<Prediction>, PlannerError> {
    request.check()?;
    let shares = request.loads.shares(&request.moe_layers, request.num_experts)?;
    let speeds = request.speeds();
    let domains = Domains::new(&request.workers);
    let held: Vec<Vec<ExpertSlice>> = held.iter().map(|held| merge_slices(held.clone())).collect();
    let layers = request.moe_layers.iter().zip(&shares);
    let arranged = layers.map(|(&layer, shares)| arrangement(request, layer, shares, &held));
    let Some(arrangements) = arranged.collect::<Option<Vec<Arrangement>>>() else {
        return Ok(None);
    };
    let planner = Planner {
        request,
        shares: &shares,
        speeds: &speeds,
        domains: &domains,
    };
    let looked_at = COSTED_LAYERS.min(arrangements.len());
    let layers = (0..looked_at).map(|index| index * arrangements.len() / looked_at);
    let cost = planner.cost(layers.map(|layer| (layer, &arrangements[layer])));
    Ok(Some(predict(request, &arrangements, &speeds, cost).0))
}

/// The experts of a layer, cut wherever somebody's run begins or ends; `None` if a block has no holder.
fn arrangement(
    request: &PlanRequest,
    layer: LayerId,
    shares: &[f64],
    held: &[Vec<ExpertSlice>],
) -> Option<Arrangement> {
    let num_blocks = request.size.num_blocks();
    let (mut pieces, mut all_holders) = (Vec::new(), Vec::new());
    for (expert, &load) in shares.iter().enumerate() {
        let id = ExpertId(u16::try_from(expert).ok()?);
        let runs: Vec<(usize, BlockRange)> = held
            .iter()
            .enumerate()
            .flat_map(|(worker, held)| {
                let start = held.partition_point(|slice| (slice.layer, slice.expert) < (layer, id));
                let of_expert = held[start..]
                    .iter()
                    .take_while(|slice| (slice.layer, slice.expert) == (layer, id));
                of_expert.map(|slice| (worker, slice.blocks)).collect::<Vec<_>>()
            })
            .collect();
        let mut borders: Vec<u16> = runs.iter().flat_map(|(_, blocks)| [blocks.first, blocks.end]).collect();
        borders.extend([0, num_blocks]);
        borders.sort_unstable();
        borders.dedup();
        let slices = u16::try_from(borders.len() - 1).ok()?;
        for border in borders.windows(2) {
            let blocks = BlockRange {
                first: border[0],
                end: border[1],
            };
            let able = runs.iter().filter(|(_, run)| run.contains(blocks));
            let holders: Vec<usize> = able.map(|&(worker, _)| worker).collect();
            if holders.is_empty() {
                return None;
            }
            pieces.push(Piece {
                expert: id.0,
                blocks,
                load: load * blocks.len() as f64 / f64::from(num_blocks),
                slices,
            });
            all_holders.push(holders);
        }
    }
    Some(Arrangement::new(pieces, &all_holders, request.workers.len()))
}
