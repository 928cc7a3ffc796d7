//! The balance that is promised for 64 experts on 8 workers.

use super::cases::{request, zipf};
use crate::planner::{eplb_global, plan};

#[test]
fn with_nine_slots_a_worker_nearly_nothing_is_lost_to_imbalance() {
    for seed in 0..20 {
        let loads = zipf(64, 0.8, seed);
        let mut request = request(std::slice::from_ref(&loads), 8, 9, 1);
        request.extra_holders = 8;
        let plan = plan(&request).expect("it fits");
        let baseline = eplb_global(&loads, 72, 8).balance(&loads, 8, None).0;
        let balance = plan.prediction.balance;
        println!("seed {seed}: {balance:.4}, EPLB {baseline:.4}");
        assert!(
            balance >= 0.98 && balance > baseline,
            "seed {seed}: {balance}, EPLB {baseline}"
        );
        for held in &plan.held {
            assert_eq!(held.len(), 9);
        }
    }
}

#[test]
fn with_two_holders_each_every_death_leaves_the_others_balanced() {
    for seed in 0..20 {
        let loads = zipf(64, 0.8, seed);
        let mut request = request(&[loads], 8, 16, 1);
        request.replicas = 2;
        let plan = plan(&request).expect("it fits");
        let death = plan.prediction.after_worst_death.expect("eight workers");
        println!(
            "seed {seed}: {:.4}, after the worst death {death:?}",
            plan.prediction.balance
        );
        assert!(death.balance >= 0.94 && death.lost == 0.0, "seed {seed}: {death:?}");
        assert!(plan.prediction.balance >= 0.999, "seed {seed}");
    }
}
