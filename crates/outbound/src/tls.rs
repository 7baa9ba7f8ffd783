//! Whose certificates are believed: the system's, and those that the configuration adds.

use std::{io, sync::Arc};

use rustls::{ClientConfig, RootCertStore, crypto::ring};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{net::TcpStream, sync::OnceCell};
use tokio_rustls::{TlsConnector, client::TlsStream};
use url::{Host, Url};

use crate::{OutboundError, Refused};

/// The certificates to believe. The system's are read when they are first needed.
#[derive(Debug, Default)]
pub struct Roots {
    extra: Vec<CertificateDer<'static>>,
    connector: OnceCell<Connector>,
}

struct Connector(TlsConnector);

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connector")
    }
}

/// Certificates can't be used; says which.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadCertificates(String);

impl Roots {
    /// The system's, and those of a PEM file's text.
    ///
    /// # Errors
    /// When the text has no certificate, or one that can't be read.
    pub fn with_extra(pem: &[u8]) -> Result<Self, BadCertificates> {
        let bad = |why: String| BadCertificates(format!("the certificates of the additional authorities: {why}"));
        let extra = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| bad(error.to_string()))?;
        if extra.is_empty() {
            return Err(bad("there is no PEM block of type CERTIFICATE".into()));
        }
        let mut store = RootCertStore::empty();
        for certificate in &extra {
            store.add(certificate.clone()).map_err(|error| bad(error.to_string()))?;
        }
        Ok(Self { extra, connector: OnceCell::new() })
    }

    /// Speaks TLS over `stream`, to the URL's host.
    pub(crate) async fn shake_hands(
        &self,
        url: &Url,
        stream: TcpStream,
    ) -> Result<TlsStream<TcpStream>, OutboundError> {
        let name = match url.host().ok_or(Refused::NoHost)? {
            Host::Domain(name) => ServerName::try_from(name.trim_end_matches('.').to_owned())
                .map_err(|error| OutboundError::Tls(io::Error::new(io::ErrorKind::InvalidInput, error)))?,
            Host::Ipv4(address) => ServerName::IpAddress(std::net::IpAddr::V4(address).into()),
            Host::Ipv6(address) => ServerName::IpAddress(std::net::IpAddr::V6(address).into()),
        };
        let extra = self.extra.clone();
        let connector = self
            .connector
            .get_or_try_init(|| async {
                let read = tokio::task::spawn_blocking(move || connector(extra)).await;
                read.map_err(|error| BadCertificates(error.to_string()))?
            })
            .await?;
        connector.0.connect(name, stream).await.map_err(OutboundError::Tls)
    }
}

fn connector(extra: Vec<CertificateDer<'static>>) -> Result<Connector, BadCertificates> {
    let mut store = RootCertStore::empty();
    // Of the system's certificates those that can be read are enough.
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    store.add_parsable_certificates(extra);
    if store.is_empty() {
        let none = "the host has no certificates of authorities: install the package ca-certificates";
        return Err(BadCertificates(none.into()));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| BadCertificates(error.to_string()))?
        .with_root_certificates(store)
        .with_no_client_auth();
    Ok(Connector(TlsConnector::from(Arc::new(config))))
}
