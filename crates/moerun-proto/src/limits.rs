//! Numbers that both ends of a connection share, and what a receiver knows before it believes a message.

use moerun_types::{FeedForwardKind, LayerId, ModelConfig, Numerics};

/// Version of the protocol between gateway and worker: major × 1000 + minor. Equal majors understand each other.
pub const PROTOCOL_VERSION: u32 = 1002;

/// The first version whose requests and answers carry checksums.
const CHECKSUMS_SINCE: u32 = 1002;

/// Largest gRPC message, on both sides of every service. A request between gateway and worker stays far below it
/// ([`MAX_EXECUTE_BYTES`]).
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Largest answer to a handshake: 16 bytes for every block of every expert that a worker holds.
pub const MAX_HANDSHAKE_BYTES: usize = 64 << 20;

/// A batch is cut into requests of at most this many bytes (of rows and assignments), so that it streams. A single row
/// may be longer.
pub const MAX_EXECUTE_BYTES: usize = 256 << 10;

/// Most rows in one request.
pub const MAX_ROWS_PER_MESSAGE: usize = 1 << 16;

/// HTTP/2 flow-control window of a stream; must exceed the largest message.
pub const STREAM_WINDOW_BYTES: u32 = 16 << 20;

/// HTTP/2 flow-control window of a connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// Largest HTTP/2 frame, so that a message of [`MAX_EXECUTE_BYTES`] is one frame and not sixteen.
pub const MAX_FRAME_BYTES: u32 = 1 << 20;

/// Whether two protocol versions understand each other.
pub fn speaks_same_major(version: u32) -> bool {
    version / 1000 == PROTOCOL_VERSION / 1000
}

/// Whether a peer of that version answers with checksums where it is asked with them.
pub fn speaks_checksums(version: u32) -> bool {
    version >= CHECKSUMS_SINCE
}

/// What a receiver knows of the model: the bounds of every number in a message.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelLimits {
    /// Length of a row.
    pub hidden: usize,
    /// Experts of a MoE layer.
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Combine blocks of an expert.
    pub num_blocks: usize,
    /// For each layer, whether it has experts.
    pub moe_layers: Vec<bool>,
    /// Number format of the rows, and how partial sums are added.
    pub numerics: Numerics,
    /// Most rows in one request, such that neither it nor its answer exceeds [`MAX_MESSAGE_BYTES`].
    pub max_rows: usize,
}

impl ModelLimits {
    /// The limits of a model; a dense one has no layer that may be asked for.
    pub fn new(config: &ModelConfig, numerics: Numerics) -> Self {
        let (num_experts, top_k, intermediate) = config
            .moe
            .as_ref()
            .map_or((0, 0, 0), |moe| (moe.num_experts, moe.top_k, moe.intermediate));
        // An exact sum takes at most 8 bytes, its row one more for the width; the rest of an answer is short.
        let reply_row_bytes = config.hidden.saturating_mul(8).saturating_add(1);
        Self {
            hidden: config.hidden,
            num_experts,
            top_k,
            num_blocks: numerics.num_blocks(intermediate),
            moe_layers: config
                .layers
                .iter()
                .map(|layer| layer.feed_forward == FeedForwardKind::Moe)
                .collect(),
            numerics,
            max_rows: ((MAX_MESSAGE_BYTES - (64 << 10)) / reply_row_bytes).clamp(1, MAX_ROWS_PER_MESSAGE),
        }
    }

    /// Whether `layer` is a layer of the model that has experts.
    pub fn is_moe_layer(&self, layer: LayerId) -> bool {
        usize::try_from(layer.0)
            .ok()
            .and_then(|index| self.moe_layers.get(index))
            .copied()
            .unwrap_or(false)
    }

    /// Most blocks, over all its assignments, that one row may ask for.
    pub(crate) fn max_blocks_per_row(&self) -> usize {
        self.top_k.saturating_mul(self.num_blocks)
    }
}
