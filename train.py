"""Train a conditional DDPM on i-CLEVR.

    python train.py                               # the reference recipe; wants a CUDA GPU
    python train.py --model small                 # a model for two CPU cores
    accelerate launch train.py                    # several GPUs: the same batches, shared out

The same command again goes on where the run in --out stopped. Denoising diffusion (Ho et al., arXiv
2006.11239) with a multi-hot label; presets may add velocity prediction (arXiv 2202.00512) and
classifier-free guidance (arXiv 2207.12598).
"""

import argparse
from pathlib import Path

from infra.commands import ROOT, InputError, Parser, command, number, read_early, to_path, to_seed
from options import OPTIMIZERS, PRECISIONS, PRESETS, SCHEDULES, recipe_options


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Train a conditional DDPM on i-CLEVR.")
    # What is trained on what, and where it goes
    add = parser.add_argument_group("run").add_argument
    add("--model", choices=PRESETS, default="reference", help="preset (default: %(default)s)")
    add("--data", type=to_path, help="folder or .npz of pictures (default: iclevr/, else what ships)")
    add("--extra", type=to_path, metavar="DIR", help="folder of more pictures, with its labels.json")
    add("--labels", type=to_path, default=ROOT / "train.json", help="label file (default: train.json)")
    add("--out", type=to_path, help="folder of the run (default: runs/<model>)")
    add("--init", type=to_path, metavar="DIR", help="start from these weights, with a new optimizer")
    add("--distill", type=to_path, metavar="DIR",
        help="learn what these weights predict with guidance, to need none; starts from them")  # fmt: skip
    add("--seed", type=to_seed, default=0, help="default: %(default)s")
    add("--dry-run", action="store_true", help="print what would be trained on what, and stop")
    add("--mixed-precision", choices=PRECISIONS, help="default: what is fastest here")

    # What decides the result; a run goes on only with the same recipe
    add = parser.add_argument_group("recipe (defaults: the preset's)").add_argument
    add("--epochs", type=number(float, 1e-6), help="passes over the pictures")
    add("--max-steps", type=number(int, 1), help="optimizer steps, in place of --epochs")
    add("--batch-size", type=number(int, 1), help="pictures at a time, over all processes")
    add("--grad-accum", type=number(int, 1), default=1, help="batches per step (default: 1)")
    add("--learning-rate", "--lr", type=number(float, 0))
    add("--lr-schedule", choices=("constant", "linear"), help="linear: down to 0 at the end")
    add("--warmup-steps", type=number(int, 0), help="linear warm-up of the learning rate")
    add("--ema-decay", type=number(float, 0, 1), help="of the averaged weights; 0: none")
    add("--label-dropout", type=number(float, 0, 1), help="share trained without label")
    add("--optimizer", choices=OPTIMIZERS)
    add("--prediction-type", choices=SCHEDULES["prediction_type"], help="what the network predicts")
    add("--beta-schedule", choices=SCHEDULES["beta_schedule"], help="of the noise")
    add("--hard-share", type=number(float, 0, 1),
        help="share of a batch from the pictures of three objects, or of two in one colour")  # fmt: skip
    add("--wrong-labels", type=number(float, 0, 1), metavar="SHARE",
        help="of the pictures, with --distill: given the label of others that differ by a mistake")  # fmt: skip
    add("--timestep-sampling", choices=("uniform", "logit-normal"))
    add("--logit-mean", type=number(float, -10, 10), help="of logit-normal; above 0: more of the noisy timesteps")
    add("--min-snr-gamma", type=number(float, 0), help="weigh timesteps in the loss by min-SNR; 0: alike")

    add = parser.add_argument_group("output").add_argument
    add("--save-every", type=number(int, 1), metavar="STEPS", help="default: every 10 minutes, at the end")
    add("--sample-every", type=number(int, 0), default=1000, metavar="STEPS", help="default: 1000; 0: never")
    add("--eval-every", type=number(int, 0), default=0, metavar="STEPS",
        help="score 64 validation conditions, painted with few steps, by the evaluator; default: 0, never")  # fmt: skip
    add("--keep-checkpoints", type=number(int, 1), default=2, metavar="N", help="the newest N (default: 2)")
    add("--log-every", type=number(int, 1), default=10, metavar="STEPS", help="default: 10")
    add("--log-with", choices=("tensorboard", "wandb"), help="besides <out>/log.jsonl")
    args = parser.parse_args(argv)
    # Whatever is not given is as in the preset.
    for name, value in recipe_options(args.model).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs", args.model)
    args.init = args.init or args.distill
    return args


