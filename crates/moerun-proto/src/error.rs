//! Why a message was refused.

/// A field of a message that cannot be what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: wanted {wanted}, found {found}")]
pub struct WireError {
    /// The field, as `proto/` names it.
    pub field: &'static str,
    /// What was wanted.
    pub wanted: String,
    /// What was found.
    pub found: String,
}

impl WireError {
    /// Names the field and both values.
    pub fn new(field: &'static str, wanted: impl ToString, found: impl ToString) -> Self {
        Self {
            field,
            wanted: wanted.to_string(),
            found: found.to_string(),
        }
    }
}
