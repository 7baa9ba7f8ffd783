-- People, their sessions, what was done, and what was run.

CREATE TABLE users (
    id              TEXT   NOT NULL PRIMARY KEY,
    account_id      TEXT   NOT NULL REFERENCES accounts (id),
    email           TEXT   NOT NULL UNIQUE,
    password_hash   TEXT   NOT NULL CHECK (password_hash <> ''),
    scopes          TEXT   NOT NULL CHECK (scopes <> ''),
    created_at      BIGINT NOT NULL,
    password_set_at BIGINT NOT NULL
);

CREATE TABLE sessions (
    id           TEXT   NOT NULL PRIMARY KEY CHECK (length(id) = 64), -- the token's SHA-256
    user_id      TEXT   NOT NULL REFERENCES users (id),
    created_at   BIGINT NOT NULL,
    last_used_at BIGINT NOT NULL,
    expires_at   BIGINT NOT NULL
);
CREATE INDEX sessions_by_user ON sessions (user_id, created_at);
CREATE INDEX sessions_by_expiry ON sessions (expires_at);

-- Ids are ULIDs in the order of writing. No foreign keys: what was done is remembered longer than who did it.
CREATE TABLE activity (
    id         TEXT   NOT NULL PRIMARY KEY,
    at         BIGINT NOT NULL,
    event      TEXT   NOT NULL,
    actor_kind TEXT   NOT NULL CHECK (actor_kind IN ('key', 'user', 'system', 'anonymous')),
    actor_id   TEXT,
    actor_name TEXT,
    account_id TEXT,
    target     TEXT,
    status     BIGINT,
    request_id TEXT,
    peer       TEXT,
    details    TEXT
);
CREATE INDEX activity_by_age ON activity (at);

CREATE TABLE exec_logs (
    id          TEXT   NOT NULL PRIMARY KEY,
    vm_id       TEXT   NOT NULL,
    at          BIGINT NOT NULL,
    kind        TEXT   NOT NULL CHECK (kind IN ('exec', 'run-ts', 'run-js')),
    outcome     TEXT   NOT NULL CHECK (outcome IN ('exited', 'timed_out', 'abandoned', 'failed')),
    exit_code   BIGINT,
    duration_ms BIGINT NOT NULL,
    truncated   BIGINT NOT NULL,
    actor_kind  TEXT   NOT NULL,
    actor_id    TEXT,
    actor_name  TEXT,
    request_id  TEXT,
    command     TEXT
);
CREATE INDEX exec_logs_by_vm ON exec_logs (vm_id, id);
CREATE INDEX exec_logs_by_age ON exec_logs (at);
