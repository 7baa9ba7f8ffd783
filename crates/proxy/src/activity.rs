//! When something last happened on a client's connection, and how much is under way on it.
//!
//! Invariant: a connection on which nothing is under way ends after the idle time, one on which nothing moves after the
//! streams' time, whatever its protocol keeps alive.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// One connection's.
#[derive(Debug)]
pub(crate) struct Activity {
    began: Instant,
    last_ms: AtomicU64,
    open: AtomicUsize,
}

/// A request or a tunnel that is under way.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Activity>);

impl Activity {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), last_ms: AtomicU64::new(0), open: AtomicUsize::new(0) })
    }

    /// Something moved.
    pub(crate) fn touch(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// When something last moved.
    pub(crate) fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    /// Something begins.
    pub(crate) fn begin(self: &Arc<Self>) -> UnderWay {
        self.open.fetch_add(1, Ordering::Relaxed);
        self.touch();
        UnderWay(Arc::clone(self))
    }

    fn is_idle(&self) -> bool {
        self.open.load(Ordering::Relaxed) == 0
    }

    /// Returns when nothing has moved for `stream`, or for `idle` with nothing under way; the latter is `true`.
    pub(crate) async fn stale(&self, idle: Duration, stream: Duration) -> bool {
        loop {
            let limit = if self.is_idle() { idle } else { stream };
            let (due, now) = (self.last() + limit, Instant::now());
            if due <= now {
                return self.is_idle();
            }
            // What is under way may end meanwhile.
            sleep_until(due.min(now + idle)).await;
        }
    }
}

impl std::ops::Deref for UnderWay {
    type Target = Activity;
    fn deref(&self) -> &Activity {
        &self.0
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.touch();
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_with_nothing_under_way_is_stale_sooner_than_one_that_waits_for_something() {
        let (short, never) = (Duration::from_millis(10), Duration::from_secs(3600));
        let activity = Activity::new();
        assert!(activity.stale(short, never).await);
        let request = activity.begin();
        assert!(!activity.stale(never, short).await);
        let unfinished = tokio::time::timeout(5 * short, activity.stale(short, never)).await;
        assert!(unfinished.is_err(), "what is under way may take its time");
        drop(request);
        assert!(activity.stale(short, never).await);
    }
}
