"""The contract that every codec fulfils, and the types that travel through it.

Images at the interface are uint8 [H, W, 3]; inside, batches are float32 [B, H, W, 3] in 0..255.
"""

import abc
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Protocol

import numpy as np
import tensorflow as tf

from common import tiling
from common.bitstream import FINGERPRINT_BYTES
from common.profiling import Stage

if TYPE_CHECKING:
  from common.rd import RDTerms


class NotPreparedError(RuntimeError):
  """The codec cannot code yet; the message says what it lacks and how to get it."""


class Latent(NamedTuple):
  """One latent tensor as the encoder infers it.

  Attributes:
    loc: [B, h, w, C] float32, the (mean of the) latent before quantization.
    log_scale: [B, h, w, C] float32, log standard deviation of its posterior; None where the
      encoder is deterministic.
  """

  loc: tf.Tensor
  log_scale: Optional[tf.Tensor] = None


# By name, "y" and, with a hyperprior, "z".
Latents = dict[str, Latent]


class Quantized(NamedTuple):
  """What a quantizer makes of a latent; both [B, h, w, C] float32.

  Attributes:
    rate: The prior's likelihood is evaluated here.
    decode: The synthesis gets this.
  """

  rate: tf.Tensor
  decode: tf.Tensor


class Quantizer(Protocol):
  """Quantizes the latent `name` around `offset` (a prior's mean or quantization offset, [C] or
  the latent's shape): grid points are the integers plus the offset."""

  def __call__(self, name: str, loc: tf.Tensor, offset: tf.Tensor) -> Quantized: ...  # noqa: D102


class Coded(NamedTuple):
  """Latents after quantization, and what they cost.

  Attributes:
    decode: What the synthesis gets, by latent name.
    bits: Negative log2 likelihood by latent name, each [B] float32: one number an image.
  """

  decode: dict[str, tf.Tensor]
  bits: dict[str, tf.Tensor]


class Codec(abc.ABC):
  """Turns a picture into bytes, and those bytes alone back into a picture.

  Attributes:
    file_suffix: What its files are called.
  """

  file_suffix: str = ".ntc"

  @abc.abstractmethod
  def compress(self, image: np.ndarray) -> bytes:
    """`image`: uint8 [H, W, 3], any size from 1x1. Returns the whole file."""

  @abc.abstractmethod
  def decompress(self, data: bytes) -> np.ndarray:
    """Returns uint8 [H, W, 3].

    Raises:
      common.bitstream.BitstreamError: The data is damaged, truncated, hostile, or was made by
        another model. Never a wrong picture.
    """


class _Graphs:
  """Holds compiled functions where neither checkpoints nor tf.Module look for variables."""

  def __init__(self) -> None:
    self.functions: dict[str, Callable[..., Any]] = {}


