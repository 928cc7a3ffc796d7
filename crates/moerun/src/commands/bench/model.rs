//! `moerun bench --model DIR`: prefill and decode of a whole model.

mod cost;
mod plan;
mod report;

use std::{
    io::{self, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use moerun_dispatch::ExpertBackend;
use moerun_engine::{EngineHandle, GenerateRequest, SamplingParams, TokenEvent};
use moerun_kernels::CpuPool;
use moerun_process::WARNINGS_AND_PROGRESS;
use moerun_weights::{Checkpoint, Needs};
use serde_json::json;
use tokio::sync::mpsc::Receiver;

use self::{cost::Cost, plan::Plan, report::Report};
use super::{
    counted_experts::CountedExperts,
    header,
    machine::{Limits, Machine},
    print_json,
    random::Random,
    spread::Spread,
};
use crate::{
    cli::BenchModelArgs,
    settings::{RoleFlags, Settings},
    stack::Experts,
};

/// How often a measurement is tried that this thread could not follow.
const TRIES: usize = 20;

/// Runs the command.
pub(super) fn run(args: &BenchModelArgs) -> anyhow::Result<()> {
    let role = RoleFlags {
        workers: args.workers,
        ..RoleFlags::default()
    };
    let mut settings = Settings::load(&args.serving, &role)?;
    crate::commands::start_logging(&mut settings, WARNINGS_AND_PROGRESS)?;
    let config = Checkpoint::open(settings.model_dir()?, Needs::GatewayOnly)?
        .config()
        .clone();
    let plan = Plan::new(args, &settings, &config)?;

    let mut experts = Experts::start(&plan.settings(settings.clone(), &config))?;
    let counted = Arc::new(CountedExperts::new(Arc::clone(&experts.backend)));
    experts.backend = Arc::clone(&counted) as Arc<dyn ExpertBackend>;
    let format = experts.model.format();
    let pool = Arc::clone(&experts.pool);
    let machine = Machine::measure_first(&pool)?;

    let engine = experts.start_engine(&plan.settings(settings.clone(), &config))?;
    let mut bench = Bench {
        engine: engine.handle(),
        machine,
        pool: Arc::clone(&pool),
        counted,
        vocab_size: u32::try_from(config.vocab_size).context("vocabulary")?,
        moe_layers: config.moe_layers().len(),
        plan: &plan,
    };
    let prefill = bench.prefill()?;
    let decodes = plan
        .batches
        .iter()
        .map(|&batch| bench.decode(batch))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let cost = Cost::of(&config, format, settings.kv_format);
    let report = Report {
        machine: bench.machine,
        cost,
        format,
        prompt_tokens: plan.prompt_tokens,
        gen_tokens: plan.gen_tokens,
        prefill,
        decodes,
    };
    if args.json {
        let mut json = header(pool.threads());
        json.insert(
            "model".to_owned(),
            json!({
                "path": settings.model_dir()?,
                "family": config.family.model_type(),
                "weights": format,
                "combine": settings.combine,
                "workers": settings.workers,
            }),
        );
        report.add_to_json(&mut json);
        print_json(json)?;
    } else {
        write!(io::stdout().lock(), "{report}")?;
    }
    Ok(())
}

/// An engine under measurement.
struct Bench<'a> {
    engine: EngineHandle,
    machine: Machine,
    pool: Arc<CpuPool>,
    counted: Arc<CountedExperts>,
    vocab_size: u32,
    moe_layers: usize,
    plan: &'a Plan,
}

/// A run, and what the machine could do before and after it.
struct Run {
    seconds: f64,
    limits: Limits,
}

/// Of one batch size.
struct Decode {
    batch: usize,
    tokens_per_second: Spread,
    runs: Vec<Run>,
    /// Experts read in a step, all layers together.
    experts_per_step: f64,
    /// Mean length of a sequence while it was measured.
    mean_context: f64,
    preemptions: u64,
}

impl Bench<'_> {
    /// Seconds from a request to its first token, one prompt at a time; the first is not counted.
    fn prefill(&mut self) -> anyhow::Result<Vec<Run>> {
        let mut runs = Vec::new();
        let mut before = self.machine.measure(&self.pool);
        for turn in 0..=self.plan.repeat {
            let prompt = self.prompt(turn as u64);
            self.await_idle()?;
            let begun = Instant::now();
            let mut events = self.engine.generate(self.request(prompt, 1))?;
            ensure!(next_token(&mut events)?, "the prompt gave no token");
            let seconds = begun.elapsed().as_secs_f64();
            let limits = self.limits_around(&mut before)?;
            if turn > 0 {
                runs.push(Run { seconds, limits });
            }
        }
        Ok(runs)
    }

    /// Tokens per second of `batch` sequences that all generate; the first run is not counted.
    fn decode(&mut self, batch: usize) -> anyhow::Result<Decode> {
        let (mut runs, mut experts_per_layer, mut context) = (Vec::new(), 0.0, 0.0);
        let mut before = self.machine.measure(&self.pool);
        let preemptions = self.engine.stats().preemptions;
        for turn in 0..=self.plan.repeat {
            let run = self.decode_in_time(batch, turn as u64 * batch as u64)?;
            let limits = self.limits_around(&mut before)?;
            if turn > 0 {
                runs.push(Run {
                    seconds: run.seconds,
                    limits,
                });
                experts_per_layer += run.experts_per_layer;
                context += run.mean_context;
            }
        }
        let turns = self.plan.repeat as f64;
        let rates: Vec<f64> = runs
            .iter()
            .map(|run| (batch * self.plan.gen_tokens) as f64 / run.seconds)
            .collect();
        Ok(Decode {
            batch,
            tokens_per_second: Spread::of(&rates),
            runs,
            experts_per_step: experts_per_layer / turns * self.moe_layers as f64,
            mean_context: context / turns,
            preemptions: self.engine.stats().preemptions - preemptions,
        })
    }

    /// The limits of the machine before and after a run that has just ended; those of now come before the next one.
    fn limits_around(&mut self, before: &mut Limits) -> anyhow::Result<Limits> {
        // What was cancelled computes until it notices.
        self.await_idle()?;
        let after = self.machine.measure(&self.pool);
        let around = before.or_more(after);
        *before = after;
        Ok(around)
    }

    /// A run that this thread followed from beginning to end. On a machine that is busy with others, a small model may run
    /// ahead of it, and then its clock tells nothing.
    fn decode_in_time(&self, batch: usize, seed: u64) -> anyhow::Result<DecodeRun> {
        for _ in 0..TRIES {
            if let Some(run) = self.decode_once(batch, seed)? {
                return Ok(run);
            }
        }
        bail!(
            "batch {batch}: in {TRIES} tries the model ran ahead of the thread that measures: the machine is busy with others"
        )
    }

    /// `None` if the model ran ahead.
    fn decode_once(&self, batch: usize, seed: u64) -> anyhow::Result<Option<DecodeRun>> {
        self.await_idle()?;
        let tokens = self.plan.gen_tokens + self.plan.spare_tokens;
        let mut sequences = (0..batch as u64)
            .map(|index| self.engine.generate(self.request(self.prompt(seed + index), tokens)))
            .collect::<Result<Vec<_>, _>>()?;
        // Until all have begun, and then to the end of that step.
        let mut generated = 0;
        for events in &mut sequences {
            generated += usize::from(next_token(events)?);
        }
        for events in &mut sequences {
            while let Ok(event) = events.try_recv() {
                check_token(event)?;
                generated += 1;
            }
        }
        for events in &mut sequences {
            if !next_token(events)? {
                return Ok(None);
            }
            generated += 1;
        }
        if self.is_behind(&sequences) {
            return Ok(None);
        }
        let (begun, before) = (Instant::now(), self.counted.counts());
        for _ in 0..self.plan.gen_tokens {
            for events in &mut sequences {
                if !next_token(events)? {
                    return Ok(None);
                }
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        if self.is_behind(&sequences) {
            return Ok(None);
        }
        let after = self.counted.counts();
        // A mean per layer: the step that is under way at either end does not matter to it.
        let layers = (after.layers - before.layers).max(1);
        Ok(Some(DecodeRun {
            seconds,
            experts_per_layer: (after.experts - before.experts) as f64 / layers as f64,
            mean_context: self.plan.prompt_tokens as f64
                + generated as f64 / batch as f64
                + self.plan.gen_tokens as f64 / 2.0,
        }))
    }

    /// Whether tokens wait to be seen: more than one of a sequence, and more than a 32nd of what is measured.
    fn is_behind(&self, sequences: &[Receiver<TokenEvent>]) -> bool {
        let most = (self.plan.gen_tokens / 32).max(1);
        sequences.iter().any(|events| events.len() > most)
    }

    /// Waits until what was cancelled has gone.
    fn await_idle(&self) -> anyhow::Result<()> {
        let until = Instant::now() + Duration::from_secs(60);
        while self.engine.stats().running + self.engine.stats().waiting > 0 {
            ensure!(Instant::now() < until, "sequences that were cancelled go on");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Token ids drawn at random; no tokenizer is asked.
    fn prompt(&self, index: u64) -> Vec<u32> {
        let mut random = Random::new(self.plan.seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..self.plan.prompt_tokens)
            .map(|_| random.below(self.vocab_size))
            .collect()
    }

    fn request(&self, prompt_ids: Vec<u32>, max_tokens: usize) -> GenerateRequest {
        GenerateRequest {
            prompt_ids,
            max_tokens,
            stop_token_ids: Vec::new(),
            sampling: SamplingParams {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                seed: self.plan.seed,
            },
            logprobs: None,
        }
    }
}

struct DecodeRun {
    seconds: f64,
    experts_per_layer: f64,
    mean_context: f64,
}

/// Waits for the next token; false if the sequence has ended.
fn next_token(events: &mut Receiver<TokenEvent>) -> anyhow::Result<bool> {
    match events.blocking_recv() {
        Some(event) => check_token(event).map(|()| true),
        None => Ok(false),
    }
}

fn check_token(event: TokenEvent) -> anyhow::Result<()> {
    match event {
        TokenEvent::Token { .. } => Ok(()),
        TokenEvent::Failed(error) => bail!(error),
    }
}
