//! I1: the tokens of the undisturbed run, or a typed error; never another token, but where the answer says from then on
//! that an expert was left out.

use std::collections::HashMap;

use super::Verdict;
use crate::{History, Outcome, RequestRecord};

pub(super) fn check(history: &History) -> Verdict {
    let mut verdict = Verdict::new(
        "I1",
        "the tokens of the undisturbed run, a mark before others, or a typed error",
    );
    let references: HashMap<usize, &[u32]> = history
        .references
        .iter()
        .map(|reference| (reference.case, reference.tokens.as_slice()))
        .collect();
    for request in &history.requests {
        verdict.checked += 1;
        let Some(&wanted) = references.get(&request.case) else {
            verdict.violated(|| format!("request {}: case {} has no reference", request.id, request.case));
            continue;
        };
        if let Some(wrong) = wrong_tokens(request, wanted) {
            verdict.violated(|| format!("request {} of case {}: {wrong}", request.id, request.case));
        }
        for terminal in &request.terminals {
            if let Outcome::Error { code, reason, message } = &terminal.outcome
                && reason.is_empty()
            {
                verdict.violated(|| format!("request {}: an error without a reason: {code}: {message}", request.id));
            }
        }
    }
    verdict
}

/// An answer that did not finish is a beginning of the reference, one that did is all of it.
fn wrong_tokens(request: &RequestRecord, wanted: &[u32]) -> Option<String> {
    let exact = request.degraded_from.unwrap_or(usize::MAX);
    let found: Vec<u32> = request.tokens.iter().take(exact).map(|&(id, _)| id).collect();
    if let Some(at) = (0..found.len()).find(|&at| wanted.get(at) != Some(&found[at])) {
        let wanted = wanted.get(at).map_or("the end".to_owned(), ToString::to_string);
        return Some(format!("token {at}: wanted {wanted}, found {}", found[at]));
    }
    let finished = |terminal: &crate::Terminal| matches!(terminal.outcome, Outcome::Finished(_));
    if request.terminals.iter().any(finished) && request.tokens.len() < wanted.len() {
        let found = request.tokens.len();
        return Some(format!("finished after {found} of {} tokens", wanted.len()));
    }
    None
}
