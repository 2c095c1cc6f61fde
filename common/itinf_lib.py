"""Iterative inference: the latents of given images, optimised with the weights frozen.

Starts at the encoder's output, ends in real bitstreams of the same decoder. Images of one shape go
in batches through one compiled step; a restart skips the images that are finished.

    itinf_xms/<xid>/wid=<N>-<runname>/images/<image>/
      metrics.jsonl  latents.npz  image.ntc (or .jpg)  reconstruction.png  record.json
"""

import hashlib
import logging
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import numpy as np
import tensorflow as tf

import configs
from common import (
  checkpoints,
  data,
  eval_lib,
  hyper,
  quantizers,
  rd,
  results,
  runs,
  schedules,
  writers,
)
from common.codec import BuildCodec, Latent, Latents, TrainableCodec
from common.job import Job

_LOG = logging.getLogger(__name__)


_RANGES = {
  "train_eval_config.num_steps": hyper.Range(int, 1),
  "train_eval_config.log_metrics_every_steps": hyper.Range(int, 1),
  "train_eval_config.seed": hyper.Range(int, 0),
  "data_config.batchsize": hyper.Range(int, 1),
  "itinf_config.learning_rate": hyper.Range(float, 0),
  "itinf_config.decay_after_steps": hyper.Range(int, 0),
  "itinf_config.temperature_rate": hyper.Range(float, 0),
  "itinf_config.temperature_start_step": hyper.Range(int, 0),
}

# The method of codecs that have a search of their own, see TrainableCodec.search_file.
SEARCH = "search"

# Of the method; None is its default.
_METHOD_OPTIONS = ("temperature_upper", "sigmoid_scale", "three_class_factor", "three_class_power")


def check(unit: hyper.WorkUnit, build: BuildCodec) -> None:
  """Raises for a work unit that cannot run: unknown method, data or run that is not there."""
  config = hyper.to_config(unit.config)
  hyper.check_numbers(config, _RANGES)
  positive = hyper.Range(float, 0, exclusive=True)
  hyper.check_numbers(config, {f"itinf_config.{k}": positive for k in _given_options(config)})
  if config.itinf_config.method != SEARCH:
    _make_quantizer(config)
    _temperature(config)
  data.resolve(config.data_config.dataset)
  if hyper.source_of(unit) is not None:  # It is still to be trained.
    return
  codec = build(_model_config(config, _trained_run(config)))
  own = type(codec).search_file is not TrainableCodec.search_file
  if config.itinf_config.method == SEARCH and not own:
    raise ValueError(
      f"itinf_config.method 'search' is for codecs that have a search of their own. "
      f"Known here: {', '.join(sorted(quantizers.FOR_ITERATIVE_INFERENCE))}."
    )


def _given_options(config: Any) -> dict[str, Any]:
  values = {key: config.itinf_config.get(key) for key in _METHOD_OPTIONS}
  return {key: value for key, value in values.items() if value is not None}


def _make_quantizer(config: Any) -> quantizers.MakeQuantizer:
  """The method's quantizer, with those of its parameters that the config gives.

  Raises:
    ValueError: No method of iterative inference, or a parameter that it does not have.
  """
  name = config.itinf_config.method
  if name not in quantizers.FOR_ITERATIVE_INFERENCE:
    raise ValueError(
      f"itinf_config.method {name!r} is no method of iterative inference. "
      f"Known: {', '.join(sorted(quantizers.FOR_ITERATIVE_INFERENCE))}."
    )
  given = _given_options(config)
  given.pop("temperature_upper", None)
  return quantizers.make_quantizer(name, **given)


def _temperature(config: Any) -> schedules.Schedule:
  """Of the method; a constant 1 where it has none.

  Raises:
    ValueError: An upper bound is given for a method without a temperature.
  """
  method = config.itinf_config
  upper = _given_options(config).get("temperature_upper")
  default = quantizers.FOR_ITERATIVE_INFERENCE[method.method]
  if default is None:
    if upper is not None:
      raise ValueError(
        f"itinf_config.method {method.method!r} has no temperature: leave "
        "itinf_config.temperature_upper at None."
      )
    return lambda step: 1.0
  return schedules.annealed_temperature(
    float(method.temperature_rate),
    int(method.temperature_start_step),
    default if upper is None else float(upper),
  )


