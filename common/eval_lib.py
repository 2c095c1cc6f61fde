"""Evaluation of a trained run on a data set: real bitstreams, image by image; and its profile."""

import dataclasses
import hashlib
import io
import logging
import math
import pathlib
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf

import configs
from common import (
  artefacts,
  checkpoints,
  data,
  hyper,
  metrics,
  profiling,
  rd,
  results,
  runs,
  train_lib,
  writers,
)
from common.codec import BuildCodec, Codec, Latents, TrainableCodec

_LOG = logging.getLogger(__name__)

# (Height, width) of the picture to profile with, where neither a data set nor the user sets it.
PROFILE_SIZE = (512, 768)


class MismatchError(RuntimeError):
  """A decoded picture is not the encoder's own reconstruction: a bug, never to be averaged over."""


def load_codec(
  run: runs.RunDir, build: BuildCodec, step: Optional[str] = None, with_coding: bool = True
) -> tuple[TrainableCodec, int]:
  """A run's codec with the weights of a checkpoint, ready to compress.

  Where coding needs more than the weights, it is read from the run's `coding_dir`, if it was made.

  Args:
    run: A training run.
    build: Of its family.
    step: Of the checkpoint, "best" for the best by validation loss, None for the newest whole one.
    with_coding: Whether to read that; not where it is about to be made.

  Raises:
    checkpoints.CheckpointError: There is no such checkpoint, or it does not fit.
    artefacts.ArtefactError: What was made for coding is damaged.
  """
  codec = build(hyper.to_config(run.read_work_unit().config).model_config)
  ckpts = checkpoints.Checkpoints(run.checkpoints_dir)
  if step is None:
    _, number = checkpoints.find(run.path)
  else:
    best = ckpts.best() or {"step": None}
    found = {"best": best["step"], **{str(s): s for s in ckpts.steps()}}.get(step)
    if found is None:
      raise checkpoints.CheckpointError(
        f"{run.path} has no checkpoint of step {step}. It has: {ckpts.steps()}, best: "
        f"{best['step']}."
      )
    number = found
  ckpts.restore(train_lib.weights_only(codec), number)
  codec.named_by = f"--workdir {shlex.quote(str(run.path))}" + (f" --step {number}" if step else "")
  saved = run.coding_dir(number) / "default.npz"
  if not with_coding or not saved.is_file():
    codec.prepare()
    return codec, number
  try:
    codec.prepare(artefacts.read_arrays(saved))
  except (ValueError, KeyError, TypeError) as e:
    raise artefacts.ArtefactError(
      f"{saved} does not fit this model ({type(e).__name__}: {e}). Remove it, and make it again."
    ) from e
  return codec, number


def estimate(
  codec: TrainableCodec, image: np.ndarray, latents: Optional[Latents] = None
) -> tuple[float, np.ndarray]:
  """Bits by the prior's likelihoods, and the encoder's own reconstruction (uint8 [H, W, 3]).

  `latents` are the picture's, where they are known already.
  """
  latents = codec.latents_of(image) if latents is None else latents
  size = (image.shape[0], image.shape[1])
  decoded = rd.reconstruct(codec, codec.rounded(latents), size)
  return codec.ideal_bits(latents), decoded


