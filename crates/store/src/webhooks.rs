//! Webhooks: who is to be told of which events, and with which secret that is signed.
//!
//! Invariant: a secret leaves only through [`Store::webhook_target`], for signing, and is in no `Debug` text.
//!
//! What is to be delivered is in `outbox` (written with the event that causes it) and `deliveries` (claimed, tried,
//! settled).

macro_rules! webhook_columns {
    () => {
        "id, account_id, name, url, enabled, event_types, created_at, updated_at, old_secret_until, failing_since,
         disabled_reason, dropped"
    };
}
mod deliveries;
mod outbox;

use std::fmt;

use sqlx::any::AnyRow;
use tiffin_types::{
    id::{AccountId, WebhookId},
    time::Timestamp,
};

pub use deliveries::{Attempt, Claimed, Delivery, DeliveryState, Redelivery, Settled, Verdict};
pub(crate) use outbox::{Event, emit};

use crate::{
    Store, StoreError, quota,
    row::{Fields, column, millis, returned},
};

/// A webhook, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Webhook {
    /// Its id.
    pub id: WebhookId,
    /// Whose it is: it is told of that account's events.
    pub account_id: AccountId,
    /// A name for people; need not be unique.
    pub name: String,
    /// Where it is delivered to.
    pub url: String,
    /// Whether it is told of anything.
    pub enabled: bool,
    /// Of which events, or `*`.
    pub event_types: Vec<String>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
    /// Until when what is delivered is signed with the secret before, too.
    pub old_secret_until: Option<Timestamp>,
    /// Since when nothing has been delivered though it was tried.
    pub failing_since: Option<Timestamp>,
    /// Why it was disabled by Tiffin, if it was.
    pub disabled_reason: Option<DisabledReason>,
    /// Events that were dropped because too much was waiting.
    pub dropped: u64,
}

/// Why Tiffin disabled a webhook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisabledReason {
    /// Its receiver said that it is gone for good (410).
    Gone,
    /// Nothing could be delivered for days.
    Failing,
}

impl DisabledReason {
    const ALL: [Self; 2] = [Self::Gone, Self::Failing];

    /// Its name in the API and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Failing => "failing",
        }
    }
}

impl std::str::FromStr for DisabledReason {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == text).ok_or("not gone or failing")
    }
}

/// A webhook to be made.
#[derive(Clone)]
pub struct NewWebhook<'a> {
    /// Whose it is.
    pub account_id: &'a AccountId,
    /// A name for people.
    pub name: &'a str,
    /// Where it is delivered to.
    pub url: &'a str,
    /// Whether it is told of anything yet.
    pub enabled: bool,
    /// Of which events, or `*`; none of them has a comma.
    pub event_types: &'a [String],
    /// What it is signed with.
    pub secret: &'a str,
}

/// What is to be changed of a webhook.
#[derive(Debug, Clone, Default)]
pub struct WebhookChange {
    /// Its name.
    pub name: Option<String>,
    /// Where it is delivered to.
    pub url: Option<String>,
    /// Whether it is told of anything. Enabled, it is forgotten that it failed.
    pub enabled: Option<bool>,
    /// Of which events.
    pub event_types: Option<Vec<String>>,
}

/// Where to deliver, and what to sign with.
#[derive(Clone)]
pub struct WebhookTarget {
    /// Where.
    pub url: String,
    /// The secret, and the one before it while that is good.
    pub secrets: Vec<String>,
}

impl fmt::Debug for NewWebhook<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewWebhook").field("name", &self.name).field("url", &self.url).finish_non_exhaustive()
    }
}

impl fmt::Debug for WebhookTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookTarget").field("url", &self.url).finish_non_exhaustive()
    }
}

