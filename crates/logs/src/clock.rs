//! The times of lines: they don't go back within a segment.

/// How far the clock may go back without the log following it: what a time daemon corrects.
const STEP_BACK_MS: i64 = 10_000;

/// Gives each line its time.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    last_ms: Option<i64>,
}

/// The time of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) at_ms: i64,
    /// The clock was set back by so much that the log follows it: a new segment begins.
    pub(crate) is_jump: bool,
}

impl Clock {
    /// Goes on after the newest line of a log.
    pub(crate) fn after(last_ms: Option<i64>) -> Self {
        Self { last_ms }
    }

    /// The time of a line that is printed at `now_ms`: a clock that went back a little stands still instead.
    pub(crate) fn stamp(&mut self, now_ms: i64) -> Stamp {
        let stamp = match self.last_ms {
            Some(last) if now_ms < last && last - now_ms <= STEP_BACK_MS => Stamp { at_ms: last, is_jump: false },
            Some(last) => Stamp { at_ms: now_ms, is_jump: now_ms < last },
            None => Stamp { at_ms: now_ms, is_jump: false },
        };
        self.last_ms = Some(stamp.at_ms);
        stamp
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_steps_back_are_held_and_large_ones_followed() {
        let mut clock = Clock::default();
        let stamps = [100_000, 99_500, 100_001, 20_000, 20_001].map(|now| clock.stamp(now));
        assert_eq!(stamps.map(|stamp| stamp.at_ms), [100_000, 100_000, 100_001, 20_000, 20_001]);
        assert_eq!(stamps.map(|stamp| stamp.is_jump), [false, false, false, true, false]);
    }
}
