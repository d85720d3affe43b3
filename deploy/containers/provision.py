"""The one-shot of compose.yaml and Nomad: what servers must have before a service can start.

Safe to run again; an upgrade runs it first, while the version before still serves.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from deploy.containers.installation import ContainerInstallation
from deploy.local.provision import provision

SECRETS = Path(os.environ.get("DARKROOM_INSTALLATION_FILE") or "/run/secrets/installation")

if __name__ == "__main__":
    replicas = int(os.environ.get("DARKROOM_STREAM_REPLICAS") or 1)
    asyncio.run(provision(ContainerInstallation.read(SECRETS), replicas=replicas))
