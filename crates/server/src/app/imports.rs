//! Importing images from registries: found, got, put together, named in a record.
//!
//! ```text
//!   reference -> registry: manifest, configuration -> layers into the cache -> confined process -> blob -> record
//! ```
//!
//! Invariants: an import has no record before it is whole, so nothing of one that ends early is an image: what is left are
//! layers in the cache, whole or in part, with which the next one goes on. It runs to its end when its client goes away. One manifest is
//! made an image of once: whoever asks meanwhile waits for it, and whoever asks later has its blob. Everybody shows the
//! registry credentials of their own before that. Places are shared by accounts, and one that waits for a place counts as one
//! that has it: no account keeps all others out.

mod cache;
mod progress;

use std::{pin::Pin, sync::Arc};

use futures_util::{StreamExt, TryStreamExt};
use tiffin_image::{
    convert::{ConvertError, Unpacked},
    layers::Layer,
    oci::{Descriptor, Reference},
};
use tiffin_store::{Imported, NewImage};
use tiffin_types::{
    account::Scope,
    id::{Digest, ImageId},
};

pub(crate) use self::progress::{ImportNow, ImportStage};
use self::{
    cache::Cache,
    progress::{Ongoing, Progress},
};
use super::{
    App,
    auth::Caller,
    places::{Locks, Places, Shares},
};
use crate::{
    authorities::BadAuthorities,
    config::Config,
    error::{AppError, chain},
    fault,
    registry::{Credentials, Found, Registries, RegistryError, Session},
};

/// Layers of one image that are received at once.
const AT_ONCE: usize = 3;
const NAME_CHARS: usize = 100;

/// Where imports are, and what they share.
pub(crate) struct Imports {
    registries: Registries,
    places: Places,
    shares: Shares,
    /// One at a time for each manifest.
    locks: Locks<String>,
    cache: Cache,
    ongoing: Ongoing,
}

impl Imports {
    pub(crate) fn open(config: &Config) -> Result<Self, BadAuthorities> {
        Ok(Self {
            registries: Registries::open(&config.registry)?,
            places: Places::new(
                config.registry.imports_in_flight,
                config.registry.imports_queued,
                config.registry.import_wait,
                "too many images are being imported at once; try again shortly",
            ),
            shares: Shares::new(config.registry.imports_in_flight, "imports"),
            locks: Locks::default(),
            cache: Cache::new(&config.data_dir.join("images"), config.registry.cache_bytes),
            ongoing: Ongoing::default(),
        })
    }

    /// Where images are put together; cleared at start.
    pub(crate) fn work_folder(config: &Config) -> camino::Utf8PathBuf {
        config.data_dir.join("images/imports")
    }

    /// Lets go of layers that nobody used for long, where nobody uses any.
    pub(crate) async fn trim(&self) {
        self.cache.trim().await;
    }
}

/// An image to be imported.
pub(crate) struct ImportRequest {
    /// As the client wrote it.
    pub(crate) image_uri: String,
    pub(crate) reference: Reference,
    /// None for what everybody may have.
    pub(crate) credentials: Option<Credentials>,
}

