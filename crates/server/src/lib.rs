//! The server: configuration, the REST API, the rules behind it, and the reconcilers.
//!
//! ```text
//!   HTTP -> api (extract, wrap) -> app (authorize, decide) -> store (SQL)
//!                                        |                      ^
//!                                        `-> engine             |
//!                 reconcile (start, ends, timer) ---------------'
//! ```
//!
//! Invariants: only `api` knows axum's extractors and only `error` turns an error into HTTP; the store holds the intent
//! before the engine acts; VMs outlive the server. It starts no process of its own and knows no engine but by the trait.

mod api;
mod app;
mod authorities;
pub mod config;
mod error;
pub mod fault;
mod metrics;
mod reconcile;
mod registry;
mod serve;

pub use api::openapi_document;
pub use app::{
    api_keys::first_key,
    passwords::{PasswordError, random_password},
    sessions::{FirstLogin, SetPasswordError, first_login, set_password},
};
pub use authorities::BadAuthorities;
pub use config::{Config, ConfigError};
pub use serve::{IngressError, ServeError, serve};
