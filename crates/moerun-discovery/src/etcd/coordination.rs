//! What a gateway has of etcd beside the workers: whether it leads, and the plan.

use tokio::sync::watch;

use super::{Etcd, EtcdError, Leadership, PublishedPlan, publish_plan, stand, watch_plan};
use crate::discovery::Work;

/// What gateways agree on. Each stands for election; the one that leads may publish plans, and all see them.
#[derive(Debug)]
pub struct Coordination {
    etcd: Etcd,
    leading: watch::Receiver<Option<Leadership>>,
    plan: watch::Receiver<Option<PublishedPlan>>,
}

impl Coordination {
    /// … and the work that keeps it so, which ends when it is dropped.
    pub(crate) fn begin(etcd: Etcd, name: String) -> (Self, [Work; 2]) {
        let (lead, leading) = watch::channel(None);
        let (publish, plan) = watch::channel(None);
        let work: [Work; 2] = [
            Box::pin(stand(etcd.clone(), name, lead)),
            Box::pin(watch_plan(etcd.clone(), publish)),
        ];
        (Self { etcd, leading, plan }, work)
    }

    /// Whether this gateway leads, as it changes.
    pub fn leading(&self) -> watch::Receiver<Option<Leadership>> {
        self.leading.clone()
    }

    /// The newest plan, as it changes; while etcd does not answer, the last one.
    pub fn plan(&self) -> watch::Receiver<Option<PublishedPlan>> {
        self.plan.clone()
    }

    /// Publishes a plan for all gateways, if this one leads and the plan's epoch is above that of the one that is there.
    pub async fn publish(&self, plan: &PublishedPlan) -> Result<(), EtcdError> {
        let Some(leadership) = self.leading.borrow().clone() else {
            return Err(EtcdError::NotLeader);
        };
        publish_plan(&self.etcd, &leadership, plan).await
    }
}
