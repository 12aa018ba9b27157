"""A page in the browser: click objects, and watch a picture of them come out of the noise.

pip install -r requirements-dev.txt
python app.py                            # then open the address that it prints
python app.py --weights runs/reference   # with other weights
"""

import argparse

from infra.commands import InputError, Parser, command, number, read_early, to_path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="A page in the browser that paints the objects one clicks.")
    add = parser.add_argument
    add("--weights", type=to_path, help="folder (default: the newest run, else the weights that ship)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine alone, %(default)s)")
    add("--port", type=number(int, 0, 65535), default=7860, help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    read_early(parse_args)

import dataclasses
import html
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from checkpoint import describe, load_weights, newest, newest_weights
from data.pack import PACK
from data.render import COLORS
from dataset import load_data, to_uint8
from infra.commands import ROOT
from infra.device import choose_setup, join_processes, prepare
from lab import load_evaluator
from label_files import MAX_OBJECTS, load_objects, names_of
from labels import colour_of, shape_of
from pipeline import Painter
from report.judge import count_colours
from report.likeness import nearest
from report.metrics import judge

SIDE = 320  # of the picture on the page, in pixels
VISITORS = 2  # whose pictures are painted at the same time; the others wait in a queue
EXAMPLES = [
    [["red sphere", "cyan cylinder", "cyan cube"]],
    [["red cube", "red sphere"]],
    [["gray cube", "blue sphere", "yellow cylinder"]],
]
SHAPES = {"cube": "2px", "sphere": "50%", "cylinder": "50% / 20%"}  # how the corners of a square are rounded


class Studio:
    """Paints for the page and judges what it painted. `objects`: the names that can be clicked, in their order."""

    def __init__(self, weights: Path):
        state = join_processes()
        model, noise_scheduler, metadata = load_weights(weights)
        print(describe(weights, metadata))
        self.options = metadata["sampling"]
        self.evaluator = load_evaluator(None, state.device)
        indices = load_objects()
        self.objects = names_of(indices)
        self.data, _ = load_data(PACK, ROOT / "train.json", indices)
        setup = choose_setup(state, None, 0, training=False)
        print(setup)
        plain_network, network = prepare(model, setup)
        self.painter = Painter(network, plain_network, noise_scheduler, indices, self.options, state.device)

    def paint(
        self, chosen: list[str], seed: float, steps: float, guidance: float, negative: float, best_of: float
    ) -> Iterator[tuple]:
        """The picture on its way out of the noise, then what the judges see in it, and the nearest training picture.
        Yields what the page's outputs show."""
        if not 1 <= len(chosen) <= MAX_OBJECTS:
            raise gr.Error(f"Click 1 to {MAX_OBJECTS} objects; {len(chosen)} are chosen.", print_exception=False)
        if seed is None or not 0 <= seed < 2**31:
            raise gr.Error("The seed is a whole number from 0 to 2147483647.", print_exception=False)
        options = self.options | {"steps": int(steps), "guidance_scale": guidance, "negative_scale": negative}
        painter = dataclasses.replace(self.painter, options=options, best_of=int(best_of))
        # The sampler calls back, the page wants to be fed: the sampler runs in a thread of its own.
        frames: queue.Queue = queue.Queue()
        has_left = threading.Event()

        def look(images: torch.Tensor) -> torch.Tensor:
            if has_left.is_set():
                raise InterruptedError
            frames.put(to_uint8(images)[0].cpu())
            return images

        def work():
            try:
                frames.put((to_uint8(painter.paint([chosen], [(int(seed), 0)], look))[0].cpu(),))
            except Exception as error:  # told in the visitor's own thread
                frames.put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            while isinstance(found := frames.get(), torch.Tensor):
                yield enlarged(found), "", None, ""
        finally:
            has_left.set()
        if isinstance(found, Exception):
            raise gr.Error(str(found), print_exception=False) from found
        [picture] = found
        near, caption = self.nearest(picture)
        yield enlarged(picture), self.verdict(picture, chosen), near, caption

    def verdict(self, picture: torch.Tensor, asked: list[str]) -> str:
        """What both judges see in a picture, uint8 [3, 64, 64], as a table in HTML."""
        judged = judge(picture[None], [asked], self.evaluator)
        seen = [name for name, is_seen in zip(self.objects, judged.seen[0], strict=True) if is_seen]
        numbers = [f"{number} {colour}" for colour, number in count_colours(judged.found[0]).items()]
        rows = [("Evaluator sees", seen, judged.exact[0]), ("Second judge counts", numbers, judged.counted[0])]
        cells = [
            f"<tr><td>{who}</td><td>{html.escape(', '.join(found) or 'nothing')}</td>"
            f"<td class='{'right' if is_right else 'wrong'}'>{'right' if is_right else 'wrong'}</td></tr>"
            for who, found, is_right in rows
        ]
        return f"<table>{''.join(cells)}</table>"

    def nearest(self, picture: torch.Tensor) -> tuple[Image.Image, str]:
        """The nearest training picture, and what it shows."""
        distance, index = nearest(picture[None], self.data.images)
        near = int(index)
        shows = html.escape(", ".join(self.data.conditions[near]))
        return enlarged(self.data.images[near]), f"{shows}<br>{distance.item():.1f} grey levels away (root mean square)"


def enlarged(picture: torch.Tensor) -> Image.Image:
    """A picture, uint8 [3, 64, 64], as large as on the page."""
    return to_pil_image(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def style(objects: list[str]) -> str:
    """The page's CSS: a board of 3 rows of 8 objects, 6 of 4 on a narrow screen, each with its colour and shape."""
    rules = []
    for place, name in enumerate(objects, start=1):
        red, green, blue = COLORS[colour_of(name)]
        tile = f"#board label:nth-of-type({place})::before"
        rules.append(f"{tile} {{ background: rgb({red} {green} {blue}); border-radius: {SHAPES[shape_of(name)]}; }}")
    return (
        "\n".join(rules)
        + """
#board .wrap { display: grid; grid-template-columns: repeat(8, minmax(0, 1fr)); gap: 6px; }
#board label { padding: 8px 4px; flex-direction: column; justify-content: flex-start; gap: 6px; text-align: center; }
#board label::before { content: ""; width: 22px; height: 22px; }
#board label span { margin: 0; font-size: 12px; }
#caption { padding: 4px 8px; }
@media (max-width: 760px) { #board .wrap { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
#verdict td { padding: 4px 8px; } #verdict .right { color: #2e7d32; } #verdict .wrong { color: #c62828; }
#picture img, #nearest img { image-rendering: pixelated; }
"""
    )


def page(studio: Studio) -> gr.Blocks:
    """The page: a board to click, options, and what came out."""
    options = studio.options
    with gr.Blocks(title="i-CLEVR scenes") as blocks:
        gr.Markdown(
            "# i-CLEVR scenes\nClick the objects, then paint. The model was trained on scenes of 1 to 3 objects."
        )
        board = gr.CheckboxGroup(studio.objects, label="Objects", elem_id="board")
        with gr.Row():
            button = gr.Button("Paint", variant="primary", elem_id="paint")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        with gr.Accordion("Options", open=False), gr.Row():
            steps = gr.Slider(1, 100, options["steps"], step=1, label="Steps")
            guidance = gr.Slider(0, 10, options["guidance_scale"], label="Guidance scale (1: none)")
            negative = gr.Slider(0, 10, options.get("negative_scale", 0), label="Negative scale (0: none)")
            best_of = gr.Slider(1, 8, 1, step=1, label="Best of N")
        shown: dict[str, Any] = {"interactive": False, "height": SIDE + 20, "buttons": ["download"]}
        with gr.Row():
            with gr.Column():
                picture = gr.Image(label="Picture", elem_id="picture", **shown)
                verdict = gr.HTML(elem_id="verdict")
            with gr.Column():
                near = gr.Image(label="Nearest training picture", elem_id="nearest", **shown)
                caption = gr.HTML(elem_id="caption")
        gr.Examples(EXAMPLES, [board], label="Examples")
        inputs = [board, seed, steps, guidance, negative, best_of]
        button.click(
            studio.paint, inputs, [picture, verdict, near, caption], concurrency_limit=VISITORS, show_progress="hidden"
        )
    return blocks


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    studio = Studio(newest(args.weights or newest_weights()))
    try:
        page(studio).queue().launch(server_name=args.host, server_port=args.port or None, css=style(studio.objects))
    except OSError as error:
        raise InputError(f"--port {args.port}: {error}; choose another one") from None


if __name__ == "__main__":
    main()
