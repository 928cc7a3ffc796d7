//! The best division of each piece's load over its holders.
//!
//! The least level that the busiest worker can have is the largest, over all sets of workers, of the load that only they
//! hold divided by their speed. Load is pushed along shortest paths from workers above the level to workers below it, as
//! a maximum flow is found; where no path is left, the workers that were reached are such a set, and the level is theirs.

use super::arrangement::Arrangement;

/// What a division of load comes to.
#[derive(Debug, Clone)]
pub(crate) struct Level {
    /// Load over speed of the busiest worker.
    pub(crate) busiest: f64,
    /// … if load could be anywhere.
    pub(crate) ideal: f64,
    /// Load of the pieces that have no holder.
    pub(crate) lost: f64,
    /// Workers that alone hold too much, if load is not as even as can be.
    pub(crate) crowded: Vec<usize>,
}

impl Level {
    /// Mean over max: 1 is even.
    pub(crate) fn balance(&self) -> f64 {
        if self.busiest > 0.0 {
            self.ideal / self.busiest
        } else {
            1.0
        }
    }
}

/// Divides every piece in proportion to its holders' speeds: a start for [`even_out`]. One share a slot.
pub(crate) fn proportional(arrangement: &Arrangement, speeds: &[f64]) -> Vec<f64> {
    let mut shares = vec![0.0; arrangement.num_slots()];
    for (piece, of) in arrangement.pieces.iter().enumerate() {
        let speed: f64 = arrangement.holders(piece).map(|worker| speeds[worker]).sum();
        for slot in arrangement.slots(piece) {
            shares[slot] = of.load * speeds[arrangement.holder(slot)] / speed;
        }
    }
    shares
}

/// Changes `shares` (of all of every piece's load) so that the busiest worker has as little as can be; with `dead`, that
/// worker's shares go to the other holders first.
pub(crate) fn even_out(arrangement: &Arrangement, speeds: &[f64], dead: Option<usize>, shares: &mut [f64]) -> Level {
    let lost = dead.map_or(0.0, |dead| hand_over(arrangement, speeds, dead, shares));
    let mut search = Search::new(arrangement, speeds, dead, shares);
    let total: f64 = search.load.iter().sum();
    let speed: f64 = (0..speeds.len())
        .filter(|&worker| Some(worker) != dead)
        .map(|worker| speeds[worker])
        .sum();
    let ideal = if speed > 0.0 { total / speed } else { 0.0 };
    let mut level = ideal;
    let mut crowded = Vec::new();
    // Every push fills a share, a worker or empties one; the bound is never met in practice.
    for _ in 0..64 * (arrangement.num_slots() + speeds.len()) {
        match search.push(level, ideal * 1e-9, shares) {
            Pushed::Some => {}
            Pushed::Done => break,
            Pushed::Stuck => {
                crowded = std::mem::take(&mut search.queue);
                let load: f64 = crowded.iter().map(|&worker| search.load[worker]).sum();
                let speed: f64 = crowded.iter().map(|&worker| speeds[worker]).sum();
                level = level.max(load / speed);
            }
        }
    }
    let busiest = (0..speeds.len())
        .filter(|&worker| Some(worker) != dead)
        .map(|worker| search.load[worker] / speeds[worker]);
    Level {
        busiest: busiest.fold(0.0, f64::max),
        ideal,
        lost,
        crowded,
    }
}

/// Gives a dead worker's shares to the other holders, as fast as they are; returns what nobody else holds.
fn hand_over(arrangement: &Arrangement, speeds: &[f64], dead: usize, shares: &mut [f64]) -> f64 {
    let mut lost = 0.0;
    for &slot in arrangement.held_by(dead) {
        let slot = slot as usize;
        let share = std::mem::take(&mut shares[slot]);
        let speed: f64 = arrangement.others(slot).map(|worker| speeds[worker]).sum();
        if speed == 0.0 {
            lost += share;
            continue;
        }
        for other in arrangement
            .slots(arrangement.piece_of(slot))
            .filter(|&other| other != slot)
        {
            shares[other] += share * speeds[arrangement.holder(other)] / speed;
        }
    }
    lost
}

