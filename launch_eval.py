#!/usr/bin/env python3
"""Evaluates runs on a data set, one job a run; the family is read from each run's record.

usage:
  ./launch_eval.py --workdirs 'train_xms/<xid>/wid=*' --dataset kodak
                   [--skip 'wid=*-vae-*'] [--args '--skip_existing=false'] [--jobs N] [--dry_run]
                   [--executor slurm|local] [--sargs '--partition=gpu']

On Slurm the evaluations are one job array, an experiment of its own in SLURM_DIR/<xid>/ with a
snapshot of the source, so `./launch.py status|rerun|cancel <xid>` work on it.
The evaluation's state and log go to <run>/eval-<dataset>/; results to json_results/<dataset>/.
Runs that cannot be evaluated are shown as FAILED, and do not hold up the others. Experiments whose
name starts with `_` are left out, unless the glob names them.
"""

import fnmatch
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from common import venv

if __name__ == "__main__":
  venv.use_project_venv(__file__)

import pathlib

from absl import flags as absl_flags

import configs
import launch
from common import datasets, flags, hyper, launchers, runs

_RESERVED_ARGS = ("workdir", "job_dir", "dataset", "config", "check_args", "help", "h")


def _define(values: absl_flags.FlagValues) -> None:
  absl_flags.DEFINE_string("workdirs", None, "Run directories, or experiments: a quoted glob.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("dataset", None, "A data set's name, a folder or a glob of images.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("skip", None, "Leave out the runs whose names this glob fits.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_string("args", "", "Further arguments for every task, as one quoted text.",
                           flag_values=values)  # fmt: skip
  absl_flags.DEFINE_bool("dry_run", False, "Print the jobs; write and start nothing.",
                         flag_values=values)  # fmt: skip
  absl_flags.DEFINE_bool("use_snapshot", False,
                         "Evaluate with each experiment's own source, not with the present one.",
                         flag_values=values)  # fmt: skip
  launch.define_executor(values)


