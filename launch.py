#!/usr/bin/env python3
"""Runs a config's sweep: every setting of get_hyper() becomes a run directory and a job.

usage:
  ./launch.py --main factorized.train --config factorized/configs/bls2017.py[:tiny]
              [--config.a.b=value ...] [--args '...'] [--sargs '--partition=gpu --time=24:00:00']
              [--executor slurm|local] [--jobs N] [--then_eval kodak] [--dry_run | --test_only]
  ./launch.py --sweep sweeps/FILE.py[:variant] [...]         (several configs as one experiment)
  ./launch.py status XID [--watch]
  ./launch.py rerun XID [--states FAILED,TIMEOUT,LOST] [--wids 3,7-9]
  ./launch.py cancel XID

The experiment goes to <experiments_dir>/<xid>/: its record, a snapshot of the source (jobs and
reruns run that, whatever is edited meanwhile), and a folder a run with its config, state and log.
On Slurm (where there is `sbatch`) it is submitted as a job array from slurm_template.py, and xid is
the array's id: docs/cluster.md. On this machine the launcher runs it; Ctrl-C asks the running jobs
to save their state and stop; `rerun XID` goes on from there.
A run that starts from the weights of another one of the sweep (train_eval_config.warm_start is
"wid=0", see common/hyper.py) starts when that one is DONE.
XID may also be the experiment's path. A single run needs no launcher: python -m <family>.train
"""

import dataclasses
import gc
import os
import shlex
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, Optional

from common import venv

if __name__ == "__main__":
  venv.use_project_venv(__file__)
  gc.disable()  # A hundred thousand settings are no garbage, and looking for some takes seconds.

import pathlib
import shutil
import time

from absl import flags as absl_flags

import configs
import slurm_template
from common import datasets, flags, hyper, launchers, runs, slurm

# The launcher decides these for each task.
_RESERVED_ARGS = ("workdir", "job_dir", "wid", "xid", "config", "check_units", "help", "h")

# What tasks take as folders.
_FOLDER_ARGS = ("experiments_dir", "results_dir", "save_dir")


