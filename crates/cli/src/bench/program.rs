//! How fast a program's lines get into its log, the whole way: the program in its VM, the agent, the sandbox's output, the
//! monitor, the disk.
//!
//! The log's own numbers and times tell it: from the oldest line that is kept to the newest. The image is the caller's, as
//! the API takes no program but an image's.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tiffin_types::{id::VmId, time::Timestamp};

use super::{
    Bench, SCENARIO_LIMIT,
    report::{Figure, Scenario},
    stats::Samples,
};
use crate::output::field;

/// Lines that are kept a second, at least.
const LINES: f64 = 300_000.0;
/// How long a program may print.
const RUN_LIMIT: Duration = Duration::from_secs(120);
const LOOK: Duration = Duration::from_millis(200);
/// What a log says where lines weren't kept.
const MISSING: &str = "lines%20missing%3A";

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let image = bench.program_image.as_deref().context(
        "name an image with --program-image whose program prints as fast as it can and ends within two minutes",
    )?;
    let mut times = Samples::new("tiffin: 300,000 lines of a program");
    let deadline = Instant::now() + SCENARIO_LIMIT;
    let mut lines = 0;
    for _ in 0..bench.count(5, 1) {
        if Instant::now() > deadline {
            break;
        }
        bench.settle().await;
        let printed = once(bench, image).await;
        if let Ok((count, _)) = &printed {
            lines = *count;
        }
        times.note(printed.map(|(count, time)| time.mul_f64(LINES / count as f64)));
    }
    let mut scenario = Scenario::new("program");
    let a_second = times.p50().map(|millis| (LINES * 1e3 / millis).round());
    scenario.figures = vec![
        Figure::plain("a program's lines kept, a second, p50", "", a_second),
        Figure::goal("time to keep 300,000 of them, p50", "s", times.p50().map(|millis| millis / 1e3), 1.0),
    ];
    if times.p50().is_none() {
        scenario.failure = Some("no program's lines could be measured".to_owned());
    }
    scenario.notes.push(format!("{lines} lines between the oldest and the newest that are kept"));
    scenario.samples = vec![times.summary()];
    Ok(scenario)
}

/// Runs the program to its end: how many lines were kept, and in which time.
async fn once(bench: &Bench, image: &str) -> anyhow::Result<(u64, Duration)> {
    let cpus = bench.cpus();
    let id = bench.api.start_program(&json!({"imageId": image, "cpu": cpus, "memory": 512})).await?;
    let deadline = Instant::now() + RUN_LIMIT;
    while bench.api.program_state(&id).await? != "destroyed" {
        ensure!(Instant::now() < deadline, "the program of {image} goes on printing: one that ends is needed");
        tokio::time::sleep(LOOK).await;
    }
    let measured = kept(bench, &id).await;
    bench.api.forget(&id);
    measured
}

async fn kept(bench: &Bench, id: &VmId) -> anyhow::Result<(u64, Duration)> {
    let missing = bench.api.lines(id, &format!("query={MISSING}")).await?;
    if let Some(line) = missing.iter().find(|line| line["level"] == "warn") {
        bail!("the host lost lines: {}", field(line, "message"));
    }
    let (oldest, newest) =
        (bench.api.lines(id, "order=oldest_first").await?, bench.api.lines(id, "order=newest_first").await?);
    span(oldest.first().context("nothing was printed")?, newest.first().context("nothing was printed")?)
}

/// What lies between two lines.
fn span(oldest: &Value, newest: &Value) -> anyhow::Result<(u64, Duration)> {
    let read = |line: &Value| -> anyhow::Result<(u64, i64)> {
        let at: Timestamp = serde_json::from_value(line["at"].clone()).context("a line's time")?;
        Ok((line["id"].as_u64().context("a line's number")?, at.as_millis()))
    };
    let ((first, begun), (last, ended)) = (read(oldest)?, read(newest)?);
    let millis = u64::try_from(ended - begun).unwrap_or(0);
    ensure!(
        last > first && millis >= 200,
        "it printed for {millis} ms, which is too short to tell: an image whose program prints more is needed"
    );
    Ok((last - first, Duration::from_millis(millis)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted_and_timed_by_the_log_itself() {
        let line = |id: u64, at: &str| json!({"id": id, "at": at});
        let oldest = line(7, "2026-01-01T00:00:00.250Z");
        let (lines, time) = span(&oldest, &line(600_007, "2026-01-01T00:00:02.250Z")).unwrap();
        assert_eq!((lines, time), (600_000, Duration::from_secs(2)));
        assert!(span(&oldest, &line(8, "2026-01-01T00:00:00.260Z")).is_err());
        assert!(span(&oldest, &json!({"id": 9})).is_err());
    }
}
