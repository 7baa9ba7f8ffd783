-- What is kept of uploads that broke off: the bytes are a file of the server's. total_bytes: what the whole file has, if the
-- client said so; digest: its SHA-256, if the client said so; updated_at: when it was last worked on.
CREATE TABLE image_partials (
    image_id       TEXT   NOT NULL REFERENCES images (id),
    part           TEXT   NOT NULL CHECK (part IN ('rootfs', 'kernel')),
    received_bytes BIGINT NOT NULL CHECK (received_bytes >= 0),
    total_bytes    BIGINT,
    digest         TEXT,
    updated_at     BIGINT NOT NULL,
    PRIMARY KEY (image_id, part)
);
