//! The state of one worker's connection: up with its waiters, or down with a reason.

use std::{collections::HashMap, sync::Arc};

use moerun_proto::v1;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::session::{Session, describe};

/// An answer, or the end of the connection it would have come on.
#[derive(Debug)]
pub(crate) struct Arrival {
    /// Which part of the dispatch it belongs to.
    pub(crate) part: usize,
    /// The answer, or why there will be none.
    pub(crate) outcome: Result<v1::ExecuteResponse, String>,
}

/// Where the answer to one request goes. The channel has room for every part of its dispatch.
#[derive(Debug)]
pub(crate) struct Waiter {
    /// Which part of the dispatch it is.
    pub(crate) part: usize,
    /// Where the dispatch waits.
    pub(crate) arrivals: mpsc::Sender<Arrival>,
}

impl Waiter {
    fn arrive(self, outcome: Result<v1::ExecuteResponse, String>) {
        // Fails only when the dispatch has been dropped, and then nobody wants it.
        let _ = self.arrivals.try_send(Arrival {
            part: self.part,
            outcome,
        });
    }
}

/// One worker, for as long as the gateway runs.
#[derive(Debug)]
pub(crate) struct Link {
    worker: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Ids go on counting over reconnections, so that an id names one request only.
    next_request_id: u64,
    connection: Connection,
}

#[derive(Debug)]
enum Connection {
    Up {
        requests: mpsc::Sender<v1::ExecuteRequest>,
        waiters: HashMap<u64, Waiter>,
    },
    Down {
        reason: String,
    },
}

impl Link {
    pub(crate) fn new(worker: String) -> Self {
        let connection = Connection::Down {
            reason: "not connected yet".to_owned(),
        };
        Self {
            worker,
            state: Mutex::new(State {
                next_request_id: 1,
                connection,
            }),
        }
    }

    /// Address of the worker.
    pub(crate) fn worker(&self) -> &str {
        &self.worker
    }

    /// Why it is down, if it is.
    pub(crate) fn down_reason(&self) -> Option<String> {
        match &self.state.lock().connection {
            Connection::Up { .. } => None,
            Connection::Down { reason } => Some(reason.clone()),
        }
    }

    /// Says anew why it is down; the last attempt to bring it up tells more than what ended it.
    pub(crate) fn still_down(&self, why: String) {
        if let Connection::Down { reason } = &mut self.state.lock().connection {
            *reason = why;
        }
    }

    /// Adds a waiter before its request is sent; returns the request's id and where to send it, or why it is down.
    pub(crate) fn register(&self, waiter: Waiter) -> Result<(u64, mpsc::Sender<v1::ExecuteRequest>), String> {
        let mut state = self.state.lock();
        let id = state.next_request_id;
        match &mut state.connection {
            Connection::Down { reason } => Err(reason.clone()),
            Connection::Up { requests, waiters } => {
                waiters.insert(id, waiter);
                let requests = requests.clone();
                state.next_request_id += 1;
                Ok((id, requests))
            }
        }
    }

    /// Nobody waits for this answer any more.
    pub(crate) fn forget(&self, request_id: u64) {
        if let Connection::Up { waiters, .. } = &mut self.state.lock().connection {
            waiters.remove(&request_id);
        }
    }

    /// Brings the link up.
    pub(crate) fn connect(self: &Arc<Self>, session: Session) -> Connected {
        let Session { requests, replies, .. } = session;
        self.state.lock().connection = Connection::Up {
            requests,
            waiters: HashMap::new(),
        };
        Connected {
            link: Arc::clone(self),
            replies,
            reason: "the gateway is stopping".to_owned(),
        }
    }

    fn deliver(&self, response: v1::ExecuteResponse) -> Result<(), String> {
        let id = response.request_id;
        let mut state = self.state.lock();
        if id == 0 || id >= state.next_request_id {
            return Err(format!("it answered request {id}, which was never sent"));
        }
        let waiter = match &mut state.connection {
            Connection::Up { waiters, .. } => waiters.remove(&id),
            Connection::Down { .. } => None,
        };
        drop(state);
        // No waiter: the answer came after the dispatch's deadline.
        if let Some(waiter) = waiter {
            waiter.arrive(Ok(response));
        }
        Ok(())
    }
}

/// A link that is up. However this ends, the link is then down and all that waited on it have been told.
#[derive(Debug)]
pub(crate) struct Connected {
    link: Arc<Link>,
    replies: Streaming<v1::ExecuteResponse>,
    reason: String,
}

impl Connected {
    /// Hands out answers until the stream ends; returns why it did.
    pub(crate) async fn run(mut self) -> String {
        self.reason = loop {
            match self.replies.message().await {
                Ok(Some(response)) => {
                    if let Err(reason) = self.link.deliver(response) {
                        break reason;
                    }
                }
                Ok(None) => break "the worker ended the stream".to_owned(),
                Err(status) => break describe(&status),
            }
        };
        self.reason.clone()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let down = Connection::Down {
            reason: self.reason.clone(),
        };
        let before = std::mem::replace(&mut self.link.state.lock().connection, down);
        if let Connection::Up { waiters, .. } = before {
            for waiter in waiters.into_values() {
                waiter.arrive(Err(self.reason.clone()));
            }
        }
    }
}
