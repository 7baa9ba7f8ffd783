//! What a run found: the figures with their goals, as a table and as JSON.

use serde::Serialize;

use super::{Bench, stats::Summary};
use crate::{failure::Failure, output};

/// A whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) environment: Environment,
    pub(super) scenarios: Vec<Scenario>,
}

/// Where it was measured.
#[derive(Debug, Serialize)]
pub(super) struct Environment {
    cores: usize,
    kernel: String,
    tiffin: &'static str,
    /// `runsc`'s version, or why it wasn't measured.
    runsc: String,
    quick: bool,
}

/// One scenario's findings.
#[derive(Debug, Serialize)]
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) seconds: f64,
    pub(super) samples: Vec<Summary>,
    pub(super) figures: Vec<Figure>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) notes: Vec<String>,
    /// Why it couldn't be measured, or what went wrong that must not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) failure: Option<String>,
}

/// A figure and what it should be at most.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Figure {
    name: String,
    unit: &'static str,
    /// `None` where it couldn't be measured.
    measured: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    goal_at_most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reached: Option<bool>,
}

impl Figure {
    /// A figure without a goal.
    pub(super) fn plain(name: impl Into<String>, unit: &'static str, measured: Option<f64>) -> Self {
        Self { name: name.into(), unit, measured, goal_at_most: None, reached: None }
    }

    /// A figure with its goal.
    pub(super) fn goal(name: impl Into<String>, unit: &'static str, measured: Option<f64>, at_most: f64) -> Self {
        let reached = measured.map(|measured| measured <= at_most);
        Self { goal_at_most: Some(at_most), reached, ..Self::plain(name, unit, measured) }
    }

    fn row(&self) -> Vec<String> {
        let verdict = match (self.goal_at_most, self.reached) {
            (None, _) => "",
            (Some(_), Some(true)) => "pass",
            (Some(_), Some(false)) => "MISS",
            (Some(_), None) => "not measured",
        };
        vec![
            self.name.clone(),
            self.measured.map(|measured| format!("{} {}", number(measured), self.unit)).unwrap_or_default(),
            self.goal_at_most.map(|goal| format!("<= {} {}", number(goal), self.unit)).unwrap_or_default(),
            verdict.to_owned(),
        ]
        .into_iter()
        .map(|cell| cell.trim_end().to_owned())
        .collect()
    }
}

impl Scenario {
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, seconds: 0.0, samples: Vec::new(), figures: Vec::new(), notes: Vec::new(), failure: None }
    }
}

impl Environment {
    pub(super) async fn read(bench: &Bench) -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let runsc = match &bench.raw {
            Ok(raw) => raw.version().to_owned(),
            Err(why) => format!("not measured: {why}"),
        };
        Self {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: kernel.trim().to_owned(),
            tiffin: env!("CARGO_PKG_VERSION"),
            runsc,
            quick: bench.quick,
        }
    }
}

impl Report {
    /// Prints the tables.
    pub(super) fn print(&self) -> Result<(), Failure> {
        let on = &self.environment;
        output::print(&format!(
            "{} cores, kernel {}, tiffin {}, runsc {}\n",
            on.cores, on.kernel, on.tiffin, on.runsc
        ))?;
        for scenario in &self.scenarios {
            output::print(&format!("\n{} ({:.1} s)\n", scenario.name, scenario.seconds))?;
            if !scenario.samples.is_empty() {
                let header = ["SAMPLES", "OK", "FAILED", "P50 MS", "P95 MS", "P99 MS"];
                output::table(&header, scenario.samples.iter().map(sample_row).collect())?;
            }
            if !scenario.figures.is_empty() {
                output::print("\n")?;
                let header = ["FIGURE", "MEASURED", "GOAL", "RESULT"];
                output::table(&header, scenario.figures.iter().map(Figure::row).collect())?;
            }
            for failure in scenario.samples.iter().flat_map(|sample| sample.failures.first()) {
                output::print(&format!("a try failed: {}\n", output::visible(failure)))?;
            }
            for note in &scenario.notes {
                output::print(&format!("note: {}\n", output::visible(note)))?;
            }
            if let Some(failure) = &scenario.failure {
                output::print(&format!("FAILED: {}\n", output::visible(failure)))?;
            }
        }
        Ok(())
    }
}

fn sample_row(sample: &Summary) -> Vec<String> {
    let time = |ms: Option<f64>| ms.map(number).unwrap_or_default();
    vec![
        sample.name.to_owned(),
        sample.count.to_string(),
        sample.failed.to_string(),
        time(sample.p50_ms),
        time(sample.p95_ms),
        time(sample.p99_ms),
    ]
}

/// Three digits that matter, whatever the size.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 || value.fract() == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_passes_misses_or_was_not_measured() {
        assert_eq!(Figure::goal("a", "", Some(1.3), 1.3).row(), ["a", "1.30", "<= 1.30", "pass"]);
        assert_eq!(Figure::goal("a", "ms", Some(3.01), 3.0).row(), ["a", "3.01 ms", "<= 3 ms", "MISS"]);
        assert_eq!(Figure::goal("a", "ms", None, 3.0).row(), ["a", "", "<= 3 ms", "not measured"]);
        assert_eq!(Figure::plain("a", "MB", Some(123.4)).row(), ["a", "123 MB", "", ""]);
    }
}
