//! `moerun health`: asks a health door, for probes that can run nothing but this binary.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::time::timeout;
use tonic::{Code, transport::Endpoint};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
};

use crate::cli::HealthArgs;

/// Runs the command; an error is exit code 1, which a probe takes for "not well".
pub(crate) fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("async runtime")?;
    let limit = Duration::from_secs(args.timeout);
    let asking = async { timeout(limit, ask(&args.connect, &args.service)).await };
    let said = runtime
        .block_on(asking)
        .with_context(|| format!("no answer from {} within {limit:?}", args.connect))??;
    if said != ServingStatus::Serving as i32 {
        let status = if said == ServingStatus::NotServing as i32 {
            "NOT_SERVING"
        } else {
            "UNKNOWN"
        };
        bail!("{}: {status}", args.connect);
    }
    println!("SERVING");
    Ok(())
}

async fn ask(address: &str, service: &str) -> anyhow::Result<i32> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .with_context(|| format!("--connect: wanted HOST:PORT, found {address:?}"))?;
    let channel = endpoint
        .connect()
        .await
        .with_context(|| format!("--connect: nobody answers at {address}"))?;
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    match HealthClient::new(channel).check(request).await {
        Ok(response) => Ok(response.into_inner().status),
        Err(status) if status.code() == Code::NotFound => bail!("{address} has no service {service:?}"),
        Err(status) => bail!("{address}: {}", status.message()),
    }
}
