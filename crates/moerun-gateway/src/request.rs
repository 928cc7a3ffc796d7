//! What a client asks for, and how it becomes a request to the engine.

use moerun_engine::{FinishReason, GenerateRequest, SamplingParams};
use moerun_types::ModelConfig;
use moerun_weights::GenerationConfig;

use crate::{ChatMessage, GatewayError};

/// Tokens generated if neither the request nor the checkpoint names a number.
const DEFAULT_MAX_TOKENS: usize = 256;

/// Most likeliest tokens that are reported with each token.
const MAX_LOGPROBS: usize = 20;

/// Most stop ids of a request, besides the model's own.
const MAX_STOP_TOKEN_IDS: usize = 64;

/// A prompt and how to continue it. What is not set takes the defaults of the checkpoint's `generation_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct TextRequest {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens to generate, at least 1.
    pub max_tokens: Option<usize>,
    /// How the next token is chosen.
    pub sampling: SamplingOverrides,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Ids that end the text besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// The model's own end-of-sequence ids do not end the text.
    pub ignore_eos: bool,
    /// Report the log-probabilities of this many likeliest tokens with each token (0 = of the token itself).
    pub logprobs: Option<usize>,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids, taken as they are.
    TokenIds(Vec<u32>),
    /// A conversation, rendered by the model's chat template with the assistant's turn opened.
    Chat(Vec<ChatMessage>),
}

/// How the next token is chosen, as far as the client says.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SamplingOverrides {
    /// 0 = greedy.
    pub temperature: Option<f32>,
    /// Keep the k likeliest tokens; 0 = all.
    pub top_k: Option<u32>,
    /// Keep the likeliest tokens whose probabilities reach p; 1 = all.
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the best; 0 = all.
    pub min_p: Option<f32>,
    /// Divides (multiplies, if negative) logits of tokens already seen; 1 = off.
    pub repetition_penalty: Option<f32>,
    /// Random numbers are a function of (seed, position); 0 if not set, so that one request gives one text.
    pub seed: Option<u64>,
}

/// A step of the answer: the next token, the text that it completes, and at the end the reason.
#[derive(Debug, Clone, PartialEq)]
pub struct TextEvent {
    /// The token; the last one may be the stop id that ended the text.
    pub token_id: u32,
    /// Text that it completes; empty while a character is not whole or a stop string may be beginning.
    pub text: String,
    /// The token's own log-probability, if asked for.
    pub logprob: Option<TokenLogprob>,
    /// The likeliest tokens here, descending; as many as were asked for.
    pub top_logprobs: Vec<TokenLogprob>,
    /// Whether an expert was left out for this answer, here or before. Once set it stays.
    pub degraded: bool,
    /// Set on the last event.
    pub finish: Option<Finish>,
}

/// A token's log-probability under the model, before temperature and cuts.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// Token.
    pub id: u32,
    /// Its text where it follows others; U+FFFD where it is no whole character.
    pub text: String,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// How a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated, the one that ended the text included.
    pub completion_tokens: usize,
    /// Leading tokens of the prompt that were not computed again.
    pub cached_tokens: usize,
}

/// What a checkpoint says about requests that do not say it themselves.
#[derive(Debug, Clone)]
pub(crate) struct Defaults {
    generation: GenerationConfig,
    eos_token_ids: Vec<u32>,
    vocab_size: usize,
    max_context: usize,
    max_answer_tokens: usize,
}

impl TextRequest {
    /// Continues `prompt` with the model's defaults.
    pub fn new(prompt: Prompt) -> Self {
        TextRequest {
            prompt,
            max_tokens: None,
            sampling: SamplingOverrides::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
        }
    }
}

impl Defaults {
    pub(crate) fn new(
        config: &ModelConfig,
        generation: GenerationConfig,
        max_context: usize,
        max_answer_tokens: Option<usize>,
    ) -> Self {
        let eos = if generation.eos_token_ids.is_empty() {
            &config.eos_token_ids
        } else {
            &generation.eos_token_ids
        };
        Defaults {
            eos_token_ids: eos.clone(),
            vocab_size: config.vocab_size,
            max_context,
            max_answer_tokens: max_answer_tokens.unwrap_or(usize::MAX),
            generation,
        }
    }

