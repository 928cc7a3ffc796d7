//! What to do when no holder of an expert is left.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What to do when no holder of an expert is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExpertLoss {
    /// This process computes it, where its own checkpoint has it: exact, slower. Else the request fails.
    #[default]
    Local,
    /// The request fails.
    Fail,
    /// The expert is left out, and the other weights of the row are scaled to the same sum: not exact, and told in the
    /// response.
    Skip,
}

impl fmt::Display for OnExpertLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnExpertLoss::Local => "local",
            OnExpertLoss::Fail => "fail",
            OnExpertLoss::Skip => "skip",
        })
    }
}

impl FromStr for OnExpertLoss {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "local" => Ok(OnExpertLoss::Local),
            "fail" => Ok(OnExpertLoss::Fail),
            "skip" => Ok(OnExpertLoss::Skip),
            other => Err(format!("wanted local, fail or skip, found {other:?}")),
        }
    }
}
