#!/usr/bin/env python3
"""Compresses pictures to files with a trained model, and decodes them.

usage:
  ./ntc.py compress PICTURE FILE.ntc [--workdir RUN [--step N|best] | --model MODEL.ntcm] [--rate N]
  ./ntc.py compress PICTURE ... --output_dir DIR [--workdir RUN | --model MODEL.ntcm]
  ./ntc.py decompress FILE.ntc PICTURE.png [--workdir RUN [--step N|best] | --model MODEL.ntcm]
  ./ntc.py decompress FILE.ntc ... --output_dir DIR [...]
  ./ntc.py export RUN [--step N|best] [--output MODEL.ntcm] [--decoder_only] [--half]
  ./ntc.py info FILE ...                 (of .ntc and .ntcm; starts at once)
  ./ntc.py COMMAND --help

A file names the model that decodes it by family and fingerprint. `export` writes a model into one
.ntcm file, which compresses and decodes without the run; those in the models folder (MODELS_DIR in
configs.py, or NTC_MODELS_DIR) are found by their fingerprint when neither --workdir nor --model is
given. `compress` takes the example model (EXAMPLE_MODEL) then. Existing files are overwritten with
--force only.

Exit codes: 0 done; 1 a file could not be made, and none was left half written; 2 the command line
is wrong, nothing was written; 130 interrupted.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from common import venv

if __name__ == "__main__":
  venv.use_project_venv(__file__)

import argparse
import contextlib
import errno
import importlib
import io
import math
import pathlib
import time

import configs
from common import artefacts, bitstream, flags, runs

if TYPE_CHECKING:
  import numpy as np

  from common.codec import BuildCodec, TrainableCodec

# Formats that keep every pixel, by the output's suffix.
_LOSSLESS = {".bmp": "BMP", ".png": "PNG", ".ppm": "PPM", ".tif": "TIFF", ".tiff": "TIFF"}
# An output of `compress` with such a name is a picture that --output_dir was forgotten for.
_PICTURES = (*_LOSSLESS, ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".pnm", ".webp")

_Pair = tuple[pathlib.Path, pathlib.Path]


class CommandError(RuntimeError):
  """A file cannot be made; the message names the fix."""


def main(argv: Sequence[str]) -> int:
  """The command line without the program's name; returns the exit code."""
  commands = {"compress": _compress, "decompress": _decompress, "export": _export, "info": _info}
  try:
    if not argv or argv[0] in ("--help", "-h", "-help", "help"):
      print((__doc__ or "").strip())
      return 0 if argv else 2
    if argv[0] not in commands:
      raise flags.UsageError(f"Unknown command {argv[0]!r}. Known: {', '.join(commands)}.")
    return commands[argv[0]](list(argv[1:]))
  except KeyboardInterrupt:
    print("Interrupted.", file=sys.stderr)
    return 130
  except flags.UsageError as e:
    print(f"Error: {e}", file=sys.stderr)
    return 2
  except Exception as e:
    if not _is_expected(e):
      raise
    print(f"Error: {_said(e)}", file=sys.stderr)
    return 1


def _is_expected(error: Exception) -> bool:
  """Whether an error's own text says it all: ours, and the system's. Others need a traceback."""
  ours = isinstance(error, CommandError) or type(error).__module__.startswith("common.")
  return ours or isinstance(error, OSError)


