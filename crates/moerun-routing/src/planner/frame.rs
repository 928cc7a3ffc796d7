//! One layout worked out: pieces, their sizes, everyone's places, and an arrangement of each layer.

use moerun_types::{ExpertId, ExpertSlice, LayerId};

use super::{
    Layout, PlanRequest, PlannerError,
    apart::Domains,
    arrangement::{Arrangement, Piece},
    fill::LayerTask,
    layout::slice_blocks,
    places::{SizeClass, Wanted, deal, share_out},
    random::Random,
    refine::Refine,
    spread::descend,
};

/// Divisions of load that the search may compute in all layers, times places: seconds for the largest clusters.
const EFFORT: usize = 4_000_000;
/// … and for one layer at least and at most.
const LEAST_EFFORT: usize = 200;
const MOST_EFFORT: usize = 30_000;

/// A layout with all that follows from it.
pub(crate) struct Frame<'a> {
    request: &'a PlanRequest,
    pub(crate) layout: Layout,
    pub(crate) domains: &'a Domains,
    pub(crate) speeds: &'a [f64],
    /// Pieces of each layer.
    pieces: Vec<Vec<Piece>>,
    /// Size class of each.
    class_of: Vec<Vec<usize>>,
    /// Places by size class and worker, in all layers.
    given: Vec<Vec<usize>>,
    classes: Vec<SizeClass>,
}

impl<'a> Frame<'a> {
    /// Cuts the experts and gives out places; refuses what does not fit.
    pub(crate) fn new(
        request: &'a PlanRequest,
        layout: Layout,
        shares: &[Vec<f64>],
        domains: &'a Domains,
        speeds: &'a [f64],
    ) -> Result<Self, PlannerError> {
        let num_blocks = request.size.num_blocks();
        let pieces: Vec<Vec<Piece>> = shares.iter().map(|shares| cut(layout, shares, num_blocks)).collect();
        let mut lengths: Vec<usize> = pieces[0].iter().map(|piece| piece.blocks.len()).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        let class_of = |piece: &Piece| {
            lengths
                .iter()
                .position(|&length| length == piece.blocks.len())
                .expect("cut alike")
        };
        let class_of: Vec<Vec<usize>> = pieces
            .iter()
            .map(|pieces| pieces.iter().map(class_of).collect())
            .collect();
        let classes: Vec<SizeClass> = lengths
            .iter()
            .enumerate()
            .map(|(class, &blocks)| SizeClass {
                bytes: request.size.bytes(blocks),
                pieces: class_of[0].iter().filter(|&&of| of == class).count(),
                extra: if class == 0 { request.extra_holders } else { 0 },
            })
            .collect();
        let wanted = Wanted {
            classes: &classes,
            layers: pieces.len(),
            replicas: request.replicas,
            speeds,
            memory: request.workers.iter().map(|worker| worker.memory_bytes).collect(),
            names: request.workers.iter().map(|worker| worker.name.clone()).collect(),
        };
        let given = share_out(&wanted, domains)?;
        Ok(Self {
            request,
            layout,
            domains,
            speeds,
            pieces,
            class_of,
            given,
            classes,
        })
    }

    /// A quick arrangement of some layers, for the cost model: `(layer index, arrangement)`.
    pub(crate) fn sketch(&self, most_layers: usize) -> Result<Vec<(usize, Arrangement)>, PlannerError> {
        let places = self.dealt();
        let layers = self.pieces.len();
        let looked_at = most_layers.min(layers);
        (0..looked_at)
            .map(|index| index * layers / looked_at)
            .map(|layer| Ok((layer, self.arranged_anew(layer, &places[layer], &self.counts(layer))?)))
            .collect()
    }

    /// Arranges all layers, near to `present` (slices by worker) where it is not empty.
    pub(crate) fn arrange(&self, present: &[&[ExpertSlice]]) -> Result<Vec<Arrangement>, PlannerError> {
        let holders = self.present_holders(present);
        let has_present = holders.iter().flatten().any(|holders| !holders.is_empty());
        let counts: Vec<Vec<usize>>;
        let places;
        if let Some(as_they_are) = has_present.then(|| self.present_places(&holders)).flatten() {
            places = as_they_are;
            counts = holders
                .iter()
                .map(|pieces| pieces.iter().map(Vec::len).collect())
                .collect();
        } else {
            places = self.dealt();
            counts = (0..self.pieces.len()).map(|layer| self.counts(layer)).collect();
        }
        (0..self.pieces.len())
            .map(|layer| {
                if has_present {
                    self.arranged_near(layer, &places[layer], &counts[layer], &holders[layer])
                } else {
                    self.refined(layer, &places[layer], &counts[layer])
                }
            })
            .collect()
    }

