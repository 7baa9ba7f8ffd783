//! How a process in an image starts: the part of the OCI image configuration that the platform uses.

use serde::{Deserialize, Serialize};

/// The `config` object of an OCI image configuration, under its own names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// Environment, as `NAME=value`.
    pub env: Vec<String>,
    /// Absolute folder that commands start in.
    pub working_dir: String,
    /// `uid:gid`, both numbers.
    pub user: String,
}
