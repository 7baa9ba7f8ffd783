//! What stands between the server and a registry: passes on, notes what was asked, and hangs up where the test wants it.

use std::sync::{Arc, Mutex};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// A request that came by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
}

/// How many bytes of an answer, its head among them, are passed on to that request, the so-manieth; all of them without.
type Cut = dyn Fn(&Asked, usize) -> Option<u64> + Send + Sync;

/// It ends with this.
pub(crate) struct Middle {
    pub(crate) host: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    server: JoinHandle<()>,
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Middle {
    /// Before the registry at `to`.
    pub(crate) async fn before(
        to: &str,
        cut: impl Fn(&Asked, usize) -> Option<u64> + Send + Sync + 'static,
    ) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let host = listener.local_addr()?.to_string();
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (to, noted, cut): (_, _, Arc<Cut>) = (to.to_owned(), Arc::clone(&asked), Arc::new(cut));
        #[allow(clippy::disallowed_methods, reason = "it ends with the test")]
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(pass(client, to.clone(), Arc::clone(&noted), Arc::clone(&cut)));
            }
        });
        Ok(Self { host, asked, server })
    }

    /// What was asked with that method for paths with that end.
    pub(crate) fn asked(&self, method: &str, end: &str) -> Vec<Asked> {
        let asked = self.asked.lock().expect("nobody panics with it");
        asked.iter().filter(|one| one.method == method && one.path.ends_with(end)).cloned().collect()
    }

    pub(crate) fn image(&self, rest: &str) -> String {
        format!("{}/{rest}", self.host)
    }
}

/// One request, as the server makes them, and its answer.
async fn pass(mut client: TcpStream, to: String, noted: Arc<Mutex<Vec<Asked>>>, cut: Arc<Cut>) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(client.read_u8().await?);
    }
    let text = String::from_utf8_lossy(&head);
    let mut words = text.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let range = text.lines().find_map(|line| line.strip_prefix("range: ").map(str::to_owned));
    let asked = Asked { method, path, range };
    let nth = {
        let mut noted = noted.lock().expect("nobody panics with it");
        noted.push(asked.clone());
        noted.iter().filter(|one| (&one.method, &one.path) == (&asked.method, &asked.path)).count()
    };
    let mut registry = TcpStream::connect(to).await?;
    registry.write_all(&head).await?;
    match cut(&asked, nth) {
        Some(bytes) => drop(tokio::io::copy(&mut registry.take(bytes), &mut client).await?),
        None => drop(tokio::io::copy_bidirectional(&mut client, &mut registry).await?),
    }
    Ok(())
}
