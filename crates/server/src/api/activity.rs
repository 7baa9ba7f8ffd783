//! `/v1/admin/activity`, and what its entries look like, there and in streams.

use std::sync::Arc;

use axum::{Json, extract::State};
use serde::Serialize;
use serde_json::Value;
use tiffin_store::{Activity, Performer};
use tiffin_types::time::Timestamp;
use utoipa::ToSchema;

use super::request::Parameters;
use crate::{
    app::{App, activity, auth::Caller},
    error::AppError,
};

/// Entries of one answer.
const LIMIT: std::ops::RangeInclusive<u32> = 1..=1000;
const LIMIT_DEFAULT: u32 = 100;

/// Something that was done or happened.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ActivityBody {
    /// Later entries have greater ids.
    #[schema(example = "01JD4W5C1QZX6M0V5K2B8N7T3A")]
    pub(super) id: String,
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    /// The operation's id in this document, or `vm_state`.
    #[schema(example = "vm_create")]
    pub(super) event: String,
    actor: ActorBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    account_id: Option<String>,
    /// The id of what it was done to; several with commas between.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "vm-0123456789abcd")]
    target: Option<String>,
    /// The answer's status; 499 where the client had gone before it, so that the change may be done or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 201)]
    status: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    /// The address that the request came from: behind a proxy, the proxy's.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    /// For `vm_state`: `state`, and `reason` and `message` of an end.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    details: Option<Value>,
}

/// Who did something.
#[derive(Serialize, ToSchema)]
pub(crate) struct ActorBody {
    /// `key`, `user`, `system` (Tiffin itself) or `anonymous`.
    #[serde(rename = "type")]
    #[schema(example = "key")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "key-0123456789abcd")]
    id: Option<String>,
    /// The key's name or the user's email.
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

impl From<Performer> for ActorBody {
    fn from(actor: Performer) -> Self {
        Self { kind: actor.kind.as_str(), id: actor.id, name: actor.name }
    }
}

impl From<Activity> for ActivityBody {
    fn from(entry: Activity) -> Self {
        Self {
            id: entry.id,
            at: entry.at,
            event: entry.event,
            actor: entry.actor.into(),
            account_id: entry.account_id.map(String::from),
            target: entry.target,
            status: entry.status,
            request_id: entry.request_id,
            peer: entry.peer,
            details: entry.details,
        }
    }
}

/// See what was done
///
/// Each operation that changed something, each that was refused for lack of rights, and each state that a VM came into.
/// Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/activity", operation_id = "activity_list", tag = "Administration",
    params(("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "100 when missing"),
        ("before" = Option<String>, Query, description = "Only entries before this id: for the next page, the last one's")),
    responses((status = 200, description = "Entries, newest first", body = Vec<ActivityBody>)))]
pub(crate) async fn activity_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    mut parameters: Parameters,
) -> Result<Json<Vec<ActivityBody>>, AppError> {
    let limit = parameters.optional("limit", LIMIT_DEFAULT, "must be a whole number from 1 to 1000", |text| {
        text.parse().ok().filter(|limit| LIMIT.contains(limit))
    })?;
    let before = parameters
        .optional("before", None, "must be an entry's id, 26 letters and digits", |text| id(text).map(Some))?;
    parameters.finish("limit and before are")?;
    let list = activity::activity_list(&app, &caller, limit, before.as_deref()).await?;
    Ok(Json(list.into_iter().map(ActivityBody::from).collect()))
}

/// An entry's id, if it can be one.
pub(super) fn id(text: &str) -> Option<String> {
    (text.len() == 26 && text.bytes().all(|b| b.is_ascii_digit() || b.is_ascii_uppercase())).then(|| text.to_owned())
}
