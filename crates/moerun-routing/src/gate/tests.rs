mod definition;

use moerun_types::{ExpertId, GateConfig, GroupLimit, GroupScore, Renormalize, ScoreFunction};
use ndarray::{Array2, Axis};

use super::{GateError, select_experts};
use crate::testing::{Seeded, plain_gate};
use definition::{GateCase, by_definition};

fn assert_as_defined(case: &GateCase, what: &str) {
    let routing = case.run();
    assert_eq!(routing.tokens(), case.router_logits.nrows(), "{what}");
    for token in 0..routing.tokens() {
        let places = token * case.top_k..(token + 1) * case.top_k;
        let experts: Vec<usize> = routing.expert_ids[places.clone()]
            .iter()
            .map(|id| usize::from(id.0))
            .collect();
        let (wanted, weights) = by_definition(case, token);
        assert_eq!(experts, wanted, "{what}, token {token}, {:?}", case.gate);
        for (found, wanted) in routing.routing_weights[places].iter().zip(weights) {
            assert!(
                (f64::from(*found) - wanted).abs() < 2e-6,
                "{what}, token {token}: {found} {wanted} {:?}",
                case.gate
            );
        }
    }
}

#[test]
fn every_gate_chooses_and_weighs_as_its_definition_says() {
    for seed in 0..2000 {
        assert_as_defined(&GateCase::from_seed(seed, false), &format!("seed {seed}"));
    }
}

#[test]
fn equal_scores_go_to_the_lower_expert_and_group() {
    // Scores on a coarse grid tie often, and tie in f32 exactly where they tie in f64.
    for seed in 0..2000 {
        let case = GateCase::from_seed(seed, true);
        // Group sums of two probabilities may tie in one precision and not in the other.
        let sums_probabilities = matches!(
            case.gate.groups,
            Some(GroupLimit {
                score: GroupScore::SumOfTopTwo,
                ..
            })
        );
        // The same holds for the border of the sparse mixer's mask, which such scores may meet exactly.
        if !sums_probabilities && !matches!(case.gate.score, ScoreFunction::SparseMixer { .. }) {
            assert_as_defined(&case, &format!("seed {seed}"));
        }
    }
    let all_equal = Array2::zeros((1, 6));
    for score in [
        ScoreFunction::Softmax,
        ScoreFunction::SoftmaxOfTopK,
        ScoreFunction::Sigmoid,
        ScoreFunction::SparseMixer { jitter: 0.01 },
    ] {
        let routing = select_experts(all_equal.view(), &plain_gate(score), 3, None).unwrap();
        assert_eq!(routing.expert_ids, [ExpertId(0), ExpertId(1), ExpertId(2)], "{score:?}");
    }
    for score in [GroupScore::Max, GroupScore::SumOfTopTwo] {
        let groups = Some(GroupLimit {
            num_groups: 3,
            top_groups: 2,
            score,
        });
        let gate = GateConfig {
            groups,
            ..plain_gate(ScoreFunction::Sigmoid)
        };
        let routing = select_experts(all_equal.view(), &gate, 4, None).unwrap();
        assert_eq!(routing.expert_ids, [0, 1, 2, 3].map(ExpertId), "{score:?}");
    }
}

#[test]
fn a_token_is_routed_the_same_whatever_shares_its_batch() {
    for seed in 0..500 {
        let case = GateCase::from_seed(seed, false);
        let together = case.run();
        for token in 0..together.tokens() {
            let mut alone = case.clone();
            alone.router_logits = case.router_logits.select(Axis(0), &[token]);
            let alone = alone.run();
            let places = token * case.top_k..(token + 1) * case.top_k;
            assert_eq!(alone.expert_ids, together.expert_ids[places.clone()], "seed {seed}");
            let bits = |weights: &[f32]| weights.iter().map(|weight| weight.to_bits()).collect::<Vec<_>>();
            assert_eq!(
                bits(&alone.routing_weights),
                bits(&together.routing_weights[places]),
                "seed {seed}"
            );
        }
    }
}

#[test]
fn weights_of_all_experts_sum_to_one_where_a_softmax_covers_them() {
    for seed in 0..200 {
        let mut random = Seeded::new(seed);
        let num_experts = random.between(1, 40);
        let router_logits = Array2::from_shape_simple_fn((3, num_experts), || 20.0 * random.signed());
        for score in [ScoreFunction::Softmax, ScoreFunction::SoftmaxOfTopK] {
            let routing = select_experts(router_logits.view(), &plain_gate(score), num_experts, None).unwrap();
            for token in routing.routing_weights.chunks(num_experts) {
                assert!((token.iter().sum::<f32>() - 1.0).abs() < 1e-5, "seed {seed} {score:?}");
                assert!(
                    token.is_sorted_by(|a, b| a >= b),
                    "seed {seed} {score:?}: best expert first"
                );
            }
        }
    }
}

#[test]
fn saturated_sigmoids_are_told_apart_by_their_logits() {
    let router_logits = Array2::from_shape_vec((1, 3), vec![30.0, 31.0, -200.0]).unwrap();
    let routing = select_experts(router_logits.view(), &plain_gate(ScoreFunction::Sigmoid), 3, None).unwrap();
    assert_eq!(routing.expert_ids, [1, 0, 2].map(ExpertId));
    assert_eq!(routing.routing_weights, [1.0, 1.0, 0.0]);
}

