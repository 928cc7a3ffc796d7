//! Why a `config.json` was refused.

/// Why a `config.json` was refused. Field names are those of the file, with a dot for nesting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not JSON.
    #[error("config.json: {0}")]
    Json(#[from] serde_json::Error),
    /// JSON, but no object.
    #[error("config.json: wanted an object, found {found}")]
    NotAnObject {
        /// What was found.
        found: String,
    },
    /// A field without which the model cannot be known is absent or null.
    #[error("config.json: {field} is missing: wanted {wanted}")]
    Missing {
        /// The field.
        field: String,
        /// What it should hold.
        wanted: String,
    },
    /// A field of the wrong type, out of range, or contradicting another.
    #[error("config.json: {field}: wanted {wanted}, found {found}")]
    Invalid {
        /// The field.
        field: String,
        /// What it should hold.
        wanted: String,
        /// What it holds.
        found: String,
    },
    /// A feature of the upstream family that would be computed wrongly if it were ignored.
    #[error("config.json: {field} is {found}, which is not supported: wanted {wanted}")]
    Unsupported {
        /// The field.
        field: String,
        /// What would be supported.
        wanted: String,
        /// What it holds.
        found: String,
    },
    /// A model family that is not known here.
    #[error("config.json: unsupported model_type {found:?}; supported: {supported}")]
    UnsupportedModelType {
        /// `model_type` of the file.
        found: String,
        /// The families that are known, comma-separated.
        supported: String,
    },
    /// A multimodal model whose language model is one part of it.
    #[error(
        "config.json: model_type {model_type:?} wraps a language model in text_config: wanted the config of a plain \
         decoder, one of {supported}"
    )]
    Multimodal {
        /// `model_type` of the file.
        model_type: String,
        /// The families that are known, comma-separated.
        supported: String,
    },
}
