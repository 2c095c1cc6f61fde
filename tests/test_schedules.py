"""Schedules: the temperature of iterative inference."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import schedules


def test_temperature_follows_its_formula():
  at = schedules.annealed_temperature(1e-2, 50, upper=0.2)
  assert at(0) == at(50) == 0.2
  assert at(150) == pytest.approx(0.2 * math.exp(-1), rel=1e-9)
  assert at(10_000) == 1e-8


def test_the_upper_bound_is_that_of_the_exponential_clipped():
  """rate 1e-3 from step 693 is min(exp(-1e-3 t), 0.5), as the paper's code has it."""
  at = schedules.annealed_temperature(1e-3, round(math.log(2) / 1e-3))
  for step in (0, 600, 700, 1500, 2000):
    assert at(step) == pytest.approx(min(math.exp(-1e-3 * step), 0.5), rel=1e-3)


@settings(max_examples=50, deadline=None)
@given(
  rate=st.floats(0, 1e3),
  start=st.integers(0, 10**7),
  upper=st.floats(1e-6, 1),
  step=st.integers(0, 10**7),
)
def test_temperature_stays_within_its_bounds_and_never_rises(rate, start, upper, step):
  at = schedules.annealed_temperature(rate, start, upper)
  assert 1e-8 <= at(step + 1) <= at(step) <= upper
