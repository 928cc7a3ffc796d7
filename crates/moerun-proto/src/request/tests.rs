use moerun_types::{CombineMode, NumberFormat, Numerics, QUANTIZED_BLOCK};
use proptest::prelude::*;
use prost::Message;

use super::*;

const HIDDEN: usize = 3;
const NUM_EXPERTS: u16 = 5;
const NUM_BLOCKS: u16 = 4;

fn limits(format: NumberFormat) -> ModelLimits {
    ModelLimits {
        hidden: HIDDEN,
        num_experts: NUM_EXPERTS.into(),
        top_k: 2,
        num_blocks: NUM_BLOCKS.into(),
        moe_layers: vec![false, true],
        numerics: Numerics {
            format,
            combine: CombineMode::Exact,
            combine_block: QUANTIZED_BLOCK,
        },
        max_rows: 16,
    }
}

fn activations(format: ActivationFormat, rows: usize) -> Activations {
    match format {
        ActivationFormat::F32 => Activations::F32 {
            rows,
            cols: HIDDEN,
            data: (0..rows * HIDDEN).map(|i| i as f32 - 2.5).collect(),
        },
        ActivationFormat::Bf16 => Activations::Bf16 {
            rows,
            cols: HIDDEN,
            data: (0..rows * HIDDEN).map(|i| 0x3f80 + i as u16).collect(),
        },
        ActivationFormat::Int8 => Activations::Int8 {
            rows,
            cols: HIDDEN,
            codes: (0..rows)
                .map(|row| std::array::from_fn(|col| if col < HIDDEN { row as i8 * 3 - col as i8 } else { 0 }))
                .collect(),
            scales: (0..rows).map(|row| row as f32 * 0.25).collect(),
        },
    }
}

/// One or two assignments for each of 1 to 6 rows, within what a row may ask for.
fn assignments() -> impl Strategy<Value = Vec<Vec<(u16, u16, f32)>>> {
    let one = (0..NUM_EXPERTS, 0..NUM_BLOCKS, -2.0f32..2.0);
    prop::collection::vec(prop::collection::vec(one, 1..=2), 1..=6)
}

fn flatten(per_row: &[Vec<(u16, u16, f32)>]) -> Vec<Assignment> {
    (0u32..)
        .zip(per_row)
        .flat_map(|(row, list)| {
            list.iter().map(move |&(expert, first, weight)| Assignment {
                row,
                expert: ExpertId(expert),
                blocks: BlockRange { first, end: NUM_BLOCKS },
                weight,
            })
        })
        .collect()
}

fn valid_request() -> v1::ExecuteRequest {
    let work = flatten(&[vec![(0, 0, 1.0), (4, 1, 0.5)], vec![(2, 3, 0.25)]]);
    let rows = activations(ActivationFormat::F32, 2);
    encode_request(7, LayerId(1), &rows, &[0, 1], &work, Duration::from_secs(1))
}

proptest! {
    #[test]
    fn a_request_comes_back_as_it_was_sent(per_row in assignments(), format in prop::sample::select(NumberFormat::ALL.to_vec())) {
        let sent = activations(format.activations(), per_row.len());
        let work = flatten(&per_row);
        let rows: Vec<u32> = (0..per_row.len() as u32).collect();
        let message = encode_request(9, LayerId(1), &sent, &rows, &work, Duration::from_millis(5));
        let message = v1::ExecuteRequest::decode(message.encode_to_vec().as_slice()).unwrap();
        let received = decode_request(&message, &limits(format)).unwrap();
        prop_assert_eq!(received.request_id, 9);
        prop_assert_eq!(received.layer, LayerId(1));
        prop_assert_eq!(received.deadline, Some(Duration::from_millis(5)));
        prop_assert_eq!(received.assignments, work);
        prop_assert_eq!(received.activations, sent);
    }

    #[test]
    fn garbled_requests_never_panic(position: prop::sample::Index, byte: u8, length: prop::sample::Index) {
        let mut bytes = valid_request().encode_to_vec();
        let place = position.index(bytes.len());
        bytes[place] = byte;
        bytes.truncate(length.index(bytes.len()) + 1);
        if let Ok(message) = v1::ExecuteRequest::decode(bytes.as_slice()) {
            let _ = decode_request(&message, &limits(NumberFormat::F32));
        }
    }
}

