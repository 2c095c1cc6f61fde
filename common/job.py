"""A task within its run directory: stop requests, the end mark, time since the start."""

import os
import signal
import socket
import time
from typing import Any, Callable, Optional

import ml_collections

from common import hyper, runs


class Interrupted(Exception):
  """The task was asked to stop and has saved its state; it exits with runs.EXIT_RESUME."""

  def __init__(self, step: int):
    super().__init__(f"Stopped at step {step}; the state is saved.")
    self.step = step


class Job:
  """What a loop knows of its run.

  Attributes:
    unit: The work unit.
    config: Its config, locked.
    run: The run directory; this process holds its lock.
    label: A short name for progress lines.
    distribution: The devices of a training, or None for one device.
    checked: What the entry point's check built and the loop may go on with, or None.
  """

  def __init__(
    self,
    unit: hyper.WorkUnit,
    run: runs.RunDir,
    began: Optional[float] = None,
    distribution: Optional[Any] = None,
    checked: Optional[Any] = None,
    on_started: Callable[[], None] = lambda: None,
  ):
    """A job of this process.

    Args:
      unit: The work unit.
      run: Its directory.
      began: time.time() at which the program started.
      distribution: The `distribution.Distribution` of a training; None for one device.
      checked: See the attributes.
      on_started: Called by `started`.
    """
    self.unit = unit
    self.config: ml_collections.ConfigDict = hyper.to_config(unit.config)
    self.run = run
    self.label = run.path.name
    self.distribution = distribution
    self.checked = checked
    self._on_started = on_started
    self._began = time.time() if began is None else began
    self._stop: Optional[str] = None

  def handle_signals(self) -> None:
    """SIGTERM, SIGUSR2 and the first SIGINT ask the loop to stop after its current step."""

    def request(number: int, frame: Any) -> None:
      del frame
      self._stop = signal.Signals(number).name
      if number == signal.SIGINT:  # A second Ctrl-C ends at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
      signal.signal(number, request)

  def started(self) -> None:
    """To be called when the first step is done: from then on the program does what it is for."""
    self._on_started()

  def stop_requested(self) -> bool:
    """Whether a signal asked the loop to save its state and stop."""
    return self._stop is not None

  def interrupted(self, step: int) -> None:
    """To be called once the state is saved: raises `Interrupted`."""
    raise Interrupted(step)

  def done(self, **facts: Any) -> None:
    """The end mark: nothing else makes a run DONE."""
    self.run.write_state("DONE", **facts)

  def running(self, **facts: Any) -> None:
    """Marks the run as RUNNING here and now."""
    self.run.write_state("RUNNING", pid=os.getpid(), host=socket.gethostname(), **facts)

  def seconds(self) -> float:
    """Since the program started."""
    return time.time() - self._began
