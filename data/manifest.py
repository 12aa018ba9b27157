"""The manifest that render.py leaves beside its pictures: from which labels it made them, and how."""

from pathlib import Path

from infra.commands import InputError
from infra.files import load_json, text_sha256

MANIFEST_NAME = "manifest.json"


def open_manifest(out: Path, wanted: dict) -> dict:
    """The manifest of `out`, new or to go on with. Raises InputError if `out` holds any other set."""
    path = out / MANIFEST_NAME
    if not path.exists():
        return wanted | {"scenes_done": 0}
    manifest = load_json(path)
    for key, value in wanted.items():
        found = manifest.get(key) if isinstance(manifest, dict) else None
        if found != value and key != "labels":
            raise InputError(f"{path}: {key} is {found}, this run's is {value}; choose another --out")
    return manifest


def check_manifest(manifest, where: Path, labels_path: Path) -> int:
    """How many scenes were rendered. Raises InputError if it was from another label file than this.

    File names are the same in every i-CLEVR set, so only the manifest that render.py leaves can tell whether
    pictures and labels belong together.
    """
    unreadable = InputError(f"{where}: not a manifest of render.py; render into another folder")
    try:
        made_from = manifest["labels_sha256"]
        done = int(manifest["scenes_done"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise unreadable from None
    if done < 0:
        raise unreadable
    if made_from != text_sha256(labels_path):
        raise InputError(
            f"{where}: these pictures were rendered from another label file than {labels_path} (SHA-256 "
            f"differs); render its own with `python -m data.render --labels {labels_path} --out DIR` and "
            f"give --data DIR, or link the lab's pictures to iclevr/"
        )
    return done
