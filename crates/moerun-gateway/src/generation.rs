//! An answer under way: engine tokens in, text out.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::Stream;
use moerun_engine::{FinishReason, LogprobEntry, TokenEvent};
use tokio::sync::mpsc;

use crate::{
    Detokenizer, Finish, GatewayError, StopStrings, TextCodec, TextEvent, TokenLogprob,
    answer_counts::{AnswerCounts, AnswerEnd},
};

/// An answer under way: one event per token, the last with `finish` set; an error ends it too. Dropping it cancels the
/// request and frees what it holds in the engine.
#[derive(Debug)]
pub struct Generation {
    /// `None` once the answer has ended; dropping the receiver is what tells the engine.
    tokens: Option<mpsc::Receiver<TokenEvent>>,
    codec: TextCodec,
    detokenizer: Detokenizer,
    stop_strings: StopStrings,
    prompt_tokens: usize,
    completion_tokens: usize,
    cached_tokens: usize,
    degraded: bool,
    answers: Arc<AnswerCounts>,
}

impl Generation {
    pub(crate) fn new(
        tokens: mpsc::Receiver<TokenEvent>,
        codec: TextCodec,
        stop_strings: StopStrings,
        prompt_tokens: usize,
        answers: Arc<AnswerCounts>,
    ) -> Self {
        answers.begin(prompt_tokens);
        let detokenizer = codec.detokenizer();
        Generation {
            tokens: Some(tokens),
            codec,
            detokenizer,
            stop_strings,
            prompt_tokens,
            completion_tokens: 0,
            cached_tokens: 0,
            degraded: false,
            answers,
        }
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    fn token(
        &mut self,
        id: u32,
        logprobs: Option<Vec<LogprobEntry>>,
        engine_finish: Option<FinishReason>,
    ) -> TextEvent {
        self.completion_tokens += 1;
        self.answers.token();
        // A stop id ends the text and is no part of it, whether it is a special token or not.
        let mut piece = if engine_finish == Some(FinishReason::Stop) {
            String::new()
        } else {
            self.detokenizer.push(id)
        };
        if engine_finish.is_some() {
            piece.push_str(&self.detokenizer.finish());
        }
        let checked = self.stop_strings.push(&piece);
        let mut text = checked.text;
        let reason = if checked.stopped {
            Some(FinishReason::Stop)
        } else {
            engine_finish
        };
        if reason.is_some() && !checked.stopped {
            text.push_str(&self.stop_strings.finish());
        }
        let mut entries = logprobs.into_iter().flatten().map(|entry| TokenLogprob {
            id: entry.id,
            text: self.codec.token_text(entry.id),
            logprob: entry.logprob,
        });
        let (logprob, top_logprobs) = (entries.next(), entries.collect());
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens, self.completion_tokens);
        let finish = reason.map(|reason| Finish {
            reason,
            prompt_tokens,
            completion_tokens,
            cached_tokens: self.cached_tokens,
        });
        TextEvent {
            token_id: id,
            text,
            logprob,
            top_logprobs,
            degraded: self.degraded,
            finish,
        }
    }
}