/// Imports an image and answers with its id when VMs can be made of it.
pub(crate) async fn image_import(app: &Arc<App>, caller: &Caller, request: ImportRequest) -> Result<ImageId, AppError> {
    caller.require(Scope::Write)?;
    let session = app.imports.registries.session(&request.reference, request.credentials).map_err(told)?;
    let room = app.store.image_usage(&caller.account_id).await?;
    let quota = &app.config.images.quota;
    if room.images >= quota.images {
        let over = tiffin_store::QuotaExceeded { what: "images", limit: quota.images, used: room.images, asked: 1 };
        return Err(AppError::OverQuota(over));
    }
    let share = app.imports.shares.take(&caller.account_id)?;
    let progress = app.imports.ongoing.begin(&caller.account_id, &request.image_uri);
    let (work, account) = (Arc::clone(app), caller.account_id.clone());
    app.run(async move {
        let (_share, reference) = (share, request.reference);
        let import = Import { app: &work, account: &account, reference: &reference, session, progress };
        let limit = work.config.registry.timeout;
        let in_its_place = async {
            let _place = work.imports.places.take().await?;
            tokio::time::timeout(limit, import.run()).await.unwrap_or_else(|_| Err(too_slow(limit)))
        };
        let done = tokio::select! {
            done = in_its_place => done,
            () = work.shutdown.cancelled() => Err(AppError::Unavailable {
                code: "shutting_down",
                message: "the server is being stopped: import the image again, it goes on where it was".into(),
            }),
        };
        work.imports.trim().await;
        match &done {
            Ok(id) => tracing::info!(image_id = %id, account_id = %account, "{reference} imported as {id}"),
            Err(error) => {
                tracing::info!(account_id = %account, error = chain(error), "{reference} not imported");
            }
        }
        done
    })
    .await
}

/// The caller's imports that are under way.
pub(crate) fn image_import_list(app: &App, caller: &Caller) -> Result<Vec<ImportNow>, AppError> {
    caller.require(Scope::Read)?;
    Ok(app.imports.ongoing.list(&caller.account_id))
}

/// A layer on its way.
type Getting<'a> = Pin<Box<dyn Future<Output = Result<Layer, AppError>> + Send + 'a>>;

struct Import<'a> {
    app: &'a Arc<App>,
    account: &'a tiffin_types::id::AccountId,
    reference: &'a Reference,
    session: Session,
    progress: Progress,
}

