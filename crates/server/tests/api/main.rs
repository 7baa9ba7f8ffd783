//! The API over real HTTP, with the fake engine and a SQLite store of its own for each test.
//!
//! Every case runs twice: `tests/api_pool` is a link to this folder, where the server has VMs booted ahead.

mod accounts;
mod activity;
mod api_keys;
mod events;
mod exec;
mod exec_logs;
mod files;
mod harness;
mod http;
mod images;
mod import_layers;
mod import_reach;
mod imports;
mod kernels;
mod logs;
mod middle;
mod odd;
mod openapi;
mod overview;
mod pool;
mod ports;
mod program_logs;
mod rates;
mod reconcile;
mod registry;
mod scripts;
mod services;
mod sessions;
mod snapshots;
mod terminal;
mod uploads;
mod vm_create;
mod vm_fork;
mod vms;
mod webhooks;
