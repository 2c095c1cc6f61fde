"""The factorized-prior codec (Ballé, Laparra and Simoncelli 2017): one latent, one section."""

from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import tensorflow as tf

from common import bitstream, dct_init, entropy, quantizers, rd, rescale, tiling, transforms
from common.codec import Coded, Latent, Latents, Quantizer, TrainableCodec
from common.profiling import Stage
from factorized import vae

FAMILY = "factorized"


class FactorizedCodec(TrainableCodec):
  """Analysis, a density a channel, synthesis.

  Attributes:
    analysis: [B, H, W, 3] in -0.5..0.5 to the latent [B, H/s, W/s, C].
    synthesis: The way back.
    prior: Of the latent.
  """

  def __init__(
    self,
    analysis: transforms.Sequential,
    synthesis: transforms.Sequential,
    offset_heuristic: bool = True,
    prior_init_scale: float = 10.0,
    fit_prior_to_data: bool = False,
  ):
    """Raises ValueError if the transforms do not fit each other."""
    super().__init__(name=FAMILY)
    transforms.check_pair(analysis, synthesis)
    self.calibration_images = int(fit_prior_to_data)
    self.analysis = analysis
    self.synthesis = synthesis
    self.prior = entropy.FactorizedPrior(
      analysis.out_channels, init_scale=prior_init_scale, offset_heuristic=offset_heuristic
    )

  @property
  def downsample_factor(self) -> int:
    """Of the analysis."""
    return self.analysis.downsample

  def infer(self, x: tf.Tensor) -> Latents:
    """See `TrainableCodec.infer`."""
    return {"y": Latent(self.analysis(x / 255.0 - 0.5))}

  def code(self, latents: Latents, quantizer: Quantizer) -> Coded:
    """See `TrainableCodec.code`."""
    y = quantizer("y", latents["y"].loc, self.prior.offset)
    return Coded(decode={"y": y.decode}, bits={"y": self.prior.bits(y.rate)})

  def synthesize(self, decode: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """See `TrainableCodec.synthesize`."""
    return (self.synthesis(decode["y"]) + 0.5) * 255.0

  def analysis_windows(self) -> tiling.Windows:
    """See `TrainableCodec.analysis_windows`."""
    return {"y": self.analysis}

  def synthesis_windows(self) -> tiling.Windows:
    """See `TrainableCodec.synthesis_windows`."""
    return {"y": self.synthesis}

  @property
  def prior_variables(self) -> Sequence[tf.Variable]:
    """Of the factorized prior."""
    return self.prior.trainable_variables

  def calibrate(self, x: tf.Tensor) -> None:
    """Fits the prior's initial densities to the latents of `x`, where the config asks for it."""
    if self.calibration_images:
      y = self.infer(x)["y"].loc.numpy().reshape(-1, self.prior.channels)
      self.prior.calibrate(np.median(y, axis=0), np.std(y, axis=0))

  def rescale(self, factor: float) -> None:
    """See `TrainableCodec.rescale`."""
    rescale.multiply_outputs(self.analysis, np.full(self.analysis.out_channels, factor))
    rescale.divide_inputs(self.synthesis, factor)
    self.prior.stretch(factor)

  @property
  def decoder_variables(self) -> Sequence[tf.Variable]:
    """Of the synthesis."""
    return self.synthesis.variables

  def derive_coding(self) -> dict[str, np.ndarray]:
    """See `TrainableCodec.derive_coding`."""
    return self.prior.derive()

  def use_coding(self, derived: Mapping[str, np.ndarray]) -> None:
    """See `TrainableCodec.use_coding`."""
    self.prior.use(derived)

  def rounded(self, latents: Latents) -> dict[str, tf.Tensor]:
    """See `TrainableCodec.rounded`."""
    return {"y": self.prior.values(self.prior.symbols(latents["y"].loc))}

  def ideal_bits(self, latents: Latents) -> float:
    """See `TrainableCodec.ideal_bits`; band by band."""
    y = latents["y"].loc
    total = 0.0
    for band in rd.bands(y.shape):
      total += super().ideal_bits({"y": Latent(y[:, band])})
    return total

  def pack(self, latents: Latents, size: tuple[int, int]) -> bytes:
    """See `TrainableCodec.pack`."""
    symbols = self.prior.symbols(latents["y"].loc)
    return bitstream.write(
      bitstream.Bitstream(
        family=FAMILY,
        fingerprint=self.fingerprint,
        height=size[0],
        width=size[1],
        sections=(entropy.encode(self.prior.tables, symbols),),
        symbols_crc=entropy.symbols_crc(symbols),
      )
    )

  def unpack(self, data: bytes) -> tuple[dict[str, tf.Tensor], tuple[int, int]]:
    """See `TrainableCodec.unpack`."""
    stream = bitstream.read(data)
    bitstream.check_model(stream, FAMILY, self.fingerprint)
    if len(stream.sections) != 1:
      raise bitstream.BitstreamError(
        f"{len(stream.sections)} sections; a {FAMILY} file has one: damaged or hostile."
      )
    height, width = rd.latent_grid(self, (stream.height, stream.width))
    shape = (1, height, width, self.prior.channels)
    symbols = entropy.decode(self.prior.tables, stream.sections[0], shape)
    if entropy.symbols_crc(symbols) != stream.symbols_crc:
      raise bitstream.BitstreamError(
        "The decoded symbols are not those that were encoded: the tables differ or the file is "
        "damaged."
      )
    return {"y": self.prior.values(symbols)}, (stream.height, stream.width)

  def stages(self) -> dict[str, Stage]:
    """f and g."""
    return {
      "f": Stage(self.analysis, 1),
      "g": Stage(self.synthesis, self.downsample_factor),
    }


def build(model_config: Mapping[str, Any]) -> Union[FactorizedCodec, vae.GaussianVAE]:
  """An untrained codec from `model_config`; factorized/configs/bls2017.py explains its fields.

  With a `likelihood_variance` it is the VAE of factorized/configs/bls2017_vae.py.

  Raises:
    ValueError, TypeError: A value that no codec can be built from; the message lists the known.
  """
  if "likelihood_variance" in model_config:
    return vae.build(model_config)
  if model_config["quantizer"] == "gnoise":
    raise ValueError("model_config.quantizer 'gnoise' is for VAEs, whose latents have a deviation.")
  quantizers.make_quantizer(model_config["quantizer"])
  dct_init.check(model_config["init"])
  codec = FactorizedCodec(
    transforms.from_config(model_config["analysis"]),
    transforms.from_config(model_config["synthesis"]),
    offset_heuristic=model_config["quantizer"] != "mixedq",
    prior_init_scale=model_config["prior_init_scale"],
    fit_prior_to_data=model_config["init"] == "dct",
  )
  if model_config["init"] == "dct":
    dct_init.initialise(codec.analysis, codec.synthesis, dct_init.step(model_config["rd_lambda"]))
  return codec
