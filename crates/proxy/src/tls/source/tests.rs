use std::os::unix::fs::PermissionsExt;

use rcgen::{CertificateParams, KeyPair};

use super::*;

fn local(folder: &std::path::Path, domain: &str) -> Keeper {
    Keeper::open(Source::Local { folder: folder.to_owned(), domain: domain.into() }).unwrap()
}

fn own(keeper: &Keeper) -> Vec<u8> {
    keeper.certificates().current().cert[0].to_vec()
}

fn issue(folder: &std::path::Path, name: &str) {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
    fs::write(folder.join("chain.pem"), certificate.pem()).unwrap();
    fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
}

fn files(folder: &std::path::Path) -> Source {
    Source::Files { certificates: folder.join("chain.pem"), key: folder.join("key.pem") }
}

#[test]
fn an_authority_and_its_wildcard_are_made_once_and_their_keys_are_their_owners_only() {
    let folder = tempfile::tempdir().unwrap();
    let first = local(folder.path(), "vm.localhost");
    let again = local(folder.path(), "vm.localhost");
    assert_eq!(first.authority(), again.authority());
    assert_eq!(own(&first), own(&again));
    for (name, mode) in [("ca.key", 0o600), ("wildcard.pem", 0o600), ("ca.pem", 0o644)] {
        let file = fs::metadata(folder.path().join("vm.localhost").join(name)).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, mode, "{name}");
    }
    let other = local(folder.path(), "apps.example");
    assert_ne!(first.authority(), other.authority(), "an authority is for one domain");
}

#[test]
fn a_wildcard_of_no_use_is_made_anew_and_a_good_one_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let mut keeper = local(folder.path(), "vm.localhost");
    let first = own(&keeper);
    keeper.look().unwrap();
    assert_eq!(own(&keeper), first);
    // Somebody else's: what is there isn't what clients would take.
    let other = tempfile::tempdir().unwrap();
    local(other.path(), "vm.localhost");
    let wildcard = std::path::Path::new("vm.localhost/wildcard.pem");
    fs::copy(other.path().join(wildcard), folder.path().join(wildcard)).unwrap();
    keeper.look().unwrap();
    let second = own(&keeper);
    assert_ne!(second, first);
    fs::remove_file(folder.path().join(wildcard)).unwrap();
    keeper.look().unwrap();
    assert_ne!(own(&keeper), second);
}

#[test]
fn a_damaged_authority_is_an_error_and_never_silently_replaced() {
    let folder = tempfile::tempdir().unwrap();
    local(folder.path(), "vm.localhost");
    let key = folder.path().join("vm.localhost/ca.key");
    fs::write(&key, "nonsense").unwrap();
    let source = Source::Local { folder: folder.path().to_owned(), domain: "vm.localhost".into() };
    let said = Keeper::open(source.clone()).unwrap_err().to_string();
    assert!(said.contains("ca.key"), "{said}");
    fs::remove_file(&key).unwrap();
    assert!(Keeper::open(source.clone()).unwrap_err().to_string().contains("ca.key"));
    // A key without a certificate is what a killed first start leaves.
    fs::write(&key, "nonsense").unwrap();
    fs::remove_file(folder.path().join("vm.localhost/ca.pem")).unwrap();
    assert!(Keeper::open(source).is_ok());
}

#[test]
fn files_that_change_are_taken_and_those_of_no_use_are_not() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Keeper::open(files(folder.path())).is_err());
    issue(folder.path(), "a.example");
    let mut keeper = Keeper::open(files(folder.path())).unwrap();
    assert_eq!(keeper.authority(), None);
    let first = own(&keeper);
    let written_at = |seconds| {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for name in ["chain.pem", "key.pem"] {
            fs::File::options().write(true).open(folder.path().join(name)).unwrap().set_modified(at).unwrap();
        }
    };
    issue(folder.path(), "b.example");
    written_at(1_000);
    keeper.look().unwrap();
    let second = own(&keeper);
    assert_ne!(second, first);

    let chain = fs::read(folder.path().join("chain.pem")).unwrap();
    issue(folder.path(), "c.example");
    fs::write(folder.path().join("chain.pem"), chain).unwrap();
    written_at(2_000);
    let said = keeper.look().unwrap_err().to_string();
    assert!(said.contains("key.pem") && said.contains("not the key"), "{said}");
    fs::write(folder.path().join("chain.pem"), "nothing").unwrap();
    written_at(3_000);
    assert!(keeper.look().unwrap_err().to_string().contains("chain.pem"));
    assert_eq!(own(&keeper), second, "the one before stays");
}
