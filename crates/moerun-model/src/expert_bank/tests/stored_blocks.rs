//! Stored blocks are held as they are: every value of a packed matrix is that of the checkpoint.

use std::{fs, ops::Range};

use half::f16;
use moerun_kernels::PackedMatrix;
use moerun_testkit::{Family, RawGguf, Storage, TinyCheckpoint};
use moerun_types::{BlockRange, CombineMode, ExpertId, ExpertSlice, LayerId, NumberFormat, Numerics};
use moerun_weights::{Checkpoint, LayerTensor, MatrixSource, MemoryNeed, Needs, TensorRole};

use crate::{ExpertBank, ModelError};

/// Codes of `ggml_type`.
const Q4_0: u32 = 2;
const Q8_0: u32 = 8;
const MXFP4: u32 = 39;

fn tiny(family: Family) -> TinyCheckpoint {
    TinyCheckpoint {
        hidden: 64,
        heads: 4,
        head_dim: 16,
        dense_intermediate: 64,
        expert_intermediate: 96,
        layers: 2,
        dense_first: 0,
        ..TinyCheckpoint::new(family, 1)
    }
}

/// A GGUF file whose matrices are blocks that no rounding of their values would give: the largest magnitude is not the
/// largest code, and of 8-bit codes one is -128.
fn gguf_of_blocks(family: Family, type_code: u32) -> RawGguf {
    let dir = tempfile::tempdir().expect("a temporary directory");
    tiny(family).write(dir.path()).expect("a tiny checkpoint");
    let mut gguf = RawGguf::from_checkpoint(dir.path()).expect("a family that has a GGUF form");
    let mut state = 1u32;
    let mut random = move |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    for tensor in &mut gguf.tensors {
        if tensor.dims.len() < 2 || tensor.name.contains("ffn_gate_inp") {
            continue;
        }
        let blocks = tensor.dims.iter().product::<u64>() / 32;
        tensor.type_code = type_code;
        tensor.data.clear();
        for block in 0..blocks {
            let sign = if block % 3 == 0 { -1.0 } else { 1.0 };
            let scale = f16::from_f32(sign * (random(900) + 100) as f32 / 1e5).to_le_bytes();
            match type_code {
                Q8_0 => {
                    tensor.data.extend(scale);
                    tensor.data.extend((0..32).map(|_| (random(201) as i32 - 100) as u8));
                    if block % 5 == 0 {
                        *tensor.data.last_mut().expect("a code") = 0x80;
                    }
                }
                Q4_0 => {
                    tensor.data.extend(scale);
                    tensor
                        .data
                        .extend((0..16).map(|_| ((1 + random(14)) | ((1 + random(14)) << 4)) as u8));
                }
                _ => {
                    tensor.data.push(118 + random(5) as u8);
                    tensor.data.extend((0..16).map(|_| random(256) as u8));
                }
            }
        }
    }
    gguf
}

fn open(gguf: &RawGguf) -> Checkpoint {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("model.gguf");
    fs::write(&file, gguf.to_bytes()).expect("writable");
    Checkpoint::open(&file, Needs::All).expect("a good file")
}

fn numerics(format: NumberFormat) -> Numerics {
    Numerics::checked(format, CombineMode::Exact, 32).expect("whole blocks")
}

fn assert_rows(packed: &PackedMatrix, source: &MatrixSource<'_>, rows: Range<usize>, cols: Range<usize>, what: &str) {
    assert_eq!((packed.rows(), packed.cols()), (rows.len(), cols.len()), "{what}");
    let (mut found, mut wanted) = (vec![0.0; cols.len()], vec![0.0; cols.len()]);
    for (index, row) in rows.enumerate() {
        packed.unpack_row(index, &mut found);
        source.read_row_part(row, cols.start, &mut wanted);
        // Not by bits: MXFP4's code for a negative zero is held, and read back as 0.
        assert_eq!(found, wanted, "{what}, row {row}");
    }
}

/// Whole experts and each third of them hold the stored values.
fn assert_experts_are_as_stored(checkpoint: &Checkpoint, format: NumberFormat) {
    let moe = checkpoint.config().moe.clone().expect("experts");
    let hidden = checkpoint.config().hidden;
    let slice = |expert, first, end| ExpertSlice {
        layer: LayerId(1),
        expert: ExpertId(expert),
        blocks: BlockRange { first, end },
    };
    for blocks in [0..3, 0..1, 1..2, 2..3, 1..3] {
        let held: Vec<_> = (0..moe.num_experts as u16)
            .map(|expert| slice(expert, blocks.start, blocks.end))
            .collect();
        let bank = ExpertBank::load(checkpoint, &held, numerics(format), &mut |_, _| {}).expect("the experts load");
        let columns = usize::from(blocks.start) * 32..usize::from(blocks.end) * 32;
        let need = |slice: &ExpertSlice| MemoryNeed::of_slice(checkpoint.config(), &numerics(format), slice.blocks);
        assert_eq!(
            bank.memory_bytes(),
            held.iter().map(need).sum::<u64>(),
            "{format}, blocks {blocks:?}"
        );
        for (expert, weights) in bank.weights.iter().enumerate() {
            let source = checkpoint
                .expert(LayerId(1), ExpertId(expert as u16))
                .expect("an expert");
            let what = format!("{format}, expert {expert}, blocks {blocks:?}");
            assert_rows(&weights.gate_proj, &source.gate_proj, columns.clone(), 0..hidden, &what);
            assert_rows(&weights.up_proj, &source.up_proj, columns.clone(), 0..hidden, &what);
            assert_rows(&weights.down_proj, &source.down_proj, 0..hidden, columns.clone(), &what);
        }
    }
}

