//! From an uploaded ext4 filesystem to an image in the blob store.
//!
//! ```text
//!   upload --(reader, confined process)--> folder --(mkfs.erofs)--> blob store
//! ```
//!
//! Invariants: the host mounts nothing of it. The reader runs in a process of its own that may do nothing but write below
//! the folder ([`main`]), so that neither a mistake in it nor its memory is the server's; when this process ends, so does
//! it. Everything is bounded by [`Limits`]. What is left of a conversion that was killed is its folder, which is the
//! caller's to remove.

mod confine;
mod recognise;
mod unpack;

pub(crate) use confine::{Confinement, confine};

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::Path,
    process::{Command, ExitCode},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    blob::{Blob, BlobError, BlobStore},
    erofs::{self, ErofsError},
    ext4::{Ext4Error, Filesystem},
    tool::{self, ToolError},
};

/// The word by which a program that has this crate in it becomes the reader: its first argument.
pub const SUBCOMMAND: &str = "convert-image";
const PROGRESS: &str = "progress";
/// Memory: names of a million files with several links each, with room to spare.
const MEMORY_BYTES: u64 = 2 << 30;
const OPEN_FILES: u64 = 32;

/// What a conversion may use.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of the files together, holes too.
    pub bytes: u64,
    /// Bytes of the disk that stay free.
    pub leave_free_bytes: u64,
    /// How long reading may take.
    pub time: Duration,
}

/// How much has been unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    /// Files, folders and links.
    pub entries: u64,
    /// Bytes of the files, each file once.
    pub bytes: u64,
}

/// What a conversion made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The image's filesystem, in the store.
    pub blob: Blob,
    /// What is in it.
    pub unpacked: Unpacked,
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The upload is no filesystem that is taken; the text says why and is for whoever uploaded it.
    #[error("{0}")]
    Refused(String),
    /// The disk has no room.
    #[error("the host's disk has no room for it")]
    DiskFull,
    /// The host failed.
    #[error("{0}")]
    Host(String),
    /// The image could not be written.
    #[error(transparent)]
    Erofs(#[from] ErofsError),
    /// The store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

/// Why a filesystem could not be unpacked, as the reader's process tells it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Unreadable {
    Refused(String),
    DiskFull,
    Host(String),
}

impl Unreadable {
    pub(crate) fn refused(why: impl Into<String>) -> Self {
        Self::Refused(why.into())
    }
}

impl From<Ext4Error> for Unreadable {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::Unsupported(_) | Ext4Error::Damaged(_) => Self::Refused(error.to_string()),
            Ext4Error::Io(ref source) => Self::Host(format!("{error}: {source}")),
        }
    }
}

impl From<Unreadable> for ConvertError {
    fn from(error: Unreadable) -> Self {
        match error {
            Unreadable::Refused(why) => Self::Refused(why),
            Unreadable::DiskFull => Self::DiskFull,
            Unreadable::Host(why) => Self::Host(why),
        }
    }
}

/// Turns filesystems into images.
#[derive(Debug, Clone)]
pub struct Converter {
    program: Option<Utf8PathBuf>,
}

impl Converter {
    /// Reads in a confined process: `program` run with [`SUBCOMMAND`], which must call [`main`].
    pub fn confined(program: impl Into<Utf8PathBuf>) -> Self {
        Self { program: Some(program.into()) }
    }

    /// Reads in this very process, unconfined: for tests of the layers above, whose program has no subcommands.
    pub fn in_process() -> Self {
        Self { program: None }
    }

    /// The program to run, if it isn't this process that reads.
    pub(crate) fn program(&self) -> Option<&Utf8Path> {
        self.program.as_deref()
    }

    /// Makes an image of the filesystem in the file `upload`, by way of the folder `work`, which is made and removed. The
    /// upload stays, so that it can be gone on with when this is cut short. Blocks for as long as it takes.
    ///
    /// # Errors
    /// [`ConvertError`]; nothing is left then but `work`, if it can't be removed.
    pub fn convert(
        &self,
        upload: &Utf8Path,
        work: &Utf8Path,
        store: &BlobStore,
        limits: &Limits,
        tell: &mut dyn FnMut(Unpacked),
    ) -> Result<Converted, ConvertError> {
        let converted = self.convert_in(upload, work, store, limits, tell);
        if let Err(error) = remove_tree(work) {
            return converted.and(Err(ConvertError::Host(format!("removing {work}: {error}"))));
        }
        converted
    }

    fn convert_in(
        &self,
        upload: &Utf8Path,
        work: &Utf8Path,
        store: &BlobStore,
        limits: &Limits,
        tell: &mut dyn FnMut(Unpacked),
    ) -> Result<Converted, ConvertError> {
        let host = |error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull => ConvertError::DiskFull,
            _ => ConvertError::Host(format!("{work}: {error}")),
        };
        let root = work.join("root");
        remove_tree(work).map_err(host)?;
        DirBuilder::new().mode(0o700).create(work).map_err(host)?;
        DirBuilder::new().mode(0o755).create(&root).map_err(host)?;
        let unpacked = match &self.program {
            Some(program) => read_confined(program, upload, &root, limits, tell)?,
            None => read(upload.as_std_path(), root.as_std_path(), false, limits, tell)?,
        };
        enough_room(work, limits, unpacked.bytes)?;
        let incoming = store.incoming()?;
        erofs::make(&root, unpacked.bytes, incoming.path()).map_err(|error| match error {
            ErofsError::Tool(ToolError::TooSlow { limit, .. }) => ConvertError::Refused(format!(
                "writing the image took longer than {} s, the most that is given to one of its size",
                limit.as_secs()
            )),
            other => other.into(),
        })?;
        Ok(Converted { blob: incoming.commit()?, unpacked })
    }
}

