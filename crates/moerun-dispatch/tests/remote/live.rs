//! Experts that move between workers while dispatches go on, and what is refused on the way.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use moerun_dispatch::{DispatchError, RemoteExperts};
use moerun_model::ExpertBank;
use moerun_process::Shutdown;
use moerun_routing::ShardSpec;
use moerun_testkit::{copy_perturbed, copy_without_experts};
use moerun_transport::ClientProtection;
use moerun_types::NumberFormat;
use moerun_weights::{Checkpoint, Load, Needs};
use moerun_worker::{ExpertSource, Worker, identify};

use crate::cluster::{config, connect, golden, local, numerics, open, options, request, run, wait_for};

const FAMILY: &str = "qwen3_moe";

/// A worker that holds `shard` of the golden checkpoint, and takes more from the checkpoint in `source`.
fn worker(shard: &str, source: &Path) -> Worker {
    let (checkpoint, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let spec = ShardSpec::parse_experts(shard).unwrap();
    let slices = spec.resolve(checkpoint.config(), &numerics).unwrap();
    let identity = identify(&checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
    let bank = ExpertBank::load(&checkpoint, &slices, numerics, &mut |_, _| {}).unwrap();
    let source = ExpertSource {
        model_dir: source.to_owned(),
        load: Load::default(),
        max_expert_bytes: None,
        dial: ClientProtection::default(),
    };
    Worker::serve_from(source, bank, &identity, options("127.0.0.1:0"), Shutdown::new()).unwrap()
}

/// The gateway's checkpoint, which has no expert.
fn stripped(folder: &tempfile::TempDir) -> Arc<Checkpoint> {
    let dir = folder.path().join("stripped");
    copy_without_experts(&golden(FAMILY), &dir).unwrap();
    open(&dir, Needs::GatewayOnly)
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future)
}

fn held(remote: &RemoteExperts) -> Vec<usize> {
    remote.workers().iter().map(|worker| worker.held.len()).collect()
}

#[test]
fn experts_move_and_every_dispatch_gives_the_same_bits() {
    let (full, numerics) = (open(&golden(FAMILY), Needs::All), numerics(NumberFormat::F32));
    let folder = tempfile::tempdir().unwrap();
    let workers = [worker("*:*", &golden(FAMILY)), worker("none", &golden(FAMILY))];
    let remote = Arc::new(connect(&workers, &stripped(&folder), numerics).unwrap());
    // Another gateway of the same workers, which nobody tells.
    let other = connect(&workers, &stripped(&folder), numerics).unwrap();
    let local = local(&full, numerics);
    let requests: Vec<_> = full
        .config()
        .moe_layers()
        .into_iter()
        .flat_map(|layer| [1, 2, 3].map(|seed| request(full.config(), NumberFormat::F32, layer, 5, seed)))
        .collect();
    let wanted: Vec<_> = requests.iter().map(|request| run(&local, request).unwrap()).collect();
    let (ended, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let asking = {
        let (remote, ended, rounds) = (Arc::clone(&remote), Arc::clone(&ended), Arc::clone(&rounds));
        let (requests, wanted) = (requests.clone(), wanted.clone());
        thread::spawn(move || {
            while !ended.load(SeqCst) {
                for (request, wanted) in requests.iter().zip(&wanted) {
                    assert!(run(remote.as_ref(), request).unwrap() == *wanted);
                }
                rounds.fetch_add(1, SeqCst);
            }
        })
    };
    assert!(wait_for(|| rounds.load(SeqCst) > 2));

    let before = held(&remote);
    let plan = wait(remote.rebalance(true)).unwrap();
    assert!(!plan.carried_out && plan.workers[1].load_slices > 0, "{plan:?}");
    assert_eq!((held(&remote), before[1]), (before.clone(), 0));
    let report = wait(remote.rebalance(false)).unwrap();
    assert!(report.carried_out, "{report:?}");
    let after = held(&remote);
    assert!(after[0] > 0 && after[1] > 0, "{after:?}");
    assert_eq!(remote.placement().fewest_holders, 1, "copied, and then let go");
    assert!(wait_for(|| held(&other) == after), "{:?} {after:?}", held(&other));

    // Drained, the one holds still what it held, and the other all.
    let address = remote.workers()[0].address.clone();
    let drained = wait(remote.drain_worker(&address)).unwrap();
    assert!(drained.moved_slices > 0 && drained.in_flight == 0, "{drained:?}");
    let calls = remote.stats().workers[0].calls;
    let done = rounds.load(SeqCst);
    assert!(wait_for(|| rounds.load(SeqCst) > done + 2));
    assert_eq!(remote.stats().workers[0].calls, calls);
    let last = remote.workers()[1].address.clone();
    let error = wait(remote.drain_worker(&last)).unwrap_err();
    assert!(matches!(error, DispatchError::LastWorker { .. }), "{error}");
    assert!(matches!(
        wait(remote.drain_worker("nobody:1")),
        Err(DispatchError::UnknownWorker { .. })
    ));
    wait(remote.resume_worker(&address)).unwrap();
    assert!(wait_for(|| remote.stats().workers[0].calls > calls));
    ended.store(true, SeqCst);
    asking.join().unwrap();
    for (request, wanted) in requests.iter().zip(&wanted) {
        assert!(run(&other, request).unwrap() == *wanted);
    }
    assert!(
        remote
            .placement()
            .loads
            .layers()
            .any(|(_, loads)| loads.iter().any(|&load| load > 0.0))
    );
}

#[test]
fn a_worker_without_experts_on_its_disk_fetches_them_and_takes_no_others() {
    let numerics = numerics(NumberFormat::F32);
    let folder = tempfile::tempdir().unwrap();
    let gateways = stripped(&folder);
    let bare = folder.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    std::fs::copy(golden(FAMILY).join("config.json"), bare.join("config.json")).unwrap();
    let twin = folder.path().join("twin");
    copy_perturbed(&golden(FAMILY), &twin, "model.layers.0.mlp.experts.1.down_proj.weight").unwrap();

    // What the holder would hand over is not what it said that it holds.
    let workers = [worker("*:*", &twin), worker("none", &bare)];
    let remote = RemoteExperts::connect(config(&workers), Arc::clone(&gateways), numerics).unwrap();
    let error = wait(remote.drain_worker(&workers[0].address().to_string())).unwrap_err();
    let words = error.to_string();
    assert!(
        matches!(&error, DispatchError::CannotHold { .. })
            && words.contains("layer 0 expert 1 block")
            && words.contains("hashes to"),
        "{error}"
    );
    assert_eq!(held(&remote)[1], 0, "nothing of it was taken");
    let layer = gateways.config().moe_layers()[0];
    let request = request(gateways.config(), NumberFormat::F32, layer, 4, 9);
    let wanted = run(&local(&open(&golden(FAMILY), Needs::All), numerics), &request).unwrap();
    assert!(run(&remote, &request).unwrap() == wanted, "the holder is asked on");

    let workers = [worker("*:*", &golden(FAMILY)), worker("none", &bare)];
    let remote = RemoteExperts::connect(config(&workers), Arc::clone(&gateways), numerics).unwrap();
    wait(remote.drain_worker(&workers[0].address().to_string())).unwrap();
    assert_eq!(held(&remote)[0], held(&remote)[1]);
    assert!(run(&remote, &request).unwrap() == wanted);
    assert_eq!(remote.stats().workers[0].calls, 0);
    assert!(remote.stats().workers[1].calls > 0);
}
