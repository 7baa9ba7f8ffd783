//! `tiffin vm cp` and `tiffin vm files`: files between this machine and a VM.
//!
//! Invariant: what a VM packed is somebody else's: files and folders of it are made anew, below a folder that wasn't there,
//! and anything else in it (links, devices, names that lead out) is refused with nothing left. A copy that breaks off
//! leaves nothing at its place.

mod archive;

use std::{
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use clap::Args;
use reqwest::{Body, Method, Response};
use tiffin_types::{
    id::VmId,
    path::{GuestPath, WORKSPACE},
};
use tokio_util::io::ReaderStream;

use super::OutputArgs;
use crate::{
    client::{Call, Client, query},
    failure::Failure,
    output::{self, field},
};

/// How long a copy may take.
const LIMIT: Duration = Duration::from_secs(900);

#[derive(Debug, Args)]
#[command(after_help = "\
One of the two is in a VM, as ID:PATH; a path that doesn't begin with / begins at /workspace:
    tiffin vm cp notes.txt vm-...:notes.txt
    tiffin vm cp vm-...:/workspace/out.csv .
    tiffin vm cp -r project vm-...:project
    tiffin vm cp -r vm-...:project copy-of-it
    tiffin vm cp - vm-...:input < input ; tiffin vm cp vm-...:output -")]
pub(crate) struct CopyArgs {
    /// What to copy; - is standard input
    from: Place,
    /// Where to; a folder takes a file under its own name; - is standard output
    to: Place,
    /// Copy a folder with all in it; into the VM it is added to what is there, from the VM it is made anew
    #[arg(long, short)]
    recursive: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FilesArgs {
    id: VmId,
    /// The folder
    #[arg(default_value = WORKSPACE)]
    path: String,
    #[command(flatten)]
    output: OutputArgs,
}

/// One end of a copy.
#[derive(Debug, Clone)]
enum Place {
    /// On this machine.
    Here(PathBuf),
    /// In a VM; whether the path ended in a slash.
    Vm(VmId, GuestPath, bool),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':').and_then(|(id, path)| Some((id.parse().ok()?, path))) {
            Some((id, path)) => Ok(Self::Vm(id, guest_path(path)?, path.is_empty() || path.ends_with('/'))),
            None => Ok(Self::Here(text.into())),
        }
    }
}

fn guest_path(text: &str) -> Result<GuestPath, String> {
    let absolute = if text.starts_with('/') { text.to_owned() } else { format!("{WORKSPACE}/{text}") };
    absolute.parse().map_err(|error| format!("the path in the VM {error}"))
}

/// Copies.
pub(crate) async fn copy(client: &Client, args: &CopyArgs) -> Result<(), Failure> {
    match (&args.from, &args.to) {
        (Place::Here(from), Place::Vm(id, to, _)) if args.recursive => upload(client, from, id, to).await,
        (Place::Here(from), Place::Vm(id, to, into)) => write(client, from, id, &within(to, *into, from)?).await,
        (Place::Vm(id, from, _), Place::Here(to)) if args.recursive => download(client, id, from, to).await,
        (Place::Vm(id, from, _), Place::Here(to)) => read(client, id, from, to).await,
        (Place::Here(_), Place::Here(_)) => {
            Err(anyhow!("neither is in a VM: name one as ID:PATH, such as vm-0123456789abcd:/workspace/a").into())
        }
        (Place::Vm(..), Place::Vm(..)) => Err(anyhow!("both are in VMs: copy here first").into()),
    }
}

/// Lists a folder.
pub(crate) async fn list(client: &Client, args: &FilesArgs) -> Result<(), Failure> {
    let path = guest_path(&args.path).map_err(|error| anyhow!(error))?;
    let entries = client.get(&query(&format!("/v1/vms/{}/files", args.id), &[("path", path.as_str())])).await?;
    if args.output.json {
        return output::json(&entries);
    }
    let row = |entry| ["type", "mode", "size", "modifiedAt", "name"].iter().map(|name| field(entry, name)).collect();
    let rows = entries.as_array().into_iter().flatten().map(row).collect();
    output::table(&["TYPE", "MODE", "SIZE", "MODIFIED", "NAME"], rows)
}

/// The file to write: `to`, or below it under its own name.
fn within(to: &GuestPath, into: bool, from: &Path) -> Result<GuestPath, Failure> {
    if !into {
        return Ok(to.clone());
    }
    let name = from.file_name().and_then(|name| name.to_str()).filter(|name| *name != "-");
    let name = name.with_context(|| format!("{}: give the file's name in the VM too", from.display()))?;
    guest_path(&format!("{to}/{name}")).map_err(|error| anyhow!(error).into())
}

