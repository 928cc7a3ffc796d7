//! How often each expert is chosen: moving averages, and the file that they are kept in.

use std::collections::BTreeMap;

use moerun_types::LayerId;
use serde::{Deserialize, Serialize};

use super::PlannerError;
use crate::Routing;

/// Version of the JSON that [`ExpertLoads::from_json`] reads.
const VERSION: u32 = 1;

/// Load of every expert of every MoE layer, on any positive scale: what counts is how experts of one layer compare.
///
/// Recorded by [`record`](Self::record) as counts that fade with [`fade`](Self::fade), or read from a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertLoads {
    version: u32,
    /// What was recorded, in the words of whoever did.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// One value per expert, by model layer.
    layers: BTreeMap<u32, Vec<f64>>,
}

impl ExpertLoads {
    /// All zero, which plans as if every expert were chosen alike.
    pub fn new(moe_layers: &[LayerId], num_experts: usize) -> Self {
        Self {
            version: VERSION,
            source: String::new(),
            layers: moe_layers
                .iter()
                .map(|layer| (layer.0, vec![0.0; num_experts]))
                .collect(),
        }
    }

    /// The given loads, one vector per layer.
    pub fn from_layers(layers: impl IntoIterator<Item = (LayerId, Vec<f64>)>) -> Self {
        Self {
            version: VERSION,
            source: String::new(),
            layers: layers.into_iter().map(|(layer, loads)| (layer.0, loads)).collect(),
        }
    }

    /// Adds one for every row and expert that `routing` chose in `layer`. A layer or expert that is not there is left
    /// out: it is not planned.
    pub fn record(&mut self, layer: LayerId, routing: &Routing) {
        let Some(loads) = self.layers.get_mut(&layer.0) else {
            return;
        };
        for expert in &routing.expert_ids {
            if let Some(load) = loads.get_mut(usize::from(expert.0)) {
                *load += 1.0;
            }
        }
    }

    /// Multiplies all by `factor`, so that what was long ago counts less than what is added next: an exponential moving
    /// average when done at even intervals.
    pub fn fade(&mut self, factor: f64) {
        for load in self.layers.values_mut().flatten() {
            *load *= factor;
        }
    }

    /// Layers and their loads, ascending.
    pub fn layers(&self) -> impl Iterator<Item = (LayerId, &[f64])> {
        self.layers
            .iter()
            .map(|(&layer, loads)| (LayerId(layer), loads.as_slice()))
    }

    /// Loads of one layer.
    pub fn of(&self, layer: LayerId) -> Option<&[f64]> {
        self.layers.get(&layer.0).map(Vec::as_slice)
    }

    /// Reads what [`to_json`](Self::to_json) wrote. Errors: other JSON, another version.
    pub fn from_json(text: &str) -> Result<Self, PlannerError> {
        let loads: ExpertLoads = serde_json::from_str(text).map_err(|error| PlannerError::LoadsSyntax {
            reason: error.to_string(),
        })?;
        if loads.version != VERSION {
            return Err(PlannerError::LoadsSyntax {
                reason: format!("version {}: wanted {VERSION}", loads.version),
            });
        }
        Ok(loads)
    }

    /// As JSON: `{"version": 1, "source": …, "layers": {"0": [loads of its experts], …}}`, one line per layer.
    pub fn to_json(&self) -> String {
        let layers: Vec<String> = self
            .layers
            .iter()
            .map(|(layer, loads)| {
                let loads: Vec<String> = loads.iter().map(f64::to_string).collect();
                format!("    \"{layer}\": [{}]", loads.join(", "))
            })
            .collect();
        let source = serde_json::Value::from(self.source.as_str());
        format!(
            "{{\n  \"version\": {VERSION},\n  \"source\": {source},\n  \"layers\": {{\n{}\n  }}\n}}\n",
            layers.join(",\n")
        )
    }

