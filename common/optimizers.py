"""Adam in one operation a variable, with a learning rate of its own where that is asked for.

Adam moves all values of a layer by about the learning rate, however small they are. The kernels
that a DCT gives a synthesis are small where they take latents in quantization steps, which are
large: at the rate that suits the others, a few dozen steps destroy what they began with
(docs/results.md, "Half an hour").
"""

import types
from collections.abc import Sequence
from typing import Any, Optional

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


def clip_by_global_norm(
  gradients: Sequence[Optional[tf.Tensor]], clip_norm: float
) -> tuple[list[Optional[tf.Tensor]], tf.Tensor]:
  """tf.clip_by_global_norm for dense gradients, with an operation less for each.

  Returns the gradients, scaled where their norm is above `clip_norm`, and the norm before. A norm
  that is not finite makes all of them NaN, as there.
  """
  norm = tf.linalg.global_norm(gradients)
  scale = clip_norm * tf.minimum(1.0 / norm, tf.constant(1.0) / clip_norm)
  scale *= (norm + 1.0) / (norm + 1.0)  # 1, or NaN. (`numerics` would stop at a constant NaN.)
  return [g if g is None else g * scale for g in gradients], norm


class Adam(tf.keras.optimizers.Adam):
  """Keras' Adam, for variables in float32 with dense gradients; its checkpoints are the same.

  Keras makes some 35 operations for each variable, which were half of a step's graph: to trace and
  to optimize it took a third of the time to a training's first step.
  """

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
    # A function and a namespace: other attributes would be parts of the optimizer's checkpoint.
    self._factor_of = None if factors is None else lambda index: factors[first + index]
    self._shared = types.SimpleNamespace(scalars=None)
    self.build(list(variables))

  def _make_scalars(self) -> dict[str, tf.Tensor]:
    """The operation's arguments that do not depend on the variable."""
    step = tf.cast(self.iterations + 1, tf.float32)
    first, second = tf.constant(self.beta_1), tf.constant(self.beta_2)
    return {
      "beta1_power": first**step,
      "beta2_power": second**step,
      "lr": tf.convert_to_tensor(self.learning_rate),
      "beta1": first,
      "beta2": second,
      "epsilon": tf.constant(self.epsilon),
    }

  def _distributed_apply_gradients_fn(
    self, distribution: Any, grads_and_vars: Any, **kwargs: Any
  ) -> Any:
    """Keras' loop over the variables, which runs once for all replicas."""
    gradients_and_variables = list(grads_and_vars)
    self._shared.scalars = self._make_scalars()
    try:
      if tf.distribute.has_strategy():
        return super()._distributed_apply_gradients_fn(
          distribution, gradients_and_variables, **kwargs
        )
      for gradient, variable in gradients_and_variables:
        self.update_step(gradient, variable)
      return self.iterations.assign_add(1)
    finally:
      self._shared.scalars = None

  def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
    """One variable's step (Kingma and Ba 2015, algorithm 1, in the order of section 2's end)."""
    index = self._index_dict[self._var_key(variable)]
    scalars = self._shared.scalars or self._make_scalars()
    if self._factor_of is not None:
      scalars = {**scalars, "lr": scalars["lr"] * self._factor_of(index)}
    tf.raw_ops.ResourceApplyAdam(
      var=variable.handle,
      m=self._momentums[index].handle,
      v=self._velocities[index].handle,
      grad=gradient,
      **scalars,
    )
