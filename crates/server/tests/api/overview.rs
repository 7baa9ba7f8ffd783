//! `/v1/admin/overview`

use anyhow::Result;
use serde_json::json;

use crate::harness::Server;

#[tokio::test]
async fn the_overview_counts_what_there_is_and_what_of_the_host_is_taken() -> Result<()> {
    let server = Server::start().await?;
    let (_, down) = (server.vm().await?, server.vm().await?);
    server.act(&format!("{down}/stop")).await?.ok(204);
    server.other_key("other", &["read"]).await?;
    let seen = server.get("/v1/admin/overview").await?.ok(200);
    assert_eq!(
        (&seen["vms"]["RUNNING"], &seen["vms"]["STOPPED"], &seen["vms"]["ERROR"]),
        (&json!(1), &json!(1), &json!(0))
    );
    assert!(seen["vms"].get("DELETED").is_none());
    let counts = ["images", "snapshots", "accounts", "apiKeys"].map(|name| seen[name].clone());
    assert_eq!(counts, [json!(1), json!(0), json!(2), json!(2)]);
    assert_eq!((&seen["cpu"]["allocated"], &seen["memoryMb"]["allocated"]), (&json!(1), &json!(128)));
    assert_eq!(seen["storageMb"]["allocated"], json!(2048));
    for part in ["memoryMb", "storageMb"] {
        assert!(seen[part]["total"].as_u64() >= seen[part]["used"].as_u64() && seen[part]["used"].is_u64(), "{seen}");
    }
    assert!(seen["cpu"]["total"].as_u64() >= Some(1));
    assert_eq!((&seen["engine"], &seen["version"]), (&json!("fake"), &json!(env!("CARGO_PKG_VERSION"))));
    assert!(seen["uptimeS"].is_u64() && seen["startedAt"].is_string());
    Ok(())
}
