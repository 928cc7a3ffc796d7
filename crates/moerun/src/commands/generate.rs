//! `moerun generate`: continues a prompt, with a model loaded here or by a gateway that already runs.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures::{Stream, StreamExt};
use moerun_gateway::{ChatMessage, FinishReason, Prompt, SamplingOverrides, TextRequest};
use moerun_process::{Address, WARNINGS_AND_PROGRESS};
use moerun_proto::v1::{self, generate_request, inference_service_client::InferenceServiceClient};
use moerun_transport::{ClientProtection, Dial};
use serde_json::json;
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

use crate::{
    cli::GenerateArgs,
    settings::{RoleFlags, Settings},
    stack::{Experts, Serving},
};

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let role = RoleFlags {
        workers: args.workers,
        cluster: args.cluster.clone(),
        ..RoleFlags::default()
    };
    let mut settings = Settings::load(&args.serving, &role)?;
    super::start_logging(&mut settings, WARNINGS_AND_PROGRESS)?;
    let runtime = tokio::runtime::Runtime::new().context("async runtime")?;
    let loading = Instant::now();
    match &args.connect {
        Some(address) => runtime.block_on(async {
            let gateway = connect(address, &settings.client_protection()?).await?;
            let (connected, begun) = (loading.elapsed(), Instant::now());
            let pieces = ask_gateway(gateway, args).await?;
            print(args, connected, begun, pieces).await
        }),
        None => {
            let serving = Serving::start(&settings, Experts::start(&settings)?)?;
            let (loaded, begun) = (loading.elapsed(), Instant::now());
            runtime.block_on(async {
                let pieces = ask_here(&serving, args).await?;
                print(args, loaded, begun, pieces).await
            })
        }
    }
}

/// A step of the answer, from either source.
struct Piece {
    token_ids: Vec<u32>,
    text: String,
    /// Whether an expert was left out for the answer so far.
    degraded: bool,
    /// Set on the last piece: reason and tokens of the prompt.
    finish: Option<(&'static str, usize)>,
}

fn reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

async fn ask_here(serving: &Serving, args: &GenerateArgs) -> anyhow::Result<impl Stream<Item = anyhow::Result<Piece>>> {
    let prompt = match (&args.prompt_ids, &args.prompt) {
        (Some(ids), _) => Prompt::TokenIds(ids.clone()),
        (None, Some(text)) if args.chat => Prompt::Chat(vec![ChatMessage {
            role: "user".to_owned(),
            content: text.clone(),
        }]),
        (None, text) => Prompt::Text(text.clone().unwrap_or_default()),
    };
    let sampling = SamplingOverrides {
        temperature: args.sampling.temperature,
        top_k: args.sampling.top_k,
        top_p: args.sampling.top_p,
        min_p: args.sampling.min_p,
        repetition_penalty: args.sampling.repetition_penalty,
        seed: args.sampling.seed,
    };
    let request = TextRequest {
        max_tokens: args.max_tokens.map(|tokens| tokens as usize),
        sampling,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ..TextRequest::new(prompt)
    };
    let answer = serving.gateway.generate(request).await?;
    Ok(answer.map(|event| {
        let event = event?;
        Ok(Piece {
            token_ids: vec![event.token_id],
            text: event.text,
            degraded: event.degraded,
            finish: event
                .finish
                .map(|finish| (reason_name(finish.reason), finish.prompt_tokens)),
        })
    }))
}

/// A connection to a gateway, and how it was made: why it was refused is known there.
struct Connected {
    channel: Channel,
    dial: Dial,
}

async fn connect(address: &str, protection: &ClientProtection) -> anyhow::Result<Connected> {
    let wanted = || format!("--connect: wanted HOST:PORT, found {address:?}");
    let host = address.strip_prefix("http://").unwrap_or(address);
    if host.starts_with("https://") && protection.tls().is_none() {
        bail!("--connect {address}: wanted --tls-ca with it, the authorities that sign the gateway's certificate");
    }
    let host = Address::parse(host.strip_prefix("https://").unwrap_or(host))
        .ok()
        .with_context(wanted)?;
    let endpoint = Dial::endpoint(&host, protection).ok().with_context(wanted)?;
    let dial = Dial::new(host, protection.clone());
    let connecting = endpoint
        .connect_timeout(Duration::from_secs(5))
        .connect_with_connector(dial.clone())
        .await;
    match (connecting, dial.refusal()) {
        (Err(_), Some(refusal)) => bail!("--connect: the gateway at {address}: {refusal}"),
        (connecting, _) => Ok(Connected {
            channel: connecting.with_context(|| format!("--connect: no gateway answers at {address}"))?,
            dial,
        }),
    }
}

async fn ask_gateway(
    gateway: Connected,
    args: &GenerateArgs,
) -> anyhow::Result<impl Stream<Item = anyhow::Result<Piece>>> {
    if args.max_tokens == Some(0) {
        bail!("max_tokens: wanted at least 1, found 0"); // on the wire 0 means the model's default
    }
    let prompt = match (&args.prompt_ids, &args.prompt) {
        (Some(ids), _) => generate_request::Prompt::TokenIds(v1::TokenIds { ids: ids.clone() }),
        (None, Some(text)) if args.chat => generate_request::Prompt::Chat(v1::Chat {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                content: text.clone(),
            }],
        }),
        (None, text) => generate_request::Prompt::Text(text.clone().unwrap_or_default()),
    };
    let request = v1::GenerateRequest {
        prompt: Some(prompt),
        max_tokens: args.max_tokens.unwrap_or(0),
        sampling: Some(v1::SamplingParams {
            temperature: args.sampling.temperature,
            top_k: args.sampling.top_k,
            top_p: args.sampling.top_p,
            min_p: args.sampling.min_p,
            repetition_penalty: args.sampling.repetition_penalty,
            seed: args.sampling.seed,
        }),
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ..v1::GenerateRequest::default()
    };
    let Connected { channel, dial } = gateway;
    let refused = move |status: tonic::Status| match dial.refusal() {
        Some(refusal) => anyhow::anyhow!("the gateway: {refusal}"),
        None => anyhow::anyhow!("{} ({:?})", status.message(), status.code()),
    };
    let mut request = tonic::Request::new(request);
    if let Some(key) = &args.api_key {
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", key.trim())
            .parse()
            .map_err(|_| anyhow::anyhow!("--api-key: wanted a key in visible ASCII"))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
    let answer = InferenceServiceClient::new(channel)
        .generate(request)
        .await
        .map_err(&refused)?
        .into_inner();
    Ok(answer.map(move |response| {
        let response = response.map_err(&refused)?;
        let prompt_tokens = response.usage.map_or(0, |usage| usage.prompt_tokens as usize);
        let finish = match response.finish_reason() {
            v1::FinishReason::Stop => Some(("stop", prompt_tokens)),
            v1::FinishReason::Length => Some(("length", prompt_tokens)),
            v1::FinishReason::Unspecified => None,
        };
        Ok(Piece {
            token_ids: response.token_ids,
            text: response.text_delta,
            degraded: response.degraded,
            finish,
        })
    }))
}

