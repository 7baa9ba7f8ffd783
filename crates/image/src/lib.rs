//! Images: what a VM's filesystem starts from.
//!
//! One format: an EROFS file, read-only and named after the SHA-256 of its bytes ([`blob`]), made from a folder
//! ([`erofs`]). The default image ([`default_image`]) is made from Debian packages and Deno; others from the ext4
//! filesystems that clients upload ([`convert`], [`ext4`]) and the layers of container images ([`oci`], [`layers`]). Kernels ([`kernel`]) are kept beside them, as they come.
//!
//! Invariants: a blob under its digest's name is complete and never changes. Images are made in userspace: nothing here
//! mounts a filesystem. This crate knows no store, no account and no engine; everything in it blocks, so async callers
//! run it on a blocking thread.

pub mod blob;
pub mod config;
pub mod convert;
pub mod default_image;
pub mod erofs;
pub mod ext4;
pub mod kernel;
pub mod layers;
pub mod oci;
mod tool;

pub use tool::ToolError;