fn enough_room(work: &Utf8Path, limits: &Limits, bytes: u64) -> Result<(), ConvertError> {
    let disk = nix::sys::statvfs::statvfs(work.as_std_path()).map_err(|error| ConvertError::Host(error.to_string()))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size());
    if free < limits.leave_free_bytes.saturating_add(bytes) { Err(ConvertError::DiskFull) } else { Ok(()) }
}

/// Removes a folder and all below it; one that isn't there is fine.
pub(crate) fn remove_tree(path: &Utf8Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn read_confined(
    program: &Utf8Path,
    upload: &Utf8Path,
    root: &Utf8Path,
    limits: &Limits,
    tell: &mut dyn FnMut(Unpacked),
) -> Result<Unpacked, ConvertError> {
    let mut command = Command::new(program);
    let limits_text = serde_json::to_string(limits).expect("numbers are always JSON");
    command.args([SUBCOMMAND, upload.as_str(), root.as_str(), &limits_text]);
    run_confined(command, limits, "the filesystem", tell)
}

/// Runs a process that [`answer`]s, passes on what it tells, and gives its answer.
pub(crate) fn run_confined<T: DeserializeOwned>(
    mut command: Command,
    limits: &Limits,
    what: &str,
    tell: &mut dyn FnMut(Unpacked),
) -> Result<T, ConvertError> {
    command.current_dir("/").env_clear();
    let mut on_line = |line: &str| {
        if let Some(done) = line.strip_prefix(PROGRESS).and_then(|text| serde_json::from_str(text).ok()) {
            tell(done);
        }
    };
    let said = tool::run(command, limits.time, &mut on_line).map_err(|error| match error {
        ToolError::Start { .. } => ConvertError::Host(error.to_string()),
        ToolError::TooSlow { limit, .. } => ConvertError::Refused(format!(
            "reading {what} took longer than {} s, the most that is given",
            limit.as_secs()
        )),
        ToolError::Failed { ref stderr, .. } if stderr.contains(CANT_CONFINE) => ConvertError::Host(error.to_string()),
        // It ran into a limit of its process, or into a mistake of ours: with others it works.
        ToolError::Failed { status, .. } => {
            ConvertError::Refused(format!("{what} can't be read: its reader ended with {status}"))
        }
    })?;
    let outcome: Result<T, Unreadable> = serde_json::from_slice(&said)
        .map_err(|error| ConvertError::Host(format!("the answer of the process that reads makes no sense: {error}")))?;
    Ok(outcome?)
}

pub(crate) const CANT_CONFINE: &str = "the reader can't be confined";

/// The reader's process: `arguments` are the upload, the folder and the limits. Must be called before any thread is
/// started.
pub fn main(arguments: &[String]) -> ExitCode {
    let [upload, root, limits] = arguments else {
        eprintln!("usage: tiffin {SUBCOMMAND} UPLOAD FOLDER LIMITS (run by the server)");
        return ExitCode::from(2);
    };
    let Ok(limits) = serde_json::from_str::<Limits>(limits) else {
        eprintln!("the limits are none");
        return ExitCode::from(2);
    };
    answer(|tell| read(Path::new(upload), Path::new(root), true, &limits, tell))
}

/// Does the work of a confined process: tells how far it is on stderr, and its outcome on stdout.
pub(crate) fn answer<T: Serialize>(
    work: impl FnOnce(&mut (dyn FnMut(Unpacked) + Send)) -> Result<T, Unreadable>,
) -> ExitCode {
    let mut tell = |done: Unpacked| {
        let text = serde_json::to_string(&done).expect("numbers are always JSON");
        // Whoever asked may be gone; then this process is about to be, too.
        let _ = writeln!(io::stderr(), "{PROGRESS} {text}");
    };
    let outcome = work(&mut tell);
    if let Err(Unreadable::Host(why)) = &outcome
        && why.starts_with(CANT_CONFINE)
    {
        eprintln!("{why}");
        return ExitCode::FAILURE;
    }
    let text = serde_json::to_string(&outcome).expect("numbers and texts are always JSON");
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn read(
    upload: &Path,
    root: &Path,
    confined: bool,
    limits: &Limits,
    tell: &mut dyn FnMut(Unpacked),
) -> Result<Unpacked, Unreadable> {
    let host = |error: io::Error| Unreadable::Host(error.to_string());
    let file = File::open(upload).map_err(host)?;
    let mut root = root;
    // What makes the image of the folder sees its files below the folder's own path.
    let before = root.canonicalize().map_err(host)?.as_os_str().len();
    if confined {
        let bounds = Confinement {
            memory_bytes: MEMORY_BYTES,
            cpu_seconds: limits.time.as_secs().max(1),
            file_bytes: limits.bytes,
            open_files: OPEN_FILES,
            capabilities: confine::GIVE_AWAY,
        };
        confine(root, &bounds).map_err(|error| Unreadable::Host(format!("{CANT_CONFINE}: {error}")))?;
        root = Path::new("/");
    }
    let seen = file.try_clone().map_err(host)?;
    match Filesystem::open(file) {
        Ok(filesystem) => unpack::unpack(&filesystem, root, before, limits, tell),
        Err(error @ Ext4Error::Unsupported(_)) => Err(match recognise::something_else(&seen).map_err(host)? {
            Some(what) => Unreadable::Refused(format!("this is no ext4 filesystem: {what}")),
            None => error.into(),
        }),
        Err(error) => Err(error.into()),
    }
}
