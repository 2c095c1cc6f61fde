"""The training loop of every family.

Order of a start: own checkpoint, else warm start, else initial values fitted to data. What a step
does is a function of (seed, step) alone, so a run that was killed ends with the same weights as an
unbroken one.
"""

import contextlib
import logging
import math
import re
import time
from collections.abc import Iterator
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf

from common import checkpoints as checkpoints_lib
from common import (
  data,
  hyper,
  layers,
  metrics,
  numerics,
  optimizers,
  precision,
  quantizers,
  rescale,
  runs,
  schedules,
  train_options,
  validation,
  writers,
)
from common import distribution as distribution_lib
from common.averages import Averages
from common.codec import BuildCodec, TrainableCodec
from common.distribution import Distribution
from common.early_stopping import EarlyStopping, Stopped
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


_OVERFLOW = "overflow"  # 1 for a step of float16 that was left out, see `common.precision`.

# A checkpoint that the chief sees must be seen by the other workers after so many seconds.
_CHECKPOINT_SECONDS = 120.0


class DivergedError(RuntimeError):
  """The loss is not finite; the last checkpoint is good."""


class WorkerError(RuntimeError):
  """Another process that trains the same run ended too early."""


class TrainState:
  """What is checkpointed: the codec, its optimizers, the step; with options, what they need.

  Attributes:
    averages: Of the trained weights, or None.
    loss_scale: Of a training in float16, or None.
    rate_factors: float32 [number of trained variables], of their learning rates, or None.
  """

  def __init__(
    self,
    codec: TrainableCodec,
    ema_decay: Optional[float] = None,
    precision_policy: Optional[str] = None,
    rates_by_size: bool = False,
  ):
    """Makes the optimizers' variables too, so that a restore can be strict."""
    prior = {id(v) for v in codec.prior_variables}
    self.codec = codec
    self.groups = [
      [v for v in codec.trainable_variables if id(v) not in prior],
      [v for v in codec.trainable_variables if id(v) in prior],
    ]
    self.rate_factors: Optional[tf.Variable] = None
    if rates_by_size:
      self.rate_factors = tf.Variable(
        tf.ones([sum(len(g) for g in self.groups)]), trainable=False, name="rate_factors"
      )
    self.optimizers = [
      optimizers.Adam(self.groups[0], self.rate_factors),
      optimizers.Adam(self.groups[1], self.rate_factors, first=len(self.groups[0])),
    ]
    self.step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
    self.averages = Averages(codec.trainable_variables, ema_decay) if ema_decay else None
    self.loss_scale = precision.LossScale() if precision_policy == "mixed_float16" else None

  def checkpoint(self) -> tf.train.Checkpoint:
    """The whole state; to be saved and restored while `evaluated`."""
    parts: dict[str, Any] = {}
    if self.averages is not None:
      parts["raw_weights"] = self.averages.values
    if self.loss_scale is not None:
      parts["loss_scale"] = self.loss_scale
    if self.rate_factors is not None:
      parts["rate_factors"] = self.rate_factors
    return tf.train.Checkpoint(
      codec=self.codec, optimizers=self.optimizers, step=self.step, **parts
    )

  def start(self) -> None:
    """Before the first step: what follows from the initial weights."""
    if self.rate_factors is not None:
      flat = [v for group in self.groups for v in group]
      self.rate_factors.assign(optimizers.factors_by_size(flat))
    if self.averages is not None:
      self.averages.start()

  def evaluated(self) -> contextlib.AbstractContextManager[None]:
    """Within, the codec has the weights to evaluate: averages, where they are kept."""
    return contextlib.nullcontext() if self.averages is None else self.averages.in_place()


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
  policy = config.train_eval_config.get("precision_policy")
  loss_scale = state.loss_scale
  # Where numbers are checked, each operation has a name of its own to say which one it was.
  checks = bool(config.train_eval_config.get("check_numerics"))
  tracing = contextlib.nullcontext if checks else layers.tracing_once
  flat = [v for group in state.groups for v in group]

  def apply(gradients):
    begin = 0
    for optimizer, variables in zip(state.optimizers, state.groups):
      optimizer.apply_gradients(
        zip(gradients[begin : begin + len(variables)], variables),
        skip_gradients_aggregation=True,  # `mean` did that, before the norm was taken.
      )
      begin += len(variables)

  def replica_step(crops, step, rd_lambda):
    crops, rows = distribution.share(crops)
    x = tf.cast(crops, tf.float32)
    with tf.GradientTape() as tape:
      drawn = tf.stack([seed, step])
      quantizer = make_quantizer(seed=drawn, rows=rows)
      with precision.computing_in(policy), tracing():
        terms = state.codec.objective(x, rd_lambda, quantizer, seed=drawn)
      loss = terms.loss if loss_scale is None else terms.loss * loss_scale.scale
    gradients = tape.gradient(loss, flat)
    if loss_scale is not None:
      gradients = [g if g is None else g / loss_scale.scale for g in gradients]
    gradients = distribution.mean(gradients)
    is_finite = tf.constant(True) if loss_scale is None else precision.are_finite(gradients)
    gradients, norm = optimizers.clip_by_global_norm(gradients, clip_norm)
    if loss_scale is None:
      apply(gradients)
    else:
      precision.apply_if(is_finite, apply, gradients)
    scalars = {
      "loss": terms.loss,
      "bpp": tf.reduce_mean(terms.bpp),
      "mse": tf.reduce_mean(terms.mse),
      **(terms.parts or {}),
    }
    means = distribution.mean(list(scalars.values()))
    return {**dict(zip(scalars, means)), "gradient_norm": norm}, is_finite

  # AutoGraph rewrites Python's `if` and `for` over tensors; there are none, and it takes as long as
  # the tracing itself.
  @tf.function(autograph=False)
  def train_step(crops, step, learning_rate, rd_lambda):
    for optimizer, factor in zip(state.optimizers, factors):
      optimizer.learning_rate.assign(learning_rate * factor)
    scalars, is_finite = distribution.run(replica_step, crops, step, rd_lambda)
    if loss_scale is not None:
      is_overflow = tf.logical_and(tf.logical_not(is_finite), loss_scale.scale > 1.0)
      loss_scale.update(is_finite)
      scalars["loss_scale"] = tf.identity(loss_scale.scale)
      scalars[_OVERFLOW] = tf.cast(is_overflow, tf.float32)
    if state.averages is not None:
      state.averages.update(step)
    return scalars

  return train_step


