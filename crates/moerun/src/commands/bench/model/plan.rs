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
            spare_tokens: largest
                .saturating_mul(args.prompt_tokens)
                .div_ceil(rows_for_prompts)
                .saturating_add(SPARE_STEPS),
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
        // With less, the sequences of a batch would never generate at the same time.
        let measured = plan.prompt_tokens + plan.gen_tokens;
        let needed = kv_bytes(config, settings, measured, largest);
        if let Some(ByteSize(found)) = settings.kv_memory {
            ensure!(
                found >= needed,
                "--kv-memory: wanted at least {needed} bytes for {largest} sequences of {measured} tokens, found {found}"
            );
        }
        Ok(plan)
    }

    /// Longest sequence.
    pub(super) fn sequence_tokens(&self) -> usize {
        [self.gen_tokens, self.spare_tokens, 1]
            .into_iter()
            .fold(self.prompt_tokens, usize::saturating_add)
    }

    /// The operator's settings, with room for the largest batch and without what would spare work.
    pub(super) fn settings(&self, settings: Settings, config: &ModelConfig) -> Settings {
        let batch = self.batches.iter().copied().max().unwrap_or(1);
        let kv_bytes = kv_bytes(config, &settings, self.sequence_tokens() + KV_PAGE_TOKENS, batch);
        Settings {
            max_context: settings.max_context.or(Some(self.sequence_tokens())),
            kv_memory: settings.kv_memory.or(Some(ByteSize(kv_bytes))),
            max_queue: settings.max_queue.max(batch),
            prefix_cache: Switch::Off,
            speculate: 0,
            ..settings
        }
    }
}

/// Memory of the keys and values of `batch` sequences of `tokens`, in whole pages.
fn kv_bytes(config: &ModelConfig, settings: &Settings, tokens: usize, batch: usize) -> u64 {
    let rows = tokens.next_multiple_of(KV_PAGE_TOKENS) * batch;
    KvCache::bytes_per_token(config, settings.kv_format).saturating_mul(rows as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::ServingFlags;

    fn args(prompt_tokens: usize, gen_tokens: usize, batch: usize) -> BenchModelArgs {
        BenchModelArgs {
            serving: ServingFlags::default(),
            workers: None,
            prompt_tokens,
            gen_tokens,
            batch: vec![1, batch],
            repeat: 1,
            seed: 0,
            json: false,
        }
    }

    fn config() -> ModelConfig {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/mixtral/config.json");
        ModelConfig::from_json(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn the_engine_has_a_queue_and_a_cache_for_the_largest_batch() {
        let (config, settings) = (config(), Settings::default());
        let plan = Plan::new(&args(8, 2, 384), &settings, &config).unwrap();
        assert!(settings.max_queue < 384);
        let found = plan.settings(settings.clone(), &config);
        assert_eq!(found.max_queue, 384);
        let bytes = kv_bytes(&config, &settings, plan.sequence_tokens(), 384);
        assert!(found.kv_memory.is_some_and(|ByteSize(found)| found >= bytes));
        // 22 tokens are two pages.
        let page = kv_bytes(&config, &settings, 1, 1);
        let with = |pages: u64| Settings {
            kv_memory: Some(ByteSize(pages * page)),
            ..Settings::default()
        };
        assert!(Plan::new(&args(20, 2, 4), &with(8), &config).is_ok());
        let error = Plan::new(&args(20, 2, 4), &with(7), &config).err().unwrap().to_string();
        let wanted = format!(
            "--kv-memory: wanted at least {} bytes for 4 sequences of 22 tokens, found {}",
            8 * page,
            7 * page
        );
        assert_eq!(error, wanted);
    }

    #[test]
    fn lengths_beyond_all_bounds_are_refused_and_not_wrapped() {
        for (prompt, generated) in [(8, usize::MAX), (usize::MAX, 8), (usize::MAX / 2, usize::MAX / 2 + 1)] {
            let error = Plan::new(&args(prompt, generated, 1), &Settings::default(), &config())
                .err()
                .unwrap();
            let wanted = format!("a sequence takes {} tokens", usize::MAX);
            assert!(error.to_string().starts_with(&wanted), "{error}");
        }
    }
}
