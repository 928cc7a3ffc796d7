//! Log lines on standard error, as text for people or JSON for collectors.

use std::{
    env, fmt, io,
    io::IsTerminal,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use tracing_subscriber::{EnvFilter, fmt as log};

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line of text an event.
    #[default]
    Text,
    /// One JSON object an event.
    Json,
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            other => Err(format!("unknown log format {other:?}: wanted text or json")),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        })
    }
}

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter makes no sense.
    #[error("{origin}: {text:?} is not a log filter: {reason}")]
    Filter {
        /// The setting or environment variable.
        origin: &'static str,
        /// Its value.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It has been set up before.
    #[error("logging has been set up already")]
    AlreadySet,
}

/// Levels of a filter; `warning` or `inf` would silently be the name of a module that logs nothing.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Sends log lines to standard error. What is logged is said by `wanted`, the setting `log_level`; else by `MOERUN_LOG`,
/// else by `RUST_LOG`, else by `default_filter` (`info` for a server, `warn` for a command whose output a person reads).
/// Returns the filter, for processes that this one starts.
///
/// # Errors
/// A filter that makes no sense, with where it came from. Of a filter for us, each part is a level or `module=level`.
pub fn init_telemetry(format: LogFormat, wanted: Option<&str>, default_filter: &str) -> Result<String, TelemetryError> {
    let filter = filter(wanted, |variable| env::var(variable).ok(), default_filter)?;
    let in_force = filter.to_string();
    let builder = log::Subscriber::builder()
        .with_env_filter(filter)
        .with_writer(|| StandardError);
    match format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().try_init(),
    }
    .map_err(|_| TelemetryError::AlreadySet)?;
    Ok(in_force)
}

static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Log lines that could not be written, as where the disk is full.
pub(crate) fn dropped_log_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Standard error that takes everything: a line that cannot be written is dropped and counted. The subscriber would say on
/// standard error that standard error fails, and panic.
struct StandardError;

impl io::Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if io::stderr().write_all(line).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn filter(
    wanted: Option<&str>,
    lookup: impl Fn(&str) -> Option<String>,
    default_filter: &str,
) -> Result<EnvFilter, TelemetryError> {
    let given = [
        ("log_level", wanted.map(str::to_owned)),
        ("MOERUN_LOG", lookup("MOERUN_LOG")),
        ("RUST_LOG", lookup("RUST_LOG")),
    ];
    for (origin, text) in given {
        let Some(text) = text.filter(|text| !text.trim().is_empty()) else {
            continue;
        };
        let refused = |reason| TelemetryError::Filter {
            origin,
            text: text.clone(),
            reason,
        };
        if origin != "RUST_LOG"
            && let Some(word) = text
                .split(',')
                .map(str::trim)
                .find(|part| !is_level_or_assignment(part))
        {
            return Err(refused(format!(
                "wanted {} or MODULE=LEVEL, found {word:?}",
                LEVELS.join(", ")
            )));
        }
        return EnvFilter::try_new(&text).map_err(|error| refused(error.to_string()));
    }
    Ok(EnvFilter::new(default_filter))
}

fn is_level_or_assignment(part: &str) -> bool {
    part.contains('=') || LEVELS.iter().any(|level| part.eq_ignore_ascii_case(level))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter_of(wanted: Option<&str>, moerun: Option<&str>, rust: Option<&str>) -> Result<String, String> {
        let lookup = |variable: &str| match variable {
            "MOERUN_LOG" => moerun.map(str::to_owned),
            _ => rust.map(str::to_owned),
        };
        filter(wanted, lookup, "info")
            .map(|filter| filter.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn the_setting_goes_before_our_own_variable_and_that_before_the_general_one() {
        assert_eq!(filter_of(None, None, None).unwrap(), "info");
        assert_eq!(filter_of(None, None, Some("warn")).unwrap(), "warn");
        assert_eq!(filter_of(None, Some("debug"), Some("warn")).unwrap(), "debug");
        assert_eq!(filter_of(None, Some(" "), Some("warn")).unwrap(), "warn");
        assert_eq!(filter_of(Some("error"), Some("debug"), Some("warn")).unwrap(), "error");
    }

    #[test]
    fn a_senseless_filter_is_named_with_where_it_came_from() {
        let error = filter_of(None, Some("moerun=loud=er"), None).unwrap_err();
        assert!(
            error.starts_with("MOERUN_LOG: \"moerun=loud=er\" is not a log filter: "),
            "{error}"
        );
        let error = filter_of(Some("info,warning"), None, None).unwrap_err();
        assert!(
            error.starts_with("log_level: ") && error.contains("found \"warning\""),
            "{error}"
        );
        assert!(filter_of(Some("INFO,moerun_dispatch=debug"), None, None).is_ok());
    }

    #[test]
    fn log_formats_have_names() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(format.to_string().parse::<LogFormat>().unwrap(), format);
        }
        assert!("xml".parse::<LogFormat>().unwrap_err().contains("\"xml\""));
    }
}
