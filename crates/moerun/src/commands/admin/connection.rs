//! A connection to an admin service, protected as other clients' are.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use moerun_process::Address;
use moerun_proto::v1::admin_service_client::AdminServiceClient;
use moerun_transport::Dial;
use tokio::time::timeout;
use tonic::{
    Code, Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use crate::{
    cli::AdminArgs,
    settings::{RoleFlags, ServingFlags, Settings},
};

/// How long a gateway may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers name everything that workers hold.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A connection to an admin service.
#[derive(Debug, Clone)]
pub(super) struct Admin {
    pub(super) client: AdminServiceClient<Channel>,
    address: String,
    key: Option<MetadataValue<Ascii>>,
    /// Knows why it was turned away.
    dial: Dial,
}

/// Connects as `args` say, and runs `call`, within the time that they allow.
pub(super) fn ask<T, F: Future<Output = anyhow::Result<T>>>(
    args: &AdminArgs,
    call: impl FnOnce(Admin) -> F,
) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("async runtime")?;
    let limit = Duration::from_secs(args.timeout);
    runtime.block_on(async {
        let asking = async { call(connect(args).await?).await };
        timeout(limit, asking)
            .await
            .with_context(|| format!("no answer from {} within {limit:?}", args.admin))?
    })
}

async fn connect(args: &AdminArgs) -> anyhow::Result<Admin> {
    let role = RoleFlags {
        cluster: args.cluster.clone(),
        ..RoleFlags::default()
    };
    let settings = Settings {
        insecure: args.insecure,
        ..Settings::load(&ServingFlags::default(), &role)?
    };
    let protection = settings.client_protection()?;
    let wanted = || format!("--admin: wanted HOST:PORT or unix:/PATH, found {:?}", args.admin);
    let address = Address::parse(&args.admin).ok().with_context(wanted)?;
    let endpoint = Dial::endpoint(&address, &protection).ok().with_context(wanted)?;
    let dial = Dial::new(address, protection);
    let connecting = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(dial.clone())
        .await;
    let channel = match (connecting, dial.refusal()) {
        (Err(_), Some(refusal)) => bail!("--admin: {}: {refusal}", args.admin),
        (connecting, _) => connecting.with_context(|| format!("--admin: nobody answers at {}", args.admin))?,
    };
    let key = args.api_key.as_ref().map(|key| {
        let value = format!("Bearer {}", key.trim()).parse::<MetadataValue<Ascii>>();
        let mut value = value.map_err(|_| anyhow!("--api-key: wanted a key in visible ASCII"))?;
        value.set_sensitive(true);
        Ok::<_, anyhow::Error>(value)
    });
    Ok(Admin {
        client: AdminServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES),
        address: args.admin.clone(),
        key: key.transpose()?,
        dial,
    })
}

impl Admin {
    /// A request, with the key if there is one.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(key) = &self.key {
            request.metadata_mut().insert("authorization", key.clone());
        }
        request
    }

    /// What it says, or why not.
    pub(super) fn told<T>(&self, answer: Result<Response<T>, Status>) -> anyhow::Result<T> {
        let address = &self.address;
        match answer {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => match (self.dial.refusal(), status.code()) {
                (Some(refusal), _) => bail!("{address}: {refusal}"),
                (None, Code::Unimplemented) => {
                    bail!("{address} has no admin service: wanted the --admin-addr of a gateway")
                }
                (None, code) => bail!("{address}: {} ({code:?})", status.message()),
            },
        }
    }
}
