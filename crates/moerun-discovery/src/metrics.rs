//! What discovery shows to Prometheus.

use std::{fmt, sync::Arc};

use moerun_metrics::{Figures, Kind, MAX_LABELLED, Page};

use crate::{Discovery, SourceStats};

/// Each source of a gateway's workers.
#[derive(Debug)]
pub struct DiscoveryFigures(Arc<Discovery>);

impl DiscoveryFigures {
    /// Of these sources.
    pub fn new(discovery: Arc<Discovery>) -> Self {
        Self(discovery)
    }
}

impl Figures for DiscoveryFigures {
    fn write(&self, page: &mut Page<'_>) -> fmt::Result {
        type Value = fn(&SourceStats) -> f64;
        let figures: [(Kind, &str, &str, Value); 5] = [
            (
                Kind::Gauge,
                "discovery_up",
                "Whether a source says who is there; if not, its last known workers stay",
                |it| f64::from(u8::from(it.failing.is_none())),
            ),
            (
                Kind::Gauge,
                "discovery_workers",
                "Workers that a source is believed to have",
                |it| it.workers as f64,
            ),
            (Kind::Counter, "discovery_answers", "Lists that a source named", |it| {
                it.answers as f64
            }),
            (
                Kind::Counter,
                "discovery_errors",
                "Times that a source failed to",
                |it| it.errors as f64,
            ),
            (
                Kind::Counter,
                "discovery_changes",
                "Times that its list changed",
                |it| it.changes as f64,
            ),
        ];
        let mut sources = self.0.stats();
        sources.truncate(MAX_LABELLED);
        for (kind, name, help, value) in figures {
            let values = sources.iter().map(|it| ([("source", it.source.as_str())], value(it)));
            page.family(kind, name, help, values)?;
        }
        #[cfg(feature = "etcd")]
        if let Some(coordination) = self.0.coordination() {
            let leads = f64::from(u8::from(coordination.leading().borrow().is_some()));
            page.figure(
                Kind::Gauge,
                "leads",
                "Whether this gateway is the one that plans",
                leads,
            )?;
            let epoch = coordination
                .plan()
                .borrow()
                .as_ref()
                .map_or(0.0, |plan| plan.epoch as f64);
            page.figure(
                Kind::Gauge,
                "published_plan_epoch",
                "Of the plan in etcd; 0 without one",
                epoch,
            )?;
        }
        Ok(())
    }
}
