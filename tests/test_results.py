import dataclasses
import json
import math
import re

import pytest

from common import results


def record(image="a.png", **changes):
  fields = {
    "image": image,
    "num_pixels": 6000,
    "num_bytes": 750,
    "bpp": 1.0,
    "bpp_estimated": 0.98,
    "psnr_db": 30.0,
    "msssim": 0.99,
    "msssim_scales": 5,
    "lpips": None,
    "mse": 65.0,
    "seconds_encode": 0.1,
    "seconds_decode": 0.2,
  }
  return results.EvalRecord(**{**fields, **changes})


def result(wid=0, step=100, mode="bitstream", records=None, **run):
  records = tuple(records or (record("a.png"), record("b.png")))
  return results.ResultFile(
    run={"family": "factorized", "xid": "1", "wid": wid, "runname": f"w={wid}", **run},
    config={"model_config": {"rd_lambda": 0.01}},
    overrides={"model_config.rd_lambda": 0.01},
    step=step,
    dataset={"name": "kodak", "images": [r.image for r in records], "hash": "0" * 64},
    mode=mode,
    records=records,
  )


def test_results_come_back_as_they_were_written(tmp_path):
  written = dataclasses.replace(result(), profile={"flops": {"g": 1.5}})
  path = results.write(tmp_path, written)
  assert path == (
    tmp_path / "kodak" / "bitstream" / "factorized-w=0-step=100-xid=1-wid=0.json"
  )  # fmt: skip
  assert results.read(path) == written
  assert results.find(tmp_path, "kodak") == [path]


def test_two_runs_never_share_a_file():
  paths = {
    results.result_path("r", "kodak", r.mode, r.run, r.step)
    for r in (result(), result(wid=1), result(step=200), result(mode="estimated"), result(xid="2"))
  }
  assert len(paths) == 5


def test_a_mode_that_does_not_exist_is_refused():
  with pytest.raises(results.ResultError, match="Known: bitstream"):
    results.result_path("r", "kodak", "fast", result().run, 0)


@pytest.mark.parametrize(
  "damage",
  [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: "3",
    lambda text: text.replace('"mse"', '"mean squared error"'),
    lambda text: text.replace('"records"', '"rows"'),
    lambda text: text.replace('"run"', '"runs"'),
  ],
)
def test_damaged_files_are_named(tmp_path, damage):
  path = results.write(tmp_path, result())
  path.write_text(damage(path.read_text()))
  with pytest.raises(results.ResultError, match=re.escape(str(path))):
    results.read(path)


def test_other_schema_versions_are_refused(tmp_path):
  path = results.write(tmp_path, result())
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, "schema_version": 99}))
  with pytest.raises(results.ResultError, match="version 99; this code reads 1"):
    results.read(path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(results.ResultError, match=r"gone\.json"):
    results.read(tmp_path / "gone.json")


def test_means_leave_out_what_is_not_known():
  r = result(records=[record(psnr_db=30.0), record(psnr_db=34.0), record(psnr_db=None)])
  assert r.mean("psnr_db") == 32.0
  assert r.mean("lpips") is None
  assert result(records=[record(psnr_db=math.inf)]).mean("psnr_db") is None


def test_msssim_in_decibels():
  assert results.msssim_to_db(0.99) == pytest.approx(20)
  assert results.msssim_to_db(0.0) == 0
  assert results.msssim_to_db(1.0) == math.inf


def test_a_curve_has_a_point_a_run_by_rate():
  files = [
    result(wid=w, records=[record(bpp=b, psnr_db=p, msssim=0.9)])
    for w, b, p in ((0, 0.9, 36.0), (1, 0.1, 28.0), (2, 0.4, 32.0))
  ]
  (curve,) = results.curves(files)
  assert curve.bpp == (0.1, 0.4, 0.9)
  assert curve.psnr_db == (28.0, 32.0, 36.0)
  assert curve.msssim_db == pytest.approx((10, 10, 10))
  assert curve.lpips is None
  assert (curve.label, curve.group, curve.source) == ("factorized 1", "factorized-1", "bitstream")


def test_the_last_step_of_a_run_counts():
  files = [
    result(step=s, records=[record(psnr_db=p)]) for s, p in ((100, 30.0), (300, 33.0), (200, 31.0))
  ]
  (curve,) = results.curves(files)
  assert curve.psnr_db == (33.0,)


def test_experiments_and_modes_have_curves_of_their_own():
  files = [result(), result(mode="estimated"), result(xid="2"), result(family="mshyper")]
  assert sorted((c.group, c.source) for c in results.curves(files)) == [
    ("factorized-1", "bitstream"),
    ("factorized-1", "estimated"),
    ("factorized-2", "bitstream"),
    ("mshyper-1", "bitstream"),
  ]


def test_underscored_experiments_are_ignored():
  assert results.curves([result(xid="_debug")]) == []


def test_a_curve_takes_the_label_of_its_runs():
  (curve,) = results.curves([result(label="JPEG 4:2:0")])
  assert curve.label == "JPEG 4:2:0"
  (curve,) = results.curves([result(label="BLS2017", mode="estimated")])
  assert curve.label == "BLS2017 (estimated)"
