"""Adam, with a learning rate of its own for each variable where that is asked for.

Adam moves all values of a layer by about the learning rate, however small they are. The kernels
that a DCT gives a synthesis are small where they take latents in quantization steps, which are
large: at the rate that suits the others, a few dozen steps destroy what they began with
(docs/results.md, "Half an hour").
"""

from collections.abc import Sequence
from typing import Optional

import numpy as np
import tensorflow as tf

_USUAL_SIZE = 0.02  # Root mean square of a kernel that learns at the full rate.
_SMALLEST = 0.05


def factors_by_size(variables: Sequence[tf.Variable]) -> np.ndarray:
  """Factors of learning rates, float32 [len(variables)], from the variables' values.

  A convolution's kernel whose values are small learns as many times slower; all else, and kernels
  of zeros, at the full rate.
  """

  def one(variable: tf.Variable) -> float:
    if len(variable.shape) != 4:
      return 1.0
    size = float(np.sqrt(np.mean(np.square(variable.numpy(), dtype=np.float64))))
    return float(np.clip(size / _USUAL_SIZE, _SMALLEST, 1.0)) if size else 1.0

  return np.array([one(v) for v in variables], np.float32)


class Adam(tf.keras.optimizers.Adam):
  """Keras' Adam; its checkpoints are the same."""

  def __init__(
    self,
    variables: Sequence[tf.Variable],
    factors: Optional[tf.Variable] = None,
    first: int = 0,
  ):
    """Makes the moments.

    Args:
      variables: What is trained.
      factors: Of the learning rate, None for 1 each.
      first: Where in `factors` that of the first variable is.
    """
    super().__init__(jit_compile=False)
    # A function, for what is an attribute would be a part of the optimizer's checkpoint.
    self._factor_of = None if factors is None else lambda index: factors[first + index]
    self.build(list(variables))

  def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
    """One variable's step (Kingma and Ba 2015, algorithm 1, in the order of section 2's end)."""
    if self._factor_of is None:
      super().update_step(gradient, variable)
      return
    index = self._index_dict[self._var_key(variable)]
    step = tf.cast(self.iterations + 1, tf.float32)
    corrections = tf.sqrt(1.0 - self.beta_2**step) / (1.0 - self.beta_1**step)
    rate = self.learning_rate * self._factor_of(index) * corrections
    mean, square = self._momentums[index], self._velocities[index]
    mean.assign_add((gradient - mean) * (1.0 - self.beta_1))
    square.assign_add((tf.square(gradient) - square) * (1.0 - self.beta_2))
    variable.assign_sub(mean * rate / (tf.sqrt(square) + self.epsilon))
