//! Many creates at once: each must succeed or be refused with 429 or 503, and after deleting nothing may be left.

use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::{
    Bench, host,
    report::{Figure, Scenario},
    stats::Samples,
};
use crate::failure::Failure;

/// How long the host has to be clean after the last delete was answered.
const CLEAN_LIMIT: Duration = Duration::from_secs(15);

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let before = bench.api.list().await?;
    let server = bench.api.port().and_then(host::listener);
    let on_host = || (server.and_then(host::open_files), host::network_namespaces());
    let (files_before, namespaces_before) = on_host();
    let count = bench.count(100, 10);
    let creates = (0..count).map(|_| async {
        let start = Instant::now();
        (bench.api.create(1, 128).await, start.elapsed())
    });
    let mut scenario = Scenario::new("burst");
    let mut samples = Samples::new("tiffin: create, all at once");
    let (mut refused, mut failed, mut ids) = (0, 0, Vec::new());
    for (created, took) in join_all(creates).await {
        match created {
            Ok(id) => {
                samples.note(Ok(took));
                ids.push(id);
            }
            Err(Failure::Api(error)) if matches!(error.status, 429 | 503) => {
                refused += 1;
                if error.retry_after.is_none() {
                    scenario.notes.push(format!("a {} came without Retry-After", error.status));
                }
            }
            Err(failure) => {
                failed += 1;
                samples.note(Err(failure.into()));
            }
        }
    }
    scenario.notes.truncate(3);
    let undeleted = bench.api.delete_all().await;
    let listed = bench.api.list().await?.difference(&before).count();
    let left = host::wait_until_clean(&ids, CLEAN_LIMIT).await;
    let (files, namespaces) = on_host();
    let more = |now: usize, before: usize| now as f64 - before as f64;
    scenario.figures = vec![
        Figure::plain("creates at once", "", Some(count as f64)),
        Figure::plain("created", "", Some(ids.len() as f64)),
        Figure::plain("refused with 429 or 503", "", Some(f64::from(refused))),
        Figure::goal("failed otherwise", "", Some(f64::from(failed)), 0.0),
        Figure::goal("deletes that failed", "", Some(undeleted as f64), 0.0),
        Figure::goal("VMs still listed", "", Some(listed as f64), 0.0),
        Figure::goal("leftovers on the host", "", Some(left.len() as f64), 0.0),
        Figure::plain("network namespaces, more than before", "", Some(more(namespaces, namespaces_before))),
        Figure::plain(
            "the server's open files, more than before",
            "",
            files.zip(files_before).map(|(now, before)| more(now, before)),
        ),
    ];
    if failed > 0 || undeleted > 0 || listed > 0 || !left.is_empty() {
        scenario.failure = Some("a create or delete failed, or something was left behind".to_owned());
        scenario.notes.extend(left.into_iter().take(5).map(|trace| format!("left behind: {trace}")));
    }
    scenario.samples = vec![samples.summary()];
    Ok(scenario)
}
