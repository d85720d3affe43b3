"""One function per command: load, decide, save, emit. Below them, what models does unasked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence, Set
from datetime import timedelta

from msgspec.structs import replace

from services.models.domain import (
    INITIAL,
    Checkpoint,
    check_id,
    check_parts,
    check_type,
    check_uploads,
    check_urls,
    likely_names,
)
from services.models.store.checkpoints import CheckpointStore
from services.models.store.contents import ContentStore
from services.models.store.files import FileStore
from shared.contracts import models
from shared.contracts.models import CREATING, CheckpointFile
from shared.errors import Rejected, Retry
from shared.logs import get_logger
from shared.unit_of_work import Tx

log = get_logger(__name__)

Wake = Callable[[], Awaitable[None]]


async def create_checkpoint(
    cmd: models.CreateCheckpoint, tx: Tx, *, files: FileStore, wake: Wake, schemes: Set[str]
) -> None:
    if bool(cmd.filenames) == bool(cmd.urls):
        raise Rejected("models.invalid", field="filenames", detail="give either it or urls")
    check_uploads(cmd.filenames)
    check_urls(cmd.urls, schemes)
    checkpoint = Checkpoint(
        checkpoint_id=check_id(cmd.checkpoint_id),
        type=check_type(cmd.checkpoint_type),
        names=[file.filename for file in cmd.filenames] or likely_names(cmd.urls),
        status=CREATING if cmd.urls else INITIAL,
        s3_location=files.location(cmd.checkpoint_type, cmd.checkpoint_id),
        bucket=files.bucket,
        files=[],
        urls=cmd.urls,
        creator=cmd.creator,
        message=cmd.message,
        params=cmd.params,
        allowed_roles_or_users=cmd.allowed_roles_or_users,
        created_at=tx.now,
    )
    if await CheckpointStore(tx.conn).find(cmd.checkpoint_id):
        raise Rejected("models.invalid", field="checkpoint_id", detail="it is used already")
    if cmd.urls:
        await _create_from_urls(checkpoint, tx)
        tx.after_commit.append(wake)
    else:
        await _create_for_upload(checkpoint, cmd.filenames, tx, files)


async def _create_from_urls(checkpoint: Checkpoint, tx: Tx) -> None:
    """What the files are really called is known, and claimed, when their bytes come."""
    store = CheckpointStore(tx.conn)
    await store.check_names_free(checkpoint.type, checkpoint.names, checkpoint.checkpoint_id)
    await store.save(checkpoint)
    tx.emit(models.CheckpointCreated.of(checkpoint))


async def _create_for_upload(
    checkpoint: Checkpoint, filenames: Sequence[models.UploadFile], tx: Tx, files: FileStore
) -> None:
    store = CheckpointStore(tx.conn)
    await files.abort_uploads(checkpoint)  # of a delivery of this command that died half-way
    await store.claim_names(checkpoint.type, checkpoint.names, checkpoint.checkpoint_id)
    async with files.begin_uploads(checkpoint, filenames) as uploads:
        begun = replace(
            checkpoint,
            multipart_upload=uploads,
            files=[CheckpointFile(filename=name, key=up.key) for name, up in uploads.items()],
        )
        await store.save(begun)
    tx.emit(models.CheckpointCreated.of(begun))


async def complete_checkpoint(
    cmd: models.CompleteCheckpoint, tx: Tx, *, files: FileStore, wake: Wake
) -> None:
    """Looks at the parts of every file before it puts the first one together."""
    store = CheckpointStore(tx.conn)
    checkpoint = await store.get(cmd.checkpoint_id)
    checkpoint.check_tags(cmd.multi_parts_tags)
    ready = []
    for filename, upload in checkpoint.multipart_upload.items():
        parts = await files.list_parts(upload)
        if parts is not None:
            given = cmd.multi_parts_tags[filename]
            tags = check_parts(filename, upload.parts_number, given, parts)
            ready.append((filename, upload, tags))
        elif await files.size(upload.key) is None:
            raise Rejected("models.part_mismatch", filename=filename, detail="its upload is gone")
        # else: a delivery that died before its commit has checked the parts and completed them
    for filename, upload, tags in ready:
        await files.complete(filename, upload, tags)
    uploaded = checkpoint.complete([await _measure(file, files) for file in checkpoint.files])
    await store.save(uploaded)
    tx.emit(models.CheckpointUploaded.of(uploaded))
    tx.after_commit.append(wake)


async def _measure(file: CheckpointFile, files: FileStore) -> CheckpointFile:
    size = await files.size(file.key)
    if size is None:
        raise Retry(f"{file.key} is not there yet")
    return replace(file, size=size)


async def rename_checkpoint(cmd: models.RenameCheckpoint, tx: Tx) -> None:
    store = CheckpointStore(tx.conn)
    checkpoint = await store.get(cmd.checkpoint_id)
    renamed = checkpoint.rename(cmd.name)
    if renamed.names == checkpoint.names:
        return
    await store.claim_names(checkpoint.type, renamed.names, checkpoint.checkpoint_id)
    await store.release_names(checkpoint.checkpoint_id, keep=renamed.names)
    await store.save(renamed)
    tx.emit(models.CheckpointChanged.of(renamed))


async def set_checkpoint_status(cmd: models.SetCheckpointStatus, tx: Tx) -> None:
    store = CheckpointStore(tx.conn)
    checkpoint = await store.get(cmd.checkpoint_id)
    switched = checkpoint.switch(cmd.status)
    if switched.status == checkpoint.status:
        return
    await store.save(switched)
    tx.emit(models.CheckpointChanged.of(switched))


async def retry_checkpoint(cmd: models.RetryCheckpoint, tx: Tx, *, wake: Wake) -> None:
    store = CheckpointStore(tx.conn)
    checkpoint = await store.get(cmd.checkpoint_id)
    retried = checkpoint.retry()
    await store.check_names_free(checkpoint.type, retried.names, checkpoint.checkpoint_id)
    if not await store.begin_again(checkpoint.checkpoint_id):
        raise Retry(f"what is left of {checkpoint.checkpoint_id} is still being removed")
    await store.save(retried)
    tx.emit(models.CheckpointRetried.of(retried))
    tx.after_commit.append(wake)


async def delete_checkpoints(cmd: models.DeleteCheckpoints, tx: Tx, *, wake: Wake) -> None:
    """All that exist; their bytes go after the commit, by the upkeep."""
    store = CheckpointStore(tx.conn)
    for checkpoint_id in sorted(set(cmd.checkpoint_ids)):  # one order for all: no deadlock
        checkpoint = await store.find(checkpoint_id)
        if checkpoint and not checkpoint.deleted:
            await _delete(checkpoint, tx)
            tx.after_commit.append(wake)


async def resync(_: models.ResyncModels, tx: Tx) -> None:
    for checkpoint in await CheckpointStore(tx.conn).list_all(with_deleted=True):
        tx.emit(models.CheckpointSynced.of(checkpoint))


async def accept(
    checkpoint_id: str, holder: str, files: list[CheckpointFile], replaced: Sequence[str], tx: Tx
) -> None:
    """Its files are here and were looked at. `replaced`: keys of files that others stand for now.
    Like its siblings it does nothing if the checkpoint was deleted meanwhile or another process has
    taken over."""
    checkpoint = await _held(checkpoint_id, holder, tx)
    if checkpoint:
        active = checkpoint.activate(await _place(files, replaced, tx))
        await CheckpointStore(tx.conn).release_names(checkpoint_id, keep=active.names)
        await _end_intake(active, holder, tx)
        tx.emit(models.CheckpointActivated.of(active))


async def refuse(
    checkpoint_id: str, holder: str, files: list[CheckpointFile], reason: str, tx: Tx
) -> None:
    """One of its files would do harm."""
    checkpoint = await _held(checkpoint_id, holder, tx)
    if checkpoint:
        refused = checkpoint.refuse(await _place(files, [], tx), reason)
        await _end_intake(refused, holder, tx)
        tx.emit(models.CheckpointRefused.of(refused))


async def fail(checkpoint_id: str, holder: str, reason: str, tx: Tx) -> None:
    """One of its files can't be had, or is not what was declared."""
    checkpoint = await _held(checkpoint_id, holder, tx)
    if checkpoint:
        failed = checkpoint.fail(reason)
        await CheckpointStore(tx.conn).release_names(checkpoint_id)
        await _end_intake(failed, holder, tx)
        tx.emit(models.CheckpointFailed.of(failed))


