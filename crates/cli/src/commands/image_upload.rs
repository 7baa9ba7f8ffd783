//! Sending a file to an image, with a bar that shows how far it is. What breaks off is gone on with, in this run or a later one.
//!
//! Invariant: it goes on only with what the server keeps of the very same file: its length and its SHA-256 are the same. However often
//! it breaks off, it tries again only while it gets on.

use std::{io::SeekFrom, time::Duration};

use anyhow::Context;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use camino::{Utf8Path, Utf8PathBuf};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;
use tiffin_image::blob;
use tiffin_types::id::Digest;
use tokio::io::AsyncSeekExt;

use crate::{
    client::Client,
    failure::Failure,
    output::{self, Transfer, field},
};

/// From the first byte of a request to its answer: large files through narrow lines, and the conversion.
const LIMIT: Duration = Duration::from_secs(12 * 3600);
/// How often it is tried again without getting on.
const TRIES: u32 = 10;
/// Before trying again; twice as long each time, up to the second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// What passes: somebody else's upload, a busy or slow server, a state that was looked up too early.
const PASSING: [&str; 8] = [
    "upload_in_progress",
    "wrong_offset",
    "other_upload",
    "busy",
    "too_many",
    "too_slow",
    "body_timeout",
    "store_unavailable",
];

/// Where an upload begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    /// At the beginning: the image was made just now.
    Anew,
    /// Where an earlier one of the same file ended.
    WhereItEnded,
}

/// Refuses a file that can't be sent.
pub(crate) fn readable(file: &Utf8Path) -> Result<u64, Failure> {
    let opened = std::fs::File::open(file).with_context(|| format!("opening {file}"))?;
    let metadata = opened.metadata().with_context(|| format!("looking at {file}"))?;
    if !metadata.is_file() {
        return Err(anyhow::anyhow!("{file} is no file: make an ext4 filesystem of a folder with mke2fs -d").into());
    }
    Ok(metadata.len())
}

/// A file on its way to a part of an image.
struct Sending<'a> {
    client: &'a Client,
    /// The image's.
    path: &'a str,
    part: &'a str,
    file: &'a Utf8Path,
    bytes: u64,
    digest: Digest,
}

/// Sends `file` as that part of the image at `path`.
pub(crate) async fn send(
    client: &Client,
    path: &str,
    part: &str,
    file: &Utf8Path,
    begin: Begin,
) -> Result<(), Failure> {
    let bytes = readable(file)?;
    let sending = Sending { client, path, part, file, bytes, digest: digest_of(file.to_owned()).await? };
    let (mut at, mut known_error) = (0, String::new());
    if begin == Begin::WhereItEnded {
        let image = client.get(path).await?;
        at = sending.kept(&image).unwrap_or(0);
        known_error = field(&image, "error");
    }
    let bar = Transfer::start(format!("uploading {file}"), bytes);
    let (mut tries, mut pause) = (0, PAUSE.0);
    loop {
        let Err(failure) = sending.request(at, &bar).await else { return Ok(()) };
        if tries == TRIES || !passes(&failure) {
            return Err(failure);
        }
        tokio::time::sleep(pause).await;
        (tries, pause) = (tries + 1, (pause * 2).min(PAUSE.1));
        // A server that isn't there now is asked again by the next try.
        let Ok(image) = client.get(path).await else { continue };
        match sending.kept(&image) {
            Some(kept) if kept > at => (at, tries, pause) = (kept, 0, PAUSE.0),
            Some(kept) => at = kept,
            None => {
                let why = field(&image, "error");
                if let Failure::Exchange(broken) = &failure
                    && !why.is_empty()
                    && why != known_error
                {
                    // It answered before it had read everything, and broke off before the answer was read.
                    return Err(Failure::Exchange(format!("{broken}; the server says: {}", output::visible(&why))));
                }
                at = 0;
            }
        }
    }
}

async fn digest_of(file: Utf8PathBuf) -> Result<Digest, Failure> {
    let name = file.clone();
    let hashed = tokio::task::spawn_blocking(move || blob::hash(&mut std::fs::File::open(file)?));
    Ok(hashed.await.map_err(anyhow::Error::from)?.with_context(|| format!("reading {name}"))?.digest)
}

fn passes(failure: &Failure) -> bool {
    match failure {
        Failure::Api(error) => PASSING.contains(&error.code.as_str()),
        Failure::Unreachable { .. } | Failure::Exchange(_) => true,
        Failure::Closed | Failure::AlreadyTold | Failure::Other(_) => false,
    }
}

impl Sending<'_> {
    /// How much the server keeps of this very file.
    fn kept(&self, image: &Value) -> Option<u64> {
        let kept = image.get("partialUploads")?.as_array()?.iter().find(|kept| {
            kept["part"] == self.part
                && kept["digest"] == self.digest.as_str()
                && kept["expectedBytes"].as_u64().is_none_or(|bytes| bytes == self.bytes)
        })?;
        kept["receivedBytes"].as_u64().filter(|received| *received <= self.bytes)
    }

    /// Sends what comes from `at`.
    async fn request(&self, at: u64, bar: &Transfer) -> Result<(), Failure> {
        let mut open = tokio::fs::File::open(self.file).await.with_context(|| format!("opening {}", self.file))?;
        open.seek(SeekFrom::Start(at)).await.with_context(|| format!("reading {}", self.file))?;
        let mut headers = HeaderMap::new();
        let sha256 = hex::decode(self.digest.hex()).map_err(anyhow::Error::from)?;
        headers
            .insert(HeaderName::from_static("repr-digest"), value(format!("sha-256=:{}:", STANDARD.encode(sha256)))?);
        if at > 0 {
            let range = if at == self.bytes { "*".to_owned() } else { format!("{at}-{}", self.bytes - 1) };
            headers.insert(header::CONTENT_RANGE, value(format!("bytes {range}/{}", self.bytes))?);
        }
        let sent = bar.counter();
        let path = format!("{}/{}", self.path, self.part);
        self.client.upload(&path, headers, open, self.bytes - at, LIMIT, move |now| sent(at + now)).await
    }
}

fn value(text: String) -> Result<HeaderValue, Failure> {
    Ok(HeaderValue::from_str(&text).map_err(anyhow::Error::from)?)
}
