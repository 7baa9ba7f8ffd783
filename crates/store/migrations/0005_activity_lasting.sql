-- Whether an entry is forgotten by its age alone: what administrators do isn't crowded out by what programs do.
ALTER TABLE activity ADD COLUMN lasting BIGINT NOT NULL DEFAULT 0;
