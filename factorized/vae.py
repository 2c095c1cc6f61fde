"""A variational autoencoder with Gaussian posteriors, which is quantized after its training.

Yang, Bamler and Mandt 2020, "Variational Bayesian Quantization" (ICML, arXiv 2002.08158): the
encoder gives a mean and a variance for each latent. Training knows no quantization; the variance
says how finely a latent has to be coded (factorized/vbq.py).

    -ELBO = KL(q(z|x) || p(z)) + |x - g(z)|^2 / (2 v) + const,    pixels in 0..1

In bits per pixel that is `common.rd`'s loss, bpp + rd_lambda * MSE, with the divergence as the rate
and rd_lambda = 3 / (2 ln 2 * 255^2 * v) for a likelihood of variance v.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf
import tensorflow_compression as tfc

from common import bitstream, dct_init, entropy, rd, tiling, transforms
from common.codec import Coded, Latent, Latents, NotPreparedError, Quantizer, TrainableCodec
from common.profiling import Stage
from factorized import vbq
from factorized.vbq import posterior

FAMILY = "factorized"


def rd_lambda(likelihood_variance: float) -> float:
  """The weight of the MSE (0..255) beside bits per pixel that is the negative ELBO."""
  return 3 / (2 * math.log(2) * 255**2 * likelihood_variance)


class GaussianVAE(TrainableCodec):
  """Analysis to means and log variances, a prior a channel, synthesis.

  Files need a quantizer besides the weights, which comes from calibration pictures
  (`use_coding`); it codes at several rates, of which `rate_index` chooses one.

  Attributes:
    analysis: [B, H, W, 3] in -0.5..0.5 to [B, H/s, W/s, 2C]: means, then log variances.
    synthesis: From the latent [B, H/s, W/s, C].
    log_variance_bias: [C], added to the log variances: the analysis ends without a bias.
    prior: Of the latent, a density; None for the standard normal.
  """

  def __init__(
    self,
    analysis: transforms.Sequential,
    synthesis: transforms.Sequential,
    likelihood_variance: float,
    learned_prior: bool = False,
    fit_to_data: bool = False,
  ):
    """Raises ValueError if the transforms do not fit each other."""
    super().__init__(name=FAMILY)
    channels = synthesis.in_channels
    if analysis.downsample != synthesis.upsample or analysis.out_channels != 2 * channels:
      raise ValueError(
        f"The analysis shrinks by {analysis.downsample} and gives {analysis.out_channels} "
        f"channels, the synthesis grows by {synthesis.upsample} and takes {channels}: "
        "the analysis of a VAE gives twice the channels that its synthesis takes, means and log "
        "variances."
      )
    self._likelihood_variance = likelihood_variance
    self.calibration_images = 64 if fit_to_data else 0
    self.analysis = analysis
    self.synthesis = synthesis
    self.log_variance_bias = tf.Variable(tf.zeros([channels]), name="log_variance_bias")
    # About a logistic density with the deviation of the standard normal.
    self.prior = tfc.DeepFactorized((channels,), init_scale=0.5) if learned_prior else None
    self._coder: Optional[vbq.Coder] = None
    self._rate: Optional[int] = None

  @property
  def channels(self) -> int:
    """Of the latent."""
    return self.synthesis.in_channels

  @property
  def downsample_factor(self) -> int:
    """Of the analysis."""
    return self.analysis.downsample

  def infer(self, x: tf.Tensor) -> Latents:
    """See `TrainableCodec.infer`."""
    mean, log_variance = tf.split(self.analysis(x / 255.0 - 0.5), 2, axis=-1)
    return {"y": Latent(mean, 0.5 * (log_variance + self.log_variance_bias))}

  def code(self, latents: Latents, quantizer: Quantizer) -> Coded:
    """See `TrainableCodec.code`. The quantizer works in units of the posterior's deviation.

    The bits are the divergence of the posterior from the prior: its own bits back. For the
    standard normal it is exact, for a learned prior its cross-entropy is taken at the sample.
    """
    loc, log_scale = latents["y"]
    scale = tf.exp(log_scale)
    z = scale * quantizer("y", loc / scale, tf.zeros([self.channels])).decode
    if self.prior is None:
      nats = 0.5 * (tf.square(loc) + tf.square(scale) - 1.0) - log_scale
    else:
      nats = -self.prior.log_prob(z) - log_scale - 0.5 * math.log(2 * math.pi * math.e)
    return Coded(decode={"y": z}, bits={"y": tf.reduce_sum(nats, axis=[1, 2, 3]) / math.log(2)})

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
    """Of the learned prior; none for the standard normal."""
    return () if self.prior is None else self.prior.trainable_variables

  def calibrate(self, x: tf.Tensor) -> None:
    """Where the config starts from a DCT: scales its latents to the prior, by the data `x`.

    The synthesis gives a coefficient c of variance s^2 as s z; the posterior of z in that model has
    the mean w c / s and the variance 1 - w, where w = s^2 / (s^2 + v).
    """
    if not self.calibration_images:
      return
    coefficients = self.analysis(x / 255.0 - 0.5)[..., : self.channels].numpy()
    spread = np.maximum(np.std(coefficients.reshape(-1, self.channels), axis=0), 1e-4)
    share = spread**2 / (spread**2 + self._likelihood_variance)
    last, first = self.analysis.layers[-1].kernel, self.synthesis.layers[0].kernel
    means = last.numpy()[..., : self.channels] * share / spread
    last.assign(np.concatenate([means, np.zeros_like(means)], axis=-1))
    first.assign(first.numpy() * spread[:, None])
    self.log_variance_bias.assign(np.log(self._likelihood_variance / spread**2 * share))

  @property
  def decoder_variables(self) -> Sequence[tf.Variable]:
    """Of the synthesis."""
    return self.synthesis.variables

  # --- Files -------------------------------------------------------------------------------------

  @property
  def coder(self) -> vbq.Coder:
    """The quantizer and its tables.

    Raises:
      NotPreparedError: There are none.
    """
    if self._coder is None:
      raise NotPreparedError(
        "This model is a VAE: its files need a quantizer, made from calibration pictures. Make it: "
        f"python -m factorized.vbq_eval {self.named_by} --calibration DATASET --dataset DATASET"
      )
    return self._coder

  @property
  def fingerprint(self) -> bytes:
    """See `TrainableCodec.fingerprint`."""
    assert self.coder is not None  # Else NotPreparedError.
    return super().fingerprint

  @property
  def num_rates(self) -> int:
    """See `TrainableCodec.num_rates`."""
    return self.coder.num_rates

  @property
  def rate_index(self) -> int:
    """See `TrainableCodec.rate_index`."""
    return self.coder.default_rate if self._rate is None else self._rate

  @rate_index.setter
  def rate_index(self, value: int) -> None:
    if not 0 <= value < self.num_rates:
      raise ValueError(f"There is no rate {value}: this model has 0 to {self.num_rates - 1}.")
    self._rate = value

  def derive_coding(self) -> dict[str, np.ndarray]:
    """The quantizer's tables; empty where there are none: weights alone do not give them."""
    return {} if self._coder is None else self._coder.arrays()

  def use_coding(self, derived: Mapping[str, np.ndarray]) -> None:
    """See `TrainableCodec.use_coding`; nothing takes the quantizer away."""
    coder = vbq.Coder.from_arrays(derived) if derived else None
    if coder is not None and coder.channels != self.channels:
      raise ValueError(f"The tables are of {coder.channels} channels, the VAE has {self.channels}.")
    self._coder = coder
    self._rate = None

  def prepare_untrained(self, image: np.ndarray) -> None:
    """See `TrainableCodec.prepare_untrained`: with a VBQ quantizer of this picture."""
    self.prepare(vbq.build_vbq(vbq.samples_of(self, [image])).arrays())

  def symbols(self, latents: Latents) -> np.ndarray:
    """The indices of the code points for the latents of a batch: int32 [B, h, w, C]."""
    loc, log_scale = latents["y"]
    assert log_scale is not None, "A VAE's encoder gives a scale."
    symbols = np.empty(loc.shape, np.int32)
    for band in rd.bands(loc.shape):
      part = {"y": Latent(loc[:, band], log_scale[:, band])}
      symbols[:, band] = self.coder.quantize(*posterior(part), self.rate_index)
    return symbols

  def rounded(self, latents: Latents) -> dict[str, tf.Tensor]:
    """See `TrainableCodec.rounded`."""
    return {"y": tf.constant(self.coder.values(self.symbols(latents), self.rate_index))}

  def ideal_bits(self, latents: Latents) -> float:
    """See `TrainableCodec.ideal_bits`: by the tables, not by the divergence that was trained."""
    return self.coder.bits(self.symbols(latents), self.rate_index)

  def symbols_of_all_rates(self, latents: Latents) -> list[np.ndarray]:
    """`symbols` at every rate, for little more than the cost of a few; uint16: there are many."""
    loc, log_scale = latents["y"]
    assert log_scale is not None, "A VAE's encoder gives a scale."
    symbols = [np.empty(loc.shape, np.uint16) for _ in range(self.num_rates)]
    for band in rd.bands(loc.shape):
      part = {"y": Latent(loc[:, band], log_scale[:, band])}
      for of_rate, found in zip(symbols, self.coder.quantize_all(*posterior(part))):
        of_rate[:, band] = found
    return symbols

  def pack(self, latents: Latents, size: tuple[int, int]) -> bytes:
    """See `TrainableCodec.pack`."""
    return self.pack_symbols(self.symbols(latents), self.rate_index, size)

  def pack_symbols(self, symbols: np.ndarray, rate: int, size: tuple[int, int]) -> bytes:
    """A file of code points. Its section: number of the rate (varint), the coded ranks."""
    return bitstream.write(
      bitstream.Bitstream(
        family=FAMILY,
        fingerprint=self.fingerprint,
        height=size[0],
        width=size[1],
        sections=(bitstream.varint(rate) + self.coder.encode(symbols, rate),),
        symbols_crc=entropy.symbols_crc(symbols),
      )
    )

  def unpack(self, data: bytes) -> tuple[dict[str, tf.Tensor], tuple[int, int]]:
    """See `TrainableCodec.unpack`; the rate is the file's, whatever `rate_index` is."""
    stream = bitstream.read(data)
    bitstream.check_model(stream, FAMILY, self.fingerprint)
    if len(stream.sections) != 1:
      raise bitstream.BitstreamError(
        f"{len(stream.sections)} sections; a file of a VAE has one: damaged or hostile."
      )
    cursor = bitstream.Cursor(stream.sections[0])
    rate = cursor.varint("number of the rate")
    if rate >= self.num_rates:
      raise bitstream.BitstreamError(
        f"Rate {rate} of {self.num_rates} (0 is the first): damaged or hostile."
      )
    height, width = rd.latent_grid(self, (stream.height, stream.width))
    symbols = self.coder.decode(cursor.rest(), (1, height, width, self.channels), rate)
    if entropy.symbols_crc(symbols) != stream.symbols_crc:
      raise bitstream.BitstreamError(
        "The decoded symbols are not those that were encoded: the tables differ or the file is "
        "damaged."
      )
    values = tf.constant(self.coder.values(symbols, rate))
    return {"y": values}, (stream.height, stream.width)

  def stages(self) -> dict[str, Stage]:
    """f and g."""
    return {
      "f": Stage(self.analysis, 1),
      "g": Stage(self.synthesis, self.downsample_factor),
    }


