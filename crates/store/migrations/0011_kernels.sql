-- The kernel of its image that a VM boots, and that VMs of a snapshot will; NULL: the engine's own.
ALTER TABLE vms ADD COLUMN kernel_digest TEXT;
ALTER TABLE snapshots ADD COLUMN kernel_digest TEXT;
