"""Where one training run computes: on one device, on all devices of a node, or on several nodes.

| train_eval_config.strategy | the replicas of the model |
|---|---|
| one_device   | one |
| mirrored     | one on each GPU that the process sees (tf.distribute.MirroredStrategy) |
| multi_worker | the same in each of several processes (tf.distribute.MultiWorkerMirroredStrategy) |

`train_data_config.batchsize` is the global batch: each replica takes an equal part of its rows,
with the noise that these rows have on one device, and gradients are averaged over the replicas
before they are clipped. So a step is that of one device, up to the order of summation.

Of several workers the first, the chief, writes all of the run's files. A worker learns its place
from TF_CONFIG, as TensorFlow describes it, or from NTC_WORKERS (host:port of each, commas between)
and SLURM_PROCID, which the launcher sets on Slurm. Each must see the run directory.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

STRATEGIES = ("one_device", "mirrored", "multi_worker")


@dataclasses.dataclass(frozen=True)
class Worker:
  """One of the processes that train a run together.

  Attributes:
    index: From 0, which is the chief.
    addresses: host:port of each worker; empty where there is only this one.
  """

  index: int = 0
  addresses: tuple[str, ...] = ()

  @property
  def is_chief(self) -> bool:
    """Whether this process writes the run's files."""
    return self.index == 0

  @property
  def count(self) -> int:
    """How many workers there are."""
    return max(1, len(self.addresses))


def check(config: Mapping[str, Any]) -> None:
  """Raises ValueError for settings that no devices fit."""
  name, number = strategy_of(config), config["train_eval_config"].get("num_replicas")
  if number is None:
    return
  if not isinstance(number, int) or isinstance(number, bool) or number < 1:
    raise ValueError(f"train_eval_config.num_replicas is {number!r}; it must be 1 or more.")
  if name == "one_device" and number > 1:
    raise ValueError(
      f"train_eval_config.num_replicas={number} needs train_eval_config.strategy=mirrored "
      "or multi_worker."
    )


def strategy_of(config: Mapping[str, Any]) -> str:
  """`train_eval_config.strategy` of a config or its record; "one_device" where it has none.

  Raises:
    ValueError: There is no such strategy.
  """
  name = config["train_eval_config"].get("strategy", "one_device")
  if name not in STRATEGIES:
    raise ValueError(
      f"Unknown train_eval_config.strategy {name!r}. Known: {', '.join(STRATEGIES)}."
    )
  return str(name)


def this_worker(config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Worker:
  """This process's place among the workers of a run; alone unless the config says multi_worker.

  Raises:
    ValueError: The environment describes no worker; the message says what is wrong.
  """
  if strategy_of(config) != "multi_worker":
    return Worker()
  if environ.get("TF_CONFIG"):
    return _from_tf_config(environ["TF_CONFIG"])
  addresses = tuple(a for a in environ.get("NTC_WORKERS", "").split(",") if a)
  if not addresses:
    return Worker()
  index = environ.get("SLURM_PROCID", "")
  if not index.isdigit() or int(index) >= len(addresses):
    raise ValueError(f"SLURM_PROCID={index!r} is none of the {len(addresses)} of NTC_WORKERS.")
  return Worker(int(index), addresses)


def _from_tf_config(text: str) -> Worker:
  try:
    record = json.loads(text)
    cluster, task = record["cluster"], record["task"]
    chiefs = list(cluster.get("chief", []))
    addresses = tuple([*chiefs, *cluster.get("worker", [])])
    index = int(task["index"]) + (len(chiefs) if task["type"] == "worker" else 0)
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"TF_CONFIG={text!r} is not understood: {type(e).__name__}: {e}.") from e
  if task["type"] not in ("chief", "worker") or not 0 <= index < len(addresses):
    raise ValueError(f"TF_CONFIG={text!r}: its task is not one of the cluster's workers.")
  return Worker(index, addresses)


class Share(NamedTuple):
  """A replica's part of a batch.

  Attributes:
    values: [B / replicas, ...], its rows.
    rows: (first, total): where they lie in the global batch of `total` rows; None for all.
  """

  values: Any
  rows: Optional[tuple[Any, int]]


