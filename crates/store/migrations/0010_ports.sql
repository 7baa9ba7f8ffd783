-- Ports of VMs that are reached from outside. label: what the host name that leads there begins with.
CREATE TABLE ports (
    label      TEXT   NOT NULL PRIMARY KEY CHECK (length(label) = 26),
    vm_id      TEXT   NOT NULL REFERENCES vms (id),
    port       BIGINT NOT NULL CHECK (port BETWEEN 1 AND 65535),
    created_at BIGINT NOT NULL,
    UNIQUE (vm_id, port)
);
