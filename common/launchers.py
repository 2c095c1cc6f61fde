"""Experiments, the jobs in them, and the executors that run jobs behind one small interface.

An experiment is made once (`Experiment.create`): its record, a snapshot of the source, one run
directory a work unit. Jobs are made from that record, at launch and at every rerun alike, so the
record is all that is needed. Each job runs under common/supervise.py, whatever the executor.
"""

import abc
import contextlib
import copy
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, Optional, TextIO

import configs
from common import datasets, hyper, runs, supervise

# A job is not over in these states.
OPEN_STATES = ("PENDING", "RUNNING")

# What a rerun picks up unless told otherwise: all but DONE, RUNNING and CANCELLED.
RERUN_STATES = ("FAILED", "LOST", "TIMEOUT", "REQUEUED", "PENDING")

# Whose supervisor's heartbeat is older than this many seconds, is gone.
STALE_SECONDS = 90.0

# Of a larger sweep, each job makes its own run directory when it starts.
MOST_FOLDERS_AT_ONCE = 2000

# Entry points that launch.py starts; evaluations are launch_eval.py's.
TASKS = ("train", "itinf")

# The task of an experiment that launch_eval.py makes: evaluations of runs, wherever those are.
EVAL_TASK = "eval"

# Of the experiment of a sweep file: each of its parts has its own.
SWEEP_TASK = "sweep"

_SITE_VARIABLES = {
  "NTC_TRAIN_DIR": "TRAIN_DIR",
  "NTC_ITINF_DIR": "ITINF_DIR",
  "NTC_SLURM_DIR": "SLURM_DIR",
  "NTC_RESULTS_DIR": "RESULTS_DIR",
  "NTC_REPORTS_DIR": "REPORTS_DIR",
  "NTC_DATA_CACHE_DIR": "DATA_CACHE_DIR",
  "NTC_SHARED_DIR": "SHARED_DIR",
  "NTC_DATA_DIR": "DATA_DIR",
}

# Without git, these belong to the source; with git, the checkout's own rules say.
_SOURCE_SUFFIXES = (
  ".cfg", ".in", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml",
)  # fmt: skip
_NOT_SOURCE = ("__pycache__", "env", "node_modules", "venv")
_LARGE_SNAPSHOT_BYTES = 200_000_000

_LAUNCHER_LOCK = "launcher.lock"


class Stops:
  """While this is entered, SIGTERM and SIGHUP raise KeyboardInterrupt as SIGINT does.

  Within `held` all three wait: what was begun and what is known of it stay together.
  """

  def __init__(self) -> None:
    """Nothing is handled yet."""
    self._before: dict[int, Any] = {}
    self._depth = 0
    self._received: Optional[int] = None

  def __enter__(self) -> "Stops":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before = signal.getsignal(number)
        if before != signal.SIG_IGN:  # What nohup made deaf, stays deaf.
          self._before[number] = before
          signal.signal(number, self._on_signal)
    return self

  def __exit__(self, *unused: Any) -> None:
    self.forget()
    for number in list(self._before):
      signal.signal(number, self._before.pop(number))

  def _on_signal(self, number: int, frame: Any) -> None:
    del frame
    if not self._depth:
      raise KeyboardInterrupt(signal.Signals(number).name)
    self._received = number

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """What came meanwhile is raised at the end, unless something else is raised there."""
    self._depth += 1
    try:
      yield
    finally:
      self._depth -= 1
    if self._received is not None and not self._depth:
      received, self._received = self._received, None
      raise KeyboardInterrupt(signal.Signals(received).name)

  def forget(self) -> None:
    """What came meanwhile came too late."""
    self._received = None


# Of the launcher's commands; there is one set of signals a process.
STOPS = Stops()


class LaunchError(RuntimeError):
  """A launch cannot be done as asked; the message names the fix."""


class PartlySubmitted(LaunchError):
  """Not all jobs could be submitted; `ids` holds the ids of those that were, by name."""

  def __init__(self, message: str, ids: Mapping[str, str]):
    super().__init__(message)
    self.ids = dict(ids)


@dataclasses.dataclass(frozen=True)
class Job:
  """One task to run under a supervisor.

  Attributes:
    name: For people and messages, "wid=0-rd_lambda=0.01"; unique among the jobs of a launch.
    argv: The task's program and arguments.
    folder: Where its state and log go.
    cwd: The folder of the source that it runs.
    env: Added to the environment.
    after: A job that must end DONE before this one starts: of an evaluation its training, of a run
      the one that it starts from.
    wid: The work unit that it belongs to; of an array of evaluations, its place in it.
    kind: "run", or "eval" for an evaluation that belongs to an experiment's run.
  """

  name: str
  argv: tuple[str, ...]
  folder: runs.RunDir
  cwd: pathlib.Path
  env: Mapping[str, str]
  after: Optional["Job"] = None
  wid: int = 0
  kind: str = "run"

  def supervised(self) -> list[str]:
    """The command that runs the task and records its end; its cwd must be `self.cwd`."""
    supervise = [sys.executable, "-m", "common.supervise", "--job_dir", str(self.folder.path)]
    return [*supervise, "--", *self.argv]


