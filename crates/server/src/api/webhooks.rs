//! `/v1/admin/webhooks`

use std::{
    collections::BTreeSet,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Json,
    extract::{FromRequestParts, Path, State},
    http::{StatusCode, request::Parts},
};
use serde::Serialize;
use serde_json::Value;
use tiffin_outbound::Policy;
use tiffin_store::{Attempt, Delivery, DeliveryState, Webhook, WebhookChange};
use tiffin_types::{
    id::{DeliveryId, WebhookId},
    limits,
    time::Timestamp,
};
use utoipa::ToSchema;

use super::{
    body::{Fields, JsonObject, NAME, OptionalJsonObject, name, text, whole},
    gate, openapi,
    request::{Id, Parameters},
};
use crate::{
    app::{App, auth::Caller, journal, webhooks, webhooks::WebhookRequest},
    error::AppError,
};

/// A webhook to make.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `webhook_request` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct WebhookCreate {
    #[schema(example = "billing", min_length = 1, max_length = 100)]
    name: String,
    /// An https URL that leads to a public address; what else is allowed, the server's configuration says.
    #[schema(example = "https://hooks.example.com/tiffin", max_length = 2048)]
    url: String,
    /// Whether it is told of anything yet; true when missing.
    enabled: Option<bool>,
    /// Which events it is told of: names of operations that change something, as in the activity, `vm_state`, `webhook_disable`;
    /// `*` is all, and what comes when it is missing.
    #[schema(example = json!(["vm_state"]), min_items = 1, max_items = 100)]
    event_types: Option<Vec<String>>,
}

/// What to change of a webhook: the fields that are given.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `webhook_change` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct WebhookPatch {
    #[schema(example = "billing", min_length = 1, max_length = 100)]
    name: Option<String>,
    #[schema(example = "https://hooks.example.com/tiffin", max_length = 2048)]
    url: Option<String>,
    /// Enabling one that Tiffin disabled forgets that it failed; what waits is delivered then.
    #[schema(example = true)]
    enabled: Option<bool>,
    #[schema(example = json!(["vm_state"]), min_items = 1, max_items = 100)]
    event_types: Option<Vec<String>>,
}

/// How to change a webhook's secret.
#[derive(ToSchema)]
#[allow(dead_code, reason = "documents what `overlap` reads")]
#[schema(rename_all = "camelCase")]
pub(crate) struct WebhookRotate {
    /// For how long what is delivered is signed with the secret before, too; a day when missing.
    #[schema(example = 86400, minimum = 0, maximum = 604_800)]
    overlap_seconds: Option<u64>,
}

/// A webhook, without its secret.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct WebhookBody {
    #[schema(example = "whk-0123456789abcd")]
    id: String,
    #[schema(example = "billing")]
    name: String,
    #[schema(example = "https://hooks.example.com/tiffin")]
    url: String,
    enabled: bool,
    #[schema(example = json!(["vm_state"]))]
    event_types: Vec<String>,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
    /// Until when what is delivered is signed with the secret before, too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    old_secret_until: Option<Timestamp>,
    /// Since when nothing could be delivered though it was tried.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    failing_since: Option<Timestamp>,
    /// Why Tiffin disabled it: `gone` (its receiver answered 410) or `failing` (nothing could be delivered for days).
    #[serde(skip_serializing_if = "Option::is_none")]
    disabled_reason: Option<&'static str>,
    /// Events that were dropped because too much was waiting.
    dropped: u64,
    /// What its deliveries are signed with; in the answer to its creation and to a rotation only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")]
    secret: Option<String>,
}

impl WebhookBody {
    fn new(webhook: Webhook, secret: Option<String>) -> Self {
        Self {
            id: webhook.id.to_string(),
            name: webhook.name,
            url: webhook.url,
            enabled: webhook.enabled,
            event_types: webhook.event_types,
            created_at: webhook.created_at,
            updated_at: webhook.updated_at,
            old_secret_until: webhook.old_secret_until.filter(|until| *until > Timestamp::now()),
            failing_since: webhook.failing_since,
            disabled_reason: webhook.disabled_reason.map(|reason| reason.as_str()),
            dropped: webhook.dropped,
            secret,
        }
    }
}

