//! Terms that fixed point cannot take, and values that are not numbers.

use super::*;

/// Three experts of four blocks of 8, whose down weights are 1 except where a test says otherwise.
fn unit_experts(hidden: usize, change: impl Fn(usize, &mut Plain)) -> Vec<FeedForward> {
    (0..3)
        .map(|index| {
            let mut plain = Plain {
                gate: Array2::from_elem((32, hidden), 1.0),
                up: Array2::from_elem((32, hidden), 1.0),
                down: Array2::from_elem((hidden, 32), 1.0),
                biases: Some([vec![0.0; 32], vec![0.0; 32], vec![1.0; hidden]]),
                activation: Activation::Relu,
            };
            change(index, &mut plain);
            plain.pack(NumberFormat::F32, 0..32)
        })
        .collect()
}

/// What running all three on two rows of ones says, on each variant and number of threads.
fn outcomes(hidden: usize, experts: &[FeedForward], limit: f32) -> Vec<Result<(), ExactTermError>> {
    let x = Activations::F32 {
        rows: 2,
        cols: hidden,
        data: vec![1.0 / (hidden as f32).sqrt(); 2 * hidden],
    };
    let groups: Vec<Group<'_>> = experts
        .iter()
        .map(|weights| Group {
            weights,
            rows: &[0, 1],
            routing_weights: &[0.5, 0.25],
            blocks: 1..4,
            owes_down_bias: true,
        })
        .collect();
    let mut outcomes = Vec::new();
    for isa in Isa::all_available() {
        for threads in [1, 2, 3] {
            for _ in 0..5 {
                let pool = CpuPool::new(threads);
                let grouped = Grouped {
                    isa,
                    workspace: &pool.workspace(),
                    x: (&x).into(),
                    groups: &groups,
                    weight_on_input: false,
                    combine_block: 8,
                };
                outcomes.push(grouped.exact(limit, &mut vec![0; 2 * hidden]));
            }
        }
    }
    outcomes
}

#[test]
fn the_lowest_group_and_block_that_fail_are_named_whatever_the_threads_do() {
    let hidden = 300; // several stripes
    let fails_in = |group: usize, col: usize, row: usize| {
        move |index: usize, plain: &mut Plain| {
            if index >= group {
                plain.down[[row, col]] = 1e30;
                plain.down[[hidden - 1 - row, 31]] = f32::NAN;
                plain.down[[0, 31]] = 1e30;
            }
        }
    };
    for (group, col, row) in [(0, 8, 299), (1, 17, 150), (2, 31, 20), (1, 30, 0)] {
        let experts = unit_experts(hidden, fails_in(group, col, row));
        for outcome in outcomes(hidden, &experts, 1e6) {
            let error = outcome.expect_err("a term is too large");
            let wanted = (group, Some(col / 8), 1e6);
            assert_eq!((error.group, error.block, error.limit), wanted);
            assert!(error.term > 1e20, "{error}");
        }
    }
    // Block 0 is not run, so what stands there does no harm.
    let experts = unit_experts(hidden, |_, plain| plain.down[[5, 7]] = f32::INFINITY);
    assert!(
        outcomes(hidden, &experts, 1e6)
            .into_iter()
            .all(|outcome| outcome == Ok(()))
    );
}

#[test]
fn a_down_bias_that_fails_comes_after_all_blocks_of_its_group() {
    let hidden = 40;
    let bias_fails = |index: usize, plain: &mut Plain| {
        if index == 1 {
            plain.biases.as_mut().expect("unit experts have biases")[2][33] = f32::NEG_INFINITY;
        }
    };
    for outcome in outcomes(hidden, &unit_experts(hidden, bias_fails), 1e6) {
        let error = outcome.expect_err("the bias is infinite");
        assert_eq!((error.group, error.block, error.term), (1, None, f32::NEG_INFINITY));
        assert_eq!(
            error.to_string(),
            "term -inf of group 1, block None is not finite or not below 1000000"
        );
    }
    let both_fail = |index: usize, plain: &mut Plain| {
        bias_fails(index, plain);
        plain.down[[39, 30]] = f32::NAN;
    };
    let experts = unit_experts(hidden, |index, plain| {
        if index > 0 {
            both_fail(index, plain)
        }
    });
    for outcome in outcomes(hidden, &experts, 1e6) {
        let error = outcome.expect_err("a term is not a number");
        assert_eq!((error.group, error.block), (1, Some(3)));
        assert!(error.term.is_nan());
    }
}

#[test]
fn a_term_must_be_below_the_limit_and_may_come_close() {
    // Each block of a row of ones: 8 columns of sqrt(4)^2 = 4, so 32, times the routing weight 0.5.
    let experts = unit_experts(4, |_, _| {});
    assert!(
        outcomes(4, &experts, 16.0_f32.next_up())
            .into_iter()
            .all(|outcome| outcome == Ok(()))
    );
    for outcome in outcomes(4, &experts, 16.0) {
        let wanted = ExactTermError {
            group: 0,
            block: Some(1),
            term: 16.0,
            limit: 16.0,
        };
        assert_eq!(outcome, Err(wanted));
    }
    assert!(
        outcomes(4, &experts, MAX_TERM_LIMIT)
            .into_iter()
            .all(|outcome| outcome == Ok(()))
    );
}

#[test]
fn a_nan_is_not_swallowed_by_any_activation() {
    let clamped = Activation::ClampedSwiglu {
        alpha: 1.702,
        limit: 1.0,
    };
    for activation in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        clamped,
    ] {
        for in_gate in [true, false] {
            let experts = unit_experts(20, |_, plain| {
                plain.activation = activation;
                let weights = if in_gate { &mut plain.gate } else { &mut plain.up };
                weights[[9, 3]] = f32::NAN;
            });
            for outcome in outcomes(20, &experts, 1e6) {
                let error = outcome.expect_err("a term is not a number");
                assert_eq!((error.group, error.block), (0, Some(1)), "{activation:?}");
                assert!(error.term.is_nan());
            }
        }
    }
}

#[test]
fn no_groups_and_groups_without_rows_add_nothing() {
    let pool = CpuPool::new(2);
    let x = Activations::round(ActivationFormat::F32, Array2::zeros((2, 4)).view());
    let mut sums = [7; 8];
    assert_eq!(grouped_exact(&pool, &x, &[], false, 8, 1.0, &mut sums), Ok(()));
    let experts = unit_experts(4, |_, _| {});
    let group = Group {
        weights: &experts[0],
        rows: &[],
        routing_weights: &[],
        blocks: 0..4,
        owes_down_bias: true,
    };
    assert_eq!(grouped_exact(&pool, &x, &[group], false, 8, 1.0, &mut sums), Ok(()));
    let bias_only = Group {
        weights: &experts[0],
        rows: &[1],
        routing_weights: &[0.5],
        blocks: 2..2,
        owes_down_bias: true,
    };
    assert_eq!(grouped_exact(&pool, &x, &[bias_only], false, 8, 1.0, &mut sums), Ok(()));
    let half = 7 + (1 << 39);
    assert_eq!(sums, [7, 7, 7, 7, half, half, half, half]);
}
