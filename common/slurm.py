"""Sweeps on Slurm: job arrays made from an experiment's record, and what runs in each task of them.

An array's task knows only its index; kind and wid of its job follow from the batch script's words:

    python -m common.slurm EXPERIMENT run 2000       (this task: wid 2000 + SLURM_ARRAY_TASK_ID)

All else is read from EXPERIMENT/experiment.json, so no value passes through a shell. Arrays are
submitted held and released when the experiment's folder is whole: the first array's id is its name.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

from common import launchers, runs, supervise

FIELDS = ("job_name", "array", "log_file", "source", "command")

# Where `scontrol show config` cannot be asked: Slurm's own default.
DEFAULT_MAX_ARRAY_SIZE = 1001

# A task that was heard of within this many seconds is not LOST, whatever Slurm says.
STALE_SECONDS = launchers.STALE_SECONDS
_LOOK_AGAIN_SECONDS = 0.2
_LOCK_SECONDS = 60.0
_COMMAND_SECONDS = 120.0
_REQUEUE_ATTEMPTS = 4

_ACTIVE = (
  "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "REQUEUED",
  "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT",
)  # fmt: skip
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
# What Slurm's last word on a task means where the task's own record is not final.
_ENDED = {
  "TIMEOUT": "TIMEOUT",
  "DEADLINE": "TIMEOUT",
  "PREEMPTED": "TIMEOUT",
  "CANCELLED": "CANCELLED",
  "REVOKED": "CANCELLED",
  "NODE_FAIL": "LOST",
  "BOOT_FAIL": "LOST",
  "OUT_OF_MEMORY": "FAILED",
  "FAILED": "FAILED",
  "COMPLETED": "FAILED",
}
_FINAL = ("DONE", "FAILED", "TIMEOUT", "CANCELLED")

# The launcher decides these for each array; of another cluster it could ask nothing.
_RESERVED = ("array", "wrap", "test-only", "wait", "parsable", "output", "clusters")
_RESERVED_LETTERS = "aWoM"
# Options of sbatch that take no value, or take it after "=" only.
_NO_VALUE = (
  "contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "kill-on-invalid-dep", "nice",
  "no-kill", "no-requeue", "overcommit", "oversubscribe", "propagate", "quiet", "reboot", "requeue",
  "spread-job", "use-min-nodes", "verbose",
)  # fmt: skip
_NO_VALUE_LETTERS = "HOQksv"


# Without these a template works, until something happens.
_NEEDED = {
  "^#SBATCH --requeue": "a preempted task does not start again, an interrupted one is TIMEOUT",
  "^#SBATCH --signal=B:USR2": "a time limit kills tasks before they have saved their state",
  "^exec ": "signals do not reach the supervisor",
}


class SlurmError(launchers.LaunchError):
  """A Slurm command failed; the message holds its own words, `code` its exit code."""

  def __init__(self, message: str, code: Optional[int] = None):
    super().__init__(message)
    self.code = code


# What a job is given of its own: Slurm's words, and its GPUs.
_OF_A_JOB = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")
_GPUS_OF_A_JOB = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")
_OF_A_TASK = ("NTC_WORKERS", "NTC_SUPERVISED")
# What people set for their own eyes would hide tasks from the launcher.
_VIEWS = ("SQUEUE_", "SACCT_", "SCANCEL_")


def environment() -> dict[str, str]:
  """This process's environment for Slurm's commands: from within a job, without that job's own."""
  env = {name: value for name, value in os.environ.items() if not name.startswith(_VIEWS)}
  for name in ("PYTHONSAFEPATH", *_OF_A_TASK):  # `python -m` must find the source in the cwd.
    env.pop(name, None)
  if "SLURM_JOB_ID" in env:
    for name in list(env):
      if name in _GPUS_OF_A_JOB or (name.startswith(_OF_A_JOB) and name != "SLURM_CONF"):
        del env[name]
  return env


def call(*argv: str, text: Optional[str] = None) -> str:
  """Runs a Slurm command; returns its standard output.

  Raises:
    SlurmError: It is not here, failed, or did not answer.
  """
  return _run(*argv, text=text).stdout


def _run(*argv: str, text: Optional[str] = None) -> "subprocess.CompletedProcess[str]":
  """`call` with both outputs."""
  try:
    done = subprocess.run(
      argv, env=environment(), input=text or "", capture_output=True, text=True, errors="replace",
      timeout=_COMMAND_SECONDS, check=False, start_new_session=True,  # A terminal's Ctrl-C is ours.
    )  # fmt: skip
  except FileNotFoundError as e:
    raise SlurmError(f"There is no {argv[0]!r} on the PATH.") from e
  except subprocess.TimeoutExpired as e:
    said: Any = e.stderr or b""  # Bytes, even of a text.
    words = " ".join((said if isinstance(said, str) else said.decode(errors="replace")).split())
    message = f"{argv[0]} did not answer within {_COMMAND_SECONDS:.0f} s. {words}"
    raise SlurmError(message.strip()) from e
  if done.returncode:
    words = " ".join((done.stderr.strip() or done.stdout.strip()).split())
    raise SlurmError(
      f"{argv[0]} failed ({done.returncode}): {words or 'without a word'}", done.returncode
    )
  return done


# Batch scripts


