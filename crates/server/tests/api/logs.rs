//! What is logged, and what never is.

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
};

use anyhow::Result;
use reqwest::Method;
use serde_json::json;
use tiffin_engine::fake::Call;
use tracing_subscriber::fmt::MakeWriter;

use crate::harness::{Server, send, small_vm};

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panics with it")).into_owned()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;
    fn make_writer(&'a self) -> Lines {
        self.clone()
    }
}

#[tokio::test]
async fn requests_are_logged_with_their_id_and_without_commands_environments_and_keys() -> Result<()> {
    let lines = Lines::default();
    let subscriber =
        tracing_subscriber::fmt().with_writer(lines.clone()).with_max_level(tracing::Level::TRACE).finish();
    // This test's runtime has one thread, so its whole server logs here.
    let _guard = tracing::subscriber::set_default(subscriber);

    let server = Server::start_cold().await?;
    let vm = server.vm().await?;
    for (cmd, cwd) in [("echo forbidden-command", "/tmp"), ("forbidden-failing", "/missing/forbidden-dir")] {
        let body = json!({ "cmd": cmd, "cwd": cwd, "env": { "FORBIDDEN_NAME": "forbidden-value" } });
        let request = server.request(Method::POST, &format!("{vm}/exec")).header("x-request-id", "my-exec");
        send(request.json(&body)).await?;
    }
    server.fake.fail_next(Call::Start);
    let failed = server.request(Method::POST, "/v1/vms").header("x-request-id", "my-failure").json(&small_vm());
    send(failed).await?.refused(500, "internal");

    let ours: String = lines.text().lines().filter(|line| line.contains("tiffin")).collect::<Vec<_>>().join("\n");
    assert!(!ours.to_lowercase().contains("forbidden"), "{ours}");
    assert!(!ours.contains(server.key.rsplit_once('_').expect("a key").1));
    assert!(ours.contains("my-exec") && ours.contains("200"), "{ours}");
    let cause = ours.lines().find(|line| line.contains("my-failure") && line.contains("ERROR")).expect("the cause");
    assert!(cause.contains("a scripted failure of Start"), "{cause}");
    Ok(())
}
