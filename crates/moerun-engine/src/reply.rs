//! The client's end of a request. It is always answered: a reply dropped before its end says that the engine stopped,
//! so no path out of the engine (shutdown, a lost race, a panic) can leave a client without a last word.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use moerun_dispatch::Combined;
use tokio::sync::{mpsc, oneshot};

use crate::{EngineError, LogitsRow, TokenEvent};

/// What can end a stream of `Self`.
pub(crate) trait Failure {
    /// The item that says `error`.
    fn failure(error: EngineError) -> Self;
}

impl Failure for TokenEvent {
    fn failure(error: EngineError) -> Self {
        TokenEvent::Failed(error)
    }
}

impl Failure for Result<LogitsRow, EngineError> {
    fn failure(error: EngineError) -> Self {
        Err(error)
    }
}

/// Sends a request's items; has room for all of them, so sending never waits.
#[derive(Debug)]
pub(crate) struct Reply<T: Failure> {
    items: mpsc::Sender<T>,
    ended: bool,
}

impl<T: Failure> Reply<T> {
    /// A reply of at most `num_items` items, and a failure.
    pub(crate) fn new(num_items: usize) -> (Self, mpsc::Receiver<T>) {
        // The channel's own bound is usize::MAX / 8; its memory grows with what is in it.
        let (items, receiver) = mpsc::channel(num_items.min(usize::MAX >> 4) + 1);
        (Self { items, ended: false }, receiver)
    }

    /// Sends an item after which others follow.
    pub(crate) fn send(&mut self, item: T) {
        debug_assert!(!self.ended, "an item after the end");
        // The only error left is a client that went away: `is_over` tells the scheduler.
        let sent = self.items.try_send(item);
        debug_assert!(
            !matches!(sent, Err(mpsc::error::TrySendError::Full(_))),
            "the reply has room for every item"
        );
    }

    /// Sends the last item.
    pub(crate) fn finish(&mut self, item: T) {
        self.send(item);
        self.ended = true;
    }

    /// Marks the last item as sent, where the item itself does not say so.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }

    /// Ends with `error`.
    pub(crate) fn fail(&mut self, error: EngineError) {
        self.finish(T::failure(error));
    }

    /// Whether nobody waits for more: the last item was sent, or the client went away.
    pub(crate) fn is_over(&self) -> bool {
        self.ended || self.items.is_closed()
    }
}

impl<T: Failure> Drop for Reply<T> {
    fn drop(&mut self) {
        if !self.ended {
            self.fail(EngineError::Stopping);
        }
    }
}

/// Answers once, with rows of a MoE block.
#[derive(Debug)]
pub(crate) struct RowsReply(Option<oneshot::Sender<Result<Combined, EngineError>>>);

impl RowsReply {
    /// A reply and where it arrives.
    pub(crate) fn new() -> (Self, oneshot::Receiver<Result<Combined, EngineError>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)), receiver)
    }

    /// Answers; a client that went away does not matter any more.
    pub(crate) fn send(mut self, rows: Result<Combined, EngineError>) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(rows);
        }
    }

    /// Whether the client went away.
    pub(crate) fn is_over(&self) -> bool {
        self.0.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

impl Drop for RowsReply {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(Err(EngineError::Stopping));
        }
    }
}

/// A place in the queue: counted from the moment the handle accepts a request until it starts (until it is answered, for
/// rows of a MoE block), given back on drop.
#[derive(Debug)]
pub(crate) struct QueuePlace(Arc<AtomicUsize>);

impl QueuePlace {
    /// A place among `limit`, or an error if all are taken.
    pub(crate) fn take(waiting: &Arc<AtomicUsize>, limit: usize) -> Result<Self, EngineError> {
        waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| {
                (count < limit).then_some(count + 1)
            })
            .map(|_| Self(Arc::clone(waiting)))
            .map_err(|_| EngineError::QueueFull { limit })
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FinishReason;

    fn token(id: u32, finish: Option<FinishReason>) -> TokenEvent {
        TokenEvent::Token {
            id,
            logprobs: None,
            cached_tokens: 0,
            degraded: false,
            finish,
        }
    }

    #[test]
    fn a_reply_dropped_before_its_end_says_that_the_engine_stopped() {
        let (mut reply, mut events) = Reply::new(2);
        reply.send(token(7, None));
        drop(reply);
        assert!(matches!(events.try_recv(), Ok(TokenEvent::Token { id: 7, .. })));
        assert!(matches!(
            events.try_recv(),
            Ok(TokenEvent::Failed(EngineError::Stopping))
        ));
        assert!(events.try_recv().is_err());

        let (reply, mut rows) = RowsReply::new();
        drop(reply);
        assert!(matches!(rows.try_recv(), Ok(Err(EngineError::Stopping))));
    }

    #[test]
    fn a_finished_reply_says_nothing_more() {
        let (mut reply, mut events) = Reply::new(1);
        reply.finish(token(7, Some(FinishReason::Stop)));
        assert!(reply.is_over());
        drop(reply);
        assert!(matches!(
            events.try_recv(),
            Ok(TokenEvent::Token {
                finish: Some(FinishReason::Stop),
                ..
            })
        ));
        assert!(events.try_recv().is_err());
    }

    #[test]
    fn a_reply_without_a_client_is_over() {
        let (mut reply, events) = Reply::new(1);
        assert!(!reply.is_over());
        drop(events);
        assert!(reply.is_over());
        reply.send(token(7, None));
    }

    #[test]
    fn places_in_the_queue_are_bounded_and_come_back() {
        let waiting = Arc::new(AtomicUsize::new(0));
        let first = QueuePlace::take(&waiting, 2).expect("two places");
        let _second = QueuePlace::take(&waiting, 2).expect("two places");
        assert!(matches!(
            QueuePlace::take(&waiting, 2),
            Err(EngineError::QueueFull { limit: 2 })
        ));
        drop(first);
        assert_eq!(waiting.load(Ordering::Acquire), 1);
        QueuePlace::take(&waiting, 2).expect("one came back");
    }
}
