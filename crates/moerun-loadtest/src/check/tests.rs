//! Histories made by hand: a healthy one, and each with one thing wrong.

use super::*;
use crate::{
    Entry, Evidence, FaultRecord, LogLine, Outcome, Phase, Reference, RequestRecord, RunInfo, Sample, Terminal,
};

const SECOND: u64 = 1_000_000;
const ADDRESS: &str = "127.0.0.1:50061";

/// 200 requests over 20 s, one worker killed at 5 s and back at 6 s, nobody any the wiser.
pub(crate) fn healthy() -> History {
    let mut history = History {
        run: RunInfo {
            version: 1,
            seed: 7,
            deadline: 10 * SECOND,
            baseline: (0, 5 * SECOND),
            end: 20 * SECOND,
        },
        references: vec![Reference {
            case: 0,
            tokens: vec![4, 5, 5, 6],
        }],
        ..History::default()
    };
    for id in 0..200 {
        let intended = id * SECOND / 10;
        history.push(Entry::Request(RequestRecord {
            id,
            case: 0,
            intended,
            sent: intended + 100,
            tokens: (0..4u64)
                .map(|at| ([4, 5, 5, 6][at as usize], intended + 10_000 * (at + 1)))
                .collect(),
            terminals: vec![Terminal {
                at: intended + 40_000,
                outcome: Outcome::Finished("length".to_owned()),
            }],
            reported_tokens: Some(4),
            degraded_from: None,
            closed: intended + 41_000,
        }));
    }
    history.push(Entry::Fault(FaultRecord {
        id: 0,
        action: "kill".to_owned(),
        target: "worker-0".to_owned(),
        names: vec![ADDRESS.to_owned()],
        begin: 5 * SECOND,
        end: 6 * SECOND,
        evidence: vec![Evidence {
            counter: "requests_executed".to_owned(),
            before: 100,
            after: 180,
        }],
        must_show: true,
    }));
    history.push(Entry::Log(LogLine {
        at: 5 * SECOND + 30_000,
        process: "gateway".to_owned(),
        line: format!("WARN moerun_dispatch: worker is gone: reset worker={ADDRESS:?}"),
    }));
    for (at, phase) in [
        (0, Phase::Baseline),
        (5 * SECOND + 50_000, Phase::Load),
        (21 * SECOND, Phase::Final),
    ] {
        let figures = [
            ("running_requests", u64::from(phase == Phase::Load)),
            ("kv_pages_used", 3 * u64::from(phase == Phase::Load)),
            ("open_files", 20),
            ("async_tasks", 9),
            ("resident_bytes", 50 << 20),
            ("panics", 0),
        ];
        history.push(Entry::Sample(Sample {
            at,
            process: "gateway".to_owned(),
            pid: 10,
            phase,
            figures: figures.map(|(name, value)| (name.to_owned(), value)).into(),
            links: [(ADDRESS.to_owned(), phase != Phase::Load)].into(),
            troubles: [].into(),
        }));
    }
    history
}

/// The invariants that are violated, and all that is said of them.
fn violated(change: impl FnOnce(&mut History)) -> (Vec<&'static str>, String) {
    let mut history = healthy();
    change(&mut history);
    let verdicts = check(&history, &Limits::default());
    let broken = verdicts.iter().filter(|verdict| !verdict.holds());
    let names = broken.clone().map(|verdict| verdict.invariant).collect();
    (names, broken.map(|verdict| format!("{verdict}\n")).collect())
}

#[track_caller]
fn expect(wanted: &[&str], word: &str, change: impl FnOnce(&mut History)) {
    let (found, said) = violated(change);
    assert_eq!(found, wanted, "{said}");
    assert!(said.contains(word), "{word:?} is not in: {said}");
}

fn error(reason: &str) -> Outcome {
    Outcome::Error {
        code: "Unavailable".to_owned(),
        reason: reason.to_owned(),
        message: "the worker is gone".to_owned(),
    }
}

