"""Downloads, from a server on this machine: resumed, compared, put in place whole."""

import functools
import hashlib
import http.server
import threading

import pytest
from PIL import Image

import configs
from common import data, fetch
from tests.conftest import picture
from tests.test_unpack import MEMBERS, write_zip

CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
  def __init__(self, server_settings, *args):
    self.settings = server_settings
    super().__init__(*args)

  def do_GET(self):
    settings = self.settings
    settings["requests"].append(self.headers.get("Range"))
    content = settings["files"].get(self.path.lstrip("/"))
    if content is None:
      self.send_error(404)
      return
    first = 0
    if settings["ranges"] and self.headers.get("Range"):
      first = int(self.headers["Range"].split("=")[1].rstrip("-"))
      if first >= len(content):
        self.send_error(416)
        return
      self.send_response(206)
    else:
      self.send_response(200)
    rest = content[first:]
    self.send_header("Content-Length", str(len(rest)))
    self.end_headers()
    self.wfile.write(rest[: settings.pop("cut", len(rest))])

  def log_message(self, *unused):
    pass


@pytest.fixture
def server():
  settings = {"files": {"x.bin": CONTENT}, "requests": [], "ranges": True}
  with http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(Handler, settings)
  ) as served:
    threading.Thread(target=served.serve_forever, daemon=True).start()
    settings["url"] = f"http://127.0.0.1:{served.server_address[1]}"
    yield settings
    served.shutdown()


def one(server, sha256=DIGEST):
  return [fetch.Download(server["url"] + "/x.bin", "x.bin", sha256)]


def test_a_file_arrives_once(server, tmp_path):
  (path,) = fetch.fetch(one(server), tmp_path / "new" / "folder")
  assert path.read_bytes() == CONTENT
  fetch.fetch(one(server), path.parent)
  assert len(server["requests"]) == 1
  path.write_bytes(b"damaged")
  fetch.fetch(one(server), path.parent)
  assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on(server, tmp_path, ranges):
  server.update(cut=300_000, ranges=ranges)
  with pytest.raises(fetch.FetchError, match="300,000 bytes are kept"):
    fetch.fetch(one(server), tmp_path)
  assert not (tmp_path / "x.bin").exists()
  (path,) = fetch.fetch(one(server), tmp_path)
  assert path.read_bytes() == CONTENT
  assert server["requests"] == [None, "bytes=300000-"]


def test_all_received_but_not_yet_in_place(server, tmp_path):
  (tmp_path / ".x.bin.part").write_bytes(CONTENT)
  (path,) = fetch.fetch(one(server), tmp_path)
  assert path.read_bytes() == CONTENT


def test_a_wrong_file_is_thrown_away(server, tmp_path):
  with pytest.raises(fetch.FetchError, match="not the file it should be"):
    fetch.fetch(one(server, "0" * 64), tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(server, tmp_path):
  with pytest.raises(fetch.FetchError, match=r"nothing\.bin.*404"):
    fetch.fetch([fetch.Download(server["url"] + "/nothing.bin", "nothing.bin")], tmp_path)


@pytest.fixture
def site(server, tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "DATA_CACHE_DIR", tmp_path / "cache")
  monkeypatch.setattr(configs, "DATA_DIR", tmp_path / "data")
  pictures = {}
  for i in range(2):
    file = tmp_path / f"{i}.png"
    Image.fromarray(picture(8, 9, i)).save(file)
    pictures[f"{i}.png"] = file.read_bytes()
  archive = write_zip(tmp_path / "a.zip", MEMBERS).read_bytes()
  server["files"].update({**pictures, "a.zip": archive})
  monkeypatch.setattr(configs, "DOWNLOADS", {
    "two": {"url": server["url"],
            "files": {n: hashlib.sha256(c).hexdigest() for n, c in pictures.items()}},
    "zipped": {"url": server["url"], "files": {"a.zip": None}},
  })  # fmt: skip
  return server


def test_the_command_fetches_pictures_and_archives(site, tmp_path, capsys):
  assert data.main(["fetch", "two", "zipped"]) == 0
  said = capsys.readouterr().out
  assert "two: 2 pictures" in said and "zipped: 3 pictures" in said
  assert hashlib.sha256(site["files"]["a.zip"]).hexdigest() in said
  assert len(data.resolve(str(tmp_path / "data" / "two"))) == 2
  requests = len(site["requests"])
  assert data.main(["fetch", "two"]) == 0
  assert len(site["requests"]) == requests


def test_the_command_names_what_it_knows(site, capsys):
  assert data.main(["fetch", "three"]) == 1
  assert "Known: two, zipped" in capsys.readouterr().err


def test_the_hashes_of_kodak_are_those_of_the_pictures_here():
  folder = configs.DATA_DIR / "kodak"
  if not folder.is_dir():
    pytest.skip("kodak is not on this machine")
  files = configs.DOWNLOADS["kodak"]["files"]
  assert len(files) == 24
  for name in ("kodim01.png", "kodim24.png"):
    assert fetch.sha256_of(folder / name) == files[name]


def test_check_counts_and_names_broken_pictures(tmp_path, capsys):
  Image.fromarray(picture(8, 9)).save(tmp_path / "good.png")
  Image.fromarray(picture(8, 9)).save(tmp_path / "cut.png")
  content = (tmp_path / "cut.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(content[: len(content) * 2 // 3])
  assert data.main(["check", "--pixels", str(tmp_path)]) == 0
  said = capsys.readouterr().out
  assert ": 1 pictures" in said and "broken: cut.png" in said
