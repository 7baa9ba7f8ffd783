//! What the ingress is bounded by.

use std::time::Duration;

/// The bounds, and how requests are passed on.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Client connections at once; more wait to be accepted.
    pub max_connections: usize,
    /// Of one client address (IPv6: of one /64); more are closed at once.
    pub max_connections_per_address: usize,
    /// Connections into one backend at once; a request for which there is none waits as long as for a dial.
    pub max_connections_per_backend: usize,
    /// How long a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// How long a client's connection may have nothing under way; a request's head must have come by then, too.
    pub idle_timeout: Duration,
    /// How long a client may send none of a body that is waited for.
    pub body_timeout: Duration,
    /// How long a client may take none of an answer that waits for it.
    pub write_timeout: Duration,
    /// How long a connection into a VM may take to come about.
    pub dial_timeout: Duration,
    /// How long a request waits for a program to listen that has not listened yet since its VM was started.
    pub listen_patience: Duration,
    /// How long a program may take from the last byte of a request until its answer begins.
    pub answer_timeout: Duration,
    /// How long an answer, a WebSocket or a gRPC stream may be silent.
    pub stream_timeout: Duration,
    /// How long a connection into a VM is kept for the next request: less than programs keep theirs, the least of them
    /// for two seconds.
    pub keep: Duration,
    /// How long requests under way may go on once the server is told to end.
    pub shutdown_grace: Duration,
    /// Whether what a client says of whom it speaks for (`X-Forwarded-*`) is believed and continued.
    pub trust_forwarded: bool,
    /// Whether each request is logged.
    pub access_log: bool,
    /// The port in the addresses that plain HTTP is redirected to.
    pub public_port: u16,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_connections_per_address: 512,
            max_connections_per_backend: 512,
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            dial_timeout: Duration::from_secs(5),
            listen_patience: Duration::from_secs(3),
            answer_timeout: Duration::from_secs(120),
            stream_timeout: Duration::from_secs(3600),
            keep: Duration::from_millis(1500),
            shutdown_grace: Duration::from_secs(10),
            trust_forwarded: false,
            access_log: false,
            public_port: 443,
        }
    }
}
