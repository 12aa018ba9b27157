"""How a command reads its options and how it ends: a mistake is one line on stderr and exit code 2.

Imports nothing that takes time, so that a script can look at its options before it loads PyTorch:
`python sample.py --help` answers at once.
"""

import argparse
import functools
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent  # the label files and weights that ship stand beside the scripts


class InputError(ValueError):
    """A mistake in what the user gave, in one line: which file, which entry, what was expected."""


def command(main):
    """Wrap a script's `main(argv)`: an InputError or OSError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None):
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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that tells a mistake in one line, without the whole usage before it."""

    def error(self, message: str):
        print(f"error: {message}; {self.prog} --help lists all options", file=sys.stderr)
        raise SystemExit(2)


def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite int or float from `low` to `high`."""

    def parse(text: str):
        if not low <= (value := kind(text)) <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def shown(value) -> str:
    """What was found in a file, for an error message, which nothing may make endless."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
