//! What was found, and what would help.

use std::fmt;

use serde::Serialize;

/// How bad something is; the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// It works, and somebody should know.
    Warn,
    /// It does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    /// What was looked at.
    pub(crate) check: String,
    /// What was found.
    pub(crate) found: String,
    /// What would help; nothing where all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Ok => "OK  ",
            Level::Warn => "WARN",
            Level::Fail => "FAIL",
        };
        write!(f, "{level}  {}: {}", self.check, self.found)?;
        match &self.remedy {
            Some(remedy) => write!(f, " (wanted: {remedy})"),
            None => Ok(()),
        }
    }
}

/// All that was looked at, in order.
#[derive(Debug, Default)]
pub(crate) struct Findings(Vec<Finding>);

impl Findings {
    pub(crate) fn ok(&mut self, check: impl fmt::Display, found: impl fmt::Display) {
        self.push(Level::Ok, check, found, None);
    }

    pub(crate) fn warn(&mut self, check: impl fmt::Display, found: impl fmt::Display, remedy: impl fmt::Display) {
        self.push(Level::Warn, check, found, Some(remedy.to_string()));
    }

    pub(crate) fn fail(&mut self, check: impl fmt::Display, found: impl fmt::Display, remedy: impl fmt::Display) {
        self.push(Level::Fail, check, found, Some(remedy.to_string()));
    }

    fn push(&mut self, level: Level, check: impl fmt::Display, found: impl fmt::Display, remedy: Option<String>) {
        self.0.push(Finding {
            level,
            check: check.to_string(),
            found: found.to_string(),
            remedy,
        });
    }

    /// The worst level; that all is well if nothing was looked at.
    pub(crate) fn worst(&self) -> Level {
        self.0.iter().map(|it| it.level).max().unwrap_or(Level::Ok)
    }

    pub(crate) fn all(&self) -> &[Finding] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_decides_and_a_remedy_is_told() {
        let mut findings = Findings::default();
        assert_eq!(findings.worst(), Level::Ok);
        findings.warn("files", "limit 64", "ulimit -n 4096");
        findings.ok("cpu", "avx2");
        assert_eq!(findings.worst(), Level::Warn);
        findings.fail("port", "in use", "another");
        assert_eq!(findings.worst(), Level::Fail);
        assert_eq!(
            findings.all()[0].to_string(),
            "WARN  files: limit 64 (wanted: ulimit -n 4096)"
        );
        assert_eq!(findings.all()[1].to_string(), "OK    cpu: avx2");
    }
}
