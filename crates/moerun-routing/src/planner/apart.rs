//! Who may hold replicas of one piece together: different workers, and different failure domains where there are enough.

use std::collections::BTreeMap;

use super::WorkerSpec;

/// The failure domains of the workers.
#[derive(Debug)]
pub(crate) struct Domains {
    /// Domain of each worker.
    of: Vec<usize>,
    /// Workers of each domain.
    sizes: Vec<usize>,
    names: Vec<String>,
}

impl Domains {
    pub(crate) fn new(workers: &[WorkerSpec]) -> Self {
        let mut known: BTreeMap<&str, usize> = BTreeMap::new();
        let mut domains = Self {
            of: Vec::with_capacity(workers.len()),
            sizes: Vec::new(),
            names: Vec::new(),
        };
        for worker in workers {
            let index = match &worker.domain {
                Some(name) => *known.entry(name).or_insert_with(|| domains.push(name)),
                None => domains.push(&worker.name),
            };
            domains.sizes[index] += 1;
            domains.of.push(index);
        }
        domains
    }

    fn push(&mut self, name: &str) -> usize {
        self.names.push(name.to_owned());
        self.sizes.push(0);
        self.sizes.len() - 1
    }

    /// Number of domains.
    pub(crate) fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Domain of a worker.
    pub(crate) fn of(&self, worker: usize) -> usize {
        self.of[worker]
    }

    pub(crate) fn name(&self, domain: usize) -> &str {
        &self.names[domain]
    }

    /// Most of `replicas` holders in one domain: 1 where there are as many domains, else the fewest that can be.
    pub(crate) fn most_together(&self, replicas: usize) -> usize {
        (1..replicas)
            .find(|&most| self.sizes.iter().map(|&size| size.min(most)).sum::<usize>() >= replicas)
            .unwrap_or(replicas)
    }

    /// Whether `worker` may hold what `others` hold, `most` in a domain.
    pub(crate) fn allows(&self, worker: usize, others: impl Iterator<Item = usize>, most: usize) -> bool {
        let mut together = 0;
        for other in others {
            if other == worker {
                return false;
            }
            together += usize::from(self.of[other] == self.of[worker]);
        }
        together < most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(names: &[Option<&str>]) -> Domains {
        let workers: Vec<WorkerSpec> = names
            .iter()
            .enumerate()
            .map(|(index, domain)| WorkerSpec {
                name: format!("w{index}"),
                memory_bytes: 0,
                bandwidth: 1.0,
                round_trip_seconds: 0.0,
                domain: domain.map(str::to_owned),
            })
            .collect();
        Domains::new(&workers)
    }

    #[test]
    fn replicas_share_a_domain_only_where_there_are_too_few() {
        let racks = domains(&[Some("a"), Some("a"), Some("b"), Some("b"), None]);
        assert_eq!((racks.len(), racks.of(1), racks.of(3)), (3, 0, 1));
        assert_eq!(
            [1, 2, 3, 4, 5].map(|replicas| racks.most_together(replicas)),
            [1, 1, 1, 2, 2]
        );
        assert!(racks.allows(2, [0].into_iter(), 1));
        assert!(!racks.allows(1, [0].into_iter(), 1), "one rack");
        assert!(racks.allows(1, [0].into_iter(), 2));
        assert!(!racks.allows(1, [1].into_iter(), 2), "one worker");
    }
}
