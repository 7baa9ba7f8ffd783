//! Accounts, what they may use, and what an API key may do.

use serde::{Deserialize, Serialize};

/// What one account's VMs may use together. VMs that are not deleted count for `vms` and `disk_mb`;
/// VMs that run, start or pause count for `cpus` and `mem_mb` too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Quota {
    /// VMs that exist.
    pub vms: u32,
    /// vCPUs of the VMs that are up.
    pub cpus: u32,
    /// Memory of the VMs that are up, in MiB.
    pub mem_mb: u64,
    /// Disk of the VMs that exist, in MiB.
    pub disk_mb: u64,
}

/// What is in use of a [`Quota`], in the same units.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// VMs that exist.
    pub vms: u32,
    /// vCPUs of the VMs that are up.
    pub cpus: u32,
    /// Memory of the VMs that are up, in MiB.
    pub mem_mb: u64,
    /// Disk of the VMs that exist, in MiB.
    pub disk_mb: u64,
}

/// What an API key may do. A key has one or more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// See the account's own resources.
    Read,
    /// Create, change, use and delete the account's own resources; includes `read`.
    Write,
    /// Manage accounts and every account's keys; includes `write`, for the own account's resources only.
    Admin,
}

impl Scope {
    /// Every scope, weakest first.
    pub const ALL: [Scope; 3] = [Scope::Read, Scope::Write, Scope::Admin];

    /// The scope's name in the API and in the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Read => "read",
            Scope::Write => "write",
            Scope::Admin => "admin",
        }
    }

    /// Whether a key with this scope may do what asks for `needed`.
    pub fn covers(self, needed: Scope) -> bool {
        self >= needed
    }
}

impl std::str::FromStr for Scope {
    type Err = UnknownScope;
    fn from_str(text: &str) -> Result<Self, UnknownScope> {
        Scope::ALL.into_iter().find(|scope| scope.as_str() == text).ok_or(UnknownScope)
    }
}

/// The text is no scope's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be one of read, write, admin")]
pub struct UnknownScope;
