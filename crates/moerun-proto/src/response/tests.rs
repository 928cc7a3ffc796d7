use bytes::Bytes;
use proptest::prelude::*;
use prost::Message;

use super::*;

const HIDDEN: usize = 3;

fn exact(rows: usize) -> impl Strategy<Value = PartialSums> {
    // Shifts give every packed width its turn.
    let element = (any::<i64>(), 0u32..64).prop_map(|(value, shift)| value >> shift);
    prop::collection::vec(element, rows * HIDDEN).prop_map(|sums| PartialSums::Exact { hidden: HIDDEN, sums })
}

fn valid_response() -> v1::ExecuteResponse {
    let sums = PartialSums::Exact {
        hidden: HIDDEN,
        sums: vec![1, -2, 300, 0, 0, 0],
    };
    encode_response(5, &sums, Duration::from_micros(3), Duration::from_micros(4))
}

proptest! {
    #[test]
    fn exact_sums_come_back_as_they_were_sent((rows, sums) in (1usize..5).prop_flat_map(|n| (Just(n), exact(n)))) {
        let message = encode_response(5, &sums, Duration::from_micros(3), Duration::from_micros(4));
        let message = v1::ExecuteResponse::decode(message.encode_to_vec().as_slice()).unwrap();
        let reply = decode_response(&message, CombineMode::Exact, rows, HIDDEN).unwrap();
        prop_assert_eq!(reply.request_id, 5);
        prop_assert_eq!(reply.outcome, Ok(sums));
        prop_assert_eq!((reply.queued, reply.computed), (Duration::from_micros(3), Duration::from_micros(4)));
    }

    #[test]
    fn garbled_responses_never_panic(position: prop::sample::Index, byte: u8, length: prop::sample::Index) {
        let mut bytes = valid_response().encode_to_vec();
        let place = position.index(bytes.len());
        bytes[place] = byte;
        bytes.truncate(length.index(bytes.len()) + 1);
        if let Ok(message) = v1::ExecuteResponse::decode(bytes.as_slice()) {
            let _ = decode_response(&message, CombineMode::Exact, 2, HIDDEN);
            let _ = decode_response(&message, CombineMode::Fast, 2, HIDDEN);
        }
    }
}

#[test]
fn fast_sums_come_back_as_they_were_sent() {
    let sums = PartialSums::Fast {
        hidden: HIDDEN,
        sums: vec![1.5, -0.0, 3.25],
    };
    let message = encode_response(5, &sums, Duration::ZERO, Duration::ZERO);
    let reply = decode_response(&message, CombineMode::Fast, 1, HIDDEN).unwrap();
    assert_eq!(reply.outcome, Ok(sums));
}

#[test]
fn failures_come_back_as_they_were_sent() {
    let (layer, expert, message) = (LayerId(3), ExpertId(9), "why".to_owned());
    let failures = [
        ExecuteFailure::Invalid {
            message: message.clone(),
        },
        ExecuteFailure::NotHeld {
            layer,
            expert,
            block: Some(2),
            message: message.clone(),
        },
        ExecuteFailure::TermOutOfRange {
            layer,
            expert,
            block: None,
            message: message.clone(),
        },
        ExecuteFailure::Overloaded,
        ExecuteFailure::Draining,
        ExecuteFailure::DeadlineExceeded,
        ExecuteFailure::Internal { message },
    ];
    for failure in failures {
        let reply = decode_response(&encode_failure(4, failure.clone()), CombineMode::Exact, 1, HIDDEN).unwrap();
        assert_eq!((reply.request_id, reply.outcome), (4, Err(failure)));
    }
}

#[test]
fn every_lie_of_a_response_is_named() {
    type Lie = (&'static str, fn(&mut v1::ExecuteResponse));
    let lies: &[Lie] = &[
        ("status", |m| m.status = 0),
        ("status", |m| m.status = 99),
        ("row_widths", |m| m.row_widths = Bytes::from_static(&[2])),
        ("row_widths", |m| m.row_widths = Bytes::from_static(&[2, 9])),
        ("partial_sums", |m| m.row_widths = Bytes::from_static(&[8, 8])),
        ("partial_sums", |m| m.partial_sums = m.partial_sums.slice(1..)),
        ("expert", |m| {
            m.status = v1::ExecuteStatus::NotHeld.into();
            m.expert = 1 << 16;
        }),
        ("block", |m| {
            m.status = v1::ExecuteStatus::TermOutOfRange.into();
            m.block = Some(1 << 16);
        }),
    ];
    decode_response(&valid_response(), CombineMode::Exact, 2, HIDDEN).unwrap();
    for (index, (field, lie)) in lies.iter().enumerate() {
        let mut message = valid_response();
        lie(&mut message);
        let error = decode_response(&message, CombineMode::Exact, 2, HIDDEN).unwrap_err();
        assert_eq!(error.field, *field, "lie {index}: {error}");
    }
}
