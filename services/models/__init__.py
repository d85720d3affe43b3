"""models: the checkpoint registry: who uploads what, what is in it, whether it may be used.

Owns        schema `models`: checkpoints, checkpoint_names, contents, doomed_keys; everything in the
            models bucket
Accepts     models.create_checkpoint, complete_checkpoint, rename_checkpoint, retry_checkpoint,
            set_checkpoint_status, delete_checkpoints, resync
Emits       models.checkpoint_created, _uploaded, _activated, _changed, _refused, _retried, _failed,
            _deleted, _synced; on progress.<checkpoint id> how far a download has come
Listens to  nobody
Unasked     downloads checkpoints given by URL, unpacks archives and looks at what came in
            (intake.py), drops uploads that were never completed and removes the bytes of what was
            deleted (upkeep.py)
"""
