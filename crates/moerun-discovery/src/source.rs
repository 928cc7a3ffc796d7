//! What a source is to [`crate::Discovery`]: something that reports lists, or why it has none.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::DiscoveryError;

/// Between two attempts to reach a source that failed: the first pause, doubled up to the last.
pub(crate) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(crate) const LAST_PAUSE: Duration = Duration::from_secs(2);

/// Who is there, or why it is not known.
pub(crate) type Said = Result<Vec<String>, DiscoveryError>;

/// Where a source reports to.
#[derive(Debug, Clone)]
pub(crate) struct Reports {
    source: usize,
    queue: mpsc::Sender<(usize, Said)>,
}

impl Reports {
    pub(crate) fn new(source: usize, queue: mpsc::Sender<(usize, Said)>) -> Self {
        Self { source, queue }
    }

    /// Reports; whether anybody still listens.
    pub(crate) async fn say(&self, said: Said) -> bool {
        self.queue.send((self.source, said)).await.is_ok()
    }

    /// Waits until nobody does.
    pub(crate) async fn unheard(&self) {
        self.queue.closed().await;
    }
}
