//! What is kept of uploads that broke off, so that they can be gone on with.
//!
//! Invariants: there is at most one for each part of an image; it goes with the image, and when the part is whole. What is kept
//! counts against the quota of the image's account. The bytes are a file of the server's, and its length is what counts there.

use sqlx::any::AnyRow;
use tiffin_types::{
    id::{AccountId, Digest, ImageId},
    time::Timestamp,
};

use super::{ImageQuota, Upload, usage};
use crate::{
    Store, StoreError, quota,
    row::{Fields, column},
};

/// An upload that isn't whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partial {
    /// The image.
    pub image_id: ImageId,
    /// Which part of it.
    pub part: Upload,
    /// Bytes that came.
    pub received_bytes: u64,
    /// Bytes of the whole file, if the client said so.
    pub total_bytes: Option<u64>,
    /// The SHA-256 of the whole file, if the client said so.
    pub digest: Option<Digest>,
    /// When it was last worked on.
    pub updated_at: Timestamp,
}

impl Store {
    /// Writes down an upload that begins or goes on. An image that is gone is a [`StoreError::Conflict`].
    pub async fn image_partial_begin(&self, partial: &Partial) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO image_partials (image_id, part, received_bytes, total_bytes, digest, updated_at)
             VALUES ($1, $2, $3, $4, $5, $6)
             ON CONFLICT (image_id, part) DO UPDATE SET received_bytes = excluded.received_bytes,
             total_bytes = excluded.total_bytes, digest = excluded.digest, updated_at = excluded.updated_at",
        )
        .bind(partial.image_id.as_str())
        .bind(partial.part.as_str())
        .bind(column(partial.received_bytes))
        .bind(partial.total_bytes.map(column))
        .bind(partial.digest.as_ref().map(Digest::as_str))
        .bind(partial.updated_at.as_millis())
        .execute(&self.pool)
        .await
        .map_err(|error| StoreError::or_conflict(error, "the upload's image doesn't exist"))?;
        Ok(())
    }

    /// Keeps what came of an upload, if that fits the quota of the account whose image it is beside all else; `false`
    /// when it doesn't, and then it is forgotten. In one transaction.
    pub async fn image_partial_keep(
        &self,
        id: &ImageId,
        part: Upload,
        account: Option<&AccountId>,
        quota: &ImageQuota,
        received_bytes: u64,
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        if let Some(account) = account {
            quota::lock_account(account, &mut tx).await?;
        }
        let set = "UPDATE image_partials SET received_bytes = $3, updated_at = $4 WHERE image_id = $1 AND part = $2";
        let now = Timestamp::now().as_millis();
        let nothing = sqlx::query(set).bind(id.as_str()).bind(part.as_str()).bind(0_i64).bind(now);
        nothing.execute(&mut *tx).await?;
        let fits = match account {
            Some(account) => usage(account, None, &mut tx).await?.bytes.saturating_add(received_bytes) <= quota.bytes,
            None => true,
        };
        let statement = if fits { set } else { "DELETE FROM image_partials WHERE image_id = $1 AND part = $2" };
        let mut query = sqlx::query(statement).bind(id.as_str()).bind(part.as_str());
        if fits {
            query = query.bind(column(received_bytes)).bind(now);
        }
        query.execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(fits)
    }

    /// Forgets an upload; one that isn't there is fine.
    pub async fn image_partial_remove(&self, id: &ImageId, part: Upload) -> Result<(), StoreError> {
        let statement = sqlx::query("DELETE FROM image_partials WHERE image_id = $1 AND part = $2");
        statement.bind(id.as_str()).bind(part.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    /// The uploads to images that an account sees.
    pub async fn image_partials_of(&self, account: &AccountId) -> Result<Vec<Partial>, StoreError> {
        let rows = sqlx::query(
            "SELECT image_id AS id, part, received_bytes, total_bytes, image_partials.digest, updated_at
             FROM image_partials JOIN images ON images.id = image_partials.image_id
             WHERE account_id = $1 OR account_id IS NULL ORDER BY image_id, part DESC",
        );
        let rows = rows.bind(account.as_str()).fetch_all(&self.pool).await?;
        rows.iter().map(partial_from).collect()
    }

    /// One of them, whoever owns the image. Not for answering requests: check whose it is.
    pub async fn image_partial_get(&self, id: &ImageId, part: Upload) -> Result<Option<Partial>, StoreError> {
        let row = sqlx::query(
            "SELECT image_id AS id, part, received_bytes, total_bytes, digest, updated_at
             FROM image_partials WHERE image_id = $1 AND part = $2",
        );
        let row = row.bind(id.as_str()).bind(part.as_str()).fetch_optional(&self.pool).await?;
        row.map(|row| partial_from(&row)).transpose()
    }

    /// The uploads that nobody has worked on since; all, where that is now. Each with the account whose image it is.
    pub async fn image_partials_before(
        &self,
        time: Timestamp,
    ) -> Result<Vec<(Partial, Option<AccountId>)>, StoreError> {
        let rows = sqlx::query(
            "SELECT image_id AS id, part, received_bytes, total_bytes, image_partials.digest, updated_at, account_id
             FROM image_partials JOIN images ON images.id = image_partials.image_id
             WHERE updated_at <= $1 ORDER BY updated_at, image_id, part",
        );
        let rows = rows.bind(time.as_millis()).fetch_all(&self.pool).await?;
        let with_account =
            |row: &AnyRow| Ok((partial_from(row)?, Fields::new("image_partials", row).parsed_if_any("account_id")?));
        rows.iter().map(with_account).collect()
    }
}

fn partial_from(row: &AnyRow) -> Result<Partial, StoreError> {
    let fields = Fields::new("image_partials", row);
    Ok(Partial {
        image_id: fields.parsed("id")?,
        part: fields.parsed("part")?,
        received_bytes: fields.number("received_bytes")?,
        total_bytes: fields.number_if_any("total_bytes")?,
        digest: fields.parsed_if_any("digest")?,
        updated_at: fields.time("updated_at")?,
    })
}
