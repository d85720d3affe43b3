"""models: the checkpoint registry: who uploads what, where its bytes lie, whether it may be used.

Owns        schema `models`: checkpoints, checkpoint_names; everything in the models bucket
Accepts     models.create_checkpoint, complete_checkpoint, rename_checkpoint,
            set_checkpoint_status, delete_checkpoints, resync
Emits       models.checkpoint_created, _activated, _changed, _failed, _deleted, _synced
Listens to  nobody
Unasked     downloads checkpoints given by URL, drops uploads that were never completed, removes
            the bytes of what was deleted
"""
