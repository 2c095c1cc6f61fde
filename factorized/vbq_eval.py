"""Variational Bayesian Quantization of a trained VAE: all rates of one model, in real bytes.

    python -m factorized.vbq_eval --workdir RUN --calibration cid22-train --dataset kodak

Makes the quantizers of a checkpoint from the posteriors of the calibration's pictures, keeps them
in the run (coding/step-.../), and measures each of them at all of its settings. `./ntc.py` and
`python -m factorized.eval` use the VBQ quantizer that was made first; with `--make_default` they
use this calibration's from now on.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import numpy as np
from absl import flags as absl_flags

import configs
from common import cli, flags, hyper, results, runs

if TYPE_CHECKING:
  from common import data
  from factorized import vae, vbq

_LOG = logging.getLogger(__name__)

METHODS = ("vbq", "uniform", "kmeans")

USAGE = """
python -m factorized.vbq_eval --workdir RUN --calibration DATASET --dataset DATASET
    [--methods vbq,uniform,kmeans] [--make_default] [--export FILE.npz] [--profile]

Quantizes a trained VAE (factorized/configs/bls2017_vae.py) at all rates, and measures its files.
"""


def evaluate(
  run: runs.RunDir,
  calibration: str,
  dataset: str,
  methods: Sequence[str] = METHODS,
  step: Optional[str] = None,
  results_dir: runs.PathLike = configs.RESULTS_DIR,
  skip_existing: bool = True,
  export: Optional[runs.PathLike] = None,
  make_default: bool = False,
  profile: bool = False,
) -> list[pathlib.Path]:
  """Makes a run's quantizers, measures them, and writes a results file a method and setting.

  Args:
    run: Of a VAE.
    calibration: The data set that code points and tables are made from.
    dataset: The data set to measure.
    methods: Some of METHODS.
    step: As `eval_lib.load_codec`.
    results_dir: Where results go.
    skip_existing: Whether results of the same pictures, weights and calibration stay as they are.
    export: An `.npz` for all measurements as arrays; then everything is measured anew.
    make_default: Whether the run codes with this calibration's VBQ quantizer from now on, also
      where it has one.
    profile: Whether to measure what the model costs, with the first of the methods, print that and
      put it into the results of that method.

  Returns:
    The results files.

  Raises:
    results.ResultError: There are results of another run with this xid and wid.
  """
  from common import data, eval_lib
  from factorized import vae
  from factorized.codec import build

  codec, number = eval_lib.load_codec(run, build, step, with_coding=False)
  if not isinstance(codec, vae.GaussianVAE):
    raise hyper.ConfigError(
      f"{run.path} is no VAE: it codes at the rate that it was trained for. Evaluate it with "
      f"python -m factorized.eval, or train factorized/configs/bls2017_vae.py."
    )
  images, known = data.load_eval_images(dataset), data.load_eval_images(calibration)
  if images.hash == known.hash:
    _LOG.warning("The tables are made from the pictures that are measured: the rates flatter.")
  quantizers = Quantizers(run, number, codec, known)
  paths, arrays = [], {}
  for method in methods:
    coder = quantizers.get(method)
    if method == "vbq":
      quantizers.use_as_default(make_default)
    codec.prepare(coder.arrays())
    headers = _headers(run, number, codec, quantizers, images)
    if profile and method == methods[0]:
      typical = eval_lib.typical_image(dataset, images)
      cost = eval_lib.profile_and_print(codec, *typical, step=number)
      headers = [dataclasses.replace(h, profile=cost) for h in headers]
    there = [results.result_path(results_dir, images.name, "vbq", h.run, number) for h in headers]
    paths += there
    done = [_is_current(path, header) for path, header in zip(there, headers)]
    if skip_existing and export is None and all(done):
      for path, header in zip(there, headers):
        if header.profile is not None:
          results.write(
            results_dir, dataclasses.replace(results.read(path), profile=header.profile)
          )
      _LOG.info("%s: all results are there already (--skip_existing=false measures anew).", method)
      continue
    anew = not skip_existing or export is not None
    with contextlib.ExitStack() as stack:
      partials = [
        stack.enter_context(results.Partial(path, _depends_on(header, codec), anew))
        for path, header in zip(there, headers)
      ]
      measured = _measure(codec, images, method, export is not None, partials)
      _write(results_dir, headers, [[p.records[n] for n in images.names] for p in partials])
      for partial in partials:
        partial.remove()
    arrays.update({f"{method}_{name}": value for name, value in measured.items()})
    arrays[f"{method}_settings"] = coder.settings
  if export is not None:
    from common import artefacts

    artefacts.write_arrays(export, {**arrays, "images": np.array(images.names)})
    _LOG.info("%s: %s", export, ", ".join(sorted(arrays)))
  return paths


def _headers(
  run: runs.RunDir,
  step: int,
  codec: "vae.GaussianVAE",
  quantizers: "Quantizers",
  images: "data.EvalImages",
) -> list[results.ResultFile]:
  """The results at every rate of the codec's quantizer, without records.

  Method and calibration are in the name of the run and of the curve: other ones have files and
  curves of their own.
  """
  from common import eval_lib

  unit, coder = run.read_work_unit(), codec.coder
  facts = {**eval_lib.run_facts(run), **eval_lib.codec_facts(codec)}
  calibrated = f"cal={quantizers.calibration}"
  return [
    results.ResultFile(
      run={
        **facts,
        "runname": f"{unit.runname}-{calibrated}-{coder.method}-{_setting_name(coder, rate)}",
        "curve": f"{coder.method} wid={unit.wid} {calibrated}",
      },
      config={**unit.config, "quantizer": quantizers.describe(coder, rate)},
      overrides=unit.overrides,
      step=step,
      dataset={"name": images.name, "images": [], "hash": images.hash},
      mode="vbq",
      records=(),
    )
    for rate in range(coder.num_rates)
  ]


def _is_current(path: pathlib.Path, header: results.ResultFile) -> bool:
  """Whether a results file is of this model, quantizer and these pictures.

  Raises:
    results.ResultError: It is another run's: two runs never share a file.
  """
  if not path.is_file():
    return False
  try:
    there = results.read(path)
  except results.ResultError as e:
    _LOG.warning("%s; it is made anew.", e)
    return False
  if there.run.get("fingerprint") == header.run["fingerprint"] and there.config == header.config:
    return there.dataset["hash"] == header.dataset["hash"]
  if there.run.get("workdir") != header.run["workdir"]:
    raise results.ResultError(
      f"{path} holds results of another run with this xid and wid ({there.run.get('workdir')}). "
      "Give --results_dir, or move that file away."
    )
  return False


def _depends_on(header: results.ResultFile, codec: "vae.GaussianVAE") -> dict[str, Any]:
  """All that the records of one rate depend on, but for the machine."""
  from common import metrics

  weights = hashlib.sha256()
  for variable in codec.variables:  # The fingerprint is of the decoder alone.
    weights.update(variable.numpy().tobytes())
  return {
    "run": header.run,
    "weights": weights.hexdigest(),
    "config": header.config,
    "step": header.step,
    "dataset": header.dataset,
    "lpips": metrics.lpips_weights() is not None,
    "code": results.code_hash("common", "factorized"),
  }


def _write(
  results_dir: runs.PathLike,
  headers: Sequence[results.ResultFile],
  records: Sequence[Sequence[results.EvalRecord]],
) -> None:
  """The results files of all rates; `records` are of [rates][pictures]."""
  from common import eval_lib

  for header, of_rate in zip(headers, records):
    result = dataclasses.replace(
      header,
      dataset={**header.dataset, "images": [r.image for r in of_rate]},
      records=tuple(of_rate),
    )
    results.write(results_dir, result)
    _LOG.info("%s: %s", result.run["runname"], eval_lib.summary(result))


class Quantizers:
  """The quantizers of one checkpoint and one calibration, made when they are first asked for.

  Kept in the run, named by what they were made from: weights, pictures, and the code's version.
  """

  def __init__(
    self, run: runs.RunDir, step: int, codec: "vae.GaussianVAE", images: "data.EvalImages"
  ):
    """Reads the calibration's pictures once, for their hash."""
    from factorized import vbq

    self._codec, self._images = codec, images
    self._folder = run.coding_dir(step)
    key = hashlib.sha256(f"{vbq.VERSION} {images.hash} ".encode())
    for variable in codec.variables:
      key.update(variable.numpy().tobytes())
    self._key = key.hexdigest()[:12]
    self._samples: Optional[vbq.Samples] = None

  @property
  def calibration(self) -> str:
    """The calibration's name, and a few digits of the hash of its pictures."""
    return f"{self._images.name}-{self._images.hash[:6]}"

  def path(self, method: str) -> pathlib.Path:
    """Where a method's quantizer is kept."""
    return self._folder / f"{method}-{self._key}.npz"

  def get(self, method: str) -> "vbq.Coder":
    """The quantizer; a file that is damaged is made anew."""
    from common import artefacts
    from factorized import vbq

    path = self.path(method)
    if path.is_file():
      try:
        coder = vbq.Coder.from_arrays(artefacts.read_arrays(path))
        _LOG.info("%s", path)
        return coder
      except (artefacts.ArtefactError, ValueError, KeyError) as e:
        _LOG.warning("%s; it is made anew.", e)
    began = time.monotonic()
    coder = vbq.BUILDERS[method](self._posteriors())
    artefacts.write_arrays(path, coder.arrays())
    _LOG.info("Made %s in %.0f s", path, time.monotonic() - began)
    return coder

  def _posteriors(self) -> "vbq.Samples":
    from factorized import vbq

    if self._samples is None:
      began = time.monotonic()
      self._samples = vbq.samples_of(self._codec, [image for _, image in self._images])
      shape = self._samples.mean.shape
      _LOG.info("%d posteriors in %d channels, %.0f s", *shape[::-1], time.monotonic() - began)
    return self._samples

  def use_as_default(self, replace: bool) -> None:
    """Lets the run code with this VBQ quantizer where nothing else is asked for.

    Args:
      replace: Whether to take the place of a sound one of another calibration; else that stays.
    """
    from common import artefacts
    from factorized import vbq

    default, own = self._folder / "default.npz", self.path("vbq")
    there = None
    if default.is_file():
      try:
        there = artefacts.read_arrays(default)
        vbq.Coder.from_arrays(there)
      except (artefacts.ArtefactError, ValueError, KeyError) as e:
        _LOG.warning("%s: %s; it is made anew.", default, e)
        there = None
    if there is not None:
      arrays = artefacts.read_arrays(own)
      same = arrays.keys() == there.keys()
      if same and all(np.array_equal(arrays[name], there[name]) for name in arrays):
        return
      if not replace:
        _LOG.warning(
          "Files and exports of this run still use its first quantizer (%s), not that of %s; "
          "--make_default changes that.", default, self.calibration,
        )  # fmt: skip
        return
    runs.atomic_write(default, own.read_bytes())
    before = "" if there is None else (
      " Files of the one before no longer decode with the run, only with a model exported before."
    )  # fmt: skip
    _LOG.info(
      "Files and exports of this run use the quantizer of %s from now on.%s", self.calibration,
      before,
    )  # fmt: skip

  def describe(self, coder: "vbq.Coder", rate: int) -> dict[str, Any]:
    """For the results' config."""
    return {
      "method": coder.method,
      "setting": float(coder.settings[rate]),
      "calibration": self._images.name,
      "calibration_hash": self._images.hash,
    }


