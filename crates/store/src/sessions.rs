//! Who is logged in, by the hash of the token that their browser holds.
//!
//! Invariant: a token never gets here, only its SHA-256; sessions of one user are bounded. Whether a session is still good
//! is for the caller to decide.

use tiffin_types::time::Timestamp;

use crate::{Store, StoreError, User, row::Fields, users::user_from};

/// Sessions that one user has at most; the oldest make room.
const PER_USER: i64 = 100;

/// A user's session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// Whose it is.
    pub user: User,
    /// When it was last used, about: see [`Store::session_used`].
    pub last_used_at: Timestamp,
    /// When it ends, however much it is used.
    pub expires_at: Timestamp,
}

impl Store {
    /// Begins a session of a user, as long as their password is the one set at `password_set_at`; `false` when it has been
    /// changed since.
    pub async fn session_create(
        &self,
        token_sha256: [u8; 32],
        user: &User,
        now: Timestamp,
        expires_at: Timestamp,
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        // An update, as it waits for a change of the password that isn't committed yet, and makes one that comes wait: a
        // session is begun before it, and ended by it, or not at all.
        let is_current =
            sqlx::query("UPDATE users SET password_set_at = password_set_at WHERE id = $1 AND password_set_at = $2")
                .bind(user.id.as_str())
                .bind(user.password_set_at.as_millis())
                .execute(&mut *tx)
                .await?;
        if is_current.rows_affected() != 1 {
            tx.rollback().await?;
            return Ok(false);
        }
        sqlx::query(
            "INSERT INTO sessions (id, user_id, created_at, last_used_at, expires_at)
             VALUES ($1, $2, CAST($3 AS BIGINT), CAST($3 AS BIGINT), $4)",
        )
        .bind(hex::encode(token_sha256))
        .bind(user.id.as_str())
        .bind(now.as_millis())
        .bind(expires_at.as_millis())
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "DELETE FROM sessions WHERE user_id = $1 AND id NOT IN
             (SELECT id FROM sessions WHERE user_id = $1 ORDER BY created_at DESC, id LIMIT $2)",
        )
        .bind(user.id.as_str())
        .bind(PER_USER)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// The session of that token, expired ones too.
    pub async fn session_get(&self, token_sha256: [u8; 32]) -> Result<Option<Session>, StoreError> {
        let row = sqlx::query(
            "SELECT users.id AS id, account_id, email, scopes, users.created_at AS created_at, password_set_at,
                 last_used_at, expires_at
             FROM sessions JOIN users ON users.id = user_id WHERE sessions.id = $1",
        )
        .bind(hex::encode(token_sha256))
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            let fields = Fields::new("sessions", &row);
            let (last_used_at, expires_at) = (fields.time("last_used_at")?, fields.time("expires_at")?);
            Ok(Session { user: user_from(&row)?, last_used_at, expires_at })
        })
        .transpose()
    }

    /// Notes that a session was used; an earlier moment than the one noted changes nothing. A write, so the caller
    /// throttles it.
    pub async fn session_used(&self, token_sha256: [u8; 32], at: Timestamp) -> Result<(), StoreError> {
        sqlx::query("UPDATE sessions SET last_used_at = $2 WHERE id = $1 AND last_used_at < $2")
            .bind(hex::encode(token_sha256))
            .bind(at.as_millis())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Ends a session; `false` when there is none.
    pub async fn session_delete(&self, token_sha256: [u8; 32]) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM sessions WHERE id = $1")
            .bind(hex::encode(token_sha256))
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Forgets sessions that end before `now` or were last used before `idle_since`; how many.
    pub async fn session_prune(&self, now: Timestamp, idle_since: Timestamp) -> Result<u64, StoreError> {
        let done = sqlx::query("DELETE FROM sessions WHERE expires_at <= $1 OR last_used_at <= $2")
            .bind(now.as_millis())
            .bind(idle_since.as_millis())
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected())
    }
}
