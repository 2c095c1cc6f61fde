import csv
import dataclasses
import io
import json
import math
import re
import resource
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import configs
from common import (
  bd,
  classical,
  data,
  flags,
  hyper,
  metrics,
  report,
  report_content,
  report_cost,
  report_crops,
  report_data,
  report_look,
  report_plots,
  results,
  runs,
)
from tests.conftest import processor_slowness

HASH = "ab" * 32


def curve(bpp, psnr, group="classical-jpeg", label="", source="bitstream", **more):
  return results.RDCurve(
    label=label or group, bpp=tuple(bpp), psnr_db=tuple(psnr), source=source, group=group, **more
  )


BPP = (0.1, 0.2, 0.4, 0.8, 1.6)
PSNR = (26.0, 28.5, 31.5, 34.5, 38.0)
ANCHOR = curve(BPP, PSNR)


def result(
  bpp=0.5,
  psnr=30.0,
  family="factorized",
  xid="1001",
  wid=0,
  step=1000,
  mode="bitstream",
  hash=HASH,
  label=None,
  num_images=2,
  dataset="kodak",
  **record,
):
  records = []
  for index in range(num_images):
    change = 0.1 * index / (num_images - 1) - 0.05
    fields = {
      "image": f"kodim{index:02d}.png",
      "num_pixels": 393216,
      "num_bytes": None if mode == "estimated" else round((bpp + change * bpp) * 393216 / 8),
      "bpp": bpp + change * bpp,
      "bpp_estimated": None if family == "classical" else (bpp + change * bpp) * 0.99,
      "psnr_db": psnr + change,
      "msssim": 1 - 10 ** (-(psnr / 2) / 10),
      "msssim_scales": 5,
      "lpips": None,
      "mse": 65.0,
      "seconds_encode": 0.1,
      "seconds_decode": 0.02,
    }
    records.append(results.EvalRecord(**{**fields, **record}))
  run = {
    "family": family, "xid": xid, "wid": wid, "runname": f"rd_lambda={wid}",
    "commit": "0123456789", "dirty": False, "workdir": None,
  }  # fmt: skip
  if label:
    run["label"] = label
  return results.ResultFile(
    run=run,
    config={},
    overrides={},
    step=step,
    dataset={"name": dataset, "images": [r.image for r in records], "hash": hash},
    mode=mode,
    records=tuple(records),
  )


def write_curve(folder, scale=1.0, points=5, **more):
  for wid, (bpp, psnr) in enumerate(zip(BPP[:points], PSNR)):
    results.write(folder, result(bpp * scale, psnr, wid=wid, **more))


def write_jpeg(folder):
  write_curve(folder, family="classical", xid="jpeg", step=0, label="JPEG 4:2:0 (Pillow 1)")


def make(tmp_path, *more, published=None):
  """Runs the command; returns the page and what was printed."""
  lines = []
  argv = ["--dataset=kodak", f"--results_dir={tmp_path / 'results'}", f"--out={tmp_path / 'out'}"]
  path = report.run([*argv, *more], say=lines.append)
  assert path == tmp_path / "out" / "index.html"
  return path.read_text(), "\n".join(lines)


def table(tmp_path, name):
  return list(csv.DictReader(io.StringIO((tmp_path / "out" / name).read_text())))


@pytest.fixture(autouse=True)
def no_published(monkeypatch, tmp_path):
  monkeypatch.setattr(configs, "PUBLISHED_DIR", tmp_path / "published")


# --- Bjontegaard deltas ---


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0, 1.25])
def test_bd_rate_of_a_scaled_rate_is_the_scale(scale):
  found = bd.bd_rate(ANCHOR, curve([b * scale for b in BPP], PSNR))
  assert found.value == pytest.approx(100 * (scale - 1), abs=0.1)
  assert found.overlap == (26.0, 38.0)
  assert found.share == 1
  assert found.remark == ""


def test_bd_psnr_of_a_raised_curve_is_the_height():
  found = bd.bd_psnr(ANCHOR, curve(BPP, [p + 0.7 for p in PSNR]))
  assert found.value == pytest.approx(0.7, abs=1e-9)
  assert found.overlap == (0.1, 1.6)


def test_bd_rate_by_msssim():
  anchor = dataclasses.replace(ANCHOR, msssim_db=(8.0, 10.0, 13.0, 16.0, 20.0))
  other = dataclasses.replace(anchor, bpp=tuple(0.9 * b for b in BPP))
  assert bd.bd_rate(anchor, other, bd.MSSSIM).value == pytest.approx(-10, abs=0.1)
  refused = bd.bd_rate(ANCHOR, other, bd.MSSSIM)
  assert refused.value is None
  assert refused.remark == "the anchor has no MS-SSIM"


def test_curves_without_common_quality_are_refused_with_the_reason():
  found = bd.bd_rate(ANCHOR, curve(BPP, [p + 20 for p in PSNR]))
  assert found.value is None
  assert found.remark == (
    "no common PSNR: the curve has 46 to 58 dB, the anchor 26 to 38 dB"
  )  # fmt: skip
  found = bd.bd_psnr(ANCHOR, curve([10 * 2**b for b in range(5)], PSNR))
  assert found.value is None
  assert found.remark == (
    "no common rate: the curve has 10 to 160 bpp, the anchor 0.1 to 1.6 bpp"
  )  # fmt: skip


def test_one_point_is_refused_and_few_points_are_called_coarse():
  found = bd.bd_rate(ANCHOR, curve([0.3], [30.0]))
  assert found.value is None
  assert found.remark == "the curve has one usable point; interpolation needs two"
  found = bd.bd_rate(curve([0.3], [30.0]), ANCHOR)
  assert "the anchor has one usable point" in found.remark
  found = bd.bd_rate(ANCHOR, curve(BPP[:2], PSNR[:2]))
  assert found.value == pytest.approx(0, abs=5)
  assert found.remark == "coarse: 2 points"


def test_a_short_overlap_is_stated():
  found = bd.bd_rate(ANCHOR, curve(BPP, [p + 8 for p in PSNR]))
  assert found.overlap == (34.0, 38.0)
  assert found.share == pytest.approx(1 / 3)
  assert found.remark == "short overlap"


def test_points_beaten_by_their_own_curve_do_not_count():
  bumpy = curve([*BPP, 0.5, 0.2], [*PSNR, 30.0, 27.0])
  assert bd.front(bumpy) == list(zip(BPP, PSNR))
  found = bd.bd_rate(ANCHOR, bumpy)
  assert found.value == pytest.approx(0, abs=1e-9)
  assert found.remark == "not counted: 2 points beaten by others of the curve"


def test_lossless_points_do_not_break_a_curve():
  assert bd.front(curve([0.1, 0.2, 8.0], [30.0, 31.0, math.inf])) == [(0.1, 30.0), (0.2, 31.0)]


