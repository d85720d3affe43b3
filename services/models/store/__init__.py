"""What models keeps: `checkpoints.py` in Postgres, `files.py` in the object store."""
