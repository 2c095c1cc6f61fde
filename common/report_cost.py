"""What decoding costs, a curve each: FLOPs a pixel, and seconds a megapixel."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from common import bd, report_data, results

# What results say that were written before the device was recorded.
UNKNOWN_DEVICE = "device not recorded"


class Range(NamedTuple):
  """The least, the median and the greatest over the points of a curve."""

  low: float
  middle: float
  high: float


@dataclasses.dataclass(frozen=True)
class Cost:
  """A curve's BD-rate, and what its decoder costs.

  Attributes:
    series: The curve.
    rate: Its BD-rate against the report's anchor.
    flops: FLOPs of the decoder for each pixel, two a multiply-add; None where they are not known.
    flops_remark: Why not, with the command that measures them.
    seconds: Wall time from file to pixels, for a million pixels; None where it is not known.
    seconds_remark: Why not.
    devices: What it was timed on.
  """

  series: bd.Series
  rate: bd.Delta
  flops: Optional[Range]
  flops_remark: str
  seconds: Optional[Range]
  seconds_remark: str
  devices: tuple[str, ...]


def profiles(result_files: Iterable[results.ResultFile]) -> dict[str, Mapping[str, Any]]:
  """Run directory -> its model's profile: of one model, whatever it was evaluated for."""
  return {
    _trained(r.run): r.profile
    for r in result_files
    if r.profile is not None and "decoder_flops_per_pixel" in r.profile
  }


def _trained(run: Mapping[str, Any]) -> str:
  """The trained run behind results, also of latents that were optimised."""
  return report_data.trained_run(run) or str(report_data.run_key(run))


def cost(
  series: bd.Series,
  members: Sequence[results.ResultFile],
  rate: bd.Delta,
  known: Mapping[str, Mapping[str, Any]],
) -> Cost:
  """The cost of one curve.

  Args:
    series: The curve.
    members: The results that its points are made of; none for a publication.
    rate: Its BD-rate against the anchor.
    known: Made by `profiles`.
  """
  publication = series.publication
  if publication is not None:
    flops = publication.decoder_flops_per_pixel
    return Cost(
      series, rate,
      None if flops is None else Range(flops, flops, flops),
      "" if flops is not None else "its source counts none",
      None, "published without times that compare", (),
    )  # fmt: skip
  found = [known[_trained(m.run)] for m in members if _trained(m.run) in known]
  counted = _range(float(p["decoder_flops_per_pixel"]) for p in found)
  seconds = [s for m in members if (s := seconds_per_megapixel(m)) is not None]
  devices = dict.fromkeys(
    device_of(m) for m in members if seconds_per_megapixel(m) is not None
  )  # fmt: skip
  remark = "its rate is an estimate: nothing was decoded"
  return Cost(
    series, rate,
    counted, "" if counted else _without_profile(members),
    _range(seconds), "" if seconds else remark,
    tuple(devices),
  )  # fmt: skip


def _without_profile(members: Sequence[results.ResultFile]) -> str:
  run = members[0].run
  if run["family"] == "classical":
    return "a classical codec: FLOPs are not counted"
  folder = report_data.trained_run(run) or "RUN"
  name = members[0].dataset["name"]
  return f"no profile; python -m {run['family']}.eval --profile --workdir '{folder}' " \
    f"--dataset {name}"  # fmt: skip


def _range(values: Iterable[float]) -> Optional[Range]:
  ordered = sorted(values)
  if not ordered:
    return None
  return Range(ordered[0], statistics.median(ordered), ordered[-1])


def seconds_per_megapixel(result: results.ResultFile) -> Optional[float]:
  """Wall time of decoding over all pictures, for a million pixels; None where it is not known."""
  timed = [(r.seconds_decode, r.num_pixels) for r in result.records if r.seconds_decode is not None]
  pixels = sum(p for _, p in timed)
  seconds = sum(s for s, _ in timed)
  return 1e6 * seconds / pixels if pixels and seconds > 0 else None


def device_of(result: results.ResultFile) -> str:
  """What results were timed on."""
  profile = result.profile or {}
  return str(result.run.get("device") or profile.get("device") or UNKNOWN_DEVICE)