def test_published_bd_rates_are_reproduced():
  path = configs.SHARED_DIR / "reference" / "reference_rd.json"
  if not path.is_file():
    pytest.skip(f"no published numbers at {path} (NTC_SHARED_DIR)")
  content = json.loads(path.read_text())
  curves = {}
  for c in content["curves"]:
    key = (c["source"], c["codec"], c["dataset"])
    if c.get("psnr_rgb"):
      order = np.argsort(c["bpp"])
      curves[key] = curve([c["bpp"][i] for i in order], [c["psnr_rgb"][i] for i in order])
  rows = content["derived_bd_rate"]["rows"]
  for row in rows:
    source, codec = row["anchor"].split(":")
    anchor = next(
      c for k, c in curves.items() if k[0].endswith(source) and k[1:] == (codec, row["dataset"])
    )
    test = curves[row["source"], row["codec"], row["dataset"]]
    found = bd.bd_rate(anchor, test)
    assert found.value == pytest.approx(row["bd_rate_pct"]["pchip"], abs=0.1), row
    assert found.overlap == pytest.approx(row["psnr_overlap_db"], abs=0.01)
  assert len(rows) > 200


# --- Where a curve beats the anchor ---


def test_gain_finds_where_a_curve_is_higher():
  tilted = curve(BPP, [27.0, 29.0, 31.5, 34.0, 37.0])
  found = bd.gain(ANCHOR, tilted)
  assert found.rates == (0.1, 1.6)
  assert found.most_db == pytest.approx(1.0)
  assert found.most_at == pytest.approx(0.1)
  ((low, high),) = found.above
  assert (low, high) == pytest.approx((0.1, 0.4), rel=0.01)
  assert found.least_db == pytest.approx(-1.0)
  sentence = bd.gain_sentence(found)
  assert sentence.startswith("higher from 0.10 to 0.40 bpp: at most +1.00 dB at 0.10 bpp")
  assert sentence.endswith("lower by up to 1.00 dB.")


def test_gain_says_everywhere_nowhere_and_no_common_rates():
  above = bd.gain_sentence(bd.gain(ANCHOR, curve(BPP, [p + 1 for p in PSNR])))
  assert above.startswith("higher at every common rate (0.10 to 1.60 bpp)")
  below = bd.gain_sentence(bd.gain(ANCHOR, curve(BPP, [p - 1 for p in PSNR])))
  assert below.startswith("lower at every common rate (0.10 to 1.60 bpp); nearest with \u22121.00")
  apart = bd.gain(ANCHOR, curve([20, 40], [40.0, 50.0]))
  assert apart is None
  assert bd.gain_sentence(apart) == "no rates in common."


# --- Anchors ---


def series(*curves_):
  paper = results.Publication("a title", "a codec", "a paper", "files; mean")
  return [bd.Series(c, paper if c.source == "published" else None) for c in curves_]


def test_the_default_anchor_is_jpeg_then_any_classical_codec_then_the_first_curve():
  own = curve(BPP, PSNR, "factorized-1")
  webp, jpeg = curve(BPP, PSNR, "classical-webp"), ANCHOR
  paper = curve(BPP, PSNR, "published-bpg", source="published")
  assert bd.pick_anchor(series(paper, own, webp, jpeg), None).curve is jpeg
  assert bd.pick_anchor(series(paper, own, webp), None).curve is webp
  assert bd.pick_anchor(series(paper, own), None).curve is own
  assert bd.pick_anchor(series(paper), None).curve is paper


def test_an_anchor_is_found_by_label_group_codec_or_part_of_a_label():
  all_series = series(
    curve(BPP, PSNR, "classical-jpeg", "JPEG 4:2:0"),
    curve(BPP, PSNR, "classical-jpeg444", "JPEG 4:4:4"),
    curve(BPP, PSNR, "published-bpg444", "BPG [paper]", source="published"),
  )
  for wanted, index in (
    ("jpeg", 0), ("classical-jpeg444", 1), ("JPEG 4:4:4", 1), ("bpg444", 2), ("paper", 2),
  ):  # fmt: skip
    assert bd.pick_anchor(all_series, wanted) is all_series[index]
  with pytest.raises(bd.AnchorError, match="fits more than one curve"):
    bd.pick_anchor(all_series, "4:")
  with pytest.raises(bd.AnchorError, match=r"Known: JPEG 4:2:0 \(jpeg\); .*bpg444"):
    bd.pick_anchor(all_series, "vtm")


# --- The command ---


