-- VMs that run their image's program. lifetime: NULL for a sandbox, which runs what it is told to.
-- host_label: what its public host name begins with; NULL in records of before.
ALTER TABLE vms ADD COLUMN lifetime TEXT CHECK (lifetime IN ('one_time', 'cached'));
ALTER TABLE vms ADD COLUMN host_label TEXT;
ALTER TABLE vms ADD COLUMN port BIGINT CHECK (port BETWEEN 1 AND 65535);
ALTER TABLE vms ADD COLUMN volume_gb BIGINT CHECK (volume_gb > 0);
CREATE UNIQUE INDEX vms_by_host_label ON vms (host_label) WHERE host_label IS NOT NULL;
-- Pages of lists with deleted VMs in them.
CREATE INDEX vms_by_account ON vms (account_id, created_at, id);
