"""Paints conditions: what sample.py works with, and a pipeline of diffusers.

`python checkpoint.py RUN DIR` writes this file, with all that it needs of labels.py and diffusion.py, as
`DIR/pipeline.py`: a fresh process then paints without this project.

    pipe = DiffusionPipeline.from_pretrained(DIR, custom_pipeline=DIR, trust_remote_code=True)
    pipe(["red sphere", "cyan cube"], generator=torch.Generator().manual_seed(0)).images[0]
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ImagePipelineOutput,
    UniPCMultistepScheduler,
)
from diffusers.image_processor import VaeImageProcessor

from diffusion import (
    SCHEDULERS,
    Callback,
    Interval,
    Network,
    generate,
    keep,
    likelihood_ratio,
    make_scheduler,
    picture_seed,
)
from labels import hard_negatives, labels_with_one_mistake, multi_hot


@dataclass
class Painter:
    """Paints batches of conditions, each picture the best of `best_of` candidates by its likelihood ratio.

    `network` may be compiled for one size of batches; `plain_network` is the same, not compiled. `objects`: name ->
    index. `options`: of `generate`, and for a student the learned ones of `likelihood_ratio`. `lift_over`: what a label
    is compared with, "mistakes" for labels with one mistake in them, or "unconditional" for no label at all.
    """

    network: Network
    plain_network: Network
    noise_scheduler: DDPMScheduler
    objects: dict[str, int]
    options: dict[str, Any]
    device: torch.device
    evaluator: torch.nn.Module | None = None
    best_of: int = 1
    lift_over: str = "mistakes"

    def paint(
        self, conditions: list[list[str]], places: list[tuple[int, int]], callback: Callback = keep
    ) -> torch.Tensor:
        """Pictures [B, 3, 64, 64] in [-1, 1] of B conditions. `places`: (seed of the run, index in the list),
        on which a picture's noise depends. `callback` as in `generate`."""
        labels = multi_hot(conditions, self.objects).to(self.device)
        options = dict(self.options)
        learned = {name: options.pop(name) for name in self.options if name.startswith("learned_")}
        options["negative_labels"] = [hard_negatives(condition, self.objects) for condition in conditions]
        options["evaluator"] = self.evaluator
        options["callback"] = callback
        # A candidate is the same picture with other noise.
        candidates = []
        for k in range(self.best_of):
            seeds = [picture_seed(seed, index, k) for seed, index in places]
            candidates.append(generate(self.network, self.noise_scheduler, labels, seeds, **options))
        if self.best_of == 1:
            return candidates[0]
        if self.lift_over == "mistakes":
            others = [labels_with_one_mistake(condition, self.objects) for condition in conditions]
        else:
            others = [torch.zeros(1, labels.shape[1])] * len(conditions)
        # Not by the compiled network, which wants all batches of one size.
        ratios = [
            likelihood_ratio(self.plain_network, self.noise_scheduler, images, labels, others, **learned)
            for images in candidates
        ]
        best = torch.stack(ratios).argmax(0)  # [B]
        return torch.stack(candidates)[best, torch.arange(len(best))]


SCHEDULER_NAMES = {  # of diffusers' classes, for `pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`
    DDIMScheduler: "ddim", DPMSolverMultistepScheduler: "dpmsolver++", UniPCMultistepScheduler: "unipc"
}  # fmt: skip