def run(job: Job, build: BuildCodec) -> pathlib.Path:
  """Optimises every image of the data set; writes the results file and returns its path.

  Raises:
    job.Interrupted: Asked to stop; finished images are kept.
  """
  config = job.config
  trained = _trained_run(config)
  model_config = _model_config(config, trained)
  codec = build(model_config)
  ckpts, step = _pinned_checkpoint(job.run, trained)
  ckpts.restore(tf.train.Checkpoint(codec=codec), step)
  codec.prepare()
  images = data.load_eval_images(config.data_config.dataset)
  facts = eval_lib.run_facts(job.run)
  results.check_writable(
    results.result_path(configs.RESULTS_DIR, images.name, "itinf", facts, step)
  )
  searches = config.itinf_config.method == SEARCH
  rd_lambda = float(model_config.rd_lambda)
  optimizer = None if searches else LatentOptimizer(codec, config, rd_lambda)
  num_steps = int(config.train_eval_config.num_steps)
  progress = writers.Progress(len(images) * num_steps, run=job.run, label=job.label)
  done = 0
  records: dict[str, results.EvalRecord] = {}
  try:
    for names in _batches(images, job.run, int(config.data_config.batchsize), records):
      done = len(records) * num_steps
      batch = [images[i] for i in names]
      wanted = {name for name, _ in batch} - records.keys()

      def report(at: int, detail: str, done: int = done, count: int = len(wanted)) -> None:
        job.started()
        progress.update(done + at * count, detail)
        if job.stop_requested():
          job.interrupted(done)

      if optimizer is None:
        found = _search_batch(codec, rd_lambda, num_steps, batch, wanted, job.run, report)
      else:
        found = _optimise_batch(optimizer, batch, wanted, job.run, report)
      for record in found:
        records[record.image] = record
    progress.update(len(images) * num_steps)
  finally:
    progress.close()
  ordered = tuple(records[name] for name, _ in images)
  result = results.ResultFile(
    run={**facts, "trained_run": str(trained.path)},
    config={**job.unit.config, "model_config": hyper.plain(model_config)},
    overrides=job.unit.overrides,
    step=step,
    dataset={"name": images.name, "images": [r.image for r in ordered], "hash": images.hash},
    mode="itinf",
    records=ordered,
  )
  path = results.write(configs.RESULTS_DIR, result)
  _LOG.info("%s", eval_lib.summary(result))
  _LOG.info("Results: %s", path)
  job.done(step=len(images) * num_steps, num_steps=len(images) * num_steps, result=str(path))
  return path


def _pinned_checkpoint(
  run: runs.RunDir, trained: runs.RunDir
) -> tuple[checkpoints.Checkpoints, int]:
  """The trained run's newest checkpoint, at a restart the one that this run began with."""
  record = run.path / "trained_checkpoint.json"
  if record.is_file():
    step = int(runs.read_json(record)["step"])
    return checkpoints.Checkpoints(trained.checkpoints_dir), step
  ckpts, step = checkpoints.find(trained.path)
  runs.write_json(record, {"run": str(trained.path), "step": step})
  return ckpts, step


def _trained_run(config: Any) -> runs.RunDir:
  """The training run whose weights are used.

  Raises:
    ValueError: None is named; the message says how to name it.
    checkpoints.CheckpointError: It has no checkpoint.
  """
  options = config.train_eval_config
  if not options.warm_start_exp_dir:
    raise ValueError(
      "Name the experiment (or run) whose model is used: "
      "--config.train_eval_config.warm_start_exp_dir=train_xms/<xid> and, for an experiment, "
      "--config.train_eval_config.warm_start_wid=<N>."
    )
  found, _ = checkpoints.find(options.warm_start_exp_dir, options.warm_start_wid)
  return runs.RunDir.open(found.folder.parent)


def _model_config(config: Any, trained: runs.RunDir) -> Any:
  """The trained run's model_config, with the overrides that the config gives."""
  model = hyper.to_config(trained.read_work_unit().config)
  overrides = {
    f"model_config.{key}": value for key, value in config.model_config.items() if value is not None
  }
  hyper.set_values(model, overrides)
  return model.model_config


