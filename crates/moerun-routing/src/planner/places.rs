//! How many pieces of each size each worker holds in each layer: memory, speed and failure domains in numbers.
//!
//! Places are given out for the whole model, one at a time, to the worker that would be least busy with one more, as far
//! as memory and domains allow: of all ways within those bounds the evenest. They are then dealt to the layers in turn,
//! so that every layer gets the number it needs and no worker's share of a layer differs by more than one.

use super::{PlannerError, apart::Domains, error::Shortage};

/// Pieces of one size, the same in every layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SizeClass {
    /// Bytes of one.
    pub(crate) bytes: u64,
    /// Pieces in a layer.
    pub(crate) pieces: usize,
    /// Holders beyond the replicas of each, in a layer.
    pub(crate) extra: usize,
}

/// What places are given out for.
pub(crate) struct Wanted<'a> {
    /// Largest first.
    pub(crate) classes: &'a [SizeClass],
    pub(crate) layers: usize,
    pub(crate) replicas: usize,
    pub(crate) speeds: &'a [f64],
    /// Bytes of each worker.
    pub(crate) memory: Vec<u64>,
    /// Workers' names, for errors.
    pub(crate) names: Vec<String>,
}

/// Places of each class and worker in all layers.
pub(crate) fn share_out(wanted: &Wanted<'_>, domains: &Domains) -> Result<Vec<Vec<usize>>, PlannerError> {
    let mut memory = wanted.memory.clone();
    let together = domains.most_together(wanted.replicas);
    let mut busy = vec![0.0; memory.len()];
    wanted
        .classes
        .iter()
        .map(|class| {
            let pieces = class.pieces * wanted.layers;
            let most: Vec<usize> = memory
                .iter()
                .map(|&bytes| places(bytes, class.bytes).min(pieces))
                .collect();
            let mut room = vec![together * pieces + class.extra * wanted.layers; domains.len()];
            let need = pieces * wanted.replicas + class.extra * wanted.layers;
            let mut given = vec![0usize; memory.len()];
            for _ in 0..need {
                let free =
                    (0..given.len()).filter(|&worker| given[worker] < most[worker] && room[domains.of(worker)] > 0);
                let idle = |worker: usize| (busy[worker] + class.bytes as f64) / wanted.speeds[worker];
                let Some(worker) = free.min_by(|&a, &b| idle(a).total_cmp(&idle(b))) else {
                    return Err(shortage(wanted, class, &memory, &most, domains, together));
                };
                given[worker] += 1;
                busy[worker] += class.bytes as f64;
                room[domains.of(worker)] -= 1;
            }
            for (memory, given) in memory.iter_mut().zip(&given) {
                *memory -= *given as u64 * class.bytes;
            }
            Ok(given)
        })
        .collect()
}

fn places(memory: u64, bytes: u64) -> usize {
    memory
        .checked_div(bytes)
        .map_or(usize::MAX, |places| usize::try_from(places).unwrap_or(usize::MAX))
}

fn shortage(
    wanted: &Wanted<'_>,
    class: &SizeClass,
    memory: &[u64],
    most: &[usize],
    domains: &Domains,
    together: usize,
) -> PlannerError {
    let pieces = class.pieces * wanted.layers;
    let limit = together * pieces + class.extra * wanted.layers;
    let mut in_domain = vec![0; domains.len()];
    for (worker, most) in most.iter().enumerate() {
        in_domain[domains.of(worker)] += most;
    }
    let limited = (0..domains.len()).filter(|&domain| in_domain[domain] > limit);
    PlannerError::DoesNotFit(Box::new(Shortage {
        replicas: wanted.replicas,
        pieces,
        extra: class.extra * wanted.layers,
        piece_bytes: class.bytes,
        places: in_domain.iter().map(|&places| places.min(limit)).sum(),
        workers: (0..most.len())
            .map(|worker| (wanted.names[worker].clone(), memory[worker], most[worker]))
            .collect(),
        domains: limited.map(|domain| (domains.name(domain).to_owned(), limit)).collect(),
    }))
}

/// Deals `given` places of each worker to `layers` in turn; `[layer][worker]`. Workers of one domain come one after
/// another, so that a domain's share of a layer does not differ by more than one either.
pub(crate) fn deal(given: &[usize], layers: usize, domains: &Domains) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..given.len()).collect();
    order.sort_by_key(|&worker| (domains.of(worker), worker));
    let mut places = vec![vec![0; given.len()]; layers];
    let mut next = 0;
    for worker in order {
        for _ in 0..given[worker] {
            places[next][worker] += 1;
            next = (next + 1) % layers;
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::planner::WorkerSpec;

    fn workers(memory: &[u64], domains: &[&str]) -> Vec<WorkerSpec> {
        memory
            .iter()
            .zip(domains)
            .enumerate()
            .map(|(index, (&memory_bytes, domain))| WorkerSpec {
                name: format!("w{index}"),
                memory_bytes,
                bandwidth: 1.0,
                round_trip_seconds: 0.0,
                domain: Some((*domain).to_owned()),
            })
            .collect()
    }

    fn give(workers: &[WorkerSpec], speeds: &[f64], replicas: usize) -> Result<Vec<Vec<usize>>, PlannerError> {
        let wanted = Wanted {
            classes: &[SizeClass {
                bytes: 10,
                pieces: 8,
                extra: 0,
            }],
            layers: 3,
            replicas,
            speeds,
            memory: workers.iter().map(|worker| worker.memory_bytes).collect(),
            names: workers.iter().map(|worker| worker.name.clone()).collect(),
        };
        share_out(&wanted, &Domains::new(workers))
    }

    #[test]
    fn places_follow_speed_as_far_as_memory_allows() {
        let all = workers(&[1000, 1000, 45], &["a", "b", "c"]);
        assert_eq!(give(&all, &[2.0, 1.0, 1.0], 1).unwrap(), [[14, 6, 4]]);
        // No worker can hold a piece twice.
        assert_eq!(give(&all, &[9.0, 1.0, 1.0], 2).unwrap(), [[24, 20, 4]]);
    }

    #[test]
    fn a_shortage_is_told_with_the_arithmetic() {
        let error = give(&workers(&[100, 45], &["a", "b"]), &[1.0; 2], 1)
            .unwrap_err()
            .to_string();
        for words in [
            "24 pieces of 10 B with 1 holder",
            "need 24 places = 240 B",
            "there are 14 = 140 B",
            "w1 has 4 in 45 B",
        ] {
            assert!(error.contains(words), "{error}");
        }
        // Enough memory, but nearly all of it in one domain.
        let error = give(&workers(&[240, 240, 30], &["a", "a", "b"]), &[1.0; 3], 2)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("failure domain a takes at most 24") && error.contains("there are 27"),
            "{error}"
        );
    }

    #[test]
    fn every_layer_gets_what_it_needs() {
        let all = workers(&[1000; 5], &["a", "a", "b", "b", "c"]);
        let domains = Domains::new(&all);
        let given = [7, 5, 6, 3, 3];
        let dealt = deal(&given, 3, &domains);
        for layer in &dealt {
            assert_eq!(layer.iter().sum::<usize>(), 8);
        }
        for worker in 0..5 {
            let of = |layer: &Vec<usize>| layer[worker];
            assert_eq!(dealt.iter().map(of).sum::<usize>(), given[worker]);
            assert!(dealt.iter().map(of).max().unwrap() - dealt.iter().map(of).min().unwrap() <= 1);
        }
    }
}
