use super::*;
use crate::test_data::Rng;

/// A cache of one or two sequences whose pages are scattered, and queries on it.
struct Case {
    kv: KvPages,
    pages: Vec<u32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    ranges: Vec<(usize, usize)>,
    queries: Vec<f32>,
    num_heads: usize,
    scale: f32,
    sinks: Option<Vec<f32>>,
}

impl Case {
    fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let kv_heads = 1 + rng.below(3);
        let num_heads = kv_heads * [1, 2, 3, 5, 13][rng.below(5)];
        let key_dim = [10, 12, 24, 64, 1][rng.below(5)];
        let value_dim = [10, 16, 24, 33, 1][rng.below(5)];
        let tokens = rng.below(90);
        let num_pages = tokens.div_ceil(KV_PAGE_TOKENS);
        let mut kv = KvPages::new(num_pages * 2 + 1, kv_heads, key_dim, value_dim);
        // What no row may use is NaN.
        for page in 0..num_pages * 2 + 1 {
            for slot in 0..KV_PAGE_TOKENS {
                let nan = [vec![f32::NAN; kv_heads * key_dim], vec![f32::NAN; kv_heads * value_dim]];
                kv.write(page as u32, slot, &nan[0], &nan[1]);
            }
        }
        let pages: Vec<u32> = (0..num_pages)
            .map(|index| (2 * (num_pages - index) - rng.below(2)) as u32)
            .collect();
        let keys: Vec<Vec<f32>> = (0..tokens).map(|_| rng.vec(kv_heads * key_dim)).collect();
        let values: Vec<Vec<f32>> = (0..tokens).map(|_| rng.vec(kv_heads * value_dim)).collect();
        for position in 0..tokens {
            let page = pages[position / KV_PAGE_TOKENS];
            kv.write(page, position % KV_PAGE_TOKENS, &keys[position], &values[position]);
        }
        let num_rows = rng.below(6);
        let ranges = (0..num_rows)
            .map(|_| {
                let end = rng.below(tokens + 1);
                let first = if rng.below(2) == 0 { 0 } else { rng.below(end + 1) };
                (first, end)
            })
            .collect();
        let queries = rng
            .vec(num_rows * num_heads * key_dim)
            .iter()
            .map(|value| value * 3.0)
            .collect();
        let sinks = (rng.below(2) == 0).then(|| rng.vec(num_heads));
        Self {
            kv,
            pages,
            keys,
            values,
            ranges,
            queries,
            num_heads,
            scale: 0.7,
            sinks,
        }
    }

    fn run(&self, isa: Isa, threads: usize, rows: Range<usize>) -> Vec<f32> {
        let attention_rows: Vec<_> = self.ranges[rows.clone()]
            .iter()
            .map(|&(first_key, end_key)| AttentionRow {
                pages: &self.pages,
                first_key,
                end_key,
            })
            .collect();
        let query_width = self.num_heads * self.kv.key_dim();
        let mut out = vec![f32::NAN; rows.len() * self.num_heads * self.kv.value_dim()];
        let attention = Attention {
            kv: &self.kv,
            rows: &attention_rows,
            queries: &self.queries[rows.start * query_width..rows.end * query_width],
            num_heads: self.num_heads,
            scale: self.scale,
            sinks: self.sinks.as_deref(),
        };
        attention.run(isa, &CpuPool::new(threads), &mut out);
        out
    }

    /// Softmax over all visible keys at once, in f64.
    fn naive(&self) -> Vec<f64> {
        let (key_dim, value_dim) = (self.kv.key_dim(), self.kv.value_dim());
        let mut out = Vec::new();
        for (row, &(first, end)) in self.ranges.iter().enumerate() {
            for head in 0..self.num_heads {
                let kv_head = head / (self.num_heads / self.kv.kv_heads());
                let query = &self.queries[(row * self.num_heads + head) * key_dim..][..key_dim];
                let scores: Vec<f64> = (first..end)
                    .map(|position| &self.keys[position][kv_head * key_dim..][..key_dim])
                    .map(|key| {
                        query
                            .iter()
                            .zip(key)
                            .map(|(&q, &k)| f64::from(q) * f64::from(k))
                            .sum::<f64>()
                    })
                    .map(|dot| dot * f64::from(self.scale))
                    .collect();
                let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[head]).exp());
                let sum = scores.iter().map(|score| score.exp()).sum::<f64>() + sink.unwrap_or(0.0);
                for d in 0..value_dim {
                    let weighted = scores.iter().zip(&self.values[first..end]);
                    let value = weighted
                        .map(|(s, v)| s.exp() * f64::from(v[kv_head * value_dim + d]))
                        .sum::<f64>();
                    out.push(if first == end { 0.0 } else { value / sum });
                }
            }
        }
        out
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn attention_agrees_with_double_precision_and_has_the_same_bits_on_every_isa_and_thread_count() {
    for seed in 0..150 {
        let case = Case::from_seed(seed);
        let expected = case.run(Isa::Portable, 1, 0..case.ranges.len());
        for (found, truth) in expected.iter().zip(case.naive()) {
            assert!(
                (f64::from(*found) - truth).abs() < 1e-5,
                "seed {seed}: {found}, not {truth}"
            );
        }
        for isa in Isa::all_available() {
            for threads in [1, 2, 3] {
                let found = case.run(isa, threads, 0..case.ranges.len());
                assert!(same_bits(&found, &expected), "seed {seed}, {isa}, {threads} threads");
            }
        }
    }
}

#[test]
fn rows_alone_and_in_chunks_have_the_bits_they_have_together() {
    for seed in 0..60 {
        let case = Case::from_seed(seed);
        for isa in Isa::all_available() {
            let num_rows = case.ranges.len();
            let whole = case.run(isa, 2, 0..num_rows);
            for chunk in [1, 2, 3] {
                let parts = (0..num_rows)
                    .step_by(chunk)
                    .map(|first| first..num_rows.min(first + chunk));
                let chunked: Vec<f32> = parts.flat_map(|rows| case.run(isa, 2, rows)).collect();
                assert!(same_bits(&chunked, &whole), "seed {seed}, {isa}, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow_and_a_nan_is_not_swallowed() {
    let mut kv = KvPages::new(2, 1, 1, 1);
    for position in 0..20 {
        kv.write(
            position as u32 / 16,
            position % 16,
            &[position as f32 * 1e4],
            &[position as f32],
        );
    }
    let rows = [AttentionRow {
        pages: &[0, 1],
        first_key: 0,
        end_key: 20,
    }];
    let pool = CpuPool::new(1);
    let mut out = [0.0];
    paged_attention(&pool, &kv, &rows, &[1.0], 1, 1.0, None, &mut out);
    assert_eq!(out, [19.0]);
    paged_attention(&pool, &kv, &rows, &[-1.0], 1, 1.0, None, &mut out);
    assert_eq!(out, [0.0]);
    kv.write(0, 3, &[f32::NAN], &[0.0]);
    paged_attention(&pool, &kv, &rows, &[1.0], 1, 1.0, None, &mut out);
    assert!(out[0].is_nan());
}

#[test]
#[should_panic(expected = "pages of")]
fn keys_beyond_the_pages_are_refused() {
    let kv = KvPages::new(2, 1, 1, 1);
    let rows = [AttentionRow {
        pages: &[0],
        first_key: 0,
        end_key: 17,
    }];
    paged_attention(&CpuPool::new(1), &kv, &rows, &[1.0], 1, 1.0, None, &mut [0.0]);
}
