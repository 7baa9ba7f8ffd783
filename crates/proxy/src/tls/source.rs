//! Where certificates come from, and keeping them fresh.

use std::{fs, path::PathBuf, sync::Arc, time::Duration, time::SystemTime};

use tokio_util::sync::CancellationToken;

use super::{Certificates, TlsError, files, local::LocalCa};
use crate::answer::chain;

/// How often it is looked whether files have changed.
const LOOK: Duration = Duration::from_secs(5);
/// How often it is looked whether the certificate of one's own is about to end.
const RENEW: Duration = Duration::from_secs(3600);

/// Where certificates come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// An authority of one's own for that domain, made in that folder.
    Local {
        /// The folder.
        folder: PathBuf,
        /// The domain, in lower case.
        domain: String,
    },
    /// Files that somebody else keeps.
    Files {
        /// The chain of certificates, in PEM.
        certificates: PathBuf,
        /// The key, in PEM.
        key: PathBuf,
    },
}

/// Keeps certificates fresh.
#[derive(Debug)]
pub struct Keeper {
    certificates: Arc<Certificates>,
    way: Way,
}

#[derive(Debug)]
enum Way {
    Local(Box<LocalCa>),
    Files { certificates: PathBuf, key: PathBuf, seen: Seen },
}

/// When files were last written.
type Seen = [Option<SystemTime>; 2];

impl Keeper {
    /// The certificates of a source, loaded or made.
    ///
    /// # Errors
    /// When there are none, with the file that is to blame.
    pub fn open(source: Source) -> Result<Self, TlsError> {
        match source {
            Source::Local { folder, domain } => {
                let ca = LocalCa::open(&folder, &domain)?;
                let missing = || TlsError::Content { path: folder, expected: "has no certificate" };
                let first = ca.wildcard(None)?.ok_or_else(missing)?;
                Ok(Self { certificates: Certificates::new(first), way: Way::Local(Box::new(ca)) })
            }
            Source::Files { certificates, key } => {
                let seen = seen(&certificates, &key);
                let first = files::load(&certificates, &key)?;
                Ok(Self { certificates: Certificates::new(first), way: Way::Files { certificates, key, seen } })
            }
        }
    }

    /// What a handshake gets.
    pub fn certificates(&self) -> Arc<Certificates> {
        Arc::clone(&self.certificates)
    }

    /// The certificate of one's own authority, in PEM, for clients to trust.
    pub fn authority(&self) -> Option<&str> {
        match &self.way {
            Way::Local(ca) => Some(ca.pem()),
            Way::Files { .. } => None,
        }
    }

    /// Renews and reloads until `shutdown`.
    pub async fn keep(mut self, shutdown: CancellationToken) {
        let every = match &self.way {
            Way::Local(_) => RENEW,
            Way::Files { .. } => LOOK,
        };
        while shutdown.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
            // Small files, seldom.
            if let Err(error) = self.look() {
                tracing::error!(error = chain(&error), "the ingress keeps the certificate that it has");
            }
        }
    }

    /// Takes what is new.
    pub(super) fn look(&mut self) -> Result<(), TlsError> {
        let new = match &mut self.way {
            Way::Local(ca) => {
                let before = self.certificates.current();
                ca.wildcard(Some(&before))?
            }
            Way::Files { certificates, key, seen: before } => {
                let now = seen(certificates, key);
                if now == *before {
                    return Ok(());
                }
                // One of the two may still be on its way: what doesn't fit is looked at again when it changes.
                *before = now;
                Some(files::load(certificates, key)?)
            }
        };
        if let Some(new) = new {
            self.certificates.replace(new);
            tracing::info!("the ingress has a new certificate");
        }
        Ok(())
    }
}

fn seen(certificates: &PathBuf, key: &PathBuf) -> Seen {
    [certificates, key].map(|path| fs::metadata(path).and_then(|file| file.modified()).ok())
}

#[cfg(test)]
mod tests;
