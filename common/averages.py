"""Exponential moving averages of the trained weights.

After step t (0, 1, ...) the averages a become d a + (1 - d) w, with d = min(decay, (1 + t) /
(10 + t)): a function of the step, so that a resume needs no more than the averages. The warm-up
forgets the initial weights early; they start the averages.

Weights and averages change places while a checkpoint is written or the model is validated: the
checkpoint's codec holds the averages, which is what evaluation, export and warm starts read, and
the weights that training goes on from lie beside it.
"""

import contextlib
from collections.abc import Iterator, Sequence

import tensorflow as tf


class Averages:
  """The averages of some variables.

  Attributes:
    values: The averages, in the order of the variables; the weights while `in_place`.
  """

  def __init__(self, variables: Sequence[tf.Variable], decay: float):
    """`decay`: above 0 and below 1, such as 0.9999. Call `start` once the weights are initial."""
    self._variables, self._decay = list(variables), decay
    self.values = [tf.Variable(tf.zeros(v.shape), trainable=False) for v in self._variables]

  def start(self) -> None:
    """The averages are the weights as they are."""
    for average, variable in zip(self.values, self._variables):
      average.assign(tf.identity(variable))

  def update(self, step: tf.Tensor) -> None:
    """After step `step`, an integer scalar, outside of the replicas."""
    t = tf.cast(step, tf.float32)
    decay = tf.minimum(self._decay, (1.0 + t) / (10.0 + t))
    for average, variable in zip(self.values, self._variables):
      average.assign(decay * average + (1.0 - decay) * variable)

  def swap(self) -> None:
    """The averages become the weights, and the weights the averages."""
    for average, variable in zip(self.values, self._variables):
      weights = tf.identity(variable)
      variable.assign(tf.identity(average))
      average.assign(weights)

  @contextlib.contextmanager
  def in_place(self) -> Iterator[None]:
    """Within, the averages are the weights."""
    self.swap()
    try:
      yield
    finally:
      self.swap()
