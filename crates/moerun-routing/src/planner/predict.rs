//! What a plan promises, in numbers.

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId};

use super::{
    PlanRequest, StepCost,
    arrangement::Arrangement,
    split::{even_out, proportional, smooth},
};

/// What a plan promises. A balance is the mean over the max of the workers' loads, each divided by the worker's speed:
/// 1 where all are done at the same time. Load is divided over holders in the best proportion.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Of the sums over all layers.
    pub balance: f64,
    /// … after the death that leaves the least balance; `None` with one worker.
    pub after_worst_death: Option<Death>,
    /// Layer by layer.
    pub layers: Vec<LayerPrediction>,
    /// Worker by worker.
    pub workers: Vec<WorkerPrediction>,
    /// Of one step and layer.
    pub cost: StepCost,
    /// Bytes that workers must fetch, starting from the present plan.
    pub moved_bytes: u64,
}

/// A worker's death and what remains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Death {
    /// Index of the worker.
    pub worker: usize,
    /// Balance of the others, with what they can compute.
    pub balance: f64,
    /// Share of the load that no worker can compute any more.
    pub lost: f64,
}

/// One layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPrediction {
    /// Which.
    pub layer: LayerId,
    /// Before any death.
    pub balance: f64,
    /// After the one that leaves the least.
    pub after_worst_death: Option<Death>,
}

/// One worker.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerPrediction {
    /// Bytes of all that it holds.
    pub memory_bytes: u64,
    /// Pieces of experts that it holds.
    pub pieces: usize,
    /// Share of all load.
    pub load: f64,
    /// Bytes that it must fetch.
    pub moved_bytes: u64,
}

/// How the load of one piece is divided over its holders.
#[derive(Debug, Clone, PartialEq)]
pub struct PieceShares {
    /// The piece.
    pub slice: ExpertSlice,
    /// `(index of a worker, its part of the piece's load)`, ascending by worker; the parts sum to 1.
    pub holders: Vec<(usize, f64)>,
}

/// Reckons all of it.
pub(super) fn predict(
    request: &PlanRequest,
    arrangements: &[Arrangement],
    speeds: &[f64],
    cost: StepCost,
) -> (Prediction, Vec<PieceShares>) {
    let workers = speeds.len();
    let mut loads = vec![0.0; workers];
    let mut after = vec![vec![0.0; workers]; workers];
    let mut lost = vec![0.0; workers];
    let mut layers = Vec::with_capacity(arrangements.len());
    let mut divided = Vec::new();
    for (&layer, arrangement) in request.moe_layers.iter().zip(arrangements) {
        let mut shares = proportional(arrangement, speeds);
        let level = even_out(arrangement, speeds, None, &mut shares);
        smooth(arrangement, speeds, &mut shares);
        add_loads(arrangement, &shares, &mut loads);
        let mut worst: Option<Death> = None;
        for dead in (0..workers).filter(|_| workers > 1) {
            let mut shares = shares.clone();
            let level = even_out(arrangement, speeds, Some(dead), &mut shares);
            smooth_alive(arrangement, speeds, dead, &mut shares);
            add_loads(arrangement, &shares, &mut after[dead]);
            lost[dead] += level.lost;
            let death = Death {
                worker: dead,
                balance: level.balance(),
                lost: level.lost,
            };
            if worst.is_none_or(|worst| death.balance < worst.balance) {
                worst = Some(death);
            }
        }
        layers.push(LayerPrediction {
            layer,
            balance: level.balance(),
            after_worst_death: worst,
        });
        divided.extend(piece_shares(layer, arrangement, &shares));
    }
    let deaths = (0..workers).filter(|_| workers > 1).map(|dead| Death {
        worker: dead,
        balance: balance(&after[dead], speeds, Some(dead)),
        lost: lost[dead] / arrangements.len() as f64,
    });
    let total: f64 = loads.iter().sum();
    let moved = moved_bytes(request, arrangements);
    let workers = (0..workers).map(|worker| WorkerPrediction {
        memory_bytes: held_bytes(request, arrangements, worker),
        pieces: arrangements
            .iter()
            .map(|arrangement| arrangement.held_by(worker).len())
            .sum(),
        load: loads[worker] / total,
        moved_bytes: moved[worker],
    });
    let prediction = Prediction {
        balance: balance(&loads, speeds, None),
        after_worst_death: deaths.min_by(|a, b| a.balance.total_cmp(&b.balance)),
        layers,
        workers: workers.collect(),
        cost,
        moved_bytes: moved.iter().sum(),
    };
    (prediction, divided)
}

