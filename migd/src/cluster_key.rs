//! Who belongs to the cluster: whoever holds the cluster key.
//!
//! The key file is a certificate authority of its own (private key and certificate, PEM, mode 0600).
//! Every process that speaks to another node makes itself a certificate when it starts, signed by that
//! authority, and both ends of every connection must show one: mutual TLS 1.3 and nothing else.
//! Nothing here knows which node is which; the names are told inside the connection.
//!
//! It does not revoke: whoever had the key is a member until the key is changed everywhere.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the key lies unless told otherwise.
pub const DEFAULT_KEY: &str = "/etc/migd/cluster.key";
/// The name in every certificate; which node it is is told inside the connection.
const CERTIFICATE_NAME: &str = "member.migd.internal";
/// A key file larger than this is not one.
const MAX_KEY_FILE: u64 = 64 << 10;

/// Why there is no usable cluster key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file is not there.
    #[error("there is no cluster key at {0}; make one with `mosctl cluster init`, or copy it from a member")]
    Missing(PathBuf),
    /// It is there already, and is never overwritten.
    #[error("there is a cluster key at {0} already; remove it first if you mean to leave that cluster")]
    Exists(PathBuf),
    /// Others could read it.
    #[error("the cluster key {path} is open to others (mode {mode:04o}); change it with `chmod 600 {path}`")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It cannot be read or written.
    #[error("the cluster key {path} cannot be used: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not hold a key and its certificate.
    #[error("{path} is not a cluster key ({what}); copy it again from a member")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A certificate could not be made.
    #[error("a certificate could not be made: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library refuses the key.
    #[error("TLS could not be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// The cluster's key, and the certificate this process has made with it.
pub struct ClusterKey {
    root: CertificateDer<'static>,
    leaf: CertificateDer<'static>,
    leaf_key: PrivatePkcs8KeyDer<'static>,
}

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("ClusterKey(..)")
    }
}

/// The name that a client asks for; every member's certificate has it.
pub fn server_name() -> ServerName<'static> {
    ServerName::try_from(CERTIFICATE_NAME).expect("a constant DNS name")
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Makes a new cluster: writes its key to `path`, which must not exist.
pub fn create(path: &Path) -> Result<(), KeyError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "migd cluster");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    let certificate = params.self_signed(&key)?;
    write_new(path, &format!("{}{}", certificate.pem(), key.serialize_pem()))
}

/// Joins a cluster: checks the key file copied from a member, and installs it at `path`.
pub fn install(from: &Path, path: &Path) -> Result<(), KeyError> {
    let text = read(from)?;
    parse(from, &text)?;
    write_new(path, &text)
}

fn write_new(path: &Path, text: &str) -> Result<(), KeyError> {
    let io = |source| KeyError::Io { path: path.to_path_buf(), source };
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(io)?;
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(
        |source| match source.kind() {
            io::ErrorKind::AlreadyExists => KeyError::Exists(path.to_path_buf()),
            _ => io(source),
        },
    )?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io)
}

fn read(path: &Path) -> Result<String, KeyError> {
    let io = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyError::Missing(path.to_path_buf()),
        _ => KeyError::Io { path: path.to_path_buf(), source },
    };
    let length = fs::metadata(path).map_err(io)?.len();
    if length > MAX_KEY_FILE {
        return Err(KeyError::Malformed { path: path.to_path_buf(), what: format!("{length} bytes long") });
    }
    fs::read_to_string(path).map_err(io)
}

fn parse(path: &Path, text: &str) -> Result<(CertificateDer<'static>, KeyPair), KeyError> {
    let bad = |what: String| KeyError::Malformed { path: path.to_path_buf(), what };
    let root = CertificateDer::from_pem_slice(text.as_bytes())
        .map_err(|error| bad(format!("no certificate: {error}")))?;
    let key = PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|error| bad(format!("no private key: {error}")))?;
    let key = KeyPair::try_from(key.secret_der()).map_err(|error| bad(error.to_string()))?;
    Ok((root, key))
}

impl ClusterKey {
    /// Reads the key file and makes this process' certificate with it.
    pub fn load(path: &Path) -> Result<ClusterKey, KeyError> {
        let text = read(path)?;
        let mode =
            fs::metadata(path).map_err(|source| KeyError::Io { path: path.to_path_buf(), source })?.mode()
                & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Open { path: path.to_path_buf(), mode });
        }
        let (root, authority) = parse(path, &text)?;
        let issuer = Issuer::from_ca_cert_der(&root, authority)?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![CERTIFICATE_NAME.to_string()])?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let leaf = params.signed_by(&key, &issuer)?;
        let leaf_key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok(ClusterKey { root, leaf: leaf.der().clone(), leaf_key })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, KeyError> {
        let mut roots = RootCertStore::empty();
        roots.add(self.root.clone())?;
        Ok(Arc::new(roots))
    }

    fn own_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.leaf_key.clone_key())
    }

    /// For the side that accepts: TLS 1.3, and the client must show a certificate of the cluster.
    pub fn server_config(&self) -> Result<Arc<rustls::ServerConfig>, KeyError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.leaf.clone()], self.own_key())?;
        // A resumed session would outlive a change of key.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// For the side that dials: TLS 1.3, and the server must show a certificate of the cluster.
    pub fn client_config(&self) -> Result<Arc<rustls::ClientConfig>, KeyError> {
        let config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(vec![self.leaf.clone()], self.own_key())?;
        Ok(Arc::new(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A handshake in memory; what each side said about it.
    fn shake(server: &ClusterKey, client: &ClusterKey) -> Result<(), rustls::Error> {
        let mut server =
            rustls::ServerConnection::new(server.server_config().expect("config")).expect("server");
        let mut client =
            rustls::ClientConnection::new(client.client_config().expect("config"), server_name())
                .expect("client");
        for _ in 0..8 {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).expect("to memory");
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                server.read_tls(&mut rest).expect("from memory");
                server.process_new_packets()?;
            }
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).expect("to memory");
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                client.read_tls(&mut rest).expect("from memory");
                client.process_new_packets()?;
            }
        }
        if client.is_handshaking() || server.is_handshaking() {
            return Err(rustls::Error::HandshakeNotComplete);
        }
        Ok(())
    }

    #[test]
    fn members_meet_and_strangers_do_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
        create(&ours).expect("created");
        create(&theirs).expect("created");
        let (a, b) = (ClusterKey::load(&ours).expect("loads"), ClusterKey::load(&ours).expect("loads"));
        let stranger = ClusterKey::load(&theirs).expect("loads");
        shake(&a, &b).expect("members meet");
        shake(&a, &stranger).expect_err("a stranger as client");
        shake(&stranger, &a).expect_err("a stranger as server");
    }

    #[test]
    fn the_file_is_private_whole_and_never_overwritten() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("etc/cluster.key");
        assert!(matches!(ClusterKey::load(&path), Err(KeyError::Missing(_))));
        create(&path).expect("created");
        assert_eq!(fs::metadata(&path).expect("there").mode() & 0o7777, 0o600);
        assert!(matches!(create(&path), Err(KeyError::Exists(_))));
        let copy = folder.path().join("copy");
        install(&path, &copy).expect("installed");
        ClusterKey::load(&copy).expect("loads");
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(matches!(ClusterKey::load(&copy), Err(KeyError::Open { .. })));
        let text = fs::read_to_string(&path).expect("read");
        let cut = folder.path().join("cut");
        fs::write(&cut, &text[..text.len() / 2]).expect("written");
        assert!(matches!(install(&cut, &folder.path().join("new")), Err(KeyError::Malformed { .. })));
    }
}
