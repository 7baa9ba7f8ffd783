//! Images that came from registries: what of whose manifest is here already.
//!
//! Invariant: `imported_from` names the repository and the digest of the manifest that the image's filesystem was made of;
//! an upload to the image clears it.

use tiffin_types::id::{AccountId, Digest};

use super::{Image, ImageQuota, NewImage, insert, usage};
use crate::{QuotaExceeded, Store, StoreError, quota, row::Fields};

/// What a manifest was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// Bytes of the files in it.
    pub rootfs_bytes: u64,
}

impl Store {
    /// The filesystem that was made of the manifest, whoever imported it, as long as anybody has it.
    pub async fn image_imported(&self, from: &str) -> Result<Option<Imported>, StoreError> {
        let row = sqlx::query(
            "SELECT id, digest, size_bytes, rootfs_bytes FROM images
             WHERE imported_from = $1 AND digest IS NOT NULL ORDER BY created_at, id LIMIT 1",
        );
        let row = row.bind(from).fetch_optional(&self.pool).await?;
        let Some(row) = row else { return Ok(None) };
        let fields = Fields::new("images", &row);
        Ok(Some(Imported {
            digest: fields.parsed("digest")?,
            size_bytes: fields.number("size_bytes")?,
            rootfs_bytes: fields.number("rootfs_bytes")?,
        }))
    }

    /// Keeps an image that was imported, if it fits the account's quota. In one transaction.
    pub async fn image_insert_imported(
        &self,
        new: NewImage,
        account: &AccountId,
        quota: &ImageQuota,
        from: &str,
    ) -> Result<Result<Image, QuotaExceeded>, StoreError> {
        let mut tx = self.pool.begin().await?;
        if !quota::lock_account(account, &mut tx).await? {
            return Err(StoreError::Conflict(format!("no account {account}")));
        }
        let used = usage(account, None, &mut tx).await?;
        let asked = u64::try_from(new.size_bytes).unwrap_or(0);
        let fits = quota::fits("images", quota.images, used.images, 1)
            .and_then(|()| quota::fits("imageBytes", quota.bytes, used.bytes, asked));
        if let Err(over) = fits {
            tx.rollback().await?;
            return Ok(Err(over));
        }
        let image = insert(new, &mut *tx).await?;
        let mark = sqlx::query("UPDATE images SET imported_from = $2 WHERE id = $1");
        mark.bind(image.id.as_str()).bind(from).execute(&mut *tx).await?;
        tx.commit().await?;
        Ok(Ok(image))
    }
}
