use moerun_types::ActivationFormat;
use ndarray::{Array2, ShapeBuilder, s};

use super::*;
use crate::{
    Activations,
    test_data::{Rng, pack_array, product_by_definition},
};

fn bits(array: &Array2<f32>) -> Vec<u32> {
    array.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn products_have_the_bits_of_the_definition_on_every_isa_for_all_odd_shapes() {
    for seed in 0..120 {
        let mut rng = Rng::new(seed);
        let (rows, cols, tokens) = match seed {
            0 => (0, 5, 3),
            1 => (5, 0, 3),
            2 => (5, 3, 0),
            3 => (1, 1, 1),
            4 => (300, 257, 67),
            _ => (rng.below(70), rng.below(200), rng.below(30)),
        };
        for format in NumberFormat::ALL {
            let packed = pack_array(format, &rng.array(rows, cols));
            let x = Activations::round(format.activations(), rng.array(tokens, cols).view());
            let expected = bits(&product_by_definition(&packed, 0..cols, &x));
            for threads in [1, 2, 3] {
                let pool = CpuPool::new(threads);
                for isa in Isa::all_available() {
                    let mut out = Array2::from_elem((tokens, rows), f32::NAN);
                    packed.matmul_on(isa, &pool, (&x).into(), out.view_mut());
                    assert!(
                        bits(&out) == expected,
                        "seed {seed}: {rows} x {cols}, {tokens} tokens, {format} {isa}"
                    );
                }
            }
        }
    }
}

#[test]
fn several_products_at_once_give_what_each_gives() {
    let mut rng = Rng::new(11);
    let pool = CpuPool::new(2);
    for format in NumberFormat::ALL {
        // Of the same rows, of others, and of other formats.
        let formats = [format, format, format, format, NumberFormat::Bf16, NumberFormat::Int4];
        let mut matrices = [50, 3, 0, 200, 40, 9].into_iter().zip(formats);
        let matrices: [PackedMatrix; 6] = std::array::from_fn(|_| {
            let (rows, format) = matrices.next().expect("six");
            pack_array(format, &rng.array(rows, 77))
        });
        for tokens in [0, 1, 13] {
            let mut round = |format: NumberFormat, tokens: usize| {
                Activations::round(format.activations(), rng.array(tokens, 77).view())
            };
            let shared = round(format, tokens);
            let others = [
                round(format, tokens + 2),
                round(NumberFormat::Bf16, tokens),
                round(NumberFormat::Int4, 1),
            ];
            let rows = [&shared, &shared, &shared, &others[0], &others[1], &others[2]];
            let products: Vec<_> = matrices.iter().zip(rows.map(ActivationRows::from)).collect();
            let mut outs: Vec<Vec<f32>> = matrices
                .iter()
                .zip(rows)
                .map(|(matrix, x)| vec![f32::NAN; x.rows() * matrix.rows()])
                .collect();
            let mut slices: Vec<&mut [f32]> = outs.iter_mut().map(|out| &mut out[..]).collect();
            PackedMatrix::matmul_all(&pool, &products, &mut slices);
            for ((matrix, x), out) in matrices.iter().zip(rows).zip(outs) {
                let mut alone = Array2::zeros((x.rows(), matrix.rows()));
                matrix.matmul(&pool, x, alone.view_mut());
                let together = Array2::from_shape_vec(alone.raw_dim(), out).expect("of that shape");
                assert_eq!(bits(&together), bits(&alone), "{format}, {tokens} tokens");
            }
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_in_a_batch() {
    let mut rng = Rng::new(7);
    let pool = CpuPool::new(2);
    for format in NumberFormat::ALL {
        let packed = pack_array(format, &rng.array(50, 133));
        let x = Activations::round(format.activations(), rng.array(31, 133).view());
        for isa in Isa::all_available() {
            let mut batch = Array2::zeros((31, 50));
            packed.matmul_on(isa, &pool, (&x).into(), batch.view_mut());
            for row in 0..31 {
                let mut alone = Array2::zeros((1, 50));
                packed.matmul_on(isa, &pool, (&x.select_rows(&[row])).into(), alone.view_mut());
                assert_eq!(
                    bits(&alone),
                    bits(&batch.slice(s![row as usize..=row as usize, ..]).to_owned())
                );
            }
        }
    }
}

#[test]
fn denormals_are_flushed_alike_on_every_isa() {
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let pool = CpuPool::new(2);
        for format in NumberFormat::ALL {
            let packed = pack_array(format, &rng.array(40, 9).mapv(|value| value * 1e-19));
            let tiny = rng
                .array(13, 9)
                .mapv(|value| value * [1e-19, 1e-18, 1e-39, 1e-44][seed as usize % 4]);
            let x = Activations::round(format.activations(), tiny.view());
            let mut expected = Array2::zeros((13, 40));
            packed.matmul_on(Isa::Portable, &pool, (&x).into(), expected.view_mut());
            assert!(
                expected.iter().all(|value| !value.is_subnormal()),
                "seed {seed}, {format}"
            );
            for isa in Isa::all_available() {
                let mut found = Array2::zeros((13, 40));
                packed.matmul_on(isa, &pool, (&x).into(), found.view_mut());
                assert!(bits(&found) == bits(&expected), "seed {seed}, {format} {isa}");
            }
        }
    }
}

#[test]
fn an_output_of_any_layout_is_filled() {
    let mut rng = Rng::new(8);
    let pool = CpuPool::new(1);
    let packed = pack_array(NumberFormat::F32, &rng.array(20, 9));
    let rounded = Activations::round(ActivationFormat::F32, rng.array(6, 9).view());
    let mut column_major = Array2::zeros((6, 20).f());
    packed.matmul(&pool, &rounded, column_major.view_mut());
    assert_eq!(column_major, product_by_definition(&packed, 0..9, &rounded));
    let mut wide = Array2::zeros((6, 30));
    packed.matmul(&pool, &rounded, wide.slice_mut(s![.., 5..25]));
    assert_eq!(
        wide.slice(s![.., 5..25]),
        product_by_definition(&packed, 0..9, &rounded)
    );
    assert!(
        wide.slice(s![.., ..5])
            .iter()
            .chain(wide.slice(s![.., 25..]).iter())
            .all(|&value| value == 0.0)
    );
}

#[test]
fn unpacking_gives_back_the_rounded_rows() {
    let mut rng = Rng::new(9);
    for format in NumberFormat::ALL {
        for (rows, cols) in [(1, 1), (17, 3), (40, 8), (33, 300)] {
            let weights = rng.array(rows, cols);
            let packed = pack_array(format, &weights);
            assert_eq!((packed.rows(), packed.cols(), packed.format()), (rows, cols, format));
            let mut row = vec![f32::NAN; cols];
            for index in 0..rows {
                packed.unpack_row(index, &mut row);
                for (&back, &weight) in row.iter().zip(weights.row(index)) {
                    let tolerance = match format {
                        NumberFormat::F32 => 0.0,
                        NumberFormat::Bf16 => 0.002,
                        NumberFormat::Int8 => 0.005,
                        NumberFormat::Int4 => 0.13,
                        NumberFormat::Mxfp4 => 0.26,
                    };
                    assert!(
                        (back - weight).abs() <= tolerance,
                        "{format}: {weight} came back as {back}"
                    );
                }
            }
        }
    }
}

#[test]
fn codes_and_scales_are_kept_as_they_are_given() {
    let mut rng = Rng::new(10);
    for format in [NumberFormat::Int8, NumberFormat::Int4, NumberFormat::Mxfp4] {
        let (rows, cols) = (21, 130);
        let given: Vec<QuantizedRow> = (0..rows)
            .map(|_| QuantizedRow {
                codes: (0..5)
                    .map(|_| {
                        std::array::from_fn(|_| rng.below(if format == NumberFormat::Int8 { 256 } else { 16 }) as u8)
                    })
                    .collect(),
                scales: (0..5)
                    .map(|_| {
                        if format == NumberFormat::Mxfp4 {
                            100 + rng.below(50) as u16
                        } else {
                            f16::from_f32(rng.value()).to_bits()
                        }
                    })
                    .collect(),
            })
            .collect();
        let packed = PackedMatrix::from_quantized(format, rows, cols, |row| given[row].clone()).expect("finite scales");
        assert_eq!(packed.bytes() as u64, PackedMatrix::packed_bytes(format, rows, cols));
        let mut values = vec![0.0; cols];
        for (index, row) in given.iter().enumerate() {
            packed.unpack_row(index, &mut values);
            for (col, &value) in values.iter().enumerate() {
                let (code, scale) = (row.codes[col / 32][col % 32], row.scales[col / 32]);
                let wanted = match format {
                    NumberFormat::Int8 => f32::from(code as i8) * f16::from_bits(scale).to_f32(),
                    NumberFormat::Int4 => (f32::from(code) - 8.0) * f16::from_bits(scale).to_f32(),
                    _ => f32::from(MXFP4_DOUBLED[usize::from(code)]) / 2.0 * 2.0_f32.powi(i32::from(scale) - 127),
                };
                assert_eq!(value, wanted, "{format}, row {index}, column {col}");
            }
        }
    }
}

#[test]
fn a_weight_that_no_block_can_hold_is_refused_by_its_place() {
    let error = PackedMatrix::pack(NumberFormat::Int8, 3, 70, |row, out| {
        if row == 2 {
            out[65] = f32::INFINITY;
        }
    })
    .expect_err("an infinite weight");
    assert_eq!(
        error.to_string(),
        "row 2, columns from 64, as int8: a weight is inf: wanted a finite number"
    );
    let stored = |scale| QuantizedRow {
        codes: vec![[1; QUANTIZED_BLOCK]; 2],
        scales: vec![1, scale],
    };
    for (format, infinite) in [
        (NumberFormat::Int8, 0x7c00),
        (NumberFormat::Int4, 0xfe00),
        (NumberFormat::Mxfp4, 255),
    ] {
        let error = PackedMatrix::from_quantized(format, 3, 64, |row| stored(if row == 1 { infinite } else { 1 }))
            .expect_err("a scale that is not finite");
        assert_eq!(
            (error.row, error.first_col, error.cause),
            (1, 32, BlockError::Scale(infinite))
        );
    }
}
