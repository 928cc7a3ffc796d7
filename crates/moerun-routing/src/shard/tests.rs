use moerun_types::{BlockRange, CombineMode, ExpertId, ExpertSlice, LayerId, NumberFormat, Numerics};

use super::{ShardError, ShardSpec};
use crate::testing::model;

const NUMERICS: Numerics = Numerics {
    format: NumberFormat::F32,
    combine: CombineMode::Exact,
    combine_block: 8,
};

/// Layers 1 and 3 of 4 have 5 experts of 3 blocks, the last of them short.
fn resolve(spec: &ShardSpec) -> Result<Vec<ExpertSlice>, ShardError> {
    spec.resolve(&model(&[false, true, false, true], 5, 20), &NUMERICS)
}

fn experts(text: &str) -> Result<Vec<ExpertSlice>, ShardError> {
    ShardSpec::parse_experts(text).and_then(|spec| resolve(&spec))
}

fn shard(text: &str) -> Result<Vec<ExpertSlice>, ShardError> {
    ShardSpec::parse_shard(text).and_then(|spec| resolve(&spec))
}

fn slice(layer: u32, expert: u16, first: u16, end: u16) -> ExpertSlice {
    ExpertSlice {
        layer: LayerId(layer),
        expert: ExpertId(expert),
        blocks: BlockRange { first, end },
    }
}

#[test]
fn shards_of_experts_deal_them_out_in_every_layer() {
    assert_eq!(
        shard("1/3").unwrap(),
        [
            slice(1, 1, 0, 3),
            slice(1, 4, 0, 3),
            slice(3, 1, 0, 3),
            slice(3, 4, 0, 3)
        ]
    );
    assert_eq!(shard("0/1").unwrap(), resolve(&ShardSpec::All).unwrap());
    assert_eq!(shard("7/8").unwrap(), [], "beyond the experts");
}

#[test]
fn shards_of_slices_tile_the_blocks() {
    let of_first_expert = |text: &str| -> Vec<_> {
        shard(text)
            .unwrap()
            .into_iter()
            .filter(|held| held.expert.0 == 0 && held.layer.0 == 1)
            .collect()
    };
    assert_eq!(of_first_expert("slice:0/2"), [slice(1, 0, 0, 1)]);
    assert_eq!(of_first_expert("slice:1/2"), [slice(1, 0, 1, 3)]);
    assert_eq!(shard("slice:1/2").unwrap().len(), 10);
    for count in 1..9 {
        let mut blocks: Vec<u16> = (0..count)
            .flat_map(|index| of_first_expert(&format!("slice:{index}/{count}")))
            .flat_map(|held| held.blocks.first..held.blocks.end)
            .collect();
        blocks.sort_unstable();
        assert_eq!(blocks, [0, 1, 2], "{count} slices");
    }
}

#[test]
fn lists_take_ranges_and_stars() {
    assert_eq!(experts("1:2").unwrap(), [slice(1, 2, 0, 3)]);
    assert_eq!(
        experts("0-2:1-2:1-2").unwrap(),
        [slice(1, 1, 1, 3), slice(1, 2, 1, 3)],
        "only layer 1 has experts"
    );
    assert_eq!(
        experts("*:4:0,1:0:*").unwrap(),
        [slice(1, 0, 0, 3), slice(1, 4, 0, 1), slice(3, 4, 0, 1)]
    );
    assert_eq!(experts("*:*").unwrap(), resolve(&ShardSpec::All).unwrap());
    let ShardSpec::List(items) = ShardSpec::parse_experts("0-15:0-31,16-23:*").unwrap() else {
        panic!("not a list")
    };
    assert_eq!(
        (items[0].layers, items[0].experts, items[0].blocks),
        (Some((0, 15)), Some((0, 31)), None)
    );
    assert_eq!(
        (items[1].layers, items[1].experts, items[1].blocks),
        (Some((16, 23)), None, None)
    );
}

#[test]
fn overlapping_items_become_sorted_disjoint_runs() {
    assert_eq!(
        experts("3:1:2,1:0:0-1,1:0:1-2,3:1:0").unwrap(),
        [slice(1, 0, 0, 3), slice(3, 1, 0, 1), slice(3, 1, 2, 3)]
    );
}

#[test]
fn numbers_outside_the_model_are_named() {
    let out = |item: &str, what, number, count| {
        Err(ShardError::OutOfModel {
            item: item.to_owned(),
            what,
            number,
            count,
        })
    };
    assert_eq!(experts("1:0,1-4:0"), out("1-4:0", "layer", 4, 4));
    assert_eq!(experts("1:3-5"), out("1:3-5", "expert", 5, 5));
    assert_eq!(experts("*:*:3"), out("*:*:3", "block", 3, 3));
    let no_moe = ShardError::NoMoeLayer {
        item: "2:*".to_owned(),
        moe_layers: vec![LayerId(1), LayerId(3)],
    };
    assert_eq!(
        no_moe.to_string(),
        "shard item \"2:*\" names no layer that has experts; those that have: 1, 3"
    );
    assert_eq!(experts("1:1,2:*"), Err(no_moe));
}

