//! The compute thread and the bounded queue before it, and the short way past both.

use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use moerun_kernels::{Activations, flush_denormals};
use moerun_model::ExpertError;
use moerun_proto::{ExecuteFailure, ExecuteWork, encode_failure, encode_response, seal_answer, v1};
use moerun_routing::{Assignment, PartialSums};
use tokio::sync::{mpsc::OwnedPermit, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::queue::{JobReceiver, JobSender, NotQueued, job_queue};

/// Runs the experts of one request.
pub(crate) type RunExperts = Box<dyn FnMut(&ExecuteWork) -> Result<PartialSums, ExpertError> + Send>;

/// Room for one answer on the stream that asked: the compute thread never waits for a slow reader.
#[derive(Debug)]
pub(crate) struct ReplySlot {
    permit: OwnedPermit<Result<v1::ExecuteResponse, Status>>,
    sealed: bool,
}

impl ReplySlot {
    /// For the answer to `request`, which has a checksum if the request has.
    pub(crate) fn new(permit: OwnedPermit<Result<v1::ExecuteResponse, Status>>, request: &v1::ExecuteRequest) -> Self {
        Self {
            permit,
            sealed: request.checksum.is_some(),
        }
    }

    /// Sends the answer.
    pub(crate) fn send(self, mut response: v1::ExecuteResponse) {
        if self.sealed {
            seal_answer(&mut response);
        }
        self.permit.send(Ok(response));
    }
}

/// A request, and where its answer goes.
pub(crate) struct Job {
    /// What is asked.
    pub(crate) work: ExecuteWork,
    /// When the message was read.
    pub(crate) arrived: Instant,
    /// Cancelled when nobody can receive the answer any more.
    pub(crate) abandoned: CancellationToken,
    /// Takes the answer.
    pub(crate) reply: ReplySlot,
}

/// Handle to the compute thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub(crate) struct Compute {
    run: Arc<Mutex<RunExperts>>,
    jobs: JobSender,
    max_queue: usize,
    inline_rows: usize,
    outstanding: watch::Sender<usize>,
}

impl Compute {
    /// Starts the thread, with a queue of `max_queue` requests. Requests of at most `inline_rows` rows are run on the thread
    /// that submits them while there are no others.
    pub(crate) fn start(run: RunExperts, max_queue: usize, inline_rows: usize) -> io::Result<(Self, JoinHandle<()>)> {
        let run = Arc::new(Mutex::new(run));
        let (jobs, queue) = job_queue(max_queue);
        let queue_run = Arc::clone(&run);
        let outstanding = watch::Sender::new(0);
        let finished = outstanding.clone();
        let thread = thread::Builder::new()
            .name("moerun-compute".to_owned())
            .spawn(move || serve_queue(&queue, &queue_run, &finished))?;
        let compute = Self {
            run,
            jobs,
            max_queue,
            inline_rows,
            outstanding,
        };
        Ok((compute, thread))
    }

    /// Requests that the queue has room for.
    pub(crate) fn max_queue(&self) -> usize {
        self.max_queue
    }

    /// Runs a small request at once if nothing else is queued or running, else queues it, or answers it at once that the
    /// queue is full.
    pub(crate) fn submit(&self, job: Job) {
        let is_small = job.work.activations.rows() <= self.inline_rows;
        let mut is_alone = false;
        self.outstanding.send_modify(|count| {
            is_alone = *count == 0;
            *count += 1;
        });
        if is_small
            && is_alone
            && let Ok(mut run) = self.run.try_lock()
        {
            // To wake the compute thread and to be woken by it costs more than a row's experts of a small model.
            finish(job, &mut run, &self.outstanding);
            return;
        }
        let Err(refused) = self.jobs.try_send(job) else {
            return;
        };
        let (job, failure) = match *refused {
            NotQueued::Full(job) => (job, ExecuteFailure::Overloaded),
            NotQueued::Ended(job) => (
                job,
                ExecuteFailure::Internal {
                    message: "the compute thread has ended".to_owned(),
                },
            ),
        };
        self.outstanding.send_modify(|count| *count -= 1);
        job.reply.send(encode_failure(job.work.request_id, failure));
    }

    /// Requests queued or being computed.
    pub(crate) fn outstanding(&self) -> usize {
        *self.outstanding.borrow()
    }

    /// Waits until nothing is queued or being computed.
    pub(crate) async fn idle(&self) {
        // Fails only if the sender is gone, and `self` holds one.
        let _ = self.outstanding.subscribe().wait_for(|&count| count == 0).await;
    }
}

impl std::fmt::Debug for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compute")
            .field("outstanding", &self.outstanding())
            .finish_non_exhaustive()
    }
}

