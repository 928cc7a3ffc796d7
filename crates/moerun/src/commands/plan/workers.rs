//! Workers as they are given to `moerun plan`.

use std::str::FromStr;

use moerun_routing::planner::WorkerSpec;

use crate::{cli::PlanArgs, settings::SettingsError, size::ByteSize};

/// Bytes read per second, and seconds of a round trip, where nobody measured them.
const BANDWIDTH: f64 = 20e9;
const ROUND_TRIP_SECONDS: f64 = 100e-6;

/// The workers of the command line, in their order.
pub(super) fn workers(args: &PlanArgs) -> Result<Vec<WorkerSpec>, SettingsError> {
    if let (Some(count), Some(memory)) = (args.workers, args.memory) {
        return Ok((0..count).map(|index| plain(format!("w{index}"), memory)).collect());
    }
    args.worker
        .iter()
        .map(|text| parse(text).map_err(|why| SettingsError(format!("--worker {text:?}: {why}"))))
        .collect()
}

fn plain(name: String, memory: ByteSize) -> WorkerSpec {
    WorkerSpec {
        name,
        memory_bytes: memory.0,
        bandwidth: BANDWIDTH,
        round_trip_seconds: ROUND_TRIP_SECONDS,
        domain: None,
    }
}

/// `NAME=MEMORY[,bandwidth=SIZE][,rtt=TIME][,domain=NAME]`.
fn parse(text: &str) -> Result<WorkerSpec, String> {
    let wanted = "wanted NAME=MEMORY[,bandwidth=SIZE][,rtt=TIME][,domain=NAME]";
    let mut fields = text.split(',');
    let (name, memory) = fields.next().and_then(|first| first.split_once('=')).ok_or(wanted)?;
    if name.is_empty() {
        return Err(wanted.to_owned());
    }
    let mut worker = plain(name.to_owned(), memory.parse()?);
    for field in fields {
        match field.split_once('=') {
            Some(("bandwidth", size)) => worker.bandwidth = ByteSize::from_str(size.trim_end_matches("/s"))?.0 as f64,
            Some(("rtt", time)) => worker.round_trip_seconds = seconds(time)?,
            Some(("domain", domain)) if !domain.is_empty() => worker.domain = Some(domain.to_owned()),
            _ => return Err(format!("{wanted}, found {field:?}")),
        }
    }
    Ok(worker)
}

/// A time as people write it.
fn seconds(text: &str) -> Result<f64, String> {
    let refused = || format!("wanted a time such as 150us, 0.2ms or 1s, found {text:?}");
    let units = [("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let (number, unit) = units
        .iter()
        .find_map(|(name, unit)| text.strip_suffix(name).map(|number| (number, unit)))
        .ok_or_else(refused)?;
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number * unit),
        _ => Err(refused()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_read_with_all_that_was_measured() {
        let worker = parse("a=8GiB,bandwidth=12GB/s,rtt=150us,domain=rack1").unwrap();
        assert_eq!((worker.name.as_str(), worker.memory_bytes), ("a", 8 << 30));
        assert_eq!((worker.bandwidth, worker.domain.as_deref()), (12e9, Some("rack1")));
        assert!((worker.round_trip_seconds - 150e-6).abs() < 1e-12);
        let plain = parse("b=1GB").unwrap();
        assert_eq!((plain.bandwidth, plain.domain), (BANDWIDTH, None));
    }

    #[test]
    fn what_is_no_worker_is_refused_by_name() {
        for (text, words) in [
            ("a", "wanted NAME=MEMORY"),
            ("=1GB", "wanted NAME=MEMORY"),
            ("a=much", "found \"much\""),
            ("a=1GB,speed=3", "found \"speed=3\""),
            ("a=1GB,domain=", "found \"domain=\""),
            ("a=1GB,rtt=3", "wanted a time such as 150us"),
            ("a=1GB,rtt=-3ms", "wanted a time such as 150us"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
