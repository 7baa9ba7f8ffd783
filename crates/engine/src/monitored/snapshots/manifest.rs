//! What a snapshot says of itself, sealed: `manifest.json`.
//!
//! It is written last, so a folder with one is whole. Everything in it, and through the hashes in it every byte of the
//! snapshot, is bound to this host's secret: what is damaged, cut, edited or another host's is told from what was saved
//! here. Nothing is read before it is judged, but for the few fields that say why it can't be judged.

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use serde::{Deserialize, Serialize};
use tiffin_types::{
    id::{Digest, SnapshotId, VmId},
    vm::{EngineName, VmSize},
};

use crate::monitor::launch;

/// Its name in the snapshot's folder.
pub(super) const MANIFEST: &str = "manifest.json";
/// The format that is written, and the only one that is read.
const FORMAT: u32 = 1;
/// The host's secret, in the data folder.
const KEY: &str = "snapshot.key";
/// A manifest is a few kilobytes; more is none.
const MAX_MANIFEST: u64 = 256 * 1024;

/// A snapshot, as it was saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Its own name: a snapshot under another one is not what it seems.
    pub(super) snapshot: SnapshotId,
    /// The VM that was saved.
    pub(super) vm: VmId,
    /// When, milliseconds since the Unix epoch.
    pub(super) created_ms: i64,
    /// What ran it.
    pub(super) engine: EngineName,
    /// Its release: another one may not understand what it wrote.
    pub(super) engine_version: String,
    /// What the CPU can do: programs have looked, and go on using it.
    pub(super) cpu: BTreeSet<String>,
    /// The image below the disk.
    pub(super) image: Digest,
    /// The kernel that its image came with, if it did: VMs of it boot that after a stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) kernel: Option<Digest>,
    /// The VM's size.
    pub(super) size: VmSize,
    /// The agent's secret in the saved memory.
    pub(super) token: String,
    /// The folder of the agent that runs in the saved memory.
    pub(super) agent: String,
    /// Every other file.
    pub(super) files: Vec<SealedFile>,
}

/// A file of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SealedFile {
    /// Its path in the snapshot's folder.
    pub(super) path: String,
    /// Its length in bytes.
    pub(super) length: u64,
    /// The keyed hash of what isn't zero in it.
    pub(super) hash: String,
}

/// The file as it stands in the folder.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    format: u32,
    #[serde(default)]
    host: String,
    #[serde(default)]
    seal: String,
    /// The manifest's JSON, as text: the seal is over bytes.
    #[serde(default)]
    manifest: String,
}

/// The host's secret.
#[derive(Clone)]
pub(super) struct Key([u8; 32]);

impl Key {
    /// The host's key; made when there is none.
    pub(super) fn open(data_dir: &Path) -> io::Result<Self> {
        let path = data_dir.join(KEY);
        if !path.exists() {
            let unfinished = data_dir.join(format!("{KEY}.tmp"));
            let mut file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.write_all(hex::encode(rand::random::<[u8; 32]>()).as_bytes())?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)?;
            fs::File::open(data_dir)?.sync_all()?;
        }
        let text = fs::read_to_string(&path)?;
        let bytes = hex::decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| io::Error::other("it isn't 64 hexadecimal digits"))
    }

    /// A hasher for a file's content.
    pub(super) fn hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.0)
    }

    /// Names the key without giving it away.
    fn host(&self) -> String {
        hex::encode(&blake3::derive_key("tiffin 2026 name of the host of a snapshot", &self.0)[..8])
    }

    fn seal(&self, manifest: &str) -> blake3::Hash {
        let key = blake3::derive_key("tiffin 2026 seal of a snapshot's manifest", &self.0);
        blake3::keyed_hash(&key, manifest.as_bytes())
    }
}

/// Writes the manifest and waits for the host's disk.
pub(super) fn write(dir: &Path, key: &Key, manifest: &Manifest) -> io::Result<()> {
    let manifest = serde_json::to_string(manifest).map_err(io::Error::other)?;
    let seal = key.seal(&manifest).to_hex().to_string();
    launch::write(dir, MANIFEST, &Envelope { format: FORMAT, host: key.host(), seal, manifest }, true)
}

