//! Registries of container images: finding out what a reference means, and getting its parts.
//!
//! The distribution protocol (OCI, Docker's registry v2) over [`tiffin_outbound`]: every address that a user, a registry, a
//! challenge or a redirect names is judged when it is connected to. Plain HTTP, and addresses that aren't public, are for
//! registries that the configuration lets in, and for what those point to; a registry elsewhere can't point there.
//!
//! Invariants: credentials go to the registry, and to the token server that it names, alone; they are in no error and no log. What is
//! read into memory is bounded. Digests are compared where whole texts are read here; whoever takes a blob in pieces
//! compares its digest.

mod auth;
mod challenge;
mod places;
mod session;

pub(crate) use self::{
    auth::Credentials,
    places::Registries,
    session::{Found, PATIENCE, Session},
};

use tiffin_image::oci::NoImage;
use tiffin_outbound::OutboundError;

/// Why a registry gave nothing, by what the caller does about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    /// It may not be asked.
    #[error("{0}")]
    Forbidden(String),
    /// It wants other credentials than it got.
    #[error("{0}")]
    Credentials(&'static str),
    /// It has no such image.
    #[error("{0}")]
    Absent(String),
    /// What it has is no image that is taken.
    #[error(transparent)]
    NoImage(#[from] NoImage),
    /// It can't be reached, or doesn't answer as registries do; maybe later.
    #[error("{0}")]
    Failed(String),
}

impl From<OutboundError> for RegistryError {
    fn from(error: OutboundError) -> Self {
        match error {
            OutboundError::Refused(_) | OutboundError::Request(_) => Self::Forbidden(error.to_string()),
            OutboundError::Resolve { .. }
            | OutboundError::Connect(_)
            | OutboundError::ConnectTimeout(_)
            | OutboundError::Tls(_)
            | OutboundError::Roots(_)
            | OutboundError::Http(_)
            | OutboundError::TooLarge(_) => Self::Failed(error.to_string()),
        }
    }
}

/// A text of a registry's, for an error: cut, and nothing in it that a terminal obeys.
fn shown(text: &str) -> String {
    const SHOWN: usize = 200;
    text.chars().filter(|c| !c.is_control()).take(SHOWN).collect()
}
