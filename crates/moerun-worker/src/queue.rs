//! The bounded queue before the compute thread. What is taken from it is one request, and with it those that run as well
//! together: requests of several gateways, or pieces of one long prompt, for the same layer.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use crate::compute::Job;

/// Most rows of requests that are run together: an expert's weights are read once for all of them, and nobody waits long
/// for another's rows.
const MAX_ROWS_TOGETHER: usize = 256;

/// The side that puts requests in; the queue closes with the last of them.
#[derive(Clone)]
pub(crate) struct JobSender {
    closing: Arc<CloseOnDrop>,
}

/// The side that takes them out.
pub(crate) struct JobReceiver {
    queue: Arc<Queue>,
}

/// A request that the queue did not take.
pub(crate) enum NotQueued {
    /// There is no room.
    Full(Job),
    /// Nobody takes requests any more.
    Ended(Job),
}

struct CloseOnDrop {
    queue: Arc<Queue>,
}

struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
    max_jobs: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    no_senders: bool,
    no_receiver: bool,
}

/// A queue of at most `max_jobs` requests.
pub(crate) fn job_queue(max_jobs: usize) -> (JobSender, JobReceiver) {
    let queue = Arc::new(Queue {
        state: Mutex::default(),
        arrived: Condvar::new(),
        max_jobs,
    });
    let closing = Arc::new(CloseOnDrop {
        queue: Arc::clone(&queue),
    });
    (JobSender { closing }, JobReceiver { queue })
}

impl JobSender {
    /// Puts a request at the end if there is room.
    pub(crate) fn try_send(&self, job: Job) -> Result<(), Box<NotQueued>> {
        let queue = &self.closing.queue;
        let mut state = queue.lock();
        if state.no_receiver {
            return Err(Box::new(NotQueued::Ended(job)));
        }
        if state.jobs.len() >= queue.max_jobs {
            return Err(Box::new(NotQueued::Full(job)));
        }
        state.jobs.push_back(job);
        drop(state);
        queue.arrived.notify_one();
        Ok(())
    }
}

impl JobReceiver {
    /// Waits for the first request and takes it, with those behind it that run together with it, in order, up to
    /// [`MAX_ROWS_TOGETHER`] rows. `None` when no more will come.
    pub(crate) fn take(&self) -> Option<Vec<Job>> {
        let mut state = self.queue.lock();
        let first = loop {
            match state.jobs.pop_front() {
                Some(job) => break job,
                None if state.no_senders => return None,
                None => state = self.queue.arrived.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        };
        let mut rows = first.work.activations.rows();
        let mut taken = vec![first];
        let mut index = 0;
        while let Some(job) = state.jobs.get(index) {
            let more = job.work.activations.rows();
            if runs_with(&taken[0], job) && rows + more <= MAX_ROWS_TOGETHER {
                rows += more;
                taken.extend(state.jobs.remove(index));
            } else {
                index += 1;
            }
        }
        Some(taken)
    }
}

/// Whether the rows of two requests can be run as one.
fn runs_with(one: &Job, other: &Job) -> bool {
    let (one, other) = (&one.work, &other.work);
    one.layer == other.layer
        && one.activations.format() == other.activations.format()
        && one.activations.cols() == other.activations.cols()
}

impl Queue {
    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.queue.lock().no_senders = true;
        self.queue.arrived.notify_all();
    }
}

impl Drop for JobReceiver {
    fn drop(&mut self) {
        self.queue.lock().no_receiver = true;
    }
}
