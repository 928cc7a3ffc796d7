//! What a decode step costs: the experts that a batch touches × bytes ÷ bandwidth, rows × operations, and hops.
//!
//! The slowest worker of a layer decides, and which that is depends on what tokens choose together. So batches are drawn
//! from the loads, with the planner's seed, and run through the arrangement: each piece touched is read by the one of its
//! holders that has least to do so far.

use super::{
    PlannerError, WorkerSpec,
    arrangement::Arrangement,
    random::Random,
    request::{not_negative, positive},
};

/// Batches drawn for each layer that is looked at.
const BATCHES: usize = 24;

/// What a step is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostModel {
    /// Rows of a step.
    pub batch_tokens: usize,
    /// Operations of one whole expert on one row.
    pub expert_ops: f64,
    /// Operations per second of a worker of mean bandwidth; others compute as much faster as they read.
    pub ops_per_second: f64,
    /// Bytes of one row on the wire, there and back.
    pub row_bytes: f64,
    /// Bytes per second that the gateway's link carries.
    pub link_bytes_per_second: f64,
    /// Seconds that one message and its answer take of the gateway's thread.
    pub message_seconds: f64,
}

impl CostModel {
    pub(super) fn check(&self) -> Result<(), PlannerError> {
        positive("cost model", "rows of a step", self.batch_tokens as f64)?;
        not_negative("cost model", "operations of an expert", self.expert_ops)?;
        positive("cost model", "operations per second", self.ops_per_second)?;
        not_negative("cost model", "bytes of a row", self.row_bytes)?;
        positive("cost model", "bytes per second of the link", self.link_bytes_per_second)?;
        not_negative("cost model", "seconds of a message", self.message_seconds)
    }
}

/// Mean cost of a layer in one step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepCost {
    /// Until the slowest worker has answered and all messages are handled: the sum of the next three.
    pub seconds: f64,
    /// … of which the slowest worker reads weights,
    pub read_seconds: f64,
    /// computes,
    pub compute_seconds: f64,
    /// and messages travel.
    pub hop_seconds: f64,
    /// Experts whose weights are read.
    pub distinct_experts: f64,
    /// Workers that one token goes to.
    pub workers_per_token: f64,
}

/// One layer as the cost model sees it.
pub(crate) struct CostedLayer<'a> {
    pub(crate) arrangement: &'a Arrangement,
    /// Load shares of the layer's experts.
    pub(crate) shares: &'a [f64],
}

/// Reckons costs for one set of workers.
pub(crate) struct Costing<'a> {
    pub(crate) model: &'a CostModel,
    pub(crate) workers: &'a [WorkerSpec],
    pub(crate) top_k: usize,
    /// Bytes of the pieces of each length in blocks.
    pub(crate) bytes: &'a dyn Fn(usize) -> u64,
    pub(crate) num_blocks: usize,
}

