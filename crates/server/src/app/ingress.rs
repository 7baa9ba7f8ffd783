//! The ingress in the server: listening, certificates, routes from the records.

use std::{net::SocketAddr, sync::Arc, sync::OnceLock};

use tiffin_proxy::{
    Listeners, ProxyConfig,
    tls::{Keeper, Source, TlsError},
};
use tiffin_types::account::Scope;
use tokio::net::TcpListener;

use super::{App, auth::Caller};
use crate::{
    config::Config,
    error::{AppError, chain},
};

const HTTPS_PORT: u16 = 443;
/// The port in URLs while nothing listens.
const DEFAULT_PORT: u16 = 3443;

/// The ingress can't begin.
#[derive(Debug, thiserror::Error)]
pub enum IngressError {
    /// The address is taken, or not this host's.
    #[error("can't listen on {address}: stop what does, or set {key} to another address")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The setting that says so.
        key: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No certificate.
    #[error("the ingress has no certificate (ingress.cert_file, ingress.key_file, or the folder ingress in data_dir)")]
    Certificate(#[from] TlsError),
}

/// What the API tells of the ingress.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    port: OnceLock<u16>,
    authority: OnceLock<String>,
}

/// An ingress that listens and doesn't serve yet.
pub(crate) struct Ingress {
    listeners: Listeners,
    keeper: Keeper,
    port: u16,
}

impl Ingress {
    /// Listens as configured, if at all.
    pub(crate) async fn open(config: &Config) -> Result<Option<Self>, IngressError> {
        let Some(address) = config.ingress.listen else { return Ok(None) };
        let tls = listen(address, "ingress.listen").await?;
        let redirect = match config.ingress.http_listen {
            Some(address) => Some(listen(address, "ingress.http_listen").await?),
            None => None,
        };
        let bound = tls.local_addr().map_or(address.port(), |bound| bound.port());
        let port = config.ingress.public_port.unwrap_or(bound);
        let keeper = Keeper::open(source(config))?;
        Ok(Some(Self { listeners: Listeners { tls, redirect }, keeper, port }))
    }

    /// Serves until the shutdown, beside the API.
    pub(crate) fn begin(self, app: &Arc<App>) {
        let Self { listeners, keeper, port } = self;
        let listen = listeners.tls.local_addr().map(|address| address.to_string()).ok();
        app.ingress.port.get_or_init(|| port);
        if let Some(authority) = keeper.authority() {
            app.ingress.authority.get_or_init(|| authority.to_owned());
        }
        let config = ProxyConfig { public_port: port, ..app.config.ingress.proxy.clone() };
        let routes: Arc<dyn tiffin_proxy::Routes> = app.routes.clone();
        let served = tiffin_proxy::serve(config, routes, keeper.certificates(), listeners, app.shutdown.clone());
        app.tasks.spawn(keeper.keep(app.shutdown.clone()));
        app.tasks.spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(error = chain(&error), "the ingress can't begin");
            }
        });
        tracing::info!(listen, domain = app.config.ingress.domain, "the ingress is listening");
    }
}

async fn listen(address: SocketAddr, key: &'static str) -> Result<TcpListener, IngressError> {
    TcpListener::bind(address).await.map_err(|source| IngressError::Listen { address, key, source })
}

fn source(config: &Config) -> Source {
    match &config.ingress.certificate {
        Some((certificates, key)) => Source::Files { certificates: certificates.into(), key: key.into() },
        None => Source::Local { folder: config.data_dir.join("ingress").into(), domain: config.ingress.domain.clone() },
    }
}

/// Fills the table of routes from the records.
pub(crate) async fn load_routes(app: &App) -> Result<(), AppError> {
    app.store.port_prune().await?;
    let ports = app.store.port_list_all().await?;
    for vm in app.store.vm_not_deleted().await? {
        for port in ports.iter().filter(|port| port.vm_id == vm.id) {
            app.routes.set_port(port);
        }
        app.routes.follow(&vm);
    }
    Ok(())
}

/// What is told of the ingress.
pub(crate) struct IngressFacts {
    pub(crate) domain: String,
    /// None while it is off.
    pub(crate) port: Option<u16>,
    /// The certificate of its own authority, in PEM, where it has one.
    pub(crate) authority: Option<String>,
}

/// How VMs are reached from outside.
pub(crate) fn ingress_get(app: &App, caller: &Caller) -> Result<IngressFacts, AppError> {
    caller.require(Scope::Read)?;
    Ok(IngressFacts {
        domain: app.config.ingress.domain.clone(),
        port: app.ingress.port.get().copied(),
        authority: app.ingress.authority.get().cloned(),
    })
}

/// Where a host name is reached.
pub(crate) fn url(app: &App, hostname: &str) -> String {
    match app.ingress.port.get().copied().unwrap_or(DEFAULT_PORT) {
        HTTPS_PORT => format!("https://{hostname}/"),
        port => format!("https://{hostname}:{port}/"),
    }
}
