//! Deliveries: claimed by a lease, tried, settled.
//!
//! Invariant: whoever holds a lease that hasn't run out is alone with the delivery, also of several servers; what they
//! find counts only while the lease is theirs (compare-and-set). A lease that ran out is as good as none, so that what a
//! killed server had claimed is tried again: at least once.

use serde::{Deserialize, Serialize};
use sqlx::{Any, any::AnyRow};
use tiffin_types::{
    id::{DeliveryId, EventId, WebhookId},
    time::Timestamp,
};

use super::{DisabledReason, Webhook, webhook_from};
use crate::{
    Store, StoreError,
    row::{Fields, returned},
};

/// What may wait to be delivered to one webhook.
pub(super) const PENDING_MAX: u64 = 10_000;
/// Attempts that are remembered of each delivery.
const HISTORY: usize = 10;

/// One event for one webhook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// Its id.
    pub id: DeliveryId,
    /// Whose it is.
    pub webhook_id: WebhookId,
    /// The event's id: the same for all webhooks that are told of it, and for every attempt.
    pub event_id: EventId,
    /// What happened.
    pub event_type: String,
    /// What became of it.
    pub state: DeliveryState,
    /// When the event happened.
    pub created_at: Timestamp,
    /// When it is tried next; of something that is pending.
    pub due_at: Timestamp,
    /// How often it was tried since it was last asked for.
    pub attempts: u32,
    /// The latest attempts, oldest first.
    pub history: Vec<Attempt>,
}

/// What became of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryState {
    /// It is tried, or will be.
    Pending,
    /// The receiver has taken it.
    Delivered,
    /// It is not tried any more.
    Failed,
}

impl DeliveryState {
    const ALL: [Self; 3] = [Self::Pending, Self::Delivered, Self::Failed];

    /// Its name in the API and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Delivered => "delivered",
            Self::Failed => "failed",
        }
    }
}

impl std::str::FromStr for DeliveryState {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|state| state.as_str() == text).ok_or("not pending, delivered or failed")
    }
}

/// One attempt to deliver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attempt {
    /// When it began.
    pub at: Timestamp,
    /// How long it took.
    pub duration_ms: u64,
    /// The answer's status, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why it isn't delivered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A delivery that is one's own for a time.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// The delivery.
    pub delivery: Delivery,
    /// What to send.
    pub body: String,
    /// The lease's name.
    lease: String,
}

/// What is to become of a delivery after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The receiver has taken it.
    Delivered,
    /// It is tried again then.
    Again(Timestamp),
    /// It isn't tried again.
    GiveUp,
    /// It isn't tried again, and nothing else either: the receiver is gone.
    Gone,
}

/// What settling changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settled {
    /// The delivery alone.
    Delivery,
    /// The webhook is disabled with it.
    Disabled(Box<Webhook>, DisabledReason),
    /// Nothing: the lease was lost, or the webhook is gone.
    Nothing,
}

/// What became of asking for a delivery again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Redelivery {
    /// It is pending again.
    Queued(Delivery),
    /// It is being tried this moment.
    Underway,
    /// There is no such delivery.
    Unknown,
}

macro_rules! columns {
    () => {
        "id, webhook_id, event_id, event_type, state, created_at, due_at, attempts, history"
    };
}

