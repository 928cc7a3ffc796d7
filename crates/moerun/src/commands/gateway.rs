//! `moerun serve` and `moerun gateway`: the doors on a socket until a signal comes.

use anyhow::Context;
use moerun_gateway::grpc::{self, ServeSettings};
use moerun_process::{Exit, Shutdown};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    cli::{GatewayArgs, ServeArgs},
    settings::{RoleFlags, Settings},
    stack::{Experts, Serving},
};

/// Runs `moerun serve`.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        workers: args.workers,
        grpc_addr: args.grpc_addr.clone(),
        health_addr: args.health_addr.clone(),
        ..RoleFlags::default()
    };
    serve_experts(Settings::load(&args.serving, &role)?, Experts::start)
}

/// Runs `moerun gateway`.
pub(crate) fn gateway(args: &GatewayArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        worker: args.worker.clone(),
        grpc_addr: args.grpc_addr.clone(),
        health_addr: args.health_addr.clone(),
        ..RoleFlags::default()
    };
    serve_experts(Settings::load(&args.serving, &role)?, Experts::connect)
}

fn serve_experts(mut settings: Settings, start: fn(&Settings) -> anyhow::Result<Experts>) -> anyhow::Result<Exit> {
    super::start_logging(&mut settings, "info")?;
    let shutdown = Shutdown::on_signals().context("signals")?;
    let runtime = tokio::runtime::Runtime::new().context("async runtime")?;
    // The address is taken before anything large is read, so that a port in use is said at once.
    let address = &settings.grpc_addr;
    let listener = runtime
        .block_on(TcpListener::bind(address))
        .with_context(|| format!("grpc_addr: cannot listen on {address}"))?;
    let bound = listener.local_addr().context("grpc_addr")?;
    let supervision = super::supervise(&settings, &shutdown)?;
    supervision.watch(runtime.handle());
    let serving = Serving::start(&settings, start(&settings)?)?;
    runtime.block_on(async {
        let drain = CancellationToken::new();
        let door = grpc::serve(
            listener,
            serving.gateway.clone(),
            ServeSettings::default(),
            drain.clone(),
        );
        tokio::pin!(door);
        shutdown.begin();
        supervision.ready();
        super::print_ready(bound, supervision.address())?;
        tokio::select! {
            ended = &mut door => return ended.map(|()| shutdown.exit()).map_err(anyhow::Error::from),
            () = shutdown.draining() => drain.cancel(),
        }
        tokio::select! {
            ended = &mut door => ended?,
            () = shutdown.stopping() => {}
        }
        Ok(shutdown.exit())
    })
}
