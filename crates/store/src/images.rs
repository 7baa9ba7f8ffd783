//! Images: what VMs are made of, by content digest. Uploads to them are in [`uploads`], which one is the default in
//! [`defaults`].
//!
//! Invariant: an image without an account is everybody's. The blobs themselves are elsewhere; [`Store::digests_in_use`]
//! says which must stay.

use sqlx::{Any, AnyConnection, any::AnyRow};
use tiffin_types::{
    id::{AccountId, Digest, ImageId},
    time::Timestamp,
};

use crate::{
    QuotaExceeded, Store, StoreError, quota,
    row::{Fields, returned},
};

/// `is_default` as a column: whether the one row of `default_image` names the image.
macro_rules! select {
    ($rest:literal) => {
        concat!(
            "SELECT images.id, account_id, name, description, digest, size_bytes, rootfs_bytes, config, created_at,
             kernel_digest, kernel_bytes, upload, upload_error,
             CASE WHEN default_image.image_id IS NULL THEN CAST(0 AS BIGINT) ELSE CAST(1 AS BIGINT) END AS is_default
             FROM images LEFT JOIN default_image ON default_image.image_id = images.id ",
            $rest
        )
    };
}

mod defaults;
mod imports;
mod partials;
mod uploads;

pub use self::{
    imports::Imported,
    partials::Partial,
    uploads::{Upload, Uploaded},
};

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
    /// The kernel's blob, if one was uploaded.
    pub kernel_digest: Option<Digest>,
    /// Bytes of the kernel.
    pub kernel_bytes: i64,
    /// What is being uploaded now.
    pub upload: Option<Upload>,
    /// Why the last upload came to nothing, for who uploaded it.
    pub upload_error: Option<String>,
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

/// How many images, and bytes in them, an account may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageQuota {
    /// Images.
    pub images: u64,
    /// Bytes of their filesystems and kernels on the host, and of what is kept of uploads that broke off.
    pub bytes: u64,
}

/// What became of a [`Store::image_delete`].
#[derive(Debug, Clone, PartialEq)]
pub enum ImageDeleted {
    /// It is gone; these are the blobs that it named.
    Deleted(Vec<Digest>),
    /// There is no such image.
    Absent,
    /// So many VMs and snapshots are made of it; nothing was done.
    InUse {
        /// VMs that aren't deleted.
        vms: i64,
        /// Snapshots.
        snapshots: i64,
    },
    /// It is everybody's default image, or an account's own image and its default; nothing was done.
    IsDefault,
    /// Something is being uploaded to it; nothing was done.
    Uploading,
}

impl Store {
    /// Keeps a new image; not the default one.
    pub async fn image_insert(&self, new: NewImage) -> Result<Image, StoreError> {
        insert(new, &self.pool).await
    }

    /// Keeps a new image of an account, if it has fewer than it may. In one transaction.
    pub async fn image_insert_within(
        &self,
        new: NewImage,
        account: &AccountId,
        quota: &ImageQuota,
    ) -> Result<Result<Image, QuotaExceeded>, StoreError> {
        let mut tx = self.pool.begin().await?;
        if !quota::lock_account(account, &mut tx).await? {
            return Err(StoreError::Conflict(format!("no account {account}")));
        }
        let used = usage(account, None, &mut tx).await?;
        if used.images >= quota.images {
            tx.rollback().await?;
            return Ok(Err(QuotaExceeded { what: "images", limit: quota.images, used: used.images, asked: 1 }));
        }
        let image = insert(new, &mut *tx).await?;
        tx.commit().await?;
        Ok(Ok(image))
    }

    /// What an account's images use.
    pub async fn image_usage(&self, account: &AccountId) -> Result<ImageQuota, StoreError> {
        let mut connection = self.pool.acquire().await?;
        usage(account, None, &mut connection).await
    }

    /// The image with that id, if it is the account's own or everybody's.
    pub async fn image_get(&self, account: &AccountId, id: &ImageId) -> Result<Option<Image>, StoreError> {
        let row = sqlx::query(select!("WHERE images.id = $1 AND (account_id = $2 OR account_id IS NULL)"))
            .bind(id.as_str())
            .bind(account.as_str())
            .fetch_optional(&self.pool)
            .await?;
        let mut images = row.iter().map(image_from).collect::<Result<Vec<_>, _>>()?;
        self.mark_default(account, &mut images).await?;
        Ok(images.pop())
    }

    /// The account's own images and everybody's, oldest first.
    pub async fn image_list(&self, account: &AccountId) -> Result<Vec<Image>, StoreError> {
        let rows = sqlx::query(select!("WHERE account_id = $1 OR account_id IS NULL ORDER BY created_at, images.id"))
            .bind(account.as_str())
            .fetch_all(&self.pool)
            .await?;
        let mut images = rows.iter().map(image_from).collect::<Result<Vec<_>, _>>()?;
        self.mark_default(account, &mut images).await?;
        Ok(images)
    }

    /// Removes the record of an image that nothing is made of and that isn't the default. Accounts whose default is a
    /// shared image follow everybody's again, or anybody could keep it for ever. In one transaction; the check
    /// of the VMs holds against creates only while the caller lets none read the image's record.
    pub async fn image_delete(&self, id: &ImageId) -> Result<ImageDeleted, StoreError> {
        let mut tx = self.pool.begin().await?;
        let done = delete_checked(id, &mut tx).await?;
        match done {
            ImageDeleted::Deleted(_) => tx.commit().await?,
            ImageDeleted::Absent | ImageDeleted::InUse { .. } | ImageDeleted::IsDefault | ImageDeleted::Uploading => {
                tx.rollback().await?;
            }
        }
        Ok(done)
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

    /// Whether an image is of that blob, by its files or its kernel.
    pub async fn image_has_blob(&self, digest: &Digest) -> Result<bool, StoreError> {
        let row = sqlx::query("SELECT images.id FROM images WHERE digest = $1 OR kernel_digest = $1 LIMIT 1")
            .bind(digest.as_str())
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.is_some())
    }

