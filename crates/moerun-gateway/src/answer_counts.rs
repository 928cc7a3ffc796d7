//! How the answers of a gateway ended, since it started.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counts of answers; each that began is in one of the others once it is over.
#[derive(Debug, Default)]
pub(crate) struct AnswerCounts {
    begun: AtomicU64,
    finished: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    degraded: AtomicU64,
}

/// How the answers of a gateway ended, since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnswerStats {
    /// Answers that began.
    pub begun: u64,
    /// Answers with a finish reason.
    pub finished: u64,
    /// Answers that ended in an error.
    pub failed: u64,
    /// Answers that their client gave up.
    pub cancelled: u64,
    /// Tokens of the prompts of those that began.
    pub prompt_tokens: u64,
    /// Tokens that they have had.
    pub generated_tokens: u64,
    /// Answers for which an expert was left out, whether or not they are over.
    pub degraded: u64,
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AnswerEnd {
    /// With a finish reason.
    Finished,
    /// In an error.
    Failed,
    /// Its client went away.
    Cancelled,
}

impl AnswerCounts {
    pub(crate) fn begin(&self, prompt_tokens: usize) {
        self.begun.fetch_add(1, Relaxed);
        self.prompt_tokens.fetch_add(prompt_tokens as u64, Relaxed);
    }

    pub(crate) fn token(&self) {
        self.generated_tokens.fetch_add(1, Relaxed);
    }

    /// An expert was left out for an answer; told once of each.
    pub(crate) fn degraded(&self) {
        self.degraded.fetch_add(1, Relaxed);
    }

    pub(crate) fn end(&self, how: AnswerEnd) {
        let count = match how {
            AnswerEnd::Finished => &self.finished,
            AnswerEnd::Failed => &self.failed,
            AnswerEnd::Cancelled => &self.cancelled,
        };
        count.fetch_add(1, Relaxed);
    }

    pub(crate) fn now(&self) -> AnswerStats {
        AnswerStats {
            begun: self.begun.load(Relaxed),
            finished: self.finished.load(Relaxed),
            failed: self.failed.load(Relaxed),
            cancelled: self.cancelled.load(Relaxed),
            prompt_tokens: self.prompt_tokens.load(Relaxed),
            generated_tokens: self.generated_tokens.load(Relaxed),
            degraded: self.degraded.load(Relaxed),
        }
    }
}