impl Costing<'_> {
    /// The mean over `layers`.
    pub(crate) fn mean(&self, layers: &[CostedLayer<'_>], seed: u64) -> StepCost {
        let mut random = Random::new(seed ^ 0x6d6f_6572_756e);
        let mut sum = StepCost::default();
        for layer in layers {
            for _ in 0..BATCHES {
                let cost = self.batch(layer, &mut random);
                sum.seconds += cost.seconds;
                sum.read_seconds += cost.read_seconds;
                sum.compute_seconds += cost.compute_seconds;
                sum.hop_seconds += cost.hop_seconds;
                sum.distinct_experts += cost.distinct_experts;
                sum.workers_per_token += cost.workers_per_token;
            }
        }
        let count = (layers.len() * BATCHES).max(1) as f64;
        StepCost {
            seconds: sum.seconds / count,
            read_seconds: sum.read_seconds / count,
            compute_seconds: sum.compute_seconds / count,
            hop_seconds: sum.hop_seconds / count,
            distinct_experts: sum.distinct_experts / count,
            workers_per_token: sum.workers_per_token / count,
        }
    }

    fn batch(&self, layer: &CostedLayer<'_>, random: &mut Random) -> StepCost {
        let tokens = self.model.batch_tokens;
        let mut rows_of = vec![Vec::new(); layer.shares.len()];
        for token in 0..tokens {
            for expert in choose(layer.shares, self.top_k, random) {
                rows_of[expert].push(token);
            }
        }
        let mut touched: Vec<usize> = (0..layer.arrangement.pieces.len())
            .filter(|&piece| !rows_of[usize::from(layer.arrangement.pieces[piece].expert)].is_empty())
            .collect();
        let work = |piece: usize| {
            let of = layer.arrangement.pieces[piece];
            of.blocks.len() * rows_of[usize::from(of.expert)].len()
        };
        touched.sort_by_key(|&piece| (std::cmp::Reverse(work(piece)), piece));

        let mean_bandwidth =
            self.workers.iter().map(|worker| worker.bandwidth).sum::<f64>() / self.workers.len() as f64;
        let mut busy = vec![(0.0, 0.0); self.workers.len()]; // read, compute
        let mut goes_to = vec![false; tokens * self.workers.len()];
        for piece in touched {
            let of = layer.arrangement.pieces[piece];
            let rows = &rows_of[usize::from(of.expert)];
            let part = of.blocks.len() as f64 / self.num_blocks as f64;
            let time = |worker: usize| {
                let bandwidth = self.workers[worker].bandwidth;
                let ops_per_second = self.model.ops_per_second * bandwidth / mean_bandwidth;
                let compute = rows.len() as f64 * part * self.model.expert_ops / ops_per_second;
                ((self.bytes)(of.blocks.len()) as f64 / bandwidth, compute)
            };
            let until = |worker: usize| {
                let (read, compute) = time(worker);
                busy[worker].0 + busy[worker].1 + read + compute + self.workers[worker].round_trip_seconds
            };
            let holder = layer
                .arrangement
                .holders(piece)
                .min_by(|&a, &b| until(a).total_cmp(&until(b)).then(a.cmp(&b)));
            let holder = holder.expect("every piece has a holder");
            let (read, compute) = time(holder);
            busy[holder].0 += read;
            busy[holder].1 += compute;
            for &token in rows {
                goes_to[token * self.workers.len() + holder] = true;
            }
        }
        let rows = goes_to.iter().filter(|&&goes| goes).count() as f64;
        let used = |worker: usize| {
            goes_to
                .iter()
                .skip(worker)
                .step_by(self.workers.len())
                .any(|&goes| goes)
        };
        let used: Vec<usize> = (0..self.workers.len()).filter(|&worker| used(worker)).collect();
        let all = |worker: usize| busy[worker].0 + busy[worker].1 + self.workers[worker].round_trip_seconds;
        let slowest = used
            .iter()
            .copied()
            .max_by(|&a, &b| all(a).total_cmp(&all(b)))
            .unwrap_or(0);
        let hop_seconds = self.workers[slowest].round_trip_seconds
            + used.len() as f64 * self.model.message_seconds
            + rows * self.model.row_bytes / self.model.link_bytes_per_second;
        StepCost {
            seconds: busy[slowest].0 + busy[slowest].1 + hop_seconds,
            read_seconds: busy[slowest].0,
            compute_seconds: busy[slowest].1,
            hop_seconds,
            distinct_experts: rows_of.iter().filter(|rows| !rows.is_empty()).count() as f64,
            workers_per_token: rows / tokens as f64,
        }
    }
}

/// `top_k` different experts, each drawn in proportion to its share of what is left.
fn choose(shares: &[f64], top_k: usize, random: &mut Random) -> Vec<usize> {
    // The largest of ln(u) / share is a draw in proportion to the shares; the next largest is one of the rest.
    let mut keys: Vec<(f64, usize)> = shares
        .iter()
        .enumerate()
        .map(|(expert, &share)| ((1.0 - random.unit()).ln() / share.max(1e-12), expert))
        .collect();
    let count = top_k.min(keys.len());
    if count < keys.len() {
        keys.select_nth_unstable_by(count, |a, b| b.0.total_cmp(&a.0));
    }
    keys.truncate(count);
    keys.into_iter().map(|(_, expert)| expert).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_drawn_in_proportion_to_their_shares_and_never_twice() {
        let shares = [0.5, 0.3, 0.2, 0.0];
        let mut random = Random::new(7);
        let mut first = [0usize; 4];
        for _ in 0..20_000 {
            first[choose(&shares, 1, &mut random)[0]] += 1;
            let mut two = choose(&shares, 2, &mut random);
            two.sort_unstable();
            two.dedup();
            assert_eq!(two.len(), 2);
        }
        for (count, share) in first.iter().zip(shares) {
            assert!((*count as f64 / 20_000.0 - share).abs() < 0.02, "{first:?}");
        }
        assert_eq!(choose(&shares, 9, &mut random).len(), 4);
    }
}