/// Reads the manifest of `snapshot` in `dir`.
///
/// # Errors
/// Why it is not to be used, as a sentence for people; the inner failure is the host's.
pub(super) fn read(dir: &Path, key: &Key, snapshot: &SnapshotId) -> io::Result<Result<Manifest, String>> {
    let path = dir.join(MANIFEST);
    let bytes = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Err("the snapshot is not on this host".into()));
        }
        Err(error) => return Err(error),
        Ok(meta) if meta.len() > MAX_MANIFEST => return Ok(Err(damaged("its manifest is too long"))),
        Ok(_) => fs::read(&path)?,
    };
    Ok(open_envelope(&bytes, key).and_then(|manifest| {
        if manifest.snapshot == *snapshot {
            Ok(manifest)
        } else {
            Err(format!("the snapshot is not what its name says: it was saved as {}", manifest.snapshot))
        }
    }))
}

fn open_envelope(bytes: &[u8], key: &Key) -> Result<Manifest, String> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|_| damaged("its manifest can't be read"))?;
    if envelope.format != FORMAT {
        return Err(format!(
            "the snapshot has the unknown format {}: it was saved by another version of the platform",
            envelope.format
        ));
    }
    if envelope.host != key.host() {
        return Err("the snapshot was saved by another host".into());
    }
    let seal = blake3::Hash::from_hex(&envelope.seal).map_err(|_| damaged("its manifest has no seal"))?;
    // Comparing these hashes takes the same time wherever they differ.
    if seal != key.seal(&envelope.manifest) {
        return Err(damaged("its manifest was changed"));
    }
    serde_json::from_str(&envelope.manifest).map_err(|_| damaged("its manifest can't be read"))
}

/// The refusal of a snapshot that isn't as it was saved.
pub(super) fn damaged(how: &str) -> String {
    format!("the snapshot is damaged: {how}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest() -> Manifest {
        Manifest {
            snapshot: SnapshotId::random(),
            vm: VmId::random(),
            created_ms: 1,
            engine: EngineName::Gvisor,
            engine_version: "runsc version 1".into(),
            cpu: ["sse".to_owned()].into(),
            image: Digest::from_sha256([1; 32]),
            kernel: Some(Digest::from_sha256([2; 32])),
            size: VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 },
            token: "t".into(),
            agent: "a".into(),
            files: vec![SealedFile { path: "disk.ext4".into(), length: 3, hash: "00".into() }],
        }
    }

    fn refusal(dir: &Path, key: &Key, snapshot: &SnapshotId) -> String {
        read(dir, key, snapshot).unwrap().unwrap_err()
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_by_this_host_alone() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = Key::open(dir.path()).unwrap();
        let manifest = manifest();
        write(dir.path(), &key, &manifest).unwrap();
        let again = Key::open(dir.path()).unwrap();
        assert_eq!(read(dir.path(), &again, &manifest.snapshot).unwrap().unwrap(), manifest);
        let foreign = Key::open(other.path()).unwrap();
        assert!(refusal(dir.path(), &foreign, &manifest.snapshot).contains("another host"));
        assert!(refusal(dir.path(), &key, &SnapshotId::random()).contains("not what its name says"));
        assert!(refusal(other.path(), &key, &manifest.snapshot).contains("not on this host"));
        use std::os::unix::fs::PermissionsExt;
        let mode = fs::metadata(dir.path().join(KEY)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_unknown_format_is_told_from_damage() {
        let dir = tempfile::tempdir().unwrap();
        let key = Key::open(dir.path()).unwrap();
        fs::write(dir.path().join(MANIFEST), r#"{"format": 2, "anything": "else"}"#).unwrap();
        assert!(refusal(dir.path(), &key, &SnapshotId::random()).contains("unknown format 2"));
        fs::write(dir.path().join(MANIFEST), vec![b' '; 300_000]).unwrap();
        assert!(refusal(dir.path(), &key, &SnapshotId::random()).contains("too long"));
    }

    proptest! {
        #[test]
        fn no_changed_byte_goes_unnoticed(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
            let key = Key([7; 32]);
            let text = serde_json::to_string(&manifest()).unwrap();
            let seal = key.seal(&text).to_hex().to_string();
            let envelope = Envelope { format: FORMAT, host: key.host(), seal, manifest: text };
            let whole = serde_json::to_vec(&envelope).unwrap();
            let mut bytes = whole.clone();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            match open_envelope(&bytes, &key) {
                // Some bytes mean the same: a digit of the seal in upper case.
                Ok(read) => prop_assert_eq!(read, open_envelope(&whole, &key).unwrap()),
                Err(refusal) => prop_assert!(!refusal.is_empty()),
            }
        }
    }
}
