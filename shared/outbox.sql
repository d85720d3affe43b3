-- Plumbing that every schema with an inbox or outbox has. Runs before the schema's own migrations.
CREATE TABLE IF NOT EXISTS inbox (
    message_id  text PRIMARY KEY,
    type        text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS outbox (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id text NOT NULL,
    subject    text NOT NULL,
    body       bytea NOT NULL,
    command_id text,
    created_at timestamptz NOT NULL DEFAULT now(),
    sent_at    timestamptz
);
CREATE INDEX IF NOT EXISTS outbox_unsent ON outbox (id) WHERE sent_at IS NULL;
CREATE INDEX IF NOT EXISTS outbox_command ON outbox (command_id) WHERE command_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS outbox_sent ON outbox (sent_at) WHERE sent_at IS NOT NULL;

CREATE TABLE IF NOT EXISTS attempts (
    message_id text PRIMARY KEY,
    number     integer NOT NULL,
    ended      boolean NOT NULL,
    begun_at   timestamptz NOT NULL DEFAULT now()
);
