//! `/v1/admin/api-keys`, and who gets in with what.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tiffin_types::time::Timestamp;

use crate::harness::{Server, send, small_vm, until};

#[tokio::test]
async fn without_a_valid_key_nothing_is_told() -> Result<()> {
    let server = Server::start().await?;
    let missing = send(server.client.get(format!("{}/v1/vms", server.url))).await?;
    assert!(missing.refused(401, "unauthorized").contains("X-API-Key"));
    let (head, secret) = server.key.rsplit_once('_').unwrap();
    let mut wrong_secret = secret.to_owned();
    wrong_secret.replace_range(0..1, if secret.starts_with('0') { "1" } else { "0" });
    for wrong in [
        "",
        "x",
        "tfn__",
        head,
        &format!("{head}_"),
        &format!("{head}_{wrong_secret}"),
        &format!("tfn_0000000000_{secret}"),
        &format!("{} ", server.key).replace(' ', "x"),
        &server.key.to_uppercase(),
        &"x".repeat(5000),
    ] {
        let message = server.get_as(wrong, "/v1/vms").await?.refused(401, "unauthorized");
        assert!(message.contains("not valid"), "{message}");
    }
    Ok(())
}

#[tokio::test]
async fn a_revoked_key_is_refused_at_once_and_says_so_to_its_holder_only() -> Result<()> {
    let server = Server::start().await?;
    let body = json!({ "name": "ci", "scopes": ["write"] });
    let made = server.post("/v1/admin/api-keys", &body).await?.ok(201);
    let key = made["key"].as_str().unwrap();
    server.get_as(key, "/v1/vms").await?.ok(200);
    let path = format!("/v1/admin/api-keys/{}", made["id"].as_str().unwrap());
    server.delete(&path).await?.ok(204);
    let message = server.get_as(key, "/v1/vms").await?.refused(401, "unauthorized");
    assert!(message.contains("revoked"), "{message}");
    let head = key.rsplit_once('_').unwrap().0;
    let message = server.get_as(&format!("{head}_00"), "/v1/vms").await?.refused(401, "unauthorized");
    assert!(!message.contains("revoked"), "{message}");
    server.delete("/v1/admin/api-keys/key-0123456789abcd").await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn an_expired_key_is_refused() -> Result<()> {
    let server = Server::start().await?;
    // A moment that is over when the request is read is refused: a busy machine is given longer, and waited for longer.
    let mut ahead_ms = 400;
    let (soon, made) = loop {
        let soon = Timestamp::now().plus_millis(ahead_ms).to_string();
        let body = json!({ "name": "brief", "scopes": ["read"], "expiresAt": soon });
        let answer = server.post("/v1/admin/api-keys", &body).await?;
        if answer.status == 400 && ahead_ms < 10_000 {
            ahead_ms *= 4;
            continue;
        }
        break (soon, answer.ok(201));
    };
    assert_eq!(made["expiresAt"], soon);
    let key = made["key"].as_str().unwrap();
    until("the key has expired", async || Ok(server.get_as(key, "/v1/vms").await?.status == 401)).await?;
    assert!(server.get_as(key, "/v1/vms").await?.refused(401, "unauthorized").contains("expired"));
    Ok(())
}

#[tokio::test]
async fn a_scope_allows_what_it_covers_and_a_refusal_names_the_one_needed() -> Result<()> {
    let server = Server::start().await?;
    let reader = server.other_key("reader", &["read"]).await?;
    server.get_as(&reader, "/v1/vms").await?.ok(200);
    server.get_as(&reader, "/v1/images").await?.ok(200);
    let refused = server.post_as(&reader, "/v1/vms", &small_vm()).await?;
    assert!(refused.refused(403, "forbidden").contains("write"));
    assert_eq!(refused.json()["details"]["scope"], "write");
    let vm = "/v1/vms/vm-0123456789abcd";
    for what in ["start", "stop", "pause", "resume"] {
        server.post_as(&reader, &format!("{vm}/{what}"), &json!({})).await?.refused(403, "forbidden");
    }
    server.post_as(&reader, &format!("{vm}/exec"), &json!({ "cmd": "x" })).await?.refused(403, "forbidden");

    let writer = server.other_key("writer", &["write"]).await?;
    server.get_as(&writer, "/v1/vms").await?.ok(200);
    server.post_as(&writer, "/v1/vms", &small_vm()).await?.ok(201);
    for path in ["/v1/admin/accounts", "/v1/admin/api-keys"] {
        assert!(server.get_as(&writer, path).await?.refused(403, "forbidden").contains("admin"));
    }
    Ok(())
}

#[tokio::test]
async fn keys_are_listed_without_secrets_and_with_their_last_use() -> Result<()> {
    let server = Server::start().await?;
    let key = server.other_key("other", &["read", "write", "read"]).await?;
    server.get_as(&key, "/v1/vms").await?.ok(200);
    let reply = server.get("/v1/admin/api-keys").await?;
    assert!(!reply.text.contains(key.rsplit_once('_').unwrap().1));
    let list = reply.ok(200);
    assert_eq!(list.as_array().unwrap().len(), 2);
    let other = &list[1];
    assert_eq!(other["scopes"], json!(["read", "write"]));
    assert!(other["lastUsedAt"].is_string() && other.get("key").is_none(), "{other}");
    assert!(key.starts_with(&format!("tfn_{}_", other["prefix"].as_str().unwrap())));

    let account = other["accountId"].as_str().unwrap();
    let only = server.get(&format!("/v1/admin/api-keys?accountId={account}")).await?.ok(200);
    assert_eq!(only, json!([other]));
    server.get("/v1/admin/api-keys?accountId=x").await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn a_keys_last_use_is_written_once_a_minute() -> Result<()> {
    let server = Server::start().await?;
    let last_use =
        async || -> Result<Value> { Ok(server.get("/v1/admin/api-keys").await?.ok(200)[0]["lastUsedAt"].clone()) };
    let first = last_use().await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(last_use().await?, first);
    Ok(())
}

#[tokio::test]
async fn a_key_can_not_revoke_itself() -> Result<()> {
    let server = Server::start().await?;
    let own = server.get("/v1/admin/api-keys").await?.ok(200)[0]["id"].as_str().expect("an id").to_owned();
    let refused = server.delete(&format!("/v1/admin/api-keys/{own}")).await?;
    assert!(refused.refused(409, "own_key").contains("another key"));
    server.get("/v1/admin/api-keys").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn bad_keys_are_not_made() -> Result<()> {
    let server = Server::start().await?;
    for (field, body) in [
        ("name", json!({ "scopes": ["read"] })),
        ("name", json!({ "name": "", "scopes": ["read"] })),
        ("scopes", json!({ "name": "x" })),
        ("scopes", json!({ "name": "x", "scopes": [] })),
        ("scopes", json!({ "name": "x", "scopes": "read" })),
        ("scopes", json!({ "name": "x", "scopes": ["root"] })),
        ("scopes", json!({ "name": "x", "scopes": [1] })),
        ("expiresAt", json!({ "name": "x", "scopes": ["read"], "expiresAt": "2001-01-01T00:00:00Z" })),
        ("expiresAt", json!({ "name": "x", "scopes": ["read"], "expiresAt": "tomorrow" })),
        ("expiresAt", json!({ "name": "x", "scopes": ["read"], "expiresAt": 5 })),
        ("accountId", json!({ "name": "x", "scopes": ["read"], "accountId": "x" })),
    ] {
        let reply = server.post("/v1/admin/api-keys", &body).await?;
        reply.refused(400, "invalid_parameter");
        assert_eq!(reply.json()["details"]["fields"][0]["field"], field);
    }
    let nobody = json!({ "name": "x", "scopes": ["read"], "accountId": "acc-0123456789abcd" });
    server.post("/v1/admin/api-keys", &nobody).await?.refused(404, "not_found");
    Ok(())
}

#[tokio::test]
async fn the_first_start_makes_a_key_and_no_later_one_does() -> Result<()> {
    let server = Server::start().await?;
    let quota = tiffin_server::Config::load(None, std::iter::empty(), &[])?.quota;
    assert_eq!(tiffin_server::first_key(&server.store, quota).await?, None);
    server.get("/v1/admin/accounts").await?.ok(200);
    Ok(())
}