def _batches(
  images: data.EvalImages, run: runs.RunDir, batchsize: int, records: dict[str, results.EvalRecord]
) -> Iterator[list[int]]:
  """Indexes of images, those of one shape together; finished ones go to `records`.

  What goes together depends on the data set alone, so that after a restart every image sees the
  batch, and so ends at the bits, that it would have without. A batch is left out if all of it is
  finished.
  """
  by_shape: dict[tuple[int, ...], list[int]] = {}
  for i, (name, image) in enumerate(images):
    record_file = _folder(run, name) / "record.json"
    facts = runs.read_json(_folder(run, name) / "facts.json") if record_file.is_file() else {}
    if facts.get("image_sha256") == _sha256(image):
      records[name] = results.EvalRecord(**runs.read_json(record_file))
      _LOG.info("%s is finished already.", name)
    by_shape.setdefault(image.shape, []).append(i)
  for members in by_shape.values():
    for begin in range(0, len(members), batchsize):
      batch = members[begin : begin + batchsize]
      if any(images[i][0] not in records for i in batch):
        yield batch


def _folder(run: runs.RunDir, name: str) -> pathlib.Path:
  """A folder of its own for each image: names that had to be changed get a hash."""
  safe = hyper.safe_name(name)
  if safe != name:
    safe += "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
  return run.path / "images" / safe


def _sha256(image: np.ndarray) -> str:
  return hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()


class _State(NamedTuple):
  """What a step changes; each by latent name, [B, h, w, C] float32.

  Attributes:
    loc: The latents.
    first, second: Adam's moments.
  """

  loc: dict[str, tf.Tensor]
  first: dict[str, tf.Tensor]
  second: dict[str, tf.Tensor]


# (state, x [B, H, W, 3], step, learning rate, temperature) -> state, {"bpp": [B], "mse": [B]}.
_Step = Callable[..., tuple[_State, dict[str, tf.Tensor]]]


class LatentOptimizer:
  """The compiled step: one trace for each height and width, gradients for the latents alone.

  The batch size stays open, so that the last, smaller batch of a shape needs no trace of its own.
  (Filling it up with copies would need none either, but pays the copies' share in every step.)
  """

  def __init__(self, codec: TrainableCodec, config: Any, rd_lambda: float):
    self.codec = codec
    self.rd_lambda = rd_lambda
    options, method = config.train_eval_config, config.itinf_config
    self.num_steps = int(options.num_steps)
    self.log_every = int(options.log_metrics_every_steps)
    self._make_quantizer = _make_quantizer(config)
    self._seed = int(options.seed)
    self._learning_rate = float(method.learning_rate)
    self._decay_after = int(method.decay_after_steps)
    self._temperature = _temperature(config)
    self._steps: dict[Any, _Step] = {}

  def learning_rate(self, step: int) -> float:
    """Of a step."""
    return self._learning_rate * (0.1 if step >= self._decay_after else 1.0)

  def scheduled(self, step: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """What a compiled step takes beside state and images: step, learning rate, temperature."""
    return (
      tf.constant(step, tf.int32),
      tf.constant(self.learning_rate(step), tf.float32),
      tf.constant(self._temperature(step), tf.float32),
    )

  def prepare(self, x: tf.Tensor) -> tuple[_State, _Step]:
    """The state that begins at the encoder's latents of `x`, and the step for it."""
    loc = {k: v.loc for k, v in rd.infer(self.codec, x).items()}
    zeros = {k: tf.zeros_like(v) for k, v in loc.items()}
    state = _State(loc, zeros, zeros)
    key = tuple(x.shape[1:])
    if key not in self._steps:
      self._steps.clear()  # Batches come by shape: the one before is done with.
      self._steps[key] = self._compile(state, x)
    return state, self._steps[key]

  def _compile(self, state: _State, x: tf.Tensor) -> _Step:
    def step(state: _State, x, number, learning_rate, temperature):
      with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(state.loc)
        latents = {k: Latent(v) for k, v in state.loc.items()}
        quantizer = self._make_quantizer(
          seed=tf.stack([self._seed, number]), temperature=temperature, share_noise=True
        )
        terms = rd.rd_terms_of(self.codec, latents, x, self.rd_lambda, quantizer)
        # A sum over images, in bits of the picture: neither the batch nor the number of pixels
        # changes how large gradients are against Adam's epsilon.
        loss = tf.reduce_sum(terms.bpp + self.rd_lambda * terms.mse) * (x.shape[1] * x.shape[2])
      gradients = tape.gradient(loss, state.loc)
      return _adam(state, gradients, number, learning_rate), {"bpp": terms.bpp, "mse": terms.mse}

    signature = tf.nest.map_structure(
      lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), (state, x)
    )
    scalars = [tf.TensorSpec([], t) for t in (tf.int32, tf.float32, tf.float32)]
    return tf.function(step, autograph=False).get_concrete_function(*signature, *scalars)

  def costs(self, latents: Latents, x: tf.Tensor) -> dict[str, np.ndarray]:
    """Estimated bpp, mse and loss of rounded latents, each [B]."""
    rounding = quantizers.make_quantizer("round")()
    terms = rd.rd_terms_of(self.codec, latents, x, self.rd_lambda, rounding)
    bpp, mse = terms.bpp.numpy(), terms.mse.numpy()
    return {"bpp": bpp, "mse": mse, "loss": bpp + self.rd_lambda * mse}


