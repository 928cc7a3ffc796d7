//! `moerun forward`: one forward pass over a batch, written out tensor by tensor, so that anyone can check a family
//! against its original.

use std::{collections::BTreeMap, ops::Range, path::Path};

use anyhow::{Context, bail, ensure};
use moerun_engine::{Capture, Forward, ForwardMemory};
use moerun_kernels::KV_PAGE_TOKENS;
use moerun_model::{KvCache, MoeInput, Step, StepSequence};
use moerun_process::WARNINGS_AND_PROGRESS;
use moerun_routing::planner::ExpertLoads;
use moerun_types::{LayerId, ModelConfig};
use ndarray::Array2;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{
    cli::ForwardArgs,
    settings::{RoleFlags, Settings},
    stack::Experts,
};

/// Runs the command.
pub(crate) fn run(args: &ForwardArgs) -> anyhow::Result<()> {
    let role = RoleFlags {
        workers: args.workers,
        ..RoleFlags::default()
    };
    let mut settings = Settings::load(&args.serving, &role)?;
    super::start_logging(&mut settings, WARNINGS_AND_PROGRESS)?;
    check_can_be_written(&args.out)?;
    let batch = Batch::read(&args.inputs)?;
    let experts = Experts::start(&settings)?;
    let config = experts.model.config();
    let num_experts = config.moe.as_ref().map_or(0, |moe| moe.num_experts);
    let mut loads = args
        .loads
        .is_some()
        .then(|| ExpertLoads::new(&config.moe_layers(), num_experts));
    let outputs = forward(&experts, &settings, &batch, args.capture, loads.as_mut())?;
    if let (Some(path), Some(mut loads)) = (&args.loads, loads) {
        loads.source = format!("moerun forward --inputs {}", args.inputs.display());
        super::plan::write_whole(path, &loads.to_json())?;
    }
    outputs.write(&args.out)
}

/// A pass may take long: that its result has no place to go is said before it.
fn check_can_be_written(out: &Path) -> anyhow::Result<()> {
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder {
        ensure!(
            folder.is_dir(),
            "--out {}: wanted a folder that exists, found none at {}",
            out.display(),
            folder.display()
        );
    }
    ensure!(
        !out.is_dir(),
        "--out {}: wanted the path of a file, found a folder",
        out.display()
    );
    Ok(())
}

/// Token ids of a padded batch.
struct Batch {
    /// Rows of the batch.
    sequences: usize,
    /// Padded length.
    length: usize,
    /// `[sequences, length]`.
    token_ids: Vec<u32>,
    /// Valid positions of each sequence: one run.
    valid: Vec<Range<usize>>,
}

impl Batch {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("{}", path.display()))?;
        let tensors = SafeTensors::deserialize(&bytes).with_context(|| format!("{}", path.display()))?;
        let ids = tensors
            .tensor("input_ids")
            .with_context(|| format!("{}: input_ids", path.display()))?;
        let &[sequences, length] = ids.shape() else {
            bail!("input_ids: wanted shape [batch, sequence], found {:?}", ids.shape());
        };
        ensure!(
            sequences > 0 && length > 0,
            "input_ids: wanted at least one token, found shape {:?}",
            ids.shape()
        );
        let token_ids = integers("input_ids", &ids)?
            .into_iter()
            .map(|id| u32::try_from(id).with_context(|| format!("input_ids: wanted token ids, found {id}")))
            .collect::<anyhow::Result<Vec<u32>>>()?;
        let valid = match tensors.tensor("attention_mask") {
            Ok(mask) => {
                ensure!(
                    mask.shape() == ids.shape(),
                    "attention_mask: wanted shape {:?} as input_ids has, found {:?}",
                    ids.shape(),
                    mask.shape()
                );
                let mask = integers("attention_mask", &mask)?;
                mask.chunks(length)
                    .enumerate()
                    .map(valid_run)
                    .collect::<anyhow::Result<_>>()?
            }
            Err(_) => vec![0..length; sequences],
        };
        Ok(Batch {
            sequences,
            length,
            token_ids,
            valid,
        })
    }

    fn check(&self, config: &ModelConfig) -> anyhow::Result<()> {
        ensure!(
            self.length <= config.max_position_embeddings,
            "input_ids: wanted at most the {} positions that the checkpoint supports, found {}",
            config.max_position_embeddings,
            self.length
        );
        for (sequence, valid) in self.valid.iter().enumerate() {
            for position in valid.clone() {
                let id = self.token_ids[sequence * self.length + position];
                ensure!(
                    (id as usize) < config.vocab_size,
                    "input_ids[{sequence}, {position}] is {id}: wanted an id below the vocabulary's {}",
                    config.vocab_size
                );
            }
        }
        Ok(())
    }
}