def _setting_name(coder: "vbq.Coder", rate: int) -> str:
  setting = coder.settings[rate]
  return f"lambda=2^{np.log2(setting):g}" if coder.method == "vbq" else f"levels={setting:g}"


def _measure(
  codec: "vae.GaussianVAE",
  images: "data.EvalImages",
  method: str,
  with_arrays: bool,
  partials: Sequence[results.Partial],
) -> dict[str, np.ndarray]:
  """Measures the pictures that `partials` (one a rate) lack; also as arrays [pictures, rates]."""
  from common import writers

  done = [name for name in images.names if all(name in p.records for p in partials)]
  if done:
    _LOG.info("%s: %d of %d pictures were measured before.", method, len(done), len(images))
  progress = writers.Progress(len(images), len(done), unit="image", label=method)
  rows = []
  try:
    for number, name in enumerate((n for n in images.names if n not in done), len(done) + 1):
      _, image = images[images.names.index(name)]
      of_image, row = _measure_image(codec, name, image, with_arrays)
      for partial, record in zip(partials, of_image):
        if name not in partial.records:  # A kill between two rates left some.
          partial.append(record)
      rows.append(row)
      progress.update(number)
  finally:
    progress.close()
  keys = rows[0][0] if rows else {}
  return {key: np.array([[r[key] for r in row] for row in rows]) for key in keys}


