-- Deleted rows stay as tombstones, so that a name that is used again goes on counting versions.
CREATE TABLE roles (
    role_name   text PRIMARY KEY,
    permissions text[] NOT NULL,
    creator     text NOT NULL,
    is_default  boolean NOT NULL,
    created_at  timestamptz NOT NULL,
    version     integer NOT NULL,
    deleted     boolean NOT NULL
);

CREATE TABLE users (
    username      text PRIMARY KEY,
    password_hash text NOT NULL,
    roles         text[] NOT NULL,
    permissions   text[] NOT NULL,
    creator       text NOT NULL,
    created_at    timestamptz NOT NULL,
    version       integer NOT NULL,
    deleted       boolean NOT NULL
);
CREATE INDEX users_by_role ON users USING gin (roles) WHERE NOT deleted;

CREATE TABLE tokens (
    token_id   text PRIMARY KEY,
    username   text NOT NULL,
    name       text NOT NULL,
    token_hash text NOT NULL,
    created_at timestamptz NOT NULL,
    expires_at timestamptz,
    version    integer NOT NULL,
    deleted    boolean NOT NULL
);
CREATE INDEX tokens_by_user ON tokens (username) WHERE NOT deleted;
