"""Message type -> function: all that models does when spoken to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Set
from functools import partial

from services.models import commands
from services.models.store.files import FileStore
from shared.bus import Handlers
from shared.contracts import models


def handlers(
    files: FileStore, *, wake: Callable[[], Awaitable[None]], schemes: Set[str]
) -> Handlers:
    """`wake`: there is something to take in or to remove."""
    return {
        models.CreateCheckpoint: partial(
            commands.create_checkpoint, files=files, wake=wake, schemes=schemes
        ),
        models.CompleteCheckpoint: partial(commands.complete_checkpoint, files=files, wake=wake),
        models.RetryCheckpoint: partial(commands.retry_checkpoint, wake=wake),
        models.RenameCheckpoint: commands.rename_checkpoint,
        models.SetCheckpointStatus: commands.set_checkpoint_status,
        models.DeleteCheckpoints: partial(commands.delete_checkpoints, wake=wake),
        models.ResyncModels: commands.resync,
    }
