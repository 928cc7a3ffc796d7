use std::path::Path;

use moerun_kernels::{Activations, CpuPool};
use moerun_model::ExpertError;
use moerun_routing::{Assignment, ShardSpec};
use moerun_types::{BlockRange, CombineMode, NumberFormat};

use super::*;
use crate::identify;

const NUMERICS: Numerics = Numerics {
    format: NumberFormat::F32,
    combine: CombineMode::Exact,
    combine_block: 8,
};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/qwen3_moe")
}

fn named(text: &str) -> Vec<HeldExpert> {
    let checkpoint = Checkpoint::open(&model(), Needs::ExpertsOnly).unwrap();
    let slices = ShardSpec::parse_experts(text)
        .unwrap()
        .resolve(checkpoint.config(), &NUMERICS)
        .unwrap();
    identify(&checkpoint, &slices, NUMERICS, &mut |_, _| {}).unwrap().held
}

fn slices(text: &str) -> Vec<ExpertSlice> {
    named(text).into_iter().map(|held| held.slice).collect()
}

/// Holds `text`, and at most `max_expert_bytes`.
fn holdings(text: &str, max_expert_bytes: Option<u64>) -> Holdings {
    let checkpoint = Checkpoint::open(&model(), Needs::ExpertsOnly).unwrap();
    let slices = ShardSpec::parse_experts(text)
        .unwrap()
        .resolve(checkpoint.config(), &NUMERICS)
        .unwrap();
    let identity = identify(&checkpoint, &slices, NUMERICS, &mut |_, _| {}).unwrap();
    let bank = ExpertBank::load(&checkpoint, &slices, NUMERICS, &mut |_, _| {}).unwrap();
    let source = ExpertSource {
        model_dir: model(),
        load: Load::default(),
        max_expert_bytes,
        dial: ClientProtection::default(),
    };
    Holdings::new(identity, Some(bank), Some(source))
}

impl Holdings {
    /// From the checkpoint alone.
    fn gain(&self, wanted: &[HeldExpert]) -> Result<Arc<Held>, HoldingError> {
        match self.prepare(wanted)? {
            Some(change) => self.load(&change, &Received::new()),
            None => Ok(self.now()),
        }
    }
}

/// What expert `expert` of layer 0 gives for a row of halves.
fn run(bank: &ExpertBank, expert: u16) -> Result<moerun_routing::PartialSums, ExpertError> {
    let cols = bank.config().hidden;
    let row = Activations::F32 {
        rows: 1,
        cols,
        data: vec![0.5; cols],
    };
    let end = NUMERICS.num_blocks(bank.config().moe.as_ref().unwrap().intermediate) as u16;
    let work = Assignment {
        row: 0,
        expert: ExpertId(expert),
        blocks: BlockRange { first: 0, end },
        weight: 1.0,
    };
    bank.execute(&CpuPool::new(1), LayerId(0), &row, &[work])
}

#[test]
fn a_worker_gains_and_loses_experts_and_what_runs_keeps_what_it_began_with() {
    let holdings = holdings("0:0-1", None);
    let before = holdings.now();
    let bank = before.bank.clone().unwrap();
    let wanted = run(&bank, 1).unwrap();
    assert!(matches!(run(&bank, 5), Err(ExpertError::NotHeld { .. })));

    let after = holdings.gain(&named("0:1-5,1:2:0-1")).unwrap();
    assert_eq!((before.epoch, after.epoch), (0, 1));
    assert_eq!(after.identity.held, named("0:0-5,1:2:0-1"));
    let all = self::holdings("*:*", None).now();
    let (now, whole) = (after.bank.as_ref().unwrap(), all.bank.as_ref().unwrap());
    assert_eq!(run(now, 5).unwrap(), run(whole, 5).unwrap());
    assert_eq!(holdings.gain(&named("0:3")).unwrap().epoch, 1, "it is held already");

    // The rest of an expert is joined to what is held of it.
    let joined = holdings.gain(&named("1:2:2-2")).unwrap();
    assert_eq!(joined.identity.held, named("0:0-5,1:2"));
    let less = holdings.unload(&slices("0:1,1:2:0-0,1:7")).unwrap();
    assert_eq!(less.identity.held, named("0:0,0:2-5,1:2:1-2"));
    assert_eq!(less.epoch, 3);
    assert_eq!(holdings.unload(&slices("1:7")).unwrap().epoch, 3, "it was not held");
    assert!(matches!(
        run(less.bank.as_ref().unwrap(), 1),
        Err(ExpertError::NotHeld { .. })
    ));
    assert_eq!(run(&bank, 1).unwrap(), wanted, "whoever began before goes on");
    assert_eq!(holdings.describe(&less).held, less.identity.held);
}

#[test]
fn other_contents_are_refused_and_nothing_changes() {
    let holdings = holdings("0:0", None);
    let mut other = named("0:1-2");
    other[1].block_hashes[1][0] ^= 1;
    let error = holdings.gain(&other).unwrap_err();
    assert!(
        matches!(
            &error,
            HoldingError::Content {
                expert: ExpertId(2),
                block: 1,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(error.to_status().code(), tonic::Code::DataLoss);
    // What is held already must be the same too.
    let mut held = named("0:0");
    held[0].block_hashes[0][0] ^= 1;
    assert!(matches!(holdings.gain(&held), Err(HoldingError::Content { .. })));
    assert_eq!(
        (holdings.now().epoch, &holdings.now().identity.held),
        (0, &named("0:0"))
    );
}

#[test]
fn what_does_not_fit_is_refused_with_the_arithmetic() {
    let expert_bytes = holdings("0:0", None).describe(&holdings("0:0", None).now()).held_bytes;
    let holdings = holdings("0:0", Some(3 * expert_bytes));
    assert_eq!(holdings.describe(&holdings.now()).free_bytes, Some(2 * expert_bytes));
    let error = holdings.gain(&named("0:1-3")).unwrap_err();
    let wanted = format!(
        "3 expert slices in f32 take {} bytes more than the {expert_bytes} held, but only {} bytes are left of {} allowed",
        3 * expert_bytes,
        2 * expert_bytes,
        3 * expert_bytes
    );
    assert_eq!(error.to_string(), wanted);
    assert_eq!(error.to_status().code(), tonic::Code::ResourceExhausted);
    holdings.gain(&named("0:1-2")).unwrap();
    holdings.unload(&slices("0:0")).unwrap();
    holdings.gain(&named("0:3")).unwrap();
}

#[test]
fn experts_that_were_handed_over_stay_as_they_are() {
    let mut holdings = holdings("0:0", None);
    holdings.source = None;
    assert!(matches!(holdings.gain(&named("0:1")), Err(HoldingError::NoSource)));
    assert_eq!(holdings.describe(&holdings.now()).free_bytes, None);
}
