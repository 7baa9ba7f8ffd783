//! A command in a VM that runs, against `runsc exec`; and what of it is the platform's own share.

use std::time::Instant;

use super::{
    Bench, SCENARIO_LIMIT,
    report::{Figure, Scenario},
    stats::{Samples, ratio},
};

const WARM_UP: usize = 5;
const COMMAND: &str = "/bin/true";

pub(super) async fn run(bench: &Bench) -> anyhow::Result<Scenario> {
    let mut platform = Samples::new("tiffin: exec /bin/true");
    let mut share = Samples::new("of that, beyond the time in the guest");
    let mut login = Samples::new("runsc exec bash -lc /bin/true");
    let mut plain = Samples::new("runsc exec /bin/true");
    let id = bench.api.create(bench.cpus(), 256).await?;
    let raw = match &bench.raw {
        Ok(raw) => Some((raw, raw.start_idle().await?)),
        Err(_) => None,
    };
    let deadline = Instant::now() + SCENARIO_LIMIT;
    for round in 0..WARM_UP + bench.count(200, 10) {
        if Instant::now() > deadline {
            break;
        }
        let own = bench.api.exec(&id, COMMAND).await;
        let beside = match &raw {
            Some((raw, id)) => {
                Some((raw.exec(id, &["/bin/bash", "-lc", COMMAND]).await, raw.exec(id, &[COMMAND]).await))
            }
            None => None,
        };
        if round < WARM_UP {
            continue;
        }
        if let Ok(own) = &own
            && let Some(guest) = own.guest
        {
            share.note(Ok(own.total.saturating_sub(guest)));
        }
        platform.note(own.map(|own| own.total));
        if let Some((by_bash, by_itself)) = beside {
            login.note(by_bash);
            plain.note(by_itself);
        }
    }
    Ok(scenario(&platform, &share, raw.is_some().then_some((&login, &plain))))
}

fn scenario(platform: &Samples, share: &Samples, raw: Option<(&Samples, &Samples)>) -> Scenario {
    let mut scenario = Scenario::new("exec");
    let (login, plain) = (raw.and_then(|raw| raw.0.p50()), raw.and_then(|raw| raw.1.p50()));
    scenario.figures = vec![
        Figure::goal("p50, over runsc exec of bash -lc", "", ratio(platform.p50(), login), 0.5),
        Figure::goal("p50, over runsc exec of the program itself", "", ratio(platform.p50(), plain), 0.5),
        Figure::goal("the platform's share, p50", "ms", share.p50(), 3.0),
    ];
    if share.p50().is_none() {
        scenario.notes.push("the server doesn't tell the time in the guest (Server-Timing: guest)".to_owned());
    }
    if platform.p50().is_none() {
        scenario.failure = Some("no command succeeded".to_owned());
    }
    scenario.samples = vec![platform.summary(), share.summary()];
    scenario.samples.extend(raw.into_iter().flat_map(|(login, plain)| [login.summary(), plain.summary()]));
    scenario
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn without_a_single_success_the_scenario_fails() {
        let mut none = Samples::new("x");
        none.note(Err(anyhow::anyhow!("no")));
        assert!(scenario(&none, &Samples::new("y"), None).failure.is_some());
        let mut some = Samples::new("x");
        some.note(Ok(Duration::from_millis(4)));
        let told = scenario(&some, &Samples::new("y"), None);
        assert!(told.failure.is_none() && told.notes.len() == 1);
    }
}
