//! Exchanges that make the exact predicted time shorter: of the fault-free layer, and after the worst death.
//!
//! Where load is not as even as can be, some workers alone hold too much (`Level::crowded`). Only an exchange that takes
//! a piece out of their hands can help, so only those are tried, the most relieving first.

use super::{
    apart::Domains,
    arrangement::Arrangement,
    split::{Level, even_out, proportional},
    spread::may_swap,
};

/// A gain below this part of the ideal time is none.
const LEAST_GAIN: f64 = 1e-6;
/// Exchanges tried for one crowded set.
const MOST_CANDIDATES: usize = 600;

/// What the search over one layer is told.
pub(crate) struct Refine<'a> {
    pub(crate) domains: &'a Domains,
    /// Most holders of each piece in one domain.
    pub(crate) together: &'a [usize],
    pub(crate) speeds: &'a [f64],
    /// Whether every piece outlives any one death.
    pub(crate) survives: bool,
    /// Cost of moving all of the layer, and who holds what now: `[piece][worker]`; without, moves are free.
    pub(crate) present: Option<(f64, &'a [Vec<bool>])>,
    /// Divisions of load that may be computed.
    pub(crate) budget: usize,
}

/// Predicted time of a layer over that of an ideal division, 1 being best, and what must be changed for less.
#[derive(Debug, Clone)]
pub(crate) struct Measure {
    /// Without a fault and after the worst death, one to two; the former alone where a death loses pieces.
    pub(crate) time: f64,
    normal: Level,
    worst: Option<(usize, Level)>,
}