    /// How many of the held blocks are whole pieces of this layout.
    pub(crate) fn fits_present(&self, present: &[&[ExpertSlice]]) -> bool {
        let held: usize = present
            .iter()
            .flat_map(|held| held.iter())
            .map(|slice| slice.blocks.len())
            .sum();
        let holders = self.present_holders(present);
        let in_pieces: usize = holders
            .iter()
            .zip(&self.pieces)
            .flat_map(|(holders, pieces)| holders.iter().zip(pieces))
            .map(|(holders, piece)| holders.len() * piece.blocks.len())
            .sum();
        held > 0 && held == in_pieces
    }

    /// `[layer][class][worker]`.
    fn dealt(&self) -> Vec<Vec<Vec<usize>>> {
        let layers = self.pieces.len();
        let by_class: Vec<Vec<Vec<usize>>> = self
            .given
            .iter()
            .map(|given| deal(given, layers, self.domains))
            .collect();
        (0..layers)
            .map(|layer| by_class.iter().map(|dealt| dealt[layer].clone()).collect())
            .collect()
    }

    /// Holders of each piece: those beyond the replicas go, one after another, to the piece with most load a holder.
    fn counts(&self, layer: usize) -> Vec<usize> {
        let workers = self.speeds.len();
        let mut counts = vec![self.request.replicas; self.pieces[layer].len()];
        for _ in 0..self.request.extra_holders {
            let a_holder = |piece: usize| self.pieces[layer][piece].load / counts[piece] as f64;
            let open = (0..counts.len()).filter(|&piece| self.class_of[layer][piece] == 0 && counts[piece] < workers);
            match open.max_by(|&a, &b| a_holder(a).total_cmp(&a_holder(b)).then(b.cmp(&a))) {
                Some(piece) => counts[piece] += 1,
                None => break,
            }
        }
        counts
    }

    /// Who holds each piece now, `[layer][piece]`.
    fn present_holders(&self, present: &[&[ExpertSlice]]) -> Vec<Vec<Vec<usize>>> {
        let layer_at = |layer: LayerId| self.request.moe_layers.binary_search(&layer).ok();
        let mut holders: Vec<Vec<Vec<usize>>> = self
            .pieces
            .iter()
            .map(|pieces| vec![Vec::new(); pieces.len()])
            .collect();
        // Pieces of one expert stand together, ascending by block.
        let first_of =
            |layer: usize, expert: ExpertId| self.pieces[layer].partition_point(|piece| piece.expert < expert.0);
        for (worker, held) in present.iter().enumerate() {
            for slice in held.iter() {
                let Some(layer) = layer_at(slice.layer) else { continue };
                let pieces = self.pieces[layer]
                    .iter()
                    .enumerate()
                    .skip(first_of(layer, slice.expert));
                for (index, piece) in pieces.take_while(|(_, piece)| piece.expert == slice.expert.0) {
                    if slice.blocks.contains(piece.blocks) {
                        holders[layer][index].push(worker);
                    }
                }
            }
        }
        holders
    }

    /// The places as they are used now, if all that is asked for is held and everyone's part is near to what it would be
    /// given anew.
    fn present_places(&self, holders: &[Vec<Vec<usize>>]) -> Option<Vec<Vec<Vec<usize>>>> {
        let (workers, replicas) = (self.speeds.len(), self.request.replicas);
        let mut used = vec![vec![0usize; workers]; self.classes.len()];
        let mut places = vec![vec![vec![0usize; workers]; self.classes.len()]; self.pieces.len()];
        for (layer, holders) in holders.iter().enumerate() {
            let mut extra = 0;
            for (piece, holders) in holders.iter().enumerate() {
                extra += holders.len().checked_sub(replicas)?;
                let most = self.domains.most_together(holders.len());
                for (index, &worker) in holders.iter().enumerate() {
                    if !self.domains.allows(worker, holders[..index].iter().copied(), most) {
                        return None;
                    }
                    used[self.class_of[layer][piece]][worker] += 1;
                    places[layer][self.class_of[layer][piece]][worker] += 1;
                }
            }
            if extra != self.request.extra_holders {
                return None;
            }
        }
        let fits = (0..workers).all(|worker| {
            let bytes = self
                .classes
                .iter()
                .zip(&used)
                .map(|(class, used)| class.bytes * used[worker] as u64);
            bytes.sum::<u64>() <= self.request.workers[worker].memory_bytes
        });
        let near = self.given.iter().zip(&used).all(|(given, used)| {
            let near = |(&given, &used): (&usize, &usize)| given.abs_diff(used) <= (given / 20).max(self.pieces.len());
            given.iter().zip(used).all(near)
        });
        (fits && near).then_some(places)
    }

    fn together(&self, counts: &[usize]) -> Vec<usize> {
        counts.iter().map(|&count| self.domains.most_together(count)).collect()
    }