if __name__ == "__main__":
    read_early(parse_args)

import copy
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import checkpoint
from bookkeeping import tracking
from bookkeeping.preview import preview
from bookkeeping.run import Run, announce, recipe_of
from checkpoint import TrainingState
from dataset import ICLEVRDataset, draw_labels, draw_pictures, load_data, seed_of, to_float
from diffusion import Negatives, guided_prediction, target_of
from infra.device import Setup, choose_setup, explained, join_processes, new_accelerator, prepare, smaller_batch
from infra.files import disk_errors, lock, text_sha256
from infra.signals import clean_stop
from label_files import load_objects, unseen_triples
from labels import hard_negatives
from model import build
from muon import Muon
from network import ConditionalUNet

OPTIMIZER_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "muon": Muon,
}

Teacher = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[list[str]]], torch.Tensor]

# -------------------------------------------------------------------------------------- what a step works on


def shares_of_process(args: argparse.Namespace, accelerator: Accelerator) -> list[slice]:
    """The parts of a step's pictures that this process works on, one after the other: one, or --grad-accum
    of them."""
    size = args.batch_size // accelerator.num_processes
    first = accelerator.process_index * size
    starts = range(first, args.batch_size * args.grad_accum, args.batch_size)
    return [slice(start, start + size) for start in starts]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up from 0, then constant, or linear down to 0 at the last step."""
    # From nearly 0, as an optimizer's first steps know little of the gradient's size.
    warmup = min(1.0, (step + 1) / args.warmup_steps) if args.warmup_steps else 1.0
    decay = 1 - step / args.max_steps if args.lr_schedule == "linear" else 1.0
    return args.learning_rate * warmup * decay


def loss_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, min_snr_gamma: float) -> torch.Tensor:
    """What the squared error of the prediction at `timesteps` [B] counts: [B]. Ones, or for a `min_snr_gamma`
    above 0 what makes that of the clean picture count min(SNR, gamma) (arXiv 2303.09556, section 3.4)."""
    if not min_snr_gamma:
        return torch.ones_like(timesteps, dtype=torch.float32)
    alpha_bar = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha_bar / (1 - alpha_bar)  # signal-to-noise ratio
    # The squared error of the clean picture is 1 / SNR of that of the noise, 1 / (SNR + 1) of that of the velocity.
    scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=min_snr_gamma) / scale[noise_scheduler.config.prediction_type]


# ---------------------------------------------------------------------------------------------- the training


def train(
    args: argparse.Namespace,
    data: ICLEVRDataset,
    model: ConditionalUNet,
    noise_scheduler: DDPMScheduler,
    teacher: Teacher | None,
    setup: Setup,
    run: Run,
):
    """Train `model` from the newest checkpoint of `run` on, until the last step or a signal to stop."""
    accelerator = run.accelerator
    device = accelerator.device
    # The average of the weights over training (EMA) is what is sampled with and what ships.
    ema_model = copy.deepcopy(model).requires_grad_(False) if args.ema_decay else model
    optimizer = OPTIMIZER_CLASSES[args.optimizer](model.parameters(), lr=args.learning_rate)
    # The network as it is called: by several processes, in half precision. Its weights are those of `model`.
    network, accelerated_optimizer = accelerator.prepare(model, optimizer)
    # A checkpoint is loaded after `prepare`, which moves all that an optimizer has to the device.
    state = TrainingState(model, ema_model, optimizer, accelerator.scaler)
    first_step = run.begin(state)
    if first_step >= args.max_steps:
        return
    if setup.compile_mode:
        network = torch.compile(network, mode=setup.compile_mode, dynamic=False)
    # The whole data set lies on the device: no loader, and nothing is copied in a step but indices.
    images = data.images.to(device)  # uint8 [N, 3, 64, 64]
    labels = data.labels.to(device)  # float32 [N, 24], multi-hot
    batch_size = args.batch_size * args.grad_accum  # of a step, over all processes
    shares = shares_of_process(args, accelerator)
    num_timesteps = noise_scheduler.config.num_train_timesteps
    steps = range(first_step, args.max_steps)
    is_quiet = not accelerator.is_main_process
    with tqdm(steps, initial=first_step, total=args.max_steps, disable=is_quiet, unit="step") as bar:
        run.watch.bar = bar
        for step in bar:
            # Draw. All draws of a step follow from (seed, step). Every process draws the whole batch and
            # works on its share, so the number of processes changes nothing.
            torch.manual_seed(seed_of(args.seed, step))
            indices = draw_pictures(step, batch_size, data, args.hard_share, args.seed)
            label_indices = draw_labels(indices, data, args.wrong_labels)  # the same, but for --wrong-labels
            clean = to_float(images[indices.to(device, non_blocking=True)])  # [B, 3, 64, 64] in [-1, 1]
            label = labels[label_indices.to(device, non_blocking=True)]  # [B, 24]
            # The forward process (arXiv 2006.11239, equation 4): noise at a random timestep for each picture.
            noise = torch.randn_like(clean)
            timesteps = torch.randint(num_timesteps, (batch_size,), device=device)
            if args.timestep_sampling == "logit-normal":  # more of the middle (arXiv 2403.03206, section 3.1)
                logits = torch.randn(batch_size, device=device) + args.logit_mean
                timesteps = (num_timesteps * logits.sigmoid()).long()
            # Label dropout for classifier-free guidance (arXiv 2207.12598): zeros mean no label.
            label = label * (torch.rand(batch_size, 1, device=device) >= args.label_dropout)
            noisy = noise_scheduler.add_noise(clean, noise, timesteps)
            target = target_of(noise_scheduler, clean, noise, timesteps)
            if teacher:  # guidance distillation (arXiv 2210.03142): what it predicts with guidance
                target = teacher(noisy, timesteps, label, [data.conditions[i] for i in label_indices])
            weights = loss_weights(noise_scheduler, timesteps, args.min_snr_gamma)  # [B]

            # Learn. A process adds up the gradients of its shares; accelerate averages over processes.
            # The rate is set by hand: it follows from the step alone, so a run that goes on needs no scheduler.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            loss = torch.zeros((), device=device)
            for share in shares:
                with accelerator.accumulate(network):
                    # bf16 or fp16 by accelerate's autocast; the loss in fp32
                    prediction = network(noisy[share], timesteps[share], label[share])
                    errors = F.mse_loss(prediction.float(), target[share], reduction="none").mean((1, 2, 3))
                    part = (weights[share] * errors).mean()
                    accelerator.backward(part)
                loss += part.detach() / args.grad_accum
            accelerator.unscale_gradients()  # in fp16
            # A loss or gradient that is not finite ends the run before it spoils the weights.
            norm = get_total_norm([p.grad for p in model.parameters()])
            run.check(step, loss, norm, optimizer, indices)  # the one wait for the device
            accelerated_optimizer.step()
            accelerated_optimizer.zero_grad()
            if args.ema_decay:  # the first steps count less, to forget the initial weights
                decay = min(args.ema_decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(list(ema_model.parameters()), list(model.parameters()), 1 - decay)

            # Keep. A signal to stop is seen by all processes after the same step.
            done = step + 1
            is_stopping = run.watch.is_stopping(step)
            if accelerator.is_main_process:
                preview(args, done, ema_model, noise_scheduler, run)
            if is_stopping or run.is_time_to_save(done):
                run.save(state, noise_scheduler, done)
            if is_stopping:
                break

    run.end(done, is_stopping)


# ------------------------------------------------------------------------------------------------- around it


def load_teacher(folder: Path, setup: Setup, objects: dict[str, int]) -> tuple[Teacher, dict]:
    """What the weights in `folder` predict with the guidance they were made for, and the options to sample a
    student of them with. Raises InputError."""
    model, _, metadata = checkpoint.load_weights(folder)
    network, _ = prepare(model, setup)
    options = dict(metadata["sampling"])
    student_options = {"sampler": options.pop("sampler"), "steps": options.pop("steps"), "guidance_scale": 1.0}
    # The guidance that the student learns, on top of what a teacher that is a student has learned itself.
    interval = options.pop("learned_interval", options.get("guidance_interval", (0, 1000)))
    student_options["learned_scale"] = options["guidance_scale"] * options.pop("learned_scale", 1.0)
    student_options["learned_interval"] = interval

    def predict(
        images: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor, conditions: list[list[str]]
    ) -> torch.Tensor:
        negatives = Negatives([hard_negatives(condition, objects) for condition in conditions], setup.device)
        return guided_prediction(network, images, timesteps, labels, negatives, **options)

    return predict, student_options


def load_model(args: argparse.Namespace, data: ICLEVRDataset) -> tuple[ConditionalUNet, DDPMScheduler, dict]:
    """The network to train, new or that of --init, its noise scheduler, and what a run's checkpoints say of
    it. Raises InputError."""
    unseen = unseen_triples(data.label_file, data.objects)
    pictures_before = 0
    schedule = {name: getattr(args, name) for name in SCHEDULES}
    if args.init:
        # The network is that of the weights, also where the preset has changed since.
        model, noise_scheduler, before = checkpoint.load_weights(args.init)
        if before["model"] != args.model:
            raise InputError(f"{args.init}: weights of --model {before['model']}, not of {args.model}")
        for name, value in schedule.items():
            trained = noise_scheduler.config[name]
            if trained != value:
                raise InputError(f"{args.init}: trained with {name} {trained}, not {value}; give it as an option")
        pictures_before = before["pictures_seen"]
        # Not seen by any of the runs that led here.
        unseen = [triple for triple in unseen if triple in before["unseen"]]
    else:
        torch.manual_seed(args.seed)
        model, noise_scheduler = build(args.model, **schedule)
    metadata = {
        "model": args.model,
        "recipe": recipe_of(args),
        "data": {
            "labels_sha256": text_sha256(args.labels),
            "pictures_sha256": data.sha256(),
            "pictures": len(data),
            "labelled": len(data.label_file),
        },
        "unseen": unseen,
        "sampling": PRESETS[args.model]["sampling"],
        "pictures_seen": pictures_before,
    }
    return model, noise_scheduler, metadata


def check_surroundings(args: argparse.Namespace, accelerator: Accelerator):
    """Raise InputError for options that do not fit the processes or the libraries that there are."""
    processes = accelerator.num_processes
    if args.batch_size % processes:
        raise InputError(f"--batch-size {args.batch_size}: expected a multiple of the {processes} processes")
    if args.log_with and not accelerator.log_with:
        raise InputError(f"--log-with {args.log_with}: not installed; pip install {args.log_with}")
    tracking.check(args, accelerator)


@command
def main(argv: list[str] | None = None):
    args = parse_args(argv)
    state = join_processes()
    if state.is_main_process:
        checkpoint.refuse_other_run(args.out)
    with state.main_process_first():  # the first decodes the pictures, the others read what it kept
        data, args.data = load_data(args.data, args.labels, load_objects(), args.extra)
    if args.hard_share and not len(data.hard):
        raise InputError(
            f"--hard-share {args.hard_share}: {args.data} has no picture of three objects or of two in one colour"
        )
    if args.wrong_labels and not args.distill:
        raise InputError(f"--wrong-labels {args.wrong_labels}: only for --distill")
    batch_size = args.batch_size * args.grad_accum  # of a step, over all processes
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(data) / batch_size)
    # A CUDA graph writes the gradients of each pass to the same place: they can't be added up, nor shared.
    graphs = args.grad_accum == 1 and state.num_processes == 1
    # Compiling pays for long runs, so it depends on the steps that are left.
    left = args.max_steps - checkpoint.steps_done(args.out)
    setup = choose_setup(state, args.mixed_precision, left * args.grad_accum, training=True, graphs=graphs)
    args.mixed_precision = setup.precision  # of the recipe: a run goes on with what it began with
    accelerator = new_accelerator(
        mixed_precision=setup.precision,
        gradient_accumulation_steps=args.grad_accum,
        log_with=args.log_with,
        project_dir=args.out,
    )
    check_surroundings(args, accelerator)
    model, noise_scheduler, metadata = load_model(args, data)
    is_main = accelerator.is_main_process
    advice = smaller_batch(args.batch_size, args.grad_accum, accelerator.num_processes)
    # Too little memory is told with what to try; for this all that uses the device is inside.
    with explained(state.device, advice):
        model.to(accelerator.device, memory_format=setup.memory_format).train()
        if is_main:
            announce(args, data, model, setup, accelerator, max(0, left))
        if args.dry_run:
            return
        teacher = None
        if args.distill:
            teacher, metadata["sampling"] = load_teacher(args.distill, setup, data.objects)
        # From here on the folder is ours, and a signal to stop waits for the end of a step.
        own_folder = lock(args.out) if is_main else nullcontext()
        with own_folder, clean_stop(accelerator.num_processes) as stop, disk_errors(args.out):
            run = Run(args, accelerator, metadata, data.filenames, stop)
            train(args, data, model, noise_scheduler, teacher, setup, run)


if __name__ == "__main__":
    main()
