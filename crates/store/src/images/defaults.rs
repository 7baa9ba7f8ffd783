//! Which image VMs are made of whose creator names none: the account's own default, else everybody's.
//!
//! Invariant: there is at most one default for everybody, and it is an image of nobody; there is at most one for each
//! account, and it is an image that the account sees. Everybody's default can't be deleted, nor can an account's own image that is its
//! default; a shared one can, and the accounts that chose it follow everybody's.

use sqlx::AnyConnection;
use tiffin_types::id::{AccountId, ImageId};

use super::{Image, image_from};
use crate::{Store, StoreError, row::Fields};

impl Store {
    /// Everybody's default image, if one was named.
    pub async fn image_default(&self) -> Result<Option<Image>, StoreError> {
        sqlx::query(select!("WHERE default_image.image_id IS NOT NULL"))
            .fetch_optional(&self.pool)
            .await?
            .map(|row| image_from(&row))
            .transpose()
    }

    /// The account's default image: its own, else everybody's.
    pub async fn image_default_of(&self, account: &AccountId) -> Result<Option<Image>, StoreError> {
        match self.own_default(account).await? {
            Some(id) => self.image_get(account, &id).await,
            None => self.image_default().await,
        }
    }

    /// Makes an image everybody's default one instead of whichever was. `false`, and nothing changed, when there is no such
    /// image or it is an account's own.
    pub async fn image_set_default(&self, id: &ImageId) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        hold(id, &mut tx).await?;
        let done = sqlx::query(
            "INSERT INTO default_image (only_row, image_id)
             SELECT 1, id FROM images WHERE id = $1 AND account_id IS NULL
             ON CONFLICT (only_row) DO UPDATE SET image_id = excluded.image_id",
        )
        .bind(id.as_str())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Makes an image the account's own default one. `false`, and nothing changed, when there is no such image or the
    /// account doesn't see it.
    pub async fn image_set_default_of(&self, account: &AccountId, id: &ImageId) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        hold(id, &mut tx).await?;
        let done = sqlx::query(
            "INSERT INTO account_default_images (account_id, image_id)
             SELECT CAST($1 AS TEXT), id FROM images WHERE id = $2 AND (account_id = $1 OR account_id IS NULL)
             ON CONFLICT (account_id) DO UPDATE SET image_id = excluded.image_id",
        )
        .bind(account.as_str())
        .bind(id.as_str())
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    /// Lets the account follow everybody's default again.
    pub async fn image_clear_default_of(&self, account: &AccountId) -> Result<(), StoreError> {
        let statement = sqlx::query("DELETE FROM account_default_images WHERE account_id = $1");
        statement.bind(account.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    /// Says of each image whether it is the account's default: an own default goes before everybody's.
    pub(super) async fn mark_default(&self, account: &AccountId, images: &mut [Image]) -> Result<(), StoreError> {
        if let Some(own) = self.own_default(account).await? {
            for image in images {
                image.is_default = image.id == own;
            }
        }
        Ok(())
    }

    async fn own_default(&self, account: &AccountId) -> Result<Option<ImageId>, StoreError> {
        let row = sqlx::query("SELECT image_id AS id FROM account_default_images WHERE account_id = $1")
            .bind(account.as_str())
            .fetch_optional(&self.pool)
            .await?;
        row.map(|row| Fields::new("account_default_images", &row).parsed("id")).transpose()
    }
}

/// Keeps the image from being deleted for the rest of the transaction, whose first statement this must be: what is read
/// alone is no lock on Postgres, and the reference would fail.
async fn hold(id: &ImageId, tx: &mut AnyConnection) -> Result<(), StoreError> {
    let statement = sqlx::query("UPDATE images SET created_at = created_at WHERE id = $1");
    statement.bind(id.as_str()).execute(tx).await?;
    Ok(())
}
