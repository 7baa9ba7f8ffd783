//! A TypeScript program by `run-ts`, against `deno run` of the same program by `exec` in the same VM.

use std::time::Instant;

use super::{
    Bench, SCENARIO_LIMIT,
    report::{Figure, Scenario},
    stats::Samples,
};

const WARM_UP: usize = 3;
const GOAL_MS: f64 = 15.0;
const PROGRAM: &str = "console.log(2 + 2)";

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut scripts = Samples::new("tiffin: run-ts");
    let mut commands = Samples::new("tiffin: exec of deno run");
    let id = bench.api.create(bench.cpus(), 512).await?;
    bench.api.exec(&id, &format!("echo '{PROGRAM}' > /workspace/four.ts")).await?;
    let deadline = Instant::now() + SCENARIO_LIMIT;
    for round in 0..WARM_UP + bench.count(30, 3) {
        if Instant::now() > deadline {
            break;
        }
        let script = bench.api.run_ts(&id, PROGRAM).await;
        let command = bench.api.exec(&id, "exec deno run four.ts").await;
        if round >= WARM_UP {
            scripts.note(script);
            commands.note(command.map(|command| command.total));
        }
    }
    let mut scenario = Scenario::new("script");
    let more = scripts.p50().zip(commands.p50()).map(|(script, command)| script - command);
    scenario.figures = vec![Figure::goal("run-ts p50, beyond deno run", "ms", more, GOAL_MS)];
    if scripts.p50().is_none() {
        scenario.failure = Some("no program ran".to_owned());
    }
    scenario.samples = vec![scripts.summary(), commands.summary()];
    Ok(scenario)
}
