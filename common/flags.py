"""Command lines: absl flags and config overrides, with errors that name the fix.

Flags live in a FlagValues of their own, so commands can be run and tested within one process.
"""

import sys
from collections.abc import Sequence
from typing import Any, Callable, NoReturn, Optional

from absl import flags
from ml_collections import config_flags

from common import hyper

# What absl itself defines and the published commands use.
_ABSL_FLAGS = ("alsologtostderr", "logtostderr", "verbosity", "v", "stderrthreshold")


class UsageError(Exception):
  """The command line is wrong; the message says how to put it right."""


def fail(message: Any) -> NoReturn:
  """Prints an error for people and ends the program with exit code 2."""
  print(f"Error: {message}", file=sys.stderr)
  sys.exit(2)


def config_source(argv: Sequence[str]) -> Optional[str]:
  """The value of --config among `argv`, or None."""
  for i, arg in enumerate(argv):
    for dashes in ("--", "-"):
      if arg.startswith(f"{dashes}config="):
        return arg.split("=", 1)[1]
      if arg == f"{dashes}config":
        if i + 1 == len(argv):
          raise UsageError("--config needs a file: --config factorized/configs/bls2017.py")
        return argv[i + 1]
  return None


def parse(
  argv: Sequence[str],
  define: Callable[[flags.FlagValues], None],
  usage: str,
  allow_config: bool = True,
) -> tuple[flags.FlagValues, Optional[hyper.ConfigFile], dict[str, Any]]:
  """Parses a command line.

  Args:
    argv: Arguments without the program's name.
    define: Defines the command's own flags on the FlagValues that it is given.
    usage: Printed above the flags by --help.
    allow_config: Whether --config and --config.x=y are taken.

  Returns:
    The flags, the config file (None without --config), and the overrides given by
    `--config.a.b=value`, typed as the config types them.

  Raises:
    UsageError: Unknown flags, leftover arguments, values that do not parse.
    hyper.ConfigError: The config file is missing or wrong, or an override's key is unknown.
  """
  values = flags.FlagValues()
  define(values)
  flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
  flags.DEFINE_bool(
    "alsologtostderr", False, "Accepted for compatibility: logs always go there.",
    flag_values=values,
  )  # fmt: skip
  argv = _without_absl_flags(list(argv))
  if any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in argv):
    _print_help(values, usage, allow_config)
    sys.exit(0)
  source = config_source(argv) if allow_config else None
  config_file = None
  names: list[str] = []
  if source is not None:
    config_file = hyper.load(source)
    config = config_file.get_config()
    argv, names = _split_overrides(_without_config(argv), config)
    config_flags.DEFINE_config_dict("config", config, flag_values=values)
  elif any(a.lstrip("-").startswith("config.") for a in argv):
    raise UsageError("--config.<key> overrides need --config FILE before them.")
  try:
    rest = values(["program", *argv])[1:]
  except (flags.Error, ValueError, TypeError) as e:
    raise UsageError(f"{e} (see --help)") from e
  if rest:
    raise UsageError(
      f"Left over on the command line: {' '.join(rest)}. Flags are written --name=value; "
      "booleans too: --config.a.b=False."
    )
  overrides: dict[str, Any] = {}
  if config_file is not None:
    given = values["config"].override_values  # type: ignore[attr-defined]
    overrides = {name: None if name in names else given[name] for name in [*given, *names]}
  return values, config_file, overrides


def _without_absl_flags(argv: list[str]) -> list[str]:
  kept = []
  for arg in argv:
    name = arg.lstrip("-").split("=", 1)[0]
    if arg.startswith("-") and name in _ABSL_FLAGS:
      continue
    kept.append(arg)
  return kept


def _without_config(argv: Sequence[str]) -> list[str]:
  kept, skip = [], False
  for arg in argv:
    if skip:
      skip = False
    elif arg in ("--config", "-config"):
      skip = True
    elif not arg.startswith(("--config=", "-config=")):
      kept.append(arg)
  return kept


def _split_overrides(argv: Sequence[str], config: Any) -> tuple[list[str], list[str]]:
  """Checks each override's key; takes out those that set an optional field to None."""
  kept, nones = [], []
  for arg in argv:
    if arg.startswith(("--config.", "-config.")):
      key, _, value = arg.lstrip("-")[len("config.") :].partition("=")
      current = hyper.get_value(config, key)
      if hasattr(current, "keys"):
        hyper.set_values(config, {key: None})  # Raises, and names the members of the group.
      if value in ("None", "none"):
        hyper.set_values(config, {key: None})
        nones.append(key)
        continue
    kept.append(arg)
  return kept, nones


def _print_help(values: flags.FlagValues, usage: str, allow_config: bool) -> None:
  print(usage.strip())
  print("\nflags:")
  for name in sorted(values):
    flag = values[name]
    if name in ("alsologtostderr", "h") or flag.name != name:
      continue
    default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
    print(f"  --{name}: {flag.help}{default}")
  if allow_config:
    print("  --config.<key>=<value>: override one value of the config, e.g.")
    print("    --config.train_eval_config.num_steps=1000")