class Links(HTMLParser):
  """Collects everything that a browser would fetch, and checks that tags close."""

  def __init__(self, text):
    super().__init__()
    self.found = []
    self.open = []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
      if values.get(name) is not None:
        self.found.append(values[name])
    if tag not in ("meta", "br"):
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(tmp_path):
  write_jpeg(tmp_path / "results")
  write_curve(tmp_path / "results", 0.9)
  write_curve(tmp_path / "results", 0.89, mode="estimated")
  text, printed = make(tmp_path)
  assert all(link.startswith("#") for link in Links(text).found)
  assert not re.search(r"url\((?!#)|@import|<script|<link", text)
  for url in re.findall(r"https?://[^\s\"'<>]+", text):
    assert url.startswith("http://www.w3.org/"), url  # Names of XML namespaces; never fetched.
  assert "prefers-color-scheme:dark" in text
  assert 'name="viewport"' in text
  assert text.count("<svg") > 2
  assert "<b>factorized 1001</b>: higher at every common rate" in text
  assert "\u221210.0 %" in text
  assert "-10.0 %" in printed
  assert printed.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'index.html'}"
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
    "bd_matrix.csv", "bd_rate.csv", "cost_seconds.png", "cost_seconds.svg", "costs.csv",
    "curves.csv", "index.html", "rd_mse.png", "rd_mse.svg", "rd_msssim.png",
    "rd_msssim.svg", "rd_psnr.png", "rd_psnr.svg", "records.csv",
  ]  # fmt: skip
  assert (tmp_path / "out" / "rd_psnr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_texts_from_results_cannot_break_the_page(tmp_path):
  write_curve(tmp_path / "results", label='<script>alert("x")</script> & "co"')
  text, _ = make(tmp_path, "--title=<b>bold")
  Links(text)
  assert "<script" not in text
  assert "&lt;b&gt;bold" in text


def test_tables_hold_every_point_and_every_picture(tmp_path):
  write_jpeg(tmp_path / "results")
  write_curve(tmp_path / "results", 0.9)
  make(tmp_path)
  points = table(tmp_path, "curves.csv")
  assert len(points) == 10
  own = [p for p in points if p["group"] == "factorized-1001"]
  assert [float(p["bpp"]) for p in own] == pytest.approx([0.9 * b for b in BPP])
  assert [float(p["psnr_db"]) for p in own] == pytest.approx(PSNR)
  assert own[0]["source"] == "bitstream"
  assert float(own[0]["msssim_db"]) == pytest.approx(13.0)
  records = table(tmp_path, "records.csv")
  assert len(records) == 20
  assert {r["image"] for r in records} == {"kodim00.png", "kodim01.png"}
  assert float(records[-1]["psnr_db"]) == pytest.approx(38.05)
  assert records[-1]["lpips"] == ""
  (row,) = table(tmp_path, "bd_rate.csv")
  assert row["anchor"] == "JPEG 4:2:0 (Pillow 1)"
  assert float(row["bd_rate_percent"]) == pytest.approx(-10, abs=0.1)
  assert float(row["psnr_overlap_low_db"]) == pytest.approx(26)
  assert float(row["max_gain_db"]) > 0


def test_refused_comparisons_say_why(tmp_path):
  write_jpeg(tmp_path / "results")
  results.write(tmp_path / "results", result(0.5, 30))
  text, printed = make(tmp_path)
  (row,) = table(tmp_path, "bd_rate.csv")
  assert row["bd_rate_percent"] == ""
  reason = "the curve has one usable point; interpolation needs two"
  assert row["bd_rate_remark"] == reason
  assert reason in text and reason in printed


@pytest.mark.slow
def test_lpips_is_drawn_where_it_is_known(tmp_path):
  write_curve(tmp_path / "results", lpips=0.2)
  text, _ = make(tmp_path)
  assert "LPIPS (lower is better)" in text
  assert (tmp_path / "out" / "rd_lpips.svg").is_file()
  for path in results.find(tmp_path / "results", "kodak"):
    path.unlink()
  write_curve(tmp_path / "results")
  make(tmp_path)
  assert not (tmp_path / "out" / "rd_lpips.svg").exists()


def test_every_dot_names_its_run(tmp_path):
  write_curve(tmp_path / "results")
  text, _ = make(tmp_path)
  for wid in range(5):
    assert f"<title>factorized 1001, rd_lambda={wid}\n" in text


def test_damaged_files_are_named_and_the_rest_is_drawn(tmp_path):
  folder = tmp_path / "results"
  write_jpeg(folder)
  good = results.write(folder, result()).read_text()
  bad = {
    "torn.json": good[:300],
    "list.json": "[1, 2]",
    "few.json": json.dumps({**json.loads(good), "records": json.loads(good)["records"][:1]}),
    "norun.json": json.dumps({**json.loads(good), "run": {}}),
    "mode.json": json.dumps({**json.loads(good), "mode": "fast"}),
    "step.json": json.dumps({**json.loads(good), "step": "last"}),
    "version.json": json.dumps({**json.loads(good), "schema_version": 99}),
    "number.json": json.dumps(
      {**json.loads(good), "records": [{**r, "bpp": "?"} for r in json.loads(good)["records"]]}
    ),
    "copy.json": good,
  }
  for name, content in bad.items():
    (folder / "kodak" / "bitstream" / name).write_text(content)
  text, printed = make(tmp_path)
  found = report_data.load(folder, "kodak")
  named = {p.path.name: p.reason for p in found.left_out}
  assert set(named) == set(bad)
  assert len(found.results) == 6
  assert "2 pictures: not complete" in named["few.json"]
  assert "schema version 99" in named["version.json"]
  assert named["norun.json"] == "no field 'family'"
  for name in named:
    assert f"<code>{name}</code>" in text
    assert name in printed


def test_results_of_other_pictures_are_left_out_and_said(tmp_path):
  folder = tmp_path / "results"
  write_jpeg(folder)
  results.write(folder, result(xid="other", hash="cd" * 32))
  results.write(folder, result(xid="tecnick", dataset="tecnick"))
  foreign = (
    folder / "tecnick" / "bitstream" / "factorized-rd_lambda=0-step=1000-xid=tecnick-wid=0.json"
  )
  foreign.rename(folder / "kodak" / "bitstream" / foreign.name)
  text, _ = make(tmp_path)
  loaded = report_data.load(folder, "kodak")
  assert {r.dataset["hash"] for r in loaded.results} == {HASH}
  assert loaded.other_pictures == 1
  assert [p.reason for p in loaded.left_out] == [
    "of data set 'tecnick'",
    f"measured on other pictures (2 of hash {'cd' * 6}; the report is of hash {HASH[:12]})",
  ]
  assert "1 result measured on other pictures" in text
  assert {p["group"] for p in table(tmp_path, "curves.csv")} == {"classical-jpeg"}


def test_underscored_experiments_are_ignored(tmp_path):
  write_jpeg(tmp_path / "results")
  results.write(tmp_path / "results", result(xid="_debug"))
  text, _ = make(tmp_path)
  assert "_debug" not in text


def test_earlier_steps_are_listed_and_not_drawn(tmp_path):
  write_curve(tmp_path / "results")
  results.write(tmp_path / "results", result(BPP[0], 20.0, wid=0, step=500))
  text, _ = make(tmp_path)
  assert text.count("(earlier step)") == 1
  assert len(table(tmp_path, "curves.csv")) == 5


def test_lossless_pictures_are_said_to_be_left_out_of_the_mean(tmp_path):
  write_curve(tmp_path / "results", psnr_db=None, mse=0.0)
  results.write(tmp_path / "results", result(xid="2"))
  text, _ = make(tmp_path)
  assert "10 records without any error" in text


def write_run(folder, wid, state, **facts):
  unit = hyper.WorkUnit("factorized", "train", {}, wid, {}, f"rd_lambda={wid}", "a.py")
  run = runs.RunDir.of(folder, "1001", unit)
  run.create(unit, "1001")
  run.write_state(state, **facts)
  return run


def test_runs_without_results_are_listed_with_their_state(tmp_path):
  write_jpeg(tmp_path / "results")
  write_curve(tmp_path / "results", 0.9, points=3)
  results.write(tmp_path / "results", result(xid="other"))
  for wid in range(3):
    write_run(tmp_path / "xms", wid, "DONE", step=1000)
  write_run(tmp_path / "xms", 3, "FAILED", step=70, reason="loss is NaN")
  damaged = write_run(tmp_path / "xms", 4, "RUNNING")
  damaged.work_unit_file.write_text("{")
  text, printed = make(tmp_path, f"--runs={tmp_path}/xms/*")
  assert "Runs without results" in text
  assert "1001/wid=3-rd_lambda=3" in text and "FAILED" in text and "loss is NaN" in text
  assert "1001/wid=4-rd_lambda=4" in text and "its record is damaged" in text
  assert "1001/wid=2-rd_lambda=2</code>" not in text
  assert "FAILED, step 70, loss is NaN" in printed
  assert "1 result of other runs not shown" in text
  groups = {p["group"] for p in table(tmp_path, "curves.csv")}
  assert groups == {"classical-jpeg", "factorized-1001"}


def test_a_sweep_without_any_result_has_a_page_too(tmp_path):
  write_run(tmp_path / "xms", 0, "RUNNING")
  text, printed = make(tmp_path, f"--runs={tmp_path}/xms/*")
  assert "1001/wid=0-rd_lambda=0" in text
  assert "No curves yet." in printed


def published(**changes):
  record = {
    "label": "BPG 4:4:4", "codec": "bpg444", "source": "a paper", "convention": "files; mean",
    "dataset": "kodak", "bpp": [0.4, 0.1, 0.2], "psnr_db": [36.0, 30.0, 33.0],
  }  # fmt: skip
  return {**record, **changes}


def write_published(*records, name="a.json"):
  configs.PUBLISHED_DIR.mkdir(exist_ok=True)
  content = {"schema_version": 1, "curves": list(records)}
  (configs.PUBLISHED_DIR / name).write_text(json.dumps(content))


@pytest.mark.slow
def test_published_curves_are_drawn_compared_and_sourced(tmp_path):
  write_jpeg(tmp_path / "results")
  write_published(published(), published(dataset="tecnick", label="elsewhere"))
  text, printed = make(tmp_path)
  assert '<b class="code">1</b><span>BPG 4:4:4 [a paper]' in text
  assert "files; mean" in text
  assert "elsewhere" not in text
  (row,) = table(tmp_path, "bd_rate.csv")
  assert (row["group"], row["source"]) == ("published-bpg444", "published")
  assert float(row["bd_rate_percent"]) < 0
  _, printed = make(tmp_path, "--anchor=bpg444")
  assert printed.startswith("Anchor: BPG 4:4:4 [a paper]")


def write_several():
  write_published(
    published(),
    published(label="VTM", codec="vtm", source="b/repository", rate="files"),
    published(label="HM", codec="hm", source="b/repository", on_request=True),
    published(label="Guess", codec="guess", rate="estimate", on_request=True),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "wanted, drawn",
  [
    ([], ["bpg444", "vtm"]),
    (["--published=none"], []),
    (["--published=all"], ["bpg444", "vtm", "hm", "guess"]),
    (["--published=HM"], ["hm"]),
    (["--published=default,g*"], ["bpg444", "vtm", "guess"]),
    (["--published=b/repository"], ["vtm", "hm"]),
    (["--anchor=hm"], ["bpg444", "vtm", "hm"]),
    (["--anchor=hm", "--published=none"], ["hm"]),
    (["--anchor=jpeg", "--published=none"], []),
  ],
)
def test_published_curves_are_chosen_by_name(tmp_path, wanted, drawn):
  write_jpeg(tmp_path / "results")
  write_several()
  text, printed = make(tmp_path, *wanted)
  found = dict.fromkeys(p["group"] for p in table(tmp_path, "curves.csv"))
  assert list(found) == ["classical-jpeg", *(f"published-{codec}" for codec in drawn)]
  left = [c for c in ("bpg444", "vtm", "hm", "guess") if c not in drawn]
  for codec in left:
    assert f"(<code>{codec}</code>)" in text
  assert (f"or names): {', '.join(left)}" in printed) == bool(left)


def test_an_unknown_published_name_says_which_there_are(tmp_path):
  write_jpeg(tmp_path / "results")
  write_several()
  with pytest.raises(report.ReportError, match=r"--published=av1: .*Known: bpg444, vtm, hm, guess"):
    make(tmp_path, "--published=default,av1")


def test_published_rates_are_told_apart(tmp_path):
  write_jpeg(tmp_path / "results")
  write_several()
  text, _ = make(tmp_path, "--published=all")
  for said in ("publication, files", "publication, estimate", ">publication<"):
    assert said in text
  rates = {p["group"]: p["published_rate"] for p in table(tmp_path, "curves.csv")}
  assert rates["published-guess"] == "estimate"
  assert rates["published-bpg444"] == "not stated"
  assert rates["classical-jpeg"] == ""


@pytest.mark.slow
def test_every_published_curve_has_a_switch_a_number_and_its_source(tmp_path):
  write_jpeg(tmp_path / "results")
  write_published(
    published(commit="c0ffee", files=["a/file.txt"]), published(label="<HM>", codec="hm")
  )
  text, _ = make(tmp_path)
  Links(text)
  for number in (1, 2):
    assert f'<label class="p{number}"><input type="checkbox" checked/>' in text
    assert f"label.p{number} input:not(:checked)) g.p{number}{{display:none}}" in text
    for kind in ("line", "dots", "end"):
      assert f'class="p{number} {kind}"' in text
  assert "c0ffee a/file.txt" in text
  assert "<HM>" not in text


def test_numbers_of_published_curves_lie_on_their_curves_and_apart(tmp_path):
  """Ten curves side by side: every number is on its own curve, and none covers another."""
  curves = [published(label=f"c{i}", codec=f"c{i}", bpp=[b * (1 + 0.12 * i) for b in BPP],
                      psnr_db=list(PSNR)) for i in range(10)]  # fmt: skip
  write_published(*curves)
  drawn = report_content.build("kodak", tmp_path / "results").series
  from matplotlib.figure import Figure

  axes = Figure().add_subplot()
  axes.set_xlim(0, 2)
  axes.set_ylim(25, 39)
  lines = [(i, list(zip(s.curve.bpp, s.curve.psnr_db))) for i, s in enumerate(drawn, 1)]
  report_plots._write_numbers(axes, lines)
  spots = {int(t.get_text()): t.get_position() for t in axes.texts}
  assert sorted(spots) == list(range(1, 11))
  for number, (x, y) in spots.items():
    off = {i: abs(np.interp(x, *zip(*points), left=0, right=0) - y) for i, points in lines}
    assert min(off, key=off.get) == number
    assert off[number] < 1e-6
    for other, (u, v) in spots.items():
      assert other == number or abs(x - u) > 0.08 or abs(y - v) > 0.6


def test_published_curves_alone_make_a_report(tmp_path):
  write_published(published(), published(label="other", codec="x", msssim_db=[14, 9, 12]))
  text, _ = make(tmp_path)
  assert text.count("[a paper]") > 2


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes, words",
  [
    ({"psnr_db": [1.0]}, "3 values of bpp, 1 of psnr_db"),
    ({"msssim_db": [1.0]}, "3 values of bpp, 1 of msssim_db"),
    ({"bpp": [0.0, 0.1, 0.2]}, "a rate of 0"),
    ({"bpp": ["a", "b", "c"]}, "must be real number"),
    ({"rate": "guessed"}, "rate 'guessed'; known: files, streams, estimate, not stated"),
  ],
)
def test_damaged_published_files_are_named(tmp_path, changes, words):
  write_jpeg(tmp_path / "results")
  write_published(published(**changes))
  make(tmp_path)
  found, left_out = report_data.load_published(configs.PUBLISHED_DIR, "kodak")
  assert not found
  assert re.search(words, left_out[0].reason)