    /// The shares of the experts of each of `moe_layers`: they sum to 1 in each layer, and are even where nothing was
    /// counted. Errors: a layer that is missing, another number of experts, a load that is negative or not finite.
    pub(super) fn shares(&self, moe_layers: &[LayerId], num_experts: usize) -> Result<Vec<Vec<f64>>, PlannerError> {
        moe_layers
            .iter()
            .map(|&layer| {
                let loads = self.of(layer).ok_or(PlannerError::LoadsMissing { layer })?;
                if loads.len() != num_experts {
                    return Err(PlannerError::LoadsLength {
                        layer,
                        wanted: num_experts,
                        found: loads.len(),
                    });
                }
                if let Some((expert, &load)) = loads.iter().enumerate().find(|(_, load)| !is_load(**load)) {
                    return Err(PlannerError::BadLoad { layer, expert, load });
                }
                let largest = loads.iter().copied().fold(0.0, f64::max);
                if largest == 0.0 {
                    return Ok(vec![1.0 / num_experts as f64; num_experts]);
                }
                // Divided twice, so that no sum overflows.
                let scaled: Vec<f64> = loads.iter().map(|load| load / largest).collect();
                let sum: f64 = scaled.iter().sum();
                Ok(scaled.iter().map(|load| load / sum).collect())
            })
            .collect()
    }
}

fn is_load(load: f64) -> bool {
    load.is_finite() && load >= 0.0
}

#[cfg(test)]
mod tests {
    use moerun_types::ExpertId;

    use super::*;

    fn layers() -> Vec<LayerId> {
        vec![LayerId(1), LayerId(3)]
    }

    #[test]
    fn choices_are_counted_and_fade() {
        let mut loads = ExpertLoads::new(&layers(), 4);
        let routing = Routing {
            top_k: 2,
            expert_ids: [3, 1, 1, 0].map(ExpertId).to_vec(),
            routing_weights: vec![0.5; 4],
        };
        loads.record(LayerId(3), &routing);
        loads.fade(0.5);
        loads.record(LayerId(3), &routing);
        loads.record(LayerId(7), &routing); // not a layer of ours
        assert_eq!(loads.of(LayerId(3)), Some(&[1.5, 3.0, 0.0, 1.5][..]));
        assert_eq!(loads.of(LayerId(1)), Some(&[0.0; 4][..]));
        let shares = loads.shares(&layers(), 4).unwrap();
        assert_eq!(shares, [[0.25; 4], [0.25, 0.5, 0.0, 0.25]]);
    }

    #[test]
    fn json_is_read_as_it_was_written() {
        let mut loads = ExpertLoads::from_layers([(LayerId(1), vec![1.0, 0.1 + 0.2]), (LayerId(10), vec![3.0, 0.0])]);
        loads.source = "a \"quoted\" name".to_owned();
        assert_eq!(ExpertLoads::from_json(&loads.to_json()), Ok(loads));
    }

    #[test]
    fn what_is_no_load_is_refused_by_name() {
        let shares = |loads: Vec<f64>| ExpertLoads::from_layers([(LayerId(1), loads)]).shares(&[LayerId(1)], 2);
        for (loads, words) in [
            (vec![1.0], "wanted 2 experts, found 1"),
            (
                vec![1.0, -1.0],
                "layer 1 expert 1: wanted a load of 0 or more, found -1",
            ),
            (vec![f64::NAN, 1.0], "found NaN"),
            (vec![f64::INFINITY, 1.0], "found inf"),
        ] {
            let error = shares(loads).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(shares(vec![f64::MAX, f64::MAX]), Ok(vec![vec![0.5; 2]]));
        let missing = ExpertLoads::new(&[], 2).shares(&[LayerId(1)], 2).unwrap_err();
        assert_eq!(missing, PlannerError::LoadsMissing { layer: LayerId(1) });
        for text in [
            "",
            "{}",
            r#"{"version": 2, "layers": {}}"#,
            r#"{"version": 1, "layers": {"x": []}}"#,
        ] {
            assert!(
                matches!(ExpertLoads::from_json(text), Err(PlannerError::LoadsSyntax { .. })),
                "{text}"
            );
        }
    }
}
