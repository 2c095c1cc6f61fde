"""What a training is validated and tested on, and how.

Rounding takes the place of the training's noise, float32 that of mixed precision, and crops and
quantizer are the same every time. The loss is that of training, lambda without its warm-up.
"""

from typing import Any, NamedTuple, Optional

import numpy as np
import tensorflow as tf

from common import data, metrics, quantizers, rd
from common.codec import TrainableCodec


def validation_settings(config: Any) -> Optional[dict[str, Any]]:
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


def test_settings(config: Any) -> Optional[dict[str, Any]]:
  """The pipeline settings of the crops of the test at the end, or None for no test."""
  settings = dict(config.test_data_config)
  return None if settings["dataset"] is None else settings


class Pictures(NamedTuple):
  """The first crops, uint8 [N, P, P, 3] each."""

  original: np.ndarray
  decoded: np.ndarray


class Evaluation:
  """Mean rate and distortion over fixed crops."""

  def __init__(
    self,
    codec: TrainableCodec,
    config: Any,
    settings: dict[str, Any],
    max_crops: Optional[int] = None,
  ):
    """`settings`: of the pipeline; `max_crops`: at most so many, in whole batches."""
    self._codec = codec
    self._dataset = data.make_val_dataset(settings)
    if max_crops is not None:
      self._dataset = self._dataset.take(-(-max_crops // settings["batchsize"]))
    name = quantizers.for_validation(config.model_config.quantizer)
    quantizer = quantizers.make_quantizer(name)(seed=(0, 0))

    @tf.function(autograph=False)
    def terms(crops):
      rd_lambda = float(config.model_config.rd_lambda)
      return codec.objective(tf.cast(crops, tf.float32), rd_lambda, quantizer)

    self._terms = terms

  def run(self, num_pictures: int = 0) -> tuple[dict[str, float], Pictures]:
    """With the weights as they are: loss, bpp, mse and psnr_db; and the first crops."""
    self._codec.prepare()
    bpp: list[float] = []
    mse: list[float] = []
    losses: list[float] = []  # One a crop, as the others.
    pictures: Optional[Pictures] = None
    for crops in self._dataset:
      terms = self._terms(crops)
      bpp += terms.bpp.numpy().tolist()
      mse += terms.mse.numpy().tolist()
      losses += [float(terms.loss)] * len(crops)
      if pictures is None:
        original = crops.numpy()[:num_pictures]
        decoded = [rd.to_image(x) for x in terms.x_hat.numpy()[:num_pictures]]
        pictures = Pictures(original, np.stack(decoded) if decoded else original)
    assert pictures is not None
    values = {
      "loss": float(np.mean(losses)),
      "bpp": float(np.mean(bpp)),
      "mse": float(np.mean(mse)),
      "psnr_db": float(np.mean([metrics.psnr_of_mse(max(m, 1e-10)) for m in mse])),
    }
    return values, pictures
