//! A server of one's own, and a client for it.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use reqwest::{Method, StatusCode, header::HeaderMap};
use serde_json::{Value, json};
use tiffin_engine::{Engine, Observed, fake::Fake};
use tiffin_image::convert::Converter;
use tiffin_server::Config;
use tiffin_store::{NewImage, Store};
use tiffin_types::{
    id::{Digest, VmId},
    network::EgressPolicy,
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long anything that is waited for may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether this is the second run of all cases, over a server that has VMs booted ahead: what a create does must not
/// differ.
const POOLED: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"api_pool");

/// A server with its engine and store. The directory goes with it.
pub(crate) struct Server {
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) fake: Arc<Fake>,
    pub(crate) store: Store,
    pub(crate) client: reqwest::Client,
    settings: Vec<(String, String)>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    _dir: tempfile::TempDir,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("{} is no JSON: {:?}", self.status, self.text))
    }

    /// Asserts the status and the error's code; gives the message.
    #[track_caller]
    pub(crate) fn refused(&self, status: u16, code: &str) -> String {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let body = self.json();
        assert_eq!(body["code"], code, "{body}");
        assert_eq!(body["requestId"], self.headers["x-request-id"].to_str().expect("ASCII"));
        body["message"].as_str().expect("a message").to_owned()
    }

    #[track_caller]
    pub(crate) fn ok(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        if self.text.is_empty() { Value::Null } else { self.json() }
    }
}

impl Server {
    pub(crate) async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// A server that boots each VM, in both runs: for cases about how the engine boots.
    pub(crate) async fn start_cold() -> Result<Self> {
        Self::start_cold_with(&[]).await
    }

    pub(crate) async fn start_cold_with(settings: &[(&str, &str)]) -> Result<Self> {
        let cold = [("pool.max_vms", "0"), ("pool.keep", "")];
        Self::start_with(&[&cold, settings].concat()).await
    }

    pub(crate) async fn start_with(settings: &[(&str, &str)]) -> Result<Self> {
        Self::start_over(Fake::new(), settings).await
    }

    /// A server over that engine.
    pub(crate) async fn start_over(fake: Arc<Fake>, settings: &[(&str, &str)]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut all = vec![("data_dir".to_owned(), dir.path().to_str().context("a path of UTF-8")?.to_owned())];
        all.push(("http.shutdown_grace_ms".into(), "300".into()));
        // Tests of the ingress set it.
        all.push(("ingress.listen".into(), "off".into()));
        // Tests ask as often as they like, except those of the limits, which set them.
        let rates = ["vm_create", "exec", "run", "upload", "download", "import", "auth_failures"];
        all.extend(
            rates
                .into_iter()
                .chain(["login", "login_email", "login_address"])
                .map(|rate| (format!("rate.{rate}_per_min"), "0".to_owned())),
        );
        let (most, keep) = if POOLED { ("3", "1x128=2") } else { ("0", "") };
        all.extend([("pool.max_vms".into(), most.into()), ("pool.keep".into(), keep.into())]);
        all.extend(settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let config = Config::load(None, std::iter::empty(), &all)?;
        let store = Store::open(config.database_url.reveal()).await?;
        let key = tiffin_server::first_key(&store, config.quota).await?.context("the first start makes a key")?;
        default_image(&store).await?;
        let mut server = Self {
            url: String::new(),
            key,
            fake,
            store,
            client: reqwest::Client::new(),
            settings: all,
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
            _dir: dir,
        };
        server.serve().await?;
        Ok(server)
    }

    async fn serve(&mut self) -> Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        self.url = format!("http://{}", listener.local_addr()?);
        let config = Config::load(None, std::iter::empty(), &self.settings)?;
        let keeps = config.pool.keep.iter().map(|keep| keep.count).sum::<usize>().min(config.pool.max_vms);
        self.shutdown = CancellationToken::new();
        self.tasks = TaskTracker::new();
        let served = tiffin_server::serve(
            config,
            self.fake.clone(),
            self.store.clone(),
            Converter::in_process(),
            listener,
            self.shutdown.clone(),
        );
        self.tasks.spawn(async move { served.await.expect("the server begins") });
        self.tasks.close();
        if keeps > 0 {
            until("the pool is full", async || Ok(self.pooled().await?.len() >= keeps)).await?;
        }
        Ok(())
    }

