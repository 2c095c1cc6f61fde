"""Run directories: the one class that knows every path of a run, and atomic writes.

<experiments_dir>/<xid>/                     an experiment: one sweep
  experiment.json                            the command, the commit, the launcher's options
  wid=<N>-<runname>/                         a run: one work unit
    work_unit.json  environment.json  state.json  lock  log.txt
    checkpoints/step-<n>/  coding/step-<n>/  metrics.jsonl  tensorboard/  images/
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import IO, Any, Optional, Union

from common import hyper, train_options

PathLike = Union[str, "os.PathLike[str]"]

# A run's states. DONE is written by the task's own end mark, never inferred.
STATES = (
  "PENDING", "RUNNING", "REQUEUED", "DONE", "FAILED", "TIMEOUT", "CANCELLED", "LOST",
)  # fmt: skip

# A task that was told to stop, saved its state and wants to go on later exits with this code.
EXIT_RESUME = 75

SCHEMA_VERSION = 1

_LOCK_ATTEMPTS = 5


class RunError(RuntimeError):
  """A run directory cannot be used as asked; the message names the fix."""


@contextlib.contextmanager
def holding(path: PathLike, what: str) -> Iterator[None]:
  """Holds a lock file; the system lets go of it when the process ends, however it ends.

  Args:
    path: The lock file; made where missing, never removed.
    what: What the lock protects, for the message: "The run train_xms/1/wid=0".

  Raises:
    RunError: Another process holds it; the message names that process.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a+") as f:
    for attempt in range(_LOCK_ATTEMPTS):
      if try_lock(f, path):
        break
      if attempt + 1 < _LOCK_ATTEMPTS:
        time.sleep(0.02)  # `lock_holder` of another process may be looking just now.
        continue
      f.seek(0)
      raise RunError(
        f"{what} is in use by {f.read().strip() or 'another process'}. "
        "Wait for it or stop it; two processes never share a run directory."
      )
    f.truncate(0)
    f.write(this_process())
    f.flush()
    try:
      yield
    finally:
      f.truncate(0)


def try_lock(f: IO[Any], path: PathLike) -> bool:
  """Locks an open file until it is closed; False where another process holds it.

  Raises:
    RunError: The file system has no locks.
  """
  try:
    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
  except OSError as e:
    _check_is_held(e, path)
    return False


def this_process() -> str:
  """What a lock says of its holder: "process 12 on host since ..."."""
  return f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"


def lock_holder(path: PathLike) -> Optional[str]:
  """Who holds a lock file ("process 12 on host since ..."), or None where nobody does."""
  try:
    with pathlib.Path(path).open() as f:
      try:
        fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError as e:
        _check_is_held(e, path)
        return f.read().strip() or "another process"
  except FileNotFoundError:
    pass
  return None


def _check_is_held(refusal: OSError, path: PathLike) -> None:
  """Raises unless a lock was refused because another process holds it."""
  if refusal.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
    raise RunError(
      f"The file system of {path} has no locks ({refusal.strerror}): have it mounted with them "
      "(Lustre: -o flock), or keep experiments elsewhere; see docs/cluster.md."
    ) from refusal
  if refusal.errno not in (errno.EAGAIN, errno.EACCES):
    raise refusal


