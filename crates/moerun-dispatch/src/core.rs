//! What all dispatches of a gateway share.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use moerun_routing::{Assignment, LayerPlan};
use moerun_types::{LayerId, Numerics};
use parking_lot::Mutex;
use rand::{SeedableRng, rngs::StdRng};
use tokio::time::Instant;

use crate::{
    OnExpertLoss,
    admission::Admission,
    budget::Budget,
    health::SizeClass,
    load_averages::LoadAverages,
    local_resort::LocalResort,
    run_plan::{Chooser, RunPlan},
    stats::{DispatchStats, Totals},
};

/// What all dispatches of a gateway share. Nothing in it knows who drives them.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) admission: Arc<Admission>,
    pub(crate) numerics: Numerics,
    /// The plan that new dispatches take.
    pub(crate) plan: ArcSwap<RunPlan>,
    pub(crate) retries: Mutex<Budget>,
    pub(crate) hedges: Mutex<Budget>,
    pub(crate) totals: Totals,
    /// How often each expert is chosen.
    pub(crate) loads: Mutex<LoadAverages>,
    /// How long one dispatch may take at most.
    pub(crate) dispatch_deadline: Duration,
    /// When no holder of an expert is left.
    pub(crate) on_loss: OnExpertLoss,
    /// Computes experts here, where that is asked for and possible.
    pub(crate) local: Option<Arc<LocalResort>>,
    random: Mutex<StdRng>,
}

/// Whom to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whom {
    /// Suspect and ejected holders too, if there are no others.
    AnyLive,
    /// Neither.
    OnlyGood,
}

impl Core {
    pub(crate) fn new(
        admission: Arc<Admission>,
        plan: RunPlan,
        seed: u64,
        dispatch_deadline: Duration,
        on_loss: OnExpertLoss,
        local: Option<Arc<LocalResort>>,
    ) -> Self {
        let now = Instant::now();
        Self {
            numerics: admission.numerics(),
            loads: Mutex::new(LoadAverages::new(admission.config(), now)),
            admission,
            plan: ArcSwap::from_pointee(plan),
            retries: Mutex::new(Budget::for_retries(now)),
            hedges: Mutex::new(Budget::for_hedges(now)),
            totals: Totals::default(),
            dispatch_deadline,
            on_loss,
            local,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
        }
    }

    /// Gives work of `layer` to live holders that are not in `tried`.
    pub(crate) fn give_out(
        &self,
        plan: &RunPlan,
        layer: LayerId,
        work: &[Assignment],
        tried: &[usize],
        whom: Whom,
    ) -> LayerPlan {
        let mut random = self.random.lock();
        // By what each would get if all got the same.
        let class = SizeClass::of(work.len().div_ceil(plan.members.len().max(1)));
        let mut chooser = Chooser::new(plan, tried, class, Instant::now(), &mut random);
        if whom == Whom::OnlyGood {
            chooser = chooser.only_good();
        }
        plan.placement.plan_layer(layer, work, &mut |run| chooser.choose(run))
    }

    /// As plain numbers.
    pub(crate) fn stats(&self) -> DispatchStats {
        let plan = self.plan.load();
        let now = Instant::now();
        let totals = &self.totals;
        DispatchStats {
            plan_epoch: plan.epoch,
            workers: plan.members.iter().map(|member| member.stats(now)).collect(),
            dispatches: totals.dispatches.get(),
            calls: totals.calls.get(),
            retries: totals.retries.get(),
            retried_rows: totals.retried_rows.get(),
            hedges: totals.hedges.get(),
            hedges_won: totals.hedges_won.get(),
            retry_budget_exhausted: totals.retry_budget_exhausted.get(),
            local_assignments: totals.local_assignments.get(),
            skipped_assignments: totals.skipped_assignments.get(),
            canaries: totals.canaries.get(),
            canary_failures: totals.canary_failures.get(),
        }
    }
}
