//! The default image: Debian, the tools that people expect in a sandbox, Python, Node.js and Deno.
//!
//! ```text
//!   recipe --+-- mmdebstrap (the machine's own Debian mirror) --+-- adapt the tree -- mkfs.erofs -- blob store
//!            `-- npm pack (Deno, checked against its pin) ------'                                       |
//!   <images>/default.json  <- what was built, by which recipe ------------------------------------------'
//! ```
//!
//! Invariants: builds are serialised by `<images>/build.lock`. A build that is killed leaves its work folder, which the
//! next one removes, and nothing in the store. Nothing is built when the record names this recipe and its blob is here.
//! What the database knows of the image is not this module's business.

mod debian;
mod deno;
mod recipe;
mod tree;

use std::{
    fs::{self, File},
    io,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use tiffin_types::id::Digest;

pub use self::recipe::recipe_hash;
use crate::{
    blob::{BlobError, BlobStore},
    config::ImageConfig,
    erofs::{self, ErofsError},
    tool::ToolError,
};

/// How long a build waits for another one.
const LOCK_LIMIT: Duration = Duration::from_secs(900);

/// What to build, and where.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// The server's data folder; the store is `<data_dir>/images`.
    pub data_dir: Utf8PathBuf,
    /// Where the tree is made before it becomes an image: about 1 GB on a filesystem that takes device nodes and
    /// set-uid files. `None` is `<data_dir>/images/work`.
    pub work_dir: Option<Utf8PathBuf>,
    /// A Debian mirror (`http://...`) to take everything but security updates from, instead of the machine's own.
    pub mirror: Option<String>,
    /// Build even where the image is there already.
    pub force: bool,
}

/// The image that was built, or found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefaultImage {
    /// Which recipe it was built by.
    pub recipe: String,
    /// Its filesystem, in the store.
    pub digest: Digest,
    /// Bytes of the filesystem's file.
    pub size_bytes: u64,
    /// Bytes of the files in it.
    pub rootfs_bytes: u64,
    /// How commands start in it.
    pub config: ImageConfig,
    /// What is in it: Debian packages, and Deno.
    pub packages: Vec<Package>,
}

/// A package in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// What a build is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The image is here already; nothing is done.
    Found,
    /// Another build runs; this one waits for it.
    Waiting,
    /// Debian packages are being fetched and unpacked.
    Packages,
    /// A detail of that, in the tool's own words.
    Detail(String),
    /// Deno is being fetched.
    Deno,
    /// The tree is being made fit for a sandbox.
    Adapting,
    /// The filesystem is being written and hashed.
    Writing,
    /// A part of the work is done; it took that long.
    Done(&'static str, Duration),
}

