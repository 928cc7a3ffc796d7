//! `moerun bench plan`: how balanced the planner's placements are, beside EPLB's, and how long planning takes.

use std::{
    fs,
    io::{self, Write},
    time::Instant,
};

use anyhow::{Context, ensure};
use moerun_process::{LogFormat, init_telemetry};
use moerun_routing::planner::{
    CostModel, EplbPlan, ExpertLoads, ExpertSize, Layout, PlanRequest, WorkerSpec, eplb_global, eplb_hierarchical, plan,
};
use moerun_types::LayerId;
use serde_json::{Value, json};

use super::{header, print_json, random::Random, spread::Spread};
use crate::{cli::BenchPlanArgs, commands::table::Table};

/// Exponents of the synthetic loads.
const EXPONENTS: [f64; 4] = [0.0, 0.5, 0.8, 1.2];

/// Runs the command.
pub(super) fn run(args: &BenchPlanArgs) -> anyhow::Result<()> {
    init_telemetry(LogFormat::Text, None, "warn")?;
    ensure!(args.seeds > 0, "--seeds: wanted at least 1, found 0");
    let mut figures = Vec::new();
    for exponent in EXPONENTS {
        let layers: Vec<Vec<f64>> = (0..args.seeds).map(|seed| zipf(args.experts, exponent, seed)).collect();
        figures.extend(compare(&format!("Zipf {exponent}"), &layers, args.workers)?);
    }
    for path in &args.loads {
        let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        let loads = ExpertLoads::from_json(&text).with_context(|| format!("{}", path.display()))?;
        let layers: Vec<Vec<f64>> = loads.layers().map(|(_, loads)| loads.to_vec()).collect();
        ensure!(
            !layers.is_empty(),
            "{}: wanted loads of at least one layer",
            path.display()
        );
        let name = path
            .file_stem()
            .map_or_else(|| "recorded".into(), |name| name.to_string_lossy());
        // As many workers as a quarter of the experts, so that small recorded models are spread too.
        let workers = args.workers.min(layers[0].len() / 2).max(2);
        figures.extend(compare(&name, &layers, workers)?);
    }
    let times = (!args.quick).then(planning_times).transpose()?;
    if args.json {
        let mut json = header(1);
        json.insert("plan".to_owned(), figures.iter().map(Figure::to_json).collect());
        let times = times.map(|times| {
            times
                .into_iter()
                .map(|(name, seconds)| (name, json!(seconds)))
                .collect::<Value>()
        });
        json.insert("planning".to_owned(), times.into());
        print_json(json)?;
        return Ok(());
    }
    let mut table = Table::new(&[
        "loads",
        "workers",
        "slots",
        "balance",
        "worst",
        "EPLB",
        "worst",
        "after a death",
        "worst",
        "EPLB",
        "worst",
        "lost",
    ]);
    for figure in &figures {
        table.row(figure.to_row());
    }
    let mut stdout = io::stdout().lock();
    writeln!(
        stdout,
        "balance (mean over max of the workers' loads) of each layer: median and worst; after a death: the worst one.\n\
         EPLB divides evenly over replicas; lost: most load that it leaves without a holder. x+y: x holders of every\n\
         expert and y more a layer.\n\n{table}"
    )?;
    if let Some(times) = times {
        writeln!(
            stdout,
            "\nplanning 58 layers of 256 experts on 64 workers, seconds (least–largest)"
        )?;
        for (name, seconds) in times {
            writeln!(
                stdout,
                "{name}: {:.2} ({:.2}–{:.2})",
                seconds.median, seconds.min, seconds.max
            )?;
        }
    }
    Ok(())
}

/// Loads by rank to the power of `-exponent`, in a random order.
fn zipf(experts: usize, exponent: f64, seed: u64) -> Vec<f64> {
    let mut random = Random::new(seed);
    let mut loads: Vec<f64> = (1..=experts).map(|rank| (rank as f64).powf(-exponent)).collect();
    for index in (1..loads.len()).rev() {
        loads.swap(index, random.below(index as u32 + 1) as usize);
    }
    loads
}

/// One kind of loads in one arrangement of slots.
struct Figure {
    loads: String,
    workers: usize,
    slots: String,
    ours: Balances,
    eplb: Balances,
    /// Most load that EPLB leaves without a holder after one death.
    eplb_lost: f64,
}

/// Balance of each layer: before, and after the worst death where every expert should outlive it.
struct Balances {
    before: Spread,
    after: Option<Spread>,
}

/// (a) one holder each and as many more as there are workers; (b) two holders each; (c) both.
fn compare(name: &str, layers: &[Vec<f64>], workers: usize) -> anyhow::Result<Vec<Figure>> {
    [(1, workers), (2, 0), (2, workers)]
        .into_iter()
        .map(|(replicas, extra)| figure(name, layers, workers, replicas, extra))
        .collect()
}

