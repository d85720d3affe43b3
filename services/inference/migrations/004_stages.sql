-- When the params of a job came, and when and by whom its last attempt was begun.
ALTER TABLE jobs
    ADD COLUMN params_at timestamptz,
    ADD COLUMN taken_at timestamptz,
    ADD COLUMN instance_id text;
