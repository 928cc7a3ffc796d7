//! A smooth measure of how well pieces are spread, cheap enough to try every exchange.
//!
//! Three sums of squares, smallest when even: each worker's load (pieces divided evenly over their holders); for each
//! pair of workers the load that one takes over when the other dies, so that every death is shared by all survivors; and
//! the slices of one expert on one worker, which would wait for each other.

use super::{apart::Domains, arrangement::Arrangement};

/// Weight of slices of one expert on one worker.
const SAME_EXPERT: f64 = 0.05;
/// Sweeps over all exchanges, at most.
const MAX_SWEEPS: usize = 8;
/// A sweep that gains less than this part is the last.
const LEAST_GAIN: f64 = 1e-3;

/// Sums that the measure is made of.
#[derive(Debug)]
pub(crate) struct Spread<'a> {
    speeds: &'a [f64],
    load: Vec<f64>,
    /// Load that passes from one worker to another when it dies, for each pair.
    pair: Vec<f64>,
    /// Slices of each expert on each worker, where experts are cut.
    slices: Vec<u16>,
}

/// A piece, as far as the measure is concerned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weight {
    pub(crate) expert: u16,
    pub(crate) load: f64,
    /// Holders that it will have.
    pub(crate) holders: usize,
    pub(crate) is_slice: bool,
}

impl Weight {
    fn share(&self) -> f64 {
        self.load / self.holders as f64
    }

    fn taken_over(&self) -> f64 {
        self.load / (self.holders * (self.holders.max(2) - 1)) as f64
    }
}

impl<'a> Spread<'a> {
    pub(crate) fn new(speeds: &'a [f64], num_experts: usize) -> Self {
        Self {
            speeds,
            load: vec![0.0; speeds.len()],
            pair: vec![0.0; speeds.len() * speeds.len()],
            slices: vec![0; speeds.len() * num_experts],
        }
    }

    /// How much worse it becomes if `worker` joins `others` as a holder.
    pub(crate) fn cost(&self, weight: Weight, others: impl Iterator<Item = usize>, worker: usize) -> f64 {
        let workers = self.speeds.len();
        let (share, speed) = (weight.share(), self.speeds[worker]);
        let mut cost = share * (2.0 * self.load[worker] + share) / speed;
        let taken = weight.taken_over();
        for other in others {
            let pair = self.pair[worker * workers + other];
            cost += workers as f64 * taken * (2.0 * pair + taken) / (speed * self.speeds[other]);
        }
        if weight.is_slice {
            let slices = f64::from(self.slices[usize::from(weight.expert) * workers + worker]);
            cost += SAME_EXPERT * weight.load * (2.0 * slices + 1.0);
        }
        cost
    }

    /// Makes `worker` a holder beside `others`.
    pub(crate) fn add(&mut self, weight: Weight, others: impl Iterator<Item = usize>, worker: usize) {
        self.change(weight, others, worker, 1.0);
        if weight.is_slice {
            self.slices[usize::from(weight.expert) * self.speeds.len() + worker] += 1;
        }
    }

    /// Undoes [`add`](Self::add).
    pub(crate) fn remove(&mut self, weight: Weight, others: impl Iterator<Item = usize>, worker: usize) {
        self.change(weight, others, worker, -1.0);
        if weight.is_slice {
            self.slices[usize::from(weight.expert) * self.speeds.len() + worker] -= 1;
        }
    }

    fn change(&mut self, weight: Weight, others: impl Iterator<Item = usize>, worker: usize, sign: f64) {
        let workers = self.speeds.len();
        self.load[worker] += sign * weight.share();
        let taken = sign * weight.taken_over();
        for other in others {
            self.pair[worker * workers + other] += taken;
            self.pair[other * workers + worker] += taken;
        }
    }
}

/// Whether the holders of two slots may change places: pieces of one size, and replicas stay apart.
pub(crate) fn may_swap(arrangement: &Arrangement, domains: &Domains, together: &[usize], a: usize, b: usize) -> bool {
    let (piece_a, piece_b) = (arrangement.piece_of(a), arrangement.piece_of(b));
    let (at_a, at_b) = (arrangement.holder(a), arrangement.holder(b));
    piece_a != piece_b
        && at_a != at_b
        && arrangement.pieces[piece_a].blocks.len() == arrangement.pieces[piece_b].blocks.len()
        && domains.allows(at_b, arrangement.others(a), together[piece_a])
        && domains.allows(at_a, arrangement.others(b), together[piece_b])
}

/// Exchanges holders as long as the measure becomes smaller.
pub(crate) fn descend(arrangement: &mut Arrangement, domains: &Domains, together: &[usize], speeds: &[f64]) {
    let experts = arrangement
        .pieces
        .iter()
        .map(|piece| usize::from(piece.expert) + 1)
        .max();
    let mut spread = Spread::new(speeds, experts.unwrap_or(0));
    let weights = weights(arrangement);
    let mut measure = 0.0;
    for slot in 0..arrangement.num_slots() {
        let piece = arrangement.piece_of(slot);
        let before: Vec<usize> = (arrangement.slots(piece).start..slot)
            .map(|slot| arrangement.holder(slot))
            .collect();
        let worker = arrangement.holder(slot);
        measure += spread.cost(weights[piece], before.iter().copied(), worker);
        spread.add(weights[piece], before.into_iter(), worker);
    }
    for _ in 0..MAX_SWEEPS {
        let gained = sweep(arrangement, &mut spread, &weights, domains, together);
        if gained <= LEAST_GAIN * measure {
            return;
        }
        measure -= gained;
    }
}

fn weights(arrangement: &Arrangement) -> Vec<Weight> {
    let weight = |(index, piece): (usize, &super::arrangement::Piece)| Weight {
        expert: piece.expert,
        load: piece.load,
        holders: arrangement.slots(index).len(),
        is_slice: piece.slices > 1,
    };
    arrangement.pieces.iter().enumerate().map(weight).collect()
}

fn sweep(
    arrangement: &mut Arrangement,
    spread: &mut Spread<'_>,
    weights: &[Weight],
    domains: &Domains,
    together: &[usize],
) -> f64 {
    let mut gained = 0.0;
    for a in 0..arrangement.num_slots() {
        for b in a + 1..arrangement.num_slots() {
            if !may_swap(arrangement, domains, together, a, b) {
                continue;
            }
            let (weight_a, weight_b) = (weights[arrangement.piece_of(a)], weights[arrangement.piece_of(b)]);
            let (at_a, at_b) = (arrangement.holder(a), arrangement.holder(b));
            spread.remove(weight_a, arrangement.others(a), at_a);
            spread.remove(weight_b, arrangement.others(b), at_b);
            let stay =
                spread.cost(weight_a, arrangement.others(a), at_a) + spread.cost(weight_b, arrangement.others(b), at_b);
            let change =
                spread.cost(weight_a, arrangement.others(a), at_b) + spread.cost(weight_b, arrangement.others(b), at_a);
            let (to_a, to_b) = if change < stay * (1.0 - 1e-9) - 1e-15 {
                (at_b, at_a)
            } else {
                (at_a, at_b)
            };
            spread.add(weight_a, arrangement.others(a), to_a);
            spread.add(weight_b, arrangement.others(b), to_b);
            if to_a != at_a {
                arrangement.swap(a, b);
                gained += stay - change;
            }
        }
    }
    gained
}
