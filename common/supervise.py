"""What runs inside a job: starts the task, forwards signals, records how the task ended.

    python -m common.supervise --job_dir DIR -- python -m factorized.train --workdir DIR

The task's output is appended to DIR/log.txt. DIR/state.json says at the end:

    task                                        record                exit code here
    exits with 0, and wrote DONE itself         DONE (its own)        0
    exits with 0, without that mark             FAILED                1
    exits with 75 (runs.EXIT_RESUME)            REQUEUED              75
    dies of the stop signal that it was sent    REQUEUED              75
    anything else                               FAILED, with why      the task's, or 128 + signal

SIGTERM and SIGINT reach the task as SIGTERM, SIGUSR2 as itself; SIGQUIT kills the task at once.
Where the disk is full, an end that cannot be recorded is 74 (EXIT_UNRECORDED) instead of a FAILED.
A run keeps to the number of threads (NTC_NUM_THREADS) that it was first started with, for another
number sums in another order and would end with other weights.
Whether and when a REQUEUED job starts again is the caller's business, or a `Restarts` object's. A
job whose folder holds a `cancel` file is recorded CANCELLED where it would have been REQUEUED, and
is not started; one that is DONE is not started again. While the task runs, the time of
DIR/supervisor.lock is its heartbeat. The task finds NTC_SUPERVISED=1 in its environment.
"""

import contextlib
import ctypes
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Callable, Optional

from common import runs

# The task failed, and so did recording that.
EXIT_UNRECORDED = 74

LOG_TAIL_LINES = 50
_LOG_TAIL_BYTES = 1 << 20

HEARTBEAT_SECONDS = 15.0
_SIGNAL_DELAY_SECONDS = 0.5

_FORWARDED = {
  signal.SIGTERM: signal.SIGTERM,
  signal.SIGINT: signal.SIGTERM,
  signal.SIGUSR2: signal.SIGUSR2,
}


class Restarts:
  """What becomes of a task that saved its state and stopped; here nothing: the caller decides."""

  def start(self, before: Mapping[str, Any]) -> tuple[dict[str, Any], Optional[str]]:
    """Before an attempt: facts for the state record, and why it must not start (or None)."""
    del before
    return {}, None

  def stop(self, record: Mapping[str, Any], sent: Sequence[int]) -> tuple[str, Optional[str]]:
    """After a stop: the state to record, and a reason (None: the task's own).

    Args:
      record: The state record.
      sent: The signals that were forwarded to the task, in order.
    """
    del record, sent
    return "REQUEUED", None

  def restart(self) -> Optional[str]:
    """Has a task that is recorded REQUEUED started again; returns why that failed, or None."""
    return None


def supervise(
  job: runs.RunDir,
  argv: Sequence[str],
  restarts: Optional[Restarts] = None,
  instead: Optional[Mapping[int, int]] = None,
  early: Sequence[int] = (),
) -> int:
  """Runs a task to its end and records it; returns the exit code for the job.

  Args:
    job: The job's folder: a run directory, or a bare folder for an evaluation.
    argv: The task's program and arguments.
    restarts: Decides what becomes of a task that stopped.
    instead: What the task is sent in place of SIGTERM or SIGUSR2.
    early: Signals that the caller was sent before this listens.
  """
  try:
    # A trainer that was started by hand holds the run's own lock; its state is not ours to write.
    holder = runs.lock_holder(job.lock_file)
    if holder is not None:
      raise runs.RunError(f"The run {job.path} is in use by {holder}. Wait for it or stop it.")
    with runs.holding(job.supervisor_lock_file, f"The job {job.path}"):
      return _Supervisor(job, argv, restarts or Restarts(), instead or {}).run(early)
  except (runs.RunError, OSError) as e:  # Once the task runs, nothing here raises OSError.
    _say(f"not started: {e}")
    return 1


def _say(text: str) -> None:
  with contextlib.suppress(OSError):  # Standard error is a file, too, and the disk may be full.
    print(f"[supervise] {text}", file=sys.stderr, flush=True)


