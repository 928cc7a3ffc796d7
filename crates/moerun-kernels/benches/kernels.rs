//! Expert feed-forwards, dense products and attention: `cargo bench -p moerun-kernels`.
//!
//! For one kernel while it is worked on. Figures beside the machine's limits come from `moerun bench kernels`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use moerun_kernels::{
    Activations, AttentionRow, CpuPool, FeedForward, Group, KV_PAGE_TOKENS, KvPages, KvShape, KvValues, PackedMatrix,
    grouped_exact, paged_attention,
};
use moerun_types::{Activation, KvFormat, NumberFormat};
use ndarray::Array2;

const COMBINE_BLOCK: usize = 128;

fn value(index: usize) -> f32 {
    // Any numbers of moderate size: products do not depend on them.
    ((index.wrapping_mul(2_654_435_761) >> 8) % 2001) as f32 / 1000.0 - 1.0
}

fn matrix(format: NumberFormat, rows: usize, cols: usize) -> PackedMatrix {
    PackedMatrix::pack(format, rows, cols, |row, out| {
        for (col, out) in out.iter_mut().enumerate() {
            *out = 0.05 * value(row * cols + col);
        }
    })
    .expect("weights of moderate size")
}

fn activations(format: NumberFormat, rows: usize, cols: usize) -> Activations {
    let x = Array2::from_shape_fn((rows, cols), |(row, col)| value(row * cols + col));
    Activations::round(format.activations(), x.view())
}

/// Eight experts of one layer, each run on all rows.
fn experts(criterion: &mut Criterion) {
    let pool = CpuPool::new(std::thread::available_parallelism().map_or(1, usize::from));
    for (shape, hidden, intermediate) in [("olmoe", 2048, 1024), ("granite", 1024, 512)] {
        for format in NumberFormat::ALL {
            let experts: Vec<FeedForward> = (0..8)
                .map(|_| FeedForward {
                    gate_proj: matrix(format, intermediate, hidden),
                    up_proj: matrix(format, intermediate, hidden),
                    down_proj: matrix(format, hidden, intermediate),
                    gate_bias: None,
                    up_bias: None,
                    down_bias: None,
                    activation: Activation::Silu,
                })
                .collect();
            let mut group = criterion.benchmark_group(format!("experts/{shape}/{format}"));
            for rows in [1, 8, 64, 256] {
                let x = activations(format, rows, hidden);
                let row_ids: Vec<u32> = (0..rows as u32).collect();
                let routing_weights = vec![0.125; rows];
                let groups: Vec<Group<'_>> = experts
                    .iter()
                    .map(|weights| Group {
                        weights,
                        rows: &row_ids,
                        routing_weights: &routing_weights,
                        blocks: 0..intermediate / COMBINE_BLOCK,
                        owes_down_bias: false,
                    })
                    .collect();
                let mut sums = vec![0; rows * hidden];
                let operations = 2 * 3 * hidden * intermediate * rows * experts.len();
                group.throughput(Throughput::Elements(operations as u64));
                group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
                    bencher.iter(|| {
                        grouped_exact(&pool, &x, &groups, false, COMBINE_BLOCK, 1e5, &mut sums)
                            .expect("terms of moderate size");
                    });
                });
            }
            group.finish();
        }
    }
}

/// One token over a long cache, and a chunk of a prompt over what is before it.
fn attention(criterion: &mut Criterion) {
    let pool = CpuPool::new(std::thread::available_parallelism().map_or(1, usize::from));
    let (heads, head_dim, keys) = (16, 128, 2048);
    for format in KvFormat::ALL {
        let mut kv = KvPages::new(
            format,
            keys / KV_PAGE_TOKENS,
            KvShape {
                kv_heads: heads,
                key_dim: head_dim,
                value_dim: head_dim,
                values: KvValues::Own,
            },
        );
        let token: Vec<f32> = (0..heads * head_dim).map(value).collect();
        for position in 0..keys {
            kv.write(
                (position / KV_PAGE_TOKENS) as u32,
                position % KV_PAGE_TOKENS,
                &token,
                &token,
            );
        }
        let pages: Vec<u32> = (0..(keys / KV_PAGE_TOKENS) as u32).collect();
        let mut group = criterion.benchmark_group(format!("attention/{format}"));
        for rows in [1, 64, 512] {
            let queries: Vec<f32> = (0..rows * heads * head_dim).map(value).collect();
            let attention_rows: Vec<AttentionRow<'_>> = (0..rows)
                .map(|row| AttentionRow {
                    pages: &pages,
                    first_key: 0,
                    end_key: keys - rows + row + 1,
                })
                .collect();
            let mut out = vec![0.0; rows * heads * head_dim];
            group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
                bencher.iter(|| paged_attention(&pool, &kv, &attention_rows, &queries, heads, 0.088, None, &mut out));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, experts, attention);
criterion_main!(benches);