/// One event for one webhook.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct DeliveryBody {
    #[schema(example = "dlv-0123456789abcd")]
    id: String,
    /// The event, as `webhook-id` names it: the same in every attempt.
    #[schema(example = "evt-0123456789abcd")]
    event_id: String,
    #[schema(example = "vm_state")]
    event_type: String,
    /// `pending`, `delivered` or `failed`.
    #[schema(example = "pending")]
    state: &'static str,
    #[schema(value_type = String, format = DateTime)]
    created_at: Timestamp,
    /// When it is tried next.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    next_attempt_at: Option<Timestamp>,
    /// The latest attempts, at most ten, oldest first.
    attempts: Vec<AttemptBody>,
}

/// One attempt to deliver.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(crate) struct AttemptBody {
    #[schema(value_type = String, format = DateTime)]
    at: Timestamp,
    #[schema(example = 87)]
    duration_ms: u64,
    /// The answer's status, if there was an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = 500)]
    status: Option<u16>,
    /// Why it isn't delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "the receiver answered 500 Internal Server Error")]
    error: Option<String>,
}

impl From<Delivery> for DeliveryBody {
    fn from(delivery: Delivery) -> Self {
        Self {
            id: delivery.id.to_string(),
            event_id: delivery.event_id.to_string(),
            event_type: delivery.event_type,
            state: delivery.state.as_str(),
            created_at: delivery.created_at,
            next_attempt_at: (delivery.state == DeliveryState::Pending).then_some(delivery.due_at),
            attempts: delivery.history.into_iter().map(AttemptBody::from).collect(),
        }
    }
}

impl From<Attempt> for AttemptBody {
    fn from(attempt: Attempt) -> Self {
        Self { at: attempt.at, duration_ms: attempt.duration_ms, status: attempt.status, error: attempt.error }
    }
}

/// Make a webhook
///
/// It is told of the events of the caller's account. The answer shows the secret that deliveries are signed with this
/// once. Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/admin/webhooks", operation_id = "webhook_create", tag = "Webhooks",
    request_body = WebhookCreate,
    responses((status = 201, description = "Made", body = WebhookBody), (status = 429, description = "")))]
pub(crate) async fn webhook_create(
    caller: Caller,
    State(app): State<Arc<App>>,
    body: JsonObject,
) -> Result<(StatusCode, Json<WebhookBody>), AppError> {
    let request = webhook_request(body.fields(), app.outbound.policy())?;
    let (webhook, secret) = webhooks::webhook_create(&app, &caller, request).await?;
    Ok((StatusCode::CREATED, Json(WebhookBody::new(webhook, Some(secret)))))
}

/// List webhooks
///
/// Those of the caller's account, without their secrets. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/webhooks", operation_id = "webhook_list", tag = "Webhooks",
    responses((status = 200, description = "Webhooks, oldest first", body = Vec<WebhookBody>)))]
pub(crate) async fn webhook_list(
    caller: Caller,
    State(app): State<Arc<App>>,
) -> Result<Json<Vec<WebhookBody>>, AppError> {
    let list = webhooks::webhook_list(&app, &caller).await?;
    Ok(Json(list.into_iter().map(|webhook| WebhookBody::new(webhook, None)).collect()))
}

/// See a webhook
///
/// Without its secret. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/webhooks/{id}", operation_id = "webhook_get", tag = "Webhooks",
    params(("id" = String, Path)), responses((status = 200, description = "The webhook", body = WebhookBody)))]
pub(crate) async fn webhook_get(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<WebhookId>,
) -> Result<Json<WebhookBody>, AppError> {
    Ok(Json(WebhookBody::new(webhooks::webhook_get(&app, &caller, &id).await?, None)))
}

/// Change a webhook
///
/// What isn't given stays. What waits to be delivered goes to the new URL. Needs the scope `admin`.
#[utoipa::path(patch, path = "/v1/admin/webhooks/{id}", operation_id = "webhook_update", tag = "Webhooks",
    params(("id" = String, Path)), request_body = WebhookPatch,
    responses((status = 200, description = "Changed", body = WebhookBody)))]
pub(crate) async fn webhook_update(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<WebhookId>,
    body: JsonObject,
) -> Result<Json<WebhookBody>, AppError> {
    let change = webhook_change(body.fields(), app.outbound.policy())?;
    Ok(Json(WebhookBody::new(webhooks::webhook_update(&app, &caller, &id, change).await?, None)))
}

/// Delete a webhook
///
/// What waits to be delivered to it is dropped. Needs the scope `admin`.
#[utoipa::path(delete, path = "/v1/admin/webhooks/{id}", operation_id = "webhook_delete", tag = "Webhooks",
    params(("id" = String, Path)), responses((status = 204, description = "Deleted")))]
