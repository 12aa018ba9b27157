"""Plain data: what the task fixes, and what a user can choose.

Nothing here takes time to import, so a script can read its options before it loads PyTorch.
"""

from infra.commands import InputError, shown

IMAGE_SIZE = 64
NUM_OBJECTS = 24

# Trailing timesteps: sampling with few steps then starts where training ended (arXiv 2305.08891).
_COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon",
           "timestep_spacing": "trailing"}  # fmt: skip
_REPORT = {  # the recipe of the report that this project starts from
    "scheduler": _COSINE,
    "training": {"batch_size": 32, "learning_rate": 1e-4, "lr_schedule": "constant", "warmup_steps": 0,
                 "epochs": 40, "ema_decay": 0.0, "label_dropout": 0.0,
                 "timestep_sampling": "uniform", "logit_mean": 0.0, "min_snr_gamma": 0.0, "hard_share": 0.0,
                 "wrong_labels": 0.0, "optimizer": "adamw"},
    "sampling": {"sampler": "ddpm", "steps": 1000, "guidance_scale": 1.0},
}  # fmt: skip

# Everything that makes a run: network, noise scheduler, and the defaults of train.py and sample.py.
PRESETS: dict[str, dict] = {
    # 113.7M parameters, the defaults of model.py. Expected of 40 epochs: new_test 0.8095 (the report's own figure).
    "reference": _REPORT | {"network": {}},
    "tiny-attention": _REPORT | {"network": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("AttnDownBlock2D",) * 3,
    }},
    "tiny-mixed": _REPORT | {"network": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    }},
    # For two CPU cores. The weights that ship: test 0.992, new_test 0.957 (README.md#results).
    "small": {
        "network": {
            "patch_size": 2,
            "block_out_channels": (64, 96, 128),
            "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 32,
            "resnet_time_scale_shift": "scale_shift",
        },
        "scheduler": _COSINE | {"prediction_type": "v_prediction"},
        "training": {"batch_size": 32, "learning_rate": 3e-3, "lr_schedule": "linear", "warmup_steps": 200,
                     "epochs": 40, "ema_decay": 0.999, "label_dropout": 0.1,
                     "timestep_sampling": "logit-normal", "logit_mean": 0.0, "min_snr_gamma": 0.0, "hard_share": 0.0,
                     "wrong_labels": 0.0, "optimizer": "muon"},
        # Guidance from the first step on paints copies of objects: the noisiest timesteps go without.
        "sampling": {"sampler": "dpmsolver++", "steps": 15, "guidance_scale": 4.0,
                     "guidance_interval": (0, 750),
                     "negative_scale": 4.0, "negative_interval": (350, 1000)},
    },
}  # fmt: skip

OPTIMIZERS = ("adamw", "muon")
# Of the noise scheduler, by diffusers' names: what the network predicts, and how much noise a timestep has.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "beta_schedule": ("squaredcos_cap_v2", "linear"),
}
PRECISIONS = ("no", "fp16", "bf16")  # of autocast, by accelerate's names; no: fp32
SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "unipc")
RANGES = {  # of the options of `generate`; both bounds of an interval
    "steps": (1, 1000),
    "guidance_scale": (0, 100),
    "guidance_interval": (0, 1000),
    "negative_scale": (0, 100),
    "negative_interval": (0, 1000),
    "evaluator_scale": (0, 100),
}
# Of a student of guidance distillation: the guidance that is in its predictions. No options of sample.py.
LEARNED_RANGES = {"learned_scale": (0, 100), "learned_interval": (0, 1000)}


def recipe_options(preset: str) -> dict:
    """The options of train.py that decide a result, by name, as they are in a preset."""
    scheduler = PRESETS[preset]["scheduler"]
    return PRESETS[preset]["training"] | {name: scheduler[name] for name in SCHEDULES}


def check_options(options, where: str):
    """Raise InputError unless `options`, which weights bring along, are some that a `Painter` takes."""
    if not isinstance(options, dict) or not {"sampler", "steps", "guidance_scale"} <= options.keys():
        raise InputError(f"{where}: expected sampler, steps and guidance_scale, got {shown(options)}")
    ranges = RANGES | LEARNED_RANGES
    for name, value in options.items():
        if name not in ("sampler", *ranges):
            raise InputError(f"{where}, {shown(name)}: no option of sampling")
        if name == "sampler":
            is_right = value in list(SAMPLERS)
            expected = f"one of {', '.join(SAMPLERS)}"
        else:
            low, high = ranges[name]
            count = 2 if name.endswith("_interval") else 1
            kinds = (int,) if name == "steps" else (int, float)
            values = value if count == 2 and isinstance(value, list) else [value]
            is_right = len(values) == count and all(type(v) in kinds and low <= v <= high for v in values)
            expected = f"{'two numbers' if count == 2 else 'a number'} from {low} to {high}"
        if not is_right:
            raise InputError(f"{where}, {shown(name)}: expected {expected}, got {shown(value)}")
