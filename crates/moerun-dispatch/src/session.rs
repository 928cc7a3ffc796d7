//! From an address to an admitted worker with an open stream.

use std::{error::Error, sync::Arc, time::Duration};

use moerun_process::Address;
use moerun_proto::{
    CONNECTION_WINDOW_BYTES, MAX_FRAME_BYTES, MAX_HANDSHAKE_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION,
    STREAM_WINDOW_BYTES, WorkerIdentity,
    v1::{self, expert_service_client::ExpertServiceClient},
};
use moerun_transport::{ClientProtection, Dial};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport};

use crate::{Connector, DispatchError, admission::Admission};

/// A worker that is gone without a word is found within the sum of these.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a worker may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long it may then take to say what it holds, and to open the stream.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests that may wait for the connection to take them.
const SEND_QUEUE: usize = 64;

/// An admitted worker and its stream.
#[derive(Debug)]
pub(crate) struct Session {
    /// What it is and holds.
    pub(crate) identity: WorkerIdentity,
    /// Takes requests.
    pub(crate) requests: mpsc::Sender<v1::ExecuteRequest>,
    /// Gives answers.
    pub(crate) replies: Streaming<v1::ExecuteResponse>,
    /// What it all runs over.
    pub(crate) channel: transport::Channel,
}

/// Why there is no session.
#[derive(Debug)]
pub(crate) enum SessionError {
    /// It may go better later.
    NotYet(String),
    /// It is there, and still loads its experts.
    Loading(String),
    /// It will not.
    Refused(DispatchError),
}

/// Where a worker is, and how it is talked to.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    settings: transport::Endpoint,
    address: Address,
    protection: ClientProtection,
}

impl Endpoint {
    /// Where it is.
    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    /// What every connection to it has.
    pub(crate) fn settings(&self) -> &transport::Endpoint {
        &self.settings
    }
}

/// Parses `host:port` or `unix:/path` and sets what every connection to a worker has.
pub(crate) fn endpoint(worker: &str, protection: &ClientProtection) -> Result<Endpoint, DispatchError> {
    let refused = |reason: String| DispatchError::Address {
        worker: worker.to_owned(),
        reason,
    };
    let address = Address::parse(worker).map_err(refused)?;
    if matches!(&address, Address::Tcp(text) if text.ends_with(":0")) {
        return Err(refused("wanted a port above 0".to_owned()));
    }
    let settings = Dial::endpoint(&address, protection)
        .map_err(refused)?
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(MAX_FRAME_BYTES)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(Endpoint {
        settings,
        address,
        protection: protection.clone(),
    })
}

/// Connects, admits, opens the stream.
pub(crate) async fn open(
    worker: &str,
    endpoint: &Endpoint,
    connector: &Connector,
    admission: &Arc<Admission>,
) -> Result<Session, SessionError> {
    let dial = Dial::new(endpoint.address.clone(), endpoint.protection.clone());
    let opened = open_over(&dial, worker, endpoint, connector, admission).await;
    // What runs above the connection passes on words at most; why it was refused is known below.
    opened.map_err(|error| match dial.refusal() {
        Some(refusal) => SessionError::Refused(DispatchError::Untrusted {
            worker: worker.to_owned(),
            refusal,
        }),
        None => error,
    })
}