class ConditionalDDPMPipeline(DiffusionPipeline):
    """Paints i-CLEVR scenes that show the objects asked for.

    `unet`: a ConditionalUNet. `scheduler`: the noise scheduler that it was trained with. `objects`: name -> index in
    the label. `sampling`: the default options of a call.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    # Without types: diffusers 0.35 reads them, and does not know `dict | None`.
    def __init__(self, unet, scheduler, objects=None, sampling=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(objects=objects, sampling=sampling)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[list[str]],
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: Interval | None = None,
        negative_scale: float | None = None,
        negative_interval: Interval | None = None,
        sampler: str | None = None,
        best_of: int = 1,
        lift_over: str = "mistakes",
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ConditionalDDPMPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Pictures of the objects in `prompt`: one name, the names of one scene such as ["red sphere", "cyan cube"], or
        a list of scenes.

        What is not given is as the weights were made for (`pipe.config.sampling`). `guidance_scale`: of classifier-free
        guidance (arXiv 2207.12598), 1 for none, at timesteps within `guidance_interval`, of 0 (clear) to 1000 (noise).
        `negative_scale`: of negative prompting, which pushes away from two objects of one colour in one shape; 0 for
        none. `sampler`: one of ddpm, ddim, dpmsolver++, sde-dpmsolver++ and unipc. `best_of`: candidates for each
        picture, of which the one is kept that fits its label best by the network's own denoising error.

        `generator`: its seed decides, not its state. Picture i of a call with one generator of seed s is picture i of
        `sample.py --seed s`; of a list, a generator for each picture, it is picture 0 of each seed. None: other ones
        in each call. `output_type`: "pil", "np" [B, 64, 64, 3] in [0, 1], "pt" [B, 3, 64, 64] in [0, 1], or "latent",
        the same in [-1, 1]. `callback_on_step_end(pipe, step, timestep, {"latents": images})` returns the images to
        go on with in such a dict. It is given the pictures [B, 3, 64, 64] themselves: there is no other latent.

        Raises ValueError for unknown names and values, FloatingPointError for a picture that is not finite.
        """
        conditions = [one for one in self.conditions_of(prompt) for _ in range(num_images_per_prompt)]
        options = self.options_of(
            sampler=sampler,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            negative_scale=negative_scale,
            negative_interval=negative_interval,
        )
        if callback_on_step_end_tensor_inputs and set(callback_on_step_end_tensor_inputs) != {"latents"}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected latents, got {callback_on_step_end_tensor_inputs}"
            )
        painter = Painter(
            self._network, self._network, self.scheduler, self.config.objects, options, self._execution_device,
            best_of=best_of, lift_over=lift_over,
        )  # fmt: skip
        timesteps = make_scheduler(self.scheduler, options["sampler"], options["steps"]).timesteps.tolist()
        with self.progress_bar(total=len(timesteps) * best_of) as bar:
            after_step = self._after_step(timesteps, bar, callback_on_step_end)
            images = painter.paint(conditions, self.places_of(generator, len(conditions)), after_step)
        self.maybe_free_model_hooks()
        pictures = VaeImageProcessor().postprocess(images, output_type)
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)

    def conditions_of(self, prompt: str | list[str] | list[list[str]]) -> list[list[str]]:
        """The scenes [B] that `prompt` asks for, each a list of names. Raises ValueError."""
        scenes: Any = [prompt] if isinstance(prompt, str) else prompt
        if all(isinstance(one, str) for one in scenes):
            scenes = [scenes]
        for scene in scenes:
            if not isinstance(scene, list | tuple) or not scene or len(set(scene)) < len(scene):
                raise ValueError(f"expected a list of different objects, at least one, got {scene!r}")
            for name in scene:
                if name not in self.config.objects:
                    nearest = difflib.get_close_matches(str(name), self.config.objects, n=1) or self.config.objects
                    raise ValueError(f"unknown object {name!r}; there is {', '.join(nearest)}")
        return [list(scene) for scene in scenes]

    def options_of(self, **given: Any) -> dict[str, Any]:
        """The options of `generate`: those given that are not None, else what the weights were made for."""
        options = dict(self.config.sampling)
        if type(self.scheduler) is not DDPMScheduler:  # the user has set another one
            if type(self.scheduler) not in SCHEDULER_NAMES:
                raise ValueError(f"{type(self.scheduler).__name__} is not supported; choose one by sampler=")
            options["sampler"] = SCHEDULER_NAMES[type(self.scheduler)]
        options.update({name: value for name, value in given.items() if value is not None})
        if options["sampler"] not in SCHEDULERS:
            raise ValueError(f"sampler {options['sampler']!r}: expected one of {', '.join(SCHEDULERS)}")
        if not 1 <= options["steps"] <= 1000:
            raise ValueError(f"num_inference_steps: expected 1 to 1000, got {options['steps']}")
        return options

    def places_of(self, generator: torch.Generator | list[torch.Generator] | None, count: int) -> list[tuple[int, int]]:
        """Seed and index of so many pictures, on which their noise depends. Raises ValueError."""
        if isinstance(generator, list):
            if len(generator) != count:
                raise ValueError(f"expected {count} generators, one for each picture, got {len(generator)}")
            return [(one.initial_seed(), 0) for one in generator]
        seed = generator.initial_seed() if generator else int(torch.randint(2**62, ()))
        return [(seed, i) for i in range(count)]

    def _after_step(self, timesteps: list[int], bar: Any, callback_on_step_end: Callable | None) -> Callback:
        """A callback for `generate`: moves the progress bar, and calls the user's."""
        done = 0  # steps of a candidate

        def after_step(images: torch.Tensor) -> torch.Tensor:
            nonlocal done
            if done > 0:
                bar.update()
                if callback_on_step_end:
                    answer = callback_on_step_end(self, done - 1, timesteps[done - 1], {"latents": images})
                    images = (answer or {}).get("latents", images)
            done = (done + 1) % (len(timesteps) + 1)
            return images

        return after_step

    def _network(self, images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The prediction, computed in the precision of the weights (`torch_dtype`); all else is in fp32."""
        return self.unet(images.to(self.unet.dtype), timesteps, labels.to(self.unet.dtype)).float()
