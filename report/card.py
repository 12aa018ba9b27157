"""The model card of a folder of weights: what the Hub shows of it, made from its metadata and its scored pictures."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from infra.commands import InputError
from report.metrics import Spread, load_samples, runs_of, scores

CARD_NAME = "README.md"
GRID_NAME = "samples.png"
TASK = "text-to-image"  # the Hub's word for pictures from a list of words
METRICS = {"accuracy": "accuracy", "exact_set": "exact_match", "both": "both_judges"}  # ours -> the Hub's


@dataclass(frozen=True)
class Scored:
    """A list that was painted with the weights: its name, the report of sample.py, its measures, its grid."""

    name: str
    report: dict
    scores: dict[str, Spread]
    grid: Path


def load_scored(folder: Path, weights_sha256: str) -> Scored:
    """Judge what sample.py painted into `folder`. Raises InputError if it is of other weights, or if the evaluator took
    part in sampling."""
    report, judged = load_samples(folder)
    if report.get("weights_sha256") != weights_sha256:
        raise InputError(f"{folder}: painted with other weights ({report['weights']}); sample with these first")
    if report.get("evaluator_scale"):
        raise InputError(f"{folder}: the evaluator took part in sampling, so this is no score of the model")
    grid = folder.with_name(f"{folder.name}.png")
    if not grid.is_file():
        raise InputError(f"{grid}: no such file; it is the grid that sample.py writes")
    return Scored(folder.name, report, scores(runs_of(judged, len(report["conditions"]))), grid)


def model_card(name: str, metadata: dict, scored: list[Scored], objects: list[str]) -> ModelCard:
    """The card of weights called `name`, which paint `objects`. `metadata`: what is noted beside them."""
    results = []
    for one in scored:
        for measure, metric in METRICS.items():
            result = EvalResult(
                task_type=TASK,
                dataset_type="i-clevr",
                dataset_name=f"i-CLEVR, {one.name}",
                dataset_split=one.name,  # by which, not by the name, the Hub tells them apart
                metric_type=metric,
                metric_value=round(one.scores[measure].mean, 4),
            )
            results.append(result)
    data = ModelCardData(
        license="mit",
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["ddpm", "conditional-diffusion", "i-clevr", "classifier-free-guidance"],
        metrics=list(METRICS.values()),
        model_name=name,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=Path(__file__).with_name("card.jinja").read_text(),
        name=name,
        metadata=metadata,
        scored=scored,
        objects=objects,
        grid=GRID_NAME,
    )


def write_card(folder: Path, card: ModelCard, scored: list[Scored]):
    """Write the card into the folder of weights, and the grid of the first list beside it."""
    (folder / CARD_NAME).write_text(card.content)
    if scored:
        shutil.copyfile(scored[0].grid, folder / GRID_NAME)
