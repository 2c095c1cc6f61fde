"""The learned JPEG (Strümpler, Yang and Timofte 2020): its encoder is learned, its files are JPEG.

Latents are the DCT coefficients divided by the tables: "y", "cb", "cr", each [B, h, w, 64] in
zigzag order. A file is a baseline .jpg with nothing around it, `decompress` is Pillow's decoder.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import tensorflow as tf

from common import bitstream, lpips, quantizers, rd, tiling
from common.codec import Coded, Latent, Latents, Quantizer, TrainableCodec
from common.layers import Layer
from common.profiling import Stage
from ljpeg import dct, jpeg_file, rdo
from ljpeg import tables as tables_lib
from ljpeg.attention import Attention
from ljpeg.pre_edit import PreEdit
from ljpeg.rate import Rate, RunLengthRate, make_rate

FAMILY = "ljpeg"

LATENTS = ("y", "cb", "cr")
COEFFICIENTS = ("round", "rdo")
SEARCHES = ("", *rdo.EFFORTS)
LOSSES = ("rate", "weights")


class LearnedJpeg(TrainableCodec):
  """Tables, a rate model, and perhaps networks that act before the rounding.

  Attributes:
    tables: The two tables.
    rate: What coefficients cost, for training and for the choice of coefficients.
    attention: Factors on the divided coefficients, or None.
    pre_edit: Edits the picture, or None.
  """

  file_suffix = ".jpg"
  downsample_factor = 1  # `infer` repeats edges to the block grid itself.
  calibration_images = 8

  def __init__(
    self,
    tables: dct.Tables,
    rate: Rate,
    rd_lambda: float,
    subsampling: str = "4:4:4",
    rounding: str = "exact",
    coefficients: str = "round",
    loss: str = "rate",
    lpips_weight: float = 0.0,
    total_weight_regularizer: float = 0.0,
    attention: Optional[Attention] = None,
    attention_weight: float = 0.0,
    pre_edit: Optional[PreEdit] = None,
    train_qualities: Optional[tuple[int, int]] = None,
    search: str = "",
  ):
    """Makes the codec; ljpeg/configs/ljpeg.py explains the options.

    Raises:
      ValueError: A choice that does not exist, or two that do not go together.
    """
    super().__init__(name=FAMILY)
    for key, value, known in (
      ("subsampling", subsampling, dct.SUBSAMPLINGS),
      ("rounding", rounding, dct.ROUNDINGS),
      ("coefficients", coefficients, COEFFICIENTS),
      ("loss", loss, LOSSES),
      ("search", search, SEARCHES),
    ):
      if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"Unknown model_config.{key} {value!r}. Known: {names}.")
    if coefficients == "rdo" and not isinstance(rate, RunLengthRate):
      raise ValueError("model_config.coefficients='rdo' needs model_config.rate='runs'.")
    if search and (attention is not None or pre_edit is not None):
      raise ValueError(
        "model_config.search looks for the coefficients that are closest to the picture: it does "
        "not go with attention or pre_edit, which choose others. Use ''."
      )
    self.tables = tables
    self.rate = rate
    self.attention = attention
    self.pre_edit = pre_edit
    self._rd_lambda = float(rd_lambda)
    self._subsampling = subsampling
    self._rounding, self._coefficients = rounding, coefficients
    # Decoders compute in integers. On photographs 0.04 at most was measured, and 0.33 with 4:2:0,
    # whose interpolation they round.
    self.decoder_tolerance = 0.1 if subsampling == "4:4:4" else 0.5
    self._loss = loss
    self._search = search
    self._lpips_weight = float(lpips_weight)
    self._regularizer = float(total_weight_regularizer)
    self._attention_weight = float(attention_weight)
    self._train_qualities = train_qualities
    # Not tf.Variables: neither trained nor saved.
    self._coding = _Hidden(None)

  # --- The encoder --------------------------------------------------------------------------------

  def _divided(
    self, x: tf.Tensor, steps: tf.Tensor, training: bool = False
  ) -> tuple[dict[str, tf.Tensor], Optional[tf.Tensor]]:
    """(Divided coefficients by name, the attention [B, h, w, 128] or None) of [B, H, W, 3]."""
    x = dct.pad_edge(x, 16 if self._subsampling == "4:2:0" else 8)
    if self.pre_edit is not None:
      x = self.pre_edit(x, training)
    divided = {}
    for i, (name, blocks) in enumerate(zip(LATENTS, dct.analyse(x, self._subsampling))):
      divided[name] = blocks / steps[min(i, 1)]
    if self.attention is None:
      return divided, None
    factors = self.attention(x)
    luma, chroma = tf.split(factors, 2, axis=-1)
    if self._subsampling == "4:2:0":
      chroma = tf.nn.avg_pool2d(chroma, 2, 2, "VALID")
    return {n: v * (luma if n == "y" else chroma) for n, v in divided.items()}, factors

  def _chosen(
    self, divided: Mapping[str, tf.Tensor], steps: tf.Tensor, rd_lambda: tf.Tensor
  ) -> dict[str, tf.Tensor]:
    """Whole numbers for divided coefficients, as `coefficients` says; no gradient."""
    if self._coefficients == "round":
      return {name: tf.stop_gradient(tf.round(v)) for name, v in divided.items()}
    assert isinstance(self.rate, RunLengthRate)
    chosen = {}
    for i, (name, values) in enumerate(divided.items()):
      # A sample of halved colours stands for four pixels.
      area = 4.0 if i and self._subsampling == "4:2:0" else 1.0
      weight = tf.cast(rd_lambda, tf.float32) * (area * dct.COLOUR_WEIGHTS[i])
      chosen[name] = self.rate.choose(values, min(i, 1), steps[min(i, 1)], weight)
    return chosen

  def infer(self, x: tf.Tensor) -> Latents:
    """See `TrainableCodec.infer`. With coefficients="rdo", the whole numbers that were chosen."""
    steps = self.tables()
    divided, _ = self._divided(x, steps)
    if self._coefficients != "round":
      divided = self._chosen(divided, steps, tf.constant(self._rd_lambda))
    return {name: Latent(value) for name, value in divided.items()}

  def latents_of(self, image: np.ndarray) -> Latents:
    """See `TrainableCodec.latents_of`: with `search`, coefficients found for this picture with its
    own Huffman codes (`ljpeg.rdo`)."""
    if not self._search:
      return super().latents_of(image)
    rd.check_image(image)
    _check_search(image)
    found = rdo.optimise(
      rdo.source(image, self._subsampling),
      list(self._written_tables.astype(np.int64)),
      _search_lambda(self._rd_lambda),
      rdo.EFFORTS[self._search],
    )
    return {k: Latent(v) for k, v in self._from_natural(found.components).items()}

  def search_file(self, image: np.ndarray, report: Callable[[float, str], None]) -> Optional[bytes]:
    """See `TrainableCodec.search_file`: coefficients, with the file's own Huffman codes, and the
    tables of this one file, by `rdo.optimise_with_tables` from the trained tables."""
    rd.check_image(image)
    _check_search(image)

    def progress(done: int, total: int, best: rdo.Result) -> None:
      report(done / total, f"{best.num_bits / (image.shape[0] * image.shape[1]):.4f} bpp")

    found = rdo.optimise_with_tables(
      rdo.source(image, self._subsampling),
      list(self._written_tables.astype(np.int64)),
      _search_lambda(self._rd_lambda),
      progress=progress,
    )
    return found.file()

  # --- Rate and distortion ------------------------------------------------------------------------

  def code(self, latents: Latents, quantizer: Quantizer) -> Coded:
    """See `TrainableCodec.code`. Bits of the coded coefficients, without a file's headers."""
    steps, offset = self.tables(), tf.zeros([64])
    decode, bits = {}, {}
    for name in LATENTS:
      table = 0 if name == "y" else 1
      quantized = quantizer(name, latents[name].loc, offset)
      decode[name] = quantized.decode
      bits[name] = self.rate.bits(quantized.rate, table, steps[table])
    return Coded(decode, bits)

  def synthesize(self, decode: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """See `TrainableCodec.synthesize`."""
    return self._synthesize(decode, self.tables())

  def _synthesize(self, decode: Mapping[str, tf.Tensor], steps: tf.Tensor) -> tf.Tensor:
    multiplied = [decode[name] * steps[min(i, 1)] for i, name in enumerate(LATENTS)]
    return dct.synthesise(multiplied, self._subsampling)

  def objective(
    self, x: tf.Tensor, rd_lambda: tf.Tensor, quantizer: Quantizer, seed: Optional[tf.Tensor] = None
  ) -> rd.RDTerms:
    """See `TrainableCodec.objective`: the two losses of ljpeg/configs/ljpeg.py."""
    height, width = int(x.shape[1]), int(x.shape[2])
    steps = self._steps(seed)
    divided, factors = self._divided(x, steps, training=seed is not None)
    chosen = self._chosen(divided, steps, rd_lambda)
    bits = []
    decode = {}
    for name, values in divided.items():
      table = 0 if name == "y" else 1
      decode[name], coded = self._relaxed(values, chosen[name], steps[table])
      if not isinstance(self.rate, RunLengthRate):
        coded = quantizer(name, values, tf.zeros([64])).rate
      bits.append(self.rate.bits(coded, table, steps[table]))
    bpp = tf.add_n(bits) / (height * width)
    x_hat = self._synthesize(decode, steps)[:, :height, :width]
    mse = tf.reduce_mean(tf.math.squared_difference(x, x_hat), axis=[1, 2, 3])
    distortion = tf.reduce_mean(mse)
    parts: dict[str, tf.Tensor] = {}
    if self._lpips_weight:  # Coding needs no weights, so that they are read here.
      perceptual = tf.reduce_mean(lpips.distance(x, x_hat, lpips.load()))
      distortion += self._lpips_weight * perceptual
      parts["lpips"] = perceptual
    rate = tf.reduce_mean(bpp)
    if self._loss == "weights":  # The rate model learns beside it, and weighs nothing.
      rate -= tf.stop_gradient(rate)
    loss = rate + rd_lambda * distortion
    inverse = tf.reduce_sum(1.0 / steps)
    if self._regularizer:
      loss += self._regularizer * inverse
    parts["sum_of_inverse_steps"] = inverse
    if factors is not None:
      attention = tf.reduce_mean(factors)
      loss += self._attention_weight * attention
      parts["attention"] = attention
    return rd.RDTerms(loss, bpp, mse, x_hat, parts)

  def _steps(self, seed: Optional[tf.Tensor]) -> tf.Tensor:
    """The tables; in a training with `train_qualities` those of a quality drawn for the batch."""
    if seed is None or self._train_qualities is None:
      return self.tables()
    low, high = self._train_qualities
    quality = tf.random.stateless_uniform([], seed, low, high + 1, tf.int32)
    return dct.standard_tables(quality)

  def _relaxed(
    self, values: tf.Tensor, chosen: tf.Tensor, steps: tf.Tensor
  ) -> tuple[tf.Tensor, tf.Tensor]:
    """`chosen` twice, with gradients in `values` as `rounding` says: for synthesis and for rate.

    "exact" holds the chosen numbers constant. The error is continuous where a choice changes, so
    that this is its derivative; the rate jumps there, but for "rdo" not the sum that is minimised,
    and for "round" `dct.round_sharp` counts the jumps. Where a frequency's numbers are large this
    is right on average only, and very noisy: there both are followed straight through. All of that
    is for the tables; networks before the rounding move values across its thresholds, where
    `dct.round_sharp` counts error and rate alike.
    """
    # What the rate model rounds to `chosen`, on the side on which the value lies.
    near = tf.stop_gradient(chosen + tf.clip_by_value(values - chosen, -0.49, 0.49))
    follow = values - tf.stop_gradient(values)
    if self._rounding == "ste":
      return chosen + follow, near + follow
    if self._rounding == "cubic":
      follow = dct.round_cubic(values) - tf.stop_gradient(tf.round(values))
      return chosen + follow, near + follow
    size = tf.reduce_mean(tf.abs(tf.stop_gradient(values)), axis=[0, 1, 2])
    is_large = tf.cast(size > _LARGE, tf.float32)
    by_tables = tf.stop_gradient(values * steps) / steps
    follow = is_large * (by_tables - tf.stop_gradient(by_tables))
    jumps = tf.zeros_like(follow)
    if self._coefficients == "round":
      jumps = (1.0 - is_large) * _jumps(by_tables)
    if self.attention is not None or self.pre_edit is not None:
      crossed = _jumps(values * (steps / tf.stop_gradient(steps)))  # Not by the tables.
      chosen, near = chosen + crossed, near + crossed
    return chosen + follow, near + follow + jumps

  # --- Training -----------------------------------------------------------------------------------

  def analysis_windows(self) -> Optional[tiling.Windows]:
    """See `TrainableCodec.analysis_windows`; None with an attention that is not ours."""
    if self.attention is not None and not isinstance(self.attention.backbone, Layer):
      return None
    windows = {}
    for name in LATENTS:
      factor = 2 if name != "y" and self._subsampling == "4:2:0" else 1
      window: tiling.Window = tiling.Blocks(downsample=8 * factor)
      if self.attention is not None:
        window = tiling.Beside(window, tiling.Chain(self.attention, tiling.Blocks(factor)))
      windows[name] = window if self.pre_edit is None else tiling.Chain(self.pre_edit, window)
    return windows

  def synthesis_windows(self) -> Optional[tiling.Windows]:
    """See `TrainableCodec.synthesis_windows`."""
    if self._subsampling == "4:4:4":
      return {name: tiling.Blocks(upsample=8) for name in LATENTS}
    chroma = tiling.Blocks(upsample=16, reach=2)  # Doubling looks at the neighbours.
    return {"y": tiling.Blocks(upsample=8), "cb": chroma, "cr": chroma}

  @property
  def prior_variables(self) -> Sequence[tf.Variable]:
    """Of the rate model."""
    return self.rate.trainable_variables

  def calibrate(self, x: tf.Tensor) -> None:
    """Fits the rate model to rounded coefficients of `x`."""
    steps = self.tables()
    divided, _ = self._divided(x, steps)
    y, cb, cr = (divided[name].numpy() for name in LATENTS)
    self.rate.fit(y, 0, steps[0].numpy())
    self.rate.fit(np.concatenate([cb, cr]), 1, steps[1].numpy())
    if self._coefficients == "rdo":  # What is chosen is cheaper, and so are its symbols.
      chosen = self._chosen(divided, steps, tf.constant(self._rd_lambda))
      y, cb, cr = (chosen[name].numpy() for name in LATENTS)
      self.rate.fit(y, 0, steps[0].numpy())
      self.rate.fit(np.concatenate([cb, cr]), 1, steps[1].numpy())

  # --- Files --------------------------------------------------------------------------------------

  @property
  def decoder_variables(self) -> Sequence[tf.Variable]:
    """None: the decoder is Pillow's, and what it needs is in the file."""
    return ()

  def derive_coding(self) -> dict[str, np.ndarray]:
    """The two tables, uint8 [2, 64] in zigzag order."""
    return {"tables": self.tables.integers()}

  def use_coding(self, derived: Mapping[str, np.ndarray]) -> None:
    """See `TrainableCodec.use_coding`."""
    tables = np.asarray(derived["tables"])
    if tables.shape != (2, 64) or tables.dtype != np.uint8 or not tables.all():
      raise ValueError("tables must be uint8 [2, 64] of 1..255.")
    self._coding.value = tables

  @property
  def _written_tables(self) -> np.ndarray:
    """[2, 8, 8] in natural order."""
    if self._coding.value is None:
      raise RuntimeError("No tables yet: call prepare() after building or restoring.")
    return self._coding.value[:, dct.NATURAL].reshape(2, 8, 8)

  def table_path(self, name: str) -> tables_lib.TablePath:
    """The tables as `ljpeg.tables` keeps them, a path of one point."""
    luma, chroma = self._written_tables.astype(np.int64)
    point = tables_lib.Point(luma, chroma, _search_lambda(self._rd_lambda))
    note = ""
    if self.attention is not None or self.pre_edit is not None:
      note = f"{name} has a network; only its tables are used here (ljpeg.eval uses both)."
    return tables_lib.TablePath((point,), self._subsampling, name, note)

  def rounded(self, latents: Latents) -> dict[str, tf.Tensor]:
    """See `TrainableCodec.rounded`: within what baseline files hold."""
    return {
      name: tf.clip_by_value(tf.round(value.loc), -1023.0, 1023.0)
      for name, value in latents.items()
    }

  def pack(self, latents: Latents, size: tuple[int, int]) -> bytes:
    """See `TrainableCodec.pack`: a baseline .jpg file with optimised Huffman codes."""
    components = []
    for i, name in enumerate(LATENTS):
      blocks = self.rounded(latents)[name][0].numpy().astype(np.int16)
      rows, cols = jpeg_file.grid(size, self._subsampling, i)
      natural = blocks[:rows, :cols, dct.NATURAL]
      components.append(natural.reshape(rows, cols, 8, 8))
    luma, chroma = self._written_tables.astype(np.int64)
    return jpeg_file.write_jpeg(components, [luma, chroma], size, self._subsampling)

  def unpack(self, data: bytes) -> tuple[dict[str, tf.Tensor], tuple[int, int]]:
    """See `TrainableCodec.unpack`: reads the coefficients back."""
    try:
      image = jpeg_file.read_jpeg(data)
    except jpeg_file.JpegFileError as e:
      raise bitstream.BitstreamError(str(e)) from e
    luma, chroma = self._written_tables
    expected = (luma, chroma, chroma)
    if (
      len(image.components) != 3
      or image.subsampling != self._subsampling
      or any(np.any(a != b) for a, b in zip(image.tables, expected))
    ):
      raise bitstream.BitstreamError(
        "The file has other tables than this model: any JPEG decoder shows it, this model cannot "
        "take it apart."
      )
    return self._from_natural(image.components), image.size

  def _from_natural(self, components: Sequence[np.ndarray]) -> dict[str, tf.Tensor]:
    """Blocks of a file, [rows, cols, 8, 8], as [1, rows, cols, 64] float32 in zigzag order.

    With 4:2:0, luminance's last blocks are repeated to an even number.
    """
    found = {}
    factor = 2 if self._subsampling == "4:2:0" else 1
    for i, name in enumerate(LATENTS):
      blocks = components[i]
      blocks = blocks.reshape(*blocks.shape[:2], 64)[:, :, dct.ZIGZAG].astype(np.float32)
      rows, cols = (-n % factor if i == 0 else 0 for n in blocks.shape[:2])
      blocks = np.pad(blocks, ((0, rows), (0, cols), (0, 0)), "edge")
      found[name] = tf.constant(blocks[None])
    return found

  def decompress(self, data: bytes) -> np.ndarray:
    """See `Codec.decompress`: what Pillow shows. JPEG has no checksums: damage within a picture's
    data may go unnoticed.

    Raises:
      bitstream.BitstreamError: It is no JPEG file, or it is truncated.
    """
    from PIL import Image

    try:
      with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        jpeg_file.check_room(data, (image.height, image.width))
        return np.array(image.convert("RGB"))
    except bitstream.BitstreamError:
      raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
      raise bitstream.BitstreamError(f"Not a whole JPEG file: {e}") from e

  def stages(self) -> dict[str, Stage]:
    """f, the DCT and the tables; f_e the pre-edit; f_a the attention; g, the inverse DCT."""
    stages = {"f": Stage(_Forward(self), 1), "g": Stage(_Backward(self), 8)}
    if self.pre_edit is not None:
      stages["f_e"] = Stage(self.pre_edit, 1)
    if self.attention is not None:
      stages["f_a"] = Stage(self.attention, 1)
    return stages


def _search_lambda(rd_lambda: float) -> float:
  """What `ljpeg.rdo` calls lambda: squared errors, summed over three channels, for a bit."""
  return 3.0 / rd_lambda


# A search holds all blocks at once, about 0.17 GB a million pixels.
MAX_SEARCH_PIXELS = 1 << 24


def _check_search(image: np.ndarray) -> None:
  if image.shape[0] * image.shape[1] > MAX_SEARCH_PIXELS:
    raise tiling.TooLargeError(
      f"A picture of {image.shape[1]}x{image.shape[0]} pixels: the search of the learned JPEG "
      f"takes at most {MAX_SEARCH_PIXELS}. With model_config.search='' the encoder runs in tiles; "
      "or cut the picture into parts."
    )


# Mean magnitude, in steps, from which a frequency's numbers are large: there the density is flat
# across a step, and following is right.
_LARGE = 1.5


def _jumps(values: tf.Tensor) -> tf.Tensor:
  """0, with the gradient of `dct.round_sharp`."""
  return dct.round_sharp(values) - tf.stop_gradient(tf.round(values))


class _Hidden:
  """Keeps a value from tf.Module and from checkpoints."""

  def __init__(self, value: Any):
    self.value = value


# A separable DCT has 2 x 8 multiply-adds a sample; three samples a pixel, or one and a half.
class _Forward(Layer):
  """Colours, DCT, division, for profiling."""

  downsample = 8
  in_channels, out_channels = 3, 192

  def __init__(self, codec: LearnedJpeg):
    super().__init__(name="forward")
    self.tables = codec.tables
    self._hidden = _Hidden(codec)

  def __call__(self, x: tf.Tensor) -> tf.Tensor:
    codec = self._hidden.value
    blocks = dct.analyse(x, codec._subsampling)
    steps = self.tables()
    flat = [tf.reshape(b / steps[min(i, 1)], [-1]) for i, b in enumerate(blocks)]
    return tf.concat(flat, 0)

  def macs(self, height: int, width: int) -> int:
    samples = 1.5 if self._hidden.value._subsampling == "4:2:0" else 3.0
    return int(height * width * (9 + 16 * samples))


class _Backward(Layer):
  """Multiplication, inverse DCT, colours, for profiling."""

  upsample = 8
  in_channels, out_channels = 192, 3

  def __init__(self, codec: LearnedJpeg):
    super().__init__(name="backward")
    self.tables = codec.tables
    self._subsampling = codec._subsampling

  def __call__(self, blocks: tf.Tensor) -> tf.Tensor:
    y, cb, cr = tf.split(blocks, 3, axis=-1)
    if self._subsampling == "4:2:0":
      y, cb, cr = dct.pad_edge(y, 2), *(dct.pad_edge(c, 2)[:, ::2, ::2] for c in (cb, cr))
    return dct.synthesise([y, cb, cr], self._subsampling)

  def macs(self, height: int, width: int) -> int:
    samples = 1.5 if self._subsampling == "4:2:0" else 3.0
    return int(64 * height * width * (9 + 16 * samples))


def initial_tables(settings: Mapping[str, Any], rd_lambda: float) -> np.ndarray:
  """[2, 64] in zigzag order, float.

  Args:
    settings: `init`: "flat", all entries alike: at high rates best for the squared error, where
      the slope of a coefficient's bits, -1 / (ln 2 q), meets rd_lambda times that of its error
      q^2 / 12. Or "standard": the Independent JPEG Group's of `quality`.
    rd_lambda: Of the loss.

  Raises:
    ValueError: Another `init`, or a quality that is not in 1..100.
  """
  if settings["init"] == "flat":
    step = _FLAT_FACTOR * math.sqrt(6.0 / (math.log(2.0) * rd_lambda))
    return np.full([2, 64], np.clip(step, 2.0, 200.0))
  if settings["init"] != "standard":
    raise ValueError(
      f"Unknown model_config.tables.init {settings['init']!r}. Known: flat, standard."
    )
  quality = int(settings["quality"])
  if not 1 <= quality <= 100:
    raise ValueError(f"model_config.tables.quality is 1 to 100, not {quality}.")
  return dct.standard_tables(quality).numpy()


# Steps grow easily while a training begins; one whose coefficients are all 0 has no gradient.
_FLAT_FACTOR = 0.7


def build(model_config: Mapping[str, Any]) -> LearnedJpeg:
  """An untrained codec from `model_config`; ljpeg/configs/ljpeg.py explains its fields.

  Raises:
    ValueError, TypeError: A value that no codec can be built from; the message lists the known.
    lpips.LpipsError: LPIPS weights are needed and not there; the message says how to make them.
  """
  quantizers.make_quantizer(model_config["quantizer"])
  rd_lambda = float(model_config["rd_lambda"])
  tables = dct.Tables(
    initial_tables(model_config["tables"], rd_lambda),
    trainable=bool(model_config["tables"]["learned"]),
    learning_rate_factor=float(model_config["tables"].get("learning_rate_factor", 1.0)),
  )
  attention, pre_edit = model_config["attention"], model_config["pre_edit"]
  qualities = None
  if pre_edit["filters"] and pre_edit["train_qualities"]:
    low, high = (int(q) for q in pre_edit["train_qualities"])
    if not 1 <= low <= high <= 100 or model_config["tables"]["learned"]:
      raise ValueError(
        "model_config.pre_edit.train_qualities is (lowest, highest) within 1..100, and goes with "
        "model_config.tables.learned=False."
      )
    qualities = (low, high)
  return LearnedJpeg(
    tables,
    make_rate(model_config["rate"]),
    rd_lambda,
    subsampling=model_config["subsampling"],
    rounding=model_config["rounding"],
    coefficients=model_config["coefficients"],
    loss=model_config["loss"],
    lpips_weight=model_config["lpips_weight"],
    total_weight_regularizer=model_config["total_weight_regularizer"],
    attention=(
      Attention(attention["backbone"], int(attention["channels"]))
      if attention["backbone"]
      else None
    ),
    attention_weight=attention["weight"],
    pre_edit=PreEdit([int(f) for f in pre_edit["filters"]]) if pre_edit["filters"] else None,
    train_qualities=qualities,
    search=model_config["search"],
  )
