//! Rows and assignments ↔ [`v1::ExecuteRequest`].

use std::time::Duration;

use bytes::Bytes;
use moerun_kernels::{Activations, ActivationsError};
use moerun_routing::Assignment;
use moerun_types::{ActivationFormat, BlockRange, ExpertId, LayerId};

use crate::{
    ModelLimits, WireError,
    packed::{byte_len, check_len, f32s, u16s},
    v1,
};

/// Bytes of one assignment: expert, weight, first and last block.
const ASSIGNMENT_BYTES: usize = 2 + 4 + 2 + 2;

/// What a gateway asks of a worker, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecuteWork {
    /// Matches the answer.
    pub request_id: u64,
    /// Model layer; it has experts.
    pub layer: LayerId,
    /// `[rows, hidden]`.
    pub activations: Activations,
    /// Work on the rows, ascending by row; at least one for each.
    pub assignments: Vec<Assignment>,
    /// How long after sending the gateway stops waiting.
    pub deadline: Option<Duration>,
}

/// Bytes that a row with `assignments` assignments takes in a request, for cutting a batch into messages.
pub fn request_cost_bytes(format: ActivationFormat, hidden: usize, assignments: usize) -> usize {
    format.row_bytes(hidden) + 2 + assignments * ASSIGNMENT_BYTES
}

/// Encodes the rows of `activations` named by `rows`; `assignments` are ascending by row, which counts within `rows`.
///
/// Each row must have between 1 and 65,535 assignments.
pub fn encode_request(
    request_id: u64,
    layer: LayerId,
    activations: &Activations,
    rows: &[u32],
    assignments: &[Assignment],
    deadline: Duration,
) -> v1::ExecuteRequest {
    let format = activations.format();
    let mut hidden_states = Vec::with_capacity(rows.len() * format.row_bytes(activations.cols()));
    activations.append_rows_le(rows, &mut hidden_states);
    let mut counts = vec![0u16; rows.len()];
    let mut expert_ids = Vec::with_capacity(assignments.len() * 2);
    let mut routing_weights = Vec::with_capacity(assignments.len() * 4);
    let mut first_blocks = Vec::with_capacity(assignments.len() * 2);
    let mut end_blocks = Vec::with_capacity(assignments.len() * 2);
    for assignment in assignments {
        counts[assignment.row as usize] += 1;
        expert_ids.extend_from_slice(&assignment.expert.0.to_le_bytes());
        routing_weights.extend_from_slice(&assignment.weight.to_le_bytes());
        first_blocks.extend_from_slice(&assignment.blocks.first.to_le_bytes());
        end_blocks.extend_from_slice(&assignment.blocks.end.to_le_bytes());
    }
    v1::ExecuteRequest {
        request_id,
        layer: layer.0,
        rows: rows.len() as u32,
        hidden: activations.cols() as u32,
        format: wire_format(format).into(),
        hidden_states: hidden_states.into(),
        assignment_counts: counts
            .iter()
            .flat_map(|count| count.to_le_bytes())
            .collect::<Vec<_>>()
            .into(),
        expert_ids: expert_ids.into(),
        routing_weights: routing_weights.into(),
        first_blocks: first_blocks.into(),
        end_blocks: end_blocks.into(),
        deadline_micros: u32::try_from(deadline.as_micros()).unwrap_or(u32::MAX),
        echo: Bytes::new(),
        checksum: None,
    }
}