def test_wrong_commands_name_the_fix(tmp_path):
  with pytest.raises(flags.UsageError, match="--dataset is needed"):
    report.run([])
  with pytest.raises(report.ReportError, match=r"(?s)No results of data set 'kodak'.*classical"):
    make(tmp_path)
  write_curve(tmp_path / "results", dataset="tecnick")
  with pytest.raises(report.ReportError, match="There are results of: tecnick"):
    make(tmp_path)
  write_jpeg(tmp_path / "results")
  with pytest.raises(bd.AnchorError, match="Known: JPEG"):
    make(tmp_path, "--anchor=vtm")
  with pytest.raises(runs.RunError, match="No run directory matches"):
    make(tmp_path, "--runs=nothing/*")


def test_the_report_imports_no_tensorflow(tmp_path):
  write_jpeg(tmp_path / "results")
  program = (
    "import sys; from common import report; "
    f"report.run(['--dataset=kodak', '--results_dir={tmp_path / 'results'}', "
    f"'--out={tmp_path / 'out'}']); "
    "assert not any(m.split('.')[0] in ('tensorflow', 'keras') for m in sys.modules)"
  )
  subprocess.run([sys.executable, "-c", program], check=True, cwd=configs.PROJECT_DIR)


@pytest.mark.slow
def test_200_runs_take_less_than_3_seconds_of_a_fast_processor(tmp_path):
  folder = tmp_path / "results"
  for experiment in range(25):
    for wid, (bpp, psnr) in enumerate(zip(np.linspace(0.1, 2, 8), np.linspace(27, 40, 8))):
      scale = 1 + 0.02 * experiment
      results.write(
        folder,
        result(float(bpp * scale), float(psnr), xid=f"10{experiment:02d}", wid=wid, num_images=24),
      )
  command = [sys.executable, "-m", "common.report", "--dataset=kodak", f"--results_dir={folder}"]
  seconds = []
  for _ in range(5):  # The first may build matplotlib's font cache.
    slowness = processor_slowness()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, f"--out={tmp_path / 'out'}"], check=True, cwd=configs.PROJECT_DIR)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of one processor, for the machine may be busy; of a slower one, as much more.
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    seconds.append(used / min(slowness, processor_slowness()))
    if seconds[-1] < 3:
      break
  assert seconds[-1] < 3, seconds
  assert len(table(tmp_path, "records.csv")) == 4800
  curves = len({p["label"] for p in table(tmp_path, "curves.csv")})
  assert len(table(tmp_path, "bd_matrix.csv")) == curves * (curves - 1)
  assert len(table(tmp_path, "costs.csv")) == curves


