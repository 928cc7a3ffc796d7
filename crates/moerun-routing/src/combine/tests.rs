use moerun_types::{CombineMode, NumberFormat, Numerics};

use super::{CombineError, PartialSums, term_limit, terms_per_element};
use crate::testing::{Seeded, model};

fn exact(hidden: usize, sums: Vec<i64>) -> PartialSums {
    PartialSums::Exact { hidden, sums }
}

/// Numbers of all magnitudes.
fn random_sum(random: &mut Seeded) -> i64 {
    let bits = random.below(65) as u32;
    (random.next() as i64).checked_shr(bits).unwrap_or(0)
}

#[test]
fn any_grouping_and_order_of_partial_sums_gives_the_same_result() {
    for seed in 0..200 {
        let mut random = Seeded::new(seed);
        let (rows, hidden) = (random.between(1, 6), random.between(1, 9));
        // Each part is one holder's answer for some of the rows.
        let mut parts: Vec<(Vec<u32>, PartialSums)> = (0..random.between(1, 8))
            .map(|_| {
                let named: Vec<u32> = (0..rows as u32).filter(|_| random.chance(60)).collect();
                let sums = (0..named.len() * hidden).map(|_| random_sum(&mut random)).collect();
                (named, exact(hidden, sums))
            })
            .collect();
        let mut one_by_one = PartialSums::zeros(CombineMode::Exact, rows, hidden);
        for (named, part) in &parts {
            one_by_one.add_rows(named, part).unwrap();
        }
        random.shuffle(&mut parts);
        let (left, right) = parts.split_at(random.between(0, parts.len()));
        let subtotal = |parts: &[(Vec<u32>, PartialSums)]| {
            let mut sum = PartialSums::zeros(CombineMode::Exact, rows, hidden);
            parts
                .iter()
                .for_each(|(named, part)| sum.add_rows(named, part).unwrap());
            sum
        };
        let all_rows: Vec<u32> = (0..rows as u32).collect();
        let mut grouped = subtotal(right);
        grouped.add_rows(&all_rows, &subtotal(left)).unwrap();
        assert_eq!(grouped, one_by_one, "seed {seed}");
    }
}

#[test]
fn unpacking_inverts_packing() {
    for seed in 0..300 {
        let mut random = Seeded::new(seed);
        let (rows, hidden) = (random.between(0, 6), random.between(1, 9));
        let mut sums: Vec<i64> = (0..rows * hidden).map(|_| random_sum(&mut random)).collect();
        for row in sums.chunks_mut(hidden) {
            match random.below(8) {
                0 => row.fill(0),
                1 => row[0] = i64::MIN,
                2 => row[0] = i64::MAX,
                _ => {
                    let bits = random.below(64);
                    row.iter_mut().for_each(|sum| *sum >>= bits);
                }
            }
        }
        let sums = exact(hidden, sums);
        let (widths, bytes) = sums.pack();
        assert_eq!(
            PartialSums::unpack(CombineMode::Exact, rows, hidden, &widths, &bytes),
            Ok(sums),
            "seed {seed}"
        );

        let fast = PartialSums::Fast {
            hidden,
            sums: (0..rows * hidden).map(|_| random.signed()).collect(),
        };
        let (widths, bytes) = fast.pack();
        assert!(widths.is_empty());
        assert_eq!(
            PartialSums::unpack(CombineMode::Fast, rows, hidden, &widths, &bytes),
            Ok(fast),
            "seed {seed}"
        );
    }
}

#[test]
fn a_row_takes_the_fewest_bytes_that_hold_it() {
    let width = |value: i64| exact(2, vec![0, value]).pack().0[0];
    assert_eq!(width(0), 0);
    assert_eq!((width(1), width(-1), width(127), width(-128)), (1, 1, 1, 1));
    assert_eq!((width(128), width(-129), width(32767), width(-32768)), (2, 2, 2, 2));
    assert_eq!((width(1 << 39), width((1 << 39) - 1)), (6, 5));
    assert_eq!((width(i64::MAX), width(i64::MIN)), (8, 8));
    let (widths, bytes) = exact(2, vec![0, 0, -2, 258]).pack();
    assert_eq!((widths, bytes), (vec![0, 2], vec![0xfe, 0xff, 2, 1]));
}

