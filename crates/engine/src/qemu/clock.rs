//! The rate of the host's time stamp counter, which is the clock of an emulated machine's guest.
//!
//! An emulated processor's counter is the host's. What the guest takes its rate for decides how fast its clock goes, and a busy
//! host is too slow for a guest to measure it by. So it is measured here, against the host's own clock, while a VM's other
//! parts are prepared. (`/proc/cpuinfo` tells a processor's rate of the moment, which isn't the counter's.)

use std::{
    fs,
    time::{Duration, Instant},
};

/// What the host's processors have if their counters go on at one rate, whatever they do.
const STEADY: [&str; 2] = ["constant_tsc", "nonstop_tsc"];

/// Between two looks at least. A look is off by some hundred nanoseconds at most: a guest's clock by a second in a day.
const APART: Duration = Duration::from_millis(20);

/// Of so many looks the one that was least disturbed counts.
const LOOKS: usize = 8;

/// The counter at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    at: Instant,
    ticks: u64,
}

impl Look {
    /// Looks at the counter; none where it isn't steady.
    pub fn now() -> Option<Self> {
        is_steady(&fs::read_to_string("/proc/cpuinfo").ok()?).then(Self::least_disturbed)?
    }

    /// The rate since this look in kHz; waits until it was long enough ago.
    pub fn khz(self) -> Option<u64> {
        std::thread::sleep(APART.saturating_sub(self.at.elapsed()));
        let now = Self::least_disturbed()?;
        let nanos = u64::try_from(now.at.duration_since(self.at).as_nanos()).ok()?;
        let ticks = u128::from(now.ticks.checked_sub(self.ticks)?);
        u64::try_from((ticks * 1_000_000 + u128::from(nanos / 2)) / u128::from(nanos)).ok().filter(|khz| *khz > 0)
    }

    fn least_disturbed() -> Option<Self> {
        let looks = (0..LOOKS).filter_map(|_| {
            let before = Instant::now();
            let ticks = ticks()?;
            Some((before.elapsed(), Self { at: before, ticks }))
        });
        looks.min_by_key(|(took, _)| *took).map(|(took, look)| Self { at: look.at + took / 2, ..look })
    }
}

fn is_steady(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':')).map(|(_, flags)| flags);
    let flags: Vec<&str> = flags.unwrap_or_default().split_whitespace().collect();
    STEADY.iter().all(|needed| flags.contains(needed))
}

#[cfg(target_arch = "x86_64")]
fn ticks() -> Option<u64> {
    // SAFETY: every x86-64 processor has the counter, and Linux lets programs read it.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_counts_where_it_goes_on_at_one_rate() {
        let flags = |words: &str| format!("processor\t: 0\nflags\t\t: fpu {words} msr\nbugs\t\t:\n");
        assert!(is_steady(&flags("constant_tsc x nonstop_tsc")));
        assert!(!is_steady(&flags("constant_tsc")));
        assert!(!is_steady("processor\t: 0\n"));
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn two_measurements_agree() {
        let (Some(one), Some(other)) = (Look::least_disturbed(), Look::least_disturbed()) else {
            panic!("no counter");
        };
        let (one, other) = (one.khz().unwrap(), other.khz().unwrap());
        assert!(one.abs_diff(other) * 1000 < one, "{one} and {other} kHz");
    }
}
