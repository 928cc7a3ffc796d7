//! One layer's way to a worker and back, without the socket and the experts: `cargo bench -p moerun-dispatch`.
//!
//! Gate, plan, request, checksum, check at the worker; answer, checksum, check at the gateway, combine. The shape is
//! that of olmoe-1b-7b; two workers hold half of every expert each. The hop itself is measured by `moerun bench hop`.

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use moerun_kernels::Activations;
use moerun_proto::{
    ModelLimits, answer_is_intact, decode_request, decode_response, encode_request, encode_response, request_is_intact,
    seal_answer, seal_request,
};
use moerun_routing::{
    Candidates, GateMemory, PartialSums, Placement, Routing, WorkerBatch, select_experts, select_experts_into,
    whole_assignments,
};
use moerun_types::{BlockRange, CombineMode, ExpertId, ExpertSlice, LayerId, ModelConfig, NumberFormat, Numerics};
use moerun_weights::Shape;
use ndarray::Array2;

const LAYER: LayerId = LayerId(0);
const COMBINE_BLOCK: usize = 128;
/// Decode alone and in a batch, and a piece of a prompt.
const ROWS: [usize; 3] = [1, 16, 256];

/// Any numbers of moderate size.
fn values(rows: usize, cols: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, cols), |(row, col)| {
        let mixed = (row * cols + col).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// One layer of olmoe, and rows on their way through it.
struct Layer {
    config: ModelConfig,
    numerics: Numerics,
    logits: Array2<f32>,
    routing: Routing,
    placement: Placement,
    activations: Activations,
    batch: WorkerBatch,
}

impl Layer {
    fn new(rows: usize) -> Self {
        let shape = Shape::by_name("olmoe-1b-7b").expect("a shape of ours");
        let config = ModelConfig::from_json(shape.config_json).expect("a good config");
        let numerics = Numerics::checked(NumberFormat::Bf16, CombineMode::Exact, COMBINE_BLOCK).expect("whole blocks");
        let moe = config.moe.as_ref().expect("it has experts");
        let num_blocks = numerics.num_blocks(moe.intermediate);
        let held = [0, 1].map(|half| halves(&config, moe.num_experts, num_blocks, half));
        let placement = Placement::new(&config, num_blocks, &held).expect("halves of the model's experts");
        let logits = values(rows, moe.num_experts);
        let routing = select_experts(logits.view(), &moe.gate, moe.top_k, None).expect("finite logits");
        let plan = plan(&placement, &routing, num_blocks);
        Self {
            numerics,
            logits,
            placement,
            activations: Activations::round(numerics.format.activations(), values(rows, config.hidden).view()),
            batch: plan.into_iter().next().expect("both workers have work"),
            routing,
            config,
        }
    }

    fn num_blocks(&self) -> usize {
        let moe = self.config.moe.as_ref().expect("it has experts");
        self.numerics.num_blocks(moe.intermediate)
    }
}

/// What the worker that has half `half` of every expert holds.
fn halves(config: &ModelConfig, num_experts: usize, num_blocks: usize, half: usize) -> Vec<ExpertSlice> {
    let bound = |half: usize| (half * num_blocks / 2) as u16;
    let blocks = BlockRange {
        first: bound(half),
        end: bound(half + 1),
    };
    let of_layer = |layer| {
        (0..num_experts).map(move |expert| ExpertSlice {
            layer,
            expert: ExpertId(expert as u16),
            blocks,
        })
    };
    config.moe_layers().into_iter().flat_map(of_layer).collect()
}

fn plan(placement: &Placement, routing: &Routing, num_blocks: usize) -> Vec<WorkerBatch> {
    let work: Vec<_> = whole_assignments(routing, num_blocks).collect();
    let mut first = |candidates: Candidates<'_>| candidates.holders.first().map(|&worker| worker as usize);
    placement.plan_layer(LAYER, &work, &mut first).batches
}

/// From logits to what each worker is asked.
fn gate_and_plan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gate");
    for rows in ROWS {
        let layer = Layer::new(rows);
        let moe = layer.config.moe.as_ref().expect("it has experts");
        let (mut memory, mut routing) = (GateMemory::default(), Routing::default());
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            bencher.iter(|| {
                select_experts_into(
                    layer.logits.view(),
                    &moe.gate,
                    moe.top_k,
                    None,
                    &mut memory,
                    &mut routing,
                )
                .expect("finite logits");
            });
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("plan");
    for rows in ROWS {
        let layer = Layer::new(rows);
        group.bench_function(BenchmarkId::from_parameter(rows), |bencher| {
            bencher.iter(|| black_box(plan(&layer.placement, &layer.routing, layer.num_blocks())));
        });
    }
    group.finish();
}

/// A request from rows to message and back; the checksum alone, so that its share can be seen.
fn requests(criterion: &mut Criterion) {
    for rows in ROWS {
        let layer = Layer::new(rows);
        let limits = ModelLimits::new(&layer.config, layer.numerics);
        let WorkerBatch {
            rows: sent,
            assignments,
            ..
        } = &layer.batch;
        let deadline = Duration::from_secs(1);
        let encode = || encode_request(1, LAYER, &layer.activations, sent, assignments, deadline);
        let mut request = encode();
        let mut group = criterion.benchmark_group("request");
        group.bench_function(BenchmarkId::new("encode", rows), |bencher| bencher.iter(encode));
        group.bench_function(BenchmarkId::new("checksum", rows), |bencher| {
            bencher.iter(|| seal_request(&mut request));
        });
        assert!(request_is_intact(&request), "as it was sealed");
        group.bench_function(BenchmarkId::new("decode", rows), |bencher| {
            bencher.iter(|| decode_request(&request, &limits).expect("a request of ours"));
        });
        group.finish();
    }
}

/// An answer from sums to message and back into the layer's sums.
fn answers(criterion: &mut Criterion) {
    for rows in ROWS {
        let hidden = Layer::new(1).config.hidden;
        let sums = PartialSums::Exact {
            hidden,
            // Of the size that sums of a layer have.
            sums: values(rows, hidden)
                .iter()
                .map(|value| (value * (1_u64 << 40) as f32) as i64)
                .collect(),
        };
        let encode = || encode_response(1, &sums, Duration::ZERO, Duration::ZERO);
        let mut answer = encode();
        let mut group = criterion.benchmark_group("answer");
        group.bench_function(BenchmarkId::new("encode", rows), |bencher| bencher.iter(encode));
        group.bench_function(BenchmarkId::new("checksum", rows), |bencher| {
            bencher.iter(|| seal_answer(&mut answer));
        });
        assert!(answer_is_intact(&answer), "as it was sealed");
        let decode = || decode_response(&answer, CombineMode::Exact, rows, hidden).expect("an answer of ours");
        group.bench_function(BenchmarkId::new("decode", rows), |bencher| bencher.iter(decode));
        let part = decode().outcome.expect("sums");
        let row_ids: Vec<u32> = (0..rows as u32).collect();
        let mut combined = PartialSums::zeros(CombineMode::Exact, rows, hidden);
        group.bench_function(BenchmarkId::new("combine", rows), |bencher| {
            bencher.iter(|| combined.add_rows(&row_ids, &part).expect("sums of the same shape"));
        });
        group.finish();
    }
}

criterion_group!(benches, gate_and_plan, requests, answers);
criterion_main!(benches);
