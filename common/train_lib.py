"""The training loop of every family.

Order of a start: own checkpoint, else warm start, else initial values fitted to data. What a step
does is a function of (seed, step) alone, so a run that was killed ends with the same weights as an
unbroken one.
"""

import logging
import math
import time
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from common import checkpoints as checkpoints_lib
from common import data, hyper, quantizers, rd, runs, schedules, writers
from common.codec import BuildCodec, TrainableCodec
from common.job import Job

_LOG = logging.getLogger(__name__)


class DivergedError(RuntimeError):
  """The loss is not finite; the last checkpoint is good."""


class TrainState:
  """What is checkpointed: the codec, its optimizers, the step."""

  def __init__(self, codec: TrainableCodec):
    """Makes the optimizers' variables too, so that a restore can be strict."""
    prior = {id(v) for v in codec.prior_variables}
    self.codec = codec
    self.groups = [
      [v for v in codec.trainable_variables if id(v) not in prior],
      [v for v in codec.trainable_variables if id(v) in prior],
    ]
    self.optimizers = [tf.keras.optimizers.Adam(jit_compile=False) for _ in self.groups]
    for optimizer, variables in zip(self.optimizers, self.groups):
      optimizer.build(variables)
    self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")

  def checkpoint(self) -> tf.train.Checkpoint:
    """The whole state."""
    return tf.train.Checkpoint(codec=self.codec, optimizers=self.optimizers, step=self.step)


def weights_only(codec: TrainableCodec) -> tf.train.Checkpoint:
  """The codec's part of a training checkpoint, for evaluation and warm starts."""
  return tf.train.Checkpoint(codec=codec)


def make_train_step(state: TrainState, config: Any):
  """The compiled step: (crops uint8 [B, P, P, 3], step int32, lr, lambda) -> scalars by name."""
  make_quantizer = quantizers.make_quantizer(config.model_config.quantizer)
  seed = int(config.train_eval_config.seed)
  clip_norm = float(config.optimizer_config.gradient_clip_norm)
  factors = [1.0, float(config.optimizer_config.prior_learning_rate_factor)]

  @tf.function
  def train_step(crops, step, learning_rate, rd_lambda):
    x = tf.cast(crops, tf.float32)
    with tf.GradientTape() as tape:
      quantizer = make_quantizer(seed=tf.stack([seed, step]))
      terms = rd.rd_terms(state.codec, x, rd_lambda, quantizer)
    flat = [v for group in state.groups for v in group]
    gradients, norm = tf.clip_by_global_norm(tape.gradient(terms.loss, flat), clip_norm)
    begin = 0
    for optimizer, variables, factor in zip(state.optimizers, state.groups, factors):
      optimizer.learning_rate.assign(learning_rate * factor)
      optimizer.apply_gradients(zip(gradients[begin : begin + len(variables)], variables))
      begin += len(variables)
    return {
      "loss": terms.loss,
      "bpp": tf.reduce_mean(terms.bpp),
      "mse": tf.reduce_mean(terms.mse),
      "gradient_norm": norm,
    }

  return train_step


def check(unit: hyper.WorkUnit, build: BuildCodec) -> None:
  """Raises for a work unit that cannot be trained: unknown names, data that are not there, sizes.

  Raises:
    ValueError, TypeError, RuntimeError: The message lists what is known.
  """
  config = hyper.to_config(unit.config)
  options = config.train_eval_config
  for key in (
    "num_steps", "log_metrics_every_steps", "checkpoint_every_steps", "eval_every_steps",
    "max_ckpts_to_keep",
  ):  # fmt: skip
    if options[key] < 1:
      raise ValueError(f"train_eval_config.{key} is {options[key]}; it must be 1 or more.")
  if not config.model_config.rd_lambda > 0:
    raise ValueError(f"model_config.rd_lambda is {config.model_config.rd_lambda}; it must be > 0.")
  for settings in (dict(config.train_data_config), _validation_data(config)):
    if settings is not None:
      data.DataConfig.of(settings)
      data.resolve(settings["dataset"])
  schedules.learning_rate(config.optimizer_config, int(options.num_steps))
  build(config.model_config)
  if options.warm_start:
    checkpoints_lib.find(options.warm_start, _warm_start_wid(config, unit.wid))


