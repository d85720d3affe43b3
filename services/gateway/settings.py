from __future__ import annotations

from shared.settings import ServiceSettings
from shared.webui.settings import WebuiSettings


class Settings(ServiceSettings, frozen=True, kw_only=True):
    """`api_key_sha256`: hex digests of the keys that are let in, separated by commas."""

    api_key_sha256: str
    token_secret: str
    token_seconds: int = 3600
    """How long an access token of POST /auth/token is good for."""
    command_timeout: float = 10.0
    """Seconds to wait for the answer to a command before 504; the command still completes."""
    realtime_timeout: float = 60.0
    """Seconds that the start of a Real-time job waits for its end before it answers 202."""
    upload_check_timeout: float = 20.0
    """Seconds that the PUT which completes an upload waits until its files are looked at."""
    presign_seconds: int = 3600
    upload_presign_seconds: int = 12 * 3600
    max_body_bytes: int = 1024 * 1024
    max_params_bytes: int = 32 * 1024 * 1024
    """For POST /inferences with inline params."""
    esd_compat: bool = False
    """The ESD compatibility profile, see compat.py."""
    endpoint_prefix: str = ""
    """`sd` names endpoints `sd-async-NAME`; empty leaves names as they are given, in the profile it
    is `esd`."""
    webui: WebuiSettings = WebuiSettings()
    """As the workers have it: models are looked for in bodies as they are read there."""
    cors_origin: str = ""
    metrics_port: int = 0
    """Where `/metrics` is, and `/workers` for their discovery; not on the port of the API, whose
    clients have no business with them. 0: nowhere."""