def fill(template: str, values: Mapping[str, str]) -> str:
  """A batch script: `{field}` replaced by its value; a shell's `${VARIABLE}` is left alone.

  Raises:
    launchers.LaunchError: A field is unknown or missing.
  """
  pattern = r"(?<!\$)\{([A-Za-z_]\w*)\}"
  named = re.findall(pattern, template)
  unknown = sorted(set(named) - set(FIELDS))
  missing = [name for name in FIELDS if name not in named]
  if unknown or missing:
    problems = [f"unknown field {{{name}}}" for name in unknown]
    problems += [f"missing field {{{name}}}" for name in missing]
    raise launchers.LaunchError(
      f"slurm_template.py: {', '.join(problems)}. "
      f"The fields are {', '.join(f'{{{name}}}' for name in FIELDS)}."
    )
  return re.sub(pattern, lambda match: values[match.group(1)], template)


def _sbatch_word(text: str) -> str:
  """A value as an #SBATCH line takes it."""
  if re.fullmatch(r"[\w./,:@%+=-]+", text):
    return text
  return '"' + text.replace('"', '\\"') + '"'


def ranges(indices: Iterable[int]) -> str:
  """Ascending numbers as Slurm and people write them: "0-3,7"."""
  parts: list[list[int]] = []
  for index in indices:
    if parts and index == parts[-1][1] + 1:
      parts[-1][1] = index
    else:
      parts.append([index, index])
  return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


@dataclasses.dataclass(frozen=True)
class _Array:
  """Jobs that go into one array: their indices there are their wids minus `offset`.

  Attributes:
    kind: "run" or "eval".
    offset: The wid of index 0.
    wids: The jobs' wids.
    source: Of runs, the wid of the run of this submission that all of them wait for, or None; of
      evaluations, that of their runs.
    after: Whether these are evaluations of runs of this submission: of the array with the same
      offset and source, task by task.
  """

  kind: str
  offset: int
  wids: tuple[int, ...]
  source: Optional[int] = None
  after: bool = False

  def spec(self, at_once: Optional[int] = None) -> str:
    limit = f"%{at_once}" if at_once else ""
    return ranges(wid - self.offset for wid in self.wids) + limit


def _arrays(jobs: Sequence[launchers.Job], size: int) -> list[_Array]:
  """Jobs as arrays of indices below `size`, in the order of submission."""
  sources: dict[str, Optional[int]] = {}
  wids: dict[tuple[bool, str, int, Optional[int]], list[int]] = {}
  for job in jobs:
    first = job.after if job.after is not None and job.after.name in sources else None
    source = first.wid if first is not None else None
    after = first is not None and job.kind == "eval"
    if first is not None and after:
      source = sources[first.name]
    sources[job.name] = source
    wids.setdefault((after, job.kind, job.wid - job.wid % size, source), []).append(job.wid)

  def order(item: tuple[tuple[bool, str, int, Optional[int]], list[int]]) -> tuple[bool, str, int]:
    (after, kind, offset, source), _ = item
    waits = after or source is not None  # Those that do, stay in the jobs' order.
    return (True, "", 0) if waits else (False, kind, offset)

  return [
    _Array(kind, offset, tuple(sorted(found)), source, after)
    for (after, kind, offset, source), found in sorted(wids.items(), key=order)
  ]


def _first_array(wids: Sequence[int], size: int) -> _Array:
  """The first array of runs that wait for no other run."""
  offset = wids[0] - wids[0] % size
  return _Array("run", offset, tuple(wid for wid in wids if wid < offset + size))


def _dependency(array: _Array, submitted: Mapping[_Array, str]) -> Optional[str]:
  """What the array waits for, as sbatch takes it; a requeue of that is no end of it."""
  for other, xid in submitted.items():
    if array.after:
      if (other.kind, other.offset, other.source) == ("run", array.offset, array.source):
        return f"aftercorr:{xid}"
    elif array.source is not None and other.kind == "run" and array.source in other.wids:
      return f"afterok:{xid}_{array.source - other.offset}"
  return None


# Submission


