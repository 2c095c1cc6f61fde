"""Mixed precision: convolutions in 16 bits while weights, latents and losses stay float32.

| policy | convolutions | range, significant bits | loss scaling |
|---|---|---|---|
| float32 | float32 | 1e38, 24 | none |
| mixed_bfloat16 | bfloat16 | 1e38, 8 | none |
| mixed_float16 | float16 | 65504, 11 | dynamic |

`computing_in` is entered around the training's forward pass alone, so validation, evaluation and
coding are float32 whatever a run was trained with. `common.layers` asks `lowered` what to compute
in: what goes from one layer of a transform to the next is in 16 bits too. A transform's last layer
is float32, since latents and pixels above 256 would lose their integers in bfloat16. Casts pass
gradients on in float32, so their sums over replicas, clipping and Adam are float32.

Loss scaling (Micikevicius et al. 2018, arXiv 1710.03740): gradients that float16 would round to 0
are those of a multiple of the loss. Where one overflows, the step is left out and the multiple is
halved; after many good steps it is doubled.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Callable, Optional

import tensorflow as tf

_LOW: dict[str, tf.DType] = {"mixed_float16": tf.float16, "mixed_bfloat16": tf.bfloat16}

_state = threading.local()  # Replicas of a model are traced in threads of their own.


@contextlib.contextmanager
def computing_in(policy: Optional[str]) -> Iterator[None]:
  """Convolutions that are built within compute as `policy` says; None is float32."""
  before = getattr(_state, "dtype", None)
  _state.dtype = _LOW.get(policy) if policy else None
  try:
    yield
  finally:
    _state.dtype = before


def lowered(x: tf.Tensor) -> tf.Tensor:
  """A float32 tensor in the precision to compute in; tensors of other types as they are."""
  return tf.cast(x, _state.dtype) if is_lowered(x) else x


def is_lowered(x: tf.Tensor) -> bool:
  """Whether `lowered` gives another precision than x has."""
  return getattr(_state, "dtype", None) is not None and x.dtype == tf.float32


def widened(x: tf.Tensor) -> tf.Tensor:
  """A tensor of 16 bits as float32; others as they are."""
  return tf.cast(x, tf.float32) if x.dtype in (tf.float16, tf.bfloat16) else x


class LossScale(tf.Module):
  """The multiple of the loss whose gradients are taken.

  Attributes:
    scale: A power of two, 1 or more.
    good_steps: Steps since it last changed.
  """

  INITIAL = 2.0**15
  GOOD_STEPS = 2000  # After so many without an overflow it is doubled.

  def __init__(self) -> None:
    super().__init__(name="loss_scale")
    self.scale = tf.Variable(self.INITIAL, trainable=False, name="scale")
    self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False, name="good_steps")

  def update(self, is_finite: tf.Tensor) -> None:
    """After a step, outside of the replicas; `is_finite`: whether its gradients were."""
    good = tf.where(is_finite, self.good_steps + 1, tf.zeros_like(self.good_steps))
    doubles = good >= self.GOOD_STEPS
    kept = tf.where(doubles, 2.0 * self.scale, tf.convert_to_tensor(self.scale))
    self.scale.assign(tf.where(is_finite, kept, tf.maximum(0.5 * self.scale, 1.0)))
    self.good_steps.assign(tf.where(doubles, tf.zeros_like(good), good))


def are_finite(gradients: list[Optional[tf.Tensor]]) -> tf.Tensor:
  """Whether all values of all tensors are finite: a scalar bool. None is a tensor that has none."""
  checks = [tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None]
  return tf.reduce_all(checks)


def apply_if(
  is_finite: tf.Tensor, apply: Callable[[list[Any]], None], gradients: list[Any]
) -> None:
  """Within a replica: `apply(gradients)` where `is_finite`, which is the same in all replicas."""

  def across(strategy: Any, is_finite: Any, gradients: Any) -> None:
    def apply_in_all() -> tf.Tensor:
      strategy.extended.call_for_each_replica(apply, args=(gradients,))
      return tf.constant(True)

    first = strategy.experimental_local_results(is_finite)[0]
    tf.cond(first, apply_in_all, lambda: tf.constant(False))

  tf.distribute.get_replica_context().merge_call(across, args=(is_finite, gradients))