impl Refine<'_> {
    /// The exact measure of an arrangement.
    pub(crate) fn measure(&self, arrangement: &Arrangement) -> Measure {
        let mut shares = proportional(arrangement, self.speeds);
        let normal = even_out(arrangement, self.speeds, None, &mut shares);
        self.measure_from(arrangement, &shares, normal, f64::INFINITY, &[], &mut 0)
            .expect("no measure is above infinity")
    }

    /// `None` as soon as the time is known to reach `bound`. Deaths in `first` are looked at before others.
    fn measure_from(
        &self,
        arrangement: &Arrangement,
        shares: &[f64],
        normal: Level,
        bound: f64,
        first: &[usize],
        divisions: &mut usize,
    ) -> Option<Measure> {
        let normal_time = 1.0 / normal.balance();
        if !self.survives {
            let measure = Measure {
                time: normal_time,
                normal,
                worst: None,
            };
            return (measure.time < bound).then_some(measure);
        }
        let mut worst: Option<(usize, Level)> = None;
        let mut worst_time = 1.0;
        let others = (0..self.speeds.len()).filter(|worker| !first.contains(worker));
        for dead in first.iter().copied().chain(others) {
            if arrangement.held_by(dead).is_empty() {
                continue;
            }
            let mut after = shares.to_vec();
            let level = even_out(arrangement, self.speeds, Some(dead), &mut after);
            *divisions += 1;
            let time = 1.0 / level.balance();
            if worst.is_none() || time > worst_time {
                worst_time = time;
                worst = Some((dead, level));
            }
            if (normal_time + 2.0 * worst_time) / 3.0 >= bound {
                return None;
            }
        }
        Some(Measure {
            time: (normal_time + 2.0 * worst_time) / 3.0,
            normal,
            worst,
        })
    }

    /// Cost of what is held but was not before.
    pub(crate) fn moving(&self, arrangement: &Arrangement) -> f64 {
        let Some((cost, present)) = self.present else {
            return 0.0;
        };
        let blocks = |slot: usize| arrangement.pieces[arrangement.piece_of(slot)].blocks.len();
        let new = |slot: &usize| !present[arrangement.piece_of(*slot)][arrangement.holder(*slot)];
        let all: usize = (0..arrangement.num_slots()).map(blocks).sum();
        let moved: usize = (0..arrangement.num_slots()).filter(new).map(blocks).sum();
        cost * moved as f64 / all.max(1) as f64
    }

    /// Exchanges holders as long as time and moves together become less, within the budget.
    pub(crate) fn run(&self, arrangement: &mut Arrangement) -> Measure {
        let mut shares = proportional(arrangement, self.speeds);
        let normal = even_out(arrangement, self.speeds, None, &mut shares);
        let mut divisions = 1;
        let mut measure = self
            .measure_from(arrangement, &shares, normal, f64::INFINITY, &[], &mut divisions)
            .expect("no measure is above infinity");
        while divisions < self.budget {
            let Some((better, new_shares)) = self.improve(arrangement, &shares, &measure, &mut divisions) else {
                break;
            };
            measure = better;
            shares = new_shares;
        }
        measure
    }

    fn improve(
        &self,
        arrangement: &mut Arrangement,
        shares: &[f64],
        measure: &Measure,
        divisions: &mut usize,
    ) -> Option<(Measure, Vec<f64>)> {
        let moving = self.moving(arrangement);
        let worst = measure.worst.iter().map(|(dead, level)| (Some(*dead), level));
        let mut faults: Vec<_> = worst.chain([(None, &measure.normal)]).collect();
        faults.retain(|(_, level)| level.busiest > level.ideal * (1.0 + LEAST_GAIN) && !level.crowded.is_empty());
        let first: Vec<usize> = measure.worst.iter().map(|(dead, _)| *dead).collect();
        for (dead, level) in faults {
            for (a, b) in self.candidates(arrangement, dead, &level.crowded) {
                if *divisions >= self.budget {
                    return None;
                }
                arrangement.swap(a, b);
                let bound = measure.time + moving - self.moving(arrangement) - LEAST_GAIN;
                // Shares belong to slots, which keep their pieces: the division so far is a good start.
                let mut new_shares = shares.to_vec();
                let normal = even_out(arrangement, self.speeds, None, &mut new_shares);
                *divisions += 1;
                if let Some(better) = self.measure_from(arrangement, &new_shares, normal, bound, &first, divisions) {
                    return Some((better, new_shares));
                }
                arrangement.swap(a, b);
            }
        }
        None
    }

    /// Exchanges that take load out of the hands of `crowded` workers, the most first.
    fn candidates(&self, arrangement: &Arrangement, dead: Option<usize>, crowded: &[usize]) -> Vec<(usize, usize)> {
        let mut inside = vec![false; self.speeds.len()];
        for &worker in crowded.iter().chain(&dead) {
            inside[worker] = true;
        }
        let confined = |piece: usize| arrangement.holders(piece).all(|worker| inside[worker]);
        let mut found: Vec<(f64, usize, usize)> = Vec::new();
        for piece in (0..arrangement.pieces.len()).filter(|&piece| confined(piece)) {
            let load = arrangement.pieces[piece].load;
            for b in (0..arrangement.num_slots()).filter(|&slot| !inside[arrangement.holder(slot)]) {
                let other = arrangement.piece_of(b);
                let comes_in = arrangement.others(b).all(|worker| inside[worker]);
                let relief = load - if comes_in { arrangement.pieces[other].load } else { 0.0 };
                if relief <= 0.0 {
                    continue;
                }
                let allowed = arrangement.slots(piece).filter(|&a| {
                    may_swap(arrangement, self.domains, self.together, a, b) && !self.joins_slices(arrangement, a, b)
                });
                found.extend(allowed.map(|a| (relief, a, b)));
            }
        }
        found.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
        found.truncate(MOST_CANDIDATES);
        found.into_iter().map(|(_, a, b)| (a, b)).collect()
    }

    /// Whether an exchange would bring slices of one expert together on a worker.
    fn joins_slices(&self, arrangement: &Arrangement, a: usize, b: usize) -> bool {
        let joins = |slot: usize, worker: usize| {
            let piece = arrangement.pieces[arrangement.piece_of(slot)];
            piece.slices > 1
                && arrangement
                    .held_by(worker)
                    .iter()
                    .any(|&held| arrangement.pieces[arrangement.piece_of(held as usize)].expert == piece.expert)
        };
        joins(a, arrangement.holder(b)) || joins(b, arrangement.holder(a))
    }
}
