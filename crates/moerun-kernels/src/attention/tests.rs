use std::ops::Range;

use moerun_types::KvFormat;

use super::*;
use crate::{KvShape, KvValues, exponential::exp, simd::sum_lanes, test_data::Rng};

/// A cache of a few sequences whose pages are scattered, and queries on it.
struct Case {
    kv: KvPages,
    sequences: Vec<Sequence>,
    rows: Vec<Row>,
    queries: Vec<f32>,
    num_heads: usize,
    scale: f32,
    sinks: Option<Vec<f32>>,
}

/// Keys and values as the cache holds them, `[position][kv_heads * dim]`.
struct Sequence {
    pages: Vec<u32>,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

#[derive(Clone, Copy)]
struct Row {
    sequence: usize,
    first_key: usize,
    end_key: usize,
}

impl Case {
    fn from_seed(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let kv_heads = 1 + rng.below(3);
        let num_heads = kv_heads * [1, 2, 3, 5, 13][rng.below(5)];
        let key_dim = [10, 12, 24, 64, 1][rng.below(5)];
        let value_dim = [10, 16, 24, 33, 1][rng.below(5)];
        let format = KvFormat::ALL[rng.below(3)];
        let values_from = if value_dim <= key_dim && rng.below(2) == 0 {
            KvValues::StartOfKey
        } else {
            KvValues::Own
        };
        let lengths: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(150)).collect();
        let num_pages: usize = lengths.iter().map(|tokens| tokens.div_ceil(KV_PAGE_TOKENS)).sum();
        let mut kv = KvPages::new(
            format,
            num_pages * 2 + 1,
            KvShape {
                kv_heads,
                key_dim,
                value_dim,
                values: values_from,
            },
        );
        let own_width = match values_from {
            KvValues::Own => kv_heads * value_dim,
            KvValues::StartOfKey => 0,
        };
        // What no row may use is NaN.
        for page in 0..num_pages * 2 + 1 {
            for slot in 0..KV_PAGE_TOKENS {
                let nan = [vec![f32::NAN; kv_heads * key_dim], vec![f32::NAN; own_width]];
                kv.write(page as u32, slot, &nan[0], &nan[1]);
            }
        }
        let mut free: Vec<u32> = (1..=num_pages).map(|index| (2 * index - rng.below(2)) as u32).collect();
        let mut sequences = Vec::new();
        for tokens in lengths {
            let pages: Vec<u32> = (0..tokens.div_ceil(KV_PAGE_TOKENS))
                .map(|_| free.swap_remove(rng.below(free.len())))
                .collect();
            let keys: Vec<Vec<f32>> = (0..tokens).map(|_| rng.vec(kv_heads * key_dim)).collect();
            let mut values: Vec<Vec<f32>> = (0..tokens).map(|_| rng.vec(own_width)).collect();
            if tokens > 0 && rng.below(4) == 0 {
                // Rows that do not see it must not notice.
                values[rng.below(tokens)].fill(f32::INFINITY);
            }
            for position in 0..tokens {
                let page = pages[position / KV_PAGE_TOKENS];
                kv.write(page, position % KV_PAGE_TOKENS, &keys[position], &values[position]);
            }
            let heads = |rows: &[Vec<f32>], parts: &[usize]| -> Vec<Vec<f32>> {
                rows.iter().map(|row| held(format, row, parts)).collect()
            };
            let (keys, values) = match values_from {
                KvValues::Own => (heads(&keys, &[key_dim]), heads(&values, &[value_dim])),
                KvValues::StartOfKey => {
                    let keys = heads(&keys, &[value_dim, key_dim - value_dim]);
                    let start = |key: &Vec<f32>| -> Vec<f32> {
                        key.chunks(key_dim).flat_map(|key| &key[..value_dim]).copied().collect()
                    };
                    let values = keys.iter().map(start).collect();
                    (keys, values)
                }
            };
            sequences.push(Sequence { pages, keys, values });
        }
        let mut rows = Vec::new();
        for (sequence, Sequence { keys, .. }) in sequences.iter().enumerate() {
            rows.extend(rows_of(&mut rng, sequence, keys.len()));
        }
        let queries = rng
            .vec(rows.len() * num_heads * key_dim)
            .iter()
            .map(|value| value * 3.0)
            .collect();
        let sinks = (rng.below(2) == 0).then(|| rng.vec(num_heads));
        Self {
            kv,
            sequences,
            rows,
            queries,
            num_heads,
            scale: 0.7,
            sinks,
        }
    }

