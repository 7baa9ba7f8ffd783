//! `GET /v1/vms/{id}/terminal`

use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tiffin_types::vm::{EndReason, EndReport};
use tokio::net::TcpStream;
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest, http::HeaderValue},
};

use crate::harness::{Server, id_of, until};

const PATIENCE: Duration = Duration::from_secs(20);

/// A client of a terminal.
struct Client(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Client {
    async fn open(server: &Server, vm: &str, query: &str) -> Result<Self> {
        let url = format!("{}{vm}/terminal{query}", server.url.replace("http://", "ws://"));
        let mut request = url.into_client_request()?;
        request.headers_mut().insert("x-api-key", HeaderValue::from_str(&server.key)?);
        Ok(Self(connect_async(request).await?.0))
    }

    async fn types(&mut self, text: &str) -> Result<()> {
        Ok(self.0.send(Message::binary(text.as_bytes().to_vec())).await?)
    }

    async fn says(&mut self, message: &Value) -> Result<()> {
        Ok(self.0.send(Message::text(message.to_string())).await?)
    }

    async fn next(&mut self) -> Result<Message> {
        Ok(tokio::time::timeout(PATIENCE, self.0.next()).await?.context("it is over")??)
    }

    /// Waits until the terminal has shown that text.
    async fn shows(&mut self, text: &str) -> Result<()> {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            match self.next().await? {
                Message::Binary(bytes) => seen.extend(bytes),
                Message::Ping(_) => {}
                other => bail!("{other:?} instead of {text}"),
            }
        }
        Ok(())
    }

    /// What the server says last, and the code and reason with which it closes.
    async fn end(&mut self) -> Result<(Value, u16, String)> {
        let mut said = Value::Null;
        loop {
            match self.next().await? {
                Message::Text(text) => said = serde_json::from_str(&text)?,
                Message::Close(Some(frame)) => return Ok((said, frame.code.into(), frame.reason.to_string())),
                Message::Binary(_) | Message::Ping(_) => {}
                other => bail!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_terminal_echoes_is_resized_and_tells_its_exit_code() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let mut client = Client::open(&server, &vm, "?cols=100&rows=30").await?;
    client.types("size\r").await?;
    client.shows("30 100\r\n").await?;
    client.says(&json!({ "resize": { "cols": 132, "rows": 50 } })).await?;
    client.types("size\r").await?;
    client.shows("50 132\r\n").await?;
    client.types("exit 7\r").await?;
    assert_eq!(client.end().await?, (json!({ "exit": { "exitCode": 7 } }), 1000, String::new()));
    until("it is over in the guest", async || Ok(server.fake.commands() == 0)).await
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_program() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let client = Client::open(&server, &vm, "").await?;
    until("it runs", async || Ok(server.fake.commands() == 1)).await?;
    drop(client);
    until("it is over", async || Ok(server.fake.commands() == 0)).await?;
    let mut client = Client::open(&server, &vm, "").await?;
    client.0.close(None).await?;
    until("it is over", async || Ok(server.fake.commands() == 0)).await
}

#[tokio::test]
async fn what_is_wrong_before_the_upgrade_is_an_ordinary_error() -> Result<()> {
    let server = Server::start_with(&[("exec.max_concurrent", "1")]).await?;
    let vm = server.vm().await?;
    let path = format!("{vm}/terminal");
    assert!(server.get(&path).await?.refused(426, "upgrade_required").contains("WebSocket"));
    let refused = async |query: &str| match Client::open(&server, &vm, query).await {
        Ok(_) => panic!("{query} was taken"),
        Err(error) => error.to_string(),
    };
    for bad in ["?cols=0", "?rows=1001", "?cols=x", "?cols=-1", "?size=1", "?cmd=", "?cmd=%20", "?cols=1&cols=2"] {
        assert!(refused(bad).await.contains("400"), "{bad}");
        server.get(&format!("{path}{bad}")).await?.refused(400, "invalid_parameter");
    }
    let stranger = server.other_key("other", &["write"]).await?;
    let as_stranger = server.client.get(format!("{}{path}", server.url)).header("X-API-Key", &stranger);
    let as_stranger = as_stranger.header("connection", "upgrade").header("upgrade", "websocket");
    let as_stranger =
        as_stranger.header("sec-websocket-version", "13").header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==");
    crate::harness::send(as_stranger).await?.refused(404, "not_found");

    let _one = Client::open(&server, &vm, "").await?;
    assert!(refused("").await.contains("429"), "the places of a VM are counted");
    server.act(&format!("{vm}/stop")).await?.ok(204);
    assert!(refused("").await.contains("409"));
    Ok(())
}

#[tokio::test]
async fn a_terminal_keeps_its_place_among_the_connections() -> Result<()> {
    let mut server = Server::start_with(&[("http.max_connections", "1")]).await?;
    server.client = reqwest::Client::builder().pool_max_idle_per_host(0).build()?;
    let vm = server.vm().await?;
    let client = Client::open(&server, &vm, "").await?;
    {
        let mut other = std::pin::pin!(server.get("/v1/vms"));
        // Nothing can be waited for here: whatever comes in this time is wrong.
        let early = tokio::time::timeout(Duration::from_millis(500), other.as_mut()).await;
        assert!(early.is_err(), "there was one place, and the terminal has it");
        drop(client);
        other.await?.ok(200);
    }
    Ok(())
}

#[tokio::test]
async fn a_key_that_is_revoked_ends_its_terminals() -> Result<()> {
    let server = Server::start_with(&[("terminal.ping_ms", "100")]).await?;
    let vm = server.vm().await?;
    let own = server.get("/v1/admin/accounts").await?.ok(200)[0]["id"].clone();
    let body = json!({ "name": "short", "scopes": ["write"], "accountId": own });
    let key = server.post("/v1/admin/api-keys", &body).await?.ok(201);
    let url = format!("{}{vm}/terminal", server.url.replace("http://", "ws://"));
    let mut request = url.into_client_request()?;
    let text = key["key"].as_str().context("a key")?;
    request.headers_mut().insert("x-api-key", HeaderValue::from_str(text)?);
    let mut client = Client(connect_async(request).await?.0);
    client.types("x").await?;
    client.shows("x").await?;
    let id = key["id"].as_str().context("an id")?;
    server.delete(&format!("/v1/admin/api-keys/{id}")).await?.ok(204);
    let (_, code, reason) = client.end().await?;
    assert_eq!(code, 1008);
    assert!(reason.starts_with("unauthorized"), "{reason}");
    until("it is over in the guest", async || Ok(server.fake.commands() == 0)).await
}

#[tokio::test]
async fn a_vm_that_ends_closes_its_terminals_with_the_reason() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let mut client = Client::open(&server, &vm, "").await?;
    client.types("x").await?;
    client.shows("x").await?;
    let report = EndReport { reason: EndReason::Oom, message: "It ran out of memory.".into(), exit_code: None };
    server.fake.kill(&id_of(&vm), report);
    let (said, code, reason) = client.end().await?;
    assert_eq!((said, code), (Value::Null, 4000));
    assert!(reason.starts_with("vm_ended: ") && reason.contains("ERROR"), "{reason}");
    Ok(())
}

#[tokio::test]
async fn an_agent_that_hangs_up_closes_it_as_a_failure() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let mut client = Client::open(&server, &vm, "").await?;
    client.types("hang\r").await?;
    let (_, code, reason) = client.end().await?;
    assert_eq!((code, reason.as_str()), (1011, "agent_failed: the VM's agent failed"));
    Ok(())
}

#[tokio::test]
async fn messages_that_are_no_messages_close_it() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    for bad in [json!({}), json!("resize"), json!({ "resize": { "cols": 0, "rows": 1 } })] {
        let mut client = Client::open(&server, &vm, "").await?;
        client.says(&bad).await?;
        let (_, code, reason) = client.end().await?;
        assert_eq!(code, 1008);
        assert!(reason.contains("resize"), "{reason}");
    }
    let mut client = Client::open(&server, &vm, "").await?;
    // The server may stop reading before all of it is sent.
    let _ = client.0.send(Message::binary(vec![b'x'; 300_000])).await;
    let (_, code, reason) = client.end().await?;
    assert_eq!(code, 1009);
    assert!(reason.contains("262144"), "{reason}");
    until("all are over", async || Ok(server.fake.commands() == 0)).await
}

