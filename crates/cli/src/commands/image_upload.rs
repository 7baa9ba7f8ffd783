//! Sending a file to an image, with a bar that shows how far it is.

use std::time::Duration;

use anyhow::Context;
use camino::Utf8Path;
use serde_json::Value;

use crate::{
    client::Client,
    failure::Failure,
    output::{self, Transfer},
};

/// From the first byte to the answer: large files through narrow lines, and the conversion.
const LIMIT: Duration = Duration::from_secs(12 * 3600);

/// Refuses a file that can't be sent.
pub(crate) fn readable(file: &Utf8Path) -> Result<u64, Failure> {
    let opened = std::fs::File::open(file).with_context(|| format!("opening {file}"))?;
    let metadata = opened.metadata().with_context(|| format!("looking at {file}"))?;
    if !metadata.is_file() {
        return Err(anyhow::anyhow!("{file} is no file: make an ext4 filesystem of a folder with mke2fs -d").into());
    }
    Ok(metadata.len())
}

/// Sends `file` as that part of the image at `path`.
pub(crate) async fn send(client: &Client, path: &str, part: &str, file: &Utf8Path) -> Result<(), Failure> {
    let bytes = readable(file)?;
    let open = tokio::fs::File::open(file).await.with_context(|| format!("opening {file}"))?;
    let bar = Transfer::start(format!("uploading {file}"), bytes);
    let sent = client.upload(&format!("{path}/{part}"), open, bytes, LIMIT, bar.counter()).await;
    drop(bar);
    match sent {
        // One that answers before it has read everything may break off before the answer is read: it is asked why.
        Err(Failure::Exchange(broken)) => {
            let image = client.get(path).await.unwrap_or(Value::Null);
            match output::field(&image, "error") {
                why if why.is_empty() => Err(Failure::Exchange(broken)),
                why => Err(Failure::Exchange(format!("{broken}; the server says: {}", output::visible(&why)))),
            }
        }
        other => other,
    }
}
