//! The ingress as clients meet it: over TLS, in front of programs that do as they should and of others.

#![allow(clippy::unwrap_used, reason = "test code")]

mod failing;
mod grpc;
mod harness;
mod hostile;
mod life;
mod passing;
mod websocket;
