//! Every tensor on disk against what the config asks for.

use std::collections::HashSet;

use moerun_types::{Family, ModelConfig};

use crate::{
    Dtype, Needs, WeightsError,
    expected::{ExpectedTensor, ExpectedTypes, ModelPart, scale_name},
    store::{StoredTensor, TensorStore},
};

impl Needs {
    /// Whether a process with these needs can do without a tensor.
    pub(crate) fn allow_absence(self, part: ModelPart) -> bool {
        match (self, part) {
            (Needs::All, _) => false,
            (Needs::GatewayOnly, part) => matches!(part, ModelPart::Experts(_)),
            (Needs::ExpertsOnly, part) => matches!(part, ModelPart::Dense(_)),
            (Needs::Nothing, _) => true,
        }
    }
}

/// Checks presence, shape and type of every expected tensor, and that nothing else is there but known extras.
pub(crate) fn verify(
    store: &TensorStore,
    config: &ModelConfig,
    expected: &[ExpectedTensor],
    needs: Needs,
) -> Result<(), WeightsError> {
    let mut known: HashSet<String> = expected.iter().map(|tensor| tensor.name.clone()).collect();
    for tensor in expected {
        match store.get(&tensor.name) {
            Some(stored) => {
                if check(tensor, stored)? == Dtype::F8E4M3 {
                    known.insert(check_scales(store, tensor)?);
                }
            }
            None if needs.allow_absence(tensor.part) => {}
            None => {
                let others = unexpected(store, config, &known);
                return Err(missing(&tensor.name, &tensor.shape, most_similar(&tensor.name, others)));
            }
        }
    }
    // The store has no order; the first by name makes the message the same every time.
    if let Some((name, stored)) = unexpected(store, config, &known).min_by_key(|(name, _)| *name) {
        return Err(WeightsError::Unexpected {
            tensor: name.to_owned(),
            shard: store.shard_name(stored).to_owned(),
            dtype: stored.element.name.to_owned(),
            shape: stored.shape.clone(),
        });
    }
    log_extras(store, &known);
    Ok(())
}

fn missing(tensor: &str, wanted: &[usize], found: Option<&str>) -> WeightsError {
    let found = found.map_or_else(|| "nothing".to_owned(), |name| format!("an unexpected tensor {name}"));
    WeightsError::Missing {
        tensor: tensor.to_owned(),
        wanted: wanted.to_vec(),
        found,
    }
}

/// Which of the tensors shares most of the beginning of a name: what the missing one may be called here.
fn most_similar<'a>(name: &str, others: impl Iterator<Item = (&'a str, &'a StoredTensor)>) -> Option<&'a str> {
    let shared = |other: &str| name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    others
        .map(|(other, _)| other)
        .max_by_key(|other| (shared(other), std::cmp::Reverse(*other)))
}

/// Tensors that are neither known nor extras of the family.
fn unexpected<'a>(
    store: &'a TensorStore,
    config: &'a ModelConfig,
    known: &'a HashSet<String>,
) -> impl Iterator<Item = (&'a str, &'a StoredTensor)> {
    store
        .iter()
        .filter(move |(name, _)| !known.contains(*name) && !is_known_extra(config, name))
}

fn log_extras(store: &TensorStore, known: &HashSet<String>) {
    let extras = || store.iter().map(|(name, _)| name).filter(|name| !known.contains(*name));
    if let (Some(first), Some(last)) = (extras().min(), extras().max()) {
        tracing::info!(
            count = extras().count(),
            first,
            last,
            "tensors that this family may carry are skipped"
        );
    }
}

fn check(tensor: &ExpectedTensor, stored: &StoredTensor) -> Result<Dtype, WeightsError> {
    check_shape(&tensor.name, &tensor.shape, stored)?;
    match stored.element.dtype {
        Some(dtype) if tensor.types.allow(dtype) => Ok(dtype),
        _ => Err(WeightsError::wrong_type(
            &tensor.name,
            tensor.types.wanted(),
            stored.element.name,
        )),
    }
}

fn check_shape(name: &str, wanted: &[usize], stored: &StoredTensor) -> Result<(), WeightsError> {
    if stored.shape == wanted {
        return Ok(());
    }
    let (wanted, found) = (wanted.to_vec(), stored.shape.clone());
    Err(WeightsError::Shape {
        tensor: name.to_owned(),
        wanted,
        found,
    })
}

/// The scales of an fp8 tensor: one number per block, the last blocks may be short. DeepSeek stores them in F32, Qwen in
/// BF16.
fn check_scales(store: &TensorStore, tensor: &ExpectedTensor) -> Result<String, WeightsError> {
    let name = scale_name(&tensor.name);
    let (
        &[rows, cols],
        ExpectedTypes::PlainOrFp8 {
            rows: block_rows,
            cols: block_cols,
        },
    ) = (&tensor.shape[..], tensor.types)
    else {
        return Err(WeightsError::wrong_type(
            &tensor.name,
            crate::error::PLAIN_TYPES,
            Dtype::F8E4M3,
        ));
    };
    let shape = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
    let stored = store.get(&name).ok_or_else(|| missing(&name, &shape, None))?;
    check_shape(&name, &shape, stored)?;
    match stored.element.dtype {
        Some(dtype) if ExpectedTypes::Plain.allow(dtype) => Ok(name),
        _ => Err(WeightsError::wrong_type(
            &name,
            crate::error::PLAIN_TYPES,
            stored.element.name,
        )),
    }
}

/// Tensors that checkpoints of a family carry and that generation does not use.
fn is_known_extra(config: &ModelConfig, name: &str) -> bool {
    // Buffers that older versions saved; the frequencies follow from the config.
    if name.ends_with("rotary_emb.inv_freq") {
        return true;
    }
    if config.tied_head && name == "lm_head.weight" {
        return true;
    }
    match config.family {
        // Layers after the last predict further tokens during training (multi-token prediction).
        Family::DeepseekV3 | Family::Glm4Moe => name
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.'))
            .is_some_and(|(layer, _)| layer.parse() == Ok(config.layers.len())),
        Family::Ernie45Moe => name.starts_with("model.mtp_"),
        _ => false,
    }
}
