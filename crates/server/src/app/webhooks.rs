//! Webhooks: made and managed by administrators, each for the events of its own account.
//!
//! `deliver` sends what the store's outbox has, `attempt` is one exchange, `signature` what proves where it comes from.

mod attempt;
mod deliver;
mod signature;

use std::time::Duration;

use serde_json::Value;
use tiffin_outbound::{Client, Policy};
use tiffin_store::{Delivery, NewWebhook, QuotaExceeded, Redelivery, Webhook, WebhookChange};
use tiffin_types::{
    account::Scope,
    id::{DeliveryId, WebhookId},
    time::Timestamp,
};

use super::{App, auth::Caller};
use crate::{
    authorities::{self, BadAuthorities},
    config::WebhooksConfig,
    error::AppError,
};

pub(crate) use deliver::deliver;
pub(crate) use signature::new_secret;

/// The event of a webhook that Tiffin disabled.
pub(crate) const DISABLED: &str = "webhook_disable";

/// A webhook to be made.
pub(crate) struct WebhookRequest {
    pub(crate) name: String,
    pub(crate) url: String,
    pub(crate) enabled: bool,
    pub(crate) event_types: Vec<String>,
}

/// What deliveries are sent by.
pub(crate) fn client(config: &WebhooksConfig) -> Result<Client, BadAuthorities> {
    let roots = authorities::roots("webhooks.ca_file", config.ca_file.as_deref())?;
    let policy = Policy { allow_http: config.allow_http, allow: config.allow_networks.clone() };
    Ok(Client::new(policy, roots, config.connect_timeout))
}

/// Makes a webhook; its secret is shown this once.
pub(crate) async fn webhook_create(
    app: &App,
    caller: &Caller,
    request: WebhookRequest,
) -> Result<(Webhook, String), AppError> {
    caller.require(Scope::Admin)?;
    let secret = new_secret();
    let new = NewWebhook {
        account_id: &caller.account_id,
        name: &request.name,
        url: &request.url,
        enabled: request.enabled,
        event_types: &request.event_types,
        secret: &secret,
    };
    let limit = app.config.webhooks.per_account;
    let over = QuotaExceeded { what: "webhooks", limit: limit.into(), used: limit.into(), asked: 1 };
    let made = app.store.webhook_create(new, limit).await?.ok_or(AppError::OverQuota(over))?;
    Ok((made, secret))
}

/// The account's webhooks.
pub(crate) async fn webhook_list(app: &App, caller: &Caller) -> Result<Vec<Webhook>, AppError> {
    caller.require(Scope::Admin)?;
    Ok(app.store.webhook_list(&caller.account_id).await?)
}

/// One of them.
pub(crate) async fn webhook_get(app: &App, caller: &Caller, id: &WebhookId) -> Result<Webhook, AppError> {
    caller.require(Scope::Admin)?;
    app.store.webhook_get(&caller.account_id, id).await?.ok_or(NOT_FOUND)
}

/// Changes a webhook.
pub(crate) async fn webhook_update(
    app: &App,
    caller: &Caller,
    id: &WebhookId,
    change: WebhookChange,
) -> Result<Webhook, AppError> {
    caller.require(Scope::Admin)?;
    app.store.webhook_update(&caller.account_id, id, &change).await?.ok_or(NOT_FOUND)
}

/// Removes a webhook, and what was to be delivered to it.
pub(crate) async fn webhook_delete(app: &App, caller: &Caller, id: &WebhookId) -> Result<(), AppError> {
    caller.require(Scope::Admin)?;
    if app.store.webhook_delete(&caller.account_id, id).await? { Ok(()) } else { Err(NOT_FOUND) }
}

/// Gives a webhook another secret, shown this once. For `overlap` what is delivered is signed with both.
pub(crate) async fn webhook_rotate(
    app: &App,
    caller: &Caller,
    id: &WebhookId,
    overlap: Duration,
) -> Result<(Webhook, String), AppError> {
    caller.require(Scope::Admin)?;
    let secret = new_secret();
    let millis = i64::try_from(overlap.as_millis()).unwrap_or(i64::MAX);
    let until = (millis > 0).then(|| Timestamp::now().plus_millis(millis));
    let rotated = app.store.webhook_rotate(&caller.account_id, id, &secret, until).await?;
    Ok((rotated.ok_or(NOT_FOUND)?, secret))
}

/// Has an event `ping` delivered.
pub(crate) async fn webhook_test(app: &App, caller: &Caller, id: &WebhookId) -> Result<Delivery, AppError> {
    caller.require(Scope::Admin)?;
    let webhook = webhook_get(app, caller, id).await?;
    refuse_disabled(&webhook)?;
    app.store.webhook_ping(&caller.account_id, id).await?.ok_or_else(|| {
        AppError::TooMany("too many deliveries wait for this webhook already: see why they fail first".into())
    })
}

/// A webhook's deliveries, newest first.
pub(crate) async fn webhook_delivery_list(
    app: &App,
    caller: &Caller,
    id: &WebhookId,
    limit: u32,
) -> Result<Vec<Delivery>, AppError> {
    caller.require(Scope::Admin)?;
    webhook_get(app, caller, id).await?;
    Ok(app.store.delivery_list(id, limit).await?)
}

/// Has an event delivered once more.
pub(crate) async fn webhook_redeliver(
    app: &App,
    caller: &Caller,
    id: &WebhookId,
    delivery: &DeliveryId,
) -> Result<Delivery, AppError> {
    caller.require(Scope::Admin)?;
    let webhook = webhook_get(app, caller, id).await?;
    refuse_disabled(&webhook)?;
    match app.store.delivery_again(id, delivery).await? {
        Redelivery::Queued(delivery) => Ok(delivery),
        Redelivery::Unknown => Err(AppError::NotFound("delivery")),
        Redelivery::Underway => Err(AppError::Conflict {
            code: "delivery_underway",
            message: "this is being delivered at this moment: see what comes of it".into(),
            details: Value::Null,
        }),
    }
}

const NOT_FOUND: AppError = AppError::NotFound("webhook");

fn refuse_disabled(webhook: &Webhook) -> Result<(), AppError> {
    if webhook.enabled {
        return Ok(());
    }
    Err(AppError::Conflict {
        code: "webhook_disabled",
        message: "the webhook is disabled, and nothing is delivered to it: enable it first".into(),
        details: Value::Null,
    })
}
