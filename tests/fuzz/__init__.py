"""Random input, and whether what comes of it is a result or a clear reason."""
