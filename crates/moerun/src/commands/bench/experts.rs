//! `moerun bench kernels`: expert feed-forwards grouped as a layer runs them, over weights larger than any cache.

use std::{
    io::{self, Write},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use moerun_kernels::{Activations, CpuPool, FeedForward, Group, PackedMatrix, grouped_exact, grouped_fast};
use moerun_process::available_threads;
use moerun_routing::{PartialSums, term_limit, terms_per_element};
use moerun_types::{CombineMode, ModelConfig, MoeConfig, NumberFormat, Numerics, default_combine_block};
use moerun_weights::{Shape, available_memory_bytes};
use ndarray::Array2;
use serde_json::json;

use super::{
    header,
    machine::{Limits, Machine, PROBE_BYTES},
    print_json,
    random::Random,
    spread::Spread,
};
use crate::{
    cli::BenchKernelsArgs,
    commands::table::{Table, share},
    size::ByteSize,
};

/// Weights from which experts are drawn: more than any cache holds.
const WEIGHT_BYTES: usize = 1 << 30;
/// Numbers drawn for the weights, more than any row has.
const TABLE: usize = 1 << 20;
/// Measurements of one case, at least; more while they take no longer than [`CASE_TIME`].
const LEAST_RUNS: usize = 7;
const CASE_TIME: Duration = Duration::from_millis(400);

/// Runs the command.
pub(super) fn run(args: &BenchKernelsArgs) -> anyhow::Result<()> {
    let threads = args.threads.unwrap_or_else(available_threads);
    ensure!(
        (1..=1024).contains(&threads),
        "--threads: wanted 1 to 1024, found {threads}"
    );
    for &rows in &args.rows {
        ensure!((1..=4096).contains(&rows), "--rows: wanted 1 to 4096, found {rows}");
    }
    for &block in &args.combine_block {
        ensure!(
            (1..=1 << 20).contains(&block),
            "--combine-block: wanted 1 to {}, found {block}",
            1 << 20
        );
    }
    let need = (WEIGHT_BYTES + PROBE_BYTES) as u64;
    if let Some(available) = available_memory_bytes() {
        ensure!(
            available > need,
            "weights and the memory for the read bandwidth take {}, but {} are available",
            ByteSize(need),
            ByteSize(available)
        );
    }
    let pool = CpuPool::new(threads);
    let mut machine = Machine::measure_first(&pool)?;
    let mut cases = Vec::new();
    for name in &args.shape {
        let shape = Shape::by_name(name).with_context(|| format!("--shape: unknown shape {name:?}"))?;
        let config = ModelConfig::from_json(shape.config_json)?;
        let moe = config
            .moe
            .as_ref()
            .with_context(|| format!("--shape {name}: it has no experts"))?;
        for format in NumberFormat::ALL
            .into_iter()
            .filter(|&format| args.weights.is_none_or(|only| only == format))
        {
            let blocks = match args.combine_block[..] {
                [] => &[default_combine_block(moe.intermediate)][..],
                ref blocks => blocks,
            };
            let numerics = blocks
                .iter()
                .map(|&block| Numerics::checked(format, args.combine, block).context("--combine-block"))
                .collect::<Result<Vec<_>, _>>()?;
            let experts = Experts::new(&config, moe, format);
            let mut before = machine.measure(&pool);
            for &rows in &args.rows {
                for &numerics in &numerics {
                    let mut case = experts.measure(&pool, name, rows, moe, numerics, before)?;
                    let after = machine.measure(&pool);
                    case.limits = before.or_more(after);
                    cases.push(case);
                    before = after;
                }
            }
        }
    }
    if args.json {
        let mut json = header(threads);
        json.insert("machine".to_owned(), machine.to_json());
        let cases: Vec<_> = cases.iter().map(Case::to_json).collect();
        json.insert("kernels".to_owned(), cases.into());
        print_json(json)?;
    } else {
        let mut table = Table::new(&[
            "shape",
            "weights",
            "block",
            "rows",
            "µs",
            "min",
            "max",
            "GB/s",
            "of read",
            "Gop/s",
            "of multiply",
        ]);
        for case in &cases {
            table.row(case.to_row());
        }
        let experts = "the experts that one token chooses, drawn at random, each run on all rows";
        write!(io::stdout().lock(), "{machine}\n{experts}\n{table}")?;
    }
    Ok(())
}

/// Experts of one shape and format, enough to fill [`WEIGHT_BYTES`].
struct Experts {
    weights: Vec<FeedForward>,
    format: NumberFormat,
    hidden: usize,
    intermediate: usize,
    top_k: usize,
}

/// What came of one case.
struct Case {
    shape: String,
    numerics: Numerics,
    rows: usize,
    seconds: Spread,
    weight_bytes: usize,
    operations: usize,
    /// Of the machine, before and after.
    limits: Limits,
}

impl Experts {
    fn new(config: &ModelConfig, moe: &MoeConfig, format: NumberFormat) -> Self {
        let (hidden, intermediate) = (config.hidden, moe.intermediate);
        // Rows are cut from a table, each at a place of its own: to draw every weight would take longer than all the rest.
        let mut random = Random::new(0);
        let table: Vec<f32> = (0..TABLE).map(|_| 0.02 * uniform(&mut random)).collect();
        let make = |seed: u64| {
            let mut random = Random::new(seed);
            let mut matrix = |rows, cols| {
                PackedMatrix::pack(format, rows, cols, |_, row| {
                    let first = random.below((TABLE - row.len()) as u32) as usize;
                    row.copy_from_slice(&table[first..first + row.len()]);
                })
                .expect("weights of moderate size")
            };
            FeedForward {
                gate_proj: matrix(intermediate, hidden),
                up_proj: matrix(intermediate, hidden),
                down_proj: matrix(hidden, intermediate),
                gate_bias: None,
                up_bias: None,
                down_bias: None,
                activation: moe.activation,
            }
        };
        let first = make(0);
        let count = WEIGHT_BYTES.div_ceil(bytes(&first)).max(moe.top_k);
        // Packing is a thread's own work; all cores share it.
        let threads = available_threads();
        let others: Vec<FeedForward> = thread::scope(|scope| {
            let making: Vec<_> = (0..threads)
                .map(|thread| {
                    let make = &make;
                    scope.spawn(move || {
                        let own = (1 + thread..count).step_by(threads);
                        own.map(|index| make(index as u64)).collect::<Vec<_>>()
                    })
                })
                .collect();
            making
                .into_iter()
                .flat_map(|thread| thread.join().expect("packing does not panic"))
                .collect()
        });
        Self {
            weights: [vec![first], others].concat(),
            format,
            hidden,
            intermediate,
            top_k: moe.top_k,
        }
    }

    fn measure(
        &self,
        pool: &CpuPool,
        shape: &str,
        rows: usize,
        moe: &MoeConfig,
        numerics: Numerics,
        limits: Limits,
    ) -> anyhow::Result<Case> {
        let mut random = Random::new(rows as u64);
        let x = Array2::from_shape_simple_fn((rows, self.hidden), || uniform(&mut random));
        let x = Activations::round(self.format.activations(), x.view());
        let row_ids: Vec<u32> = (0..rows as u32).collect();
        let routing_weights = vec![1.0 / self.top_k as f32; rows];
        let blocks = numerics.num_blocks(self.intermediate);
        let block = numerics.combine_block;
        let term_limit = term_limit(terms_per_element(moe, &numerics));
        let mut sums = PartialSums::zeros(numerics.combine, rows, self.hidden);
        let (mut seconds, mut weight_bytes) = (Vec::new(), 0);
        let begun = Instant::now();
        // The first run, which meets cold caches and sleeping threads, is not counted.
        for turn in 0.. {
            let groups: Vec<Group<'_>> = self
                .choose(&mut random)
                .into_iter()
                .map(|weights| Group {
                    weights,
                    rows: &row_ids,
                    routing_weights: &routing_weights,
                    blocks: 0..blocks,
                    owes_down_bias: false,
                })
                .collect();
            weight_bytes = groups.iter().map(|group| bytes(group.weights)).sum();
            sums.reset(numerics.combine, rows, self.hidden);
            let started = Instant::now();
            match &mut sums {
                PartialSums::Exact { sums, .. } => grouped_exact(pool, &x, &groups, false, block, term_limit, sums)?,
                PartialSums::Fast { sums, .. } => grouped_fast(pool, &x, &groups, false, block, sums),
            }
            if turn > 0 {
                seconds.push(started.elapsed().as_secs_f64());
            }
            if turn >= LEAST_RUNS && begun.elapsed() >= CASE_TIME {
                break;
            }
        }
        Ok(Case {
            shape: shape.to_owned(),
            numerics,
            rows,
            seconds: Spread::of(&seconds),
            weight_bytes,
            limits,
            operations: 2 * 3 * self.hidden * self.intermediate * rows * self.top_k,
        })
    }

    /// As many experts as one token takes, all different.
    fn choose(&self, random: &mut Random) -> Vec<&FeedForward> {
        let mut chosen: Vec<usize> = Vec::with_capacity(self.top_k);
        while chosen.len() < self.top_k {
            let expert = random.below(self.weights.len() as u32) as usize;
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        chosen.into_iter().map(|expert| &self.weights[expert]).collect()
    }
}

impl Case {
    fn bytes_per_second(&self) -> f64 {
        self.weight_bytes as f64 / self.seconds.median
    }

    fn ops_per_second(&self) -> f64 {
        self.operations as f64 / self.seconds.median
    }

    fn to_json(&self) -> serde_json::Value {
        json!({
            "shape": self.shape,
            "weights": self.numerics.format,
            "combine": self.numerics.combine,
            "combine_block": self.numerics.combine_block,
            "rows": self.rows,
            "seconds": self.seconds,
            "weight_bytes": self.weight_bytes,
            "bytes_per_second": self.bytes_per_second(),
            "fraction_of_read_bandwidth": self.limits.share_of_read(self.bytes_per_second()),
            "limits": self.limits.to_json(),
            "ops": self.operations,
            "ops_per_second": self.ops_per_second(),
            "fraction_of_multiply_peak": self.limits.share_of_peak(self.numerics.format, self.ops_per_second()),
        })
    }

    fn to_row(&self) -> Vec<String> {
        let micros = self.seconds.scaled(1e6);
        vec![
            self.shape.clone(),
            self.numerics.format.to_string(),
            match self.numerics.combine {
                CombineMode::Exact => self.numerics.combine_block.to_string(),
                CombineMode::Fast => "fast".to_owned(),
            },
            self.rows.to_string(),
            format!("{:.0}", micros.median),
            format!("{:.0}", micros.min),
            format!("{:.0}", micros.max),
            format!("{:.1}", self.bytes_per_second() / 1e9),
            share(Some(self.limits.share_of_read(self.bytes_per_second()))),
            format!("{:.0}", self.ops_per_second() / 1e9),
            share(self.limits.share_of_peak(self.numerics.format, self.ops_per_second())),
        ]
    }
}

fn bytes(weights: &FeedForward) -> usize {
    weights.gate_proj.bytes() + weights.up_proj.bytes() + weights.down_proj.bytes()
}

/// From -1 to 1.
fn uniform(random: &mut Random) -> f32 {
    (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
}
