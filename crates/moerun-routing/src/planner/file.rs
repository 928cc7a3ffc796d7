//! The plan file: JSON that people read, gateways follow and `moerun worker --experts` takes piece by piece.

use std::collections::{BTreeMap, BTreeSet};

use moerun_types::{BlockRange, ExpertId, ExpertSlice, LayerId, ModelConfig, Numerics};
use serde::{Deserialize, Serialize};

use super::{PlacementPlan, PlanRequest, PlannerError, WorkerSpec};
use crate::{ShardItem, ShardSpec, slices::merge_slices};

/// Version of the JSON that [`PlanFile::from_json`] reads.
const VERSION: u64 = 1;

/// What a plan was made for: a gateway follows no other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanIdentity {
    /// Hash of the parsed config.
    pub config_hash: String,
    /// [`Numerics::id`]: blocks are counted by it.
    pub numerics: String,
}

/// A plan as it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    version: u64,
    /// Counts the plans of a cluster: the higher is the newer.
    pub epoch: u64,
    /// What it is for.
    pub model: PlanIdentity,
    /// How experts are cut, as [`Layout`](super::Layout) is written.
    pub layout: String,
    /// Holders of every block of every expert.
    pub replicas: usize,
    /// Predicted balance before any death.
    pub balance: f64,
    /// … and after the worst; absent with one worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_after_worst_death: Option<f64>,
    /// Who holds what.
    pub workers: Vec<PlannedWorker>,
}

/// One worker of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedWorker {
    /// Its name.
    pub name: String,
    /// Bytes that experts may take.
    pub memory_bytes: u64,
    /// Bytes that it reads per second.
    pub bandwidth: f64,
    /// Seconds of an empty round trip.
    pub round_trip_seconds: f64,
    /// What it fails together with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// What it holds, as `moerun worker --experts` takes it; empty for nothing.
    pub experts: String,
}

impl PlanFile {
    /// The file of a plan.
    pub fn new(epoch: u64, model: PlanIdentity, request: &PlanRequest, plan: &PlacementPlan) -> Self {
        let extent = Extent {
            moe_layers: &request.moe_layers,
            num_experts: request.num_experts,
            num_blocks: request.size.num_blocks(),
        };
        let worker = |(worker, held): (&WorkerSpec, &Vec<ExpertSlice>)| PlannedWorker {
            name: worker.name.clone(),
            memory_bytes: worker.memory_bytes,
            bandwidth: worker.bandwidth,
            round_trip_seconds: worker.round_trip_seconds,
            domain: worker.domain.clone(),
            experts: extent.experts(held),
        };
        Self {
            version: VERSION,
            epoch,
            model,
            layout: plan.layout.to_string(),
            replicas: request.replicas,
            balance: rounded(plan.prediction.balance),
            balance_after_worst_death: plan.prediction.after_worst_death.map(|death| rounded(death.balance)),
            workers: request.workers.iter().zip(&plan.held).map(worker).collect(),
        }
    }

    /// Reads a plan. Errors: other JSON, another version, two workers of one name.
    pub fn from_json(text: &str) -> Result<Self, PlannerError> {
        let syntax = |error: serde_json::Error| PlannerError::PlanSyntax {
            reason: error.to_string(),
        };
        let value: serde_json::Value = serde_json::from_str(text).map_err(syntax)?;
        // Before the fields: another version may have others.
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(VERSION) => {}
            Some(version) => {
                return Err(PlannerError::PlanMismatch {
                    what: "version",
                    wanted: VERSION.to_string(),
                    found: version.to_string(),
                });
            }
            None => {
                return Err(PlannerError::PlanSyntax {
                    reason: "wanted an object with a version".to_owned(),
                });
            }
        }
        let plan: PlanFile = serde_json::from_value(value).map_err(syntax)?;
        let mut names = BTreeSet::new();
        match plan.workers.iter().find(|worker| !names.insert(&worker.name)) {
            Some(worker) => Err(PlannerError::DuplicateWorker {
                name: worker.name.clone(),
            }),
            None => Ok(plan),
        }
    }

    /// As JSON, for people too.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("strings and finite numbers");
        text.push('\n');
        text
    }

    /// What each worker holds, by name, if the plan is for this model and numerics and leaves no block out.
    pub fn resolve(
        &self,
        model: &PlanIdentity,
        config: &ModelConfig,
        numerics: &Numerics,
    ) -> Result<Vec<(String, Vec<ExpertSlice>)>, PlannerError> {
        for (what, wanted, found) in [
            ("config hash", &model.config_hash, &self.model.config_hash),
            ("numerics", &model.numerics, &self.model.numerics),
        ] {
            if wanted != found {
                return Err(PlannerError::PlanMismatch {
                    what,
                    wanted: wanted.clone(),
                    found: found.clone(),
                });
            }
        }
        let held = self
            .workers
            .iter()
            .map(|worker| {
                let slices = match worker.experts.as_str() {
                    "" => Ok(Vec::new()),
                    text => ShardSpec::parse_experts(text).and_then(|spec| spec.resolve(config, numerics)),
                };
                let slices = slices.map_err(|error| PlannerError::PlanExperts {
                    worker: worker.name.clone(),
                    error,
                })?;
                Ok((worker.name.clone(), slices))
            })
            .collect::<Result<Vec<_>, _>>()?;
        check_covered(config, numerics, &held)?;
        Ok(held)
    }
}

