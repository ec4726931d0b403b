"""Orbax's checkpoint managers, of one process and of many, and when a checkpoint of theirs counts: once it is on disk.
"""

import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from bd3lm_jax.core import files

TRASH = ".trash"  # where orbax moves a step before deleting it
UNFINISHED_MARK = ".orbax-checkpoint-tmp"  # in the names of directories that orbax does not take for steps, and removes


class SyncedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A step that gets its name only once its files are on the disk, and that counts only once the name is.

    Orbax writes in STEP.PART.PART and, when all is written, renames that to STEP.PART. It deletes older steps and says
    that it is done after `finalize`, in the background.
    """

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> ocp.path.atomicity.AtomicRenameTemporaryPath:
        return super().from_final(final_path.with_name(final_path.name + UNFINISHED_MARK), **options)

    def get_final(self) -> Any:
        written = super().get_final()
        return written.with_name(written.name.removesuffix(UNFINISHED_MARK))

    async def finalize(self) -> None:
        await super().finalize()
        written = super().get_final()
        files.sync_tree(written)
        os.replace(written, self.get_final())
        files.sync(written.parent)


def open_manager(directory: Path, read_only: bool, **options: Any) -> ocp.CheckpointManager:
    """Of all processes together one that writes, of each alone one that reads."""
    if not read_only:
        options |= {"cleanup_tmp_directories": True, "todelete_subdir": TRASH, "temporary_path_class": SyncedPath}
    elif jax.process_count() > 1:
        me = jax.process_index()
        options["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}")
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(read_only=read_only, **options))
