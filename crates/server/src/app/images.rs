//! Images, as far as VMs need them.

use tiffin_store::Image;
use tiffin_types::{
    account::Scope,
    id::{Digest, ImageId},
};

use super::{App, auth::Caller};
use crate::error::AppError;

/// The images that the caller may use.
pub(crate) async fn image_list(app: &App, caller: &Caller) -> Result<Vec<Image>, AppError> {
    caller.require(Scope::Read)?;
    Ok(app.store.image_list(&caller.account_id).await?)
}

/// The image that a VM is to be made of: the one named, or the default.
pub(super) async fn image_for(app: &App, caller: &Caller, id: Option<&ImageId>) -> Result<(Image, Digest), AppError> {
    let image = match id {
        Some(id) => app
            .store
            .image_get(&caller.account_id, id)
            .await?
            .ok_or_else(|| AppError::field("imageId", "names no image of yours: GET /v1/images lists them"))?,
        None => app.store.image_default().await?.ok_or_else(|| {
            AppError::field("imageId", "is needed, as there is no default image: name one, or build the default one")
        })?,
    };
    match image.digest.clone() {
        Some(digest) => Ok((image, digest)),
        None => Err(AppError::field("imageId", "names an image that has no filesystem yet: upload it first")),
    }
}