fn smooth_alive(arrangement: &Arrangement, speeds: &[f64], dead: usize, shares: &mut [f64]) {
    // A dead worker is one that is infinitely slow: nothing moves to it.
    let mut speeds = speeds.to_vec();
    speeds[dead] = 1e-12;
    smooth(arrangement, &speeds, shares);
}

fn add_loads(arrangement: &Arrangement, shares: &[f64], loads: &mut [f64]) {
    for (slot, share) in shares.iter().enumerate() {
        loads[arrangement.holder(slot)] += share;
    }
}

/// Mean over max of load over speed.
fn balance(loads: &[f64], speeds: &[f64], dead: Option<usize>) -> f64 {
    let alive = || (0..loads.len()).filter(|&worker| Some(worker) != dead);
    let mean = alive().map(|worker| loads[worker]).sum::<f64>() / alive().map(|worker| speeds[worker]).sum::<f64>();
    let most = alive().map(|worker| loads[worker] / speeds[worker]).fold(0.0, f64::max);
    if most > 0.0 { mean / most } else { 1.0 }
}

fn piece_shares<'a>(
    layer: LayerId,
    arrangement: &'a Arrangement,
    shares: &'a [f64],
) -> impl Iterator<Item = PieceShares> + 'a {
    arrangement.pieces.iter().enumerate().map(move |(index, piece)| {
        let slots = arrangement.slots(index);
        let even = 1.0 / slots.len() as f64;
        let part = |slot: usize| {
            if piece.load > 0.0 {
                (shares[slot] / piece.load).max(0.0)
            } else {
                even
            }
        };
        let sum: f64 = slots.clone().map(part).sum();
        let mut holders: Vec<(usize, f64)> = slots.map(|slot| (arrangement.holder(slot), part(slot) / sum)).collect();
        holders.sort_by_key(|&(worker, _)| worker);
        PieceShares {
            slice: slice_of(layer, piece.expert, piece.blocks),
            holders,
        }
    })
}

pub(super) fn slice_of(layer: LayerId, expert: u16, blocks: BlockRange) -> ExpertSlice {
    ExpertSlice {
        layer,
        expert: ExpertId(expert),
        blocks,
    }
}

fn held_bytes(request: &PlanRequest, arrangements: &[Arrangement], worker: usize) -> u64 {
    let bytes = |arrangement: &Arrangement| -> u64 {
        let held = arrangement.held_by(worker).iter();
        held.map(|&slot| {
            request
                .size
                .bytes(arrangement.pieces[arrangement.piece_of(slot as usize)].blocks.len())
        })
        .sum()
    };
    arrangements.iter().map(bytes).sum()
}

/// Bytes of the blocks that each worker is to hold and does not hold now.
fn moved_bytes(request: &PlanRequest, arrangements: &[Arrangement]) -> Vec<u64> {
    let present = request.present_by_worker();
    let missing = |worker: usize, slice: ExpertSlice| -> u64 {
        let has = |block: u16| {
            present[worker].iter().any(|held| {
                (held.layer, held.expert) == (slice.layer, slice.expert)
                    && held.blocks.first <= block
                    && block < held.blocks.end
            })
        };
        let missing = (slice.blocks.first..slice.blocks.end)
            .filter(|&block| !has(block))
            .count();
        request.size.bytes(missing)
    };
    let holds_whole = present.iter().map(|held| {
        let mut sorted = held.to_vec();
        sorted.sort_unstable();
        sorted
    });
    let sorted: Vec<Vec<ExpertSlice>> = holds_whole.collect();
    let mut moved = vec![0; present.len()];
    for (&layer, arrangement) in request.moe_layers.iter().zip(arrangements) {
        for (worker, moved) in moved.iter_mut().enumerate() {
            for &slot in arrangement.held_by(worker) {
                let piece = arrangement.pieces[arrangement.piece_of(slot as usize)];
                let slice = slice_of(layer, piece.expert, piece.blocks);
                if sorted[worker].binary_search(&slice).is_err() {
                    *moved += missing(worker, slice);
                }
            }
        }
    }
    moved
}