def record(
  codec: Codec,
  name: str,
  image: np.ndarray,
  mode: str,
  data_bytes: Optional[bytes] = None,
  lpips: bool = True,
) -> tuple[results.EvalRecord, np.ndarray]:
  """Measures one picture.

  Args:
    codec: With tables.
    name: Of the image, for the record.
    image: uint8 [H, W, 3].
    mode: "estimated" skips the coding; every other mode measures a file.
    data_bytes: The file, if it was made already (iterative inference); else `codec.compress`.
    lpips: Whether to measure LPIPS, where there are weights.

  Returns:
    The record and the decoded picture.

  Raises:
    MismatchError: The decoder gives another picture than the encoder's own reconstruction.
  """
  pixels = image.shape[0] * image.shape[1]
  estimated, own = (None, None)
  seconds: list[Optional[float]] = [None, None]
  num_bytes: Optional[int] = None
  began = time.perf_counter()
  if isinstance(codec, TrainableCodec) and data_bytes is None:
    # What `compress` does, in its two steps: the estimate needs the latents too.
    latents = codec.latents_of(image)
    if mode != "estimated":
      data_bytes = codec.pack(latents, (image.shape[0], image.shape[1]))
      seconds[0] = time.perf_counter() - began
    bits, own = estimate(codec, image, latents)
    estimated = bits / pixels
  elif data_bytes is None and mode != "estimated":
    data_bytes = codec.compress(image)
    seconds[0] = time.perf_counter() - began
  if data_bytes is None:
    if own is None or estimated is None:
      raise ValueError("Only trained codecs have an estimated rate.")
    decoded, bpp = own, estimated
  else:
    began = time.perf_counter()
    decoded = codec.decompress(data_bytes)
    seconds[1] = time.perf_counter() - began
    num_bytes = len(data_bytes)
    bpp = 8 * num_bytes / pixels
    if own is not None and isinstance(codec, TrainableCodec):
      _check_decoded(name, own, decoded, codec.decoder_tolerance)
  measured = metrics.measure(image, decoded, lpips)
  return (
    results.EvalRecord(
      image=name,
      num_pixels=pixels,
      num_bytes=num_bytes,
      bpp=bpp,
      bpp_estimated=estimated,
      seconds_encode=seconds[0],
      seconds_decode=seconds[1],
      **measured,
    ),
    decoded,
  )


def _check_decoded(name: str, own: np.ndarray, decoded: np.ndarray, tolerance: float) -> None:
  """Raises MismatchError where the decoded picture is not the encoder's own reconstruction."""
  if np.array_equal(own, decoded):
    return
  if own.shape == decoded.shape:
    total = sum(np.abs(a.astype(np.int32) - b).sum() for a, b in zip(own, decoded))
    if total <= tolerance * own.size:
      return
  raise MismatchError(
    f"{name}: the decoded picture differs from the encoder's reconstruction in "
    f"{int(np.sum(own != decoded))} values."
  )


def run_facts(run: runs.RunDir) -> dict[str, Any]:
  """What a results file says of its run."""
  unit = run.read_work_unit()
  started = {}
  if run.environment_file.is_file():
    started = runs.read_json(run.environment_file)[-1]
  name = unit.part or pathlib.Path(unit.config_file).stem
  return {
    "family": unit.family,
    "xid": run.xid,
    "wid": unit.wid,
    "runname": unit.runname,
    "commit": started.get("commit"),
    "dirty": started.get("dirty"),
    "workdir": str(run.path),
    "device": profiling.device_name(),
    "label": f"{unit.family} {name} {run.xid}",
    **({"curve": unit.part} if unit.part else {}),
  }


def codec_facts(codec: TrainableCodec) -> dict[str, Any]:
  """What a results file says of the model: what decodes its files, and how large it is."""
  return {
    "fingerprint": codec.fingerprint.hex(),
    "num_parameters": sum(math.prod(v.shape) for v in codec.trainable_variables),
  }


