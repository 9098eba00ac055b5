"""Train an encoder (ResNet-MAE, A.3) and a generator (drifting, A.8-A.9): two stages, one loop.

    python train.py --preset digits                            # data, encoder, generator: minutes
    python train.py --preset small --data my.zip --size 32     # the same for your images
    torchrun --nproc_per_node 8 train.py --preset cifar10      # the same on several processes
    python train.py --preset digits --gen 32 --out runs/wide   # a preset, changed

OUT/ gets step_*/ (EMA weights that sample.py and others load, and what resuming needs), pictures
samples_*.png and log.jsonl. The same command again resumes. What a step draws depends on (seed,
step) alone, whatever the number of processes and micro-batches.

In order: presets and options; the two stages (the method is in `GeneratorStage.batch`, `loss` and
`backward`); `main`, which sets up a run; checkpoints; `train`, the loop; the log and evaluation.
"""
import argparse
import contextlib
import copy
import functools
import json
import math
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from tqdm import tqdm

import drift
import fid
import model
import prepare_data
import sample
from model import (UsageError, all_reduce, atomic_write, gather, get_rank, note, run_script,
                   world_size)
from prepare_data import upload

# What the paper's recipes share (A.3, A.8, Table 8), as in the release. There each of 16 to 32
# hosts pushes 64 to 128 samples a step into queues of its own; --push is their sum.
LATENT = dict(stage="generator", data="data/imagenet_latents", flip=True)
SOTA = LATENT | dict(encoder=["hf://mae_latent_640"], labels=128, uncond=32, push=2048, lr=4e-4,
                     warmup=10000, steps=200000)
PIXEL = SOTA | dict(data="data/imagenet256", crop_scale=0.2, patch_size=16, attn_fp32=True,
                    encoder=["hf://mae_pixel_640", "hf://facebook/convnextv2-base-22k-224"],
                    pos=128, alpha_power=5, steps=100000)
MAE = dict(stage="encoder", data="data/imagenet256", crop_scale=0.2, batch_size=8192, lr=4e-3,
           warmup=4000, ema_decay=0.9995)

# What differs from the options' defaults, which are those of the paper's ablations. Rows end with
# the FID they reach: paper (release).
PRESETS = {
    "latent_ablation": LATENT | dict(
        encoder=["hf://mae_latent_256"], attn_fp32=True),                       # 8.46 (8.49)
    "latent_B": SOTA | dict(alpha_power=5, weight_decay=0.0),                   # 1.75 (1.74)
    "latent_L": SOTA | dict(model="L", alpha_fixed=0.5),                        # 1.54 (1.53)
    "pixel_B": PIXEL | dict(lr=2e-4),                                           # 1.76 (1.73)
    "pixel_L": PIXEL | dict(model="L"),                                         # 1.61 (1.62)

    # Encoders, with the FID of a generator in their features: Table 3, and the best row above.
    "mae_latent_256": MAE | dict(
        base_channels=256, steps=30000, to_latents=True),                       # 8.46 (8.49)
    "mae_latent_640": MAE | dict(
        base_channels=640, steps=200000, to_latents=True, cls_steps=3000),      # 3.36 (1.53)
    "mae_pixel_640": MAE | dict(
        base_channels=640, steps=200000, input_patch_size=8, cls_steps=3000),   # 3.70 (1.62)

    # Small ones of ours. `digits` takes minutes on two CPU cores.
    "digits_encoder": dict(
        stage="encoder", data="data/digits", input_patch_size=2, base_channels=64,
        layers=[1, 1], batch_size=128, cls_steps=300, ema_decay=0.99,
        lr=2e-3, warmup=50, steps=300, sample_every=150, save_every=100),
    "digits": dict(
        stage="generator", data="data/digits", encoder=["digits_encoder"], model="XXS",
        patch_size=4, head_channels=16, labels=10, gen=24, pos=64, uncond=12, alpha_power=2,
        reals="index", ema_decay=0.99, lr=5e-3, muon=True, warmup=30, cooldown=0.7, steps=900,
        sample_every=100, save_every=150),
    # For ten classes of images of about 32 x 32 pixels on a CPU, where many small steps go farther
    # than few large ones. Larger alphas than the paper's make more images clearly of their class.
    "small_encoder": dict(
        stage="encoder", input_patch_size=2, base_channels=32, layers=[1, 1, 1],
        batch_size=128, cls_steps=1000, ema_decay=0.99, lr=2e-3, warmup=50, steps=1000,
        sample_every=200, save_every=100),
    "small": dict(
        stage="generator", encoder=["small_encoder"], model="XS", patch_size=4, head_channels=32,
        labels=5, gen=16, pos=32, uncond=8, alpha_power=1.5, reals="index", ema_decay=0.99,
        lr=4e-3, muon=True, warmup=50, cooldown=0.7, steps=1900, sample_every=100, save_every=100),
    # For one modern GPU.
    "cifar10_encoder": dict(
        stage="encoder", data="data/cifar10", base_channels=64, layers=[2, 2, 2],
        batch_size=512, crop_scale=0.2, cls_steps=1500, lr=1e-3, warmup=200,
        ema_decay=0.99, steps=3000, save_every=1000),
    "cifar10": dict(
        stage="generator", data="data/cifar10", encoder=["cifar10_encoder"], model="S",
        patch_size=4, labels=16, gen=64, pos=64, uncond=16, flip=True, lr=4e-4, warmup=200,
        steps=10000, save_every=500, sample_every=500),
}
# The same on a GPU.
PRESETS["small_gpu_encoder"] = PRESETS["small_encoder"] | dict(
    base_channels=64, layers=[2, 2, 2], batch_size=512, cls_steps=1500, steps=3000)
