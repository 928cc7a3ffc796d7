//! What commands that write a checkpoint share: progress, and an end at the first signal.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::Context;
use moerun_process::{LoadProgress, Shutdown};

/// How far the writing has come, told by any thread.
pub(super) struct WritingProgress(Mutex<LoadProgress>);

impl WritingProgress {
    pub(super) fn new(out: &Path) -> Self {
        WritingProgress(Mutex::new(LoadProgress::new(format!("{}", out.display()))))
    }

    pub(super) fn update(&self, written_bytes: u64, total_bytes: u64) {
        let mut progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        progress.update(written_bytes, total_bytes);
    }

    pub(super) fn finish(self) {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner).finish();
    }
}

/// Becomes true at the first signal, so that what was written is removed.
pub(super) fn interrupted_by_signals() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let shutdown = Shutdown::on_signals().context("signals")?;
    shutdown.begin(); // what a signal leaves behind is removed
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .context("async runtime")?;
    let flag = Arc::clone(&interrupted);
    thread::spawn(move || {
        runtime.block_on(shutdown.draining());
        flag.store(true, Ordering::Relaxed);
    });
    Ok(interrupted)
}
