//! `moerun serve` and `moerun gateway`: the doors on a socket until a signal comes.

use anyhow::Context;
use moerun_gateway::grpc::{self, ServeSettings};
use moerun_process::{Exit, Shutdown, bind_admin, count_panics};
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
        admin_addr: args.admin_addr.clone(),
        grpc_addr: args.grpc_addr.clone(),
        ..RoleFlags::default()
    };
    serve_experts(Settings::load(&args.serving, &role)?, Experts::start, false)
}

/// Runs `moerun gateway`.
pub(crate) fn gateway(args: &GatewayArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        worker: args.worker.clone(),
        admin_addr: args.admin_addr.clone(),
        grpc_addr: args.grpc_addr.clone(),
        ..RoleFlags::default()
    };
    serve_experts(
        Settings::load(&args.serving, &role)?,
        Experts::connect,
        args.exit_with_parent,
    )
}

fn serve_experts(
    mut settings: Settings,
    start: fn(&Settings) -> anyhow::Result<Experts>,
    exit_with_parent: bool,
) -> anyhow::Result<Exit> {
    super::start_logging(&mut settings, "info")?;
    count_panics();
    let shutdown = Shutdown::on_signals().context("signals")?;
    if exit_with_parent {
        shutdown.drain_with_parent().context("standard input")?;
    }
    let runtime = tokio::runtime::Runtime::new().context("async runtime")?;
    // The address is taken before anything large is read, so that a port in use is said at once.
    let address = &settings.grpc_addr;
    let listener = runtime
        .block_on(TcpListener::bind(address))
        .with_context(|| format!("grpc_addr: cannot listen on {address}"))?;
    let bound = listener.local_addr().context("grpc_addr")?;
    let admin = settings
        .admin_addr
        .as_deref()
        .map(|address| bind_admin(address).with_context(|| format!("admin_addr: cannot listen on {address}")));
    let admin = admin.transpose()?;
    let door_settings = ServeSettings {
        with_admin: admin.is_none() && bound.ip().is_loopback(),
        ..ServeSettings::default()
    };
    let serving = Serving::start(&settings, start(&settings)?)?;
    runtime.block_on(async {
        let drain = CancellationToken::new();
        let door = grpc::serve(listener, serving.gateway.clone(), door_settings, drain.clone());
        tokio::pin!(door);
        // Ends with the runtime: until then it tells how the drain goes.
        if let Some(admin) = admin {
            tracing::info!(address = %admin.local_addr()?, "admin service");
            let gateway = serving.gateway.clone();
            tokio::spawn(async move {
                if let Err(error) = grpc::serve_admin(admin, gateway, CancellationToken::new()).await {
                    tracing::error!(%error, "the admin service ended");
                }
            });
        }
        shutdown.begin();
        super::print_ready(bound)?;
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