#[test]
fn blocks_of_gguf_are_held_bit_for_bit() {
    for family in [Family::Qwen3Moe, Family::Mixtral, Family::GraniteMoe] {
        for (type_code, format) in [
            (Q8_0, NumberFormat::Int8),
            (Q4_0, NumberFormat::Int4),
            (MXFP4, NumberFormat::Mxfp4),
        ] {
            let checkpoint = open(&gguf_of_blocks(family, type_code));
            assert_eq!(checkpoint.default_format(), format, "{family:?}");
            assert_experts_are_as_stored(&checkpoint, format);
            // Of mixtral and granite the rows of a query head are stored in pairs.
            for tensor in [LayerTensor::QProj, LayerTensor::KProj, LayerTensor::OProj] {
                let source = checkpoint
                    .matrix(TensorRole::Layer(LayerId(0), tensor))
                    .expect("a matrix");
                let packed = source
                    .pack(format, 0..source.rows(), 0..source.cols())
                    .expect("finite scales");
                let what = format!("{family:?} {tensor:?} {format}");
                assert_rows(&packed, &source, 0..source.rows(), 0..source.cols(), &what);
            }
        }
    }
}

#[test]
fn mxfp4_of_hugging_face_is_held_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let tiny = TinyCheckpoint {
        storage: Storage::Mxfp4,
        ..tiny(Family::GptOss)
    };
    tiny.write(dir.path()).expect("a tiny checkpoint");
    let checkpoint = Checkpoint::open(dir.path(), Needs::All).expect("a good checkpoint");
    assert_eq!(checkpoint.default_format(), NumberFormat::Mxfp4);
    assert_experts_are_as_stored(&checkpoint, NumberFormat::Mxfp4);
}

#[test]
fn blocks_of_another_format_are_dequantised_and_rounded() {
    let checkpoint = open(&gguf_of_blocks(Family::Qwen3Moe, Q8_0));
    let source = checkpoint.matrix(TensorRole::Embedding).expect("a matrix");
    for format in NumberFormat::ALL
        .into_iter()
        .filter(|&format| format != NumberFormat::Int8)
    {
        let (packed, mut found, mut wanted) = (
            source.pack(format, 5..90, 0..source.cols()).expect("finite values"),
            vec![0.0; source.cols()],
            vec![0.0; source.cols()],
        );
        let by_value = PackedMatrix::pack(format, 85, source.cols(), |row, out| source.read_row(5 + row, out));
        for row in 0..85 {
            packed.unpack_row(row, &mut found);
            by_value.as_ref().expect("finite values").unpack_row(row, &mut wanted);
            assert_eq!(found, wanted, "{format}, row {row}");
        }
    }
}

#[test]
fn a_transposed_part_has_the_rounded_values_of_its_columns() {
    let checkpoint = open(&gguf_of_blocks(Family::Qwen3Moe, Q8_0));
    let source = checkpoint
        .matrix(TensorRole::Layer(LayerId(0), LayerTensor::QProj))
        .expect("a matrix");
    let packed = source
        .pack_transposed(NumberFormat::F32, 16..48)
        .expect("finite values");
    assert_eq!((packed.rows(), packed.cols()), (64, 32));
    let (mut column, mut row) = (vec![0.0; 32], vec![0.0; 64]);
    for col in 0..64 {
        packed.unpack_row(col, &mut column);
        for (index, &value) in column.iter().enumerate() {
            source.read_row(16 + index, &mut row);
            assert_eq!(value, row[col]);
        }
    }
}

#[test]
fn a_damaged_scale_is_refused_by_its_place() {
    let damage = |name: &str, block: usize| {
        let mut gguf = gguf_of_blocks(Family::Qwen3Moe, Q8_0);
        let tensor = gguf
            .tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .expect("a tensor");
        tensor.data[34 * block..][..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
        open(&gguf)
    };
    // Row 3 of expert 1, second of three blocks.
    let checkpoint = damage("blk.1.ffn_down_exps.weight", (64 + 3) * 3 + 1);
    let slices = [ExpertSlice {
        layer: LayerId(1),
        expert: ExpertId(1),
        blocks: BlockRange { first: 1, end: 3 },
    }];
    let load = |format| ExpertBank::load(&checkpoint, &slices, numerics(format), &mut |_, _| {});
    let message = |error: ModelError| error.to_string();
    assert_eq!(
        load(NumberFormat::Int8).map(|_| ()).map_err(message),
        Err("down_proj of layer 1 expert 1: row 3, columns from 0, as int8: the stored scale 0x7c00 is not a finite number".to_owned())
    );
    let error = load(NumberFormat::Int4)
        .map(|_| ())
        .map_err(message)
        .expect_err("no code for an infinite weight");
    assert!(error.contains("row 3, columns from 0, as int4: a weight is"), "{error}");

    let checkpoint = damage("token_embd.weight", 2);
    let error = crate::Model::load(&checkpoint, NumberFormat::Int8, &mut |_, _| {})
        .map(|_| ())
        .map_err(message);
    assert_eq!(
        error,
        Err("Embedding: row 1, columns from 0, as int8: the stored scale 0x7c00 is not a finite number".to_owned())
    );
}