/// Elements of an integer tensor.
fn integers(name: &str, tensor: &TensorView<'_>) -> anyhow::Result<Vec<i64>> {
    fn read<const N: usize>(bytes: &[u8], value: fn([u8; N]) -> i64) -> Vec<i64> {
        bytes.as_chunks::<N>().0.iter().map(|&chunk| value(chunk)).collect()
    }
    let bytes = tensor.data();
    Ok(match tensor.dtype() {
        Dtype::I64 => read(bytes, i64::from_le_bytes),
        Dtype::I32 => read(bytes, |chunk| i32::from_le_bytes(chunk).into()),
        Dtype::U32 => read(bytes, |chunk| u32::from_le_bytes(chunk).into()),
        Dtype::U8 | Dtype::BOOL => read(bytes, |[byte]| byte.into()),
        other => bail!("{name}: wanted integers (I64, I32, U32, U8 or BOOL), found {other:?}"),
    })
}

/// The one run of ones of a row of the mask.
fn valid_run((row, mask): (usize, &[i64])) -> anyhow::Result<Range<usize>> {
    if let Some(position) = mask.iter().position(|value| ![0, 1].contains(value)) {
        bail!(
            "attention_mask[{row}, {position}]: wanted 0 or 1, found {}",
            mask[position]
        );
    }
    let first = mask.iter().position(|&value| value == 1).unwrap_or(0);
    let end = mask
        .iter()
        .rposition(|&value| value == 1)
        .map_or(first, |last| last + 1);
    if let Some(hole) = (first..end).find(|&position| mask[position] == 0) {
        bail!("attention_mask[{row}]: wanted one run of ones (padding left and right only), found a 0 at {hole}");
    }
    Ok(first..end)
}

/// Named f32 and i64 tensors on their way to a file.
#[derive(Default)]
struct Outputs {
    floats: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    integers: BTreeMap<String, (Vec<usize>, Vec<i64>)>,
}

impl Outputs {
    /// Room for `[batch, sequence, width]`, zeros where no token is.
    fn float_rows(&mut self, batch: &Batch, name: String, width: usize) -> &mut [f32] {
        let shape = vec![batch.sequences, batch.length, width];
        let len = shape.iter().product();
        &mut self.floats.entry(name).or_insert_with(|| (shape, vec![0.0; len])).1
    }

