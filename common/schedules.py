"""Schedules: plain functions from the step (an int, counted from 0) to a float."""

import math
from typing import Any, Callable

Schedule = Callable[[int], float]

LEARNING_RATE_SCHEDULES = ("constant", "piecewise", "cosine")


def learning_rate(optimizer_config: Any, num_steps: int) -> Schedule:
  """Linear warm-up, then the schedule named in the config.

  Args:
    optimizer_config: `learning_rate` (the peak), `warmup_steps`, `schedule`, and for "piecewise"
      `decay_after_steps` and `decay_factor`; "cosine" falls to `decay_factor` times the peak.
    num_steps: Steps of the whole training.

  Raises:
    ValueError: An unknown schedule; the message lists the known ones.
  """
  peak = float(optimizer_config.learning_rate)
  warmup = int(optimizer_config.warmup_steps)
  name = optimizer_config.schedule
  factor = float(optimizer_config.decay_factor)
  after = int(optimizer_config.decay_after_steps)
  if name not in LEARNING_RATE_SCHEDULES:
    raise ValueError(
      f"Unknown optimizer_config.schedule {name!r}. Known: {', '.join(LEARNING_RATE_SCHEDULES)}."
    )

  def at(step: int) -> float:
    if step < warmup:
      return peak * (step + 1) / warmup
    if name == "piecewise":
      return peak * factor if step >= after else peak
    if name == "cosine":
      progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
      return peak * (factor + (1 - factor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak

  return at


def rd_lambda(value: float, warmup_steps: int, warmup_factor: float, below: float) -> Schedule:
  """`value`, times `warmup_factor` during the first `warmup_steps` where `value` <= `below`.

  Low rates train better when the reconstruction comes first (Yang et al. 2023, appendix: ten times
  lambda for the first 20% of the steps where lambda <= 0.01).
  """

  def at(step: int) -> float:
    return value * warmup_factor if value <= below and step < warmup_steps else value

  return at


LOWEST_TEMPERATURE = 1e-8


def annealed_temperature(rate: float, start_step: int, upper: float = 0.5) -> Schedule:
  """tau(t) = clip(upper exp(-rate (t - start_step)), 1e-8, upper): Yang et al. 2020, appendix.

  With `upper` = exp(-rate start_step) this is clip(exp(-rate t), 1e-8, upper), as their code and
  that of SGA+ have it: rate 1e-3 and 0.5 start falling at step 693.
  """

  def at(step: int) -> float:
    exponent = min(0.0, -rate * (step - start_step))  # exp of large positive numbers overflows.
    return max(upper * math.exp(exponent), LOWEST_TEMPERATURE)

  return at
