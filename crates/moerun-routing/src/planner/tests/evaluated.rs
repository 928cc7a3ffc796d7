//! What is there is judged as what is planned.

use moerun_types::ExpertSlice;

use super::cases::{request, zipf};
use crate::planner::{Layout, evaluate, plan};

#[test]
fn a_plan_that_was_carried_out_promises_what_it_promised() {
    for (seed, layout) in [Layout::Whole, Layout::Slices(3), Layout::Mix { busiest: 2, slices: 2 }]
        .into_iter()
        .enumerate()
    {
        let layers = [zipf(12, 0.8, seed as u64), zipf(12, 0.8, 7 + seed as u64)];
        let mut request = request(&layers, 4, 8, 6);
        (request.layout, request.replicas) = (Some(layout), 2);
        let planned = plan(&request).unwrap();
        let found = evaluate(&request, &planned.held).unwrap().unwrap();
        let (wanted, found) = (&planned.prediction, &found);
        assert!(
            (wanted.balance - found.balance).abs() < 1e-6,
            "{layout}: {wanted:?} {found:?}"
        );
        assert!(
            (wanted.cost.seconds - found.cost.seconds).abs() < 0.05 * wanted.cost.seconds,
            "{layout}"
        );
    }
}

#[test]
fn a_newcomer_that_holds_nothing_makes_what_is_there_uneven() {
    let request = request(&[zipf(8, 0.0, 1)], 3, 8, 2);
    let half = |worker: usize| -> Vec<ExpertSlice> {
        let two = request_of_two();
        plan(&two).unwrap().held[worker].clone()
    };
    let held = [half(0), half(1), Vec::new()];
    let found = evaluate(&request, &held).unwrap().unwrap();
    assert!((found.balance - 2.0 / 3.0).abs() < 1e-6, "{found:?}");
    let missing = [half(0), Vec::new(), Vec::new()];
    assert_eq!(evaluate(&request, &missing).unwrap(), None);
}

fn request_of_two() -> crate::planner::PlanRequest {
    request(&[zipf(8, 0.0, 1)], 2, 4, 2)
}