class SlurmExecutor(launchers.Executor):
  """Runs jobs as Slurm's job arrays, in chunks where there are more than an array can hold."""

  name = "slurm"
  detached = True

  def __init__(
    self,
    template: str,
    sargs: Sequence[str] = (),
    at_once: Optional[int] = None,
    max_requeues: int = 100,
  ):
    """Options for every array.

    Args:
      template: The batch script with `FIELDS`.
      sargs: Further arguments for sbatch.
      at_once: How many tasks of an array run at once; None: as many as Slurm likes.
      max_requeues: After a time limit a task is requeued this often at most.
    """
    if at_once is not None and at_once < 1:
      raise launchers.LaunchError(f"--jobs={at_once}: at least one job must run at a time.")
    self._template, self._sargs, self._at_once = template, list(sargs), at_once
    self._max_requeues = max_requeues
    self._reserved: Optional[tuple[str, _Array, str]] = None
    self._size: Optional[int] = None
    self._view = View({})
    self._logs = pathlib.Path()

  def options(self) -> dict[str, Any]:
    """What sbatch is given, and the limits."""
    return {"sargs": self._sargs, "jobs": self._at_once, "max_requeues": self._max_requeues}

  def check(self) -> None:
    """See `Executor`; the template's fields and --sargs are looked at, too."""
    self._check_text()
    if shutil.which("sbatch") is None:
      raise launchers.LaunchError(
        "There is no 'sbatch' on the PATH: submit from a login node of the cluster, "
        "or run the sweep on this machine with --executor=local."
      )

  def _check_text(self) -> None:
    fill(self._template, dict.fromkeys(FIELDS, ""))
    for part, lost in _NEEDED.items():
      if not re.search(part, self._template, re.MULTILINE):
        _say(f"slurm_template.py has no line {part.lstrip('^')!r}: {lost}.")
    may_be_value = False
    for i, arg in enumerate(self._sargs):
      option, _, value = arg.partition("=")
      if not arg.startswith("-") and not may_be_value:
        raise launchers.LaunchError(
          f"--sargs: {arg!r} is no option, and sbatch would take it for the batch script."
        )
      may_be_value = _takes_next(arg)
      if _is_reserved(option):
        raise launchers.LaunchError(
          f"--sargs: {arg!r} is set by the launcher, or the launcher cannot work with it."
        )
      if len(option) > 4 and "--signal".startswith(option):
        value = value or (self._sargs[i + 1] if i + 1 < len(self._sargs) else "")
        if not value.startswith(("B:USR2", "BR:USR2", "RB:USR2", "B:SIGUSR2")):
          raise launchers.LaunchError(
            f"--sargs: --signal={value}: the supervisor waits for B:USR2@<seconds>."
          )

  def max_array_size(self) -> int:
    """The cluster's MaxArraySize: indices lie below it."""
    if self._size is None:
      self._size = DEFAULT_MAX_ARRAY_SIZE
      try:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.M)
      except SlurmError as e:
        _say(f"{e} MaxArraySize is taken to be {self._size}.")
      else:
        if found and int(found.group(1)) > 0:
          self._size = int(found.group(1))
    return self._size

  def _script(
    self, array: _Array, folder: Optional[pathlib.Path], parent: pathlib.Path, title: str
  ):
    """The batch script; `folder` is None where Slurm's id will name it, within `parent`."""
    where = str(folder or parent)
    if re.search(r"[\n\r\\]", where):
      raise launchers.LaunchError(
        f"{where!r}: Slurm takes no line breaks and backslashes in paths."
      )
    logs, quoted = where.replace("%", "%%"), shlex.quote(where)
    if folder is None:
      logs, quoted = f"{logs}/%A", f'{quoted}/"$SLURM_ARRAY_JOB_ID"'
    program = [sys.executable, "-m", "common.slurm"]
    return fill(
      self._template,
      {
        "job_name": _sbatch_word(title if array.kind == "run" else f"{title}-then-eval"),
        "array": array.spec(self._at_once),
        "log_file": _sbatch_word(f"{logs}/logs/%A_%a.txt"),
        "source": f"{quoted}/source",
        "command": f"{shlex.join(program)} {quoted} {array.kind} {array.offset}",
      },
    )

  def preview(
    self,
    sources: Sequence[Optional[int]],
    parent: pathlib.Path,
    title: str,
    evaluated: Sequence[int] = (),
  ) -> str:
    """The commands and the first array's batch script for a new sweep; Slurm is not needed.

    Args:
      sources: For each wid, that of the run that it waits for, or None.
      parent: Where the experiment will lie.
      title: Of the experiment.
      evaluated: The wids of the runs that evaluations follow.
    """
    self._check_text()
    size = self.max_array_size() if shutil.which("scontrol") else DEFAULT_MAX_ARRAY_SIZE
    first = _first_array([wid for wid, source in enumerate(sources) if source is None], size)
    lines = [shlex.join(["sbatch", "--parsable", "--hold", *self._sargs])]
    chunks = len({wid // size for wid, source in enumerate(sources) if source is None})
    lines.append(f"# {chunks} array{'s' * (chunks > 1)} of up to {size} tasks (MaxArraySize)")
    waiting = [(source, wid // size) for wid, source in enumerate(sources) if source is not None]
    if waiting:
      lines.append(
        f"# then {len(set(waiting))} with --dependency=afterok:<id>_<index> for the {len(waiting)} "
        "runs that start from another"
      )
    if evaluated:
      count = len({(sources[wid], wid // size) for wid in evaluated})
      lines.append(f"# then {count} with --dependency=aftercorr:<id> for the evaluations")
    return "\n".join([*lines, "", self._script(first, None, parent, title)])

  def test_only(self, wids: Sequence[int], parent: pathlib.Path, title: str) -> str:
    """What `sbatch --test-only` says to the first array of these wids; nothing is submitted.

    Raises:
      SlurmError: Slurm would refuse it.
    """
    self.check()
    array = _first_array(wids, self.max_array_size())
    script = self._script(array, None, parent, title)
    done = _run("sbatch", "--test-only", *self._sargs, text=script)
    return (done.stderr.strip() + "\n" + done.stdout.strip()).strip()

  def _sbatch(self, script: str, more: Sequence[str] = ()) -> str:
    done = _run("sbatch", "--parsable", "--hold", *self._sargs, *more, text=script)
    if done.stderr.strip():  # What the site has to say of a job that it took.
      print(done.stderr.strip(), file=sys.stderr, flush=True)
    ids = re.findall(r"^(\d+)(?:;(.*))?$", done.stdout, re.MULTILINE)
    if not ids:
      raise SlurmError(f"sbatch gave no job id: {done.stdout.strip()!r}")
    xid, cluster = ids[-1]
    if cluster and cluster != self._cluster():
      _scancel(["-M", cluster, xid])
      raise SlurmError(
        f"sbatch went to the cluster {cluster!r}, of which the launcher cannot ask anything; array "
        f"{xid} is cancelled there. Launch on a login node of {cluster!r}."
      )
    return str(xid)

  def _cluster(self) -> Optional[str]:
    """The name of the cluster that Slurm's commands ask."""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", call("scontrol", "show", "config"), re.M)
    return found[1] if found else None

  def reserve(
    self, experiments_dir: pathlib.Path, wids: Sequence[int], title: str
  ) -> Optional[str]:
    """Submits the first array, held; its id names the experiment."""
    array = _first_array(wids, self.max_array_size())
    script = self._script(array, None, experiments_dir, title)
    with launchers.STOPS.held():
      try:
        xid = self._sbatch(script)
      except SlurmError as e:
        raise SlurmError(f"{e} (To run on this machine instead: --executor=local.)", e.code) from e
      self._reserved = (xid, array, script)
    return xid

  def reserved(self) -> dict[str, Any]:
    """See `Executor`: the wids below this number are in the first array, or the index of each."""
    if self._reserved is None:
      return {}
    array = self._reserved[1]
    count = len(array.wids)
    if array.wids == tuple(range(count)):
      return {"first_array": count}
    return {"first_array": {str(wid): wid - array.offset for wid in array.wids}}

  def give_up(self, experiment: Optional[launchers.Experiment]) -> None:
    """Cancels the array that `reserve` submitted."""
    with launchers.STOPS.held():
      if self._reserved is not None:
        xid, self._reserved = self._reserved[0], None
        _scancel([xid])
        if experiment is not None:
          experiment.note_submission(self, {})

  def submit(
    self, jobs: Sequence[launchers.Job], experiment: Optional[launchers.Experiment] = None
  ) -> dict[str, str]:
    """Submits the jobs' arrays held, notes them in the experiment, and releases them.

    A stop before the release takes all of it back.

    Raises:
      launchers.PartlySubmitted: See `Executor`.
      KeyboardInterrupt: A stop, see `launchers.Stops`.
    """
    assert experiment is not None
    names = {(job.kind, job.wid): job.name for job in jobs}
    ids: dict[str, str] = {}
    submitted: dict[_Array, str] = {}
    failed: Optional[SlurmError] = None
    try:
      arrays = _arrays(jobs, self.max_array_size())
      (experiment.path / "logs").mkdir(exist_ok=True)
      for array in arrays:
        with launchers.STOPS.held():
          dependency = _dependency(array, submitted)
          xid = self._submit_array(array, dependency, experiment)
          submitted[array] = xid
          tasks = {names[(array.kind, w)]: f"{xid}_{w - array.offset}" for w in array.wids}
          ids.update(tasks)
          experiment.note_submission(self, tasks)
    except SlurmError as e:
      failed = e
    except BaseException:
      self._take_back(submitted.values(), ids, experiment)
      raise
    if self._reserved is not None and self._reserved[0] not in submitted.values():
      _scancel([self._reserved[0]])  # Of other jobs than these.
    self._reserved = None
    released = ",".join(submitted.values())
    if released and not self._is_held():
      with launchers.STOPS.held():
        try:
          call("scontrol", "release", released)
        except SlurmError as e:
          failed = failed or SlurmError(f"{e} To release by hand: scontrol release {released}.")
        launchers.STOPS.forget()  # The jobs are on their way.
    if failed is not None:
      missing = ranges(sorted({job.wid for job in jobs if job.name not in ids}))
      done = ", ".join(
        f"{array.kind} {ranges(array.wids)} as {xid}" for array, xid in submitted.items()
      )
      message = f"{failed} Submitted: {done or 'nothing'}."
      message += f" Not submitted: wid {missing}." if missing else ""
      raise launchers.PartlySubmitted(message, ids)
    return ids

  def _is_held(self) -> bool:
    return any(arg in ("--hold", "-H") for arg in self._sargs)

  def _submit_array(
    self,
    array: _Array,
    dependency: Optional[str],
    experiment: launchers.Experiment,
  ) -> str:
    """Submits an array, held, where `reserve` has not done so; returns its id."""
    if self._reserved is not None and self._reserved[1] == array:
      xid, _, script = self._reserved
    else:
      more = []
      if dependency is not None:
        more = [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
      script = self._script(array, experiment.path, experiment.path.parent, experiment.title)
      xid = self._sbatch(script, more)
    runs.atomic_write(experiment.path / "sbatch" / f"{xid}.sh", script, sync=False)
    return xid

  def _take_back(
    self, arrays: Iterable[str], ids: Mapping[str, str], experiment: launchers.Experiment
  ) -> None:
    """Cancels held arrays, and notes that their jobs are not submitted."""
    with launchers.STOPS.held():
      found = list(arrays)
      if self._reserved is not None and self._reserved[0] not in found:
        found.append(self._reserved[0])
      self._reserved = None
      _scancel(found)
      experiment.note_submission(self, dict.fromkeys(ids))
      launchers.STOPS.forget()

  def poll(self) -> dict[str, str]:
    """Nothing is waited for: see `follow` and `observe`."""
    return {}

  def stop(self, kill: bool = False) -> None:
    """Nothing runs here."""

  def follow(self, experiment: launchers.Experiment) -> Sequence[str]:
    """Asks squeue, and of what it does not list sacct."""
    self._logs = experiment.path / "logs"
    self._view = View(experiment.ids(self.name))
    self._view.submitted = max((float(n["time"]) for n in experiment.submissions()), default=0.0)
    return self._view.look(experiment.jobs())

  def observe(self, job: launchers.Job) -> dict[str, Any]:
    """A job's own record, and where that is not final what Slurm says."""
    record = self._view.judged(job)
    if record["state"] in ("FAILED", "LOST", "TIMEOUT") and not job.folder.log_file.exists():
      log = self._logs / f"{self._view.ids.get(job.name)}.txt"
      return {**record, "log": str(log)} if log.exists() else record
    return record

  def advice(self, jobs: Sequence[launchers.Job]) -> Sequence[str]:
    """See `Executor`: arrays that were submitted held, and not released."""
    held: dict[str, int] = {}
    for job in jobs:
      task = self._view.ids.get(job.name, "")
      if self._view.answers.get(task, ("", ""))[1].startswith("JobHeld"):
        held[task.split("_")[0]] = held.get(task.split("_")[0], 0) + 1
    if not held:
      return ()
    return [
      f"{sum(held.values())} jobs are held, by --hold or because the launcher was killed before it "
      f"released them. To let them start: scontrol release {','.join(held)}"
    ]

  def queued(self, jobs: Sequence[launchers.Job]) -> dict[str, str]:
    """See `Executor`; the jobs that Slurm still has, and may run, are among them."""
    found = dict(super().queued(jobs))
    view = View(self._view.ids)
    by_name = {job.name: job for job in jobs}
    wanted = {name: view.ids[name] for name in by_name if name in view.ids}
    notes: list[str] = []
    if wanted:
      view.ask_squeue(list(wanted.values()), notes)
    for note in notes:
      raise launchers.LaunchError(f"Which jobs are still queued is not known: {note}")
    for name, task in wanted.items():
      state, reason = view.answers.get(task, ("", ""))
      if state not in _ACTIVE or reason == "DependencyNeverSatisfied":
        continue
      if reason == "Dependency" and launchers.is_stuck(by_name[name], self._view.judged):
        continue  # Slurm has yet to notice that it can never start.
      found[name] = f"Slurm's task {task}, which is {state}"
    return found

  def cancel(self, jobs: Sequence[launchers.Job], ids: Mapping[str, str]) -> dict[str, str]:
    """Marks the jobs that are not over as cancelled, and has Slurm stop them."""
    fates = {}
    marked = []
    for job in jobs:
      state = self.observe(job)["state"]
      if state not in (*launchers.OPEN_STATES, "REQUEUED"):
        fates[job.name] = f"is {state} already"
        continue
      runs.atomic_write(job.folder.cancel_file, f"cancelled {time.ctime()}\n", sync=False)
      marked.append(job)
    _scancel(_whole_arrays([job.name for job in marked], ids))
    for job in marked:
      own = {"state": "PENDING", **job.folder.read_state()}
      if own["state"] == "RUNNING" and self.observe(job)["state"] == "RUNNING":
        fates[job.name] = "is asked to save its state and stop"
      elif own["state"] in ("PENDING", "REQUEUED", "RUNNING"):
        job.folder.note_state("CANCELLED", reason=f"cancelled while {own['state']}")
        fates[job.name] = f"was {own['state']}, is CANCELLED"
      else:
        fates[job.name] = f"is {own['state']}"
    return fates


def _is_reserved(option: str) -> bool:
  """Whether an option is the launcher's, abbreviated as getopt permits."""
  if option.startswith("--"):
    return len(option) > 2 and any(name.startswith(option[2:]) for name in _RESERVED)
  return option.startswith("-") and option[1:2] in tuple(_RESERVED_LETTERS)


def _takes_next(arg: str) -> bool:
  """Whether the word after this one of sbatch's may be its value."""
  if arg.startswith("--"):
    return "=" not in arg and arg[2:] not in _NO_VALUE
  return len(arg) == 2 and arg[0] == "-" and arg[1] not in _NO_VALUE_LETTERS


def _whole_arrays(names: Sequence[str], ids: Mapping[str, str]) -> list[str]:
  """The ids of jobs as scancel takes them, an array as one where all of its tasks are meant."""
  wanted: dict[str, set[int]] = {}
  there: dict[str, set[int]] = {}
  for task in ids.values():
    xid, _, index = task.partition("_")
    there.setdefault(xid, set()).add(int(index))
  for name in names:
    if name in ids:
      xid, _, index = ids[name].partition("_")
      wanted.setdefault(xid, set()).add(int(index))
  return [
    xid if found == there[xid] else f"{xid}_[{ranges(sorted(found))}]"
    for xid, found in wanted.items()
  ]


def _scancel(ids: Iterable[str]) -> None:
  ids = list(ids)
  if ids:
    try:
      call("scancel", *ids)
    except SlurmError as e:
      _say(f"{e} To cancel by hand: scancel {' '.join(ids)}")


def _say(text: str) -> None:
  print(f"Warning: {text}", file=sys.stderr, flush=True)


# Status

# Slurm's word on a task: state and reason.
Answer = tuple[str, str]


class View:
  """What Slurm says of tasks, asked for all of them at once."""

  def __init__(self, ids: Mapping[str, str]):
    """`ids`: each job's newest task id by the job's name, {"wid=0-...": "12_0"}."""
    self.ids = dict(ids)
    self.answers: dict[str, Answer] = {}
    self.misses: dict[str, int] = {}
    self.submitted = 0.0
    self._now = time.time()

  def look(self, jobs: Sequence[launchers.Job]) -> list[str]:
    """Asks Slurm about the jobs whose own records are not final; returns notes for people."""
    notes: list[str] = []
    records = {
      self.ids[job.name]: (job, record)
      for job in jobs
      if job.name in self.ids
      for record in [{"state": "PENDING", **job.folder.read_state()}]
      if record["state"] not in _FINAL
    }
    if not records:
      return notes
    unknown = self.ask_squeue(list(records), notes)
    if unknown:
      self._ask_sacct(unknown)
      unknown = [
        task for task in unknown
        if task not in self.answers and self._age(*records[task]) >= STALE_SECONDS
      ]  # fmt: skip
    if unknown and not notes:
      time.sleep(_LOOK_AGAIN_SECONDS)
      unknown = self.ask_squeue(unknown, notes)
      self._ask_scontrol([t for t in unknown if records[t][1]["state"] != "RUNNING"])
    return notes

  def ask_squeue(self, wanted: Sequence[str], notes: list[str]) -> list[str]:
    """Asks about tasks; returns those that squeue does not list, and notes why it is silent."""
    arrays = ",".join(dict.fromkeys(task.split("_")[0] for task in wanted))
    try:
      said = call("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%r", "-j", arrays)
    except SlurmError as e:
      if "Invalid job id specified" not in str(e):  # It has forgotten all of them.
        notes.append(f"{e} The states are the runs' own.")
        return list(wanted)
      said = ""
    found = {}
    for line in said.splitlines():
      task, _, rest = line.strip().partition("|")
      state, _, reason = rest.partition("|")
      found[task] = (state, reason)
    for task in wanted:
      if task in found:
        self.answers[task] = found[task]
      else:
        self.misses[task] = self.misses.get(task, 0) + 1
    return [task for task in wanted if task not in found]

  def _ask_sacct(self, wanted: Sequence[str]) -> None:
    arrays = ",".join(dict.fromkeys(task.split("_")[0] for task in wanted))
    asked = set(wanted)
    try:
      said = call("sacct", "-n", "-P", "-X", "-j", arrays, "-o", "JobID,State,ExitCode")
    except SlurmError:  # Many sites have none.
      return
    for line in said.splitlines():
      task, _, rest = line.strip().partition("|")
      state, _, code = rest.partition("|")
      if task in asked and state:
        self.answers[task] = (state.split()[0], f"exit code {code}")

  def _ask_scontrol(self, wanted: Sequence[str]) -> None:
    """Asks about tasks that wait: they have no heartbeat, so only Slurm's lists tell of them."""
    for xid in dict.fromkeys(task.split("_")[0] for task in wanted):
      tasks = [task for task in wanted if task.split("_")[0] == xid]
      try:
        said = call("scontrol", "-o", "show", "job", xid)
      except SlurmError as e:
        if "Invalid job id specified" not in str(e):
          for task in tasks:
            self.misses[task] = 0  # Nobody has said that it is gone.
        continue
      for line in said.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        for task in tasks:
          if _is_among(int(task.split("_")[1]), fields.get("ArrayTaskId", "")):
            self.answers[task] = (fields.get("JobState", ""), fields.get("Reason", ""))

  def judged(self, job: launchers.Job) -> dict[str, Any]:
    """A job's state record, completed by what Slurm said."""
    record = {"state": "PENDING", **job.folder.read_state()}
    if record["state"] in _FINAL:
      return record
    if job.kind == "run":
      return launchers.with_reason(job, self._judged_run(job, record), self._judged_run)
    if job.after is not None and record["state"] == "PENDING":
      first = self.judged(job.after)
      if first["state"] in ("FAILED", "CANCELLED", "TIMEOUT", "LOST"):
        reason = f"not started: {job.after.name} is {first['state']}"
        return {**record, "state": "CANCELLED", "reason": reason}
    return self._judged_alone(job, record)

  def _judged_alone(self, job: launchers.Job, record: dict[str, Any]) -> dict[str, Any]:
    if record["state"] in _FINAL:
      return record
    task = self.ids.get(job.name)
    if task is None and record["state"] == "RUNNING":  # Started elsewhere than on Slurm.
      return launchers.observe(job.folder)
    if task is None:
      return {**record, "reason": "not submitted: rerun does that"}
    return judge(record, self.answers.get(task), self.misses.get(task, 0), self._age(job, record))

  def _judged_run(
    self, job: launchers.Job, record: Optional[dict[str, Any]] = None
  ) -> dict[str, Any]:
    """`judged` of a run, whatever it waits for."""
    record = record or {"state": "PENDING", **job.folder.read_state()}
    found = self._judged_alone(job, record)
    gone = found["state"] in ("CANCELLED", "LOST") and record["state"] == "PENDING"
    if job.after is None or not gone:
      return found
    # Slurm cancels what waits for a task that failed, and forgets it.
    return {**record, "reason": "Slurm has given its task up: rerun submits it"}

  def _age(self, job: launchers.Job, record: Mapping[str, Any]) -> float:
    """Seconds since the job was last heard of; infinite if its supervisor was here and is gone."""
    heard = max(float(record.get("time", 0)), self.submitted)
    if record["state"] == "RUNNING":
      here = record.get("host") == socket.gethostname()
      if here and runs.lock_holder(job.folder.supervisor_lock_file) is None:
        return float("inf")
      with contextlib.suppress(OSError):
        heard = max(heard, job.folder.supervisor_lock_file.stat().st_mtime)
    return self._now - heard


def _is_among(index: int, spec: str) -> bool:
  """Whether scontrol means the index by "0-3,8-20:4%2"; a long list that it cuts is "0,2,..."."""
  parts = spec.split("%")[0].split(",")
  for i, part in enumerate(parts):
    match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
    if match is None:
      return "..." in "".join(parts[i:])
    first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
    if first <= index <= last and (index - first) % step == 0:
      return True
  return False


def judge(
  record: Mapping[str, Any], answer: Optional[Answer], misses: int, age: float
) -> dict[str, Any]:
  """A job's state from its own record and Slurm's answer; the record's own end always counts.

  Args:
    record: The job's state record.
    answer: Slurm's state and reason; None where it did not list the task.
    misses: How often Slurm answered without listing the task.
    age: Seconds since the job was last heard of.
  """
  state = record["state"]
  fresh = age < STALE_SECONDS
  if state in _FINAL:
    return dict(record)
  if answer is not None and answer[0] in _ACTIVE:
    if answer[1] == "DependencyNeverSatisfied":
      return {**record, "state": "CANCELLED", "reason": "its dependency cannot be met any more"}
    if answer[0] not in _WAITING:
      return {**record, **({} if state == "RUNNING" else {"reason": f"Slurm: {answer[0]}"})}
    if state == "RUNNING":
      if fresh:
        return dict(record)
      return {**record, "state": "REQUEUED", "reason": f"starts again (Slurm: {answer[1]})"}
    return {**record, "reason": f"Slurm: {answer[1]}"}
  if state == "RUNNING" and fresh:
    return dict(record)
  if answer is not None:
    if answer[0] == "COMPLETED" and fresh:  # Its end mark may be on its way through the network.
      return dict(record)
    mapped = _ENDED.get(answer[0], "LOST")
    words = f"Slurm: {answer[0]} ({answer[1]}), and the task left no end mark; see its log"
    return {**record, "state": mapped, "reason": words}
  if misses >= 2 and not fresh:
    words = "its process is gone without a word" if age == float("inf") else "not heard of since"
    words += "" if age == float("inf") else f" {age / 60:.0f} min"
    return {**record, "state": "LOST", "reason": f"Slurm does not list it; {words}"}
  return dict(record)


# In the job


class _Requeues(supervise.Restarts):
  """A task that its time limit interrupts is requeued by scontrol; within limits."""

  def __init__(self, folder: runs.RunDir, max_requeues: int, task: str, saves: bool = True):
    """Args: the job's folder; how often at most; "12_0"; whether checkpoints show its progress."""
    self._folder, self._max, self._task, self._saves = folder, max_requeues, task, saves
    self._wanted = False
    self._sent: Sequence[int] = ()

  def _newest(self) -> str:
    """The newest checkpoint's name; empty where there is none."""
    return max((path.name for path in self._folder.checkpoints_dir.glob("step-*")), default="")

  def _idle_restarts(self, record: Mapping[str, Any]) -> int:
    """How many restarts in a row, the recorded attempt included, saved no newer checkpoint."""
    if (
      not self._saves
      or record.get("restart", 0) == 0
      or record.get("started_from") != self._newest()
    ):
      return 0
    return int(record.get("idle_restarts", 0)) + 1

  def _no_progress(self, record: Mapping[str, Any]) -> Optional[str]:
    if self._idle_restarts(record) < 2:
      return None
    newest = self._newest() or "none at all"
    return f"no progress: two restarts saved no newer checkpoint than {newest}"

  def start(self, before: Mapping[str, Any]) -> tuple[dict[str, Any], Optional[str]]:
    restart = int(before["restart"]) + 1 if "restart" in before else 0
    facts = {
      "slurm_job": self._task,
      "node": os.environ.get("SLURMD_NODENAME"),
      "restart": restart,
      "started_from": self._newest(),
      "idle_restarts": self._idle_restarts(before),
    }
    return facts, self._no_progress(before)

  def stop(self, record: Mapping[str, Any], sent: Sequence[int]) -> tuple[str, Optional[str]]:
    self._sent = sent
    failed = self._no_progress(record)
    if failed is not None:
      return "FAILED", failed
    if signal.SIGTERM in sent and signal.SIGUSR2 in sent:
      return "TIMEOUT", "saved its state too late to be requeued: raise --signal=B:USR2@<seconds>"
    if signal.SIGTERM in sent:
      return "REQUEUED", "stopped by Slurm (preempted, or scancel)"
    count = int(record.get("requeues", 0))
    if count >= self._max:
      return "TIMEOUT", f"requeued {count} times already (MAX_REQUEUES in slurm_template.py)"
    self._wanted = True
    return "REQUEUED", None

  def restart(self) -> Optional[str]:
    if not self._wanted:
      return None
    count = int(self._folder.read_state().get("requeues", 0))
    problem: Optional[Exception] = None
    try:
      self._folder.write_state("REQUEUED", requeues=count + 1)
      for attempt in range(_REQUEUE_ATTEMPTS):
        if attempt:
          time.sleep(random.uniform(5.0, 15.0))
        problem = self._requeue()
        if problem is None or signal.SIGTERM in self._sent:
          return None  # The requeue ends all of the job's processes; a late answer does not count.
        if not _is_passing(problem):
          break
    except OSError as e:
      problem = e
    return f"interrupted by its time limit, and could not be requeued: {problem}"

  def _requeue(self) -> Optional[SlurmError]:
    try:
      call("scontrol", "requeue", self._task)
    except SlurmError as e:
      # The requeue ends all of the job's processes, this command's included.
      return None if e.code in (-signal.SIGTERM, -signal.SIGKILL) else e
    return None


def _is_passing(problem: SlurmError) -> bool:
  """Whether a busy controller, rather than a site's rules, refused."""
  words = ("disabled", "Invalid", "There is no")
  return not any(word in str(problem) for word in words)


def run_task(folder: pathlib.Path, kind: str, offset: int, early: Sequence[int] = ()) -> int:
  """Runs the job of this array task under the supervisor; returns the exit code.

  Args:
    folder: The experiment's.
    kind: "run" or "eval".
    offset: The wid of the array's index 0.
    early: The signals that came so far; more may come while this runs.
  """
  array, index = os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
  experiment = launchers.Experiment.open(folder)
  job = experiment.job(kind, offset + int(index))
  os.environ.update(job.env)
  os.environ["PYTHONUNBUFFERED"] = "1"
  cpus = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
  if cpus and not os.environ.get("NTC_NUM_THREADS"):
    os.environ["NTC_NUM_THREADS"] = cpus
  job.folder.path.mkdir(parents=True, exist_ok=True)
  os.chdir(job.cwd)
  deadline = time.monotonic() + _LOCK_SECONDS
  while time.monotonic() < deadline and _is_held(job.folder):  # A former attempt may be ending.
    time.sleep(1.0)
  argv = [*_workers(job), *job.argv]
  # Evaluations and latent optimisations have no checkpoints.
  saves = kind == "run" and experiment.saves(job.wid)
  requeues = _Requeues(job.folder, _max_requeues(experiment), f"{array}_{index}", saves)
  # srun makes a SIGKILL of a SIGTERM, and hands SIGUSR2 on; trainers take both alike.
  instead: dict[int, int] = {}
  if len(argv) > len(job.argv):
    instead = {signal.SIGTERM: signal.SIGUSR2}
  return supervise.supervise(job.folder, argv, requeues, instead, early)


def _max_requeues(experiment: launchers.Experiment) -> int:
  """Of the newest submission to Slurm: the record's executor may be another by now."""
  options = [experiment.record["executor"], *experiment.submissions()]
  return int(next((o["max_requeues"] for o in reversed(options) if "max_requeues" in o), 0))


def _workers(job: launchers.Job) -> list[str]:
  """What starts a training in each of the job's Slurm tasks; nothing where it is one process.

  The workers find one another by NTC_WORKERS, see common/distribution.py.
  """
  count = int(os.environ.get("SLURM_NTASKS") or os.environ.get("SLURM_NNODES", "1"))
  if count == 1 or job.kind != "run":
    return []
  options = job.folder.read_work_unit().config.get("train_eval_config", {})
  if options.get("strategy") != "multi_worker":
    _say(f"one process, although the job has {count} tasks: see train_eval_config.strategy")
    return []
  os.environ["NTC_WORKERS"] = ",".join(_worker_addresses(count))
  # Exit code 75 is not bad: nobody is killed because another saved its state a moment earlier.
  # Who lost a worker notices that; whoever does not is ended a minute after the first end.
  argv = [
    "srun",
    f"--ntasks={count}",
    "--distribution=block",
    "--kill-on-bad-exit=0",
    "--wait=60",
    "--mpi=none",
  ]
  if "SLURM_NTASKS" not in os.environ:
    argv.append("--ntasks-per-node=1")
  cpus = os.environ.get("SLURM_CPUS_PER_TASK")
  return [*argv, f"--cpus-per-task={cpus}"] if cpus else argv


# Workers listen above this port; below the ports that Linux gives to outgoing connections.
_FIRST_PORT = 12000
_NUM_PORTS = 20000


def _worker_addresses(count: int) -> list[str]:
  """host:port of each of a job's tasks, in order; neighbouring jobs have other ports.

  Raises:
    LaunchError: Slurm does not say where they are.
  """
  per_node = f"1(x{count})"  # As Slurm does where only --nodes is given.
  if "SLURM_NTASKS" in os.environ:
    per_node = os.environ.get("SLURM_TASKS_PER_NODE", "")
  try:
    nodes = call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    on_each = [
      int(match[1])
      for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?(?:,|$)", per_node)
      for _ in range(int(match[2] or 1))
    ]
    hosts = [_address(node) for node, tasks in zip(nodes, on_each) for _ in range(tasks)]
  except (KeyError, SlurmError) as e:
    raise launchers.LaunchError(f"The addresses of the job's nodes cannot be found: {e}") from e
  if len(hosts) != count:
    raise launchers.LaunchError(f"{per_node!r} tasks on {nodes} are not the {count} of the job.")
  first = int(os.environ["SLURM_JOB_ID"]) * max(count, 64)
  return [f"{host}:{_FIRST_PORT + (first + i) % _NUM_PORTS}" for i, host in enumerate(hosts)]


def _address(node: str) -> str:
  """A node's address; its name need not resolve."""
  match = re.search(r"\bNodeAddr=(\S+)", call("scontrol", "show", "node", node))
  return match[1] if match else node


def _is_held(folder: runs.RunDir) -> bool:
  files = (folder.supervisor_lock_file, folder.lock_file)
  return any(runs.lock_holder(file) is not None for file in files)


def main(argv: Sequence[str]) -> int:
  """The command line of a task; see the module's docstring."""
  early: list[int] = []  # Until the supervisor listens.
  for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda received, frame: early.append(received))
  if len(argv) != 3 or not argv[2].isdigit() or "SLURM_ARRAY_TASK_ID" not in os.environ:
    print("usage, within a Slurm array: python -m common.slurm EXPERIMENT run|eval OFFSET",
          file=sys.stderr)  # fmt: skip
    return 2
  try:
    return run_task(pathlib.Path(argv[0]), argv[1], int(argv[2]), early)
  except (launchers.LaunchError, runs.RunError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
