//! A checkpoint in f32 that holds the weights of another as a number format holds them.

use std::path::Path;

use moerun_kernels::PackedMatrix;
use moerun_testkit::{Element, RawTensor, copy_checkpoint, decode, edit_tensors, encode, is_expert_tensor};
use moerun_types::{AttentionConfig, ModelConfig, NumberFormat};

/// Copies the checkpoint `from` to `to`, which is created, with every matrix rounded as a run in `format` packs it.
pub(crate) fn write_rounded(from: &Path, to: &Path, config: &ModelConfig, format: NumberFormat) {
    copy_checkpoint(from, to).expect("a copy");
    edit_tensors(to, |tensors| {
        for tensor in tensors {
            let element = Element::from_name(&tensor.dtype).expect("plain tensors");
            let mut values: Vec<f32> = decode(element, &tensor.data)
                .into_iter()
                .map(|value| value as f32)
                .collect();
            round_tensor(tensor, &mut values, config, format);
            tensor.dtype = Element::F32.name().to_owned();
            tensor.data = encode(Element::F32, &values.into_iter().map(f64::from).collect::<Vec<_>>());
        }
    })
    .expect("a rewritten copy");
}

fn round_tensor(tensor: &RawTensor, values: &mut [f32], config: &ModelConfig, format: NumberFormat) {
    let name = tensor.name.trim_end_matches(".weight");
    let in_full = ["bias", ".gate", "_gate"].iter().any(|end| name.ends_with(end)) || name.contains("router");
    match tensor.shape[..] {
        _ if in_full => {}
        [rows, cols] if name.ends_with("embed_tokens") || name.ends_with("lm_head") => {
            round(format.for_vocabulary(), values, [rows, cols]);
        }
        [_, rank] if name.ends_with("kv_b_proj") => {
            let AttentionConfig::Latent(latent) = &config.attention else {
                panic!("{name} without latent attention")
            };
            let (nope, value) = (latent.qk_nope_head_dim, latent.v_head_dim);
            for head in values.chunks_exact_mut((nope + value) * rank) {
                // The key half is multiplied from the other side.
                let (keys, head_values) = head.split_at_mut(nope * rank);
                round_transposed(format.for_dense(), keys, [nope, rank]);
                round(format.for_dense(), head_values, [value, rank]);
            }
        }
        [rows, cols] if is_expert_tensor(&tensor.name) => round(format, values, [rows, cols]),
        [rows, cols] => round(format.for_dense(), values, [rows, cols]),
        [_, inputs, outputs] if name.ends_with("gate_up_proj") || name.ends_with("down_proj") => {
            for expert in values.chunks_exact_mut(inputs * outputs) {
                round_transposed(format, expert, [inputs, outputs]);
            }
        }
        [_, rows, cols] => {
            for expert in values.chunks_exact_mut(rows * cols) {
                round(format, expert, [rows, cols]);
            }
        }
        _ => {}
    }
}

/// Rounds a row-major matrix `[rows, cols]`, blocks along the rows.
fn round(format: NumberFormat, values: &mut [f32], [rows, cols]: [usize; 2]) {
    let packed = PackedMatrix::pack(format, rows, cols, |row, out| {
        out.copy_from_slice(&values[row * cols..][..cols]);
    })
    .expect("weights that every format can hold");
    for (row, out) in values.chunks_exact_mut(cols).enumerate() {
        packed.unpack_row(row, out);
    }
}

/// Rounds a row-major matrix `[rows, cols]`, blocks along the columns.
fn round_transposed(format: NumberFormat, values: &mut [f32], [rows, cols]: [usize; 2]) {
    let mut transposed: Vec<f32> = (0..cols)
        .flat_map(|col| (0..rows).map(move |row| (row, col)))
        .map(|(row, col)| values[row * cols + col])
        .collect();
    round(format, &mut transposed, [cols, rows]);
    for (index, value) in values.iter_mut().enumerate() {
        *value = transposed[index % cols * rows + index / cols];
    }
}
