//! Log lines on standard error, as text for people or JSON for collectors.

use std::{env, fmt, io, io::IsTerminal, str::FromStr};

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
    #[error("{variable}={text:?} is not a log filter: {reason}")]
    Filter {
        /// The environment variable.
        variable: &'static str,
        /// Its value.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It has been set up before.
    #[error("logging has been set up already")]
    AlreadySet,
}

/// Sends log lines to standard error. What is logged is said by `MOERUN_LOG`, else by `RUST_LOG`, else by
/// `default_filter` (`info` for a server, `warn` for a command whose output a person reads).
pub fn init_telemetry(format: LogFormat, default_filter: &str) -> Result<(), TelemetryError> {
    let filter = filter(|variable| env::var(variable).ok(), default_filter)?;
    let builder = log::Subscriber::builder()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().try_init(),
    }
    .map_err(|_| TelemetryError::AlreadySet)
}

fn filter(lookup: impl Fn(&str) -> Option<String>, default_filter: &str) -> Result<EnvFilter, TelemetryError> {
    for variable in ["MOERUN_LOG", "RUST_LOG"] {
        if let Some(text) = lookup(variable).filter(|text| !text.trim().is_empty()) {
            return EnvFilter::try_new(&text).map_err(|error| TelemetryError::Filter {
                variable,
                reason: error.to_string(),
                text,
            });
        }
    }
    Ok(EnvFilter::new(default_filter))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter_of(moerun: Option<&str>, rust: Option<&str>) -> Result<String, String> {
        let lookup = |variable: &str| match variable {
            "MOERUN_LOG" => moerun.map(str::to_owned),
            _ => rust.map(str::to_owned),
        };
        filter(lookup, "info")
            .map(|filter| filter.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn our_own_variable_goes_before_the_general_one() {
        assert_eq!(filter_of(None, None).unwrap(), "info");
        assert_eq!(filter_of(None, Some("warn")).unwrap(), "warn");
        assert_eq!(filter_of(Some("debug"), Some("warn")).unwrap(), "debug");
        assert_eq!(filter_of(Some(" "), Some("warn")).unwrap(), "warn");
    }

    #[test]
    fn a_senseless_filter_is_named() {
        let error = filter_of(Some("moerun=loud=er"), None).unwrap_err();
        assert!(
            error.starts_with("MOERUN_LOG=\"moerun=loud=er\" is not a log filter: "),
            "{error}"
        );
    }

    #[test]
    fn log_formats_have_names() {
        for format in [LogFormat::Text, LogFormat::Json] {
            assert_eq!(format.to_string().parse::<LogFormat>().unwrap(), format);
        }
        assert!("xml".parse::<LogFormat>().unwrap_err().contains("\"xml\""));
    }
}
