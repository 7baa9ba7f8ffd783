//! Time to the first interaction where a VM of the size is ready: from asking for one to a command's first output. Each
//! round waits until the server says that its pool is filled, as it is between a user's creates.

use std::time::{Duration, Instant};

use anyhow::Context;

use super::{
    Bench, SCENARIO_LIMIT,
    report::{Figure, Scenario},
    stats::Samples,
};

const WARM_UP: usize = 2;
const P50_MS: f64 = 20.0;
const P99_MS: f64 = 60.0;
/// How long the pool may take to be filled.
const FILL_LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);
const MEM_MB: u32 = 256;

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut whole = Samples::new("tiffin: create from the pool and echo hi");
    let mut create = Samples::new("of that, create");
    let deadline = Instant::now() + SCENARIO_LIMIT;
    // The first create of a size is what tells the pool of it.
    once(bench).await?;
    let hits = claims(bench).await?;
    let mut rounds = 0;
    for round in 0..WARM_UP + bench.count(100, 3) {
        if Instant::now() > deadline {
            break;
        }
        filled(bench).await?;
        bench.settle().await;
        let own = once(bench).await;
        rounds += 1;
        if round >= WARM_UP {
            if let Ok((_, created)) = &own {
                create.note(Ok(*created));
            }
            whole.note(own.map(|(whole, _)| whole));
        }
    }
    let hits = claims(bench).await? - hits;
    let mut scenario = Scenario::new("pool");
    scenario.figures = vec![
        Figure::goal("create to first output p50", "ms", whole.p50(), P50_MS),
        Figure::goal("create to first output p99", "ms", whole.percentile(99), P99_MS),
        Figure::plain("creates that the pool served, of all", "", Some(hits / f64::from(rounds))),
    ];
    if whole.p50().is_none() {
        scenario.failure = Some("no VM came up".to_owned());
    }
    scenario.samples = vec![whole.summary(), create.summary()];
    Ok(scenario)
}

/// The time to the first output, and of that the time to the VM.
async fn once(bench: &Bench) -> anyhow::Result<(Duration, Duration)> {
    let start = Instant::now();
    let id = bench.api.create(bench.cpus(), MEM_MB).await?;
    let created = start.elapsed();
    let output = bench.api.first_output(&id, "echo hi").await;
    let time = start.elapsed();
    bench.api.delete(&id).await?;
    output.map(|()| (time, created))
}

async fn filled(bench: &Bench) -> anyhow::Result<()> {
    let deadline = Instant::now() + FILL_LIMIT;
    while bench.api.metric("tiffin_pool_vms").await? < 1.0 {
        anyhow::ensure!(
            Instant::now() < deadline,
            "no VM was booted ahead within {} s: is the server's setting pool.max_vms 0?",
            FILL_LIMIT.as_secs()
        );
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Creates that the pool has served since the server started.
async fn claims(bench: &Bench) -> anyhow::Result<f64> {
    bench.api.metric("tiffin_pool_claims_total{outcome=\"hit\"}").await.context("the pool's claims")
}
