"""Pictures and figures as text that goes into the page: data URLs and SVG."""

import base64
import io
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from bookkeeping.curves import plot_steps, read_log
from report.metrics import confidence_interval

# Text in a figure stays text, in the font of the page.
matplotlib.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
matplotlib.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True})


def data_url(kind: str, content: bytes) -> str:
    """An image file's content as an address that holds it; `kind`: png or webp."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture_url(picture: torch.Tensor) -> str:
    """A uint8 picture [3, 64, 64] as a data URL, lossless."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "webp", lossless=True)
    return data_url("webp", buffer.getvalue())


def png_url(path: Path) -> str:
    """A PNG file as a data URL."""
    return data_url("png", path.read_bytes())


def to_svg(figure: Figure) -> str:
    """A figure as an <svg> element, without the lines that an SVG file has before it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw_objects(rows: list[tuple[str, int, float]]) -> str:
    """A bar for each object: its accuracy. `rows`: of `metrics.by_group`."""
    figure = Figure(figsize=(8, 3))
    axes = figure.subplots()
    accuracies = [accuracy for _, _, accuracy in rows]
    axes.bar([name for name, _, _ in rows], accuracies, color="tab:blue")
    axes.set(ylabel="accuracy", ylim=(min(0.5, *accuracies), 1))
    axes.tick_params(axis="x", rotation=90)
    return to_svg(figure)


def draw_confusions(matrix: torch.Tensor, names: list[str]) -> str:
    """A matrix of mistakes: what was seen in place of what was asked for. `matrix`: of
    `metrics.confusion_matrix`; its diagonal, what was seen right, would outshine the rest and is left out."""
    figure = Figure(figsize=(6.5, 6))
    axes = figure.subplots()
    counts = matrix.float().fill_diagonal_(0).numpy()
    axes.imshow(np.where(counts > 0, counts, np.nan), cmap="Reds", vmin=0)
    axes.grid(False)
    for row, column in np.argwhere(counts):
        count = counts[row, column]
        colour = "white" if count > counts.max() / 2 else "black"
        axes.text(column, row, f"{count:.0f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(names) + 1), [*names, "nothing"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(names) + 1), [*names, "nothing"], fontsize=7)
    axes.set(xlabel="seen", ylabel="asked for")
    return to_svg(figure)


def draw_seeds(lists: dict[str, list[float]]) -> str | None:
    """A curve for each list: mean accuracy of its first 2, 3, ... seeds, with the 95 % confidence interval.
    None if no list has two seeds."""
    lists = {name: accuracies for name, accuracies in lists.items() if len(accuracies) > 1}
    if not lists:
        return None
    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    for name, accuracies in lists.items():
        counts = range(2, len(accuracies) + 1)
        means = [statistics.mean(accuracies[:n]) for n in counts]
        intervals = np.array([confidence_interval(accuracies[:n]) for n in counts])  # [len(counts), 2]
        line = axes.plot(counts, means, marker="o", markersize=3, label=name)
        axes.fill_between(counts, intervals[:, 0], intervals[:, 1], alpha=0.15, color=line[0].get_color())
    axes.set(xlabel="seeds", ylabel="mean accuracy", ylim=(None, 1.02))
    axes.legend()
    return to_svg(figure)


def draw_histograms(sets: dict[str, dict[str, np.ndarray]]) -> str:
    """A panel for each quantity, with a line for each set of pictures.

    `sets`: name of the set -> quantity -> its values in that set; all sets have the same quantities.
    """
    quantities = list(next(iter(sets.values())))
    figure = Figure(figsize=(3.2 * len(quantities), 2.8))
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for axes, quantity in zip(panels, quantities, strict=True):
        everything = np.concatenate([values[quantity] for values in sets.values()])
        edges = np.histogram_bin_edges(everything, bins=40)
        for name, values in sets.items():
            axes.hist(values[quantity], edges, density=True, histtype="step", label=name)
        axes.set(xlabel=quantity, yticks=[])
    panels[0].set_ylabel("density")
    panels[-1].legend(fontsize=7)
    return to_svg(figure)


def draw_log(path: Path) -> str:
    """The loss of a training run over the pictures it has seen. `path`: its log.jsonl."""
    steps, _ = read_log(path)
    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    plot_steps(axes, steps, "loss")
    axes.set(xlabel="pictures seen", ylabel="training loss", yscale="log")
    return to_svg(figure)