    /// Checks everything but the prompt, whose tokens come later.
    pub(crate) fn check(&self, request: &TextRequest) -> Result<(), GatewayError> {
        request.sampling.check()?;
        if request.max_tokens == Some(0) {
            return Err(GatewayError::invalid("max_tokens", "at least 1", 0));
        }
        if let Some(found) = request.max_tokens.filter(|&found| found > self.max_answer_tokens) {
            let wanted = format!("at most {}", self.max_answer_tokens);
            return Err(GatewayError::invalid("max_tokens", wanted, found));
        }
        if let Some(logprobs) = request.logprobs.filter(|&count| count > MAX_LOGPROBS) {
            return Err(GatewayError::invalid(
                "logprobs",
                format!("at most {MAX_LOGPROBS}"),
                logprobs,
            ));
        }
        if request.stop_token_ids.len() > MAX_STOP_TOKEN_IDS {
            let found = request.stop_token_ids.len();
            return Err(GatewayError::invalid(
                "stop_token_ids",
                format!("at most {MAX_STOP_TOKEN_IDS} ids"),
                found,
            ));
        }
        self.check_ids("stop_token_ids", &request.stop_token_ids)
    }

    /// Ids of a prompt must be there and belong to the vocabulary, and leave room for `room` more.
    pub(crate) fn check_prompt(&self, field: &'static str, ids: &[u32], room: usize) -> Result<(), GatewayError> {
        if ids.is_empty() {
            return Err(GatewayError::invalid(field, "at least one token", "none"));
        }
        if ids.len() + room > self.max_context {
            return Err(GatewayError::PromptTooLong {
                prompt_tokens: ids.len(),
                max_context: self.max_context,
            });
        }
        self.check_ids(field, ids)
    }

    pub(crate) fn check_ids(&self, field: &'static str, ids: &[u32]) -> Result<(), GatewayError> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(GatewayError::invalid(
                field,
                format!("ids below {}", self.vocab_size),
                id,
            )),
        }
    }

    /// The request as the engine takes it; `prompt_ids` and the request have been checked.
    pub(crate) fn complete(&self, request: &TextRequest, prompt_ids: Vec<u32>) -> GenerateRequest {
        let wanted = request
            .max_tokens
            .or(self.generation.max_new_tokens.filter(|&n| n > 0).map(|n| n as usize));
        let room = self.max_context - prompt_ids.len();
        let own: &[u32] = if request.ignore_eos { &[] } else { &self.eos_token_ids };
        GenerateRequest {
            max_tokens: wanted
                .unwrap_or(DEFAULT_MAX_TOKENS)
                .min(room)
                .min(self.max_answer_tokens),
            stop_token_ids: own.iter().chain(&request.stop_token_ids).copied().collect(),
            sampling: self.sampling(&request.sampling),
            logprobs: request.logprobs,
            prompt_ids,
        }
    }

    fn sampling(&self, wanted: &SamplingOverrides) -> SamplingParams {
        let default_temperature = if self.generation.do_sample {
            self.generation.temperature.unwrap_or(1.0)
        } else {
            0.0
        };
        SamplingParams {
            temperature: wanted.temperature.unwrap_or(default_temperature),
            top_k: wanted.top_k.or(self.generation.top_k).unwrap_or(0),
            top_p: wanted.top_p.or(self.generation.top_p).unwrap_or(1.0),
            min_p: wanted.min_p.or(self.generation.min_p).unwrap_or(0.0),
            repetition_penalty: wanted
                .repetition_penalty
                .or(self.generation.repetition_penalty)
                .unwrap_or(1.0),
            seed: wanted.seed.unwrap_or(0),
        }
    }
}

