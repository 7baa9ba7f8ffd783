//! Samples and what is said of them. Percentiles are by nearest rank: each is a time that was really measured.

use std::time::Duration;

use serde::Serialize;

/// Times of one thing done many times, in milliseconds.
#[derive(Debug, Clone)]
pub(super) struct Samples {
    name: &'static str,
    times: Vec<f64>,
    failures: Vec<String>,
}

/// What is reported of [`Samples`]. Times in milliseconds.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Summary {
    pub(super) name: &'static str,
    pub(super) count: usize,
    pub(super) failed: usize,
    /// Of all tries, how many succeeded, 0 to 1.
    pub(super) success_rate: f64,
    pub(super) p50_ms: Option<f64>,
    pub(super) p95_ms: Option<f64>,
    pub(super) p99_ms: Option<f64>,
    /// The first few failures' texts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) failures: Vec<String>,
}

impl Samples {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, times: Vec::new(), failures: Vec::new() }
    }

    /// Notes a success with its time, or a failure.
    pub(super) fn note(&mut self, outcome: anyhow::Result<Duration>) {
        match outcome {
            Ok(time) => self.times.push(time.as_secs_f64() * 1e3),
            Err(error) => self.failures.push(format!("{error:#}")),
        }
    }

    /// The time below which `percent` of the samples lie, in milliseconds; `None` where there are no samples.
    pub(super) fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.times.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    pub(super) fn p50(&self) -> Option<f64> {
        self.percentile(50)
    }

    pub(super) fn summary(&self) -> Summary {
        let (count, failed) = (self.times.len(), self.failures.len());
        Summary {
            name: self.name,
            count,
            failed,
            success_rate: if count + failed == 0 { 0.0 } else { count as f64 / (count + failed) as f64 },
            p50_ms: self.percentile(50),
            p95_ms: self.percentile(95),
            p99_ms: self.percentile(99),
            failures: self.failures.iter().take(3).cloned().collect(),
        }
    }
}

/// `a` over `b`, where there are both.
pub(super) fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a? / b.filter(|b| *b > 0.0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(times: impl IntoIterator<Item = u64>) -> Samples {
        let mut samples = Samples::new("x");
        times.into_iter().for_each(|ms| samples.note(Ok(Duration::from_millis(ms))));
        samples
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let five = samples([35, 20, 15, 50, 40]);
        assert_eq!([5, 30, 40, 50, 100].map(|p| five.percentile(p).unwrap()), [15.0, 20.0, 20.0, 35.0, 50.0]);
        let hundred = samples(1..=100);
        assert_eq!([50, 95, 99].map(|p| hundred.percentile(p).unwrap()), [50.0, 95.0, 99.0]);
        assert_eq!(samples([]).percentile(50), None);
        assert_eq!(samples([7]).percentile(99), Some(7.0));
    }

    #[test]
    fn failures_count_against_the_success_rate_and_not_in_the_times() {
        let mut three = samples([1, 2, 3]);
        three.note(Err(anyhow::anyhow!("no")));
        let summary = three.summary();
        assert_eq!((summary.count, summary.failed, summary.success_rate), (3, 1, 0.75));
        assert_eq!(summary.failures, ["no"]);
    }

    #[test]
    fn a_ratio_needs_both_sides() {
        assert_eq!(ratio(Some(3.0), Some(2.0)), Some(1.5));
        assert_eq!((ratio(None, Some(1.0)), ratio(Some(1.0), None), ratio(Some(1.0), Some(0.0))), (None, None, None));
    }
}
