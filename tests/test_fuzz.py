"""Damaged and hostile files are refused or decode to the right picture (tests/fuzz_decode.py)."""

import subprocess
import sys

import numpy as np
import pytest

from tests import fuzz_decode
from tests.conftest import ROOT

FAST = ("factorized", "vbq", "mshyper", "ljpeg")


@pytest.mark.parametrize("family", FAST)
def test_two_hundred_files_of_a_family(family):
  tally = fuzz_decode.run(family, 250, seed=1)
  assert not tally.failures
  outcomes = {outcome for _, outcome in tally.outcomes}
  assert outcomes == {"refused", "right"}  # The deep end was reached too.


@pytest.mark.slow
def test_thousands_of_files_in_bounded_memory():
  """In a process of its own: what it takes at most is no other test's."""
  command = [sys.executable, "-m", "tests.fuzz_decode", "--number", "10000", "--seed", "2"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
  assert float(done.stdout.split()[-2]) < 1.5, done.stdout


def test_a_file_is_the_same_whenever_it_is_made():
  assert fuzz_decode.make("ljpeg", 3, 17) == fuzz_decode.make("ljpeg", 3, 17)
  assert fuzz_decode.make("ljpeg", 3, 17) != fuzz_decode.make("ljpeg", 4, 17)


@pytest.mark.parametrize("name", sorted(p.name for p in fuzz_decode.CORPUS.glob("*-*.*")))
def test_the_corpus(name):
  content = (fuzz_decode.CORPUS / name).read_bytes()
  for family in fuzz_decode.families_of(name):
    expected = "refused" if name.startswith("hostile") else "right"
    assert fuzz_decode.check(family, content) == expected


def test_a_segment_that_is_too_short_is_not_given_to_libjpeg():
  """Found by the files: Pillow shows the picture, jpeglib takes the length for an array's."""
  from ljpeg import jpeg_file

  with pytest.raises(jpeg_file.JpegFileError, match="segment of 1 bytes"):
    jpeg_file.read_jpeg((fuzz_decode.CORPUS / "odd-segment.jpg").read_bytes())


def test_the_corpus_is_what_the_code_makes():
  for name, content in fuzz_decode.corpus().items():
    if not name.endswith(".jpg"):  # Those are of the Pillow that made them.
      assert (fuzz_decode.CORPUS / name).read_bytes() == content, name


@pytest.mark.parametrize("broken", ["picture", "error", "size"])
def test_what_breaks_a_promise_is_seen(broken, monkeypatch):
  """The check itself can fail."""
  target = fuzz_decode._factorized()
  data = target.valid[0]
  codec = target.check.__closure__[0].cell_contents
  whole = codec.decompress

  def decompress(data):
    if broken == "error":
      raise ValueError("unforeseen")
    image = whole(data)
    return 255 - image if broken == "picture" else image[1:]

  assert target.check(data) == "right"
  monkeypatch.setattr(codec, "decompress", decompress)
  monkeypatch.setattr(fuzz_decode, "target", lambda family: target)
  with pytest.raises((fuzz_decode.Wrong, ValueError)):
    fuzz_decode.check("factorized", data)


def test_libfuzzers_entry_takes_anything():
  for data in (b"", b"\0", b"\3\xff\xd8", bytes(range(256))):
    fuzz_decode.TestOneInput(data)


def test_a_row_of_pixels_cannot_claim_more_than_a_picture_may_have():
  """Padded to the latent's grid, a single row takes as much as sixteen."""
  target = fuzz_decode.target("factorized")
  stream = fuzz_decode.bitstream.read(target.valid[0])
  long = fuzz_decode.dataclasses.replace(stream, height=1, width=1 << 26)
  assert target.check(fuzz_decode.sealed(long)) == "refused"
  assert np.prod([16, 1 << 26]) > fuzz_decode.bitstream.MAX_PIXELS
