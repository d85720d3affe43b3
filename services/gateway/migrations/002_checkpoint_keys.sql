-- By which a job's params may name a file of a checkpoint, in lower case: its name with and without
-- the suffix of a model file, what its author called it, as the webui shortens a SHA-256, and the
-- kind of a model that restores faces. See shared/webui/titles.py, which chooses among those that
-- are found by one.
CREATE FUNCTION checkpoint_keys(state jsonb) RETURNS text[]
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN ARRAY(
    SELECT lower(name) FROM jsonb_array_elements_text(state->'names') AS names (name)
    UNION
    SELECT regexp_replace(lower(name), '\.(safetensors|ckpt|pt|pth|bin|onnx)$', '')
    FROM jsonb_array_elements_text(state->'names') AS names (name)
    UNION
    SELECT key FROM jsonb_array_elements(state->'files') AS files (file),
        unnest(ARRAY[
            lower(file->'kind'->>'alias'),
            left(lower(file->>'sha256'), 10),
            CASE WHEN state->>'type' = 'FaceRestoration' THEN lower(file->'kind'->>'family') END
        ]) AS keys (key)
    WHERE key <> ''
);

CREATE INDEX checkpoints_by_key ON aggregates USING gin (checkpoint_keys(state))
    WHERE kind = 'checkpoint' AND NOT deleted;
CREATE INDEX checkpoints_by_type ON aggregates ((state->>'type'))
    WHERE kind = 'checkpoint' AND NOT deleted;
