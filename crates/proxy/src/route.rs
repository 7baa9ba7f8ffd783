//! What the ingress asks of whoever runs it.

use std::{pin::Pin, sync::Arc};

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::upstream::Backend;

/// A stream of bytes to a program.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection to a program.
pub type Connection = Pin<Box<dyn Stream>>;

/// Who has which host name.
pub trait Routes: Send + Sync + 'static {
    /// Where requests for `host` go, if anywhere. Lower case, without port and without a dot at the end. Asked for every
    /// request: a look into a table, never more.
    fn route(&self, host: &str) -> Option<Arc<dyn Route>>;
}

/// Where the requests of a host name go.
#[async_trait]
pub trait Route: Send + Sync + 'static {
    /// Who takes the next request. May wait for somebody who has to wake; it is given up at the time limit of answers.
    async fn backend(&self) -> Result<Arc<Backend>, DialError>;
}

/// The route with one backend that is always there.
pub struct Single(pub Arc<Backend>);

#[async_trait]
impl Route for Single {
    async fn backend(&self) -> Result<Arc<Backend>, DialError> {
        Ok(Arc::clone(&self.0))
    }
}

/// The way to a program.
#[async_trait]
pub trait Dial: Send + Sync + 'static {
    /// A new connection. It is given up at the time limit of dials.
    async fn dial(&self) -> Result<Connection, DialError>;
}

/// Why there is no connection, by what the client is told.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// Whoever is to answer doesn't run; says what it is instead ("STOPPED").
    #[error("it is {0}")]
    NotRunning(String),
    /// It runs, and nothing takes connections there.
    #[error("nothing listens there")]
    Refused,
    /// It didn't answer in time.
    #[error("no answer in time")]
    TimedOut,
    /// It can't take one more now.
    #[error("too much is asked of it at once")]
    Busy,
    /// Something else failed; the client isn't told what.
    #[error("it can't be reached")]
    Failed(#[source] Box<dyn std::error::Error + Send + Sync>),
}
