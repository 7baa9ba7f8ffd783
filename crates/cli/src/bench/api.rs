//! The platform's side of the measurements: the calls that are timed, and a record of what was created.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use futures_util::{StreamExt, stream};
use reqwest::{
    Method, Response,
    header::{ACCEPT, HeaderMap, HeaderValue},
};
use serde_json::{Value, json};
use tiffin_types::id::VmId;

use crate::{
    client::{Call, Client, query, sse::Parser},
    failure::Failure,
    output::field,
};

const DELETES_AT_ONCE: usize = 8;
const POLL: Duration = Duration::from_millis(5);

/// The API, timed.
pub(super) struct Api {
    client: Client,
    created: RefCell<BTreeSet<VmId>>,
}

/// An exec's times.
pub(super) struct ExecTimes {
    /// From sending the request to having the answer.
    pub(super) total: Duration,
    /// Of that, the time in the guest, where the server tells it (`Server-Timing: guest;dur=...`).
    pub(super) guest: Option<Duration>,
    pub(super) stdout: String,
}

impl Api {
    pub(super) fn new(client: Client) -> Self {
        Self { client, created: RefCell::default() }
    }

    /// Creates a VM and returns when it runs. The error is the API's own, so that refusals can be told apart.
    pub(super) async fn create(&self, cpus: usize, mem_mb: u32) -> Result<VmId, Failure> {
        self.create_of(json!({"cpu": cpus, "memMb": mem_mb, "allowIps": [], "outboundInternet": false})).await
    }

    /// The same by an engine that is named.
    pub(super) async fn create_on(&self, engine: &str, cpus: usize, mem_mb: u32) -> Result<VmId, Failure> {
        self.create_of(json!({"cpu": cpus, "memMb": mem_mb, "allowIps": [], "engine": engine})).await
    }

    /// A field of a VM.
    pub(super) async fn about(&self, id: &VmId, name: &str) -> Result<String, Failure> {
        Ok(field(&self.client.get(&format!("/v1/vms/{id}")).await?, name))
    }

    /// Stops a VM, and starts it again: how long the start takes.
    pub(super) async fn restart(&self, id: &VmId) -> anyhow::Result<Duration> {
        let stop: Option<&Value> = None;
        self.client.post(&format!("/v1/vms/{id}/stop"), stop).await?;
        let start = Instant::now();
        self.client.post(&format!("/v1/vms/{id}/start"), stop).await?;
        Ok(start.elapsed())
    }

    /// Creates a VM that goes on where a snapshot was taken.
    pub(super) async fn restore(&self, cpus: usize, mem_mb: u32, snapshot: &str) -> Result<VmId, Failure> {
        self.create_of(json!({"cpu": cpus, "memMb": mem_mb, "allowIps": [], "snapshotId": snapshot})).await
    }

    async fn create_of(&self, body: Value) -> Result<VmId, Failure> {
        let vm = self.client.post("/v1/vms", Some(&body)).await?;
        let id: VmId = field(&vm, "id").parse().map_err(anyhow::Error::from)?;
        self.created.borrow_mut().insert(id.clone());
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut state = field(&vm, "state");
        while state != "RUNNING" {
            if !matches!(state.as_str(), "CREATED" | "STARTING") || Instant::now() > deadline {
                return Err(anyhow::anyhow!("the new VM {id} is {state}").into());
            }
            tokio::time::sleep(POLL).await;
            state = field(&self.client.get(&format!("/v1/vms/{id}")).await?, "state");
        }
        Ok(id)
    }

    /// Starts an image's program; its VM, as the first dialect names it.
    pub(super) async fn start_program(&self, body: &Value) -> anyhow::Result<VmId> {
        let vm = self.client.post("/v1/vm/start", Some(body)).await?;
        let id: VmId = format!("vm-{}", field(&vm, "id")).parse()?;
        self.created.borrow_mut().insert(id.clone());
        Ok(id)
    }

    /// The state of a program's VM, in the words of its dialect.
    pub(super) async fn program_state(&self, id: &VmId) -> anyhow::Result<String> {
        let name = id.as_str().trim_start_matches("vm-");
        Ok(field(&self.client.get(&format!("/v1/vm/{name}")).await?, "state"))
    }

    /// A page of what a VM's program printed.
    pub(super) async fn lines(&self, id: &VmId, query: &str) -> anyhow::Result<Vec<Value>> {
        let mut page = self.client.get(&format!("/v1/vms/{id}/logs/search?batch=50&{query}")).await?;
        serde_json::from_value(page["lines"].take()).context("a page of lines")
    }

    /// Counts a VM as deleted that went by itself.
    pub(super) fn forget(&self, id: &VmId) {
        self.created.borrow_mut().remove(id);
    }