class TrainableCodec(Codec, tf.Module):
  """A codec with an encoder, a prior and a decoder that are trained.

  A subclass gives the abstract methods; `common.rd` combines them, `compress` and `decompress`
  follow.

  Attributes:
    decoder_tolerance: Mean absolute difference, 0..255, that is allowed between the decoded picture
      and the encoder's own reconstruction: more than 0 where the decoder is not ours.
  """

  decoder_tolerance: float = 0.0

  @property
  @abc.abstractmethod
  def downsample_factor(self) -> int:
    """Padded image sides are multiples of this; derived from the transforms."""

  @abc.abstractmethod
  def infer(self, x: tf.Tensor) -> Latents:
    """`x`: [B, H, W, 3] float32 in 0..255, sides multiples of `downsample_factor`."""

  @abc.abstractmethod
  def code(self, latents: Latents, quantizer: Quantizer) -> Coded:
    """Quantizes the latents and evaluates the prior. Differentiable in both."""

  @abc.abstractmethod
  def synthesize(self, decode: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """From `Coded.decode` to pixels: [B, H, W, 3] float32, about 0..255, not rounded."""

  @property
  @abc.abstractmethod
  def decoder_variables(self) -> Sequence[tf.Variable]:
    """What `synthesize` computes with; part of the fingerprint."""

  @abc.abstractmethod
  def derive_coding(self) -> dict[str, np.ndarray]:
    """All that coding derives from the weights as they are now: tables, offsets, integer kernels.

    Decoding reads these alone: a machine whose logarithm rounds otherwise can be given them.
    """

  @abc.abstractmethod
  def use_coding(self, derived: Mapping[str, np.ndarray]) -> None:
    """Sets what `derive_coding` gave, here or elsewhere.

    Raises:
      ValueError, KeyError: It is not of such a codec.
    """

  @abc.abstractmethod
  def rounded(self, latents: Latents) -> dict[str, tf.Tensor]:
    """What `unpack` gives back for the files of these latents; any batch."""

  @abc.abstractmethod
  def pack(self, latents: Latents, size: tuple[int, int]) -> bytes:
    """Rounds the latents of one image (B = 1) of `size` (height, width) and codes them: a file."""

  @abc.abstractmethod
  def unpack(self, data: bytes) -> tuple[dict[str, tf.Tensor], tuple[int, int]]:
    """The inverse of `pack`: exactly the values that rounding gave, and (height, width)."""

  def ideal_bits(self, latents: Latents) -> float:
    """What coding the rounded latents of one image costs by its probabilities, without a header."""
    from common import quantizers  # Lazy: quantizers imports this module.

    bits = self.code(latents, quantizers.make_quantizer("round")()).bits
    return float(sum(float(b[0]) for b in bits.values()))

  @property
  def num_rates(self) -> int:
    """At how many rates the model codes; rate 0 makes the fewest bytes."""
    return 1

  @property
  def rate_index(self) -> int:
    """Of the files that `pack` writes: 0 to num_rates - 1. Decoding needs none.

    Setting it raises ValueError where there is no such rate.
    """
    return 0

  @rate_index.setter
  def rate_index(self, value: int) -> None:
    if value != 0:
      raise ValueError(f"There is no rate {value}: this model codes at one rate, 0.")

  @abc.abstractmethod
  def stages(self) -> dict[str, Stage]:
    """Named stages ("f" analysis, "g" synthesis, ...) for `common.profiling`."""

  def prepare(self, derived: Optional[Mapping[str, np.ndarray]] = None) -> None:
    """Builds the coding tables from the weights as they are now; call it after a restore.

    `pack`, `unpack`, `rounded` and rounding quantizers need it; training does not.

    Args:
      derived: The tables instead, from `derive_coding` of a codec with the same weights.
    """
    self._fingerprint = None  # Half of a state must not pass for the one before.
    derived = self.derive_coding() if derived is None else derived
    self.use_coding(derived)
    digest = hashlib.sha256()
    for name in sorted(derived):
      digest.update(f"{name} {derived[name].dtype} {derived[name].shape} ".encode())
      digest.update(np.ascontiguousarray(derived[name]).tobytes())
    for variable in self.decoder_variables:
      digest.update(variable.numpy().tobytes())
    self._fingerprint = digest.digest()[:FINGERPRINT_BYTES]

  def analysis_windows(self) -> Optional[tiling.Windows]:
    """Which pixels each latent depends on, by its name, so that large pictures are inferred in
    tiles; None where they cannot be: they are refused then."""
    return None

  def infer_tile(self, x: tf.Tensor) -> Latents:
    """`infer` of a part of a large picture: the latents that `analysis_windows` names."""
    return self.infer(x)

  def complete(self, latents: Latents) -> Latents:
    """All latents of a large picture, from those of `infer_tile` put together."""
    return latents

  def synthesis_windows(self) -> Optional[tiling.Windows]:
    """Which values of each of `synthesize`'s inputs a pixel depends on, by name; None as above."""
    return None

  @property
  def prior_variables(self) -> Sequence[tf.Variable]:
    """The trainable variables of the entropy model: they may get a learning rate of their own."""
    return ()

  def objective(
    self, x: tf.Tensor, rd_lambda: tf.Tensor, quantizer: Quantizer, seed: Optional[tf.Tensor] = None
  ) -> "RDTerms":
    """What training minimises; `rd.rd_terms` unless a codec has terms of its own.

    Args:
      x: [B, H, W, 3] float32 in 0..255.
      rd_lambda: Of the loss.
      quantizer: Of the training, or rounding in a validation.
      seed: int32 [2], (seed, step) of a training step, which alone determines what is drawn; None
        in a validation.
    """
    del seed
    from common import rd  # Lazy: rd imports this module.

    return rd.rd_terms(self, x, rd_lambda, quantizer)

  def search_file(self, image: np.ndarray, report: Callable[[float, str], None]) -> Optional[bytes]:
    """A file found by a search of the codec's own for this picture: method "search" of itinf.

    Args:
      image: uint8 [H, W, 3].
      report: Called with the share that is done, 0 to 1, and a short text; may raise to stop.

    Returns None where the codec has no such search.
    """
    del image, report
    return None

  def rescale(self, factor: float) -> None:
    """Multiplies the latents, and fits the other weights to that (`common.rescale`): without
    quantization the pictures and the relative densities stay as they are.

    Raises:
      ValueError: The model has a layer that cannot absorb the factor, or no grid to be finer.
    """
    raise ValueError(
      f"{type(self).__name__} cannot rescale its latents: set "
      "train_eval_config.warm_start_rescale=False."
    )

  calibration_images = 0  # How many crops `calibrate` wants at least; 0: it does nothing.

  def calibrate(self, x: tf.Tensor) -> None:
    """Fits initial values to data, once, before the first step; by default nothing.

    Called where `calibration_images` is not 0: a codec that has one sets the other.

    `x`: [B, H, W, 3] float32 in 0..255, training crops.
    """

  def prepare_untrained(self, image: np.ndarray) -> None:
    """`prepare` for a profile of initial weights; what else coding needs is made from a picture.

    `image`: uint8 [H, W, 3].
    """
    del image
    self.prepare()

  # Its run and checkpoint on a command line, for messages; `eval_lib.load_codec` sets it.
  named_by = "--workdir RUN"

  @property
  def fingerprint(self) -> bytes:
    """Identifies what decodes this codec's files: synthesis weights and coding tables."""
    if self._fingerprint is None:
      raise NotPreparedError("No coding tables yet: call prepare() after building or restoring.")
    return self._fingerprint

  _fingerprint: Optional[bytes] = None

  def graph(self, method: str) -> Callable[..., Any]:
    """`infer`, `infer_tile` or `synthesize`, compiled once for images of every size."""
    graphs = self.__dict__.setdefault("_graphs", _Graphs())
    if method not in graphs.functions:
      function = tf.function(getattr(self, method), autograph=False)

      def call(argument: Any) -> Any:
        # One trace for every size: batch, height and width stay open, the channels are fixed.
        key = f"{method} trace"
        if key not in graphs.functions:
          spec = tf.nest.map_structure(
            lambda t: tf.TensorSpec([None, None, None, t.shape[3]], t.dtype), argument
          )
          graphs.functions[key] = function.get_concrete_function(spec)
        return graphs.functions[key](argument)

      graphs.functions[method] = call
    return graphs.functions[method]

  def latents_of(self, image: np.ndarray) -> Latents:
    """What `compress` packs for a picture, uint8 [H, W, 3]: `infer(pad(image))`, unless an encoder
    searches further."""
    from common import rd  # Lazy: rd imports this module.

    return rd.infer_image(self, image)

  def compress(self, image: np.ndarray) -> bytes:
    """See `Codec.compress`: `pack(latents_of(image))`."""
    return self.pack(self.latents_of(image), (image.shape[0], image.shape[1]))

  def decompress(self, data: bytes) -> np.ndarray:
    """See `Codec.decompress`."""
    from common import rd  # Lazy: rd imports this module.

    decode, size = self.unpack(data)
    return rd.reconstruct(self, decode, size)


# What an entry point hands to the loops: from `model_config` to an untrained codec.
BuildCodec = Callable[[Mapping], TrainableCodec]
