//! The report: a table, or JSON whose form BENCHMARKS.md describes.

use std::fmt;

use moerun_types::NumberFormat;
use serde_json::{Map, Value, json};

use super::{
    super::{machine::Machine, spread::Spread},
    Decode, Run,
    cost::Cost,
};
use crate::commands::table::{Table, share};

/// All that was measured.
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) cost: Cost,
    pub(super) format: NumberFormat,
    pub(super) prompt_tokens: usize,
    pub(super) gen_tokens: usize,
    /// From a request to its first token.
    pub(super) prefill: Vec<Run>,
    pub(super) decodes: Vec<Decode>,
}

impl Report {
    fn prefill_ops(&self) -> u64 {
        self.cost.prompt_ops * self.prompt_tokens as u64 + self.cost.head_ops
    }

    /// Seconds to the first token.
    fn first_token(&self) -> Spread {
        Spread::of(&self.prefill.iter().map(|run| run.seconds).collect::<Vec<_>>())
    }

    /// Tokens per second of the prompt.
    fn prefill_rate(&self) -> Spread {
        let rate = |run: &Run| self.prompt_tokens as f64 / run.seconds;
        Spread::of(&self.prefill.iter().map(rate).collect::<Vec<_>>())
    }

    /// Median of the runs' shares, each of its own limits.
    fn prefill_share(&self) -> Option<f64> {
        let ops = self.prefill_ops() as f64;
        let share = |run: &Run| run.limits.share_of_peak(self.format, ops / run.seconds);
        let shares: Option<Vec<f64>> = self.prefill.iter().map(share).collect();
        Some(Spread::of(&shares?).median)
    }

    /// Median of the runs' shares, each of its own limits.
    fn decode_share(&self, decode: &Decode) -> f64 {
        let bytes = self.cost.decode_bytes(decode) * (decode.batch * self.gen_tokens) as f64;
        let share = |run: &Run| run.limits.share_of_read(bytes / run.seconds);
        Spread::of(&decode.runs.iter().map(share).collect::<Vec<_>>()).median
    }

    pub(super) fn add_to_json(&self, json: &mut Map<String, Value>) {
        json.insert("machine".to_owned(), self.machine.to_json());
        json.insert(
            "prefill".to_owned(),
            json!({
                "prompt_tokens": self.prompt_tokens,
                "time_to_first_token_seconds": self.first_token(),
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

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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
        let Spread { median, min, max } = self.first_token().scaled(1e3);
        writeln!(f, "time to first token: {median:.1} ms ({min:.1} to {max:.1})")?;
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
