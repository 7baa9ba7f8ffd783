//! The words that every other crate speaks: ids, units, a VM's specification and states, network policy, end reasons.
//!
//! Invariant: no I/O and no clock of its own; everything here can be tested without a machine.
//! What a type can't hold (a memory size out of range, a name with a slash) doesn't get past this crate.

pub mod account;
pub mod id;
pub mod limits;
pub mod network;
pub mod path;
pub mod program;
pub mod snapshot;
pub mod time;
pub mod vm;
