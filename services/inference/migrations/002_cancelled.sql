-- Of a failed job: whether it failed because somebody wanted it no more.
ALTER TABLE jobs ADD COLUMN cancelled boolean NOT NULL DEFAULT false;
