//! `Server-Timing`: what of an answer's time went where. Source of the form: the W3C's Server Timing.

use std::time::Duration;

/// The header.
pub(super) type ServerTiming = [(&'static str, String); 1];

/// The header with one time.
pub(super) fn server_timing(name: &str, time: Duration) -> ServerTiming {
    [("server-timing", format!("{name};dur={:.3}", time.as_secs_f64() * 1e3))]
}