impl Import<'_> {
    async fn run(self) -> Result<ImageId, AppError> {
        let found = self.session.find(self.reference.version()).await.map_err(told)?;
        let from = format!("{}/{}@{}", self.reference.host(), self.reference.repository(), found.digest);
        let _turn = self.app.imports.locks.lock(&from).await;
        if let Some(known) = self.app.store.image_imported(&from).await?
            && let Some(id) = self.record(&found, &from, &known).await?
        {
            return Ok(id);
        }
        let made = self.make(&found).await?;
        fault::point("after_import_made");
        match self.record(&found, &from, &made).await? {
            Some(id) => Ok(id),
            None => Err(AppError::Unavailable {
                code: "busy",
                message: "the image was deleted while it was imported again; try again".into(),
            }),
        }
    }

    /// Gets the layers and puts them together.
    async fn make(&self, found: &Found) -> Result<Imported, AppError> {
        let limit = self.app.config.images.max_rootfs_bytes;
        let bytes = found.manifest.layers.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        if bytes > limit {
            return Err(no_image(format!(
                "its layers have {bytes} bytes together, and {limit} are the most that are taken"
            )));
        }
        self.progress.expect(bytes);
        let _kept = self.app.imports.cache.keep().await;
        let layers = self.layers(found).await?;
        fault::point("after_import_received");
        self.progress.stage(ImportStage::Converting);
        self.assemble(layers).await
    }

    async fn layers(&self, found: &Found) -> Result<Vec<Layer>, AppError> {
        let mut getting: Vec<Getting<'_>> = Vec::new();
        for (layer, diff_id) in found.manifest.layers.iter().zip(&found.image.diff_ids) {
            getting.push(Box::pin(self.layer(layer, diff_id)));
        }
        futures_util::stream::iter(getting).buffered(AT_ONCE).try_collect().await
    }

    async fn layer(&self, layer: &Descriptor, diff_id: &Digest) -> Result<Layer, AppError> {
        let file = self.app.imports.cache.get(self.app, &self.session, self.reference.host(), layer, &self.progress);
        Ok(Layer { file: file.await?, diff_id: diff_id.clone() })
    }

    async fn assemble(&self, layers: Vec<Layer>) -> Result<Imported, AppError> {
        let (app, progress) = (Arc::clone(self.app), self.progress.clone());
        let work = Imports::work_folder(&app.config);
        tokio::fs::create_dir_all(&work).await.map_err(|error| AppError::internal("making a folder", error))?;
        let work = work.join(ImageId::random().as_str());
        let turn = self.app.images.converting.take(self.account).await;
        let assembled = tokio::task::spawn_blocking(move || {
            // Also when nobody waits for it any more.
            let _turn = turn;
            let images = &app.images;
            let mut tell = |done: Unpacked| progress.converted(done.entries);
            images.converter.assemble(&layers, &work, &images.filesystems, &images.limits, &mut tell)
        });
        let assembled = assembled.await.map_err(|error| AppError::internal("a task of the server panicked", error))?;
        let assembled = assembled.map_err(|error| match error {
            ConvertError::Refused(why) => no_image(why),
            ConvertError::DiskFull => super::uploads::no_room(),
            error @ (ConvertError::Host(_) | ConvertError::Erofs(_) | ConvertError::Blob(_)) => {
                AppError::internal("making an image of layers", error)
            }
        })?;
        Ok(Imported {
            digest: assembled.blob.digest,
            size_bytes: assembled.blob.size_bytes,
            rootfs_bytes: assembled.unpacked.bytes,
        })
    }

    /// Names the blob in a new record; `None` when the blob went meanwhile.
    async fn record(&self, found: &Found, from: &str, made: &Imported) -> Result<Option<ImageId>, AppError> {
        let config = serde_json::to_value(&found.image.config)
            .map_err(|error| AppError::internal("writing an image's configuration", error))?;
        let size = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let new = NewImage {
            account_id: Some(self.account.clone()),
            name: self.reference.to_string().chars().take(NAME_CHARS).collect(),
            description: format!("Imported from {}", self.reference),
            digest: Some(made.digest.clone()),
            size_bytes: size(made.size_bytes),
            rootfs_bytes: size(made.rootfs_bytes),
            config,
        };
        // While it is held, no blob goes.
        let _gate = self.app.images.gate.read().await;
        if !self.is_here(&made.digest).await? {
            return Ok(None);
        }
        let quota = &self.app.config.images.quota;
        let image = self.app.store.image_insert_imported(new, self.account, quota, from).await?;
        Ok(Some(image.map_err(AppError::OverQuota)?.id))
    }

    async fn is_here(&self, digest: &Digest) -> Result<bool, AppError> {
        let (filesystems, digest) = (self.app.images.filesystems.clone(), digest.clone());
        let here = tokio::task::spawn_blocking(move || filesystems.contains(&digest));
        here.await.map_err(|error| AppError::internal("looking for a blob", error))
    }
}

fn too_slow(limit: std::time::Duration) -> AppError {
    AppError::Unavailable {
        code: "registry_unavailable",
        message: format!(
            "the import took longer than {} s, the most that is given: import the image again, it goes on where it was",
            limit.as_secs()
        ),
    }
}

fn no_image(why: String) -> AppError {
    AppError::field("imageUri", format!("names an image that can't be imported: {why}"))
}

/// What a registry's failure means for who asked.
fn told(error: RegistryError) -> AppError {
    match error {
        RegistryError::Forbidden(why) => AppError::field("imageUri", why),
        RegistryError::Credentials(why) => AppError::field("password", why),
        RegistryError::Absent(why) => AppError::field("imageUri", format!("names no image: {why}")),
        RegistryError::NoImage(why) => no_image(why.to_string()),
        RegistryError::Failed(why) => AppError::Unavailable {
            code: "registry_unavailable",
            message: format!("the registry doesn't give the image: {why}"),
        },
    }
}

/// Clears what imports that the server's end cut short were about; layers stay, to go on with.
pub(crate) async fn settle(app: &App) {
    match tokio::fs::remove_dir_all(Imports::work_folder(&app.config)).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, "what interrupted imports left can't be removed now");
        }
        Ok(()) | Err(_) => {}
    }
    app.imports.trim().await;
}
