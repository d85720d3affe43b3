-- Everything here is derived from events and can be rebuilt (truncate, then restart the gateway),
-- but for idempotency_keys.

CREATE TABLE aggregates (
    kind    text NOT NULL,
    id      text NOT NULL,
    version integer NOT NULL,
    deleted boolean NOT NULL,
    state   jsonb NOT NULL,
    PRIMARY KEY (kind, id)
);
CREATE INDEX jobs_newest ON aggregates ((state->>'created_at') DESC)
    WHERE kind = 'job' AND NOT deleted;
CREATE INDEX jobs_by_owner ON aggregates ((state->>'owner'), (state->>'created_at') DESC)
    WHERE kind = 'job' AND NOT deleted;
CREATE INDEX checkpoints_newest ON aggregates ((state->>'created_at') DESC)
    WHERE kind = 'checkpoint' AND NOT deleted;
CREATE INDEX endpoints_by_name ON aggregates ((state->>'endpoint_name'))
    WHERE kind = 'endpoint' AND NOT deleted;

-- How far the log of events has been applied here; shared by all replicas.
CREATE TABLE position (
    stream text PRIMARY KEY,
    seq    bigint NOT NULL
);

CREATE TABLE idempotency_keys (
    command_id  text PRIMARY KEY,
    body_sha256 text NOT NULL,
    answer      jsonb,
    created_at  timestamptz NOT NULL DEFAULT now()
);
