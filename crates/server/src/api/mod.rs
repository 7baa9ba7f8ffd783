//! HTTP: thin handlers (extract, one call of the application, wrap) and what surrounds them.

mod accounts;
mod activity;
mod api_keys;
mod audit;
mod body;
mod cakework;
mod content_range;
mod docs;
mod events;
mod exec;
mod exec_logs;
mod files;
mod gate;
mod health;
mod images;
mod imports;
mod ingress;
mod layer;
mod logs;
mod openapi;
mod overview;
mod ports;
mod request;
mod router;
mod scripts;
mod sessions;
mod snapshots;
mod terminal;
mod timing;
mod uploads;
mod vm_logs;
mod vms;
mod webhooks;

pub use openapi::document as openapi_document;
pub(crate) use request::{Peer, Place};
pub(crate) use router::router;