#[test]
fn only_the_rows_named_travel() {
    let all = flatten(&[vec![(1, 0, 1.0)], vec![(2, 0, 1.0), (3, 2, 0.5)]]);
    let rows = activations(ActivationFormat::F32, 9);
    let message = encode_request(1, LayerId(1), &rows, &[4, 8], &all, Duration::ZERO);
    let received = decode_request(&message, &limits(NumberFormat::F32)).unwrap();
    assert_eq!(received.activations, rows.select_rows(&[4, 8]));
    assert_eq!(
        received
            .assignments
            .iter()
            .map(|a| (a.row, a.expert.0))
            .collect::<Vec<_>>(),
        [(0, 1), (1, 2), (1, 3)]
    );
    assert_eq!(received.deadline, None);
}

#[test]
fn every_lie_of_a_request_is_named() {
    type Lie = (&'static str, fn(&mut v1::ExecuteRequest));
    let lies: &[Lie] = &[
        ("request_id", |m| m.request_id = 0),
        ("layer", |m| m.layer = 0),
        ("layer", |m| m.layer = u32::MAX),
        ("rows", |m| m.rows = 0),
        ("rows", |m| m.rows = 17),
        ("rows", |m| m.rows = u32::MAX),
        ("hidden", |m| m.hidden = 4),
        ("format", |m| m.format = 2),
        ("format", |m| m.format = -9),
        ("hidden_states", |m| m.hidden_states = m.hidden_states.slice(1..)),
        ("hidden_states", |m| m.rows = 3),
        ("assignment_counts", |m| {
            m.assignment_counts = m.assignment_counts.slice(1..)
        }),
        ("assignment_counts", |m| {
            m.assignment_counts = Bytes::from_static(&[0, 0, 3, 0])
        }),
        ("expert_ids", |m| {
            m.assignment_counts = Bytes::from_static(&[255, 255, 255, 255])
        }),
        ("expert_ids", |m| m.expert_ids = m.expert_ids.slice(2..)),
        ("expert_ids", |m| m.expert_ids = Bytes::from_static(&[0, 0, 5, 0, 0, 0])),
        ("routing_weights", |m| m.routing_weights = m.routing_weights.slice(4..)),
        ("first_blocks", |m| m.first_blocks = Bytes::new()),
        ("end_blocks", |m| m.end_blocks = Bytes::from_static(&[0; 8])),
        ("end_blocks", |m| m.end_blocks = Bytes::from_static(&[5, 0, 4, 0, 4, 0])),
        ("end_blocks", |m| m.end_blocks = Bytes::from_static(&[4, 0, 4, 0, 3, 0])),
    ];
    let limits = limits(NumberFormat::F32);
    decode_request(&valid_request(), &limits).unwrap();
    for (index, (field, lie)) in lies.iter().enumerate() {
        let mut message = valid_request();
        lie(&mut message);
        let error = decode_request(&message, &limits).unwrap_err();
        assert_eq!(error.field, *field, "lie {index}: {error}");
    }
}

#[test]
fn a_row_may_not_ask_for_more_blocks_than_the_exact_combine_allows() {
    let work = flatten(&[vec![(0, 0, 1.0), (1, 0, 1.0), (2, 3, 1.0)]]);
    let rows = activations(ActivationFormat::F32, 1);
    let message = encode_request(1, LayerId(1), &rows, &[0], &work, Duration::ZERO);
    let error = decode_request(&message, &limits(NumberFormat::F32)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "assignment_counts: wanted at most 8 blocks a row, found 9 for row 0"
    );
}

#[test]
fn a_code_that_no_rounding_gives_is_refused() {
    let work = flatten(&[vec![(0, 0, 1.0)], vec![(1, 0, 1.0)]]);
    let rows = activations(ActivationFormat::Int8, 2);
    let mut message = encode_request(1, LayerId(1), &rows, &[0, 1], &work, Duration::ZERO);
    let mut bytes = message.hidden_states.to_vec();
    bytes[ActivationFormat::Int8.row_bytes(HIDDEN) + 2] = 0x80;
    message.hidden_states = bytes.into();
    for format in [NumberFormat::Int8, NumberFormat::Int4, NumberFormat::Mxfp4] {
        let error = decode_request(&message, &limits(format)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "hidden_states: wanted codes of -127 to 127, found -128 in row 1, column 2"
        );
    }
    let error = decode_request(&message, &limits(NumberFormat::Bf16)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "format: wanted ACTIVATION_FORMAT_BF16, found ACTIVATION_FORMAT_INT8"
    );
}
