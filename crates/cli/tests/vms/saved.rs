#![allow(dead_code, reason = "each test program uses a part of it")]
//! Saving VMs and making others of what was saved, and programs that are asked whether they went on.

use std::path::PathBuf;

use tiffin_engine::Engine;
use tiffin_types::{
    id::{SnapshotId, VmId},
    vm::{VmSize, VmSpec},
};

use crate::harness::{Host, eventually, sh};

/// Two ends of a connection within the guest, which say what one tells the other.
pub(crate) const TALK: &str = "import os, socket, signal, threading\nserver = socket.create_server(('127.0.0.1', 8000))\n\
    def serve():\n one, _ = server.accept()\n while (word := one.recv(10)): one.send(word)\n\
    threading.Thread(target=serve, daemon=True).start()\n\
    client = socket.create_connection(('127.0.0.1', 8000))\n\
    def tell(*_): client.send(b'echo'); print(client.recv(10).decode(), flush=True)\n\
    signal.signal(signal.SIGUSR1, tell)\nprint('ready', flush=True)\nwhile True: signal.pause()";

/// A small VM.
pub(crate) fn small(host: &Host) -> VmSpec {
    VmSpec { size: VmSize { cpus: 1, mem_mb: 128, disk_mb: 64 }, ..host.spec() }
}

pub(crate) fn another(spec: &VmSpec) -> VmSpec {
    VmSpec { id: VmId::random(), ..spec.clone() }
}

pub(crate) async fn save(host: &Host, id: &VmId) -> SnapshotId {
    let snapshot = SnapshotId::random();
    host.engine.snapshot_save(id, &snapshot).await.unwrap();
    snapshot
}

/// A VM that goes on from the snapshot.
pub(crate) async fn restored(host: &Host, spec: &VmSpec, snapshot: &SnapshotId) -> VmId {
    let clone = another(spec);
    host.engine.create_from(&clone, snapshot).await.unwrap();
    host.engine.start(&clone.id).await.unwrap();
    clone.id
}

pub(crate) fn snapshot_folder(host: &Host, snapshot: &SnapshotId) -> PathBuf {
    host.config.data_dir.join("snapshots").join(snapshot.as_str())
}

/// Starts a program in the guest that outlives the command, and waits until it has written `ready`.
pub(crate) async fn background(host: &Host, id: &VmId, program: &str, ready: &str) {
    let begin = format!(
        "cat > /workspace/program.py <<'END'\n{program}\nEND\nsetsid python3 /workspace/program.py > /workspace/said 2>&1 < /dev/null &"
    );
    sh(&*host.engine, id, &begin).await;
    eventually("the program is ready", async || {
        sh(&*host.engine, id, "cat /workspace/said").await.stdout.contains(ready)
    })
    .await;
}

/// Asks the program by a signal, and gives the answer that it adds.
pub(crate) async fn ask(host: &Host, id: &VmId) -> String {
    let line = "cd /workspace; n=$(wc -l < said); pkill -USR1 -f '[p]rogram.py'; \
                until [ $(wc -l < said) -gt $n ]; do sleep 0.05; done; tail -n +$((n + 1)) said";
    let answer = sh(&*host.engine, id, line).await;
    assert_eq!(answer.done.exit_code, 0, "{answer:?}");
    answer.stdout
}
