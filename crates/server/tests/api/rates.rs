//! How often a key may do what is costly.

use std::time::Instant;

use anyhow::Result;
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::json;

use crate::harness::{Reply, Server, send, small_vm, until};

fn standing(reply: &Reply) -> (u32, u32, u32) {
    let number = |name: &str| reply.headers[name].to_str().expect("ASCII").parse().expect("a number");
    (number("ratelimit-limit"), number("ratelimit-remaining"), number("ratelimit-reset"))
}

#[tokio::test]
async fn of_many_requests_at_once_exactly_the_limit_pass() -> Result<()> {
    let server = Server::start_with(&[("rate.exec_per_min", "5")]).await?;
    let path = format!("{}/exec", server.vm().await?);
    let (began, body) = (Instant::now(), json!({ "cmd": "echo" }));
    let replies = join_all((0..40).map(|_| server.post(&path, &body))).await.into_iter().collect::<Result<Vec<_>>>()?;
    // One comes back every twelve seconds.
    let back = usize::try_from(began.elapsed().as_secs() / 12)?;
    let passed = replies.iter().filter(|reply| reply.status == 200).count();
    assert!((5..=5 + back).contains(&passed), "{passed}");
    for refused in replies.iter().filter(|reply| reply.status != 200) {
        let message = refused.refused(429, "rate_limited");
        assert!(message.contains("5 times a minute"), "{message}");
        let (limit, remaining, reset) = standing(refused);
        let retry: u32 = refused.headers["retry-after"].to_str()?.parse()?;
        assert!((limit, remaining, retry) == (5, 0, reset) && (1..=12).contains(&retry), "{limit} {remaining} {retry}");
    }
    assert_eq!(server.fake.commands(), 0, "what passed has ended");
    Ok(())
}

#[tokio::test]
async fn each_answer_of_a_limited_route_tells_the_standing_also_when_it_is_an_error() -> Result<()> {
    let server = Server::start_with(&[("rate.vm_create_per_min", "3")]).await?;
    let bad = server.post("/v1/vms", &json!({})).await?;
    bad.refused(400, "invalid_parameter");
    assert_eq!(standing(&bad), (3, 2, 20));
    let made = server.post("/v1/vms", &small_vm()).await?;
    made.ok(201);
    // On a slow machine one has come back.
    let (limit, remaining, _) = standing(&made);
    assert!(limit == 3 && (1..=2).contains(&remaining), "{remaining}");
    let list = server.get("/v1/vms").await?;
    assert!(!list.headers.contains_key("ratelimit-limit"), "reading isn't limited");
    Ok(())
}

#[tokio::test]
async fn keys_do_not_share_their_limits_and_routes_neither() -> Result<()> {
    let server = Server::start_with(&[("rate.vm_create_per_min", "1"), ("rate.exec_per_min", "1")]).await?;
    let other = server.other_key("other", &["write"]).await?;
    let vm = server.vm().await?;
    server.post("/v1/vms", &small_vm()).await?.refused(429, "rate_limited");
    server.post_as(&other, "/v1/vms", &small_vm()).await?.ok(201);
    server.post(&format!("{vm}/exec"), &json!({ "cmd": "echo" })).await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn guessing_keys_is_slowed_down_and_a_right_key_is_let_in_all_the_same() -> Result<()> {
    let server = Server::start_with(&[("rate.auth_failures_per_min", "2")]).await?;
    let (head, _) = server.key.rsplit_once('_').expect("a key has parts");
    let wrong = format!("{head}_{}", "0".repeat(64));
    server.get_as(&wrong, "/v1/vms").await?.refused(401, "unauthorized");
    server.get_as("x", "/v1/vms").await?.refused(401, "unauthorized");
    // On a slow machine one has come back meanwhile.
    until("it is refused", async || {
        let refused = server.get_as(&wrong, "/v1/vms").await?;
        if refused.status == 401 {
            return Ok(false);
        }
        refused.refused(429, "rate_limited");
        assert!(refused.headers.contains_key("retry-after"));
        Ok(true)
    })
    .await?;
    server.get("/v1/vms").await?.ok(200);
    let nothing = send(server.client.request(Method::GET, format!("{}/v1/vms", server.url))).await?;
    nothing.refused(401, "unauthorized");
    Ok(())
}

#[tokio::test]
async fn imports_have_a_limit_of_their_own_by_either_method_and_in_both_places() -> Result<()> {
    let server = Server::start_with(&[("rate.import_per_min", "1")]).await?;
    let bad = server.post("/v1/image/import", &json!({})).await?;
    bad.refused(400, "invalid_parameter");
    assert_eq!(standing(&bad), (1, 0, 60));
    for path in ["/v1/image/import", "/cakework/v1/image/import"] {
        for refused in [server.post(path, &json!({ "imageUri": "a" })).await?, server.get(path).await?] {
            assert!(refused.refused(429, "rate_limited").contains("1 times a minute"), "{path}: {}", refused.text);
            assert!(refused.headers.contains_key("retry-after"), "{path}");
        }
    }
    server.get("/v1/images/imports").await?.ok(200);
    Ok(())
}

#[tokio::test]
async fn what_comes_to_the_same_counts_under_the_same_limit() -> Result<()> {
    let limits = ["vm_create", "exec", "upload", "download"].map(|limit| format!("rate.{limit}_per_min"));
    let server = Server::start_with(&limits.each_ref().map(|limit| (limit.as_str(), "1"))).await?;
    let vm = server.vm().await?;
    // Creating the VM was the one that is allowed.
    server.post(&format!("{vm}/snapshots"), &json!({})).await?.refused(429, "rate_limited");
    server.post(&format!("{vm}/exec"), &json!({ "cmd": "echo" })).await?.ok(200);
    server.get(&format!("{vm}/terminal")).await?.refused(429, "rate_limited");
    let file = format!("{vm}/files/content?path=/workspace/a");
    let first = server.put(&file, "x").await?;
    assert_eq!((standing(&first).0, standing(&first).1), (1, 0), "{}", first.text);
    server.put(&file, "x").await?.refused(429, "rate_limited");
    let first = server.get(&format!("{vm}/files?path=/workspace")).await?;
    assert_eq!((standing(&first).0, standing(&first).1), (1, 0), "{}", first.text);
    for path in ["files?path=/workspace", "files/content?path=/workspace/a", "files/download?path=/workspace"] {
        server.get(&format!("{vm}/{path}")).await?.refused(429, "rate_limited");
    }
    Ok(())
}
