//! Becoming another guest: after a restore, when a VM out of a pool is claimed, when what it may reach changes.
//!
//! Invariants
//! * Nothing is done unless all of the request makes sense.
//! * It can be repeated: the same request again changes nothing. Since the old token no longer works by then, who asks
//!   again after a lost answer asks with the new one.
//! * Once it is answered, the new identity alone holds, for new connections and for commands that start; connections that
//!   an older token let in are ended ([`crate::callers`]), and with them the commands that run for their callers.
//!
//! What could not be set becomes a line on standard error, as at boot: the guest may have spoilt its own files, and must
//! not keep itself from being renewed by it. The answer tells the clock, which a kernel may refuse to set (gVisor takes
//! the host's time): the host sees by it what holds.
//!
//! Whoever stays who it is (the same token, name and addresses, no new machine id) only learns its resolvers and the time: that is
//! what a change of policy comes to, and a machine's going on after it stood still.
//!
//! It deliberately leaves alone whatever else runs (a restore goes on where the snapshot was taken, a change of policy is not
//! the commands' business) and the guest's size: `cpus` and `max_pids` stay as at boot.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use tiffin_protocol::{Failure, FailureCode, Renew};

use crate::guest;
use crate::request::failure;

/// The longest seed, in bytes.
const MAX_SEED: usize = 4096;

/// Digits of a machine id.
const MACHINE_ID: usize = 32;

/// The longest host name that a kernel takes.
const MAX_HOSTNAME: usize = 64;

/// A clock that is less off than this is left alone: the request has been on its way, too.
const TOLERANCE: Duration = Duration::from_millis(500);

/// Has Linux use what was mixed in from the next read on, not within the minute: `_IO('R', 7)`.
const RESEED: libc::c_ulong = 0x5207;

/// A request that makes sense, ready to be done.
#[derive(Debug, PartialEq, Eq)]
pub struct Renewal<'a> {
    renew: &'a Renew,
    seed: Vec<u8>,
    clock: Duration,
}