def _measure_image(
  codec: "vae.GaussianVAE", name: str, image: np.ndarray, with_arrays: bool
) -> tuple[list[results.EvalRecord], list[dict[str, float]]]:
  """One picture at every rate: the posterior and the search's first part are computed once."""
  from common import eval_lib, metrics, rd

  size = (image.shape[0], image.shape[1])
  pixels = size[0] * size[1]
  latents = rd.infer_image(codec, image)
  records, rows = [], []
  for rate, ranks in enumerate(codec.symbols_of_all_rates(latents)):
    symbols = ranks.astype(np.int32)
    data_bytes = codec.pack_symbols(symbols, rate, size)
    began = time.perf_counter()
    decode, decoded_size = codec.unpack(data_bytes)
    decoded = rd.reconstruct(codec, decode, decoded_size)
    seconds = time.perf_counter() - began
    if decoded_size != size or not np.array_equal(
      decode["y"].numpy(), codec.coder.values(symbols, rate)
    ):
      raise eval_lib.MismatchError(f"{name}, rate {rate}: the file decodes to other code points.")
    ideal = codec.coder.bits(symbols, rate)
    records.append(
      results.EvalRecord(
        image=name,
        num_pixels=pixels,
        num_bytes=len(data_bytes),
        bpp=8 * len(data_bytes) / pixels,
        bpp_estimated=ideal / pixels,
        seconds_encode=None,  # Of all rates at once; benchmarks/vbq.py measures one.
        seconds_decode=seconds,
        **metrics.measure(image, decoded),
      )
    )
    if with_arrays:
      rows.append(_array_row(image, decoded, records[-1], symbols.size))
    else:
      rows.append({})
  return records, rows


