-- Deleted rows stay as tombstones, so that a projection that is built again learns of the deletion.
-- bytes_deleted: of a deleted or failed checkpoint, nothing is left in the object store.
-- lease_*: the process that downloads a checkpoint in Creating, and until when it is believed.
CREATE TABLE checkpoints (
    checkpoint_id          text PRIMARY KEY,
    type                   text NOT NULL,
    names                  text[] NOT NULL,
    status                 text NOT NULL,
    s3_location            text NOT NULL,
    bucket                 text NOT NULL,
    files                  jsonb NOT NULL,
    multipart_upload       jsonb NOT NULL,
    urls                   text[] NOT NULL,
    creator                text NOT NULL,
    message                text NOT NULL,
    params                 jsonb NOT NULL,
    allowed_roles_or_users text[] NOT NULL,
    created_at             timestamptz NOT NULL,
    error                  text,
    version                integer NOT NULL,
    deleted                boolean NOT NULL,
    bytes_deleted          boolean NOT NULL DEFAULT false,
    lease_by               text,
    lease_until            timestamptz
);
CREATE INDEX checkpoints_in_work ON checkpoints (status, created_at)
    WHERE status IN ('Initial', 'Creating') AND NOT deleted;
CREATE INDEX checkpoints_with_leftovers ON checkpoints (checkpoint_id)
    WHERE (deleted OR status = 'Failed') AND NOT bytes_deleted;

-- The names in use: unique per type among checkpoints that are neither deleted nor failed.
CREATE TABLE checkpoint_names (
    type          text NOT NULL,
    name          text NOT NULL,
    checkpoint_id text NOT NULL,
    PRIMARY KEY (type, name)
);
CREATE INDEX checkpoint_names_by_checkpoint ON checkpoint_names (checkpoint_id);
