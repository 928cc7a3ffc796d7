use moerun_types::{CombineMode, NumberFormat, Numerics};
use prost::Message;

use super::*;

fn limits() -> ModelLimits {
    ModelLimits {
        hidden: 3,
        num_experts: 5,
        top_k: 2,
        num_blocks: 4,
        moe_layers: vec![false, true],
        numerics: Numerics {
            format: NumberFormat::F32,
            combine: CombineMode::Exact,
            combine_block: 8,
        },
        max_rows: 16,
    }
}

fn held(expert: u16, first: u16, end: u16) -> HeldExpert {
    HeldExpert {
        slice: ExpertSlice {
            layer: LayerId(1),
            expert: ExpertId(expert),
            blocks: BlockRange { first, end },
        },
        block_hashes: (first..end).map(|block| [block as u8 + expert as u8; 16]).collect(),
    }
}

fn identity() -> WorkerIdentity {
    WorkerIdentity {
        protocol_version: crate::PROTOCOL_VERSION,
        build: "0.1.0".to_owned(),
        config_hash: "c".repeat(64),
        expert_header_hash: Some("e".repeat(64)),
        dense_header_hash: None,
        router_hash: Some("r".repeat(64)),
        numerics_id: limits().numerics.id(),
        held: vec![held(0, 0, 4), held(3, 0, 1), held(3, 2, 4)],
    }
}

#[test]
fn an_identity_comes_back_as_it_was_sent() {
    let message = encode_handshake(&identity());
    let message = v1::HandshakeResponse::decode(message.encode_to_vec().as_slice()).unwrap();
    assert_eq!(decode_handshake(&message, Some(&limits())).unwrap(), identity());
}

#[test]
fn every_lie_of_a_handshake_is_named() {
    type Lie = (&'static str, fn(&mut v1::HandshakeResponse));
    let lies: &[Lie] = &[
        ("config_hash", |m| m.config_hash = "c".repeat(257)),
        ("held.layer", |m| m.held[0].layer = 0),
        ("held.layer", |m| m.held[0].layer = 2),
        ("held.expert", |m| m.held[0].expert = 5),
        ("held.expert", |m| m.held[0].expert = 1 << 16),
        ("held.end_block", |m| m.held[0].end_block = 5),
        ("held.end_block", |m| m.held[0].end_block = 0),
        ("held.end_block", |m| m.held[0].first_block = 1 << 16),
        ("held.block_hashes", |m| m.held[0].block_hashes.truncate(63)),
        ("held", |m| m.held.swap(0, 1)),
        ("held", |m| m.held[2] = m.held[1].clone()),
    ];
    for (index, (field, lie)) in lies.iter().enumerate() {
        let mut message = encode_handshake(&identity());
        lie(&mut message);
        let error = decode_handshake(&message, Some(&limits())).unwrap_err();
        assert_eq!(error.field, *field, "lie {index}: {error}");
    }
}

#[test]
fn a_worker_of_another_model_can_be_named_before_its_slices_are_read() {
    let mut message = encode_handshake(&identity());
    message.held[0].layer = 77;
    let identity = decode_handshake(&message, None).unwrap();
    assert_eq!(identity.config_hash, "c".repeat(64));
    assert!(identity.held.is_empty());
}
