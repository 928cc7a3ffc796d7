//! Messages between gateway and workers.

use std::fs;

use moerun_proto::{ModelLimits, decode_handshake, decode_request, decode_response, request_is_intact, v1};
use moerun_tests::golden_dir;
use moerun_types::{CombineMode, ModelConfig, NumberFormat, Numerics};
use prost::Message;

use crate::{Form, Target};

const ROWS: u32 = 2;

pub(crate) fn targets() -> Vec<Target> {
    vec![
        requests("ExecuteRequest f32", NumberFormat::F32),
        requests("ExecuteRequest int8", NumberFormat::Int8),
        responses(),
        handshakes(),
    ]
}

fn limits(format: NumberFormat) -> ModelLimits {
    let text = fs::read_to_string(golden_dir("qwen3_moe").join("config.json")).expect("a golden config");
    let config = ModelConfig::from_json(&text).expect("it is valid");
    let block = if format == NumberFormat::F32 { 8 } else { 32 };
    ModelLimits::new(
        &config,
        Numerics::checked(format, CombineMode::Exact, block).expect("valid"),
    )
}

fn packed(values: &[u16]) -> bytes::Bytes {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect::<Vec<u8>>()
        .into()
}

fn requests(target: &'static str, format: NumberFormat) -> Target {
    let limits = limits(format);
    let hidden = limits.hidden;
    let row_bytes = match format {
        NumberFormat::F32 => 4 * hidden,
        _ => hidden + 4 * hidden.div_ceil(32),
    };
    let wire = match format {
        NumberFormat::F32 => v1::ActivationFormat::F32,
        _ => v1::ActivationFormat::Int8,
    };
    let weights: Vec<u8> = [0.5f32, 0.25].iter().flat_map(|value| value.to_le_bytes()).collect();
    let request = v1::ExecuteRequest {
        request_id: 7,
        layer: 0,
        rows: ROWS,
        hidden: hidden as u32,
        format: wire.into(),
        hidden_states: vec![0; row_bytes * ROWS as usize].into(),
        assignment_counts: packed(&[1, 1]),
        expert_ids: packed(&[0, 1]),
        routing_weights: weights.into(),
        first_blocks: packed(&[0, 0]),
        end_blocks: packed(&[limits.num_blocks as u16, 1]),
        ..v1::ExecuteRequest::default()
    };
    decode_request(&request, &limits).expect("what is changed is valid");
    Target::new(target, Form::Proto, vec![request.encode_to_vec()], move |bytes| {
        if let Ok(request) = v1::ExecuteRequest::decode(bytes) {
            let _ = request_is_intact(&request);
            let _ = decode_request(&request, &limits);
        }
    })
}

fn responses() -> Target {
    let limits = limits(NumberFormat::F32);
    let hidden = limits.hidden;
    let response = v1::ExecuteResponse {
        request_id: 7,
        status: v1::ExecuteStatus::Ok.into(),
        row_widths: vec![5, 6].into(),
        partial_sums: vec![1; 11 * hidden].into(),
        ..v1::ExecuteResponse::default()
    };
    decode_response(&response, CombineMode::Exact, ROWS as usize, hidden).expect("what is changed is valid");
    Target::new(
        "ExecuteResponse",
        Form::Proto,
        vec![response.encode_to_vec()],
        move |bytes| {
            if let Ok(response) = v1::ExecuteResponse::decode(bytes) {
                for mode in [CombineMode::Exact, CombineMode::Fast] {
                    let _ = decode_response(&response, mode, ROWS as usize, hidden);
                }
            }
        },
    )
}

fn handshakes() -> Target {
    let limits = limits(NumberFormat::F32);
    let held = v1::HeldSlice {
        layer: 0,
        expert: 1,
        first_block: 0,
        end_block: limits.num_blocks as u32,
        block_hashes: vec![3; 16 * limits.num_blocks].into(),
    };
    let handshake = v1::HandshakeResponse {
        protocol_version: moerun_proto::PROTOCOL_VERSION,
        build: "0.1.0".to_owned(),
        config_hash: "a".repeat(64),
        expert_header_hash: "b".repeat(64),
        dense_header_hash: String::new(),
        router_hash: "c".repeat(64),
        numerics_id: limits.numerics.id(),
        host: None,
        held: vec![held.clone(), held],
    };
    Target::new(
        "HandshakeResponse",
        Form::Proto,
        vec![handshake.encode_to_vec()],
        move |bytes| {
            if let Ok(response) = v1::HandshakeResponse::decode(bytes) {
                let _ = decode_handshake(&response, Some(&limits));
                let _ = decode_handshake(&response, None);
            }
        },
    )
}