    fn run(&self, isa: Isa, threads: usize, rows: Range<usize>) -> Vec<f32> {
        let attention_rows: Vec<_> = self.rows[rows.clone()]
            .iter()
            .map(|row| AttentionRow {
                pages: &self.sequences[row.sequence].pages,
                first_key: row.first_key,
                end_key: row.end_key,
            })
            .collect();
        let query_width = self.num_heads * self.kv.shape().key_dim;
        let mut out = vec![f32::NAN; rows.len() * self.num_heads * self.kv.shape().value_dim];
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

    /// Calls `head_output(query, keys, values, sink)` for every row and head with what is visible to it.
    fn for_each_head<T>(
        &self,
        mut head_output: impl FnMut(Row, &[f32], &[&[f32]], &[&[f32]], Option<f32>) -> Vec<T>,
    ) -> Vec<T> {
        let (key_dim, value_dim) = (self.kv.shape().key_dim, self.kv.shape().value_dim);
        let mut out = Vec::new();
        for (index, &row) in self.rows.iter().enumerate() {
            let Sequence { keys, values, .. } = &self.sequences[row.sequence];
            for head in 0..self.num_heads {
                let kv_head = head / (self.num_heads / self.kv.shape().kv_heads);
                let query = &self.queries[(index * self.num_heads + head) * key_dim..][..key_dim];
                let visible = row.first_key..row.end_key;
                let keys: Vec<_> = keys[visible.clone()]
                    .iter()
                    .map(|key| &key[kv_head * key_dim..][..key_dim])
                    .collect();
                let values: Vec<_> = values[visible]
                    .iter()
                    .map(|value| &value[kv_head * value_dim..][..value_dim])
                    .collect();
                let sink = self.sinks.as_ref().map(|sinks| sinks[head]);
                out.extend(head_output(row, query, &keys, &values, sink));
            }
        }
        out
    }

    /// Softmax over all visible keys at once, in f64.
    fn naive(&self) -> Vec<f64> {
        self.for_each_head(|_, query, keys, values, sink| {
            let score = |key: &&[f32]| -> f64 {
                let products = query.iter().zip(*key).map(|(&q, &k)| f64::from(q) * f64::from(k));
                products.sum::<f64>() * f64::from(self.scale)
            };
            let weights: Vec<f64> = keys.iter().map(|key| score(key).exp()).collect();
            let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| f64::from(sink).exp());
            let value = |d: usize| -> f64 { weights.iter().zip(values).map(|(p, v)| p * f64::from(v[d])).sum() };
            (0..self.kv.shape().value_dim)
                .map(|d| if keys.is_empty() { 0.0 } else { value(d) / sum })
                .collect()
        })
    }

    /// The definition in the doc comment of [`paged_attention`], step by step.
    fn definition(&self) -> Vec<f32> {
        let _flush = crate::denormals::FlushDenormals::enter();
        self.for_each_head(|row, query, keys, values, sink| {
            let (mut max, mut sum) = sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0_f32));
            let mut acc = vec![0.0_f32; self.kv.shape().value_dim];
            let mut position = row.first_key;
            while position < row.end_key {
                let tile_end = (position / KV_PAGE_TOKENS + 1) * KV_PAGE_TOKENS;
                let visible = position..tile_end.min(row.end_key);
                let mut s = [f32::NEG_INFINITY; KV_PAGE_TOKENS];
                for position in visible.clone() {
                    let products = query.iter().zip(keys[position - row.first_key]);
                    let dot = products.fold(0.0_f32, |sum, (q, k)| q.mul_add(*k, sum));
                    s[position % KV_PAGE_TOKENS] = dot * self.scale;
                }
                let new = s.iter().fold(max, |max, &s| if s > max { s } else { max });
                let correction = exp(max - new);
                let p = s.map(|s| exp(s - new));
                max = new;
                sum = sum.mul_add(correction, sum_lanes(p));
                for (d, acc) in acc.iter_mut().enumerate() {
                    *acc *= correction;
                    for position in visible.clone() {
                        *acc = p[position % KV_PAGE_TOKENS].mul_add(values[position - row.first_key][d], *acc);
                    }
                }
                position = visible.end;
            }
            acc.iter().map(|acc| if sum == 0.0 { 0.0 } else { acc / sum }).collect()
        })
    }
}

