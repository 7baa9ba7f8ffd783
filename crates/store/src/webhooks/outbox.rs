//! From an event to what is to be delivered: written in the transaction of what the event tells of.
//!
//! Invariant: whoever commits a change commits its deliveries with it, so that a server that is killed loses none. A body
//! is written once, and every attempt sends the same bytes.

use serde::Serialize;
use serde_json::{Value, json};
use sqlx::AnyConnection;
use tiffin_types::{
    id::{AccountId, DeliveryId, EventId, WebhookId},
    time::Timestamp,
};

use super::{
    Delivery,
    deliveries::{self, PENDING_MAX},
};
use crate::{
    Activity, Store, StoreError, Vm,
    row::{Fields, column},
};

/// Bytes of what is delivered; of an event with more only that it happened.
const BODY_BYTES: usize = 65_536;
/// The event that tries a webhook out.
const PING: &str = "ping";
/// The event of a VM that came into a state.
const VM_STATE: &str = "vm_state";

/// Something that webhooks may be told of.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Event<'a> {
    id: EventId,
    #[serde(rename = "type")]
    kind: &'a str,
    timestamp: Timestamp,
    account_id: &'a AccountId,
    data: Value,
}

impl<'a> Event<'a> {
    /// A VM came into a state.
    pub(crate) fn of_vm(vm: &'a Vm) -> Self {
        let mut data = json!({ "vmId": vm.id, "state": vm.state });
        if let Some(end) = &vm.end {
            data["reason"] = end.reason.as_str().into();
            data["message"] = end.message.clone().into();
        }
        Self { id: EventId::random(), kind: VM_STATE, timestamp: vm.updated_at, account_id: &vm.account_id, data }
    }

    /// An entry of the audit trail; none of nobody's, and none that the change itself told of.
    pub(crate) fn of_activity(entry: &'a Activity) -> Option<Self> {
        let account_id = entry.account_id.as_ref().filter(|_| entry.event != VM_STATE)?;
        let actor = json!({ "kind": entry.actor.kind.as_str(), "id": entry.actor.id, "name": entry.actor.name });
        let data = json!({
            "activityId": entry.id, "actor": actor, "target": entry.target, "status": entry.status,
            "requestId": entry.request_id, "details": entry.details,
        });
        Some(Self { id: EventId::random(), kind: &entry.event, timestamp: entry.at, account_id, data })
    }

    fn body(&self) -> Result<String, StoreError> {
        let body = serde_json::to_string(self).map_err(StoreError::unavailable)?;
        if body.len() <= BODY_BYTES {
            return Ok(body);
        }
        let short = Self { data: json!({ "tooLarge": true }), id: self.id.clone(), ..*self };
        serde_json::to_string(&short).map_err(StoreError::unavailable)
    }
}

/// Writes what is to be delivered of an event; how much. Once it is committed, the store's outbox is to be notified.
pub(crate) async fn emit(event: &Event<'_>, tx: &mut AnyConnection) -> Result<usize, StoreError> {
    let told = sqlx::query(
        "SELECT id FROM webhooks WHERE account_id = $1 AND enabled = 1
         AND (event_types = ',*,' OR replace(event_types, $2, '') <> event_types)",
    )
    .bind(event.account_id.as_str())
    .bind(format!(",{},", event.kind))
    .fetch_all(&mut *tx)
    .await?;
    for row in &told {
        put(&Fields::new("webhooks", row).parsed("id")?, event, tx).await?;
    }
    Ok(told.len())
}

/// Writes what is to be delivered to one webhook, if not too much is waiting already.
async fn put(webhook: &WebhookId, event: &Event<'_>, tx: &mut AnyConnection) -> Result<Option<DeliveryId>, StoreError> {
    let waiting = sqlx::query(
        "SELECT COUNT(*) AS waiting FROM (SELECT 1 FROM webhook_deliveries WHERE webhook_id = $1 AND state = 'pending'
         LIMIT $2) AS some_of_them",
    )
    .bind(webhook.as_str())
    .bind(column(PENDING_MAX))
    .fetch_one(&mut *tx)
    .await?;
    if Fields::new("webhook_deliveries", &waiting).number::<u64>("waiting")? >= PENDING_MAX {
        let dropped = "UPDATE webhooks SET dropped = dropped + 1 WHERE id = $1";
        sqlx::query(dropped).bind(webhook.as_str()).execute(tx).await?;
        return Ok(None);
    }
    let id = DeliveryId::random();
    let now = Timestamp::now().as_millis();
    sqlx::query(
        "INSERT INTO webhook_deliveries (id, webhook_id, event_id, event_type, body, state, created_at, due_at)
         VALUES ($1, $2, $3, $4, $5, 'pending', $6, $6)",
    )
    .bind(id.as_str())
    .bind(webhook.as_str())
    .bind(event.id.as_str())
    .bind(event.kind)
    .bind(event.body()?)
    .bind(now)
    .execute(tx)
    .await?;
    Ok(Some(id))
}

impl Store {
    /// Has an event `ping` delivered to a webhook, whatever it wants to be told of; `None` when too much is waiting.
    pub async fn webhook_ping(&self, account: &AccountId, webhook: &WebhookId) -> Result<Option<Delivery>, StoreError> {
        let event = Event {
            id: EventId::random(),
            kind: PING,
            timestamp: Timestamp::now(),
            account_id: account,
            data: json!({ "webhookId": webhook }),
        };
        let mut tx = self.pool.begin().await?;
        // A transaction begins with a write; this one also keeps the webhook from going meanwhile.
        let there = sqlx::query("UPDATE webhooks SET updated_at = updated_at WHERE id = $1").bind(webhook.as_str());
        there.execute(&mut *tx).await?;
        let Some(id) = put(webhook, &event, &mut tx).await? else {
            tx.commit().await?;
            return Ok(None);
        };
        let delivery = deliveries::get(webhook, &id, &mut *tx).await?;
        tx.commit().await?;
        self.outbox.notify_one();
        Ok(delivery)
    }

    /// Waits until something may be there to deliver that wasn't before.
    pub async fn webhook_news(&self) {
        self.outbox.notified().await;
    }
}
