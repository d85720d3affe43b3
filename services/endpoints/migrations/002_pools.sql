-- The bounds of scaling, and how many instances are wanted between them since when.
ALTER TABLE endpoints
    ADD COLUMN min_instance_number integer NOT NULL DEFAULT 1,
    ADD COLUMN scaled_to integer,
    ADD COLUMN scaled_at timestamptz;
UPDATE endpoints SET scaled_to = max_instance_number, min_instance_number = max_instance_number;
ALTER TABLE endpoints
    ALTER COLUMN min_instance_number DROP DEFAULT,
    ALTER COLUMN scaled_to SET NOT NULL;

-- A process of the version before this one adds endpoints and knows neither; they do not scale.
CREATE FUNCTION fill_scaling() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.min_instance_number := coalesce(NEW.min_instance_number, NEW.max_instance_number);
    NEW.scaled_to := coalesce(NEW.scaled_to, NEW.max_instance_number);
    RETURN NEW;
END $$;
CREATE TRIGGER fill_scaling BEFORE INSERT ON endpoints
    FOR EACH ROW EXECUTE FUNCTION fill_scaling();

-- An endpoint that is being deleted keeps its row until its workers are gone, but not its name.
UPDATE endpoints SET endpoint_status = 'Deleted' WHERE released AND deleted;
UPDATE endpoints SET deleted = false WHERE NOT released AND deleted;
DROP INDEX endpoints_by_name;
CREATE UNIQUE INDEX endpoints_by_name ON endpoints (endpoint_name)
    WHERE NOT deleted AND endpoint_status <> 'Deleting';

-- When a worker that is given up has had its time to finish.
ALTER TABLE instances ADD COLUMN stop_by timestamptz;
