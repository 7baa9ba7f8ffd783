//! Saving a VM and going on from what was saved, against the engine's own `checkpoint` and `restore` of a container that
//! does as little. The platform's save has the disk in it as well, its restore the network, the disk and the identity.

use std::time::{Duration, Instant};

use super::{
    Bench, SCENARIO_LIMIT,
    raw::Raw,
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};

const WARM_UP: usize = 2;
const GOAL: f64 = 1.2;

struct Found {
    save: Samples,
    pause: Samples,
    restore: Samples,
    raw_save: Samples,
    raw_restore: Samples,
}

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut found = Found {
        save: Samples::new("tiffin: save"),
        pause: Samples::new("of that, the VM stood still"),
        restore: Samples::new("tiffin: create from it and echo hi"),
        raw_save: Samples::new("runsc checkpoint --leave-running"),
        raw_restore: Samples::new("runsc restore and exec bash -lc 'echo hi'"),
    };
    let id = bench.api.create(bench.cpus(), 256).await?;
    let raw = match &bench.raw {
        Ok(raw) => Some((raw, raw.start_idle().await?)),
        Err(_) => None,
    };
    let deadline = Instant::now() + SCENARIO_LIMIT;
    for round in 0..WARM_UP + bench.count(20, 3) {
        if Instant::now() > deadline {
            break;
        }
        bench.settle().await;
        let own = platform(bench, &id).await;
        bench.settle().await;
        let beside = match &raw {
            Some((raw, id)) => Some(engine(raw, id).await),
            None => None,
        };
        if round >= WARM_UP {
            found.note(own, beside);
        }
    }
    Ok(found.scenario(raw.is_some()))
}

/// The time of a save, of the standstill in it, and of a create from it with a first output.
async fn platform(
    bench: &Bench,
    id: &tiffin_types::id::VmId,
) -> anyhow::Result<(Duration, Option<Duration>, Duration)> {
    let start = Instant::now();
    let (snapshot, pause) = bench.api.snapshot(id).await?;
    let saved = start.elapsed();
    bench.settle().await;
    let start = Instant::now();
    let clone = bench.api.restore(bench.cpus(), 256, &snapshot).await?;
    let output = bench.api.first_output(&clone, "echo hi").await;
    let restored = start.elapsed();
    bench.api.delete(&clone).await?;
    bench.api.snapshot_delete(&snapshot).await?;
    output.map(|()| (saved, pause, restored))
}

async fn engine(raw: &Raw, id: &str) -> anyhow::Result<(Duration, Duration)> {
    let (image, saved) = raw.checkpoint(id).await?;
    let restored = raw.restore(&image).await;
    std::fs::remove_dir_all(&image)?;
    restored.map(|restored| (saved, restored))
}

impl Found {
    fn note(
        &mut self,
        own: anyhow::Result<(Duration, Option<Duration>, Duration)>,
        beside: Option<anyhow::Result<(Duration, Duration)>>,
    ) {
        match own {
            Ok((saved, pause, restored)) => {
                self.save.note(Ok(saved));
                self.restore.note(Ok(restored));
                if let Some(pause) = pause {
                    self.pause.note(Ok(pause));
                }
            }
            Err(error) => self.save.note(Err(error)),
        }
        match beside {
            Some(Ok((saved, restored))) => {
                self.raw_save.note(Ok(saved));
                self.raw_restore.note(Ok(restored));
            }
            Some(Err(error)) => self.raw_save.note(Err(error)),
            None => {}
        }
    }

    fn scenario(&self, with_raw: bool) -> Scenario {
        let mut scenario = Scenario::new("snapshot");
        let over = |own: &Samples, raw: &Samples| ratio(own.p50(), raw.p50());
        scenario.figures = vec![
            Figure::goal("standstill p50, over runsc checkpoint", "", over(&self.pause, &self.raw_save), GOAL),
            Figure::plain("save p50, over runsc checkpoint", "", over(&self.save, &self.raw_save)),
            Figure::goal(
                "restore to first output p50, over runsc restore and exec",
                "",
                over(&self.restore, &self.raw_restore),
                GOAL,
            ),
        ];
        if self.restore.p50().is_none() {
            scenario.failure = Some("nothing could be saved and restored".to_owned());
        }
        scenario.samples = vec![self.save.summary(), self.pause.summary(), self.restore.summary()];
        if with_raw {
            scenario.samples.extend([self.raw_save.summary(), self.raw_restore.summary()]);
        }
        scenario
    }
}
