"""`compose.yaml`'s one-shot: everything that the servers must have before a service can start.

Safe to run again; an upgrade runs it first, while the version before still serves.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from deploy.containers.installation import ContainerInstallation
from deploy.local.provision import provision

SECRETS = Path("/run/secrets/installation")

if __name__ == "__main__":
    replicas = int(os.environ.get("DARKROOM_STREAM_REPLICAS") or 1)
    asyncio.run(provision(ContainerInstallation.read(SECRETS), replicas=replicas))
