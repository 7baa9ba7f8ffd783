//! How slow an upload may be.
//!
//! Invariant: whoever brings too little over a stretch of time gives the place to somebody else, however steadily it comes. What
//! came is kept, so nothing is lost by it. Pure but for the clock that it is told.

use std::time::Duration;

use tokio::time::Instant;

use crate::{config::ImagesConfig, error::AppError};

/// A client that brings less than this in the time that a body may take has stalled.
const PROGRESS_BYTES: u64 = 256 << 10;

/// What came when.
pub(super) struct Pace {
    patience: Duration,
    least_per_s: u64,
    stretch: Duration,
    /// Since the last progress worth the name.
    mark: (Instant, u64),
    /// Since the stretch began.
    begun: (Instant, u64),
}

impl Pace {
    pub(super) fn new(config: &ImagesConfig, patience: Duration, now: Instant) -> Self {
        Self {
            patience,
            least_per_s: config.min_upload_bytes_per_s,
            stretch: config.upload_stretch,
            mark: (now, 0),
            begun: (now, 0),
        }
    }

    /// Until when the next piece must come.
    pub(super) fn deadline(&self) -> Instant {
        self.mark.0 + self.patience
    }

    /// So many bytes have come by now.
    pub(super) fn note(&mut self, received: u64, now: Instant) -> Result<(), AppError> {
        if received - self.mark.1 >= PROGRESS_BYTES {
            self.mark = (now, received);
        }
        let (since, before) = self.begun;
        let took = now.duration_since(since);
        if took < self.stretch {
            return Ok(());
        }
        let came = received - before;
        let due = self.least_per_s.saturating_mul(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)) / 1000;
        if came < due {
            return Err(AppError::TooSlow(format!(
                "the upload brought {came} bytes in {} s, which is less than {} a second, the least that is taken",
                took.as_secs(),
                self.least_per_s
            )));
        }
        self.begun = (now, received);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(least_per_s: u64) -> (Pace, Instant) {
        let now = Instant::now();
        let (patience, stretch) = (Duration::from_secs(30), Duration::from_secs(60));
        (Pace { patience, least_per_s, stretch, mark: (now, 0), begun: (now, 0) }, now)
    }

    #[test]
    fn a_burst_at_the_beginning_doesnt_pay_for_trickling_later() {
        let (mut pace, began) = pace(1000);
        let after = |seconds| began + Duration::from_secs(seconds);
        pace.note(10, after(59)).unwrap();
        pace.note(10_000_000, after(60)).unwrap();
        pace.note(10_000_010, after(100)).unwrap();
        let slow = pace.note(10_059_000, after(120)).unwrap_err().to_string();
        assert!(slow.contains("59000 bytes in 60 s") && slow.contains("1000 a second"), "{slow}");
    }

    #[test]
    fn one_that_keeps_to_it_goes_on_and_none_is_too_slow_where_nothing_is_asked() {
        let (mut steady, began) = pace(1000);
        let (mut free, free_began) = pace(0);
        for second in 1..1000 {
            let now = began + Duration::from_secs(second);
            steady.note(second * 1000, now).unwrap();
            free.note(second, now).unwrap();
        }
        assert!(steady.deadline() > began + Duration::from_secs(700));
        assert_eq!(free.deadline(), free_began + Duration::from_secs(30), "some bytes a second are a stall");
    }
}
