//! Who is a member, who is asked, and who is not believed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use moerun_dispatch::{DispatchError, LocalConfig, OnExpertLoss, RemoteConfig, RemoteExperts};
use moerun_kernels::CpuPool;
use moerun_proto::v1;
use moerun_routing::ShardSpec;
use moerun_types::NumberFormat;
use moerun_weights::Needs;

use crate::{
    cluster::{config, golden, local, numerics, open, request, run, start, start_all, wait_for},
    puppet::{Act, Puppet},
};

const FAMILY: &str = "qwen3_moe";

fn flip_a_sum(answer: &mut v1::ExecuteResponse) {
    let mut sums = answer.partial_sums.to_vec();
    sums[0] ^= 1;
    answer.partial_sums = sums.into();
}

#[test]
fn a_worker_that_is_not_needed_may_come_later_and_is_then_asked() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let mut workers = start_all(&checkpoint, &[ShardSpec::All, ShardSpec::All], numerics);
    let config = config(&workers);
    let late = workers.pop().unwrap();
    let address = late.address().to_string();
    drop(late);
    let remote = RemoteExperts::connect(config, checkpoint.clone(), numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 6, 1);
    let wanted = run(&local(&checkpoint, numerics), &request).unwrap();
    assert!(run(&remote, &request).unwrap() == wanted);
    let before = remote.stats();
    assert!(before.workers[1].down.is_some() && before.workers[1].calls == 0);

    let _late = start(&checkpoint, &ShardSpec::All, numerics, &address);
    assert!(wait_for(|| remote.workers()[1].down.is_none()), "{:?}", remote.stats());
    for _ in 0..20 {
        assert!(run(&remote, &request).unwrap() == wanted);
    }
    let after = remote.stats();
    assert!(after.plan_epoch > before.plan_epoch, "{after:?}");
    assert!(after.workers[1].calls > 0, "{after:?}");
}

#[test]
fn workers_are_replaced_while_dispatches_go_on() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let workers = start_all(&checkpoint, &[ShardSpec::All, ShardSpec::All], numerics);
    let addresses: Vec<String> = workers.iter().map(|worker| worker.address().to_string()).collect();
    let remote = RemoteExperts::connect(config(&workers[..1]), checkpoint.clone(), numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 6, 1);
    let wanted = run(&local(&checkpoint, numerics), &request).unwrap();

    let under_way = moerun_dispatch::ExpertBackend::submit(&remote, request.clone()).unwrap();
    let epoch = remote.stats().plan_epoch;
    assert!(remote.set_workers(&addresses).unwrap() > epoch);
    let found = under_way.wait().unwrap().hidden_states;
    assert!(found.iter().map(|value| value.to_bits()).eq(wanted.iter().copied()));
    assert!(wait_for(
        || remote.workers().len() == 2 && remote.workers()[1].down.is_none()
    ));

    remote.set_workers(&addresses[1..]).unwrap();
    for _ in 0..5 {
        assert!(run(&remote, &request).unwrap() == wanted);
    }
    let stats = remote.stats();
    assert_eq!(stats.workers.len(), 1);
    assert_eq!(stats.workers[0].address, addresses[1]);
    assert!(stats.workers[0].calls >= 5, "{stats:?}");
    let twice = [addresses[1].clone(), addresses[1].clone()];
    assert!(matches!(remote.set_workers(&twice), Err(DispatchError::Address { .. })));
}

#[test]
fn a_gateway_that_can_compute_does_not_wait_for_ever_for_a_missing_worker() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let half = [
        ShardSpec::Experts { index: 0, count: 2 },
        ShardSpec::Experts { index: 1, count: 2 },
    ];
    let mut workers = start_all(&checkpoint, &half, numerics);
    let mut config = config(&workers);
    drop(workers.pop());
    config.startup_timeout = Duration::from_millis(400);
    config.on_expert_loss = OnExpertLoss::Local;
    config.local = Some(LocalConfig {
        pool: Arc::new(CpuPool::new(1)),
        max_bytes: 0,
    });
    let remote = RemoteExperts::connect(config, checkpoint.clone(), numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 5, 2);
    assert!(run(&remote, &request).unwrap() == run(&local(&checkpoint, numerics), &request).unwrap());
    assert!(remote.stats().local_assignments > 0);
}

#[test]
fn a_peer_of_the_minor_before_is_served_without_checksums() {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let sealed = Arc::new(AtomicBool::new(false));
    let saw = Arc::clone(&sealed);
    let old = Puppet::start_as(
        &golden(FAMILY),
        numerics,
        &ShardSpec::All,
        |identity| identity.protocol_version = 1001,
        move |request| {
            saw.fetch_or(request.checksum.is_some(), SeqCst);
            Act::Right
        },
    );
    let config = RemoteConfig::new(vec![old.address.to_string()]);
    let remote = RemoteExperts::connect(config, checkpoint.clone(), numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 5, 2);
    assert!(run(&remote, &request).unwrap() == run(&local(&checkpoint, numerics), &request).unwrap());
    assert!(old.requests() > 0 && !sealed.load(SeqCst));
}

/// A puppet that begins to answer wrongly when told to, beside `honest` real workers.
fn beside(
    honest: usize,
    dir: &std::path::Path,
) -> (RemoteExperts, Vec<moerun_worker::Worker>, Arc<AtomicBool>, Puppet) {
    let (full, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let lies = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&lies);
    let puppet = Puppet::start(&golden(FAMILY), numerics, move |_| match told.load(SeqCst) {
        true => Act::Wrong(flip_a_sum),
        false => Act::Right,
    });
    let workers = start_all(&full, &vec![ShardSpec::All; honest], numerics);
    let mut config = config(&workers);
    config.workers.push(puppet.address.to_string());
    config.canary_interval = Duration::from_millis(50);
    let remote = RemoteExperts::connect(config, open(dir, Needs::GatewayOnly), numerics).unwrap();
    (remote, workers, lies, puppet)
}

#[test]
fn a_worker_that_answers_wrongly_is_found_by_the_gateways_own_checkpoint() {
    let (remote, _workers, lies, puppet) = beside(1, &golden(FAMILY));
    assert!(wait_for(|| remote.stats().canaries > 10));
    let stats = remote.stats();
    assert_eq!((stats.canary_failures, &stats.workers[1].down), (0, &None), "{stats:?}");
    lies.store(true, SeqCst);
    assert!(
        wait_for(|| remote.stats().workers[1].canary_failures > 0),
        "{:?}",
        remote.stats()
    );
    assert_eq!(remote.stats().workers[1].address, puppet.address.to_string());
    assert_eq!(remote.stats().workers[0].canary_failures, 0);
}

#[test]
fn a_worker_that_answers_wrongly_is_found_by_two_others_that_agree() {
    let dir = tempfile::tempdir().unwrap();
    moerun_testkit::copy_without_experts(&golden(FAMILY), dir.path()).unwrap();
    let (remote, _workers, lies, _puppet) = beside(2, dir.path());
    assert!(wait_for(|| remote.stats().canaries > 10));
    assert_eq!(remote.stats().canary_failures, 0);
    lies.store(true, SeqCst);
    assert!(
        wait_for(|| remote.stats().workers[2].canary_failures > 0),
        "{:?}",
        remote.stats()
    );
    let honest = &remote.stats().workers[..2];
    assert!(honest.iter().all(|worker| worker.canary_failures == 0), "{honest:?}");
}
