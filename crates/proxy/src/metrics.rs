//! Measurements. Labels are outcomes and protocols, never names or what anybody sends.

use std::time::Duration;

use http::{StatusCode, Version};
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

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

/// A request was answered.
pub(crate) fn request(status: StatusCode, version: Version, took: Duration) {
    let class = match status.as_u16() / 100 {
        1 => "1xx",
        2 => "2xx",
        3 => "3xx",
        4 => "4xx",
        _ => "5xx",
    };
    let protocol = if version == Version::HTTP_2 { "h2" } else { "http1" };
    histogram!("tiffin_ingress_request_duration_seconds", "status" => class, "protocol" => protocol).record(took);
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
    counter!("tiffin_ingress_reused_total").increment(1);
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
