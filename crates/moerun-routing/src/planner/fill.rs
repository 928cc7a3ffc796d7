//! Finding a holder for every place of a layer: what is held already is kept, the rest is spread.

use std::collections::VecDeque;

use super::{
    apart::Domains,
    arrangement::Piece,
    spread::{Spread, Weight},
};

/// What a layer's pieces are to be given to.
pub(crate) struct LayerTask<'a> {
    pub(crate) pieces: &'a [Piece],
    /// Size class of each piece.
    pub(crate) class_of: &'a [usize],
    /// Holders that each piece must have.
    pub(crate) replicas: usize,
    /// Holders that each piece is to have: those beyond `replicas` may be left out.
    pub(crate) counts: &'a [usize],
    /// Most holders of each piece in one domain.
    pub(crate) together: &'a [usize],
    /// Places of each class on each worker: `[class][worker]`.
    pub(crate) places: &'a [Vec<usize>],
    pub(crate) domains: &'a Domains,
    pub(crate) speeds: &'a [f64],
    /// Among equally good workers, the earlier in this order.
    pub(crate) order: &'a [usize],
}

impl LayerTask<'_> {
    fn weight(&self, piece: usize) -> Weight {
        Weight {
            expert: self.pieces[piece].expert,
            load: self.pieces[piece].load,
            holders: self.counts[piece],
            is_slice: self.pieces[piece].slices > 1,
        }
    }

    fn num_experts(&self) -> usize {
        self.pieces
            .iter()
            .map(|piece| usize::from(piece.expert) + 1)
            .max()
            .unwrap_or(0)
    }

    /// Of the present `holders` of each piece, those that may stay: apart, and within everyone's places. A worker with
    /// too many gives up pieces whose loads are nearest to what it should lose, so that its load stays in proportion.
    pub(crate) fn keep(&self, holders: &[Vec<usize>]) -> Vec<Vec<usize>> {
        let mut kept: Vec<Vec<usize>> = vec![Vec::new(); self.pieces.len()];
        for (piece, holders) in holders.iter().enumerate() {
            for &worker in holders {
                let apart = self
                    .domains
                    .allows(worker, kept[piece].iter().copied(), self.together[piece]);
                if apart && kept[piece].len() < self.counts[piece] {
                    kept[piece].push(worker);
                }
            }
        }
        for (class, places) in self.places.iter().enumerate() {
            for (worker, &places) in places.iter().enumerate() {
                self.give_up(&mut kept, class, worker, places);
            }
        }
        kept
    }

    fn give_up(&self, kept: &mut [Vec<usize>], class: usize, worker: usize, places: usize) {
        let share = |kept: &[Vec<usize>], piece: usize| self.pieces[piece].load / kept[piece].len() as f64;
        loop {
            let held: Vec<usize> = (0..self.pieces.len())
                .filter(|&piece| self.class_of[piece] == class && kept[piece].contains(&worker))
                .collect();
            if held.len() <= places {
                return;
            }
            let load: f64 = held.iter().map(|&piece| share(kept, piece)).sum();
            let fair = load * places as f64 / held.len() as f64;
            let each = (load - fair) / (held.len() - places) as f64;
            let off = |piece: usize| (share(kept, piece) - each).abs();
            let dropped = held.into_iter().min_by(|&a, &b| off(a).total_cmp(&off(b)));
            let dropped = dropped.expect("a worker with too many has some");
            kept[dropped].retain(|&holder| holder != worker);
        }
    }

    /// Gives every piece the holders that it lacks, the heaviest first, each to the worker where the spread suffers
    /// least. Holders beyond the replicas are left out where there is no place for them; `Err` names a piece that lacks
    /// one of its replicas.
    pub(crate) fn fill(&self, kept: Vec<Vec<usize>>) -> Result<Vec<Vec<usize>>, usize> {
        let mut filling = Filling::new(self, kept);
        let mut by_load: Vec<usize> = (0..self.pieces.len()).collect();
        by_load.sort_by(|&a, &b| self.pieces[b].load.total_cmp(&self.pieces[a].load).then(a.cmp(&b)));
        for piece in by_load {
            while filling.holders[piece].len() < self.counts[piece] {
                if !filling.place(piece) && !filling.make_room(piece) {
                    if filling.holders[piece].len() < self.replicas {
                        return Err(piece);
                    }
                    break;
                }
            }
        }
        Ok(filling.holders)
    }
}