fn serve_queue(queue: &JobReceiver, run: &Mutex<RunExperts>, outstanding: &watch::Sender<usize>) {
    flush_denormals();
    while let Some(jobs) = queue.take() {
        // What panics is caught while the lock is held, so it is never poisoned.
        let mut run = run.lock().unwrap_or_else(PoisonError::into_inner);
        finish_together(jobs, &mut run, outstanding);
    }
}

/// Runs requests as one. Should that fail, each is run alone, so that one gateway's bad rows fail its own request only.
fn finish_together(jobs: Vec<Job>, run: &mut RunExperts, outstanding: &watch::Sender<usize>) {
    let (together, rest): (Vec<Job>, Vec<Job>) = jobs.into_iter().partition(|job| !job.is_over());
    let mut answered = Vec::new();
    if together.len() > 1 {
        let begun = Instant::now();
        let work = as_one(&together);
        if let Ok(Ok(sums)) = catch_unwind(AssertUnwindSafe(|| run(&work))) {
            let computed = begun.elapsed();
            let rows: Vec<usize> = together.iter().map(|job| job.work.activations.rows()).collect();
            let responses = sums.split(&rows);
            answered = responses
                .iter()
                .zip(&together)
                .map(|(sums, job)| encode_response(job.work.request_id, sums, begun - job.arrived, computed))
                .collect();
        }
    }
    if answered.is_empty() {
        for job in together.into_iter().chain(rest) {
            finish(job, run, outstanding);
        }
        return;
    }
    for (job, response) in together.into_iter().zip(answered) {
        job.reply.send(response);
        outstanding.send_modify(|count| *count -= 1);
    }
    for job in rest {
        finish(job, run, outstanding);
    }
}

/// The rows and assignments of all `jobs`, one after another.
fn as_one(jobs: &[Job]) -> ExecuteWork {
    let activations: Vec<&Activations> = jobs.iter().map(|job| &job.work.activations).collect();
    let mut assignments = Vec::with_capacity(jobs.iter().map(|job| job.work.assignments.len()).sum());
    let mut first_row = 0;
    for job in jobs {
        assignments.extend(job.work.assignments.iter().map(|assignment| Assignment {
            row: assignment.row + first_row,
            ..*assignment
        }));
        first_row += job.work.activations.rows() as u32;
    }
    ExecuteWork {
        request_id: jobs[0].work.request_id,
        layer: jobs[0].work.layer,
        activations: Activations::concatenate(&activations),
        assignments,
        deadline: None,
    }
}

fn finish(job: Job, run: &mut RunExperts, outstanding: &watch::Sender<usize>) {
    if !job.abandoned.is_cancelled() {
        let response = answer(&job, run);
        job.reply.send(response);
    }
    outstanding.send_modify(|count| *count -= 1);
}

impl Job {
    /// Whether nobody waits for the answer any more, or not for this one.
    fn is_over(&self) -> bool {
        self.abandoned.is_cancelled() || self.is_late()
    }

    fn is_late(&self) -> bool {
        self.work
            .deadline
            .is_some_and(|deadline| self.arrived.elapsed() >= deadline)
    }
}

fn answer(job: &Job, run: &mut RunExperts) -> v1::ExecuteResponse {
    let id = job.work.request_id;
    if job.is_late() {
        return encode_failure(id, ExecuteFailure::DeadlineExceeded);
    }
    let begun = Instant::now();
    let queued = begun - job.arrived;
    // A panicking request must not take the others with it; the bank is read-only, so nothing is left half changed.
    match catch_unwind(AssertUnwindSafe(|| run(&job.work))) {
        Ok(Ok(sums)) => {
            let computed = begun.elapsed();
            encode_response(id, &sums, queued, computed)
        }
        Ok(Err(error)) => encode_failure(id, failure_of(&error)),
        Err(panic) => {
            let message = panic_message(panic.as_ref());
            tracing::error!(request_id = id, layer = job.work.layer.0, "experts panicked: {message}");
            encode_failure(
                id,
                ExecuteFailure::Internal {
                    message: format!("panic: {message}"),
                },
            )
        }
    }
}

fn failure_of(error: &ExpertError) -> ExecuteFailure {
    let message = error.to_string();
    match *error {
        ExpertError::NotHeld { layer, expert, blocks } => ExecuteFailure::NotHeld {
            layer,
            expert,
            block: Some(blocks.first),
            message,
        },
        ExpertError::Term {
            layer, expert, block, ..
        } => ExecuteFailure::TermOutOfRange {
            layer,
            expert,
            block,
            message,
        },
        ExpertError::Shape { .. }
        | ExpertError::Format { .. }
        | ExpertError::Row { .. }
        | ExpertError::NoBlocks { .. }
        | ExpertError::Duplicate { .. }
        | ExpertError::TooManyExperts { .. }
        | ExpertError::Weight { .. } => ExecuteFailure::Invalid { message },
        _ => ExecuteFailure::Internal { message },
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