/// What the cache makes of a token's heads, each of which consists of parts of the lengths `parts` with a scale of their
/// own.
fn held(format: KvFormat, row: &[f32], parts: &[usize]) -> Vec<f32> {
    let mut held = Vec::new();
    let mut rest = row;
    for &len in parts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (part, others) = rest.split_at(len);
        rest = others;
        let largest = part.iter().map(|value| value.abs()).fold(0.0, f32::max);
        held.extend(part.iter().map(|&value| match format {
            KvFormat::F32 => value,
            KvFormat::Bf16 => half::bf16::from_f32(value).to_f32(),
            KvFormat::Int8 if largest.is_infinite() => f32::NAN,
            KvFormat::Int8 => (value / (largest / 127.0)).round_ties_even() * (largest / 127.0),
        }));
    }
    held
}

/// Rows of one sequence of `tokens`: any ranges, or what a causal, a windowed or a chunked layer asks for.
fn rows_of(rng: &mut Rng, sequence: usize, tokens: usize) -> Vec<Row> {
    let row = |first_key, end_key| Row {
        sequence,
        first_key,
        end_key,
    };
    let first_position = rng.below(tokens + 1);
    let window = 1 + rng.below(40);
    match rng.below(4) {
        0 => (0..rng.below(6))
            .map(|_| {
                let end = rng.below(tokens + 1);
                row(rng.below(end + 1), end)
            })
            .collect(),
        1 => (first_position..tokens).map(|position| row(0, position + 1)).collect(),
        2 => (first_position..tokens)
            .map(|position| row((position + 1).saturating_sub(window), position + 1))
            .collect(),
        _ => (first_position..tokens)
            .map(|position| row(position / window * window, position + 1))
            .collect(),
    }
}

/// Equal bits; of a NaN only that it is one.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    a.len() == b.len() && a.iter().zip(b).all(same)
}

#[test]
fn attention_has_the_bits_of_its_definition_on_every_isa_and_thread_count() {
    for seed in 0..300 {
        let case = Case::from_seed(seed);
        let expected = case.definition();
        for (found, truth) in expected.iter().zip(case.naive()) {
            assert!(
                (f64::from(*found) - truth).abs() < 1e-5 || !truth.is_finite(),
                "seed {seed}: {found}, not {truth}"
            );
        }
        for isa in Isa::all_available() {
            for threads in [1, 2, 3] {
                let found = case.run(isa, threads, 0..case.rows.len());
                assert!(same_bits(&found, &expected), "seed {seed}, {isa}, {threads} threads");
            }
        }
    }
}

#[test]
fn rows_alone_and_in_chunks_have_the_bits_they_have_together() {
    for seed in 300..360 {
        let case = Case::from_seed(seed);
        for isa in Isa::all_available() {
            let num_rows = case.rows.len();
            let whole = case.run(isa, 2, 0..num_rows);
            for chunk in [1, 2, 3, 7, 64] {
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
    let mut kv = KvPages::new(
        KvFormat::F32,
        2,
        KvShape {
            kv_heads: 1,
            key_dim: 1,
            value_dim: 1,
            values: KvValues::Own,
        },
    );
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
    let kv = KvPages::new(
        KvFormat::F32,
        2,
        KvShape {
            kv_heads: 1,
            key_dim: 1,
            value_dim: 1,
            values: KvValues::Own,
        },
    );
    let rows = [AttentionRow {
        pages: &[0],
        first_key: 0,
        end_key: 17,
    }];
    paged_attention(&CpuPool::new(1), &kv, &rows, &[1.0], 1, 1.0, None, &mut [0.0]);
}
