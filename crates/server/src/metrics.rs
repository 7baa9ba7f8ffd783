//! Measurements for Prometheus.
//!
//! One recorder in the process, whoever starts first; labels are routes and states, never ids or what clients send.

use std::{sync::OnceLock, time::Duration};

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tiffin_types::{snapshot::SnapshotState, vm::VmState};

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Upper bounds, in seconds.
const BUCKETS: [f64; 15] =
    [0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// The recorder, installed at the first call.
pub(crate) fn install() -> PrometheusHandle {
    RECORDER.get_or_init(make).clone()
}

fn make() -> PrometheusHandle {
    let recorder = PrometheusBuilder::new().set_buckets(&BUCKETS).expect("BUCKETS isn't empty").build_recorder();
    let handle = recorder.handle();
    if metrics::set_global_recorder(recorder).is_err() {
        tracing::warn!("something else records this process's measurements; /metrics stays empty");
    }
    describe_histogram!("tiffin_http_request_duration_seconds", "From a request's head to its answer's head.");
    describe_gauge!("tiffin_vms", "VMs by state, those deleted aside.");
    describe_histogram!("tiffin_exec_duration_seconds", "A command, as the client sees it.");
    describe_histogram!("tiffin_exec_platform_seconds", "The part of it that is not the command's own.");
    describe_histogram!("tiffin_vm_start_duration_seconds", "Bringing a VM up, made or made again.");
    describe_counter!("tiffin_vm_starts_total", "Attempts to bring a VM up, by how they ended.");
    describe_counter!("tiffin_vm_ends_total", "Runs that ended, by reason.");
    describe_gauge!("tiffin_snapshots", "Snapshots by state.");
    describe_histogram!("tiffin_snapshot_save_duration_seconds", "Saving a VM, for a snapshot or a fork.");
    describe_counter!("tiffin_snapshot_saves_total", "Attempts to save a VM, by how they ended.");
    describe_counter!(
        "tiffin_pool_claims_total",
        "Creates that could have taken a VM that was booted ahead: hit, miss, or unfit (it was down)."
    );
    describe_gauge!("tiffin_pool_vms", "VMs that are booted ahead and ready.");
    describe_counter!("tiffin_journal_lost_total", "Times that entries of the audit trail or of exec logs were lost.");
    describe_counter!("tiffin_webhook_deliveries_total", "Attempts to deliver to webhooks, by what came of them.");
    tiffin_proxy::describe();
    describe_gauge!("tiffin_build_info", "Always 1; the version is in the label.");
    gauge!("tiffin_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    handle
}

/// A request was answered.
pub(crate) fn http(route: &str, method: &str, status: u16, took: Duration) {
    let labels = [("route", route.to_owned()), ("method", method.to_owned()), ("status", status.to_string())];
    histogram!("tiffin_http_request_duration_seconds", &labels).record(took);
}

/// VMs in each state, at the moment of a scrape.
pub(crate) fn vms(counts: &[(VmState, i64)]) {
    for state in VmState::ALL.into_iter().filter(|state| *state != VmState::Deleted) {
        let count = counts.iter().find(|(other, _)| *other == state).map_or(0, |(_, count)| *count);
        gauge!("tiffin_vms", "state" => state.as_str()).set(f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
    }
}

/// Snapshots in each state, at the moment of a scrape.
pub(crate) fn snapshots(counts: &[(SnapshotState, i64)]) {
    for state in SnapshotState::ALL {
        let count = counts.iter().find(|(other, _)| *other == state).map_or(0, |(_, count)| *count);
        gauge!("tiffin_snapshots", "state" => state.as_str()).set(f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
    }
}

/// A VM was saved, or wasn't.
pub(crate) fn snapshot_save(ok: bool, took: Duration) {
    counter!("tiffin_snapshot_saves_total", "outcome" => if ok { "ok" } else { "failed" }).increment(1);
    if ok {
        histogram!("tiffin_snapshot_save_duration_seconds").record(took);
    }
}

/// Somebody asked the pool for a VM.
pub(crate) fn pool_claim(outcome: &'static str) {
    counter!("tiffin_pool_claims_total", "outcome" => outcome).increment(1);
}

/// So many VMs are ready in the pool.
pub(crate) fn pool_ready(vms: usize) {
    gauge!("tiffin_pool_vms").set(f64::from(u32::try_from(vms).unwrap_or(u32::MAX)));
}

/// A command ended.
pub(crate) fn exec(took: Duration, in_guest: Duration) {
    histogram!("tiffin_exec_duration_seconds").record(took);
    histogram!("tiffin_exec_platform_seconds").record(took.saturating_sub(in_guest));
}

/// A VM came up, or didn't; `outcome` is `ok` or why not.
pub(crate) fn vm_start(outcome: &'static str, took: Duration) {
    counter!("tiffin_vm_starts_total", "outcome" => outcome).increment(1);
    if outcome == "ok" {
        histogram!("tiffin_vm_start_duration_seconds").record(took);
    }
}

/// A VM's run ended.
pub(crate) fn vm_end(reason: &'static str) {
    counter!("tiffin_vm_ends_total", "reason" => reason).increment(1);
}

/// A delivery to a webhook was tried.
pub(crate) fn delivery(outcome: &'static str) {
    counter!("tiffin_webhook_deliveries_total", "outcome" => outcome).increment(1);
}

/// Entries of the journal could not be written.
pub(crate) fn journal_lost() {
    counter!("tiffin_journal_lost_total").increment(1);
}
