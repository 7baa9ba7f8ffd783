//! What container registries and images say of themselves: references, manifests, configurations.
//!
//! Texts in, values out: no I/O, and nothing that a registry sends does more than an error. Sizes of texts are bounded by
//! who reads them.

mod image;
mod manifest;
mod reference;

pub use self::{
    image::{OciImage, oci_image},
    manifest::{Descriptor, Document, Manifest, document},
    reference::{BadReference, Reference, Version},
};

/// What a registry sent is no image that is taken; the text says why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoImage(pub String);

impl NoImage {
    fn because(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// The host's architecture, as images call it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
