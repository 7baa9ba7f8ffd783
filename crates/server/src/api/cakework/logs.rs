//! `/v1/vm/{id}/logs`, `/v1/vm/cached/{id}/logs`: what VMs' programs print, a page at a time.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use tiffin_logs::{Answer, Line};
use utoipa::ToSchema;

use super::vms::ServiceId;
use crate::{
    api::{
        logs,
        request::{Id, Parameters},
    },
    app::{App, auth::Caller},
    error::AppError,
};

/// A line that a program printed.
#[derive(Serialize, ToSchema)]
pub(crate) struct CakeworkLogLine {
    /// Milliseconds since the Unix epoch.
    #[schema(example = 1_676_625_938_460_i64)]
    timestamp: i64,
    /// `info`, `error`, or what the line says itself.
    #[schema(example = "info")]
    level: String,
    message: String,
}

/// Lines, and how to ask for more.
#[derive(Serialize, ToSchema)]
pub(crate) struct CakeworkLogPage {
    lines: Vec<CakeworkLogLine>,
    /// If there may be more: send it, `from` and `to` along with the same query.
    #[serde(skip_serializing_if = "Option::is_none")]
    pagination: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2023-03-07 06:12:56 UTC")]
    from: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "2023-03-08 06:11:56 UTC")]
    to: Option<String>,
}

impl From<Line> for CakeworkLogLine {
    fn from(line: Line) -> Self {
        Self { timestamp: line.time_ms, level: line.level, message: line.message }
    }
}

impl From<Answer> for CakeworkLogPage {
    fn from(answer: Answer) -> Self {
        let (pagination, from, to) = match answer.more {
            Some(more) => (Some(more.pagination), Some(more.from), Some(more.to)),
            None => (None, None, None),
        };
        Self { lines: answer.lines.into_iter().map(Into::into).collect(), pagination, from, to }
    }
}

/// Get what a VM's program printed, also after the VM is destroyed
#[utoipa::path(get, path = "/v1/vm/{id}/logs", operation_id = "cakework_vm_log_list", tag = "Programs",
    params(("id" = String, Path),
        ("query" = Option<String>, Query, description = "Only lines with this text, in upper or lower case"),
        ("batch" = Option<u32>, Query, minimum = 50, maximum = 1000, description = "Lines; 100 when missing"),
        ("order" = Option<String>, Query, description = "`oldest_first` (when missing) or `newest_first`"),
        ("pagination" = Option<String>, Query, description = "From the page before"),
        ("from" = Option<String>, Query, description = "Only lines from then on: `2022-07-19T13:32:56+0000`"),
        ("to" = Option<String>, Query, description = "Only lines until then")),
    responses((status = 200, description = "Lines", body = CakeworkLogPage)))]
pub(crate) async fn cakework_vm_log_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
    parameters: Parameters,
) -> Result<Json<CakeworkLogPage>, AppError> {
    Ok(Json(logs::answer(&app, &caller, &id, parameters).await?.into()))
}

/// Get what a cached VM's program printed, in all its runs
#[utoipa::path(get, path = "/v1/vm/cached/{id}/logs", operation_id = "cakework_cached_log_list", tag = "Programs",
    params(("id" = String, Path),
        ("query" = Option<String>, Query, description = "Only lines with this text, in upper or lower case"),
        ("batch" = Option<u32>, Query, minimum = 50, maximum = 1000, description = "Lines; 100 when missing"),
        ("order" = Option<String>, Query, description = "`oldest_first` (when missing) or `newest_first`"),
        ("pagination" = Option<String>, Query, description = "From the page before"),
        ("from" = Option<String>, Query, description = "Only lines from then on: `2022-07-19T13:32:56+0000`"),
        ("to" = Option<String>, Query, description = "Only lines until then")),
    responses((status = 200, description = "Lines", body = CakeworkLogPage)))]
pub(crate) async fn cakework_cached_log_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(ServiceId(id)): Id<ServiceId>,
    parameters: Parameters,
) -> Result<Json<CakeworkLogPage>, AppError> {
    Ok(Json(logs::answer(&app, &caller, &id, parameters).await?.into()))
}