def evaluate(
  run: Union[runs.RunDir, hyper.WorkUnit],
  build: BuildCodec,
  dataset: Optional[str],
  mode: str = "bitstream",
  step: Optional[str] = None,
  results_dir: runs.PathLike = configs.RESULTS_DIR,
  skip_existing: bool = True,
  save_dir: Optional[runs.PathLike] = None,
  save_pictures: bool = False,
  job_dir: Optional[runs.RunDir] = None,
  profile: bool = False,
  profile_size: Optional[tuple[int, int]] = None,
  lpips: bool = True,
) -> Optional[pathlib.Path]:
  """Evaluates a run on a data set and writes its results file; returns that file's path.

  Records are kept as they are measured (`results.Partial`): one that was killed goes on where it
  was.

  Args:
    run: A training run with a checkpoint; or a work unit, whose untrained model is profiled.
    build: Of its family.
    dataset: As `data.load_eval_images` takes it; None (always with a work unit): profile only,
      print that, write nothing and return None.
    mode: "bitstream" measures files, "estimated" likelihoods only.
    step: Of the checkpoint, or "best"; None for the newest.
    results_dir: Where results lie.
    skip_existing: Whether an existing results file of the same pictures, model and config is left
      as it is, and an evaluation that ended early goes on; not if `save_dir` is given (with
      `save_pictures` it does).
    save_dir: Where decoded pictures (PNG) and files go; None: nowhere.
    save_pictures: Whether they go beside the results, where reports look for them
      (`results.pictures_dir`). If all are there already, nothing is done anew.
    job_dir: Where a launcher looks for the state of this evaluation.
    profile: Whether to measure what the model costs, print that and put it into the results file,
      also into one that is left as it is otherwise. Without this, a results file that is made anew
      keeps the profile of the same model.
    profile_size: (height, width) of the picture to profile with; None for the data set's typical
      one, or PROFILE_SIZE.
    lpips: Whether to measure LPIPS, where there are weights.

  Raises:
    hyper.ConfigError: The work unit's config gives no model of this family.
    results.ResultError: The results cannot be written, or another process is making them.
  """
  if isinstance(run, hyper.WorkUnit):
    name, image = sample_image(profile_size or PROFILE_SIZE)
    profile_and_print(untrained_codec(run, build, image), name, image, step=None)
    return None
  codec, number = load_codec(run, build, step)
  if dataset is None:
    profile_and_print(codec, *sample_image(profile_size or PROFILE_SIZE), step=number)
    return None
  images = data.load_eval_images(dataset)
  facts = {**run_facts(run), **codec_facts(codec)}
  unit = run.read_work_unit()
  path = results.result_path(results_dir, images.name, mode, facts, number)
  current = _current(path, facts, unit, images)
  if save_pictures:
    save_dir = path.with_suffix("")
  are_saved = save_dir is None or (save_pictures and _are_saved(save_dir, images.names))
  if current is not None and skip_existing and are_saved:
    _LOG.info("Exists already: %s (--skip_existing=false evaluates anew)", path)
    result = current
  else:
    header = results.ResultFile(
      run=facts,
      config=unit.config,
      overrides=unit.overrides,
      step=number,
      dataset={"name": images.name, "hash": images.hash},
      mode=mode,
      records=(),
      profile=None if current is None else current.profile,
    )
    of = _depends_on(codec, facts, unit, number, images, mode, lpips)
    anew = not skip_existing or (save_dir is not None and not save_pictures)
    with results.Partial(path, {**of, "save_pictures": save_pictures}, anew) as partial:
      found = None
      if not anew and (save_dir is None or _are_saved(save_dir, images.names)):
        found = _current(path, facts, unit, images)  # By a process just before.
      if found is None:
        _measure(codec, images, mode, save_dir, job_dir, run.path.name, lpips, partial)
        found = _completed(header, images, partial)
        results.write(results_dir, found)
      partial.remove()
    result = found
    _LOG.info("%s", summary(result))
  if profile:
    measured = profile_and_print(codec, *typical_image(dataset, images, profile_size), step=number)
    results.write(results_dir, dataclasses.replace(result, profile=measured))
    _LOG.info("The profile is in %s", path)
  return path


def _completed(
  header: results.ResultFile, images: data.EvalImages, partial: results.Partial
) -> results.ResultFile:
  """The results of all pictures that could be read, in their order."""
  records = tuple(partial.records[name] for name in images.names)
  dataset = {
    "name": images.name, "images": [r.image for r in records], "hash": images.hash,
  }  # fmt: skip
  return dataclasses.replace(header, dataset=dataset, records=records)


