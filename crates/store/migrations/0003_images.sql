-- Uploads. upload: what is being uploaded now (rootfs or kernel), so that the next start of the server finds what a killed
-- one left; upload_error: why the last upload came to nothing.
ALTER TABLE images ADD COLUMN kernel_digest TEXT;
ALTER TABLE images ADD COLUMN kernel_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN upload TEXT CHECK (upload IN ('rootfs', 'kernel'));
ALTER TABLE images ADD COLUMN upload_error TEXT;

-- At most one row for each account: its own default image, which goes before everybody's.
CREATE TABLE account_default_images (
    account_id TEXT NOT NULL PRIMARY KEY REFERENCES accounts (id),
    image_id   TEXT NOT NULL REFERENCES images (id)
);
CREATE INDEX account_default_images_by_image ON account_default_images (image_id);
CREATE INDEX vms_existing_by_image ON vms (image_id) WHERE state <> 'DELETED';
