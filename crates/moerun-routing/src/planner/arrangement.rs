//! Who holds the pieces of one layer.

use moerun_types::BlockRange;

/// A run of blocks of an expert that is held as one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Piece {
    pub(crate) expert: u16,
    pub(crate) blocks: BlockRange,
    /// Share of the layer's work.
    pub(crate) load: f64,
    /// Slices that the expert is cut into.
    pub(crate) slices: u16,
}

/// The pieces of a layer and their holders. A *slot* is one holder of one piece; the slots of a piece stand together.
#[derive(Debug, Clone)]
pub(crate) struct Arrangement {
    pub(crate) pieces: Vec<Piece>,
    /// First slot of each piece, and the number of slots.
    start: Vec<u32>,
    piece_of: Vec<u32>,
    holder: Vec<u32>,
    by_worker: Vec<Vec<u32>>,
}

impl Arrangement {
    /// Takes the holders of each piece.
    pub(crate) fn new(pieces: Vec<Piece>, holders: &[Vec<usize>], num_workers: usize) -> Self {
        let mut arrangement = Self {
            pieces,
            start: vec![0],
            piece_of: Vec::new(),
            holder: Vec::new(),
            by_worker: vec![Vec::new(); num_workers],
        };
        for (piece, holders) in holders.iter().enumerate() {
            for &worker in holders {
                arrangement.by_worker[worker].push(arrangement.holder.len() as u32);
                arrangement.holder.push(worker as u32);
                arrangement.piece_of.push(piece as u32);
            }
            arrangement.start.push(arrangement.holder.len() as u32);
        }
        arrangement
    }

    pub(crate) fn num_slots(&self) -> usize {
        self.holder.len()
    }

    pub(crate) fn slots(&self, piece: usize) -> std::ops::Range<usize> {
        self.start[piece] as usize..self.start[piece + 1] as usize
    }

    pub(crate) fn piece_of(&self, slot: usize) -> usize {
        self.piece_of[slot] as usize
    }

    pub(crate) fn holder(&self, slot: usize) -> usize {
        self.holder[slot] as usize
    }

    pub(crate) fn held_by(&self, worker: usize) -> &[u32] {
        &self.by_worker[worker]
    }

    /// Holders of a piece.
    pub(crate) fn holders(&self, piece: usize) -> impl Iterator<Item = usize> + '_ {
        self.holder[self.slots(piece)].iter().map(|&worker| worker as usize)
    }

    /// Holders of a slot's piece but for the slot's own.
    pub(crate) fn others(&self, slot: usize) -> impl Iterator<Item = usize> + '_ {
        let slots = self.slots(self.piece_of(slot));
        slots
            .filter(move |&other| other != slot)
            .map(|other| self.holder(other))
    }

    /// The holders of two slots change places.
    pub(crate) fn swap(&mut self, a: usize, b: usize) {
        let (at_a, at_b) = (self.holder(a), self.holder(b));
        self.holder.swap(a, b);
        replace(&mut self.by_worker[at_a], a, b);
        replace(&mut self.by_worker[at_b], b, a);
    }

    /// The holders of each piece, ascending.
    pub(crate) fn all_holders(&self) -> Vec<Vec<usize>> {
        (0..self.pieces.len())
            .map(|piece| {
                let mut holders: Vec<usize> = self.holders(piece).collect();
                holders.sort_unstable();
                holders
            })
            .collect()
    }
}

fn replace(slots: &mut [u32], old: usize, new: usize) {
    let at = slots.iter_mut().find(|slot| **slot == old as u32);
    *at.expect("a worker lists its slots") = new as u32;
}