#[test]
fn a_correction_bias_moves_the_choice_and_not_the_weight() {
    let router_logits = Array2::from_shape_vec((1, 3), vec![2.0, 0.0, -1.0]).unwrap();
    let gate = GateConfig {
        correction_bias: true,
        ..plain_gate(ScoreFunction::Sigmoid)
    };
    let routing = select_experts(router_logits.view(), &gate, 1, Some(&[0.0, 5.0, 0.0])).unwrap();
    assert_eq!(
        (routing.expert_ids, routing.routing_weights),
        (vec![ExpertId(1)], vec![0.5])
    );
}

#[test]
fn extreme_logits_give_finite_weights() {
    let router_logits = Array2::from_shape_vec((1, 4), vec![f32::MAX, f32::MIN, 0.0, -0.0]).unwrap();
    for score in [
        ScoreFunction::Softmax,
        ScoreFunction::SoftmaxOfTopK,
        ScoreFunction::Sigmoid,
        ScoreFunction::SparseMixer { jitter: 0.01 },
    ] {
        for renormalize in [
            Renormalize::No,
            Renormalize::Sum { epsilon: 0.0 },
            Renormalize::SumAtLeast { floor: 0.0 },
        ] {
            let gate = GateConfig {
                renormalize,
                ..plain_gate(score)
            };
            let routing = select_experts(router_logits.view(), &gate, 4, None).unwrap();
            assert!(
                routing.routing_weights.iter().all(|weight| weight.is_finite()),
                "{gate:?}: {routing:?}"
            );
            // Probabilities that underflow are equal: the lower id first.
            let order = if score == ScoreFunction::Softmax {
                [0, 1, 2, 3]
            } else {
                [0, 2, 3, 1]
            };
            assert_eq!(routing.expert_ids, order.map(ExpertId), "{gate:?}");
        }
    }
    let all_underflow = Array2::from_elem((1, 4), -500.0);
    let gate = GateConfig {
        renormalize: Renormalize::Sum { epsilon: 0.0 },
        ..plain_gate(ScoreFunction::Sigmoid)
    };
    let routing = select_experts(all_underflow.view(), &gate, 2, None).unwrap();
    assert_eq!(routing.routing_weights, [0.0, 0.0]);
}

#[test]
fn logits_that_are_not_finite_are_refused_by_name() {
    for seed in 0..300 {
        let mut case = GateCase::from_seed(seed, false);
        let mut random = Seeded::new(seed);
        let (row, expert) = (
            random.below(case.router_logits.nrows()),
            random.below(case.router_logits.ncols()),
        );
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            case.router_logits[[row, expert]] = value;
            let refused = select_experts(
                case.router_logits.view(),
                &case.gate,
                case.top_k,
                case.correction_bias.as_deref(),
            );
            match refused {
                Err(GateError::NonFinite {
                    row: r,
                    expert: e,
                    value: v,
                }) => {
                    assert_eq!((r, e, v.to_bits()), (row, expert, value.to_bits()), "seed {seed}");
                }
                other => panic!("seed {seed}: {other:?}"),
            }
        }
    }
}

#[test]
fn gates_that_do_not_fit_their_logits_are_refused() {
    let logits = Array2::zeros((2, 6));
    let refused = |gate: &GateConfig, top_k: usize, bias: Option<&[f32]>| {
        select_experts(logits.view(), gate, top_k, bias).unwrap_err()
    };
    let plain = plain_gate(ScoreFunction::Softmax);
    assert_eq!(
        refused(&plain, 0, None),
        GateError::TopK {
            top_k: 0,
            selectable: 6
        }
    );
    assert_eq!(
        refused(&plain, 7, None),
        GateError::TopK {
            top_k: 7,
            selectable: 6
        }
    );
    assert_eq!(
        refused(&plain, 2, Some(&[0.0; 6])),
        GateError::CorrectionBias { wanted: false }
    );

    let biased = GateConfig {
        correction_bias: true,
        ..plain
    };
    assert_eq!(refused(&biased, 2, None), GateError::CorrectionBias { wanted: true });
    assert_eq!(
        refused(&biased, 2, Some(&[0.0; 5])),
        GateError::Width { wanted: 5, found: 6 }
    );
    let infinite = [0.0, 0.0, f32::INFINITY, 0.0, 0.0, 0.0];
    assert_eq!(
        refused(&biased, 2, Some(&infinite)),
        GateError::NonFiniteBias {
            expert: 2,
            value: f32::INFINITY
        }
    );

    for (num_groups, top_groups) in [(0, 1), (4, 1), (3, 0), (3, 4)] {
        let groups = Some(GroupLimit {
            num_groups,
            top_groups,
            score: GroupScore::Max,
        });
        let gate = GateConfig { groups, ..plain };
        assert_eq!(
            refused(&gate, 2, None),
            GateError::Groups {
                num_experts: 6,
                num_groups,
                top_groups
            }
        );
    }
    let groups = Some(GroupLimit {
        num_groups: 3,
        top_groups: 1,
        score: GroupScore::SumOfTopTwo,
    });
    assert_eq!(
        refused(&GateConfig { groups, ..plain }, 3, None),
        GateError::TopK {
            top_k: 3,
            selectable: 2
        }
    );
}

#[test]
fn no_tokens_are_routed_nowhere() {
    let routing = select_experts(
        Array2::zeros((0, 4)).view(),
        &plain_gate(ScoreFunction::Softmax),
        2,
        None,
    )
    .unwrap();
    assert_eq!((routing.tokens(), routing.expert_ids.len()), (0, 0));
}