def atomic_write(path: PathLike, data: Union[str, bytes], sync: bool = True) -> None:
  """Writes a file whole or not at all: temporary file, fsync, rename; parents are made.

  Without `sync` it does not wait for the disk: a loss of power may leave an empty file.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = data.encode() if isinstance(data, str) else data
  descriptor, temporary = tempfile.mkstemp(
    dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp"
  )
  try:
    with os.fdopen(descriptor, "wb") as f:
      f.write(content)
      f.flush()
      if sync:
        os.fsync(f.fileno())
    umask = os.umask(0)
    os.umask(umask)
    pathlib.Path(temporary).chmod(0o666 & ~umask)
    pathlib.Path(temporary).replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      pathlib.Path(temporary).unlink()
    raise


def write_json(path: PathLike, value: Any, sync: bool = True) -> None:
  """`atomic_write` of indented JSON. NaN is refused: it is not JSON."""
  atomic_write(path, json.dumps(value, indent=1, allow_nan=False) + "\n", sync)


def read_json(path: PathLike) -> Any:
  """Reads JSON.

  Raises:
    RunError: The file is missing or is not JSON; the message names it.
  """
  try:
    return json.loads(pathlib.Path(path).read_text())
  except FileNotFoundError as e:
    raise RunError(f"No such record: {str(path)!r}.") from e
  except ValueError as e:
    raise RunError(f"Record {str(path)!r} is not JSON ({e}); it was damaged or edited.") from e


def json_line(record: Mapping[str, Any]) -> str:
  """One line of a JSON-lines file."""
  return json.dumps(record) + "\n"


def append_jsonl(path: PathLike, record: dict[str, Any]) -> None:
  """Appends one line whole or not at all; a last line that a kill tore is closed off first.

  Raises:
    OSError: The disk is full or not writable; the file is as it was.
  """
  line = json_line(record).encode()
  with pathlib.Path(path).open("ab+", buffering=0) as f:
    end = f.seek(0, os.SEEK_END)
    if end:
      f.seek(-1, os.SEEK_END)
      if f.read(1) != b"\n":
        line = b"\n" + line
    try:
      while line:
        line = line[f.write(line) :]
    except BaseException:
      f.truncate(end)
      raise


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
  """The whole records of a JSON-lines file; torn lines are passed over."""
  records = []
  with contextlib.suppress(FileNotFoundError):
    for line in pathlib.Path(path).read_text(errors="replace").splitlines():
      with contextlib.suppress(ValueError):
        records.append(json.loads(line))
  return records


def new_xid(experiments_dir: PathLike) -> str:
  """Claims an experiment id: the time as digits, unique in `experiments_dir` (made by the call)."""
  folder = pathlib.Path(experiments_dir)
  folder.mkdir(parents=True, exist_ok=True)
  while True:
    xid = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
    try:
      (folder / xid).mkdir()
      return xid
    except FileExistsError:
      time.sleep(0.1)


def check_xid(xid: str) -> None:
  """Raises RunError for an experiment id that is no plain folder name."""
  if not re.fullmatch(r"[A-Za-z0-9_.-]+", xid) or xid in (".", ".."):
    raise RunError(f"--xid={xid!r}: letters, digits, '_', '.' and '-' only.")


@dataclasses.dataclass(frozen=True)
class RunDir:
  """One run's directory. Every path of a run is asked of this class."""

  path: pathlib.Path

  @classmethod
  def of(cls, experiments_dir: PathLike, xid: str, unit: hyper.WorkUnit) -> "RunDir":
    """Where a work unit of experiment `xid` lives: `<xid>/wid=<N>-<runname>`."""
    check_xid(xid)
    folder = pathlib.Path(experiments_dir).absolute() / xid
    return cls(folder / f"wid={unit.wid}-{unit.runname}")

  @classmethod
  def open(cls, path: PathLike) -> "RunDir":
    """An existing run directory.

    Raises:
      RunError: There is no such directory, or no run in it.
    """
    run = cls(pathlib.Path(path).absolute())
    if not run.path.is_dir():
      raise RunError(f"No run directory {str(path)!r}.")
    if not run.work_unit_file.is_file():
      inside = sorted(p.name for p in run.path.glob("wid=*"))
      hint = f" It is an experiment with the runs {', '.join(inside)}: name one." if inside else ""
      raise RunError(
        f"{str(path)!r} holds no {run.work_unit_file.name}: not a run directory.{hint}"
      )
    return run

  @property
  def xid(self) -> str:
    """The experiment's id."""
    return str(self.read_record()["xid"])

  @property
  def work_unit_file(self) -> pathlib.Path:
    """What this run is: xid, work unit, schema version."""
    return self.path / "work_unit.json"

  @property
  def environment_file(self) -> pathlib.Path:
    """Machine, packages and commit of each start, newest last."""
    return self.path / "environment.json"

  @property
  def state_file(self) -> pathlib.Path:
    """The run's state: state, step, time, pid, host, reason."""
    return self.path / "state.json"

  @property
  def lock_file(self) -> pathlib.Path:
    """Held (flock) by the process that writes this run."""
    return self.path / "lock"

  @property
  def supervisor_lock_file(self) -> pathlib.Path:
    """Held (flock) by the supervisor that runs this run's task (common/supervise.py)."""
    return self.path / "supervisor.lock"

  @property
  def cancel_file(self) -> pathlib.Path:
    """Its presence says that the run was cancelled: whoever would run it, records so instead."""
    return self.path / "cancel"

  @property
  def log_file(self) -> pathlib.Path:
    """The task's standard output and error, all attempts."""
    return self.path / "log.txt"

  @property
  def metrics_file(self) -> pathlib.Path:
    """JSON lines, one record a logging step."""
    return self.path / "metrics.jsonl"

  @property
  def stopped_file(self) -> pathlib.Path:
    """How a training with early stopping ended (common/early_stopping.py)."""
    return self.path / "stopped.json"

  @property
  def checkpoints_dir(self) -> pathlib.Path:
    """One folder a checkpoint."""
    return self.path / "checkpoints"

  def coding_dir(self, step: int) -> pathlib.Path:
    """What coding with a step's weights needs besides them, where that is not derived from them."""
    return self.path / "coding" / f"step-{step:08d}"

  @property
  def tensorboard_dir(self) -> pathlib.Path:
    """TensorBoard event files."""
    return self.path / "tensorboard"

  @property
  def images_dir(self) -> pathlib.Path:
    """Original/reconstruction pairs as PNG."""
    return self.path / "images"

  def create(self, unit: hyper.WorkUnit, xid: str) -> None:
    """Makes the directory and its record, or checks that it holds the same work unit already.

    Raises:
      RunError: The directory holds another config; the message names what differs.
    """
    record = {"schema_version": SCHEMA_VERSION, "xid": xid, "work_unit": unit.to_json()}
    if self.work_unit_file.is_file():
      there = self.read_work_unit()
      recorded, given = (train_options.with_defaults(u.config) for u in (there, unit))
      if recorded != given or there.family != unit.family or there.task != unit.task:
        changed = differences(recorded, given)
        raise RunError(
          f"{self.path} holds another config (differs in: {', '.join(changed) or 'family, task'}). "
          f"Resume it as it is with --workdir={self.path}, or choose another --xid."
        )
      return
    others = [p for p in self.path.parent.glob(f"wid={unit.wid}-*") if p != self.path]
    if others:
      raise RunError(
        f"Experiment {xid} already has a run with wid {unit.wid}: {others[0].name}. "
        "Choose another --wid or --xid."
      )
    write_json(self.work_unit_file, record)
    self.write_state("PENDING")

  def create_new(self, unit: hyper.WorkUnit, xid: str) -> None:
    """`create` for one of many runs at once, in a place of its own: nothing waits for the disk.

    The experiment's record holds all that is written here, see `launchers.Experiment.job`.
    """
    record = {"schema_version": SCHEMA_VERSION, "xid": xid, "work_unit": unit.to_json()}
    self.path.mkdir(parents=True, exist_ok=True)
    state = {"state": "PENDING", "time": time.time()}
    self.state_file.write_text(json.dumps(state, indent=1) + "\n")
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    temporary = self.path / f".{self.work_unit_file.name}.{unique_id()}.tmp"
    temporary.write_text(text)
    temporary.replace(self.work_unit_file)

  def read_record(self) -> dict[str, Any]:
    """The whole `work_unit.json`."""
    record = read_json(self.work_unit_file)
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
      raise RunError(
        f"{self.work_unit_file} has schema version {version!r}; this code reads {SCHEMA_VERSION}. "
        "Use the code that wrote it (its commit is in environment.json)."
      )
    return record

  def read_work_unit(self) -> hyper.WorkUnit:
    """The run's work unit."""
    return hyper.WorkUnit.from_json(self.read_record()["work_unit"])

  def write_state(self, state: str, **facts: Any) -> None:
    """Records the run's state, whole; facts given before are kept, a fact of None is dropped."""
    self._write_state(state, facts, sync=True)

  def note_state(self, state: str, **facts: Any) -> None:
    """`write_state` for many runs at once: nothing waits for the disk."""
    self._write_state(state, facts, sync=False)

  def _write_state(self, state: str, facts: Mapping[str, Any], sync: bool) -> None:
    if state not in STATES:
      raise ValueError(f"Unknown state {state!r}. Known: {', '.join(STATES)}.")
    record = self.read_state()
    if state != record.get("state"):
      record.pop("reason", None)
    record.update(facts, state=state, time=time.time())
    write_json(self.state_file, {k: v for k, v in record.items() if v is not None}, sync)

  def read_state(self) -> dict[str, Any]:
    """The state record; empty where none was written."""
    try:
      record = read_json(self.state_file)
    except RunError:
      return {}
    return record if isinstance(record, dict) else {}

  def write_environment(self) -> None:
    """Appends this start's machine, Python packages and commit to `environment.json`."""
    history: list[Any] = []
    with contextlib.suppress(RunError):
      history = read_json(self.environment_file)
    history.append({"time": time.time(), "argv": sys.argv, **environment()})
    write_json(self.environment_file, history)

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Holds the run's lock.

    Raises:
      RunError: Another process holds it; the message names that process.
    """
    with holding(self.lock_file, f"The run {self.path}"):
      yield


def find_runs(pattern: str) -> list[RunDir]:
  """The run directories that match a glob, in order of wid; experiments give all their runs.

  Raises:
    RunError: Nothing matches; the message says what was looked for.
  """
  import glob

  found = []
  for name in glob.glob(str(pathlib.Path(pattern).expanduser())):  # noqa: PTH207
    path = pathlib.Path(name)
    candidates = [path, *path.glob("wid=*"), *path.glob("*/wid=*")]
    found += [RunDir(p.absolute()) for p in candidates if (p / "work_unit.json").is_file()]
  if not found:
    raise RunError(
      f"No run directory matches {pattern!r}. A run directory holds work_unit.json, "
      "for example train_xms/<xid>/wid=0-<runname>; quote the glob for the shell."
    )
  unique = {run.path: run for run in found}

  def order(run: RunDir) -> Any:
    match = re.match(r"wid=(\d+)", run.path.name)
    return (str(run.path.parent), int(match.group(1)) if match else -1, run.path.name)

  return sorted(unique.values(), key=order)


def with_source(
  unit: hyper.WorkUnit, run: Optional[RunDir], seconds: float = 0.0
) -> hyper.WorkUnit:
  """The work unit, with the path of the run of its own experiment that it starts from, if any.

  Args:
    unit: May name a run as "wid=0", see `hyper.source_of`.
    run: The unit's own run directory, beside which the other one lies; None where there is none.
    seconds: To wait for that run to be DONE: a network file system may show its end late.

  Raises:
    RunError: There is no such run, or it is not DONE.
  """
  wid = hyper.source_of(unit)
  if wid is None:
    return unit
  starts = f"This run (wid {unit.wid}) starts from wid {wid} of its sweep"
  main = f"python -m {unit.family}.{unit.task}"
  if wid == unit.wid:
    raise RunError(f"{starts}, itself: name another, or a run's path.")
  if run is None:
    raise RunError(
      f"{starts}. ./launch.py runs both in turn; by hand: {main} --wid {wid} --xid NAME first, "
      "then this one with the same --xid."
    )
  deadline = time.monotonic() + seconds
  while True:
    found = [p for p in run.path.parent.glob(f"wid={wid}-*") if (p / "work_unit.json").is_file()]
    state = RunDir(found[0]).read_state().get("state") if len(found) == 1 else None
    if state == "DONE":
      return hyper.with_source(unit, str(found[0]))
    if time.monotonic() >= deadline:
      break
    time.sleep(1.0)
  what = f"is {state}" if found else f"is not in {run.path.parent}"
  raise RunError(
    f"{starts}, which {what}: it must be DONE first (./launch.py rerun, or --wid {wid})."
  )


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
  """Dotted keys at which two nested dicts differ."""
  if a is b:
    return []
  if isinstance(a, dict) and isinstance(b, dict):
    found: list[str] = []
    for key in sorted(set(a) | set(b)):
      where = f"{prefix}.{key}" if prefix else key
      if key not in a or key not in b:
        found.append(where)
      else:
        found += differences(a[key], b[key], where)
    return found
  return [] if a == b else [prefix]


def _packages() -> dict[str, str]:
  """Names and versions of the installed packages; of two of one name the one that is imported.

  By a look at the first lines of their records: `Distribution.metadata` reads whole ones, a tenth
  of a second for those of a training.
  """
  from importlib import metadata

  found: dict[str, str] = {}
  for distribution in metadata.distributions():
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    head = text.split("\n\n", 1)[0]
    name, version = (re.search(f"^{key}: *(.+?) *$", head, re.M) for key in ("Name", "Version"))
    if name is not None and version is not None:
      found.setdefault(name.group(1), version.group(1))
  return dict(sorted(found.items()))


def environment() -> dict[str, Any]:
  """Facts about this process's machine, interpreter, packages and code."""
  import configs

  return {
    "host": socket.gethostname(),
    "platform": platform.platform(),
    "cpu": _cpu_name(),
    "num_cpus": os.cpu_count(),
    "python": platform.python_version(),
    "packages": _packages(),
    "cwd": str(pathlib.Path.cwd()),
    **git_state(configs.PROJECT_DIR),
  }


