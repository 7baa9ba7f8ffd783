//! Accounts and their quotas, and the one account that the first start makes.
//!
//! Invariant: names are unique; there is at most one first start, however many servers start at once.

use sqlx::any::AnyRow;
use tiffin_types::{
    account::Quota,
    id::{AccountId, ApiKeyId},
    time::Timestamp,
};

use crate::{
    ApiKey, NewApiKey, Store, StoreError, api_keys,
    row::{Fields, column, returned},
};

/// Who owns VMs, images and keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// Its id.
    pub id: AccountId,
    /// Its name; no two accounts have the same.
    pub name: String,
    /// What its VMs may use together.
    pub quota: Quota,
    /// When it was made.
    pub created_at: Timestamp,
}

/// The key that the first start makes along with the admin account: [`NewApiKey`] without the account.
#[derive(Debug, Clone)]
pub struct NewAdminKey<'a> {
    /// A name for people.
    pub name: &'a str,
    /// The visible part of the key; unique.
    pub prefix: &'a str,
    /// The SHA-256 of the secret.
    pub secret_sha256: [u8; 32],
    /// What it may do; one or more.
    pub scopes: &'a [tiffin_types::account::Scope],
    /// From when on it is refused, if ever.
    pub expires_at: Option<Timestamp>,
}

macro_rules! columns {
    () => {
        "id, name, quota_vms, quota_cpus, quota_mem_mb, quota_disk_mb, created_at"
    };
}

impl Store {
    /// Makes an account. A name that is taken is a [`StoreError::Conflict`].
    pub async fn account_create(&self, name: &str, quota: Quota) -> Result<Account, StoreError> {
        let account = new_account(name, quota);
        insert(&account, &self.pool).await?;
        Ok(account)
    }

    /// The account with that id.
    pub async fn account_get(&self, id: &AccountId) -> Result<Option<Account>, StoreError> {
        sqlx::query(concat!("SELECT ", columns!(), " FROM accounts WHERE id = $1"))
            .bind(id.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| account_from(&row))
            .transpose()
    }

    /// Every account, oldest first.
    pub async fn account_list(&self) -> Result<Vec<Account>, StoreError> {
        let rows = sqlx::query(concat!("SELECT ", columns!(), " FROM accounts ORDER BY created_at, id"))
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(account_from).collect()
    }

    /// Changes an account's quota; `false` when there is no such account. What is in use beyond a smaller quota stays,
    /// nothing is added.
    pub async fn account_set_quota(&self, id: &AccountId, quota: Quota) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "UPDATE accounts SET quota_vms = $2, quota_cpus = $3, quota_mem_mb = $4, quota_disk_mb = $5 WHERE id = $1",
        )
        .bind(id.as_str())
        .bind(i64::from(quota.vms))
        .bind(i64::from(quota.cpus))
        .bind(column(quota.mem_mb))
        .bind(column(quota.disk_mb))
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Makes the first account and its key, in one transaction; `None` when there is or ever was an account. Of
    /// servers that start at once on one database, exactly one gets `Some`.
    pub async fn setup_admin(
        &self,
        name: &str,
        quota: Quota,
        key: NewAdminKey<'_>,
    ) -> Result<Option<(Account, ApiKey)>, StoreError> {
        let account = new_account(name, quota);
        let mut tx = self.pool.begin().await?;
        // The first statement decides the race: on SQLite by the write lock, on Postgres by the primary key, on which
        // the second comer waits for the first one's commit.
        let claim = sqlx::query(
            "INSERT INTO first_start (only_row, created_at) SELECT 1, CAST($1 AS BIGINT)
             WHERE NOT EXISTS (SELECT 1 FROM accounts) ON CONFLICT DO NOTHING",
        )
        .bind(account.created_at.as_millis())
        .execute(&mut *tx)
        .await?;
        if claim.rows_affected() == 0 {
            tx.rollback().await?;
            return Ok(None);
        }
        insert(&account, &mut *tx).await?;
        let key = NewApiKey {
            account_id: &account.id,
            name: key.name,
            prefix: key.prefix,
            secret_sha256: key.secret_sha256,
            scopes: key.scopes,
            expires_at: key.expires_at,
        };
        let key = api_keys::insert(&ApiKeyId::random(), &key, &mut *tx).await?;
        tx.commit().await?;
        Ok(Some((account, key)))
    }
}

fn new_account(name: &str, quota: Quota) -> Account {
    Account { id: AccountId::random(), name: name.to_owned(), quota, created_at: Timestamp::now() }
}

async fn insert<'e>(account: &Account, db: impl sqlx::Executor<'e, Database = sqlx::Any>) -> Result<(), StoreError> {
    let statement = sqlx::query(concat!(
        "INSERT INTO accounts (",
        columns!(),
        ") VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id"
    ))
    .bind(account.id.as_str())
    .bind(account.name.as_str())
    .bind(i64::from(account.quota.vms))
    .bind(i64::from(account.quota.cpus))
    .bind(column(account.quota.mem_mb))
    .bind(column(account.quota.disk_mb))
    .bind(account.created_at.as_millis());
    returned(statement, db)
        .await
        .map_err(|error| StoreError::or_conflict(error, format!("an account named {:?} exists", account.name)))?;
    Ok(())
}

fn account_from(row: &AnyRow) -> Result<Account, StoreError> {
    let fields = Fields::new("accounts", row);
    Ok(Account {
        id: fields.parsed("id")?,
        name: fields.text("name")?,
        quota: Quota {
            vms: fields.number("quota_vms")?,
            cpus: fields.number("quota_cpus")?,
            mem_mb: fields.number("quota_mem_mb")?,
            disk_mb: fields.number("quota_disk_mb")?,
        },
        created_at: fields.time("created_at")?,
    })
}
