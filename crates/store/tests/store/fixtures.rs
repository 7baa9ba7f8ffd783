//! What the cases begin with: an empty database, an account, a VM to be made.

use std::{path::Path, sync::Arc};

use tiffin_store::{Account, Inserted, NewImage, NewVm, Store, Vm};
use tiffin_types::{
    account::Quota,
    id::{AccountId, Digest, ImageId, VmId},
    network::EgressPolicy,
    vm::{EngineName, Isolation, ProvisionMode, VmSize},
};
use tokio::{sync::Barrier, task::JoinSet};

/// An empty database.
pub(crate) struct Db {
    url: String,
}

impl Db {
    pub(crate) fn sqlite(folder: &Path) -> Self {
        Self::at(format!("sqlite://{}/tiffin.db", folder.display()))
    }

    pub(crate) fn at(url: String) -> Self {
        Self { url }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// As one more server opens it.
    pub(crate) async fn open(&self) -> Store {
        Store::open(&self.url).await.unwrap()
    }
}

/// Room for ten VMs of `SIZE`, all up.
pub(crate) const QUOTA: Quota = Quota { vms: 10, cpus: 10, mem_mb: 10_240, disk_mb: 10_240 };
pub(crate) const SIZE: VmSize = VmSize { cpus: 1, mem_mb: 1024, disk_mb: 1024 };

pub(crate) async fn account(store: &Store, name: &str) -> Account {
    store.account_create(name, QUOTA).await.unwrap()
}

pub(crate) fn new_vm(account: &AccountId) -> NewVm {
    NewVm {
        id: VmId::random(),
        account_id: account.clone(),
        image_id: ImageId::random(),
        image_digest: digest(1),
        kernel_digest: None,
        engine: EngineName::Gvisor,
        isolation: Isolation::UserspaceKernel,
        size: SIZE,
        egress: EgressPolicy { outbound_internet: true, allow: vec!["10.1.0.0/16".parse().unwrap()] },
        provision_mode: ProvisionMode::Boot,
        snapshot_id: None,
        service: None,
    }
}

/// A VM that was made: CREATED.
pub(crate) async fn vm(store: &Store, account: &AccountId) -> Vm {
    match store.vm_insert(&new_vm(account), &QUOTA, None).await.unwrap() {
        Inserted::New(vm) => vm,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn digest(number: u8) -> Digest {
    Digest::from_sha256([number; 32])
}

pub(crate) fn new_image(account: Option<&AccountId>, number: u8) -> NewImage {
    NewImage {
        account_id: account.cloned(),
        name: format!("image {number}"),
        description: "Debian 12 – with \"quotes\"".to_owned(),
        digest: Some(digest(number)),
        size_bytes: 5_000_000_000,
        rootfs_bytes: 7_000_000_000,
        config: serde_json::json!({"env": ["A=b"], "n": 1.5, "nul": "\0"}),
    }
}

/// Runs `attempt` for each of `count` at the same time, on two servers' stores by turns; the results.
pub(crate) async fn race<T, F>(stores: [&Store; 2], count: usize, attempt: impl Fn(Store, usize) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    for store in stores {
        connect_all(store).await;
    }
    let together = Arc::new(Barrier::new(count));
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let (run, together) = (attempt(stores[number % 2].clone(), number), together.clone());
        tasks.spawn(async move {
            together.wait().await;
            run.await
        });
    }
    tasks.join_all().await
}

/// Opens every connection of the pool, so that racers don't come one by one as connections do.
async fn connect_all(store: &Store) {
    let mut held = Vec::new();
    for _ in 0..store.pool().options().get_max_connections() {
        held.push(store.pool().acquire().await.unwrap());
    }
}

/// Does something to the database that no store operation does. Every statement is a constant of the tests.
pub(crate) async fn tamper(store: &Store, statement: &'static str) {
    let done = sqlx::query(statement).execute(store.pool()).await.unwrap();
    assert!(done.rows_affected() > 0, "nothing was changed by {statement}");
}
