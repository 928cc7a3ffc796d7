//! Experts that do what a test tells them to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use moerun_dispatch::{Combined, DispatchError, ExpertBackend, ExpertRequest, PendingExperts};
use moerun_model::ExpertError;
use moerun_types::LayerId;
use parking_lot::{Condvar, Mutex};

use crate::fixture::PATIENCE;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    Works,
    /// Hangs until another behaviour is set, then does that.
    Hangs,
    /// Works for this many requests of all there ever were, then hangs.
    HangsAfter(usize),
    WorkerGone,
    MissesDeadline,
    PanicsInSubmit,
    PanicsInWait,
    /// Refuses requests of more rows than this, as a term out of range does.
    RefusesRowsAbove(usize),
    /// Leaves all experts of the first row of each request out, and says so.
    LeavesOutFirstRow,
}

/// Real experts behind a switch.
#[derive(Debug)]
pub(crate) struct FaultyExperts {
    experts: Arc<dyn ExpertBackend>,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether they say that they compute elsewhere.
    elsewhere: AtomicBool,
}

#[derive(Debug)]
struct State {
    behaviour: Behaviour,
    requests: usize,
}

impl State {
    fn hangs(&self) -> bool {
        match self.behaviour {
            Behaviour::Hangs => true,
            Behaviour::HangsAfter(requests) => self.requests > requests,
            _ => false,
        }
    }
}

struct PanicsInWait;

struct WithoutFirstRow(Box<dyn PendingExperts>);

impl PendingExperts for WithoutFirstRow {
    fn wait(self: Box<Self>) -> Result<Combined, DispatchError> {
        let mut combined = self.0.wait()?;
        combined.hidden_states.row_mut(0).fill(0.0);
        combined.degraded_rows = vec![0];
        Ok(combined)
    }
}

impl PendingExperts for PanicsInWait {
    fn wait(self: Box<Self>) -> Result<Combined, DispatchError> {
        panic!("the fake was told to panic");
    }
}

impl FaultyExperts {
    pub(crate) fn new(experts: Arc<dyn ExpertBackend>) -> Self {
        let state = State {
            behaviour: Behaviour::Works,
            requests: 0,
        };
        FaultyExperts {
            experts,
            state: Mutex::new(state),
            changed: Condvar::new(),
            elsewhere: AtomicBool::new(false),
        }
    }

    /// They say from now on that they compute elsewhere.
    pub(crate) fn move_elsewhere(&self) {
        self.elsewhere.store(true, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, behaviour: Behaviour) {
        self.state.lock().behaviour = behaviour;
        self.changed.notify_all();
    }

    /// Requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.state.lock().requests
    }

    /// Counts a request and waits while told to hang.
    fn behaviour(&self) -> Behaviour {
        let mut state = self.state.lock();
        state.requests += 1;
        while state.hangs() {
            let timed_out = self.changed.wait_for(&mut state, PATIENCE).timed_out();
            assert!(!timed_out, "the test left its experts hanging");
        }
        state.behaviour
    }
}

impl ExpertBackend for FaultyExperts {
    fn computes_elsewhere(&self) -> bool {
        self.elsewhere.load(Ordering::Relaxed)
    }

    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        let layer = request.layer;
        match self.behaviour() {
            Behaviour::WorkerGone => Err(DispatchError::WorkerGone {
                worker: "w1".into(),
                reason: "killed".into(),
            }),
            Behaviour::MissesDeadline => Err(DispatchError::DeadlineExceeded {
                worker: "w1".into(),
                layer,
                deadline: Duration::from_secs(1),
            }),
            Behaviour::PanicsInSubmit => panic!("the fake was told to panic"),
            Behaviour::PanicsInWait => Ok(Box::new(PanicsInWait)),
            Behaviour::RefusesRowsAbove(limit) if request.activations.rows() > limit => Err(term_error(layer).into()),
            Behaviour::LeavesOutFirstRow => Ok(Box::new(WithoutFirstRow(self.experts.submit(request)?))),
            Behaviour::Works | Behaviour::Hangs | Behaviour::HangsAfter(_) | Behaviour::RefusesRowsAbove(_) => {
                self.experts.submit(request)
            }
        }
    }
}

fn term_error(layer: LayerId) -> ExpertError {
    ExpertError::Shape {
        what: "rows of the fake",
        wanted: 0,
        found: layer.0 as usize,
    }
}
