"""Large pictures in tiles: transforms run on overlapping parts, so that memory does not grow.

A transform's output at one place depends on a window of its input; `needs` of a layer
(`common.layers`) says which, exactly. A tile is read with that much around it, aligned to the
strides, and what its own part does not determine is cut off: the results are those of the whole
picture up to the rounding of sums.

What is coded with must be the same in encoder and decoder. Both tile by size alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Optional, Protocol

# Padded pixels that go through a transform at once; larger pictures are tiled. mbt2018 takes
# about 0.8 GB a million.
PIXELS_AT_ONCE = 1 << 21

# Where a transform is of a kind that cannot be tiled.
MAX_PIXELS_WHOLE = 1 << 22


class TooLargeError(ValueError):
  """A picture is too large for a codec that cannot run in tiles."""


class Window(Protocol):
  """What tiling knows of a transform; `layers.Layer` is one.

  Attributes:
    downsample: By how much it shrinks each side.
    upsample: By how much it enlarges.
  """

  @property
  def downsample(self) -> int: ...  # noqa: D102

  @property
  def upsample(self) -> int: ...  # noqa: D102

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """First and last input sample that the output samples `first` to `last` depend on."""


class Chain:
  """Transforms one after the other, as a window."""

  def __init__(self, *windows: Window):
    """In the order in which they run."""
    self.windows = windows
    self.downsample = math.prod(w.downsample for w in windows)
    self.upsample = math.prod(w.upsample for w in windows)

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Window`."""
    for window in reversed(self.windows):
      first, last = window.needs(first, last)
    return first, last


class Beside:
  """Transforms of the same input whose outputs are combined, as a window."""

  def __init__(self, *windows: Window):
    """All of one stride."""
    self.windows = windows
    self.downsample, self.upsample = windows[0].downsample, windows[0].upsample

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Window`."""
    return union(*(w.needs(first, last) for w in self.windows))


class Blocks:
  """Blocks that are analysed, or painted, one by one; as a window.

  Attributes:
    downsample: Side of a block in the input; 1 where blocks are painted.
    upsample: Side of a block in the output; 1 where blocks are analysed.
    reach: Output samples beyond its own block that an input sample has a say in.
  """

  def __init__(self, downsample: int = 1, upsample: int = 1, reach: int = 0):
    """One of the sides is 1."""
    self.downsample, self.upsample, self.reach = downsample, upsample, reach

  def needs(self, first: int, last: int) -> tuple[int, int]:
    """See `Window`."""
    first, last = (first - self.reach) // self.upsample, (last + self.reach) // self.upsample
    return first * self.downsample, (last + 1) * self.downsample - 1


def union(*spans: tuple[int, int]) -> tuple[int, int]:
  """The smallest span (first, last) that holds all of these."""
  return min(s[0] for s in spans), max(s[1] for s in spans)


class Span(NamedTuple):
  """A tile along one axis, in samples of the finer side (pixels), ends exclusive.

  Attributes:
    first, end: What the tile gives.
    begin, stop: What it is computed from.
  """

  first: int
  end: int
  begin: int
  stop: int

  def own(self, scale: int) -> tuple[slice, slice]:
    """Where the tile's part lies in the whole, and in the tile's own output, at 1/scale."""
    size = (self.end - self.first) // scale
    whole, local = self.first // scale, (self.first - self.begin) // scale
    return slice(whole, whole + size), slice(local, local + size)

  def source(self, scale: int) -> slice:
    """What is read, at 1/scale."""
    return slice(self.begin // scale, self.stop // scale)


def step_of(windows: Sequence[Window]) -> int:
  """Tiles begin and end at multiples of this."""
  return math.lcm(*(max(w.downsample, w.upsample) for w in windows))


def tiles(
  size: tuple[int, int],
  windows: Sequence[Window],
  at_once: int,
  extent: Optional[tuple[int, int]] = None,
) -> Iterator[tuple[Span, Span]]:
  """The tiles (rows, columns) of a picture.

  Args:
    size: Height and width in pixels, multiples of `step_of(windows)`.
    windows: Of all that is computed from a tile; analyses (pixels to latents) or syntheses.
    at_once: Pixels of a tile with all that it is computed from, about.
    extent: How far what is read reaches, where that is beyond `size`.
  """
  step = step_of(windows)
  middle = _span(1 << 20, (1 << 20) + step, 1 << 30, windows)
  around = middle.stop - middle.begin - step
  side = max(step, (math.isqrt(at_once) - around) // step * step)
  width = _even(size[1], side, step)
  read = min(size[1], width + around)
  height = size[0]
  if size[0] * read > at_once:
    height = _even(size[0], max(step, (at_once // read - around) // step * step), step)
  extent = extent or size
  for top in range(0, size[0], height):
    rows = _span(top, min(size[0], top + height), extent[0], windows)
    for left in range(0, size[1], width):
      yield rows, _span(left, min(size[1], left + width), extent[1], windows)


def _even(size: int, most: int, step: int) -> int:
  """The side of tiles of at most `most`, all nearly alike."""
  count = -(-size // most)
  return -(-size // (count * step)) * step


def _span(first: int, end: int, size: int, windows: Sequence[Window]) -> Span:
  step, begin, stop = step_of(windows), first, end
  for window in windows:
    if window.downsample > 1:  # To latents of another scale.
      low, high = window.needs(first // window.downsample, end // window.downsample - 1)
    else:
      low, high = window.needs(first, end - 1)
      low, high = low * window.upsample, (high + 1) * window.upsample - 1
    begin, stop = min(begin, low), max(stop, high + 1)
  return Span(first, end, max(0, begin // step * step), min(size, -(-stop // step) * step))


def check_whole(size: tuple[int, int], what: str) -> None:
  """Raises TooLargeError for a picture that a codec without windows cannot take."""
  if size[0] * size[1] > MAX_PIXELS_WHOLE:
    raise TooLargeError(
      f"A picture of {size[1]}x{size[0]} pixels: {what} cannot run in tiles, and takes at most "
      f"{MAX_PIXELS_WHOLE} pixels. Cut it into parts."
    )


# Latent name -> its window.
Windows = Mapping[str, Window]
