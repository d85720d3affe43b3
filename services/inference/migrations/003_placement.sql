-- Who may use an endpoint; version 0, so that the next word of it fills this in.
ALTER TABLE endpoints
    ADD COLUMN roles text[] NOT NULL DEFAULT '{}',
    ADD COLUMN creator text NOT NULL DEFAULT '';
UPDATE endpoints SET version = 0;

-- Of a job: who started it, with which rights. Another endpoint must be one that they may use.
ALTER TABLE jobs ADD COLUMN starter jsonb;

-- Seconds of one instance that a job of an endpoint takes, measured at the ends of jobs.
CREATE TABLE paces (
    endpoint_id      text PRIMARY KEY,
    seconds_per_job  double precision NOT NULL,
    last_end         timestamptz NOT NULL
);
