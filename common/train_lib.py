"""The training loop of every family.

Order of a start: own checkpoint, else warm start, else initial values fitted to data. What a step
does is a function of (seed, step) alone, so a run that was killed ends with the same weights as an
unbroken one.
"""

import contextlib
import logging
import math
import pathlib
import re
import time
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf

from common import checkpoints as checkpoints_lib
from common import data, hyper, metrics, quantizers, rd, runs, schedules, writers
from common import distribution as distribution_lib
from common.codec import BuildCodec, TrainableCodec
from common.distribution import Distribution
from common.job import Job

_LOG = logging.getLogger(__name__)


_RANGES = {
  **{
    f"train_eval_config.{key}": hyper.Range(int, 1)
    for key in (
      "num_steps", "log_metrics_every_steps", "checkpoint_every_steps", "eval_every_steps",
      "max_ckpts_to_keep",
    )
  },
  **{
    f"train_eval_config.{key}": hyper.Range(int, 0)
    for key in ("seed", "log_images_every_evals", "num_images_to_log")
  },
  "train_data_config.cache_mb": hyper.Range(int, 0),
  "optimizer_config.learning_rate": hyper.Range(float, 0),
  "optimizer_config.prior_learning_rate_factor": hyper.Range(float, 0),
  "optimizer_config.warmup_steps": hyper.Range(int, 0),
  "optimizer_config.decay_after_steps": hyper.Range(int, 0),
  "optimizer_config.decay_factor": hyper.Range(float, 0),
  "optimizer_config.gradient_clip_norm": hyper.Range(float, 0, exclusive=True),
  "model_config.rd_lambda": hyper.Range(float, 0, exclusive=True),
  "model_config.rd_lambda_warmup_steps": hyper.Range(int, 0),
  "model_config.rd_lambda_warmup_factor": hyper.Range(float, 0, exclusive=True),
  "model_config.rd_lambda_warmup_below": hyper.Range(float, 0),
}  # fmt: skip


# A checkpoint that the chief sees must be seen by the other workers after so many seconds.
_CHECKPOINT_SECONDS = 120.0


class DivergedError(RuntimeError):
  """The loss is not finite; the last checkpoint is good."""


class WorkerError(RuntimeError):
  """Another process that trains the same run ended too early."""


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


def make_train_step(state: TrainState, config: Any, distribution: Optional[Distribution] = None):
  """The compiled step: (crops uint8 [B, P, P, 3], step int32, lr, lambda) -> scalars by name.

  Of several workers each gives its own rows of the batch, and gets what all get.
  """
  distribution = distribution or Distribution()
  make_quantizer = quantizers.make_quantizer(config.model_config.quantizer)
  seed = int(config.train_eval_config.seed)
  clip_norm = float(config.optimizer_config.gradient_clip_norm)
  factors = [1.0, float(config.optimizer_config.prior_learning_rate_factor)]

  def replica_step(crops, step, rd_lambda):
    crops, rows = distribution.share(crops)
    x = tf.cast(crops, tf.float32)
    with tf.GradientTape() as tape:
      drawn = tf.stack([seed, step])
      quantizer = make_quantizer(seed=drawn, rows=rows)
      terms = state.codec.objective(x, rd_lambda, quantizer, seed=drawn)
    flat = [v for group in state.groups for v in group]
    gradients = distribution.mean(tape.gradient(terms.loss, flat))
    gradients, norm = tf.clip_by_global_norm(gradients, clip_norm)
    begin = 0
    for optimizer, variables in zip(state.optimizers, state.groups):
      optimizer.apply_gradients(
        zip(gradients[begin : begin + len(variables)], variables),
        skip_gradients_aggregation=True,  # `mean` did that, before the norm was taken.
      )
      begin += len(variables)
    scalars = {
      "loss": terms.loss,
      "bpp": tf.reduce_mean(terms.bpp),
      "mse": tf.reduce_mean(terms.mse),
      **(terms.parts or {}),
    }
    means = distribution.mean(list(scalars.values()))
    return {**dict(zip(scalars, means)), "gradient_norm": norm}

  @tf.function
  def train_step(crops, step, learning_rate, rd_lambda):
    for optimizer, factor in zip(state.optimizers, factors):
      optimizer.learning_rate.assign(learning_rate * factor)
    return distribution.run(replica_step, crops, step, rd_lambda)

  return train_step


