"""gateway: the only process that speaks HTTP to the outside.

Owns        schema `gateway`: a projection of everybody's events, and idempotency keys
Publishes   every command that a client may cause (see shared/contracts/subjects.py)
Listens to  all events, as one ordered consumer per process; progress and previews
Serves      the ESD 1.4.0 API, GET /api (OpenAPI), /docs, Server-Sent Events

A write publishes a command, waits for the event that answers it, and replies from the projection,
which has that event by then. A read never leaves the gateway.
"""