    fn integer_rows(&mut self, batch: &Batch, name: String, width: usize) -> &mut [i64] {
        let shape = vec![batch.sequences, batch.length, width];
        let len = shape.iter().product();
        &mut self.integers.entry(name).or_insert_with(|| (shape, vec![0; len])).1
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let floats = self.floats.iter().map(|(name, (shape, data))| {
            let bytes: Vec<u8> = data.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, Dtype::F32, shape, bytes)
        });
        let integers = self.integers.iter().map(|(name, (shape, data))| {
            let bytes: Vec<u8> = data.iter().flat_map(|value| value.to_le_bytes()).collect();
            (name, Dtype::I64, shape, bytes)
        });
        let encoded: Vec<_> = floats.chain(integers).collect();
        let views = encoded
            .iter()
            .map(|(name, dtype, shape, bytes)| Ok((name.as_str(), TensorView::new(*dtype, shape.to_vec(), bytes)?)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let file = safetensors::serialize(views, None)?;
        let partial = path.with_extension("partial");
        std::fs::write(&partial, file).with_context(|| format!("{}", partial.display()))?;
        std::fs::rename(&partial, path).with_context(|| format!("{}", path.display()))
    }
}

/// Puts what a chunk computed where its tokens stand in the batch.
struct Recorder<'a> {
    outputs: &'a mut Outputs,
    batch: &'a Batch,
    /// `sequence * length + position` of each row of the chunk.
    places: Vec<usize>,
    moe_layers: &'a [LayerId],
    /// Whether tensors are kept, and not only counts.
    tensors: bool,
    loads: Option<&'a mut ExpertLoads>,
}

impl Recorder<'_> {
    fn floats(&mut self, name: String, rows: &Array2<f32>) {
        let width = rows.ncols();
        let room = self.outputs.float_rows(self.batch, name, width);
        for (row, &place) in rows.rows().into_iter().zip(&self.places) {
            for (to, &from) in room[place * width..(place + 1) * width].iter_mut().zip(row) {
                *to = from;
            }
        }
    }
}

impl Capture for Recorder<'_> {
    fn moe(&mut self, layer: LayerId, input: &MoeInput, output: &Array2<f32>) {
        if let Some(loads) = self.loads.as_deref_mut() {
            loads.record(layer, &input.routing);
        }
        if !self.tensors {
            return;
        }
        let j = self
            .moe_layers
            .iter()
            .position(|&other| other == layer)
            .expect("only MoE layers are captured here");
        self.floats(format!("moe.{j}.input"), &input.hidden_states);
        self.floats(format!("moe.{j}.output"), output);
        self.floats(format!("moe.{j}.router_logits"), &input.router_logits);
        let top_k = input.routing.top_k;
        for (row, &place) in self.places.iter().enumerate() {
            let chosen = row * top_k..(row + 1) * top_k;
            let mut experts: Vec<_> = input.routing.expert_ids[chosen.clone()]
                .iter()
                .zip(&input.routing.routing_weights[chosen])
                .map(|(expert, &weight)| (expert.0, weight))
                .collect();
            experts.sort_by_key(|&(expert, _)| expert);
            let room = place * top_k..(place + 1) * top_k;
            let ids = self
                .outputs
                .integer_rows(self.batch, format!("moe.{j}.topk_ids"), top_k);
            for (to, &(expert, _)) in ids[room.clone()].iter_mut().zip(&experts) {
                *to = expert.into();
            }
            let weights = self
                .outputs
                .float_rows(self.batch, format!("moe.{j}.topk_weights"), top_k);
            for (to, &(_, weight)) in weights[room].iter_mut().zip(&experts) {
                *to = weight;
            }
        }
    }

    fn layer_output(&mut self, layer: LayerId, hidden_states: &Array2<f32>) {
        if self.tensors {
            self.floats(format!("layer.{layer}.output"), hidden_states);
        }
    }
}