    /// Every blob, of files or a kernel, that an image, a VM that isn't deleted or a snapshot needs, in no order, each once. A snapshot needs its
    /// image's blobs like a VM: an image may be deleted only when no snapshot is of its digest either.
    pub async fn digests_in_use(&self) -> Result<Vec<Digest>, StoreError> {
        let rows = sqlx::query(
            "SELECT digest AS id FROM images WHERE digest IS NOT NULL
             UNION SELECT kernel_digest AS id FROM images WHERE kernel_digest IS NOT NULL
             UNION SELECT image_digest AS id FROM vms WHERE state <> 'DELETED'
             UNION SELECT kernel_digest AS id FROM vms WHERE state <> 'DELETED' AND kernel_digest IS NOT NULL
             UNION SELECT image_digest AS id FROM snapshots
             UNION SELECT kernel_digest AS id FROM snapshots WHERE kernel_digest IS NOT NULL",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(|row| Fields::new("digests in use", row).parsed("id")).collect()
    }
}

async fn insert<'e>(new: NewImage, db: impl sqlx::Executor<'e, Database = Any>) -> Result<Image, StoreError> {
    let image = Image {
        id: ImageId::random(),
        account_id: new.account_id,
        name: new.name,
        description: new.description,
        digest: new.digest,
        size_bytes: new.size_bytes,
        rootfs_bytes: new.rootfs_bytes,
        kernel_digest: None,
        kernel_bytes: 0,
        upload: None,
        upload_error: None,
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
    .execute(db)
    .await
    .map_err(|error| StoreError::or_conflict(error, "the image's account doesn't exist or a size is negative"))?;
    Ok(image)
}

/// What an account's images use, `except` aside.
async fn usage(
    account: &AccountId,
    except: Option<&ImageId>,
    db: &mut AnyConnection,
) -> Result<ImageQuota, StoreError> {
    let row = sqlx::query(
        "SELECT 'images' AS id, COUNT(*) AS images,
             CAST(COALESCE(SUM(size_bytes + kernel_bytes + COALESCE(
                 (SELECT SUM(received_bytes) FROM image_partials WHERE image_id = images.id), 0)), 0) AS BIGINT) AS bytes
         FROM images WHERE account_id = $1 AND id <> $2",
    )
    .bind(account.as_str())
    .bind(except.map_or("", ImageId::as_str))
    .fetch_one(db)
    .await?;
    let fields = Fields::new("usage of images", &row);
    Ok(ImageQuota { images: fields.number("images")?, bytes: fields.number("bytes")? })
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
        kernel_digest: fields.parsed_if_any("kernel_digest")?,
        kernel_bytes: fields.number("kernel_bytes")?,
        upload: fields.parsed_if_any("upload")?,
        upload_error: fields.text_if_any("upload_error")?,
        is_default: fields.number::<i64>("is_default")? == 1,
        config: fields.json("config")?,
        created_at: fields.time("created_at")?,
    })
}

async fn delete_checked(id: &ImageId, tx: &mut AnyConnection) -> Result<ImageDeleted, StoreError> {
    // The first statement writes, as every transaction's does, and keeps uploads and defaults from beginning meanwhile.
    let statement = sqlx::query(
        "UPDATE images SET created_at = created_at WHERE id = $1
         RETURNING id, account_id, digest, kernel_digest, upload",
    )
    .bind(id.as_str());
    let Some(row) = returned(statement, &mut *tx).await? else { return Ok(ImageDeleted::Absent) };
    let fields = Fields::new("images", &row);
    if fields.text_if_any("upload")?.is_some() {
        return Ok(ImageDeleted::Uploading);
    }
    let users = sqlx::query(
        "SELECT 'image' AS id,
             (SELECT COUNT(*) FROM vms WHERE image_id = $1 AND state <> 'DELETED') AS vms,
             (SELECT COUNT(*) FROM snapshots WHERE image_id = $1) AS snapshots,
             (SELECT COUNT(*) FROM default_image WHERE image_id = $1)
                 + (SELECT COUNT(*) FROM account_default_images WHERE image_id = $1 AND account_id = $2) AS defaults",
    )
    .bind(id.as_str())
    .bind(fields.text_if_any("account_id")?.unwrap_or_default())
    .fetch_one(&mut *tx)
    .await?;
    let users = Fields::new("users of an image", &users);
    let (vms, snapshots) = (users.number("vms")?, users.number("snapshots")?);
    if vms > 0_i64 || snapshots > 0_i64 {
        return Ok(ImageDeleted::InUse { vms, snapshots });
    }
    if users.number::<i64>("defaults")? > 0 {
        return Ok(ImageDeleted::IsDefault);
    }
    let blobs = [fields.parsed_if_any("digest")?, fields.parsed_if_any("kernel_digest")?];
    for also in
        ["DELETE FROM account_default_images WHERE image_id = $1", "DELETE FROM image_partials WHERE image_id = $1"]
    {
        sqlx::query(also).bind(id.as_str()).execute(&mut *tx).await?;
    }
    sqlx::query("DELETE FROM images WHERE id = $1").bind(id.as_str()).execute(tx).await?;
    Ok(ImageDeleted::Deleted(blobs.into_iter().flatten().collect()))
}
