//! People who log in with a password.
//!
//! Invariant: the password itself never gets here, and its hash leaves only through [`Store::user_by_email`]; a new
//! password ends every session of its user in the same transaction. Emails are kept as they are given: the caller
//! brings them to one form.

use sqlx::any::AnyRow;
use tiffin_types::{
    account::Scope,
    id::{AccountId, UserId},
    time::Timestamp,
};

use crate::{
    Store, StoreError,
    row::{Fields, returned},
};

/// Somebody who may log in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Their id.
    pub id: UserId,
    /// The account that they act for.
    pub account_id: AccountId,
    /// What they log in with; no two have the same.
    pub email: String,
    /// What they may do; one or more.
    pub scopes: Vec<Scope>,
    /// When they were made.
    pub created_at: Timestamp,
    /// When their password was set.
    pub password_set_at: Timestamp,
}

macro_rules! columns {
    () => {
        "id, account_id, email, scopes, created_at, password_set_at"
    };
}

impl Store {
    /// Makes the first user, for the oldest account; `None` when there is a user, or no account. Of servers that start at
    /// once on one database, at most one gets `Some`.
    pub async fn setup_user(
        &self,
        email: &str,
        password_hash: &str,
        scopes: &[Scope],
    ) -> Result<Option<User>, StoreError> {
        let scopes = scopes.iter().map(|scope| scope.as_str()).collect::<Vec<_>>().join(",");
        let statement = sqlx::query(concat!(
            "INSERT INTO users (id, account_id, email, password_hash, scopes, created_at, password_set_at)
             SELECT $1, oldest.id, $2, $3, $4, CAST($5 AS BIGINT), CAST($5 AS BIGINT)
             FROM (SELECT id FROM accounts ORDER BY created_at, id LIMIT 1) AS oldest
             WHERE NOT EXISTS (SELECT 1 FROM users) ON CONFLICT DO NOTHING RETURNING ",
            columns!()
        ))
        .bind(UserId::random().as_str().to_owned())
        .bind(email)
        .bind(password_hash)
        .bind(scopes)
        .bind(Timestamp::now().as_millis());
        returned(statement, &self.pool).await?.map(|row| user_from(&row)).transpose()
    }

    /// Whether anybody may log in.
    pub async fn user_exists(&self) -> Result<bool, StoreError> {
        Ok(sqlx::query("SELECT id FROM users LIMIT 1").fetch_optional(&self.pool).await?.is_some())
    }

    /// The user with that email, and the hash of their password.
    pub async fn user_by_email(&self, email: &str) -> Result<Option<(User, String)>, StoreError> {
        sqlx::query(concat!("SELECT ", columns!(), ", password_hash FROM users WHERE email = $1"))
            .bind(email)
            .fetch_optional(&self.pool)
            .await?
            .map(|row| Ok((user_from(&row)?, Fields::new("users", &row).text("password_hash")?)))
            .transpose()
    }

    /// Sets a user's password and ends every session of theirs; `false` when there is no such user.
    pub async fn user_set_password(&self, email: &str, password_hash: &str) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        let done = sqlx::query("UPDATE users SET password_hash = $2, password_set_at = $3 WHERE email = $1")
            .bind(email)
            .bind(password_hash)
            .bind(Timestamp::now().as_millis())
            .execute(&mut *tx)
            .await?;
        sqlx::query("DELETE FROM sessions WHERE user_id IN (SELECT id FROM users WHERE email = $1)")
            .bind(email)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }
}

pub(crate) fn user_from(row: &AnyRow) -> Result<User, StoreError> {
    let fields = Fields::new("users", row);
    Ok(User {
        id: fields.parsed("id")?,
        account_id: fields.parsed("account_id")?,
        email: fields.text("email")?,
        scopes: fields.parsed_list("scopes")?,
        created_at: fields.time("created_at")?,
        password_set_at: fields.time("password_set_at")?,
    })
}
