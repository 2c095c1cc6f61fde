"""bpgenc, bpgdec, EncoderApp and DecoderApp as small programs: the options of the real ones.

They keep pixels exactly at quantization 0 and coarser beyond; a broken stream ends them with 1.
"""

import stat
import sys

_COMMON = """#!{python}
import io, sys, zlib
import numpy as np
argv = sys.argv[1:]
def option(*names):
  for name in names:
    if name in argv:
      return argv[argv.index(name) + 1]
    for a in argv:
      if a.startswith(name + "="):
        return a.split("=", 1)[1]
  sys.exit("missing option " + names[0])
def coarse(x, qp):
  step = 1 << (int(qp) // 8)
  return np.minimum(x.astype(int) // step * step + step // 2, 255).astype(np.uint8)
def unpacked(data, magic):
  if data[:4] != magic:
    print("not a stream", file=sys.stderr)
    sys.exit(1)
  return zlib.decompress(data[4:])
"""

_PROGRAMS = {
  "bpgenc": """
if not argv:
  print("BPG Image Encoder version 0.9.8")
  sys.exit(1)
from PIL import Image
assert option("-f") in ("444", "420") and option("-b") == "8"
image = Image.open(argv[-1])
buffer = io.BytesIO()
Image.fromarray(coarse(np.array(image), option("-q"))).save(buffer, "PNG")
open(option("-o"), "wb").write(b"BPG\\xfb" + zlib.compress(buffer.getvalue()))
""",
  "bpgdec": """
data = unpacked(open(argv[-1], "rb").read(), b"BPG\\xfb")
open(option("-o"), "wb").write(data)
""",
  "EncoderApp": """
if not argv:
  print("VVCSoftware: VTM Encoder Version 23.4 [Linux][GCC]")
  sys.exit(0)
assert open(option("-c")).read() == "intra"
assert option("--InputChromaFormat") == "444" and option("--InputBitDepth") == "8"
size = int(option("--SourceWidth")) * int(option("--SourceHeight")) * 3
planes = np.fromfile(option("--InputFile"), np.uint8)
assert planes.size == size
packed = zlib.compress(coarse(planes, option("--QP")).tobytes())
open(option("--BitstreamFile"), "wb").write(b"VVC1" + packed)
""",
  "DecoderApp": """
assert option("-d") == "8"
open(option("-o"), "wb").write(unpacked(open(option("-b"), "rb").read(), b"VVC1"))
""",
}


def install(folder):
  """Writes the programs to `folder`/bin, and VTM's configuration beside it; returns the first."""
  programs = folder / "bin"
  programs.mkdir(parents=True)
  for name, code in _PROGRAMS.items():
    path = programs / name
    path.write_text(_COMMON.format(python=sys.executable) + code)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  (folder / "cfg").mkdir()
  (folder / "cfg" / "encoder_intra_vtm.cfg").write_text("intra")
  return programs
