//! What is told of one process, written anew each time it is read.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

/// Something that counts.
pub trait Figures: fmt::Debug + Send + Sync + 'static {
    /// Writes its figures as they are now.
    fn write(&self, page: &mut Page<'_>) -> fmt::Result;
}

/// Whether a figure only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It counts from the start of the process; `_total` is put behind its name.
    Counter,
    /// It is what it is now.
    Gauge,
}

/// The page that is being written. Names go without `moerun_`.
#[derive(Debug)]
pub struct Page<'a> {
    encoder: DescriptorEncoder<'a>,
}

impl Page<'_> {
    /// One figure.
    pub fn figure(&mut self, kind: Kind, name: &str, help: &str, value: impl Into<f64>) -> fmt::Result {
        let name = full(name);
        let mut metric = (self.encoder).encode_descriptor(&name, help, None, kind.as_type())?;
        write(&mut metric, kind, value.into())
    }

    /// A figure of each of several, told apart by their labels.
    pub fn family<L: EncodeLabelSet>(
        &mut self,
        kind: Kind,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let name = full(name);
        let mut family = (self.encoder).encode_descriptor(&name, help, None, kind.as_type())?;
        for (labels, value) in values {
            write(&mut family.encode_family(&labels)?, kind, value)?;
        }
        Ok(())
    }

    /// A histogram of each of several: the sum of what was observed, and how much of it was at most each bound, not counting
    /// what was at most the bound before; the last bound is infinite.
    pub fn histograms<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, f64, Vec<(f64, u64)>)>,
    ) -> fmt::Result {
        let name = full(name);
        let mut family = (self.encoder).encode_descriptor(&name, help, None, MetricType::Histogram)?;
        for (labels, sum, buckets) in values {
            let count = buckets.iter().map(|(_, count)| count).sum();
            let mut metric = family.encode_family(&labels)?;
            metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

impl Kind {
    fn as_type(self) -> MetricType {
        match self {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        }
    }
}

fn full(name: &str) -> String {
    format!("moerun_{name}")
}

fn write(metric: &mut MetricEncoder<'_>, kind: Kind, value: f64) -> fmt::Result {
    match kind {
        Kind::Counter => metric.encode_counter::<NoLabelSet, f64, f64>(&value, None),
        Kind::Gauge => metric.encode_gauge(&value),
    }
}

/// [`Figures`] as the library wants them.
#[derive(Debug)]
pub(crate) struct Source<F>(pub(crate) F);

impl<F: Figures> Collector for Source<F> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.write(&mut Page { encoder })
    }
}
