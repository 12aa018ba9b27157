"""The table and the figures of benchmarks/study.py, made from its results."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from studies.rows import ROWS

NAMES = {
    "accuracy": "accuracy",
    "exact_set": "exact set",
    "both": "both judges",
    "background": "background",
    "tint": "tint",
}


def last(one: dict) -> dict:
    """What was measured at the end of a training."""
    return one["points"][-1]


def by_row(results: dict, budget: str) -> dict[str, list[dict]]:
    """The results of a budget: name of the row -> one result for each training seed, in the order of ROWS."""
    found = [one for one in results["rows"] if one["budget"] == budget]
    names = [name for name in ROWS if any(one["row"] == name for one in found)]
    return {name: sorted((one for one in found if one["row"] == name), key=lambda one: one["seed"]) for name in names}


# ----------------------------------------------------------------------------------------------------- tables


def mean_and_deviation(runs: list[dict], name: str) -> str:
    """Over all sampling seeds of all training seeds."""
    values = [value for one in runs for value in last(one)[name]]
    deviation = f" ± {statistics.stdev(values):.3f}" if name == "accuracy" and len(values) > 1 else ""
    return f"{statistics.mean(values):.{1 if name in ('background', 'tint') else 3}f}{deviation}"


def table(results: dict, budget: str) -> str:
    """A line for each row: means over all its training and sampling seeds."""
    lines = [
        "| row | training seeds | pictures | minutes | " + " | ".join(NAMES.values()) + " | spikes: loss | gradient |",
        "|---" * (6 + len(NAMES)) + "|",
    ]
    factor = ""
    for name, runs in by_row(results, budget).items():
        if ROWS[name].factor != factor:
            factor = ROWS[name].factor
            lines.append(f"| **{factor}** |" + " |" * (5 + len(NAMES)))
        cells = [
            name,
            str(len(runs)),
            f"{statistics.mean(one['pictures'] for one in runs):,.0f}",
            f"{statistics.mean(one['seconds'] for one in runs) / 60:.0f}",
            *(mean_and_deviation(runs, measure) for measure in NAMES),
            *(f"{statistics.mean(one[kind] for one in runs):g}" for kind in ("loss_spikes", "gradient_spikes")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def seeds_table(results: dict, budget: str) -> str:
    """The accuracy of each training seed, mean of its sampling seeds, of rows that have several."""
    lines = ["| row | seed 0 | seed 1 |", "|---|---|---|"]
    for name, runs in by_row(results, budget).items():
        if len(runs) > 1:
            cells = [f"{statistics.mean(last(one)['accuracy']):.3f}" for one in runs]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def guidance_table(results: dict, budget: str) -> str:
    """Accuracy and the share right for both judges against the guidance scale, of rows sampled with several."""
    rows = {name: runs for name, runs in by_row(results, budget).items() if ROWS[name].guidance_scales}
    scales = sorted({scale for runs in rows.values() for scale in runs[0]["guidance"]})
    lines = [f"| accuracy / both judges | {' | '.join(f'guidance {scale}' for scale in [*scales, '4'])} |"]
    lines.append("|---" * (2 + len(scales)) + "|")
    for name, runs in rows.items():
        cells = []
        for scale in [*scales, "4"]:
            found = [one["guidance"].get(scale, last(one)) for one in runs]
            means = [statistics.mean(v for one in found for v in one[kind]) for kind in ("accuracy", "both")]
            cells.append(" / ".join(f"{mean:.3f}" for mean in means))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def search_table(results: dict) -> str:
    """The results of the search for the preset `small`, which came before the study."""
    lines = ["| row | seed | commit | pictures | guidance 2 | guidance 4 |", "|---|---|---|---|---|---|"]
    for one in results["rows"]:
        if one["budget"] == "search":
            values = [one["guidance"]["2"]["accuracy"], last(one)["accuracy"]]
            cells = [f"{statistics.mean(value):.3f} ± {statistics.stdev(value):.3f}" for value in values]
            line = [one["row"], str(one["seed"]), one["commit"], f"{one['pictures']:,}", *cells]
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- figures


def draw_rows(results: dict, budget: str, path: Path):
    """Accuracy and the share right for both judges of each row: a dot for each training seed."""
    rows = by_row(results, budget)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
    kinds = (("accuracy", "o", "tab:blue"), ("exact_set", "s", "tab:green"), ("both", "^", "tab:orange"))
    for kind, marker, colour in kinds:
        places = [(statistics.mean(last(one)[kind]), y) for y, runs in enumerate(rows.values()) for one in runs]
        axes.scatter(*zip(*places, strict=True), marker=marker, color=colour, label=NAMES[kind], alpha=0.7)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="share, on validation.json", xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_curves(results: dict, budget: str, path: Path):
    """Accuracy against pictures seen and against time, mean over the training seeds. Quick budget: the minutes that
    a row is given, since those used depend on what else the machine does."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.5), layout="constrained", sharey=True)
    for number, (name, runs) in enumerate(by_row(results, budget).items()):
        points = [
            statistics.mean(v for one in runs for v in one["points"][i]["accuracy"])
            for i in range(len(runs[0]["points"]))
        ]
        pictures = [point["pictures"] for point in runs[0]["points"]]
        used = statistics.mean(one["seconds"] for one in runs) / 60
        minutes = ROWS[name].minutes if budget == "quick" else used
        style = {"marker": "os^v"[number // 10 % 4], "color": f"C{number % 10}", "label": name}
        panels[0].plot(pictures, points, **style)
        panels[1].plot([minutes * count / pictures[-1] for count in pictures], points, **style)
    label_axes(panels[0], "pictures seen", "accuracy on validation.json")
    label_axes(panels[1], "minutes of one idle core" if budget == "quick" else "minutes", "")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def label_axes(axes: Axes, x: str, y: str):
    axes.set(xlabel=x, ylabel=y, xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both")


def draw_backgrounds(results: dict, budget: str, path: Path):
    """Left: loss against pictures seen. Right: how far the background's colour spreads, beside the data's."""
    rows = by_row(results, budget)
    kinds = (("background", "o", "tab:blue"), ("tint", "^", "tab:orange"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 2.5 + 0.3 * len(rows)), layout="constrained")
    for number, (name, runs) in enumerate(rows.items()):
        curve = runs[0]["curve"]
        style = ("-", "--", ":")[number // 10 % 3]
        left.plot(curve["pictures"], curve["loss"], style, color=f"C{number % 10}", lw=1, label=name)
        for kind, marker, colour in kinds:
            values = [statistics.mean(last(one)[kind]) for one in runs]
            right.scatter(values, [number] * len(values), marker=marker, color=colour, alpha=0.7)
    for kind, _, colour in kinds:
        right.axvline(results["data"][kind], color=colour, ls="--", label=f"{NAMES[kind]} of the data")
    label_axes(left, "pictures seen", "training loss")
    left.set(yscale="log")
    left.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    right.set_yticks(range(len(rows)), list(rows))
    right.set_ylim(len(rows) - 0.5, -0.5)
    right.set(xlabel="spread over samples, grey levels", xscale="log")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw(results: dict, budget: str, out: Path):
    """The three figures."""
    draw_rows(results, budget, out / f"{budget}_rows.png")
    draw_curves(results, budget, out / f"{budget}_curves.png")
    draw_backgrounds(results, budget, out / f"{budget}_backgrounds.png")
