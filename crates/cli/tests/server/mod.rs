//! A small HTTP server with scripted answers, and a record of what it was asked.

#![allow(clippy::unwrap_used, dead_code, reason = "test code, of which each test file uses a part")]

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes, to_bytes},
    extract::Request,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use futures_util::{StreamExt, stream};
use serde_json::Value;
use tokio::sync::oneshot;

/// What the server answers on one path.
pub(crate) struct Answer {
    status: u16,
    content_type: &'static str,
    body: String,
    header: Option<(&'static str, &'static str)>,
    rest: Mutex<Option<(oneshot::Receiver<()>, String)>>,
}

impl Answer {
    pub(crate) fn json(status: u16, body: Value) -> Self {
        Self { status, content_type: "application/json", body: body.to_string(), header: None, rest: Mutex::new(None) }
    }

    pub(crate) fn empty(status: u16) -> Self {
        Self { status, content_type: "text/plain", body: String::new(), header: None, rest: Mutex::new(None) }
    }

    pub(crate) fn events(body: &str) -> Self {
        Self {
            status: 200,
            content_type: "text/event-stream",
            body: body.to_owned(),
            header: None,
            rest: Mutex::new(None),
        }
    }

    pub(crate) fn with_header(self, name: &'static str, value: &'static str) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    /// Events of which the second part is sent only when released.
    pub(crate) fn held_events(first: &str, second: &str) -> (Self, oneshot::Sender<()>) {
        let (release, held) = oneshot::channel();
        (Self { rest: Mutex::new(Some((held, second.to_owned()))), ..Self::events(first) }, release)
    }

    fn body(&self) -> Body {
        let first = Bytes::from(self.body.clone());
        match self.rest.lock().unwrap().take() {
            None => Body::from(first),
            Some((held, second)) => {
                let rest = stream::once(async move {
                    held.await.unwrap();
                    Bytes::from(second)
                });
                Body::from_stream(stream::iter([first]).chain(rest).map(Ok::<_, Infallible>))
            }
        }
    }
}

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    headers: HeaderMap,
    pub(crate) query: String,
    pub(crate) body: Value,
    /// Bytes of the body.
    pub(crate) length: usize,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

type Script = Arc<Mutex<HashMap<&'static str, VecDeque<Answer>>>>;

/// The server; gone when dropped.
pub(crate) struct Server {
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    _runtime: tokio::runtime::Runtime,
}

impl Server {
    /// Serves `answers` by `METHOD /path`, those of one path in their order, the last for ever; whatever else is asked is a
    /// 500.
    pub(crate) fn start(answers: Vec<(&'static str, Answer)>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let mut script: HashMap<_, VecDeque<_>> = HashMap::new();
        answers.into_iter().for_each(|(path, answer)| script.entry(path).or_default().push_back(answer));
        let (script, record): (Script, _) = (Arc::new(Mutex::new(script)), Arc::clone(&asked));
        let app =
            Router::new().fallback(move |request: Request| answer(Arc::clone(&script), Arc::clone(&record), request));
        runtime.spawn(async move { axum::serve(listener, app).await });
        Self { url, asked, _runtime: runtime }
    }

    /// What was asked so far.
    pub(crate) fn requests(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

async fn answer(script: Script, record: Arc<Mutex<Vec<Asked>>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let asked = format!("{} {}", head.method, head.uri.path());
    let body = to_bytes(body, 1 << 20).await.unwrap();
    let length = body.len();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let query = head.uri.query().unwrap_or_default().to_owned();
    record.lock().unwrap().push(Asked { method: head.method.to_string(), headers: head.headers, query, body, length });
    let mut script = script.lock().unwrap();
    let mut answers = script.get_mut(asked.as_str());
    let used = answers.as_mut().filter(|answers| answers.len() > 1).and_then(|answers| answers.pop_front());
    let Some(answer) = used.as_ref().or(answers.as_ref().and_then(|answers| answers.front())) else {
        return Response::builder().status(StatusCode::INTERNAL_SERVER_ERROR).body(Body::from(asked)).unwrap();
    };
    let response = Response::builder().status(StatusCode::from_u16(answer.status).unwrap());
    let response = response.header("content-type", answer.content_type);
    let response = answer.header.iter().fold(response, |response, (name, value)| response.header(*name, *value));
    response.body(answer.body()).unwrap()
}