def processor() -> str:
  """The processor and how many of them there are, for records of times."""
  return f"{_cpu_name()}, {os.cpu_count()} CPUs"


def _cpu_name() -> str:
  with contextlib.suppress(OSError):
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return line.split(":", 1)[1].strip()
  return platform.processor()


def git_state(folder: PathLike, recorded: bool = True) -> dict[str, Any]:
  """`{"commit": hash or None, "dirty": bool or None}` of a checkout; None outside of one.

  A job runs a source snapshot, which is no checkout: NTC_COMMIT and NTC_DIRTY, which the launcher
  sets for its jobs, are believed before git. `recorded=False` asks git alone.
  """
  if recorded and "NTC_COMMIT" in os.environ:
    dirty = os.environ.get("NTC_DIRTY", "")
    return {
      "commit": os.environ["NTC_COMMIT"] or None,
      "dirty": {"0": False, "1": True}.get(dirty),
    }

  def git(*args: str) -> Optional[str]:
    if shutil.which("git") is None:
      return None
    # Without --no-optional-locks, `git status` would rewrite the user's index.
    done = subprocess.run(
      ["git", "--no-optional-locks", "-C", str(folder), *args],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout if done.returncode == 0 else None

  commit = git("rev-parse", "HEAD")
  status = git("status", "--porcelain")
  return {
    "commit": commit.strip() if commit else None,
    "dirty": bool(status.strip()) if status is not None else None,
  }


def unique_id() -> str:
  """A short random id, for temporary names."""
  return uuid.uuid4().hex[:12]