class Executor(abc.ABC):
  """Where jobs run. A job's records, not the executor, say how it ended.

  `submit` hands jobs over and returns at once. An executor that runs jobs only while the launcher
  lives starts them in `poll`, which `wait` calls until nothing is left.
  """

  name: str

  # Whether submitted jobs go on without the launcher.
  detached = False

  def check(self) -> None:  # noqa: B027
    """Whether jobs could be submitted here; writes and starts nothing.

    Raises:
      LaunchError: They could not.
    """

  def reserve(
    self, experiments_dir: pathlib.Path, wids: Sequence[int], title: str
  ) -> Optional[str]:
    """The id for a new experiment, where this executor is the one to give it; else None.

    What this has taken, `submit` uses, and `give_up` gives back.

    Args:
      experiments_dir: Where the experiment will lie.
      wids: Of the runs that wait for no other run, ascending.
      title: Of the experiment.
    """
    del experiments_dir, wids, title
    return None

  def reserved(self) -> dict[str, Any]:
    """For the experiment's record: what `reserve` took, see `Experiment.submitted`."""
    return {}

  def give_up(self, experiment: Optional["Experiment"]) -> None:  # noqa: B027
    """Takes back what `reserve` did and `submit` did not use; the experiment, if one was made."""

  def follow(self, experiment: "Experiment") -> Sequence[str]:
    """Before `observe`: learns of an experiment's jobs what is known; returns notes for people."""
    del experiment
    return ()

  def observe(self, job: Job) -> dict[str, Any]:
    """A job's state record, with what this executor knows and could not record."""
    return _observe_folder(job)

  def advice(self, jobs: Sequence[Job]) -> Sequence[str]:
    """After `follow`: what people have to do so that jobs go on, with the commands."""
    del jobs
    return ()

  def queued(self, jobs: Sequence[Job]) -> dict[str, str]:
    """Those of the jobs that wait or run somewhere, so must not be submitted: name -> why.

    A task that has recorded its end may not have ended yet.

    Raises:
      LaunchError: That is not known.
    """
    return {job.name: holder for job in jobs for holder in [_holder(job.folder)] if holder}

  @abc.abstractmethod
  def options(self) -> dict[str, Any]:
    """What the experiment's record keeps of this executor."""

  @abc.abstractmethod
  def submit(
    self, jobs: Sequence[Job], experiment: Optional["Experiment"] = None
  ) -> dict[str, str]:
    """Hands over jobs, those named by `Job.after` before those that name them.

    Args:
      jobs: Prepared jobs.
      experiment: Whose jobs they are, if any.

    Returns the executor's own id of each job, by the job's name.

    Raises:
      PartlySubmitted: Some jobs were handed over, and others could not be.
    """

  @abc.abstractmethod
  def poll(self) -> dict[str, str]:
    """The submitted jobs that are not over: name -> PENDING or RUNNING."""

  @abc.abstractmethod
  def stop(self, kill: bool = False) -> None:
    """Starts no more jobs, and asks the running ones to save their state and stop (or kills)."""

  @abc.abstractmethod
  def cancel(self, jobs: Sequence[Job], ids: Mapping[str, str]) -> dict[str, str]:
    """Stops jobs for good, whichever process submitted them; returns a word on each job's fate.

    Args:
      jobs: Jobs as made from an experiment's record.
      ids: What `submit` returned for them when they were last submitted.
    """


