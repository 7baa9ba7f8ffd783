//! Where registries may be: authorities of one's own, plain HTTP, private networks, and what registries point to.
//!
//! What is on this host's loopback is let in by default. With that off it is as private as any other address.

use anyhow::{Context, Result};
use axum::{
    body::Body,
    extract::Request,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::json;

use crate::{
    harness::{Reply, Server},
    odd::Odd,
    registry::{Image, Registry, tar},
};

const LOOPBACK_IS_PRIVATE: (&str, &str) = ("registry.loopback", "false");
const ALLOWED: (&str, &str) = ("registry.allow_networks", "127.0.0.0/8");

fn app() -> Image {
    Image::new(&[tar(&[("app", "here")])], &json!({}))
}

async fn import(settings: &[(&str, &str)], uri: &str) -> Result<Reply> {
    let server = Server::start_with(&[&[LOOPBACK_IS_PRIVATE], settings].concat()).await?;
    server.post("/v1/image/import", &json!({ "imageUri": uri })).await
}

#[tokio::test]
async fn a_registry_by_tls_of_an_authority_of_ones_own_is_believed_where_the_configuration_names_that() -> Result<()> {
    let registry = Registry::open().await?;
    registry.push("app", "1", &app()).await?;
    let (folder, key, authority_key) = (tempfile::tempdir()?, KeyPair::generate()?, KeyPair::generate()?);
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let file = folder.path().join("authorities.pem");
    std::fs::write(&file, authority.self_signed(&authority_key)?.pem())?;
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    let certificate = certificate.signed_by(&key, &Issuer::new(authority, authority_key))?;
    let secured = registry.secured(&certificate.pem(), &key.serialize_pem()).await?;
    let uri = format!("{}/app:1", secured.host);
    let known = ("registry.ca_file", file.to_str().context("a path of UTF-8")?);
    import(&[ALLOWED, known], &uri).await?.ok(200);
    let stranger = import(&[ALLOWED], &uri).await?;
    let why = stranger.refused(503, "registry_unavailable");
    assert!(why.contains("certificate"), "{why}");
    // A certificate of a known authority lets nobody in who isn't.
    import(&[known], &uri).await?.refused(400, "invalid_parameter");
    Ok(())
}

#[tokio::test]
async fn plain_http_and_private_networks_each_need_to_be_configured() -> Result<()> {
    let registry = Registry::open().await?;
    registry.push("app", "1", &app()).await?;
    let uri = registry.image("app:1");
    let plain = ("registry.plain_http", registry.host.as_str());
    import(&[plain, ALLOWED], &uri).await?.ok(200);
    let why = import(&[plain], &uri).await?.refused(400, "invalid_parameter");
    assert!(why.contains("isn't public"), "{why}");
    let why = import(&[ALLOWED], &uri).await?.refused(503, "registry_unavailable");
    assert!(why.contains("TLS"), "it is spoken to by TLS, which it doesn't know: {why}");
    let why = import(&[], &uri).await?.refused(400, "invalid_parameter");
    assert!(why.contains("registry.loopback"), "{why}");
    // Of a host without a port, every port is meant; of another port, not this one.
    import(&[("registry.plain_http", "127.0.0.1"), ALLOWED], &uri).await?.ok(200);
    import(&[("registry.plain_http", "127.0.0.1:1"), ALLOWED], &uri).await?.refused(503, "registry_unavailable");
    Ok(())
}

#[tokio::test]
async fn redirects_and_token_servers_lead_into_private_networks_where_the_configuration_says_so() -> Result<()> {
    let registry = Registry::open().await?;
    registry.push("app", "1", &app()).await?;
    // One registry sends on everything, the other wants a token from elsewhere, and then does so.
    let tokens = Odd::start(|_, _| Some(json!({ "token": "T" }).to_string().into_response())).await?;
    let (to, realm) = (registry.host.clone(), format!(r#"Bearer realm="http://{}/token""#, tokens.host));
    let front = move |wants_token: bool| {
        let (to, realm) = (to.clone(), realm.clone());
        Odd::start(move |request: &Request, _| {
            if wants_token && !request.headers().contains_key(header::AUTHORIZATION) {
                return Some((StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, realm.clone())]).into_response());
            }
            let to = format!("http://{to}{}", request.uri().path());
            Some(Response::builder().status(307).header(header::LOCATION, to).body(Body::empty()).unwrap_or_default())
        })
    };
    for wants_token in [false, true] {
        let odd = front(wants_token).await?;
        let mut plain = vec![odd.host.as_str(), registry.host.as_str()];
        if wants_token {
            plain.push(&tokens.host);
        }
        let listed = plain.join(",");
        import(&[("registry.plain_http", listed.as_str()), ALLOWED], &odd.image()).await?.ok(200);
        // Each of them must be listed, and be where connections may lead.
        for missing in 0..plain.len() {
            let mut others = plain.clone();
            others.remove(missing);
            let reply = import(&[("registry.plain_http", others.join(",").as_str()), ALLOWED], &odd.image()).await?;
            assert!(matches!(reply.status.as_u16(), 400 | 503), "{missing}: {}", reply.text);
        }
        let narrow = ("registry.allow_networks", "127.0.0.2/32");
        let why = import(&[("registry.plain_http", listed.as_str()), narrow], &odd.image()).await?;
        assert!(why.refused(400, "invalid_parameter").contains("isn't public"), "{}", why.text);
    }
    assert!(!tokens.seen().is_empty());
    Ok(())
}
