-- One text for SQLite and Postgres: TEXT and BIGINT only, 0/1 for booleans, milliseconds since 1970 for times, lower-case
-- hexadecimal for hashes. Never edited once released: a change is a new file.

CREATE TABLE accounts (
    id            TEXT   NOT NULL PRIMARY KEY,
    name          TEXT   NOT NULL UNIQUE,
    quota_vms     BIGINT NOT NULL CHECK (quota_vms >= 0),
    quota_cpus    BIGINT NOT NULL CHECK (quota_cpus >= 0),
    quota_mem_mb  BIGINT NOT NULL CHECK (quota_mem_mb >= 0),
    quota_disk_mb BIGINT NOT NULL CHECK (quota_disk_mb >= 0),
    created_at    BIGINT NOT NULL
);

-- At most one row: that the first start happened. Whoever writes it makes the admin account.
CREATE TABLE first_start (
    only_row   BIGINT NOT NULL PRIMARY KEY CHECK (only_row = 1),
    created_at BIGINT NOT NULL
);

CREATE TABLE api_keys (
    id            TEXT   NOT NULL PRIMARY KEY,
    account_id    TEXT   NOT NULL REFERENCES accounts (id),
    name          TEXT   NOT NULL,
    prefix        TEXT   NOT NULL UNIQUE,
    secret_sha256 TEXT   NOT NULL CHECK (length(secret_sha256) = 64),
    scopes        TEXT   NOT NULL CHECK (scopes <> ''),
    created_at    BIGINT NOT NULL,
    expires_at    BIGINT,
    revoked_at    BIGINT,
    last_used_at  BIGINT
);
CREATE INDEX api_keys_by_account ON api_keys (account_id, created_at, id);

CREATE TABLE images (
    id           TEXT   NOT NULL PRIMARY KEY,
    account_id   TEXT   REFERENCES accounts (id),
    name         TEXT   NOT NULL,
    description  TEXT   NOT NULL,
    digest       TEXT,
    size_bytes   BIGINT NOT NULL CHECK (size_bytes >= 0),
    rootfs_bytes BIGINT NOT NULL CHECK (rootfs_bytes >= 0),
    config       TEXT   NOT NULL,
    created_at   BIGINT NOT NULL
);
CREATE INDEX images_by_account ON images (account_id, created_at, id);
CREATE INDEX images_by_digest ON images (digest);

-- At most one row, so that there can't be two default images, whoever races.
CREATE TABLE default_image (
    only_row BIGINT NOT NULL PRIMARY KEY CHECK (only_row = 1),
    image_id TEXT   NOT NULL REFERENCES images (id)
);

-- image_id has no foreign key: the record of a deleted VM outlives its image. What a VM needs of the image is its digest.
CREATE TABLE vms (
    id             TEXT   NOT NULL PRIMARY KEY,
    account_id     TEXT   NOT NULL REFERENCES accounts (id),
    image_id       TEXT   NOT NULL,
    image_digest   TEXT   NOT NULL,
    engine         TEXT   NOT NULL,
    isolation      TEXT   NOT NULL,
    cpus           BIGINT NOT NULL CHECK (cpus > 0),
    mem_mb         BIGINT NOT NULL CHECK (mem_mb > 0),
    disk_mb        BIGINT NOT NULL CHECK (disk_mb > 0),
    egress         TEXT   NOT NULL,
    state          TEXT   NOT NULL CHECK (state IN ('CREATED', 'STARTING', 'RUNNING', 'PAUSED', 'STOPPING', 'STOPPED', 'ERROR', 'DELETED')),
    desired        TEXT   NOT NULL CHECK (desired IN ('running', 'stopped', 'deleted')),
    end_report     TEXT,
    provision_mode TEXT   NOT NULL,
    created_at     BIGINT NOT NULL,
    updated_at     BIGINT NOT NULL,
    started_at     BIGINT,
    deleted_at     BIGINT,
    CHECK ((state = 'DELETED') = (deleted_at IS NOT NULL))
);
-- Records of deleted VMs pile up; lists, quotas and the reconciler must not pay for them.
CREATE INDEX vms_existing ON vms (account_id, created_at, id) WHERE state <> 'DELETED';
CREATE INDEX vms_existing_by_digest ON vms (image_digest) WHERE state <> 'DELETED';
CREATE INDEX vms_by_state ON vms (state);

CREATE TABLE idempotency_keys (
    account_id     TEXT   NOT NULL REFERENCES accounts (id),
    key            TEXT   NOT NULL,
    request_sha256 TEXT   NOT NULL CHECK (length(request_sha256) = 64),
    vm_id          TEXT   NOT NULL REFERENCES vms (id),
    created_at     BIGINT NOT NULL,
    PRIMARY KEY (account_id, key)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
