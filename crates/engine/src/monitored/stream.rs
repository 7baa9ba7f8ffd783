//! A connection into a guest that ends with the guest.
//!
//! A guest that is killed says nothing any more, and its network vanishes without a word: the host's end of a TCP
//! connection would wait for ever, and keep the network namespace alive. So a connection is bound to its run.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

pub(super) struct GuestStream {
    tcp: Pin<Box<TcpStream>>,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
    token: CancellationToken,
}

impl GuestStream {
    /// A connection of the run that ends when `over` is cancelled. It has a token of its own, as each poll looks at it: one
    /// that all of a busy VM's connections share is fought over.
    pub(super) fn new(tcp: TcpStream, over: &CancellationToken) -> Self {
        let token = over.child_token();
        Self { tcp: Box::pin(tcp), over: Box::pin(token.clone().cancelled_owned()), token }
    }

    /// Fails once the run is over. The future is done with after that, so the token answers from then on.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.token.is_cancelled() || self.over.as_mut().poll(cx).is_ready() {
            return Err(io::Error::new(io::ErrorKind::ConnectionReset, "the VM ended"));
        }
        Ok(())
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // What the guest said before its end is still to be had.
        match self.tcp.as_mut().poll_read(cx, buffer) {
            Poll::Ready(read) => Poll::Ready(read),
            Poll::Pending => match self.check(cx) {
                Ok(()) => Poll::Pending,
                Err(over) => Poll::Ready(Err(over)),
            },
        }
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if let Err(over) = self.check(cx) {
            return Poll::Ready(Err(over));
        }
        self.tcp.as_mut().poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.as_mut().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tcp.as_mut().poll_shutdown(cx)
    }
}
