"""python -m ljpeg.pillow_eval --config ljpeg/configs/pillow.py --dataset kodak.

Measures standard JPEG by Pillow at every quality of the config's sweep: one results file each, as a
run of this family. Nothing is trained, so there is no run directory: the experiment is called
`pillow-444`, `pillow-420-optimized`, ..., and its runs have the quality for a wid.
"""

import concurrent.futures
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags

import configs
from common import classical, data, flags, hyper, results, runs

FAMILY = "ljpeg"

USAGE = """
python -m ljpeg.pillow_eval --config ljpeg/configs/pillow.py[:optimized] --dataset NAME

Compresses the pictures of a data set with Pillow's JPEG at all qualities of the config, decodes the
files again, and writes one results file a quality.
"""

_KEYS = {"quality", "subsampling", "optimize"}


def check(unit: hyper.WorkUnit) -> None:
  """Raises hyper.ConfigError for a setting that Pillow cannot write."""
  config = hyper.to_config(unit.config)
  if set(config.get("model_config", {})) != _KEYS:
    raise hyper.ConfigError(
      f"{unit.config_file} is no config of Pillow's JPEG: its model_config should have "
      f"{', '.join(sorted(_KEYS))}, as ljpeg/configs/pillow.py has."
    )
  hyper.check_numbers(config, {"model_config.quality": hyper.Range(int, 1)})
  if config.model_config.quality > 100:
    raise hyper.ConfigError(
      f"model_config.quality={config.model_config.quality}: it is from 1 to 100."
    )
  if config.model_config.subsampling not in ("4:4:4", "4:2:0"):
    raise hyper.ConfigError(
      f"Unknown model_config.subsampling {config.model_config.subsampling!r}. Known: 4:4:4, 4:2:0."
    )


def evaluate(unit: hyper.WorkUnit, images: classical.Images, jobs: int = 1) -> results.ResultFile:
  """Measures one setting on all pictures, `jobs` at a time."""
  options = dict(unit.config["model_config"])
  codec = classical.PillowCodec("JPEG", options, max_side=65500)

  def measure(index: int) -> results.EvalRecord:
    name, image = images[index]
    return classical.measure(codec, name, image)

  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    records = tuple(pool.map(measure, range(len(images))))
  huffman = ", optimized Huffman tables" if options["optimize"] else ""
  run: dict[str, Any] = {
    "family": FAMILY,
    "xid": _xid(unit),
    "wid": unit.config["model_config"]["quality"],
    "runname": unit.runname,
    **runs.git_state(configs.PROJECT_DIR),
    "workdir": None,
    "label": f"JPEG {options['subsampling']}{huffman} by Pillow",
  }
  dataset = {"name": images.name, "images": [r.image for r in records], "hash": images.hash}
  return results.ResultFile(run, unit.config, unit.overrides, 0, dataset, "bitstream", records)


def _xid(unit: hyper.WorkUnit) -> str:
  """The experiment's name: there is no run directory that has one."""
  model = unit.config["model_config"]
  subsampling = model["subsampling"].replace(":", "")
  return f"pillow-{subsampling}{'-optimized' if model['optimize'] else ''}"


def _define(values: absl_flags.FlagValues) -> None:
  text = absl_flags.DEFINE_string
  text("dataset", None, "A known name, a folder or a glob.", flag_values=values)
  text("results_dir", str(configs.RESULTS_DIR), "Where results go.", flag_values=values)
  absl_flags.DEFINE_bool(
    "skip_existing", True, "Leave existing results of the same pictures.", flag_values=values
  )


def run(argv: Sequence[str]) -> None:
  """The command; `argv` without the program's name.

  Raises:
    flags.UsageError, hyper.ConfigError, data.DataError: The message names the fix.
  """
  values, config_file, overrides = flags.parse(argv, _define, USAGE)
  if config_file is None or not values.dataset:
    raise flags.UsageError("--config and --dataset are needed; see --help.")
  units = hyper.expand(config_file, FAMILY, "train", overrides)
  for unit in units:
    check(unit)
  images = data.load_eval_images(values.dataset)
  for unit in units:
    if values.skip_existing and _is_done(unit, images, values.results_dir):
      print(f"{unit.runname}: its results are there already.")
      continue
    result = evaluate(unit, images, os.cpu_count() or 1)
    path = results.write(values.results_dir, result)
    bpp, psnr = result.mean("bpp") or 0, result.mean("psnr_db") or 0
    print(f"{unit.runname}: {bpp:.4f} bpp, {psnr:.3f} dB  {path}")


def _is_done(unit: hyper.WorkUnit, images: classical.Images, results_dir: str) -> bool:
  quality = unit.config["model_config"]["quality"]
  facts = {"family": FAMILY, "xid": _xid(unit), "wid": quality, "runname": unit.runname}
  path = results.result_path(results_dir, images.name, "bitstream", facts, 0)
  try:
    found = results.read(path) if path.is_file() else None
  except results.ResultError:
    return False
  return found is not None and (
    found.dataset.get("hash") == images.hash and found.config == unit.config
  )


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code: 0 done, 2 wrong."""
  try:
    run(argv)
  except (flags.UsageError, ValueError, runs.RunError, OSError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