PRESETS["small_gpu"] = PRESETS["small"] | dict(
    encoder=["small_gpu_encoder"], model="S", labels=16, gen=64, pos=64, uncond=16, lr=4e-4,
    steps=7500)
# The ablation's recipe for a day of one GPU.
PRESETS["latent_day"] = PRESETS["latent_ablation"] | dict(
    labels=8, push=128, checkpoint_blocks=True, steps=60000)
# Fashion-MNIST, where Debian's package dataset-fashion-mnist puts it. Patches of 7, not 4,
# make a step cheaper and leave most sandals whole.
FASHION = dict(data="/usr/share/datasets/fashion-mnist")
PRESETS["fashion_encoder"] = PRESETS["small_encoder"] | FASHION
PRESETS["fashion"] = PRESETS["small"] | FASHION | dict(
    encoder=["fashion_encoder"], patch_size=7, steps=2100)
# The same recipes with W-Flow's field, and its paper's FID. Its runs push on 8 and 64 hosts.
WFLOW = dict(field="sinkhorn", iterations=1, push=8192)
PRESETS |= {
    "wflow_ablation": PRESETS["latent_ablation"] | WFLOW | dict(iterations=10, push=512),  # 7.08
    "wflow_B": PRESETS["latent_B"] | WFLOW | dict(iterations=10),               # 1.52
    "wflow_L": PRESETS["latent_L"] | WFLOW,                                     # 1.35
    "wflow_XL": PRESETS["latent_L"] | WFLOW | dict(
        model="XL", entropic_reg=0.01, pos=128, alpha_power=4, alpha_fixed=0.2,
        lr=3e-4),                                                               # 1.29, at 180k
}


