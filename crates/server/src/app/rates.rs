//! How often a caller may do what is costly, and an address send a wrong key.
//!
//! Each limit is a bucket that holds a minute's worth and fills evenly (GCRA, by the crate `governor`): of requests at the
//! same time exactly the limit pass. Callers are known by their key or user, so what they are is checked before;
//! wrong keys by the address they come from, IPv6 by its /64, which is what one customer gets.
//!
//! Attempts to log in are counted by the address, by the email from that address, and, loosely, by the email: so that
//! somebody else's attempts don't keep its owner out.
//!
//! Invariant: memory is bounded. A bucket that is full again is forgotten, and when too many names are known, those that
//! aren't share one bucket.

use std::{
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use governor::{
    Quota, RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::StateInformationMiddleware,
    nanos::Nanos,
    state::{
        StateStore,
        keyed::{DashMapStateStore, ShrinkableKeyedStateStore},
    },
};

use crate::{config::RateConfig, error::AppError};

/// Every so many requests what can be forgotten is.
const TIDY_EVERY: u32 = 256;
/// So many buckets are kept of one limit; whoever is new then shares one.
const BUCKETS: usize = 10_000;

/// What is limited for each caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limited {
    /// `POST /v1/vms`, and what makes VMs or copies of them
    VmCreate,
    /// `exec` and `terminal`
    Exec,
    /// `run-ts` and `run-js`
    Run,
    /// `files/upload`, and writing a file
    Upload,
    /// `files/download`, and reading files and folders
    Download,
    /// `POST /v1/image/import`
    Import,
}

/// How a caller stands after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Requests a minute.
    pub(crate) limit: u32,
    /// How many may be made now.
    pub(crate) remaining: u32,
    /// Seconds until all of them may be made; when none may be made now, until one may.
    pub(crate) reset_s: u32,
    /// Whether this one may go on.
    pub(crate) allowed: bool,
}

/// Every limit.
pub(crate) struct Rates {
    vm_create: Option<Buckets>,
    exec: Option<Buckets>,
    run: Option<Buckets>,
    upload: Option<Buckets>,
    download: Option<Buckets>,
    import: Option<Buckets>,
    wrong_keys: Option<Buckets>,
    logins_by_both: Option<Buckets>,
    logins_by_email: Option<Buckets>,
    logins_by_address: Option<Buckets>,
}

impl Rates {
    pub(super) fn new(config: &RateConfig) -> Self {
        Self {
            vm_create: Buckets::per_minute(config.vm_create),
            exec: Buckets::per_minute(config.exec),
            run: Buckets::per_minute(config.run),
            upload: Buckets::per_minute(config.upload),
            download: Buckets::per_minute(config.download),
            import: Buckets::per_minute(config.import),
            wrong_keys: Buckets::per_minute(config.auth_failures),
            logins_by_both: Buckets::per_minute(config.login),
            logins_by_email: Buckets::per_minute(config.login_email),
            logins_by_address: Buckets::per_minute(config.login_address),
        }
    }

    /// Counts a request of that caller; `None` where it isn't limited.
    pub(crate) fn take(&self, what: Limited, caller: &str) -> Option<Standing> {
        let buckets = match what {
            Limited::VmCreate => &self.vm_create,
            Limited::Exec => &self.exec,
            Limited::Run => &self.run,
            Limited::Upload => &self.upload,
            Limited::Download => &self.download,
            Limited::Import => &self.import,
        };
        Some(buckets.as_ref()?.take(caller))
    }

    /// Counts a wrong key from an address; refuses when there were too many.
    pub(crate) fn wrong_key(&self, peer: Option<IpAddr>) -> Result<(), AppError> {
        refuse("an address may send wrong API keys", self.wrong_keys.as_ref(), &address(peer))
    }

    /// Counts a request of somebody unknown from an address, such as an attempt to log in.
    pub(crate) fn attempt(&self, peer: Option<IpAddr>) -> Result<(), AppError> {
        refuse("an address may try to log in", self.logins_by_address.as_ref(), &address(peer))
    }

    /// Counts an attempt to log in with an email.
    pub(crate) fn login(&self, email: &str, peer: Option<IpAddr>) -> Result<(), AppError> {
        let both = format!("{} {email}", address(peer));
        refuse("an address may try to log in with an email", self.logins_by_both.as_ref(), &both)?;
        // Only what its own address may still try counts against everybody.
        refuse("all may try to log in with an email", self.logins_by_email.as_ref(), email)
    }
}

fn refuse(what: &'static str, buckets: Option<&Buckets>, who: &str) -> Result<(), AppError> {
    match buckets.map(|buckets| buckets.take(who)) {
        Some(standing) if !standing.allowed => Err(standing.refusal(what)),
        Some(_) | None => Ok(()),
    }
}

impl Limited {
    /// As an error calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Limited::VmCreate => "a key may create VMs",
            Limited::Exec => "a key may run commands",
            Limited::Run => "a key may run scripts",
            Limited::Upload => "a key may upload files",
            Limited::Download => "a key may download files",
            Limited::Import => "a key may import images",
        }
    }
}

impl Standing {
    /// The answer to a request that may not go on.
    pub(crate) fn refusal(self, what: &'static str) -> AppError {
        AppError::RateLimited { what, per_minute: self.limit, retry_s: self.reset_s }
    }
}

/// The name that an address is counted under.
fn address(peer: Option<IpAddr>) -> String {
    match peer {
        Some(IpAddr::V4(address)) => address.to_string(),
        Some(IpAddr::V6(address)) => address.segments()[..4].iter().map(|part| format!("{part:x}:")).collect(),
        None => "unknown".into(),
    }
}