/// Slices (sorted, merged) as `moerun worker --experts` takes them; empty for nothing.
pub fn expert_list(held: &[ExpertSlice], config: &ModelConfig, numerics: &Numerics) -> String {
    let num_blocks = config
        .moe
        .as_ref()
        .map_or(0, |moe| numerics.num_blocks(moe.intermediate));
    let extent = Extent {
        moe_layers: &config.moe_layers(),
        num_experts: config.moe.as_ref().map_or(0, |moe| moe.num_experts),
        num_blocks: u16::try_from(num_blocks).unwrap_or(u16::MAX),
    };
    extent.experts(held)
}

/// As many digits as a prediction has.
fn rounded(balance: f64) -> f64 {
    (balance * 1e4).round() / 1e4
}

fn check_covered(
    config: &ModelConfig,
    numerics: &Numerics,
    held: &[(String, Vec<ExpertSlice>)],
) -> Result<(), PlannerError> {
    let covered = merge_slices(held.iter().flat_map(|(_, slices)| slices.clone()).collect());
    let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
    let num_blocks = config
        .moe
        .as_ref()
        .map_or(0, |moe| numerics.num_blocks(moe.intermediate));
    let mut at = covered.iter().peekable();
    for layer in config.moe_layers() {
        for expert in (0..num_experts).map(|expert| ExpertId(expert as u16)) {
            let mut next = 0;
            while let Some(slice) = at.next_if(|slice| (slice.layer, slice.expert) == (layer, expert)) {
                if slice.blocks.first > next {
                    return Err(uncovered(layer, expert, next, slice.blocks.first));
                }
                next = slice.blocks.end;
            }
            if usize::from(next) < num_blocks {
                return Err(uncovered(layer, expert, next, num_blocks as u16));
            }
        }
    }
    Ok(())
}

fn uncovered(layer: LayerId, expert: ExpertId, first: u16, end: u16) -> PlannerError {
    PlannerError::PlanUncovered {
        missing: ExpertSlice {
            layer,
            expert,
            blocks: BlockRange { first, end },
        },
    }
}

/// What the model has, to say "all".
struct Extent<'a> {
    moe_layers: &'a [LayerId],
    num_experts: usize,
    num_blocks: u16,
}

impl Extent<'_> {
    /// Slices (sorted, merged) as an expert list: neighbouring experts with the same blocks are one item, and so are
    /// neighbouring layers with the same item.
    fn experts(&self, held: &[ExpertSlice]) -> String {
        let mut layers_of: BTreeMap<(u16, u16, BlockRange), Vec<usize>> = BTreeMap::new();
        for (index, &layer) in self.moe_layers.iter().enumerate() {
            let start = held.partition_point(|slice| slice.layer < layer);
            let end = held.partition_point(|slice| slice.layer <= layer);
            for item in runs_of_experts(&held[start..end]) {
                layers_of.entry(item).or_default().push(index);
            }
        }
        let mut items: Vec<(usize, u16, ShardItem)> = Vec::new();
        for ((first, last, blocks), layers) in layers_of {
            for run in layers.chunk_by(|a, b| a + 1 == *b) {
                let (from, to) = (run[0], run[run.len() - 1]);
                items.push((from, first, self.item((from, to), (first, last), blocks)));
            }
        }
        items.sort_by_key(|(layer, expert, item)| (*layer, *expert, item.blocks));
        let items: Vec<ShardItem> = items.into_iter().map(|(_, _, item)| item).collect();
        match items.is_empty() {
            true => String::new(),
            false => ShardSpec::List(items).to_string(),
        }
    }

    fn item(&self, (from, to): (usize, usize), (first, last): (u16, u16), blocks: BlockRange) -> ShardItem {
        let all_layers = from == 0 && to + 1 == self.moe_layers.len();
        let all_experts = first == 0 && usize::from(last) + 1 == self.num_experts;
        let all_blocks = blocks.first == 0 && blocks.end == self.num_blocks;
        let layer = |index: usize| self.moe_layers[index].0 as usize;
        ShardItem {
            layers: (!all_layers).then(|| (layer(from), layer(to))),
            experts: (!all_experts).then_some((usize::from(first), usize::from(last))),
            blocks: (!all_blocks).then(|| (usize::from(blocks.first), usize::from(blocks.end) - 1)),
        }
    }
}

/// `(first, last, blocks)` of neighbouring experts of which the same blocks are held.
fn runs_of_experts(held: &[ExpertSlice]) -> Vec<(u16, u16, BlockRange)> {
    let mut open: BTreeMap<BlockRange, (u16, u16)> = BTreeMap::new();
    let mut runs = Vec::new();
    for slice in held {
        let expert = slice.expert.0;
        match open.get_mut(&slice.blocks) {
            Some((_, last)) if *last + 1 == expert => *last = expert,
            Some(run) => {
                runs.push((run.0, run.1, slice.blocks));
                *run = (expert, expert);
            }
            None => _ = open.insert(slice.blocks, (expert, expert)),
        }
    }
    runs.extend(open.into_iter().map(|(blocks, (first, last))| (first, last, blocks)));
    runs
}