def _array_row(
  image: np.ndarray, decoded: np.ndarray, record: results.EvalRecord, num_latents: int
) -> dict[str, float]:
  """One picture at one rate for the export; `_luma` is of the picture as Pillow's grey (BT.601)."""
  from PIL import Image

  from common import metrics

  grey = [
    np.asarray(Image.fromarray(x).convert("L"))[..., None].repeat(3, 2) for x in (image, decoded)
  ]
  row = {
    "bytes": float(record.num_bytes or 0),
    "bpp": record.bpp,
    "bits_per_latent": 8 * float(record.num_bytes or 0) / num_latents,
  }
  for suffix, pair in (("", (image, decoded)), ("_luma", tuple(grey))):
    row[f"mse{suffix}"] = metrics.mse(*pair)
    row[f"psnr{suffix}"] = metrics.psnr_db(*pair)
    similarity = metrics.msssim(*pair)[0]
    row[f"msssim{suffix}"] = np.nan if similarity is None else similarity
  return row


def _define(values: absl_flags.FlagValues) -> None:
  text = absl_flags.DEFINE_string
  text("workdir", None, "The run of a VAE.", flag_values=values)
  text(
    "calibration", None, "The data set that code points and tables are made from: some hundred "
    "pictures, other ones than those of --dataset.", flag_values=values,
  )  # fmt: skip
  text("dataset", None, "A name in configs.py, a folder, a glob or an image.", flag_values=values)
  absl_flags.DEFINE_list(
    "methods", list(METHODS), f"One or more of: {', '.join(METHODS)}.", flag_values=values
  )
  absl_flags.DEFINE_bool(
    "make_default", False, "Let ./ntc.py and factorized.eval use this calibration's VBQ quantizer "
    "from now on, also where the run has one of another calibration.", flag_values=values,
  )  # fmt: skip
  absl_flags.DEFINE_bool(
    "profile", False, "Measure FLOPs per pixel, parameters and seconds of the model's stages too, "
    "and put them into the results.", flag_values=values,
  )  # fmt: skip
  text("export", None, "Write all measurements as arrays to this .npz.", flag_values=values)
  text("step", None, "Of the checkpoint, or 'best'; default the newest.", flag_values=values)
  text("results_dir", str(configs.RESULTS_DIR), "Where results go.", flag_values=values)
  absl_flags.DEFINE_bool(
    "skip_existing", True, "Leave existing results of the same pictures.", flag_values=values
  )


def main(argv: Sequence[str]) -> int:
  """The command line; returns the exit code: 0 done, 1 failed, 2 the command line is wrong."""
  try:
    values, _, _ = flags.parse(argv, _define, USAGE, allow_config=False)
    for name in ("workdir", "calibration", "dataset"):
      if getattr(values, name) is None:
        raise flags.UsageError(f"--{name} is needed; see --help.")
    unknown = [m for m in values.methods if m not in METHODS]
    if unknown or not values.methods:
      raise flags.UsageError(
        f"--methods={','.join(values.methods)}: one or more of {', '.join(METHODS)}."
      )
    if values.make_default and "vbq" not in values.methods:
      raise flags.UsageError("--make_default needs vbq among --methods: files are coded with it.")
    if values.export is not None and not values.export.endswith(".npz"):
      raise flags.UsageError(f"--export={values.export}: its name must end in .npz.")
    run = runs.RunDir.open(values.workdir)
    unit = run.read_work_unit()
    if (unit.family, unit.task) != ("factorized", "train"):
      raise flags.UsageError(
        f"{values.workdir} is a run of {unit.family}.{unit.task}; name a VAE's."
      )
    from common import data

    data.resolve(values.dataset)
    data.resolve(values.calibration)
    cli.set_up_process()
  except (flags.UsageError, ValueError, runs.RunError) as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2
  with cli.logging_to():
    try:
      paths = evaluate(
        run=run,
        calibration=values.calibration,
        dataset=values.dataset,
        methods=list(dict.fromkeys(values.methods)),
        step=values.step,
        results_dir=values.results_dir,
        skip_existing=values.skip_existing,
        export=values.export,
        make_default=values.make_default,
        profile=values.profile,
      )
    except KeyboardInterrupt:
      return 130
    except Exception as e:
      expected = isinstance(e, OSError) or type(e).__module__.startswith("common.")
      _LOG.error("Error: %s: %s", type(e).__name__, e, exc_info=not expected)
      return 1
  for path in paths:
    print(path)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