/// The buckets of one limit by name, shared so that one can be looked for without making it.
#[derive(Clone, Default)]
struct Table(Arc<DashMapStateStore<String>>);

impl StateStore for Table {
    type Key = String;

    fn measure_and_replace<T, F, E>(&self, key: &String, f: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        self.0.measure_and_replace(key, f)
    }
}

impl ShrinkableKeyedStateStore<String> for Table {
    fn retain_recent(&self, drop_below: Nanos) {
        self.0.retain_recent(drop_below);
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// One limit: a bucket for each caller or address.
struct Buckets {
    table: Table,
    limiter: RateLimiter<String, Table, DefaultClock, StateInformationMiddleware>,
    clock: DefaultClock,
    limit: NonZeroU32,
    taken: AtomicU32,
    crowded: AtomicBool,
}

impl Buckets {
    /// `None` when there is no limit.
    fn per_minute(limit: u32) -> Option<Self> {
        let limit = NonZeroU32::new(limit)?;
        let (table, clock) = (Table::default(), DefaultClock::default());
        Some(Self {
            limiter: RateLimiter::new(Quota::per_minute(limit), table.clone(), clock.clone()),
            table,
            clock,
            limit,
            taken: AtomicU32::new(0),
            crowded: AtomicBool::new(false),
        })
    }

    fn take(&self, who: &str) -> Standing {
        if self.taken.fetch_add(1, Ordering::Relaxed) % TIDY_EVERY == TIDY_EVERY - 1 {
            self.limiter.retain_recent();
            self.crowded.store(self.limiter.len() > BUCKETS, Ordering::Relaxed);
        }
        let limit = self.limit.get();
        let mut who = who.to_owned();
        if self.crowded.load(Ordering::Relaxed) && !self.table.0.contains_key(&who) {
            who = "everybody else".to_owned();
        }
        match self.limiter.check_key(&who) {
            Ok(left) => {
                let remaining = left.remaining_burst_capacity();
                let missing = u64::from(limit.saturating_sub(remaining));
                let reset_s =
                    if remaining == 0 { 60_u64.div_ceil(limit.into()) } else { (missing * 60).div_ceil(limit.into()) };
                let reset_s = u32::try_from(reset_s).unwrap_or(60);
                Standing { limit, remaining, reset_s, allowed: true }
            }
            Err(until) => {
                let wait = until.wait_time_from(self.clock.now());
                let reset_s = u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(60).max(1);
                Standing { limit, remaining: 0, reset_s, allowed: false }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn of_requests_at_once_exactly_the_limit_pass_and_callers_do_not_share() {
        let buckets = Buckets::per_minute(5).unwrap();
        let began = Instant::now();
        let passed: u64 = std::thread::scope(|scope| {
            let all: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| (0..50).filter(|_| buckets.take("key-a").allowed).count() as u64))
                .collect();
            all.into_iter().map(|one| one.join().unwrap()).sum()
        });
        // One comes back every twelve seconds.
        let back = began.elapsed().as_secs() / 12;
        assert!((5..=5 + back).contains(&passed), "{passed}");
        assert_eq!(buckets.take("key-b").remaining, 4);
    }

    #[test]
    fn a_standing_says_how_many_are_left_and_when_more_may_be_made() {
        let buckets = Buckets::per_minute(2).unwrap();
        assert_eq!(buckets.take("a"), Standing { limit: 2, remaining: 1, reset_s: 30, allowed: true });
        assert_eq!(buckets.take("a"), Standing { limit: 2, remaining: 0, reset_s: 30, allowed: true });
        let refused = buckets.take("a");
        assert!(!refused.allowed && (1..=30).contains(&refused.reset_s), "{refused:?}");
        assert!(Buckets::per_minute(0).is_none());
    }

    #[test]
    fn no_number_of_addresses_takes_more_than_the_bound() {
        let buckets = Buckets::per_minute(1).unwrap();
        for number in 0..3 * BUCKETS {
            buckets.take(&number.to_string());
        }
        assert!(buckets.limiter.len() <= BUCKETS + TIDY_EVERY as usize + 1, "{}", buckets.limiter.len());
        assert!(!buckets.take("new").allowed);
    }

    #[test]
    fn who_is_known_keeps_a_bucket_when_the_table_is_crowded() {
        let buckets = Buckets::per_minute(2).unwrap();
        assert!(buckets.take("known").allowed);
        for number in 0..BUCKETS + 2 * TIDY_EVERY as usize {
            buckets.take(&number.to_string());
        }
        assert!(!buckets.take("new").allowed, "whoever is new shares a bucket, and it is empty");
        assert!(buckets.take("known").allowed);
    }

    #[test]
    fn attempts_with_an_email_are_counted_by_its_address_first_and_loosely_by_all() {
        let mut config = crate::Config::load(None, std::iter::empty(), &[]).unwrap().rate;
        (config.login, config.login_email) = (2, 3);
        let rates = Rates::new(&config);
        let from = |last: u8, email: &str| rates.login(email, Some(IpAddr::from([192, 0, 2, last]))).is_ok();
        assert_eq!([(); 4].map(|()| from(1, "a@b")), [true, true, false, false]);
        assert!(from(2, "a@b"), "what one address may no longer try doesn't count against others");
        assert!(!from(3, "a@b"), "all together may try so often");
        assert!(from(3, "c@d"));
    }

    #[test]
    fn an_address_of_ipv6_counts_by_its_network() {
        let counted = |text: &str| address(Some(text.parse().unwrap()));
        assert_eq!(counted("2001:db8:1:2::7"), counted("2001:db8:1:2:ffff::1"));
        assert_ne!(counted("2001:db8:1:2::7"), counted("2001:db8:1:3::7"));
        assert_ne!(counted("192.0.2.1"), counted("192.0.2.2"));
    }
}