#[tokio::test]
async fn a_session_over_its_limit_ends_as_timed_out() -> Result<()> {
    let server = Server::start_with(&[("terminal.max_session_ms", "1000")]).await?;
    let vm = server.vm().await?;
    let mut client = Client::open(&server, &vm, "").await?;
    let (said, code, _) = client.end().await?;
    assert_eq!((said, code), (json!({ "exit": { "exitCode": -1, "timedOut": true } }), 1000));
    Ok(())
}

#[tokio::test]
async fn a_program_that_prints_for_ever_waits_for_its_reader() -> Result<()> {
    let server = Server::start_with(&[("http.write_timeout_ms", "1500")]).await?;
    let vm = server.vm().await?;
    let mut client = Client::open(&server, &vm, "").await?;
    client.types("flood\r").await?;
    let mut seen = 0;
    while seen < 10 << 20 {
        if let Message::Binary(bytes) = client.next().await? {
            seen += bytes.len();
        }
    }
    // The client holds the connection and reads nothing more: it is cut off, and the program with it.
    until("it is over", async || Ok(server.fake.commands() == 0)).await
}

#[tokio::test]
async fn a_client_that_answers_no_ping_is_cut_off_and_one_that_does_is_not() -> Result<()> {
    let server = Server::start_with(&[("terminal.ping_ms", "200")]).await?;
    let vm = server.vm().await?;
    let _silent = Client::open(&server, &vm, "").await?;
    let mut client = Client::open(&server, &vm, "").await?;
    // Reading answers pings.
    let mut pings = 0;
    while pings < 10 {
        assert!(matches!(client.next().await?, Message::Ping(_)));
        pings += 1;
    }
    until("the silent one is over", async || {
        client.types("x").await?;
        client.shows("x").await?;
        Ok(server.fake.commands() == 1)
    })
    .await
}

#[tokio::test]
async fn a_shutdown_of_the_server_ends_terminals_at_once_and_says_so() -> Result<()> {
    let server = Server::start_with(&[("http.shutdown_grace_ms", "20000")]).await?;
    let vm = server.vm().await?;
    let mut client = Client::open(&server, &vm, "").await?;
    client.types("x").await?;
    client.shows("x").await?;
    let (end, ()) = tokio::join!(client.end(), server.stop());
    let (_, code, reason) = end?;
    assert_eq!(code, 1001);
    assert!(reason.contains("shuts down"), "{reason}");
    assert_eq!(server.fake.present().len(), 1);
    Ok(())
}