def check(unit: hyper.WorkUnit, build: BuildCodec) -> None:
  """Raises for a work unit that cannot be trained: unknown names, missing data, wrong sizes.

  A warm start is tried here already, before the run has a directory; from a run of the same sweep
  when that one is done.

  Raises:
    ValueError, TypeError, RuntimeError: The message lists what is known.
  """
  config = hyper.to_config(unit.config)
  options = config.train_eval_config
  hyper.check_numbers(config, _RANGES)
  distribution_lib.check(config)
  name = config.model_config.quantizer
  if name not in quantizers.FOR_TRAINING:
    raise ValueError(
      f"model_config.quantizer {name!r} does not train. "
      f"Known: {', '.join(quantizers.FOR_TRAINING)}."
    )
  _train_sampler(config)
  settings = _validation_data(config)
  if settings is not None:
    data.CropSampler(settings, 0, "val")
  schedules.learning_rate(config.optimizer_config, int(options.num_steps))
  codec = build(config.model_config)
  if options.warm_start and hyper.source_of(unit) is None:
    _warm_start(codec, unit, config)


def train(job: Job, build: BuildCodec) -> dict[str, float]:
  """Trains (or goes on training) one run to its end; returns the last metrics.

  Raises:
    job.Interrupted: Asked to stop; the state is saved.
    DivergedError: The loss is NaN or infinite.
    WorkerError: Another worker is gone.
    data.DataError: No picture is left that can be read.
    OSError: A checkpoint could not be written.
  """
  distribution = job.distribution or Distribution()
  try:
    with distribution.strategy.scope():
      return _Training(job, build).run()
  except tf.errors.UnavailableError as e:
    if distribution.num_workers == 1:
      raise
    raise WorkerError(
      "Another worker of this run is gone, see the log. A rerun goes on from the last checkpoint."
    ) from e
  except tf.errors.OpError as e:  # What the pipeline raises arrives wrapped in TensorFlow's error.
    found = re.search(r"DataError: (.*)", e.message)
    if found is None:
      raise
    raise data.DataError(found.group(1)) from None


