"""Ways to spoil a file of the working directory; the rows of hostile_inputs.py name them."""

import json
import os
import pickle
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from label_files import load_objects
from model import build


class Code:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("the_code_has_run", "w")


# ------------------------------------------------------------------------------------------ files and folders


def remove(path: str):
    """A file, a link or a folder."""
    if Path(path).is_dir() and not Path(path).is_symlink():
        shutil.rmtree(path)
    else:
        Path(path).unlink()


def write(path: str, text: str):
    """A file of these characters, each a byte, in place of what was there."""
    remove(path)
    Path(path).write_bytes(text.encode("latin-1"))


def folder(path: str):
    remove(path)
    Path(path).mkdir()


def link(path: str, to: str):
    remove(path)
    Path(path).symlink_to(to)


def pipe(path: str):
    remove(path)
    os.mkfifo(path)


def cut(path: str):
    """The first half alone."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


def pickle_with_code(path: str):
    Path(path).write_bytes(pickle.dumps(Code()))


# ------------------------------------------------------------------------------------------------------- JSON


def edit(path: str, changes: dict):
    """Change entries of a JSON file."""
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**content, **changes}))


def edit_sampling(path: str, changes: dict):
    """Change the options of sampling in the metadata of weights."""
    content = json.loads(Path(path).read_text())
    edit(path, {"sampling": {**content["sampling"], **changes}})


def remove_entry(path: str, name: str):
    content = json.loads(Path(path).read_text())
    del content[name]
    Path(path).write_text(json.dumps(content))


def label(filename: str, condition):
    """Give a picture this condition in labels.json."""
    edit("labels.json", {filename: condition})


def some_objects(count: int) -> list[str]:
    """So many names of objects; after the last one they begin again."""
    names = list(load_objects())
    return [names[i % len(names)] for i in range(count)]


def label_with_objects(filename: str, count: int):
    label(filename, some_objects(count))


def condition(value):
    """The second entry of list.json."""
    Path("list.json").write_text(json.dumps([["red cube"], value]))


def condition_with_objects(count: int):
    condition(some_objects(count))


# --------------------------------------------------------------------------------------------------- pictures


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, data: bytes, more: bytes = b"") -> bytes:
    """An RGB picture as a PNG file with `more` chunks; `data`: its rows, each after a byte 0."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def small_png(path: str, width: int, height: int):
    """One that says to be of this size, and has the data of a small picture."""
    Path(path).write_bytes(png(width, height, 8, bytes(1000)))


def png_with_text(path: str, size: int):
    """One with a compressed text of so many bytes."""
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(size)))
    Path(path).write_bytes(png(64, 64, 8, bytes(1000), text))


def image(path: str, mode: str, kind: str):
    """A picture in a mode of Pillow's and a file format, whatever the file's name is."""
    Image.new(mode, (64, 64)).save(path, kind)


def animated_png(path: str):
    second = Image.new("RGB", (64, 64), "red")
    Image.new("RGB", (64, 64)).save(path, "png", save_all=True, append_images=[second])


# ------------------------------------------------------------------------------------------------------ packs


def write_pack(shape: list[int], manifest: np.ndarray):
    differences = np.zeros(shape, np.uint8)
    np.savez_compressed("pack.npz", differences=differences, manifest=manifest)


def pack(shape: list[int], changes: dict):
    """A pack with black pictures in an array of this shape, and changes in its manifest."""
    with np.load("pack.npz") as file:
        manifest = json.loads(str(file["manifest"]))
    write_pack(shape, np.array(json.dumps({**manifest, **changes})))


def pack_with_manifest(text: str):
    write_pack([1, 3, 64, 64, 3], np.array(text))


def pack_with_code():
    write_pack([1, 3, 64, 64, 3], np.array([Code()]))


# ---------------------------------------------------------------------------------------------------- weights


def change_tensors(path: str, change: Callable[[dict[str, torch.Tensor]], object]):
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def fill_tensor(path: str, name: str, value: float):
    change_tensors(path, lambda tensors: tensors[name].fill_(value))


def make_tensor_integer(path: str, name: str):
    change_tensors(path, lambda tensors: tensors.update({name: tensors[name].int()}))


def remove_tensor(path: str, name: str):
    change_tensors(path, lambda tensors: tensors.pop(name))


def add_tensor(path: str, name: str, shape: list[int]):
    change_tensors(path, lambda tensors: tensors.update({name: torch.ones(shape)}))


def tensors(path: str, shapes: dict[str, list[int]]):
    """These tensors in place of those in a file."""
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)


def weights_of_preset(path: str, preset: str):
    save_file(build(preset)[0].state_dict(), path)


def tensor_header(path: str, tensor: str, changes: dict):
    """Change what a safetensors file says of one of its tensors."""
    content = Path(path).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header[tensor].update(changes)
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


# ------------------------------------------------------------------------------------------------- evaluators


def evaluator(content):
    """What evaluator.pth is to hold."""
    torch.save(content, "evaluator.pth")


def loaded_evaluator() -> dict:
    return torch.load("evaluator.pth", weights_only=True)


def evaluator_with(changes: dict):
    evaluator({**loaded_evaluator(), **changes})


def evaluator_with_code():
    evaluator_with({"more": Code()})


def evaluator_in_a_list():
    evaluator([loaded_evaluator()])


def fill_evaluator(name: str, value: float):
    """The first row of a tensor."""
    content = loaded_evaluator()
    content["model"][name][0] = value
    evaluator(content)
