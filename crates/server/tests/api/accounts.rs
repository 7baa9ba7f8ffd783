//! `/v1/admin/accounts`, and what one account sees of another.

use anyhow::Result;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Server, send, small_vm};

#[tokio::test]
async fn an_account_is_made_listed_and_given_another_quota() -> Result<()> {
    let server = Server::start().await?;
    let made = server.post("/v1/admin/accounts", &json!({ "name": "acme" })).await?.ok(201);
    assert_eq!(made["quota"]["vms"], 100);
    let list = server.get("/v1/admin/accounts").await?.ok(200);
    let names: Vec<&Value> = list.as_array().unwrap().iter().map(|account| &account["name"]).collect();
    assert_eq!(names, ["admin", "acme"]);

    let path = format!("/v1/admin/accounts/{}", made["id"].as_str().unwrap());
    let quota = json!({ "vms": 1, "cpus": 2, "memMb": 300, "diskMb": 4000 });
    let request = server.request(Method::PATCH, &path).json(&json!({ "quota": quota }));
    assert_eq!(send(request).await?.ok(200)["quota"], quota);
    let key = server.key_for(&made["id"], &["write"]).await?;
    server.post_as(&key, "/v1/vms", &small_vm()).await?.ok(201);
    server.post_as(&key, "/v1/vms", &small_vm()).await?.refused(429, "quota_exceeded");
    let got = server.get(&path).await?.ok(200);
    assert_eq!((&got["quota"], &got["usage"]["vms"], &got["usage"]["memMb"]), (&quota, &json!(1), &json!(128)));

    let own = json!({ "name": "small", "quota": quota });
    assert_eq!(server.post("/v1/admin/accounts", &own).await?.ok(201)["quota"], quota);
    server.post("/v1/admin/accounts", &own).await?.refused(409, "name_taken");
    Ok(())
}

#[tokio::test]
async fn bad_names_and_quotas_are_refused() -> Result<()> {
    let server = Server::start().await?;
    let quota = |field: &str, value: Value| {
        let mut quota = json!({ "vms": 1, "cpus": 2, "memMb": 300, "diskMb": 4000 });
        quota[field] = value;
        json!({ "name": "x", "quota": quota })
    };
    for (field, body) in [
        ("name", json!({})),
        ("name", json!({ "name": "" })),
        ("name", json!({ "name": " x" })),
        ("name", json!({ "name": "a\nb" })),
        ("name", json!({ "name": "x".repeat(101) })),
        ("name", json!({ "name": 1 })),
        ("quota", json!({ "name": "x", "quota": 1 })),
        ("quota", json!({ "name": "x", "quota": null })),
        ("quota.vms", quota("vms", json!(-1))),
        ("quota.cpus", quota("cpus", json!(1.5))),
        ("quota.memMb", quota("memMb", json!("1"))),
        ("quota.diskMb", quota("diskMb", json!(u64::MAX))),
        ("quota.disk", quota("disk", json!(1))),
        ("nome", json!({ "name": "x", "nome": 1 })),
    ] {
        let reply = server.post("/v1/admin/accounts", &body).await?;
        reply.refused(400, "invalid_parameter");
        assert_eq!(reply.json()["details"]["fields"][0]["field"], field);
    }
    let path = "/v1/admin/accounts/acc-0123456789abcd";
    let quota = json!({ "quota": { "vms": 1, "cpus": 2, "memMb": 300, "diskMb": 4000 } });
    send(server.request(Method::PATCH, path).json(&quota)).await?.refused(404, "not_found");
    server.get(path).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn what_belongs_to_somebody_else_is_not_found_by_any_call() -> Result<()> {
    let server = Server::start().await?;
    let vm = server.vm().await?;
    // Not even an administrator's scope shows other accounts' VMs.
    let other = server.other_key("other", &["admin"]).await?;
    assert_eq!(server.get_as(&other, "/v1/vms").await?.ok(200), json!([]));
    for path in ["", "/logs", "/network"] {
        server.get_as(&other, &format!("{vm}{path}")).await?.refused(404, "not_found");
    }
    for what in ["start", "stop", "pause", "resume"] {
        server.post_as(&other, &format!("{vm}/{what}"), &json!({})).await?.refused(404, "not_found");
    }
    server.post_as(&other, &format!("{vm}/exec"), &json!({ "cmd": "x" })).await?.refused(404, "not_found");
    let delete = server.client.delete(format!("{}{vm}", server.url)).header("X-API-Key", &other);
    send(delete).await?.refused(404, "not_found");
    assert_eq!(server.state(&vm).await?, "RUNNING");
    Ok(())
}
