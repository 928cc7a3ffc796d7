//! Who is refused, and in which words.

use std::{thread, time::Duration};

use moerun_dispatch::{DispatchError, RemoteConfig, RemoteExperts};
use moerun_routing::ShardSpec;
use moerun_types::{CombineMode, NumberFormat, Numerics};
use moerun_weights::Needs;

use crate::cluster::{config, connect, golden, numerics, open, request, run, start, start_all};

fn halves() -> [ShardSpec; 2] {
    [
        ShardSpec::Experts { index: 0, count: 2 },
        ShardSpec::Experts { index: 1, count: 2 },
    ]
}

#[test]
fn another_model_is_refused_with_both_hashes() {
    let numerics = numerics(NumberFormat::F32);
    let (ours, other) = (
        open(&golden("qwen3_moe"), Needs::All),
        open(&golden("mixtral"), Needs::All),
    );
    let workers = start_all(&other, &[ShardSpec::All], numerics);
    let error = connect(&workers, &ours, numerics).unwrap_err();
    let wanted = format!(
        "worker {} is refused: its config hash is {}, the gateway's is {}",
        workers[0].address(),
        other.config_hash(),
        ours.config_hash()
    );
    assert_eq!(error.to_string(), wanted);
}

#[test]
fn other_numerics_are_refused_with_both_ids() {
    let ours = numerics(NumberFormat::F32);
    let checkpoint = open(&golden("qwen3_moe"), Needs::All);
    for other in [
        Numerics {
            format: NumberFormat::Bf16,
            ..ours
        },
        Numerics {
            combine: CombineMode::Fast,
            ..ours
        },
        Numerics {
            combine_block: 16,
            ..ours
        },
    ] {
        let workers = start_all(&checkpoint, &[ShardSpec::All], other);
        let error = connect(&workers, &checkpoint, ours).unwrap_err().to_string();
        assert!(error.contains(&other.id()) && error.contains(&ours.id()), "{error}");
    }
}

#[test]
fn another_training_of_one_architecture_is_refused_by_its_contents() {
    let numerics = numerics(NumberFormat::F32);
    let ours = open(&golden("qwen3_moe"), Needs::All);
    let dir = tempfile::tempdir().unwrap();
    moerun_testkit::copy_checkpoint(&golden("qwen3_moe"), dir.path()).unwrap();
    moerun_testkit::edit_tensors(dir.path(), |tensors| {
        for tensor in tensors
            .iter_mut()
            .filter(|tensor| moerun_testkit::is_expert_tensor(&tensor.name))
        {
            let last = tensor.data.len() - 4;
            tensor.data[last] ^= 1;
        }
    })
    .unwrap();
    let other = open(dir.path(), Needs::All);

    let workers = start_all(&other, &[ShardSpec::All], numerics);
    let error = connect(&workers, &ours, numerics).unwrap_err();
    assert!(matches!(error, DispatchError::ContentDiffers { .. }), "{error}");

    // A gateway without experts cannot know who is right, but sees that two holders differ.
    let bare_dir = tempfile::tempdir().unwrap();
    moerun_testkit::copy_without_experts(&golden("qwen3_moe"), bare_dir.path()).unwrap();
    let bare = open(bare_dir.path(), Needs::GatewayOnly);
    let workers = [
        start(&ours, &ShardSpec::All, numerics, "127.0.0.1:0"),
        start(&other, &ShardSpec::All, numerics, "127.0.0.1:0"),
    ];
    let error = connect(&workers, &bare, numerics).unwrap_err().to_string();
    let both = format!(
        "workers {} and {} differ in layer ",
        workers[0].address(),
        workers[1].address()
    );
    assert!(error.starts_with(&both), "{error}");
}

#[test]
fn a_hole_in_the_coverage_is_named() {
    let numerics = numerics(NumberFormat::F32);
    let checkpoint = open(&golden("qwen3_moe"), Needs::All);
    let layer = checkpoint.config().moe_layers()[0];
    let error = connect(&start_all(&checkpoint, &halves()[..1], numerics), &checkpoint, numerics).unwrap_err();
    let experts = error.to_string();
    assert!(
        experts.contains(&format!("no worker holds layer {layer} expert 1 blocks 0..")),
        "{experts}"
    );
    let first_slice = [ShardSpec::Slices { index: 0, count: 2 }];
    let error = connect(&start_all(&checkpoint, &first_slice, numerics), &checkpoint, numerics).unwrap_err();
    let blocks = error.to_string();
    assert!(
        blocks.contains(&format!("no worker holds layer {layer} expert 0 blocks ")),
        "{blocks}"
    );
    assert!(!blocks.contains("blocks 0.."), "{blocks}");
    let nobody = RemoteExperts::connect(RemoteConfig::new(Vec::new()), checkpoint, numerics).unwrap_err();
    assert!(matches!(nobody, DispatchError::Placement(_)), "{nobody}");
}

#[test]
fn a_worker_may_come_up_after_the_gateway() {
    let numerics = numerics(NumberFormat::F32);
    let checkpoint = open(&golden("qwen3_moe"), Needs::All);
    let first = start(&checkpoint, &ShardSpec::All, numerics, "127.0.0.1:0");
    let address = first.address().to_string();
    let late = config(std::slice::from_ref(&first));
    drop(first);
    let gateway_checkpoint = checkpoint.clone();
    let gateway = thread::spawn(move || RemoteExperts::connect(late, gateway_checkpoint, numerics));
    thread::sleep(Duration::from_millis(300));
    assert!(!gateway.is_finished());
    let _worker = start(&checkpoint, &ShardSpec::All, numerics, &address);
    let remote = gateway.join().unwrap().unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    run(&remote, &request(checkpoint.config(), NumberFormat::F32, layer, 2, 5)).unwrap();
}

#[test]
fn a_worker_that_never_comes_up_is_named() {
    let numerics = numerics(NumberFormat::F32);
    let checkpoint = open(&golden("qwen3_moe"), Needs::All);
    let worker = start(&checkpoint, &ShardSpec::All, numerics, "127.0.0.1:0");
    let address = worker.address().to_string();
    let mut config = config(&[worker]);
    config.startup_timeout = Duration::from_millis(300);
    let error = RemoteExperts::connect(config.clone(), checkpoint.clone(), numerics)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&format!("worker {address} could not be reached within 300ms: ")),
        "{error}"
    );
    config.workers.push(address.to_string());
    let error = RemoteExperts::connect(config, checkpoint, numerics).unwrap_err();
    assert_eq!(error.to_string(), format!("worker address {:?}: given twice", address));
}