def _current(
  path: pathlib.Path, facts: dict[str, Any], unit: hyper.WorkUnit, images: data.EvalImages
) -> Optional[results.ResultFile]:
  """A results file, if there is one of this model, config and these pictures.

  Raises:
    results.ResultError: It is another run's: two runs never share a file.
  """
  if not path.is_file():
    return None
  try:
    there = results.read(path)
  except results.ResultError as e:
    _LOG.warning("%s; it is made anew.", e)
    return None
  workdir = there.run.get("workdir")
  if there.run.get("fingerprint") == facts["fingerprint"] and there.config == unit.config:
    return there if there.dataset["hash"] == images.hash else None
  if workdir != facts["workdir"]:
    raise results.ResultError(
      f"{path} holds results of another run with this xid and wid ({workdir}). Give "
      "--results_dir, or move that file away."
    )
  return None


def _depends_on(
  codec: TrainableCodec,
  facts: dict[str, Any],
  unit: hyper.WorkUnit,
  step: int,
  images: data.EvalImages,
  mode: str,
  lpips: bool,
) -> dict[str, Any]:
  """All that an evaluation's records depend on, but for the machine."""
  weights = hashlib.sha256()
  for variable in codec.variables:  # The fingerprint is of the decoder alone.
    weights.update(variable.numpy().tobytes())
  return {
    "run": facts,
    "weights": weights.hexdigest(),
    "config": unit.config,
    "step": step,
    "dataset": {"name": images.name, "hash": images.hash, "images": images.names},
    "mode": mode,
    "lpips": lpips and metrics.lpips_weights() is not None,
    "code": results.code_hash("common", unit.family),
  }


def _measure(
  codec: Codec,
  images: data.EvalImages,
  mode: str,
  save_dir: Optional[runs.PathLike],
  job_dir: Optional[runs.RunDir],
  label: str,
  lpips: bool,
  partial: results.Partial,
) -> None:
  """Measures the pictures that are not in `partial` yet, and puts them there.

  A record is kept after its picture is saved, but somebody may have removed some pictures since:
  those are measured again.
  """
  if save_dir is not None:
    for name in [n for n in partial.records if not _are_saved(save_dir, [n])]:
      del partial.records[name]
  done = len(partial.records)
  if done:
    _LOG.info("%d of %d pictures were measured before.", done, len(images))
  if done == len(images):
    return
  missing = [i for i, name in enumerate(images.names) if name not in partial.records]
  _, image = images[missing[0]]
  codec.decompress(codec.compress(image))  # The first call traces: not part of anybody's time.
  progress = writers.Progress(len(images), done, unit="image", run=job_dir, label=label)
  try:
    for measured in _records(codec, (images[i] for i in missing), mode, save_dir, lpips):
      partial.append(measured)
      done += 1
      progress.update(done, f"{measured.bpp:.3f} bpp {measured.psnr_db or math.inf:.2f} dB")
  finally:
    progress.close()


def _records(
  codec: Codec,
  images: Iterable[tuple[str, np.ndarray]],
  mode: str,
  save_dir: Optional[runs.PathLike],
  lpips: bool,
) -> Iterator[results.EvalRecord]:
  for name, image in images:
    measured, decoded = record(codec, name, image, mode, lpips=lpips)
    if save_dir is not None:
      file = None if mode == "estimated" else codec.compress(image)
      save(save_dir, name, decoded, file, codec.file_suffix)
    yield measured


def untrained_codec(unit: hyper.WorkUnit, build: BuildCodec, image: np.ndarray) -> TrainableCodec:
  """A config's codec with initial weights, calibrated on a crop of `image` and ready to compress.

  Raises:
    hyper.ConfigError: The config gives no model of this family.
  """
  tf.keras.utils.set_random_seed(0)
  try:
    codec = build(hyper.to_config(unit.config).model_config)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    why = f"it lacks {e.args[0]!r}." if isinstance(e, KeyError) else str(e)
    raise hyper.ConfigError(
      f"{unit.config_file} gives no model of the family {unit.family!r}: {why} "
      f"The family's configs are in {unit.family}/configs/."
    ) from e
  codec.calibrate(rd.pad(rd.to_batch(image[:256, :256]), codec.downsample_factor))
  codec.prepare_untrained(image[:256, :256])
  return codec