/// Runs every sequence in chunks of at most `max_batch_tokens` rows; which rows share a chunk changes no bit.
fn forward(
    experts: &Experts,
    settings: &Settings,
    batch: &Batch,
    capture: bool,
    mut loads: Option<&mut ExpertLoads>,
) -> anyhow::Result<Outputs> {
    let model = &experts.model;
    batch.check(model.config())?;
    let pages_each = batch.length.div_ceil(KV_PAGE_TOKENS);
    let mut kv = KvCache::new(model.config(), settings.kv_format, pages_each * batch.sequences);
    let pages: Vec<u32> = (0..u32::try_from(pages_each * batch.sequences)?).collect();
    let moe_layers = model.config().moe_layers();
    let mut memory = ForwardMemory::default();
    let mut outputs = Outputs::default();
    outputs.float_rows(batch, "logits".to_owned(), model.config().vocab_size);
    for chunk in chunks(batch, settings.max_batch_tokens) {
        let mut token_ids = Vec::new();
        let mut places = Vec::new();
        let mut sequences = Vec::new();
        for (sequence, positions) in chunk {
            let first_row = token_ids.len();
            for position in positions.clone() {
                places.push(sequence * batch.length + position);
                token_ids.push(batch.token_ids[sequence * batch.length + position]);
            }
            sequences.push(StepSequence {
                rows: first_row..token_ids.len(),
                first_position: positions.start,
                start_position: batch.valid[sequence].start,
                pages: &pages[sequence * pages_each..(sequence + 1) * pages_each],
                // The original's long or short factors go by the padded length of the whole batch.
                rope_length: batch.length,
            });
        }
        let mut recorder = Recorder {
            outputs: &mut outputs,
            batch,
            places,
            moe_layers: &moe_layers,
            tensors: capture,
            loads: loads.as_deref_mut(),
        };
        let wanted = capture || recorder.loads.is_some();
        let step = Step { sequences: &sequences };
        let forward = Forward {
            pool: &experts.pool,
            model,
            experts: experts.backend.as_ref(),
        };
        let capturing = wanted.then_some(&mut recorder as &mut dyn Capture);
        let hidden_states = forward.run(&mut memory, &token_ids, &step, &mut kv, capturing)?;
        let normed = model.final_norm(&experts.pool, hidden_states);
        if capture {
            recorder.floats("hidden_final".to_owned(), &normed);
        }
        recorder.floats("logits".to_owned(), &model.logits(&experts.pool, &normed));
    }
    Ok(outputs)
}

/// Cuts the valid positions of all sequences, in order, into steps of at most `max_rows` rows.
fn chunks(batch: &Batch, max_rows: usize) -> Vec<Vec<(usize, Range<usize>)>> {
    let mut steps = vec![Vec::new()];
    let mut room = max_rows;
    for (sequence, valid) in batch.valid.iter().enumerate() {
        let mut first = valid.start;
        while first < valid.end {
            if room == 0 {
                steps.push(Vec::new());
                room = max_rows;
            }
            let end = valid.end.min(first + room);
            room -= end - first;
            steps.last_mut().expect("never empty").push((sequence, first..end));
            first = end;
        }
    }
    steps.retain(|step| !step.is_empty());
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_with_a_hole_is_refused_by_place() {
        assert_eq!(valid_run((0, &[0, 1, 1, 0])).unwrap(), 1..3);
        assert_eq!(valid_run((0, &[0, 0])).unwrap(), 0..0);
        let error = valid_run((4, &[1, 0, 1])).expect_err("a hole").to_string();
        assert!(error.contains("attention_mask[4]") && error.contains("at 1"), "{error}");
        assert!(valid_run((0, &[1, 2])).is_err());
    }

    #[test]
    fn chunks_cover_every_valid_position_once_in_order() {
        for max_rows in 1..12 {
            let batch = Batch {
                sequences: 3,
                length: 7,
                token_ids: vec![0; 21],
                valid: vec![0..7, 2..2, 3..6],
            };
            let steps = chunks(&batch, max_rows);
            assert!(
                steps
                    .iter()
                    .all(|step| step.iter().map(|(_, run)| run.len()).sum::<usize>() <= max_rows)
            );
            let seen: Vec<_> = steps
                .iter()
                .flatten()
                .flat_map(|(sequence, run)| run.clone().map(|p| (*sequence, p)))
                .collect();
            let wanted: Vec<_> = (0..7).map(|p| (0, p)).chain((3..6).map(|p| (2, p))).collect();
            assert_eq!(seen, wanted, "{max_rows} rows");
        }
    }
}