pub(crate) async fn webhook_delete(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<WebhookId>,
) -> Result<StatusCode, AppError> {
    webhooks::webhook_delete(&app, &caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Change a webhook's secret
///
/// The answer shows the new one this once. Until the overlap is over, deliveries have a signature by each. Needs the scope
/// `admin`.
#[utoipa::path(post, path = "/v1/admin/webhooks/{id}/rotate-secret", operation_id = "webhook_rotate", tag = "Webhooks",
    params(("id" = String, Path)), request_body = WebhookRotate,
    responses((status = 200, description = "Changed", body = WebhookBody)))]
pub(crate) async fn webhook_rotate(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<WebhookId>,
    OptionalJsonObject(body): OptionalJsonObject,
) -> Result<Json<WebhookBody>, AppError> {
    let overlap = overlap(body.fields())?;
    let (webhook, secret) = webhooks::webhook_rotate(&app, &caller, &id, overlap).await?;
    Ok(Json(WebhookBody::new(webhook, Some(secret))))
}

/// Try a webhook out
///
/// Has an event of type `ping` delivered to it; its deliveries say what came of it. Needs the scope `admin`.
#[utoipa::path(post, path = "/v1/admin/webhooks/{id}/test", operation_id = "webhook_test", tag = "Webhooks",
    params(("id" = String, Path)),
    responses((status = 202, description = "It will be delivered", body = DeliveryBody),
        (status = 409, description = ""), (status = 429, description = "")))]
pub(crate) async fn webhook_test(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<WebhookId>,
) -> Result<(StatusCode, Json<DeliveryBody>), AppError> {
    let delivery = webhooks::webhook_test(&app, &caller, &id).await?;
    Ok((StatusCode::ACCEPTED, Json(delivery.into())))
}

/// See what was delivered
///
/// And what wasn't, why, and when it is tried next. Those that are done are forgotten in time. Needs the scope `admin`.
#[utoipa::path(get, path = "/v1/admin/webhooks/{id}/deliveries", operation_id = "webhook_delivery_list",
    tag = "Webhooks",
    params(("id" = String, Path),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "50 when missing")),
    responses((status = 200, description = "Deliveries, newest first", body = Vec<DeliveryBody>)))]
pub(crate) async fn webhook_delivery_list(
    caller: Caller,
    State(app): State<Arc<App>>,
    Id(id): Id<WebhookId>,
    mut parameters: Parameters,
) -> Result<Json<Vec<DeliveryBody>>, AppError> {
    let range = limits::WEBHOOK_DELIVERIES;
    let expected = format!("must be a whole number from {} to {}", range.start(), range.end());
    let limit = parameters.optional("limit", limits::WEBHOOK_DELIVERIES_DEFAULT, &expected, |text| {
        text.parse().ok().filter(|limit| range.contains(limit))
    })?;
    parameters.finish("limit is")?;
    let list = webhooks::webhook_delivery_list(&app, &caller, &id, limit).await?;
    Ok(Json(list.into_iter().map(DeliveryBody::from).collect()))
}

/// Deliver once more
///
/// At once, with the same id and body, and with as many attempts as at first; also what was delivered already. Needs the
/// scope `admin`.
#[utoipa::path(post, path = "/v1/admin/webhooks/{id}/deliveries/{delivery}/redeliver",
    operation_id = "webhook_delivery_retry", tag = "Webhooks",
    params(("id" = String, Path), ("delivery" = String, Path)),
    responses((status = 202, description = "It will be delivered", body = DeliveryBody),
        (status = 409, description = "")))]
pub(crate) async fn webhook_delivery_retry(
    caller: Caller,
    State(app): State<Arc<App>>,
    Both { webhook, delivery }: Both,
) -> Result<(StatusCode, Json<DeliveryBody>), AppError> {
    let delivery = webhooks::webhook_redeliver(&app, &caller, &webhook, &delivery).await?;
    Ok((StatusCode::ACCEPTED, Json(delivery.into())))
}

/// The ids of a webhook and of a delivery of its.
pub(crate) struct Both {
    webhook: WebhookId,
    delivery: DeliveryId,
}

