//! `moerun inspect`: what a checkpoint is, and what it needs.

mod words;

use std::{
    io::{self, Write},
    path::Path,
};

use moerun_model::KvCache;
use moerun_process::{LogFormat, init_telemetry};
use moerun_types::{KvFormat, NumberFormat, default_combine_block};
use moerun_weights::{Checkpoint, MemoryNeed, Needs, ParameterCounts, WeightsError};
use serde_json::{Value, json};

use self::words::{attention, count, counted, gate};
use crate::{cli::InspectArgs, size::ByteSize};

/// Runs the command.
pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<()> {
    init_telemetry(LogFormat::Text, None, "warn")?;
    let checkpoint = open_any_part(&args.model)?;
    let mut stdout = io::stdout().lock();
    if args.json {
        writeln!(stdout, "{:#}", as_json(&checkpoint))?;
    } else {
        for (name, value) in as_lines(&checkpoint) {
            writeln!(stdout, "{name:<22}{value}")?;
        }
    }
    Ok(())
}

/// Opens a checkpoint of which only the config and the headers are read. Either part may be absent: a gateway's copy and a
/// worker's tell what they are too.
pub(super) fn open_any_part(path: &Path) -> Result<Checkpoint, WeightsError> {
    Checkpoint::open(path, Needs::All).or_else(|error| {
        [Needs::GatewayOnly, Needs::ExpertsOnly]
            .into_iter()
            .find_map(|needs| Checkpoint::open(path, needs).ok())
            .ok_or(error)
    })
}

fn has_all_experts(checkpoint: &Checkpoint) -> bool {
    checkpoint.config().moe.is_none() || checkpoint.expert_header_hash().is_some()
}

fn as_json(checkpoint: &Checkpoint) -> Value {
    let config = checkpoint.config();
    let parameters = ParameterCounts::of(config);
    let memory: serde_json::Map<String, Value> = NumberFormat::ALL
        .into_iter()
        .map(|format| {
            let need = MemoryNeed::of(config, format);
            let need = json!({
                "gateway_bytes": need.gateway_bytes,
                "expert_bytes": need.expert_bytes,
                "all_experts_bytes": need.all_experts_bytes,
            });
            (format.to_string(), need)
        })
        .collect();
    let kv_bytes_per_token: serde_json::Map<String, Value> = KvFormat::ALL
        .iter()
        .map(|&format| (format.to_string(), json!(KvCache::bytes_per_token(config, format))))
        .collect();
    json!({
        "config": config,
        "moe_layers": config.moe_layers(),
        "default_format": checkpoint.default_format(),
        "packed": checkpoint.packed_format().is_some(),
        "default_combine_block": config.moe.as_ref().map(|moe| default_combine_block(moe.intermediate)),
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "experts": parameters.experts,
            "per_expert": parameters.per_expert,
        },
        "memory": memory,
        "kv_bytes_per_token": kv_bytes_per_token,
        "has_all_experts": has_all_experts(checkpoint),
        "has_all_others": checkpoint.dense_header_hash().is_some(),
        "config_hash": checkpoint.config_hash(),
    })
}

fn as_lines(checkpoint: &Checkpoint) -> Vec<(String, String)> {
    let config = checkpoint.config();
    let parameters = ParameterCounts::of(config);
    let mut lines = vec![
        ("family".to_owned(), config.family.model_type().to_owned()),
        (
            "sizes".to_owned(),
            format!(
                "hidden {}, {}, vocabulary {}, context {}",
                config.hidden,
                counted(config.layers.len(), "layer"),
                config.vocab_size,
                config.max_position_embeddings
            ),
        ),
        ("attention".to_owned(), attention(config)),
    ];
    if let Some(moe) = &config.moe {
        let layers = config.moe_layers();
        lines.push((
            "experts".to_owned(),
            format!(
                "{} of width {} in {}, {} per token",
                moe.num_experts,
                moe.intermediate,
                counted(layers.len(), "layer"),
                moe.top_k
            ),
        ));
        if let Some(shared) = &moe.shared {
            let gated = if shared.sigmoid_gate {
                ", with a gate of its own"
            } else {
                ""
            };
            lines.push((
                "shared experts".to_owned(),
                format!("width {}{gated}", shared.intermediate),
            ));
        }
        lines.push(("gate".to_owned(), gate(moe)));
    }
    lines.push((
        "parameters".to_owned(),
        format!(
            "{} in all, {} active per token",
            count(parameters.total),
            count(parameters.active)
        ),
    ));
    lines.push((
        "stored as".to_owned(),
        match checkpoint.packed_format() {
            Some(packed) => format!("{packed}, packed: mapped as it is, and run in no other format"),
            None => format!("{} (default of --weights)", checkpoint.default_format()),
        },
    ));
    if !has_all_experts(checkpoint) {
        lines.push((
            "expert tensors".to_owned(),
            "not all here: a copy for gateways with workers".to_owned(),
        ));
    }
    if checkpoint.dense_header_hash().is_none() {
        lines.push((
            "other tensors".to_owned(),
            "not all here: a copy for workers".to_owned(),
        ));
    }
    for format in NumberFormat::ALL {
        let need = MemoryNeed::of(config, format);
        let experts = match need.all_experts_bytes {
            0 => String::new(),
            all => format!(
                "; workers {} ({} an expert)",
                ByteSize(all),
                ByteSize(need.expert_bytes)
            ),
        };
        lines.push((
            format!("memory in {format}"),
            format!("gateway {}{experts}", ByteSize(need.gateway_bytes)),
        ));
    }
    let kv = KvFormat::ALL.map(|format| format!("{} in {format}", ByteSize(KvCache::bytes_per_token(config, format))));
    lines.push((
        "keys and values".to_owned(),
        format!("per token of context {} (--kv-format)", kv.join(", ")),
    ));
    lines.push(("config hash".to_owned(), checkpoint.config_hash()));
    lines
}
