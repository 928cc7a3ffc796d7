//! What a request may ask for: checked once, in the handle, before anything is queued.

use std::fmt::Display;

use moerun_kernels::KV_PAGE_TOKENS;
use moerun_model::{KvCache, Model};
use moerun_types::{LayerId, ModelConfig};

use crate::{EngineConfig, EngineError, ForwardRequest, GenerateRequest, MoeLayerRequest, SamplingParams};

/// Most likeliest tokens that are reported with each token.
pub(crate) const MAX_LOGPROBS: usize = 100;

/// Most bytes of logits that one request may ask for: they are kept until the client has read them.
pub(crate) const MAX_LOGITS_BYTES: usize = 1 << 30;

/// Most places in the queue; each takes a few hundred bytes from the start.
const MAX_QUEUE_BOUND: usize = 1 << 20;

/// Bounds that follow from model and configuration.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    vocab_size: usize,
    hidden: usize,
    moe_layers: Vec<LayerId>,
    /// Longest sequence, prompt and output together.
    max_context: usize,
    /// Pages of the cache.
    pub(crate) num_pages: u32,
    /// Most requests that wait.
    pub(crate) max_queue: usize,
}

fn invalid(field: &'static str, wanted: impl Into<String>, found: impl Display) -> EngineError {
    EngineError::Invalid {
        field,
        wanted: wanted.into(),
        found: found.to_string(),
    }
}

fn require(holds: bool, field: &'static str, wanted: &str, found: impl Display) -> Result<(), EngineError> {
    if holds {
        Ok(())
    } else {
        Err(invalid(field, wanted, found))
    }
}

impl Limits {
    /// Checks the configuration against the model.
    pub(crate) fn new(model: &Model, config: &EngineConfig) -> Result<Self, EngineError> {
        Self::from_parts(
            model.config(),
            KvCache::page_bytes(model.config(), config.kv_format),
            config,
        )
    }

    fn from_parts(model: &ModelConfig, page_bytes: usize, config: &EngineConfig) -> Result<Self, EngineError> {
        require(
            config.max_context >= 2,
            "max_context",
            "at least 2 (one token in, one out)",
            config.max_context,
        )?;
        let supported = model.max_position_embeddings;
        if config.max_context > supported {
            let wanted = format!("at most the {supported} positions that the checkpoint supports");
            return Err(invalid("max_context", wanted, config.max_context));
        }
        require(
            config.max_batch_tokens >= 1,
            "max_batch_tokens",
            "at least 1",
            config.max_batch_tokens,
        )?;
        let queue = 1..=MAX_QUEUE_BOUND;
        require(
            queue.contains(&config.max_queue),
            "max_queue",
            &format!("1 to {MAX_QUEUE_BOUND}"),
            config.max_queue,
        )?;
        let num_pages = config.kv_memory_bytes / (page_bytes.max(1) as u64);
        if num_pages == 0 {
            let wanted = format!("at least {page_bytes} bytes, one page of {KV_PAGE_TOKENS} tokens");
            return Err(invalid("kv_memory_bytes", wanted, config.kv_memory_bytes));
        }
        Ok(Self {
            vocab_size: model.vocab_size,
            hidden: model.hidden,
            moe_layers: model.moe_layers(),
            max_context: config.max_context,
            num_pages: u32::try_from(num_pages).unwrap_or(u32::MAX),
            max_queue: config.max_queue,
        })
    }

    /// Tokens that the cache has room for.
    fn cache_tokens(&self) -> usize {
        (self.num_pages as usize).saturating_mul(KV_PAGE_TOKENS)
    }

    /// Checks a request, and lowers its `max_tokens` to what context and cache leave.
    pub(crate) fn check_generate(&self, request: &mut GenerateRequest) -> Result<(), EngineError> {
        let prompt_tokens = request.prompt_ids.len();
        require(prompt_tokens > 0, "prompt_ids", "at least one token", "none")?;
        // The last token of the output is never fed back, so it needs no room in the cache.
        let longest = self.max_context.min(self.cache_tokens().saturating_add(1));
        if prompt_tokens >= longest {
            return Err(EngineError::PromptTooLong {
                prompt_tokens,
                max_context: longest,
            });
        }
        self.check_ids("prompt_ids", &request.prompt_ids)?;
        require(request.max_tokens >= 1, "max_tokens", "at least 1", request.max_tokens)?;
        check_sampling(&request.sampling)?;
        let logprobs = request.logprobs.unwrap_or(0);
        require(
            logprobs <= MAX_LOGPROBS,
            "logprobs",
            &format!("at most {MAX_LOGPROBS}"),
            logprobs,
        )?;
        request.max_tokens = request.max_tokens.min(longest - prompt_tokens);
        Ok(())
    }

