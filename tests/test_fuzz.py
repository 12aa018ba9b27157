"""Files that hypothesis makes up, and pictures with wrong bytes: each is read or refused in one line."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import NAMES, TINY_NETWORK
from dataset import read_picture
from infra.commands import InputError
from label_files import load_conditions, load_labels, load_objects
from model import load_network, load_noise_scheduler

OBJECTS = load_objects()
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def collections_of(values):
    """Lists and mappings of values."""
    return st.lists(values, max_size=6) | st.dictionaries(names, values, max_size=4)


names = st.sampled_from([*OBJECTS, "red cone", "", "\ud800"]) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | names
values = st.recursive(scalars, collections_of, max_leaves=12)
filenames = st.sampled_from(NAMES) | st.text(max_size=12) | st.from_regex(r"[\w./-]{1,8}_\d\.png", fullmatch=True)
likely_labels = st.dictionaries(filenames, st.lists(names, max_size=6) | values, max_size=4)


def written(path: Path, value) -> Path:
    """The path, after a value was written there, as JSON unless it is bytes."""
    content = value if isinstance(value, bytes) else json.dumps(value).encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return path


@pytest.mark.slow
@fuzz
@given(value=likely_labels | values | st.binary(max_size=60))
def test_any_label_file_is_read_or_refused(tmp_path_factory, value):
    path = written(tmp_path_factory.getbasetemp() / "labels.json", value)
    for load in (load_labels, load_conditions):
        try:
            found = load(path, OBJECTS)
        except InputError as error:
            assert str(error).startswith(f"{path}") and len(str(error).splitlines()) == 1
            continue
        conditions = found.values() if isinstance(found, dict) else found
        for condition in conditions:
            assert 1 <= len(condition) <= 5 and set(condition) <= OBJECTS.keys()
        assert all("/" not in filename for filename in found if isinstance(found, dict))


@pytest.mark.slow
@fuzz
@given(value=st.dictionaries(names, st.integers(-1, 25) | values, max_size=25) | values)
def test_any_object_file_is_read_or_refused(tmp_path_factory, value):
    path = written(tmp_path_factory.getbasetemp() / "objects.json", value)
    try:
        assert sorted(load_objects(path).values()) == list(range(24))
    except InputError as error:
        assert str(error).startswith(f"{path}")


network_options = [
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "dropout",
    "patch_size",
    "resnet_time_scale_shift",
    "x",
]
block_types = ["DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D", "x"]
blocks = st.sampled_from(block_types)
few = st.integers(-1, 70) | st.sampled_from([0, 1, 2, 32, 64, 96, 128, 4096, 10**12])
likely = few | st.lists(few, max_size=3) | st.lists(blocks, max_size=3) | blocks | st.floats() | values


@pytest.mark.slow
@fuzz
@given(changes=st.dictionaries(st.sampled_from(network_options), likely, max_size=3))
def test_any_network_file_is_read_or_refused(tmp_path_factory, changes):
    """Without the memory that it asks for; what is read works."""
    path = written(tmp_path_factory.getbasetemp() / "config.json", {**TINY_NETWORK, **changes})
    try:
        model = load_network(path)
    except InputError as error:
        assert str(error).startswith(f"{path}")
        return
    assert all(parameter.is_meta for parameter in model.parameters())


schedule_options = [
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "clip_sample",
    "timestep_spacing",
    "steps_offset",
    "rescale_betas_zero_snr",
    "_class_name",
    "x",
]
likely_of_schedules = st.sampled_from([1000, "linear", "epsilon"]) | values


@pytest.mark.slow
@fuzz
@given(changes=st.dictionaries(st.sampled_from(schedule_options), likely_of_schedules))
def test_any_schedule_file_is_read_or_refused(tmp_path_factory, changes):
    path = written(tmp_path_factory.getbasetemp() / "schedule.json", changes)
    try:
        scheduler = load_noise_scheduler(path)
    except InputError as error:
        assert str(error).startswith(f"{path}")
        return
    assert len(scheduler.alphas_cumprod) == 1000


changed_bytes = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4)


@fuzz
@given(changes=changed_bytes, end=st.integers(0, 10**6))
def test_any_picture_is_read_or_refused(pictures, tmp_path_factory, changes, end):
    content = bytearray((pictures / NAMES[0]).read_bytes())
    for place, byte in changes:
        content[place % len(content)] = byte
    path = written(tmp_path_factory.getbasetemp() / "a.png", bytes(content[: end % len(content) + 1]))
    try:
        assert read_picture(path).shape == (3, 64, 64)
    except InputError as error:
        assert str(error).startswith(f"{path}")