class _Training:
  """One run's training, from its last checkpoint to its end."""

  def __init__(self, job: Job, build: BuildCodec):
    config = job.config
    self._job, self._options = job, config.train_eval_config
    self._distribution = job.distribution or Distribution()
    self._num_steps = int(self._options.num_steps)
    tf.keras.utils.set_random_seed(int(self._options.seed))
    self._state = TrainState(build(config.model_config))
    averages = [
      v for v in self._state.codec.variables
      if v.synchronization == tf.VariableSynchronization.ON_READ
    ]  # fmt: skip
    if averages and self._distribution.num_workers > 1:  # To save one takes all workers.
      raise ValueError(
        "This model keeps moving averages (batch normalisation), which train_eval_config.strategy="
        "multi_worker does not serve: use mirrored."
      )
    max_to_keep = int(self._options.max_ckpts_to_keep)
    self._ckpts = checkpoints_lib.Checkpoints(job.run.checkpoints_dir, max_to_keep)
    self._start = self._saved = self._restore_or_warm_start()
    self._metrics: dict[str, float] = self._ckpts.facts(self._start) if self._start else {}
    sampler = _train_sampler(config)
    if self._start == 0 and not self._options.warm_start:
      crops = [sampler.batch(0)]
      while len(crops) * len(crops[0]) < self._state.codec.calibration_images:
        crops.append(sampler.batch(len(crops)))
      self._state.codec.calibrate(tf.constant(np.concatenate(crops), tf.float32))
    self._batches = data.to_tf_dataset(
      sampler,
      self._start,
      self._num_steps - self._start,
      rows=self._distribution.worker_rows(sampler.config.batchsize),
    )
    self._validation = _Validation(self._state.codec, config)
    self._learning_rate = schedules.learning_rate(config.optimizer_config, self._num_steps)
    model = config.model_config
    self._rd_lambda = schedules.rd_lambda(
      float(model.rd_lambda),
      int(model.rd_lambda_warmup_steps),
      float(model.rd_lambda_warmup_factor),
      float(model.rd_lambda_warmup_below),
    )
    self._step = make_train_step(self._state, config, self._distribution)
    self._is_chief = self._distribution.is_chief
    self._writer: Union[writers.MetricsWriter, writers.Silent] = (
      writers.MetricsWriter(job.run) if self._is_chief else writers.Silent()
    )

  def run(self) -> dict[str, float]:
    """The loop; returns the last step's metrics."""
    progress: Union[writers.Progress, writers.Silent] = writers.Silent()
    if self._is_chief:
      progress = writers.Progress(
        self._num_steps, self._start, run=self._job.run, label=self._job.label
      )
    try:
      self._catch_up()
      self._loop(progress)
    finally:
      progress.close()
      self._writer.close()
    if self._is_chief:
      self._job.done(step=self._num_steps, num_steps=self._num_steps, detail=_text(self._metrics))
    with contextlib.suppress(tf.errors.OpError):  # All is written, whoever is gone by now.
      self._distribution.sum_over_workers(0)
    return self._metrics

  def _restore_or_warm_start(self) -> int:
    own = self._ckpts.latest()
    step = self._distribution.value_of_chief(-1 if own is None else own)
    if step >= 0:
      if own != step:
        self._wait_for_checkpoint(step)
      self._ckpts.restore(self._state.checkpoint(), step)
      _LOG.info("Resumed at step %d from %s.", step, self._ckpts.path(step))
      return step
    if self._options.warm_start:
      source = _warm_start(self._state.codec, self._job.unit, self._job.config)
      _LOG.info("Warm start from %s.", source)
    return 0

  def _wait_for_checkpoint(self, step: int) -> None:
    """A network file system may show a file later here than where the chief is."""
    deadline = time.monotonic() + _CHECKPOINT_SECONDS
    while self._ckpts.verify(step) is not None and time.monotonic() < deadline:
      time.sleep(1.0)

  def _loop(self, progress: Union[writers.Progress, writers.Silent]) -> None:
    options = self._options
    # On a GPU the host must not wait for each step; steps are then checked when they are logged.
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    check_every = int(options.log_metrics_every_steps) if has_gpu else 1
    ask_every = 10 if has_gpu else 1
    pending: list[tuple[int, dict[str, tf.Tensor]]] = []
    clock, clock_step = time.monotonic(), self._start
    for step, crops in enumerate(self._batches, start=self._start):
      done = step + 1
      at = {"learning_rate": self._learning_rate(step), "rd_lambda": self._rd_lambda(step)}
      pending.append((step, self._step(crops, np.int32(step), *map(np.float32, at.values()))))
      if step == self._start:
        _LOG.info("First step done %.1f s after the start of the program.", self._job.seconds())
      logs = self._is_due(done, options.log_metrics_every_steps)
      evaluates = self._is_due(done, options.eval_every_steps)
      saves = evaluates or done % int(options.checkpoint_every_steps) == 0
      stops = self._job.stop_requested()
      if self._distribution.num_workers > 1:  # All must stop after the same step.
        stops = done % ask_every == 0 and self._distribution.sum_over_workers(int(stops)) > 0
      if done % check_every == 0 or logs or saves or stops:
        self._metrics = _checked(pending)
        pending.clear()
      progress.update(done, f"loss {self._metrics['loss']:.4f}" if self._metrics else "")
      if logs:
        rate = (done - clock_step) / max(time.monotonic() - clock, 1e-9)
        clock, clock_step = time.monotonic(), done
        psnr_db = metrics.psnr_of_mse(max(self._metrics["mse"], 1e-10))
        facts = {"psnr_db": psnr_db, "steps_per_second": rate}
        self._writer.scalars(done, {**self._metrics, **at, **facts})
      if saves or stops:
        self._save(done)
      if evaluates:
        self._validate(done)
        clock, clock_step = time.monotonic(), done
      if stops and done < self._num_steps:
        self._distribution.sum_over_workers(0)  # The chief has saved.
        self._job.interrupted(done)

  def _is_due(self, step: int, every: int) -> bool:
    return step % int(every) == 0 or step == self._num_steps

  def _catch_up(self) -> None:
    """A kill between a checkpoint, its validation and the mark of the best must lose none."""
    start = self._start
    if self._is_chief and start and self._is_due(start, self._options.eval_every_steps):
      records = runs.read_jsonl(self._job.run.metrics_file)
      found = [r for r in records if r.get("split") == "val" and r.get("step") == start]
      if found:
        self._mark_if_best(start, found[-1]["loss"])
      else:
        self._validate(start)

  def _save(self, step: int) -> None:
    if step != self._saved and self._is_chief:
      self._state.step.assign(step)
      self._ckpts.save(self._state.checkpoint(), step, facts=dict(sorted(self._metrics.items())))
      self._saved = step

  def _validate(self, step: int) -> None:
    if not self._is_chief:
      return
    values = self._validation.run(step, self._writer)
    if not values:
      return
    self._mark_if_best(step, values["loss"])
    _LOG.info("Step %d validation: %s", step, _text(values))

  def _mark_if_best(self, step: int, loss: float) -> None:
    best = self._ckpts.best()
    if self._options.keep_best and (best is None or loss < best["loss"]):
      self._ckpts.mark_best(step, loss)