def _said(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f"{error.filename}: {error.strerror}."
  return str(error)


# --- Command lines -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise flags.UsageError(f"{message} (see ./ntc.py {self.prog.split()[-1]} --help).")


def _parser(command: str, description: str) -> _Parser:
  return _Parser(prog=f"ntc.py {command}", description=description, allow_abbrev=False)


def _add_files(parser: _Parser, inputs: str, output: str) -> None:
  parser.add_argument(
    "files",
    nargs="+",
    metavar="FILE",
    help=f"{inputs} and {output}; with --output_dir only {inputs}s",
  )
  parser.add_argument("--output_dir", metavar="DIR", help="folder for the outputs; made if missing")
  parser.add_argument("--force", action="store_true", help="overwrite existing files")
  parser.add_argument("--workdir", metavar="RUN", help="a run directory: train_xms/<xid>/wid=...")
  parser.add_argument("--step", help="of the run's checkpoint, or 'best'; default the newest")
  parser.add_argument("--model", metavar="MODEL.ntcm", help="an exported model")


def _check_model_flags(args: argparse.Namespace, needed: bool) -> None:
  if args.workdir is not None and args.model is not None:
    raise flags.UsageError("--workdir and --model both name a model: give one of them.")
  if args.step is not None and args.workdir is None:
    raise flags.UsageError("--step chooses among a run's checkpoints: it goes with --workdir.")
  if needed and args.workdir is None and args.model is None:
    if not configs.EXAMPLE_MODEL.is_file():
      raise flags.UsageError(
        "Which model? --workdir RUN names a trained run, --model MODEL.ntcm an exported one."
      )
    args.model = str(configs.EXAMPLE_MODEL)
    print(
      f"Note: with the example model; --workdir or --model name others. {args.model}",
      file=sys.stderr,
    )
  if args.model is not None and not pathlib.Path(args.model).is_file():
    raise flags.UsageError(f"No model file {args.model!r}. Export one: ./ntc.py export RUN")


def _pairs(args: argparse.Namespace, suffix: str) -> list[_Pair]:
  """Inputs and their outputs, checked before anything is loaded."""
  files = [pathlib.Path(name).expanduser() for name in args.files]
  if args.output_dir is not None:
    folder = pathlib.Path(args.output_dir).expanduser()
    if folder.exists() and not folder.is_dir():
      raise flags.UsageError(f"--output_dir={args.output_dir} is no folder.")
    pairs = [(path, folder / path.with_suffix(suffix).name) for path in files]
  elif len(files) == 2:
    pairs = [(files[0], files[1])]
    if files[1].is_dir():
      raise flags.UsageError(f"{files[1]} is a folder: write --output_dir {files[1]}")
    _check_parent(files[1])
  else:
    raise flags.UsageError(
      f"{len(files)} file{'s' * (len(files) > 1)}: name an input and an output, or inputs and "
      "--output_dir DIR."
    )
  targets: dict[pathlib.Path, pathlib.Path] = {}
  for source, target in pairs:
    if not source.is_file():
      what = "is a folder: name its files" if source.is_dir() else "does not exist"
      raise flags.UsageError(f"The input {source} {what}.")
    other = targets.setdefault(target, source)
    if other is not source:
      raise flags.UsageError(f"{other} and {source} would both become {target}: rename one.")
    if target.exists() and target.samefile(source):
      raise flags.UsageError(f"{source} is input and output at once: name another output.")
    _check_free(target, args.force)
  return pairs


def _check_parent(target: pathlib.Path) -> None:
  """A folder that is missing under a single output's name is a slip of the pen."""
  if not target.parent.is_dir():
    what = "is no folder" if target.parent.exists() else "does not exist"
    raise flags.UsageError(
      f"The output {target}: {target.parent} {what}. Make it first, or name another output."
    )


def _check_free(target: pathlib.Path, force: bool) -> None:
  # A rename would put a file in the place of a device or a pipe: /dev/null, for example.
  if target.exists() and not target.is_file():
    what = "a folder" if target.is_dir() else "no regular file"
    raise flags.UsageError(f"The output {target} is {what}: name a file.")
  if (target.exists() or target.is_symlink()) and not force:
    raise flags.UsageError(f"{target} exists already: name another output, or give --force.")


# --- Models --------------------------------------------------------------------------------------


def families() -> list[str]:
  """The entropy-model families: folders with a codec and a training."""
  found = configs.PROJECT_DIR.glob("*/codec.py")
  return sorted(p.parent.name for p in found if p.with_name("train.py").is_file())


def _build_of(family: str, what: str) -> "BuildCodec":
  if family not in families():
    raise CommandError(
      f"{what} is of the family {family!r}, which is not here. Here are: {', '.join(families())}. "
      "Use the code that made it."
    )
  return importlib.import_module(f"{family}.codec").build


def _start_tensorflow() -> None:
  from common import cli

  cli.set_up_process()


def _open_run(path: str) -> tuple[runs.RunDir, "BuildCodec"]:
  try:
    run = runs.RunDir.open(pathlib.Path(path).expanduser())
    unit = run.read_work_unit()
  except runs.RunError as e:
    raise flags.UsageError(str(e)) from e
  if unit.task != "train":
    raise flags.UsageError(f"{path} is a run of {unit.family}.{unit.task}: name a training run.")
  return run, _build_of(unit.family, path)


def _load_artefact(path: runs.PathLike, encoder: bool) -> "TrainableCodec":
  artefact = artefacts.read(path)
  build = _build_of(artefact.family, str(path))
  if encoder:
    artefact.check_encoder()
  _start_tensorflow()
  return artefacts.load(artefact, build, encoder=encoder)


class _Decoders:
  """Codecs by what files name: each model is loaded once.

  They come from the run or the exported model that the command line names, else from the models
  folder.
  """

  def __init__(self, args: argparse.Namespace):
    self._args = args
    self._loaded: dict[bytes, TrainableCodec] = {}
    self._run = _open_run(args.workdir) if args.workdir is not None else None
    self._rest = self._run_codecs()
    self._tried: list[str] = []

  def of(self, stream: bitstream.Bitstream, name: str) -> "TrainableCodec":
    """The codec that wrote `stream`; `name` is the file's, for messages.

    Raises:
      CommandError: There is none; the message says what was looked for, and where.
    """
    if stream.fingerprint not in self._loaded:
      if self._run is not None:
        self._load_from_run(self._run, stream, name)
      elif self._args.model is not None:
        self._load_model(pathlib.Path(self._args.model), stream, name)
      else:
        self._load_from_folder(stream, name)
    return self._loaded[stream.fingerprint]

  def _run_codecs(self) -> "Iterator[tuple[int, TrainableCodec]]":
    """The run's steps and codecs: the one asked for; without --step the newest, then the others."""
    assert self._run is not None
    _start_tensorflow()
    from common import checkpoints, eval_lib

    run, build = self._run
    codec, newest = eval_lib.load_codec(run, build, self._args.step)
    yield newest, codec
    others = [] if self._args.step else checkpoints.Checkpoints(run.checkpoints_dir).steps()
    for step in reversed(others):
      if step != newest:
        try:
          yield step, eval_lib.load_codec(run, build, str(step))[0]
        except checkpoints.CheckpointError as e:
          print(f"Note: {e}", file=sys.stderr)

  def _load_from_run(
    self, opened: tuple[runs.RunDir, "BuildCodec"], stream: bitstream.Bitstream, name: str
  ) -> None:
    run, _ = opened
    _check_family(stream, name, run.read_work_unit().family, str(run.path))
    from common.codec import NotPreparedError  # Lazy: it imports TensorFlow.

    for step, codec in self._rest:
      try:
        fingerprint = codec.fingerprint
      except NotPreparedError:  # A VAE's checkpoint that no quantizer was made for.
        self._tried.append(f"step {step} cannot code yet")
        continue
      self._loaded[fingerprint] = codec
      self._tried.append(f"step {step} is {fingerprint.hex()}")
      if fingerprint == stream.fingerprint:
        if len(self._tried) > 1:
          print(f"Note: {name} was written by step {step} of {run.path}.", file=sys.stderr)
        return
    raise CommandError(
      f"{name} was written by model {stream.fingerprint.hex()}, and no checkpoint of {run.path} is "
      f"that ({', '.join(self._tried)}). Name the run or the exported model that wrote it."
    )

  def _load_model(self, path: pathlib.Path, stream: bitstream.Bitstream, name: str) -> None:
    model = artefacts.peek(path)
    _check_family(stream, name, model["family"], str(path))
    if model["fingerprint"] != stream.fingerprint.hex():
      raise CommandError(
        f"{name} was written by model {stream.fingerprint.hex()}; {path} is "
        f"{model['fingerprint']}. Name the run or the exported model that wrote it."
      )
    self._loaded[stream.fingerprint] = _load_artefact(path, encoder=False)

  def _load_from_folder(self, stream: bitstream.Bitstream, name: str) -> None:
    folder = configs.MODELS_DIR
    found, wrong = _find_models(stream.fingerprint)
    for path in found:
      try:
        return self._load_model(path, stream, name)
      except artefacts.ArtefactError as e:
        wrong.append(str(e))
    raise CommandError(
      f"{name} needs the {stream.family} model {stream.fingerprint.hex()}; no *{artefacts.SUFFIX} "
      f"in {folder} is it. Export it from its run (./ntc.py export RUN [--step N]), or name the "
      "run with --workdir; NTC_MODELS_DIR names another folder."
      + "".join(f" Note: {w}" for w in wrong)
    )


def _find_models(fingerprint: bytes) -> tuple[list[pathlib.Path], list[str]]:
  """`artefacts.find` in the models folder; and the example model, if it is the one."""
  found, wrong = artefacts.find(configs.MODELS_DIR, fingerprint)
  example = configs.EXAMPLE_MODEL
  if example.is_file() and example.parent != configs.MODELS_DIR:
    try:
      if artefacts.peek(example)["fingerprint"] == fingerprint.hex():
        found.append(example)
    except (artefacts.ArtefactError, OSError) as e:
      wrong.append(str(e))
  return found, wrong


def _check_family(stream: bitstream.Bitstream, name: str, family: str, what: str) -> None:
  if stream.family != family:
    raise CommandError(
      f"{name} was written by the family {stream.family!r}, {what} is of {family!r}. Name the run "
      "or the exported model that wrote it."
    )


# --- Commands ------------------------------------------------------------------------------------


def _each(pairs: Sequence[_Pair], make: Callable[[pathlib.Path, pathlib.Path], str]) -> int:
  """Makes every output; one that fails does not hold up the others. Returns the exit code."""
  failed = 0
  for source, target in pairs:
    try:
      print(f"{target}: {make(source, target)}", flush=True)
    except Exception as e:
      if len(pairs) == 1 or not _is_expected(e) or _is_full(e):
        raise
      failed += 1
      print(f"Error: {_said(e)}", file=sys.stderr)
  if failed:
    print(f"Error: {failed} of {len(pairs)} files could not be made.", file=sys.stderr)
  return 1 if failed else 0


def _is_full(error: Exception) -> bool:
  return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _write(target: pathlib.Path, content: bytes) -> None:
  try:
    runs.atomic_write(target, content)
  except OSError as e:
    e.filename = str(target)  # Not the temporary file's.
    raise


@contextlib.contextmanager
def _enough_memory(name: pathlib.Path, pixels: int) -> Iterator[None]:
  import tensorflow as tf

  try:
    yield
  except (MemoryError, tf.errors.ResourceExhaustedError) as e:
    raise CommandError(
      f"{name}: a picture of {pixels} pixels needs more memory than there is. Cut it into parts."
    ) from e


def _compress(argv: list[str]) -> int:
  parser = _parser("compress", "Compresses pictures to files, and decodes each to be sure.")
  _add_files(parser, "picture", "FILE.ntc")
  parser.add_argument("--noverify", action="store_true", help="do not decode what was made")
  parser.add_argument(
    "--rate", type=int, metavar="N",
    help="for a model of several rates: 0 (fewest bytes) and up; default the model's own. A VAE "
    "quantized by VBQ has 0 to 15, lambda = 2^(7-N), default 8; `info` of an exported model lists "
    "its rates",
  )  # fmt: skip
  args = parser.parse_intermixed_args(argv)
  _check_model_flags(args, needed=True)
  pairs = _pairs(args, ".ntc")
  if args.output_dir is None and pairs[0][1].suffix.lower() in _PICTURES:
    raise flags.UsageError(f"The output {pairs[0][1]} is named like a picture; for several "
                           "pictures give --output_dir DIR.")  # fmt: skip
  if args.workdir is not None:
    run, build = _open_run(args.workdir)
    _start_tensorflow()
    from common import eval_lib

    codec = eval_lib.load_codec(run, build, args.step)[0]
  else:
    codec = _load_artefact(args.model, encoder=True)
  if args.rate is not None:
    try:
      codec.rate_index = args.rate
    except ValueError as e:
      raise flags.UsageError(f"--rate={args.rate}: {e}") from e
  return _each(pairs, lambda source, target: _compress_one(codec, source, target, args))


def _compress_one(
  codec: "TrainableCodec", source: pathlib.Path, target: pathlib.Path, args: argparse.Namespace
) -> str:
  from common import metrics

  image = _read_picture(source)
  pixels = image.shape[0] * image.shape[1]
  with _enough_memory(source, pixels):
    began = time.perf_counter()
    data = codec.compress(image)
    seconds = time.perf_counter() - began
    quality = "not verified"
    if not args.noverify:
      decoded = _decoded(codec, data, source)
      if decoded.shape != image.shape:
        raise CommandError(f"{source}: its file decodes to another size; nothing was written.")
      psnr = metrics.psnr_db(image, decoded)
      quality = f"decodes, {psnr:.2f} dB" if math.isfinite(psnr) else "decodes, without loss"
  _check_free(target, args.force)
  _write(target, data)
  return f"{len(data)} bytes, {8 * len(data) / pixels:.3f} bpp, {seconds:.2f} s, {quality}"


def _decoded(codec: "TrainableCodec", data: bytes, source: pathlib.Path) -> "np.ndarray":
  try:
    return codec.decompress(data)
  except bitstream.BitstreamError as e:
    raise CommandError(
      f"{source}: its file does not decode ({e}); nothing was written. This is a bug of the "
      "model's code: please report it with the picture."
    ) from e


def _read_picture(path: pathlib.Path) -> "np.ndarray":
  from common import data

  try:
    height, width = data.FileImage(path.name, path).size()
    bitstream.check_size(height, width)
    return data.read_image(path)
  except bitstream.BitstreamError as e:
    raise CommandError(f"{path}: {e} Cut it into parts.") from e
  except MemoryError as e:
    raise CommandError(f"{path} needs more memory than there is. Cut it into parts.") from e
  except Exception as e:  # Pillow's readers raise many types.
    raise CommandError(f"{path} is no picture that can be read ({e}).") from e


def _decompress(argv: list[str]) -> int:
  parser = _parser(
    "decompress",
    "Decodes files to pictures. Without --workdir and --model, the model is looked for by the "
    f"fingerprint that the file names, in {configs.MODELS_DIR} (NTC_MODELS_DIR).",
  )
  _add_files(parser, "FILE.ntc", f"picture ({', '.join(_LOSSLESS)})")
  args = parser.parse_intermixed_args(argv)
  _check_model_flags(args, needed=False)
  pairs = _pairs(args, ".png")
  for _, target in pairs:
    if target.suffix.lower() not in _LOSSLESS:
      raise flags.UsageError(
        f"The output {target} must end in {', '.join(_LOSSLESS)}: formats that keep every pixel."
      )
  decoders = _Decoders(args)
  return _each(pairs, lambda source, target: _decompress_one(decoders, source, target, args.force))


def _decompress_one(
  decoders: _Decoders, source: pathlib.Path, target: pathlib.Path, force: bool
) -> str:
  data = source.read_bytes()
  stream = _read_stream(data, source)
  codec = decoders.of(stream, str(source))
  with _enough_memory(source, stream.height * stream.width):
    began = time.perf_counter()
    try:
      image = codec.decompress(data)
    except bitstream.BitstreamError as e:
      raise CommandError(f"{source}: {e}") from e
    seconds = time.perf_counter() - began
  from PIL import Image

  encoded = io.BytesIO()
  Image.fromarray(image).save(encoded, _LOSSLESS[target.suffix.lower()])
  _check_free(target, force)
  _write(target, encoded.getvalue())
  return f"{stream.width}x{stream.height} pixels, {seconds:.2f} s"


def _read_stream(data: bytes, source: pathlib.Path) -> bitstream.Bitstream:
  try:
    return bitstream.read(data)
  except bitstream.BitstreamError as e:
    raise CommandError(f"{source}: {e}") from e


def _export(argv: list[str]) -> int:
  parser = _parser("export", "Writes a trained model into one file that needs no run directory.")
  parser.add_argument("run", metavar="RUN", help="a run directory: train_xms/<xid>/wid=...")
  parser.add_argument("--step", help="of the checkpoint, or 'best'; default the newest")
  parser.add_argument(
    "--output", metavar="MODEL.ntcm",
    help=f"default {configs.MODELS_DIR}/<family>-<runname>-<fingerprint>.ntcm",
  )  # fmt: skip
  parser.add_argument(
    "--decoder_only", action="store_true", help="leave out the weights that only compressing needs"
  )
  parser.add_argument(
    "--half", action="store_true", help="round the weights to 16 bits: another model, half the size"
  )
  parser.add_argument("--force", action="store_true", help="overwrite an existing file")
  args = parser.parse_intermixed_args(argv)
  run, build = _open_run(args.run)
  given = pathlib.Path(args.output).expanduser() if args.output is not None else None
  if given is not None:
    if given.suffix != artefacts.SUFFIX:
      raise flags.UsageError(f"--output={given}: models end in {artefacts.SUFFIX}.")
    _check_parent(given)
    _check_free(given, args.force)
  _start_tensorflow()
  from common import eval_lib

  codec, step = eval_lib.load_codec(run, build, args.step)
  unit, facts = run.read_work_unit(), eval_lib.run_facts(run)
  if args.half:
    artefacts.round_weights(codec)
  content = artefacts.dumps(
    codec, unit.family, unit.config["model_config"], step, facts, args.decoder_only
  )
  # A model that does not load must not be found later, when the run is gone.
  artefact = artefacts.loads(content)
  artefacts.load(artefact, build, encoder=not args.decoder_only)
  target = given or configs.MODELS_DIR / artefacts.default_name(
    unit.family, unit.runname, codec.fingerprint, args.decoder_only
  )
  if given is None and target.is_file() and target.read_bytes() == content:
    print(f"{target}: exists already, the same.")
    return 0
  _check_free(target, args.force)
  _write(target, content)
  print(f"{target}: {len(content)} bytes, step {step}, model {codec.fingerprint.hex()}")
  return 0


def _info(argv: list[str]) -> int:
  parser = _parser("info", "Says what .ntc files and .ntcm models are; checks their checksums.")
  parser.add_argument("files", nargs="+", metavar="FILE")
  args = parser.parse_intermixed_args(argv)
  failed = 0
  for i, name in enumerate(args.files):
    try:
      lines = _facts_of(pathlib.Path(name).expanduser())
    except (CommandError, artefacts.ArtefactError, OSError) as e:
      print(f"Error: {_said(e)}", file=sys.stderr)
      failed += 1
      continue
    print("\n" * (i > 0) + name)
    for key, value in lines:
      print(f"  {key:<12} {value}")
  return 1 if failed else 0


def _facts_of(path: pathlib.Path) -> list[tuple[str, Any]]:
  with path.open("rb") as f:
    is_archive = f.read(2) == b"PK"
  return _facts_of_model(path) if is_archive else _facts_of_file(path)


def _facts_of_file(path: pathlib.Path) -> list[tuple[str, Any]]:
  data = path.read_bytes()
  stream = _read_stream(data, path)
  sections = [len(section) for section in stream.sections]
  found, _ = _find_models(stream.fingerprint)
  return [
    ("family", stream.family),
    ("fingerprint", stream.fingerprint.hex()),
    ("model", found[0] if found else f"not in {configs.MODELS_DIR}"),
    ("picture", f"{stream.width}x{stream.height} pixels"),
    ("bytes", len(data)),
    ("header", f"{len(data) - sum(sections)} bytes"),
    ("sections", ", ".join(f"{size} bytes" for size in sections)),
    ("bpp", f"{8 * len(data) / (stream.height * stream.width):.4f}"),
  ]


def _facts_of_model(path: pathlib.Path) -> list[tuple[str, Any]]:
  artefact = artefacts.read(path)
  model = artefact.model
  lines = [
    ("family", artefact.family),
    ("fingerprint", artefact.fingerprint.hex()),
    ("does", "decodes" if artefact.decoder_only else "compresses and decodes"),
    ("step", model["step"]),
    *((key, model["training"].get(key)) for key in artefacts.TRAINING_FACTS),
    ("bytes", len(artefact.data)),
    *_rates_of(artefact),
  ]
  for group in ("weights", "coding"):
    shapes = artefact.shapes(group)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    size = artefact.num_bytes(group)
    lines.append((group, f"{len(shapes)} arrays, {numbers} numbers, {size} bytes"))
  lines.append(("versions", ", ".join(f"{k} {v}" for k, v in model["versions"].items())))
  lines += [("config", f"{key}={value}") for key, value in _flat(model["model_config"])]
  return lines


def _rates_of(artefact: artefacts.Artefact) -> list[tuple[str, Any]]:
  """Of a quantized VAE (factorized/vbq.py): what each --rate stands for."""
  shapes = artefact.shapes("coding")
  if artefact.family != "factorized" or not {"method", "settings"} <= shapes.keys():
    return []
  coding = artefact.arrays("coding")
  settings = [float(x) for x in coding["settings"].ravel()]
  if coding["method"].tolist() == [0] and all(0 < x < math.inf for x in settings):  # VBQ.
    named = "lambda " + ", ".join(f"2^{math.log2(x):g}" for x in settings)
  else:
    named = "levels " + ", ".join(f"{x:g}" for x in settings)
  return [("rates", f"{len(settings)}, --rate 0 to {len(settings) - 1}: {named}")]


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
