#![allow(dead_code, reason = "each test program uses a part of it")]
//! Programs in VMs as clients outside reach them: through the ingress of a [`Site`], by curl.

use std::{fs, net::SocketAddr, process::Command};

use serde_json::Value;
use tiffin_types::id::VmId;

use crate::{harness::eventually, server::Site};

/// A port of a VM as a client outside sees it.
pub(crate) struct Outside<'a> {
    site: &'a Site,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) hostname: String,
    pub(crate) url: String,
    pub(crate) address: SocketAddr,
    /// The certificate of the ingress's own authority.
    pub(crate) authority: String,
}

impl<'a> Outside<'a> {
    /// A port that is given a URL.
    pub(crate) async fn expose(site: &'a Site, id: &VmId, port: u16) -> Self {
        let exposed = site.ask("PUT", &format!("/v1/vms/{id}/ports/{port}"), None).await;
        assert_eq!(exposed.status, 200, "{exposed:?}");
        let (hostname, url) = (text(&exposed.body, "hostname"), text(&exposed.body, "url"));
        let named = Self::named(site, &hostname).await;
        assert_eq!(named.url, url);
        named
    }

    /// What has that host name.
    pub(crate) async fn named(site: &'a Site, hostname: &str) -> Self {
        let ingress = site.ask("GET", "/v1/ingress", None).await.body;
        let (folder, authority) = (tempfile::tempdir().unwrap(), text(&ingress, "caCertificate"));
        fs::write(folder.path().join("ca.pem"), &authority).unwrap();
        let port = u16::try_from(ingress["port"].as_u64().unwrap()).unwrap();
        let url = format!("https://{hostname}:{port}/");
        Self { site, folder, hostname: hostname.to_owned(), url, address: ([127, 0, 0, 1], port).into(), authority }
    }

    /// What curl gets, which trusts nothing but the ingress's own authority: the status, and the answer with its head.
    pub(crate) async fn curl(&self, path: &str, more: &[&str]) -> (u16, String) {
        let (authority, body) = (self.folder.path().join("ca.pem"), self.folder.path().join("body"));
        let resolve = format!("{}:{}:127.0.0.1", self.hostname, self.address.port());
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-i", "--max-time", "280", "-w", "%{http_code}", "--noproxy", "*", "--resolve", &resolve]);
        curl.arg("--cacert").arg(authority).arg("-o").arg(&body).args(more).arg(format!("{}{path}", self.url));
        let out = tokio::task::spawn_blocking(move || curl.output().unwrap()).await.unwrap();
        assert!(out.status.success(), "{}\n{}", String::from_utf8_lossy(&out.stderr), self.site.log());
        let status = String::from_utf8(out.stdout).unwrap().parse().unwrap();
        (status, String::from_utf8_lossy(&fs::read(body).unwrap()).into_owned())
    }

    pub(crate) async fn until_listening(&self, path: &str) {
        eventually("the program listens", async || self.curl(path, &[]).await.0 != 502).await;
    }
}

fn text(body: &Value, name: &str) -> String {
    body[name].as_str().unwrap_or_else(|| panic!("{name} in {body}")).to_owned()
}