impl SamplingOverrides {
    fn check(&self) -> Result<(), GatewayError> {
        let checked = |field, value: Option<f32>, wanted: &str, holds: fn(f32) -> bool| match value {
            Some(value) if !holds(value) => Err(GatewayError::invalid(field, wanted, value)),
            _ => Ok(()),
        };
        checked(
            "sampling.temperature",
            self.temperature,
            "a finite number of at least 0",
            |t| t.is_finite() && t >= 0.0,
        )?;
        checked("sampling.top_p", self.top_p, "more than 0, at most 1", |p| {
            p > 0.0 && p <= 1.0
        })?;
        checked("sampling.min_p", self.min_p, "at least 0, at most 1", |p| {
            (0.0..=1.0).contains(&p)
        })?;
        checked(
            "sampling.repetition_penalty",
            self.repetition_penalty,
            "a finite number above 0",
            |r| r.is_finite() && r > 0.0,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaults(generation: GenerationConfig) -> Defaults {
        Defaults {
            generation,
            eos_token_ids: vec![2],
            vocab_size: 100,
            max_context: 50,
            max_answer_tokens: 40,
        }
    }

    fn request(change: impl FnOnce(&mut TextRequest)) -> TextRequest {
        let mut request = TextRequest::new(Prompt::TokenIds(vec![1]));
        change(&mut request);
        request
    }

    #[test]
    fn without_do_sample_the_default_is_greedy() {
        let generation = GenerationConfig {
            temperature: Some(0.7),
            top_k: Some(5),
            ..GenerationConfig::default()
        };
        let complete = defaults(generation).complete(&request(|_| ()), vec![1]);
        assert_eq!(complete.sampling.temperature, 0.0);
        assert_eq!((complete.sampling.top_k, complete.sampling.seed), (5, 0));
    }

    #[test]
    fn the_checkpoints_values_hold_unless_the_request_says_otherwise() {
        let generation = GenerationConfig {
            do_sample: true,
            temperature: Some(0.7),
            top_p: Some(0.9),
            repetition_penalty: Some(1.1),
            max_new_tokens: Some(8),
            ..GenerationConfig::default()
        };
        let defaults = defaults(generation);
        let plain = defaults.complete(&request(|_| ()), vec![1]);
        let expected = SamplingParams {
            temperature: 0.7,
            top_k: 0,
            top_p: 0.9,
            min_p: 0.0,
            repetition_penalty: 1.1,
            seed: 0,
        };
        assert_eq!(
            (plain.sampling, plain.max_tokens, plain.stop_token_ids),
            (expected, 8, vec![2])
        );

        let explicit = defaults.complete(
            &request(|r| {
                r.sampling = SamplingOverrides {
                    temperature: Some(0.0),
                    seed: Some(7),
                    ..SamplingOverrides::default()
                };
                r.max_tokens = Some(3);
                r.stop_token_ids = vec![9];
                r.ignore_eos = true;
            }),
            vec![1],
        );
        assert_eq!(
            (
                explicit.sampling.temperature,
                explicit.sampling.top_p,
                explicit.sampling.seed
            ),
            (0.0, 0.9, 7)
        );
        assert_eq!((explicit.max_tokens, explicit.stop_token_ids), (3, vec![9]));
    }

    #[test]
    fn sampling_without_a_temperature_is_at_1() {
        let generation = GenerationConfig {
            do_sample: true,
            ..GenerationConfig::default()
        };
        assert_eq!(
            defaults(generation)
                .complete(&request(|_| ()), vec![1])
                .sampling
                .temperature,
            1.0
        );
    }

    #[test]
    fn max_tokens_is_cut_to_the_context_and_the_prompt_never_is() {
        let defaults = defaults(GenerationConfig::default());
        assert_eq!(defaults.complete(&request(|_| ()), vec![1; 10]).max_tokens, 40);
        assert!(defaults.check_prompt("token_ids", &[1; 49], 1).is_ok());
        let error = defaults.check_prompt("token_ids", &[1; 50], 1).unwrap_err();
        assert!(
            matches!(
                error,
                GatewayError::PromptTooLong {
                    prompt_tokens: 50,
                    max_context: 50
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn values_out_of_range_name_their_field() {
        type Change = fn(&mut TextRequest);
        let cases: [(&str, Change); 12] = [
            ("sampling.temperature", |r| r.sampling.temperature = Some(-0.1)),
            ("sampling.temperature", |r| r.sampling.temperature = Some(f32::NAN)),
            ("sampling.temperature", |r| r.sampling.temperature = Some(f32::INFINITY)),
            ("sampling.top_p", |r| r.sampling.top_p = Some(0.0)),
            ("sampling.top_p", |r| r.sampling.top_p = Some(1.5)),
            ("sampling.min_p", |r| r.sampling.min_p = Some(f32::NAN)),
            ("sampling.repetition_penalty", |r| {
                r.sampling.repetition_penalty = Some(0.0)
            }),
            ("max_tokens", |r| r.max_tokens = Some(0)),
            ("logprobs", |r| r.logprobs = Some(21)),
            ("stop_token_ids", |r| r.stop_token_ids = vec![100]),
            ("stop_token_ids", |r| r.stop_token_ids = vec![1; 65]),
            ("sampling.min_p", |r| r.sampling.min_p = Some(-1.0)),
        ];
        let defaults = defaults(GenerationConfig::default());
        for (wanted, change) in cases {
            let error = defaults.check(&request(change)).unwrap_err();
            assert!(
                matches!(&error, GatewayError::Invalid { field, .. } if *field == wanted),
                "{wanted}: {error}"
            );
        }
        assert!(defaults.check(&request(|r| r.logprobs = Some(20))).is_ok());
        assert!(matches!(
            defaults.check_prompt("text", &[], 1),
            Err(GatewayError::Invalid { field: "text", .. })
        ));
        assert!(matches!(
            defaults.check_prompt("token_ids", &[100], 1),
            Err(GatewayError::Invalid { .. })
        ));
    }
}
