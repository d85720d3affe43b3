import os

# Read by testcontainers when it is imported. Its reaper is an image that only a registry has; what
# tests start, they stop.
os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
os.environ.setdefault("TESTCONTAINERS_HOST_OVERRIDE", "127.0.0.1")