    /// Stops the server; engine and store live on.
    pub(crate) async fn stop(&self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.tasks.wait()).await.expect("the server shuts down");
    }

    /// A new server over the same engine and store.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        self.stop().await;
        self.serve().await
    }

    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).header("X-API-Key", &self.key).timeout(PATIENCE)
    }

    pub(crate) async fn get(&self, path: &str) -> Result<Reply> {
        send(self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Result<Reply> {
        send(self.request(Method::POST, path).json(body)).await
    }

    /// A post without a body.
    pub(crate) async fn act(&self, path: &str) -> Result<Reply> {
        send(self.request(Method::POST, path)).await
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<Reply> {
        send(self.request(Method::DELETE, path)).await
    }

    pub(crate) async fn put(&self, path: &str, body: impl Into<reqwest::Body>) -> Result<Reply> {
        send(self.request(Method::PUT, path).header("Content-Type", "application/octet-stream").body(body)).await
    }

    /// The account of the key.
    pub(crate) async fn account(&self) -> Result<tiffin_types::id::AccountId> {
        let accounts = self.get("/v1/admin/accounts").await?.ok(200);
        Ok(accounts[0]["id"].as_str().context("an account")?.parse()?)
    }

    /// The folder of the server's data.
    pub(crate) fn data_dir(&self) -> &std::path::Path {
        self._dir.path()
    }

    /// A running VM's path.
    pub(crate) async fn vm(&self) -> Result<String> {
        let reply = self.post("/v1/vms", &small_vm()).await?;
        ensure!(reply.status == 201, "{}", reply.text);
        Ok(format!("/v1/vms/{}", reply.json()["id"].as_str().context("an id")?))
    }

    /// The VMs on the host that are booted ahead: nobody's, as a leftover of a VM would be, but running and closed.
    pub(crate) async fn pooled(&self) -> Result<Vec<VmId>> {
        let mut pooled = Vec::new();
        for id in self.fake.present() {
            let closed = self.fake.spec(&id).is_some_and(|spec| spec.egress == EgressPolicy::default());
            if closed && self.fake.observe(&id).await == Observed::Running && self.is_unknown(&id).await? {
                pooled.push(id);
            }
        }
        Ok(pooled)
    }

    /// The VMs on the host, those booted ahead aside in the run that has them.
    pub(crate) async fn present(&self) -> Result<Vec<VmId>> {
        let pooled = if POOLED { self.pooled().await? } else { Vec::new() };
        let starting = async |id: &VmId| POOLED && self.fake.observe(id).await == Observed::Starting;
        let mut present = Vec::new();
        for id in self.fake.present() {
            if pooled.contains(&id) || starting(&id).await && self.is_unknown(&id).await? {
                continue;
            }
            present.push(id);
        }
        Ok(present)
    }

    async fn is_unknown(&self, id: &VmId) -> Result<bool> {
        for account in self.store.account_list().await? {
            if self.store.vm_get(&account.id, id).await?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(crate) async fn state(&self, path: &str) -> Result<String> {
        let reply = self.get(path).await?;
        ensure!(reply.status == 200, "{}", reply.text);
        Ok(reply.json()["state"].as_str().context("a state")?.to_owned())
    }

    /// Waits until the VM is in a state.
    pub(crate) async fn until_state(&self, path: &str, state: &str) -> Result<()> {
        until(&format!("{path} is {state}"), async || Ok(self.state(path).await? == state)).await
    }

    /// A key of another account, with those scopes.
    pub(crate) async fn other_key(&self, account: &str, scopes: &[&str]) -> Result<String> {
        let account = self.post("/v1/admin/accounts", &json!({ "name": account })).await?.ok(201);
        self.key_for(&account["id"], scopes).await
    }

    pub(crate) async fn key_for(&self, account: &Value, scopes: &[&str]) -> Result<String> {
        let body = json!({ "name": "test", "scopes": scopes, "accountId": account });
        let key = self.post("/v1/admin/api-keys", &body).await?.ok(201);
        Ok(key["key"].as_str().context("a key")?.to_owned())
    }

    /// The same server with another key.
    pub(crate) async fn get_as(&self, key: &str, path: &str) -> Result<Reply> {
        send(self.client.get(format!("{}{path}", self.url)).header("X-API-Key", key)).await
    }

    pub(crate) async fn post_as(&self, key: &str, path: &str, body: &Value) -> Result<Reply> {
        send(self.client.post(format!("{}{path}", self.url)).header("X-API-Key", key).json(body)).await
    }
}

pub(crate) async fn send(request: reqwest::RequestBuilder) -> Result<Reply> {
    let response = request.send().await?;
    let (status, headers) = (response.status(), response.headers().clone());
    Ok(Reply { status, headers, text: response.text().await? })
}

/// Polls until `done`, with a deadline.
pub(crate) async fn until(what: &str, mut done: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let poll = async {
        while !done().await? {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, poll).await.with_context(|| format!("waited in vain until {what}"))?
}

pub(crate) fn small_vm() -> Value {
    json!({ "cpu": 1, "memMb": 128, "allowIps": [] })
}

pub(crate) fn id_of(path: &str) -> VmId {
    path.rsplit('/').next().and_then(|id| id.parse().ok()).expect("a VM's path")
}

async fn default_image(store: &Store) -> Result<()> {
    let new = NewImage {
        account_id: None,
        name: "default".into(),
        description: "for tests".into(),
        digest: Some(Digest::from_sha256([7; 32])),
        size_bytes: 1000,
        rootfs_bytes: 2000,
        config: json!({}),
    };
    let image = store.image_insert(new).await?;
    store.image_set_default(&image.id).await?;
    Ok(())
}