def profile_and_print(
  codec: TrainableCodec, name: str, image: np.ndarray, step: Optional[int]
) -> dict[str, Any]:
  """Measures what a codec costs for a picture, prints that, and returns it as results hold it.

  Args:
    codec: With tables.
    name: Of the picture.
    image: uint8 [H, W, 3].
    step: Of the weights; None: untrained.
  """
  _LOG.info("Profiling %s with %s ...", type(codec).__name__, name)
  measured = {"image": name, **profiling.profile_codec(codec, image)}
  print(f"{name}, weights: {'untrained' if step is None else f'step {step}'}")
  print(profiling.table(measured))
  if step is None:
    print("Bytes and seconds of pack and unpack are not typical: they depend on trained weights.")
  return measured


def sample_image(size: tuple[int, int]) -> tuple[str, np.ndarray]:
  """A photograph of the data set `sample`, mirrored and cropped to (height, width), and its name.

  Raises:
    data.DataError: The packages that hold the photographs are not installed.
  """
  name, image = data.load_eval_images("sample")[0]
  return name, _fitted(image, size)


def typical_image(
  dataset: str, images: data.EvalImages, size: Optional[tuple[int, int]] = None
) -> tuple[str, np.ndarray]:
  """The picture with the median number of pixels, at its own size or fitted to `size`."""
  whole = set(images.names)
  sources = [s for s in data.resolve(dataset) if s.name in whole]
  sources.sort(key=lambda s: s.size()[0] * s.size()[1])
  middle = sources[(len(sources) - 1) // 2]
  image = middle.load()
  return middle.name, image if size is None else _fitted(image, size)


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The picture's top left corner; what it lacks to `size` is mirrored."""
  lacking = [(0, max(0, wanted - side)) for wanted, side in zip(size, image.shape)]
  return np.pad(image, [*lacking, (0, 0)], "symmetric")[: size[0], : size[1]]


def _saved_as(folder: runs.PathLike, name: str, suffix: str) -> pathlib.Path:
  return pathlib.Path(f"{pathlib.Path(folder) / pathlib.Path(name).with_suffix('')}{suffix}")


def _are_saved(folder: runs.PathLike, names: Sequence[str]) -> bool:
  return all(_saved_as(folder, name, ".png").is_file() for name in names)


def save(
  folder: runs.PathLike,
  name: str,
  decoded: np.ndarray,
  data_bytes: Optional[bytes],
  suffix: str = ".ntc",
) -> None:
  """Writes a decoded picture as PNG and its file under the image's name."""
  from PIL import Image

  target = _saved_as(folder, name, ".png")
  target.parent.mkdir(parents=True, exist_ok=True)
  encoded = io.BytesIO()
  Image.fromarray(decoded).save(encoded, "PNG")
  runs.atomic_write(target, encoded.getvalue())  # `_are_saved` looks for nothing but the file.
  if data_bytes is not None:
    runs.atomic_write(_saved_as(folder, name, suffix), data_bytes)


def summary(result: results.ResultFile) -> str:
  """One line: mean rate, PSNR, MS-SSIM, and what the files cost over the estimate."""
  parts = [f"{len(result.records)} images: {result.mean('bpp'):.4f} bpp"]
  estimated = result.mean("bpp_estimated")
  if estimated and result.mode != "estimated":
    parts.append(f"(estimate {estimated:.4f}, {100 * (result.mean('bpp') / estimated - 1):+.2f}%)")  # type: ignore[operator]
  psnr, msssim = result.mean("psnr_db"), result.mean("msssim")
  if psnr is not None:
    parts.append(f"PSNR {psnr:.3f} dB")
  if msssim is not None:
    parts.append(f"MS-SSIM {msssim:.4f} ({results.msssim_to_db(msssim):.2f} dB)")
  lpips = result.mean("lpips")
  if lpips is not None:
    parts.append(f"LPIPS {lpips:.4f}")
  for name in ("encode", "decode"):
    seconds = result.mean(f"seconds_{name}")
    if seconds is not None:
      parts.append(f"{name} {seconds:.3f} s")
  return ", ".join(parts)