#[test]
fn a_healthy_history_satisfies_all() {
    expect(&[], "", |_| {});
    let counts: Vec<usize> = check(&healthy(), &Limits::default())
        .iter()
        .map(|it| it.checked)
        .collect();
    assert!(counts.iter().all(|&count| count > 0), "{counts:?}");
}

#[test]
fn another_token_is_found_wherever_it_is() {
    expect(&["I1"], "token 3: wanted 6, found 7", |history| {
        history.requests[9].tokens[3].0 = 7
    });
    // An error does not excuse what came before it.
    expect(&["I1"], "token 1: wanted 5, found 4", |history| {
        let request = &mut history.requests[9];
        request.tokens.truncate(2);
        request.tokens[1].0 = 4;
        request.terminals[0].outcome = error("WORKER_GONE");
        request.reported_tokens = None;
    });
    expect(&["I1"], "finished after 3 of 4", |history| {
        history.requests[9].tokens.pop();
        history.requests[9].reported_tokens = Some(3);
    });
    expect(&["I1"], "no reference", |history| history.requests[9].case = 1);
}

#[test]
fn another_token_is_allowed_only_behind_a_mark() {
    let change = |degraded_from| {
        move |history: &mut History| {
            let request = &mut history.requests[9];
            request.degraded_from = degraded_from;
            request.tokens[2].0 = 9;
        }
    };
    expect(&["I1"], "token 2: wanted 5, found 9", change(None));
    expect(&["I1"], "token 2: wanted 5, found 9", change(Some(3)));
    expect(&[], "", change(Some(2)));
    // A mark excuses another token, not a missing one.
    expect(&["I1"], "finished after 3 of 4", |history| {
        let request = &mut history.requests[9];
        request.degraded_from = Some(0);
        request.tokens.pop();
        request.reported_tokens = Some(3);
    });
}

#[test]
fn a_typed_error_is_no_violation_and_an_untyped_one_is() {
    let fail = |reason: &'static str| {
        move |history: &mut History| {
            let request = &mut history.requests[55];
            request.tokens.truncate(2);
            request.terminals[0].outcome = error(reason);
            request.reported_tokens = None;
        }
    };
    expect(&[], "", fail("WORKER_GONE"));
    expect(&["I1"], "an error without a reason", fail(""));
}

#[test]
fn a_request_ends_once_and_in_time() {
    expect(&["I2", "I6"], "nothing said that it had ended", |history| {
        // Enough of them that the share of answers falls too.
        for request in history.requests.iter_mut().skip(150) {
            request.terminals.clear();
        }
    });
    expect(&["I2"], "2 ends", |history| {
        let again = history.requests[9].terminals[0].clone();
        history.requests[9].terminals.push(again);
    });
    expect(&["I2"], "wanted 11000000 at most", |history| {
        history.requests[9].terminals[0].at += 11 * SECOND
    });
    expect(&["I2"], "after its end", |history| {
        history.requests[9].terminals[0].at -= 5_000
    });
}

#[test]
fn a_token_that_came_twice_is_found_even_where_the_text_repeats_itself() {
    expect(&["I1", "I2"], "came twice", |history| {
        let request = &mut history.requests[9];
        let again = request.tokens[0];
        request.tokens.insert(1, again);
        request.tokens.pop();
    });
    expect(&["I1", "I2"], "5 tokens came, 4 were sent", |history| {
        let again = history.requests[9].tokens[1];
        history.requests[9].tokens.insert(2, again);
    });
}

#[test]
fn what_is_not_given_back_is_named() {
    let last = |name: &'static str, value| {
        move |history: &mut History| {
            history.samples[2].figures.insert(name.to_owned(), value);
        }
    };
    expect(
        &["I3"],
        "kv_pages_used: wanted 0 after the load, found 1",
        last("kv_pages_used", 1),
    );
    expect(&["I3"], "running_requests", last("running_requests", 2));
    expect(
        &["I3"],
        "open_files: 20 before the load, 30 after",
        last("open_files", 30),
    );
    expect(&["I3"], "resident bytes", last("resident_bytes", 80 << 20));
    expect(&["I3"], "no figures after the load", |history| {
        history.samples.pop();
    });
    // A process that was started anew may have other files open, but nothing under way.
    expect(&[], "", |history| {
        history.samples[2].pid = 11;
        history.samples[2].figures.insert("open_files".to_owned(), 30);
    });
}

