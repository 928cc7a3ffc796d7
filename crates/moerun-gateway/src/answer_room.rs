//! Memory for large answers, logits and rows of MoE layers: they are computed whether or not the client reads them, so all
//! requests share one bound.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::GatewayError;

/// Memory for the large answers of all requests together.
#[derive(Debug)]
pub(crate) struct AnswerRoom {
    free_kib: Arc<Semaphore>,
    limit_kib: u32,
}

/// A request's share, given back on drop: keep it as long as the answer.
#[derive(Debug)]
pub struct AnswerShare(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl AnswerRoom {
    /// Room for `limit_kib` KiB.
    pub(crate) fn new(limit_kib: u32) -> Self {
        AnswerRoom {
            free_kib: Arc::new(Semaphore::new(limit_kib as usize)),
            limit_kib,
        }
    }

    /// Room for `rows` rows of `width` f32, or an error if others have too much of it.
    ///
    /// A request for more than there is at all takes everything: the engine refuses it with the number that would do.
    pub(crate) fn take(&self, rows: usize, width: usize) -> Result<AnswerShare, GatewayError> {
        let bytes = (rows as u64).saturating_mul(width as u64 * size_of::<f32>() as u64);
        let wanted_kib = u32::try_from(bytes.div_ceil(1024)).map_or(self.limit_kib, |kib| kib.min(self.limit_kib));
        Arc::clone(&self.free_kib)
            .try_acquire_many_owned(wanted_kib)
            .map(AnswerShare)
            .map_err(|_| GatewayError::AnswersFull {
                wanted_kib,
                limit_kib: self.limit_kib,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_shared_and_comes_back() {
        let room = AnswerRoom::new(100);
        let first = room.take(60, 256).unwrap();
        let error = room.take(41, 256).unwrap_err();
        assert!(
            matches!(
                error,
                GatewayError::AnswersFull {
                    wanted_kib: 41,
                    limit_kib: 100
                }
            ),
            "{error}"
        );
        let second = room.take(39, 257).unwrap(); // 39.2 KiB take 40
        assert!(room.take(1, 1).is_err());
        drop((first, second));
        room.take(usize::MAX, 256).unwrap();
        room.take(100, 256).unwrap();
    }
}