#[test]
fn a_dense_model_has_nothing_to_hold() {
    let dense = model(&[false, false], 0, 0);
    for spec in ["0/1", "1/2", "slice:0/2"] {
        assert_eq!(
            ShardSpec::parse_shard(spec).unwrap().resolve(&dense, &NUMERICS),
            Ok(vec![])
        );
    }
    assert_eq!(ShardSpec::All.resolve(&dense, &NUMERICS), Ok(vec![]));
    let listed = ShardSpec::parse_experts("*:*").unwrap().resolve(&dense, &NUMERICS);
    assert!(matches!(listed, Err(ShardError::NoMoeLayer { .. })), "{listed:?}");
}

#[test]
fn text_that_is_no_shard_is_refused() {
    for text in [
        "",
        "1",
        "/",
        "1/",
        "/2",
        "2/2",
        "0/0",
        "-1/2",
        "+1/2",
        "a/2",
        "1/2/3",
        "slice:",
        "slice:3/2",
        "slices:0/2",
        " 0/2",
        "0/99999999999999999999999",
    ] {
        let refused = ShardSpec::parse_shard(text);
        assert!(
            matches!(refused, Err(ShardError::Syntax { .. })),
            "{text:?}: {refused:?}"
        );
    }
    for text in [
        "",
        "1",
        "1:",
        ":1",
        "1:2:",
        "1:2:3:4",
        "1:2,",
        ",1:2",
        "2-1:0",
        "1-:0",
        "-1:0",
        "1--2:0",
        "**:0",
        "*-2:0",
        "a:b",
        "1:2;3:4",
        "0x1:0",
        "1:99999999999999999999999",
    ] {
        let refused = ShardSpec::parse_experts(text);
        assert!(
            matches!(refused, Err(ShardError::Syntax { .. })),
            "{text:?}: {refused:?}"
        );
    }
    for spec in [
        ShardSpec::Experts { index: 0, count: 0 },
        ShardSpec::Slices { index: 3, count: 3 },
    ] {
        assert!(matches!(resolve(&spec), Err(ShardError::Syntax { .. })), "{spec}");
    }
}

#[test]
fn more_blocks_than_can_be_numbered_are_refused() {
    let huge = ShardSpec::All.resolve(&model(&[true], 2, 8 * 70_000), &NUMERICS);
    assert_eq!(
        huge,
        Err(ShardError::TooMany {
            num_experts: 2,
            num_blocks: 70_000
        })
    );
}

#[test]
fn a_spec_is_displayed_as_it_is_written() {
    for text in ["0-15:0-31,16-23:*", "1:2:3", "*:*:0-4"] {
        assert_eq!(ShardSpec::parse_experts(text).unwrap().to_string(), text);
    }
    for text in ["1/3", "slice:0/2"] {
        assert_eq!(ShardSpec::parse_shard(text).unwrap().to_string(), text);
    }
}

#[test]
fn several_shards_are_held_together_and_replicas_follow_each_other() {
    assert_eq!(shard("0/3,2/3").unwrap(), experts("*:0,*:2,*:3").unwrap());
    assert_eq!(shard("0/2,0/2").unwrap(), shard("0/2").unwrap());
    let replicated = |text: &str, replicas: usize| ShardSpec::parse_shard(text).and_then(|it| it.replicated(replicas));
    for (text, replicas, same) in [
        ("1/4", 1, "1/4"),
        ("1/4", 2, "1/4,2/4"),
        ("3/4", 2, "3/4,0/4"),
        ("slice:2/3", 2, "slice:2/3,slice:0/3"),
        ("1/2", 2, "1/2,0/2"),
    ] {
        let spec = replicated(text, replicas).unwrap();
        assert_eq!(spec.to_string(), same);
        assert_eq!(resolve(&spec), shard(same), "{text}");
    }
    for (text, replicas, most) in [("1/4", 5, 4), ("1/4", 0, 4), ("0/2,1/2", 2, 1)] {
        let shard = text.to_owned();
        assert_eq!(
            replicated(text, replicas),
            Err(ShardError::Replicas { shard, replicas, most })
        );
    }
    for bad in ["0/3,", "0/3,3/3", ",0/3"] {
        assert!(matches!(shard(bad), Err(ShardError::Syntax { .. })), "{bad}");
    }
}
