//! Placement and changes to it as messages of the admin service.

use moerun_dispatch::{
    DispatchError, DrainReport, PlacementStatus, Promise, RebalanceReport, WorkerMoves, WorkerPlacement,
};
use moerun_proto::v1;
use tonic::{Code, Status};

/// How the placement is.
pub(super) fn status(status: PlacementStatus) -> v1::GetPlacementResponse {
    let loads = status.loads.layers().map(|(layer, loads)| v1::LayerLoads {
        layer: layer.0,
        experts: loads.to_vec(),
    });
    v1::GetPlacementResponse {
        epoch: status.epoch,
        follow: status.follow,
        config_hash: status.config_hash,
        numerics_id: status.numerics,
        fewest_holders: count(status.fewest_holders),
        dispatches_per_second: status.dispatches_per_second,
        loads: loads.collect(),
        workers: status.workers.into_iter().map(placed).collect(),
    }
}

fn placed(worker: WorkerPlacement) -> v1::PlacedWorker {
    let stats = worker.stats;
    v1::PlacedWorker {
        address: stats.address,
        down_reason: stats.down.unwrap_or_default(),
        suspect: stats.suspect,
        ejected: stats.ejected,
        drained: worker.drained,
        build: worker.build,
        protocol_version: worker.protocol_version,
        held_slices: worker.held.len() as u64,
        held_epoch: worker.held_epoch,
        held_bytes: worker.held_bytes,
        free_bytes: worker.free_bytes,
        calls: stats.calls,
        failed_calls: stats.failures.iter().map(|(_, count)| count).sum(),
        assignments_in_flight: stats.assignments_in_flight,
        p50_micros: stats
            .p50
            .map_or(0, |p50| u64::try_from(p50.as_micros()).unwrap_or(u64::MAX)),
        experts: worker.experts,
    }
}

/// What became of a drain.
pub(super) fn drained(report: &DrainReport) -> v1::DrainWorkerResponse {
    v1::DrainWorkerResponse {
        epoch: report.epoch,
        moved_slices: report.moved_slices as u64,
        moved_bytes: report.moved_bytes,
        assignments_in_flight: report.in_flight,
        took_micros: u64::try_from(report.took.as_micros()).unwrap_or(u64::MAX),
    }
}

/// What a plan comes to.
pub(super) fn rebalanced(report: RebalanceReport) -> v1::RebalanceResponse {
    v1::RebalanceResponse {
        epoch: report.epoch,
        carried_out: report.carried_out,
        worthwhile: report.worthwhile,
        reason: report.reason,
        layout: report.layout,
        replicas: count(report.replicas),
        present: report.present.map(promise),
        planned: Some(promise(report.planned)),
        workers: report.workers.into_iter().map(moves).collect(),
    }
}

fn promise(promise: Promise) -> v1::Promise {
    v1::Promise {
        balance: promise.balance,
        after_worst_death: promise.after_worst_death,
        dispatch_seconds: promise.dispatch_seconds,
    }
}

fn moves(moves: WorkerMoves) -> v1::WorkerMoves {
    v1::WorkerMoves {
        address: moves.address,
        load_slices: moves.load_slices as u64,
        load_bytes: moves.load_bytes,
        unload_slices: moves.unload_slices as u64,
        unload_bytes: moves.unload_bytes,
    }
}

fn count(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Why nothing was changed, or not all.
pub(super) fn refusal(error: &DispatchError) -> Status {
    let code = match error {
        DispatchError::UnknownWorker { .. } => Code::NotFound,
        DispatchError::NoRoom { .. } | DispatchError::NoRoomElsewhere { .. } => Code::ResourceExhausted,
        DispatchError::WorkerGone { .. } => Code::Unavailable,
        DispatchError::Start { .. } => Code::Internal,
        _ => Code::FailedPrecondition,
    };
    Status::new(code, error.to_string())
}
