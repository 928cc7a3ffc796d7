//! How `--workers N` cuts a model.

use moerun_routing::ShardSpec;

/// What each of `workers` local processes holds: a slice of every expert where there is a block for each of them, so
/// that one token's work is divided too; else whole experts.
pub fn local_shards(num_blocks: usize, workers: usize) -> Vec<ShardSpec> {
    (0..workers)
        .map(|index| {
            if num_blocks >= workers {
                ShardSpec::Slices { index, count: workers }
            } else {
                ShardSpec::Experts { index, count: workers }
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_cut_only_when_every_worker_gets_a_block() {
        let text = |shards: Vec<ShardSpec>| shards.iter().map(ShardSpec::to_string).collect::<Vec<_>>();
        assert_eq!(text(local_shards(2, 2)), ["slice:0/2", "slice:1/2"]);
        assert_eq!(text(local_shards(1, 2)), ["0/2", "1/2"]);
        assert_eq!(text(local_shards(5, 1)), ["slice:0/1"]);
        assert!(local_shards(5, 0).is_empty());
    }
}
