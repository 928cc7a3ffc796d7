//! `moerun bench --model DIR`: prefill and decode of a whole model.

use std::{
    io::{self, Write},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use moerun_dispatch::ExpertBackend;
use moerun_engine::{EngineHandle, GenerateRequest, SamplingParams, TokenEvent};
use moerun_kernels::KV_PAGE_TOKENS;
use moerun_process::WARNINGS_AND_PROGRESS;
use moerun_types::{ModelConfig, NumberFormat};
use moerun_weights::{Checkpoint, MemoryNeed, Needs, ParameterCounts};
use serde_json::json;
use tokio::sync::mpsc::Receiver;

use super::{
    counted_experts::CountedExperts,
    header,
    machine::Machine,
    print_json,
    spread::Spread,
    table::{Table, share},
};
use crate::{
    cli::BenchModelArgs,
    settings::{RoleFlags, Settings},
    size::ByteSize,
    stack::Experts,
};

/// Steps that a sequence may generate while others start, beyond those that their prompts take: at least, and where the
/// context has room. A small model runs ahead of whoever asks it.
const SPARE_STEPS: usize = 8;
const MORE_SPARE_STEPS: usize = 256;
/// How often a measurement is tried that ended before it began.
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
    let mut machine = Machine::measure_first(&pool)?;

    let engine = experts.start_engine(&plan.settings(settings.clone(), &config))?;
    let bench = Bench {
        engine: engine.handle(),
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
    machine.measure(&pool);

    let cost = Cost::of(&config, format);
    let report = Report {
        machine,
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

/// What is to be measured, checked.
struct Plan {
    prompt_tokens: usize,
    gen_tokens: usize,
    batches: Vec<usize>,
    repeat: usize,
    seed: u64,
    /// Tokens that a sequence of the largest batch may generate while others start.
    spare_tokens: usize,
}

impl Plan {
    fn new(args: &BenchModelArgs, settings: &Settings, config: &ModelConfig) -> anyhow::Result<Self> {
        for (flag, value) in [
            ("--prompt-tokens", args.prompt_tokens),
            ("--gen-tokens", args.gen_tokens),
            ("--repeat", args.repeat),
        ] {
            ensure!(value > 0, "{flag}: wanted at least 1, found 0");
        }
        let largest = args.batch.iter().copied().max().unwrap_or(0);
        // The scheduler keeps a quarter of a step for prompts.
        let most = settings.max_batch_tokens * 3 / 4;
        for &batch in &args.batch {
            ensure!(
                (1..=most.max(1)).contains(&batch),
                "--batch: wanted 1 to {most}, three quarters of --max-batch-tokens {}, found {batch}",
                settings.max_batch_tokens
            );
        }
        let rows_for_prompts = (settings.max_batch_tokens - largest.min(settings.max_batch_tokens - 1)).max(1);
        let mut plan = Self {
            prompt_tokens: args.prompt_tokens,
            gen_tokens: args.gen_tokens,
            batches: args.batch.clone(),
            repeat: args.repeat,
            seed: args.seed,
            spare_tokens: (largest * args.prompt_tokens).div_ceil(rows_for_prompts) + SPARE_STEPS,
        };
        let (length, limit) = (plan.sequence_tokens(), config.max_position_embeddings);
        ensure!(
            length <= limit,
            "a sequence takes {length} tokens ({} of prompt, {} generated, {} while others start), but the checkpoint supports \
             {limit}",
            plan.prompt_tokens,
            plan.gen_tokens,
            plan.spare_tokens
        );
        plan.spare_tokens += MORE_SPARE_STEPS.min(limit - length);
        Ok(plan)
    }

    /// Longest sequence.
    fn sequence_tokens(&self) -> usize {
        self.prompt_tokens + self.gen_tokens + self.spare_tokens + 1
    }

    /// The operator's settings, with room for the largest batch and without what would spare work.
    fn settings(&self, settings: Settings, config: &ModelConfig) -> Settings {
        let pages = self.sequence_tokens().div_ceil(KV_PAGE_TOKENS) + 1;
        let batch = self.batches.iter().copied().max().unwrap_or(1);
        // Keys and values may be held in less, never in more than f32.
        let kv_bytes =
            MemoryNeed::of(config, NumberFormat::F32).kv_bytes_per_token * (pages * KV_PAGE_TOKENS * batch) as u64;
        Settings {
            max_context: settings.max_context.or(Some(self.sequence_tokens())),
            kv_memory: settings.kv_memory.or(Some(ByteSize(kv_bytes))),
            prefix_cache: crate::settings::Switch::Off,
            speculate: 0,
            ..settings
        }
    }
}

/// An engine under measurement.
struct Bench<'a> {
    engine: EngineHandle,
    counted: Arc<CountedExperts>,
    vocab_size: u32,
    moe_layers: usize,
    plan: &'a Plan,
}

/// Of one batch size.
struct Decode {
    batch: usize,
    tokens_per_second: Spread,
    /// Experts read in a step, all layers together.
    experts_per_step: f64,
    /// Mean length of a sequence while it was measured.
    mean_context: f64,
    preemptions: u64,
}

impl Bench<'_> {
    /// Seconds from a request to its first token, one prompt at a time; the first is not counted.
    fn prefill(&self) -> anyhow::Result<Spread> {
        let mut seconds = Vec::new();
        for turn in 0..=self.plan.repeat {
            let prompt = self.prompt(turn as u64);
            self.await_idle()?;
            let begun = Instant::now();
            let mut events = self.engine.generate(self.request(prompt, 1))?;
            ensure!(next_token(&mut events)?, "the prompt gave no token");
            if turn > 0 {
                seconds.push(begun.elapsed().as_secs_f64());
            }
        }
        Ok(Spread::of(&seconds))
    }

    /// Tokens per second of `batch` sequences that all generate; the first run is not counted.
    fn decode(&self, batch: usize) -> anyhow::Result<Decode> {
        let (mut rates, mut experts_per_layer, mut context) = (Vec::new(), 0.0, 0.0);
        let preemptions = self.engine.stats().preemptions;
        for turn in 0..=self.plan.repeat {
            let run = self.decode_in_time(batch, turn as u64 * batch as u64)?;
            if turn > 0 {
                rates.push((batch * self.plan.gen_tokens) as f64 / run.seconds);
                experts_per_layer += run.experts_per_layer;
                context += run.mean_context;
            }
        }
        let turns = self.plan.repeat as f64;
        Ok(Decode {
            batch,
            tokens_per_second: Spread::of(&rates),
            experts_per_step: experts_per_layer / turns * self.moe_layers as f64,
            mean_context: context / turns,
            preemptions: self.engine.stats().preemptions - preemptions,
        })
    }

    /// A run in which all sequences are seen to generate at the same time. On a machine that is busy with others, a small
    /// model may have ended before this thread looks.
    fn decode_in_time(&self, batch: usize, seed: u64) -> anyhow::Result<DecodeRun> {
        for _ in 0..TRIES {
            if let Some(run) = self.decode_once(batch, seed)? {
                return Ok(run);
            }
        }
        bail!(
            "batch {batch}: in {TRIES} tries no run of {} tokens was seen from its beginning; this thread gets no time",
            self.plan.gen_tokens + self.plan.spare_tokens
        )
    }

    /// `None` if a sequence ended before it was measured.
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
        let (begun, before) = (Instant::now(), self.counted.counts());
        for _ in 0..self.plan.gen_tokens {
            for events in &mut sequences {
                if !next_token(events)? {
                    return Ok(None);
                }
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
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

/// A small generator of evenly spread numbers (splitmix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u32) -> u32 {
        ((self.next() >> 32) * u64::from(bound) >> 32) as u32
    }
}

/// What a token costs by the config and the number format, from the tensors that it passes.
struct Cost {
    /// Weights outside the experts that every step reads: all but an embedding that is only looked up.
    dense_bytes: u64,
    expert_bytes: u64,
    kv_bytes_per_token: u64,
    /// Multiplications and additions of one prompt token, without attention's scores and without the head.
    prompt_ops: u64,
    /// … of the head, for the one row whose logits are wanted.
    head_ops: u64,
}

impl Cost {
    fn of(config: &ModelConfig, format: NumberFormat) -> Self {
        let need = MemoryNeed::of(config, format);
        let active = ParameterCounts::of(config).active;
        let head = (config.vocab_size * config.hidden) as u64;
        let (looked_up_bytes, outside) = if config.tied_head {
            (0, head)
        } else {
            (need.embedding_bytes, 2 * head)
        };
        Cost {
            dense_bytes: need.gateway_bytes - looked_up_bytes,
            expert_bytes: need.expert_bytes,
            kv_bytes_per_token: need.kv_bytes_per_token,
            prompt_ops: 2 * (active - outside),
            head_ops: 2 * head,
        }
    }

    /// Bytes read for one token of a batch.
    fn decode_bytes(&self, decode: &Decode) -> f64 {
        let weights = self.dense_bytes as f64 + decode.experts_per_step * self.expert_bytes as f64;
        weights / decode.batch as f64 + self.kv_bytes_per_token as f64 * decode.mean_context
    }
}

/// All that was measured.
struct Report {
    machine: Machine,
    cost: Cost,
    format: NumberFormat,
    prompt_tokens: usize,
    gen_tokens: usize,
    /// Seconds to the first token.
    prefill: Spread,
    decodes: Vec<Decode>,
}

impl Report {
    fn prefill_ops(&self) -> u64 {
        self.cost.prompt_ops * self.prompt_tokens as u64 + self.cost.head_ops
    }

    /// Tokens per second; the extremes change places.
    fn prefill_rate(&self) -> Spread {
        let rate = |seconds: f64| self.prompt_tokens as f64 / seconds;
        Spread {
            median: rate(self.prefill.median),
            min: rate(self.prefill.max),
            max: rate(self.prefill.min),
        }
    }

    fn prefill_share(&self) -> Option<f64> {
        self.machine
            .share_of_peak(self.format, self.prefill_ops() as f64 / self.prefill.median)
    }

    fn decode_share(&self, decode: &Decode) -> f64 {
        self.machine
            .share_of_read(self.cost.decode_bytes(decode) * decode.tokens_per_second.median)
    }

    fn add_to_json(&self, json: &mut serde_json::Map<String, serde_json::Value>) {
        json.insert("machine".to_owned(), self.machine.to_json());
        json.insert(
            "prefill".to_owned(),
            json!({
                "prompt_tokens": self.prompt_tokens,
                "time_to_first_token_seconds": self.prefill,
                "tokens_per_second": self.prefill_rate(),
                "ops": self.prefill_ops(),
                "fraction_of_multiply_peak": self.prefill_share(),
            }),
        );
        let decodes: Vec<_> = self
            .decodes
            .iter()
            .map(|decode| {
                json!({
                    "batch": decode.batch,
                    "gen_tokens": self.gen_tokens,
                    "mean_context": decode.mean_context,
                    "tokens_per_second": decode.tokens_per_second,
                    "experts_per_step": decode.experts_per_step,
                    "bytes_per_token": self.cost.decode_bytes(decode),
                    "fraction_of_read_bandwidth": self.decode_share(decode),
                    "preemptions": decode.preemptions,
                })
            })
            .collect();
        json.insert("decode".to_owned(), decodes.into());
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{}", self.machine)?;
        let mut table = Table::new(&["what", "tokens/s", "min", "max", "MB/token", "of read", "of multiply"]);
        let row = |what: String, rate: Spread, bytes: Option<f64>, read: Option<f64>, multiply: Option<f64>| {
            vec![
                what,
                format!("{:.1}", rate.median),
                format!("{:.1}", rate.min),
                format!("{:.1}", rate.max),
                bytes.map_or_else(|| "-".to_owned(), |bytes| format!("{:.1}", bytes / 1e6)),
                share(read),
                share(multiply),
            ]
        };
        let what = format!("prefill of {}", self.prompt_tokens);
        table.row(row(what, self.prefill_rate(), None, None, self.prefill_share()));
        for decode in &self.decodes {
            let what = format!("decode, batch {}", decode.batch);
            let bytes = self.cost.decode_bytes(decode);
            table.row(row(
                what,
                decode.tokens_per_second,
                Some(bytes),
                Some(self.decode_share(decode)),
                None,
            ));
        }
        write!(f, "{table}")?;
        writeln!(
            f,
            "time to first token: {:.1} ms ({:.1} to {:.1})",
            self.prefill.median * 1e3,
            self.prefill.min * 1e3,
            self.prefill.max * 1e3
        )?;
        for decode in self.decodes.iter().filter(|decode| decode.preemptions > 0) {
            writeln!(
                f,
                "batch {}: {} preemptions, so keys were computed twice; give it more --kv-memory",
                decode.batch, decode.preemptions
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use moerun_weights::Shape;

    use super::*;

    fn config(shape: &str) -> ModelConfig {
        ModelConfig::from_json(Shape::by_name(shape).expect("a shape of ours").config_json).expect("a good config")
    }

    fn decode(batch: usize, experts_per_step: f64) -> Decode {
        Decode {
            batch,
            tokens_per_second: Spread::of(&[1.0]),
            experts_per_step,
            mean_context: 0.0,
            preemptions: 0,
        }
    }

    #[test]
    fn bytes_of_a_token_are_those_of_the_tensors_it_passes() {
        // Granite: attention 3 MiB of bf16 pairs, head tied to the embedding.
        let granite = Cost::of(&config("granite-3.1-1b-a400m"), NumberFormat::Bf16);
        let attention = 2 * (1024 * 1024 * 2 + 2 * 512 * 1024);
        let norms_and_router = 4 * (2 * 1024 + 32 * 1024);
        let head = 2 * 49168 * 1024; // rows padded to whole panels
        let dense = 24 * (attention + norms_and_router) + head + 4 * 1024;
        assert_eq!(granite.dense_bytes, dense);
        let experts = 24.0 * 8.0;
        let expert = 3.0 * 2.0 * 512.0 * 1024.0;
        assert_eq!(
            granite.decode_bytes(&decode(1, experts)),
            dense as f64 + experts * expert
        );
        // A batch shares what it reads.
        assert_eq!(
            granite.decode_bytes(&decode(4, experts)),
            (dense as f64 + experts * expert) / 4.0
        );

        // OLMoE: of an embedding of its own one row is looked up, which is nothing.
        let olmoe = Cost::of(&config("olmoe-1b-7b"), NumberFormat::Bf16);
        let all = MemoryNeed::of(&config("olmoe-1b-7b"), NumberFormat::Bf16).gateway_bytes;
        assert_eq!(all - olmoe.dense_bytes, 2 * 50304 * 2048);
    }

    #[test]
    fn operations_of_a_prompt_leave_out_what_is_looked_up() {
        let granite = Cost::of(&config("granite-3.1-1b-a400m"), NumberFormat::Bf16);
        let per_layer = 1024 * 1024 * 2 + 2 * 512 * 1024 + 32 * 1024 + 2 * 1024 + 8 * 3 * 512 * 1024;
        assert_eq!(granite.prompt_ops, 2 * (24 * per_layer + 1024));
        assert_eq!(granite.head_ops, 2 * 49155 * 1024);
    }

    #[test]
    fn random_tokens_lie_below_the_vocabulary_and_follow_the_seed() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..1000).map(|_| random.below(17)).collect::<Vec<_>>()
        };
        assert!((0..17).all(|token| draw(1).contains(&token)));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(Random::new(3).below(1), 0);
    }
}