/// Checks a request against the model and takes it apart.
pub fn decode_request(request: &v1::ExecuteRequest, limits: &ModelLimits) -> Result<ExecuteWork, WireError> {
    if request.request_id == 0 {
        return Err(WireError::new("request_id", "not 0", 0));
    }
    let layer = LayerId(request.layer);
    if !limits.is_moe_layer(layer) {
        return Err(WireError::new("layer", "a layer with experts", layer));
    }
    let rows = request.rows as usize;
    if rows == 0 || rows > limits.max_rows {
        return Err(WireError::new("rows", format!("1 to {}", limits.max_rows), rows));
    }
    if request.hidden as usize != limits.hidden {
        return Err(WireError::new("hidden", limits.hidden, request.hidden));
    }
    let format = limits.numerics.format.activations();
    if request.format != i32::from(wire_format(format)) {
        let found = v1::ActivationFormat::try_from(request.format)
            .map_or_else(|_| request.format.to_string(), |found| found.as_str_name().to_owned());
        return Err(WireError::new("format", wire_format(format).as_str_name(), found));
    }
    let states = &request.hidden_states;
    check_len(
        "hidden_states",
        states,
        byte_len("hidden_states", &[rows, format.row_bytes(limits.hidden)])?,
    )?;
    let assignments = decode_assignments(request, rows, limits)?;
    let activations = Activations::from_le_bytes(format, rows, limits.hidden, states).map_err(activations_error)?;
    Ok(ExecuteWork {
        request_id: request.request_id,
        layer,
        activations,
        assignments,
        deadline: (request.deadline_micros > 0).then(|| Duration::from_micros(request.deadline_micros.into())),
    })
}

fn decode_assignments(
    request: &v1::ExecuteRequest,
    rows: usize,
    limits: &ModelLimits,
) -> Result<Vec<Assignment>, WireError> {
    let counts: &Bytes = &request.assignment_counts;
    check_len("assignment_counts", counts, byte_len("assignment_counts", &[rows, 2])?)?;
    let total: usize = u16s(counts).map(usize::from).sum();
    check_len("expert_ids", &request.expert_ids, byte_len("expert_ids", &[total, 2])?)?;
    check_len(
        "routing_weights",
        &request.routing_weights,
        byte_len("routing_weights", &[total, 4])?,
    )?;
    check_len(
        "first_blocks",
        &request.first_blocks,
        byte_len("first_blocks", &[total, 2])?,
    )?;
    check_len("end_blocks", &request.end_blocks, byte_len("end_blocks", &[total, 2])?)?;

    let mut experts = u16s(&request.expert_ids);
    let mut weights = f32s(&request.routing_weights);
    let mut firsts = u16s(&request.first_blocks);
    let mut ends = u16s(&request.end_blocks);
    let mut assignments = Vec::with_capacity(total);
    for (row, count) in (0u32..).zip(u16s(counts)) {
        if count == 0 {
            return Err(WireError::new(
                "assignment_counts",
                "at least 1",
                format!("0 for row {row}"),
            ));
        }
        let mut row_blocks = 0;
        for _ in 0..count {
            let fields = (experts.next(), weights.next(), firsts.next(), ends.next());
            let (Some(expert), Some(weight), Some(first), Some(end)) = fields else {
                return Err(WireError::new("expert_ids", format!("{total} assignments"), "fewer"));
            };
            if usize::from(expert) >= limits.num_experts {
                return Err(WireError::new(
                    "expert_ids",
                    format!("below {}", limits.num_experts),
                    expert,
                ));
            }
            let blocks = BlockRange { first, end };
            if blocks.is_empty() || usize::from(end) > limits.num_blocks {
                let wanted = format!("a run of blocks within 0..{}", limits.num_blocks);
                return Err(WireError::new("end_blocks", wanted, blocks));
            }
            row_blocks += blocks.len();
            assignments.push(Assignment {
                row,
                expert: ExpertId(expert),
                blocks,
                weight,
            });
        }
        if row_blocks > limits.max_blocks_per_row() {
            let wanted = format!("at most {} blocks a row", limits.max_blocks_per_row());
            return Err(WireError::new(
                "assignment_counts",
                wanted,
                format!("{row_blocks} for row {row}"),
            ));
        }
    }
    Ok(assignments)
}

fn activations_error(error: ActivationsError) -> WireError {
    match error {
        ActivationsError::Length { wanted, found, .. } => WireError::new("hidden_states", wanted, found),
        ActivationsError::Code { row, col } => WireError::new(
            "hidden_states",
            "codes of -127 to 127",
            format!("-128 in row {row}, column {col}"),
        ),
    }
}

fn wire_format(format: ActivationFormat) -> v1::ActivationFormat {
    match format {
        ActivationFormat::F32 => v1::ActivationFormat::F32,
        ActivationFormat::Bf16 => v1::ActivationFormat::Bf16,
        ActivationFormat::Int8 => v1::ActivationFormat::Int8,
    }
}

#[cfg(test)]
mod tests;
