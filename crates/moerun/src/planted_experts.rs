//! Violations planted around the experts: `late-reply-twice`, `swallowed-panic`, `no-recovery`. Tests only.

use std::{
    panic::catch_unwind,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use moerun_dispatch::{Combined, DispatchError, ExpertBackend, ExpertRequest, PendingExperts};
use ndarray::Array2;

/// Of this many dispatches one is spoilt.
const ONE_IN: u64 = 200;

/// Wraps the experts if `MOERUN_PLANT` says so.
pub(crate) fn plant(experts: Arc<dyn ExpertBackend>) -> Arc<dyn ExpertBackend> {
    let plant = match std::env::var("MOERUN_PLANT").as_deref() {
        Ok("late-reply-twice") => Plant::LateReplyTwice,
        Ok("swallowed-panic") => Plant::SwallowedPanic,
        Ok("no-recovery") => Plant::NoRecovery,
        _ => return experts,
    };
    Arc::new(PlantedExperts {
        experts,
        plant,
        state: Arc::default(),
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plant {
    /// What an earlier dispatch was answered is added to a later one.
    LateReplyTwice,
    /// A panic is caught and nobody is told.
    SwallowedPanic,
    /// After the first error nothing goes well again.
    NoRecovery,
}

#[derive(Debug)]
struct PlantedExperts {
    experts: Arc<dyn ExpertBackend>,
    plant: Plant,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    dispatches: AtomicU64,
    last: Mutex<Option<Array2<f32>>>,
    error: Mutex<Option<DispatchError>>,
}

impl State {
    fn fail(&self, error: &DispatchError) {
        self.error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(error.clone());
    }
}

impl ExpertBackend for PlantedExperts {
    fn submit(&self, request: ExpertRequest) -> Result<Box<dyn PendingExperts>, DispatchError> {
        let number = self.state.dispatches.fetch_add(1, Relaxed);
        if self.plant == Plant::SwallowedPanic && number % ONE_IN == ONE_IN - 1 {
            let _ = catch_unwind(|| panic!("planted"));
        }
        if self.plant == Plant::NoRecovery
            && let Some(error) = &*self.state.error.lock().unwrap_or_else(PoisonError::into_inner)
        {
            return Err(error.clone());
        }
        let pending = self
            .experts
            .submit(request)
            .inspect_err(|error| self.state.fail(error))?;
        Ok(Box::new(PlantedPending {
            pending,
            plant: self.plant,
            spoil: number % ONE_IN == ONE_IN - 1,
            state: Arc::clone(&self.state),
        }))
    }

    fn computes_elsewhere(&self) -> bool {
        self.experts.computes_elsewhere()
    }
}

struct PlantedPending {
    pending: Box<dyn PendingExperts>,
    plant: Plant,
    spoil: bool,
    state: Arc<State>,
}

impl PendingExperts for PlantedPending {
    fn wait(self: Box<Self>) -> Result<Combined, DispatchError> {
        let mut combined = self.pending.wait().inspect_err(|error| self.state.fail(error))?;
        if self.plant == Plant::LateReplyTwice {
            let mut last = self.state.last.lock().unwrap_or_else(PoisonError::into_inner);
            if self.spoil
                && let Some(late) = last.as_ref().filter(|late| late.dim() == combined.hidden_states.dim())
            {
                combined.hidden_states += late;
            }
            *last = Some(combined.hidden_states.clone());
        }
        Ok(combined)
    }
}
