"""Training options that came after the first version: defaults, ranges, what fits together.

A run that an older version recorded lacks their fields: `with_defaults` is the one place that gives
them. The config files have the same defaults, and say what each means.
"""

import copy
from collections.abc import Mapping
from typing import Any

from common import hyper

# "float32" is the same as None.
PRECISION_POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  "train_eval_config": {
    "early_stopping_patience": None,
    "precision_policy": None,
    "check_numerics": False,
    "ema_decay": None,
    "warm_start_partial": False,
    "warm_start_rescale": False,
  },
  "optimizer_config": {"rates_by_size": False},
  "test_data_config": {"dataset": None, "batchsize": 8, "patchsize": 256, "max_images": None},
}

_RANGES = {
  "train_eval_config.early_stopping_patience": hyper.Range(int, 1, optional=True),
  "train_eval_config.ema_decay": hyper.Range(float, 0, exclusive=True, below=1, optional=True),
  "test_data_config.batchsize": hyper.Range(int, 1),
  "test_data_config.patchsize": hyper.Range(int, 1),
  "test_data_config.max_images": hyper.Range(int, 1, optional=True),
}


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
  """A plain config of a training with the fields that it lacks; other configs as they are."""
  filled = copy.deepcopy(dict(config))
  if "train_data_config" not in filled or "train_eval_config" not in filled:
    return filled
  for group, fields in DEFAULTS.items():
    filled[group] = {**fields, **filled.get(group, {})}
  return filled


def check(config: Any) -> None:
  """Raises ConfigError for values that are out of range, unknown, or do not fit each other.

  Args:
    config: A ConfigDict with all fields, see `with_defaults`.
  """
  hyper.check_numbers(config, _RANGES)
  options = config.train_eval_config
  policy = options.precision_policy
  if policy is not None and policy not in PRECISION_POLICIES:
    raise hyper.ConfigError(
      f"Unknown train_eval_config.precision_policy {policy!r}. "
      f"Known: {', '.join(PRECISION_POLICIES)}."
    )
  if options.check_numerics and policy == "mixed_float16":
    raise hyper.ConfigError(
      "train_eval_config.check_numerics stops at the overflows that mixed_float16 finds its loss "
      "scale by: look for NaN with precision_policy=float32 or mixed_bfloat16."
    )
  if options.warm_start_rescale and (not options.warm_start or options.warm_start_partial):
    raise hyper.ConfigError(
      "train_eval_config.warm_start_rescale multiplies all latents of another run's weights: set "
      "warm_start, and warm_start_partial=False."
    )
  if options.early_stopping_patience is None:
    return
  if config.val_data_config.dataset is None and config.train_data_config.val_split is None:
    raise hyper.ConfigError(
      "train_eval_config.early_stopping_patience needs validation data: set "
      "train_data_config.val_split (such as 0.1) or val_data_config.dataset."
    )
  if not options.keep_best:
    raise hyper.ConfigError(
      "train_eval_config.early_stopping_patience restores the best checkpoint by the loss on "
      "val_split or val_data_config: set train_eval_config.keep_best=True."
    )
