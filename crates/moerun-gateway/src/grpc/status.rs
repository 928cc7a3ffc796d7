//! Errors as gRPC statuses: the one place where that is decided.

use std::{collections::HashMap, time::Duration};

use moerun_dispatch::DispatchError;
use moerun_engine::EngineError;
use moerun_model::ExpertError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::GatewayError;

/// `ErrorInfo.domain` of all our errors.
const DOMAIN: &str = "moerun";

/// When a client that was refused for lack of room may try again.
const RETRY_WHEN_FULL: Duration = Duration::from_secs(1);

/// When a client may try again that lost its workers or found this gateway stopping.
const RETRY_ELSEWHERE: Duration = Duration::from_secs(5);

/// The status of an error, with `google.rpc` details: `ErrorInfo` always, `BadRequest` for a bad field, `RetryInfo` where
/// trying again can help, `ResourceInfo` for a model that is not there, `PreconditionFailure` for a model that cannot.
pub fn to_status(error: &GatewayError) -> Status {
    let refusal = Refusal::of(error);
    let message = error.to_string();
    let mut details = ErrorDetails::new();
    details.set_error_info(refusal.reason, DOMAIN, refusal.metadata());
    match &refusal.kind {
        Kind::BadField(field) => {
            details.add_bad_request_violation(*field, message.clone());
        }
        Kind::NoSuchModel(name) => {
            details.set_resource_info("moerun.v1.Model", *name, "", message.clone());
        }
        Kind::CannotDo(subject) => {
            details.add_precondition_failure_violation(refusal.reason, *subject, message.clone());
        }
        Kind::TryAgain(_, after) => {
            details.set_retry_info(Some(*after));
        }
        Kind::Other(_) => {}
    }
    if matches!(refusal.kind, Kind::Other(Code::Internal)) {
        tracing::error!(%error, "a request failed inside");
    }
    Status::with_error_details(refusal.kind.code(), message, details)
}

struct Refusal<'a> {
    /// `ErrorInfo.reason`.
    reason: &'static str,
    kind: Kind<'a>,
    numbers: Vec<(&'static str, String)>,
}