    /// Runs a command and returns when its first output is here.
    pub(super) async fn first_output(&self, id: &VmId, command: &str) -> anyhow::Result<()> {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("text/event-stream"))]);
        let (path, body) = (format!("/v1/vms/{id}/exec"), json!({"cmd": command}));
        let call = Call { headers, body: Some(&body), ..Call::new(Method::POST, &path) };
        let mut answer = self.client.send(call).await?;
        let mut parser = Parser::default();
        while let Some(chunk) = self.client.chunk(&mut answer).await? {
            for event in parser.push(&chunk)? {
                match event.name.as_str() {
                    "stdout" => return Ok(()),
                    "exit" | "error" => bail!("no output, but {}: {}", event.name, event.data),
                    _ => {}
                }
            }
        }
        bail!("the stream ended without output")
    }

    /// Runs a command that must succeed.
    pub(super) async fn exec(&self, id: &VmId, command: &str) -> anyhow::Result<ExecTimes> {
        let (path, body) = (format!("/v1/vms/{id}/exec"), json!({"cmd": command}));
        let start = Instant::now();
        let answer = self.client.send(Call { body: Some(&body), ..Call::new(Method::POST, &path) }).await?;
        let guest = server_timing(&answer, "guest");
        let result = self.client.body(answer).await?;
        let total = start.elapsed();
        let result: Value = serde_json::from_slice(&result).context("the exec's answer")?;
        if result.get("exitCode") != Some(&Value::from(0)) {
            bail!("the command failed: {result}");
        }
        Ok(ExecTimes { total, guest, stdout: field(&result, "stdout") })
    }

    /// Runs a TypeScript program that must succeed.
    pub(super) async fn run_ts(&self, id: &VmId, code: &str) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let result = self.client.post(&format!("/v1/vms/{id}/run-ts"), Some(&json!({"code": code}))).await?;
        let time = start.elapsed();
        if result.get("exitCode") != Some(&Value::from(0)) {
            bail!("the program failed: {result}");
        }
        Ok(time)
    }

    /// Unpacks an archive into a folder of a VM.
    pub(super) async fn upload(&self, id: &VmId, folder: &str, archive: Vec<u8>) -> anyhow::Result<Duration> {
        let path = query(&format!("/v1/vms/{id}/files/upload"), &[("dest", folder)]);
        let start = Instant::now();
        self.client.pass(Call::new(Method::POST, &path), "application/gzip", archive.into()).await?;
        Ok(start.elapsed())
    }

    /// Packs a folder of a VM.
    pub(super) async fn download(&self, id: &VmId, folder: &str) -> anyhow::Result<(Duration, Vec<u8>)> {
        let path = query(&format!("/v1/vms/{id}/files/download"), &[("path", folder)]);
        let start = Instant::now();
        let answer = self.client.send(Call::new(Method::GET, &path)).await?;
        let archive = self.client.body(answer).await?;
        Ok((start.elapsed(), archive))
    }

    /// Saves a running VM: the snapshot's id, and how long the VM stood still where the server tells it
    /// (`Server-Timing: pause;dur=...`).
    pub(super) async fn snapshot(&self, id: &VmId) -> anyhow::Result<(String, Option<Duration>)> {
        let answer = self.client.send(Call::new(Method::POST, &format!("/v1/vms/{id}/snapshots"))).await?;
        let pause = server_timing(&answer, "pause");
        let snapshot: Value = serde_json::from_slice(&self.client.body(answer).await?).context("the answer")?;
        Ok((field(&snapshot, "id"), pause))
    }

    pub(super) async fn snapshot_delete(&self, snapshot: &str) -> anyhow::Result<()> {
        self.client.delete(&format!("/v1/snapshots/{snapshot}")).await.with_context(|| format!("deleting {snapshot}"))
    }

    pub(super) async fn delete(&self, id: &VmId) -> anyhow::Result<()> {
        self.client.delete(&format!("/v1/vms/{id}")).await.with_context(|| format!("deleting {id}"))?;
        self.created.borrow_mut().remove(id);
        Ok(())
    }

    /// Deletes whatever is left of what was created here; the failures' count.
    pub(super) async fn delete_all(&self) -> usize {
        let left: Vec<VmId> = self.created.borrow().iter().cloned().collect();
        let deletes = left.iter().map(|id| self.delete(id));
        let done: Vec<_> = stream::iter(deletes).buffer_unordered(DELETES_AT_ONCE).collect().await;
        done.iter().filter(|deleted| deleted.is_err()).count()
    }

    /// The ids that the API lists now.
    pub(super) async fn list(&self) -> anyhow::Result<BTreeSet<String>> {
        let vms = self.client.get("/v1/vms").await?;
        Ok(vms.as_array().into_iter().flatten().map(|vm| field(vm, "id")).collect())
    }

    /// A metric's value (name and labels as they are shown); 0 where the server hasn't counted anything there yet.
    pub(super) async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let answer = self.client.send(Call::new(Method::GET, "/metrics")).await?;
        let text = String::from_utf8(self.client.body(answer).await?).context("the server's metrics")?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(Ok(0.0), |value| value.parse().with_context(|| format!("the metric {name}")))
    }

    /// The port that the server listens on.
    pub(super) fn port(&self) -> Option<u16> {
        self.client.port()
    }
}

/// One of the times of a `Server-Timing` header.
fn server_timing(answer: &Response, name: &str) -> Option<Duration> {
    timing(answer.headers().get("server-timing")?.to_str().ok()?, name)
}

fn timing(header: &str, name: &str) -> Option<Duration> {
    let metric = header.split(',').map(str::trim).find(|metric| metric.split(';').next() == Some(name))?;
    let millis = metric.split(';').find_map(|part| part.trim().strip_prefix("dur="))?;
    Duration::try_from_secs_f64(millis.parse::<f64>().ok()? / 1e3).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_found_among_others() {
        assert_eq!(timing("guest;dur=1.5", "guest"), Some(Duration::from_micros(1500)));
        assert_eq!(timing("dial;dur=9, guest;desc=\"x\"; dur=2", "guest"), Some(Duration::from_millis(2)));
        for other in ["", "guest", "guests;dur=1", "guest;dur=x", "guest;dur=-1"] {
            assert_eq!(timing(other, "guest"), None, "{other}");
        }
    }
}
