use super::*;

#[test]
fn a_bank_that_gained_and_lost_experts_gives_the_bits_of_one_that_was_loaded_so() {
    for family in ["qwen3_moe", "gpt_oss", "llama4_text"] {
        let golden = Golden::open(family, 0);
        let x = golden.activations(EXACT);
        let all = golden.shard(&ShardSpec::All, EXACT);
        let halves = [0, 1].map(|index| golden.shard(&ShardSpec::Slices { index, count: 2 }, EXACT));
        let rows = |bank: &ExpertBank, work: &[_]| bank.execute(&pool(), golden.layer, &x, work).unwrap();

        // Whole experts take the place of the slices that were there.
        let grown = halves[0].with(&all);
        assert_eq!(grown.held(), all.held(), "{family}");
        assert_eq!(grown.memory_bytes(), all.memory_bytes(), "{family}");
        let whole: Vec<_> = whole_assignments(&golden.routing, golden.num_blocks(EXACT)).collect();
        assert_eq!(rows(&grown, &whole), rows(&all, &whole), "{family}");

        // What is left of whole experts is what the other half was.
        let shrunk = grown.without(halves[0].held());
        assert_eq!(shrunk.held(), halves[1].held(), "{family}");
        assert_eq!(shrunk.memory_bytes(), halves[1].memory_bytes(), "{family}");
        let blocks = halves[1].held()[0].blocks;
        let half: Vec<_> = whole
            .iter()
            .map(|work| moerun_routing::Assignment { blocks, ..*work })
            .collect();
        assert_eq!(rows(&shrunk, &half), rows(&halves[1], &half), "{family}");
        let refused = shrunk.execute(&pool(), golden.layer, &x, &whole).unwrap_err();
        assert!(
            matches!(refused, super::super::ExpertError::NotHeld { .. }),
            "{family}: {refused}"
        );

        let nothing = shrunk.without(halves[1].held());
        assert_eq!((nothing.held().len(), nothing.memory_bytes()), (0, 0), "{family}");
        assert_eq!(nothing.with(&halves[0]).held(), halves[0].held(), "{family}");
    }
}