def main(argv: Sequence[str], project_dir: pathlib.Path = configs.PROJECT_DIR) -> int:
  """The command line without the program's name; returns the exit code.

  0: all is well (after a launch here: every job is DONE; on Slurm: every job is submitted).
  1: some job is not. 2: the command is wrong.
  75: stopped, and `rerun` goes on. 130: interrupted before any job was started.
  """
  commands = {"status": _status, "rerun": _rerun, "cancel": _cancel}
  try:
    with launchers.STOPS:
      if argv and argv[0] in commands:
        return commands[argv[0]](list(argv[1:]))
      if argv and not argv[0].startswith("-"):
        raise flags.UsageError(
          f"Unknown command {argv[0]!r}. Known: {', '.join(commands)}; to launch: --main, "
          "--config, or --sweep."
        )
      return _launch(list(argv), project_dir)
  except KeyboardInterrupt:  # While jobs run, `launchers.wait` sees to it.
    print("Interrupted.", file=sys.stderr)
    return 130
  except (flags.UsageError, hyper.ConfigError, launchers.LaunchError, runs.RunError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2


def _define_launch(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string("main", None, "What to run, <family>.<task>: factorized.train",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("sweep", None, "A file of several configs and their settings, instead "
                           "of --main and --config; its get_sweep() returns hyper.Part(...)s.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("args", "", "Further arguments for every task, as one quoted text.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_bool("dry_run", False, "Print the settings; write and start nothing.",
                         flag_values=values)  # fmt: skip
  absl_flags.DEFINE_bool("test_only", False,
                         "Ask Slurm whether it would take the batch script; submit nothing.",
                         flag_values=values)  # fmt: skip
  absl_flags.DEFINE_bool(
    "deep_check", None,
    "Let the task's own code check every setting before the launch, which starts TensorFlow; else "
    "each job checks its own. (default: true on this machine, not on Slurm; false also leaves out "
    "the look at --then_eval's pictures)", flag_values=values,
  )  # fmt: skip
  absl_flags.DEFINE_string("xid", None, "The experiment's id; without it the job array's id, or "
                           "the time as digits.", flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("then_eval", None, "Evaluate each run on this data set once trained.",
                           flag_values=values)  # fmt: skip
  define_experiments_dir(values)
  define_executor(values)


def define_experiments_dir(values: absl_flags.FlagValues) -> None:
  """The flag that says where experiments live."""
  absl_flags.DEFINE_string(
    "experiments_dir", None,
    "Where experiments live, instead of TRAIN_DIR or ITINF_DIR in configs.py.",
    flag_values=values,
  )  # fmt: skip


def define_executor(values: absl_flags.FlagValues) -> None:
  """The flags that say where and how jobs run."""
  absl_flags.DEFINE_string("executor", None, "Where jobs run: slurm, or local (this machine). "
                           "(default: slurm where there is sbatch)",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_integer("jobs", None, "How many jobs run at once. (default: 1 on this machine; "
                            "on Slurm as many as it likes)", flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("gpus", None, "This machine's GPUs for the jobs in turn, one a job: 0,1",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("sargs", None, "Further arguments for sbatch, as one quoted text: "
                           "'--partition=gpu --time=24:00:00'", flag_values=values)  # fmt: skip


EXECUTORS = ("slurm", "local")


def executor_from(
  values: absl_flags.FlagValues, recorded: Optional[dict[str, Any]] = None
) -> launchers.Executor:
  """The executor that the flags, and where they are silent the experiment's record, ask for."""
  recorded = recorded or {}
  name = values.executor or recorded.get("name") or configs.EXECUTOR
  chosen_here = not name
  if chosen_here:
    name = "slurm" if shutil.which("sbatch") else "local"
  if name not in EXECUTORS:
    raise flags.UsageError(f"Unknown executor {name!r}. Known: {', '.join(EXECUTORS)}.")
  sargs = values.sargs
  if recorded.get("name") != name:
    recorded = {}
  jobs = values.jobs if values.jobs is not None else recorded.get("jobs")
  if name == "slurm":
    if values.gpus is not None:
      raise flags.UsageError("--gpus is for --executor=local; on Slurm: --sargs='--gres=gpu:1'.")
    given = recorded.get("sargs", []) if sargs is None else _split("--sargs", sargs)
    return slurm.SlurmExecutor(slurm_template.TEMPLATE, given, jobs, slurm_template.MAX_REQUEUES)
  if chosen_here:
    print("There is no sbatch here: this machine runs the jobs (--executor=local).", flush=True)
  elif sargs is not None:
    raise flags.UsageError("--sargs is for --executor=slurm.")
  gpus = recorded.get("gpus", []) if values.gpus is None else _listed(values.gpus)
  return launchers.LocalExecutor(1 if jobs is None else jobs, gpus)


def _split(flag: str, text: str) -> list[str]:
  try:
    return shlex.split(text)
  except ValueError as e:
    raise flags.UsageError(f"{flag} {text!r}: {e}.") from e


def _listed(text: str) -> list[str]:
  return [part.strip() for part in text.split(",") if part.strip()]


def split_args(text: str, reserved: Sequence[str]) -> list[str]:
  """`--args` as a list; folders in it become absolute, for the jobs run elsewhere.

  Raises:
    flags.UsageError: Quotes do not match, or a flag is one that the launcher sets itself.
  """
  args = _split("--args", text)
  for arg in args:
    name = arg.lstrip("-").split("=", 1)[0].split(".", 1)[0]
    if arg.startswith("-") and name in reserved:
      raise flags.UsageError(f"--args: {arg!r} is set by the launcher; give it without --args.")
  for i, arg in enumerate(args):
    name, equals, value = arg.partition("=")
    if not arg.startswith("-") or name.lstrip("-") not in _FOLDER_ARGS:
      continue
    if equals and value:
      args[i] = f"{name}={_absolute(value)}"
    elif not equals and i + 1 < len(args):
      args[i + 1] = _absolute(args[i + 1])
  return args


def _absolute(folder: str) -> str:
  return str(pathlib.Path(folder).expanduser().absolute())


def _take_experiments_dir(args: list[str], given: Optional[str]) -> Optional[str]:
  """Published commands say `--args '--experiments_dir DIR'`: the launcher takes it out."""
  found = None
  for i, arg in enumerate(args):
    name, equals, value = arg.lstrip("-").partition("=")
    if arg.startswith("-") and name == "experiments_dir":
      if not equals and i + 1 == len(args):
        raise flags.UsageError("--args: --experiments_dir needs a folder.")
      found = value if equals else args[i + 1]
      del args[i : i + (1 if equals else 2)]
      break
  if found and given and found != _absolute(given):
    raise flags.UsageError(f"Two experiments_dir: {given!r}, and in --args {found!r}.")
  return given or found


@dataclasses.dataclass(frozen=True)
class _Sweep:
  """What is to be launched.

  Attributes:
    units: The work units.
    title: For people: --main, or the sweep file's name.
    source: The config or sweep file, as it was given.
    common: By part (without parts: ""), the overrides that hold for all settings.
  """

  units: list[hyper.WorkUnit]
  title: str
  source: str
  common: dict[str, dict[str, Any]]

  def sources(self) -> list[Optional[int]]:
    """For each wid, that of the run that it waits for, or None."""
    return [hyper.source_of(unit) for unit in self.units]

  def facts(self) -> dict[str, Any]:
    """For the experiment's record."""
    return {"title": self.title, "sweep": self.source} if self.units[0].part else {}


def _parse_launch(
  argv: list[str], project_dir: pathlib.Path
) -> tuple[absl_flags.FlagValues, Callable[[], _Sweep], list[str]]:
  """The flags, what expands the sweep, and the mains that it runs, "factorized.train"."""
  usage = __doc__ or ""
  if not any(arg.startswith("-") and arg.lstrip("-").split("=")[0] == "sweep" for arg in argv):
    values, config_file, overrides = flags.parse(argv, _define_launch, usage)
    if values.main is None or config_file is None:
      missing = "--main" if values.main is None else "--config"
      known = ", ".join(launchers.known_mains(project_dir)) or "none"
      raise flags.UsageError(
        f"{missing} is missing (see --help), or --sweep. Known for --main: {known}."
      )
    family, _, task = values.main.partition(".")
    file = config_file

    def expand() -> _Sweep:
      units = hyper.expand(file, family, task, overrides)
      return _Sweep(units, values.main, file.source, {"": overrides})

    return values, expand, [values.main]

  given, rest = flags.without_overrides(argv)
  values, config_file, _ = flags.parse(rest, _define_launch, usage)
  if values.main is not None or config_file is not None or values.sweep is None:
    raise flags.UsageError("--sweep FILE names mains and configs itself: without --main, --config.")
  parts = hyper.load_sweep(values.sweep, project_dir)

  def expand_parts() -> _Sweep:
    overrides = flags.overrides_of_each(given, [p.config_file.get_config() for p in parts])
    units = hyper.expand_parts(parts, overrides)
    common = {p.name: {**p.overrides, **o} for p, o in zip(parts, overrides)}
    title = hyper.safe_name(pathlib.Path(values.sweep.partition(":")[0]).stem)
    return _Sweep(units, title, values.sweep, common)

  return values, expand_parts, list(dict.fromkeys(f"{p.family}.{p.task}" for p in parts))


def _check_mains(mains: Sequence[str], then_eval: Optional[str], project_dir: pathlib.Path) -> None:
  known = launchers.known_mains(project_dir)
  for main_ in mains:
    if main_ not in known:
      hint = " Evaluations are started by ./launch_eval.py." if main_.endswith("eval") else ""
      raise flags.UsageError(
        f"Unknown --main {main_!r}. Known: {', '.join(known) or 'none'}.{hint}"
      )
  if not then_eval:
    return
  trained = [main_.partition(".")[0] for main_ in mains if main_.endswith(".train")]
  for family in trained:
    if not (project_dir / family / "eval.py").is_file():
      raise flags.UsageError(f"--then_eval: there is no {family}/eval.py.")
  if not trained:
    raise flags.UsageError(f"--then_eval goes with a training, not with {', '.join(mains)}.")
  launchers.check_dataset_name(then_eval)


def _launch(argv: list[str], project_dir: pathlib.Path) -> int:
  values, expand, mains = _parse_launch(argv, project_dir)
  _check_mains(mains, values.then_eval, project_dir)
  args = split_args(values.args, _RESERVED_ARGS)
  chosen = _take_experiments_dir(args, values.experiments_dir)
  only_itinf = all(main_.endswith(".itinf") for main_ in mains)
  default = configs.ITINF_DIR if only_itinf else configs.TRAIN_DIR
  experiments_dir = pathlib.Path(_absolute(chosen)) if chosen else default
  executor = executor_from(values)
  sweep = expand()
  units, sources = sweep.units, sweep.sources()
  if args:
    for main_ in mains:
      launchers.check_arguments(args, main_, project_dir)
  if values.xid is not None:
    runs.RunDir.of(experiments_dir, values.xid, units[0])
    launchers.Experiment.check_free(experiments_dir / values.xid)
  _print(_settings_tables(sweep))
  where = experiments_dir / (values.xid or "<xid>")
  print(f"\n{len(units)} settings of {sweep.source} for {', '.join(mains)}, to {where}")
  if values.dry_run:
    if (values.executor or configs.EXECUTOR) != "local":
      _print("\n" + _preview(executor, sweep, experiments_dir, values))
    print("Dry run: nothing was written; values are checked at launch.")
    return 0
  first = [wid for wid, source in enumerate(sources) if source is None]
  if values.test_only:
    if not isinstance(executor, slurm.SlurmExecutor):
      raise flags.UsageError("--test_only asks Slurm: it goes with --executor=slurm.")
    print(executor.test_only(first, experiments_dir, sweep.title))
    return 0
  executor.check()
  then_eval = datasets.absolute(values.then_eval) if values.then_eval else None
  if then_eval is not None and values.deep_check is not False:
    _check_dataset(then_eval, project_dir, executor)
  if values.deep_check or (values.deep_check is None and not executor.detached):
    print("Checking the settings and their data ...", flush=True)
    said = launchers.check_units(units, project_dir)
    if said:
      print(said)

  def create() -> launchers.Experiment:
    reserved = None
    if values.xid is None:
      reserved = executor.reserve(experiments_dir, first, sweep.title)
    facts = {**launch_facts("launch.py", argv, executor), **sweep.facts(), **executor.reserved()}
    return launchers.Experiment.create(
      experiments_dir,
      units,
      project_dir,
      args=args,
      xid=values.xid or reserved,
      then_eval=then_eval,
      facts=facts,
    )

  return launch_new(executor, create)


def _check_dataset(dataset: str, project_dir: pathlib.Path, executor: launchers.Executor) -> None:
  try:
    launchers.check_dataset(dataset, project_dir)
  except launchers.LaunchError as e:
    if not executor.detached:
      raise
    hint = "Where only the compute nodes see it: --deep_check=false."
    raise launchers.LaunchError(f"--then_eval: {e} {hint}") from e


def launch_new(
  executor: launchers.Executor,
  create: Callable[[], launchers.Experiment],
  prepare: Callable[[Sequence[launchers.Job]], Sequence[launchers.Job]] = lambda jobs: jobs,
) -> int:
  """Makes an experiment and runs its jobs; returns the exit code.

  Args:
    executor: Runs them.
    create: Reserves and makes the experiment; what was reserved is given back if anything fails.
    prepare: Of the experiment's jobs those that are ready.
  """
  experiment = None
  try:
    experiment = create()
    print(f"Experiment {experiment.xid}: {experiment.path}", flush=True)
    with experiment.attended():
      jobs = experiment.jobs()
      ready = prepare(jobs)
      code = run_jobs(executor, ready, f"./launch.py rerun {_name(experiment)}", experiment)
      return code if len(ready) == len(jobs) else code or 1
  except BaseException:
    executor.give_up(experiment)
    raise


def launch_facts(script: str, argv: Sequence[str], executor: launchers.Executor) -> dict[str, Any]:
  """For an experiment's record: the command, where it was given, and the executor."""
  return {
    "command": shlex.join([f"./{script}", *argv]),
    "argv": list(argv),
    "cwd": str(pathlib.Path.cwd()),
    "executor": {"name": executor.name, **executor.options()},
  }


def _preview(
  executor: launchers.Executor, sweep: _Sweep, where: pathlib.Path, values: absl_flags.FlagValues
) -> str:
  if not isinstance(executor, slurm.SlurmExecutor):  # There is no Slurm here, but one was meant.
    sargs = _split("--sargs", values.sargs or "")
    executor = slurm.SlurmExecutor(slurm_template.TEMPLATE, sargs, values.jobs)
  trained = [unit.wid for unit in sweep.units if values.then_eval and unit.task == "train"]
  return executor.preview(sweep.sources(), where, sweep.title, trained)


# A sweep's table shows this many rows; the rest are in the record.
_MOST_ROWS = 2000


def _print(text: str) -> None:
  try:
    print(text, flush=True)
  except BrokenPipeError:  # `| head` has seen enough; what was asked for is done nevertheless.
    sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _settings_tables(sweep: _Sweep) -> str:
  """A table of the settings, or one a part."""
  texts = []
  for part, common in sweep.common.items():
    units = [unit for unit in sweep.units if unit.part == part] if part else sweep.units
    text = _settings_table(units, common)
    if part:
      text = f"{part}: {units[0].family}.{units[0].task}, {units[0].config_file}\n{text}"
    texts.append(text)
  return "\n\n".join(texts)


def _settings_table(units: Sequence[hyper.WorkUnit], common: dict[str, Any]) -> str:
  keys = list(dict.fromkeys(key for unit in units for key in unit.overrides if key not in common))
  rows = [
    (unit.wid, *(unit.overrides.get(key, "") for key in keys), unit.runname)
    for unit in units[:_MOST_ROWS]
  ]
  text = launchers.table(("wid", *keys, "runname"), rows)
  if len(units) > _MOST_ROWS:
    text += f"\n... and {len(units) - _MOST_ROWS} more"
  if common:
    text += "\nFor all: " + ", ".join(f"{key}={value!r}" for key, value in common.items())
  return text


def _name(experiment: launchers.Experiment) -> str:
  """The experiment's id where that finds it, else its path; as a shell takes it."""
  if experiment.path.parent in (configs.TRAIN_DIR, configs.ITINF_DIR, configs.SLURM_DIR):
    return experiment.xid
  return shlex.quote(str(experiment.path))


def run_jobs(
  executor: launchers.Executor,
  jobs: Sequence[launchers.Job],
  go_on: str,
  experiment: Optional[launchers.Experiment] = None,
) -> int:
  """Submits jobs, waits for their ends and reports; returns the exit code.

  Args:
    executor: Runs them.
    jobs: Prepared jobs.
    go_on: The command that goes on with what is not DONE.
    experiment: Takes note of the submission.
  """
  if executor.detached:
    return _submit(executor, jobs, go_on, experiment)
  options = ", ".join(f"{k}={v}" for k, v in executor.options().items() if v)
  print(f"{len(jobs)} jobs on {socket.gethostname()} ({executor.name}: {options})", flush=True)
  ids = executor.submit(jobs, experiment)
  if experiment is not None:
    experiment.note_submission(executor, ids)
  progress = launchers.Progress(jobs, sys.stderr, observe=executor.observe)
  stopped = launchers.wait(executor, progress)
  text, counts = launchers.states_table(jobs, executor.observe)
  print(f"\n{text}\n{_summary(counts)}")
  if set(counts) <= {"DONE"}:
    return 0
  print(f"To go on: {go_on}")
  return runs.EXIT_RESUME if stopped else 1


def _submit(
  executor: launchers.Executor,
  jobs: Sequence[launchers.Job],
  go_on: str,
  experiment: Optional[launchers.Experiment],
) -> int:
  assert experiment is not None
  try:
    ids = executor.submit(jobs, experiment)
  except launchers.PartlySubmitted as e:
    print(f"Error: {e}\nTo go on: {go_on}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"Interrupted: nothing is submitted. To go on: {go_on}", file=sys.stderr)
    return 130
  arrays = list(dict.fromkeys(task.split("_")[0] for task in ids.values()))
  print(f"Submitted {len(ids)} jobs to Slurm in {len(arrays)} array"
        f"{'s' * (len(arrays) > 1)}: {', '.join(arrays)}")  # fmt: skip
  print(f"To follow them: ./launch.py status {_name(experiment)}")
  return 0


def _summary(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {state}" for state, n in sorted(counts.items()))


def _parse_with_xid(argv: list[str], define: Any) -> tuple[launchers.Experiment, Any]:
  xid = None
  if argv and not argv[0].startswith("-"):
    xid = argv.pop(0)
  values, _, _ = flags.parse(argv, define, __doc__ or "", allow_config=False)
  if xid is None:
    raise flags.UsageError("Which experiment? ./launch.py status XID (see --help)")
  return launchers.find_experiment(xid, values.experiments_dir), values


def _define_status(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_bool("watch", False, "Show it anew now and then, until every job is over.",
                         flag_values=values)  # fmt: skip
  absl_flags.DEFINE_float("every", 10.0, "Seconds between two looks with --watch.",
                          flag_values=values)  # fmt: skip
  define_experiments_dir(values)


def _status(argv: list[str]) -> int:
  experiment, values = _parse_with_xid(argv, _define_status)
  while True:
    counts = _show_status(experiment)
    if not values.watch or not _goes_on(experiment, counts):
      return 0
    time.sleep(max(0.1, values.every))
    if sys.stdout.isatty():
      print("\033[2J\033[H", end="")


def _goes_on(experiment: launchers.Experiment, counts: Mapping[str, int]) -> bool:
  """Whether states may still change: a run whose source has failed waits for a rerun."""
  if {"RUNNING", "REQUEUED"} & set(counts) or "PENDING" not in counts:
    return bool({"RUNNING", "REQUEUED"} & set(counts))
  executors = Executors(experiment)
  executors.follow()
  return any(
    executors.observe(job)["state"] == "PENDING" and not launchers.is_stuck(job, executors.observe)
    for job in experiment.jobs()
  )


def _show_status(experiment: launchers.Experiment) -> dict[str, int]:
  executors = Executors(experiment)
  notes = executors.follow()
  record = experiment.record
  dirty = " with changes, see source.patch" if record["dirty"] else ""
  text, counts = launchers.states_table(experiment.jobs(), executors.observe)
  _print(f"{experiment.path}\n{record.get('command', '')}\ncommit {record['commit']}{dirty}\n")
  notes = [*notes, *executors.advice(experiment.jobs())]
  _print("\n".join([text, _summary(counts), *(f"Note: {note}" for note in notes)]))
  return counts


class Executors:
  """Asks about an experiment's jobs, and stops them, as the executor does that has each of them.

  That is the one of the job's newest submission: a rerun may have chosen another.
  """

  def __init__(self, experiment: launchers.Experiment):
    self._experiment = experiment
    self._submitted = experiment.submitted()
    self._default = experiment.record["executor"]["name"]
    self._executors: dict[str, launchers.Executor] = {
      "slurm": slurm.SlurmExecutor(slurm_template.TEMPLATE),
      "local": launchers.LocalExecutor(),
    }

  def _name(self, job: launchers.Job) -> str:
    return self._submitted.get(job.name, (self._default, ""))[0]

  def _each(
    self, jobs: Sequence[launchers.Job]
  ) -> Iterator[tuple[launchers.Executor, list[launchers.Job]]]:
    for name, executor in self._executors.items():
      found = [job for job in jobs if self._name(job) == name]
      if found:
        yield executor, found

  def follow(self) -> list[str]:
    """See `launchers.Executor`, as for the others."""
    jobs = self._experiment.jobs()
    return [note for e, _ in self._each(jobs) for note in e.follow(self._experiment)]

  def observe(self, job: launchers.Job) -> dict[str, Any]:
    """A job's state record."""
    return self._executors[self._name(job)].observe(job)

  def advice(self, jobs: Sequence[launchers.Job]) -> list[str]:
    """What people have to do so that jobs go on."""
    return [note for executor, found in self._each(jobs) for note in executor.advice(found)]

  def queued(self, jobs: Sequence[launchers.Job]) -> dict[str, str]:
    """Those of the jobs that wait or run somewhere."""
    queued: dict[str, str] = {}
    for executor, found in self._each(jobs):
      queued.update(executor.queued(found))
    return queued

  def cancel(self, jobs: Sequence[launchers.Job]) -> dict[str, str]:
    """A word on each job's fate, in the jobs' order."""
    fates: dict[str, str] = {}
    for executor, found in self._each(jobs):
      fates.update(executor.cancel(found, self._experiment.ids(executor.name)))
    return {job.name: fates[job.name] for job in jobs}


def _define_rerun(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string("states", ",".join(launchers.RERUN_STATES), "Which states to run again.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("wids", None, "Only these: 3,7-9", flag_values=values)
  define_experiments_dir(values)
  define_executor(values)


def _rerun(argv: list[str]) -> int:
  experiment, values = _parse_with_xid(argv, _define_rerun)
  states = [state.upper() for state in _listed(values.states)]
  for state in states:
    if state not in runs.STATES or state in ("DONE", "RUNNING"):
      allowed = [s for s in runs.STATES if s not in ("DONE", "RUNNING")]
      raise flags.UsageError(f"--states: {state!r} cannot be rerun. Known: {', '.join(allowed)}.")
  known = [int(run["wid"]) for run in experiment.record["runs"]]
  wids = set(known) if values.wids is None else parse_wids(values.wids, known)
  if not experiment.source.is_dir():
    raise launchers.LaunchError(f"The source snapshot {experiment.source} is gone: launch anew.")
  executor = executor_from(values, experiment.record.get("executor"))
  executor.check()
  with experiment.attended():
    jobs = [job for job in experiment.jobs() if job.wid in wids]
    before = Executors(experiment)
    for note in before.follow():
      raise launchers.LaunchError(f"Which jobs are still queued is not known: {note}")
    needed = [job.after for job in jobs if job.after is not None]
    seen = {job.name: before.observe(job)["state"] for job in (*jobs, *needed)}
    chosen = _chosen(jobs, seen, states)
    queued = before.queued(chosen)
    for job in chosen:
      if job.name in queued and seen[job.name] not in ("PENDING", "REQUEUED"):
        print(f"{job.name} is {seen[job.name]}, and not over: {queued[job.name]}.")
    left_out = set(queued)
    for job in chosen:
      if job.after is not None and job.after.name in left_out:
        left_out.add(job.name)
    chosen = [job for job in chosen if job.name not in left_out]
    if not chosen:
      text, counts = launchers.states_table(jobs, before.observe)
      print(f"{text}\nNothing to rerun among {', '.join(states)}: {_summary(counts)}.")
      for note in before.advice(jobs):
        print(f"Note: {note}")
      return 0 if set(counts) <= {"DONE"} else 1
    states_before = {job.name: job.folder.read_state() for job in chosen}
    count = len(experiment.submissions())
    ready = launchers.prepare(chosen)
    chosen_executor = {"name": executor.name, **executor.options()}
    if chosen_executor != experiment.record.get("executor"):
      experiment.note(executor=chosen_executor)
    code = run_jobs(executor, ready, f"./launch.py rerun {_name(experiment)}", experiment)
    if code and executor.detached:
      _restore(ready, states_before, experiment.submissions()[count:])
    return code if len(ready) == len(chosen) else code or 1


def _restore(
  jobs: Sequence[launchers.Job],
  records: Mapping[str, Mapping[str, Any]],
  submissions: Sequence[Mapping[str, Any]],
) -> None:
  """Gives jobs that were prepared, and then not submitted, their states and reasons back."""
  ids: dict[str, Optional[str]] = {}
  for noted in submissions:
    ids.update(noted["ids"])
  for job in jobs:
    record = dict(records[job.name])
    if ids.get(job.name) is None and record.pop("state", "PENDING") != "PENDING":
      job.folder.note_state(**{**record, "state": records[job.name]["state"]})


def _chosen(
  jobs: Sequence[launchers.Job], seen: dict[str, str], states: Sequence[str]
) -> list[launchers.Job]:
  """Those of the jobs, each after the one that it waits for, that a rerun takes."""
  chosen: dict[str, launchers.Job] = {}
  for job in jobs:
    state = seen[job.name]
    wanted = state in states
    if job.after is not None and job.after.name in chosen:
      # An evaluation follows its training in any case, a run one that it has waited for.
      wanted = (
        state not in ("DONE", "RUNNING") if job.kind == "eval" else wanted or state == "PENDING"
      )
    elif job.after is not None:
      wanted = wanted or (job.kind == "eval" and state == "CANCELLED")
      wanted = wanted and seen[job.after.name] == "DONE"
    if wanted:
      chosen[job.name] = job
  return list(chosen.values())


def parse_wids(text: str, known: Sequence[int]) -> set[int]:
  """ "3,7-9" as a set.

  Raises:
    flags.UsageError: It is no such list, or names a work unit that is not there.
  """
  wids: set[int] = set()
  for part in _listed(text):
    first, dash, last = part.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
      raise flags.UsageError(f"--wids={text}: numbers and ranges, like 3,7-9.")
    begin, end = int(first), int(last if dash else first)
    wids.update(range(begin, min(end, max(begin, max(known) + 1)) + 1))  # One unknown is enough.
  unknown = sorted(wids - set(known))
  if unknown or not wids:
    raise flags.UsageError(
      f"--wids={text}: no work unit {', '.join(map(str, unknown)) or 'is named'}. "
      f"There are {min(known)} to {max(known)}."
    )
  return wids


def _cancel(argv: list[str]) -> int:
  experiment, _ = _parse_with_xid(argv, define_experiments_dir)
  executors = Executors(experiment)
  executors.follow()
  for name, fate in executors.cancel(experiment.jobs()).items():
    print(f"{name} {fate}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