async fn write(client: &Client, from: &Path, id: &VmId, to: &GuestPath) -> Result<(), Failure> {
    let body = if from == Path::new("-") {
        let input = std::io::stdin().as_fd().try_clone_to_owned().context("can't read standard input")?;
        Body::wrap_stream(ReaderStream::new(tokio::fs::File::from_std(input.into())))
    } else {
        let file = open(from).await?;
        if file.metadata().await.is_ok_and(|meta| meta.is_dir()) {
            return Err(anyhow!("{} is a folder: give -r", from.display()).into());
        }
        Body::wrap_stream(ReaderStream::new(file))
    };
    let path = query(&format!("/v1/vms/{id}/files/content"), &[("path", to.as_str())]);
    client.pass(Call { limit: LIMIT, ..Call::new(Method::PUT, &path) }, "application/octet-stream", body).await
}

async fn upload(client: &Client, from: &Path, id: &VmId, to: &GuestPath) -> Result<(), Failure> {
    let packed = archive::pack(from)?;
    let body = Body::wrap_stream(ReaderStream::new(tokio::fs::File::from_std(packed)));
    let path = query(&format!("/v1/vms/{id}/files/upload"), &[("dest", to.as_str())]);
    client.pass(Call { limit: LIMIT, ..Call::new(Method::POST, &path) }, "application/gzip", body).await
}

async fn read(client: &Client, id: &VmId, from: &GuestPath, to: &Path) -> Result<(), Failure> {
    let path = query(&format!("/v1/vms/{id}/files/content"), &[("path", from.as_str())]);
    let answer = client.send(Call { limit: LIMIT, ..Call::new(Method::GET, &path) }).await?;
    if to == Path::new("-") {
        return take(client, answer, &mut std::io::stdout().lock()).await;
    }
    let to = if to.is_dir() { to.join(from.name()) } else { to.to_owned() };
    let mut file = tempfile::Builder::new()
        .prefix(".tiffin-")
        .tempfile_in(parent(&to))
        .with_context(|| format!("can't write to {}", parent(&to).display()))?;
    take(client, answer, file.as_file_mut()).await?;
    // As other programs make files, and not for their owner alone.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666 & !umask());
    file.as_file().set_permissions(mode).context("can't set the file's mode")?;
    file.persist(&to).with_context(|| format!("can't write {}", to.display()))?;
    Ok(())
}

async fn download(client: &Client, id: &VmId, from: &GuestPath, to: &Path) -> Result<(), Failure> {
    if to.symlink_metadata().is_ok() {
        return Err(anyhow!("{} is there already: name a folder that isn't", to.display()).into());
    }
    let path = query(&format!("/v1/vms/{id}/files/download"), &[("path", from.as_str())]);
    let answer = client.send(Call { limit: LIMIT, ..Call::new(Method::GET, &path) }).await?;
    let mut packed = tempfile::tempfile().context("can't make a temporary file")?;
    take(client, answer, &mut packed).await?;
    archive::unpack(packed, to, &parent(to))?;
    Ok(())
}

/// Writes the rest of the answer.
async fn take(client: &Client, mut answer: Response, to: &mut impl Write) -> Result<(), Failure> {
    while let Some(chunk) = client.chunk(&mut answer).await? {
        to.write_all(&chunk)?;
    }
    Ok(to.flush()?)
}

async fn open(path: &Path) -> anyhow::Result<tokio::fs::File> {
    match tokio::fs::File::open(path).await {
        Ok(file) => Ok(file),
        Err(error) => bail!("can't read {}: {error}", path.display()),
    }
}

/// The folder that a path is in.
fn parent(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

/// The mode bits that new files don't get.
fn umask() -> u32 {
    let all = nix::sys::stat::Mode::empty();
    let mask = nix::sys::stat::umask(all);
    nix::sys::stat::umask(mask);
    mask.bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_a_vm_begins_with_its_id() {
        let place = |text: &str| match text.parse::<Place>().unwrap() {
            Place::Here(path) => path.display().to_string(),
            Place::Vm(id, path, into) => format!("{id} {path} {into}"),
        };
        assert_eq!(place("vm-0123456789abcd:a/b"), "vm-0123456789abcd /workspace/a/b false");
        assert_eq!(place("vm-0123456789abcd:/workspace/a/"), "vm-0123456789abcd /workspace/a true");
        assert_eq!(place("vm-0123456789abcd:"), "vm-0123456789abcd /workspace true");
        assert_eq!(place("C:file"), "C:file");
        assert_eq!(place("./vm-0123456789abcd:a"), "./vm-0123456789abcd:a");
        for bad in ["vm-0123456789abcd:/etc/passwd", "vm-0123456789abcd:../a"] {
            assert!(bad.parse::<Place>().unwrap_err().contains("/workspace"), "{bad}");
        }
    }
}
