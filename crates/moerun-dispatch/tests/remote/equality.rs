//! Local = one worker = many workers, bit for bit.

use moerun_dispatch::{ExpertBackend, local_shards};
use moerun_process::Shutdown;
use moerun_routing::ShardSpec;
use moerun_testkit::Family;
use moerun_types::{CombineMode, ExpertId, LayerId, NumberFormat, Numerics};
use moerun_weights::Needs;
use moerun_worker::{Worker, WorkerConfig};

use crate::cluster::{COMBINE_BLOCK, connect, golden, local, numerics, open, request, run, start_all, wide};

/// Plain, with a down bias, with the weight on the input, with a shared expert; three
/// experts a token where the family can.
const FAMILIES: [Family; 4] = [Family::Qwen3Moe, Family::GptOss, Family::Llama4Text, Family::Qwen2Moe];

fn shards(sliced: bool, count: usize) -> Vec<ShardSpec> {
    (0..count)
        .map(|index| {
            if sliced {
                ShardSpec::Slices { index, count }
            } else {
                ShardSpec::Experts { index, count }
            }
        })
        .collect()
}

#[test]
fn any_number_of_workers_gives_the_bits_of_local_experts() {
    for family in FAMILIES {
        let wide = wide(family);
        for format in NumberFormat::ALL {
            let (checkpoint, numerics) = (open(wide.path(), Needs::All), numerics(format));
            let local = local(&checkpoint, numerics);
            let requests: Vec<_> = checkpoint
                .config()
                .moe_layers()
                .into_iter()
                .flat_map(|layer| [(1, 7), (13, 8)].map(|(tokens, seed)| (layer, tokens, seed)))
                .map(|(layer, tokens, seed)| request(checkpoint.config(), format, layer, tokens, seed))
                .collect();
            let wanted: Vec<_> = requests.iter().map(|request| run(&local, request).unwrap()).collect();
            for (count, sliced) in (1..=4).flat_map(|count| [(count, false), (count, true)]) {
                let workers = start_all(&checkpoint, &shards(sliced, count), numerics);
                let remote = connect(&workers, &checkpoint, numerics).unwrap();
                // All in flight before any is waited for.
                let pending: Vec<_> = requests
                    .iter()
                    .map(|request| remote.submit(request.clone()).unwrap())
                    .collect();
                for ((pending, wanted), request) in pending.into_iter().zip(&wanted).zip(&requests) {
                    let combined = pending.wait().unwrap().hidden_states;
                    let found: Vec<u32> = combined.iter().map(|value| value.to_bits()).collect();
                    let case = format!(
                        "{family:?} {format} {count} workers, sliced {sliced}, layer {}",
                        request.layer
                    );
                    assert!(found == *wanted, "{case}: bits differ");
                }
            }
        }
    }
}

#[test]
fn slices_of_one_expert_are_really_held_by_several_workers() {
    let (checkpoint, numerics) = (open(&golden("qwen3_moe"), Needs::All), numerics(NumberFormat::F32));
    let workers = start_all(&checkpoint, &shards(true, 3), numerics);
    let remote = connect(&workers, &checkpoint, numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    let holders = remote.workers().into_iter().filter(|worker| {
        worker
            .held
            .iter()
            .any(|slice| slice.layer == layer && slice.expert == ExpertId(0) && !slice.blocks.is_empty())
    });
    assert!(holders.count() >= 2);
}

#[test]
fn a_long_prefill_travels_in_several_messages_and_keeps_its_bits() {
    let (checkpoint, numerics) = (open(&golden("qwen3_moe"), Needs::All), numerics(NumberFormat::F32));
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 5000, 3);
    let row_bytes = checkpoint.config().hidden * 4;
    assert!(
        5000 * row_bytes > 2 * moerun_proto::MAX_EXECUTE_BYTES,
        "the batch must be cut"
    );
    let wanted = run(&local(&checkpoint, numerics), &request).unwrap();
    let workers = start_all(&checkpoint, &shards(true, 2), numerics);
    let remote = connect(&workers, &checkpoint, numerics).unwrap();
    assert!(run(&remote, &request).unwrap() == wanted);
}