def build_parser():
    """All options on one screen: name, default, meaning."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=model.HelpFormat)
    add = functools.partial(add_option, parser.add_argument_group("run"))
    add("preset", None, "row of PRESETS; other options override it", choices=PRESETS)
    add("stage", "generator", "what is trained", choices=STAGES)
    add("data", None, "prepared data, or a source for prepare_data.py, stored in data/NAME")
    add("size", None, "resize and crop a source to this side (None: as is)", type=int)
    add("out", None, "run folder (None: runs/PRESET; small: runs/NAME)")
    add("seed", 0, "seed of all random numbers")
    add("device", "cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    add("bf16", None, "networks compute in bfloat16 (None: on a GPU); weights, statistics and loss "
        "stay float32", action=argparse.BooleanOptionalAction)
    add("compile", False, "torch.compile the networks")
    add("micro_batches", 1, "parts into which a process splits its batch: less memory, same result")
    add("init_from", None, "weights to start from, of the same sizes")
    add("log_every", 10, "steps between lines of log.jsonl")
    add("sample_every", 1000, "steps between pictures")
    add("save_every", 1000, "steps between checkpoints")

    add = functools.partial(add_option, parser.add_argument_group("real images"))
    add("crop_scale", 1.0, "least area of random crops (paper: 0.2)")
    add("flip", False, "mirror the generator's real images at random")
    add("vae", model.SD_VAE, "VAE between pixels and latents, a folder or hf://")

    add = functools.partial(add_option, parser.add_argument_group("optimisation (Table 8)"))
    add("steps", 30000, "length of the run")
    add("lr", 2e-4, "learning rate")
    add("warmup", 5000, "linear warmup steps from 1e-6")
    add("cooldown", 0.0, "final fraction of steps, linear to zero")
    add("weight_decay", 0.01, "on all parameters")
    add("clip", 2.0, "largest gradient norm")
    add("muon", False, "Muon for the matrices of a generator's blocks, AdamW for the rest")
    add("ema_decay", 0.999, "decay of the averaged weights")

    add = functools.partial(add_option, parser.add_argument_group("stage encoder (A.3)"))
    add("base_channels", 256, "width of the first stage")
    add("layers", [3, 4, 6, 3], "blocks of each stage")
    add("input_patch_size", 1, "side of patches into which pixels are folded first (of 256: 8)")
    add("batch_size", 8192, "images a step, of all processes")
    add("to_latents", False, "encode crops of pixels by --vae first")
    add("cls_steps", 0, "final steps that also train a classifier")

    add = functools.partial(add_option, parser.add_argument_group("stage generator (A.8)"))
    add("encoder", [], "one or several, in whose features samples drift: a run, checkpoint, "
        "artifact, hf://..., or a preset, which is trained first")
    add("encoder_size", None, "side to which ConvNeXt-V2 or DINOv2 resizes images", type=int)
    add("model", "B", "size of the generator", choices=model.GENERATOR_SIZES)
    add("patch_size", 2, "side of a generator's token")
    add("head_channels", 0, "width of convolutions across the patches' borders; 0: none")
    add("attn_fp32", False, "attention in float32, as the release's ablation and pixel recipes")
    add("checkpoint_blocks", False, "recompute activations: a third more work, 1/20 of the memory")
    add("labels", 64, "class labels a step, of all processes")
    add("gen", 64, "generated samples per label, G")
    add("pos", 64, "real samples per label, P")
    add("uncond", 16, "reals of any class per label, U")
    add("alpha_power", 3.0, "k of p(alpha) ~ alpha^-k")
    add("alpha_fixed", 0.0, "share of labels whose alpha is 1")
    add("reals", "queue", "positives from queues of the latest samples (the paper's), or from the "
        "whole class", choices=("queue", "index"))
    add("push", 1024, "samples pushed into queues a step")
    add("field", "drifting", "what moves the samples", choices=drift.FIELDS)
    add("kernel", "both", "of drifting (Table 11)", choices=drift.KERNELS)
    add("attraction", 1.0, "of drifting: multiplier of V+ (Table 1)")
    add("repulsion", 1.0, "of drifting: multiplier of V- (Table 1)")
    add("entropic_reg", 0.05, "of sinkhorn: regularisation R")
    add("iterations", 10, "of sinkhorn: iterations")
    add("eval_every", 0, "steps between evaluations; 0: none")
    add("eval_images", 10000, "images an evaluation")
    add("eval_features", "inception", "as --features of fid.py")
    add("eval_ref", None, "as --ref of fid.py (None: made of --data)")
    return parser


def add_option(group, name, default, meaning, **more):
    """--name, of the type of its default. Booleans are --name and --no-name."""
    if isinstance(default, bool):
        more["action"] = argparse.BooleanOptionalAction
    elif isinstance(default, list):
        more["nargs"] = "+"
        more["type"] = type(default[0]) if default else str
    elif default is not None:
        more["type"] = type(default)
    group.add_argument(f"--{name}", default=default, help=meaning, **more)


def parse(argv=None):
    """default < preset < command line."""
    parser = build_parser()
    preset = parser.parse_args(argv).preset
    parser.set_defaults(**copy.deepcopy(PRESETS.get(preset, {})))
    args = parser.parse_args(argv)
    if not args.data or not (args.out or preset):
        parser.error("--data is needed, and without a preset --out")
    if args.out is None:  # of --preset small_encoder --data my.zip: runs/my_encoder
        args.out = "runs/" + preset.replace("small", prepare_data.name_of(args.data))
    if args.device == "cuda":  # by number, as each thread has a current device of its own
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.bf16 is None:
        args.bf16 = args.device != "cpu"
    return args


# ---- The two stages ------------------------------------------------------------------------------
# Each has a network; `batch(step)`, this process's part of the step's global batch;
# `backward(batch, step, log)`, which leaves in the network the gradient of the mean loss over that
# part and returns figures for the log, more of them if `log`; and `preview(ema)`, uint8 images,
# the number of columns and their names.

class EncoderStage:
    """Masked autoencoding (A.3): half of the patches are hidden, and guessed from the others."""

    def __init__(self, args, data):
        latents = data.kind == "latents"
        through_vae = args.to_latents and not latents
        side = data.shape[1] // 8 if through_vae else data.shape[1]
        self.args = args
        self.data = data
        self.net = model.MAE(4 if args.to_latents else data.shape[0], args.base_channels,
                             args.layers, input_patch_size=args.input_patch_size,
                             num_classes=data.num_classes)
        self.grid = side // args.input_patch_size // self.net.patch_size
        self.vae = open_vae(args, data) if through_vae else None
        self.encoders = []

    def batch(self, step, most=None):
        """Images or latents, labels and masks of this process, or of the first `most` of them."""
        args = self.args
        slots = my_part(args.batch_size)[:most]
        ids = self.data.fresh(step * args.batch_size, args.batch_size, args.seed)[slots]
        # Random numbers for each image alone: its crop, mask and noise do not depend on the others.
        rngs = [np.random.default_rng([args.seed, step, slot]) for slot in slots]
        seeds = np.array([rng.integers(1 << 63) for rng in rngs])  # of the latents' noise
        masks = np.stack([rng.random((self.grid, self.grid)) < 0.5 for rng in rngs])
        x = self.data.batch(ids, seeds, self.data.kind == "latents", args.device)
        if args.crop_scale < 1:
            x = prepare_data.crop(x, args.crop_scale, rngs, mirror=True)
        if self.vae:
            mean, std = self.vae.encode(x)
            noise = [torch.randn(mean.shape[1:], generator=stream(seed)) for seed in seeds]
            x = mean + std * torch.stack(noise).to(std)
        return {"x": x, "labels": upload(self.data.labels[ids], args.device),
                "mask": upload(masks.astype(np.float32), args.device)}

    def backward(self, batch, step, log):
        """lam CE + (1 - lam) L2 (A.3): lam rises to 0.1 in a third of the last --cls_steps."""
        args = self.args
        fine_tuned = max(0, step - (args.steps - args.cls_steps))
        lam = 0.1 * min(1, 3 * fine_tuned / max(1, args.cls_steps))
        rows = []
        for part in split(batch, args.micro_batches):  # a mean: gradients of parts just add up
            with autocast(args):
                _, logits, error, cross_entropy = self.net(part["x"], part["mask"], part["labels"])
            error = error.mean()
            cross_entropy = cross_entropy.mean()
            loss = lam * cross_entropy + (1 - lam) * error
            (loss / args.micro_batches).backward()
            accuracy = (logits.argmax(1) == part["labels"]).float().mean()
            rows.append(torch.stack([loss, error, cross_entropy, accuracy]).detach())
        names = ("loss", "reconstruction", "cross_entropy", "accuracy")
        return {**dict(zip(names, torch.stack(rows).mean(0))), "lam": lam}

    def preview(self, ema):
        """Rows of images, of what the encoder sees of them, and of what it guesses."""
        x, labels, mask = self.batch(0, most=10).values()
        p = ema.input_patch_size
        guess = rearrange(ema(x, mask, labels)[0], "n (p q c) h w -> n c (h p) (w q)", p=p, q=p)
        hidden = F.interpolate(mask[:, None], x.shape[2:])
        rows = torch.cat([x, x * (1 - hidden), x * (1 - hidden) + guess * hidden])
        rows = self.vae.decode(rows) if self.vae else rows[:, :3]
        return sample.to_uint8(rows.cpu()), len(x), []


class GeneratorStage:
    """Drifting (A.8): draw labels, alphas and reals; generate; move samples in feature space."""

    def __init__(self, args, data):
        latents = data.kind == "latents"
        self.args = args
        self.data = data
        self.net = model.Generator(data.shape[1], data.shape[0], patch_size=args.patch_size,
                                   num_classes=data.num_classes, attn_fp32=args.attn_fp32,
                                   head_channels=args.head_channels,
                                   **model.GENERATOR_SIZES[args.model])
        self.net.checkpoint_blocks = args.checkpoint_blocks
        self.vae = open_vae(args, data) if latents else None
        self.encoders = [open_encoder(name, args) for name in args.encoder]
        # Encoders of pixels see decoded latents; gradients flow back through the decoder (sec. 4).
        self.decoded = latents and any(e.in_channels == 3 for e in self.encoders)
        self.queue = None
        # Fields other than drifting repel samples by a second, independent batch of them. It has
        # no gradients, but costs a forward pass of the generator and of the encoders.
        self.second = args.field != "drifting"
        # Few real images that never change pass the encoders once: 1.2 times the steps a second.
        # They must be few, since their features take a hundred times their bytes and more.
        self.cached_reals = None
        changing = latents or args.flip or args.crop_scale < 1
        if not changing and data.images.nbytes < 1 << 17:
            with torch.no_grad():
                images = data.batch(np.arange(len(data)), device=args.device)
                self.cached_reals = self.features(images[:, None])

    def batch(self, step):
        """Labels, alphas, noise, styles, ids of reals, and reals if not cached: [labels, ...] each.

        What a label gets depends on (seed, step, its slot) alone, whichever process draws it.
        """
        args = self.args
        net = self.net
        source = self.data
        fresh = args.labels
        if args.reals == "queue":
            fresh = max(args.push, args.labels)
            source = self.queue_after(step, fresh)
        # Labels are those of random images: in proportion to the data.
        labels = self.data.labels[self.data.fresh(step * fresh, fresh, args.seed)]
        slots = my_part(args.labels)
        rows = []
        for slot in slots:
            rng = np.random.default_rng([args.seed, step, slot])
            random = stream(rng.integers(1 << 63), args.device)
            # Each label has its own alpha, by which all its samples are conditioned (A.8).
            fixed = args.alpha_fixed if args.uncond else 1  # no guidance without unconditionals
            alpha = drift.sample_alpha(1, args.alpha_power, fixed, rng)
            count = args.gen * (2 if self.second else 1)
            noise = torch.randn(count, net.in_channels, net.input_size, net.input_size,
                                generator=random, device=args.device)
            styles = torch.randint(net.noise_classes, (count, net.noise_coords),
                                   generator=random, device=args.device)
            pos = source.draw(labels[slot], args.pos, rng)
            ids = np.concatenate([pos, source.draw_any(args.uncond, rng)])
            row = {"alpha": upload(alpha, args.device)[0], "noise": noise, "styles": styles,
                   "ids": upload(ids, args.device)}
            if self.cached_reals is None:  # else `loss` finds their features by these ids
                reals = self.data.batch(ids, rng, args.flip, args.device)
                if args.crop_scale < 1:
                    reals = prepare_data.crop(reals, args.crop_scale, [rng] * len(ids))
                row["reals"] = reals
            rows.append(row)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {"labels": upload(labels[slots], args.device), **batch}

    def queue_after(self, step, fresh):
        """The queues after the pushes of steps 0 to `step`, of `fresh` ids each (`Dataset.fresh`).

        All processes push the same ids: queues are equal everywhere, and a step does not depend on
        the number of processes. Checkpoints need not hold them: a resumed run pushes again what
        was pushed (at the paper's 200,000th step for a minute or two).
        """
        data = self.data
        seed = self.args.seed
        if self.queue is None or self.pushed > step + 1:  # queues start full
            self.queue = drift.SampleQueue(data.num_classes)
            ids = np.random.default_rng([seed, 1 << 32]).permutation(len(data))
            self.queue.push(ids, data.labels[ids])
            self.pushed = 0
        while self.pushed <= step:
            ids = data.fresh(self.pushed * fresh, fresh, seed)
            self.queue.push(ids, data.labels[ids])
            self.pushed += 1
        return self.queue

    def generate(self, batch, first=0):
        """Samples [labels, G, c, h, w] of each label's noise and styles from number `first` on.

        One forward pass, as in sampling: it is the training that moves samples in many steps.
        """
        gen = self.args.gen
        noise = batch["noise"][:, first:first + gen].flatten(0, 1)
        styles = batch["styles"][:, first:first + gen].flatten(0, 1)
        with autocast(self.args):
            x = self.net(noise, batch["labels"].repeat_interleave(gen),
                         batch["alpha"].repeat_interleave(gen), styles)
        return x.unflatten(0, (-1, gen))

    @torch.no_grad()
    def generate_second(self, batch):
        """Samples of the same labels and alphas with other noise and styles; None without them."""
        return self.generate(batch, self.args.gen) if self.second else None

    def features(self, x):
        """x [labels, n, c, h, w] -> {name: [labels, n, T, C]}: the samples' own, and encoders'."""
        shape = x.shape[:2]
        x = x.flatten(0, 1)
        features = {"global": rearrange(x, "n c h w -> n 1 (h w c)")}
        if self.decoded:  # reals too: no latent decodes to exactly its original
            x = self.vae.decode(x)
        for encoder in self.encoders:
            further = encoder.features(x)
            assert not features.keys() & further.keys(), "two encoders name features alike"
            features |= further
        return {name: f.unflatten(0, shape) for name, f in features.items()}

    def loss(self, x, second, batch, reduce, energies=None):
        """`drift.feature_loss` of samples x and the second ones, [labels, G, c, h, w].

        energies: a dict that collects each feature's sums of the energy distance, or None.
        """
        args = self.args
        gen = self.features(x)
        # Gradients reach samples through their own features alone: reals and the second samples
        # stand still in the loss (3.3).
        with torch.no_grad():
            gen2 = None if second is None else self.features(second)
            if self.cached_reals is None:
                reals = self.features(batch["reals"])
            else:
                reals = {name: f[batch["ids"], 0] for name, f in self.cached_reals.items()}
        # As `batch` drew them: the label's own first, then those of any class.
        pos = {name: f[:, :args.pos] for name, f in reals.items()}
        uncond = {name: f[:, args.pos:] for name, f in reals.items()}
        if energies is not None:
            for name in gen:
                sums = drift.energy_sums(drift.entries_of(gen[name]), drift.entries_of(pos[name]))
                energies[name] = energies.get(name, 0) + sums
        options = {
            "drifting": dict(kernel=args.kernel, attraction=args.attraction,
                             repulsion=args.repulsion),
            "sinkhorn": dict(temperature=args.entropic_reg, iterations=args.iterations)}
        return drift.feature_loss(args.field, gen, gen2, pos, uncond, batch["alpha"], reduce,
                                  **options.get(args.field, {}))

    def backward(self, batch, step, log):
        """The loss of the whole global batch, of which a part is in memory at a time.

        A feature's loss needs two sums over the global batch: of its distances and, made with
        these, of its forces (A.6). With 64 labels, 2 processes and 4 micro-batches a process holds
        8 labels at a time, but both sums are those of all 64: gradients are those of one pass. The
        price: one more forward pass of the generator, two of the encoders.
        """
        energies = {} if log else None
        parts = split(batch, self.args.micro_batches)
        if len(parts) == 1:
            second = self.generate_second(batch)
            loss, infos = self.loss(self.generate(batch), second, batch,
                                    lambda feature, name, sums: all_reduce(sums), energies)
            loss.backward()
            return figures([infos], energies)

        # 1. The samples of all parts, without gradients.
        with torch.no_grad():
            samples = [(self.generate(part), self.generate_second(part)) for part in parts]

        # 2. One kind of sum after the other, over the parts and then over the processes.
        global_sums = {}
        local_sums = {}  # of this process's parts so far

        def reduce(feature, name, sums):
            if (feature, name) in global_sums:
                return global_sums[feature, name]
            local_sums[feature, name] = local_sums.get((feature, name), 0) + sums
            return sums  # of this part alone: what `loss` makes of it is thrown away

        for kind in ("distance", "force"):
            local_sums.clear()
            with torch.no_grad():
                for (x, second), part in zip(samples, parts):
                    self.loss(x, second, part, reduce)
            for feature, name in local_sums:
                if name == kind:
                    global_sums[feature, kind] = all_reduce(local_sums[feature, kind])

        # 3. Part by part the gradient goes through the encoders to the samples, and from there
        #    through the generator, so that one network's activations are in memory at a time.
        infos_of_parts = []
        for (x, second), part in zip(samples, parts):
            loss, infos = self.loss(x.requires_grad_(), second, part, reduce, energies)
            (loss / len(parts)).backward()
            self.generate(part).backward(x.grad)
            infos_of_parts.append(infos)
        return figures(infos_of_parts, energies)

    def preview(self, ema):
        """A column for each of the first ten classes with images, always of the same noise."""
        labels = np.flatnonzero(self.data.count)[:10]
        index = np.arange(8 * len(labels))
        images = sample.generate(ema, np.tile(labels, 8), index, vae=self.vae)
        names = [self.data.meta["classes"][label] for label in labels]
        return sample.to_uint8(images), len(labels), names


STAGES = {"encoder": EncoderStage, "generator": GeneratorStage}


def figures(infos_of_parts, energies):
    """What a step logs: means over features (of losses the sum), and those of each feature.

    `features` are {feature: [loss, scale, force_TAU...]}. `energy` is the energy distance between
    generated and real samples {feature: number}, and `energy_distance` its mean, which falls.
    """
    infos = infos_of_parts[0]
    values = [value.detach() for infos in infos_of_parts for info in infos.values()
              for value in info.values()]
    table = torch.stack(values).unflatten(0, (len(infos_of_parts), len(infos), -1)).mean(0)
    logs = dict(zip(next(iter(infos.values())), table.mean(0)))
    logs["loss"] = table[:, 0].sum()
    if energies:
        sums = all_reduce(torch.stack(list(energies.values())))            # features 2
        energy = sums[:, 0] / sums[:, 1]
        logs["energy_distance"] = energy.mean()
        logs["energy"] = dict(zip(energies, energy))
    return {**logs, "features": dict(zip(infos, table))}


def my_part(count):
    """This process's part of range(count): contiguous, and in rank order the whole range."""
    part = count // world_size()
    return range(part * get_rank(), part * (get_rank() + 1))


def split(batch, parts):
    """{name: [n, ...]} -> a list of such, of n / parts each."""
    pieces = {name: x.tensor_split(parts) for name, x in batch.items()}
    return [{name: x[i] for name, x in pieces.items()} for i in range(parts)]


def stream(seed, device="cpu"):
    """Random numbers of their own for one image or label."""
    return torch.Generator(device).manual_seed(int(seed))


def autocast(args):
    """Around what networks compute: in bfloat16 under --bf16, from weights in float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def frozen(net, args):
    """A network that is never trained, in the type in which it computes."""
    net.eval().requires_grad_(False).to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    if args.device == "cpu":  # whose GroupNorm takes twenty times as long for channels last
        return net
    return net.to(memory_format=torch.channels_last)


def open_vae(args, data):
    """The VAE, which must be the one that made the data's latents."""
    vae = model.load_vae(args.vae, args.device, data.meta.get("vae"))
    if args.compile:
        vae.net.decoder.compile()
    return frozen(vae, args)


def open_encoder(name, args):
    encoder = model.load_encoder(name)
    if args.encoder_size:
        encoder.image_size = args.encoder_size
    # By this a resumed run recognises it. Hashed here, before it is cast to bfloat16.
    weights = model.digest(encoder.state_dict())
    encoder.identity = f"{encoder._hub_mixin_config} {args.encoder_size} {weights}"
    if isinstance(encoder, model.MAE):
        del encoder.decoder, encoder.fc  # a fifth of its memory; only `features` is used
    if args.compile:
        encoder.features = torch.compile(encoder.features)
    return frozen(encoder, args)


# ---- A run ---------------------------------------------------------------------------------------

def main(argv=None):
    """Prepare the data, train the encoders that are presets, then train one stage. Returns args.

    An encoder that is a preset is a run of its own: it is trained here first, by a call of main
    with its own options, so that it resumes, logs and draws pictures like any other run.
    """
    args = parse(argv)
    args.data = prepare_data.prepared(args.data, args.size)
    data = prepare_data.Dataset(args.data)
    if args.size not in (None, data.shape[1]):
        raise UsageError(f"{args.data} has images of {data.shape[1]}: for --size give their source")
    if data.kind == "latents" and args.crop_scale < 1:
        raise UsageError("--crop_scale cuts images, before the VAE (A.3): give images, not latents")
    parts = world_size() * args.micro_batches
    if (args.labels if args.stage == "generator" else args.batch_size) % parts:
        raise UsageError(f"{parts} = processes x micro-batches must divide --labels/--batch_size")

    for i, name in enumerate(args.encoder):
        if PRESETS.get(name, {}).get("stage") == "encoder":
            words = ["--preset", name, "--device", args.device, "--seed", str(args.seed),
                     "--bf16" if args.bf16 else "--no-bf16", "--vae", args.vae]
            if args.compile:
                words.append("--compile")
            if not PRESETS[name].get("to_latents"):  # those encode the images of their own row
                words += ["--data", args.data]
            note(f"{name} is trained first, unless its run is there: --encoder gives another")
            args.encoder[i] = main(words).out

    newest = gather(model.latest_checkpoint(args.out))[0]  # rank 0's: others may see it late
    if newest and int(newest.name[5:]) >= args.steps:
        read_state(newest, args, data)
        note(f"{newest} is there already, --steps is {args.steps}: nothing to train")
    else:
        defaults = vars(build_parser().parse_args([]))
        changed = [f"--{name} {x}" for name, x in vars(args).items() if x != defaults[name]]
        note("options that are not the defaults: " + " ".join(changed))
        with model.lock_folder(args.out):
            run = Run(args, data, newest)
            count = sum(p.numel() for p in run.params)
            note(f"{args.out}: {args.stage} of {count / 1e6:.1f}M parameters, {len(data)} images "
                 f"{list(data.shape)} of {data.num_classes} classes, {world_size()} process(es)")
            train(run)
    return args


class Run:
    """What is trained and what a checkpoint holds: network, averaged weights, optimizer."""

    def __init__(self, args, data, newest=None):
        """newest: the checkpoint to go on from, or None."""
        self.args = args
        torch.manual_seed(args.seed)  # of initial weights; a step has random numbers of its own
        self.stage = STAGES[args.stage](args, data)
        self.net = self.stage.net
        # Class names and VAE hash of the training data, for sample.py.
        self.net.origin = {key: data.meta[key] for key in ("classes", "vae") if key in data.meta}
        if args.init_from and not newest:
            start_from(args.init_from, self.net)
        self.net = self.net.to(args.device).train()
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        if args.compile:
            self.net.compile()
        self.params = list(self.net.parameters())
        self.optimizers = make_optimizers(self.net, args)
        # By these a resumed run recognises its encoders.
        self.encoder_hashes = [encoder.identity for encoder in self.stage.encoders]
        self.start = 0
        if newest:
            self.load(newest)

    def save(self, step):
        """OUT/step_N: config.json and model.safetensors (averaged weights, which load anywhere),
        and train_state.pt. No random state: draws follow from seed and step."""
        # A finite gradient can overflow weights, and a fault in one process would show nowhere
        # else, as averaged gradients keep equal weights equal.
        total = sum(p.detach().double().sum() for p in self.params).item()
        if not math.isfinite(total) or set(gather(total)) != {total}:
            raise UsageError("weights are not finite, or differ between processes: not saved")
        if get_rank() > 0:
            return
        out = Path(self.args.out)
        with atomic_write(out / f"step_{step:08d}") as folder:
            self.ema.save_pretrained(folder)
            torch.save({"step": step, "net": self.net.state_dict(),
                        "options": vars(self.args),
                        "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                        "data": self.stage.data.fingerprint(), "encoders": self.encoder_hashes},
                       folder / "train_state.pt")
        for old in sorted(out.glob("step_" + "[0-9]" * 8))[:-2]:  # copies by other names stay
            model.remove(old)

    def load(self, folder):
        """Go on from a checkpoint."""
        state = read_state(folder, self.args, self.stage.data)
        if state["encoders"] != self.encoder_hashes:
            raise UsageError(f"{folder} was trained with another encoder: choose another --out")
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(load_file(folder / "model.safetensors", self.args.device))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.start = state["step"]


def read_state(folder, args, data):
    """What a checkpoint holds for resuming. Other data are refused, changed options are told."""
    # Mapped: of a finished run only a few numbers are read, and no tensors.
    state = torch.load(folder / "train_state.pt", "cpu", weights_only=True, mmap=True)
    if state["data"] != data.fingerprint():
        raise UsageError(f"{folder} was trained on other data: choose another --out (of a preset's "
                         "encoder: train one, and give its run as --encoder)")
    for name, before in state["options"].items():
        now = vars(args).get(name)
        if before != now and name not in ("data", "device", "out", "preset"):
            note(f"{args.out} was trained with --{name} {before}, now {now}")
    return state


def make_optimizers(net, args):
    """AdamW (Table 8). With --muon, Muon for the blocks' matrices; not adaLN's, zero at first."""
    matrices = []
    if args.muon:  # in none of the paper's recipes
        matrices = [p for name, p in net.named_parameters()
                    if name.startswith("blocks.") and p.ndim == 2 and "adaln" not in name]
    others = [p for p in net.parameters() if all(p is not matrix for matrix in matrices)]
    result = [torch.optim.AdamW(others, args.lr, (0.9, 0.95), eps=1e-8,
                                weight_decay=args.weight_decay, fused=True)]
    if matrices:
        result.append(torch.optim.Muon(matrices, args.lr, weight_decay=args.weight_decay,
                                       adjust_lr_fn="match_rms_adamw"))
    return result


def start_from(path, net):
    """Copy the weights of a checkpoint, whatever its source, into a network of the same sizes.

    Class weights start anew unless the checkpoint has the same classes or, like published weights,
    no class names but as many classes.
    """
    load = model.load_generator if isinstance(net, model.Generator) else model.load_encoder
    source = load(path)
    weights = source.state_dict()
    theirs = source.origin.get("classes", net.origin["classes"])
    if theirs != net.origin["classes"] or source.num_classes != net.num_classes:
        note(f"{path} was trained on other classes, so that these start anew")
        own = net.state_dict()
        rows = own.keys() & {"class_embed.weight", "fc.weight", "fc.bias"}
        weights |= {name: own[name] for name in rows}
    net.load_state_dict(weights)


# ---- The loop ------------------------------------------------------------------------------------

def train(run):
    """Every step from run.start to the last one, in the order in which things happen."""
    args = run.args
    stage = run.stage
    params = run.params
    out = Path(args.out)
    if args.eval_every:
        extractor = fid.Extractor(args.eval_features, device=args.device)
        data = None if args.eval_ref else args.data
        reference = fid.open_reference(extractor, args.eval_ref, data)
    progress = tqdm(range(run.start, args.steps), args.out, initial=run.start, total=args.steps,
                    disable=get_rank() > 0, mininterval=1)
    began = time.time()
    skipped = 0
    ahead = None
    with ThreadPoolExecutor(1) as thread, signals_to_stop() as stop:
        for step in progress:
            done = step + 1
            last = done == args.steps
            log = done % args.log_every == 0 or done == 1 or last

            # 1. The batch. On a GPU a thread draws the next one while this one is computed; a CPU
            #    would want the same cores for both.
            batch = ahead.result() if ahead else stage.batch(step)
            if args.device != "cpu" and not last:
                ahead = thread.submit(stage.batch, done)

            # 2. The gradient: the mean of all processes. DistributedDataParallel is not used: a
            #    step has a backward pass for each micro-batch, and its loss needs communication.
            lr = learning_rate(step, args)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            logs = stage.backward(batch, step, log)
            grads = [p.grad for p in params if p.grad is not None]
            if world_size() > 1:
                for work in [dist.all_reduce(grad, async_op=True) for grad in grads]:
                    work.wait()
                torch._foreach_div_(grads, world_size())
            # --clip 2 is active at nearly every step: the digits' norm falls from 3e5 to 35.
            norm = torch.nn.utils.clip_grad_norm_(params, args.clip)

            # 3. The weights and their EMA, whose horizon grows with the run, so that short runs
            #    forget their initial weights too. A step with a non-finite gradient is skipped,
            #    on all processes alike; the next one draws other samples.
            if norm.isfinite():
                for optimizer in run.optimizers:
                    optimizer.step()
                with torch.no_grad():
                    new = 1 - min(args.ema_decay, (step + 1) / (step + 10))
                    torch._foreach_lerp_(list(run.ema.parameters()), params, new)
                    for mean, buffer in zip(run.ema.buffers(), run.net.buffers()):
                        mean.copy_(buffer)
                skipped = 0
            else:
                skipped += 1
                note(f"step {done} skipped: its gradient is not finite")
                if skipped == 10:
                    raise UsageError("10 steps in a row were not finite: try a lower --lr")
            run.net.zero_grad()

            # 4. Log, picture, evaluation, checkpoint. The evaluation comes before the checkpoint:
            #    if interrupted, it is redone after resuming. All come after the first step too
            #    (with few images to evaluate), so that any failure shows at once.
            if log:
                row = {"step": done, "seconds": round(time.time() - began, 2), "lr": lr,
                       "gpu_gb": torch.cuda.max_memory_allocated() / 1e9, "skipped": skipped,
                       **averaged({"norm": norm, **logs})}
                write_log(args, row)
                shown = "energy_distance" if "energy_distance" in row else "loss"
                progress.set_postfix_str(f"{shown} {row[shown]:.3g}")
            if get_rank() == 0 and (done % args.sample_every == 0 or done == 1 or last):
                with torch.no_grad():
                    images, columns, names = stage.preview(run.ema)
                sample.save_grid(images, columns, out / f"samples_{done:08d}.png", names=names)
            if args.eval_every and (done % args.eval_every == 0 or done == 1):
                evaluate(run, done, extractor, reference)
            # Any process may have been asked to stop.
            stopping = all_reduce(torch.tensor(int(stop.is_set()))).item()
            if done % args.save_every == 0 or done == 1 or last or stopping:
                run.save(done)
            if stopping:
                note(f"{out}: stopped after step {done}; the same command resumes")
                raise SystemExit(1)  # so that `train.py && fid.py` does not score half a run
    note(f"{out}: done; weights in {model.latest_checkpoint(out)}, pictures in samples_*.png")


def learning_rate(step, args):
    """Linear from 1e-6 in the first --warmup steps, and to zero in the last --cooldown of them.

    The paper's runs have no cooldown: they are long, and averaged weights do the same for them.
    """
    rate = 1e-6 + (args.lr - 1e-6) * min(1, (step + 1) / max(1, args.warmup))
    if args.cooldown:
        rate *= min(1, (args.steps - step) / (args.cooldown * args.steps))
    return rate


@contextlib.contextmanager
def signals_to_stop():
    """An event that is set by the signals after which a run should save and end."""
    event = threading.Event()
    before = {}

    def ask(number, frame):
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    # Of clusters, Ctrl-C, Slurm's --signal, a closed terminal. Windows lacks the last two.
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants of SIGHUP
            before[number] = signal.signal(number, ask)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- The log, and evaluation while training ------------------------------------------------------

def write_log(args, row):
    """Append a line to log.jsonl. Steps that are repeated after resuming appear twice."""
    if get_rank() == 0:
        with open(Path(args.out) / "log.jsonl", "a") as log:
            log.write(fid.json_line(row) + "\n")


def averaged(figures):
    """The mean over all processes of each number or tensor in a dict, of 7 digits."""
    if isinstance(figures, dict):
        return {name: averaged(value) for name, value in figures.items()}
    total = all_reduce(torch.as_tensor(figures, dtype=torch.float64).clone())
    values = [float(f"{value:.7g}") for value in (total / world_size()).flatten().tolist()]
    return values if total.ndim else values[0]


def evaluate(run, step, extractor, reference):
    """fid.py's figures of the averaged weights go to log.jsonl, the best weights to OUT/best."""
    args = run.args
    complete = step % args.eval_every == 0
    images = fid.generated(run.ema, seed=args.seed, vae=run.stage.vae)
    row = fid.evaluate(images, args.eval_images if complete else 100, extractor, reference)
    write_log(args, {"step": step, **row})
    if get_rank() > 0 or not complete:
        return
    score = row[extractor.key]
    best = Path(args.out) / "best"
    file = best / "score.json"
    before = json.loads(file.read_text())["score"] if file.exists() else math.inf
    if score < before:
        with atomic_write(best) as folder:
            run.ema.save_pretrained(folder)
            (folder / "score.json").write_text(json.dumps({"score": score, "step": step}))


if __name__ == "__main__":
    run_script(main)