def check(unit: hyper.WorkUnit, build: BuildCodec) -> TrainableCodec:
  """Raises for a work unit that cannot be trained: unknown names, missing data, wrong sizes.

  Returns a codec that `train` may begin with: to build a large one twice takes a second or two. A
  warm start is tried here already, before the run has a directory; from a run of the same sweep
  when that one is done.

  Raises:
    ValueError, TypeError, RuntimeError: The message lists what is known.
  """
  config = _config_of(unit)
  options = config.train_eval_config
  hyper.check_numbers(config, _RANGES)
  train_options.check(config)
  distribution_lib.check(config)
  name = config.model_config.quantizer
  if name not in quantizers.FOR_TRAINING:
    raise ValueError(
      f"model_config.quantizer {name!r} does not train. "
      f"Known: {', '.join(quantizers.FOR_TRAINING)}."
    )
  _train_sampler(config)
  for settings in (validation.validation_settings(config), validation.test_settings(config)):
    if settings is not None:
      data.CropSampler(settings, 0, "val")
  schedules.learning_rate(config.optimizer_config, int(options.num_steps))
  codec = _build(config, build)
  if options.warm_start_rescale:  # Whether it can be done, before its source is trained.
    codec.rescale(1.0)
  if options.warm_start and hyper.source_of(unit) is None:
    _warm_start(codec, unit, config)
  return codec


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
  training: Optional[_Training] = None
  try:
    checks = bool(_config_of(job.unit).train_eval_config.check_numerics)
    with numerics.checking(checks), distribution.strategy.scope():
      training = _Training(job, build)
      return training.run()
  except tf.errors.UnavailableError as e:
    if distribution.num_workers == 1:
      raise
    raise WorkerError(
      "Another worker of this run is gone, see the log. A rerun goes on from the last checkpoint."
    ) from e
  except tf.errors.OpError as e:  # What the pipeline raises arrives wrapped in TensorFlow's error.
    operation = numerics.first_operation(e.message)
    if operation is not None:
      step = max(0, training.end - 1) if training is not None else 0
      raise DivergedError(
        f"Step {step} is not finite: {operation}. Checkpoints are from before it."
      ) from None
    found = re.search(r"DataError: (.*)", e.message)
    if found is None:
      raise
    raise data.DataError(found.group(1)) from None


