//! Ports of VMs that are reached from outside, through the ingress.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use reqwest::Method;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::{Value, json};
use tiffin_types::vm::{EndReason, EndReport};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsConnector;
use tokio_util::task::TaskTracker;

use crate::harness::{Reply, Server, id_of, send, until};

const ON: [(&str, &str); 1] = [("ingress.listen", "127.0.0.1:0")];

/// A program at a port of this machine, which is every guest's with the fake engine.
async fn program(tasks: &TaskTracker) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello").await;
        }
    });
    Ok(port)
}

async fn ask(server: &Server, method: Method, path: &str) -> Result<Reply> {
    send(server.request(method, path)).await
}

async fn expose(server: &Server, vm: &str, port: u16) -> Result<Value> {
    Ok(ask(server, Method::PUT, &format!("{vm}/ports/{port}")).await?.ok(200))
}

/// What a client that trusts the server's authority gets from a host name.
async fn fetch(server: &Server, hostname: &str) -> Result<String> {
    let ingress = ask(server, Method::GET, "/v1/ingress").await?.ok(200);
    let port = u16::try_from(ingress["port"].as_u64().context("a port")?)?;
    let mut roots = RootCertStore::empty();
    let authority = ingress["caCertificate"].as_str().context("an authority")?;
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes())?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions()?.with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).await?;
    let name = ServerName::try_from(hostname.to_owned())?;
    let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let request = format!("GET / HTTP/1.1\r\nHost: {hostname}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn an_exposed_port_is_reached_for_as_long_as_its_vm_runs() -> Result<()> {
    let mut server = Server::start_with(&ON).await?;
    let tasks = TaskTracker::new();
    let port = program(&tasks).await?;
    let vm = server.vm().await?;
    let exposed = expose(&server, &vm, port).await?;
    let hostname = exposed["hostname"].as_str().context("a host name")?.to_owned();
    ensure!(hostname.ends_with(".vm.localhost") && hostname.len() == 26 + 13, "{hostname}");
    ensure!(exposed["url"].as_str().is_some_and(|url| url.starts_with(&format!("https://{hostname}:"))), "{exposed}");
    assert_eq!(expose(&server, &vm, port).await?, exposed, "it keeps its name");
    let answer = fetch(&server, &hostname).await?;
    ensure!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("hello"), "{answer}");

    ask(&server, Method::POST, &format!("{vm}/stop")).await?.ok(204);
    let answer = fetch(&server, &hostname).await?;
    ensure!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("STOPPED"), "{answer}");
    server.restart().await?;
    let answer = fetch(&server, &hostname).await?;
    ensure!(answer.starts_with("HTTP/1.1 503 "), "the name outlives a restart: {answer}");
    ask(&server, Method::POST, &format!("{vm}/start")).await?.ok(204);
    ensure!(fetch(&server, &hostname).await?.ends_with("hello"));

    let report = EndReport { reason: EndReason::Oom, message: "too much".into(), exit_code: None };
    server.fake.kill(&id_of(&vm), report);
    until("the end is noticed", async || Ok(fetch(&server, &hostname).await?.contains("503"))).await?;
    ask(&server, Method::DELETE, &vm).await?.ok(204);
    let answer = fetch(&server, &hostname).await?;
    ensure!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("unknown_host"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn what_is_no_longer_exposed_leads_nowhere_and_what_does_not_listen_is_said() -> Result<()> {
    let server = Server::start_with(&ON).await?;
    let vm = server.vm().await?;
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?.port();
    let exposed = expose(&server, &vm, free).await?;
    let hostname = exposed["hostname"].as_str().context("a host name")?;
    let answer = fetch(&server, hostname).await?;
    ensure!(answer.starts_with("HTTP/1.1 502 ") && answer.contains("not_listening"), "{answer}");
    let list = ask(&server, Method::GET, &format!("{vm}/ports")).await?.ok(200);
    assert_eq!(list, json!([exposed]));
    let path = format!("{vm}/ports/{free}");
    ask(&server, Method::DELETE, &path).await?.ok(204);
    ask(&server, Method::DELETE, &path).await?.refused(404, "not_found");
    ensure!(fetch(&server, hostname).await?.starts_with("HTTP/1.1 404 "));
    assert_eq!(ask(&server, Method::GET, &format!("{vm}/ports")).await?.ok(200), json!([]));
    Ok(())
}

#[tokio::test]
async fn ports_that_may_not_be_exposed_are_refused_with_the_reason() -> Result<()> {
    let server = Server::start_with(&ON).await?;
    let vm = server.vm().await?;
    let put = async |port: &str| ask(&server, Method::PUT, &format!("{vm}/ports/{port}")).await;
    for port in ["0", "65536", "-1", "http", "80.0"] {
        let said = put(port).await?.refused(400, "invalid_parameter");
        ensure!(said.contains("1 to 65535"), "{said}");
    }
    let agent = tiffin_protocol::AGENT_PORT.to_string();
    let said = put(&agent).await?.refused(400, "invalid_parameter");
    ensure!(said.contains("agent"), "{said}");
    for port in 2..=17 {
        put(&port.to_string()).await?.ok(200);
    }
    let said = put("18").await?.refused(409, "too_many_ports");
    ensure!(said.contains("16"), "{said}");
    put("17").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn another_accounts_ports_and_a_server_without_ingress_are_refused() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    let path = format!("{vm}/ports/8080");
    let said = ask(&server, Method::PUT, &path).await?.refused(409, "ingress_off");
    ensure!(said.contains("ingress.listen"), "{said}");
    let facts = ask(&server, Method::GET, "/v1/ingress").await?.ok(200);
    assert_eq!(facts, json!({ "domain": "vm.localhost" }));
    let stranger = server.other_key("other", &["read", "write"]).await?;
    for method in [Method::PUT, Method::DELETE] {
        let request = server.client.request(method, format!("{}{path}", server.url)).header("X-API-Key", &stranger);
        send(request).await?.refused(404, "not_found");
    }
    Ok(())
}
