-- Where the bytes of a content lie. Every file of a live checkpoint with this content has this key,
-- whichever checkpoint uploaded it first.
CREATE TABLE contents (
    sha256 text PRIMARY KEY,
    key    text NOT NULL UNIQUE,
    size   bigint NOT NULL
);

-- Objects that no file has any more; they are listed in the transaction that took the last one.
CREATE TABLE doomed_keys (
    key text PRIMARY KEY
);

CREATE INDEX checkpoints_by_file ON checkpoints USING gin (files jsonb_path_ops)
    WHERE NOT deleted;