    /// Checks a request for logits.
    pub(crate) fn check_forward(&self, request: &ForwardRequest) -> Result<(), EngineError> {
        let tokens = request.token_ids.len();
        require(tokens > 0, "token_ids", "at least one token", "none")?;
        let longest = self.max_context.min(self.cache_tokens());
        if tokens > longest {
            return Err(EngineError::PromptTooLong {
                prompt_tokens: tokens,
                max_context: longest,
            });
        }
        self.check_ids("token_ids", &request.token_ids)?;
        let positions = &request.positions;
        require(!positions.is_empty(), "positions", "at least one", "none")?;
        if let Some(pair) = positions.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(invalid(
                "positions",
                "ascending, each once",
                format!("{} before {}", pair[0], pair[1]),
            ));
        }
        let last = positions[positions.len() - 1];
        require(
            last < tokens,
            "positions",
            &format!("below {tokens}, the number of tokens"),
            last,
        )?;
        let most = (MAX_LOGITS_BYTES / (self.vocab_size * size_of::<f32>()).max(1)).max(1);
        require(
            positions.len() <= most,
            "positions",
            &format!("at most {most} in one request"),
            positions.len(),
        )
    }

    /// Checks a request for one MoE block.
    pub(crate) fn check_moe_layer(&self, request: &MoeLayerRequest) -> Result<(), EngineError> {
        if !self.moe_layers.contains(&request.layer) {
            let layers: Vec<String> = self.moe_layers.iter().map(LayerId::to_string).collect();
            let wanted = format!("a layer with experts, one of [{}]", layers.join(", "));
            return Err(invalid("layer", wanted, request.layer));
        }
        let (rows, columns) = request.hidden_states.dim();
        require(rows > 0, "hidden_states", "at least one row", rows)?;
        require(
            columns == self.hidden,
            "hidden_states",
            &format!("{} columns", self.hidden),
            columns,
        )
    }

    fn check_ids(&self, field: &'static str, ids: &[u32]) -> Result<(), EngineError> {
        match ids.iter().position(|&id| id as usize >= self.vocab_size) {
            Some(at) => {
                let wanted = format!("ids below {}, the size of the vocabulary", self.vocab_size);
                Err(invalid(field, wanted, format!("{} at position {at}", ids[at])))
            }
            None => Ok(()),
        }
    }
}

