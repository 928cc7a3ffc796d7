/// Why a gate refused its input.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum GateError {
    /// A logit is NaN or infinite.
    #[error("router logit of row {row}, expert {expert} is {value}: wanted a finite number")]
    NonFinite {
        /// Row of the batch.
        row: usize,
        /// Expert.
        expert: usize,
        /// The logit.
        value: f32,
    },
    /// The array's width is not the number of experts.
    #[error("router logits have {found} columns, wanted {wanted}")]
    Width {
        /// `num_experts`.
        wanted: usize,
        /// Columns found.
        found: usize,
    },
    /// A correction bias is missing, or given to a gate that has none.
    #[error("correction bias: wanted {}, found {}", presence(*.wanted), presence(!*.wanted))]
    CorrectionBias {
        /// Whether the gate's config asks for one.
        wanted: bool,
    },
    /// A correction bias is NaN or infinite.
    #[error("correction bias of expert {expert} is {value}: wanted a finite number")]
    NonFiniteBias {
        /// Expert.
        expert: usize,
        /// The bias.
        value: f32,
    },
    /// Fewer experts can be chosen than a token asks for, or it asks for none.
    #[error("experts per token: wanted 1 to {selectable}, found {top_k}")]
    TopK {
        /// Experts per token.
        top_k: usize,
        /// Experts that may be chosen, those of the best groups where there are groups.
        selectable: usize,
    },
    /// Groups that do not divide the experts.
    #[error(
        "group-limited choice: wanted groups that divide {num_experts} experts and 1 to all of them chosen, \
         found {top_groups} of {num_groups}"
    )]
    Groups {
        /// Experts per layer.
        num_experts: usize,
        /// Groups.
        num_groups: usize,
        /// Groups that stay.
        top_groups: usize,
    },
}

fn presence(given: bool) -> &'static str {
    if given { "one" } else { "none" }
}