/// Streams the text, or prints one JSON object at the end. The model or the connection took `loaded`; the request was
/// made at `begun`.
async fn print(
    args: &GenerateArgs,
    loaded: Duration,
    begun: Instant,
    pieces: impl Stream<Item = anyhow::Result<Piece>>,
) -> anyhow::Result<()> {
    tokio::pin!(pieces);
    let mut first_token = None;
    let (mut text, mut token_ids, mut finish, mut degraded) = (String::new(), Vec::new(), None, false);
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        first_token.get_or_insert_with(|| begun.elapsed());
        token_ids.extend(piece.token_ids);
        finish = piece.finish.or(finish);
        degraded |= piece.degraded;
        if args.json {
            text.push_str(&piece.text);
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(piece.text.as_bytes())?;
            stdout.flush()?;
        }
    }
    let (reason, prompt_tokens) = finish.context("the answer ended without a reason")?;
    let timings = Timings::new(
        loaded,
        first_token.unwrap_or_default(),
        begun.elapsed(),
        token_ids.len(),
    );
    if args.json {
        let answer = json!({
            "text": text,
            "token_ids": token_ids,
            "prompt_tokens": prompt_tokens,
            "finish_reason": reason,
            "degraded": degraded,
            "timings": {
                "load_seconds": timings.load.as_secs_f64(),
                "time_to_first_token_seconds": timings.first_token.as_secs_f64(),
                "total_seconds": timings.total.as_secs_f64(),
                "decode_tokens_per_second": timings.decode_rate,
            },
        });
        writeln!(io::stdout(), "{answer}")?;
    } else {
        writeln!(io::stdout())?;
        let told = writeln!(
            io::stderr(),
            "[{prompt_tokens} prompt tokens, {} generated ({reason}{}); {} in {:.2} s, first token after {:.3} s{}]",
            token_ids.len(),
            if degraded {
                ", degraded: an expert was left out"
            } else {
                ""
            },
            if args.connect.is_some() { "connected" } else { "loaded" },
            timings.load.as_secs_f64(),
            timings.first_token.as_secs_f64(),
            timings
                .decode_rate
                .map_or_else(String::new, |rate| format!(", then {rate:.1} tokens/s")),
        );
        drop(told); // the answer is out
    }
    Ok(())
}

/// How long an answer took.
struct Timings {
    /// Before the request: to load the model, or to connect to the gateway that has it.
    load: Duration,
    /// From the request to the first token.
    first_token: Duration,
    /// From the request to the last.
    total: Duration,
    /// Tokens per second after the first; `None` if there was only one.
    decode_rate: Option<f64>,
}

impl Timings {
    fn new(load: Duration, first_token: Duration, total: Duration, tokens: usize) -> Self {
        let decoding = total.saturating_sub(first_token).as_secs_f64();
        let decode_rate = (tokens > 1 && decoding > 0.0).then(|| (tokens - 1) as f64 / decoding);
        Timings {
            load,
            first_token,
            total,
            decode_rate,
        }
    }
}