class Distribution:
  """The devices of this process, as part of those of the run; see the module's docstring.

  Without arguments: one device, as TensorFlow chooses it.
  """

  def __init__(self, strategy: Any = None, worker: Optional[Worker] = None):
    """`strategy`: a tf.distribute.Strategy that holds this worker's replicas."""
    import tensorflow as tf

    self.strategy = tf.distribute.get_strategy() if strategy is None else strategy
    self.worker = worker or Worker()
    self.num_replicas = int(self.strategy.num_replicas_in_sync)
    self._sum: Any = None

  @property
  def is_chief(self) -> bool:
    """Whether this process writes the run's files."""
    return self.worker.is_chief

  @property
  def num_workers(self) -> int:
    """How many processes train the run."""
    return self.worker.count

  @property
  def _num_local(self) -> int:
    return self.num_replicas // self.num_workers

  def __str__(self) -> str:
    if self.num_replicas == 1:
      return "one device"
    return f"{self.num_replicas} replicas of {self.num_workers} workers"

  def check_batchsize(self, batchsize: int) -> None:
    """Raises ValueError for a global batch that the replicas cannot share evenly."""
    if batchsize % self.num_replicas:
      raise ValueError(
        f"train_data_config.batchsize={batchsize} cannot be shared evenly by {self.num_replicas} "
        f"replicas: choose a multiple of {self.num_replicas}."
      )

  def worker_rows(self, batchsize: int) -> tuple[int, int]:
    """(first, number) of the rows of a global batch that this worker's replicas take."""
    number = batchsize // self.num_workers
    return self.worker.index * number, number

  def share(self, values: Any) -> Share:
    """Within a replica: its part of the worker's rows, [B / workers, ...]."""
    if self.num_replicas == 1:
      return Share(values, None)
    import tensorflow as tf

    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    count = int(values.shape[0]) // self._num_local
    first = (replica - self.worker.index * self._num_local) * count
    return Share(values[first : first + count], (replica * count, count * self.num_replicas))

  def mean(self, values: list[Any]) -> list[Any]:
    """Within a replica: the mean of tensors over all replicas; the same everywhere."""
    if self.num_replicas == 1:
      return values
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.MEAN, values))

  def run(self, function: Any, *args: Any) -> Any:
    """Calls a function in every replica; its results, equal in all of them, come back once."""
    import tensorflow as tf

    results = self.strategy.run(function, args)
    return tf.nest.map_structure(
      lambda value: self.strategy.experimental_local_results(value)[0], results
    )

  def sum_over_workers(self, value: int) -> int:
    """The sum of the workers' numbers; each waits here for the others."""
    if self.num_workers == 1:
      return value
    import tensorflow as tf

    if self._sum is None:
      first = self.worker.index * self._num_local

      def of_replica(number: Any) -> Any:
        context = tf.distribute.get_replica_context()
        mine = tf.cast(tf.equal(context.replica_id_in_sync_group, first), tf.int64)
        return context.all_reduce(tf.distribute.ReduceOp.SUM, number * mine)

      self._sum = tf.function(lambda number: self.run(of_replica, number))
    return int(self._sum(tf.constant(value, tf.int64)))

  def value_of_chief(self, value: int) -> int:
    """The chief's number, everywhere."""
    return self.sum_over_workers(value if self.is_chief else 0)


def start(config: Mapping[str, Any]) -> Distribution:
  """The devices for a training. To be called before TensorFlow does anything else.

  Several workers wait here for one another.

  Raises:
    ValueError: Fewer devices than train_eval_config.num_replicas, no such strategy, a worker that
      is none of the cluster's, or a batch that cannot be shared.
  """
  check(config)
  name, worker = strategy_of(config), this_worker(config)
  number = config["train_eval_config"].get("num_replicas")
  if name == "one_device":
    return Distribution()
  import tensorflow as tf

  gpus = tf.config.list_physical_devices("GPU")
  if gpus and number is not None:
    if number > len(gpus):
      raise ValueError(f"train_eval_config.num_replicas={number}, but there are {len(gpus)} GPUs.")
    tf.config.set_visible_devices(gpus[:number], "GPU")
  if name == "mirrored":
    devices = None
    if not gpus:
      devices = _cpus(number or 1)
    distribution = Distribution(tf.distribute.MirroredStrategy(devices))
  else:
    if not gpus and (number or 1) > 1:
      raise ValueError("Without GPUs each worker has one replica: start more workers instead.")
    distribution = Distribution(_multi_worker(worker), worker)
  distribution.check_batchsize(int(config["train_data_config"]["batchsize"]))
  return distribution


def _cpus(count: int) -> list[str]:
  """Splits the CPU into logical devices, which share its threads: for tests."""
  import tensorflow as tf

  (cpu,) = tf.config.list_physical_devices("CPU")
  part = tf.config.LogicalDeviceConfiguration()
  tf.config.set_logical_device_configuration(cpu, [part] * count)
  return [f"CPU:{i}" for i in range(count)]


def _multi_worker(worker: Worker) -> Any:
  import tensorflow as tf

  if not worker.addresses:
    return tf.distribute.MultiWorkerMirroredStrategy()
  resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
    tf.train.ClusterSpec({"worker": list(worker.addresses)}),
    task_type="worker",
    task_id=worker.index,
    rpc_layer="grpc",
  )
  return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