enum Pushed {
    Some,
    /// Nobody is above the level.
    Done,
    /// Those above it reach nobody below it; the queue has all that they reach.
    Stuck,
}

struct Search<'a> {
    arrangement: &'a Arrangement,
    speeds: &'a [f64],
    dead: Option<usize>,
    load: Vec<f64>,
    queue: Vec<usize>,
    /// How each worker was reached: the slot that gives and the slot that takes.
    from: Vec<Option<(usize, usize)>>,
    reached: Vec<bool>,
}

impl<'a> Search<'a> {
    fn new(arrangement: &'a Arrangement, speeds: &'a [f64], dead: Option<usize>, shares: &[f64]) -> Self {
        let mut load = vec![0.0; speeds.len()];
        for (slot, share) in shares.iter().enumerate() {
            load[arrangement.holder(slot)] += share;
        }
        Self {
            arrangement,
            speeds,
            dead,
            load,
            queue: Vec::with_capacity(speeds.len()),
            from: vec![None; speeds.len()],
            reached: vec![false; speeds.len()],
        }
    }

    /// One push along a shortest path.
    fn push(&mut self, level: f64, tolerance: f64, shares: &mut [f64]) -> Pushed {
        self.queue.clear();
        self.reached.fill(false);
        for worker in 0..self.speeds.len() {
            if Some(worker) != self.dead && self.load[worker] > level * self.speeds[worker] + tolerance {
                self.reached[worker] = true;
                self.from[worker] = None;
                self.queue.push(worker);
            }
        }
        if self.queue.is_empty() {
            return Pushed::Done;
        }
        let mut next = 0;
        while next < self.queue.len() {
            let worker = self.queue[next];
            next += 1;
            for &slot in self.arrangement.held_by(worker) {
                let slot = slot as usize;
                if shares[slot] <= tolerance * 1e-3 {
                    continue;
                }
                for other in self.arrangement.slots(self.arrangement.piece_of(slot)) {
                    let taker = self.arrangement.holder(other);
                    if self.reached[taker] || Some(taker) == self.dead {
                        continue;
                    }
                    self.reached[taker] = true;
                    self.from[taker] = Some((slot, other));
                    self.queue.push(taker);
                    if self.load[taker] < level * self.speeds[taker] - tolerance {
                        self.follow(taker, level, shares);
                        return Pushed::Some;
                    }
                }
            }
        }
        Pushed::Stuck
    }

    /// Pushes along the path that reached `taker`.
    fn follow(&mut self, taker: usize, level: f64, shares: &mut [f64]) {
        let mut amount = level * self.speeds[taker] - self.load[taker];
        let mut worker = taker;
        while let Some((give, _)) = self.from[worker] {
            amount = amount.min(shares[give]);
            worker = self.arrangement.holder(give);
        }
        amount = amount.min(self.load[worker] - level * self.speeds[worker]);
        self.load[worker] -= amount;
        self.load[taker] += amount;
        let mut worker = taker;
        while let Some((give, take)) = self.from[worker] {
            shares[give] -= amount;
            shares[take] += amount;
            worker = self.arrangement.holder(give);
        }
    }
}

