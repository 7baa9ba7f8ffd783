//! Bodies on their way through. Nothing is kept: a piece is read from one side when the other takes it.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep};

use crate::{activity::UnderWay, upstream::Lease};

/// What became of a request's body, and when something of it last moved.
#[derive(Debug)]
pub(crate) struct Fate {
    state: AtomicU8,
    began: Instant,
    moved_ms: AtomicU64,
}

const GOING: u8 = 0;
const ENDED: u8 = 1;
const STALLED: u8 = 2;
const BROKEN: u8 = 3;
const WAITING: u8 = 4;

impl Fate {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: AtomicU8::new(GOING), began: Instant::now(), moved_ms: AtomicU64::new(0) })
    }

    /// When something of the body last moved; before that, when the request came.
    pub(crate) fn moved(&self) -> Instant {
        self.began + Duration::from_millis(self.moved_ms.load(Ordering::Relaxed))
    }

    fn moves(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_ms.store(now, Ordering::Relaxed);
    }

    /// All of it was passed on.
    pub(crate) fn is_over(&self) -> bool {
        self.state.load(Ordering::Acquire) == ENDED
    }

    /// The client sent nothing for too long.
    pub(crate) fn has_stalled(&self) -> bool {
        self.state.load(Ordering::Acquire) == STALLED
    }

    /// The client is to send more of it.
    pub(crate) fn is_waiting(&self) -> bool {
        self.state.load(Ordering::Acquire) == WAITING
    }

    /// The client broke off.
    pub(crate) fn is_broken(&self) -> bool {
        self.state.load(Ordering::Acquire) == BROKEN
    }

    fn set(&self, fate: u8) {
        self.state.store(fate, Ordering::Release);
    }
}

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyError {
    #[error("nothing came for too long")]
    Silent,
    #[error("broken off")]
    Broken(#[from] hyper::Error),
}

/// A limit on silence, timed only while something is waited for.
#[derive(Debug)]
struct Silence {
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
    is_waiting: bool,
}

impl Silence {
    fn new(limit: Duration) -> Self {
        Self { limit, waiting: None, is_waiting: false }
    }

    /// Something came.
    fn broken(&mut self) {
        self.is_waiting = false;
    }

    /// Nothing came; ready when it has been so for too long.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(limit)));
        if !self.is_waiting {
            waiting.as_mut().reset(Instant::now() + limit);
            self.is_waiting = true;
        }
        waiting.as_mut().poll(cx)
    }
}

/// A request's body, on its way to a program.
#[derive(Debug)]
pub(crate) struct RequestBody(Option<Coming>);

#[derive(Debug)]
struct Coming {
    body: Incoming,
    silence: Silence,
    fate: Arc<Fate>,
    request: Arc<UnderWay>,
}

impl RequestBody {
    /// No body.
    pub(crate) fn empty(fate: &Fate) -> Self {
        fate.set(ENDED);
        Self(None)
    }

    /// A second copy, which only the absence of a body has.
    pub(crate) fn copy(&self) -> Option<Self> {
        self.0.is_none().then_some(Self(None))
    }

    /// A body of which nothing may come for `limit`.
    pub(crate) fn new(body: Incoming, limit: Duration, fate: Arc<Fate>, request: Arc<UnderWay>) -> Self {
        if body.is_end_stream() {
            return Self::empty(&fate);
        }
        Self(Some(Coming { body, silence: Silence::new(limit), fate, request }))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(coming) = &mut self.0 else { return Poll::Ready(None) };
        match Pin::new(&mut coming.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                coming.silence.broken();
                coming.request.touch();
                coming.fate.moves();
                match &frame {
                    Some(Ok(_)) if coming.body.is_end_stream() => coming.fate.set(ENDED),
                    Some(Ok(_)) => coming.fate.set(GOING),
                    Some(Err(_)) => coming.fate.set(BROKEN),
                    None => coming.fate.set(ENDED),
                }
                Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
            }
            Poll::Pending => {
                let silent = coming.silence.poll(cx);
                coming.fate.set(if silent.is_ready() { STALLED } else { WAITING });
                silent.map(|()| Some(Err(BodyError::Silent)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(|coming| coming.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.0.as_ref().map_or_else(|| SizeHint::with_exact(0), |coming| coming.body.size_hint())
    }
}

/// An answer's body, on its way to a client.
pub(crate) enum ResponseBody {
    /// The ingress's own.
    Full(Option<Bytes>),
    /// A program's.
    Passed(Box<Passed>),
}

/// What a program answers, and what is held until it is all told.
pub(crate) struct Passed {
    body: Incoming,
    silence: Silence,
    /// The connection that it comes on, which is kept for the next request when this one is over.
    lease: Option<Lease>,
    fate: Arc<Fate>,
    request: Arc<UnderWay>,
}

impl ResponseBody {
    pub(crate) fn full(bytes: Bytes) -> Self {
        Self::Full(Some(bytes))
    }

    /// No body.
    pub(crate) fn nothing() -> Self {
        Self::Full(None)
    }

    /// An answer that may be silent for `limit`.
    pub(crate) fn passed(
        body: Incoming,
        limit: Duration,
        lease: Lease,
        fate: Arc<Fate>,
        request: Arc<UnderWay>,
    ) -> Self {
        let mut passed = Passed { body, silence: Silence::new(limit), lease: Some(lease), fate, request };
        if passed.body.is_end_stream() {
            passed.finish();
        }
        Self::Passed(Box::new(passed))
    }
}

impl Passed {
    /// The answer is over: its connection is free, if the request is over too.
    fn finish(&mut self) {
        if let Some(lease) = self.lease.take()
            && self.fate.is_over()
        {
            lease.give_back();
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let passed = match &mut *self {
            Self::Full(bytes) => return Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Passed(passed) => passed,
        };
        match Pin::new(&mut passed.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                passed.silence.broken();
                passed.request.touch();
                match &frame {
                    Some(Ok(_)) if passed.body.is_end_stream() => passed.finish(),
                    Some(Ok(_)) => {}
                    Some(Err(_)) => passed.lease = None,
                    None => passed.finish(),
                }
                Poll::Ready(frame.map(|frame| frame.map_err(BodyError::from)))
            }
            Poll::Pending => passed.silence.poll(cx).map(|()| Some(Err(BodyError::Silent))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_none(),
            Self::Passed(passed) => passed.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Self::Passed(passed) => passed.body.size_hint(),
        }
    }
}
