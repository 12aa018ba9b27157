"""The rows of benchmarks/study.py: plain data. A row of your own is one more entry of ROWS.

A row is a preset of options.py with changes of its parts: network, scheduler, training, sampling. `python
benchmarks/study.py ROW` runs it.
"""

import copy
from dataclasses import dataclass, field

from options import PRESETS


@dataclass(frozen=True)
class Row:
    """A row of the study. `factor`: under which heading it stands. `changes`: part of a preset -> what is
    another there than in the base, or in the `preset` if that is another. `minutes`: of one CPU core that the
    quick budget gives it. `training_seeds`: so many runs, with the seeds 0, 1 and so on. `guidance_scales`:
    other scales to sample the trained weights with, beside its own. `budgets`: those that run it when no rows
    are named. `commit`: the last one with the code of a row that did not pay; its results are kept."""

    factor: str
    changes: dict[str, dict] = field(default_factory=dict)
    preset: str = "small"
    minutes: int = 15
    training_seeds: int = 1
    guidance_scales: tuple[float, ...] = ()
    budgets: tuple[str, ...] = ("quick", "full")
    commit: str = ""


# The preset `small` with a warm-up that fits a short training, and without negative prompting, which costs
# passes and has nothing to do with training.
BASE: dict[str, dict] = copy.deepcopy(PRESETS["small"])
BASE["training"]["warmup_steps"] = 50
BASE["sampling"]["negative_scale"] = 0.0

# The report's recipe, on whatever network. Sampled like all rows, but without guidance, which it was not
# trained for.
REPORT: dict[str, dict] = {
    "scheduler": {"prediction_type": "epsilon"},
    "training": PRESETS["reference"]["training"],
    "sampling": BASE["sampling"] | {"guidance_scale": 1.0},
}
# (32, 64, 64) with attention at all levels, on 2x2 patches: at 64x64 it learns 0.3 pictures a second on a core.
TINY = PRESETS["tiny-attention"]["network"]
# That of the report's networks: the label is added to the features of a block.
ADDED = {"resnet_time_scale_shift": "default"}
NO_ATTENTION = {"down_block_types": ("DownBlock2D",) * 3}
MORE_ATTENTION = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
LARGE_PATCHES = {
    "patch_size": 4,
    "block_out_channels": (128, 192),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
}
SCALES = (1.0, 2.0, 3.0)
QUICK = ("quick",)
FULL = ("full",)

ROWS: dict[str, Row] = {
    "base": Row("base", training_seeds=2, guidance_scales=SCALES),
    # How the condition enters
    "added to the features": Row("condition", {"network": ADDED}, training_seeds=2),
    # 24 planes of zeros or ones beside the picture.
    "label planes": Row("condition", {"network": {"conditioning": "planes"}}, budgets=(), commit="f158e52"),
    "object tokens": Row("condition", {"network": {"conditioning": "tokens"}}, training_seeds=2),
    "MLP": Row("condition", {"network": {"conditioning": "mlp"}}, budgets=(), commit="eeb6f26"),
    # Recipe
    "noise prediction": Row("recipe", {"scheduler": {"prediction_type": "epsilon"}}, training_seeds=2),
    "sample prediction": Row("recipe", {"scheduler": {"prediction_type": "sample"}}),
    "linear schedule": Row("recipe", {"scheduler": {"beta_schedule": "linear"}}),
    "no EMA": Row("recipe", {"training": {"ema_decay": 0.0}}),
    "min-SNR 5": Row("recipe", {"training": {"min_snr_gamma": 5.0}}),
    "AdamW, learning rate 1e-3": Row("recipe", {"training": {"optimizer": "adamw", "learning_rate": 1e-3}}),
    "AdamW, learning rate 1e-4": Row("recipe", {"training": {"optimizer": "adamw", "learning_rate": 1e-4}}),
    "label dropout 0": Row("recipe", {"training": {"label_dropout": 0.0}}, guidance_scales=SCALES),
    # Network
    "(32, 64, 64), patches": Row("network", {"network": TINY}, training_seeds=2),
    "2 layers a block": Row("network", {"network": {"layers_per_block": 2}}),
    "no attention": Row("network", {"network": NO_ATTENTION}),
    # Attention that cannot saturate, and a transformer where the feature map is smallest
    "normalized attention": Row("network", {"network": {"normalize_attention": True}}, budgets=()),
    "middle transformer": Row("network", {"network": {"normalize_attention": True, "middle_layers": 4}}, budgets=()),
    # Half an hour each on one core
    "base, 30 minutes": Row("half an hour", minutes=30, training_seeds=2, budgets=QUICK),
    "object tokens, 30 minutes": Row(
        "half an hour", {"network": {"conditioning": "tokens"}}, minutes=30, training_seeds=2, budgets=QUICK
    ),
    "report's recipe": Row("half an hour", REPORT | {"network": ADDED}, minutes=30),
    "report's recipe, (32, 64, 64), patches": Row(
        "half an hour", REPORT | {"network": TINY | ADDED}, minutes=30, training_seeds=2
    ),
    "report's recipe, mixed (32, 64, 64)": Row("half an hour", REPORT, preset="tiny-mixed", minutes=30),
    "report's recipe, (32, 64, 64)": Row("half an hour", REPORT, preset="tiny-attention", budgets=FULL),
    "reference": Row("half an hour", REPORT, preset="reference", budgets=FULL),
    # Run only when they are named. Most were in the search for the preset `small` (docs/study.md).
    "learning rate 1.5e-3": Row("recipe", {"training": {"learning_rate": 1.5e-3}}, budgets=()),
    "learning rate 6e-3": Row("recipe", {"training": {"learning_rate": 6e-3}}, budgets=()),
    "learning rate constant": Row("recipe", {"training": {"lr_schedule": "constant"}}, budgets=()),
    "batch 16, learning rate 2e-3": Row("recipe", {"training": {"batch_size": 16, "learning_rate": 2e-3}}, budgets=()),
    "batch 64, learning rate 4e-3": Row("recipe", {"training": {"batch_size": 64, "learning_rate": 4e-3}}, budgets=()),
    "EMA 0.99": Row("recipe", {"training": {"ema_decay": 0.99}}, budgets=()),
    "EMA 0.9995": Row("recipe", {"training": {"ema_decay": 0.9995}}, budgets=()),
    "label dropout 0.05": Row("recipe", {"training": {"label_dropout": 0.05}}, budgets=()),
    "label dropout 0.2": Row("recipe", {"training": {"label_dropout": 0.2}}, budgets=()),
    "uniform timesteps": Row("recipe", {"training": {"timestep_sampling": "uniform"}}, budgets=()),
    "zero terminal SNR": Row("recipe", {"scheduler": {"rescale_betas_zero_snr": True}}, budgets=()),
    "attention at 16x16 too": Row("network", {"network": MORE_ATTENTION}, budgets=()),
    "channels 32, 64, 96": Row("network", {"network": {"block_out_channels": (32, 64, 96)}}, budgets=()),
    "channels 64, 128, 256": Row("network", {"network": {"block_out_channels": (64, 128, 256)}}, budgets=()),
    "channels 96, 128, 192": Row("network", {"network": {"block_out_channels": (96, 128, 192)}}, budgets=()),
    "patches 4, channels 128, 192": Row("network", {"network": LARGE_PATCHES}, budgets=()),
}


def preset_of(row: Row) -> dict[str, dict]:
    """The preset that a row stands for, as those of options.py."""
    start = BASE if row.preset == "small" else PRESETS[row.preset]
    return {part: start[part] | row.changes.get(part, {}) for part in BASE}