def train(job: Job, build: BuildCodec) -> dict[str, float]:
  """Trains (or goes on training) one run to its end; returns the last metrics.

  Raises:
    job.Interrupted: Asked to stop; the state is saved.
    DivergedError: The loss is NaN or infinite.
    OSError: A checkpoint could not be written.
  """
  config, options, run = job.config, job.config.train_eval_config, job.run
  tf.keras.utils.set_random_seed(int(options.seed))
  state = TrainState(build(config.model_config))
  ckpts = checkpoints_lib.Checkpoints(run.checkpoints_dir, int(options.max_ckpts_to_keep))
  start = _restore_or_warm_start(state, ckpts, job)
  num_steps = int(options.num_steps)
  seed = int(options.seed)
  dataset = data.make_train_dataset(
    config.train_data_config, seed, start_step=start, num_steps=num_steps - start
  )
  validation = _Validation(state.codec, config)
  if start == 0 and not options.warm_start:
    for crops in dataset.take(1):
      state.codec.calibrate(tf.cast(crops, tf.float32))
  learning_rate = schedules.learning_rate(config.optimizer_config, num_steps)
  model = config.model_config
  rd_lambda = schedules.rd_lambda(
    float(model.rd_lambda),
    int(model.rd_lambda_warmup_steps),
    float(model.rd_lambda_warmup_factor),
    float(model.rd_lambda_warmup_below),
  )
  train_step = make_train_step(state, config)
  writer = writers.MetricsWriter(run)
  progress = writers.Progress(num_steps, start, run=run, label=job.label)
  # On a GPU the host must not wait for each step; the steps are then checked when they are logged.
  check_every = (
    int(options.log_metrics_every_steps) if tf.config.list_physical_devices("GPU") else 1
  )
  pending: list[tuple[int, dict[str, tf.Tensor]]] = []
  metrics: dict[str, float] = dict(ckpts.facts(start)) if start else {}
  saved = start

  def save(step: int) -> None:
    nonlocal saved
    if step != saved:
      state.step.assign(step)
      ckpts.save(state.checkpoint(), step, facts={k: metrics[k] for k in sorted(metrics)})
      saved = step

  try:
    clock, clock_step = time.monotonic(), start
    for step, crops in enumerate(dataset, start=start):
      at = {"learning_rate": learning_rate(step), "rd_lambda": rd_lambda(step)}
      scalars = train_step(
        crops,
        np.int32(step),
        np.float32(at["learning_rate"]),
        np.float32(at["rd_lambda"]),
      )
      pending.append((step, scalars))
      done = step + 1
      if step == start:
        _LOG.info("First step done %.1f s after the start of the program.", job.seconds())
      logs = done % int(options.log_metrics_every_steps) == 0 or done == num_steps
      evaluates = done % int(options.eval_every_steps) == 0 or done == num_steps
      saves = evaluates or done % int(options.checkpoint_every_steps) == 0
      stops = job.stop_requested()
      if done % check_every == 0 or logs or saves or stops:
        metrics = _checked(pending)
        pending.clear()
      progress.update(done, f"loss {metrics['loss']:.4f}" if metrics else "")
      if logs:
        now = time.monotonic()
        rate = (done - clock_step) / max(now - clock, 1e-9)
        clock, clock_step = now, done
        writer.scalars(
          done, {**metrics, **at, "psnr_db": _psnr_db(metrics["mse"]), "steps_per_second": rate}
        )
      if saves or stops:
        save(done)
      if evaluates and (values := validation.run(done, writer)):
        best = ckpts.best()
        if options.keep_best and (best is None or values["loss"] < best["loss"]):
          ckpts.mark_best(done, values["loss"])
        _LOG.info("Step %d validation: %s", done, _text(values))
        clock, clock_step = time.monotonic(), done
      if stops and done < num_steps:
        job.interrupted(done)
    if start >= num_steps:
      _LOG.info("All %d steps were done already.", num_steps)
  finally:
    progress.close()
    writer.close()
  job.done(step=num_steps, num_steps=num_steps, detail=_text(metrics))
  return metrics


