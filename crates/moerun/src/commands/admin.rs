//! `moerun status`, `drain`, `resume` and `rebalance`: thin clients of a gateway's admin service.

mod connection;
mod words;

use std::io::{self, Write};

use anyhow::Context;
use moerun_proto::v1;
use serde_json::{Value, json};

use crate::cli::{AdminArgs, DrainArgs, RebalanceArgs, ResumeArgs, StatusArgs};
use connection::{Admin, ask};

/// Runs `moerun status`.
pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<()> {
    let status = ask(&args.admin, |admin: Admin| async move {
        let Admin { mut client, .. } = admin.clone();
        admin.told(client.get_placement(admin.request(v1::GetPlacementRequest {})).await)
    })?;
    print(&args.admin, &words::status_json(&status), &words::status(&status))
}

/// Runs `moerun drain`.
pub(crate) fn drain(args: &DrainArgs) -> anyhow::Result<()> {
    let worker = args.worker.clone();
    let drained = ask(&args.admin, |admin: Admin| async move {
        let Admin { mut client, .. } = admin.clone();
        admin.told(
            client
                .drain_worker(admin.request(v1::DrainWorkerRequest { worker }))
                .await,
        )
    })?;
    let seconds = drained.took_micros as f64 / 1e6;
    let value = json!({
        "worker": args.worker,
        "epoch": drained.epoch,
        "moved_slices": drained.moved_slices,
        "moved_bytes": drained.moved_bytes,
        "assignments_in_flight": drained.assignments_in_flight,
        "seconds": seconds,
    });
    let text = format!(
        "{} gets no calls since epoch {}: {} slices ({} bytes) that it alone held are held by others too; {seconds:.3} s\n",
        args.worker, drained.epoch, drained.moved_slices, drained.moved_bytes
    );
    print(&args.admin, &value, &text)
}

/// Runs `moerun resume`.
pub(crate) fn resume(args: &ResumeArgs) -> anyhow::Result<()> {
    let worker = args.worker.clone();
    let resumed = ask(&args.admin, |admin: Admin| async move {
        let Admin { mut client, .. } = admin.clone();
        admin.told(
            client
                .resume_worker(admin.request(v1::ResumeWorkerRequest { worker }))
                .await,
        )
    })?;
    let value = json!({ "worker": args.worker, "epoch": resumed.epoch });
    print(
        &args.admin,
        &value,
        &format!("{} gets calls again since epoch {}\n", args.worker, resumed.epoch),
    )
}

/// Runs `moerun rebalance`.
pub(crate) fn rebalance(args: &RebalanceArgs) -> anyhow::Result<()> {
    let dry_run = args.dry_run;
    let report = ask(&args.admin, |admin: Admin| async move {
        let Admin { mut client, .. } = admin.clone();
        admin.told(client.rebalance(admin.request(v1::RebalanceRequest { dry_run })).await)
    })?;
    print(&args.admin, &words::rebalance_json(&report), &words::rebalance(&report))
}

fn print(args: &AdminArgs, value: &Value, text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    if args.json {
        writeln!(stdout, "{value:#}").context("standard output")
    } else {
        write!(stdout, "{text}").context("standard output")
    }
}
