"""Exits with 0 if this container's process says that it is ready.

Runs every few seconds in every container, so it imports next to nothing: `python -IS`."""

import os
import socket
import sys

port = int(os.environ["DARKROOM_HTTP_PORT"])
try:
    with socket.create_connection(("127.0.0.1", port), 3) as connection:
        connection.sendall(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        status = connection.makefile("rb").readline().split()[1]
except (OSError, IndexError) as error:
    sys.exit(f"no answer: {error}")
sys.exit(0 if status == b"200" else "not ready")
