//! EPLB, the expert-parallel load balancer that DeepSeek describes, as a baseline to compare with.
//!
//! Experts are replicated greedily, always the one with the most load a replica; replicas are packed onto workers of
//! equally many places, the heaviest first, each to the worker with the least load that has a place. The hierarchical
//! form packs groups of experts onto nodes first and does the rest within each node. Ties go to the lower number. A load
//! is divided evenly over replicas, two of which may be on one worker.

/// A placement of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EplbPlan {
    /// Holder of each replica of each expert; a worker that holds two is there twice.
    pub holders: Vec<Vec<usize>>,
}

/// `slots` replicas of all experts on `workers`, without regard to groups and nodes.
///
/// Panics unless `slots` is a multiple of `workers` and at least the number of experts.
pub fn eplb_global(loads: &[f64], slots: usize, workers: usize) -> EplbPlan {
    eplb_hierarchical(loads, slots, 1, 1, workers)
}

/// The same, `groups` of neighbouring experts staying on one of `nodes` of neighbouring workers each.
///
/// Panics unless `groups` divides the experts, `nodes` divides groups and workers, `workers` divides `slots`, and there
/// is a slot for every expert.
pub fn eplb_hierarchical(loads: &[f64], slots: usize, groups: usize, nodes: usize, workers: usize) -> EplbPlan {
    assert!(
        loads.len().is_multiple_of(groups)
            && groups.is_multiple_of(nodes)
            && workers.is_multiple_of(nodes)
            && slots.is_multiple_of(workers)
            && slots >= loads.len(),
        "{} experts in {groups} groups, {slots} slots on {workers} workers of {nodes} nodes",
        loads.len()
    );
    let group_size = loads.len() / groups;
    let group_loads: Vec<f64> = loads.chunks(group_size).map(|group| group.iter().sum()).collect();
    let node_of_group = pack(&group_loads, nodes);
    let mut holders = vec![Vec::new(); loads.len()];
    let workers_a_node = workers / nodes;
    for node in 0..nodes {
        let experts: Vec<usize> = (0..loads.len())
            .filter(|expert| node_of_group[expert / group_size] == node)
            .collect();
        let replicas = replicate(&experts, loads, slots / nodes);
        let replica_loads: Vec<f64> = replicas.iter().map(|&(_, load)| load).collect();
        for (&(expert, _), worker) in replicas.iter().zip(pack(&replica_loads, workers_a_node)) {
            holders[expert].push(node * workers_a_node + worker);
        }
    }
    EplbPlan { holders }
}

/// `(expert, load)` of each of `slots` replicas.
fn replicate(experts: &[usize], loads: &[f64], slots: usize) -> Vec<(usize, f64)> {
    let mut counts = vec![1usize; experts.len()];
    for _ in experts.len()..slots {
        let a_replica = |index: usize| loads[experts[index]] / counts[index] as f64;
        let most = (0..experts.len()).max_by(|&a, &b| a_replica(a).total_cmp(&a_replica(b)).then(b.cmp(&a)));
        counts[most.expect("a node has experts")] += 1;
    }
    let replicas = experts.iter().zip(&counts);
    replicas
        .flat_map(|(&expert, &count)| std::iter::repeat_n((expert, loads[expert] / count as f64), count))
        .collect()
}

/// Pack of each item: equally many in each, the heaviest item first to the lightest pack with room.
fn pack(loads: &[f64], packs: usize) -> Vec<usize> {
    let room = loads.len() / packs;
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|&a, &b| loads[b].total_cmp(&loads[a]).then(a.cmp(&b)));
    let (mut weight, mut count) = (vec![0.0f64; packs], vec![0; packs]);
    let mut pack_of = vec![0; loads.len()];
    for item in order {
        let open = (0..packs).filter(|&pack| count[pack] < room);
        let lightest = open.min_by(|&a, &b| weight[a].total_cmp(&weight[b]).then(a.cmp(&b)));
        let lightest = lightest.expect("packs have room for all items");
        pack_of[item] = lightest;
        weight[lightest] += loads[item];
        count[lightest] += 1;
    }
    pack_of
}

impl EplbPlan {
    /// Mean over max of the workers' loads, each expert's divided evenly over its replicas that are not on `dead`; and
    /// the load of experts that have none.
    pub fn balance(&self, loads: &[f64], workers: usize, dead: Option<usize>) -> (f64, f64) {
        let mut on = vec![0.0; workers];
        let mut lost = 0.0;
        for (holders, &load) in self.holders.iter().zip(loads) {
            let alive: Vec<usize> = holders.iter().copied().filter(|&worker| Some(worker) != dead).collect();
            if alive.is_empty() {
                lost += load;
            }
            for worker in &alive {
                on[*worker] += load / alive.len() as f64;
            }
        }
        let count = workers - usize::from(dead.is_some());
        let most = on.iter().copied().fold(0.0, f64::max);
        let mean = on.iter().sum::<f64>() / count as f64;
        (if most > 0.0 { mean / most } else { 1.0 }, lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_heaviest_is_replicated_and_packs_are_filled_from_the_heaviest() {
        // Replicas: 0 twice (6 → 3 + 3), then 3, 2, 1; packed as 3 | 3, then 3 to pack 0, …
        let plan = eplb_global(&[6.0, 1.0, 2.0, 3.0], 6, 2);
        let replicas: usize = plan.holders.iter().map(Vec::len).sum();
        assert_eq!(replicas, 6);
        assert_eq!(
            plan.holders[0].len(),
            3,
            "6, 3 + 3, then the lower number among 3, 3, 3"
        );
        let (balance, lost) = plan.balance(&[6.0, 1.0, 2.0, 3.0], 2, None);
        assert!(balance > 0.99 && lost == 0.0, "{plan:?}: {balance}");
    }

    #[test]
    fn groups_stay_on_one_node() {
        let loads: Vec<f64> = (0..16).map(|expert| f64::from(expert % 5 + 1)).collect();
        let plan = eplb_hierarchical(&loads, 24, 4, 2, 4);
        for group in 0..4 {
            let nodes: Vec<usize> = (group * 4..group * 4 + 4)
                .flat_map(|expert| plan.holders[expert].iter().map(|worker| worker / 2))
                .collect();
            assert!(nodes.iter().all(|&node| node == nodes[0]), "group {group}: {nodes:?}");
        }
        for worker in 0..4 {
            let held = plan
                .holders
                .iter()
                .flatten()
                .filter(|&&holder| holder == worker)
                .count();
            assert_eq!(held, 6);
        }
    }

    #[test]
    fn what_only_the_dead_held_is_lost() {
        let plan = EplbPlan {
            holders: vec![vec![0, 0], vec![0, 1], vec![1]],
        };
        assert_eq!(plan.balance(&[2.0, 2.0, 1.0], 2, Some(0)), (1.0, 2.0));
        assert_eq!(plan.balance(&[2.0, 2.0, 2.0], 2, None), (1.0, 0.0));
    }
}