struct Filling<'a> {
    task: &'a LayerTask<'a>,
    spread: Spread<'a>,
    holders: Vec<Vec<usize>>,
    free: Vec<Vec<usize>>,
}

impl<'a> Filling<'a> {
    fn new(task: &'a LayerTask<'a>, kept: Vec<Vec<usize>>) -> Self {
        let mut filling = Self {
            task,
            spread: Spread::new(task.speeds, task.num_experts()),
            holders: vec![Vec::new(); kept.len()],
            free: task.places.to_vec(),
        };
        for (piece, workers) in kept.into_iter().enumerate() {
            for worker in workers {
                filling.add(piece, worker);
            }
        }
        filling
    }

    fn add(&mut self, piece: usize, worker: usize) {
        let others = self.holders[piece].iter().copied();
        self.spread.add(self.task.weight(piece), others, worker);
        self.holders[piece].push(worker);
        self.free[self.task.class_of[piece]][worker] -= 1;
    }

    fn remove(&mut self, piece: usize, worker: usize) {
        self.holders[piece].retain(|&holder| holder != worker);
        let others = self.holders[piece].iter().copied();
        self.spread.remove(self.task.weight(piece), others, worker);
        self.free[self.task.class_of[piece]][worker] += 1;
    }

    fn allows(&self, piece: usize, worker: usize, leaving: Option<usize>) -> bool {
        let others = self.holders[piece]
            .iter()
            .copied()
            .filter(|&holder| Some(holder) != leaving);
        self.task.domains.allows(worker, others, self.task.together[piece])
    }

    /// One more holder for `piece`, where there is a free place for it.
    fn place(&mut self, piece: usize) -> bool {
        let free = &self.free[self.task.class_of[piece]];
        let mut best: Option<(f64, usize)> = None;
        for &worker in self.task.order {
            if free[worker] == 0 || !self.allows(piece, worker, None) {
                continue;
            }
            let cost = self
                .spread
                .cost(self.task.weight(piece), self.holders[piece].iter().copied(), worker);
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, worker));
            }
        }
        best.is_some_and(|(_, worker)| {
            self.add(piece, worker);
            true
        })
    }

    /// One more holder for `piece` where only workers have free places that may not take it: other pieces move on, along
    /// the shortest chain that ends at a free place.
    fn make_room(&mut self, piece: usize) -> bool {
        let class = self.task.class_of[piece];
        let mut from: Vec<Option<(usize, usize)>> = vec![None; self.task.speeds.len()];
        let mut reached: Vec<bool> = (0..from.len()).map(|worker| self.allows(piece, worker, None)).collect();
        let mut queue: VecDeque<usize> = (0..from.len()).filter(|&worker| reached[worker]).collect();
        while let Some(worker) = queue.pop_front() {
            if self.free[class][worker] > 0 {
                self.move_on(piece, worker, &from);
                return true;
            }
            for other in 0..self.holders.len() {
                let moves = other != piece
                    && self.task.class_of[other] == class
                    && self.holders[other].contains(&worker)
                    && !is_on_path(other, worker, &from);
                if !moves {
                    continue;
                }
                for to in 0..from.len() {
                    if !reached[to] && self.allows(other, to, Some(worker)) {
                        reached[to] = true;
                        from[to] = Some((worker, other));
                        queue.push_back(to);
                    }
                }
            }
        }
        false
    }

    fn move_on(&mut self, piece: usize, end: usize, from: &[Option<(usize, usize)>]) {
        let mut to = end;
        while let Some((worker, moved)) = from[to] {
            self.remove(moved, worker);
            self.add(moved, to);
            to = worker;
        }
        self.add(piece, to);
    }
}

/// Whether `piece` moves already on the way to `worker`: moved twice it might not stay apart from itself.
fn is_on_path(piece: usize, worker: usize, from: &[Option<(usize, usize)>]) -> bool {
    let mut at = worker;
    while let Some((before, moved)) = from[at] {
        if moved == piece {
            return true;
        }
        at = before;
    }
    false
}