def _config_of(unit: hyper.WorkUnit) -> Any:
  return hyper.to_config(train_options.with_defaults(unit.config))


class _Training:
  """One run's training, from its last checkpoint to its end.

  Attributes:
    end: The steps that were begun; in the end the last one.
  """

  def __init__(self, job: Job, build: BuildCodec):
    config = _config_of(job.unit)
    self._job, self._config, self._options = job, config, config.train_eval_config
    self._distribution = job.distribution or Distribution()
    self._num_steps = int(self._options.num_steps)
    # Variables of a strategy are made in its scope, which the check was not.
    checked = None if tf.distribute.has_strategy() else job.checked
    job.checked = None
    self._state = TrainState(
      _build(config, build) if checked is None else checked,
      self._options.ema_decay,
      self._options.precision_policy,
      bool(config.optimizer_config.rates_by_size),
    )
    _check_distribution(self._state.codec, self._distribution)
    self._is_chief = self._distribution.is_chief
    max_to_keep = int(self._options.max_ckpts_to_keep)
    self._ckpts = checkpoints_lib.Checkpoints(job.run.checkpoints_dir, max_to_keep)
    patience = self._options.early_stopping_patience
    self._early = None if patience is None else EarlyStopping(job.run, self._ckpts, int(patience))
    self._stopped: Optional[Stopped] = None
    if self._early is not None and self._is_chief:
      self._stopped = self._early.stopped()
    self._start = self._saved = self.end = self._restore_or_warm_start()
    self._metrics: dict[str, float] = self._ckpts.facts(self._start) if self._start else {}
    sampler = _train_sampler(config)
    if self._start == 0:
      self._begin(sampler)
    self._batches = data.to_tf_dataset(
      sampler,
      self._start,
      self._num_steps - self._start,
      rows=self._distribution.worker_rows(sampler.config.batchsize),
    )
    self._validation = self._evaluation(
      validation.validation_settings(config), config.val_data_config.max_images
    )
    self._validations = 0
    self._learning_rate = schedules.learning_rate(config.optimizer_config, self._num_steps)
    model = config.model_config
    self._rd_lambda = schedules.rd_lambda(
      float(model.rd_lambda),
      int(model.rd_lambda_warmup_steps),
      float(model.rd_lambda_warmup_factor),
      float(model.rd_lambda_warmup_below),
    )
    self._step = make_train_step(self._state, config, self._distribution)
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
    detail = ""
    try:
      self._catch_up()
      if not self._stops_early():
        with graph_passes():
          self._loop(progress)
      self._job.started()  # If there was no step left.
      if self._is_chief:
        detail = "; ".join(t for t in (self._restore_best(), *self._test()) if t)
    finally:
      progress.close()
      self._writer.close()
    if self._is_chief:
      self._job.done(step=self.end, num_steps=self._num_steps, detail=detail)
    with contextlib.suppress(tf.errors.OpError):  # All is written, whoever is gone by now.
      self._distribution.sum_over_workers(0)
    return self._metrics

  def _restore_or_warm_start(self) -> int:
    own = self._ckpts.latest()
    step = self._distribution.value_of_chief(-1 if own is None else own)
    if step >= 0:
      if own != step:
        self._wait_for_checkpoint(step)
      with self._state.evaluated():
        self._ckpts.restore(self._state.checkpoint(), step)
      _LOG.info("Resumed at step %d from %s.", step, self._ckpts.path(step))
      return step
    if self._options.warm_start:
      _LOG.info("%s", _warm_start(self._state.codec, self._job.unit, self._config))
    return 0

  def _begin(self, sampler: data.CropSampler) -> None:
    """Before the first step: initial values that are fitted to data, and initial averages."""
    wanted = self._state.codec.calibration_images
    if wanted and not self._options.warm_start:
      crops = [sampler.batch(0)]
      while len(crops) * len(crops[0]) < wanted:
        crops.append(sampler.batch(len(crops)))
      self._state.codec.calibrate(tf.constant(np.concatenate(crops), tf.float32))
    self._state.start()

  def _evaluation(
    self, settings: Optional[dict[str, Any]], max_images: Optional[int]
  ) -> Optional[validation.Evaluation]:
    if settings is None or not self._is_chief:
      return None
    return validation.Evaluation(self._state.codec, self._config, settings, max_images)

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
      self.end = done
      pending.append((step, self._step(crops, np.int32(step), *map(np.float32, at.values()))))
      if step == self._start:
        self._job.started()
        _LOG.info("First step done %.1f s after the start of the program.", self._job.seconds())
      logs = self._is_due(done, options.log_metrics_every_steps)
      evaluates = self._is_due(done, options.eval_every_steps)
      saves = evaluates or done % int(options.checkpoint_every_steps) == 0
      stops = self._job.stop_requested()
      if self._distribution.num_workers > 1:  # All must stop after the same step.
        stops = done % ask_every == 0 and self._distribution.sum_over_workers(int(stops)) > 0
      if done % check_every == 0 or logs or saves or stops:
        self._metrics = _checked(pending) or self._metrics
        pending.clear()
      progress.update(done, f"loss {self._metrics['loss']:.4f}" if self._metrics else "")
      if logs and self._metrics:
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
        if self._stops_early():
          return
      if stops and done < self._num_steps:
        self._distribution.sum_over_workers(0)  # The chief has saved.
        self._job.interrupted(done)

  def _is_due(self, step: int, every: int) -> bool:
    return step % int(every) == 0 or step == self._num_steps

  def _catch_up(self) -> None:
    """A kill between a checkpoint, its validation and the mark of the best must lose none."""
    start = self._start
    if self._early is not None and self._is_chief:
      self._early.resume(start)
    if self._is_chief and start and self._is_due(start, self._options.eval_every_steps):
      records = runs.read_jsonl(self._job.run.metrics_file)
      found = [r for r in records if r.get("split") == "val" and r.get("step") == start]
      if found:
        self._mark_if_best(start, found[-1]["loss"])
      else:
        self._job.started()
        self._validate(start)

  def _save(self, step: int) -> None:
    if step != self._saved and self._is_chief:
      self._state.step.assign(step)
      facts = dict(sorted(self._metrics.items()))
      with self._state.evaluated():
        self._ckpts.save(self._state.checkpoint(), step, facts=facts)
      self._saved = step

  def _validate(self, step: int) -> None:
    if self._validation is None:
      return
    with self._state.evaluated(), graph_passes(have_all=True):
      values, pictures = self._validation.run(int(self._options.num_images_to_log))
    self._writer.scalars(step, values, split="val")
    every = int(self._options.log_images_every_evals)
    if len(pictures.original) and every and self._validations % every == 0:
      self._writer.image_pairs(step, *pictures)
    self._writer.flush()
    self._validations += 1
    self._mark_if_best(step, values["loss"])
    if self._early is not None:
      self._early.note(step, values["loss"])
    _LOG.info("Step %d validation: %s", step, _text(values))

  def _mark_if_best(self, step: int, loss: float) -> None:
    best = self._ckpts.best()
    if self._options.keep_best and math.isfinite(loss) and (best is None or loss < best["loss"]):
      self._ckpts.mark_best(step, loss)

  def _stops_early(self) -> bool:
    """Whether the training ends here: the chief's decision, which all workers follow."""
    if self._early is None:
      return False
    decision = self._is_chief and (self._stopped is not None or self._early.is_exhausted())
    return self._distribution.value_of_chief(int(decision)) > 0

  def _restore_best(self) -> str:
    """With early stopping, ends the run with its best checkpoint. Returns the run's detail."""
    if self._early is None:
      return _text(self._metrics)
    self._stopped = self._stopped or self._early.finish(self.end)
    self.end = self._stopped.step
    self._ckpts.restore(weights_only(self._state.codec), self._stopped.best_step)
    self._metrics = self._ckpts.facts(self._stopped.best_step)
    text = self._stopped.text(self._num_steps)
    _LOG.info("Training %s.", text)
    return text

  def _test(self) -> Iterator[str]:
    """Measures the final weights on the test data, once; gives what to say, if there are any."""
    evaluation = self._evaluation(
      validation.test_settings(self._config), self._config.test_data_config.max_images
    )
    if evaluation is None:
      return
    step = self.end if self._stopped is None else self._stopped.best_step
    records = runs.read_jsonl(self._job.run.metrics_file)
    found = [r for r in records if r.get("split") == "test" and r.get("step") == step]
    if found:  # By an attempt that was killed before the end mark.
      values = {k: v for k, v in found[-1].items() if k not in ("split", "step", "time")}
    else:
      # What was restored is averaged already.
      with self._state.evaluated() if self._stopped is None else contextlib.nullcontext():
        values, _ = evaluation.run()
      self._writer.scalars(step, values, split="test")
    _LOG.info("Test on %s: %s", self._config.test_data_config.dataset, _text(values))
    yield f"test: {_text(values)}"


