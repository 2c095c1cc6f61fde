"""Early stopping: a training ends once validation gets no better, and ends with its best weights.

The decision is a function of the recorded validation up to a step. It is written down
(`stopped.json`) before the checkpoints after the best one are dropped, and only then the run
becomes DONE. So a kill at any point changes nothing: before the record the decision is made again,
after it the rest is done again.
"""

import contextlib
import logging
import math
from typing import NamedTuple, Optional

from common import checkpoints as checkpoints_lib
from common import runs

_LOG = logging.getLogger(__name__)


class Stopped(NamedTuple):
  """How a training ended.

  Attributes:
    step: The last one.
    best_step: The one whose checkpoint is the run's newest now.
    loss: Of its validation.
  """

  step: int
  best_step: int
  loss: float

  def text(self, num_steps: int) -> str:
    """For people; `num_steps`: how many were asked for."""
    early = "stopped early" if self.step < num_steps else "ended"
    return f"{early} at step {self.step}, best step {self.best_step}, loss {self.loss:.4f}"


class EarlyStopping:
  """The validation losses of a run, and what follows from them."""

  def __init__(self, run: runs.RunDir, ckpts: checkpoints_lib.Checkpoints, patience: int):
    """`patience`: ends the training after so many evaluations in a row without a better loss."""
    self._run, self._ckpts, self._patience = run, ckpts, patience
    self._losses: dict[int, float] = {}

  def stopped(self) -> Optional[Stopped]:
    """How the training ended, if it did; what a kill left over of its end is done then."""
    try:
      found = Stopped(**runs.read_json(self._run.stopped_file))
    except (runs.RunError, TypeError):
      return None
    if self._ckpts.verify(found.best_step) is not None:  # Training finds its way there again.
      self._run.stopped_file.unlink()
      return None
    self._keep(found)
    return found

  def resume(self, start: int) -> None:
    """Takes the recorded losses up to step `start`. Later ones are of an attempt that is lost."""
    self._losses.clear()
    for record in runs.read_jsonl(self._run.metrics_file):
      if record.get("split") == "val" and record.get("step", start + 1) <= start:
        self.note(record["step"], record["loss"])
    best = self._ckpts.best()
    if best is not None and best["step"] > start:
      with contextlib.suppress(FileNotFoundError):
        (self._ckpts.folder / "best.json").unlink()
      for step in self._by_loss()[:1]:
        if self._ckpts.verify(step) is None:
          self._ckpts.mark_best(step, self._losses[step])

  def note(self, step: int, loss: float) -> None:
    """The validation loss of a step."""
    self._losses[step] = loss if math.isfinite(loss) else math.inf

  def is_exhausted(self) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    if not self._losses:
      return False
    best = self._by_loss()[0]
    return sum(step > best for step in self._losses) >= self._patience

  def finish(self, step: int) -> Stopped:
    """Ends the training at `step`: its best checkpoint becomes its newest.

    Raises:
      checkpoints.CheckpointError: No step that was validated has a whole checkpoint.
    """
    for best in self._by_loss():
      if not math.isfinite(self._losses[best]):
        break
      wrong = self._ckpts.verify(best)
      if wrong is None:
        found = Stopped(step, best, self._losses[best])
        runs.write_json(self._run.stopped_file, found._asdict())
        self._keep(found)
        return found
      if best == self._by_loss()[0]:
        _LOG.warning("The best checkpoint, of step %d, is passed over: %s.", best, wrong)
    raise checkpoints_lib.CheckpointError(
      f"{self._ckpts.folder} has no whole checkpoint of a step whose validation loss is finite."
    )

  def _keep(self, found: Stopped) -> None:
    self._ckpts.mark_best(found.best_step, found.loss)
    self._ckpts.drop_after(found.best_step)

  def _by_loss(self) -> list[int]:
    """The steps, best first; of equal losses the earlier one."""
    return sorted(self._losses, key=lambda step: (self._losses[step], step))
