//! What is to be measured, checked before anything is loaded.

use anyhow::ensure;
use moerun_kernels::KV_PAGE_TOKENS;
use moerun_model::KvCache;
use moerun_types::ModelConfig;

use crate::{
    cli::BenchModelArgs,
    settings::{Settings, Switch},
    size::ByteSize,
};

/// Steps that a sequence may generate while others start, beyond those that their prompts take: at least, and where the
/// context has room. A small model runs ahead of whoever asks it.
const SPARE_STEPS: usize = 8;
const MORE_SPARE_STEPS: usize = 256;

/// What is to be measured, checked.
pub(super) struct Plan {
    pub(super) prompt_tokens: usize,
    pub(super) gen_tokens: usize,
    pub(super) batches: Vec<usize>,
    pub(super) repeat: usize,
    pub(super) seed: u64,
    /// Tokens that a sequence of the largest batch may generate while others start.
    pub(super) spare_tokens: usize,
}

impl Plan {
    pub(super) fn new(args: &BenchModelArgs, settings: &Settings, config: &ModelConfig) -> anyhow::Result<Self> {
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
    pub(super) fn sequence_tokens(&self) -> usize {
        self.prompt_tokens + self.gen_tokens + self.spare_tokens + 1
    }

    /// The operator's settings, with room for the largest batch and without what would spare work.
    pub(super) fn settings(&self, settings: Settings, config: &ModelConfig) -> Settings {
        let pages = self.sequence_tokens().div_ceil(KV_PAGE_TOKENS) + 1;
        let batch = self.batches.iter().copied().max().unwrap_or(1);
        let kv_bytes = KvCache::bytes_per_token(config, settings.kv_format) * (pages * KV_PAGE_TOKENS * batch) as u64;
        Settings {
            max_context: settings.max_context.or(Some(self.sequence_tokens())),
            kv_memory: settings.kv_memory.or(Some(ByteSize(kv_bytes))),
            prefix_cache: Switch::Off,
            speculate: 0,
            ..settings
        }
    }
}
