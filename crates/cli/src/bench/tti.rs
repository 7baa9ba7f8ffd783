//! Time to the first interaction: from asking for a new VM to a command's first output, against `runsc run` of the
//! same command on the same image. Nothing is warm: each VM is new and is deleted afterwards.

use std::time::{Duration, Instant};

use super::{
    Bench, SCENARIO_LIMIT,
    raw::Network,
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};

const WARM_UP: usize = 2;
const GOAL: f64 = 1.3;

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut platform = Samples::new("tiffin: create and echo hi");
    let mut create = Samples::new("of that, create");
    let mut closed = Samples::new("runsc run, no network");
    let mut networked = Samples::new("runsc run, own network namespace");
    let deadline = Instant::now() + SCENARIO_LIMIT;
    for round in 0..WARM_UP + bench.count(30, 3) {
        if Instant::now() > deadline {
            break;
        }
        bench.settle().await;
        let own = once(bench).await;
        let raw = match &bench.raw {
            Ok(raw) => {
                bench.settle().await;
                let without = raw.first_output(Network::None).await;
                bench.settle().await;
                Some((without, raw.first_output(Network::Own).await))
            }
            Err(_) => None,
        };
        if round >= WARM_UP {
            if let Ok((_, created)) = &own {
                create.note(Ok(*created));
            }
            platform.note(own.map(|(whole, _)| whole));
            if let Some((without, with)) = raw {
                closed.note(without);
                networked.note(with);
            }
        }
    }
    let mut scenario = Scenario::new("tti");
    scenario.figures = vec![
        Figure::goal("p50, over runsc run without network", "", ratio(platform.p50(), closed.p50()), GOAL),
        Figure::goal("p50, over runsc run with a network namespace", "", ratio(platform.p50(), networked.p50()), GOAL),
        Figure::plain(
            "p95, over runsc run with a network namespace",
            "",
            ratio(platform.percentile(95), networked.percentile(95)),
        ),
    ];
    if platform.p50().is_none() {
        scenario.failure = Some("no VM came up".to_owned());
    }
    scenario.samples = vec![platform.summary(), create.summary()];
    if bench.raw.is_ok() {
        scenario.samples.extend([closed.summary(), networked.summary()]);
    }
    Ok(scenario)
}

/// The time to the first output, and of that the time to the VM.
async fn once(bench: &Bench) -> anyhow::Result<(Duration, Duration)> {
    let start = Instant::now();
    let id = bench.api.create(bench.cpus(), 256).await?;
    let created = start.elapsed();
    let output = bench.api.first_output(&id, "echo hi").await;
    let time = start.elapsed();
    bench.api.delete(&id).await?;
    output.map(|()| (time, created))
}