impl Store {
    /// A webhook's deliveries, newest first.
    pub async fn delivery_list(&self, webhook: &WebhookId, limit: u32) -> Result<Vec<Delivery>, StoreError> {
        let query = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM webhook_deliveries WHERE webhook_id = $1 ORDER BY created_at DESC, id LIMIT $2"
        ));
        let rows = query.bind(webhook.as_str()).bind(i64::from(limit)).fetch_all(&self.pool).await?;
        rows.iter().map(delivery_from).collect()
    }

    /// Has a delivery tried again now, as if for the first time.
    pub async fn delivery_again(&self, webhook: &WebhookId, id: &DeliveryId) -> Result<Redelivery, StoreError> {
        let statement = sqlx::query(concat!(
            "UPDATE webhook_deliveries SET state = 'pending', due_at = $3, attempts = 0
             WHERE id = $1 AND webhook_id = $2 AND leased_until <= $3 RETURNING ",
            columns!()
        ))
        .bind(id.as_str())
        .bind(webhook.as_str())
        .bind(Timestamp::now().as_millis());
        if let Some(row) = returned(statement, &self.pool).await? {
            self.outbox.notify_one();
            return delivery_from(&row).map(Redelivery::Queued);
        }
        let there = get(webhook, id, &self.pool).await?;
        Ok(if there.is_some() { Redelivery::Underway } else { Redelivery::Unknown })
    }

    /// Webhooks that something is due for, those with the fewest attempts under way first, and how many those are. Not
    /// those that have `per_webhook` of them.
    pub async fn delivery_due(
        &self,
        now: Timestamp,
        per_webhook: u32,
        limit: u32,
    ) -> Result<Vec<(WebhookId, u32)>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, busy FROM (SELECT w.id AS id,
                 (SELECT COUNT(*) FROM webhook_deliveries b
                  WHERE b.webhook_id = w.id AND b.state = 'pending' AND b.leased_until > $1) AS busy
             FROM webhooks w WHERE w.enabled = 1 AND EXISTS (SELECT 1 FROM webhook_deliveries d
                 WHERE d.webhook_id = w.id AND d.state = 'pending' AND d.due_at <= $1 AND d.leased_until <= $1)) AS due
             WHERE busy < $2 ORDER BY busy, id LIMIT $3",
        )
        .bind(now.as_millis())
        .bind(i64::from(per_webhook))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let fields = Fields::new("webhooks", row);
                Ok((fields.parsed("id")?, fields.number("busy")?))
            })
            .collect()
    }

    /// Claims what is due for a webhook, at most `limit`, the longest due first. Nobody else gets it before `until`.
    pub async fn delivery_claim(
        &self,
        webhook: &WebhookId,
        now: Timestamp,
        until: Timestamp,
        limit: u32,
    ) -> Result<Vec<Claimed>, StoreError> {
        // The name of the lease: none that was ever given before.
        let lease = DeliveryId::random().to_string();
        let rows = sqlx::query(concat!(
            "UPDATE webhook_deliveries SET lease = $3, leased_until = $4
             WHERE id IN (SELECT id FROM webhook_deliveries
                 WHERE webhook_id = $1 AND state = 'pending' AND due_at <= $2 AND leased_until <= $2
                 ORDER BY due_at, id LIMIT $5)
             AND state = 'pending' AND leased_until <= $2 RETURNING body, ",
            columns!()
        ))
        .bind(webhook.as_str())
        .bind(now.as_millis())
        .bind(lease.as_str())
        .bind(until.as_millis())
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        let claimed = |row: &AnyRow| {
            let body = Fields::new("webhook_deliveries", row).text("body")?;
            Ok(Claimed { delivery: delivery_from(row)?, body, lease: lease.clone() })
        };
        rows.iter().map(claimed).collect()
    }

    /// Writes down what came of an attempt. A webhook to which nothing has been delivered since before `patience_from` is
    /// disabled.
    pub async fn delivery_settle(
        &self,
        claimed: &Claimed,
        attempt: Attempt,
        verdict: Verdict,
        patience_from: Timestamp,
    ) -> Result<Settled, StoreError> {
        let (state, due_at) = match verdict {
            Verdict::Delivered => (DeliveryState::Delivered, claimed.delivery.due_at),
            Verdict::Again(at) => (DeliveryState::Pending, at),
            Verdict::GiveUp | Verdict::Gone => (DeliveryState::Failed, claimed.delivery.due_at),
        };
        let mut history = claimed.delivery.history.clone();
        let began = attempt.at;
        history.push(attempt);
        history.drain(..history.len().saturating_sub(HISTORY));
        let mut tx = self.pool.begin().await?;
        let done = sqlx::query(
            "UPDATE webhook_deliveries SET state = $3, due_at = $4, attempts = attempts + 1, history = $5, lease = NULL,
                 leased_until = 0 WHERE id = $1 AND lease = $2",
        )
        .bind(claimed.delivery.id.as_str())
        .bind(claimed.lease.as_str())
        .bind(state.as_str())
        .bind(due_at.as_millis())
        .bind(serde_json::to_string(&history).map_err(StoreError::unavailable)?)
        .execute(&mut *tx)
        .await?;
        if done.rows_affected() == 0 {
            tx.rollback().await?;
            return Ok(Settled::Nothing);
        }
        let webhook = &claimed.delivery.webhook_id;
        let disabled = match verdict {
            Verdict::Delivered => {
                let well = "UPDATE webhooks SET failing_since = NULL WHERE id = $1 AND failing_since IS NOT NULL";
                sqlx::query(well).bind(webhook.as_str()).execute(&mut *tx).await?;
                None
            }
            Verdict::Gone => disable(webhook, DisabledReason::Gone, None, &mut *tx).await?,
            Verdict::Again(_) | Verdict::GiveUp => {
                let badly = "UPDATE webhooks SET failing_since = COALESCE(failing_since, $2) WHERE id = $1";
                sqlx::query(badly).bind(webhook.as_str()).bind(began.as_millis()).execute(&mut *tx).await?;
                disable(webhook, DisabledReason::Failing, Some(patience_from), &mut *tx).await?
            }
        };
        tx.commit().await?;
        // Another one of this webhook's may have waited for its turn.
        self.outbox.notify_one();
        Ok(disabled.map_or(Settled::Delivery, |(webhook, reason)| Settled::Disabled(Box::new(webhook), reason)))
    }

    /// When something is due next, if anything is.
    pub async fn delivery_next_due(&self) -> Result<Option<Timestamp>, StoreError> {
        let row = sqlx::query(
            "SELECT MIN(CASE WHEN d.leased_until > d.due_at THEN d.leased_until ELSE d.due_at END) AS next
             FROM webhooks w JOIN webhook_deliveries d ON d.webhook_id = w.id AND d.state = 'pending'
             WHERE w.enabled = 1",
        )
        .fetch_one(&self.pool)
        .await?;
        Fields::new("webhook_deliveries", &row).time_if_any("next")
    }
}

