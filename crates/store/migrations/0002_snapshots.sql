-- vm_id and image_id have no foreign key: a snapshot outlives its VM, and what it needs of the image is its digest.
-- fork: 1 where it was saved to be cloned at once and belongs to no one; what such a row says decides whether the fork
-- is done (see crates/store/src/snapshots/fork.rs).
-- reserved_mb is what it counts for in the account's disk quota.
CREATE TABLE snapshots (
    id           TEXT   NOT NULL PRIMARY KEY,
    account_id   TEXT   NOT NULL REFERENCES accounts (id),
    vm_id        TEXT   NOT NULL,
    name         TEXT,
    image_id     TEXT   NOT NULL,
    image_digest TEXT   NOT NULL,
    engine       TEXT   NOT NULL,
    cpus         BIGINT NOT NULL CHECK (cpus > 0),
    mem_mb       BIGINT NOT NULL CHECK (mem_mb > 0),
    disk_mb      BIGINT NOT NULL CHECK (disk_mb > 0),
    state        TEXT   NOT NULL CHECK (state IN ('SAVING', 'READY', 'LOST', 'DELETING')),
    fork         BIGINT NOT NULL CHECK (fork IN (0, 1)),
    size_bytes   BIGINT NOT NULL CHECK (size_bytes >= 0),
    reserved_mb  BIGINT NOT NULL CHECK (reserved_mb >= 0),
    created_at   BIGINT NOT NULL,
    updated_at   BIGINT NOT NULL
);
CREATE INDEX snapshots_by_account ON snapshots (account_id, created_at, id);
CREATE INDEX snapshots_by_digest ON snapshots (image_digest);

-- What a VM was restored from; that may be gone since.
ALTER TABLE vms ADD COLUMN snapshot_id TEXT;
CREATE INDEX vms_by_snapshot ON vms (snapshot_id) WHERE snapshot_id IS NOT NULL;