impl<'a> Renewal<'a> {
    /// Judges `renew`. Pure.
    ///
    /// # Errors
    /// `BadRequest`, naming the field.
    pub fn of(renew: &'a Renew) -> Result<Self, Failure> {
        let boot = &renew.boot;
        if boot.token.is_empty() {
            return Err(bad("token", "must not be empty"));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
        if !(1..=MAX_HOSTNAME).contains(&boot.hostname.len()) || !boot.hostname.bytes().all(plain) {
            return Err(bad("hostname", &format!("must be 1 to {MAX_HOSTNAME} letters, digits, dots and hyphens")));
        }
        if boot.addresses.iter().any(|address| address.parse::<IpAddr>().is_err()) {
            return Err(bad("addresses", "must be IP addresses"));
        }
        if boot.resolvers.iter().any(|address| address.parse::<IpAddr>().is_err()) {
            return Err(bad("resolvers", "must be IP addresses"));
        }
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        if renew.machine_id.as_ref().is_some_and(|id| id.len() != MACHINE_ID || !id.bytes().all(digit)) {
            return Err(bad("machine_id", &format!("must be {MACHINE_ID} lower-case hexadecimal digits")));
        }
        let seed = unhex(&renew.seed)
            .filter(|seed| seed.len() <= MAX_SEED)
            .ok_or_else(|| bad("seed", &format!("must be hexadecimal, of at most {MAX_SEED} bytes")))?;
        let clock = u64::try_from(renew.unix_ms).map_err(|_| bad("unix_ms", "must not be before 1970"))?;
        Ok(Renewal { renew, seed, clock: Duration::from_millis(clock) })
    }

    /// Does what there is to do for a guest that stays who it is.
    pub fn apply_to_same(&self) {
        guest::set_resolvers(&self.renew.boot.resolvers);
        guest::report("the clock", set_clock(self.clock));
    }

    /// Does all but the identity, which is the caller's to replace.
    pub fn apply(&self) {
        guest::identify(&self.renew.boot);
        if let Some(id) = &self.renew.machine_id {
            guest::set_machine_id(id);
        }
        guest::report("the kernel's randomness", mix_in(&self.seed));
        guest::report("the clock", set_clock(self.clock));
    }
}

fn bad(field: &str, rule: &str) -> Failure {
    failure(FailureCode::BadRequest, &format!("{field} {rule}"))
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

/// Mixes `seed` into the kernel's generator. The guest may have put something else in the device's place.
fn mix_in(seed: &[u8]) -> io::Result<()> {
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW | libc::O_NOCTTY;
    let mut device = OpenOptions::new().write(true).custom_flags(flags).open("/dev/urandom")?;
    if !device.metadata()?.file_type().is_char_device() {
        return Err(io::Error::other("/dev/urandom is no device"));
    }
    device.write_all(seed)?;
    // SAFETY: takes no argument. A kernel without it mixes the seed in by itself.
    unsafe { libc::ioctl(device.as_raw_fd(), RESEED) };
    Ok(())
}

/// Sets the clock where it is off and the kernel lets it be set.
fn set_clock(to: Duration) -> io::Result<()> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if now.abs_diff(to) < TOLERANCE {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(to)).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tiffin_protocol::Boot;

    fn renew() -> Renew {
        Renew {
            boot: Boot {
                token: "t".to_owned(),
                hostname: "box-2.x".to_owned(),
                addresses: vec!["10.0.0.2".to_owned(), "fd00::2".to_owned()],
                resolvers: vec!["1.1.1.1".to_owned()],
                cpus: 1,
                max_pids: 9,
                link: None,
            },
            machine_id: Some("0123456789abcdef0123456789abcdef".to_owned()),
            unix_ms: 1_000,
            seed: "00ffA0".to_owned(),
        }
    }

    #[test]
    fn a_request_that_makes_sense_is_taken() {
        let renew = renew();
        let renewal = Renewal::of(&renew).unwrap();
        assert_eq!((renewal.seed, renewal.clock), (vec![0, 0xff, 0xa0], Duration::from_secs(1)));
        assert!(Renewal::of(&Renew { machine_id: None, seed: String::new(), ..renew.clone() }).is_ok());
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_field() {
        let with = |boot: fn(&mut Boot)| {
            let mut renew = renew();
            boot(&mut renew.boot);
            renew
        };
        let cases = [
            ("token", with(|boot| boot.token.clear())),
            ("hostname", with(|boot| boot.hostname.clear())),
            ("hostname", with(|boot| boot.hostname = "a\nb".to_owned())),
            ("hostname", with(|boot| boot.hostname = "a".repeat(65))),
            ("addresses", with(|boot| boot.addresses.push("here".to_owned()))),
            ("resolvers", with(|boot| boot.resolvers.push("1.1.1.1\noptions x".to_owned()))),
            ("machine_id", Renew { machine_id: Some("0123".to_owned()), ..renew() }),
            ("machine_id", Renew { machine_id: Some("A".repeat(32)), ..renew() }),
            ("seed", Renew { seed: "0".to_owned(), ..renew() }),
            ("seed", Renew { seed: "0g".to_owned(), ..renew() }),
            ("seed", Renew { seed: "00".repeat(MAX_SEED + 1), ..renew() }),
            ("unix_ms", Renew { unix_ms: -1, ..renew() }),
        ];
        for (field, renew) in cases {
            let refused = Renewal::of(&renew).unwrap_err();
            assert_eq!(refused.code, FailureCode::BadRequest, "{field}");
            assert!(refused.message.starts_with(field), "{field}: {}", refused.message);
        }
    }

    #[test]
    fn a_clock_that_is_right_is_left_alone() {
        // Setting it would fail, or harm whoever runs this.
        assert!(set_clock(SystemTime::now().duration_since(UNIX_EPOCH).unwrap()).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_read_back_from_hexadecimal(bytes in proptest::collection::vec(any::<u8>(), 0..50)) {
            let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            prop_assert_eq!(unhex(&text), Some(bytes));
        }

        #[test]
        fn any_text_is_a_seed_or_refused(text in ".{0,40}") {
            if let Some(seed) = unhex(&text) {
                prop_assert_eq!(seed.len() * 2, text.len());
            }
        }
    }
}