def _restore_or_warm_start(state: TrainState, ckpts: checkpoints_lib.Checkpoints, job: Job) -> int:
  options = job.config.train_eval_config
  own = ckpts.latest()
  if own is not None:
    ckpts.restore(state.checkpoint(), own)
    _LOG.info("Resumed at step %d from %s.", own, ckpts.path(own))
    return own
  if options.warm_start:
    found, step = checkpoints_lib.find(
      options.warm_start, _warm_start_wid(job.config, job.unit.wid)
    )
    found.restore(weights_only(state.codec), step)
    _LOG.info("Warm start from %s.", found.path(step))
  return 0


def _warm_start_wid(config: Any, own: int) -> int:
  given = config.train_eval_config.warm_start_wid
  return own if given is None else int(given)


def _checked(pending: list[tuple[int, dict[str, tf.Tensor]]]) -> dict[str, float]:
  """The newest step's scalars; raises if any step since the last check was not finite."""
  values: dict[str, float] = {}
  for step, scalars in pending:
    values = {k: float(v) for k, v in scalars.items()}
    if not all(math.isfinite(v) for v in values.values()):
      raise DivergedError(
        f"Step {step} is not finite: {_text(values)}. The last checkpoint is from before it. "
        "Try a lower optimizer_config.learning_rate or gradient_clip_norm, and look at the data."
      )
  return values


def _validation_data(config: Any) -> Optional[dict[str, Any]]:
  """The pipeline settings of the validation crops, or None where the config asks for none.

  They come from `val_data_config.dataset`, or from what `train_data_config.val_split` holds back.
  """
  settings = dict(config.val_data_config)
  if settings["dataset"] is not None:
    return settings
  train_data = config.train_data_config
  if train_data.val_split is None:
    return None
  return {
    **settings,
    "dataset": train_data.dataset,
    "val_split": train_data.val_split,
    "max_images": train_data.max_images,
  }


class _Validation:
  """Mean rounded rate and distortion over fixed crops; nothing where no data are configured."""

  def __init__(self, codec: TrainableCodec, config: Any):
    self._codec, self._config = codec, config
    self._count = 0
    settings = _validation_data(config)
    self._dataset: Optional[tf.data.Dataset] = (
      None if settings is None else data.make_val_dataset(settings)
    )
    rounding = quantizers.make_quantizer("round")()

    @tf.function
    def terms(crops):
      return rd.rd_terms(
        codec, tf.cast(crops, tf.float32), float(config.model_config.rd_lambda), rounding
      )

    self._terms = terms

  def run(self, step: int, writer: writers.MetricsWriter) -> dict[str, float]:
    if self._dataset is None:
      return {}
    options = self._config.train_eval_config
    self._codec.prepare()
    bpp: list[float] = []
    mse: list[float] = []
    pictures: Optional[tuple[np.ndarray, np.ndarray]] = None
    for crops in self._dataset:
      terms = self._terms(crops)
      bpp += terms.bpp.numpy().tolist()
      mse += terms.mse.numpy().tolist()
      if pictures is None:
        n = int(options.num_images_to_log)
        decoded = np.stack([rd.to_image(x) for x in terms.x_hat.numpy()[:n]]) if n else crops[:0]
        pictures = (crops.numpy()[:n], np.asarray(decoded))
    values = {
      "loss": float(np.mean(bpp) + self._config.model_config.rd_lambda * np.mean(mse)),
      "bpp": float(np.mean(bpp)),
      "mse": float(np.mean(mse)),
      "psnr_db": float(np.mean([_psnr_db(m) for m in mse])),
    }
    writer.scalars(step, values, split="val")
    every = int(options.log_images_every_evals)
    if pictures is not None and len(pictures[0]) and every and self._count % every == 0:
      writer.image_pairs(step, *pictures)
    writer.flush()
    self._count += 1
    return values


def _psnr_db(mse: float) -> float:
  return 10 * math.log10(255.0**2 / max(mse, 1e-10))


def _text(values: dict[str, float]) -> str:
  return ", ".join(f"{k} {v:.4f}" for k, v in values.items())


def describe(run: runs.RunDir) -> str:
  """One line about where a run's things are."""
  return f"{run.path} (metrics.jsonl, tensorboard/, images/, checkpoints/)"
