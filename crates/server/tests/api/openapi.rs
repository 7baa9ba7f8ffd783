//! The OpenAPI document: committed, and true of every operation.

use anyhow::{Context, Result};
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Reply, Server, send};

const SNAPSHOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/openapi.json");

pub(crate) struct Operation {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) spec: Value,
}

pub(crate) fn operations(document: &Value) -> Vec<Operation> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, spec) in item.as_object().expect("operations") {
            let method = method.to_uppercase().parse().expect("a method");
            operations.push(Operation { method, path: path.clone(), spec: spec.clone() });
        }
    }
    operations
}

pub(crate) fn document() -> Result<Value> {
    Ok(serde_json::to_value(tiffin_server::openapi_document())?)
}

/// A well-formed id that names nothing.
pub(crate) fn unknown_id(path: &str) -> String {
    let id = match path.strip_prefix("/cakework").unwrap_or(path) {
        path if path.starts_with("/v1/vm/") => "00000000000000",
        _ if path.starts_with("/v1/vms/") => "vm-00000000000000",
        _ if path.starts_with("/v1/snapshots/") => "snap-00000000000000",
        _ if path.starts_with("/v1/images/") => "01JD4W5C1QZX6M0V5K2B8N7T3A",
        _ if path.starts_with("/v1/admin/accounts/") => "acc-00000000000000",
        _ if path.starts_with("/v1/admin/webhooks/") => "whk-00000000000000",
        _ if path.starts_with("/v1/admin/api-keys/") => "key-00000000000000",
        _ => panic!("tell this test what {path} is about"),
    };
    path.replace("{id}", id).replace("{delivery}", "dlv-00000000000000").replace("{port}", "8080")
}

/// A query that the operation takes.
fn good_query(id: &str) -> &'static str {
    match id {
        "files_upload" => "?dest=/workspace/x",
        "files_download" | "file_get" | "file_update" => "?path=/workspace/x",
        _ => "",
    }
}

/// The type of the operation's body, if it has one.
fn body_type(operation: &Operation) -> Option<String> {
    operation.spec["requestBody"]["content"].as_object()?.keys().next().cloned()
}

/// A body that the operation takes.
pub(crate) fn good_body(id: &str) -> Value {
    match id.strip_prefix("prefixed_").unwrap_or(id) {
        "cakework_vm_start" | "cakework_vm_cache" => json!({ "imageId": "01JD4W5C1QZX6M0V5K2B8N7T3A" }),
        // Registries on that port are none.
        "posted_cakework_image_import" => json!({ "imageUri": "localhost:1/x" }),
        "vm_create" => crate::harness::small_vm(),
        "vm_fork" => json!({ "count": 1 }),
        "snapshot_create" => json!({ "name": "x" }),
        "exec_create" => json!({ "cmd": "true" }),
        "script_ts_run" | "script_js_run" => json!({ "code": "1" }),
        "image_create" => json!({ "name": "x", "description": "" }),
        "account_create" => json!({ "name": "x" }),
        "account_update" => json!({ "quota": { "vms": 1, "cpus": 1, "memMb": 1, "diskMb": 1 } }),
        "session_create" => json!({ "email": "x@y", "password": "x" }),
        "webhook_create" => json!({ "name": "x", "url": "https://hooks.example.com/" }),
        "webhook_update" => json!({ "enabled": true }),
        "webhook_rotate" => json!({ "overlapSeconds": 60 }),
        "api_key_create" => json!({ "name": "x", "scopes": ["read"] }),
        _ => panic!("tell this test a body for {id}"),
    }
}

#[test]
fn the_committed_document_is_the_served_one() -> Result<()> {
    let served = serde_json::to_string_pretty(&document()?)? + "\n";
    if std::env::var_os("TIFFIN_TEST_UPDATE").is_some() {
        std::fs::write(SNAPSHOT, &served)?;
    }
    let committed = std::fs::read_to_string(SNAPSHOT)?;
    assert!(committed == served, "docs/openapi.json is stale: run the tests with TIFFIN_TEST_UPDATE=1 and review it");
    Ok(())
}

#[test]
fn every_operation_has_an_id_a_summary_and_a_schema_for_each_answer() -> Result<()> {
    let document = document()?;
    let mut ids = Vec::new();
    for Operation { method, path, spec } in operations(&document) {
        let id = spec["operationId"].as_str().with_context(|| format!("{method} {path}"))?;
        let verbs = [
            "create", "list", "get", "update", "delete", "start", "stop", "pause", "resume", "fork", "revoke", "run",
            "upload", "download", "open", "destroy", "cache", "rotate", "test", "retry", "follow", "import",
        ];
        assert!(verbs.contains(&id.rsplit('_').next().unwrap()), "{id} is no <noun>_<verb>");
        assert!(spec["summary"].is_string(), "{id}");
        for (status, response) in spec["responses"].as_object().context("responses")? {
            let empty = status == "204";
            assert!(empty || response["content"].is_object(), "{id} {status}");
            assert!(response["description"].as_str().is_some_and(|text| !text.is_empty()), "{id} {status}");
        }
        ids.push(id.to_owned());
    }
    let all = ids.len();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), all, "operation ids are unique");
    assert_eq!(document["components"]["securitySchemes"]["apiKey"]["name"], "X-API-Key");
    Ok(())
}