def _adam(state: _State, gradients, step: tf.Tensor, learning_rate: tf.Tensor) -> _State:
  """A step of Adam (Kingma and Ba 2015) with its usual settings; `step` counts from 0."""
  beta1, beta2, epsilon = 0.9, 0.999, 1e-7
  t = tf.cast(step + 1, tf.float32)
  rate = learning_rate * tf.sqrt(1 - beta2**t) / (1 - beta1**t)
  moved = _State({}, {}, {})
  for name, gradient in gradients.items():
    first = beta1 * state.first[name] + (1 - beta1) * gradient
    second = beta2 * state.second[name] + (1 - beta2) * tf.square(gradient)
    moved.loc[name] = state.loc[name] - rate * first / (tf.sqrt(second) + epsilon)
    moved.first[name], moved.second[name] = first, second
  return moved


def _optimise_batch(
  optimizer: LatentOptimizer,
  batch: list[tuple[str, np.ndarray]],
  wanted: set[str],
  run: runs.RunDir,
  report,
) -> list[results.EvalRecord]:
  """Optimises images of one shape; writes a folder for each that is wanted, returns its record."""
  x = tf.concat([rd.to_batch(image) for _, image in batch], axis=0)
  state, step = optimizer.prepare(x)
  initial = {k: Latent(v) for k, v in state.loc.items()}
  before = optimizer.costs(initial, x)
  history: list[dict[str, Any]] = []
  began = time.perf_counter()
  for number in range(optimizer.num_steps):
    number_, learning_rate, temperature = optimizer.scheduled(number)
    state, terms = step(state, x, number_, learning_rate, temperature)
    if number % optimizer.log_every == 0 or number + 1 == optimizer.num_steps:
      values = {k: v.numpy() for k, v in terms.items()}
      history.append({"step": number, "temperature": float(temperature), **values})
      loss = float(np.mean(values["bpp"] + optimizer.rd_lambda * values["mse"]))
      if not math.isfinite(loss):
        raise RuntimeError(
          f"Step {number} of {', '.join(n for n, _ in batch)} is not finite: try a lower "
          "itinf_config.learning_rate."
        )
      report(number + 1, f"loss {loss:.4f}")
    else:
      report(number + 1, "")
  seconds = (time.perf_counter() - began) / len(batch)
  latents = _better(optimizer, initial, before, state.loc, x)
  after = optimizer.costs(latents, x)
  return [
    _finish(
      optimizer,
      name,
      image,
      {k: Latent(v.loc[i : i + 1]) for k, v in latents.items()},
      {f"{k}_before": float(before[k][i]) for k in before}
      | {f"{k}_after": float(after[k][i]) for k in after}
      | {"seconds": seconds, "image_sha256": _sha256(image)},
      [
        {k: (float(v[i]) if isinstance(v, np.ndarray) else v) for k, v in h.items()}
        for h in history
      ],
      run,
    )
    for i, (name, image) in enumerate(batch)
    if name in wanted
  ]


