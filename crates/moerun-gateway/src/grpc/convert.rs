//! Messages of `proto/moerun/v1` to our types and back.

use bytes::Bytes;
use moerun_proto::v1;
use ndarray::Array2;

use crate::{
    ChatMessage, FinishReason, GatewayError, Prompt, SamplingOverrides, ServedModel, TextEvent, TextRequest,
    TokenLogprob,
};

pub(super) fn text_request(message: v1::GenerateRequest) -> Result<TextRequest, GatewayError> {
    let prompt = match message.prompt {
        Some(v1::generate_request::Prompt::Text(text)) => Prompt::Text(text),
        Some(v1::generate_request::Prompt::TokenIds(token_ids)) => Prompt::TokenIds(token_ids.ids),
        Some(v1::generate_request::Prompt::Chat(chat)) => Prompt::Chat(chat_messages(chat)),
        None => {
            return Err(GatewayError::invalid(
                "prompt",
                "text, token_ids or chat",
                "none of them",
            ));
        }
    };
    let sampling = message.sampling.unwrap_or_default();
    Ok(TextRequest {
        prompt,
        max_tokens: (message.max_tokens > 0).then_some(message.max_tokens as usize),
        sampling: SamplingOverrides {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            seed: sampling.seed,
        },
        stop: message.stop,
        stop_token_ids: message.stop_token_ids,
        ignore_eos: message.ignore_eos,
        logprobs: message.logprobs.map(|count| count as usize),
    })
}

pub(super) fn tokenize_input(message: v1::TokenizeRequest) -> Result<Prompt, GatewayError> {
    match message.input {
        Some(v1::tokenize_request::Input::Text(text)) => Ok(Prompt::Text(text)),
        Some(v1::tokenize_request::Input::Chat(chat)) => Ok(Prompt::Chat(chat_messages(chat))),
        None => Err(GatewayError::invalid("input", "text or chat", "neither")),
    }
}

fn chat_messages(chat: v1::Chat) -> Vec<ChatMessage> {
    chat.messages
        .into_iter()
        .map(|message| ChatMessage {
            role: message.role,
            content: message.content,
        })
        .collect()
}

/// `combine_mode` is empty but in the first message of an answer.
pub(super) fn generate_response(event: TextEvent, combine_mode: String) -> v1::GenerateResponse {
    let finish_reason = match event.finish.map(|finish| finish.reason) {
        None => v1::FinishReason::Unspecified,
        Some(FinishReason::Stop) => v1::FinishReason::Stop,
        Some(FinishReason::Length) => v1::FinishReason::Length,
    };
    v1::GenerateResponse {
        token_ids: vec![event.token_id],
        text_delta: event.text,
        logprobs: event.logprob.into_iter().map(token_logprob).collect(),
        top_logprobs: event.top_logprobs.into_iter().map(token_logprob).collect(),
        finish_reason: finish_reason.into(),
        usage: event.finish.map(|finish| v1::Usage {
            prompt_tokens: count(finish.prompt_tokens),
            completion_tokens: count(finish.completion_tokens),
            cached_tokens: count(finish.cached_tokens),
        }),
        combine_mode,
        degraded: event.degraded,
    }
}

fn token_logprob(entry: TokenLogprob) -> v1::TokenLogprob {
    v1::TokenLogprob {
        token_id: entry.id,
        text: entry.text,
        logprob: entry.logprob,
    }
}

pub(super) fn model(served: &ServedModel) -> v1::Model {
    let config = &served.config;
    v1::Model {
        name: served.name.clone(),
        family: config.family.model_type().to_owned(),
        max_context: count(served.max_context),
        vocab_size: count(config.vocab_size),
        hidden: count(config.hidden),
        num_layers: count(config.layers.len()),
        moe_layers: config.moe_layers().iter().map(|layer| layer.0).collect(),
        num_experts: count(config.moe.as_ref().map_or(0, |moe| moe.num_experts)),
        top_k: count(config.moe.as_ref().map_or(0, |moe| moe.top_k)),
        numerics_id: served.numerics.id(),
        config_hash: served.config_hash.clone(),
    }
}

/// Rows of a `RunLayerRequest`: exactly `rows * hidden` little-endian f32.
pub(super) fn layer_rows(rows: u32, hidden: usize, bytes: &[u8]) -> Result<Array2<f32>, GatewayError> {
    let rows = rows as usize;
    // Both factors come from a u32 and a checked config, so the product fits 64 bits.
    let wanted_bytes = rows as u64 * hidden as u64 * 4;
    if rows == 0 || bytes.len() as u64 != wanted_bytes {
        let wanted = format!("{wanted_bytes} bytes: f32 [{rows}, {hidden}], at least one row");
        return Err(GatewayError::invalid(
            "hidden_states",
            wanted,
            format!("{} bytes", bytes.len()),
        ));
    }
    let values = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|value| f32::from_le_bytes(*value))
        .collect();
    Ok(Array2::from_shape_vec((rows, hidden), values).expect("the length was compared with the shape"))
}

/// Little-endian f32.
pub(super) fn row_bytes<'a>(values: impl IntoIterator<Item = &'a f32>) -> Bytes {
    values.into_iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Counts on the wire have 32 bits; nothing that is counted here comes near.
pub(super) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
