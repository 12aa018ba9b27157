"""Scripts run in processes of their own that start in a moment, for tests that stop or kill many of them.

A server that has imported the scripts, and has started no threads yet, forks for each.
"""

import importlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["train", "sample", "evaluator", "report.metrics", "report.__main__"]


def _run(script: str, argv: list[str], folder: Path, printed: Path, limits: dict[int, int]):
    """In the child: what `python script.py argv >>printed/stdout 2>>printed/stderr` does in `folder`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in a shell's background ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    importlib.import_module(script).main(argv)


def start(script: str, argv, printed: Path, folder: Path | None = None, limits: dict[int, int] | None = None):
    """Start a script, a module by its name, in `folder` (default: `printed`); returns a
    multiprocessing.Process.

    `printed`: a folder for what it prints, in the files stdout and stderr; `limits`: of the module resource.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    CONTEXT.set_forkserver_preload(PRELOAD)
    arguments = (script, [str(a) for a in argv], folder or printed, printed, limits or {})
    process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process


def finish(process, seconds: float = 180) -> int:
    """Wait for a process and return its exit code; it has so many seconds."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"still at work after {seconds} s")
    return process.exitcode


def output(printed: Path) -> str:
    """What the children in a folder printed, errors last, without progress bars."""
    text = "".join((printed / name).read_text() for name in ("stdout", "stderr"))
    lines = text.replace("\r", "\n").splitlines()
    return "\n".join(line for line in lines if "step/s" not in line)


def wait_for(condition: Callable[[], object], seconds: float = 60):
    """Wait until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def wait_for_text(path: Path, seconds: float = 60):
    """Wait until a file is there and has something in it."""
    wait_for(lambda: path.exists() and path.stat().st_size, seconds)