async fn open_over(
    dial: &Dial,
    worker: &str,
    endpoint: &Endpoint,
    connector: &Connector,
    admission: &Arc<Admission>,
) -> Result<Session, SessionError> {
    let connecting = timeout(CONNECT_TIMEOUT, connector.connect(worker, &endpoint.settings, dial)).await;
    let channel = match connecting {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => return Err(SessionError::NotYet(with_sources(&error))),
        Err(_) => {
            return Err(SessionError::NotYet(format!(
                "no connection within {CONNECT_TIMEOUT:?}"
            )));
        }
    };
    let opening = async {
        let mut control = ExpertServiceClient::new(channel.clone()).max_decoding_message_size(MAX_HANDSHAKE_BYTES);
        let asked = v1::HandshakeRequest {
            protocol_version: PROTOCOL_VERSION,
        };
        let response = control
            .handshake(asked)
            .await
            .map_err(|status| refusal(worker, &status))?
            .into_inner();
        let identity = admit(worker, response, connector, admission).await?;

        let (requests, receiver) = mpsc::channel(SEND_QUEUE);
        let mut data = ExpertServiceClient::new(channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let replies = data
            .execute(ReceiverStream::new(receiver))
            .await
            .map_err(|status| refusal(worker, &status))?;
        Ok(Session {
            identity,
            requests,
            replies: replies.into_inner(),
            channel,
        })
    };
    timeout(HANDSHAKE_TIMEOUT, opening).await.unwrap_or_else(|_| {
        Err(SessionError::NotYet(format!(
            "no handshake within {HANDSHAKE_TIMEOUT:?}"
        )))
    })
}

/// Admission may hash an expert, which takes a while and reads the disk.
async fn admit(
    worker: &str,
    response: v1::HandshakeResponse,
    connector: &Connector,
    admission: &Arc<Admission>,
) -> Result<WorkerIdentity, SessionError> {
    let (admission, worker) = (Arc::clone(admission), worker.to_owned());
    match connector.aside(move || admission.admit(&worker, &response)).await {
        Ok(admitted) => admitted.map_err(SessionError::Refused),
        Err(error) => Err(SessionError::NotYet(error.to_string())),
    }
}

fn refusal(worker: &str, status: &Status) -> SessionError {
    let message = describe(status);
    match status.code() {
        // Another protocol, another kind of server, or a message that is beyond the limits: waiting will not help.
        Code::FailedPrecondition | Code::Unimplemented | Code::OutOfRange => {
            SessionError::Refused(DispatchError::RefusedByWorker {
                worker: worker.to_owned(),
                message,
            })
        }
        // The worker's own words; what tonic says of a broken connection has other codes or a source.
        Code::Unavailable if std::error::Error::source(status).is_none() => SessionError::Loading(message),
        _ => SessionError::NotYet(message),
    }
}

/// Code and message of a status, and what lies behind it: "connection reset" says more than "h2 protocol error". A server
/// that does not know the call at all sends a code alone.
pub(crate) fn describe(status: &Status) -> String {
    let code = format!("{:?}", status.code());
    let mut text = match status.message() {
        "" => code,
        message => format!("{code}: {message}"),
    };
    push_sources(&mut text, status);
    text
}

/// tonic's transport errors say little by themselves.
pub(crate) fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    push_sources(&mut text, error);
    text
}

/// Some errors quote their source; that is not said twice.
fn push_sources(text: &mut String, error: &dyn Error) {
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_what_lies_behind_it_once() {
        let reset = std::io::Error::other(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        let mut status = Status::unknown("h2 protocol error");
        status.set_source(Arc::new(reset));
        assert_eq!(describe(&status), "Unknown: h2 protocol error: connection reset");
        assert_eq!(describe(&Status::new(Code::Unimplemented, "")), "Unimplemented");
    }

    #[test]
    fn addresses_are_host_and_port_or_a_socket() {
        for good in [
            "127.0.0.1:50061",
            "worker-0.workers:50061",
            "[::1]:50061",
            "unix:/run/a",
        ] {
            endpoint(good, &ClientProtection::default()).unwrap();
        }
        for bad in [
            "",
            "127.0.0.1",
            "127.0.0.1:0",
            ":50061",
            "host:70000",
            "host:x",
            "a b:1",
            "unix:",
        ] {
            let error = endpoint(bad, &ClientProtection::default()).unwrap_err();
            assert!(
                error.to_string().starts_with(&format!("worker address {bad:?}: ")),
                "{error}"
            );
        }
    }
}
