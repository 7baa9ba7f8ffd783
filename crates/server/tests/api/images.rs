//! `/v1/images`

use anyhow::Result;
use serde_json::json;
use tiffin_store::NewImage;
use tiffin_types::id::Digest;

use crate::harness::{Server, small_vm};

#[tokio::test]
async fn images_are_listed_with_the_contracts_fields() -> Result<()> {
    let server = Server::start().await?;
    let list = server.get("/v1/images").await?.ok(200);
    let image = &list[0];
    assert_eq!((&image["name"], &image["isDefault"]), (&json!("default"), &json!(true)));
    assert_eq!((&image["hasKernel"], &image["hasRootfs"]), (&json!(false), &json!(true)));
    assert_eq!((&image["baseRootfsBytes"], &image["sizeBytes"]), (&json!(2000), &json!(1000)));
    assert!(image["id"].is_string() && image["createdAt"].is_string() && image["description"].is_string());
    Ok(())
}

#[tokio::test]
async fn an_image_of_another_account_or_without_a_filesystem_makes_no_vm() -> Result<()> {
    let server = Server::start().await?;
    let other = server.post("/v1/admin/accounts", &json!({ "name": "other" })).await?.ok(201);
    let new = |account_id: Option<&str>, digest: Option<Digest>| NewImage {
        account_id: account_id.map(|id| id.parse().unwrap()),
        name: format!("image {account_id:?} {digest:?}").chars().take(90).collect(),
        description: String::new(),
        digest,
        size_bytes: 1,
        rootfs_bytes: 1,
        config: json!({}),
    };
    let theirs = server.store.image_insert(new(other["id"].as_str(), Some(Digest::from_sha256([1; 32])))).await?;
    let empty = server.store.image_insert(new(None, None)).await?;
    for image in [theirs.id, empty.id] {
        let mut body = small_vm();
        body["imageId"] = json!(image);
        let reply = server.post("/v1/vms", &body).await?;
        assert!(reply.refused(400, "invalid_parameter").starts_with("imageId"));
    }
    assert_eq!(server.get("/v1/images").await?.ok(200).as_array().unwrap().len(), 2);
    Ok(())
}
