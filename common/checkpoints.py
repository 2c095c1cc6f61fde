"""Checkpoints: saved whole, verified before they are believed, restored strictly.

    checkpoints/step-00001000/{state.index, state.data-..., manifest.json}
    checkpoints/best.json                              {"step": ..., "loss": ...}

A checkpoint is written into a temporary folder, its files' sizes and CRC-32 go to the manifest, and
a rename makes it visible. So a folder without a manifest that holds is no checkpoint: a kill or a
full disk can cost at most the newest one.
"""

import collections
import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import zlib
from typing import Any, Optional

import tensorflow as tf

from common import runs

_LOG = logging.getLogger(__name__)
_PREFIX = "state"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # What TensorFlow appends to a variable's name.
_NAMED = 5  # Variables that an error lists.


class CheckpointError(RuntimeError):
  """No checkpoint can be restored; the message says what was looked for and found."""


class MisfitError(CheckpointError):
  """The checkpoint is whole, but of another model; the message names the first differences."""


class Checkpoints:
  """The checkpoints of one run.

  Attributes:
    folder: Where they lie.
  """

  def __init__(self, folder: runs.PathLike, max_to_keep: int = 5):
    """`max_to_keep` newest ones stay, and always the best one."""
    self.folder = pathlib.Path(folder)
    self._max_to_keep = max_to_keep

  def steps(self) -> list[int]:
    """Steps of the checkpoints whose manifest is there, increasing; contents not verified."""
    found = []
    for path in self.folder.glob("step-*"):
      match = re.fullmatch(r"step-(\d+)", path.name)
      if match and (path / "manifest.json").is_file():
        found.append(int(match.group(1)))
    return sorted(found)

  def path(self, step: int) -> pathlib.Path:
    """The folder of a step's checkpoint."""
    return self.folder / f"step-{step:08d}"

  def save(
    self, state: tf.train.Checkpoint, step: int, facts: Optional[dict[str, Any]] = None
  ) -> None:
    """Writes a checkpoint whole or not at all, then drops the oldest beyond `max_to_keep`.

    Raises:
      OSError: The disk is full or not writable; the checkpoints before are untouched.
    """
    self.folder.mkdir(parents=True, exist_ok=True)
    self._remove_leftovers()
    temporary = self.folder / f".saving-{runs.unique_id()}"
    temporary.mkdir()
    try:
      try:
        state.write(str(temporary / _PREFIX))
      except tf.errors.OpError as e:
        raise OSError(f"Could not write a checkpoint to {self.folder}: {e.message}") from e
      files = {p.name: _fingerprint(p) for p in sorted(temporary.iterdir())}
      runs.write_json(
        temporary / "manifest.json", {"step": step, "files": files, "facts": facts or {}}
      )
      _sync(temporary)
      target = self.path(step)
      if target.exists():  # Of the same step: an earlier attempt's, maybe damaged.
        shutil.rmtree(target)
      temporary.rename(target)
      _sync(self.folder)
    except BaseException:
      shutil.rmtree(temporary, ignore_errors=True)
      raise
    self._prune()

  def verify(self, step: int) -> Optional[str]:
    """None if the checkpoint's files are those that were saved; otherwise what is wrong."""
    folder = self.path(step)
    try:
      manifest = json.loads((folder / "manifest.json").read_text())
      for name, (size, crc) in manifest["files"].items():
        if not (folder / name).is_file():
          return f"{name} is missing"
        if _fingerprint(folder / name) != [size, crc]:
          return f"{name} is truncated or damaged"
    except (OSError, ValueError, KeyError, TypeError) as e:
      return f"its manifest does not hold ({e})"
    return None

  def latest(self) -> Optional[int]:
    """The newest step that verifies, or None; damaged ones are named in the log and passed over."""
    for step in reversed(self.steps()):
      wrong = self.verify(step)
      if wrong is None:
        return step
      _LOG.warning("Checkpoint %s is passed over: %s.", self.path(step), wrong)
    return None

  def facts(self, step: int) -> dict[str, Any]:
    """What was saved beside the state."""
    return json.loads((self.path(step) / "manifest.json").read_text())["facts"]

  def restore(self, state: tf.train.Checkpoint, step: int, partial: bool = False) -> None:
    """Restores every variable of `state`.

    Args:
      state: May hold less than was saved (a codec without its optimizer), never more.
      step: Of the checkpoint.
      partial: Whether variables of `state` that were not saved may stay as they are.

    Raises:
      CheckpointError: The checkpoint is damaged.
      MisfitError: It lacks variables, or has them in other shapes.
    """
    wrong = self.verify(step)
    if wrong is not None:
      raise CheckpointError(f"Checkpoint {self.path(step)}: {wrong}.")
    prefix = str(self.path(step) / _PREFIX)
    try:
      status = state.read(prefix)
      if not partial:
        status.assert_existing_objects_matched()
      status.expect_partial()
    except (AssertionError, ValueError) as e:  # TensorFlow's text lists every object there is.
      raise MisfitError(
        f"Checkpoint {self.path(step)} does not fit this model: "
        + (_differences(state, prefix, partial) or str(e).split("\n", 1)[0])
      ) from None

  def restore_fitting(self, state: tf.train.Checkpoint, step: int) -> list[str]:
    """Restores the variables of `state` that were saved under their name with their shape.

    Returns:
      The names of the others, which stay as they are.

    Raises:
      CheckpointError: The checkpoint is damaged.
      MisfitError: There is no such variable.
    """
    wrong = self.verify(step)
    if wrong is not None:
      raise CheckpointError(f"Checkpoint {self.path(step)}: {wrong}.")
    reader = tf.train.load_checkpoint(str(self.path(step) / _PREFIX))
    saved = reader.get_variable_to_shape_map()
    own = _variables(state)
    fitting = {n: v for n, v in own.items() if saved.get(n) == v.shape.as_list()}
    if not fitting:
      raise MisfitError(
        f"Checkpoint {self.path(step)} has none of the {len(own)} variables of this model: none "
        "has the name and the shape of one here."
      )
    for name, variable in fitting.items():
      variable.assign(reader.get_tensor(name))
    return [n.removesuffix(_VALUE) for n in own if n not in fitting]

  def drop_after(self, step: int) -> None:
    """Removes the checkpoints of later steps, so that this one is the newest."""
    for later in self.steps():
      if later > step:
        shutil.rmtree(self.path(later))

  def mark_best(self, step: int, loss: float) -> None:
    """Records that this step's checkpoint is the best so far; it is never dropped."""
    runs.write_json(self.folder / "best.json", {"step": step, "loss": loss})

  def best(self) -> Optional[dict[str, Any]]:
    """`{"step", "loss"}` of the best checkpoint, or None."""
    with contextlib.suppress(runs.RunError):
      return runs.read_json(self.folder / "best.json")
    return None

  def _prune(self) -> None:
    best = self.best()
    kept = {best["step"]} if best else set()
    for step in self.steps()[: -self._max_to_keep]:
      if step not in kept:
        shutil.rmtree(self.path(step), ignore_errors=True)

  def _remove_leftovers(self) -> None:
    for path in self.folder.glob(".saving-*"):  # The run is locked: nobody else is writing.
      shutil.rmtree(path, ignore_errors=True)