#[test]
fn every_reference_leads_somewhere() -> Result<()> {
    let document = document()?;
    let text = document.to_string();
    for name in text.split("\"#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(document["components"]["schemas"][name].is_object(), "{name}");
    }
    Ok(())
}

#[tokio::test]
async fn every_operation_keeps_strangers_out_unless_it_is_public() -> Result<()> {
    let server = Server::start().await?;
    for Operation { method, path, spec } in operations(&document()?) {
        let reply = send(server.client.request(method, format!("{}{}", server.url, path))).await?;
        let at_root = path.strip_prefix("/cakework").unwrap_or(&path);
        match at_root.starts_with("/v1/") || at_root == "/vms" || path == "/auth/me" {
            true => {
                reply.refused(401, "unauthorized");
                assert!(spec["responses"]["401"].is_object() && spec["security"].is_array(), "{path}");
            }
            // They are how a stranger becomes somebody.
            false if path == "/auth/login" => _ = reply.refused(400, "bad_request"),
            false if path == "/auth/logout" => _ = reply.ok(204),
            false => assert_eq!(reply.status, 200, "{path}"),
        }
    }
    Ok(())
}

/// Headers that the operation asks for beyond the key.
fn headers(id: &str) -> &'static [(&'static str, &'static str)] {
    match id {
        "terminal_open" => &[
            ("connection", "upgrade"),
            ("upgrade", "websocket"),
            ("sec-websocket-version", "13"),
            ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ],
        _ => &[],
    }
}

/// Calls the operation, with JSON or, where it takes something else, with any bytes.
async fn call(server: &Server, operation: &Operation, path: &str, body: Option<Value>) -> Result<Reply> {
    let id = operation.spec["operationId"].as_str().context("an id")?;
    let mut request = server.request(operation.method.clone(), &format!("{path}{}", good_query(id)));
    for (name, value) in headers(id) {
        request = request.header(*name, *value);
    }
    send(match (body_type(operation).as_deref(), body) {
        (_, Some(body)) => request.json(&body),
        (Some("application/json") | None, None) => request,
        (Some(kind), None) => request.header("Content-Type", kind).body("bytes"),
    })
    .await
}

#[tokio::test]
async fn every_operation_on_something_unknown_is_not_found() -> Result<()> {
    let server = Server::start().await?;
    let mut seen = 0;
    for operation in operations(&document()?).iter().filter(|operation| operation.path.contains("{id}")) {
        let body = body_type(operation).filter(|kind| kind == "application/json");
        let body = body.map(|_| good_body(operation.spec["operationId"].as_str().unwrap()));
        for path in [unknown_id(&operation.path), operation.path.replace("{id}", "malformed").replace("{port}", "8080")]
        {
            call(&server, operation, &path, body.clone()).await?.refused(404, "not_found");
        }
        assert!(operation.spec["responses"]["404"].is_object(), "{}", operation.path);
        seen += 1;
    }
    assert!(seen >= 10);
    Ok(())
}

#[tokio::test]
async fn every_operation_with_a_body_refuses_a_bad_one() -> Result<()> {
    let server = Server::start().await?;
    let mut seen = 0;
    for operation in operations(&document()?).iter().filter(|operation| operation.spec["requestBody"].is_object()) {
        let path = if operation.path.contains("{id}") { unknown_id(&operation.path) } else { operation.path.clone() };
        for status in ["400", "413", "415"] {
            assert!(operation.spec["responses"][status].is_object(), "{path} {status}");
        }
        seen += 1;
        if body_type(operation).as_deref() != Some("application/json") {
            call(&server, operation, &path, Some(json!({}))).await?.refused(415, "unsupported_media_type");
            continue;
        }
        // Where the body may be missing, an empty one is as good.
        if operation.spec["requestBody"]["required"] != false {
            call(&server, operation, &path, Some(json!({}))).await?.refused(400, "invalid_parameter");
        }
        call(&server, operation, &path, Some(json!([]))).await?.refused(400, "bad_request");
        // The second dialect ignores what it doesn't know.
        if operation.spec["operationId"].as_str().unwrap().contains("cakework_") {
            continue;
        }
        let mut extra = good_body(operation.spec["operationId"].as_str().unwrap());
        extra["surprise"] = json!(1);
        let message = call(&server, operation, &path, Some(extra)).await?.refused(400, "invalid_parameter");
        assert!(message.contains("surprise"), "{message}");
    }
    assert!(seen >= 5);
    Ok(())
}
