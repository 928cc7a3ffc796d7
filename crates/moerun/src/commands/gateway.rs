//! `moerun serve` and `moerun gateway`: the doors on a socket until a signal comes.

use std::sync::Arc;

use anyhow::Context;
use moerun_gateway::grpc::{self, LogPrompts, ServeSettings};
use moerun_process::{Address, Exit, Shutdown, bind_admin, count_panics};
use moerun_transport::{ConnectionLimits, bind};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::warn_of_plaintext;
use crate::{
    cli::{GatewayArgs, ServeArgs},
    settings::{RoleFlags, Settings, SettingsError},
    stack::{Experts, Serving},
};

/// What would encrypt the gRPC door.
const TLS_FLAGS: &str = "--grpc-tls-cert and --grpc-tls-key";

/// Runs `moerun serve`.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        workers: args.workers,
        admin_addr: args.admin_addr.clone(),
        grpc_addr: args.grpc_addr.clone(),
        health_addr: args.health_addr.clone(),
        metrics_addr: args.metrics_addr.clone(),
        door: args.door.clone(),
        ..RoleFlags::default()
    };
    serve_experts(
        Settings::load(&args.serving, &role)?,
        |settings, _| Experts::start(settings),
        false,
    )
}

/// Runs `moerun gateway`.
pub(crate) fn gateway(args: &GatewayArgs) -> anyhow::Result<Exit> {
    let role = RoleFlags {
        worker: args.worker.clone(),
        placement: args.placement.clone(),
        placement_replicas: args.placement_replicas,
        discovery: args.discovery.clone(),
        admin_addr: args.admin_addr.clone(),
        grpc_addr: args.grpc_addr.clone(),
        health_addr: args.health_addr.clone(),
        metrics_addr: args.metrics_addr.clone(),
        cluster: args.cluster.clone(),
        door: args.door.clone(),
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
    start: fn(&Settings, &Handle) -> anyhow::Result<Experts>,
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
    let door = door(&settings)?;
    let address = Address::parse(&settings.grpc_addr)
        .map_err(|reason| SettingsError(format!("grpc_addr: {reason}, found {:?}", settings.grpc_addr)))?;
    let listener = bind(&address, &door.protection, TLS_FLAGS).context("grpc_addr")?;
    let bound = listener.address().context("grpc_addr")?;
    if let Address::Unix(path) = &bound {
        shutdown.remove_at_end(path.clone());
    }
    let admin = settings
        .admin_addr
        .as_deref()
        .map(|address| bind_admin(address).with_context(|| format!("admin_addr: cannot listen on {address}")));
    let admin = admin.transpose()?;
    let door = ServeSettings {
        with_admin: admin.is_none() && bound.is_on_this_host(),
        ..door
    };
    let metrics = super::metrics_door(&settings, "gateway")?;
    let supervision = super::supervise(&settings, &shutdown)?;
    supervision.watch(runtime.handle());
    let serving = Serving::start(&settings, start(&settings, runtime.handle())?)?;
    if let Some(door) = &metrics {
        serving.show(door);
    }
    runtime.block_on(async {
        let drain = CancellationToken::new();
        let serving_door = grpc::serve(listener, serving.gateway.clone(), door, drain.clone());
        tokio::pin!(serving_door);
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
        supervision.ready();
        super::print_ready(bound, supervision.address())?;
        tokio::select! {
            ended = &mut serving_door => return ended.map(|()| shutdown.exit()).map_err(anyhow::Error::from),
            () = shutdown.draining() => drain.cancel(),
        }
        tokio::select! {
            ended = &mut serving_door => ended?,
            () = shutdown.stopping() => {}
        }
        Ok(shutdown.exit())
    })
}

/// Who may use the gRPC door.
fn door(settings: &Settings) -> anyhow::Result<ServeSettings> {
    let protection = settings.door_protection()?;
    warn_of_plaintext("clients", settings.insecure && protection.tls().is_none());
    let auth = settings.authenticator()?;
    if auth.is_open() && protection.tls().is_some() && settings.grpc_tls_client_ca.is_none() {
        tracing::warn!(
            "no API keys are wanted: whoever reaches {} may use the model",
            settings.grpc_addr
        );
    }
    let log_prompts = if settings.log_prompts {
        tracing::warn!("--log-prompts: what people ask and are told goes into the log, in full");
        LogPrompts::Always
    } else {
        LogPrompts::Never
    };
    Ok(ServeSettings {
        protection,
        auth: Arc::new(auth),
        connections: ConnectionLimits {
            max_connections: settings.max_connections,
            ..ConnectionLimits::default()
        },
        log_prompts,
        ..ServeSettings::default()
    })
}