    fn task<'t>(
        &'t self,
        layer: usize,
        places: &'t [Vec<usize>],
        counts: &'t [usize],
        together: &'t [usize],
        order: &'t [usize],
    ) -> LayerTask<'t> {
        LayerTask {
            pieces: &self.pieces[layer],
            class_of: &self.class_of[layer],
            replicas: self.request.replicas,
            counts,
            together,
            places,
            domains: self.domains,
            speeds: self.speeds,
            order,
        }
    }

    /// Workers in an order of their own for each layer, so that equal layers do not load the same ones most.
    fn order(&self, layer: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.speeds.len()).collect();
        Random::new(self.request.seed.wrapping_add(layer as u64 * 0x9e37_79b9)).shuffle(&mut order);
        order
    }

    fn filled(&self, layer: usize, task: &LayerTask<'_>, kept: Vec<Vec<usize>>) -> Result<Arrangement, PlannerError> {
        let holders = task.fill(kept).map_err(|piece| self.apart(layer, piece))?;
        Ok(Arrangement::new(
            self.pieces[layer].clone(),
            &holders,
            self.speeds.len(),
        ))
    }

    fn apart(&self, layer: usize, piece: usize) -> PlannerError {
        let of = self.pieces[layer][piece];
        PlannerError::Apart {
            slice: ExpertSlice {
                layer: self.request.moe_layers[layer],
                expert: ExpertId(of.expert),
                blocks: of.blocks,
            },
            replicas: self.request.replicas,
            per_domain: self.domains.most_together(self.request.replicas),
        }
    }

    fn arranged_anew(
        &self,
        layer: usize,
        places: &[Vec<usize>],
        counts: &[usize],
    ) -> Result<Arrangement, PlannerError> {
        let (together, order) = (self.together(counts), self.order(layer));
        let task = self.task(layer, places, counts, &together, &order);
        let mut arrangement = self.filled(layer, &task, vec![Vec::new(); counts.len()])?;
        descend(&mut arrangement, self.domains, &together, self.speeds);
        Ok(arrangement)
    }

    fn refined(&self, layer: usize, places: &[Vec<usize>], counts: &[usize]) -> Result<Arrangement, PlannerError> {
        let mut arrangement = self.arranged_anew(layer, places, counts)?;
        self.refine(&self.together(counts), None, &arrangement)
            .run(&mut arrangement);
        Ok(arrangement)
    }

    fn refine<'r>(
        &'r self,
        together: &'r [usize],
        present: Option<(f64, &'r [Vec<bool>])>,
        arrangement: &Arrangement,
    ) -> Refine<'r> {
        let effort = EFFORT / (arrangement.num_slots() * self.pieces.len()).max(1);
        Refine {
            domains: self.domains,
            together,
            speeds: self.speeds,
            survives: self.request.replicas > 1,
            present,
            budget: effort.clamp(LEAST_EFFORT, MOST_EFFORT),
        }
    }

    /// The best of three: what is held now with the least change, the same improved as far as moving is worth it, and a
    /// new arrangement. Of equals the first, so nothing moves where nothing is gained.
    fn arranged_near(
        &self,
        layer: usize,
        places: &[Vec<usize>],
        counts: &[usize],
        holders: &[Vec<usize>],
    ) -> Result<Arrangement, PlannerError> {
        let (together, order) = (self.together(counts), self.order(layer));
        let task = self.task(layer, places, counts, &together, &order);
        let kept = task.keep(holders);
        let as_it_is = self.filled(layer, &task, kept)?;
        let new = self.refined(layer, places, counts)?;
        if new.all_holders() == as_it_is.all_holders() {
            return Ok(as_it_is);
        }
        let mut held = vec![vec![false; self.speeds.len()]; holders.len()];
        for (piece, holders) in holders.iter().enumerate() {
            holders.iter().for_each(|&worker| held[piece][worker] = true);
        }
        let search = self.refine(&together, Some((self.request.stability, &held)), &as_it_is);
        let mut improved = as_it_is.clone();
        let improved_time = search.run(&mut improved).time;
        let price = |time: f64, arrangement: &Arrangement| time + search.moving(arrangement);
        let candidates = [
            (price(search.measure(&as_it_is).time, &as_it_is), as_it_is),
            (price(improved_time, &improved), improved),
            (price(search.measure(&new).time, &new), new),
        ];
        let mut best: Option<(f64, Arrangement)> = None;
        for (price, arrangement) in candidates {
            if best.as_ref().is_none_or(|(least, _)| price < least - 1e-9) {
                best = Some((price, arrangement));
            }
        }
        Ok(best.expect("three candidates").1)
    }
}

fn cut(layout: Layout, shares: &[f64], num_blocks: u16) -> Vec<Piece> {
    let counts = layout.slices(shares);
    let expert = |(expert, (&load, &slices)): (usize, (&f64, &u16))| {
        (0..slices).map(move |index| {
            let blocks = slice_blocks(index, slices, num_blocks);
            Piece {
                expert: expert as u16,
                blocks,
                load: load * blocks.len() as f64 / f64::from(num_blocks),
                slices,
            }
        })
    };
    shares.iter().zip(&counts).enumerate().flat_map(expert).collect()
}
