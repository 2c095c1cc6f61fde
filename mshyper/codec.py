"""The mean-scale hyperprior codec (Minnen, Ballé and Toderici 2018): latents y, hyper-latents z.

z is coded with a factorized prior; from its rounded values the hyper-synthesis gives each y a mean
and a scale, and y is coded with that normal density. Two sections in a file: z, y.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from common import (
  bitstream,
  dct_init,
  entropy,
  exact,
  hyper_init,
  quantizers,
  rd,
  rescale,
  tiling,
  transforms,
)
from common.codec import Coded, Latent, Latents, Quantizer, TrainableCodec
from common.layers import Layer, Sequential
from common.profiling import Stage

FAMILY = "mshyper"


class HyperpriorCodec(TrainableCodec):
  """Analysis, hyper-analysis, hyper-synthesis, synthesis.

  Attributes:
    analysis: [B, H, W, 3] in -0.5..0.5 to the latents y [B, H/s, W/s, C].
    synthesis: The way back.
    hyper_analysis: y to the hyper-latents z.
    hyper_synthesis: z to [B, H/s, W/s, 2C], the means and the log scales of y.
    prior: Of z.
    conditional: Of y, given means and scales.
  """

  def __init__(
    self,
    analysis: Layer,
    synthesis: Layer,
    hyper_analysis: Layer,
    hyper_synthesis: Layer,
    offset_heuristic: bool = True,
    prior_init_scale: float = 10.0,
    fit_to_data: bool = False,
    exact_coding: bool = True,
  ):
    """Makes the codec.

    Args:
      analysis: See the attributes, as the next three.
      synthesis: As above.
      hyper_analysis: As above.
      hyper_synthesis: As above.
      offset_heuristic: See `entropy.FactorizedPrior`; for the grid of z.
      prior_init_scale: Width of z's initial densities, in quantization steps.
      fit_to_data: Whether `calibrate` fits the initial densities of z and y.
      exact_coding: Whether files are coded with the integer hyper-synthesis (`common.exact`), so
        that they decode everywhere; else with the float one, in less time, and then they may not
        decode with another number of threads, library or processor.

    Raises:
      ValueError: The transforms do not fit each other.
    """
    super().__init__(name=FAMILY)
    transforms.check_pair(analysis, synthesis)
    channels = analysis.out_channels
    if hyper_analysis.in_channels != channels or hyper_synthesis.out_channels != 2 * channels:
      raise ValueError(
        f"The analysis gives {channels} channels; the hyper-analysis takes "
        f"{hyper_analysis.in_channels} (it must be as many) and the hyper-synthesis gives "
        f"{hyper_synthesis.out_channels} (it must be {2 * channels}: means and log scales). Set "
        "analysis.output_channels, synthesis.in_channels, hyper_analysis.in_channels and "
        "hyper_synthesis.bottleneck_size of model_config alike."
      )
    transforms.check_pair(hyper_analysis, hyper_synthesis)
    self.calibration_images = 32 if fit_to_data else 0
    self.analysis = analysis
    self.synthesis = synthesis
    self.hyper_analysis = hyper_analysis
    self.hyper_synthesis = hyper_synthesis
    self.prior = entropy.FactorizedPrior(
      hyper_analysis.out_channels, init_scale=prior_init_scale, offset_heuristic=offset_heuristic
    )
    self.conditional = entropy.GaussianConditional()
    # Derived from the weights, so kept where checkpoints do not look.
    self._exact = _Hidden(exact.ExactTransform(hyper_synthesis, "hyper") if exact_coding else None)

  @property
  def downsample_factor(self) -> int:
    """Of analysis and hyper-analysis together."""
    return self.analysis.downsample * self.hyper_analysis.downsample

  def infer(self, x: tf.Tensor) -> Latents:
    """See `TrainableCodec.infer`."""
    y = self.analysis(x / 255.0 - 0.5)
    return {"y": Latent(y), "z": Latent(self.hyper_analysis(y))}

  def code(self, latents: Latents, quantizer: Quantizer) -> Coded:
    """See `TrainableCodec.code`. Computes in float32, whatever files are coded with."""
    z = quantizer("z", latents["z"].loc, self.prior.offset)
    mean, log_scale = tf.split(self.hyper_synthesis(z.decode), 2, axis=-1)
    y = quantizer("y", latents["y"].loc, mean)
    bits = {"y": self.conditional.bits(y.rate, mean, log_scale), "z": self.prior.bits(z.rate)}
    return Coded(decode={"y": y.decode}, bits=bits)

  def synthesize(self, decode: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """See `TrainableCodec.synthesize`."""
    return (self.synthesis(decode["y"]) + 0.5) * 255.0

  def analysis_windows(self) -> tiling.Windows:
    """See `TrainableCodec.analysis_windows`."""
    return {"y": self.analysis}

  def infer_tile(self, x: tf.Tensor) -> Latents:
    """See `TrainableCodec.infer_tile`: y alone."""
    return {"y": Latent(self.analysis(x / 255.0 - 0.5))}

  def complete(self, latents: Latents) -> Latents:
    """See `TrainableCodec.complete`: z, from tiles of y."""
    y = latents["y"].loc
    batch, height, width, channels = y.shape
    scale = self.hyper_analysis.downsample
    shape = [batch, height // scale, width // scale, self.hyper_analysis.out_channels]
    z = np.empty(shape, np.float32)
    at_once = max(1, _HYPER_VALUES_AT_ONCE // (batch * channels))
    for down, across in tiling.tiles((height, width), [self.hyper_analysis], at_once):
      part = self.hyper_analysis(y[:, down.source(1), across.source(1)]).numpy()
      (to_rows, from_rows), (to_columns, from_columns) = down.own(scale), across.own(scale)
      z[:, to_rows, to_columns] = part[:, from_rows, from_columns]
    return {"y": latents["y"], "z": Latent(tf.constant(z))}

  def synthesis_windows(self) -> tiling.Windows:
    """See `TrainableCodec.synthesis_windows`."""
    return {"y": self.synthesis}

  @property
  def prior_variables(self) -> Sequence[tf.Variable]:
    """Of the factorized prior."""
    return self.prior.trainable_variables

  @property
  def decoder_variables(self) -> Sequence[tf.Variable]:
    """Of the synthesis; of the hyper-synthesis too where coding runs it in floating point."""
    hyper = () if self._exact.transform is not None else self.hyper_synthesis.variables
    return (*self.synthesis.variables, *hyper)

  def calibrate(self, x: tf.Tensor) -> None:
    """Fits the hyperprior to the latents of `x`, where the config asks for it.

    The hyper-latents start as local contrasts where their transforms are known to
    `common.hyper_init`; other hyper-syntheses start at each channel's own mean and scale.
    """
    if not self.calibration_images:
      return
    y = self.infer(x)["y"].loc.numpy()
    if hyper_init.is_known(self.hyper_analysis, self.hyper_synthesis):
      hyper_init.initialise(self.hyper_analysis, self.hyper_synthesis, y)
    else:
      last = self.hyper_synthesis
      while isinstance(last, Sequential):
        last = last.layers[-1]
      spread = np.maximum(np.std(y, axis=(0, 1, 2)), 0.1)
      last.kernel.assign(_INITIAL_HYPER_GAIN * last.kernel)
      last.bias.assign(np.concatenate([np.mean(y, axis=(0, 1, 2)), np.log(spread)]))
    z = self.hyper_analysis(tf.constant(y)).numpy().reshape(-1, self.prior.channels)
    self.prior.calibrate(np.median(z, axis=0), np.std(z, axis=0))

  def rescale(self, factor: float) -> None:
    """See `TrainableCodec.rescale`. The hyper-latents stay as they are."""
    ones = np.ones(self.analysis.out_channels)
    rescale.multiply_outputs(self.analysis, factor * ones)
    rescale.divide_inputs(self.synthesis, factor)
    rescale.divide_inputs(self.hyper_analysis, factor)
    rescale.multiply_outputs(self.hyper_synthesis, np.concatenate([factor * ones, ones]))
    rescale.shift_outputs(self.hyper_synthesis, np.concatenate([0.0 * ones, np.log(factor) * ones]))

  def derive_coding(self) -> dict[str, np.ndarray]:
    """See `TrainableCodec.derive_coding`."""
    derived = {f"z/{key}": value for key, value in self.prior.derive().items()}
    derived |= {f"y/{key}": value for key, value in entropy.gaussian_tables().arrays().items()}
    if self._exact.transform is not None:
      # Means as they are; log scales as row numbers of the tables.
      ones = np.ones(self.analysis.out_channels)
      per_row = 1.0 / entropy.LOG_SCALE_STEP
      derived |= self._exact.transform.derive(
        gain=np.concatenate([ones, per_row * ones]),
        shift=np.concatenate([0.0 * ones, -entropy.LOG_SCALE_MIN * per_row * ones]),
        offset=derived["z/offset"],
      )
    return derived

  def use_coding(self, derived: Mapping[str, np.ndarray]) -> None:
    """See `TrainableCodec.use_coding`."""
    self.prior.use(_below(derived, "z/"))
    self.conditional.use(_below(derived, "y/"))
    if self._exact.transform is not None:
      self._exact.transform.use(derived)

  def _conditions(self, z_symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What y is coded with: means, float32, and rows of the tables, uint8; both y's shape."""
    factor = self.hyper_analysis.downsample
    shape = (z_symbols.shape[0], *(factor * s for s in z_symbols.shape[1:3]))
    shape = (*shape, self.analysis.out_channels)
    if shape[0] > 1 and math.prod(shape) > _HYPER_VALUES_AT_ONCE:
      # One after the other, for the memory.
      alone = [self._conditions(z_symbols[i : i + 1]) for i in range(shape[0])]
      return np.concatenate([m for m, _ in alone]), np.concatenate([r for _, r in alone])
    mean, rows = np.empty(shape, np.float32), np.empty(shape, np.uint8)
    for (to_rows, to_columns), (source_rows, source_columns), own in self._hyper_tiles(shape):
      part = self._conditions_of(z_symbols[:, source_rows, source_columns])
      mean[:, to_rows, to_columns], rows[:, to_rows, to_columns] = (p[own] for p in part)
    return mean, rows

  def _hyper_tiles(self, shape: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """Tiles of y's grid: where each lies in y, what it needs of z, and its own part of that."""
    _, height, width, channels = shape  # Not by the batch: alone an image has the same tiles.
    scale = self.hyper_synthesis.upsample
    at_once = max(1, _HYPER_VALUES_AT_ONCE // channels)
    for down, across in tiling.tiles((height, width), [self.hyper_synthesis], at_once):
      (to_rows, from_rows), (to_columns, from_columns) = down.own(1), across.own(1)
      yield (
        (to_rows, to_columns),
        (down.source(scale), across.source(scale)),
        (slice(None), from_rows, from_columns),
      )

  def _conditions_of(self, z_symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`_conditions`, all at once."""
    if self._exact.transform is None:
      parameters = self.graph("hyper_synthesis")(self.prior.values(z_symbols)).numpy()
      mean, log_scale = np.split(np.nan_to_num(parameters), 2, axis=-1)
      rows = np.floor((log_scale - entropy.LOG_SCALE_MIN) / entropy.LOG_SCALE_STEP + 0.5)
      return mean, _as_rows(rows)
    one = 1 << exact.FRACTION_BITS
    parameters = self._exact.transform(tf.constant(z_symbols)).numpy()
    means, numbers = np.split(parameters, 2, axis=-1)  # int32.
    rows = (numbers + one // 2) >> exact.FRACTION_BITS
    return means * np.float32(1 / one), _as_rows(rows)

  def ideal_bits(self, latents: Latents) -> float:
    """See `TrainableCodec.ideal_bits`; tile by tile."""
    y = latents["y"].loc
    z = tf.round(latents["z"].loc - self.prior.offset) + self.prior.offset
    total = sum(float(tf.reduce_sum(self.prior.bits(z[:, band]))) for band in rd.bands(z.shape))
    for (to_rows, to_columns), (source_rows, source_columns), own in self._hyper_tiles(y.shape):
      parameters = self.hyper_synthesis(z[:, source_rows, source_columns])[own]
      mean, log_scale = tf.split(parameters, 2, axis=-1)
      rounded = tf.round(y[:, to_rows, to_columns] - mean) + mean
      total += float(tf.reduce_sum(self.conditional.bits(rounded, mean, log_scale)))
    return total

  def rounded(self, latents: Latents) -> dict[str, tf.Tensor]:
    """See `TrainableCodec.rounded`."""
    mean = self._conditions(self.prior.symbols(latents["z"].loc))[0]
    return {"y": _values(entropy.round_around(latents["y"].loc, mean), mean)}

  def pack(self, latents: Latents, size: tuple[int, int]) -> bytes:
    """See `TrainableCodec.pack`."""
    z = self.prior.symbols(latents["z"].loc)
    mean, rows = self._conditions(z)
    y = entropy.round_around(latents["y"].loc, mean)
    return bitstream.write(
      bitstream.Bitstream(
        family=FAMILY,
        fingerprint=self.fingerprint,
        height=size[0],
        width=size[1],
        sections=(
          entropy.encode(self.prior.tables, z),
          entropy.encode(self.conditional.tables, y, rows),
        ),
        symbols_crc=entropy.symbols_crc(y, entropy.symbols_crc(z)),
      )
    )

  def unpack(self, data: bytes) -> tuple[dict[str, tf.Tensor], tuple[int, int]]:
    """See `TrainableCodec.unpack`."""
    stream = bitstream.read(data)
    bitstream.check_model(stream, FAMILY, self.fingerprint)
    if len(stream.sections) != 2:
      raise bitstream.BitstreamError(
        f"{len(stream.sections)} sections; a {FAMILY} file has two: damaged or hostile."
      )
    height, width = rd.latent_grid(self, (stream.height, stream.width))
    z = entropy.decode(
      self.prior.tables, stream.sections[0], (1, height, width, self.prior.channels)
    )
    factor = self.hyper_analysis.downsample
    shape = (1, height * factor, width * factor, self.analysis.out_channels)
    mean, rows = self._conditions(z)
    try:
      y = entropy.decode(self.conditional.tables, stream.sections[1], shape, rows)
    except bitstream.BitstreamError as e:
      raise bitstream.BitstreamError(f"{e}{self._float_hint}") from e
    if entropy.symbols_crc(y, entropy.symbols_crc(z)) != stream.symbols_crc:
      raise bitstream.BitstreamError(
        "The decoded symbols are not those that were encoded: the tables differ or the file is "
        f"damaged.{self._float_hint}"
      )
    return {"y": _values(y, mean)}, (stream.height, stream.width)

  @property
  def _float_hint(self) -> str:
    """What else may be wrong with a file that seems damaged."""
    if self._exact.transform is not None:
      return ""
    return (
      " Or this machine, with this number of threads, rounds otherwise than the encoder's: the "
      "model codes with exact_coding=False."
    )

  def stages(self) -> dict[str, Stage]:
    """f, f_h, g_h and g."""
    scale = self.analysis.downsample
    return {
      "f": Stage(self.analysis, 1),
      "f_h": Stage(self.hyper_analysis, scale),
      "g_h": Stage(self.hyper_synthesis, self.downsample_factor),
      "g": Stage(self.synthesis, scale),
    }


# Values of y whose means and scales are computed at once, with all that they need: a part of the
# format, for the scales of integers follow from what is computed at once.
_HYPER_VALUES_AT_ONCE = 1 << 22


# Of the last kernel of a hyper-synthesis that starts at each channel's own mean and scale.
_INITIAL_HYPER_GAIN = 0.1


class _Hidden:
  """Keeps the integer transform from tf.Module, which would take its variables for the model's."""

  def __init__(self, transform: Any):
    self.transform = transform


def _values(symbols: np.ndarray, mean: np.ndarray) -> tf.Tensor:
  """What rounding y - mean to `symbols` makes of y, float32; in the place of `mean`."""
  for row in range(mean.shape[1]):
    mean[:, row] += symbols[:, row]
  return tf.constant(mean)


def _as_rows(rows: np.ndarray) -> np.ndarray:
  return np.clip(rows, 0, entropy.NUM_SCALES - 1).astype(np.uint8)


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


def build(model_config: Mapping[str, Any]) -> HyperpriorCodec:
  """An untrained codec from `model_config`; mshyper/configs/mbt2018.py explains its fields.

  Raises:
    ValueError, TypeError: A value that no codec can be built from; the message lists the known.
  """
  quantizers.make_quantizer(model_config["quantizer"])
  dct_init.check(model_config["init"])
  codec = HyperpriorCodec(
    analysis=transforms.from_config(model_config["analysis"]),
    synthesis=transforms.from_config(model_config["synthesis"]),
    hyper_analysis=transforms.from_config(model_config["hyper_analysis"]),
    hyper_synthesis=transforms.from_config(model_config["hyper_synthesis"]),
    offset_heuristic=model_config["quantizer"] != "mixedq",
    prior_init_scale=model_config["prior_init_scale"],
    fit_to_data=model_config["init"] == "dct",
    exact_coding=model_config["exact_coding"],
  )
  if model_config["init"] == "dct":
    dct_init.initialise(codec.analysis, codec.synthesis, dct_init.step(model_config["rd_lambda"]))
  return codec
