//! Plans as files: what is written is read, and what is not of this model is refused.

use moerun_types::{CombineMode, ModelConfig, NumberFormat, Numerics};

use super::cases::{request, zipf};
use crate::{
    planner::{ExpertLoads, Layout, PlanFile, PlanIdentity, PlanRequest, PlannerError, plan},
    testing::model,
};

const NUMERICS: Numerics = Numerics {
    format: NumberFormat::F32,
    combine: CombineMode::Exact,
    combine_block: 8,
};

fn identity() -> PlanIdentity {
    PlanIdentity {
        config_hash: "a hash".to_owned(),
        numerics: NUMERICS.id(),
    }
}

/// Layers 1 and 3 of 4 have 6 experts of 3 blocks.
fn config() -> ModelConfig {
    model(&[false, true, false, true], 6, 24)
}

fn a_request(layout: Layout, workers: usize) -> PlanRequest {
    let loads = [zipf(6, 0.8, 1), zipf(6, 0.8, 2)];
    let mut request = request(&loads, workers, 12, 3);
    request.moe_layers = config().moe_layers();
    request.loads = ExpertLoads::from_layers(request.moe_layers.iter().copied().zip(loads));
    request.layout = Some(layout);
    request.workers[0].domain = Some("rack".to_owned());
    request
}

#[test]
fn every_plan_is_read_back_as_what_the_workers_hold() {
    for layout in [
        Layout::Whole,
        Layout::Slices(2),
        Layout::Slices(3),
        Layout::Mix { busiest: 2, slices: 3 },
    ] {
        for workers in 1..5 {
            for replicas in 1..=workers.min(2) {
                let mut request = a_request(layout, workers);
                request.replicas = replicas;
                let plan = plan(&request).expect("it fits");
                let file = PlanFile::new(7, identity(), &request, &plan);
                let read = PlanFile::from_json(&file.to_json()).expect("as it was written");
                assert_eq!(read, file);
                let held = read.resolve(&identity(), &config(), &NUMERICS).expect("all is there");
                let held: Vec<_> = held.into_iter().map(|(_, held)| held).collect();
                assert_eq!(held, plan.held, "{layout}, {workers} workers: {}", file.to_json());
            }
        }
    }
}

#[test]
fn lists_are_short_where_layers_and_experts_are_alike() {
    let mut request = a_request(Layout::Whole, 1);
    request.replicas = 1;
    let plan = plan(&request).expect("it fits");
    assert_eq!(PlanFile::new(1, identity(), &request, &plan).workers[0].experts, "*:*");
}

#[test]
fn what_is_no_plan_of_this_model_is_refused_by_name() {
    let request = a_request(Layout::Whole, 2);
    let plan = plan(&request).expect("it fits");
    let file = PlanFile::new(1, identity(), &request, &plan);
    let text = file.to_json();
    for (text, words) in [
        ("[]".to_owned(), "wanted an object with a version"),
        ("{".to_owned(), "EOF"),
        (
            text.replace("\"version\": 1", "\"version\": 9"),
            "version: wanted 1, found 9",
        ),
        (text.replace("\"epoch\"", "\"epoc\""), "unknown field `epoc`"),
        (text.replace("\"w1\"", "\"w0\""), "\"w0\" is named twice"),
    ] {
        let error = PlanFile::from_json(&text).expect_err(&text).to_string();
        assert!(error.contains(words), "{error}");
    }
    let other = |change: &dyn Fn(&mut PlanFile)| {
        let mut file = file.clone();
        change(&mut file);
        file.resolve(&identity(), &config(), &NUMERICS)
            .expect_err("refused")
            .to_string()
    };
    for (error, words) in [
        (
            other(&|file| file.model.config_hash = "other".to_owned()),
            "config hash: wanted a hash, found other",
        ),
        (
            other(&|file| file.model.numerics = "other".to_owned()),
            "numerics: wanted fma1-f32-exact-8, found other",
        ),
        (
            other(&|file| file.workers[0].experts = "9:*".to_owned()),
            "worker \"w0\": shard item \"9:*\"",
        ),
        (other(&|file| file.workers[0].experts = "1".to_owned()), "wanted items"),
        (
            other(&|file| {
                file.workers
                    .iter_mut()
                    .for_each(|worker| worker.experts = "1:*,3:0-4,3:5:0-1".to_owned())
            }),
            "no worker holds layer 3 expert 5 blocks 2..3",
        ),
        (
            other(&|file| file.workers.iter_mut().for_each(|worker| worker.experts.clear())),
            "layer 1 expert 0 blocks 0..3",
        ),
    ] {
        assert!(error.contains(words), "{error}");
    }
    let mut gone = file;
    gone.workers.clear();
    assert!(matches!(
        gone.resolve(&identity(), &config(), &NUMERICS),
        Err(PlannerError::PlanUncovered { .. })
    ));
}
