//! Certificates and keys in files.

use std::{
    fs::{self, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::{TlsError, provider};

/// Bytes of a file of certificates or a key.
const MOST: u64 = 1 << 20;

/// What `path` holds, which may be the same file for both.
pub(super) fn load(certificates: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let content = |path: &Path, expected| TlsError::Content { path: path.to_owned(), expected };
    let no_certificate = "must hold a chain of certificates in PEM, the server's own first";
    let pem = read(certificates)?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.ok().filter(|chain| !chain.is_empty()).ok_or_else(|| content(certificates, no_certificate))?;
    let no_key = "must hold a private key in PEM, without a password";
    let private = PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|_| content(key, no_key))?;
    CertifiedKey::from_der(chain, private, &provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            content(key, "is not the key of the certificate: name the two that belong together")
        }
        rustls::Error::General(_) => content(key, "is no key that TLS can use: take one of ECDSA P-256 or RSA"),
        rustls::Error::InvalidCertificate(_) => content(certificates, no_certificate),
        other => TlsError::Library(other),
    })
}

/// A file of bounded size.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MOST).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Writes a file of which there is all or nothing, whatever happens; `mode` says who may read it.
pub(super) fn write(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    let failed = |source| TlsError::File { path: path.to_owned(), source };
    let mut draft = PathBuf::from(path).into_os_string();
    draft.push(".new");
    let draft = PathBuf::from(draft);
    let written = || -> io::Result<()> {
        // What a killed server left has whoever's rights.
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::File::open(folder)?.sync_all()
    };
    written().map_err(failed)
}
