"""How a command reads its options, what it prints to, and how it ends: a mistake is one line and exit code 2.

Imports nothing that takes time, so that a script can look at its options before it loads PyTorch:
`python sample.py --help` answers at once.
"""

import argparse
import contextlib
import difflib
import functools
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the scripts, label files and weights


class InputError(ValueError):
    """A mistake in what the user gave, in one line: which file, which entry, what was expected."""


def command(main):
    """Wrap a script's `main(argv)`: an InputError or OSError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
        with lasting_output():
            try:
                return main(argv)
            except InputError as error:
                message = str(error)
            except OSError as error:
                message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                raise SystemExit(130) from None
            print("error:", " ".join(message.splitlines()), file=sys.stderr)
            raise SystemExit(2)

    return run


def read_early(parse_args: Callable[[None], argparse.Namespace]):
    """Read a script's options, so that a mistake is told at once, then say what the next seconds go into."""
    parse_args(None)
    with lasting_output():
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name  # python -m report
        announce(f"{name}: loading PyTorch")


def announce(what: str):
    """Say what the next seconds go into, in the first of the processes that torchrun started."""
    if os.environ.get("RANK", "0") == "0":  # where accelerate need not be there yet
        print(what, flush=True)


# ----------------------------------------------------------------------------------------------------- output


class _LastingStream:
    """A stream that takes what is written also when its reader is gone: a closed pipe or terminal."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self):
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self):
        # What is left in the stream's buffer goes nowhere as well: Python would fail on it at its end.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within it nothing that happens to stdout and stderr ends the command: `| head` and a terminal that went
    away are survived, and a terminal that knows only ASCII is given escapes."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file opened, a log or a picture, would be taken for it
            os.open(os.devnull, os.O_RDWR)
    with contextlib.redirect_stdout(_lasting(sys.stdout)), contextlib.redirect_stderr(_lasting(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def _lasting(stream):
    if stream is None:  # it was closed when Python started
        stream = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process lives
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _LastingStream(stream)


# ---------------------------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that tells a mistake in one line, without the whole usage before it, and takes no
    abbreviations: `--lr-s` could be any of several options in a later version."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        with lasting_output():
            return super().parse_args(args, namespace)

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            given = message.split(": ", 1)[1].split()[0].split("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            message += did_you_mean(given, known, otherwise="")
        message = " ".join(message.split())
        if len(message) > 400:
            message = f"{message[:400]}..."
        print(f"error: {message}; {self.prog} --help lists all options", file=sys.stderr)
        raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite int or float from `low` to `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


to_seed = number(int, 0, 2**63 - 1)  # what PyTorch's generators take


def to_path(text: str) -> Path:
    """An argparse type: a path, with `~` for the home folder also where no shell has replaced it, as in
    `--out=~/x`."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user") from None


# --------------------------------------------------------------------------------------------------- messages


def shown(value) -> str:
    """What was found in a file, for an error message, which nothing may make endless."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def did_you_mean(given: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of an error message about a name that is not among those `known`: the nearest of them, else
    `otherwise`, else all of them."""
    known = list(known)
    nearest = difflib.get_close_matches(given[:200], known, n=1, cutoff=0.75)
    if nearest:
        return f"; did you mean {nearest[0]}?"
    if otherwise is not None:
        return otherwise
    return f"; there are {', '.join(known)}" if known else ""