def test_bd_rates_of_measures_that_fall_are_over_their_logarithm():
  anchor = results.RDCurve("a", (0.2, 0.4, 0.8), (28.0, 31.0, 34.0), "bitstream",
                           lpips=(0.4, 0.2, 0.1), mse=(103.0, 51.7, 25.9))  # fmt: skip
  half = results.RDCurve("h", (0.1, 0.2, 0.4), (28.0, 31.0, 34.0), "bitstream",
                         lpips=(0.4, 0.2, 0.1), mse=(103.0, 51.7, 25.9))  # fmt: skip
  for metric in (bd.LPIPS, bd.MSE):
    assert bd.bd_rate(anchor, half, metric).value == pytest.approx(-50.0)
    assert bd.bd_rate(half, anchor, metric).value == pytest.approx(100.0)
  (compared,) = bd.compare(bd.Series(anchor), [bd.Series(half)])
  assert compared.rate_by_lpips.value == pytest.approx(-50.0)


# --- Every curve against every other ---


def test_the_matrix_holds_what_each_pair_gives_and_its_inverse():
  curves = [
    ANCHOR,
    curve([0.9 * b for b in BPP], [p + 0.2 for p in PSNR], "a-1"),
    curve(BPP, [26.5, 28.0, 32.0, 34.0, 39.0], "a-2"),
    curve(BPP, [p + 20 for p in PSNR], "a-3"),
  ]
  found = bd.matrix(series(*curves))
  for i, tested in enumerate(curves):
    for k, anchor in enumerate(curves):
      if i == k:
        assert found.rates[i][k] is None and found.psnrs[i][k] is None
      else:
        assert found.rates[i][k] == bd.bd_rate(anchor, tested)
        assert found.psnrs[i][k] == bd.bd_psnr(anchor, tested)
  there, back = found.rates[1][0].value, found.rates[0][1].value
  assert (1 + there / 100) * (1 + back / 100) == pytest.approx(1)
  assert found.psnrs[1][2].value == pytest.approx(-found.psnrs[2][1].value)
  assert found.rates[3][0].remark.startswith("no common PSNR")


def test_both_directions_agree_with_the_package():
  import bjontegaard

  other = curve([0.08, 0.2, 0.5, 0.9, 1.5], [26.5, 28.0, 32.0, 34.0, 37.0], "a-2")
  options = {"method": "pchip", "require_matching_points": False, "min_overlap": 0}
  for a, b in ((ANCHOR, other), (other, ANCHOR)):
    values = (a.bpp, a.psnr_db, b.bpp, b.psnr_db)
    assert bd.bd_rate(a, b).value == pytest.approx(bjontegaard.bd_rate(*values, **options))
    assert bd.bd_psnr(a, b).value == pytest.approx(bjontegaard.bd_psnr(*values, **options))


@pytest.mark.slow
def test_comparisons_and_matrix_are_sorted_by_bd_rate(tmp_path):
  write_jpeg(tmp_path / "results")
  for xid, scale in (("worse", 1.3), ("best", 0.6), ("better", 0.9)):
    write_curve(tmp_path / "results", scale, xid=xid)
  results.write(tmp_path / "results", result(0.5, 30, xid="point"))
  text, _ = make(tmp_path)
  rows = table(tmp_path, "bd_rate.csv")
  assert [r["label"].split()[-1] for r in rows] == ["best", "better", "worse", "point"]
  pairs = table(tmp_path, "bd_matrix.csv")
  order = ["factorized best", "factorized better", "JPEG 4:2:0 (Pillow 1)", "factorized worse"]
  assert list(dict.fromkeys(p["label"] for p in pairs)) == order
  pair = next(p for p in pairs if p["label"] == order[0] and p["anchor"] == order[1])
  assert float(pair["bd_rate_percent"]) == pytest.approx(100 * (0.6 / 0.9 - 1), abs=0.1)
  assert float(pair["psnr_overlap_low_db"]) == pytest.approx(26)
  assert "1 curve left out: of one point" in text
  compared = text[text.index("<h2>Compared") : text.index("<h2>Every curve")]
  places = [compared.index(f"<span>{name}") for name in order]
  assert places == sorted(places)  # The anchor's row stands where its 0 % belongs.


def test_codes_are_letters_for_own_and_numbers_for_published_curves():
  keys = [f"o{i}" for i in (1, 2, 26, 27, 52, 53, 703)]
  assert [report_look.code(k) for k in keys] == ["A", "B", "Z", "AA", "AZ", "BA", "AAA"]
  assert report_look.code("p12") == "12"
  own, paper = ANCHOR, curve(BPP, PSNR, "published-x", "x", "published")
  assert report_look.keys(series(own, paper)) == {own.label: "o1", "x": "p1"}


# --- What decoding costs ---


