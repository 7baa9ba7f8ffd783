-- imported_from: the registry, the repository and the digest of the manifest that an image's filesystem was made of, as
-- HOST/REPOSITORY@DIGEST. An upload to the image clears it.
ALTER TABLE images ADD COLUMN imported_from TEXT;
CREATE INDEX images_by_import ON images (imported_from);
