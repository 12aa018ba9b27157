"""Files and folders: JSON read with care, files written whole, folders that are kept to one owner.

Nothing of the user's is written over: a folder is taken if it is missing, empty, or holds what a command of
this project left there. Temporary files have a name that nobody else gives, and their random part is new each
time.
"""

import collections
import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from infra.commands import InputError, did_you_mean, shown

LOCK_NAME = ".lock"
TEMPORARY = ".iclevr-ddpm-"  # how names of temporary files and folders begin
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

# ------------------------------------------------------------------------------------------------------- JSON


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(name)} stands there twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def read_text(path: Path | str) -> str:
    """The text of a JSON file, in UTF-8, or with a byte order mark, or in UTF-16 or 32, as PowerShell writes
    it. Raises InputError if it is missing or none of these."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.json")]
        raise InputError(f"{path}: no such file{did_you_mean(path.name, names, otherwise='')}") from None
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a valid JSON file: {error}") from None


def load_json(path: Path | str):
    """Parse a JSON file. Raises InputError if it is missing or what `parse_json` refuses."""
    return parse_json(read_text(path), path)


def parse_json(text: str, path: Path | str):
    """Parse the JSON text of the file `path`. Raises InputError if it is cut off, repeats a key, or holds NaN
    or an infinite number."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_float=_finite, parse_constant=_finite)
    except json.JSONDecodeError as error:
        where = f"at character {error.pos} of {len(error.doc)}"
        raise InputError(f"{path}: not valid JSON {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a valid JSON file: {error}") from None


def check_fields(found: Any, kinds: dict[str, type], path: Path | str) -> dict:
    """Return `found`, read from `path`, if it has a value of each kind, ints and floats not negative. Raises
    InputError."""
    for name, kind in kinds.items():
        value: Any = found.get(name) if isinstance(found, dict) else found
        is_negative = isinstance(value, int | float) and value < 0
        if type(value) is not kind or is_negative:
            raise InputError(f"{path}, {name}: expected {kind.__name__}, got {shown(value)}")
    return found


# ----------------------------------------------------------------------------------------------------- hashes


def file_sha256(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def text_sha256(path: Path | str) -> str:
    """Of a JSON file's text: the same however its encoding or line ends were changed on the way here."""
    text = read_text(path).replace("\r\n", "\n")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# -------------------------------------------------------------------------------------------------- ownership


def contents(folder: Path) -> list[str]:
    """What is in `folder`, less what a command of this project that was killed left there. Empty if there is
    no such folder."""
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir()]
    return sorted(name for name in names if name != LOCK_NAME and not name.startswith(TEMPORARY))


def refuse_foreign(folder: Path, is_ours: bool, expected: str):
    """Raise InputError if `folder` holds anything and is not ours; `expected`: what we would have left."""
    found = contents(folder)
    if found and not is_ours:
        raise InputError(
            f"{folder}: not empty ({shown(found[0])}) and without {expected}, so it is left as it is; choose "
            f"another folder"
        )


def remove_temporaries(folder: Path):
    """Remove what a command that was killed left in `folder`, which has to be locked."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# ---------------------------------------------------------------------------------------------------- writing


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of `path`."""
    return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")


def write_whole(path: Path, content: bytes):
    """Write a file under a temporary name and rename it, so that it is never there in part."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content):
    """The same for what becomes JSON."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def flush(path: Path):
    """Have the system put a file or folder on the disk, so that a power cut leaves it whole.

    Some file systems (VirtualBox, FUSE, NFS, Drive on Colab) cannot do that for folders, which is no reason
    not to save.
    """
    if os.name != "posix":  # others open no folder
        return
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in NOT_SUPPORTED:
            raise


def has_locks(folder: Path) -> bool:
    """Whether the file system of `folder` knows locks."""
    if sys.platform == "win32":
        return True
    import fcntl  # which Windows has not

    path = temporary_beside(folder / LOCK_NAME)
    try:
        with path.open("xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*NOT_SUPPORTED, errno.ENOLCK):
            raise
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Within it an OSError becomes an InputError, which says how a run in `folder` goes on."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: {error}; the same command goes on from the last checkpoint") from None


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep others out of `folder`, made if need be, and removed again if nothing was written. Raises
    InputError if one is in there.

    The system drops the lock of a process that ends, however it does. Where the file system has no locks, a
    warning on stderr says so.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = None
    if has_locks(folder):
        held = filelock.FileLock(folder / LOCK_NAME, timeout=0)
        try:
            held.acquire()
        except filelock.Timeout:
            raise InputError(f"{folder}: another process is at work in there; wait for it or choose --out") from None
    else:
        print(
            f"warning: {folder}: this file system has no locks; nothing keeps a second run out of the folder",
            file=sys.stderr,
        )
    try:
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):  # where an open file cannot be removed filelock does it
                (folder / LOCK_NAME).unlink()
            held.release()
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()
