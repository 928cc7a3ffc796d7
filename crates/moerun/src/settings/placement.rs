//! Who says who holds what, as the settings say it.

use std::{fs, path::Path};

use moerun_dispatch::{Follow, PlacementPolicy};
use moerun_routing::planner::PlanFile;

use super::{Settings, SettingsError};

impl Settings {
    /// What a gateway is told of placement; reads the plan where one is named.
    pub(crate) fn placement_policy(&self) -> Result<PlacementPolicy, SettingsError> {
        let follow = match self.placement.as_str() {
            "held" => Follow::AsHeld,
            "auto" => Follow::Auto,
            file => Follow::Plan(Box::new(read(Path::new(file))?)),
        };
        Ok(PlacementPolicy {
            follow,
            replicas: self.placement_replicas,
            ..PlacementPolicy::default()
        })
    }
}

fn read(path: &Path) -> Result<PlanFile, SettingsError> {
    let refused = |why: String| SettingsError(format!("placement: wanted held, auto or a plan, found {path:?}: {why}"));
    let text = fs::read_to_string(path).map_err(|error| refused(error.to_string()))?;
    PlanFile::from_json(&text).map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_placement_is_refused_by_name() {
        let with = |placement: &str| Settings {
            placement: placement.to_owned(),
            ..Settings::default()
        };
        assert!(matches!(with("auto").placement_policy().unwrap().follow, Follow::Auto));
        assert!(matches!(
            Settings::default().placement_policy().unwrap().follow,
            Follow::AsHeld
        ));
        let error = with("/nowhere/plan.json").placement_policy().unwrap_err().to_string();
        assert!(
            error.contains("wanted held, auto or a plan, found \"/nowhere/plan.json\""),
            "{error}"
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "{}").unwrap();
        let error = with(file.path().to_str().unwrap())
            .placement_policy()
            .unwrap_err()
            .to_string();
        assert!(error.contains("wanted an object with a version"), "{error}");
    }
}
