"""Saving and restoring runs: whole, verified, on any mesh. Only managers.py and this use orbax.

`WORKDIR/checkpoints/STEP/` holds the items `params`, `ema` (absent if the average is off), `opt` (step and optimiser
state), `noise` (absent if the noise is fixed) and `meta` (JSON). `meta` records shape, dtype and fingerprint of every
array: orbax does not notice a flipped bit in array data, and its shape errors do not name the array.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from bd3lm_jax.checkpoints.checkpoint_selection import LATEST, DamagedCheckpoint, StepSelector, cause_of
from bd3lm_jax.checkpoints.checkpoint_selection import CheckpointNotFound as CheckpointNotFound
from bd3lm_jax.checkpoints.orbax_managers import TRASH, open_manager
from bd3lm_jax.core import files
from bd3lm_jax.core.errors import RunError, UserError
from bd3lm_jax.core.log import note
from bd3lm_jax.core.state import TrainState
from bd3lm_jax.parallel import distributed, replicas
from bd3lm_jax.parallel.fingerprint import fingerprints_by_device, named_leaves

FORMAT = 1  # of the meta item
DAMAGED = ".damaged"  # where steps that could not be read are put when a run goes on without them
MAX_LEAVES_NAMED = 5  # differing leaves named in an error
MAX_RETRIES = 10  # at a directory that another process changes

T = TypeVar("T")

# Orbax logs every failure with tracebacks, often several times, before it raises the exception that is reported here.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)


@dataclasses.dataclass
class _KeepLowestBounds:
    """Preserves the `count` steps of the lowest `bounds` (nats by step; a step without one is never among them)."""

    bounds: dict[int, float]
    count: int

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        chosen = _steps_by_bound(self.bounds, [info.step for info in checkpoints])[:self.count]
        return [info.step in chosen for info in checkpoints]


class Checkpoints:
    """The checkpoints of a run directory: the `keep` latest ones stay, and the `keep_best` ones of the lowest bound.

    Only a step that was validated before it was saved has a bound. `read_only` is for evaluation beside a run that may
    be writing: nothing is created, moved or deleted. `warn` gets one line for every step that had to be skipped.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int, read_only: bool = False,
                 warn: Callable[[str], None] = note, keep_best: int = 0):
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._read_only = read_only
        self._warn = warn
        self._manager: Any = None  # of orbax; None where a reader finds nothing
        self._reader: Any = None  # of this process alone
        self._bounds: dict[int, float] = {}  # nats a token by step, of the steps that were validated
        self._writing = False  # a save in the background of which `check` has not heard
        if read_only and not self.directory.is_dir():
            return
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.sync(self.directory.parent)
            self._empty_trash()
        options = {} if read_only else {"preservation_policy": checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.LatestN(keep), _KeepLowestBounds(self._bounds, keep_best)])}
        self._manager = self._retry(lambda: open_manager(self.directory, read_only, **options))
        if not read_only and jax.process_count() > 1:
            self._reader = open_manager(self.directory, True)
        if keep_best:
            self._read_bounds()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # else what is in flight came first, and tells why
                raise

    def steps(self) -> list[int]:
        """Steps that were saved completely, ascending (their contents are verified by a restore)."""
        return sorted(self._retry(lambda: self._manager.all_steps(read=self._read_only))) if self._manager else []

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the lowest bound, the later of two that are alike; None if no step there was validated."""
        self._read_bounds()
        return next(iter(_steps_by_bound(self._bounds, self.steps())), None)

    def save(self, step: int, state: TrainState, meta: dict, wait: bool = False, bound: float | None = None) -> None:
        """Save `state` and `meta` (JSON values) as `step`; writing goes on in the background unless `wait`.

        bound: nats a token of a validation of this very step, the same text and noise as at other steps, if there was
        one. The arrays may be donated as soon as this returns. Raises RunError if this or the previous save failed, if
        `step` exists, or if the replicas of an array differ: then nothing is written.
        """
        self.wait()
        if step in self.steps():
            raise RunError(f"step {step} is already saved in {self.directory}: a checkpoint is never overwritten")
        items = items_of(state)
        sums = replicas.check(items, f"nothing is saved at step {step}")
        leaves = {name: {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype),
                                "fingerprint": sums[f"{name}/{path}"]} for path, leaf in named_leaves(tree)}
                  for name, tree in items.items()}
        bound = bound if bound is not None and math.isfinite(bound) else None
        self._bounds.pop(step, None)  # of a step that was damaged and is saved anew
        record = _with_hash({"format": FORMAT, "step": step, "meta": meta, "leaves": leaves, "bound": bound})
        if bound is not None:
            self._bounds[step] = bound
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            saved = self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(record), **arguments))
        except Exception as error:
            self._raise_save_failed(error)
        if not saved:
            raise RunError(f"step {step} was not saved in {self.directory}: it has a later step, {self.latest_step()}")
        self._writing = True
        if wait:
            self.wait()

    def restore(self, abstract_state: TrainState, which_step: int | str = LATEST) -> tuple[TrainState, dict]:
        """The newest checkpoint that can be read, and its `meta`.

        `abstract_state`: TrainState of ShapeDtypeStruct with shardings, of any mesh. Steps that are half-written or
        corrupt are skipped with a warning and moved to `checkpoints/.damaged` (unless read-only). `which_step`: a
        number or "best" for that step and no other. Raises UserError if there is no such checkpoint or if it is one of
        another model (differing arrays named), RunError if none can be read.
        """
        expected = items_of(abstract_state)

        def read(step: int) -> tuple[TrainState, dict]:
            trees, record = self._read(
                step, lambda recorded_arrays: expected | {x: {}
                                                          for x in recorded_arrays if x not in expected})
            state = TrainState(step=trees["opt"]["step"], params=trees["params"], ema=trees.get("ema", {}),
                               opt_state=trees["opt"]["state"], noise=trees.get("noise", {}))
            return state, record["meta"]

        result, _ = self._restore_selected(which_step, read)
        return result

    def restore_params(self, which: str, abstract: Any, which_step: int | str = LATEST) -> tuple[Any, dict, int]:
        """Only the weights `which` ("ema" or "params"): (tree, meta, step); "ema" means "params" if no EMA was kept.

        `abstract`: the parameter tree of ShapeDtypeStruct; a leaf without sharding goes to the first device.
        `which_step` and errors as in `restore`.
        """
        if which not in ("ema", "params"):
            raise UserError(f"weights are {which!r}, expected 'ema' or 'params'")

        def read(step: int) -> tuple[Any, dict]:
            trees, record = self._read(
                step, lambda recorded_arrays: {which if which in recorded_arrays else "params": abstract})
            (tree,) = trees.values()
            return tree, record["meta"]

        (tree, meta), step = self._restore_selected(which_step, read)
        return tree, meta, step

    def check(self) -> None:
        """For every step, at no cost: raises RunError as soon as a save in the background has failed."""
        if self._writing and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until everything handed to `save` is on disk. Raises RunError if it is not."""
        if self._manager is None or self._read_only:
            return
        self._writing = False
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._raise_save_failed(error)
        self._empty_trash()

    def close(self) -> None:
        """`wait`, then let go of threads and files. Raises RunError as `wait` does."""
        try:
            self.wait()
        finally:
            for manager in (self._manager, self._reader):
                if manager is not None:
                    manager.close()

    def _restore_selected(self, which: int | str, read: Callable[[int], T]) -> tuple[T, int]:
        """`read(step)` of the step that was asked for, and that step."""
        choice = StepSelector(self.directory, self.steps, self.best_step, self._warn)
        found, step, damaged = choice.read(which, read)
        self._set_aside(damaged)
        return found, step

    def _read_bounds(self) -> None:
        """Learn the bounds of the steps that are there; one whose meta cannot be read has none."""
        for step in sorted(set(self.steps()) - self._bounds.keys()):
            try:
                bound = self._record(step).get("bound")
            except Exception:  # what is damaged is told when it is restored
                continue
            if bound is not None:
                self._bounds[step] = bound

    def _record(self, step: int) -> dict:
        """The verified contents of the meta item."""
        stored = self._restore_items(step, meta=ocp.args.JsonRestore())["meta"]
        if not isinstance(stored, dict) or _with_hash(stored.get("record")) != stored:
            raise DamagedCheckpoint("meta does not match its hash")
        record = stored["record"]
        if record["format"] != FORMAT:
            raise UserError(f"checkpoint {self.directory / str(step)} has format {record['format']}, this version "
                            f"reads {FORMAT}: install the version that wrote it")
        return record

    def _restore_items(self, step: int, **arguments: Any) -> Any:
        """Items of a step. No process waits for another: a barrier would wait for ever for one that cannot read."""
        return (self._reader or self._manager).restore(step, args=ocp.args.Composite(**arguments))

    def _read(self, step: int, select_items: Callable[[list[str]], dict[str, Any]]) -> tuple[dict[str, Any], dict]:
        """Abstract trees by item, as `select_items` says of the items that are there -> these, and the record, against
        which they are checked before and after reading. What one of many processes cannot read, none of them can."""
        record, trees, error = {}, {}, None
        try:
            record = self._record(step)
            abstract = select_items(list(record["leaves"]))
            self._check_fits(step, {name: record["leaves"].get(name, {}) for name in abstract}, abstract)
            trees = dict(self._restore_items(step, **{name: ocp.args.StandardRestore(_with_default_device(tree))
                                                      for name, tree in abstract.items()}).items())
        except Exception as caught:
            error = caught
        unreadable = "" if error is None or isinstance(error, UserError) else f"cannot read it: {cause_of(error)}"
        _raise_on_any_process(unreadable, error)
        mismatches = [f"finds that {name}/{path} differs from its fingerprint" for name, tree in trees.items()
                      for path, values in fingerprints_by_device(tree).items()
                      if any(value != record["leaves"][name][path]["fingerprint"] for value in values)]
        _raise_on_any_process(mismatches[0] if mismatches else "")
        return trees, record

    def _check_fits(self, step: int, recorded: dict[str, dict], abstract: dict[str, Any]) -> None:
        """UserError that names the arrays whose shape or dtype is not the recorded one."""
        expected_arrays = {f"{name}/{path}": f"{leaf.dtype}{list(leaf.shape)}"
                           for name, tree in abstract.items() for path, leaf in named_leaves(tree)}
        recorded_arrays = {f"{name}/{path}": f"{leaf['dtype']}{leaf['shape']}"
                           for name, leaves in recorded.items() for path, leaf in leaves.items()}
        mismatches = [
            f"{name} is {recorded_arrays.get(name, 'absent')} in the checkpoint, "
            f"{expected_arrays.get(name, 'absent')} in this model"
            for name in {**expected_arrays, **recorded_arrays} if expected_arrays.get(name) != recorded_arrays.get(name)
        ]
        if mismatches:
            more = f"; and {len(mismatches) - MAX_LEAVES_NAMED} more" if len(mismatches) > MAX_LEAVES_NAMED else ""
            raise UserError(f"checkpoint {self.directory / str(step)} is of another model: "
                            f"{'; '.join(mismatches[:MAX_LEAVES_NAMED])}{more}. Use the config it was trained with, or "
                            "another --workdir")

    def _set_aside(self, damaged: list[int]) -> None:
        """Move damaged steps away: they would count as kept ones and stop the run from saving these steps again."""
        if not damaged or self._read_only:
            return
        if jax.process_index() == 0:
            for step in damaged:
                target = self.directory / DAMAGED / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                os.replace(self.directory / str(step), target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()

    def _retry(self, operation: Callable[[], T]) -> T:
        """`operation()` at the directory. Orbax fails if another process deletes a step meanwhile: look again."""
        left = MAX_RETRIES if self._read_only else 1
        while True:
            try:
                return operation()
            except (FileNotFoundError, NotADirectoryError):
                left -= 1
                if not left:
                    raise
                time.sleep(0.01)

    def _empty_trash(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.directory / TRASH, ignore_errors=True)

    def _raise_save_failed(self, error: Exception) -> NoReturn:
        distributed.raise_if_lost_peer(error)  # which no disk space would bring back
        # The tasks of the failed save would report it once more, with tracebacks, when they are collected.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        complete = [int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()]
        last = f"the last complete checkpoint is step {max(complete)}" if complete else "no checkpoint is complete"
        raise RunError(f"could not save a checkpoint to {self.directory}: {cause_of(error)}; {last}. "
                       f"Free some disk space and run the same command again") from error


def _raise_on_any_process(fault: str, error: Exception | None = None) -> None:
    """Raise `error`, or Damaged if this process or another one has found a fault ("": it has not)."""
    found = distributed.allgather_texts(fault)
    if error is not None:
        raise error
    for i, other in enumerate(found):
        if other:
            raise DamagedCheckpoint(other if len(found) == 1 else f"process {i} {other}")


def items_of(state: TrainState) -> dict[str, Any]:
    """The trees that are stored apart, so that an evaluation reads only what it needs."""
    items = {"params": state.params, "ema": state.ema, "opt": {"step": state.step, "state": state.opt_state},
             "noise": state.noise}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _with_default_device(abstract: Any) -> Any:
    """Abstract arrays without a sharding get the first device: else orbax asks for the devices that saved them."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract)


def _steps_by_bound(bounds: dict[int, float], steps: list[int]) -> list[int]:
    """The steps that have a bound, from the lowest on; of two that are alike the later one first."""
    return sorted((step for step in steps if step in bounds), key=lambda step: (bounds[step], -step))


def _with_hash(record: Any) -> dict:
    """The record beside a hash of its canonical JSON."""
    text = json.dumps(record, sort_keys=True)
    return {"record": json.loads(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
