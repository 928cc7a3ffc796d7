//! Copies of checkpoints with something changed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::{Element, RawFile, RawTensor, TestkitError, decode, encode};

const INDEX: &str = "model.safetensors.index.json";

/// Copies every file of a checkpoint but the golden tensors into `to`, which is created.
pub fn copy_checkpoint(from: &Path, to: &Path) -> Result<(), TestkitError> {
    fs::create_dir_all(to).map_err(TestkitError::io(to))?;
    for entry in fs::read_dir(from).map_err(TestkitError::io(from))? {
        let path = entry.map_err(TestkitError::io(from))?.path();
        let Some(name) = path.file_name() else { continue };
        if path.is_file() && !name.to_string_lossy().starts_with("golden.") {
            fs::copy(&path, to.join(name)).map_err(TestkitError::io(&path))?;
        }
    }
    Ok(())
}

/// A copy that holds no expert, for a gateway that must not need any.
pub fn copy_without_experts(from: &Path, to: &Path) -> Result<(), TestkitError> {
    copy_checkpoint(from, to)?;
    edit_tensors(to, |tensors| tensors.retain(|tensor| !is_expert_tensor(&tensor.name)))
}

/// A copy that holds nothing but the experts, for a worker that must not need more.
pub fn copy_only_experts(from: &Path, to: &Path) -> Result<(), TestkitError> {
    copy_checkpoint(from, to)?;
    edit_tensors(to, |tensors| tensors.retain(|tensor| is_expert_tensor(&tensor.name)))
}

/// A copy in which one number of one tensor differs: another training of the same architecture.
pub fn copy_perturbed(from: &Path, to: &Path, tensor: &str) -> Result<(), TestkitError> {
    copy_checkpoint(from, to)?;
    perturb_tensor(to, tensor, 0.5)
}

/// Whether a tensor belongs to a routed expert, by the names of all families.
pub fn is_expert_tensor(name: &str) -> bool {
    [".experts.", ".input_linear.", ".output_linear."]
        .iter()
        .any(|part| name.contains(part))
}

/// Rewrites every weight file of a directory with what `edit` makes of its tensors, and the index to match.
pub fn edit_tensors(dir: &Path, mut edit: impl FnMut(&mut Vec<RawTensor>)) -> Result<(), TestkitError> {
    let mut weight_map = BTreeMap::new();
    for path in weight_files(dir)? {
        let mut file = RawFile::read(&path)?;
        edit(&mut file.tensors);
        file.write(&path)?;
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        weight_map.extend(file.tensors.into_iter().map(|tensor| (tensor.name, file_name.clone())));
    }
    if dir.join(INDEX).exists() {
        edit_json(dir, INDEX, |index| index["weight_map"] = json!(weight_map))?;
    }
    Ok(())
}

/// Changes the one tensor called `name`: its name, type, shape or data.
pub fn edit_tensor(dir: &Path, name: &str, edit: impl FnOnce(&mut RawTensor)) -> Result<(), TestkitError> {
    let mut edit = Some(edit);
    edit_tensors(dir, |tensors| {
        if let Some(tensor) = tensors.iter_mut().find(|tensor| tensor.name == name)
            && let Some(edit) = edit.take()
        {
            edit(tensor);
        }
    })?;
    match edit {
        None => Ok(()),
        Some(_) => Err(TestkitError::MissingTensor { name: name.to_owned() }),
    }
}

/// Adds `amount` to the first element of a tensor.
pub fn perturb_tensor(dir: &Path, name: &str, amount: f64) -> Result<(), TestkitError> {
    edit_tensor(dir, name, |tensor| {
        if let Some(element) = Element::from_name(&tensor.dtype) {
            let mut values = decode(element, &tensor.data);
            values.iter_mut().take(1).for_each(|value| *value += amount);
            tensor.data = encode(element, &values);
        }
    })
}

/// Rewrites a JSON file of a directory.
pub fn edit_json(dir: &Path, file: &str, edit: impl FnOnce(&mut Value)) -> Result<(), TestkitError> {
    let path = dir.join(file);
    let text = fs::read_to_string(&path).map_err(TestkitError::io(&path))?;
    let mut value: Value = serde_json::from_str(&text).map_err(|source| TestkitError::Json {
        path: path.clone(),
        source,
    })?;
    edit(&mut value);
    fs::write(&path, format!("{value:#}\n")).map_err(TestkitError::io(&path))
}

fn weight_files(dir: &Path) -> Result<Vec<PathBuf>, TestkitError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(TestkitError::io(dir))? {
        let path = entry.map_err(TestkitError::io(dir))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
