//! What was asked for lately, and how many of each kind to have ready for that. Pure, but for the clock.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use tiffin_types::id::Digest;

use super::Kind;

/// Kinds that are remembered; whoever was asked for longest ago is forgotten for a new one.
const KINDS: usize = 64;

/// When each kind was asked for.
#[derive(Debug, Default)]
pub(super) struct Demand(HashMap<Kind, VecDeque<Instant>>);

impl Demand {
    /// Somebody asked for one. Only the last `most` times matter.
    pub(super) fn note(&mut self, kind: &Kind, most: usize) {
        if self.0.len() >= KINDS && !self.0.contains_key(kind) {
            let oldest = self.0.iter().min_by_key(|(_, times)| times.back().copied()).map(|(kind, _)| kind.clone());
            oldest.and_then(|oldest| self.0.remove(&oldest));
        }
        let times = self.0.entry(kind.clone()).or_default();
        times.push_back(Instant::now());
        while times.len() > most {
            times.pop_front();
        }
    }

    /// Forgets a kind: it doesn't come up.
    pub(super) fn forget(&mut self, kind: &Kind) {
        self.0.remove(kind);
    }

    /// Forgets all of a blob: nobody can ask for it any more.
    pub(super) fn forget_blob(&mut self, blob: &Digest) {
        self.0.retain(|kind, _| !kind.is_of(blob));
    }

    /// How often each kind was asked for within `recent`; what is older is forgotten.
    pub(super) fn counts(&mut self, recent: Duration) -> HashMap<Kind, usize> {
        let now = Instant::now();
        for times in self.0.values_mut() {
            times.retain(|at| now.duration_since(*at) <= recent);
        }
        self.0.retain(|_, times| !times.is_empty());
        self.0.iter().map(|(kind, times)| (kind.clone(), times.len())).collect()
    }
}

/// How many of each kind to have ready, `most` in all: first those of `keep`, then as many as each was asked for. Where
/// that is too many, each place goes to the kind that was asked for most often for each that it has got (as seats are
/// given to parties).
pub(super) fn targets(keep: &[(Kind, usize)], counts: &HashMap<Kind, usize>, most: usize) -> HashMap<Kind, usize> {
    let mut targets: HashMap<Kind, usize> = HashMap::new();
    let mut left = most;
    for (kind, count) in keep {
        let given = (*count).min(left);
        *targets.entry(kind.clone()).or_default() += given;
        left -= given;
    }
    for _ in 0..left {
        let given = |kind: &Kind| targets.get(kind).copied().unwrap_or(0);
        let wanting = counts.iter().filter(|(kind, count)| given(kind) < **count);
        // Scaled, as a quotient would be cut to a whole number; the text makes equals the same each time.
        let next = wanting.max_by_key(|(kind, count)| (**count * 10_000 / (given(kind) + 1), format!("{kind:?}")));
        let Some((kind, _)) = next else { break };
        *targets.entry(kind.clone()).or_default() += 1;
    }
    targets
}

#[cfg(test)]
mod tests {
    use tiffin_types::vm::{EngineName, VmSize};

    use super::*;

    fn kind(mem_mb: u32) -> Kind {
        Kind {
            image: Digest::from_sha256([1; 32]),
            kernel: None,
            size: VmSize { cpus: 1, mem_mb, disk_mb: 1024 },
            engine: EngineName::Gvisor,
        }
    }

    fn given(counts: &[(u32, usize)], most: usize) -> Vec<(u32, usize)> {
        given_beside(&[], counts, most)
    }

    fn given_beside(keep: &[(u32, usize)], counts: &[(u32, usize)], most: usize) -> Vec<(u32, usize)> {
        let counts = counts.iter().map(|(mem_mb, count)| (kind(*mem_mb), *count)).collect();
        let keep: Vec<_> = keep.iter().map(|(mem_mb, count)| (kind(*mem_mb), *count)).collect();
        let mut given: Vec<_> =
            targets(&keep, &counts, most).into_iter().map(|(kind, count)| (kind.size.mem_mb, count)).collect();
        given.sort_unstable();
        given
    }

    #[test]
    fn as_many_are_ready_as_were_asked_for_within_the_bound() {
        assert_eq!(given(&[], 4), []);
        assert_eq!(given(&[(128, 2)], 4), [(128, 2)]);
        assert_eq!(given(&[(128, 9)], 4), [(128, 4)]);
        assert_eq!(given(&[(128, 9)], 0), []);
    }

    #[test]
    fn places_are_shared_by_how_often_each_was_asked_for() {
        assert_eq!(given(&[(128, 6), (256, 2)], 4), [(128, 3), (256, 1)]);
        assert_eq!(given(&[(128, 4), (256, 4)], 4), [(128, 2), (256, 2)]);
        assert_eq!(given(&[(128, 1), (256, 1), (512, 1)], 4), [(128, 1), (256, 1), (512, 1)]);
    }

    #[test]
    fn what_is_kept_comes_first_and_is_no_extra() {
        assert_eq!(given_beside(&[(128, 1)], &[(256, 9)], 3), [(128, 1), (256, 2)]);
        assert_eq!(given_beside(&[(128, 2)], &[(128, 1)], 4), [(128, 2)]);
        assert_eq!(given_beside(&[(128, 9)], &[(256, 9)], 3), [(128, 3)]);
    }

    #[test]
    fn what_nobody_asks_for_any_more_is_forgotten() {
        let mut demand = Demand::default();
        for _ in 0..5 {
            demand.note(&kind(128), 3);
        }
        assert_eq!(demand.counts(Duration::from_secs(3600)), HashMap::from([(kind(128), 3)]));
        assert!(demand.counts(Duration::ZERO).is_empty());
        demand.note(&kind(128), 3);
        demand.forget(&kind(128));
        assert!(demand.counts(Duration::from_secs(3600)).is_empty());
    }

    #[test]
    fn what_is_of_a_blob_goes_with_it_be_it_files_or_a_kernel() {
        let own = Kind { kernel: Some(Digest::from_sha256([2; 32])), ..kind(128) };
        for (blob, left) in [(1, 0), (2, 1), (3, 2)] {
            let mut demand = Demand::default();
            demand.note(&own, 3);
            demand.note(&kind(128), 3);
            demand.forget_blob(&Digest::from_sha256([blob; 32]));
            assert_eq!(demand.counts(Duration::from_secs(3600)).len(), left, "{blob}");
        }
    }

    #[test]
    fn memory_is_bounded_however_many_kinds_are_asked_for() {
        let mut demand = Demand::default();
        for mem_mb in 0..1000 {
            demand.note(&kind(mem_mb), 3);
        }
        let counts = demand.counts(Duration::from_secs(3600));
        assert_eq!(counts.len(), KINDS);
        assert!(counts.contains_key(&kind(999)));
    }
}