/// Makes the levels of the holders of every piece as equal as its load allows, piece by piece, so that workers that are
/// not the busiest are even too. Never raises the busiest.
pub(crate) fn smooth(arrangement: &Arrangement, speeds: &[f64], shares: &mut [f64]) {
    const SWEEPS: usize = 32;
    let mut load = vec![0.0; speeds.len()];
    for (slot, share) in shares.iter().enumerate() {
        load[arrangement.holder(slot)] += share;
    }
    for _ in 0..SWEEPS {
        let mut moved = 0.0;
        for piece in 0..arrangement.pieces.len() {
            let slots = arrangement.slots(piece);
            for a in slots.clone() {
                for b in a + 1..slots.end {
                    let (at_a, at_b) = (arrangement.holder(a), arrangement.holder(b));
                    let speed = speeds[at_a] + speeds[at_b];
                    let wanted = (load[at_a] * speeds[at_b] - load[at_b] * speeds[at_a]) / speed;
                    let amount = wanted.clamp(-shares[b], shares[a]);
                    shares[a] -= amount;
                    shares[b] += amount;
                    load[at_a] -= amount;
                    load[at_b] += amount;
                    moved += amount.abs();
                }
            }
        }
        if moved < 1e-6 {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use moerun_types::BlockRange;

    use super::{
        super::{arrangement::Piece, random::Random},
        *,
    };

    fn random_case(seed: u64) -> (Arrangement, Vec<f64>) {
        let mut random = Random::new(seed);
        let num_workers = 2 + random.below(6);
        let pieces: Vec<Piece> = (0..4 + random.below(12))
            .map(|expert| Piece {
                expert: expert as u16,
                blocks: BlockRange { first: 0, end: 1 },
                load: random.unit().powi(3),
                slices: 1,
            })
            .collect();
        let holders: Vec<Vec<usize>> = pieces
            .iter()
            .map(|_| {
                let mut workers: Vec<usize> = (0..num_workers).collect();
                random.shuffle(&mut workers);
                workers.truncate(1 + random.below(3));
                workers
            })
            .collect();
        let speeds = (0..num_workers).map(|_| 0.25 + random.unit()).collect();
        (Arrangement::new(pieces, &holders, num_workers), speeds)
    }

    /// The least level by its definition, over all sets of workers.
    fn least_level(arrangement: &Arrangement, speeds: &[f64], dead: Option<usize>) -> f64 {
        let alive = |worker: usize| Some(worker) != dead;
        (1u32..1 << speeds.len())
            .filter(|set| dead.is_none_or(|dead| set & (1 << dead) == 0))
            .map(|set| {
                let within = |worker: usize| !alive(worker) || set & (1 << worker) != 0;
                let held: f64 = (0..arrangement.pieces.len())
                    .filter(|&piece| arrangement.holders(piece).all(within) && arrangement.holders(piece).any(alive))
                    .map(|piece| arrangement.pieces[piece].load)
                    .sum();
                let speed: f64 = (0..speeds.len())
                    .filter(|worker| set & (1 << worker) != 0)
                    .map(|worker| speeds[worker])
                    .sum();
                held / speed
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn the_busiest_worker_has_as_little_as_any_division_can_give_it() {
        for seed in 0..500 {
            let (arrangement, speeds) = random_case(seed);
            for dead in std::iter::once(None).chain((0..speeds.len()).map(Some)) {
                let mut shares = proportional(&arrangement, &speeds);
                let level = even_out(&arrangement, &speeds, dead, &mut shares);
                let wanted = least_level(&arrangement, &speeds, dead);
                assert!(
                    (level.busiest - wanted).abs() < 1e-6,
                    "seed {seed} dead {dead:?}: {level:?}, wanted {wanted}"
                );
                for piece in 0..arrangement.pieces.len() {
                    let sum: f64 = arrangement.slots(piece).map(|slot| shares[slot]).sum();
                    let lost = dead.is_some_and(|dead| arrangement.holders(piece).all(|holder| holder == dead));
                    let load = if lost { 0.0 } else { arrangement.pieces[piece].load };
                    assert!((sum - load).abs() < 1e-9, "seed {seed}: shares of piece {piece}");
                }
                assert!(shares.iter().all(|&share| share >= -1e-12), "seed {seed}");
            }
        }
    }

    #[test]
    fn smoothing_evens_others_and_never_raises_the_busiest() {
        for seed in 0..200 {
            let (arrangement, speeds) = random_case(seed);
            let mut shares = proportional(&arrangement, &speeds);
            let before = even_out(&arrangement, &speeds, None, &mut shares);
            let unevenness = |shares: &[f64]| -> f64 {
                let mut load = vec![0.0; speeds.len()];
                for (slot, share) in shares.iter().enumerate() {
                    load[arrangement.holder(slot)] += share;
                }
                load.iter().zip(&speeds).map(|(load, speed)| load * load / speed).sum()
            };
            let squares = unevenness(&shares);
            smooth(&arrangement, &speeds, &mut shares);
            let mut again = shares.clone();
            let after = even_out(&arrangement, &speeds, None, &mut again);
            assert!(after.busiest <= before.busiest + 1e-9, "seed {seed}");
            assert!(unevenness(&shares) <= squares + 1e-12, "seed {seed}");
        }
    }
}
