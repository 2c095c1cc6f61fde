"""Where a loop's progress goes: JSON lines, TensorBoard, and a progress bar or plain lines."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from common import runs

_LOG = logging.getLogger(__name__)


class MetricsWriter:
  """Appends scalars and pictures of a run; nothing is ever erased.

  After a resume the steps since the checkpoint are written again: readers take the last record of
  a step.
  """

  def __init__(self, run: runs.RunDir):
    """Opens (and where needed makes) the run's log files."""
    self._run = run
    self._tensorboard = tf.summary.create_file_writer(str(run.tensorboard_dir))

  def scalars(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
    """Writes one record: `{"step", "split", "time", **values}`."""
    record = {"step": step, "split": split, "time": time.time()}
    record.update({k: float(v) for k, v in values.items()})
    runs.append_jsonl(self._run.metrics_file, record)
    with self._tensorboard.as_default(step):
      for name, value in values.items():
        tf.summary.scalar(f"{split}/{name}", value)

  def image_pairs(self, step: int, original: np.ndarray, decoded: np.ndarray) -> None:
    """Side by side, original left: uint8 [N, H, W, 3] each; as PNG and in TensorBoard."""
    from PIL import Image

    pairs = np.concatenate([original, decoded], axis=2)
    self._run.images_dir.mkdir(exist_ok=True)
    for i, pair in enumerate(pairs):
      Image.fromarray(pair).save(self._run.images_dir / f"step-{step:08d}-{i}.png")
    with self._tensorboard.as_default(step):
      tf.summary.image("original|reconstruction", pairs, max_outputs=len(pairs))

  def flush(self) -> None:
    """Makes all of it visible to readers."""
    self._tensorboard.flush()

  def close(self) -> None:
    """Flushes and closes."""
    self._tensorboard.close()


class Progress:
  """A bar in a terminal, plain lines elsewhere, and the run's state record for launchers."""

  def __init__(
    self,
    total: int,
    start: int = 0,
    unit: str = "step",
    run: Optional[runs.RunDir] = None,
    label: str = "",
    seconds_between: float = 10.0,
  ):
    """Starts at `start` of `total`; lines and state records come `seconds_between` apart."""
    self._total, self._start, self._unit, self._run, self._label = total, start, unit, run, label
    self._seconds_between = seconds_between
    self._began = self._last_line = time.monotonic()
    self._last_state = 0.0
    self._bar: Any = None
    if sys.stderr.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=total, initial=start, unit=unit, desc=label or None, dynamic_ncols=True
      )

  def update(self, step: int, detail: str = "") -> None:
    """Says that `step` of `total` are done; `detail` is a short text, such as the loss."""
    now = time.monotonic()
    if self._bar is not None:
      self._bar.update(step - self._bar.n)
      if detail:
        self._bar.set_postfix_str(detail, refresh=False)
    elif now - self._last_line >= self._seconds_between or step == self._total:
      self._last_line = now
      rate = (step - self._start) / max(now - self._began, 1e-9)
      left = (self._total - step) / rate if rate > 0 else float("inf")
      print(
        f"{self._label + ': ' if self._label else ''}{self._unit} {step}/{self._total}  {detail}  "
        f"{rate:.2f}/s  {_duration(left)} left",
        file=sys.stderr,
        flush=True,
      )
    due = now - self._last_state >= min(2.0, self._seconds_between) or step == self._total
    if self._run is not None and due:
      self._last_state = now
      try:
        self._run.write_state("RUNNING", step=step, num_steps=self._total, detail=detail)
      except OSError as e:  # A full disk shows at the next checkpoint; a heartbeat may be missed.
        _LOG.warning("The state could not be written: %s", e)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()


class Silent:
  """For those of several workers that write nothing: takes what the two classes above take."""

  def scalars(self, step: int, values: Mapping[str, float], split: str = "train") -> None:
    """Writes nothing."""

  def image_pairs(self, step: int, original: np.ndarray, decoded: np.ndarray) -> None:
    """Writes nothing."""

  def flush(self) -> None:
    """Nothing to flush."""

  def update(self, step: int, detail: str = "") -> None:
    """Shows nothing."""

  def close(self) -> None:
    """Nothing to close."""


def _duration(seconds: float) -> str:
  if seconds == float("inf"):
    return "?"
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
