//! I2: one end for each request, in time, and no token twice.

use super::Verdict;
use crate::{History, Micros, Outcome, RequestRecord};

pub(super) fn check(history: &History, grace: Micros) -> Verdict {
    let mut verdict = Verdict::new("I2", "one end for each request, in time, and no token twice");
    let allowed = history.run.deadline.saturating_add(grace);
    for request in &history.requests {
        verdict.checked += 1;
        let id = request.id;
        match request.terminals.as_slice() {
            [] => verdict.violated(|| {
                let took = request.closed.saturating_sub(request.sent);
                format!("request {id}: nothing said that it had ended, in {took} µs")
            }),
            [terminal] => {
                let took = terminal.at.saturating_sub(request.sent);
                if took > allowed {
                    verdict.violated(|| format!("request {id}: ended after {took} µs, wanted {allowed} at most"));
                }
            }
            several => verdict.violated(|| format!("request {id}: {} ends: {several:?}", several.len())),
        }
        if let Some(first) = request.terminals.first()
            && let Some((token, at)) = request.tokens.iter().find(|&&(_, at)| at > first.at)
        {
            verdict.violated(|| {
                format!(
                    "request {id}: token {token} at {at} µs, after its end at {} µs",
                    first.at
                )
            });
        }
        if let Some(twice) = token_twice(history, request) {
            verdict.violated(|| format!("request {id}: {twice}"));
        }
    }
    verdict
}

/// A token that came again: the answer then has more tokens than the server counted, or goes on as its reference does
/// once the repetition is left out.
fn token_twice(history: &History, request: &RequestRecord) -> Option<String> {
    let finished = matches!(request.terminals.first()?.outcome, Outcome::Finished(_));
    let found = request.tokens.len() as u64;
    if let Some(reported) = request
        .reported_tokens
        .filter(|&reported| finished && reported != found)
    {
        return Some(format!("{found} tokens came, {reported} were sent"));
    }
    if request.degraded_from.is_some() {
        return None; // its tokens need not be the reference's
    }
    let wanted = &history.references.iter().find(|it| it.case == request.case)?.tokens;
    let found: Vec<u32> = request.tokens.iter().map(|&(id, _)| id).collect();
    let at = (0..found.len()).find(|&at| wanted.get(at) != Some(&found[at]))?;
    let rest = &found[at + 1..];
    let repeats = at > 0 && found[at] == found[at - 1];
    let goes_on = wanted.get(at..at + rest.len()) == Some(rest) && !rest.is_empty();
    (repeats && goes_on).then(|| format!("token {at}, {}, came twice", found[at]))
}
