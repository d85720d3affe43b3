-- Deleted rows stay as tombstones: a worker may still report on them.
CREATE TABLE jobs (
    job_id         text PRIMARY KEY,
    owner          text NOT NULL,
    inference_type text NOT NULL,
    task_type      text NOT NULL,
    status         text NOT NULL,
    models         jsonb NOT NULL,
    bucket         text NOT NULL,
    params_key     text NOT NULL,
    endpoint_id    text,
    endpoint_name  text,
    instance_type  text,
    created_at     timestamptz NOT NULL,
    started_at     timestamptz,
    completed_at   timestamptz,
    attempt        integer NOT NULL,
    image_names    text[] NOT NULL,
    info_name      text,
    reason         text,
    seconds        jsonb NOT NULL,
    warnings       text[] NOT NULL,
    version        integer NOT NULL,
    deleted        boolean NOT NULL
);
CREATE INDEX jobs_unfinished ON jobs (endpoint_id) WHERE status = 'inprogress' AND NOT deleted;

-- What deleted jobs still have in S3: noted with the deletion, removed right after it.
CREATE TABLE leftovers (
    job_id   text PRIMARY KEY,
    bucket   text NOT NULL,
    prefixes text[] NOT NULL
);

-- Foreign state, as far as starting a job needs it. The newer version wins.
CREATE TABLE checkpoints (
    checkpoint_id text PRIMARY KEY,
    type          text NOT NULL,
    status        text NOT NULL,
    bucket        text NOT NULL,
    files         jsonb NOT NULL,
    version       integer NOT NULL,
    deleted       boolean NOT NULL
);

CREATE TABLE endpoints (
    endpoint_id            text PRIMARY KEY,
    endpoint_name          text NOT NULL,
    endpoint_type          text NOT NULL,
    instance_type          text NOT NULL,
    endpoint_status        text NOT NULL,
    current_instance_count integer NOT NULL,
    error                  text,
    version                integer NOT NULL,
    deleted                boolean NOT NULL
);