class _Supervisor:
  """One attempt at one task."""

  def __init__(
    self, job: runs.RunDir, argv: Sequence[str], restarts: Restarts, instead: Mapping[int, int]
  ):
    self.job = job
    self.instead = dict(instead)
    self.restarts = restarts
    self.argv = list(argv)
    self.task: Optional[subprocess.Popen[bytes]] = None
    self.sent: list[int] = []
    self.killed = False

  def run(self, early: Sequence[int]) -> int:
    for received in (*_FORWARDED, signal.SIGQUIT):
      signal.signal(received, self._on_signal)
    for number in early:
      self._on_signal(number, None)
    before = self.job.read_state()
    if before.get("state") == "DONE":  # A requeue that came too late.
      return 0
    attempt = int(before.get("attempt", 0)) + 1
    env = {**os.environ, "NTC_SUPERVISED": "1"}
    threads = before.get("num_threads") or env.get("NTC_NUM_THREADS", "")
    if threads:
      env["NTC_NUM_THREADS"] = threads
    more, refusal = self.restarts.start(before)
    self.job.write_state(
      "RUNNING",
      attempt=attempt,
      supervisor_pid=os.getpid(),
      host=socket.gethostname(),
      started=time.time(),
      first_step=before.get("step"),
      num_threads=threads if threads.isdigit() else None,  # A mistake must not stay.
      **dict.fromkeys(("pid", "ended", "exit_code", "signal", "traceback", "log_tail", "reason")),
      **more,
    )
    # Looked for after RUNNING was said, see LocalExecutor.cancel.
    if self.job.cancel_file.exists():
      self._record("CANCELLED", "cancelled before it started")
      return runs.EXIT_RESUME
    if refusal is not None:
      return 1 if self._record("FAILED", refusal) else EXIT_UNRECORDED
    with self.job.log_file.open("ab") as log:
      log.write(
        f"[supervise] attempt {attempt}, {time.ctime()}: {shlex.join(self.argv)}\n".encode()
      )
      log.flush()
      start = log.tell()
      try:
        self.task = subprocess.Popen(
          self.argv,
          env=env,
          stdin=subprocess.DEVNULL,
          stdout=log,
          stderr=log,
          start_new_session=True,
          preexec_fn=_die_with(os.getpid()),
        )
      except OSError as e:
        recorded = self._record("FAILED", f"could not start: {e}", exit_code=127)
        return 127 if recorded else EXIT_UNRECORDED
    for missed in list(self.sent):
      self._send(missed)
    ended = threading.Event()
    # Signals must come to this thread: one that another takes would not wake it from its wait.
    listened = (*_FORWARDED, signal.SIGQUIT)
    signal.pthread_sigmask(signal.SIG_BLOCK, listened)
    threading.Thread(target=self._beat, args=(ended,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, listened)
    code = self.task.wait()
    ended.set()
    if -code in (signal.SIGTERM, signal.SIGUSR2) and -code not in self.sent:
      time.sleep(_SIGNAL_DELAY_SECONDS)  # Slurm signals the whole job; ours may come second.
    return self._finish(code, start)

  def _beat(self, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
      with contextlib.suppress(OSError):
        os.utime(self.job.supervisor_lock_file)

  def _on_signal(self, received: int, frame: Optional[FrameType]) -> None:
    if received == signal.SIGQUIT:
      self.killed = True
      self.sent.append(signal.SIGKILL)
    else:
      self.sent.append(_FORWARDED[signal.Signals(received)])
    if self.task is not None:
      self._send(self.sent[-1])

  def _send(self, number: int) -> None:
    assert self.task is not None
    with contextlib.suppress(ProcessLookupError):
      if number == signal.SIGKILL:
        os.killpg(self.task.pid, number)  # And what the task itself has started.
      else:
        self.task.send_signal(self.instead.get(number, number))

  def _finish(self, code: int, start: int) -> int:
    own = self.job.read_state()
    if code == 0 and own.get("state") == "DONE":
      return 0
    sent = {*self.sent, *(self.instead.get(number, number) for number in self.sent)}
    stopped = -code in sent and not self.killed
    if code == runs.EXIT_RESUME or stopped:
      reason = "stopped before it could save"
      if not stopped:
        reason = str(own.get("reason") or "saved its state and stopped")
      state = "CANCELLED" if self.job.cancel_file.exists() else "REQUEUED"
      if state == "REQUEUED":
        state, why = self.restarts.stop(own, self.sent)
        reason = why or reason
      self._record(state, reason, exit_code=code if code >= 0 else None)
      if state == "REQUEUED":  # Recorded first: it may be the end of this process.
        refused = self.restarts.restart()
        if refused is not None:
          self._record("TIMEOUT", refused)
      return 1 if state == "FAILED" else runs.EXIT_RESUME
    text = _log_since(self.job.log_file, start)
    facts: dict[str, Any] = {"log_tail": text.splitlines()[-LOG_TAIL_LINES:]}
    trace = last_traceback(text)
    if trace is not None:
      facts["traceback"] = trace
    if code < 0:
      facts["signal"] = _signal_name(-code)
      reason = f"killed by {facts['signal']}"
      if self.killed:
        reason += ", as asked"
      elif -code == signal.SIGKILL:
        reason += " (the system does this when memory runs out)"
    elif code == 0:
      reason = "exited with 0 without its end mark"
    else:
      reason = f"exited with {code}"
      if own.get("state") == "DONE":
        reason += " after its end mark"
    if code >= 0:
      facts["exit_code"] = code
    if code > 0 and own.get("state") != "DONE":
      reason += f": {_why(own, trace, text)}"
    if not self._record("FAILED", reason, **facts):
      return EXIT_UNRECORDED
    return 128 - code if code < 0 else code or 1

  def _record(self, state: str, reason: Optional[str] = None, **facts: Any) -> bool:
    """Records an end; False, with a warning in the log, where that cannot be written."""
    try:
      self.job.write_state(state, ended=time.time(), reason=reason, **facts)
    except OSError as e:
      _say(f"warning: {state} ({reason}) could not be recorded: {e}")
      return False
    if reason is not None:
      with contextlib.suppress(OSError), self.job.log_file.open("ab") as log:
        log.write(f"[supervise] {state}: {reason}\n".encode())
    return True


def _die_with(parent: int) -> Optional[Callable[[], None]]:
  """For the child: the kernel kills it when its parent dies. None where there is no prctl."""
  if not sys.platform.startswith("linux"):
    return None
  try:
    prctl = ctypes.CDLL(None).prctl
  except (OSError, AttributeError):
    return None

  def in_child() -> None:
    prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG.
    if os.getppid() != parent:  # It died before the call.
      os.kill(os.getpid(), signal.SIGKILL)

  return in_child


def _signal_name(number: int) -> str:
  try:
    return signal.Signals(number).name
  except ValueError:
    return f"signal {number}"


def _log_since(path: pathlib.Path, start: int) -> str:
  """The log from byte `start`, its last megabyte at most; of redrawn lines the last drawing."""
  try:
    with path.open("rb") as f:
      end = f.seek(0, os.SEEK_END)
      f.seek(max(start, end - _LOG_TAIL_BYTES))
      text = f.read().decode(errors="replace")
  except OSError:
    return ""
  return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def last_traceback(text: str) -> Optional[str]:
  """The last Python traceback in a log: from its header to the exception's message, or None."""
  lines = text.splitlines()
  headers = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call")]
  if not headers:
    return None
  end = headers[-1] + 1
  while end < len(lines) and (not lines[end] or lines[end].startswith((" ", "\t"))):
    end += 1
  return "\n".join(lines[headers[-1] : end + 1])


def _why(own: Mapping[str, Any], trace: Optional[str], text: str) -> str:
  """In one line: what the task itself gave as its reason, else its exception, else last words."""
  said = own.get("reason") if own.get("state") == "FAILED" else None
  lines = (said or trace or text).strip().splitlines() or ["without a word"]
  line = re.sub(r"\s+", " ", lines[-1]).strip()
  return line if len(line) <= 300 else line[:297] + "..."


def main(argv: Sequence[str]) -> int:
  """The command line; see the module's docstring."""
  usage = "usage: python -m common.supervise --job_dir DIR -- program [argument ...]"
  argv = list(argv)
  if argv[:1] in (["--help"], ["-h"]):
    print(f"{__doc__}\n{usage}")
    return 0
  if argv and argv[0].startswith("--job_dir="):
    argv[:1] = argv[0].split("=", 1)
  if len(argv) < 4 or argv[0] != "--job_dir" or argv[2] != "--":
    print(usage, file=sys.stderr)
    return 2
  return supervise(runs.RunDir(pathlib.Path(argv[1]).absolute()), argv[3:])


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
