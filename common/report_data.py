"""What a report reads: the results of a data set, published curves, the states of runs."""

import dataclasses
import fnmatch
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional

from common import bd, datasets, hyper, results, runs

PUBLISHED_SCHEMA_VERSION = 1


class ReportError(ValueError):
  """There is nothing to report; the message names the fix."""


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A file that the report does not use, and why."""

  path: pathlib.Path
  reason: str


@dataclasses.dataclass(frozen=True)
class Loaded:
  """The usable results of a data set.

  Attributes:
    results: Of one set of pictures, in the order of their files.
    left_out: Damaged files, those of other pictures, repeated ones.
    not_selected: How many results belong to other runs than those asked for.
    other_pictures: How many of `left_out` were measured on other pictures.
  """

  results: tuple[results.ResultFile, ...]
  left_out: tuple[LeftOut, ...]
  not_selected: int = 0
  other_pictures: int = 0


RunKey = tuple[str, str, str]  # family, xid, wid


def run_key(run: Mapping[str, Any]) -> RunKey:
  """What identifies a run in its results."""
  return (str(run["family"]), str(run["xid"]), str(run["wid"]))


def run_and_mode(result: results.ResultFile) -> tuple[str, ...]:
  """What identifies a point of a curve; its last step counts."""
  return (*run_key(result.run), str(result.run["runname"]), result.mode)


def load(
  results_dir: runs.PathLike, dataset: str, selected: Optional[set[RunKey]] = None
) -> Loaded:
  """Reads the results of a data set.

  Args:
    results_dir: Where results lie.
    dataset: The data set's name.
    selected: If given, results of other runs are left out; classical codecs are kept.

  Returns:
    Results that were all measured on the same pictures. Where files disagree on the pictures'
    hash, the set that most files share counts, and the other files are in `left_out`.
  """
  found: list[tuple[pathlib.Path, results.ResultFile]] = []
  left_out: list[LeftOut] = []
  not_selected = 0
  for path in results.find(results_dir, dataset):
    try:
      result = results.read(path)
      _check(result, dataset)
    except (results.ResultError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
      left_out.append(LeftOut(path, _reason(e, path)))
      continue
    if str(result.run["xid"]).startswith("_"):
      continue
    trained = result.run["family"] != "classical"
    if selected is not None and trained and run_key(result.run) not in selected:
      not_selected += 1
      continue
    found.append((path, result))
  # Of copies, the one counts that has the name it was written with.
  found.sort(key=lambda f: f[0].name != _file_name(f[1]))
  usable: list[tuple[pathlib.Path, results.ResultFile]] = []
  seen: dict[tuple[Any, ...], pathlib.Path] = {}
  count: dict[str, int] = {}
  for path, result in found:
    identity = (*run_and_mode(result), result.step)
    if identity in seen:
      left_out.append(LeftOut(path, f"repeats {seen[identity].name}"))
      continue
    seen[identity] = path
    usable.append((path, result))
    count[result.dataset["hash"]] = count.get(result.dataset["hash"], 0) + 1
  others = 0
  if len(count) > 1:
    kept = max(count, key=lambda h: count[h])
    for path, result in usable:
      if result.dataset["hash"] != kept:
        others += 1
        left_out.append(
          LeftOut(
            path,
            f"measured on other pictures ({len(result.records)} of hash "
            f"{result.dataset['hash'][:12]}; the report is of hash {kept[:12]})",
          )
        )
    usable = [(p, r) for p, r in usable if r.dataset["hash"] == kept]
  return Loaded(tuple(r for _, r in usable), tuple(left_out), not_selected, others)


def _file_name(result: results.ResultFile) -> str:
  name = result.dataset["name"]
  return results.result_path("", name, result.mode, result.run, result.step).name


def _reason(error: Exception, path: pathlib.Path) -> str:
  """An error about a file, for a place where the file is named already."""
  text = f"no field {error}" if isinstance(error, KeyError) else str(error)
  for name in (f"Record {str(path)!r} ", f"{path}: ", f"{path} "):
    text = text.replace(name, "")
  return text


def _check(result: results.ResultFile, dataset: str) -> None:
  """Raises what `load` catches if the file cannot be used for this data set."""
  run_key(result.run)
  str(result.run["runname"])
  name = str(result.dataset["name"])
  if hyper.safe_name(name) != hyper.safe_name(dataset):
    raise ValueError(f"of data set {name!r}")
  if not isinstance(result.dataset["hash"], str):
    raise ValueError("the pictures' hash is no text")
  if not isinstance(result.step, int) or not isinstance(result.run.get("label") or "", str):
    raise ValueError(f"step {result.step!r}, label {result.run.get('label')!r}")
  if result.mode not in results.MODES:
    raise ValueError(f"unknown mode {result.mode!r}")
  if not result.records or len(result.records) != len(result.dataset["images"]):
    raise ValueError(
      f"{len(result.records)} records of {len(result.dataset['images'])} pictures: not complete"
    )
  for record in result.records:
    if not (math.isfinite(record.bpp) and record.bpp > 0 and record.num_pixels > 0):
      raise ValueError(f"{record.image}: {record.bpp} bpp, {record.num_pixels} pixels")
  for field in ("psnr_db", "msssim", "lpips", "bpp_estimated", "seconds_encode", "seconds_decode"):
    result.mean(field)


def load_published(folder: runs.PathLike, dataset: str) -> tuple[list[bd.Series], list[LeftOut]]:
  """The published curves of a data set; files that cannot be read are in the second list."""
  series: list[bd.Series] = []
  left_out: list[LeftOut] = []
  flops: dict[str, float] = {}
  for path in sorted(pathlib.Path(folder).glob("*.json")):
    try:
      content = runs.read_json(path)
      version = content["schema_version"]
      if version != PUBLISHED_SCHEMA_VERSION:
        raise ValueError(f"schema version {version!r}; this code reads {PUBLISHED_SCHEMA_VERSION}")
      series += [_published(c) for c in content["curves"] if c["dataset"] == dataset]
      flops.update(_decoder_flops(content.get("complexity", [])))
    except (runs.RunError, OSError, KeyError, TypeError, ValueError, AttributeError) as e:
      left_out.append(LeftOut(path, _reason(e, path)))
  return [_with_flops(s, flops) for s in series], left_out


def _decoder_flops(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Codec -> FLOPs a pixel of what its decoder runs, by the stages' names: synthesis transforms."""
  return {
    row["codec"]: sum(float(v) for k, v in row["flops_per_pixel"].items() if k.startswith("g"))
    for row in rows
    if "codec" in row
  }


