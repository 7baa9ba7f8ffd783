//! Measurements. Labels are outcomes and protocols, never names or what anybody sends.

use std::{sync::OnceLock, time::Duration};

use http::{StatusCode, Version};
use metrics::{Counter, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// Says what each measurement is. The recorder is the caller's.
pub fn describe() {
    describe_histogram!(
        "tiffin_ingress_request_duration_seconds",
        "From a request's head to its answer's head, at the ingress."
    );
    describe_gauge!("tiffin_ingress_connections", "Connections of clients to the ingress.");
    describe_gauge!("tiffin_ingress_tunnels", "WebSockets that are open.");
    describe_counter!("tiffin_ingress_turned_away_total", "Connections that were not served, by why.");
    describe_counter!("tiffin_ingress_refused_total", "Requests that the ingress answered itself, by why.");
    describe_histogram!("tiffin_ingress_dial_duration_seconds", "Connecting to a program in a VM, by outcome.");
    describe_counter!("tiffin_ingress_reused_total", "Requests that took a connection that was kept.");
}

/// A request was answered. Looking a histogram up by its labels costs as much as all else that is noted of a request, so it is
/// done once for each.
pub(crate) fn request(status: StatusCode, version: Version, took: Duration) {
    const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
    const PROTOCOLS: [&str; 2] = ["http1", "h2"];
    static HISTOGRAMS: [[OnceLock<Histogram>; 5]; 2] = [const { [const { OnceLock::new() }; 5] }; 2];
    let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
    let protocol = usize::from(version == Version::HTTP_2);
    let new = || histogram!("tiffin_ingress_request_duration_seconds", "status" => CLASSES[class], "protocol" => PROTOCOLS[protocol]);
    HISTOGRAMS[protocol][class].get_or_init(new).record(took);
}

/// The ingress answered itself.
pub(crate) fn refused(code: &'static str) {
    counter!("tiffin_ingress_refused_total", "code" => code).increment(1);
}

/// A connection was not served.
pub(crate) fn turned_away(why: &'static str) {
    counter!("tiffin_ingress_turned_away_total", "why" => why).increment(1);
}

/// A dial ended.
pub(crate) fn dial(outcome: &'static str, took: Duration) {
    histogram!("tiffin_ingress_dial_duration_seconds", "outcome" => outcome).record(took);
}

/// A connection was used again.
pub(crate) fn reused() {
    static REUSED: OnceLock<Counter> = OnceLock::new();
    REUSED.get_or_init(|| counter!("tiffin_ingress_reused_total")).increment(1);
}

/// One of what is counted, until it is dropped.
pub(crate) struct Counted(&'static str);

impl Counted {
    pub(crate) fn connection() -> Self {
        Self::one("tiffin_ingress_connections")
    }

    pub(crate) fn tunnel() -> Self {
        Self::one("tiffin_ingress_tunnels")
    }

    fn one(name: &'static str) -> Self {
        gauge!(name).increment(1.0);
        Self(name)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!(self.0).decrement(1.0);
    }
}
