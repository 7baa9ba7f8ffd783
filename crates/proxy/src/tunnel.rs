//! WebSockets: what is left of HTTP once both sides have agreed to something else, two streams of bytes.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional_with_sizes};

use crate::{
    activity::{Activity, UnderWay},
    answer::chain,
    metrics::Counted,
};

/// How long the two sides may take to become streams after the answer.
const UPGRADE: Duration = Duration::from_secs(10);
/// Bytes that are on their way at once, each way.
const BUFFER: usize = 16 * 1024;

/// Carries bytes both ways until one side ends, or nothing moves for `limit`.
pub(crate) async fn carry(client: OnUpgrade, program: OnUpgrade, request: Arc<UnderWay>, limit: Duration) {
    let upgraded = tokio::time::timeout(UPGRADE, async { tokio::try_join!(client, program) }).await;
    let (client, program) = match upgraded {
        Ok(Ok(both)) => both,
        Ok(Err(error)) => return tracing::debug!(error = chain(&error), "a WebSocket didn't come about"),
        Err(_) => return tracing::debug!("a WebSocket didn't come about in time"),
    };
    let _counted = Counted::tunnel();
    // Of its own: other requests on the client's connection say nothing of this one.
    let moves = Activity::new();
    let mut client = Moving { stream: TokioIo::new(client), moves: &moves, request: &request };
    let mut program = TokioIo::new(program);
    tokio::select! {
        carried = copy_bidirectional_with_sizes(&mut client, &mut program, BUFFER, BUFFER) => {
            if let Err(error) = carried {
                tracing::debug!(error = chain(&error), "a WebSocket broke off");
            }
        }
        _ = moves.stale(limit, limit) => tracing::debug!("a WebSocket was silent for too long"),
    }
}

/// A stream that says when something moves.
struct Moving<'a, S> {
    stream: S,
    moves: &'a Activity,
    request: &'a UnderWay,
}

impl<S> Moving<'_, S> {
    fn touch(&self) {
        self.moves.touch();
        self.request.touch();
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Moving<'_, S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        self.touch();
        Poll::Ready(read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Moving<'_, S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes));
        self.touch();
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
