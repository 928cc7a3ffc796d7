//! The state of one worker's connection: up with its waiters, or down with a reason.

use std::collections::BTreeMap;

use moerun_proto::v1;
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::Instant};

/// An answer, or the end of the connection it would have come on.
#[derive(Debug)]
pub(crate) struct Arrival {
    /// Which call of the dispatch it belongs to.
    pub(crate) call: usize,
    /// When it came.
    pub(crate) at: Instant,
    /// When the worker had last said something before.
    pub(crate) previous: Option<Instant>,
    /// The answer, or why there will be none.
    pub(crate) outcome: Result<v1::ExecuteResponse, String>,
}

/// Where the answer to one request goes. The channel has room for every call of its dispatch.
#[derive(Debug)]
pub(crate) struct Waiter {
    /// Which call of the dispatch it is.
    pub(crate) call: usize,
    /// Where the dispatch waits.
    pub(crate) arrivals: mpsc::Sender<Arrival>,
}

impl Waiter {
    /// Hands the answer over.
    pub(crate) fn arrive(self, at: Instant, previous: Option<Instant>, outcome: Result<v1::ExecuteResponse, String>) {
        // Fails only when the dispatch has been dropped, and then nobody wants it.
        let _ = self.arrivals.try_send(Arrival {
            call: self.call,
            at,
            previous,
            outcome,
        });
    }
}

/// One worker's connection, for as long as the worker is a member.
#[derive(Debug)]
pub(crate) struct Link {
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
        protocol_version: u32,
        /// By id, so that those who are told of an end are told in order.
        waiters: BTreeMap<u64, Waiter>,
    },
    Down {
        reason: String,
    },
}

/// A request that is waited for: what it is called and where to send it.
#[derive(Debug)]
pub(crate) struct Registered {
    /// Its id on this link.
    pub(crate) request_id: u64,
    /// Takes the request.
    pub(crate) requests: mpsc::Sender<v1::ExecuteRequest>,
    /// What the worker speaks.
    pub(crate) protocol_version: u32,
}

/// Whom an answer is for.
#[derive(Debug)]
pub(crate) enum Addressee {
    /// Somebody waits for it.
    Waiting(Waiter),
    /// Nobody does any more: it is late.
    Nobody,
}

impl Link {
    pub(crate) fn new() -> Self {
        let connection = Connection::Down {
            reason: "not connected yet".to_owned(),
        };
        Self {
            state: Mutex::new(State {
                next_request_id: 1,
                connection,
            }),
        }
    }

    /// Why it is down, if it is.
    pub(crate) fn down_reason(&self) -> Option<String> {
        match &self.state.lock().connection {
            Connection::Up { .. } => None,
            Connection::Down { reason } => Some(reason.clone()),
        }
    }

    /// Whether there is a connection.
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.state.lock().connection, Connection::Up { .. })
    }

    /// Says anew why it is down; the last attempt to bring it up tells more than what ended it.
    pub(crate) fn still_down(&self, why: String) {
        if let Connection::Down { reason } = &mut self.state.lock().connection {
            *reason = why;
        }
    }

    /// Adds a waiter before its request is sent; or says why it is down.
    pub(crate) fn register(&self, waiter: Waiter) -> Result<Registered, String> {
        let mut state = self.state.lock();
        let request_id = state.next_request_id;
        match &mut state.connection {
            Connection::Down { reason } => Err(reason.clone()),
            Connection::Up {
                requests,
                protocol_version,
                waiters,
            } => {
                waiters.insert(request_id, waiter);
                let registered = Registered {
                    request_id,
                    requests: requests.clone(),
                    protocol_version: *protocol_version,
                };
                state.next_request_id += 1;
                Ok(registered)
            }
        }
    }

    /// An id for a request that is sent before the link is up.
    pub(crate) fn reserve_id(&self) -> u64 {
        let mut state = self.state.lock();
        state.next_request_id += 1;
        state.next_request_id - 1
    }

    /// Nobody waits for this answer any more.
    pub(crate) fn forget(&self, request_id: u64) {
        if let Connection::Up { waiters, .. } = &mut self.state.lock().connection {
            waiters.remove(&request_id);
        }
    }

    /// Brings the link up.
    pub(crate) fn up(&self, requests: mpsc::Sender<v1::ExecuteRequest>, protocol_version: u32) {
        self.state.lock().connection = Connection::Up {
            requests,
            protocol_version,
            waiters: BTreeMap::new(),
        };
    }

    /// Takes the link down; returns those who still waited on it.
    pub(crate) fn down(&self, reason: &str) -> Vec<Waiter> {
        let down = Connection::Down {
            reason: reason.to_owned(),
        };
        match std::mem::replace(&mut self.state.lock().connection, down) {
            Connection::Up { waiters, .. } => waiters.into_values().collect(),
            Connection::Down { .. } => Vec::new(),
        }
    }

    /// Whom the answer to request `id` is for; an error if there was no such request.
    pub(crate) fn addressee(&self, id: u64) -> Result<Addressee, String> {
        let mut state = self.state.lock();
        if id == 0 || id >= state.next_request_id {
            return Err(format!("it answered request {id}, which was never sent"));
        }
        let waiter = match &mut state.connection {
            Connection::Up { waiters, .. } => waiters.remove(&id),
            Connection::Down { .. } => None,
        };
        Ok(waiter.map_or(Addressee::Nobody, Addressee::Waiting))
    }
}
