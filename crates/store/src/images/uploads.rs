//! Uploads to images, as far as they must outlive the server: that one is under way, what came of it.
//!
//! Invariant: what an image had before stays until the new part is whole. That an image has one upload at a time is the
//! server's care.

use tiffin_types::id::{AccountId, Digest, ImageId};

use super::{ImageQuota, usage};
use crate::{
    QuotaExceeded, Store, StoreError, quota,
    row::{Fields, column, returned},
};

/// A part of an image that is uploaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upload {
    /// Its files.
    Rootfs,
    /// Its kernel.
    Kernel,
}

impl Upload {
    /// The name in the store and in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Upload::Rootfs => "rootfs",
            Upload::Kernel => "kernel",
        }
    }
}

impl std::str::FromStr for Upload {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = [Upload::Rootfs, Upload::Kernel].into_iter().find(|upload| upload.as_str() == text);
        known.ok_or("must be rootfs or kernel")
    }
}

/// What an upload brought.
#[derive(Debug, Clone)]
pub enum Uploaded {
    /// Files.
    Rootfs {
        /// The blob.
        digest: Digest,
        /// Bytes of the blob.
        size_bytes: u64,
        /// Bytes of the files in it.
        rootfs_bytes: u64,
    },
    /// A kernel.
    Kernel {
        /// The blob.
        digest: Digest,
        /// Its bytes.
        size_bytes: u64,
    },
}

impl Store {
    /// Writes down that an upload begins; `false` when there is no such image.
    pub async fn image_upload_begin(&self, id: &ImageId, upload: Upload) -> Result<bool, StoreError> {
        let statement = sqlx::query("UPDATE images SET upload = $2, upload_error = NULL WHERE id = $1");
        let done = statement.bind(id.as_str()).bind(upload.as_str()).execute(&self.pool).await?;
        Ok(done.rows_affected() == 1)
    }

    /// Writes down that an upload's request is over, and that the next one goes on with it.
    pub async fn image_upload_pause(&self, id: &ImageId) -> Result<(), StoreError> {
        let statement = sqlx::query("UPDATE images SET upload = NULL, upload_error = NULL WHERE id = $1");
        statement.bind(id.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    /// Writes down that an upload came to nothing, and why. Nothing of one that ended already.
    pub async fn image_upload_failed(&self, id: &ImageId, why: &str) -> Result<(), StoreError> {
        let statement =
            sqlx::query("UPDATE images SET upload = NULL, upload_error = $2 WHERE id = $1 AND upload IS NOT NULL");
        // Postgres has no NUL in texts.
        statement.bind(id.as_str()).bind(why.replace('\0', "?")).execute(&self.pool).await?;
        Ok(())
    }

    /// The images with an upload that was written down to begin and not to end.
    pub async fn image_uploads_unfinished(&self) -> Result<Vec<ImageId>, StoreError> {
        let rows = sqlx::query("SELECT id FROM images WHERE upload IS NOT NULL").fetch_all(&self.pool).await?;
        rows.iter().map(|row| Fields::new("images", row).parsed("id")).collect()
    }

    /// Gives an image what was uploaded, if that fits the quota of the account whose image it is; the blob that it had
    /// in that place before. In one transaction. An image that is gone is a [`StoreError::Conflict`].
    pub async fn image_upload_finish(
        &self,
        id: &ImageId,
        account: Option<&AccountId>,
        quota: &ImageQuota,
        uploaded: &Uploaded,
    ) -> Result<Result<Option<Digest>, QuotaExceeded>, StoreError> {
        let mut tx = self.pool.begin().await?;
        if let Some(account) = account {
            quota::lock_account(account, &mut tx).await?;
        }
        let before = sqlx::query(
            "UPDATE images SET upload = NULL, upload_error = NULL WHERE id = $1
             RETURNING id, digest, kernel_digest, size_bytes, kernel_bytes",
        );
        let before = returned(before.bind(id.as_str()), &mut *tx).await?;
        let Some(before) = before else { return Err(StoreError::Conflict(format!("no image {id}"))) };
        let before = Fields::new("images", &before);
        let (part, asked, beside, replaced) = match uploaded {
            Uploaded::Rootfs { size_bytes, .. } => (Upload::Rootfs, *size_bytes, "kernel_bytes", "digest"),
            Uploaded::Kernel { size_bytes, .. } => (Upload::Kernel, *size_bytes, "size_bytes", "kernel_digest"),
        };
        // It is whole, and counts as what it became.
        let whole = sqlx::query("DELETE FROM image_partials WHERE image_id = $1 AND part = $2");
        whole.bind(id.as_str()).bind(part.as_str()).execute(&mut *tx).await?;
        if let Some(account) = account {
            let others = usage(account, Some(id), &mut tx).await?;
            let kept = sqlx::query(
                "SELECT 'kept' AS id, CAST(COALESCE(SUM(received_bytes), 0) AS BIGINT) AS bytes
                 FROM image_partials WHERE image_id = $1",
            );
            let kept = kept.bind(id.as_str()).fetch_one(&mut *tx).await?;
            let kept: u64 = Fields::new("kept", &kept).number("bytes")?;
            let used = others.bytes.saturating_add(before.number(beside)?).saturating_add(kept);
            if used.saturating_add(asked) > quota.bytes {
                tx.rollback().await?;
                return Ok(Err(QuotaExceeded { what: "imageBytes", limit: quota.bytes, used, asked }));
            }
        }
        let replaced = before.parsed_if_any(replaced)?;
        match uploaded {
            Uploaded::Rootfs { digest, size_bytes, rootfs_bytes } => {
                sqlx::query(
                    "UPDATE images SET digest = $2, size_bytes = $3, rootfs_bytes = $4, config = '{}', imported_from = NULL WHERE id = $1",
                )
                .bind(id.as_str())
                .bind(digest.as_str())
                .bind(column(*size_bytes))
                .bind(column(*rootfs_bytes))
                .execute(&mut *tx)
                .await?;
            }
            Uploaded::Kernel { digest, size_bytes } => {
                sqlx::query("UPDATE images SET kernel_digest = $2, kernel_bytes = $3 WHERE id = $1")
                    .bind(id.as_str())
                    .bind(digest.as_str())
                    .bind(column(*size_bytes))
                    .execute(&mut *tx)
                    .await?;
            }
        }
        tx.commit().await?;
        Ok(Ok(replaced))
    }
}