def profiled(found, flops, device="a processor"):
  profile = {"decoder_flops_per_pixel": flops, "device": device}
  return dataclasses.replace(found, profile=profile)


def test_costs_come_from_profiles_records_and_publications(tmp_path):
  folder = tmp_path / "results"
  write_jpeg(folder)
  write_curve(folder, 0.8, xid="counted")
  results.write(folder, profiled(result(BPP[1] * 0.8, PSNR[1], xid="counted", wid=1), 41000))
  write_curve(folder, 0.7, xid="uncounted")
  write_published(published())
  content = json.loads((configs.PUBLISHED_DIR / "a.json").read_text())
  flops = {"f": 9e5, "g": 1000.0, "g_h": 500.0}
  content["complexity"] = [{"codec": "bpg444", "flops_per_pixel": flops}]
  (configs.PUBLISHED_DIR / "a.json").write_text(json.dumps(content))
  text, _ = make(tmp_path)
  rows = {r["group"]: r for r in table(tmp_path, "costs.csv")}
  assert float(rows["factorized-counted"]["decoder_flops_per_pixel"]) == 41000
  assert float(rows["published-bpg444"]["decoder_flops_per_pixel"]) == 1500
  assert rows["published-bpg444"]["decode_seconds_per_megapixel"] == ""
  assert "FLOPs are not counted" in rows["classical-jpeg"]["flops_remark"]
  assert "factorized.eval --profile" in rows["factorized-uncounted"]["flops_remark"]
  for group in ("factorized-counted", "factorized-uncounted", "classical-jpeg"):
    seconds = float(rows[group]["decode_seconds_per_megapixel"])
    assert seconds == pytest.approx(0.02 / 0.393216)
  assert "a processor" in rows["factorized-counted"]["device"]
  assert float(rows["factorized-counted"]["bd_rate_percent"]) == pytest.approx(-20, abs=0.1)
  start = text.index('id="cost_flops-figure_1"')
  plot = text[start : text.index("</svg>", start)]
  assert 'class="o2 dots"' in plot and 'class="p1 dots"' in plot
  assert 'class="o1 dots"' not in plot and 'class="o3 dots"' not in plot
  assert "Decoder, FLOPs per pixel: 41k\nBD-rate \u221220.0 %" in plot
  listed = text[text.index("Not in these plots") :]
  assert "<b>factorized uncounted</b>: no profile. Measure it: <code>python -m" in listed
  assert "<b>JPEG 4:2:0 (Pillow 1)</b>: a classical codec" in listed


def test_a_profile_stands_for_every_evaluation_of_its_run():
  one = profiled(result(), 500)
  one.run["workdir"] = "/runs/1"
  optimised = result(mode="itinf", xid="sga")
  optimised.run.update(workdir="/itinf/1", trained_run="/runs/1")
  stranger = result(xid="other")
  stranger.run["workdir"] = "/runs/2"
  known = report_cost.profiles([one, optimised, stranger])
  s, rate = series(ANCHOR)[0], bd.Delta(-1.0)
  assert report_cost.cost(s, [optimised], rate, known).flops == (500, 500, 500)
  without = report_cost.cost(s, [stranger], rate, known)
  assert without.flops is None and "--workdir '/runs/2'" in without.flops_remark


def test_seconds_are_over_all_pixels_and_estimates_have_none():
  found = result()
  records = tuple(
    dataclasses.replace(r, num_pixels=p, seconds_decode=s)
    for r, p, s in zip(found.records, (1_000_000, 3_000_000), (1.0, 0.2))
  )
  found = dataclasses.replace(found, records=records)
  assert report_cost.seconds_per_megapixel(found) == pytest.approx(0.3)
  estimated = result(mode="estimated", seconds_decode=None)
  cost = report_cost.cost(series(ANCHOR)[0], [estimated], bd.Delta(0.0), {})
  assert cost.seconds is None and "nothing was decoded" in cost.seconds_remark
  found.run["device"] = "a card"
  assert report_cost.device_of(found) == "a card"
  assert report_cost.device_of(result()) == report_cost.UNKNOWN_DEVICE


def test_cost_plots_leave_out_what_is_far_off_and_say_so():
  def cost(rate, flops=1000.0, remark=""):
    spread = None if flops is None else report_cost.Range(flops, flops, flops)
    return report_cost.Cost(series(ANCHOR)[0], rate, spread, remark, None, "untimed", ())

  costs = [cost(bd.Delta(v)) for v in (-30.0, -10.0, 0.0, 5.0)]
  far = cost(bd.Delta(900.0))
  refused = cost(bd.Delta(None, remark="too short"))
  uncounted = cost(bd.Delta(1.0), None, "no profile")
  everything = [*costs, far, refused, uncounted]
  drawn = [c for c, _, _ in report_plots.cost_points(everything, report_plots.FLOPS)]
  assert drawn == costs
  reasons = [report_plots.why_not(c, everything, report_plots.FLOPS) for c in everything]
  assert reasons == [
    "", "", "", "", "BD-rate +900.0 %, too far from the others", "no BD-rate: too short",
    "no profile",
  ]  # fmt: skip
  assert not report_plots.cost_points(everything, report_plots.SECONDS)
  assert (
    report_plots.FLOPS.text(41031.7) == "41k" and report_plots.SECONDS.text(0.0351) == "35.1 ms"
  )