enum Kind<'a> {
    BadField(&'a str),
    NoSuchModel(&'a str),
    CannotDo(&'static str),
    TryAgain(Code, Duration),
    Other(Code),
}

impl Kind<'_> {
    fn code(&self) -> Code {
        match self {
            Kind::BadField(_) => Code::InvalidArgument,
            Kind::NoSuchModel(_) => Code::NotFound,
            Kind::CannotDo(_) => Code::FailedPrecondition,
            Kind::TryAgain(code, _) | Kind::Other(code) => *code,
        }
    }
}

impl<'a> Refusal<'a> {
    fn new(reason: &'static str, kind: Kind<'a>) -> Self {
        Refusal {
            reason,
            kind,
            numbers: Vec::new(),
        }
    }

    fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.numbers.push((name, value.to_string()));
        self
    }

    fn metadata(&self) -> HashMap<String, String> {
        self.numbers
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect()
    }

    fn of(error: &'a GatewayError) -> Self {
        match error {
            GatewayError::UnknownModel { wanted, served } => {
                Refusal::new("MODEL_NOT_FOUND", Kind::NoSuchModel(wanted)).with("served", served)
            }
            GatewayError::Invalid { field, found, .. } => Refusal::new("INVALID_FIELD", Kind::BadField(field))
                .with("field", field)
                .with("found", found),
            GatewayError::PromptTooLong {
                prompt_tokens,
                max_context,
            } => Refusal::prompt_too_long(*prompt_tokens, *max_context),
            GatewayError::NoChatTemplate { .. } => Refusal::new("NO_CHAT_TEMPLATE", Kind::CannotDo("chat_template")),
            GatewayError::BrokenChatTemplate { .. } => {
                Refusal::new("BROKEN_CHAT_TEMPLATE", Kind::CannotDo("chat_template"))
            }
            GatewayError::ChatTemplate { .. } => Refusal::new("CHAT_REFUSED", Kind::BadField("chat.messages")),
            GatewayError::AnswersFull { limit_kib, .. } => {
                Refusal::new("ANSWERS_FULL", Kind::TryAgain(Code::ResourceExhausted, RETRY_WHEN_FULL))
                    .with("limit_kib", limit_kib)
            }
            GatewayError::Auth(error) => Refusal::new(error.reason(), Kind::Other(Code::Unauthenticated)),
            GatewayError::Engine(error) => Refusal::of_engine(error),
            GatewayError::EngineGone => Refusal::new("ENGINE_GONE", Kind::Other(Code::Internal)),
            GatewayError::Tokenizer { .. } => Refusal::new("TOKENIZER_FAILED", Kind::Other(Code::Internal)),
            GatewayError::Read { .. }
            | GatewayError::Malformed { .. }
            | GatewayError::Gguf(_)
            | GatewayError::Serve(_) => Refusal::new("INTERNAL", Kind::Other(Code::Internal)),
        }
    }

    fn of_engine(error: &'a EngineError) -> Self {
        match error {
            EngineError::QueueFull { limit } => {
                Refusal::new("QUEUE_FULL", Kind::TryAgain(Code::ResourceExhausted, RETRY_WHEN_FULL))
                    .with("limit", limit)
            }
            EngineError::PromptTooLong {
                prompt_tokens,
                max_context,
            } => Refusal::prompt_too_long(*prompt_tokens, *max_context),
            EngineError::Invalid { field, found, .. } => Refusal::new("INVALID_FIELD", Kind::BadField(field))
                .with("field", field)
                .with("found", found),
            EngineError::Dispatch(error) => Refusal::of_dispatch(error),
            // A gate that saw NaN, say: the numbers themselves are bad, and trying again gives the same ones.
            EngineError::Model(_) => Refusal::new("BAD_NUMBERS", Kind::Other(Code::DataLoss)),
            EngineError::Stopping => Refusal::new("STOPPING", Kind::TryAgain(Code::Unavailable, RETRY_ELSEWHERE)),
            _ => Refusal::new("INTERNAL", Kind::Other(Code::Internal)),
        }
    }

    fn of_dispatch(error: &'a DispatchError) -> Self {
        let elsewhere = |reason, worker: &str| {
            Refusal::new(reason, Kind::TryAgain(Code::Unavailable, RETRY_ELSEWHERE)).with("worker", worker)
        };
        match error {
            DispatchError::Local(ExpertError::Term { .. }) | DispatchError::TermOutOfRange { .. } => {
                Refusal::new("BAD_NUMBERS", Kind::Other(Code::DataLoss))
            }
            DispatchError::Local(_) | DispatchError::NotMoe { .. } => {
                Refusal::new("INTERNAL", Kind::Other(Code::Internal))
            }
            DispatchError::Malformed { worker, .. }
            | DispatchError::Invalid { worker, .. }
            | DispatchError::Internal { worker, .. } => {
                Refusal::new("WORKER_FAILED", Kind::Other(Code::Internal)).with("worker", worker)
            }
            DispatchError::Overloaded { worker, .. } => {
                let kind = Kind::TryAgain(Code::ResourceExhausted, RETRY_WHEN_FULL);
                Refusal::new("WORKER_OVERLOADED", kind).with("worker", worker)
            }
            // The deadline is ours, not the client's: to the client a worker that does not answer is not there.
            DispatchError::DeadlineExceeded { worker, layer, .. } => {
                elsewhere("WORKER_SILENT", worker).with("layer", layer)
            }
            DispatchError::WorkerGone { worker, .. } | DispatchError::WorkerDown { worker, .. } => {
                elsewhere("WORKER_GONE", worker)
            }
            DispatchError::ExpertUnavailable { layer, expert, .. } => {
                Refusal::new("EXPERT_UNAVAILABLE", Kind::TryAgain(Code::Unavailable, RETRY_ELSEWHERE))
                    .with("layer", layer)
                    .with("expert", expert)
            }
            DispatchError::Corrupted { worker, layer, .. } => elsewhere("CORRUPTED", worker).with("layer", layer),
            DispatchError::Draining { worker, .. } => elsewhere("WORKER_STOPPING", worker),
            DispatchError::NotHeld {
                worker, layer, expert, ..
            } => elsewhere("EXPERT_NOT_HELD", worker)
                .with("layer", layer)
                .with("expert", expert),
            _ => Refusal::new(
                "EXPERTS_UNAVAILABLE",
                Kind::TryAgain(Code::Unavailable, RETRY_ELSEWHERE),
            ),
        }
    }

    fn prompt_too_long(prompt_tokens: usize, max_context: usize) -> Self {
        Refusal::new("PROMPT_TOO_LONG", Kind::BadField("prompt"))
            .with("prompt_tokens", prompt_tokens)
            .with("max_context", max_context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_its_code_and_details() {
        let gone = DispatchError::WorkerGone {
            worker: "10.0.0.1:7".to_owned(),
            reason: "reset".to_owned(),
        };
        let cases: [(GatewayError, Code, &str, bool, Option<&str>); 8] = [
            (
                GatewayError::UnknownModel {
                    wanted: "a".into(),
                    served: "b".into(),
                },
                Code::NotFound,
                "MODEL_NOT_FOUND",
                false,
                None,
            ),
            (
                GatewayError::invalid("stop", "less", 3),
                Code::InvalidArgument,
                "INVALID_FIELD",
                false,
                Some("stop"),
            ),
            (
                GatewayError::PromptTooLong {
                    prompt_tokens: 9,
                    max_context: 8,
                },
                Code::InvalidArgument,
                "PROMPT_TOO_LONG",
                false,
                Some("prompt"),
            ),
            (
                GatewayError::NoChatTemplate { dir: "m".into() },
                Code::FailedPrecondition,
                "NO_CHAT_TEMPLATE",
                false,
                None,
            ),
            (
                EngineError::QueueFull { limit: 3 }.into(),
                Code::ResourceExhausted,
                "QUEUE_FULL",
                true,
                None,
            ),
            (EngineError::Stopping.into(), Code::Unavailable, "STOPPING", true, None),
            (
                EngineError::Dispatch(gone).into(),
                Code::Unavailable,
                "WORKER_GONE",
                true,
                None,
            ),
            (
                EngineError::Model("NaN".into()).into(),
                Code::DataLoss,
                "BAD_NUMBERS",
                false,
                None,
            ),
        ];
        for (error, code, reason, retry, field) in cases {
            let status = to_status(&error);
            let details = status.get_error_details();
            assert_eq!(status.code(), code, "{error}");
            assert_eq!(status.message(), error.to_string());
            let info = details.error_info().unwrap();
            assert_eq!(
                (info.reason.as_str(), info.domain.as_str()),
                (reason, "moerun"),
                "{error}"
            );
            assert_eq!(details.retry_info().is_some(), retry, "{error}");
            let violation = details.bad_request().map(|bad| bad.field_violations[0].field.as_str());
            assert_eq!(violation, field, "{error}");
        }
    }
}
