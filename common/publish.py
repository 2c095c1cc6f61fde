"""Results as they are published: compact, complete by themselves, and without the machine's paths.

    python -m common.publish --dataset kodak --runs 'train_xms/overnight' --out docs/report/results
    python -m common.report --dataset kodak --results_dir docs/report/results
    python -m common.publish --check docs/report

The copies have the same schema, so reports read them as any results. Runs are named
`train_xms/<xid>/<run>` wherever they lie, measurements have six digits, and what else a report
looks up in the run's directory (minutes of training, the machine) is in the file.
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags as absl_flags

import configs
from common import datasets, flags, report_data, results, runs

USAGE = """
python -m common.publish --dataset NAME --out FOLDER [--runs 'train_xms/<xid>'] [--results_dir DIR]
python -m common.publish --check FOLDER

Copies the results of a data set for others to draw; or looks for paths of this machine in files.
"""

_TEXTS = (".json", ".html", ".csv", ".svg", ".md")

# Folders that machines have at their root: no text that is published names anything in them.
_ROOTED = re.compile(
  r"(?<![\w.:/<&-])/(?:home|root|tmp|work|usr|var|opt|mnt|media|data|scratch|srv|Users|private)/"
  r"[^\s\"'<>,;)]*"
)
_INLINE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]*")


class PublishError(ValueError):
  """There is nothing to publish, or it names this machine's paths."""


def publishable(result: results.ResultFile) -> results.ResultFile:
  """A copy that is complete without the run's directory, and names no path of this machine."""
  run = {**result.run}
  training = report_data.training(result)
  if training is not None:
    run["training"] = {"minutes": _short(training.minutes), "machine": training.machine}
  return dataclasses.replace(
    result,
    run=_each(run, _named),
    config=_each(result.config, _named),
    overrides=_each(result.overrides, _named),
    profile=_each(result.profile, _short),
    records=tuple(results.EvalRecord(**_each(results.as_dict(r), _short)) for r in result.records),
  )


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
  """A value of JSON with every number and text in it changed."""
  if isinstance(value, dict):
    return {key: _each(v, change) for key, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_each(v, change) for v in value]
  return change(value)


def _short(value: Any) -> Any:
  return float(f"{value:.6g}") if isinstance(value, float) else value


def _named(value: Any) -> Any:
  """A name in place of an absolute path."""
  if not isinstance(value, str) or not value.startswith("/"):
    return value
  name = datasets.label(value)
  return name if name in datasets.known() else results.portable(value)


def text_of(result: results.ResultFile) -> str:
  """A results file, a line a record."""
  whole = dataclasses.asdict(result)
  records = ",\n".join(f"  {json.dumps(r, allow_nan=False)}" for r in whole.pop("records"))
  head = ",\n".join(f' "{k}": {json.dumps(v, allow_nan=False)}' for k, v in whole.items())
  return f'{{\n{head},\n "records": [\n{records}\n ]\n}}\n'


def publish(
  dataset: str,
  results_dir: runs.PathLike,
  out: runs.PathLike,
  run_globs: Sequence[str] = (),
) -> list[pathlib.Path]:
  """Writes publishable copies of a data set's results; those of an earlier time are removed.

  Args:
    dataset: Its name.
    results_dir: Where the results lie.
    out: Where the copies go: <out>/<dataset>/<mode>/*.json.
    run_globs: If given, only results of these runs, and of classical codecs.

  Returns:
    The copies.

  Raises:
    PublishError: There are no results, some cannot be used, or one names a path of this machine.
    runs.RunError: A glob matches no run.
  """
  selected = None
  if run_globs:
    selected = {s.key for s in report_data.run_statuses(run_globs, dataset) if s.key is not None}
  loaded = report_data.load(results_dir, dataset, selected)
  if loaded.left_out:
    first = loaded.left_out[0]
    raise PublishError(
      f"{len(loaded.left_out)} results cannot be used, the first is {first.path}: {first.reason}. "
      "Move them away, or evaluate anew."
    )
  if not loaded.results:
    raise PublishError(f"No results of data set {dataset!r} in {str(results_dir)!r}.")
  texts = {}
  for result in map(publishable, loaded.results):
    name = result.dataset["name"]
    path = results.result_path(out, name, result.mode, result.run, result.step)
    texts[path] = text_of(result)
    found = next(machine_paths(texts[path]), None)
    if found is not None:
      raise PublishError(f"{path.name} would name {found!r}, a path of this machine.")
  for old in results.find(out, dataset):
    if old not in texts:
      old.unlink()
  for path, text in texts.items():
    runs.atomic_write(path, text, sync=False)
  return list(texts)


def machine_paths(text: str) -> Iterator[str]:
  """What a text names of this machine's folders; pictures within a page are passed over."""
  text = _INLINE.sub("", text)
  for match in _ROOTED.finditer(text):
    yield match.group()
  here = (configs.PROJECT_DIR, configs.TRAIN_DIR, configs.ITINF_DIR, configs.RESULTS_DIR)
  for folder in {str(f) for f in (*here, configs.DATA_DIR, pathlib.Path.home())} - {"/"}:
    if folder in text:
      yield folder


def check(folder: runs.PathLike) -> int:
  """Looks through all texts in a folder; returns how many there are.

  Raises:
    PublishError: Some name paths of this machine; or there are none.
  """
  paths = [p for p in sorted(pathlib.Path(folder).rglob("*")) if p.suffix in _TEXTS]
  found = [
    f"{path}: {where}" for path in paths for where in sorted(set(machine_paths(path.read_text())))
  ]
  if found:
    raise PublishError("Paths of this machine:\n  " + "\n  ".join(found))
  if not paths:
    raise PublishError(f"No texts in {str(folder)!r}.")
  return len(paths)


def _define(values: absl_flags.FlagValues) -> None:
  def define(name: str, default: Any, text: str) -> None:
    absl_flags.DEFINE_string(name, default, text, flag_values=values)

  define("dataset", None, "The data set whose results to copy.")
  define("results_dir", str(configs.RESULTS_DIR), "Where results lie.")
  define("out", None, "Where the copies go.")
  define("check", None, "Look for paths of this machine in this folder's texts; write nothing.")
  absl_flags.DEFINE_list(
    "runs", [], "Globs of run directories: only their results, and those of classical codecs.",
    flag_values=values,
  )  # fmt: skip


def run(argv: Sequence[str]) -> None:
  """The command; `argv` without the program's name.

  Raises:
    flags.UsageError, PublishError, runs.RunError: The message names the fix.
  """
  values, _, _ = flags.parse(argv, _define, USAGE, allow_config=False)
  if values.check is not None:
    print(f"{values.check}: {check(values.check)} texts, no path of this machine.")
    return
  if not values.dataset or not values.out:
    raise flags.UsageError("--dataset and --out are needed, or --check; see --help.")
  paths = publish(values.dataset, values.results_dir, values.out, values.runs)
  size = sum(p.stat().st_size for p in paths)
  print(f"{len(paths)} results of {values.dataset}, {size / 1e6:.1f} MB: {values.out}")


def main() -> None:
  """The command line."""
  try:
    run(sys.argv[1:])
  except (flags.UsageError, PublishError, runs.RunError, OSError) as e:
    flags.fail(e)


if __name__ == "__main__":
  main()
