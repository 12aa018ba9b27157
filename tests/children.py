"""Scripts run in processes of their own that start in a moment, for tests that kill many of them.

A server that has imported the scripts, and has started no threads yet, forks for each.
"""

import importlib
import multiprocessing
import os
import resource
import signal
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")


def _run(script: str, argv: list[str], folder: Path, output: Path, limits: dict[int, int]):
    """In the child: what `python script.py argv >>output/stdout 2>>output/stderr` does in `folder`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in a shell's background ignore
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup ignores
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    importlib.import_module(script).main(argv)


def start(script: str, argv, output: Path, folder: Path | None = None, limits: dict[int, int] | None = None):
    """Start a script in `folder` (default: `output`); returns a multiprocessing.Process.

    `output`: a folder for what it prints, in the files stdout and stderr; `limits`: of the module resource.
    """
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    CONTEXT.set_forkserver_preload(["train", "sample", "evaluator", "metrics", "report"])
    arguments = (script, [str(a) for a in argv], folder or output, output, limits or {})
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
