//! The subcommands, one noun a file: its arguments, its calls, what it prints.

pub(crate) mod account;
pub(crate) mod admin;
pub(crate) mod completion;
pub(crate) mod config;
pub(crate) mod data_dir;
pub(crate) mod doctor;
pub(crate) mod host;
pub(crate) mod image;
pub(crate) mod image_build;
pub(crate) mod image_import;
pub(crate) mod image_upload;
pub(crate) mod ingress;
pub(crate) mod key;
pub(crate) mod logs;
pub(crate) mod serve;
pub(crate) mod settings;
pub(crate) mod snapshot;
pub(crate) mod vm;
pub(crate) mod webhook;
