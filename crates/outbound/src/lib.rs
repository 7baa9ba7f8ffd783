//! HTTP to addresses that users name: receivers of webhooks, registries, and where those point to.
//!
//! Invariants: every address is judged by a [`Policy`] at the moment it is connected to, whether it came from a name or
//! stood in the URL, and the connection goes to that address and no other, so a name that resolves differently the second
//! time gains nothing. No proxy of the environment is used, no redirect is followed (whoever follows one sends another
//! request, which is judged again), and connecting, heads and what is read of bodies have bounds.
//!
//! It knows no retries, no users and no store. One exchange per connection: there is no pool whose connections were judged
//! by an older policy.

mod client;
mod connect;
mod policy;
mod tls;

pub use client::{Answer, Body, Client, Request};
pub use connect::{Resolve, Resolving, SystemResolver};
pub use policy::{Policy, Refused};
pub use tls::{BadCertificates, Roots};

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum OutboundError {
    /// The policy forbids it; trying again won't help.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The host's name has no address, or none now.
    #[error("the name {host} can't be resolved: {why}")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        why: String,
    },
    /// Nobody answers there.
    #[error("can't connect: {0}")]
    Connect(std::io::Error),
    /// No address answered in time.
    #[error("no connection within {0:?}")]
    ConnectTimeout(std::time::Duration),
    /// The TLS handshake failed, for example on the certificate.
    #[error("no TLS: {0}")]
    Tls(std::io::Error),
    /// The roots of the system can't be used.
    #[error(transparent)]
    Roots(#[from] BadCertificates),
    /// What came is no HTTP, or it broke off.
    #[error("the exchange broke off: {0}")]
    Http(#[source] hyper::Error),
    /// The request can't be written down.
    #[error("the request can't be sent: {0}")]
    Request(String),
    /// The answer is larger than asked for.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
}