async def _held(checkpoint_id: str, holder: str, tx: Tx) -> Checkpoint | None:
    store = CheckpointStore(tx.conn)
    if not await store.holds_lease(holder, checkpoint_id):
        return None
    return await store.get(checkpoint_id)


async def _end_intake(checkpoint: Checkpoint, holder: str, tx: Tx) -> None:
    store = CheckpointStore(tx.conn)
    await store.save(checkpoint)
    await store.end_lease(holder, checkpoint.checkpoint_id)


async def _place(
    files: Sequence[CheckpointFile], replaced: Sequence[str], tx: Tx
) -> list[CheckpointFile]:
    """Each file with the key under which its content lies; a second object with the same content
    is not needed."""
    contents = ContentStore(tx.conn)
    placed = [replace(file, key=await contents.claim(file)) for file in files]
    needed = {file.key for file in placed}
    await contents.doom(*{file.key for file in files} - needed, *replaced)
    return placed


async def expire_uploads(hours: float, tx: Tx) -> None:
    """Deletes what was begun and never completed, so that its name and its bytes are free."""
    expired = await CheckpointStore(tx.conn).lock_expired(tx.now - timedelta(hours=hours), 100)
    for checkpoint in expired:
        log.info("upload_expired", checkpoint_id=checkpoint.checkpoint_id)
        await _delete(checkpoint, tx, f"the upload was not completed within {hours:g} hours")


async def _delete(checkpoint: Checkpoint, tx: Tx, reason: str | None = None) -> None:
    store = CheckpointStore(tx.conn)
    deleted = checkpoint.delete(reason)
    await store.release_names(checkpoint.checkpoint_id)
    await store.save(deleted)
    tx.emit(models.CheckpointDeleted.of(deleted))
