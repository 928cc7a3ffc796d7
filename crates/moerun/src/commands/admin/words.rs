//! Answers of the admin service, for people and for programs.

use std::fmt::Write;

use moerun_proto::v1;
use serde_json::{Value, json};

use crate::{commands::table::Table, size::ByteSize};

/// `moerun status` for people.
pub(super) fn status(status: &v1::GetPlacementResponse) -> String {
    let mut text = String::new();
    let mut line = |words: String| {
        let _ = writeln!(text, "{words}"); // a string takes all
    };
    line(format!(
        "placement {}, epoch {}, {} live holders of every block at least, {:.1} layers a second",
        status.follow, status.epoch, status.fewest_holders, status.dispatches_per_second
    ));
    line(format!(
        "config {}, numerics {}\n",
        status.config_hash, status.numerics_id
    ));
    let mut table = Table::new(&[
        "worker",
        "is",
        "slices",
        "memory",
        "free",
        "calls",
        "failed",
        "in flight",
        "p50 µs",
        "build",
        "protocol",
    ]);
    for worker in &status.workers {
        table.row(vec![
            worker.address.clone(),
            state(worker).to_owned(),
            worker.held_slices.to_string(),
            size(worker.held_bytes),
            size(worker.free_bytes),
            worker.calls.to_string(),
            worker.failed_calls.to_string(),
            worker.assignments_in_flight.to_string(),
            worker.p50_micros.to_string(),
            worker.build.clone(),
            worker.protocol_version.to_string(),
        ]);
    }
    line(table.to_string());
    for worker in &status.workers {
        match worker.down_reason.as_str() {
            "" => {}
            reason => line(format!("{} is down: {reason}", worker.address)),
        }
    }
    text
}

fn state(worker: &v1::PlacedWorker) -> &'static str {
    match (worker.down_reason.is_empty(), worker.drained) {
        (false, true) => "drained, down",
        (false, false) => "down",
        (true, true) => "drained",
        (true, false) if worker.ejected => "ejected",
        (true, false) if worker.suspect => "suspect",
        (true, false) => "up",
    }
}

fn size(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "-".to_owned(), |bytes| ByteSize(bytes).to_string())
}

/// `moerun status` for programs.
pub(super) fn status_json(status: &v1::GetPlacementResponse) -> Value {
    let worker = |worker: &v1::PlacedWorker| {
        json!({
            "address": worker.address,
            "state": state(worker),
            "down_reason": worker.down_reason,
            "drained": worker.drained,
            "suspect": worker.suspect,
            "ejected": worker.ejected,
            "build": worker.build,
            "protocol_version": worker.protocol_version,
            "held_slices": worker.held_slices,
            "held_epoch": worker.held_epoch,
            "held_bytes": worker.held_bytes,
            "free_bytes": worker.free_bytes,
            "experts": worker.experts,
            "calls": worker.calls,
            "failed_calls": worker.failed_calls,
            "assignments_in_flight": worker.assignments_in_flight,
            "p50_micros": worker.p50_micros,
        })
    };
    let loads: serde_json::Map<String, Value> = status
        .loads
        .iter()
        .map(|layer| (layer.layer.to_string(), json!(layer.experts)))
        .collect();
    json!({
        "epoch": status.epoch,
        "placement": status.follow,
        "config_hash": status.config_hash,
        "numerics": status.numerics_id,
        "fewest_holders": status.fewest_holders,
        "dispatches_per_second": status.dispatches_per_second,
        "workers": status.workers.iter().map(worker).collect::<Vec<_>>(),
        "loads": loads,
    })
}

/// `moerun rebalance` for people.
pub(super) fn rebalance(report: &v1::RebalanceResponse) -> String {
    let moves = report.workers.iter().any(|it| it.load_slices + it.unload_slices > 0);
    let done = match (report.carried_out, moves) {
        (_, false) => "nothing to move",
        (true, true) => "experts were moved",
        (false, true) => "experts would be moved",
    };
    let mut text = format!(
        "{done}: layout {}, {} holders of every block, epoch {}\n{}\n",
        report.layout, report.replicas, report.epoch, report.reason
    );
    for (when, promise) in [("before", &report.present), ("planned", &report.planned)] {
        if let Some(promise) = promise {
            let _ = writeln!(text, "{when}: {}", words(promise));
        }
    }
    let mut table = Table::new(&["worker", "loads", "bytes", "lets go", "bytes"]);
    for worker in &report.workers {
        table.row(vec![
            worker.address.clone(),
            worker.load_slices.to_string(),
            ByteSize(worker.load_bytes).to_string(),
            worker.unload_slices.to_string(),
            ByteSize(worker.unload_bytes).to_string(),
        ]);
    }
    let _ = write!(text, "\n{table}");
    text
}

fn words(promise: &v1::Promise) -> String {
    let mut words = format!("balance {:.3}", promise.balance);
    if let Some(balance) = promise.after_worst_death {
        let _ = write!(words, ", {balance:.3} after the worst death");
    }
    if let Some(seconds) = promise.dispatch_seconds {
        let _ = write!(words, ", {:.1} µs a layer", seconds * 1e6);
    }
    words
}

/// `moerun rebalance` for programs.
pub(super) fn rebalance_json(report: &v1::RebalanceResponse) -> Value {
    let promise = |promise: &Option<v1::Promise>| {
        promise.as_ref().map(|promise| {
            json!({
                "balance": promise.balance,
                "balance_after_worst_death": promise.after_worst_death,
                "dispatch_seconds": promise.dispatch_seconds,
            })
        })
    };
    let moves = |worker: &v1::WorkerMoves| {
        json!({
            "address": worker.address,
            "load_slices": worker.load_slices,
            "load_bytes": worker.load_bytes,
            "unload_slices": worker.unload_slices,
            "unload_bytes": worker.unload_bytes,
        })
    };
    json!({
        "epoch": report.epoch,
        "carried_out": report.carried_out,
        "worthwhile": report.worthwhile,
        "reason": report.reason,
        "layout": report.layout,
        "replicas": report.replicas,
        "present": promise(&report.present),
        "planned": promise(&report.planned),
        "workers": report.workers.iter().map(moves).collect::<Vec<_>>(),
    })
}
