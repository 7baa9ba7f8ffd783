//! The server's log: lines on stderr, as text or as JSON.

use std::io::IsTerminal;

use tiffin_server::config::LogConfig;
use tracing_subscriber::EnvFilter;

/// Starts logging; once per process.
pub(super) fn start(config: &LogConfig) {
    // What the libraries say below a warning is of no use to whoever runs the server.
    let level = &config.level;
    let filter = EnvFilter::new(format!("{level},sqlx=warn,hyper=warn,hyper_util=warn,h2=warn"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if config.json {
        log.json().flatten_event(true).with_current_span(true).with_span_list(false).init();
    } else {
        log.with_ansi(std::io::stderr().is_terminal()).init();
    }
}