impl<S: Send + Sync> FromRequestParts<S> for Both {
    type Rejection = AppError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, AppError> {
        let ids = Path::<(String, String)>::from_request_parts(parts, state).await;
        let Path((webhook, delivery)) = ids.map_err(|_| AppError::NotFound("webhook"))?;
        Ok(Self {
            webhook: webhook.parse().map_err(|_| AppError::NotFound("webhook"))?,
            delivery: delivery.parse().map_err(|_| AppError::NotFound("delivery"))?,
        })
    }
}

fn webhook_request(mut fields: Fields, policy: &Policy) -> Result<WebhookRequest, AppError> {
    let name = fields.required("name", NAME, name);
    let url = fields.take("url");
    let url = match url {
        Some(url) => checked_url(&mut fields, url, policy),
        None => fields.required("url", URL, text),
    };
    let enabled = fields.optional("enabled", true, ENABLED, |value| value.as_bool());
    let all = Some(vec![ALL.to_owned()]);
    let types = if fields.has("eventTypes") { event_types_of(&mut fields) } else { all };
    let request = (|| Some(WebhookRequest { name: name?, url: url?, enabled: enabled?, event_types: types? }))();
    fields.finish_with(request, KNOWN)
}

fn webhook_change(mut fields: Fields, policy: &Policy) -> Result<WebhookChange, AppError> {
    if !["name", "url", "enabled", "eventTypes"].iter().any(|field| fields.has(field)) {
        fields.wrong("name", "or one of url, enabled, eventTypes must be given");
    }
    let name = fields.optional("name", None, NAME, |value| name(value).map(Some));
    let url = match fields.take("url") {
        Some(url) => checked_url(&mut fields, url, policy).map(Some),
        None => Some(None),
    };
    let enabled = fields.optional("enabled", None, ENABLED, |value| value.as_bool().map(Some));
    let types = if fields.has("eventTypes") { event_types_of(&mut fields).map(Some) } else { Some(None) };
    let change = (|| Some(WebhookChange { name: name?, url: url?, enabled: enabled?, event_types: types? }))();
    fields.finish_with(change, KNOWN)
}

fn overlap(mut fields: Fields) -> Result<Duration, AppError> {
    let range = limits::WEBHOOK_OVERLAP_S;
    let expected = format!("must be a whole number of seconds from {} to {}", range.start(), range.end());
    let default = limits::WEBHOOK_OVERLAP_S_DEFAULT;
    let seconds = fields.optional("overlapSeconds", default, &expected, whole(range));
    fields.finish_with(seconds.map(Duration::from_secs), "overlapSeconds is")
}

const KNOWN: &str = "name, url, enabled, eventTypes are";
const URL: &str = "must be an https URL of at most 2048 bytes";
const ENABLED: &str = "must be true or false";
/// Every event.
const ALL: &str = "*";

fn checked_url(fields: &mut Fields, value: Value, policy: &Policy) -> Option<String> {
    let fits = |text: &String| limits::WEBHOOK_URL_BYTES.contains(&text.len());
    let Some(url) = text(value).filter(fits).and_then(|text| text.parse::<url::Url>().ok()) else {
        fields.wrong("url", URL);
        return None;
    };
    match policy.check_url(&url) {
        Ok(()) => Some(url.into()),
        Err(refused) => {
            fields.wrong("url", refused.to_string());
            None
        }
    }
}

fn event_types_of(fields: &mut Fields) -> Option<Vec<String>> {
    let range = limits::WEBHOOK_EVENT_TYPES;
    let check = |text: &str| {
        let known = text == ALL || event_types().contains(text);
        let all = || event_types().iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        if known { Ok(()) } else { Err(format!("must be * or one of {}", all())) }
    };
    let mut types = fields.texts("eventTypes", *range.end(), check)?;
    types.sort();
    types.dedup();
    if types.is_empty() {
        fields.wrong("eventTypes", "must name one event or more, or *");
        return None;
    }
    // Whoever wants all wants those that are named, too.
    Some(if types.iter().any(|kind| kind == ALL) { vec![ALL.to_owned()] } else { types })
}

/// Every type of event: the operations that the audit trail notes, and what happens by itself.
fn event_types() -> &'static BTreeSet<String> {
    static TYPES: OnceLock<BTreeSet<String>> = OnceLock::new();
    TYPES.get_or_init(|| {
        let operations = gate::noted(&openapi::document());
        operations.into_iter().chain([journal::VM_STATE, webhooks::DISABLED].map(str::to_owned)).collect()
    })
}