#[test]
fn malformed_packed_sums_are_refused() {
    let unpack = |rows, hidden, widths: &[u8], bytes: &[u8]| {
        PartialSums::unpack(CombineMode::Exact, rows, hidden, widths, bytes).unwrap_err()
    };
    assert_eq!(
        unpack(2, 3, &[1], &[0; 3]),
        CombineError::WidthCount { wanted: 2, found: 1 }
    );
    assert_eq!(
        unpack(1, 3, &[1, 1], &[0; 6]),
        CombineError::WidthCount { wanted: 1, found: 2 }
    );
    assert_eq!(
        unpack(2, 1, &[1, 9], &[0; 10]),
        CombineError::Width { row: 1, width: 9 }
    );
    assert_eq!(
        unpack(2, 3, &[1, 2], &[0; 8]),
        CombineError::Length {
            rows: 2,
            hidden: 3,
            wanted: 9,
            found: 8
        }
    );
    assert_eq!(
        unpack(2, 3, &[1, 2], &[0; 10]),
        CombineError::Length {
            rows: 2,
            hidden: 3,
            wanted: 9,
            found: 10
        }
    );
    let wanted = usize::MAX;
    assert_eq!(
        unpack(1, usize::MAX, &[8], &[0; 8]),
        CombineError::Length {
            rows: 1,
            hidden: wanted,
            wanted,
            found: 8
        }
    );
    let too_many = CombineError::Length {
        rows: 2,
        hidden: usize::MAX,
        wanted: 0,
        found: 0,
    };
    assert_eq!(unpack(2, usize::MAX, &[0, 0], &[]), too_many);

    let fast = |rows, hidden, widths: &[u8], bytes: &[u8]| {
        PartialSums::unpack(CombineMode::Fast, rows, hidden, widths, bytes).unwrap_err()
    };
    assert_eq!(
        fast(1, 2, &[4], &[0; 8]),
        CombineError::WidthCount { wanted: 0, found: 1 }
    );
    assert_eq!(
        fast(1, 2, &[], &[0; 7]),
        CombineError::Length {
            rows: 1,
            hidden: 2,
            wanted: 8,
            found: 7
        }
    );
    assert!(matches!(fast(usize::MAX, 2, &[], &[0; 8]), CombineError::Length { .. }));
}

#[test]
fn sums_that_do_not_match_are_refused_and_change_nothing() {
    let before = exact(2, vec![1, 2, 3, 4]);
    let mut sums = before.clone();
    for (rows, addend) in [
        (
            vec![0],
            PartialSums::Fast {
                hidden: 2,
                sums: vec![1.0, 1.0],
            },
        ),
        (vec![0], exact(1, vec![1])),
        (vec![0], exact(2, vec![1, 1, 1, 1])),
        (vec![0, 1], exact(2, vec![1, 1])),
        (vec![0], exact(2, vec![1, 1, 1])),
        (vec![0, 2], exact(2, vec![1, 1, 1, 1])),
    ] {
        let refused = sums.add_rows(&rows, &addend);
        assert!(
            matches!(refused, Err(CombineError::Mismatch { .. })),
            "{rows:?} {addend:?}: {refused:?}"
        );
        assert_eq!(sums, before);
    }
}

#[test]
fn exact_sums_are_converted_once_to_nearest_even() {
    let one = 1i64 << 40;
    let half_step = 1i64 << 16; // half of f32's last place at 1.0, in fixed point
    let sums = exact(
        3,
        vec![
            0,
            one,
            -one / 2,
            one + half_step,
            one + half_step + 1,
            3 * half_step + one,
        ],
    );
    let last_place = f32::EPSILON;
    let wanted = [0.0, 1.0, -0.5, 1.0, 1.0 + last_place, 1.0 + 2.0 * last_place];
    assert_eq!(sums.to_f32().as_slice().unwrap(), wanted);
    assert_eq!(
        exact(1, vec![1, i64::MIN]).to_f32().as_slice().unwrap(),
        [2f32.powi(-40), -(2f32.powi(23))]
    );
    assert_eq!(
        PartialSums::Fast {
            hidden: 2,
            sums: vec![0.5, 2.0]
        }
        .to_f32()
        .as_slice()
        .unwrap(),
        [0.5, 2.0]
    );
}

#[test]
fn no_sum_of_terms_below_the_limit_overflows() {
    for terms in (0..5000).chain([usize::MAX]) {
        let limit = term_limit(terms);
        assert!(f64::from(limit) * terms as f64 <= f64::from(1 << 23), "{terms} terms");
        assert!(terms > 5000 || limit > 0.0, "{terms} terms");
    }
    assert_eq!(
        (term_limit(1), term_limit(2), term_limit(3)),
        (8388608.0, 4194304.0, 2097152.0)
    );
}

#[test]
fn terms_of_an_element_are_blocks_and_down_bias_of_each_expert() {
    let mut moe = model(&[true], 4, 20).moe.unwrap();
    let numerics = Numerics {
        format: NumberFormat::F32,
        combine: CombineMode::Exact,
        combine_block: 8,
    };
    assert_eq!(terms_per_element(&moe, &numerics), 6);
    moe.down_bias = true;
    assert_eq!(terms_per_element(&moe, &numerics), 8);
}

#[test]
fn the_parts_of_a_split_are_its_rows() {
    let whole = PartialSums::Exact {
        hidden: 2,
        sums: (0..10).collect(),
    };
    let parts = whole.clone().split(&[1, 0, 4]);
    assert_eq!(parts.iter().map(PartialSums::rows).collect::<Vec<_>>(), [1, 0, 4]);
    let mut again = PartialSums::zeros(CombineMode::Exact, 5, 2);
    again.add_rows(&[0], &parts[0]).unwrap();
    again.add_rows(&[1, 2, 3, 4], &parts[2]).unwrap();
    assert_eq!(again, whole);
}