def _with_flops(series: bd.Series, flops: Mapping[str, float]) -> bd.Series:
  if series.publication is None:
    return series
  found = flops.get(series.publication.codec)
  publication = dataclasses.replace(series.publication, decoder_flops_per_pixel=found)
  return dataclasses.replace(series, publication=publication)


def select_published(series: Sequence[bd.Series], wanted: Iterable[str]) -> list[bd.Series]:
  """The published curves that are asked for, in their order.

  Args:
    series: Published curves of one data set.
    wanted: "all", "none", "default" (all but those `on_request`), globs of codec names or sources.

  Raises:
    ReportError: A name or glob fits no curve.
  """
  chosen: set[int] = set()
  for name in (w.strip().casefold() for w in wanted):
    found = {
      i
      for i, p in enumerate(s.publication for s in series)
      if p is not None
      and (
        name == "all"
        or (name == "default" and not p.on_request)
        or fnmatch.fnmatchcase(p.codec.casefold(), name)
        or fnmatch.fnmatchcase(p.source.casefold(), name)
      )
    }
    if not found and name not in ("", "all", "default", "none"):
      known = ", ".join(s.publication.codec for s in series if s.publication) or "none"
      raise ReportError(
        f"--published={name}: no published curve of this data set is called that. Known: {known}."
      )
    chosen |= found
  return [s for i, s in enumerate(series) if i in chosen]


def _published(record: Mapping[str, Any]) -> bd.Series:
  label, bpp = str(record["label"]), record["bpp"]
  columns: dict[str, Optional[list[float]]] = {"bpp": bpp, "psnr_db": record["psnr_db"]}
  columns.update({field: record.get(field) for field in ("msssim_db", "lpips")})
  points: dict[str, Optional[tuple[float, ...]]] = {}
  for field, values in columns.items():
    if values is not None and len(values) != len(bpp):
      raise ValueError(f"{label!r}: {len(bpp)} values of bpp, {len(values)} of {field}")
    if values is not None and not all(math.isfinite(v) for v in values):
      raise ValueError(f"{label!r}: {field} is not finite everywhere")
  if not bpp or min(bpp) <= 0:
    raise ValueError(f"{label!r}: no points, or a rate of 0")
  publication = results.Publication(
    title=label,
    codec=str(record.get("codec", label)),
    source=str(record["source"]),
    convention=str(record["convention"]),
    rate=str(record.get("rate", "not stated")),
    reference=" ".join(
      [*([record["commit"]] if "commit" in record else ()), *record.get("files", ())]
    ),
    on_request=bool(record.get("on_request", False)),
  )
  if publication.rate not in results.PUBLISHED_RATES:
    known = ", ".join(results.PUBLISHED_RATES)
    raise ValueError(f"{label!r}: rate {publication.rate!r}; known: {known}")
  order = sorted(range(len(bpp)), key=lambda i: (bpp[i], record["psnr_db"][i]))
  for field, values in columns.items():
    points[field] = None if values is None else tuple(float(values[i]) for i in order)
  return bd.Series(
    results.RDCurve(
      label=f"{label} [{publication.source}]",
      source="published",
      group=f"published-{publication.codec}",
      **points,  # type: ignore[arg-type]
    ),
    publication,
  )