# Fold constants, simplify arithmetic and control dependencies: a training step on a CPU is as fast
# without, and begins up to a second earlier (docs/results.md, "The table of speeds, filled"). What
# merges products with the biases after them stays.
_PASSES = ("constant_folding", "arithmetic_optimization", "dependency_optimization")


@contextlib.contextmanager
def graph_passes(have_all: bool = False) -> Iterator[None]:
  """Within, training steps run on a CPU without those of TensorFlow's passes that do not pay there.

  Graphs are rewritten when they first run, and anew under other passes: what runs within should
  always do so. A GPU and several replicas have all passes, for which none were measured; and all
  else has within `graph_passes(have_all=True)`.
  """
  if tf.config.list_physical_devices("GPU") or tf.distribute.has_strategy():
    yield
    return
  before = tf.config.optimizer.get_experimental_options()
  tf.config.optimizer.set_experimental_options(dict.fromkeys(_PASSES, None if have_all else False))
  try:
    yield
  finally:  # None is what they are where nobody chose.
    tf.config.optimizer.set_experimental_options({name: before.get(name) for name in _PASSES})


def _build(config: Any, build: BuildCodec) -> TrainableCodec:
  """The untrained codec, with initial values by the config's seed."""
  tf.keras.utils.set_random_seed(int(config.train_eval_config.seed))
  return build(config.model_config)


