//! The ingress: names outside, programs in VMs inside. TLS, HTTP/1.1 and HTTP/2 towards clients; HTTP/1.1, and HTTP/2 for
//! gRPC, towards VMs.
//!
//! It knows nothing of accounts, records or engines. Whoever runs it answers one question, [`Routes::route`]: who has this
//! host name? The answer picks a [`Backend`] for each request, and a backend is a way to [`Dial`] and the connections that
//! are kept for the next request. Several backends behind a name, a VM that wakes for a request and a certificate for a
//! name of the user's own are other implementations of [`Route`] and of rustls' certificate resolver; nothing here changes
//! for them.
//!
//! Invariants: both sides are strangers. What passes is parsed by hyper and framed anew, so that no two parties can read
//! one message differently. Bodies stream: what one side doesn't take isn't read from the other. Everything is bounded
//! ([`ProxyConfig`]): connections, their heads, each wait. A route that changes cuts nothing that is under way.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod activity;
mod address;
mod answer;
mod body;
mod config;
mod forward;
mod headers;
mod host;
mod metrics;
mod patient;
mod redirect;
mod route;
mod serve;
pub mod tls;
mod tunnel;
mod upstream;

pub use config::ProxyConfig;
pub use metrics::describe;
pub use patient::Patient;
pub use route::{Connection, Dial, DialError, Route, Routes, Single, Stream};
pub use serve::{Listeners, serve};
pub use upstream::{Backend, Upstreams};
