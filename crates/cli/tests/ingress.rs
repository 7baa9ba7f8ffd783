//! Programs in real VMs, reached from outside through the ingress of the whole program.

#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking and ends with its runtime"
)]

#[path = "vms/harness.rs"]
mod harness;
#[path = "vms/outside.rs"]
mod outside;
#[path = "vms/server.rs"]
mod server;

use std::{fs, sync::Arc, time::Duration};

use futures_util::{SinkExt, StreamExt};
use outside::Outside;
use rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use serde_json::json;
use server::Site;
use tiffin_types::id::VmId;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_tungstenite::{client_async, tungstenite::Message};

const PATIENCE: Duration = Duration::from_secs(90);
const PORT: u16 = 8080;
const GRPC_PORT: u16 = 8081;
const LARGE: usize = 100 << 20;

/// What runs in the VM: says back what comes, tells events, takes WebSockets; and HTTP/2 without TLS with trailers.
const PROGRAM: &str = r#"
const http = require('http'), http2 = require('http2'), crypto = require('crypto');
const web = http.createServer((q, a) => {
  if (q.url === '/events') {
    a.writeHead(200, { 'content-type': 'text/event-stream' });
    let n = 0;
    const t = setInterval(() => { a.write(`data: ${++n}\n\n`); if (n === 3) { clearInterval(t); a.end(); } }, 50);
  } else if (q.url === '/seen') a.end(JSON.stringify(q.headers));
  else q.pipe(a);
});
web.on('upgrade', (q, s) => {
  const key = q.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11';
  const accept = crypto.createHash('sha1').update(key).digest('base64');
  s.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`);
  s.on('data', d => {
    const n = d[1] & 127, mask = d.subarray(2, 6);
    const text = Buffer.from(d.subarray(6, 6 + n)).map((b, i) => b ^ mask[i % 4]);
    if ((d[0] & 15) === 1) s.write(Buffer.concat([Buffer.from([0x81, n]), text])); else s.end();
  });
  s.on('error', () => {});
});
web.listen(8080);
const grpc = http2.createServer();
grpc.on('stream', (s, h) => {
  s.respond({ ':status': 200, 'content-type': 'application/grpc' }, { waitForTrailers: true });
  s.on('wantTrailers', () => s.sendTrailers({ 'grpc-status': '0', 'x-seen': h[':path'] }));
  s.pipe(s);
});
grpc.listen(8081);
"#;

async fn start_program(site: &Site) -> VmId {
    let vm = json!({ "cpu": 1, "memMb": 512, "allowIps": [] });
    let id = site.ask("POST", "/v1/vms", Some(vm)).await.id();
    site.sh(&id, &format!("cat >server.js <<'END'\n{PROGRAM}\nEND")).await;
    id
}

async fn run_program(site: &Site, id: &VmId) {
    site.sh(id, "nohup node server.js >/dev/null 2>&1 </dev/null &").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_listens_in_a_vm_is_reached_by_its_url_and_what_does_not_is_told_apart() {
    let mut site = Site::start(&["ingress.listen=127.0.0.1:0"]).await;
    let id = start_program(&site).await;
    let (path, agent) = (format!("/v1/vms/{id}"), tiffin_protocol::AGENT_PORT);
    assert_eq!(site.ask("PUT", &format!("{path}/ports/{agent}"), None).await.status, 400);
    {
        let web = Outside::expose(&site, &id, PORT).await;
        let (status, answer) = web.curl("", &[]).await;
        assert_eq!(status, 502, "{answer}");
        assert!(answer.contains("x-tiffin-error: not_listening"), "{answer}");
        run_program(&site, &id).await;
        web.until_listening("seen").await;

        let (status, answer) = web.curl("seen", &["-H", "X-Forwarded-For: 1.2.3.4", "--http1.1"]).await;
        assert_eq!(status, 200, "{answer}");
        assert!(answer.contains(r#""x-forwarded-for":"127.0.0.1""#) && answer.contains(&web.hostname), "{answer}");
        let (_, answer) = web.curl("seen", &["--http2"]).await;
        assert!(answer.starts_with("HTTP/2 200"), "{answer}");
        let (_, answer) = web.curl("events", &["-N"]).await;
        assert!(answer.ends_with("data: 1\n\ndata: 2\n\ndata: 3\n\n"), "{answer}");
        large_both_ways(&web).await;
        websocket(&web).await;

        let grpc = Outside::expose(&site, &id, GRPC_PORT).await;
        let call = ["--http2", "-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary", "hello"];
        let (status, answer) = grpc.curl("pkg.Service/Call", &call).await;
        assert_eq!(status, 200, "{answer}");
        assert!(answer.contains("hello") && answer.contains("grpc-status: 0"), "{answer}");
    }
    site.kill().await;
    site.serve(None).await;
    let web = Outside::expose(&site, &id, PORT).await;
    assert_eq!(web.curl("seen", &[]).await.0, 200, "the VM and its name outlive the server");

    for (verb, status) in [("pause", 503), ("resume", 200), ("stop", 503), ("start", 502)] {
        assert_eq!(site.ask("POST", &format!("{path}/{verb}"), None).await.status, 204, "{verb}");
        let (got, answer) = web.curl("seen", &[]).await;
        assert_eq!(got, status, "after {verb}: {answer}");
    }
    run_program(&site, &id).await;
    web.until_listening("seen").await;
    site.delete(&id).await;
    assert_eq!(web.curl("seen", &[]).await.0, 404);
    site.is_tidy().await;
}

async fn large_both_ways(web: &Outside<'_>) {
    let (sent, came) = (web.folder.path().join("sent"), web.folder.path().join("body"));
    for (version, size) in [("--http1.1", LARGE / 10), ("--http2", LARGE)] {
        let bytes: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
        fs::write(&sent, &bytes).unwrap();
        let upload = format!("@{}", sent.display());
        let more = [version, "--no-include", "-H", "Expect:", "--data-binary", &upload];
        assert_eq!(web.curl("back", &more).await.0, 200);
        assert!(fs::read(&came).unwrap() == bytes, "{version}");
    }
}

async fn websocket(web: &Outside<'_>) {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(web.authority.as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let config = config.with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(web.address).await.unwrap();
    let name = ServerName::try_from(web.hostname.clone()).unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    let talk = async {
        let (mut socket, _) = client_async(web.url.replace("https", "wss"), stream).await.unwrap();
        for word in ["one", "two"] {
            socket.send(Message::text(word)).await.unwrap();
            assert_eq!(socket.next().await.unwrap().unwrap(), Message::text(word));
        }
    };
    tokio::time::timeout(PATIENCE, talk).await.unwrap();
}
