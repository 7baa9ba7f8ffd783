//! What was done, by whom, and what became of VMs by themselves: the audit trail.
//!
//! Invariant: entries are only added, in the order of their ids, and forgotten oldest first. No entry holds a secret or
//! a body; that is for the caller to see to.

use sqlx::{AnyConnection, any::AnyRow};
use tiffin_types::{id::AccountId, time::Timestamp};

use crate::{Store, StoreError, exec_logs, row::Fields, webhooks};

/// Something that was done or happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activity {
    /// A ULID; later entries have greater ones.
    pub id: String,
    /// When.
    pub at: Timestamp,
    /// The operation's id in the API's document, or `vm_state`.
    pub event: String,
    /// Who did it.
    pub actor: Performer,
    /// Whose thing it was done as, or whose VM it is.
    pub account_id: Option<AccountId>,
    /// The ids of what it was done to, with commas between.
    pub target: Option<String>,
    /// The answer's status.
    pub status: Option<u16>,
    /// The request's id.
    pub request_id: Option<String>,
    /// The address that the request came from.
    pub peer: Option<String>,
    /// More, for events that have more.
    pub details: Option<serde_json::Value>,
    /// Whether it is forgotten by its age alone, however many others there are.
    pub is_lasting: bool,
}

/// Who did something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Performer {
    /// What kind of somebody.
    pub kind: PerformerKind,
    /// Its id.
    pub id: Option<String>,
    /// Its name for people at that time: a key's name, a user's email.
    pub name: Option<String>,
}

/// What kind of somebody did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PerformerKind {
    /// An API key.
    Key,
    /// Somebody logged in.
    User,
    /// Tiffin itself.
    System,
    /// Nobody that is known, such as one who tries to log in.
    Anonymous,
}

impl PerformerKind {
    const ALL: [Self; 4] = [Self::Key, Self::User, Self::System, Self::Anonymous];

    /// Its name in the API and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::User => "user",
            Self::System => "system",
            Self::Anonymous => "anonymous",
        }
    }
}

impl std::str::FromStr for PerformerKind {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or("not key, user, system or anonymous")
    }
}

macro_rules! columns {
    () => {
        "id, at, event, actor_kind, actor_id, actor_name, account_id, target, status, request_id, peer, details,
         lasting"
    };
}

impl Store {
    /// Writes entries down, with what webhooks are to be told of them, all or none. Written again, an entry changes nothing. Of a VM's runs the newest `runs_kept` stay.
    pub async fn journal_write(
        &self,
        activity: &[Activity],
        runs: &[exec_logs::ExecLog],
        runs_kept: u32,
    ) -> Result<(), StoreError> {
        if activity.is_empty() && runs.is_empty() {
            return Ok(());
        }
        let mut tx = self.pool.begin().await?;
        for entry in activity {
            let is_new = insert(entry, &mut tx).await?;
            if let Some(event) = webhooks::Event::of_activity(entry).filter(|_| is_new) {
                webhooks::emit(&event, &mut tx).await?;
            }
        }
        exec_logs::insert_all(runs, runs_kept, &mut tx).await?;
        tx.commit().await?;
        self.outbox.notify_one();
        Ok(())
    }

    /// The newest entries, newest first; those before `before` when that is given.
    pub async fn activity_list(&self, limit: u32, before: Option<&str>) -> Result<Vec<Activity>, StoreError> {
        let rows = sqlx::query(concat!(
            "SELECT ",
            columns!(),
            " FROM activity WHERE ($1 = '' OR id < $1) ORDER BY id DESC LIMIT $2"
        ))
        .bind(before.unwrap_or(""))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(activity_from).collect()
    }

    /// The entries after `after`, oldest first.
    pub async fn activity_after(&self, after: &str, limit: u32) -> Result<Vec<Activity>, StoreError> {
        let rows = sqlx::query(concat!("SELECT ", columns!(), " FROM activity WHERE id > $1 ORDER BY id LIMIT $2"))
            .bind(after)
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(activity_from).collect()
    }

    /// Forgets entries and runs from before `since`, and of the entries that aren't lasting all but the newest `kept`; how
    /// many.
    pub async fn journal_prune(&self, since: Timestamp, kept: u64) -> Result<u64, StoreError> {
        let entries = sqlx::query(
            "DELETE FROM activity WHERE at < $1 OR (lasting = 0
             AND id <= (SELECT id FROM activity WHERE lasting = 0 ORDER BY id DESC LIMIT 1 OFFSET $2))",
        )
        .bind(since.as_millis())
        .bind(crate::row::column(kept))
        .execute(&self.pool)
        .await?;
        let runs =
            sqlx::query("DELETE FROM exec_logs WHERE at < $1").bind(since.as_millis()).execute(&self.pool).await?;
        Ok(entries.rows_affected() + runs.rows_affected())
    }
}

/// Writes an entry; whether it wasn't there.
async fn insert(entry: &Activity, tx: &mut AnyConnection) -> Result<bool, StoreError> {
    let done = sqlx::query(concat!(
        "INSERT INTO activity (",
        columns!(),
        ") VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) ON CONFLICT DO NOTHING"
    ))
    .bind(entry.id.as_str())
    .bind(entry.at.as_millis())
    .bind(entry.event.as_str())
    .bind(entry.actor.kind.as_str())
    .bind(entry.actor.id.as_deref())
    .bind(entry.actor.name.as_deref())
    .bind(entry.account_id.as_ref().map(AccountId::as_str))
    .bind(entry.target.as_deref())
    .bind(entry.status.map(i64::from))
    .bind(entry.request_id.as_deref())
    .bind(entry.peer.as_deref())
    .bind(entry.details.as_ref().map(ToString::to_string))
    .bind(i64::from(entry.is_lasting))
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

fn activity_from(row: &AnyRow) -> Result<Activity, StoreError> {
    let fields = Fields::new("activity", row);
    Ok(Activity {
        id: fields.text("id")?,
        at: fields.time("at")?,
        event: fields.text("event")?,
        actor: performer_from(&fields)?,
        account_id: fields.parsed_if_any("account_id")?,
        target: fields.text_if_any("target")?,
        status: fields.number_if_any("status")?,
        request_id: fields.text_if_any("request_id")?,
        peer: fields.text_if_any("peer")?,
        details: fields.json_if_any("details")?,
        is_lasting: fields.number::<i64>("lasting")? != 0,
    })
}

/// Who did something, from the columns that both tables have.
pub(crate) fn performer_from(fields: &Fields<'_>) -> Result<Performer, StoreError> {
    Ok(Performer {
        kind: fields.parsed("actor_kind")?,
        id: fields.text_if_any("actor_id")?,
        name: fields.text_if_any("actor_name")?,
    })
}