def find(path: runs.PathLike, wid: Optional[int] = None) -> tuple[Checkpoints, int]:
  """The checkpoint that a path means: a checkpoint folder, a run, or an experiment and a wid.

  Returns:
    The checkpoints of the run, and the step: the one named, else the newest whole one.

  Raises:
    CheckpointError: There is none; the message says what was looked for.
  """
  path = pathlib.Path(path).expanduser().absolute()
  match = re.fullmatch(r"step-(\d+)", path.name)
  if match and (path / "manifest.json").is_file():
    return Checkpoints(path.parent), int(match.group(1))
  if not path.is_dir():
    raise CheckpointError(
      f"No checkpoint at {str(path)!r}: it is neither a checkpoint folder (step-...), nor a run "
      "(wid=...), nor an experiment (train_xms/<xid>)."
    )
  run = path
  inside = sorted(path.glob("wid=*"))
  if inside:
    members = [p for p in inside if wid is not None and p.name.startswith(f"wid={wid}-")]
    if len(members) != 1:
      raise CheckpointError(
        f"Experiment {str(path)!r} has the runs {', '.join(p.name for p in inside)}; "
        f"wid {wid} does not name one of them."
      )
    run = members[0]
  checkpoints = Checkpoints(runs.RunDir(run).checkpoints_dir)
  step = checkpoints.latest()
  if step is None:
    raise CheckpointError(f"Run {str(run)!r} has no whole checkpoint (yet).")
  return checkpoints, step


def _differences(state: tf.train.Checkpoint, prefix: str, partial: bool) -> str:
  """How many of the state's variables were saved otherwise, and the first of them; "" for none."""
  saved = {name: list(shape) for name, shape in tf.train.list_variables(prefix)}
  own = {name: variable.shape.as_list() for name, variable in _variables(state).items()}
  different = [
    f"{name.removesuffix(_VALUE)} is {shape} here, {saved.get(name, 'missing')} there"
    for name, shape in own.items()
    if (name in saved or not partial) and saved.get(name) != shape
  ]
  if not different:
    return ""
  more = len(different) - _NAMED
  listed = "; ".join(different[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
  return f"{len(different)} of {len(own)} variables differ: {listed}."


def _variables(state: tf.train.Checkpoint) -> dict[str, tf.Variable]:
  """A state's variables by the names they are saved under: the shortest paths."""
  view = tf.train.TrackableView(state)
  variables: dict[str, tf.Variable] = {}
  seen: dict[int, Any] = {id(state): state}  # Kept, so that no id is given twice.
  queue = collections.deque([("", state)])
  while queue:
    path, parent = queue.popleft()
    for name, child in view.children(parent).items():
      if id(child) in seen:
        continue
      seen[id(child)] = child
      if isinstance(child, tf.Variable):
        variables[f"{path}{name}{_VALUE}"] = child
      queue.append((f"{path}{name}/", child))
  return variables


def _fingerprint(path: pathlib.Path) -> list[int]:
  crc = 0
  with path.open("rb") as f:
    while chunk := f.read(1 << 20):
      crc = zlib.crc32(chunk, crc)
  return [path.stat().st_size, crc]


def _sync(folder: pathlib.Path) -> None:
  for path in [*folder.iterdir(), folder] if folder.is_dir() else []:
    if path.is_dir() and path != folder:
      continue
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
