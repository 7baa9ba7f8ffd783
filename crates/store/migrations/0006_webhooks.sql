-- Webhooks, and what is to be delivered to them.

CREATE TABLE webhooks (
    id               TEXT   NOT NULL PRIMARY KEY,
    account_id       TEXT   NOT NULL REFERENCES accounts (id),
    name             TEXT   NOT NULL,
    url              TEXT   NOT NULL,
    enabled          BIGINT NOT NULL,
    event_types      TEXT   NOT NULL CHECK (event_types LIKE ',%,'), -- each between commas
    secret           TEXT   NOT NULL CHECK (secret <> ''),
    old_secret       TEXT,
    old_secret_until BIGINT,
    created_at       BIGINT NOT NULL,
    updated_at       BIGINT NOT NULL,
    failing_since    BIGINT,
    disabled_reason  TEXT   CHECK (disabled_reason IN ('gone', 'failing')),
    dropped          BIGINT NOT NULL DEFAULT 0
);
CREATE INDEX webhooks_by_account ON webhooks (account_id, created_at);

-- No foreign key: an event must not fail because a webhook goes at that moment. What is left of one is pruned.
CREATE TABLE webhook_deliveries (
    id           TEXT   NOT NULL PRIMARY KEY,
    webhook_id   TEXT   NOT NULL,
    event_id     TEXT   NOT NULL,
    event_type   TEXT   NOT NULL,
    body         TEXT   NOT NULL,
    state        TEXT   NOT NULL CHECK (state IN ('pending', 'delivered', 'failed')),
    created_at   BIGINT NOT NULL,
    due_at       BIGINT NOT NULL,
    lease        TEXT,
    leased_until BIGINT NOT NULL DEFAULT 0,
    attempts     BIGINT NOT NULL DEFAULT 0,
    history      TEXT   NOT NULL DEFAULT '[]' -- the latest attempts, as JSON
);
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (webhook_id, state, due_at);
CREATE INDEX webhook_deliveries_by_age ON webhook_deliveries (webhook_id, created_at, id);
