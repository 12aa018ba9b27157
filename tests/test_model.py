"""The network, its presets and its way to disk and back."""

import copy
import shutil

import pytest
import torch
from conftest import METADATA, ROOT
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import load_weights, write_weights
from infra.commands import InputError
from infra.device import choose_setup, compiler_trouble, join_processes, new_accelerator, prepare
from model import ConditionalUNet, build
from options import PRESETS


def inputs(batch=2):
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(batch, 24, generator=generator) < 0.1).float()
    return torch.randn(batch, 3, 64, 64, generator=generator), torch.tensor([3, 970][:batch]), labels


@pytest.mark.parametrize("preset", ["small", "tiny-attention", "tiny-mixed"])
def test_round_trip_is_bit_equal(tmp_path, preset):
    torch.manual_seed(1)
    model, noise_scheduler = build(preset)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        expected = model.eval()(*inputs())
        assert expected.shape == (2, 3, 64, 64)
        assert torch.equal(ConditionalUNet.from_pretrained(tmp_path / "a").eval()(*inputs()), expected)
        write_weights(tmp_path / "b", model, noise_scheduler, METADATA)
        loaded, scheduler, metadata = load_weights(tmp_path / "b")
        assert torch.equal(loaded.eval()(*inputs()), expected)
    assert scheduler.config.prediction_type == noise_scheduler.config.prediction_type
    assert metadata == METADATA


def test_label_reaches_the_output():
    torch.manual_seed(1)
    model, _ = build("small")
    images, timesteps, labels = inputs()
    with torch.no_grad():
        assert not torch.equal(model(images, timesteps, labels), model(images, timesteps, 0 * labels))


def test_reference_is_the_reports():
    model, noise_scheduler = build("reference")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 113.7
    assert (model.class_embedding.in_features, model.class_embedding.out_features) == (24, 512)
    blocks = [type(b).__name__ for b in [*model.unet.down_blocks, *model.unet.up_blocks]]
    assert [i for i, b in enumerate(blocks) if b.startswith("Attn")] == [4, 7]  # 5th of 6 down, 2nd of 6 up
    assert noise_scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert noise_scheduler.config.prediction_type == "epsilon"
    recipe = PRESETS["reference"]["training"]
    assert (recipe["batch_size"], recipe["learning_rate"], recipe["epochs"]) == (32, 1e-4, 40)
    assert PRESETS["reference"]["sampling"] == {"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0}


def test_small_is_small():
    model, _ = build("small")
    assert sum(p.numel() for p in model.parameters()) < 10e6
    with FlopCounterMode(display=False) as counter:
        model(*inputs(1))
    assert 0.7e9 < counter.get_total_flops() < 2.6e9


def test_weights_of_another_network_are_refused(tmp_path):
    model, noise_scheduler = build("tiny-mixed")
    write_weights(tmp_path / "w", model, noise_scheduler, METADATA)
    build("tiny-attention")[0].save_pretrained(tmp_path / "w" / "unet")
    (tmp_path / "w" / "unet" / "config.json").write_text(model.to_json_string())
    with pytest.raises(
        InputError, match="diffusion_pytorch_model.safetensors: not the weights of this network"
    ):
        load_weights(tmp_path / "w")


def test_the_setup_says_why():
    training, sampling = (choose_setup(join_processes(), "no", 10**6, training=t) for t in (True, False))
    assert training.precision == sampling.precision == "no"
    assert training.compile_mode is None and sampling.compile_mode is None
    assert training.memory_format == torch.contiguous_format
    assert sampling.memory_format == torch.channels_last
    for setup in (training, sampling):
        assert str(setup).startswith("setup: cpu, fp32 (") and "\n" not in str(setup)


def test_half_precision_is_the_default_where_the_processor_has_it(run):
    """AVX512 alone is not enough: without instructions for bf16 it gains nothing."""
    line = "import torch, device; print(*device.choose_precision(torch.device('cpu'), None), sep='|')"
    has_it = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    expected = (
        "bf16|the processor has instructions for it" if has_it else "no|the processor has no instructions"
    )
    assert run(ROOT, "-c", line).stdout.startswith(expected)
    slow = run(ROOT, "-c", line, ATEN_CPU_CAPABILITY="avx2").stdout
    assert slow.startswith("no|the processor has no instructions for bf16")


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="bf16 is refused on this processor"
)
def test_weights_in_half_precision_predict_the_same():
    """They are converted once in place of in each pass."""
    torch.manual_seed(0)
    model, _ = build("small")
    expected = new_accelerator(mixed_precision="no").prepare_model(copy.deepcopy(model).eval())
    setup = choose_setup(join_processes(), "bf16", 10, training=False)
    network, _ = prepare(model, setup)
    assert model.unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            before = expected(*inputs()).float()
        assert torch.equal(network(*inputs()), before)


def test_fp16_is_for_gpus():
    with pytest.raises(InputError, match="--mixed-precision fp16: is for GPUs without bf16"):
        choose_setup(join_processes(), "fp16", 1, training=False)


def test_half_precision_is_refused_where_it_is_slow(tmp_path, run):
    argv = ["train.py", "--model", "small", "--mixed-precision", "bf16", "--out", tmp_path / "run"]
    process = run(ROOT, *argv, "--max-steps", 1, ATEN_CPU_CAPABILITY="avx2")
    assert process.returncode == 2
    error = process.stderr.splitlines()[-1]
    assert error.startswith("error: --mixed-precision bf16: 40 to 500 times slower") and "AVX2" in error
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_told(run, tmp_path):
    """No C++ compiler is to torch.compile on a CPU what no Triton is on a GPU."""
    line = "import torch, device; print(device.compiler_trouble(torch.device('cpu')))"
    process = run(ROOT, "-c", line, CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert process.stdout.startswith("the compiler does not work here: ") and "\n" not in process.stdout[:-1]
    process = run(ROOT, "-c", line, TORCH_COMPILE_DISABLE="1")
    assert process.stdout == "TORCH_COMPILE_DISABLE is set\n"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_working_compiler_is_found():
    assert compiler_trouble(torch.device("cpu")) is None


@pytest.mark.parametrize("preset", ["small", "reference"])
def test_the_network_compiles_into_one_graph(preset):
    """Prepared by accelerate as train.py does it; a break in the graph would raise."""
    blocks = build(preset)[0].config.block_out_channels
    network = ConditionalUNet(
        **PRESETS[preset]["network"] | {"block_out_channels": [32] * len(blocks)}
    ).train()
    prepared = new_accelerator(mixed_precision="no").prepare_model(network)
    compiled = torch.compile(prepared, backend="aot_eager", fullgraph=True, dynamic=False)
    images, timesteps, labels = inputs()
    expected, got = prepared(images, timesteps, labels), compiled(images, timesteps, labels)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    gradients = []
    for output in (expected, got):
        network.zero_grad()
        output.square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
