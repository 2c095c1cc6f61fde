"""What a training costs beside arithmetic, in bytes: for docs/scaling.md.

  python -m benchmarks.scale [--config factorized/configs/bls2017.py ...]

For each full config, without training: FLOPs of a step (3 x forward of the transforms), operations
that compute something in the graph that a GPU gets, bytes of a checkpoint, of a record of scalars
in metrics.jsonl and in TensorBoard's events, and of the pictures that a validation adds (pairs as
PNG and in the events). Bytes depend neither on the machine nor on what else it does. About 20
seconds a config.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import tempfile
from typing import Any
from unittest import mock

import numpy as np

from common import data, hyper, runs

_CONFIGS = (
  "factorized/configs/bls2017.py",
  "mshyper/configs/mbt2018.py",
  "mshyper/configs/jpegl.py",
  "mshyper/configs/two_layer_syn.py",
  "mshyper/configs/two_layer_syn2.py",
)
_RECORDS = 500
# Operations that compute nothing: a GPU has no kernel to start for them.
_FREE = ("Const", "Placeholder", "Identity", "NoOp", "ReadVariableOp", "Reshape", "Shape")


def _size(folder: pathlib.Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(path: str, folder: pathlib.Path, crops: np.ndarray) -> dict[str, float]:
  """The figures of one config by name; `folder` is empty."""
  from common import checkpoints, layers, profiling, train_lib, writers

  config = hyper.load(path).get_config()
  family = pathlib.Path(path).parent.parent.name
  state = train_lib.TrainState(
    importlib.import_module(f"{family}.codec").build(config.model_config)
  )
  step = train_lib.make_train_step(state, config)
  with mock.patch.object(layers, "_on_cpu", return_value=False):  # The graph that a GPU gets.
    graph = step.get_concrete_function(crops, np.int32(0), np.float32(0), np.float32(0)).graph
  costs = profiling.profile_stages(state.codec.stages()).values()
  figures: dict[str, float] = {
    "GFLOP a step": 3 * crops[..., 0].size * sum(c.flops_per_pixel for c in costs) / 1e9,
    "parameters": sum(c.num_parameters for c in costs),
    "kernels a step": sum(op.type not in _FREE for op in graph.get_operations()),
  }
  saved = checkpoints.Checkpoints(folder / "checkpoints")
  saved.save(state.checkpoint(), 1, facts={"loss": 1.2345678})
  figures["checkpoint, bytes"] = _size(saved.folder)

  run = runs.RunDir(folder / "run")
  run.path.mkdir()
  writer = writers.MetricsWriter(run)
  rng = np.random.default_rng(0)
  train = ("loss", "bpp", "mse", "gradient_norm", "learning_rate", "rd_lambda", "psnr_db")
  _scalars(writer, rng, (*train, "steps_per_second"), "train")
  figures["metrics.jsonl a record, bytes"] = run.metrics_file.stat().st_size / _RECORDS
  figures["events a record, bytes"] = _size(run.tensorboard_dir) / _RECORDS
  before = _size(run.path)
  pairs = crops[: int(config.train_eval_config.num_images_to_log)]
  for number in range(8):
    writer.image_pairs(number, pairs, pairs)
  writer.flush()
  figures["pictures a validation, bytes"] = (_size(run.path) - before) / 8
  figures["files a validation"] = len(list(run.images_dir.iterdir())) / 8
  writer.close()
  return figures


def _scalars(writer: Any, rng: np.random.Generator, names: tuple[str, ...], split: str) -> None:
  for number in range(_RECORDS):
    values = {name: float(np.float32(value)) for name, value in zip(names, rng.random(len(names)))}
    writer.scalars(100 * (number + 1_000), values, split=split)
  writer.flush()


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", nargs="+", default=list(_CONFIGS))
  parser.add_argument("--dataset", default="sample", help="whose crops are logged as pictures")
  args = parser.parse_args()
  images = [image for _, image in data.load_eval_images(args.dataset)]
  crops = np.stack([images[i % len(images)][:256, :256] for i in range(8)])
  columns = {}
  for path in args.config:
    with tempfile.TemporaryDirectory() as folder:
      columns[pathlib.Path(path).name] = measure(path, pathlib.Path(folder), crops)
  print(f"{'':32s}" + "".join(f"{name:>19s}" for name in columns))
  for name in next(iter(columns.values())):
    values = [figures[name] for figures in columns.values()]
    print(f"{name:32s}" + "".join(f"{value:19,.0f}" for value in values))


if __name__ == "__main__":
  main()
