//! A certification authority of the host's own, for one domain and what is below it, and the wildcard that it signs.
//!
//! Invariants: it is made once and never silently again, since people trust it; it can sign for its domain alone, so
//! trusting it is to trust this host with this domain and nothing else.

use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, NameConstraints, PublicKeyData, SerialNumber,
};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
    sign::CertifiedKey,
};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use super::{TlsError, files, provider};

const CA_LIFE: time::Duration = time::Duration::days(3650);
/// Shorter than what any client refuses.
const LEAF_LIFE: time::Duration = time::Duration::days(90);
/// A certificate that ends within so long is made anew.
const RENEWED_BEFORE: Duration = Duration::from_secs(30 * 24 * 3600);
/// Clients' clocks may be behind.
const EARLIER: time::Duration = time::Duration::hours(24);
const SECRET: u32 = 0o600;
const PUBLIC: u32 = 0o644;

/// The authority of one domain.
#[derive(Debug)]
pub(super) struct LocalCa {
    domain: String,
    key: KeyPair,
    certificate: CertificateDer<'static>,
    pem: String,
    /// Where the wildcard and its key are.
    leaf: PathBuf,
}

impl LocalCa {
    /// The authority in `folder`, made if there is none.
    pub(super) fn open(folder: &Path, domain: &str) -> Result<Self, TlsError> {
        let folder = folder.join(domain);
        let failed = |source| TlsError::File { path: folder.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(failed)?;
        let (certificate, key) = (folder.join("ca.pem"), folder.join("ca.key"));
        // The key is written first: one without a certificate is nobody's yet.
        if !certificate.exists() {
            let (pem, new) = make(domain)?;
            files::write(&key, &new.serialize_pem(), SECRET)?;
            files::write(&certificate, &pem, PUBLIC)?;
            tracing::info!(file = %certificate.display(), "the ingress's own certification authority is made");
        }
        files::load(&certificate, &key)?;
        let bad = |path: &Path| TlsError::Content {
            path: path.to_owned(),
            expected: "is damaged: put it back from a backup, or remove its folder to have a new authority made",
        };
        let pem = String::from_utf8(files::read(&certificate)?).map_err(|_| bad(&certificate))?;
        let secret = String::from_utf8(files::read(&key)?).map_err(|_| bad(&key))?;
        Ok(Self {
            domain: domain.to_owned(),
            certificate: CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| bad(&certificate))?,
            key: KeyPair::from_pem(&secret).map_err(|_| bad(&key))?,
            pem,
            leaf: folder.join("wildcard.pem"),
        })
    }

    /// Its certificate, in PEM.
    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    /// The wildcard certificate that is there, or a new one where it is missing, another authority's or about to end.
    /// `None` when it is the one that `before` was.
    pub(super) fn wildcard(&self, before: Option<&CertifiedKey>) -> Result<Option<CertifiedKey>, TlsError> {
        match files::load(&self.leaf, &self.leaf) {
            Ok(there) if self.is_good(&there) => {
                let is_same = before.is_some_and(|before| before.cert == there.cert);
                return Ok((!is_same).then_some(there));
            }
            Ok(_) | Err(_) => {}
        }
        let key = KeyPair::generate()?;
        let issuer = Issuer::new(authority(&self.domain, &self.key), &self.key);
        let leaf = leaf(&self.domain)?.signed_by(&key, &issuer)?;
        files::write(&self.leaf, &format!("{}{}", leaf.pem(), key.serialize_pem()), SECRET)?;
        tracing::info!(domain = self.domain, "a certificate for the ingress is made");
        files::load(&self.leaf, &self.leaf).map(Some)
    }

    /// Whether a client that trusts this authority will take it for some time yet.
    fn is_good(&self, wildcard: &CertifiedKey) -> bool {
        let mut roots = RootCertStore::empty();
        if roots.add(self.certificate.clone()).is_err() {
            return false;
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider()).build();
        let name = ServerName::try_from(format!("x.{}", self.domain));
        let then = UnixTime::since_unix_epoch(Duration::from_secs(UnixTime::now().as_secs()) + RENEWED_BEFORE);
        let (Ok(verifier), Ok(name), Some((own, rest))) = (verifier, name, wildcard.cert.split_first()) else {
            return false;
        };
        verifier.verify_server_cert(own, rest, &name, &[], then).is_ok()
    }
}

/// A new authority's certificate, and its key.
fn make(domain: &str) -> Result<(String, KeyPair), TlsError> {
    let key = KeyPair::generate()?;
    let mut params = authority(domain, &key);
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - EARLIER, now + CA_LIFE);
    params.serial_number = Some(serial());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let permitted_subtrees = vec![GeneralSubtree::DnsName(domain.to_owned())];
    params.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
    let pem = params.self_signed(&key)?.pem();
    Ok((pem, key))
}

/// What a certificate of its says of it: the same at each start, and its own among those of other hosts.
fn authority(domain: &str, key: &KeyPair) -> CertificateParams {
    let hash: [u8; 32] = Sha256::digest(key.der_bytes()).into();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Tiffin");
    let name = format!("Tiffin {} for {domain}", hex::encode(&hash[..4]));
    // The standard's bound for it.
    params.distinguished_name.push(DnType::CommonName, name.chars().take(64).collect::<String>());
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf(domain: &str) -> Result<CertificateParams, TlsError> {
    let mut params = CertificateParams::new(vec![format!("*.{domain}"), domain.to_owned()])?;
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - EARLIER, now + LEAF_LIFE);
    params.serial_number = Some(serial());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "Tiffin ingress");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Positive, as the standard wants it.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}