impl Store {
    /// Makes a webhook; `None`, and nothing done, when the account has `limit` of them.
    pub async fn webhook_create(&self, new: NewWebhook<'_>, limit: u32) -> Result<Option<Webhook>, StoreError> {
        let mut tx = self.pool.begin().await?;
        if !quota::lock_account(new.account_id, &mut tx).await? {
            return Err(StoreError::Conflict(format!("no account {}", new.account_id)));
        }
        let row = sqlx::query("SELECT COUNT(*) AS there FROM webhooks WHERE account_id = $1")
            .bind(new.account_id.as_str())
            .fetch_one(&mut *tx)
            .await?;
        if Fields::new("webhooks", &row).number::<u64>("there")? >= u64::from(limit) {
            tx.rollback().await?;
            return Ok(None);
        }
        let statement = sqlx::query(concat!(
            "INSERT INTO webhooks (id, account_id, name, url, enabled, event_types, secret, created_at, updated_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $8) RETURNING ",
            webhook_columns!()
        ))
        .bind(WebhookId::random().to_string())
        .bind(new.account_id.as_str())
        .bind(new.name)
        .bind(new.url)
        .bind(i64::from(new.enabled))
        .bind(list(new.event_types))
        .bind(new.secret)
        .bind(Timestamp::now().as_millis());
        let row = returned(statement, &mut *tx).await?.ok_or(sqlx::Error::RowNotFound)?;
        tx.commit().await?;
        webhook_from(&row).map(Some)
    }

    /// The account's webhook with that id.
    pub async fn webhook_get(&self, account: &AccountId, id: &WebhookId) -> Result<Option<Webhook>, StoreError> {
        sqlx::query(concat!("SELECT ", webhook_columns!(), " FROM webhooks WHERE id = $1 AND account_id = $2"))
            .bind(id.as_str())
            .bind(account.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| webhook_from(&row))
            .transpose()
    }

    /// The account's webhooks, oldest first.
    pub async fn webhook_list(&self, account: &AccountId) -> Result<Vec<Webhook>, StoreError> {
        let query = sqlx::query(concat!(
            "SELECT ",
            webhook_columns!(),
            " FROM webhooks WHERE account_id = $1 ORDER BY created_at, id"
        ));
        query.bind(account.as_str()).fetch_all(&self.pool).await?.iter().map(webhook_from).collect()
    }

    /// Changes a webhook; as it is then, or `None` when the account has none with that id.
    pub async fn webhook_update(
        &self,
        account: &AccountId,
        id: &WebhookId,
        change: &WebhookChange,
    ) -> Result<Option<Webhook>, StoreError> {
        let statement = sqlx::query(concat!(
            "UPDATE webhooks SET name = COALESCE($3, name), url = COALESCE($4, url),
                 enabled = COALESCE($5, enabled), event_types = COALESCE($6, event_types), updated_at = $7,
                 failing_since = CASE WHEN $5 = 1 THEN NULL ELSE failing_since END,
                 disabled_reason = CASE WHEN $5 = 1 THEN NULL ELSE disabled_reason END
             WHERE id = $1 AND account_id = $2 RETURNING ",
            webhook_columns!()
        ))
        .bind(id.as_str())
        .bind(account.as_str())
        .bind(change.name.as_deref())
        .bind(change.url.as_deref())
        .bind(change.enabled.map(i64::from))
        .bind(change.event_types.as_deref().map(list))
        .bind(Timestamp::now().as_millis());
        let changed = returned(statement, &self.pool).await?.map(|row| webhook_from(&row)).transpose()?;
        if changed.is_some() {
            self.outbox.notify_one();
        }
        Ok(changed)
    }

    /// Gives a webhook another secret. What is delivered is signed with the one before it, too, until `overlap_until`.
    pub async fn webhook_rotate(
        &self,
        account: &AccountId,
        id: &WebhookId,
        secret: &str,
        overlap_until: Option<Timestamp>,
    ) -> Result<Option<Webhook>, StoreError> {
        let statement = sqlx::query(concat!(
            "UPDATE webhooks SET old_secret = CASE WHEN $4 IS NULL THEN NULL ELSE secret END, old_secret_until = $4,
                 secret = $3, updated_at = $5
             WHERE id = $1 AND account_id = $2 RETURNING ",
            webhook_columns!()
        ))
        .bind(id.as_str())
        .bind(account.as_str())
        .bind(secret)
        .bind(millis(overlap_until))
        .bind(Timestamp::now().as_millis());
        returned(statement, &self.pool).await?.map(|row| webhook_from(&row)).transpose()
    }