def build(model_config: Mapping[str, Any]) -> GaussianVAE:
  """An untrained VAE from `model_config`; factorized/configs/bls2017_vae.py explains its fields.

  Raises:
    ValueError, TypeError: A value that no codec can be built from; the message lists the known.
  """
  dct_init.check(model_config["init"])
  variance = float(model_config["likelihood_variance"])
  if not (math.isfinite(variance) and variance > 0):
    raise ValueError(f"model_config.likelihood_variance is {variance}; it must be above 0.")
  if model_config["quantizer"] != "gnoise":
    raise ValueError(
      f"model_config.quantizer {model_config['quantizer']!r}: a VAE trains with 'gnoise', one "
      "sample of its posterior."
    )
  if not math.isclose(model_config["rd_lambda"], rd_lambda(variance), rel_tol=1e-3):
    raise ValueError(
      f"model_config.rd_lambda is {model_config['rd_lambda']}; with a likelihood variance of "
      f"{variance} it is {rd_lambda(variance):.6g}. Set model_config.likelihood_variance: "
      "rd_lambda follows."
    )
  codec = GaussianVAE(
    transforms.from_config(model_config["analysis"]),
    transforms.from_config(model_config["synthesis"]),
    likelihood_variance=variance,
    learned_prior=bool(model_config["learned_prior"]),
    fit_to_data=model_config["init"] == "dct",
  )
  if model_config["init"] == "dct":
    # Orthonormal coefficients of pixels in 0..1; `calibrate` scales them.
    dct_init.initialise(codec.analysis, codec.synthesis, step=255.0)
  return codec