/// Disables a webhook that is enabled and, where `failing_before` is given, has failed since before then.
async fn disable<'e>(
    webhook: &WebhookId,
    reason: DisabledReason,
    failing_before: Option<Timestamp>,
    db: impl sqlx::Executor<'e, Database = Any>,
) -> Result<Option<(Webhook, DisabledReason)>, StoreError> {
    let statement = sqlx::query(concat!(
        "UPDATE webhooks SET enabled = 0, disabled_reason = $2, updated_at = $3
         WHERE id = $1 AND enabled = 1 AND ($4 < 0 OR failing_since <= $4) RETURNING ",
        webhook_columns!()
    ))
    .bind(webhook.as_str())
    .bind(reason.as_str())
    .bind(Timestamp::now().as_millis())
    .bind(failing_before.map_or(-1, |before| before.as_millis().max(0)));
    returned(statement, db).await?.map(|row| Ok((webhook_from(&row)?, reason))).transpose()
}

/// One delivery of a webhook.
pub(super) async fn get<'e>(
    webhook: &WebhookId,
    id: &DeliveryId,
    db: impl sqlx::Executor<'e, Database = Any>,
) -> Result<Option<Delivery>, StoreError> {
    sqlx::query(concat!("SELECT ", columns!(), " FROM webhook_deliveries WHERE id = $1 AND webhook_id = $2"))
        .bind(id.as_str())
        .bind(webhook.as_str())
        .fetch_optional(db)
        .await?
        .map(|row| delivery_from(&row))
        .transpose()
}

fn delivery_from(row: &AnyRow) -> Result<Delivery, StoreError> {
    let fields = Fields::new("webhook_deliveries", row);
    Ok(Delivery {
        id: fields.parsed("id")?,
        webhook_id: fields.parsed("webhook_id")?,
        event_id: fields.parsed("event_id")?,
        event_type: fields.text("event_type")?,
        state: fields.parsed("state")?,
        created_at: fields.time("created_at")?,
        due_at: fields.time("due_at")?,
        attempts: fields.number("attempts")?,
        history: fields.json("history")?,
    })
}