def test_codes_in_the_cost_plot_do_not_cover_one_another():
  from matplotlib.figure import Figure

  axes = Figure().add_subplot()
  axes.set_xlim(0, 1)
  axes.set_ylim(0, 1)
  dots = [(f"o{i + 1}", 0.5 + 0.02 * (i % 2), 0.5 + 0.03 * (i // 2)) for i in range(6)]
  report_plots._write_codes(axes, dots)
  spots = [t.get_position() for t in axes.texts]
  assert len(spots) == 6
  for i, (x, y) in enumerate(spots):
    assert all(abs(x - u) > 0.02 or abs(y - v) > 0.025 for u, v in spots[:i])


def test_axes_follow_most_curves_not_the_worst():
  good = [list(zip(BPP, [p + 0.1 * i for p in PSNR])) for i in range(5)]
  bad = list(zip([b * 8 for b in BPP], [p - 20 for p in PSNR]))
  entries = [(s, points) for s, points in zip(series(*[ANCHOR] * 6), [*good, bad])]
  x_high, y_low, y_high = report_plots._limits(entries, bd.PSNR)
  assert 1.6 <= x_high < 3
  assert 18 < y_low < 26 and y_high > 38.4


# --- Training ---


def write_starts(run, times, end, logged=()):
  runs.write_json(run.environment_file, [{"time": t} for t in times])
  for t in logged:
    runs.append_jsonl(run.metrics_file, {"step": 1, "time": t})
  record = runs.read_json(run.state_file)
  runs.write_json(run.state_file, {**record, "time": end})


def test_training_is_stated_beside_curve_and_run(tmp_path):
  write_jpeg(tmp_path / "results")
  for wid, (bpp, psnr) in enumerate(zip(BPP, PSNR)):
    run = write_run(tmp_path / "xms", wid, "DONE", step=1000)
    write_starts(run, [1000.0], 1000.0 + 60 * (wid + 2))
    found = result(bpp * 0.8, psnr, wid=wid)
    found.run["workdir"] = str(run.path)
    results.write(tmp_path / "results", found)
  text, _ = make(tmp_path)
  assert "5 trained runs of 1,000 steps, 2.0\u20136.0 min each" in text
  assert "Trained, min" in text
  assert 'data-of="Trained, min">6.0</td>' in text


def test_the_wait_between_two_starts_is_no_training(tmp_path):
  run = write_run(tmp_path, 0, "DONE", step=1000)
  write_starts(run, [0.0, 9000.0], 9060.0, logged=[60.0, 120.0, 9030.0])
  found = result()
  found.run["workdir"] = str(run.path)
  assert report_data.training(found) == report_data.Training(1000, pytest.approx(3.0))
  run.write_state("RUNNING", step=10)
  assert report_data.training(found).minutes is None
  found.run["workdir"] = "/nowhere"
  assert report_data.training(found) == report_data.Training(1000, None)
  assert report_data.training(result(step=0, family="classical")) is None


# --- Pieces of a picture ---


@pytest.fixture
def gallery(tmp_path):
  """Results of JPEG on two small pictures, and where everything lies."""
  random = np.random.default_rng(0)
  folder = tmp_path / "gallery"
  folder.mkdir()
  ramp = np.linspace(0, 255, 96)[None, :, None] + np.zeros([64, 1, 3])
  for name in ("a.png", "b.png"):
    noise = np.zeros([64, 96, 3])
    noise[32:56, 64:88] = random.normal(0, 40, [24, 24, 3])
    Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8)).save(folder / name)
  images = data.load_eval_images(str(folder))
  for found in classical.evaluate("jpeg", [20, 50, 80], images, lpips=False):
    results.write(tmp_path / "results", found)
  return folder


def measured(folder, picture_of, wid=0, mode="bitstream", **run):
  """A run's results on the gallery: `picture_of` gives what it decodes, at 2 bits per pixel."""
  images = data.load_eval_images(str(folder))
  records = tuple(
    results.EvalRecord(
      image=name,
      num_pixels=image.size // 3,
      num_bytes=image.size // 12,
      bpp=2.0 + wid,
      bpp_estimated=None,
      seconds_encode=0.1,
      seconds_decode=0.1,
      **metrics.measure(image, picture_of(image), False),
    )
    for name, image in images
  )
  found = result(xid="1001", wid=wid, mode=mode)
  return dataclasses.replace(
    found,
    run={**found.run, "workdir": "/runs/one two", **run},
    dataset={"name": images.name, "images": [r.image for r in records], "hash": images.hash},
    records=records,
  )


def darker(image):
  return (image * 0.9).astype(np.uint8)


def crops_of(tmp_path, folder, crop="", bpp=None, curves=()):
  name = data.load_eval_images(str(folder)).name
  built = report_content.build(name, tmp_path / "results")
  wanted = report_crops.parse(crop, bpp, curves)
  return built, report_crops.make(built, str(folder), wanted)


def pixels(png):
  return np.array(Image.open(io.BytesIO(png)))


def test_crops_are_pieces_of_what_each_codec_gives_back(tmp_path, gallery):
  results.write(tmp_path / "results", found := measured(gallery, darker))
  saved = results.pictures_dir(tmp_path / "results", found)
  saved.mkdir(parents=True)
  original = np.array(Image.open(gallery / "b.png"))
  Image.fromarray(darker(original)).save(saved / "b.png")
  _, crops = crops_of(tmp_path, gallery, "b:60,30,20", bpp=1.9)
  assert (crops.image, crops.box) == ("b.png", (60, 30, 20, 20))
  np.testing.assert_array_equal(pixels(crops.original), original[30:50, 60:80])
  jpeg, own = crops.crops
  np.testing.assert_array_equal(pixels(own.png), darker(original)[30:50, 60:80])
  assert own.bpp == 2.0 and own.psnr_db == pytest.approx(found.records[1].psnr_db)
  quality = int(jpeg.runname.partition("=")[2])
  codec = classical.make("jpeg", quality)
  file = codec.compress(original)
  np.testing.assert_array_equal(pixels(jpeg.png), codec.decompress(file)[30:50, 60:80])
  assert jpeg.bpp == pytest.approx(8 * len(file) / (64 * 96)) and jpeg.remark == ""
  assert not crops.missing
  rates = [
    8 * len(classical.make("jpeg", q).compress(original)) / (64 * 96) for q in (20, 50, 80)
  ]  # fmt: skip
  assert abs(math.log(jpeg.bpp / 1.9)) == min(abs(math.log(r / 1.9)) for r in rates)


def test_missing_pictures_are_listed_with_the_command_that_makes_them(tmp_path, gallery):
  results.write(tmp_path / "results", found := measured(gallery, darker))
  _, crops = crops_of(tmp_path, gallery)
  (missing,) = crops.missing
  assert missing.reason == "no decoded picture was saved"
  saved = results.pictures_dir(tmp_path / "results", found)
  words = shlex.split(missing.command)
  assert words[:5] == ["python", "-m", "factorized.eval", "--workdir", "/runs/one two"]
  assert words[words.index("--save_dir") + 1] == str(saved)
  assert words[words.index("--dataset") + 1] == str(gallery)
  # A picture of other weights is refused, not shown under these results' numbers.
  saved.mkdir(parents=True)
  original = np.array(Image.open(gallery / "a.png"))
  Image.fromarray(255 - original).save(saved / "a.png")
  _, crops = crops_of(tmp_path, gallery)
  assert "is not the picture of these results" in crops.missing[0].reason
  (saved / "a.png").write_bytes(b"no picture")
  _, crops = crops_of(tmp_path, gallery)
  assert "not a picture" in crops.missing[0].reason


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "folder/c.webp"])
def test_evaluation_saves_pictures_where_the_report_looks(tmp_path, name):
  from common import eval_lib

  found = result(image=name)
  path = results.pictures_dir(tmp_path, found)
  written = results.result_path(tmp_path, "kodak", "bitstream", found.run, found.step)
  assert f"{path}.json" == str(written)
  eval_lib.save(path, name, np.zeros([8, 8, 3], np.uint8), None)
  candidate = report_crops._Candidate(series(ANCHOR)[0], found, found.records[0])
  saved = report_crops._saved(tmp_path, candidate)
  assert saved is not None and pixels(saved.read_bytes()).shape == (8, 8, 3)


def test_pictures_of_iterative_inference_are_found_in_its_run(tmp_path, gallery):
  workdir = tmp_path / "itinf"
  found = measured(gallery, darker, mode="itinf", workdir=str(workdir))
  results.write(tmp_path / "results", found)
  original = np.array(Image.open(gallery / "a.png"))
  (workdir / "images" / "a.png").mkdir(parents=True)
  Image.fromarray(darker(original)).save(workdir / "images" / "a.png" / "reconstruction.png")
  _, crops = crops_of(tmp_path, gallery)
  assert [c.series.curve.source for c in crops.crops] == ["bitstream", "itinf"]