    /// Removes a webhook and what was to be delivered to it; whether there was one.
    pub async fn webhook_delete(&self, account: &AccountId, id: &WebhookId) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        let done = sqlx::query("DELETE FROM webhooks WHERE id = $1 AND account_id = $2")
            .bind(id.as_str())
            .bind(account.as_str())
            .execute(&mut *tx)
            .await?;
        if done.rows_affected() == 0 {
            tx.rollback().await?;
            return Ok(false);
        }
        sqlx::query("DELETE FROM webhook_deliveries WHERE webhook_id = $1").bind(id.as_str()).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Where to deliver to a webhook, and what to sign with at that moment; `None` when it is gone or disabled.
    pub async fn webhook_target(&self, id: &WebhookId, now: Timestamp) -> Result<Option<WebhookTarget>, StoreError> {
        let query = "SELECT id, url, secret, CASE WHEN old_secret_until > $2 THEN old_secret END AS old_secret
             FROM webhooks WHERE id = $1 AND enabled = 1";
        let row = sqlx::query(query).bind(id.as_str()).bind(now.as_millis()).fetch_optional(&self.pool).await?;
        row.map(|row| {
            let fields = Fields::new("webhooks", &row);
            let secrets = [Some(fields.text("secret")?), fields.text_if_any("old_secret")?];
            Ok(WebhookTarget { url: fields.text("url")?, secrets: secrets.into_iter().flatten().collect() })
        })
        .transpose()
    }

    /// Forgets the secrets before that are no good any more, and of every webhook the deliveries that are done, but the
    /// newest `kept`, or from before `since`; and what is left of webhooks that are gone. How many deliveries.
    pub async fn webhook_prune(&self, since: Timestamp, kept: u64) -> Result<u64, StoreError> {
        sqlx::query("UPDATE webhooks SET old_secret = NULL, old_secret_until = NULL WHERE old_secret_until <= $1")
            .bind(Timestamp::now().as_millis())
            .execute(&self.pool)
            .await?;
        let done = sqlx::query(
            "DELETE FROM webhook_deliveries WHERE NOT EXISTS (SELECT 1 FROM webhooks w WHERE w.id = webhook_id)
             OR created_at < $1",
        )
        .bind(since.as_millis())
        .execute(&self.pool)
        .await?;
        let mut pruned = done.rows_affected();
        for row in sqlx::query("SELECT id FROM webhooks").fetch_all(&self.pool).await? {
            let id = Fields::new("webhooks", &row).text("id")?;
            let done = sqlx::query(
                "DELETE FROM webhook_deliveries WHERE webhook_id = $1 AND state <> 'pending' AND created_at <
                     (SELECT created_at FROM webhook_deliveries WHERE webhook_id = $1
                      ORDER BY created_at DESC LIMIT 1 OFFSET $2)",
            )
            .bind(id)
            .bind(column(kept))
            .execute(&self.pool)
            .await?;
            pruned += done.rows_affected();
        }
        Ok(pruned)
    }
}

/// Event types as their column has them, so that one is found between its commas.
fn list(event_types: &[String]) -> String {
    format!(",{},", event_types.join(","))
}

fn webhook_from(row: &AnyRow) -> Result<Webhook, StoreError> {
    let fields = Fields::new("webhooks", row);
    let event_types = fields.text("event_types")?;
    Ok(Webhook {
        id: fields.parsed("id")?,
        account_id: fields.parsed("account_id")?,
        name: fields.text("name")?,
        url: fields.text("url")?,
        enabled: fields.number::<i64>("enabled")? != 0,
        event_types: event_types.trim_matches(',').split(',').map(str::to_owned).collect(),
        created_at: fields.time("created_at")?,
        updated_at: fields.time("updated_at")?,
        old_secret_until: fields.time_if_any("old_secret_until")?,
        failing_since: fields.time_if_any("failing_since")?,
        disabled_reason: fields.parsed_if_any("disabled_reason")?,
        dropped: fields.number("dropped")?,
    })
}