class LocalExecutor(Executor):
  """Runs jobs on this machine, a few at a time, as child processes in sessions of their own.

  The jobs that run go on if the launcher is killed; those that wait stay PENDING.
  """

  name = "local"

  def __init__(self, jobs: int = 1, gpus: Sequence[str] = ()):
    """Args: how many jobs at once; the GPUs dealt out to them in turn (none: not touched)."""
    if jobs < 1:
      raise LaunchError(f"--jobs={jobs}: at least one job must run at a time.")
    self._limit = jobs
    self._gpus = tuple(gpus)
    self._waiting: list[Job] = []
    self._running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
    self._unrecorded: dict[str, dict[str, Any]] = {}
    self._stopping = False
    self._experiment: Optional[Experiment] = None

  def observe(self, job: Job) -> dict[str, Any]:
    """A job's state record; where its end could not be recorded, its end."""
    return with_reason(job, self._recorded(job), self._recorded)

  def _recorded(self, job: Job) -> dict[str, Any]:
    return {**observe(job.folder), **self._unrecorded.get(job.name, {})}

  def _record(self, job: Job, state: str, reason: str) -> None:
    try:
      job.folder.write_state(state, reason=reason)
    except OSError as e:  # A full disk is no reason to leave the other jobs alone.
      self._unrecorded[job.name] = {"state": state, "reason": reason}
      _warn(f"{job.name}: {state} ({reason}) could not be recorded: {e}")

  def options(self) -> dict[str, Any]:
    """How many jobs at once, and the GPUs."""
    return {"jobs": self._limit, "gpus": list(self._gpus)}

  def submit(
    self, jobs: Sequence[Job], experiment: Optional["Experiment"] = None
  ) -> dict[str, str]:
    """Queues the jobs; `poll` starts them."""
    self._experiment = experiment
    self._waiting += jobs
    return {job.name: job.name for job in jobs}

  def poll(self) -> dict[str, str]:
    """Sees which jobs ended and starts those whose turn it is."""
    for slot, (job, process) in list(self._running.items()):
      code = process.poll()
      if code is not None:
        del self._running[slot]
        self._settle(job, code)
    if not self._stopping:
      self._start_jobs()
    unfinished = {job.name: "RUNNING" for job, _ in self._running.values()}
    if not self._stopping:
      unfinished.update({job.name: "PENDING" for job in self._waiting})
    return unfinished

  def _start_jobs(self) -> None:
    unfinished = {job.name for job, _ in self._running.values()}
    unfinished.update(job.name for job in self._waiting)
    for job in list(self._waiting):
      if job.folder.cancel_file.exists():
        self._waiting.remove(job)
        self._record(job, "CANCELLED", "cancelled before it started")
      elif job.after is not None and job.after.name in unfinished:
        continue
      elif job.after is not None and self.observe(job.after)["state"] != "DONE":
        self._waiting.remove(job)
        if job.kind == "run":  # It stays PENDING: `with_reason` says why.
          continue
        state = self.observe(job.after)["state"]
        self._record(job, "CANCELLED", f"not started: {job.after.name} is {state}")
      elif len(self._running) < self._limit:
        self._waiting.remove(job)
        self._start(job)

  def _start(self, job: Job) -> None:
    slot = next(i for i in range(self._limit) if i not in self._running)
    env = {**os.environ, **job.env, "PYTHONUNBUFFERED": "1"}
    env.pop("PYTHONSAFEPATH", None)  # `python -m` must find the source in the cwd.
    # For a first start: the supervisor keeps to the number that a run was started with.
    env["NTC_NUM_THREADS"] = env.get("NTC_NUM_THREADS") or str(self._num_threads())
    if self._gpus:
      env["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
    try:
      if self._experiment is not None:
        self._experiment.job(job.kind, job.wid)  # Makes the run directory of a large sweep.
      job.folder.path.mkdir(parents=True, exist_ok=True)
      with job.folder.log_file.open("ab") as log:
        process = subprocess.Popen(
          job.supervised(), cwd=job.cwd, env=env, stdin=subprocess.DEVNULL,
          stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    except OSError as e:
      self._record(job, "FAILED", f"could not start: {e}")
      return
    self._running[slot] = (job, process)

  def _settle(self, job: Job, code: int) -> None:
    """Records the end of a job whose supervisor ended without recording it."""
    record = job.folder.read_state()
    lost = code == supervise.EXIT_UNRECORDED
    if record.get("state", "PENDING") not in (*OPEN_STATES, *(("DONE",) if lost else ())):
      return
    if is_alive(job.folder, record):
      return
    if lost:
      self._record(job, "FAILED", "its end could not be recorded (see its log): is the disk full?")
    elif code == runs.EXIT_RESUME and job.folder.cancel_file.exists():
      self._record(job, "CANCELLED", "saved its state and stopped")
    elif code == runs.EXIT_RESUME:
      self._record(job, "REQUEUED", "saved its state and stopped")
    elif code == -signal.SIGTERM and self._stopping:  # Python itself was still starting.
      self._record(job, "REQUEUED", "stopped before it started")
    elif code < 0:
      name = signal.Signals(-code).name
      self._record(job, "LOST", f"its supervisor was killed by {name}")
    else:
      self._record(job, "FAILED", f"its supervisor exited with {code} (see its log)")

  def _num_threads(self) -> int:
    """Threads for each job, so that together they use the machine's cores once."""
    at_once = min(self._limit, len(self._running) + 1 + len(self._waiting))
    return max(1, num_cpus() // at_once)

  def stop(self, kill: bool = False) -> None:
    """Forwards SIGTERM, or with `kill` SIGQUIT, to the supervisors of the running jobs."""
    self._stopping = True
    for _, process in self._running.values():
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGQUIT if kill else signal.SIGTERM)

  def cancel(self, jobs: Sequence[Job], ids: Mapping[str, str]) -> dict[str, str]:
    """Marks the jobs as cancelled and asks those that run on this machine to stop."""
    fates = {}
    for job in jobs:
      state = observe(job.folder)["state"]
      if state not in (*OPEN_STATES, "REQUEUED"):
        fates[job.name] = f"is {state} already"
        continue
      # The supervisor says RUNNING and then looks for this file: one of the two sees the other.
      runs.atomic_write(job.folder.cancel_file, f"cancelled {time.ctime()}\n")
      seen = observe(job.folder)
      if seen["state"] != "RUNNING":
        job.folder.write_state("CANCELLED", reason=f"cancelled while {seen['state']}")
        fates[job.name] = f"was {seen['state']}, is CANCELLED"
      elif seen.get("host") != socket.gethostname():
        fates[job.name] = f"runs on {seen.get('host')}: give the command there"
      elif "supervisor_pid" not in seen:
        fates[job.name] = f"was started by hand: stop process {seen.get('pid')} yourself"
      else:
        with contextlib.suppress(ProcessLookupError):
          os.kill(int(seen["supervisor_pid"]), signal.SIGTERM)
        fates[job.name] = "is asked to save its state and stop"
    return fates


def _warn(text: str) -> None:
  with contextlib.suppress(OSError):  # Standard error may be a file on a full disk, too.
    print(f"Warning: {text}", file=sys.stderr, flush=True)


def num_cpus() -> int:
  """The processors that this process may use."""
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:  # Not on every platform.
    return os.cpu_count() or 1


# States


def is_alive(job: runs.RunDir, record: Mapping[str, Any]) -> bool:
  """Whether a RUNNING record's process still is: its locks are held, or its process is there.

  Of another machine's process, only the locks (where the file system shares them) and the time of
  the supervisor's heartbeat can be asked; without a supervisor it is taken for alive.
  """
  if _holder(job):
    return True
  if record.get("host") not in (None, socket.gethostname()):
    return "supervisor_pid" not in record or not _is_stale(job, record)
  if "supervisor_pid" in record:  # It would hold its lock; its number may be another's by now.
    return False
  try:
    os.kill(int(record["pid"]), 0)
  except (KeyError, ValueError, ProcessLookupError):
    return False
  except PermissionError:
    return True
  return True


def _is_stale(job: runs.RunDir, record: Mapping[str, Any]) -> bool:
  heard = float(record.get("time", 0))
  with contextlib.suppress(OSError):
    heard = max(heard, job.supervisor_lock_file.stat().st_mtime)
  return time.time() - heard >= STALE_SECONDS


def _holder(job: runs.RunDir) -> Optional[str]:
  """The process that holds one of a job's locks, in words; None where nobody does."""
  return runs.lock_holder(job.supervisor_lock_file) or runs.lock_holder(job.lock_file)


def observe(job: runs.RunDir) -> dict[str, Any]:
  """A job's state record; RUNNING without a living process is LOST. Nothing is written."""
  record = {"state": "PENDING", **job.read_state()}
  if record["state"] == "RUNNING" and not is_alive(job, record):
    again = {"state": "PENDING", **job.read_state()}  # It may have ended in between.
    if again == record:
      return {**record, "state": "LOST", "reason": "its process is gone without a word"}
    return again
  return record


# How the state of a job is found out: Executor.observe.
ObserveJob = Callable[[Job], dict[str, Any]]


def _observe_folder(job: Job) -> dict[str, Any]:
  return with_reason(job, observe(job.folder), lambda after: observe(after.folder))


def with_reason(job: Job, record: dict[str, Any], observe_: ObserveJob) -> dict[str, Any]:
  """A job's state record; of a run that waits for another run, with that as the reason.

  Args:
    job: The job.
    record: Its record.
    observe_: How the other run's state is found out.
  """
  if job.kind != "run" or job.after is None or record["state"] != "PENDING":
    return record
  state = observe_(job.after)["state"]
  if state == "DONE":
    return record
  words = f"waits for wid {job.after.wid}"
  own = str(record.get("reason", ""))
  if state not in OPEN_STATES:
    words += f", which is {state}"
  elif own and not own.startswith("Slurm: "):  # It was not submitted, and will not start by itself.
    words += f"; {own}"
  return {**record, "reason": words}


# What these end in, does not change by itself.
_ENDED_STATES = ("FAILED", "TIMEOUT", "CANCELLED", "LOST")


def is_stuck(job: Job, observe_: ObserveJob) -> bool:
  """Whether a PENDING job waits for one that has ended, and not DONE."""
  after = job.after
  while after is not None:
    state = observe_(after)["state"]
    if state != "PENDING":
      return state in _ENDED_STATES
    after = after.after
  return False


# Experiments


@dataclasses.dataclass(frozen=True)
class Experiment:
  """One sweep's folder, `<experiments_dir>/<xid>/`, and its record."""

  path: pathlib.Path
  record: dict[str, Any]

  @classmethod
  def create(
    cls,
    experiments_dir: runs.PathLike,
    units: Sequence[hyper.WorkUnit],
    project_dir: pathlib.Path,
    args: Sequence[str] = (),
    xid: Optional[str] = None,
    then_eval: Optional[str] = None,
    facts: Optional[Mapping[str, Any]] = None,
  ) -> "Experiment":
    """Makes the experiment's folder whole, or leaves nothing.

    `experiment.json` comes last, and the launcher's lock is held until then: a folder with neither
    is what a killed creation left, and is made anew.

    Args:
      experiments_dir: Where experiments live.
      units: The work units, with consecutive wids; those of a sweep file's parts may be of several
        families and tasks.
      project_dir: The source to freeze.
      args: Further arguments for each task.
      xid: The experiment's id; without it the time as digits.
      then_eval: A data set to evaluate each run on once it is trained.
      facts: For the record: the command, the executor's options.

    Raises:
      LaunchError: There is an experiment of that id, or the snapshot lacks the task.
    """
    folder = pathlib.Path(experiments_dir).absolute()
    needed = {f"{family}/{task}.py" for family, task in mains(units)}
    firsts: dict[str, hyper.WorkUnit] = {}
    for unit in units:
      firsts.setdefault(unit.part, unit)
    common = {**(facts or {}), **_part_facts(units[0])}
    entries = [_entry(unit, firsts[unit.part]) for unit in units]
    if units[0].part:
      parts = {name: _part_facts(first) for name, first in firsts.items()}
      common = {"task": SWEEP_TASK, **(facts or {}), "parts": parts}

    def fill(path: pathlib.Path, xid: str) -> dict[str, Any]:
      if len(units) <= MOST_FOLDERS_AT_ONCE:
        for unit in units:
          runs.RunDir.of(folder, xid, unit).create_new(unit, xid)
      return {"args": list(args), "then_eval": then_eval, **common, "runs": entries}

    return cls._create(folder, xid, project_dir, needed, fill)

  @classmethod
  def create_evaluations(
    cls,
    experiments_dir: runs.PathLike,
    found: Sequence[tuple[runs.RunDir, str]],
    dataset: str,
    project_dir: pathlib.Path,
    args: Sequence[str] = (),
    xid: Optional[str] = None,
    use_snapshot: bool = False,
    facts: Optional[Mapping[str, Any]] = None,
  ) -> "Experiment":
    """Makes an experiment of evaluations: each run with its family, in this order, on a data set.

    With `use_snapshot` each runs the source of the run's own experiment.

    Raises:
      LaunchError: There is an experiment of that id, or the snapshot lacks a family's evaluation.
    """

    def fill(path: pathlib.Path, xid: str) -> dict[str, Any]:
      del path, xid
      entries = [
        {"wid": i, "workdir": str(run.path), "family": family, "use_snapshot": use_snapshot}
        for i, (run, family) in enumerate(found)
      ]
      record = {"task": EVAL_TASK, "dataset": dataset, "args": list(args), "then_eval": None}
      return {**record, **(facts or {}), "runs": entries}

    needed = {f"{family}/eval.py" for _, family in found}
    return cls._create(pathlib.Path(experiments_dir).absolute(), xid, project_dir, needed, fill)

  @classmethod
  def _create(
    cls,
    folder: pathlib.Path,
    xid: Optional[str],
    project_dir: pathlib.Path,
    needed: Iterable[str],
    fill: Callable[[pathlib.Path, str], dict[str, Any]],
  ) -> "Experiment":
    """Locks the folder, freezes the source, has the rest made by `fill`, writes the record."""
    try:
      if xid is None:
        xid = runs.new_xid(folder)
      else:
        runs.check_xid(xid)
        cls.check_free(folder / xid)
        (folder / xid).mkdir(parents=True, exist_ok=True)
      path = folder / xid
      with runs.holding(path / _LAUNCHER_LOCK, f"The experiment {path}"):
        cls.check_free(path, locked=True)
        _clear_unfinished(path)
        try:
          commit = code_state(project_dir)
          size = snapshot(project_dir, path / "source", leave_out=(folder, path))
          _check_entries(path / "source", needed)
          if commit["commit"] and commit["dirty"]:
            options = ("-c", "diff.autoRefreshIndex=false")
            patch = _git(project_dir, *options, "diff", "HEAD", "--binary")
            runs.atomic_write(path / "source.patch", patch)
          record = {
            "schema_version": runs.SCHEMA_VERSION,
            "xid": xid,
            "time": time.time(),
            "host": socket.gethostname(),
            "project_dir": str(project_dir),
            "python": sys.executable,
            "site": _site_environment(),
            **commit,
            "source_bytes": size,
            **fill(path, xid),
          }
          _write_record(path, record)
        except BaseException:
          shutil.rmtree(path, ignore_errors=True)
          raise
        return cls(path, record)
    except OSError as e:
      raise LaunchError(f"Cannot make an experiment in {folder}: {e}.") from e

  @staticmethod
  def check_free(path: pathlib.Path, locked: bool = False) -> None:
    """Whether an experiment can be made in the folder `path`: nothing would be lost.

    Args:
      path: `<experiments_dir>/<xid>`; it need not exist.
      locked: The caller holds the launcher's lock.

    Raises:
      LaunchError: There is an experiment, one is being made, or something else.
    """
    if not path.exists():
      return
    if not path.is_dir():
      raise LaunchError(f"{path} is a file: choose another --xid.")
    if (path / "experiment.json").exists():
      raise LaunchError(
        f"There is an experiment {path.name!r} in {path.parent} already. Choose another --xid; "
        f"to go on with that one: ./launch.py rerun {path.name}."
      )
    holder = None if locked else runs.lock_holder(path / _LAUNCHER_LOCK)
    if holder is not None:
      raise LaunchError(f"The experiment {path} is being made by {holder}: choose another --xid.")
    kept = _not_of_a_creation(path)
    if kept:
      raise LaunchError(
        f"{path} is no experiment of ./launch.py, and holds {kept[0]}: choose another --xid."
      )

  @classmethod
  def open(cls, path: runs.PathLike) -> "Experiment":
    """An existing experiment.

    Raises:
      LaunchError: The folder holds none, or one of another version.
    """
    folder = pathlib.Path(path).absolute()
    if not (folder / "experiment.json").is_file():
      raise LaunchError(f"{str(folder)!r} holds no experiment.json: not a launched experiment.")
    record = runs.read_json(folder / "experiment.json")
    if record.get("schema_version") != runs.SCHEMA_VERSION:
      raise LaunchError(
        f"{folder / 'experiment.json'} has schema version {record.get('schema_version')!r}; "
        f"this code reads {runs.SCHEMA_VERSION}."
      )
    return cls(folder, record)

  @property
  def xid(self) -> str:
    """The experiment's id."""
    return str(self.record["xid"])

  @property
  def title(self) -> str:
    """What it runs, for people: "factorized.train", or a sweep file's name."""
    named = ".".join(filter(None, (self.record.get("family"), self.record["task"])))
    return str(self.record.get("title", named))

  @property
  def source(self) -> pathlib.Path:
    """The frozen source."""
    return self.path / "source"

  def jobs(self) -> list[Job]:
    """All jobs: each run's task, and where the record says so each training's evaluation after it.

    In the order of their wids, but a run comes after the one that it starts from.
    """
    env = job_environment(self.record)
    source = self.source
    runs_ = self.record["runs"]
    made: dict[int, Job] = {}
    for last in runs_:
      way = [last]
      while "after" in way[-1] and way[-1]["after"] not in made:
        way.append(runs_[way[-1]["after"]])
      for run in reversed(way):
        if run["wid"] not in made:
          job = self._job(run, env, source)
          if "after" in run:
            job = dataclasses.replace(job, after=made[run["after"]])
          made[run["wid"]] = job
    jobs = list(made.values())
    if self.record["then_eval"]:
      jobs += [self._evaluation(job, env) for job in jobs if self.saves(job.wid)]
    return jobs

  def saves(self, wid: int) -> bool:
    """Whether a work unit is a training: those save checkpoints, and can be evaluated."""
    return bool(self._part(self.record["runs"][wid])["task"] == "train")

  def _part(self, run: Mapping[str, Any]) -> Mapping[str, Any]:
    """Family, task, config file and first config of a run's part; without parts, the record."""
    found: Mapping[str, Any] = self.record
    if "parts" in self.record:
      found = self.record["parts"][run["part"]]
    return found

  def job(self, kind: str, wid: int) -> Job:
    """One job, its run directory made where it is not there yet, or a loss of power damaged it.

    Raises:
      LaunchError: There is none.
    """
    runs_ = self.record["runs"]
    found = runs_[wid : wid + 1] if wid >= 0 else []
    if not found or found[0]["wid"] != wid or kind not in ("run", "eval"):
      raise LaunchError(f"{self.path} has no {kind!r} job with wid {wid}.")
    env = job_environment(self.record)
    job = self._job(found[0], env, self.source)
    if self.record["task"] != EVAL_TASK:
      try:
        runs.read_json(job.folder.work_unit_file)
      except runs.RunError:
        job.folder.create_new(self._unit(found[0]), self.xid)
    return job if kind == "run" else self._evaluation(job, env)

  def _job(self, run: Mapping[str, Any], env: Mapping[str, str], source: pathlib.Path) -> Job:
    if self.record["task"] == EVAL_TASK:
      evaluated = runs.RunDir(pathlib.Path(run["workdir"]))
      if run["use_snapshot"]:
        owner = Experiment.open(evaluated.path.parent)
        source = owner.source
        env = job_environment({**owner.record, "site": self.record.get("site")})
      job = eval_job(
        evaluated, run["family"], self.record["dataset"], source, env, self.record["args"]
      )
      return dataclasses.replace(job, wid=run["wid"])
    part = self._part(run)
    family, task = part["family"], part["task"]
    folder = runs.RunDir(self.path / f"wid={run['wid']}-{run['runname']}")
    argv = [sys.executable, "-m", f"{family}.{task}", "--workdir", str(folder.path)]
    argv += self.record["args"]
    return Job(folder.path.name, tuple(argv), folder, source, env, wid=run["wid"])

  def _evaluation(self, job: Job, env: Mapping[str, str]) -> Job:
    dataset, family = self.record["then_eval"], self._part(self.record["runs"][job.wid])["family"]
    after = eval_job(job.folder, family, dataset, self.source, env, after=job)
    return dataclasses.replace(after, wid=job.wid, kind="eval")

  def _unit(self, run: Mapping[str, Any]) -> hyper.WorkUnit:
    """A run's work unit, from the experiment's record."""
    part = self._part(run)
    config = copy.deepcopy(part["config"])
    for key, value in run["changes"].items():
      *groups, last = key.split(".")
      node = config
      for group in groups:
        node = node[group]
      node[last] = value
    return hyper.WorkUnit(
      family=part["family"],
      task=part["task"],
      config=run.get("config", config),
      wid=run["wid"],
      overrides=run["overrides"],
      runname=run["runname"],
      config_file=part["config_file"],
      part=run.get("part", ""),
    )

  def note(self, **facts: Any) -> None:
    """Adds facts to the record."""
    self.record.update(facts)
    _write_record(self.path, self.record)

  def note_submission(self, executor: Executor, ids: Mapping[str, Optional[str]]) -> None:
    """Appends what was submitted, when and with which ids to `submitted.jsonl`.

    An id of None says that the job's submission was taken back.
    """
    record = {"time": time.time(), "executor": executor.name, **executor.options(), "ids": ids}
    try:
      runs.append_jsonl(self.path / "submitted.jsonl", record)
    except OSError as e:  # The jobs are on their way.
      _warn(f"the submission could not be recorded: {e}")

  def submissions(self) -> list[dict[str, Any]]:
    """What `note_submission` noted, oldest first."""
    return runs.read_jsonl(self.path / "submitted.jsonl")

  def submitted(self) -> dict[str, tuple[str, str]]:
    """Of each submitted job, by its name: the newest submission's executor, and its id there."""
    noted = self.submissions()
    newest: dict[str, tuple[str, Optional[str]]] = {}
    # The launcher was killed after its first array's submission and before the note of it.
    if "first_array" in self.record and not any(n["executor"] == "slurm" for n in noted):
      first = self.record["first_array"]
      # A number says: so many, from wid 0 on; else the index of each wid.
      indices = first if isinstance(first, dict) else {wid: wid for wid in range(first)}
      for wid, index in indices.items():
        run = self.record["runs"][int(wid)]
        newest[self._job(run, {}, self.source).name] = ("slurm", f"{self.xid}_{index}")
    for record in noted:
      newest.update({name: (record["executor"], task) for name, task in record["ids"].items()})
    return {name: (by, task) for name, (by, task) in newest.items() if task is not None}

  def ids(self, executor: str) -> dict[str, str]:
    """The ids of the jobs that were last submitted to the executor of this name, by their names."""
    return {name: task for name, (by, task) in self.submitted().items() if by == executor}

  @contextlib.contextmanager
  def attended(self) -> Iterator[None]:
    """Held by a launcher that runs this experiment's jobs, so that two never do.

    Raises:
      RunError: Another launcher does; the message names it.
    """
    with runs.holding(self.path / _LAUNCHER_LOCK, f"The experiment {self.path}"):
      yield


def _write_record(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Writes `experiment.json`, one run a line: a hundred thousand are quickly written and read."""
  rest = {key: value for key, value in record.items() if key != "runs"}
  head = json.dumps(rest, indent=1, allow_nan=False).rsplit("\n", 1)[0]
  lines = ",\n  ".join(json.dumps(run, allow_nan=False) for run in record["runs"])
  runs.atomic_write(path / "experiment.json", f'{head},\n "runs": [\n  {lines}\n ]\n}}\n')


def mains(units: Sequence[hyper.WorkUnit]) -> list[tuple[str, str]]:
  """The families and tasks of work units, each pair once."""
  return list(dict.fromkeys((unit.family, unit.task) for unit in units))


def _part_facts(first: hyper.WorkUnit) -> dict[str, Any]:
  return {
    "family": first.family,
    "task": first.task,
    "config_file": first.config_file,
    "config": first.config,
  }


def _entry(unit: hyper.WorkUnit, first: hyper.WorkUnit) -> dict[str, Any]:
  """What the record holds of a run: enough to make its work unit from its part's first config."""
  entry = {"wid": unit.wid, "runname": unit.runname, "overrides": unit.overrides}
  if unit.part:
    entry["part"] = unit.part
  after = hyper.source_of(unit)
  if after is not None:
    entry["after"] = after
  changes = {}
  for key in runs.differences(first.config, unit.config):
    node: Any = unit.config
    for part in key.split("."):
      if not isinstance(node, dict) or part not in node:
        return {**entry, "changes": {}, "config": unit.config}
      node = node[part]
    changes[key] = node
  return {**entry, "changes": changes}


def _not_of_a_creation(path: pathlib.Path) -> list[str]:
  """What an experiment's folder holds beyond what an unfinished creation leaves, by name."""
  found = []
  for entry in sorted(path.iterdir()):
    if entry.name.startswith("wid=") and entry.is_dir():
      run = runs.RunDir(entry)
      created = (run.work_unit_file.name, run.state_file.name)
      found += [
        f"{entry.name}/{file.name}"
        for file in sorted(entry.iterdir())
        if file.name not in created and not _is_temporary(file)
      ]
      if run.state_file.exists() and run.read_state().get("state") != "PENDING":
        found.append(f"{entry.name} which was started")
    elif entry.name not in (_LAUNCHER_LOCK, "source", "source.patch") and not _is_temporary(entry):
      found.append(entry.name)
  return found


def _is_temporary(path: pathlib.Path) -> bool:
  """Whether a file is what `runs.atomic_write` leaves when it is killed."""
  return path.name.startswith(".") and path.name.endswith(".tmp")


def _clear_unfinished(path: pathlib.Path) -> None:
  """Removes what an unfinished creation left; its lock, which the caller holds, stays."""
  for entry in path.iterdir():
    if entry.is_dir() and not entry.is_symlink():
      shutil.rmtree(entry)
    elif entry.name != _LAUNCHER_LOCK:
      entry.unlink()


def find_experiment(name: str, experiments_dir: Optional[runs.PathLike] = None) -> Experiment:
  """An experiment by its id, in `experiments_dir` or the site's folders, or by its path.

  Raises:
    LaunchError: There is none, or there are two; the message says where was looked.
  """
  if os.sep in name:
    return Experiment.open(name)
  if experiments_dir is not None:
    folders = [pathlib.Path(experiments_dir).absolute()]
  else:
    folders = [configs.TRAIN_DIR, configs.ITINF_DIR, configs.SLURM_DIR]
  found = [folder / name for folder in folders if (folder / name / "experiment.json").is_file()]
  if len(found) > 1:
    raise LaunchError(f"{name!r} is in {found[0].parent} and {found[1].parent}: give its path.")
  if not found:
    files = [file for folder in folders for file in folder.glob("*/experiment.json")]
    known = [file.parent.name for file in sorted(files, key=lambda file: file.stat().st_mtime)]
    message = f"No experiment {name!r} in {' or '.join(str(f) for f in folders)}."
    message += f" The newest there: {', '.join(known[-5:])}." if known else " There are none."
    raise LaunchError(message + " Elsewhere: --experiments_dir DIR, or the experiment's path.")
  return Experiment.open(found[0])


def eval_job(
  run: runs.RunDir,
  family: str,
  dataset: str,
  source: pathlib.Path,
  env: Mapping[str, str],
  args: Sequence[str] = (),
  after: Optional[Job] = None,
) -> Job:
  """The evaluation of a run on a data set; its state and log go to `eval-<dataset>` in the run."""
  name = hyper.safe_name(dataset)
  if name != dataset:  # A path or a glob: two of them may give one safe name.
    name = f"{name[-60:]}-{hashlib.sha256(dataset.encode()).hexdigest()[:8]}"
  folder = runs.RunDir(run.path / f"eval-{name}")
  argv = [sys.executable, "-m", f"{family}.eval", "--workdir", str(run.path)]
  argv += ["--dataset", dataset, "--job_dir", str(folder.path), *args]
  return Job(f"{run.path.parent.name}/{run.path.name}/{folder.path.name}", tuple(argv), folder,
             source, env, after)  # fmt: skip


def _site_environment() -> dict[str, str]:
  return {variable: str(getattr(configs, name)) for variable, name in _SITE_VARIABLES.items()}


def job_environment(record: Mapping[str, Any]) -> dict[str, str]:
  """The site's folders and the source's commit, for jobs whose source is a snapshot elsewhere.

  Args:
    record: An experiment's record, or what `code_state` returned. A record's `site` counts: within
      a job, this process's own folders would be those beside the snapshot.
  """
  env = dict(record.get("site") or _site_environment())
  env["NTC_COMMIT"] = record["commit"] or ""
  env["NTC_DIRTY"] = {True: "1", False: "0", None: ""}[record["dirty"]]
  return env


def prepare(jobs: Sequence[Job], afresh: bool = False) -> list[Job]:
  """Makes jobs ready to be submitted (again): PENDING, with no cancellation left standing.

  A job whose folder cannot be written (a full disk) is left out, with a warning, and so is what
  comes after it.

  Args:
    jobs: None of them may be running.
    afresh: They start from nothing, so the progress of earlier attempts is forgotten.

  Returns the jobs that are ready.

  Raises:
    LaunchError: There is none.
  """
  progress = ("step", "num_steps", "detail", "num_threads")
  restarts = ("restart", "requeues", "started_from", "idle_restarts")
  forgotten = dict.fromkeys((*restarts, *(progress if afresh else ())))
  problems: dict[str, str] = {}
  for job in jobs:
    if job.after is not None and job.after.name in problems:
      problems[job.name] = f"not submitted again, for it comes after {job.after.name}"
      continue
    try:
      with contextlib.suppress(FileNotFoundError):
        job.folder.cancel_file.unlink()
      job.folder.note_state("PENDING", reason=None, **forgotten)
    except OSError as e:
      problems[job.name] = f"not submitted again: {e}"
  if problems and len(problems) == len(jobs):
    name, problem = next(iter(problems.items()))
    raise LaunchError(f"{name}: {problem}")
  for name, problem in problems.items():
    _warn(f"{name}: {problem}")
  return [job for job in jobs if job.name not in problems]


# Checks that need the families' own code, and TensorFlow: in a process of their own


def check_units(units: Sequence[hyper.WorkUnit], project_dir: pathlib.Path) -> str:
  """Has the tasks' own entry points check work units; returns what they have to say.

  Raises:
    LaunchError: A work unit cannot run.
  """
  said = []
  for family, task in mains(units):
    own = [unit for unit in units if (unit.family, unit.task) == (family, task)]
    with tempfile.TemporaryDirectory(prefix="ntc-check-") as folder:
      file = pathlib.Path(folder) / "units.json"
      runs.write_json(file, [unit.to_json() for unit in own])
      said.append(_check(project_dir, f"{family}.{task}", f"--check_units={file}"))
  return "\n".join(filter(None, said))


def check_arguments(args: Sequence[str], main: str, project_dir: pathlib.Path) -> None:
  """Has the task's own entry point parse arguments for all jobs; TensorFlow is not started.

  Raises:
    LaunchError: It does not take them.
  """
  with tempfile.TemporaryDirectory(prefix="ntc-check-") as folder:
    file = pathlib.Path(folder) / "units.json"
    runs.write_json(file, [])
    is_evaluation = main.endswith(f".{EVAL_TASK}")
    try:
      _check(project_dir, main, "--check_args" if is_evaluation else f"--check_units={file}", *args)
    except LaunchError as e:
      raise LaunchError(f"--args: {e}") from e


def check_dataset_name(dataset: str) -> None:
  """Whether a data set is a known name or could be a path; its pictures are not looked at.

  Raises:
    LaunchError: It is neither.
  """
  found = datasets.absolute(dataset)
  if found not in datasets.known() and not pathlib.Path(found).is_absolute():
    raise LaunchError(
      f"Unknown data set {dataset!r}. Known: {', '.join(datasets.known())}; or a folder, a glob."
    )


def check_dataset(dataset: str, project_dir: pathlib.Path) -> None:
  """Has common/data.py find a data set's pictures.

  Raises:
    LaunchError: There are none.
  """
  _check(project_dir, "common.data", "check", dataset)


def _check(project_dir: pathlib.Path, module: str, *args: str) -> str:
  # The GPUs are the jobs'.
  env = {**os.environ, **_site_environment(), "CUDA_VISIBLE_DEVICES": "-1"}
  env.pop("PYTHONSAFEPATH", None)  # As for jobs.
  done = subprocess.run(
    [sys.executable, "-m", module, *args], cwd=project_dir, env=env, stdin=subprocess.DEVNULL,
    capture_output=True, text=True, errors="replace", check=False,
  )  # fmt: skip
  if done.returncode == 0:
    return done.stdout.strip()
  lines = [line for line in done.stderr.splitlines() if line.strip()] or ["without a word"]
  said = [line[len("Error: ") :] for line in lines if line.startswith("Error: ")]
  if done.returncode == 2 and said:
    raise LaunchError(said[-1])
  raise LaunchError(
    f"python -m {module} {args[0].split('=')[0]} ended with {done.returncode}: {lines[-1].strip()}"
  )


# Source


def known_mains(project_dir: pathlib.Path) -> list[str]:
  """What --main can name here: "factorized.train"."""
  return sorted(
    f"{path.parent.name}.{path.stem}" for task in TASKS for path in project_dir.glob(f"*/{task}.py")
  )


def _check_entries(source: pathlib.Path, needed: Iterable[str]) -> None:
  for name in (*needed, "common/supervise.py", "common/slurm.py"):
    if not (source / name).is_file():
      raise LaunchError(f"The source snapshot lacks {name}: does .gitignore name it?")


def snapshot(
  project_dir: pathlib.Path, target: pathlib.Path, leave_out: Sequence[pathlib.Path] = ()
) -> int:
  """Copies the source as it is now, uncommitted and untracked files included; returns its bytes.

  Git's index, HEAD and stash are only read. Folders that experiments, results, models and data sets
  are written to are left out, wherever they lie.
  """
  site = [*(getattr(configs, name) for name in _SITE_VARIABLES.values()), configs.MODELS_DIR]
  written = [p for p in (*site, *leave_out) if p != project_dir and project_dir in p.parents]
  names = _git_files(project_dir)
  tracked = names is not None
  total = 0
  for name in _source_files(project_dir) if names is None else names:
    path = project_dir / name
    # Published curves are source, though they lie in the results' folder.
    if configs.PUBLISHED_DIR not in path.parents and any(p in path.parents for p in written):
      continue
    copy = target / name
    if path.is_symlink():
      copy.parent.mkdir(parents=True, exist_ok=True)
      # A relative link that leads out of the tree would lead elsewhere from the copy.
      inside = project_dir.resolve() in path.resolve().parents
      link = path.readlink()
      copy.symlink_to(link if inside and not link.is_absolute() else path.resolve())
    elif path.is_dir():  # A repository within the repository.
      shutil.copytree(path, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    elif path.is_file():  # Git still lists a file that was deleted and not committed.
      copy.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(path, copy)
      total += path.stat().st_size
  if total > _LARGE_SNAPSHOT_BYTES:
    why = "untracked files count: name data in .gitignore" if tracked else "move data elsewhere"
    print(f"Note: the source snapshot takes {total / 1e6:.0f} MB ({why}).", file=sys.stderr)
  return total


def _git(folder: pathlib.Path, *args: str) -> bytes:
  # Without the flag, and `diff` without its option, git would rewrite the user's index.
  command = ["git", "--no-optional-locks", "-C", str(folder), *args]
  return subprocess.run(command, capture_output=True, check=True).stdout


def _git_files(folder: pathlib.Path) -> Optional[list[str]]:
  """Tracked and untracked-unignored files; None outside of git."""
  try:
    top = pathlib.Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel")).rstrip("\n"))
    if top.resolve() != folder.resolve():
      command = ["git", "-C", str(top), "check-ignore", "-q", str(folder)]
      if subprocess.run(command, capture_output=True, check=False).returncode == 0:
        return None  # A copy in an ignored folder of another checkout.
    listed = _git(folder, "ls-files", "-z", "-co", "--exclude-standard")
  except (OSError, subprocess.CalledProcessError):
    return None
  return sorted({os.fsdecode(name) for name in listed.split(b"\0") if name})


def code_state(folder: pathlib.Path) -> dict[str, Any]:
  """Commit and dirty flag of the checkout that `folder` is; both None where it is none."""
  if _git_files(folder) is None:
    return {"commit": None, "dirty": None}
  return runs.git_state(folder, recorded=False)


def _source_files(folder: pathlib.Path) -> list[str]:
  """Python and other text files, for a folder without version control."""
  found = []
  for parent, folders, files in os.walk(folder):
    folders[:] = [
      d for d in folders
      if not d.startswith(".") and d not in _NOT_SOURCE
      and not (pathlib.Path(parent) / d / "experiment.json").is_file()
    ]  # fmt: skip
    for name in files:
      if name.endswith(_SOURCE_SUFFIXES):
        found.append(os.path.relpath(os.path.join(parent, name), folder))  # noqa: PTH118
  return sorted(found)


# Watching


class Progress:
  """Shows how jobs come along: bars in a terminal, a line now and then elsewhere.

  Reads `step`, `num_steps` and `detail` of each job's state record.
  """

  def __init__(
    self,
    jobs: Sequence[Job],
    stream: TextIO,
    interval: float = 30.0,
    observe: Optional[ObserveJob] = None,
  ):
    """Without an executor's `observe`, what the jobs' folders say counts.

    Args: the jobs; where to write; seconds between lines where `stream` is no terminal.
    """
    self._observe = observe or _observe_folder
    self._jobs = {job.name: job for job in jobs}
    self._stream = stream
    self._interval = interval
    self._printed = time.monotonic()
    self._open = set(self._jobs)
    self._started: set[str] = set()
    self._bars: dict[str, Any] = {}
    self._overall: Any = None
    if stream.isatty():
      import tqdm

      self._tqdm = tqdm.tqdm
      self._overall = tqdm.tqdm(total=len(jobs), desc="jobs", unit="job", file=stream, position=0)

  def update(self, unfinished: Mapping[str, str]) -> None:
    """Shows what has changed; `unfinished` is what `Executor.poll` returned."""
    running = [name for name, state in unfinished.items() if state == "RUNNING"]
    for name in running:
      if name not in self._started:
        self._started.add(name)
        self._say(f"{name}: started")
    for name in [name for name in self._jobs if name in self._open and name not in unfinished]:
      self._open.remove(name)
      self._close_bar(name)
      record = self._observe(self._jobs[name])
      if record["state"] not in OPEN_STATES:
        self._say(f"{name}: {_brief(record)}")
      if self._overall is not None:
        self._overall.update(1)
    if self._overall is not None:
      for name in running:
        self._draw(name)
    elif time.monotonic() - self._printed >= self._interval and self._open:
      self._printed = time.monotonic()
      over = len(self._jobs) - len(self._open)
      self._say(f"{over} of {len(self._jobs)} jobs ended, {len(running)} running")
      for name in running:
        record = self._jobs[name].folder.read_state()
        self._say(f"  {name}: {_steps(record)} {record.get('detail', '')}".rstrip())

  def close(self) -> None:
    """Takes the bars away."""
    for name in list(self._bars):
      self._close_bar(name)
    if self._overall is not None:
      self._overall.close()

  def _draw(self, name: str) -> None:
    record = self._jobs[name].folder.read_state()
    step = int(record.get("step") or 0)
    if name not in self._bars:
      taken = {abs(bar.pos) for bar in self._bars.values()}
      position = next(i for i in range(1, len(taken) + 2) if i not in taken)
      self._bars[name] = self._tqdm(
        total=record.get("num_steps"), initial=step, desc=name[-40:], unit="step",
        file=self._stream, position=position, leave=False,
      )  # fmt: skip
    bar = self._bars[name]
    bar.total = record.get("num_steps")
    bar.set_postfix_str(str(record.get("detail", "")), refresh=False)
    bar.n = step
    bar.refresh()

  def _close_bar(self, name: str) -> None:
    if name in self._bars:
      self._bars.pop(name).close()

  def _say(self, line: str) -> None:
    with contextlib.suppress(OSError):  # Whoever read along has gone; the jobs go on.
      if self._overall is not None:
        self._tqdm.write(line, file=self._stream)
      else:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=self._stream, flush=True)


def _steps(record: Mapping[str, Any]) -> str:
  if record.get("step") is None:
    return ""
  return f"{record['step']}/{record.get('num_steps', '?')}"


def _pace(record: Mapping[str, Any]) -> tuple[str, str]:
  """Of a running job: steps a second since this attempt started, and hours:minutes left."""
  if record["state"] != "RUNNING" or record.get("step") is None or "started" not in record:
    return "", ""
  done = int(record["step"]) - int(record.get("first_step") or 0)
  seconds = float(record["time"]) - float(record["started"])
  if done <= 0 or seconds <= 0:
    return "", ""
  rate = done / seconds
  minutes = round((int(record.get("num_steps") or record["step"]) - record["step"]) / rate / 60)
  return f"{rate:.3g}", f"{minutes // 60}:{minutes % 60:02d}"


def _brief(record: Mapping[str, Any]) -> str:
  reason = record.get("reason")
  return f"{record['state']}{f' ({reason})' if reason else ''}"


def wait(executor: Executor, progress: Progress, seconds: float = 0.1) -> bool:
  """Runs submitted jobs to their ends; returns whether it was told to stop.

  The first SIGINT, SIGTERM or SIGHUP asks the jobs to save their state and stop, and waits for
  them; a second SIGINT kills them.
  """
  received: list[int] = []
  handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  before = {number: signal.getsignal(number) for number in handled}
  for number in handled:
    if before[number] != signal.SIG_IGN:  # What nohup made deaf, stays deaf.
      signal.signal(number, lambda n, frame: received.append(n))
  asked = killed = False
  try:
    while True:
      if received and not asked:
        asked = True
        name = signal.Signals(received[0]).name
        print(f"\n{name}: jobs are asked to save their state and stop. Ctrl-C again kills them.",
              file=sys.stderr, flush=True)  # fmt: skip
        executor.stop()
      elif not killed and signal.SIGINT in received[1:]:
        killed = True
        executor.stop(kill=True)
      unfinished = executor.poll()
      progress.update(unfinished)
      if not unfinished:
        return asked
      time.sleep(seconds)
  finally:
    progress.close()
    for number, handler in before.items():
      signal.signal(number, handler)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Rows as aligned columns; the last one is not padded."""
  lines = [[str(cell) for cell in row] for row in (header, *rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
  return "\n".join(
    "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
  )


def states_table(
  jobs: Sequence[Job], observe: Optional[ObserveJob] = None
) -> tuple[str, dict[str, int]]:
  """Every job's state, progress, reason and log as a table, and how many jobs are in each state."""
  rows = []
  counts: dict[str, int] = {}
  for job in jobs:
    record = (observe or _observe_folder)(job)
    counts[record["state"]] = counts.get(record["state"], 0) + 1
    why = record.get("reason") or (record.get("detail", "") if record["state"] == "RUNNING" else "")
    log = str(job.folder.log_file) if job.folder.log_file.exists() else record.get("log", "")
    rate, left = _pace(record)
    attempt = record.get("attempt", "")
    rows.append((job.name, record["state"], _steps(record), rate, left, attempt, why, log))
  header = ("job", "state", "step", "steps/s", "left", "attempt", "reason", "log")
  return table(header, rows), counts
