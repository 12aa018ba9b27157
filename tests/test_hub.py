"""A folder of weights opens where this project is not: in diffusers, on the Hub."""

import base64
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, UNet2DModel
from huggingface_hub import ModelCard
from PIL import Image

import checkpoint
import sample
from bookkeeping.hub import pipeline_files
from conftest import SHIPPED, listing
from label_files import load_objects
from model import build
from options import PRESETS
from pipeline import ConditionalDDPMPipeline

SCENES = [["red cube"], ["cyan sphere", "gray cube"]]


@pytest.fixture(scope="module")
def exported(seedling, tmp_path_factory) -> Path:
    """What checkpoint.py writes for the weights of the fixture `seedling`."""
    folder = tmp_path_factory.mktemp("hub") / "exported"
    checkpoint.main([str(seedling), str(folder)])
    return folder


@pytest.fixture
def pipe(exported) -> ConditionalDDPMPipeline:
    """The pipeline of this project with the same weights."""
    model, noise_scheduler, metadata = checkpoint.load_weights(exported)
    made = ConditionalDDPMPipeline(model.eval(), noise_scheduler, load_objects(), metadata["sampling"] | {"steps": 3})
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------- loaded from the folder


@pytest.mark.slow
@pytest.mark.parametrize("where", ["custom_pipeline=DIR, ", ""])
def test_a_fresh_process_without_the_project_paints_what_sample_paints(exported, six, tmp_path, run, where):
    code = f"""
import json, torch
from diffusers import DiffusionPipeline
DIR = {str(exported)!r}
pipe = DiffusionPipeline.from_pretrained(DIR, {where}trust_remote_code=True)
scenes = json.load(open("six.json"))
generator = torch.Generator().manual_seed(7)
result = pipe(scenes, num_inference_steps=3, guidance_scale=4, negative_scale=4, generator=generator)
for i, image in enumerate(result.images):
    image.save(f"pipe{{i}}.png")
assert not any(name in ("sample", "diffusion", "labels", "network") for name in __import__("sys").modules)
"""
    done = run(tmp_path, "-c", code, HF_MODULES_CACHE=str(tmp_path / "modules"), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    more = ["--weights", exported, "--guidance-scale", 4, "--negative-scale", 4, "--seed", 7]
    sample.main([*six, *map(str, more), "--mixed-precision", "no"])
    for i in range(6):
        ours = np.asarray(Image.open(tmp_path / "out" / "six" / f"{i}.png"), dtype=int)
        theirs = np.asarray(Image.open(tmp_path / f"pipe{i}.png"), dtype=int)
        assert abs(ours - theirs).max() <= 1


def test_the_weights_that_ship_are_such_a_folder():
    """With the code of today. Where this fails: python checkpoint.py weights/small weights/small"""
    metadata = checkpoint.load_metadata(SHIPPED)
    for name, text in pipeline_files(metadata, load_objects()).items():
        if name == "model_index.json":
            index = json.loads((SHIPPED / name).read_text())
            assert index | {"_diffusers_version": ""} == json.loads(text) | {"_diffusers_version": ""}
        else:
            assert (SHIPPED / name).read_text() == text, name
    assert ModelCard.load(SHIPPED / "README.md").data.eval_results


@pytest.mark.parametrize("preset", PRESETS)
def test_the_network_alone_is_refused_by_the_class_it_is_not(preset, tmp_path):
    """UNet2DModel would else load what it knows of the configuration, and draw the weights at random."""
    with torch.device("meta"):
        model, _ = build(preset)
    model.save_config(tmp_path)
    shutil.copy(SHIPPED / "unet" / "diffusion_pytorch_model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="same number"):
        UNet2DModel.from_pretrained(tmp_path)


def test_a_folder_from_before_the_pipeline_still_loads(exported, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(exported, old)
    for name in ("pipeline.py", "model_index.json", "unet/network.py", "README.md"):
        (old / name).unlink()
    config = json.loads((old / "unet" / "config.json").read_text())
    for name in ("sample_size", "num_objects", "conditioning"):
        config.pop(name)
    config["up_block_types"] = ["AttnUpBlock2D", "UpBlock2D"]
    (old / "unet" / "config.json").write_text(json.dumps(config))
    before = checkpoint.load_weights(exported)[0].state_dict()
    torch.testing.assert_close(checkpoint.load_weights(old)[0].state_dict(), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- its options


def test_outputs_have_the_types_that_diffusers_promises(pipe):
    shapes = {}
    for kind in ("pt", "np", "latent"):
        images = pipe(SCENES, generator=seeded(0), output_type=kind).images
        shapes[kind] = tuple(images.shape)
        assert (images.min() < 0) == (kind == "latent")
    assert shapes == {"pt": (2, 3, 64, 64), "np": (2, 64, 64, 3), "latent": (2, 3, 64, 64)}
    [image] = pipe("red cube", generator=seeded(0), return_dict=False)[0]
    assert image.size == (64, 64)
    assert len(pipe(["red cube", "cyan sphere"]).images) == 1
    assert len(pipe(SCENES, num_images_per_prompt=3).images) == 6


def test_the_seed_decides_and_a_list_of_generators_seeds_each_picture(pipe):
    whole = pipe(SCENES, generator=seeded(3), output_type="pt").images
    assert torch.equal(pipe(SCENES, generator=seeded(3), output_type="pt").images, whole)
    assert not torch.equal(pipe(SCENES, output_type="pt").images, pipe(SCENES, output_type="pt").images)
    listed = pipe(SCENES, generator=[seeded(3), seeded(3)], output_type="pt").images
    torch.testing.assert_close(listed[0], whole[0], rtol=0, atol=1e-4)
    assert not torch.allclose(listed[1], whole[1], atol=1e-2)


def test_the_callback_sees_each_step_and_may_change_the_picture(pipe):
    seen = []

    def black(pipe, step, timestep, tensors):
        seen.append((step, timestep, tuple(tensors["latents"].shape)))
        return {"latents": torch.full_like(tensors["latents"], -1)} if step == 2 else None

    images = pipe("red cube", num_inference_steps=3, callback_on_step_end=black, output_type="pt").images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert seen[0][2] == (1, 3, 64, 64)
    assert images.max() == 0


def test_a_scheduler_that_was_set_decides_unless_sampler_is_given(pipe):
    ddim = pipe(SCENES, sampler="ddim", generator=seeded(0), output_type="pt").images
    unipc = pipe(SCENES, sampler="unipc", generator=seeded(0), output_type="pt").images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(pipe(SCENES, generator=seeded(0), output_type="pt").images, ddim)
    assert torch.equal(pipe(SCENES, sampler="unipc", generator=seeded(0), output_type="pt").images, unipc)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        pipe(SCENES)


def test_half_precision_paints_nearly_the_same(pipe):
    whole = pipe(SCENES, generator=seeded(0), output_type="pt").images
    half = pipe.to(torch.bfloat16)(SCENES, generator=seeded(0), output_type="pt").images
    assert half.dtype == torch.float32
    assert 0 < (half - whole).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prompt": "red cub"}, "red cube"),
        ({"prompt": [["red cube"], "cyan sphere"]}, "list"),
        ({"prompt": ["red cube", "red cube"]}, "different"),
        ({"prompt": []}, "at least one"),
        ({"prompt": "red cube", "sampler": "euler"}, "dpmsolver"),
        ({"prompt": "red cube", "num_inference_steps": 0}, "1 to 1000"),
        ({"prompt": "red cube", "generator": [seeded(0), seeded(1)]}, "1 generators"),
        ({"prompt": "red cube", "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents"),
    ],
)
def test_a_mistake_is_told(pipe, arguments, word):
    with pytest.raises(ValueError, match=word):
        pipe(**arguments)


# ---------------------------------------------------------------------------------------- model card, the Hub


@pytest.mark.slow
def test_the_card_holds_the_scores_of_these_weights(exported, six, tmp_path, refused):
    folder = tmp_path / "mine"
    shutil.copytree(exported, folder)
    shutil.copy(tmp_path / "six.json", tmp_path / "again.json")
    lists = [*six[:2], str(tmp_path / "again.json")]
    sample.main([*lists, *six[2:], "--weights", str(folder), "--seeds", "2"])
    scores = ["--scores", str(tmp_path / "out" / "six"), str(tmp_path / "out" / "again")]
    checkpoint.main([str(folder), str(folder), *scores])
    card = ModelCard.load(folder / "README.md")
    found = {(one.dataset_split, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert set(found) == {(name, metric) for name in ("six", "again") for metric in card.data.metrics}
    for name in ("six", "again"):
        report = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert found[name, "accuracy"] == pytest.approx(report["accuracy"], abs=1e-4)
        assert found[name, "exact_match"] == pytest.approx(report["exact_set"], abs=1e-4)
        assert f"{report['accuracy']:.3f}" in card.text
    assert (folder / "samples.png").read_bytes() == (tmp_path / "out" / "six.png").read_bytes()
    assert 'from_pretrained("mine"' in card.text

    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "pipeline.py").write_text("of another day")
    checkpoint.main([str(folder), str(folder)])  # renews the code and keeps the scores
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == whole

    before = listing(folder)
    refused(checkpoint.main, [SHIPPED, tmp_path / "other", *scores], "other weights")
    sample.main([*six, "--weights", str(folder), "--evaluator-scale", "1", "--overwrite"])
    refused(checkpoint.main, [folder, folder, *scores], "evaluator took part")
    assert listing(folder) == before


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's interface that an upload of small files needs; what it was given is in `server.given`."""

    def do_POST(self):  # noqa: N802 - the name that http.server calls
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        name = "someone/mine"
        host = f"http://{self.headers['Host']}"
        if path.endswith("/api/repos/create"):
            answer = {"url": f"{host}/{name}", "name": name, "id": name}
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in path:
            self.server.given.extend(json.loads(line) for line in body.splitlines())
            answer = {"commitUrl": f"{host}/{name}/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self):  # noqa: N802
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_the_folder_is_uploaded_whole(exported, tmp_path, run):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.given = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    line = [checkpoint.__file__, exported, tmp_path / "mine", "--push-to-hub", "someone/mine"]
    done = run(tmp_path, *line, HF_ENDPOINT=address, HF_TOKEN="hf_test")
    server.shutdown()
    assert done.returncode == 0, done.stderr
    sent = {one["value"]["path"]: one["value"]["content"] for one in server.given if one["key"] == "file"}
    files = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    assert sorted(sent) == sorted(str(path.relative_to(tmp_path / "mine")) for path in files)
    assert base64.b64decode(sent["pipeline.py"]) == (tmp_path / "mine" / "pipeline.py").read_bytes()


@pytest.mark.slow
def test_an_upload_that_fails_is_told_in_a_line(exported, tmp_path, run):
    line = [checkpoint.__file__, exported, tmp_path / "mine", "--push-to-hub", "someone/mine"]
    done = run(tmp_path, *line, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="hf_test")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--push-to-hub someone/mine" in done.stderr
    assert (tmp_path / "mine" / "README.md").exists()
