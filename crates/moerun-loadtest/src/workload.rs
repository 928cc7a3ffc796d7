//! What is asked.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

/// A prompt and how far to continue it, greedily and past the model's own end: whoever asks it gets the same tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Tokens asked for.
    pub max_tokens: u32,
}

/// Requests and their times.
#[derive(Debug, Clone)]
pub struct Workload {
    /// What is asked; at least one.
    pub cases: Vec<Case>,
    /// When, from the start of the run, ascending, and which case.
    pub sends: Vec<(Duration, usize)>,
    /// How long a request may take.
    pub deadline: Duration,
    /// Most requests under way: one more is noted as not sent, since a client has a memory too.
    pub max_outstanding: usize,
}

impl Case {
    /// `count` cases of random tokens below `vocab_size`, prompts of 2 to `max_prompt` tokens; the same for the same seed.
    pub fn random(count: usize, vocab_size: u32, max_prompt: usize, max_tokens: u32, seed: u64) -> Vec<Case> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..count)
            .map(|_| Case {
                prompt: (0..rng.random_range(2..=max_prompt.max(2)))
                    .map(|_| rng.random_range(0..vocab_size.max(1)))
                    .collect(),
                max_tokens,
            })
            .collect()
    }
}
