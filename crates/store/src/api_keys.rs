//! API keys: who they belong to, what they may do, and the hash of their secret.
//!
//! Invariant: the secret itself never gets here, and its hash leaves only through [`Store::api_key_by_prefix`], for the
//! comparison. Whether a key is good (not expired, not revoked, right secret) is for the caller to decide.

use sqlx::any::AnyRow;
use tiffin_types::{
    account::Scope,
    id::{AccountId, ApiKeyId},
    time::Timestamp,
};

use crate::{
    Store, StoreError,
    row::{Fields, millis, returned},
};

/// An API key, without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its id, which people manage it by.
    pub id: ApiKeyId,
    /// The account that it acts for.
    pub account_id: AccountId,
    /// A name for people; need not be unique.
    pub name: String,
    /// The visible part of the key; unique.
    pub prefix: String,
    /// What it may do; one or more.
    pub scopes: Vec<Scope>,
    /// When it was made.
    pub created_at: Timestamp,
    /// From when on it is refused, if ever.
    pub expires_at: Option<Timestamp>,
    /// Since when it is refused by request.
    pub revoked_at: Option<Timestamp>,
    /// About when it was last used; see [`Store::api_key_used`].
    pub last_used_at: Option<Timestamp>,
}

/// An API key to be made.
#[derive(Debug, Clone)]
pub struct NewApiKey<'a> {
    /// The account that it acts for.
    pub account_id: &'a AccountId,
    /// A name for people.
    pub name: &'a str,
    /// The visible part of the key; unique.
    pub prefix: &'a str,
    /// The SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// What it may do; one or more.
    pub scopes: &'a [Scope],
    /// From when on it is refused, if ever.
    pub expires_at: Option<Timestamp>,
}

macro_rules! columns {
    () => {
        "id, account_id, name, prefix, scopes, created_at, expires_at, revoked_at, last_used_at"
    };
}

impl Store {
    /// Makes a key. A prefix that is taken, an account that doesn't exist or no scope at all is a [`StoreError::Conflict`].
    pub async fn api_key_create(&self, new: NewApiKey<'_>) -> Result<ApiKey, StoreError> {
        insert(&ApiKeyId::random(), &new, &self.pool).await
    }

    /// The key with that prefix, and the SHA-256 of its secret: compare it in constant time. Revoked and expired keys too.
    pub async fn api_key_by_prefix(&self, prefix: &str) -> Result<Option<(ApiKey, [u8; 32])>, StoreError> {
        sqlx::query(concat!("SELECT ", columns!(), ", secret_sha256 FROM api_keys WHERE prefix = $1"))
            .bind(prefix)
            .fetch_optional(&self.pool)
            .await?
            .map(|row| Ok((api_key_from(&row)?, Fields::new("api_keys", &row).sha256("secret_sha256")?)))
            .transpose()
    }

    /// The key with that id.
    pub async fn api_key_get(&self, id: &ApiKeyId) -> Result<Option<ApiKey>, StoreError> {
        sqlx::query(concat!("SELECT ", columns!(), " FROM api_keys WHERE id = $1"))
            .bind(id.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| api_key_from(&row))
            .transpose()
    }

    /// The account's keys, or every account's; oldest first, revoked and expired ones too.
    pub async fn api_key_list(&self, account: Option<&AccountId>) -> Result<Vec<ApiKey>, StoreError> {
        let query = match account {
            Some(id) => sqlx::query(concat!(
                "SELECT ",
                columns!(),
                " FROM api_keys WHERE account_id = $1 ORDER BY created_at, id"
            ))
            .bind(id.as_str()),
            None => sqlx::query(concat!("SELECT ", columns!(), " FROM api_keys ORDER BY created_at, id")),
        };
        query.fetch_all(&self.pool).await?.iter().map(api_key_from).collect()
    }

    /// Revokes a key for good. `false`, and nothing changed, when there is no such key or it was revoked before.
    pub async fn api_key_revoke(&self, id: &ApiKeyId, at: Timestamp) -> Result<bool, StoreError> {
        let done = sqlx::query("UPDATE api_keys SET revoked_at = $2 WHERE id = $1 AND revoked_at IS NULL")
            .bind(id.as_str())
            .bind(at.as_millis())
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Notes that a key was used; an earlier moment than the one noted changes nothing.
    ///
    /// This is a write with a disk flush, so not something for each request: the caller throttles it, by the
    /// `last_used_at` that it has just read (once a minute and key is plenty).
    pub async fn api_key_used(&self, id: &ApiKeyId, at: Timestamp) -> Result<(), StoreError> {
        sqlx::query(
            "UPDATE api_keys SET last_used_at = $2 WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < $2)",
        )
        .bind(id.as_str())
        .bind(at.as_millis())
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

pub(crate) async fn insert<'e>(
    id: &ApiKeyId,
    new: &NewApiKey<'_>,
    db: impl sqlx::Executor<'e, Database = sqlx::Any>,
) -> Result<ApiKey, StoreError> {
    let scopes = new.scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",");
    let statement = sqlx::query(concat!(
        "INSERT INTO api_keys (id, account_id, name, prefix, secret_sha256, scopes, created_at, expires_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING ",
        columns!()
    ))
    .bind(id.as_str())
    .bind(new.account_id.as_str())
    .bind(new.name)
    .bind(new.prefix)
    .bind(hex::encode(new.secret_sha256))
    .bind(scopes)
    .bind(Timestamp::now().as_millis())
    .bind(millis(new.expires_at));
    let row = returned(statement, db).await.map_err(|error| {
        StoreError::or_conflict(error, "the key's prefix is taken, its account doesn't exist, or it has no scope")
    })?;
    api_key_from(&row.ok_or(sqlx::Error::RowNotFound)?)
}

fn api_key_from(row: &AnyRow) -> Result<ApiKey, StoreError> {
    let fields = Fields::new("api_keys", row);
    Ok(ApiKey {
        id: fields.parsed("id")?,
        account_id: fields.parsed("account_id")?,
        name: fields.text("name")?,
        prefix: fields.text("prefix")?,
        scopes: fields.parsed_list("scopes")?,
        created_at: fields.time("created_at")?,
        expires_at: fields.time_if_any("expires_at")?,
        revoked_at: fields.time_if_any("revoked_at")?,
        last_used_at: fields.time_if_any("last_used_at")?,
    })
}
