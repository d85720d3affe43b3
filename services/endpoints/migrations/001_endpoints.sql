-- Deleted rows stay as tombstones, so that a resync tells of them too.
CREATE TABLE endpoints (
    endpoint_id            text PRIMARY KEY,
    endpoint_name          text NOT NULL,
    endpoint_type          text NOT NULL,
    instance_type          text NOT NULL,
    endpoint_status        text NOT NULL,
    autoscaling            boolean NOT NULL,
    max_instance_number    integer NOT NULL,
    current_instance_count integer NOT NULL,
    roles                  text[] NOT NULL,
    creator                text NOT NULL,
    start_time             timestamptz NOT NULL,
    end_time               timestamptz,
    error                  text,
    crashes                integer NOT NULL,
    retry_at               timestamptz,
    released               boolean NOT NULL,
    version                integer NOT NULL,
    deleted                boolean NOT NULL
);
CREATE UNIQUE INDEX endpoints_by_name ON endpoints (endpoint_name) WHERE NOT deleted;
CREATE INDEX endpoints_unreleased ON endpoints (endpoint_id) WHERE NOT released;

-- One row per worker that is wanted. A worker without a row is stopped.
CREATE TABLE instances (
    instance_id text PRIMARY KEY,
    endpoint_id text NOT NULL REFERENCES endpoints,
    status      text NOT NULL,
    device      text NOT NULL,
    started_at  timestamptz NOT NULL,
    ready_at    timestamptz,
    error       text
);
CREATE INDEX instances_by_endpoint ON instances (endpoint_id);