def _warm_start(codec: TrainableCodec, unit: hyper.WorkUnit, config: Any) -> pathlib.Path:
  """Gives the codec the weights that `warm_start` names; returns their checkpoint's folder.

  Raises:
    checkpoints.CheckpointError: There are none, or they are another model's.
  """
  given = config.train_eval_config.warm_start_wid
  found, step = checkpoints_lib.find(
    config.train_eval_config.warm_start, unit.wid if given is None else int(given)
  )
  try:
    found.restore(weights_only(codec), step)
  except checkpoints_lib.MisfitError as e:
    record = runs.RunDir(found.folder.parent).work_unit_file
    raise checkpoints_lib.MisfitError(
      f"train_eval_config.warm_start: {e} Start with a config whose model_config is that of the "
      f"run (recorded in {record}), or name a run of this model."
    ) from None
  return found.path(step)


def _train_sampler(config: Any) -> data.CropSampler:
  return data.CropSampler(config.train_data_config, int(config.train_eval_config.seed), "train")


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
    "val_split_seed": train_data.get("val_split_seed", 0),
    "max_images": train_data.max_images,  # Before the split, as in training.
  }


class _Validation:
  """Mean rate and distortion over fixed crops; nothing where no data are configured."""

  def __init__(self, codec: TrainableCodec, config: Any):
    self._codec, self._config = codec, config
    self._count = 0
    settings = _validation_data(config)
    self._dataset: Optional[tf.data.Dataset] = None
    if settings is not None:
      self._dataset = data.make_val_dataset(settings)
      if config.val_data_config.max_images is not None:
        batches = -(-config.val_data_config.max_images // config.val_data_config.batchsize)
        self._dataset = self._dataset.take(batches)
    name = quantizers.for_validation(config.model_config.quantizer)
    quantizer = quantizers.make_quantizer(name)(seed=(0, 0))

    @tf.function
    def terms(crops):
      rd_lambda = float(config.model_config.rd_lambda)
      return codec.objective(tf.cast(crops, tf.float32), rd_lambda, quantizer)

    self._terms = terms

  def run(
    self, step: int, writer: Union[writers.MetricsWriter, writers.Silent]
  ) -> dict[str, float]:
    if self._dataset is None:
      return {}
    options = self._config.train_eval_config
    self._codec.prepare()
    bpp: list[float] = []
    mse: list[float] = []
    losses: list[float] = []  # One a crop, as the others.
    pictures: Optional[tuple[np.ndarray, np.ndarray]] = None
    for crops in self._dataset:
      terms = self._terms(crops)
      bpp += terms.bpp.numpy().tolist()
      mse += terms.mse.numpy().tolist()
      losses += [float(terms.loss)] * len(crops)
      if pictures is None:
        n = int(options.num_images_to_log)
        decoded = np.stack([rd.to_image(x) for x in terms.x_hat.numpy()[:n]]) if n else crops[:0]
        pictures = (crops.numpy()[:n], np.asarray(decoded))
    values = {
      "loss": float(np.mean(losses)),
      "bpp": float(np.mean(bpp)),
      "mse": float(np.mean(mse)),
      "psnr_db": float(np.mean([metrics.psnr_of_mse(max(m, 1e-10)) for m in mse])),
    }
    writer.scalars(step, values, split="val")
    every = int(options.log_images_every_evals)
    if pictures is not None and len(pictures[0]) and every and self._count % every == 0:
      writer.image_pairs(step, *pictures)
    writer.flush()
    self._count += 1
    return values


def _text(values: dict[str, float]) -> str:
  return ", ".join(f"{k} {v:.4f}" for k, v in values.items())