#[test]
fn a_gateway_without_any_expert_runs_the_workers_experts() {
    let (full, numerics) = (open(&golden("mixtral"), Needs::All), numerics(NumberFormat::F32));
    let dir = tempfile::tempdir().unwrap();
    moerun_testkit::copy_without_experts(&golden("mixtral"), dir.path()).unwrap();
    let bare = open(dir.path(), Needs::GatewayOnly);
    let layer = full.config().moe_layers()[0];
    assert!(!bare.has_expert(layer, ExpertId(0)));
    let workers = start_all(&full, &local_shards(2, 2), numerics);
    let remote = connect(&workers, &bare, numerics).unwrap();
    let request = request(full.config(), NumberFormat::F32, layer, 5, 11);
    assert_eq!(
        run(&remote, &request).unwrap(),
        run(&local(&full, numerics), &request).unwrap()
    );
}

#[test]
fn the_fast_combine_is_close_to_the_exact_one() {
    let exact = numerics(NumberFormat::F32);
    let fast = Numerics {
        combine: CombineMode::Fast,
        ..exact
    };
    let checkpoint = open(&golden("qwen3_moe"), Needs::All);
    let layer = checkpoint.config().moe_layers()[0];
    let request = request(checkpoint.config(), NumberFormat::F32, layer, 9, 4);
    let wanted = run(&local(&checkpoint, exact), &request).unwrap();
    let workers = start_all(&checkpoint, &shards(true, 2), fast);
    let found = run(&connect(&workers, &checkpoint, fast).unwrap(), &request).unwrap();
    assert_eq!(found.len(), wanted.len());
    for (found, wanted) in found.into_iter().zip(wanted) {
        let (found, wanted) = (f32::from_bits(found), f32::from_bits(wanted));
        assert!(
            (found - wanted).abs() <= 1e-4 + 1e-4 * wanted.abs(),
            "{found} and {wanted}"
        );
    }
}

#[test]
fn a_worker_needs_no_tensor_but_its_experts() {
    let (full, numerics) = (open(&golden("mixtral"), Needs::All), numerics(NumberFormat::F32));
    let dir = tempfile::tempdir().unwrap();
    moerun_testkit::copy_only_experts(&golden("mixtral"), dir.path()).unwrap();
    let workers: Vec<Worker> = local_shards(2, 2)
        .into_iter()
        .map(|shard| {
            let mut config = WorkerConfig::new(dir.path(), "127.0.0.1:0", shard);
            config.combine_block = Some(COMBINE_BLOCK);
            config.threads = 1;
            Worker::start(&config, Shutdown::new()).unwrap()
        })
        .collect();
    let remote = connect(&workers, &full, numerics).unwrap();
    let layer = full.config().moe_layers()[0];
    let request = request(full.config(), NumberFormat::F32, layer, 5, 12);
    assert_eq!(
        run(&remote, &request).unwrap(),
        run(&local(&full, numerics), &request).unwrap()
    );
    drop(remote);
    for worker in workers {
        worker.shutdown().drain();
        worker.wait().unwrap();
    }
}

#[test]
fn nothing_to_do_is_done_at_once_and_a_layer_without_experts_is_named() {
    let (checkpoint, numerics) = (open(&golden("qwen3_moe"), Needs::All), numerics(NumberFormat::F32));
    let workers = start_all(&checkpoint, &[ShardSpec::All], numerics);
    let remote = connect(&workers, &checkpoint, numerics).unwrap();
    let layer = checkpoint.config().moe_layers()[0];
    assert!(
        run(&remote, &request(checkpoint.config(), NumberFormat::F32, layer, 0, 1))
            .unwrap()
            .is_empty()
    );
    let beyond = LayerId(checkpoint.config().layers.len() as u32);
    let error = run(&remote, &request(checkpoint.config(), NumberFormat::F32, beyond, 1, 1)).unwrap_err();
    assert_eq!(error.to_string(), format!("layer {beyond} has no experts"));
}