def _warm_start(codec: TrainableCodec, unit: hyper.WorkUnit, config: Any) -> str:
  """Gives the codec the weights that `warm_start` names; returns what to say about it.

  Raises:
    checkpoints.CheckpointError: There are none, or they are another model's.
  """
  options = config.train_eval_config
  given = options.warm_start_wid
  found, step = checkpoints_lib.find(options.warm_start, unit.wid if given is None else int(given))
  said = f"Warm start from {found.path(step)}."
  try:
    if not options.warm_start_partial:
      found.restore(weights_only(codec), step)
      if options.warm_start_rescale:
        source = runs.RunDir(found.folder.parent).read_work_unit().config["model_config"]
        factor = rescale.factor(float(source["rd_lambda"]), float(config.model_config.rd_lambda))
        codec.rescale(factor)
        said += f" Latents times {factor:.4g}, for rd_lambda was {source['rd_lambda']:g} there."
      return said
    left = found.restore_fitting(weights_only(codec), step)
  except checkpoints_lib.MisfitError as e:
    record = runs.RunDir(found.folder.parent).work_unit_file
    raise checkpoints_lib.MisfitError(
      f"train_eval_config.warm_start: {e} Start with a config whose model_config is that of the "
      f"run (recorded in {record}), or name a run of this model."
    ) from None
  return f"{said} At their initial values stay: {', '.join(left) or 'none'}."


def _check_distribution(codec: TrainableCodec, distribution: Distribution) -> None:
  averages = [v for v in codec.variables if v.synchronization == tf.VariableSynchronization.ON_READ]
  if averages and distribution.num_workers > 1:  # To save one takes all workers.
    raise ValueError(
      "This model keeps moving averages (batch normalisation), which train_eval_config.strategy="
      "multi_worker does not serve: use mirrored."
    )


def _train_sampler(config: Any) -> data.CropSampler:
  return data.CropSampler(config.train_data_config, int(config.train_eval_config.seed), "train")


def _checked(pending: list[tuple[int, dict[str, tf.Tensor]]]) -> dict[str, float]:
  """The newest step's scalars; raises if any step since the last check was not finite.

  Steps that mixed precision left out do not count.
  """
  values: dict[str, float] = {}
  for step, scalars in pending:
    found = {k: float(v) for k, v in scalars.items()}
    if found.pop(_OVERFLOW, 0.0):
      scale = found["loss_scale"]
      _LOG.info("Step %d is left out: float16 overflows. The loss scale is now %g.", step, scale)
      continue
    values = found
    if not all(math.isfinite(v) for v in values.values()):
      raise DivergedError(
        f"Step {step} is not finite: {_text(values)}. Checkpoints are from before it. "
        "Try a lower optimizer_config.learning_rate or gradient_clip_norm, and look at the data."
      )
  return values


def _text(values: dict[str, float]) -> str:
  return ", ".join(f"{k} {v:.4f}" for k, v in values.items())