/// The default image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Only root can unpack packages with their owners and device nodes.
    #[error("building the default image needs root")]
    NotRoot,
    /// No pin for this processor.
    #[error("there is no default image for {0} yet; x86_64 only")]
    Architecture(&'static str),
    /// The machine has no package sources of that release, and none was named.
    #[error("this machine's package sources have no Debian {0}: name a mirror with --mirror")]
    NoMirror(&'static str),
    /// Another build held the lock for too long.
    #[error("another build of the default image has not ended; try again")]
    Busy,
    /// A program failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// What was fetched is not what is pinned.
    #[error("{what} does not match its pin: expected {expected}, found {found}")]
    Pin {
        /// What was fetched.
        what: String,
        /// The pinned checksum.
        expected: String,
        /// The checksum that was found.
        found: String,
    },
    /// The filesystem could not be made.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// The store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The disk failed, or is full.
    #[error("{path}")]
    Io {
        /// What was being read or written.
        path: Utf8PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl BuildError {
    fn io(path: &Utf8Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// The default image of this data folder, when the present recipe's is built and its blob is here.
///
/// # Errors
/// When the folder can't be read.
pub fn find_default(data_dir: &Utf8Path) -> Result<Option<DefaultImage>, BuildError> {
    let images = data_dir.join("images");
    let store = BlobStore::open(&images)?;
    Ok(read_record(&images).filter(|image| {
        image.recipe == recipe_hash()
            && fs::metadata(store.path(&image.digest)).is_ok_and(|blob| blob.len() == image.size_bytes)
    }))
}

/// Builds the default image, or finds it built. Blocks for about a minute; `progress` is called as it goes on, from
/// more than one thread.
///
/// # Errors
/// Says what failed in the failing tool's own words; nothing is left then.
pub fn build_default(options: &BuildOptions, progress: &(dyn Fn(Step) + Sync)) -> Result<DefaultImage, BuildError> {
    let images = options.data_dir.join("images");
    let store = BlobStore::open(&images)?;
    // Held to the end of the function.
    let _lock = lock(&images, progress)?;
    if !options.force
        && let Some(image) = find_default(&options.data_dir)?
    {
        progress(Step::Found);
        return Ok(image);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(BuildError::NotRoot);
    }
    let work = WorkDir::fresh(options.work_dir.clone().unwrap_or_else(|| images.join("work")))?;
    let image = build(options, &store, &work.path, progress)?;
    write_record(&images, &image)?;
    Ok(image)
}

fn build(
    options: &BuildOptions,
    store: &BlobStore,
    work: &Utf8Path,
    progress: &(dyn Fn(Step) + Sync),
) -> Result<DefaultImage, BuildError> {
    let root = work.join("root");
    let deno = std::thread::scope(|scope| {
        let deno = scope.spawn(|| timed("Deno", Step::Deno, progress, || deno::fetch(work)));
        let debian = timed("Debian packages", Step::Packages, progress, || {
            debian::unpack(work, &root, options.mirror.as_deref(), &mut |line| progress(Step::Detail(line)))
        });
        let deno = deno.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        debian.and(deno)
    })?;
    let rootfs_bytes = timed("the tree", Step::Adapting, progress, || {
        deno::install(&deno, &root)?;
        tree::adapt(&root)?;
        tree::bytes(&root).map_err(BuildError::io(&root))
    })?;
    let mut packages = debian::installed(&root)?;
    packages.push(Package { name: "deno".to_owned(), version: recipe::deno().version.to_owned() });

    let blob = timed("the image", Step::Writing, progress, || {
        let incoming = store.incoming()?;
        erofs::make(&root, rootfs_bytes, incoming.path())?;
        Ok::<_, BuildError>(incoming.commit()?)
    })?;
    Ok(DefaultImage {
        recipe: recipe_hash(),
        digest: blob.digest,
        size_bytes: blob.size_bytes,
        rootfs_bytes,
        config: recipe::config(),
        packages,
    })
}

fn timed<T>(
    what: &'static str,
    step: Step,
    progress: &(dyn Fn(Step) + Sync),
    work: impl FnOnce() -> Result<T, BuildError>,
) -> Result<T, BuildError> {
    let started = Instant::now();
    progress(step);
    let done = work()?;
    progress(Step::Done(what, started.elapsed()));
    Ok(done)
}

/// The folder that the image is made in; removed in the end, and at the start of the next build after a kill.
struct WorkDir {
    path: Utf8PathBuf,
}

impl WorkDir {
    fn fresh(parent: Utf8PathBuf) -> Result<Self, BuildError> {
        let path = parent.join("default-image");
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(BuildError::io(&path)(error)),
            _ => {}
        }
        fs::create_dir_all(&path).map_err(BuildError::io(&path))?;
        Ok(Self { path })
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // What can't be removed now, the next build removes or complains about.
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn lock(images: &Utf8Path, progress: &(dyn Fn(Step) + Sync)) -> Result<File, BuildError> {
    let path = images.join("build.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(BuildError::io(&path))?;
    let deadline = Instant::now() + LOCK_LIMIT;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(fs::TryLockError::Error(source)) => return Err(BuildError::io(&path)(source)),
            Err(fs::TryLockError::WouldBlock) if Instant::now() > deadline => return Err(BuildError::Busy),
            Err(fs::TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut told, true) {
                    progress(Step::Waiting);
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Whether an image is being built below this data folder now, by whichever process.
pub fn is_building(data_dir: &Utf8Path) -> bool {
    let locked = File::open(data_dir.join("images/build.lock")).map(|file| file.try_lock());
    matches!(locked, Ok(Err(fs::TryLockError::WouldBlock)))
}

/// The default image that was built last below this data folder, by whichever recipe; its blob may be gone.
pub fn recorded(data_dir: &Utf8Path) -> Option<DefaultImage> {
    read_record(&data_dir.join("images"))
}

fn record_path(images: &Utf8Path) -> Utf8PathBuf {
    images.join("default.json")
}

/// A record that can't be read is as good as none: the image is built again.
fn read_record(images: &Utf8Path) -> Option<DefaultImage> {
    serde_json::from_slice(&fs::read(record_path(images)).ok()?).ok()
}

fn write_record(images: &Utf8Path, image: &DefaultImage) -> Result<(), BuildError> {
    let path = record_path(images);
    let half = path.with_extension("json.new");
    let text = serde_json::to_vec_pretty(image).expect("a record of strings and numbers is always JSON");
    fs::write(&half, text).map_err(BuildError::io(&half))?;
    fs::rename(&half, &path).map_err(BuildError::io(&path))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn data_dir_with_image() -> (tempfile::TempDir, Utf8PathBuf, DefaultImage) {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = Utf8Path::from_path(folder.path()).unwrap().to_owned();
        let images = data_dir.join("images");
        let store = BlobStore::open(&images).unwrap();
        let source = data_dir.join("source");
        fs::write(&source, b"the image").unwrap();
        let blob = store.put_file(&source).unwrap();
        let image = DefaultImage {
            recipe: recipe_hash(),
            digest: blob.digest,
            size_bytes: blob.size_bytes,
            rootfs_bytes: 9,
            config: recipe::config(),
            packages: vec![Package { name: "bash".into(), version: "5".into() }],
        };
        write_record(&images, &image).unwrap();
        (folder, data_dir, image)
    }

    fn options(data_dir: &Utf8Path) -> BuildOptions {
        BuildOptions { data_dir: data_dir.to_owned(), work_dir: None, mirror: None, force: false }
    }

    #[test]
    fn an_image_of_the_same_recipe_is_found_and_nothing_is_built() {
        let (_folder, data_dir, image) = data_dir_with_image();
        let steps = Mutex::new(Vec::new());
        let found = build_default(&options(&data_dir), &|step| steps.lock().unwrap().push(step)).unwrap();
        assert_eq!(found, image);
        assert_eq!(*steps.lock().unwrap(), [Step::Found]);
    }

    #[test]
    fn a_record_without_its_blob_or_of_another_recipe_counts_for_nothing() {
        let (_folder, data_dir, mut image) = data_dir_with_image();
        let images = data_dir.join("images");
        BlobStore::open(&images).unwrap().remove(&image.digest).unwrap();
        assert_eq!(find_default(&data_dir).unwrap(), None);

        let (_folder, data_dir, _) = data_dir_with_image();
        image.recipe = "other".into();
        write_record(&data_dir.join("images"), &image).unwrap();
        assert_eq!(find_default(&data_dir).unwrap(), None);

        fs::write(record_path(&data_dir.join("images")), b"{ half a reco").unwrap();
        assert_eq!(find_default(&data_dir).unwrap(), None);
    }

    #[test]
    fn a_second_build_waits_for_the_first() {
        let (_folder, data_dir, image) = data_dir_with_image();
        let held = Mutex::new(Some(lock(&data_dir.join("images"), &|_| {}).unwrap()));
        assert!(is_building(&data_dir));
        let steps = Mutex::new(Vec::new());
        let found = build_default(&options(&data_dir), &|step| {
            if step == Step::Waiting {
                held.lock().unwrap().take();
            }
            steps.lock().unwrap().push(step);
        });
        assert_eq!(found.unwrap(), image);
        assert_eq!(*steps.lock().unwrap(), [Step::Waiting, Step::Found]);
        assert!(!is_building(&data_dir));
    }

    #[test]
    fn what_a_killed_build_left_is_cleared_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let parent = Utf8Path::from_path(folder.path()).unwrap().to_owned();
        fs::create_dir_all(parent.join("default-image/root/etc")).unwrap();
        let work = WorkDir::fresh(parent.clone()).unwrap();
        assert!(!work.path.join("root").exists());
        let path = work.path.clone();
        drop(work);
        assert!(!path.exists());
    }
}
