"""The rows of the performance table: what each asks, and how a benchmark hands its figures over.

Every benchmark of a row ends with `report`: it prints its figures beside what the row asks, and
with `--json FILE` writes them there too, for `python -m benchmarks.table`. Nothing here needs
TensorFlow before something has been measured, so that `--help` answers at once.
"""

import argparse
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Optional

# Names of ceilings, with their units.
MATMUL = "float32 matrix product, GFLOP/s"
COPY = "memory copy (read + write), GB/s"


class Row(NamedTuple):
  """A row of the table.

  Attributes:
    what: Is measured.
    asks: What the row asks.
    module: The benchmark; several rows may share one.
    args: Its arguments for the table; "{dataset}" and "{peer}" are the table's options.
    quick: Arguments in addition, with --quick.
  """

  what: str
  asks: str
  module: str
  args: tuple[str, ...] = ()
  quick: tuple[str, ...] = ()


_ON_DATASET = ("--dataset", "{dataset}")
_PEER = (*_ON_DATASET, "--python", "{peer}")

ROWS = {
  1: Row(
    "train step, share of the matrix-product rate",
    ">= 65% for every config",
    "train_step",
    quick=("--rounds", "3"),
  ),
  2: Row(
    "train step against the code that shallow-ntc's authors published",
    ">= 1.7x (bls2017, mbt2018), 1.2x (two_layer_syn2), 1.1x (ELIC's analysis)",
    "train_step",
    quick=("--rounds", "3"),
  ),
  3: Row("train step against CompressAI", ">= 1.5x", "peer", args=_PEER, quick=("--rounds", "2")),
  4: Row(
    "decode, two_layer_syn, against CompressAI",
    ">= 6x",
    "peer",
    args=_PEER,
    quick=("--rounds", "2"),
  ),
  5: Row(
    "encode, mbt2018, against CompressAI", ">= 1.3x", "peer", args=_PEER, quick=("--rounds", "2")
  ),
  6: Row(
    "range coding against tensorflow_compression's, one thread",
    ">= 2x; decode >= 20 Msymbol/s",
    "coding",
    quick=("--rounds", "3", "--no_large"),
  ),
  7: Row(
    "input pipeline against the train step",
    ">= 5x the step's rate; cached crops >= 5,000/s",
    "data_pipeline",
    quick=("--seconds", "1"),
  ),
  8: Row(
    "itinf step (SGA, two_layer_syn) against its FLOPs at the matrix rate",
    "<= 2x",
    "itinf_step",
    args=_ON_DATASET,
    quick=("--rounds", "3"),
  ),
  9: Row(
    "VBQ, one picture, 16 lambdas",
    "<= 1.0 s, < 1 GB",
    "vbq",
    args=_ON_DATASET,
    quick=("--rounds", "3"),
  ),
  10: Row(
    "dry run of 1,000 settings",
    "< 1 s, no TensorFlow import",
    "launching",
    args=("--settings", "0"),
    quick=("--repeat", "1"),
  ),
  11: Row(
    "1,000 settings submitted",
    "1 sbatch, < 2 s",
    "launching",
    args=("--settings", "0"),
    quick=("--repeat", "1"),
  ),
  12: Row("start of a training to its first step", "< 10 s", "startup", quick=("--rounds", "1")),
  13: Row(
    "memory of evaluating a 2048-pixel picture",
    "< 4 GB",
    "memory",
    quick=("--config", "mshyper/configs/two_layer_syn.py"),
  ),
}


class Figure(NamedTuple):
  """A measured figure beside what its row asks.

  Attributes:
    row: Of ROWS.
    what: Was measured, such as a config.
    values: In `unit`, one a round.
    unit: Such as "s".
    against: The ceiling or the peer, measured in the same run where it can be.
    ratio: What is compared with `reach`.
    reach: What the row asks.
    at_least: Whether the ratio must not be lower than `reach`; else it must not be higher.
  """

  row: int
  what: str
  values: Sequence[float]
  unit: str
  against: str
  ratio: float
  reach: float
  at_least: bool = True

  @property
  def is_reached(self) -> bool:
    """Whether the row's reach is met."""
    return self.ratio >= self.reach if self.at_least else self.ratio <= self.reach


def parser(doc: Optional[str]) -> argparse.ArgumentParser:
  """A parser with --json; `doc` is the benchmark's docstring."""
  made = argparse.ArgumentParser(
    description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument("--json", type=pathlib.Path, help="write the rows' figures to this file")
  return made


def spread(values: Sequence[float], digits: int = 3) -> str:
  """Median (least to most)."""
  median = f"{statistics.median(values):,.{digits}f}"
  if len(values) < 2:
    return median
  return f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def report(
  figures: Sequence[Figure], ceilings: Mapping[str, Sequence[float]], path: Optional[pathlib.Path]
) -> None:
  """Prints the figures and the ceilings of the same run; writes them to `path` if there is one."""
  from common import profiling

  machine = profiling.device_name()
  print()
  print("\n".join(ceiling_lines(machine, ceilings)))
  print("\n".join(markdown(figures)))
  if path is not None:
    record = {
      "machine": machine,
      "ceilings": {k: list(v) for k, v in ceilings.items()},
      "figures": [figure._asdict() for figure in figures],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def ceiling_lines(machine: str, ceilings: Mapping[str, Sequence[float]]) -> list[str]:
  """What the machine can do at best, and how much that varied in the run."""
  return [f"{machine}; " + "; ".join(f"{k}: {spread(v, 0)}" for k, v in ceilings.items()), ""]


def markdown(figures: Sequence[Figure]) -> list[str]:
  """A Markdown table; ratios are to two digits, but decided with all."""
  lines = [
    "| row | what | median (least to most) | ceiling or peer | ratio | asked | reached |",
    "|---|---|---|---|---|---|---|",
  ]
  for f in figures:
    digits = 0 if statistics.median(f.values) >= 100 else 3
    asked = f"{'>=' if f.at_least else '<='} {f.reach:.2f}"
    figure = f"{spread(f.values, digits)} {f.unit}"
    lines.append(
      f"| {f.row} | {ROWS[f.row].what}: {f.what} | {figure} | {f.against} "
      f"| {f.ratio:,.2f} | {asked} | {'yes' if f.is_reached else 'no'} |"
    )
  return lines