def _better(
  optimizer: LatentOptimizer,
  initial: Latents,
  before: dict[str, np.ndarray],
  loc: dict[str, tf.Tensor],
  x: tf.Tensor,
) -> Latents:
  """Each image's optimised latents, or the encoder's where rounding left those no better."""
  optimised = {k: Latent(v) for k, v in loc.items()}
  better = optimizer.costs(optimised, x)["loss"] < before["loss"]
  return {
    k: Latent(tf.where(better[:, None, None, None], v.loc, initial[k].loc))
    for k, v in optimised.items()
  }


def _finish(
  optimizer: LatentOptimizer,
  name: str,
  image: np.ndarray,
  latents: Latents,
  facts: dict[str, Any],
  history: list[dict[str, Any]],
  run: runs.RunDir,
) -> results.EvalRecord:
  """Codes the rounded latents, decodes the file, measures, and writes the image's folder."""
  data_bytes = optimizer.codec.pack(latents, (image.shape[0], image.shape[1]))
  folder = _folder(run, name)
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".latents.npz.tmp").open("wb") as f:
    np.savez_compressed(f, **{k: v.loc.numpy() for k, v in latents.items()})
  (folder / ".latents.npz.tmp").replace(folder / "latents.npz")
  return _write(optimizer.codec, name, image, data_bytes, facts, history, run)


def _search_batch(
  codec: TrainableCodec,
  rd_lambda: float,
  num_steps: int,
  batch: list[tuple[str, np.ndarray]],
  wanted: set[str],
  run: runs.RunDir,
  report,
) -> list[results.EvalRecord]:
  """As `_optimise_batch`, by the codec's own search; an image keeps its usual file if that costs
  less."""
  records: list[results.EvalRecord] = []
  for name, image in batch:
    if name not in wanted:
      continue
    history: list[dict[str, Any]] = []

    def progress(share: float, text: str, history: list[dict[str, Any]] = history) -> None:
      history.append({"share": share, "detail": text})
      report(round(num_steps * (len(records) + share) / len(wanted)), text)

    began = time.perf_counter()
    files = [codec.compress(image), codec.search_file(image, progress)]
    seconds = time.perf_counter() - began
    costs = []
    for data_bytes in files:
      assert data_bytes is not None  # `check` has seen to it.
      error = np.square(codec.decompress(data_bytes).astype(np.float64) - image)
      bpp = 8 * len(data_bytes) / (image.shape[0] * image.shape[1])
      costs.append(bpp + rd_lambda * float(np.mean(error)))
    best = int(np.argmin(costs))
    facts = {
      "loss_before": costs[0],
      "loss_after": costs[best],
      "bpp_after": None,
      "seconds": seconds,
      "image_sha256": _sha256(image),
    }
    chosen = files[best]
    assert chosen is not None
    records.append(_write(codec, name, image, chosen, facts, history, run))
  return records


def _write(
  codec: TrainableCodec,
  name: str,
  image: np.ndarray,
  data_bytes: bytes,
  facts: dict[str, Any],
  history: list[dict[str, Any]],
  run: runs.RunDir,
) -> results.EvalRecord:
  """Decodes a file, measures, and writes the image's folder."""
  from PIL import Image

  folder = _folder(run, name)
  folder.mkdir(parents=True, exist_ok=True)
  record, decoded = eval_lib.record(codec, name, image, "itinf", data_bytes)
  record = results.EvalRecord(
    **{
      **results.as_dict(record),
      "bpp_estimated": facts["bpp_after"],
      "seconds_encode": facts["seconds"],
    }
  )
  lines = "".join(runs.json_line(h) for h in history)
  runs.atomic_write(folder / "metrics.jsonl", lines)
  runs.atomic_write(folder / f"image{codec.file_suffix}", data_bytes)
  Image.fromarray(decoded).save(folder / "reconstruction.png")
  runs.write_json(folder / "facts.json", facts)
  runs.write_json(folder / "record.json", results.as_dict(record))  # Last: the end mark.
  _LOG.info(
    "%s: loss %.4f -> %.4f (%.1f%%), %.4f bpp in the file, %.2f dB",
    name,
    facts["loss_before"],
    facts["loss_after"],
    100 * (facts["loss_after"] / facts["loss_before"] - 1),
    record.bpp,
    record.psnr_db if record.psnr_db is not None else math.inf,
  )
  return record