fn check_sampling(sampling: &SamplingParams) -> Result<(), EngineError> {
    let SamplingParams {
        temperature,
        top_p,
        min_p,
        repetition_penalty,
        top_k: _,
        seed: _,
    } = *sampling;
    require(
        temperature.is_finite() && temperature >= 0.0,
        "temperature",
        "a finite number, 0 or above",
        temperature,
    )?;
    require(top_p > 0.0 && top_p <= 1.0, "top_p", "above 0, at most 1", top_p)?;
    require((0.0..=1.0).contains(&min_p), "min_p", "0 to 1", min_p)?;
    let positive = repetition_penalty.is_finite() && repetition_penalty > 0.0;
    require(
        positive,
        "repetition_penalty",
        "a finite number above 0",
        repetition_penalty,
    )
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    fn limits(max_context: usize, num_pages: u32) -> Limits {
        Limits {
            vocab_size: 50,
            hidden: 8,
            moe_layers: vec![LayerId(1), LayerId(3)],
            max_context,
            num_pages,
            max_queue: 4,
        }
    }

    fn request(prompt_tokens: usize, max_tokens: usize) -> GenerateRequest {
        GenerateRequest {
            prompt_ids: vec![3; prompt_tokens],
            max_tokens,
            stop_token_ids: Vec::new(),
            sampling: SamplingParams {
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                repetition_penalty: 1.0,
                seed: 0,
            },
            logprobs: None,
        }
    }

    /// The field that `check_generate` complains about after `change`.
    fn refused(change: impl Fn(&mut GenerateRequest)) -> &'static str {
        let mut request = request(4, 4);
        change(&mut request);
        match limits(100, 100).check_generate(&mut request) {
            Err(EngineError::Invalid { field, .. }) => field,
            other => panic!("wanted a refusal, found {other:?}"),
        }
    }

    #[test]
    fn a_field_out_of_range_is_named() {
        assert_eq!(refused(|r| r.prompt_ids.clear()), "prompt_ids");
        assert_eq!(refused(|r| r.prompt_ids[2] = 50), "prompt_ids");
        assert_eq!(refused(|r| r.max_tokens = 0), "max_tokens");
        assert_eq!(refused(|r| r.logprobs = Some(MAX_LOGPROBS + 1)), "logprobs");
        for value in [-0.1, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(|r| r.sampling.temperature = value), "temperature");
        }
        for value in [0.0, 1.01, f32::NAN] {
            assert_eq!(refused(|r| r.sampling.top_p = value), "top_p");
        }
        for value in [-0.1, 1.01, f32::NAN] {
            assert_eq!(refused(|r| r.sampling.min_p = value), "min_p");
        }
        for value in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(|r| r.sampling.repetition_penalty = value), "repetition_penalty");
        }
        let mut fine = request(4, 4);
        limits(100, 100)
            .check_generate(&mut fine)
            .expect("a plain request is accepted");
    }

    #[test]
    fn max_tokens_is_lowered_to_what_context_and_cache_leave() {
        let capped = |max_context, num_pages| {
            let mut request = request(20, usize::MAX);
            limits(max_context, num_pages)
                .check_generate(&mut request)
                .map(|()| request.max_tokens)
        };
        assert_eq!(capped(30, 100).expect("fits"), 10);
        assert_eq!(capped(21, 100).expect("fits"), 1);
        assert_eq!(capped(1000, 2).expect("fits"), 2 * KV_PAGE_TOKENS + 1 - 20);
    }

    #[test]
    fn a_prompt_that_can_never_fit_is_refused_with_both_numbers() {
        for (max_context, num_pages, longest) in [(20, 100, 20), (1000, 1, KV_PAGE_TOKENS + 1)] {
            match limits(max_context, num_pages).check_generate(&mut request(20, 1)) {
                Err(EngineError::PromptTooLong {
                    prompt_tokens: 20,
                    max_context,
                }) => assert_eq!(max_context, longest),
                other => panic!("wanted a refusal, found {other:?}"),
            }
        }
        // Logits need no room for output.
        let forward = |tokens| ForwardRequest {
            token_ids: vec![0; tokens],
            positions: vec![0],
        };
        limits(20, 100).check_forward(&forward(20)).expect("fits");
        assert!(matches!(
            limits(20, 100).check_forward(&forward(21)),
            Err(EngineError::PromptTooLong { .. })
        ));
        assert!(matches!(
            limits(99, 1).check_forward(&forward(17)),
            Err(EngineError::PromptTooLong { .. })
        ));
    }

    #[test]
    fn positions_are_ascending_and_in_range() {
        let check = |positions| {
            limits(99, 9).check_forward(&ForwardRequest {
                token_ids: vec![1, 2, 3],
                positions,
            })
        };
        check(vec![0, 2]).expect("fine");
        for positions in [vec![], vec![1, 1], vec![2, 0], vec![3]] {
            let found = check(positions.clone());
            assert!(
                matches!(found, Err(EngineError::Invalid { field: "positions", .. })),
                "{positions:?}: {found:?}"
            );
        }
        let huge_vocab = Limits {
            vocab_size: MAX_LOGITS_BYTES / 8,
            ..limits(99, 9)
        };
        let found = huge_vocab.check_forward(&ForwardRequest {
            token_ids: vec![1, 2, 3],
            positions: vec![0, 1, 2],
        });
        assert!(
            matches!(found, Err(EngineError::Invalid { field: "positions", .. })),
            "{found:?}"
        );
    }

    #[test]
    fn a_layer_without_experts_is_refused_naming_those_that_have() {
        let check = |layer, rows, columns| {
            let request = MoeLayerRequest {
                layer: LayerId(layer),
                hidden_states: Array2::zeros((rows, columns)),
            };
            limits(99, 9)
                .check_moe_layer(&request)
                .map_err(|error| error.to_string())
        };
        check(3, 2, 8).expect("fine");
        assert_eq!(
            check(2, 2, 8),
            Err("layer: wanted a layer with experts, one of [1, 3], found 2".into())
        );
        assert_eq!(check(3, 2, 9), Err("hidden_states: wanted 8 columns, found 9".into()));
        assert!(check(3, 0, 8).is_err());
    }
}
