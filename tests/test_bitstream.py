"""The container: what is written is read; everything else is refused, clearly and cheaply."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import bitstream
from common.bitstream import Bitstream, BitstreamError

STREAM = Bitstream("factorized", b"finger", 512, 768, (b"some bytes", b""), 0xDEADBEEF)


@given(
  family=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=63),
  fingerprint=st.binary(min_size=6, max_size=6),
  height=st.integers(1, 8_192),
  width=st.integers(1, 8_192),
  sections=st.lists(st.binary(max_size=300), min_size=1, max_size=16),
  crc=st.integers(0, 2**32 - 1),
)
def test_round_trip(family, fingerprint, height, width, sections, crc):
  stream = Bitstream(family, fingerprint, height, width, tuple(sections), crc)
  assert bitstream.read(bitstream.write(stream)) == stream


def test_overhead_of_a_kodak_file_is_41_bytes():
  payload = bytes(20_000)
  stream = Bitstream("factorized", b"finger", 512, 768, (payload,), 1)
  assert len(bitstream.write(stream)) - len(payload) == 41


@settings(max_examples=300)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(position, bit):
  data = bytearray(bitstream.write(STREAM))
  data[position % len(data)] ^= 1 << bit
  with pytest.raises(BitstreamError):
    bitstream.read(bytes(data))


def test_every_truncation_is_refused():
  data = bitstream.write(STREAM)
  for length in range(len(data)):
    with pytest.raises(BitstreamError):
      bitstream.read(data[:length])


def test_appended_bytes_are_refused():
  with pytest.raises(BitstreamError, match="appended"):
    bitstream.read(bitstream.write(STREAM) + b"x")


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data):
  with pytest.raises(BitstreamError):
    bitstream.read(data)


@given(st.binary(max_size=100))
def test_bytes_behind_the_magic_are_refused(data):
  with pytest.raises(BitstreamError):
    bitstream.read(b"NTC\x01" + data)


@pytest.mark.parametrize("height,width", [(0, 5), (5, 0), (1 << 20, 1 << 20)])
def test_impossible_sizes_are_refused_when_written_and_when_read(height, width):
  stream = Bitstream("factorized", b"finger", height, width, (b"",), 0)
  with pytest.raises(BitstreamError, match="sizes are"):
    bitstream.write(stream)
  # A hostile writer with right checksums.
  original, bitstream.check_size = bitstream.check_size, lambda h, w: None
  try:
    data = bitstream.write(stream)
  finally:
    bitstream.check_size = original
  with pytest.raises(BitstreamError, match="sizes are"):
    bitstream.read(data)


def test_wrong_family_and_wrong_model_are_named():
  with pytest.raises(BitstreamError, match="written by the family 'factorized', not by 'mshyper'"):
    bitstream.check_model(STREAM, "mshyper", b"finger")
  with pytest.raises(BitstreamError, match="decode it with the run"):
    bitstream.check_model(STREAM, "factorized", b"other!")