@pytest.mark.slow
def test_the_page_holds_the_crops_and_stays_offline(tmp_path, gallery):
  results.write(tmp_path / "results", measured(gallery, darker))
  out = tmp_path / "out"
  lines = []
  argv = [f"--dataset={gallery}", f"--results_dir={tmp_path / 'results'}", f"--out={out}"]
  path = report.run([*argv, "--crop=a:0,0,32"], say=lines.append)
  text = path.read_text()
  sources = [link for link in Links(text).found if not link.startswith("#")]
  assert len(sources) == 2
  assert all(s.startswith("data:image/png;base64,") for s in sources)
  assert "<h2>a.png at about" in text
  assert "--save_dir" in text and "No decoded picture: 1 curve" in "\n".join(lines)
  assert len(text) < 5_000_000
  names = sorted(p.name for p in (out / "crops").iterdir())
  assert names[0] == "00-original.png" and len(names) == 2
  assert pixels((out / "crops" / names[0]).read_bytes()).shape == (32, 32, 3)
  report.run([*argv, "--crop=none"], say=lines.append)
  assert "data:image" not in path.read_text()
  assert not list((out / "crops").iterdir())


def test_by_default_the_piece_is_where_the_codecs_differ_most(tmp_path, gallery):
  _, crops = crops_of(tmp_path, gallery, ":0,0,24")
  assert crops.image == "a.png" and crops.box == (0, 0, 24, 24)
  original = np.zeros([64, 96, 3], np.uint8)
  good, bad = original.copy(), original.copy()
  bad[32:56, 64:88] = 200
  assert report_crops.busiest(original, [good, bad], 24, 24) == (64, 32)
  assert report_crops.busiest(original, [], 24, 24) == (36, 20)
  assert report_crops.busiest(original, [good, bad], 96, 64) == (0, 0)


@pytest.mark.parametrize(
  "curves, rate",
  [
    ([[0.1, 0.5, 1.0], [0.5, 2.0]], 0.5),
    ([[0.1, 0.2, 0.4, 0.8], [0.1, 0.2, 0.4, 0.8]], 0.1),  # All are as near: the lowest.
    ([[0.1, 0.4], [0.38, 3.0]], 0.38),
    ([[0.3]], 0.3),
  ],
)
def test_the_rate_of_crops_is_one_that_all_curves_come_near_to(curves, rate):
  assert report_crops.common_rate(curves) == rate


def test_crops_that_would_make_the_page_too_large_are_listed(tmp_path, gallery, monkeypatch):
  monkeypatch.setattr(report_crops, "BUDGET", 100)
  _, crops = crops_of(tmp_path, gallery)
  assert not crops.crops
  assert "too large" in crops.missing[0].reason


@pytest.mark.parametrize(
  "crop, bpp, words",
  [
    ("a:1", None, "IMAGE:X,Y"),
    ("a:1,2,3000", None, "a side has 8 to"),
    ("a", -1.0, "more than 0"),
    ("zebra", None, "Known: a.png, b.png"),
    ("a:90,0,32", None, "96x64 pixels; a piece of 32x32 at 90,0"),
  ],
)
def test_wrong_pieces_name_the_fix(tmp_path, gallery, crop, bpp, words):
  with pytest.raises(report_data.ReportError, match=words):
    crops_of(tmp_path, gallery, crop, bpp)


def test_slow_codecs_code_anew_only_when_named(tmp_path, gallery):
  for path in (tmp_path / "results").rglob("*.json"):
    found = results.read(path)
    records = tuple(dataclasses.replace(r, seconds_encode=300.0) for r in found.records)
    results.write(tmp_path / "results", dataclasses.replace(found, records=records))
  _, crops = crops_of(tmp_path, gallery)
  assert "takes about 300 s" in crops.missing[0].reason and not crops.crops
  _, crops = crops_of(tmp_path, gallery, curves=["jpeg"])
  assert len(crops.crops) == 1


def test_results_that_call_the_pictures_otherwise_are_listed(tmp_path, gallery):
  found = measured(gallery, darker)
  records = tuple(dataclasses.replace(r, image=f"x{r.image}") for r in found.records)
  results.write(tmp_path / "results", dataclasses.replace(found, records=records))
  _, crops = crops_of(tmp_path, gallery)
  assert [m.reason for m in crops.missing] == ["its results have no picture called a.png"]
  assert len(crops.crops) == 1


def test_pictures_of_tensorflow_datasets_are_not_loaded():
  entries = tuple(series(curve(BPP, PSNR, "factorized-1001")))
  loaded = report_data.Loaded((result(dataset="tfds-x"),), ())
  built = report_content.Report("tfds-x", "", loaded, entries, None, (), (), ())
  assert "not read here" in report_crops.make(built, "tfds:x", report_crops.Wanted()).problem


def test_crops_of_chosen_curves_only(tmp_path, gallery):
  results.write(tmp_path / "results", measured(gallery, darker))
  _, crops = crops_of(tmp_path, gallery, curves=["JPEG"])
  assert [c.series.curve.group for c in crops.crops] == ["classical-jpeg"]
  assert not crops.missing
  with pytest.raises(report_data.ReportError, match=r"--crop_curves=webp: .*classical-jpeg"):
    crops_of(tmp_path, gallery, curves=["webp"])


def test_a_data_set_that_is_not_here_has_no_crops_and_the_page_says_so(tmp_path):
  write_curve(tmp_path / "results")
  text, _ = make(tmp_path)
  assert "<h2>A piece of a picture</h2><p>None: the " in text


def test_the_style_sheet_nests_no_has(tmp_path):
  """`:has()` within `:has()` is invalid: browsers drop the whole rule without a word."""
  write_jpeg(tmp_path / "results")
  write_several()
  text, _ = make(tmp_path)
  style = text[text.index("<style>") : text.index("</style>")]
  assert style.count("{") == style.count("}")
  starts = [m.end() for m in re.finditer(r":has\(", style)]
  assert len(starts) > 8
  for start in starts:
    depth, end = 1, start
    while depth:
      depth += {"(": 1, ")": -1}.get(style[end], 0)
      end += 1
    assert ":has(" not in style[start:end]


def test_every_own_curve_has_a_switch_in_its_family(tmp_path):
  write_jpeg(tmp_path / "results")
  write_curve(tmp_path / "results", 0.9)
  text, _ = make(tmp_path)
  for key, family in (("o1", "classical"), ("o2", "factorized")):
    assert f'<label class="{key}"><input type="checkbox" checked/>' in text
    assert f'<li class="source">{family}</li>' in text
    assert f"label.{key} input:not(:checked)) g.{key}{{display:none}}" in text
    assert f'class="{key} line"' in text and f'class="{key} dots"' in text