@dataclasses.dataclass(frozen=True)
class RunStatus:
  """A run directory, for those that were asked for.

  Attributes:
    path: The run directory.
    key: What its results are known by; None where its record is damaged.
    state: See `runs.STATES`; "?" where none is recorded.
    detail: Step and reason of the state, or what is wrong with the record.
  """

  path: pathlib.Path
  key: Optional[RunKey]
  state: str
  detail: str


def run_statuses(patterns: Sequence[str], dataset: str) -> list[RunStatus]:
  """The runs that match the globs; experiments whose name starts with `_` are left out.

  So are runs that optimise the latents of another data set's pictures than `dataset`.

  Raises:
    runs.RunError: A glob matches no run.
  """
  found: dict[pathlib.Path, RunStatus] = {}
  for pattern in patterns:
    for run in runs.find_runs(pattern):
      if not run.path.parent.name.startswith("_") and not _is_of_other_pictures(run, dataset):
        found[run.path] = _run_status(run)
  return list(found.values())


def _is_of_other_pictures(run: runs.RunDir, dataset: str) -> bool:
  try:
    unit = run.read_work_unit()
    if unit.task != "itinf":
      return False
    return datasets.label(unit.config["data_config"]["dataset"]) != dataset
  except (runs.RunError, hyper.ConfigError, OSError, KeyError, TypeError, AttributeError):
    return False  # Its status says what is wrong with it.


def _run_status(run: runs.RunDir) -> RunStatus:
  state = run.read_state()
  details = [f"step {state['step']}"] if "step" in state else []
  details += [str(state["reason"])] if state.get("reason") else []
  try:
    record = run.read_record()
    unit = record["work_unit"]
    key = (str(unit["family"]), str(record["xid"]), str(unit["wid"]))
  except (runs.RunError, OSError, KeyError, TypeError, AttributeError) as e:
    return RunStatus(run.path, None, "?", f"its record is damaged: {e}")
  return RunStatus(run.path, key, str(state.get("state", "?")), ", ".join(details))


@dataclasses.dataclass(frozen=True)
class Training:
  """What a training took.

  Attributes:
    steps: Of the weights that were measured.
    minutes: Wall time at work, without the waits between starts; None where neither the run
      directory nor the results tell.
    machine: What it ran on; empty where that is not known.
    parameters: Trained numbers of the model; None where that is not known.
  """

  steps: int
  minutes: Optional[float]
  machine: str = ""
  parameters: Optional[int] = None


def trained_run(run: Mapping[str, Any]) -> str:
  """The directory of the trained run behind results, also of latents that were optimised."""
  return str(run.get("trained_run") or run.get("workdir") or "")


def training(result: results.ResultFile) -> Optional[Training]:
  """The training behind a results file; None for codecs that are not trained."""
  if result.step <= 0:
    return None
  known = result.run.get("training") or {}  # Published results bring it along.
  minutes, machine = known.get("minutes"), str(known.get("machine", ""))
  folder = trained_run(result.run)
  if folder:
    run = runs.RunDir(results.located(folder))
    minutes = _minutes(run) if minutes is None else minutes
    machine = machine or _machine(run)
  return Training(result.step, minutes, machine, _parameters(result))


def _parameters(result: results.ResultFile) -> Optional[int]:
  """As the results say, those of older versions by their profile, if they have one."""
  if "num_parameters" in result.run:
    return int(result.run["num_parameters"])
  stages = (result.profile or {}).get("stages", {})
  return sum(int(stage["num_parameters"]) for stage in stages.values()) if stages else None


def _machine(run: runs.RunDir) -> str:
  """The processor of a run's last start, in the words of `runs.processor`."""
  try:
    start = runs.read_json(run.environment_file)[-1]
    return f"{start['cpu']}, {start['num_cpus']} CPUs"
  except (runs.RunError, OSError, KeyError, TypeError, IndexError):
    return ""


def _minutes(run: runs.RunDir) -> Optional[float]:
  """From each start to the end mark, or to the last record before the next start."""
  state = run.read_state()
  if state.get("state") != "DONE":
    return None
  try:
    starts = [float(start["time"]) for start in runs.read_json(run.environment_file)]
    ends = [float(state["time"])]
    if len(starts) > 1:
      logged = [float(r["time"]) for r in runs.read_jsonl(run.metrics_file)]
      before = [[t for t in logged if a <= t < b] for a, b in zip(starts, starts[1:])]
      ends = [*(max(times, default=start) for times, start in zip(before, starts)), *ends]
  except (runs.RunError, OSError, KeyError, TypeError, ValueError):
    return None
  return sum(end - start for start, end in zip(starts, ends)) / 60 if starts else None
