//! Figures of a process in the text format of Prometheus (OpenMetrics), and the plain HTTP door at which they are read.
//!
//! Nothing is counted here: whoever counts gives its counters as [`Figures`], which are read when somebody asks. Names are
//! `moerun_…` with their unit at the end. Labels come from what an operator set up (addresses of workers, names of sources)
//! and from lists in the code (reasons), never from a request, and there are at most [`MAX_LABELLED`] of a kind.
#![forbid(unsafe_code)]

mod door;
mod page;
mod process;

pub use door::MetricsDoor;
pub use page::{Figures, Kind, Page};

/// Most workers, or other things with names, that have figures of their own.
pub const MAX_LABELLED: usize = 256;
