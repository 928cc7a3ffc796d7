//! A plan for people, and as JSON.

use std::{fmt, path::Path};

use moerun_routing::planner::{Death, PlacementPlan, PlanFile, PlanRequest, StepCost};
use moerun_types::{ModelConfig, Numerics, default_combine_block};
use serde_json::{Value, json};

use crate::{commands::table::Table, size::ByteSize};

/// Longest list of experts that is printed: longer ones are in the plan file.
const LONGEST_LIST: usize = 4000;

/// What was planned.
pub(super) struct Report<'a> {
    pub(super) model: &'a Path,
    pub(super) config: &'a ModelConfig,
    pub(super) numerics: &'a Numerics,
    pub(super) request: &'a PlanRequest,
    pub(super) plan: &'a PlacementPlan,
    pub(super) file: &'a PlanFile,
    pub(super) out: Option<&'a Path>,
}

impl Report<'_> {
    pub(super) fn as_json(&self) -> Value {
        let prediction = &self.plan.prediction;
        let death = |death: Option<Death>| {
            death.map(|death| {
                json!({
                    "worker": self.request.workers[death.worker].name,
                    "balance": death.balance,
                    "lost_load": death.lost,
                })
            })
        };
        let layers: Vec<Value> = prediction
            .layers
            .iter()
            .map(|layer| {
                json!({
                    "layer": layer.layer,
                    "balance": layer.balance,
                    "after_worst_death": death(layer.after_worst_death),
                })
            })
            .collect();
        let workers: Vec<Value> = prediction
            .workers
            .iter()
            .zip(&self.request.workers)
            .map(|(worker, spec)| {
                json!({
                    "name": spec.name,
                    "memory_bytes": worker.memory_bytes,
                    "available_bytes": spec.memory_bytes,
                    "pieces": worker.pieces,
                    "load": worker.load,
                    "moved_bytes": worker.moved_bytes,
                })
            })
            .collect();
        let considered: Vec<Value> = self
            .plan
            .considered
            .iter()
            .map(|(layout, cost)| json!({"layout": layout.to_string(), "cost": cost_as_json(cost)}))
            .collect();
        json!({
            "plan": self.file,
            "balance": prediction.balance,
            "after_worst_death": death(prediction.after_worst_death),
            "layers": layers,
            "workers": workers,
            "cost": cost_as_json(&prediction.cost),
            "moved_bytes": prediction.moved_bytes,
            "considered": considered,
        })
    }

    fn summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = self.request;
        let whole = request.size.bytes(usize::from(request.size.num_blocks()));
        writeln!(
            f,
            "experts   {} in each of {} layers, {} each in {}, {} combine blocks of {}",
            request.num_experts,
            request.moe_layers.len(),
            ByteSize(whole),
            self.numerics.format,
            request.size.num_blocks(),
            self.numerics.combine_block,
        )?;
        let extra = match request.extra_holders {
            0 => String::new(),
            extra => format!(", {extra} more in each layer for the busiest"),
        };
        let holders = if request.replicas == 1 { "holder" } else { "holders" };
        writeln!(
            f,
            "layout    {}, {} {holders} each{extra}",
            self.plan.layout, request.replicas
        )?;
        self.balance(f)?;
        let prediction = &self.plan.prediction;
        writeln!(
            f,
            "a token   goes to {:.2} workers a layer; a step of {} rows reads {:.1} experts a layer",
            prediction.cost.workers_per_token, request.cost.batch_tokens, prediction.cost.distinct_experts
        )?;
        let from = if request.present.is_empty() {
            "nothing"
        } else {
            "the present plan"
        };
        writeln!(
            f,
            "to fetch  {}, starting from {from}",
            ByteSize(prediction.moved_bytes)
        )
    }

    /// Mean over max, in all and of the worst layer.
    fn balance(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prediction = &self.plan.prediction;
        let worst = prediction.layers.iter().min_by(|a, b| a.balance.total_cmp(&b.balance));
        write!(
            f,
            "balance   {:.3} (mean over max of the workers' loads)",
            prediction.balance
        )?;
        if let Some(worst) = worst {
            write!(f, "; worst layer {}: {:.3}", worst.layer, worst.balance)?;
        }
        writeln!(f)?;
        let Some(death) = prediction.after_worst_death else {
            return Ok(());
        };
        write!(
            f,
            "          {:.3} after the worst death, that of {}",
            death.balance, self.request.workers[death.worker].name
        )?;
        let deaths = prediction
            .layers
            .iter()
            .filter_map(|layer| Some((layer.layer, layer.after_worst_death?)));
        if let Some((layer, worst)) = deaths.min_by(|a, b| a.1.balance.total_cmp(&b.1.balance)) {
            let name = &self.request.workers[worst.worker].name;
            write!(f, "; worst layer {layer}: {:.3} without {name}", worst.balance)?;
        }
        writeln!(f)?;
        if death.lost > 0.0 {
            writeln!(
                f,
                "          {:.1} % of the work then has no holder: the gateway computes it, slower, or fails it",
                100.0 * death.lost
            )?;
        }
        Ok(())
    }

    fn workers(&self) -> Table {
        let mut table = Table::new(&["worker", "domain", "memory", "of", "pieces", "load", "to fetch"]);
        for (worker, spec) in self.plan.prediction.workers.iter().zip(&self.request.workers) {
            table.row(vec![
                spec.name.clone(),
                spec.domain.clone().unwrap_or_else(|| "-".to_owned()),
                ByteSize(worker.memory_bytes).to_string(),
                ByteSize(spec.memory_bytes).to_string(),
                worker.pieces.to_string(),
                format!("{:.1} %", 100.0 * worker.load),
                ByteSize(worker.moved_bytes).to_string(),
            ]);
        }
        table
    }

    /// Predicted microseconds of one layer of a step, for each layout that fits.
    fn costs(&self) -> Table {
        let mut table = Table::new(&[
            "layout",
            "µs a layer",
            "reading",
            "computing",
            "hops",
            "workers a token",
        ]);
        for (layout, cost) in &self.plan.considered {
            let chosen = if *layout == self.plan.layout { " *" } else { "" };
            let micros = |seconds: f64| format!("{:.1}", seconds * 1e6);
            table.row(vec![
                format!("{layout}{chosen}"),
                micros(cost.seconds),
                micros(cost.read_seconds),
                micros(cost.compute_seconds),
                micros(cost.hop_seconds),
                format!("{:.2}", cost.workers_per_token),
            ]);
        }
        table
    }

    fn commands(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numerics = self.numerics;
        let intermediate = self.config.moe.as_ref().map_or(0, |moe| moe.intermediate);
        let mut settings = format!("--weights {}", numerics.format);
        if numerics.combine != moerun_types::CombineMode::Exact {
            settings.push_str(&format!(" --combine {}", numerics.combine));
        }
        if numerics.combine_block != default_combine_block(intermediate) {
            settings.push_str(&format!(" --combine-block {}", numerics.combine_block));
        }
        for worker in &self.file.workers {
            match worker.experts.as_str() {
                "" => writeln!(f, "# {}: nothing to hold", worker.name)?,
                experts if experts.len() > LONGEST_LIST => {
                    let place = self.out.map_or_else(
                        || "write the plan with --out to have it".to_owned(),
                        |out| format!("it is in {}", out.display()),
                    );
                    writeln!(f, "# {}: a list of {} characters; {place}", worker.name, experts.len())?;
                }
                experts => {
                    let model = self.model.display();
                    writeln!(
                        f,
                        "# {}\nmoerun worker --model {model} {settings} --experts {experts}",
                        worker.name
                    )?;
                }
            }
        }
        Ok(())
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary(f)?;
        let cost = self.request.cost;
        write!(f, "\n{}\n{}", self.workers(), self.costs())?;
        let why = if self.request.layout.is_some() {
            "as asked for"
        } else {
            "chosen"
        };
        writeln!(
            f,
            "* {why}; a step of {} rows, {}/s between gateway and workers\n",
            cost.batch_tokens,
            ByteSize(cost.link_bytes_per_second as u64)
        )?;
        self.commands(f)?;
        match self.out {
            Some(out) => writeln!(f, "\nplan of epoch {} written to {}", self.file.epoch, out.display()),
            None => Ok(()),
        }
    }
}

fn cost_as_json(cost: &StepCost) -> Value {
    json!({
        "seconds": cost.seconds,
        "read_seconds": cost.read_seconds,
        "compute_seconds": cost.compute_seconds,
        "hop_seconds": cost.hop_seconds,
        "distinct_experts": cost.distinct_experts,
        "workers_per_token": cost.workers_per_token,
    })
}