#[test]
fn a_panic_is_found_in_a_log_and_in_a_count() {
    expect(&["I4"], "panicked at src/lib.rs", |history| {
        history.push(Entry::Log(LogLine {
            at: 3,
            process: "worker-0".to_owned(),
            line: "thread 'moerun-compute' panicked at src/lib.rs:1:1:".to_owned(),
        }));
    });
    expect(&["I4"], "counts 1 panics", |history| {
        history.samples[1].figures.insert("panics".to_owned(), 1);
    });
}

#[test]
fn a_fault_that_does_not_show_is_named() {
    expect(&["I5"], "no log line names it", |history| history.logs.clear());
    expect(&["I5"], "no log line names it", |history| {
        history.logs[0].at += 6 * SECOND
    });
    expect(&["I5"], "no log line names it", |history| {
        history.logs[0].process = "worker-0".to_owned()
    });
    expect(&["I5"], "no log line names it", |history| {
        history.logs[0].line = format!("INFO moerun_dispatch: worker is connected worker={ADDRESS:?}");
    });
    expect(&["I5"], "no figure shows it", |history| {
        history.samples[1].links.insert(ADDRESS.to_owned(), true);
    });
    // A count of troubles shows it as well as a link that is down.
    expect(&[], "", |history| {
        history.samples[1].links.insert(ADDRESS.to_owned(), true);
        history.samples[1].troubles.insert(ADDRESS.to_owned(), 1);
    });
    // A process that was started anew has counted more before.
    expect(&[], "", |history| {
        history.samples[1].links.insert(ADDRESS.to_owned(), true);
        history.samples[1].troubles.insert(ADDRESS.to_owned(), 2);
        for (at, count) in [(SECOND, 5), (4 * SECOND, 1)] {
            let mut earlier = history.samples[1].clone();
            earlier.at = at;
            earlier.troubles.insert(ADDRESS.to_owned(), count);
            history.samples.push(earlier);
        }
    });
    expect(&[], "", |history| {
        history.faults[0].must_show = false;
        history.logs.clear();
    });
}

#[test]
fn what_does_not_heal_is_found_and_what_was_broken_meanwhile_is_not() {
    let fail = |requests: std::ops::Range<usize>| {
        move |history: &mut History| {
            for request in &mut history.requests[requests] {
                request.tokens.clear();
                request.reported_tokens = None;
                request.terminals[0].outcome = error("WORKER_GONE");
            }
        }
    };
    // Broken from 5 s to 6 s, healed 5 s later: requests 50 to 109.
    expect(&[], "", fail(50..110));
    expect(&["I6"], "% of the tokens asked for came", fail(50..115));
    expect(&["I6"], "% of the tokens asked for came", fail(190..200));
    expect(&["I6"], "fewer than 10 requests", |history| {
        history.requests.truncate(110)
    });
}

#[test]
fn what_the_next_fault_meets_on_its_way_is_not_held_against_the_one_before() {
    let next = |begin: u64| {
        move |history: &mut History| {
            let mut fault = history.faults[0].clone();
            (fault.begin, fault.end, fault.must_show) = (begin, begin, false);
            history.push(Entry::Fault(fault));
            // Sent at 11.9 s, closed at 11.941 s.
            history.requests[119].tokens.clear();
            history.requests[119].reported_tokens = None;
            history.requests[119].terminals[0].outcome = error("WORKER_GONE");
        }
    };
    expect(&[], "", next(12 * SECOND - 70_000));
    expect(&["I6"], "% of the tokens asked for came", next(12 * SECOND));
}

#[test]
fn a_fault_without_proof_that_it_met_traffic_does_not_count() {
    expect(&["hit"], "none of 1 faults met live traffic", |history| {
        history.faults[0].evidence[0].after = 100;
        history.logs.clear();
    });
}