def main(argv: Sequence[str], project_dir: pathlib.Path = configs.PROJECT_DIR) -> int:
  """The command line without the program's name; returns the exit code, as launch.main."""
  try:
    with launchers.STOPS:
      return _main(list(argv), project_dir)
  except KeyboardInterrupt:
    print("Interrupted.", file=sys.stderr)
    return 130
  except (flags.UsageError, hyper.ConfigError, launchers.LaunchError, runs.RunError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2


def _main(argv: list[str], project_dir: pathlib.Path) -> int:
  values, _, _ = flags.parse(argv, _define, __doc__ or "", allow_config=False)
  for name in ("workdirs", "dataset"):
    if not values[name].value:
      raise flags.UsageError(f"--{name} is missing (see --help).")
  args = launch.split_args(values.args, _RESERVED_ARGS)
  executor = launch.executor_from(values)
  dataset = datasets.absolute(values.dataset)
  found = trainings(_without(not_put_aside(values.workdirs), values.skip))
  if len(found) > 1 and any(a.lstrip("-").split("=")[0] == "save_dir" for a in args):
    raise flags.UsageError(
      f"--args: {len(found)} runs would write to one --save_dir. --save_pictures keeps each run's "
      "pictures beside its results."
    )
  jobs = make_jobs(found, dataset, args, project_dir, values.use_snapshot)
  if args and not values.use_snapshot:  # What older sources take, their jobs say.
    for family in dict.fromkeys(run.read_work_unit().family for run in found):
      launchers.check_arguments(args, f"{family}.{launchers.EVAL_TASK}", project_dir)
  launchers.check_dataset(dataset, project_dir)
  if values.dry_run:
    print("\n".join(shlex.join(job.argv) for job in jobs))
    print(f"{len(jobs)} jobs. Dry run: nothing was written.")
    return 0
  busy = _busy(jobs, dataset)
  if busy:
    raise launchers.LaunchError(
      f"Evaluated already, or about to be: {'; '.join(busy)}. Wait for it, or ./launch.py cancel "
      "<xid>; what is lost there: ./launch.py rerun <xid>."
    )
  if executor.detached:
    facts = launch.launch_facts("launch_eval.py", argv, executor)
    return _submit(executor, found, dataset, args, project_dir, values.use_snapshot, facts)
  ready = launchers.prepare(jobs, afresh=True)
  code = launch.run_jobs(executor, ready, shlex.join(["./launch_eval.py", *argv]))
  return code if len(ready) == len(jobs) else code or 1


def _busy(jobs: Sequence[launchers.Job], dataset: str) -> list[str]:
  """Those of the jobs that run, or that Slurm still has, with the experiments that hold them."""
  busy = {
    job.folder.path: job.name for job in jobs if launchers.observe(job.folder)["state"] == "RUNNING"
  }
  folders = {job.folder.path for job in jobs}
  for experiment in _experiments(jobs, dataset):
    theirs = [job for job in experiment.jobs() if job.folder.path in folders]
    executors = launch.Executors(experiment)
    executors.follow()
    theirs = [job for job in theirs if executors.observe(job)["state"] in _OPEN]
    try:
      queued = executors.queued(theirs)
    except launchers.LaunchError as e:  # Their locks keep two evaluations apart.
      print(f"Warning: {e}", file=sys.stderr)
      continue
    for job in theirs:
      if job.name in queued:
        busy[job.folder.path] = f"{job.name} ({queued[job.name]}, experiment {experiment.xid})"
  return list(busy.values())


_OPEN = (*launchers.OPEN_STATES, "REQUEUED")


def _experiments(jobs: Sequence[launchers.Job], dataset: str) -> list[launchers.Experiment]:
  """The experiments that evaluate some of these runs on the data set, too."""
  runs_ = {job.folder.path.parent for job in jobs}
  found = []
  for folder in dict.fromkeys(run.parent for run in runs_):
    if (folder / "experiment.json").is_file():
      experiment = launchers.Experiment.open(folder)
      found += [experiment] if experiment.record["then_eval"] == dataset else []
  if any(job.folder.read_state().get("state") in _OPEN for job in jobs):
    for file in configs.SLURM_DIR.glob("*/experiment.json"):
      experiment = launchers.Experiment.open(file.parent)
      if experiment.record.get("dataset") == dataset and any(
        pathlib.Path(run["workdir"]) in runs_ for run in experiment.record["runs"]
      ):
        found.append(experiment)
  return found


def _submit(
  executor: launchers.Executor,
  found: Sequence[runs.RunDir],
  dataset: str,
  args: Sequence[str],
  project_dir: pathlib.Path,
  use_snapshot: bool,
  facts: Mapping[str, Any],
) -> int:
  """Makes an experiment of the evaluations, and submits it."""
  executor.check()
  families = [(run, run.read_work_unit().family) for run in found]

  def create() -> launchers.Experiment:
    xid = executor.reserve(configs.SLURM_DIR, range(len(found)), launchers.EVAL_TASK)
    more = {**facts, **executor.reserved()}
    return launchers.Experiment.create_evaluations(
      configs.SLURM_DIR, families, dataset, project_dir, args, xid, use_snapshot, more
    )

  def prepare(jobs: Sequence[launchers.Job]) -> Sequence[launchers.Job]:
    return launchers.prepare(jobs, afresh=True)

  return launch.launch_new(executor, create, prepare)


def not_put_aside(pattern: str) -> list[runs.RunDir]:
  """The runs of a glob, without those of experiments whose name starts with `_`.

  Raises:
    runs.RunError: Nothing matches.
    launchers.LaunchError: All of them are put aside.
  """
  found = runs.find_runs(pattern)
  kept = [
    r for r in found if not r.path.parent.name.startswith("_") or r.path.parent.name in pattern
  ]
  if not kept:
    raise launchers.LaunchError(
      f"All runs that match {pattern!r} are of experiments whose name starts with '_', which are "
      f"left out: name one, for example --workdirs '{found[0].path.parent}/wid=*'."
    )
  return kept


def _without(found: Sequence[runs.RunDir], skip: Optional[str]) -> list[runs.RunDir]:
  """The runs but for those of --skip.

  Raises:
    launchers.LaunchError: None is left.
  """
  kept = [r for r in found if skip is None or not fnmatch.fnmatchcase(r.path.name, skip)]
  if not kept:
    raise launchers.LaunchError(f"--skip={skip} leaves out all {len(found)} runs.")
  return kept


def trainings(found: Sequence[runs.RunDir]) -> list[runs.RunDir]:
  """The runs that are trainings, if any is; latent optimisations write their results themselves."""
  tasks = [run.read_work_unit().task for run in found]
  if "train" not in tasks:
    return list(found)
  left_out = len(tasks) - tasks.count("train")
  if left_out:
    print(f"{left_out} runs are no trainings: left out, they write their own results.")
  return [run for run, task in zip(found, tasks) if task == "train"]


def make_jobs(
  found: Sequence[runs.RunDir],
  dataset: str,
  args: Sequence[str],
  project_dir: pathlib.Path,
  use_snapshot: bool = False,
) -> list[launchers.Job]:
  """One evaluation a run.

  Raises:
    launchers.LaunchError: A run's family has no evaluation, or its snapshot is asked for and gone.
  """
  here = launchers.job_environment(launchers.code_state(project_dir))
  jobs = []
  for run in found:
    family = run.read_work_unit().family
    source, env = project_dir, here
    if use_snapshot:
      experiment = launchers.Experiment.open(run.path.parent)
      source = experiment.source
      # Whichever source runs, results go where this command's own do.
      env = launchers.job_environment({**experiment.record, "site": None})
    if not (source / family / "eval.py").is_file():
      raise launchers.LaunchError(f"{run.path} is of family {family!r}: no {family}/eval.py "
                                  f"in {source}.")  # fmt: skip
    jobs.append(launchers.eval_job(run, family, dataset, source, env, args))
  return jobs


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
