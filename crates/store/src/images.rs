//! Images: what VMs are made of, by content digest, and which one is the default.
//!
//! Invariant: an image without an account is everybody's; there is at most one default image and it is such a one.
//! The blob itself is elsewhere; [`Store::digests_in_use`] says which blobs must stay.

use sqlx::any::AnyRow;
use tiffin_types::{
    id::{AccountId, Digest, ImageId},
    time::Timestamp,
};

use crate::{Store, StoreError, row::Fields};

/// An image.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Whose it is; `None`: everybody sees it.
    pub account_id: Option<AccountId>,
    /// A name for people; need not be unique.
    pub name: String,
    /// A sentence for people.
    pub description: String,
    /// The blob, once there is one.
    pub digest: Option<Digest>,
    /// Bytes of the blob.
    pub size_bytes: i64,
    /// Bytes of the files in it, unpacked.
    pub rootfs_bytes: i64,
    /// Whether a VM whose creator named no image gets this one.
    pub is_default: bool,
    /// The image's configuration (entry point, environment, ...), as its builder wrote it.
    pub config: serde_json::Value,
    /// When it was made.
    pub created_at: Timestamp,
}

/// An image to be kept.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Whose it is; `None`: everybody sees it.
    pub account_id: Option<AccountId>,
    /// A name for people.
    pub name: String,
    /// A sentence for people.
    pub description: String,
    /// The blob, if there is one yet.
    pub digest: Option<Digest>,
    /// Bytes of the blob.
    pub size_bytes: i64,
    /// Bytes of the files in it, unpacked.
    pub rootfs_bytes: i64,
    /// The image's configuration.
    pub config: serde_json::Value,
}

/// `is_default` as a column: whether the one row of `default_image` names the image.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT images.id, account_id, name, description, digest, size_bytes, rootfs_bytes, config, created_at,
             CASE WHEN default_image.image_id IS NULL THEN CAST(0 AS BIGINT) ELSE CAST(1 AS BIGINT) END AS is_default
             FROM images LEFT JOIN default_image ON default_image.image_id = images.id ",
            $rest
        )
    };
}

impl Store {
    /// Keeps a new image; not the default one.
    pub async fn image_insert(&self, new: NewImage) -> Result<Image, StoreError> {
        let image = Image {
            id: ImageId::random(),
            account_id: new.account_id,
            name: new.name,
            description: new.description,
            digest: new.digest,
            size_bytes: new.size_bytes,
            rootfs_bytes: new.rootfs_bytes,
            is_default: false,
            config: new.config,
            created_at: Timestamp::now(),
        };
        sqlx::query(
            "INSERT INTO images (id, account_id, name, description, digest, size_bytes, rootfs_bytes, config, created_at)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        )
        .bind(image.id.as_str())
        .bind(image.account_id.as_ref().map(AccountId::as_str))
        .bind(image.name.as_str())
        .bind(image.description.as_str())
        .bind(image.digest.as_ref().map(Digest::as_str))
        .bind(image.size_bytes)
        .bind(image.rootfs_bytes)
        .bind(image.config.to_string())
        .bind(image.created_at.as_millis())
        .execute(&self.pool)
        .await
        .map_err(|error| StoreError::or_conflict(error, "the image's account doesn't exist or a size is negative"))?;
        Ok(image)
    }

    /// The image with that id, if it is the account's own or everybody's.
    pub async fn image_get(&self, account: &AccountId, id: &ImageId) -> Result<Option<Image>, StoreError> {
        sqlx::query(select!("WHERE images.id = $1 AND (account_id = $2 OR account_id IS NULL)"))
            .bind(id.as_str())
            .bind(account.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| image_from(&row))
            .transpose()
    }

    /// The account's own images and everybody's, oldest first.
    pub async fn image_list(&self, account: &AccountId) -> Result<Vec<Image>, StoreError> {
        let rows = sqlx::query(select!("WHERE account_id = $1 OR account_id IS NULL ORDER BY created_at, images.id"))
            .bind(account.as_str())
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(image_from).collect()
    }

    /// The default image, if one was named.
    pub async fn image_default(&self) -> Result<Option<Image>, StoreError> {
        sqlx::query(select!("WHERE default_image.image_id IS NOT NULL"))
            .fetch_optional(&self.pool)
            .await?
            .map(|row| image_from(&row))
            .transpose()
    }

    /// Makes an image the default one instead of whichever was. `false`, and nothing changed, when there is no such image
    /// or it is an account's own.
    pub async fn image_set_default(&self, id: &ImageId) -> Result<bool, StoreError> {
        let done = sqlx::query(
            "INSERT INTO default_image (only_row, image_id)
             SELECT 1, id FROM images WHERE id = $1 AND account_id IS NULL
             ON CONFLICT (only_row) DO UPDATE SET image_id = excluded.image_id",
        )
        .bind(id.as_str())
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// An image with that content, whoever owns it; everybody's before an account's own, older before newer.
    /// Not for answering requests: check whose it is.
    pub async fn image_by_digest(&self, digest: &Digest) -> Result<Option<Image>, StoreError> {
        sqlx::query(select!("WHERE digest = $1 ORDER BY (account_id IS NOT NULL), created_at, images.id LIMIT 1"))
            .bind(digest.as_str())
            .fetch_optional(&self.pool)
            .await?
            .map(|row| image_from(&row))
            .transpose()
    }

    /// Every blob that an image, a VM that isn't deleted or a snapshot needs, in no order, each once. A snapshot needs its
    /// image's blob like a VM: an image may be deleted only when no snapshot is of its digest either.
    pub async fn digests_in_use(&self) -> Result<Vec<Digest>, StoreError> {
        let rows = sqlx::query(
            "SELECT digest AS id FROM images WHERE digest IS NOT NULL
             UNION SELECT image_digest AS id FROM vms WHERE state <> 'DELETED'
             UNION SELECT image_digest AS id FROM snapshots",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(|row| Fields::new("digests in use", row).parsed("id")).collect()
    }
}

fn image_from(row: &AnyRow) -> Result<Image, StoreError> {
    let fields = Fields::new("images", row);
    Ok(Image {
        id: fields.parsed("id")?,
        account_id: fields.parsed_if_any("account_id")?,
        name: fields.text("name")?,
        description: fields.text("description")?,
        digest: fields.parsed_if_any("digest")?,
        size_bytes: fields.number("size_bytes")?,
        rootfs_bytes: fields.number("rootfs_bytes")?,
        is_default: fields.number::<i64>("is_default")? == 1,
        config: fields.json("config")?,
        created_at: fields.time("created_at")?,
    })
}
