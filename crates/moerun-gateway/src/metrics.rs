//! What a gateway shows to Prometheus of its requests; of its workers, `moerun-dispatch` does.

use std::{fmt, sync::Arc};

use moerun_metrics::{Figures, Kind, Page};

use crate::Gateway;

/// Requests, tokens and the KV cache of a gateway.
#[derive(Debug)]
pub struct GatewayFigures(Arc<Gateway>);

impl GatewayFigures {
    /// Of this gateway.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self(gateway)
    }
}

impl Figures for GatewayFigures {
    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        let (engine, answers) = (self.0.stats(), self.0.answer_stats());
        let draining = f64::from(u8::from(self.0.is_draining()));
        page.figure(Kind::Gauge, "draining", "Whether new requests are refused", draining)?;
        for (name, help, value) in [
            ("requests_running", "Requests with pages in the cache", engine.running),
            (
                "requests_waiting",
                "Requests that wait, preempted ones included",
                engine.waiting,
            ),
        ] {
            page.figure(Kind::Gauge, name, help, value as f64)?;
        }
        let free = engine
            .pages_total
            .saturating_sub(engine.pages_used + engine.pages_cached);
        let pages = [
            ("used", engine.pages_used),
            ("cached", engine.pages_cached),
            ("free", free),
        ];
        page.family(
            Kind::Gauge,
            "kv_pages",
            "Pages of the KV cache: used by requests, kept for requests that begin alike, free",
            pages.map(|(state, count)| ([("state", state)], count as f64)),
        )?;
        let ended = [
            ("finished", answers.finished),
            ("failed", answers.failed),
            ("cancelled", answers.cancelled),
        ];
        page.family(
            Kind::Counter,
            "answers_ended",
            "Answers that ended: with a finish reason, in an error, given up by their client",
            ended.map(|(how, count)| ([("how", how)], count as f64)),
        )?;
        for (name, help, value) in [
            ("answers_begun", "Answers that began", answers.begun),
            (
                "prompt_tokens",
                "Tokens of the prompts of answers that began",
                answers.prompt_tokens,
            ),
            ("generated_tokens", "Tokens of answers", answers.generated_tokens),
            (
                "preemptions",
                "Times that a request had to give its pages to an older one",
                engine.preemptions,
            ),
            (
                "prefix_queried_tokens",
                "Tokens of requests that started, looked up in the prefix cache",
                engine.prefix_queried_tokens,
            ),
            (
                "prefix_hit_tokens",
                "Those of them that were there",
                engine.prefix_hit_tokens,
            ),
            ("drafted_tokens", "Tokens drafted and computed", engine.drafted_tokens),
            (
                "accepted_tokens",
                "Those of them that were the text's next tokens",
                engine.accepted_tokens,
            ),
        ] {
            page.figure(Kind::Counter, name, help, value as f64)?;
        }
        Ok(())
    }
}