fn figure(name: &str, layers: &[Vec<f64>], workers: usize, replicas: usize, extra: usize) -> anyhow::Result<Figure> {
    let experts = layers[0].len();
    let slots = experts * replicas + extra;
    ensure!(
        slots.is_multiple_of(workers),
        "{experts} experts on {workers} workers: wanted a number that the workers divide evenly, as EPLB needs"
    );
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let (mut eplb_before, mut eplb_after, mut eplb_lost) = (Vec::new(), Vec::new(), 0.0f64);
    for loads in layers {
        // Each layer by itself, in as many slots as EPLB has.
        let plan = plan(&one_layer(loads, workers, slots / workers, replicas, extra))?;
        before.push(plan.prediction.balance);
        after.extend(plan.prediction.after_worst_death.map(|death| death.balance));
        let baseline = eplb_global(loads, slots, workers);
        let total: f64 = loads.iter().sum();
        let (balance, _) = baseline.balance(loads, workers, None);
        let (balance_after, lost) = worst_death(&baseline, loads, workers);
        eplb_before.push(balance);
        eplb_after.push(balance_after);
        eplb_lost = eplb_lost.max(lost / total);
    }
    let survives = replicas > 1;
    Ok(Figure {
        loads: name.to_owned(),
        workers,
        slots: format!("{} ({replicas}+{extra})", slots / workers),
        ours: Balances {
            before: Spread::of(&before),
            after: survives.then(|| Spread::of(&after)),
        },
        eplb: Balances {
            before: Spread::of(&eplb_before),
            after: survives.then(|| Spread::of(&eplb_after)),
        },
        eplb_lost: if survives { eplb_lost } else { 0.0 },
    })
}

fn worst_death(plan: &EplbPlan, loads: &[f64], workers: usize) -> (f64, f64) {
    let deaths = (0..workers).map(|dead| plan.balance(loads, workers, Some(dead)));
    deaths.fold((1.0, 0.0), |worst, death| (worst.0.min(death.0), worst.1.max(death.1)))
}

fn one_layer(loads: &[f64], workers: usize, slots: usize, replicas: usize, extra: usize) -> PlanRequest {
    PlanRequest {
        replicas,
        extra_holders: extra,
        ..request(&[loads.to_vec()], workers, slots)
    }
}

/// Layers of whole experts on workers of `slots` experts a layer each.
fn request(layers: &[Vec<f64>], workers: usize, slots: usize) -> PlanRequest {
    const EXPERT_BYTES: u64 = 1 << 20;
    let moe_layers: Vec<LayerId> = (0..layers.len() as u32).map(LayerId).collect();
    let worker = |index: usize| WorkerSpec {
        name: format!("w{index}"),
        memory_bytes: EXPERT_BYTES * (slots * layers.len()) as u64,
        bandwidth: 20e9,
        round_trip_seconds: 1e-4,
        domain: None,
    };
    PlanRequest {
        num_experts: layers[0].len(),
        top_k: 2,
        size: ExpertSize::new(vec![EXPERT_BYTES]),
        loads: ExpertLoads::from_layers(moe_layers.iter().copied().zip(layers.iter().cloned())),
        moe_layers,
        workers: (0..workers).map(worker).collect(),
        replicas: 1,
        extra_holders: 0,
        layout: Some(Layout::Whole),
        present: Vec::new(),
        stability: 0.1,
        seed: 0,
        cost: CostModel {
            batch_tokens: 16,
            expert_ops: 1e6,
            ops_per_second: 4e11,
            row_bytes: 16384.0,
            link_bytes_per_second: 1.25e9,
            message_seconds: 20e-6,
        },
    }
}

/// Planning for DeepSeek-V3's layers on 64 workers: from nothing, and again with one worker gone; EPLB's beside.
fn planning_times() -> anyhow::Result<Vec<(String, Spread)>> {
    const REPEAT: usize = 3;
    let layers: Vec<Vec<f64>> = (0..58).map(|seed| zipf(256, 0.8, seed)).collect();
    let mut from_nothing = request(&layers, 64, 9);
    from_nothing.replicas = 2;
    let first = plan(&from_nothing)?;
    let mut after_death = from_nothing.clone();
    after_death.present = after_death
        .workers
        .iter()
        .map(|worker| worker.name.clone())
        .zip(first.held)
        .collect();
    after_death.workers.remove(20);
    let timed = |work: &dyn Fn() -> anyhow::Result<()>| -> anyhow::Result<Spread> {
        let seconds = (0..REPEAT).map(|_| {
            let start = Instant::now();
            work()?;
            Ok(start.elapsed().as_secs_f64())
        });
        Ok(Spread::of(&seconds.collect::<anyhow::Result<Vec<f64>>>()?))
    };
    let eplb = || {
        for loads in &layers {
            std::hint::black_box(eplb_hierarchical(loads, 576, 8, 8, 64));
        }
        Ok(())
    };
    Ok(vec![
        (
            "two holders each, from nothing".to_owned(),
            timed(&|| plan(&from_nothing).map(drop).map_err(Into::into))?,
        ),
        (
            "the same after a worker has left".to_owned(),
            timed(&|| plan(&after_death).map(drop).map_err(Into::into))?,
        ),
        ("EPLB, hierarchical, 8 nodes".to_owned(), timed(&eplb)?),
    ])
}

impl Figure {
    fn to_row(&self) -> Vec<String> {
        let number = |value: f64| format!("{value:.3}");
        let after = |balances: &Balances| match &balances.after {
            Some(after) => [number(after.median), number(after.min)],
            None => ["-", "-"].map(str::to_owned),
        };
        let [ours, ours_worst] = after(&self.ours);
        let [eplb, eplb_worst] = after(&self.eplb);
        vec![
            self.loads.clone(),
            self.workers.to_string(),
            self.slots.clone(),
            number(self.ours.before.median),
            number(self.ours.before.min),
            number(self.eplb.before.median),
            number(self.eplb.before.min),
            ours,
            ours_worst,
            eplb,
            eplb_worst,
            format!("{:.1} %", 100.0 * self.eplb_lost),
        ]
    }

    fn to_json(&self) -> Value {
        let balances = |balances: &Balances| json!({"balance": balances.before, "after_worst_death": balances.after});
        json!({
            "loads": self.loads,
            "workers": self.workers,
            "slots": self.slots,
            "planner": balances(&self.ours),
            "eplb": balances(&self.eplb),
            "eplb_lost_load": self.eplb_lost,
        })
    }
}
