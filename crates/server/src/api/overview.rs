//! `/v1/admin/overview`

use std::{collections::BTreeMap, sync::Arc};

use axum::{Json, extract::State};
use serde::Serialize;
use tiffin_types::time::Timestamp;
use utoipa::ToSchema;

use crate::{
    app::{App, auth::Caller, overview},
    error::AppError,
};

/// The installation at a glance.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct OverviewBody {
    #[schema(example = "0.1.0")]
    version: &'static str,
    /// What runs VMs.
    #[schema(example = "gvisor")]
    engine: &'static str,
    #[schema(example = "userspace-kernel")]
    isolation: &'static str,
    #[schema(value_type = String, format = DateTime)]
    started_at: Timestamp,
    uptime_s: u64,
    /// VMs by state.
    #[schema(example = json!({"RUNNING": 3, "STOPPED": 1}))]
    vms: BTreeMap<&'static str, u64>,
    images: u64,
    /// Images' files that were found damaged on the host's disk: see `isDamaged` of images, and the server's log.
    damaged_images: usize,
    snapshots: u64,
    accounts: u64,
    /// Keys that are not revoked.
    api_keys: u64,
    cpu: CpuBody,
    /// In MiB.
    memory_mb: AmountBody,
    /// Of the data folder's filesystem, in MiB.
    storage_mb: AmountBody,
}

/// The host's processors.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct CpuBody {
    total: u64,
    /// vCPUs of the VMs that are up; may be more than there are.
    allocated: u64,
    /// Processes of the host that run or want to, over the last minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    load: Option<f64>,
}

/// Something of the host's.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AmountBody {
    /// What the host has.
    #[serde(skip_serializing_if = "Option::is_none")]
    total: Option<u64>,
    /// What of it is in use, by whatever.
    #[serde(skip_serializing_if = "Option::is_none")]
    used: Option<u64>,
    /// What VMs were promised together: memory of those that are up, disk of those that exist.
    allocated: u64,
}

impl AmountBody {
    fn new(total: Option<u64>, available: Option<u64>, allocated: u64) -> Self {
        let used = total.zip(available).map(|(total, available)| total.saturating_sub(available));
        Self { total, used, allocated }
    }
}

/// See the installation at a glance
///
/// Counts, and what of the host is taken. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/overview", operation_id = "overview_get", tag = "Administration",
    responses((status = 200, description = "Figures of now", body = OverviewBody)))]
pub(crate) async fn overview_get(caller: Caller, State(app): State<Arc<App>>) -> Result<Json<OverviewBody>, AppError> {
    let overview = overview::overview_get(&app, &caller).await?;
    let (figures, host) = (overview.figures, overview.host);
    Ok(Json(OverviewBody {
        version: env!("CARGO_PKG_VERSION"),
        engine: app.engine.default_kind().name.as_str(),
        isolation: app.engine.default_kind().isolation.as_str(),
        started_at: app.started_at,
        uptime_s: app.began.elapsed().as_secs(),
        vms: overview.vms.into_iter().map(|(state, count)| (state.as_str(), count)).collect(),
        images: figures.images,
        damaged_images: overview.damaged,
        snapshots: figures.snapshots,
        accounts: figures.accounts,
        api_keys: figures.api_keys,
        cpu: CpuBody { total: host.cpus, allocated: figures.cpus, load: host.load },
        memory_mb: AmountBody::new(host.mem_total_mb, host.mem_available_mb, figures.mem_mb),
        storage_mb: AmountBody::new(host.disk_total_mb, host.disk_available_mb, figures.disk_mb),
    }))
}
