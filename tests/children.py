"""Scripts run in processes of their own that start in a moment, for tests that start, stop or kill many of them.

A server that has imported the scripts, and has started no threads yet, forks for each.
"""

import functools
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM_PYTHON = ROOT / "tests" / "warm_python"
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


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _prepare():
    """Tell the server, before it is up, what to import."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    CONTEXT.set_forkserver_preload(PRELOAD)


def start(script: str, argv, printed: Path, folder: Path | None = None, limits: dict[int, int] | None = None):
    """Start a script, a module by its name, in `folder` (default: `printed`); returns a
    multiprocessing.Process.

    `printed`: a folder for what it prints, in the files stdout and stderr; `limits`: of the module resource.
    """
    _prepare()
    arguments = (script, [str(a) for a in argv], folder or printed, printed, limits or {})
    process = CONTEXT.Process(target=_run, args=arguments, daemon=True)
    process.start()
    return process


def _run_as_python(connection: socket.socket):
    """In the child: what `python` does with the request of tests/warm_python at the other end."""
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        os.close(descriptor)
    request = json.loads(connection.makefile().readline())
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection.sendall(f"{os.getpid()}\n".encode())
    sys.argv = request["argv"][1:] if request["argv"][0] == "-u" else request["argv"]
    sys.executable = str(WARM_PYTHON)  # so that what the script starts with it is as quick
    code = 1
    try:
        if sys.argv[0] == "-c":
            exec(sys.argv[1], {"__name__": "__main__"})
        elif sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{code}\n".encode())


def _serve(listener: socket.socket):
    """Start a child for each request of tests/warm_python."""
    while True:
        connection, _ = listener.accept()
        CONTEXT.Process(target=_run_as_python, args=(connection,)).start()
        connection.close()


@functools.cache
def warm_python() -> Path:
    """The path of a command that does what `python script.py ...`, `python -m ...` or `python -c ...` does, for this
    process and those that it starts. PyTorch and the scripts are imported already, which saves up to ten seconds."""
    _prepare()
    listener = socket.socket(socket.AF_UNIX)
    path = str(Path(tempfile.mkdtemp()) / "socket")
    listener.bind(path)
    listener.listen()
    os.environ["WARM_PYTHON"] = path
    threading.Thread(target=_serve, args=(listener,), daemon=True).start()
    return WARM_PYTHON


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
