//! A placement that keeps itself good: looked at now and then, and when somebody comes or goes.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, timeout};

use super::{Follow, Live, moves};
use crate::{DispatchError, member::Member};

/// How often the placement is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// … and at most, while what was tried fails.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// After somebody came or went, so long to see who else does.
const SETTLE: Duration = Duration::from_millis(100);
/// A worker that is gone for less is expected back: nothing moves for its sake.
const GONE_AFTER: Duration = Duration::from_secs(30);
/// Between two changes that are made for balance alone.
const COOL_DOWN: Duration = Duration::from_secs(60);

impl Live {
    /// Looks again and again at the placement, and makes it better where the policy says so. Never ends.
    pub(crate) async fn keep(self: Arc<Self>) -> Infallible {
        let mut pause = LOOK_INTERVAL;
        let mut next_for_balance = Instant::now();
        let mut gone_since: Vec<(String, Instant)> = Vec::new();
        loop {
            if timeout(pause, self.shared.changed.notified()).await.is_ok() {
                sleep(SETTLE).await;
            }
            self.note_gone(&mut gone_since);
            match self.look(&gone_since, &mut next_for_balance).await {
                Ok(()) => pause = LOOK_INTERVAL,
                Err(error) => {
                    tracing::warn!("the placement could not be changed: {error}");
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    async fn look(
        &self,
        gone_since: &[(String, Instant)],
        next_for_balance: &mut Instant,
    ) -> Result<(), DispatchError> {
        match &self.policy.follow {
            Follow::AsHeld => Ok(()),
            Follow::Plan(file) => {
                let _alone = self.changing.lock().await;
                let participants = self.participants().await?;
                let targets = self.targets_of(file, &participants)?;
                moves::carry_out(&self.shared, &targets).await
            }
            Follow::Auto => {
                if gone_since.iter().any(|(_, since)| since.elapsed() < GONE_AFTER) {
                    return Ok(());
                }
                let _alone = self.changing.lock().await;
                self.keep_good(next_for_balance).await
            }
        }
    }

    async fn keep_good(&self, next_for_balance: &mut Instant) -> Result<(), DispatchError> {
        let participants = self.participants().await?;
        let replicas = self.replicas(participants.len());
        let is_short = participants
            .iter()
            .any(|it| it.now.held.is_empty() && it.capacity_bytes() > 0)
            || self.fewest_holders() < replicas;
        if !is_short && Instant::now() < *next_for_balance {
            return Ok(());
        }
        let proposal = self.propose_among(participants).await?;
        let verdict = self.judge(&proposal);
        let moves = proposal.targets().iter().any(|target| !target.missing().is_empty());
        if moves && (is_short || verdict.worthwhile) {
            tracing::info!(reason = verdict.reason, "experts are moved");
            self.finish(proposal, verdict, false).await?;
            *next_for_balance = Instant::now() + COOL_DOWN;
        }
        Ok(())
    }

    /// Since when each member that is not connected is not.
    fn note_gone(&self, gone_since: &mut Vec<(String, Instant)>) {
        let members: Vec<Arc<Member>> = self.shared.members();
        let is_gone = |address: &str| {
            members
                .iter()
                .any(|it| it.address() == address && !it.link.is_up() && !it.is_drained() && it.announced().is_some())
        };
        gone_since.retain(|(address, _)| is_gone(address));
        for member in members.iter().filter(|it| is_gone(it.address())) {
            if !gone_since.iter().any(|(address, _)| address == member.address()) {
                gone_since.push((member.address().to_owned(), Instant::now()));
            }
        }
    }
}