impl Stream for Generation {
    type Item = Result<TextEvent, GatewayError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(tokens) = self.tokens.as_mut() else {
            return Poll::Ready(None);
        };
        let event = match ready!(tokens.poll_recv(context)) {
            Some(TokenEvent::Token {
                id,
                logprobs,
                cached_tokens,
                degraded,
                finish,
            }) => {
                self.cached_tokens = cached_tokens;
                if degraded && !std::mem::replace(&mut self.degraded, true) {
                    self.answers.degraded();
                }
                Ok(self.token(id, logprobs, finish))
            }
            Some(TokenEvent::Failed(error)) => Err(error.into()),
            None => Err(GatewayError::EngineGone),
        };
        if event.as_ref().map_or(true, |event| event.finish.is_some()) {
            self.tokens = None;
            self.answers.end(if event.is_ok() {
                AnswerEnd::Finished
            } else {
                AnswerEnd::Failed
            });
        }
        Poll::Ready(Some(event))
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.tokens.is_some() {
            self.answers.end(AnswerEnd::Cancelled);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use moerun_engine::EngineError;

    use super::*;
    use crate::test_checkpoints::tiny_bible;

    /// A token for which an expert was left out.
    const DEGRADED: u32 = 77;

    fn token(id: u32, finish: Option<FinishReason>) -> TokenEvent {
        TokenEvent::Token {
            id,
            logprobs: None,
            cached_tokens: 2,
            degraded: id == DEGRADED,
            finish,
        }
    }

    /// An answer whose engine says `events`; the sender is closed once the answer has ended.
    fn generation(stop: &[&str], events: Vec<TokenEvent>) -> (Generation, mpsc::Sender<TokenEvent>) {
        let (sender, receiver) = mpsc::channel(events.len().max(1));
        for event in events {
            sender.try_send(event).unwrap();
        }
        let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
        let codec = TextCodec::load(&tiny_bible()).unwrap();
        (
            Generation::new(receiver, codec, StopStrings::new(&stop).unwrap(), 3, Arc::default()),
            sender,
        )
    }

    fn text_ids(text: &str) -> Vec<u32> {
        TextCodec::load(&tiny_bible()).unwrap().encode(text).unwrap()
    }

    async fn answer(mut generation: Generation) -> (String, Vec<u32>, Finish) {
        let (mut text, mut ids) = (String::new(), Vec::new());
        while let Some(event) = generation.next().await {
            let event = event.unwrap();
            text.push_str(&event.text);
            ids.push(event.token_id);
            if let Some(finish) = event.finish {
                assert!(generation.next().await.is_none());
                return (text, ids, finish);
            }
        }
        panic!("the answer did not end");
    }

    #[tokio::test]
    async fn the_stop_id_is_reported_but_not_shown() {
        let ids = text_ids(" the LORD");
        let the = ids[0];
        for stop in [2, the] {
            let mut events: Vec<TokenEvent> = ids.iter().map(|&id| token(id, None)).collect();
            events.push(token(stop, Some(FinishReason::Stop)));
            let (generation, _sender) = generation(&[], events);
            let (text, seen, finish) = answer(generation).await;
            assert_eq!(text, " the LORD");
            assert_eq!(seen.last(), Some(&stop));
            assert_eq!(
                finish,
                Finish {
                    reason: FinishReason::Stop,
                    prompt_tokens: 3,
                    completion_tokens: seen.len(),
                    cached_tokens: 2,
                }
            );
        }
    }

    #[tokio::test]
    async fn a_stop_string_ends_the_answer_and_tells_the_engine() {
        let events: Vec<TokenEvent> = text_ids("And God said, Let there be light")
            .iter()
            .map(|&id| token(id, None))
            .collect();
        let (generation, sender) = generation(&["d said"], events);
        let (text, _, finish) = answer(generation).await;
        assert_eq!((text.as_str(), finish.reason), ("And Go", FinishReason::Stop));
        assert!(sender.is_closed());
    }

    #[tokio::test]
    async fn at_the_length_limit_everything_held_back_is_shown() {
        let ids = text_ids("said 日");
        let last = ids.len() - 2; // the character is cut
        let events = ids[..=last]
            .iter()
            .enumerate()
            .map(|(at, &id)| token(id, (at == last).then_some(FinishReason::Length)));
        let (generation, _sender) = generation(&["said \u{fffd}!"], events.collect());
        let (text, _, finish) = answer(generation).await;
        assert_eq!((text.as_str(), finish.reason), ("said \u{fffd}", FinishReason::Length));
    }

    #[tokio::test]
    async fn a_stop_string_in_the_last_token_wins_over_the_length() {
        let ids = text_ids("be light");
        let events = ids
            .iter()
            .enumerate()
            .map(|(at, &id)| token(id, (at + 1 == ids.len()).then_some(FinishReason::Length)));
        let (generation, _sender) = generation(&["ght"], events.collect());
        let (text, _, finish) = answer(generation).await;
        assert_eq!((text.as_str(), finish.reason), ("be li", FinishReason::Stop));
    }

    #[tokio::test]
    async fn failures_and_an_engine_that_is_gone_end_the_stream_with_an_error() {
        let (mut failed, _sender) = generation(&[], vec![token(15, None), TokenEvent::Failed(EngineError::Stopping)]);
        assert!(failed.next().await.unwrap().is_ok());
        assert!(matches!(
            failed.next().await,
            Some(Err(GatewayError::Engine(EngineError::Stopping)))
        ));
        assert!(failed.next().await.is_none());

        let (mut gone, sender) = generation(&[], vec![token(15, None)]);
        drop(sender);
        assert!(gone.next().await.unwrap().is_ok());
        assert!(matches!(gone.next().await, Some(Err(GatewayError::EngineGone))));
        assert!(gone.next().await.is_none());
    }

    #[tokio::test]
    async fn an_answer_that_is_marked_as_degraded_is_counted_once() {
        // The engine's mark stays; this asks no more of it than that it comes.
        let last = token(DEGRADED, Some(FinishReason::Length));
        let (mut marked, _sender) = generation(&[], vec![token(15, None), token(DEGRADED, None), last]);
        let mut marks = Vec::new();
        while let Some(event) = marked.next().await {
            marks.push(event.unwrap().degraded);
        }
        assert_eq!(marks, [false, true, true]);
        let now = marked.answers.now();
        assert_eq!((now.finished, now.degraded), (1, 1));
    }

    #[tokio::test]
    async fn logprobs_carry_the_text_of_their_tokens() {
        let the = text_ids(" the")[0];
        let logprobs = Some(vec![
            LogprobEntry { id: the, logprob: -0.5 },
            LogprobEntry { id: the, logprob: -0.5 },
            LogprobEntry { id: 2, logprob: -1.5 },
        ]);
        let event = TokenEvent::Token {
            id: the,
            logprobs,
            cached_tokens: 0,
            degraded: false,
            finish: Some(FinishReason::Length),
        };
        let event = generation(&[], vec![event]).0.next().await.unwrap().unwrap();
        let own = event.logprob.unwrap();
        assert_eq!((own.id, own.text.as_str(), own.logprob), (the, " the", -0.5));
        assert_eq!(event.top_logprobs.len(), 2);
        assert_eq!(event.top_logprobs[1].text, "<|im_end|>");
    }
}
