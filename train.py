"""Train an encoder (ResNet-MAE, A.3) and a generator (drifting, A.8-A.9): two stages, one loop.

    python train.py --preset digits                            # data, encoder, generator: minutes
    python train.py --preset small --data my.zip --size 32     # the same of your images
    torchrun --nproc_per_node 8 train.py --preset cifar10      # the same on several processes
    python train.py --preset digits --gen 32 --out runs/wide   # a preset, changed
    python train.py --preset latent_L --dry_run                # one step, measured, on random data

OUT/ gets step_*/ (EMA weights that sample.py and others load, and what resuming needs), pictures
samples_*.png, log.jsonl and options.json. The same command again resumes. What a step draws
depends on (seed, step) alone, whatever the number of processes and micro-batches.

In order: presets and options; the two stages, of which `GeneratorStage.batch`, `loss` and
`backward` are the method; the loop, `Run.update` and `train`; then what it needs beside: log,
evaluation, checkpoints, the dry run.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from tqdm import tqdm

import drift
import fid
import model
import prepare_data
import sample
from model import (UsageError, digest, gather, get_rank, number, on_all_ranks, one_line,
                   positive_int, read_sums, run_script, sha256, world_size, write_sums)
from prepare_data import upload

# What the paper's recipes share (A.3, A.8, Table 8), as in the release. There each of 16 to 32
# hosts pushes 64 to 128 samples a step into queues of its own; --push is their sum.
LATENT = dict(stage="generator", data="data/imagenet_latents", flip=True,
              encoder=["hf://mae_latent_640"])
PIXEL = dict(stage="generator", data="data/imagenet256", flip=True, crop_scale=0.2,
             patch_size=16, attn_fp32=True,
             encoder=["hf://mae_pixel_640", "hf://facebook/convnextv2-base-22k-224"])
MAE = dict(stage="encoder", data="data/imagenet256", crop_scale=0.2, batch_size=8192, lr=4e-3,
           warmup=4000, ema_decay=[0.9995])

# What differs from the options' defaults. Rows end with the FID they reach: paper (release).
PRESETS = {
    "latent_ablation": LATENT | dict(
        model="B", labels=64, pos=64, uncond=16, alpha_power=3, push=1024, attn_fp32=True,
        lr=2e-4, weight_decay=0.01, warmup=5000, steps=30000,
        encoder=["hf://mae_latent_256"]),                                       # 8.46 (8.49)
    "latent_B": LATENT | dict(
        model="B", labels=128, pos=64, uncond=32, alpha_power=5, push=2048,     # P: 128 pos
        lr=4e-4, weight_decay=0.0, warmup=10000, steps=200000),                 # 1.75 (1.74)
    "latent_L": LATENT | dict(
        model="L", labels=128, pos=64, uncond=32, alpha_power=3, alpha_fixed=0.5, push=2048,
        lr=4e-4, weight_decay=0.01, warmup=10000, steps=200000),                # 1.54 (1.53)
    "pixel_B": PIXEL | dict(
        model="B", labels=128, pos=128, uncond=32, alpha_power=5, push=2048,
        lr=2e-4, weight_decay=0.01, warmup=10000, steps=100000),                # 1.76 (1.73)
    "pixel_L": PIXEL | dict(
        model="L", labels=128, pos=128, uncond=32, alpha_power=5, push=2048,
        lr=4e-4, weight_decay=0.01, warmup=10000, steps=100000),                # 1.61 (1.62)

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
        layers=[1, 1], batch_size=128, cls_steps=120, cls_ramp=50, ema_decay=[0.99],
        lr=2e-3, warmup=50, steps=300, sample_every=150, save_every=100),
    "digits": dict(
        stage="generator", data="data/digits", encoder=["digits_encoder"], model="XXS",
        patch_size=8, labels=10, gen=24, pos=64, uncond=12, alpha_power=2.5, reals="index",
        ema_decay=[0.99], lr=3e-3, warmup=30, cooldown=550, steps=800,
        sample_every=100, save_every=150),
    # For any small images: what is None follows from them and from the device, see `fit`.
    # Its alphas are uniform in [1, 4]: small generators hardly read alpha, and what guides them is
    # its mean in training.
    "small_encoder": dict(
        stage="encoder", input_patch_size=None, base_channels=None, layers=None, batch_size=None,
        steps=None, cls_steps=None, cls_ramp=None, ema_decay=[0.99], lr=2e-3, warmup=None,
        sample_every=200, save_every=100),
    "small": dict(
        stage="generator", encoder=["small_encoder"], model=None, patch_size=None, labels=None,
        gen=None, pos=None, uncond=None, alpha_power=0, reals="index", ema_decay=[0.99], lr=None,
        warmup=None, steps=None, cooldown=None, sample_every=100, save_every=100),
    # For one modern GPU.
    "cifar10_encoder": dict(
        stage="encoder", data="data/cifar10", base_channels=64, layers=[2, 2, 2],
        batch_size=512, crop_scale=0.2, cls_steps=1500, cls_ramp=500, lr=1e-3, warmup=200,
        ema_decay=[0.99], steps=3000, save_every=1000),
    "cifar10": dict(
        stage="generator", data="data/cifar10", encoder=["cifar10_encoder"], model="S",
        patch_size=4, labels=16, gen=64, pos=64, uncond=16, flip=True, lr=4e-4, warmup=200,
        steps=10000, save_every=500, sample_every=500),
}
# Fashion-MNIST, where Debian's package dataset-fashion-mnist puts it.
FASHION = dict(data="/usr/share/datasets/fashion-mnist")
PRESETS["fashion_encoder"] = PRESETS["small_encoder"] | FASHION
PRESETS["fashion"] = PRESETS["small"] | FASHION | dict(encoder=["fashion_encoder"])
# The ablation's global batch on one node of eight GPUs, and on one GPU, 8 labels at a time.
PRESETS["latent_ablation_8gpu"] = PRESETS["latent_ablation"] | dict(checkpoint_blocks=True)
PRESETS["latent_ablation_1gpu"] = PRESETS["latent_ablation_8gpu"] | dict(micro_batches=8)
# The same recipes with W-Flow's field, and its paper's FID. It has eight and 64 hosts.
WFLOW = dict(field="sinkhorn", iterations=1, push=8192)
PRESETS |= {
    "wflow_ablation": PRESETS["latent_ablation"] | WFLOW | dict(iterations=10, push=512),  # 7.08
    "wflow_B": PRESETS["latent_B"] | WFLOW | dict(iterations=10),               # 1.52
    "wflow_L": PRESETS["latent_L"] | WFLOW,                                     # 1.35
    "wflow_XL": PRESETS["latent_L"] | WFLOW | dict(
        model="XL", temperature=0.01, pos=128, alpha_power=4, alpha_fixed=0.2,
        lr=3e-4),                                                               # 1.29, at 180k
}


# Kinds of numbers that options take.
share = number(float, least=0, most=1)
positive = number(float, above=0)
count = number(int, least=0)


def build_parser(preset=None):
    """All options on one screen. One of the stage that does not run is an error, see `parse`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=sample.HelpFormat)
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, help="row of PRESETS; other options override it")
    add("--stage", choices=STAGES, default="generator", help="what is trained")
    add("--data", help="folder written by prepare_data.py, of which the split train is used; or a "
        "source as it takes, which is prepared first, in data/NAME")
    add("--size", type=positive_int, help="side to which a source is prepared (None: as it is)")
    add("--out", help="run folder (None: runs/PRESET; of small runs/NAME)")
    add("--seed", type=count, default=0, help="with the step, all that randomness depends on")
    add("--device", type=model.usable_device, help="cuda or cpu",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action=argparse.BooleanOptionalAction, help="networks compute in bfloat16, which "
        "is the default on a GPU; master weights, statistics and the drift loss stay float32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--micro_batches", type=positive_int, default=1, help="parts in which a process takes its "
        "share of a step: the same gradients in less memory, with more forward passes")
    add("--dry_run", action="store_true", help="measure a step on random data with random "
        "encoders: parameters, FLOPs, seconds, memory; reads and writes nothing")
    add("--init_from", help="weights to start from, as --ckpt of sample.py, of the same sizes, "
        "but for the number of classes")
    add("--log_every", type=positive_int, default=10, help="steps between lines of log.jsonl")
    add("--sample_every", type=positive_int, default=1000, help="steps between pictures")
    add("--save_every", type=positive_int, default=1000, help="steps between checkpoints")

    add = parser.add_argument_group("real images").add_argument
    add("--crop_scale", type=number(float, above=0, most=1), default=1.0, help="least area of "
        "random resized crops (paper: 0.2)")
    add("--vae", default=model.SD_VAE, help="VAE between pixels and latents, a folder or hf://")
    add("--vae_chunk", type=positive_int, default=16, help="images in the VAE at a time")

    add = parser.add_argument_group("optimisation (Table 8)").add_argument
    add("--steps", type=positive_int, default=30000, help="length of the run")
    add("--lr", type=positive, default=2e-4, help="learning rate of AdamW")
    add("--warmup", type=count, default=5000, help="first steps, linear from 1e-6")
    add("--cooldown", type=count, default=0, help="last steps, linear to zero")
    add("--weight_decay", type=number(float, least=0), default=0.01, help="on all parameters")
    add("--clip", type=positive, default=2.0, help="largest gradient norm")
    add("--ema_decay", type=share, nargs="+", default=[0.999], help="decay of the averaged "
        "weights; further averages are kept in step_*/ema_DECAY")

    add = parser.add_argument_group("stage encoder (A.3)").add_argument
    add("--base_channels", type=positive_int, default=256, help="width of the first stage")
    add("--layers", type=positive_int, nargs="+", default=[3, 4, 6, 3], help="blocks of each stage")
    add("--input_patch_size", type=positive_int, default=1, help="side of the patches into which "
        "pixels are folded first (256 pixels: 8)")
    add("--batch_size", type=positive_int, default=8192, help="images a step, of all processes")
    add("--to_latents", action="store_true", help="encode crops of pixels by --vae first")
    add("--cls_steps", type=count, default=0, help="last steps, which train a classifier too")
    add("--cls_weight", type=share, default=0.1, help="lam of lam CE + (1 - lam) L2")
    add("--cls_ramp", type=positive_int, default=1000, help="steps in which lam rises from 0")

    add_generator_options(parser)
    parser.set_defaults(**copy.deepcopy(PRESETS.get(preset, {})))
    return parser


def add_generator_options(parser):
    """Those of the stage generator, of the queues it draws from, and of the two fields."""
    add = parser.add_argument_group("stage generator (A.8)").add_argument
    add("--encoder", nargs="+", help="whose features samples drift in, one or several: a run, "
        "checkpoint, artifact, hf://..., or a preset (then its run, trained to its end first)")
    add("--encoder_size", type=positive_int, help="side to which a ResNet50 or ConvNeXt-V2 gets "
        "images resized (None: 224)")
    add("--pixel_encoder", action="store_true", help="decode a generator's latents for an encoder "
        "of pixels; gradients pass through the decoder (sec. 4)")
    add("--model", choices=model.GENERATOR_SIZES, default="B", help="size of the generator")
    add("--patch_size", type=positive_int, default=2, help="side of a generator's token")
    add("--attn_fp32", action=argparse.BooleanOptionalAction, default=False, help="compute "
        "attention in float32, as in the release's ablation and pixel recipes: slower on a GPU")
    add("--checkpoint_blocks", action="store_true", help="recompute activations of the generator: "
        "a third more work, a twentieth of its memory")
    add("--labels", type=positive_int, default=64, help="class labels a step, of all processes")
    add("--gen", type=positive_int, default=64, help="generated samples a label, G")
    add("--pos", type=positive_int, default=64, help="real samples a label, P")
    add("--uncond", type=count, default=16, help="real samples of any class a label, U")
    add("--alpha_power", type=number(float), default=3.0, help="k of p(alpha) ~ alpha^-k")
    add("--alpha_fixed", type=share, default=0.0, help="share of labels whose alpha is 1")
    add("--reals", choices=("queue", "index"), default="queue", help="positives from queues of the "
        "latest samples (the paper's), or from the whole class")
    add("--flip", action="store_true", help="mirror real images at random")
    add("--show_reals", action="store_true", help="a first row of real images in pictures")
    add("--field", choices=drift.FIELDS, default="drifting", help="what moves the samples")
    add("--eval_every", type=count, default=0, help="steps between evaluations; 0: none")
    add("--eval_images", type=positive_int, default=10000, help="images an evaluation")
    add("--eval_features", default="inception", help="inception, pixels or encoder:CKPT")
    add("--eval_ref", help="statistics, as --ref of fid.py (None: made of --data)")
    add("--eval_resize", choices=("tf1", "half"), default="tf1", help="resize for Inception")
    add("--eval_inception", help="weights of Inception (None: downloaded)")

    add = parser.add_argument_group("reals queue").add_argument
    add("--push", type=positive_int, default=1024, help="samples pushed into queues a step")

    add = parser.add_argument_group("field drifting").add_argument
    add("--kernel", choices=drift.KERNELS, default="both", help="normalisation (Table 11)")
    add("--attraction", type=number(float), default=1.0, help="multiplier of V+ (Table 1)")
    add("--repulsion", type=number(float), default=1.0, help="multiplier of V- (Table 1)")

    add = parser.add_argument_group("field sinkhorn (W-Flow)").add_argument
    add("--temperature", type=number(float, above=0), default=0.05, help="regularisation R, in "
        "units of the mean squared distance")
    add("--iterations", type=positive_int, default=10, help="Sinkhorn iterations")
    add("--repelled_by", choices=drift.REPELLED_BY, default="independent", help="samples that push "
        "others: a second batch, the batch itself, or none")


def parse(argv):
    """default < preset < command line. An option that this run would not read is an error."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset
    parser = build_parser(preset)
    args = parser.parse_args(argv)
    given = {word.split("=")[0] for word in argv}
    options = vars(args)
    for group in parser._action_groups:  # "stage generator" and "field sinkhorn" name their switch
        switch, value, *_ = group.title.split() + [""]
        if switch in ("stage", "reals", "field") and options.get(switch) != value:
            for action in group._group_actions:
                for word in given.intersection(action.option_strings):
                    parser.error(f"{word} is read with --{switch} {value} only")
                delattr(args, action.dest)
    # A preset's schedule has the shape of its length: a shorter run gets a shorter one.
    row = PRESETS.get(preset, {})
    if row.get("steps") and args.steps < row["steps"]:
        for name in ("warmup", "cooldown", "cls_steps", "cls_ramp"):
            if name in row and f"--{name}" not in given:
                options[name] = math.ceil(row[name] * args.steps / row["steps"])

    for prefix, switch in (("eval_", "eval_every"), ("cls_", "cls_steps")):  # 0 switches all off
        for name in options.keys() - {switch}:
            if name.startswith(prefix) and f"--{name}" in given and options[switch] == 0:
                parser.error(f"--{name} is read with --{switch} only")
    if args.bf16 is None:
        args.bf16 = args.device.startswith("cuda")
    if args.out is None and args.preset is None:
        parser.error("--out is needed without a preset")
    if args.data is None or args.stage == "generator" and args.encoder is None:
        parser.error("--data (and for the generator --encoder) is needed")
    if args.out is None:  # of --preset small_encoder --data my.zip: runs/my_encoder
        args.out = "runs/" + args.preset.replace("small", name_of(args.data))
    return args


def name_of(data):
    """data/my.zip -> my; a dot -> the name of the folder where we are"""
    return re.sub(r"(\.zip|\.tar|\.gz|\.tgz)+$", "", Path(os.path.abspath(data)).name).strip(".")


def fit(args, data):
    """Set the options that a row of PRESETS leaves None: by images, classes and device.

    An encoder gets at most 16 x 16 positions, a generator at most 8 x 8 tokens. On a CPU many
    small steps go farther in the same time than few large ones.
    """
    on_gpu = args.device.startswith("cuda")
    if args.stage == "encoder":
        row = dict(base_channels=32, layers=[1, 1, 1], batch_size=128, steps=400)
        if on_gpu:
            row |= dict(base_channels=64, layers=[2, 2, 2], batch_size=512, steps=3000)
        steps = args.steps or row["steps"]
        row |= dict(cls_steps=steps // 2, cls_ramp=max(1, steps // 8))
        if args.input_patch_size is None:
            row["input_patch_size"] = patch_of(args, data, 16, 2)
    else:
        row = dict(model="XS", labels=5, gen=16, pos=32, uncond=8, lr=3e-3,
                   steps=125 * min(max(10, data.num_classes), 50))
        if on_gpu:
            row |= dict(model="S", labels=10, gen=64, pos=64, uncond=16, lr=4e-4,
                        steps=6 * row["steps"])
        row["uncond"] = min(row["uncond"], int(data.count.sum()))
        if data.num_classes == 1:  # guidance needs other classes
            gen = 80 if on_gpu else 40
            row |= dict(labels=2, gen=gen, pos=2 * gen, uncond=0)
        steps = args.steps or row["steps"]
        row["cooldown"] = steps * 7 // 10
        if args.patch_size is None:
            row["patch_size"] = patch_of(args, data, 8, 1)
    row["warmup"] = min(50, steps // 10)
    parts = world_size() * args.micro_batches
    for name, value in row.items():
        if vars(args)[name] is None:
            if name in ("labels", "batch_size"):
                value = math.ceil(value / parts) * parts
            setattr(args, name, value)


def patch_of(args, data, most, times):
    """The smallest patch, `times` which divides the side, that gives at most `most` a side.

    Raises UsageError where these are few: 62 = 2 x 31 pixels would be 2 x 2 patches.
    """
    side = data.shape[1]
    fitting = [patch for patch in range(1, side + 1)
               if side % (times * patch) == 0 and min(side, 4) <= side // patch <= most]
    if not fitting:
        raise UsageError(f"{args.data}: images of {side} x {side} pixels do not divide into "
                         f"patches: remove it, and give their source with --size "
                         f"{math.ceil(side / most) * most}")
    return min(fitting)


# --------------------------------------------------------------------------------------------
# The two stages. Each has a network; `batch(step)`, this process's part of the step's global
# batch; and `backward(batch, step)`, which leaves in the network the gradient of the mean loss
# over that part. It returns figures to log, `loss` among them; figures by feature; and whether
# what this process computed by itself is finite.

class EncoderStage:
    """Masked autoencoding (A.3): half of the patches are hidden, and guessed from the others."""

    def __init__(self, args, data):
        check_data(args, data, "batch_size")
        latents = data.meta["kind"] == "latents"
        if latents and args.crop_scale < 1 and data.meta.get("views") != "crops":
            raise UsageError(f"{args.data} holds latents of whole images, but --crop_scale cuts "
                             "before the VAE (A.3): give images, or latents made with --crops")
        through_vae = args.to_latents and not latents
        side = data.shape[1] // 8 if through_vae else data.shape[1]
        factor = 2 * args.input_patch_size  # masks hide patches of 2 x 2 of its positions
        if side % factor:
            raise UsageError(f"{args.data}: --input_patch_size {args.input_patch_size} needs "
                             f"images of a side that {factor} divides, not {side}: prepare it "
                             "with --size")
        self.args = args
        self.data = data
        self.net = model.MAE(4 if args.to_latents else data.shape[0], args.base_channels,
                             args.layers, input_patch_size=args.input_patch_size,
                             num_classes=data.num_classes)
        self.grid = side // args.input_patch_size // self.net.patch_size
        self.vae = open_vae(args, data) if through_vae else None
        self.encoder_digests = []
        self.mirrored = latents  # by choosing one of the stored views
        self.cropped = args.crop_scale < 1 and not latents

    def batch(self, step, most=None):
        """Images or latents, labels and masks of this process, or of the first `most` of them."""
        args = self.args
        slots = my_part(args.batch_size)[:most]
        ids = self.data.fresh(step * args.batch_size, args.batch_size, args.seed)[slots]
        # Random numbers for each image alone: its crop, mask and noise do not depend on the others.
        rngs = [np.random.default_rng([args.seed, step, slot]) for slot in slots]
        seeds = np.array([rng.integers(1 << 63) for rng in rngs])  # of the latents' noise
        masks = np.stack([rng.random((self.grid, self.grid)) < 0.5 for rng in rngs])
        x = self.data.batch(ids, seeds, self.mirrored, args.device)
        if self.cropped:
            x = crop(x, args.crop_scale, rngs, mirror=True)
        if self.vae:
            mean, std = self.vae.encode(x)
            noise = [torch.randn(mean.shape[1:], generator=stream(seed)) for seed in seeds]
            x = mean + std * torch.stack(noise).to(std)
        return {"x": x, "labels": upload(self.data.labels[ids], args.device),
                "mask": upload(masks.astype(np.float32), args.device)}

    def backward(self, batch, step):
        """lam CE + (1 - lam) L2 (A.3): lam is 0 until the last --cls_steps, in which it rises."""
        args = self.args
        fine_tuned = max(0, step - (args.steps - args.cls_steps))
        lam = args.cls_weight * min(1, fine_tuned / args.cls_ramp)
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
        logs = dict(zip(names, torch.stack(rows).mean(0)))
        by_feature = {name: logs[name][None] for name in ("reconstruction", "cross_entropy")}
        return {**logs, "lam": lam}, by_feature, logs["loss"].isfinite()

    def preview(self, ema):
        """Rows of images, of what the encoder sees of them, and of what it guesses.

        Returns uint8 images, their number in a row, and no text for columns.
        """
        x, labels, mask = self.batch(0, most=10).values()
        p = ema.input_patch_size
        guess = rearrange(ema(x, mask, labels)[0], "n (p q c) h w -> n c (h p) (w q)", p=p, q=p)
        hidden = F.interpolate(mask[:, None], x.shape[2:])
        rows = torch.cat([x, x * (1 - hidden), x * (1 - hidden) + guess * hidden])
        rows = self.vae.decode(rows) if self.vae else rows[:, :3]
        return sample.to_uint8(rows.cpu()), len(x), None


class GeneratorStage:
    """Drifting (A.8): draw labels, alphas and reals; generate; move samples in feature space."""

    def __init__(self, args, data):
        latents = data.meta["kind"] == "latents"
        self.queue = drift.SampleQueue(data.num_classes)
        self.pushed = None
        self.args = args
        self.data = data
        self.net = model.Generator(data.shape[1], data.shape[0], patch_size=args.patch_size,
                                   num_classes=data.num_classes, attn_fp32=args.attn_fp32,
                                   **model.GENERATOR_SIZES[args.model])
        self.net.checkpoint_blocks = args.checkpoint_blocks
        needs_vae = latents and (args.pixel_encoder or not args.dry_run)
        self.vae = open_vae(args, data) if needs_vae else None
        self.encoders, self.encoder_digests = open_encoders(args, data)
        # A second batch of samples, without gradients, by which a field other than drifting repels.
        # Its price: a forward pass of the generator and of the encoders, and its features.
        self.second = (args.field != "drifting"
                       and getattr(args, "repelled_by", "independent") == "independent")
        if args.compile:
            for encoder in self.encoders:
                encoder.features = torch.compile(encoder.features)
        # Reals that are few and never change pass the encoders once: 1.3 times the steps a second.
        # They must be few, as their features take a hundred times their bytes and more.
        self.kept = None
        changing = latents or args.flip or args.crop_scale < 1 or args.dry_run
        if not changing and data.images.nbytes < 1 << 17:
            with torch.no_grad():
                images = data.batch(np.arange(len(data)), device=args.device)
                self.kept = self.features(images[:, None])

    def batch(self, step):
        """Labels, alphas, noise, styles, reals and their ids, each [labels, ...].

        What a label gets depends on (seed, step, its slot) alone, whichever process draws it.
        """
        args, net = self.args, self.net
        source, fresh = self.data, args.labels
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
            reals = self.data.batch(ids, rng, args.flip, args.device)
            if args.crop_scale < 1:
                reals = crop(reals, args.crop_scale, [rng] * len(ids))
            rows.append({"alpha": upload(alpha, args.device)[0], "noise": noise, "styles": styles,
                         "reals": reals, "ids": upload(ids, args.device)})
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {"labels": upload(labels[slots], args.device), **batch}

    def queue_after(self, step, fresh):
        """The queues after the pushes of steps 0 to `step`, of `fresh` ids each (`Dataset.fresh`).

        All processes push the same ids: queues are equal everywhere, and a step does not depend on
        the number of processes. Checkpoints need not hold them: a resumed run pushes again what
        was pushed (at the paper's 200,000th step for a minute or two).
        """
        if self.pushed is None or self.pushed > step + 1:  # queues start full
            self.queue = drift.SampleQueue(self.data.num_classes)
            rng = np.random.default_rng([self.args.seed, 1 << 32])
            for label, count in enumerate(self.data.count):
                self.push(self.data.draw(label, min(count, self.queue.per_class), rng))
            self.push(self.data.fresh(0, self.queue.overall, self.args.seed))
            self.pushed = 0
        while self.pushed <= step:
            self.push(self.data.fresh(self.pushed * fresh, fresh, self.args.seed))
            self.pushed += 1
        return self.queue

    def push(self, ids):
        """Into the queues of their classes and of any class."""
        self.queue.push(ids, self.data.labels[ids])

    def generate(self, batch, first=0):
        """Samples [labels, G, c, h, w] of each label's noise and styles from number `first` on.

        One forward pass, as in sampling: it is the training that moves samples in many steps.
        """
        gen = self.args.gen
        noise, styles = (batch[name][:, first:first + gen] for name in ("noise", "styles"))
        with autocast(self.args):
            x = self.net(noise.flatten(0, 1), batch["labels"].repeat_interleave(gen),
                         batch["alpha"].repeat_interleave(gen), styles.flatten(0, 1))
        return x.unflatten(0, (-1, gen))

    @torch.no_grad()
    def generate_second(self, batch):
        """Samples of the same labels and alphas with other noise and styles; None without them."""
        return self.generate(batch, self.args.gen) if self.second else None

    def features(self, x):
        """x [labels, n, c, h, w] -> {name: [labels, n, T, C]}: the samples' own, and encoders'."""
        labels = len(x)
        x = x.flatten(0, 1)
        features = {"global": rearrange(x, "n c h w -> n 1 (h w c)")}
        if self.args.pixel_encoder:  # of reals too: no latent has exactly their original as image
            x = self.vae.decode(x)
        for encoder in self.encoders:
            further = encoder.features(x)
            shared = features.keys() & further.keys()
            if shared:
                raise UsageError(f"two of --encoder {' '.join(self.args.encoder)} name features "
                                 f"alike, {min(shared)} for one")
            features |= further
        return {name: f.unflatten(0, (labels, -1)) for name, f in features.items()}

    def loss(self, x, second, batch, reduce):
        """`drift.feature_loss` of samples x and the second ones, [labels, G, c, h, w]."""
        args = self.args
        gen = self.features(x)
        # Gradients reach samples through their own features alone: all else is where they are
        # pulled to or pushed from, and stands still in the loss (3.3).
        with torch.no_grad():
            gen2 = None if second is None else self.features(second)
            if self.kept is None:
                reals = self.features(batch["reals"])
            else:
                reals = {name: f[batch["ids"], 0] for name, f in self.kept.items()}
        # As `batch` drew them: the label's own first, then those of any class.
        pos = {name: f[:, :args.pos] for name, f in reals.items()}
        uncond = {name: f[:, args.pos:] for name, f in reals.items()}
        options = {name: getattr(args, name) for name in FIELD_OPTIONS.get(args.field, ())}
        return drift.feature_loss(args.field, gen, gen2, pos, uncond, batch["alpha"], reduce,
                                  **options)

    def backward(self, batch, step):
        """The loss of the whole global batch, of which a part is in memory at a time.

        A feature's loss needs two sums over the global batch: of its distances and, made with
        these, of its forces (A.6). With 64 labels, 2 processes and 4 micro-batches a process holds
        8 labels at a time, but both sums are those of all 64: gradients are those of one pass. The
        price: one more forward pass of the generator, two of the encoders.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.args.device)

        def over_processes(feature, name, sums):
            if name == "distance":  # forces come from other processes' distances too
                finite.logical_and_(sums.isfinite().all())
            return all_reduce(sums)

        parts = split(batch, self.args.micro_batches)
        if len(parts) == 1:
            second = self.generate_second(batch)
            loss, losses, infos = self.loss(self.generate(batch), second, batch, over_processes)
            loss.backward()
            return *figures([losses], infos), finite

        # 1. The samples of all parts, without gradients.
        with torch.no_grad():
            samples = [(self.generate(part), self.generate_second(part)) for part in parts]

        # 2. One kind of sum after the other, over the parts and then over the processes. `totals`
        #    are sums that are complete, `own` those of this process's parts so far.
        totals = {}
        own = {}

        def total(feature, name, sums):
            if (feature, name) in totals:
                return totals[feature, name]
            own[feature, name] = own.get((feature, name), 0) + sums
            return sums  # of this part alone: what `loss` makes of it is thrown away

        for kind in ("distance", "force"):
            own.clear()
            with torch.no_grad():
                for (x, second), part in zip(samples, parts):
                    self.loss(x, second, part, total)
            for feature, name in own:
                if name == kind:
                    totals[feature, kind] = over_processes(feature, kind, own[feature, kind])

        # 3. Part by part the gradient goes through the encoders to the samples, and from there
        #    through the generator, so that one network's activations are in memory at a time.
        losses_of_parts = []
        for (x, second), part in zip(samples, parts):
            loss, losses, infos = self.loss(x.requires_grad_(), second, part, total)
            (loss / len(parts)).backward()
            self.generate(part).backward(x.grad)
            losses_of_parts.append(losses)
        return *figures(losses_of_parts, infos), finite

    def preview(self, ema):
        """A column for each of ten classes, always of the same noise.

        Returns uint8 images, the number of columns and their classes' names.
        """
        labels = np.flatnonzero(self.data.count)[:10]
        index = np.arange(8 * len(labels))
        images = sample.generate(ema, np.tile(labels, 8), index, vae=self.vae).cpu()
        if self.args.show_reals:
            reals = self.data.batch(self.data.first[labels], device=self.args.device)
            reals = self.vae.decode(reals) if self.vae else reals
            images = torch.cat([reals.cpu(), images])
        names = [self.data.meta["classes"][label] for label in labels]
        return sample.to_uint8(images), len(labels), names


STAGES = {"encoder": EncoderStage, "generator": GeneratorStage}

# The options that a field's loss takes.
FIELD_OPTIONS = {"drifting": ("kernel", "attraction", "repulsion"),
                 "sinkhorn": ("temperature", "iterations", "repelled_by")}


def figures(losses_of_parts, infos):
    """What a step logs: means over features (of losses the sum), and {feature: [loss, *info]}.

    losses_of_parts: a list of {feature: loss}; infos {feature: info} of drift.chase.
    """
    by_feature = {}
    for feature, info in infos.items():
        loss = torch.stack([losses[feature].detach() for losses in losses_of_parts]).mean()
        by_feature[feature] = torch.stack([loss, *info.values()])
    table = torch.stack(list(by_feature.values()))
    names = next(iter(infos.values()))
    logs = dict(zip(("loss", *names), table.mean(0)))
    logs["loss"] = table[:, 0].sum()
    return logs, by_feature


def check_generator(args, data):
    """Whether GeneratorStage can be made of these: asked before an encoder is trained for it."""
    check_data(args, data, "labels")
    latents = data.meta["kind"] == "latents"
    if args.pixel_encoder and not latents or args.crop_scale < 1 and latents:
        raise UsageError(f"{args.data} holds {data.meta['kind']}: --pixel_encoder is for "
                         "latents, --crop_scale for pixels")
    if data.num_classes == 1 and args.uncond:
        say("one class: guidance and its alpha mean nothing, and --uncond 0 saves its cost")
    if data.meta.get("views") == "crops":
        raise UsageError(f"{args.data} holds crops, for encoders: make latents without --crops")
    if data.shape[1] % args.patch_size:
        raise UsageError(f"--patch_size {args.patch_size} does not divide the side of the images "
                         f"of {args.data}, {data.shape[1]}")
    smallest = data.count[data.count > 0].min()
    most_uncond = len(data)
    if args.reals == "queue":
        queue = drift.SampleQueue(data.num_classes)
        most_pos = min(smallest, queue.per_class)
        most_uncond = queue.overall
        if args.pos > most_pos:
            raise UsageError(f"--pos can be at most {most_pos} with --reals queue: the smallest "
                             f"class of {args.data} has {smallest} images, and a queue "
                             f"{queue.per_class}. Or take --reals index")
    elif args.pos > smallest:
        say(f"the smallest class has {smallest} images, fewer than --pos {args.pos}: they are "
            "drawn several times")
    if args.uncond > most_uncond:
        raise UsageError(f"--uncond can be at most {most_uncond} with --reals {args.reals} of "
                         f"{args.data}")


def check_data(args, data, size):
    """What both stages ask of --data and of the size of a step. Raises UsageError."""
    parts = world_size() * args.micro_batches
    if vars(args)[size] % parts:
        raise UsageError(f"--{size} must be divisible by processes times --micro_batches: {parts}")
    if data.shape[1] != data.shape[2]:
        raise UsageError(f"{args.data} holds images of {data.shape[2]} x {data.shape[1]} pixels, "
                         "networks here take square ones: prepare it with --size")


def my_part(count):
    """This process's part of range(count): neighbours, so that parts in order are the whole."""
    part = count // world_size()
    return range(part * get_rank(), part * (get_rank() + 1))


def split(batch, parts):
    """{name: [n, ...]} -> a list of such, of n / parts each."""
    pieces = {name: x.tensor_split(parts) for name, x in batch.items()}
    return [{name: x[i] for name, x in pieces.items()} for i in range(parts)]


def stream(seed, device="cpu"):
    """Random numbers of their own for one image or label."""
    return torch.Generator(device).manual_seed(int(seed))


def crop(x, min_area, rngs, mirror=False):
    """A random crop of each image at the image's size, half of them mirrored if that is wanted."""
    boxes = [prepare_data.random_crop(x.shape[3], x.shape[2], min_area, rng) for rng in rngs]
    flips = [mirror and rng.random() < 0.5 for rng in rngs]
    return prepare_data.crop_resize(x, np.array(boxes), np.array(flips))


def autocast(args):
    """Around what networks compute: in bfloat16 under --bf16, from weights in float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def frozen(net, args):
    """A network that is only looked through, in the type in which it computes."""
    net.eval().requires_grad_(False).to(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    if args.device == "cpu":  # whose GroupNorm takes twenty times as long for channels last
        return net
    return net.to(memory_format=torch.channels_last)


def open_vae(args, data):
    """The VAE, which must be the one that made the data's latents. Raises UsageError."""
    if args.dry_run:
        vae = random_vae(args)
    else:
        vae = model.load_vae(args.vae, args.device, args.vae_chunk, data.meta.get("vae"))
    if args.compile:
        vae.net.decoder.compile()
    return frozen(vae, args)


def open_encoders(args, data):
    """Encoders, and the sha256 of each one's weights, by which a resumed run knows them again."""
    encoders = torch.nn.ModuleList()
    digests = []
    # What an encoder sees: the data's pixels or latents, or the images that latents decode to.
    channels = 3 if args.pixel_encoder else data.shape[0]
    side = 8 * data.shape[1] if args.pixel_encoder else data.shape[1]
    for name in args.encoder:
        if args.dry_run:
            encoder = random_encoder(name, data, args.device)
        else:
            encoder = model.load_encoder(name)
        if encoder.in_channels != channels:
            raise UsageError(f"--encoder {name} takes {encoder.in_channels} channels, here it gets "
                             f"{channels} (--pixel_encoder decodes latents for it, "
                             "prepare_data.py --channels 3 takes greys)")
        if args.encoder_size:
            if not hasattr(encoder, "image_size"):
                raise UsageError(f"--encoder_size: {name} takes images as they are")
            encoder.image_size = args.encoder_size
        if isinstance(encoder, model.MAE):
            if side % encoder.input_patch_size:
                raise UsageError(f"--encoder {name} takes images of a side that "
                                 f"{encoder.input_patch_size} divides, not {side}")
            del encoder.decoder, encoder.fc  # a fifth of it, and never looked through
        if not args.dry_run:
            digests.append(digest(encoder))
        encoders.append(encoder)
    return frozen(encoders, args), digests


# --------------------------------------------------------------------------------------------
# The loop

class Run:
    """What is trained: a stage's network, its averages, the optimizer; and a step of it."""

    def __init__(self, args, data):
        self.args = args
        torch.manual_seed(args.seed)  # of initial weights; a step has random numbers of its own
        self.stage = on_all_ranks(STAGES[args.stage], args, data)
        if args.init_from and not model.latest_checkpoint(args.out):
            on_all_ranks(start_from, args.init_from, self.stage.net)
        self.net = self.stage.net.to(args.device).train()
        if args.compile:
            self.net.compile()
        # What names and pixels the weights belong to: sample.py reads it.
        self.net.origin = {key: data.meta[key] for key in ("classes", "vae") if key in data.meta}
        self.emas = [copy.deepcopy(self.net).eval().requires_grad_(False) for _ in args.ema_decay]
        self.params = list(self.net.parameters())
        self.optimizer = torch.optim.AdamW(self.params, args.lr, (0.9, 0.95), eps=1e-8,  # Table 8
                                           weight_decay=args.weight_decay, fused=True)
        self.skipped = torch.zeros(2, dtype=torch.long)  # steps in a row, and in all

    def update(self, batch, step):
        """One step: gradients of all processes, clipped, AdamW, averages.

        A step that is not finite changes nothing, and the next one draws other samples. Returns
        figures to log, figures by feature, and this process's fault: 2 if its own distances (or
        encoder's loss) were not finite, and 1 if its gradient was not, into which others' sums
        have gone.
        """
        args = self.args
        lr = learning_rate(step, args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logs, by_feature, finite = self.stage.backward(batch, step)
        grads = [p.grad for p in self.params]
        own_norm = torch.nn.utils.get_total_norm(grads)

        # The mean gradient of all processes. DistributedDataParallel would share gradients in the
        # backward pass; a step has as many of those as micro-batches, and losses that are shared.
        logs["loss"] = logs["loss"].double()
        if world_size() > 1:
            for work in [dist.all_reduce(x, async_op=True) for x in (*grads, logs["loss"])]:
                work.wait()
            torch._foreach_div_(grads, world_size())
            logs["loss"] /= world_size()
        norm = torch.nn.utils.clip_grad_norm_(self.params, args.clip)  # that before clipping

        if torch.isfinite(logs["loss"] + norm):  # the same on every process
            self.skipped[0] = 0
            self.optimizer.step()
            # The averages' memory grows with the run: short ones too forget their first weights.
            with torch.no_grad():
                for decay, ema in zip(args.ema_decay, self.emas):
                    new = 1 - min(decay, (step + 1) / (step + 10))
                    torch._foreach_lerp_(list(ema.parameters()), self.params, new)
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        return {"lr": lr, **logs, "norm": norm}, by_feature, 2 * ~finite + ~own_norm.isfinite()


def main(argv=None):
    """Data, sizes, encoders, and the training of one stage.

    An encoder that is a preset is a run of its own: it is trained here first, by a call of main
    with its own options, so that it resumes and is looked at like any other run.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.dry_run:
        data = RandomData(args.data)
    else:
        args.data = prepared(args)
        data = on_all_ranks(prepare_data.Dataset, args.data)
    if args.size not in (None, data.shape[1]):
        give_up(f"{args.data} holds images of side {data.shape[1]}, not --size {args.size}: give "
                "their source")
    fit(args, data)
    if args.device == "cuda":  # by number: the thread that makes batches has a device of its own
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if args.stage == "generator":
        on_all_ranks(check_generator, args, data)
    if args.dry_run:
        return dry_run(args, data)
    encoders = getattr(args, "encoder", [])
    # What else is needed must be there, before an encoder is trained.
    for name in encoders:
        if name not in PRESETS:
            on_all_ranks(model.find_files, name, model.MODEL_FILES)
    if args.init_from and not model.latest_checkpoint(args.out):
        on_all_ranks(model.find_files, args.init_from, model.MODEL_FILES)
    if args.stage == "generator" and data.meta["kind"] == "latents":
        on_all_ranks(model.find_files, args.vae, model.VAE_FORMS)
    for i, name in enumerate(encoders):
        if name in PRESETS:  # trained first, unless its run is there
            words = ["--preset", name, "--device", args.device, "--seed", str(args.seed)]
            words.append("--bf16" if args.bf16 else "--no-bf16")
            if args.compile:
                words.append("--compile")
            if PRESETS[name].get("to_latents"):
                words += ["--vae", args.vae]  # on the images that its own row names
            else:
                words += ["--data", args.data]
                if args.size:
                    words += ["--size", str(args.size)]
            main(words)
            args.encoder[i] = parse(words).out
    with on_all_ranks(prepare_data.claim, args.out), ThreadPoolExecutor(1) as thread:
        train(args, data, thread)


def prepared(args):
    """The folder of --data: itself, or data/NAME, which is made of the source first."""
    source = args.data
    if source in ("digits", "data/digits"):  # they come with the code
        source = "digits"
    elif (Path(source) / "train/meta.json").exists():
        return source
    elif not Path(source).exists():
        if Path(source).suffix or os.path.isabs(source):  # my.zip or fashion's: meant as a source
            give_up(f"--data {source}: there is no such file or folder")
        return source
    out = Path("data", name_of(source))
    # A folder of that name may be somebody's images, perhaps those that are read.
    if out.exists() and not ((out / ".lock").exists() or (out / "train/meta.json").exists()):
        out = Path(f"{out}_prepared")
    prepare_data.prepare(source, out, args.size)
    if not (out / "train").exists():
        splits = [path.name for path in out.iterdir() if path.is_dir()]
        give_up(f"--data {source} has no images to train on, but {', '.join(splits)} alone")
    return str(out)


def train(args, data, thread):
    """One stage, from its newest checkpoint or from the start to its last step.

    thread: an executor, in which batches are made while the step before is computed.
    """
    out = Path(args.out)
    run = Run(args, data)
    start = resume(run, out)
    if start >= args.steps:
        say(f"{out} has {start} steps already, --steps is {args.steps}")
        return
    begin(run, start)
    eval_every = getattr(args, "eval_every", 0)
    evaluator = Evaluator(args, run.stage.vae) if eval_every else None

    # Clusters take a machine away with SIGTERM, people with Ctrl-C, at whose second the run ends.
    stop = threading.Event()

    def ask_to_stop(signum, frame):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, ask_to_stop)
    progress = tqdm(range(start, args.steps), args.out, initial=start, total=args.steps,
                    disable=get_rank() > 0, mininterval=1)
    # A GPU computes while the next batch is read and drawn, which depends on its step alone. On a
    # CPU both would want the same cores: a step of `fashion_encoder` takes a sixth longer.
    batches = map(run.stage.batch, range(start, args.steps))
    if args.device != "cpu":
        batches = prepare_data.prefetch(thread, run.stage.batch, range(start, args.steps))
    began = logged_at = time.time()
    logged = start
    waited = 0
    for step in progress:
        asked = time.time()
        batch = next(batches)
        waited += time.time() - asked
        logs, by_feature, fault = run.update(batch, step)
        done = step + 1
        if run.skipped[0]:
            explain_skip(args, step, by_feature, fault)
        if run.skipped[0] >= 10:  # the weights themselves are the cause
            give_up(f"step {done}: 10 steps in a row were not finite, and were skipped: lower --lr "
                    "or raise --warmup, and run the same command. The last checkpoint: "
                    f"{model.latest_checkpoint(out) or 'none yet'}")
        stopping = all_reduce(torch.tensor(int(stop.is_set()))).item()  # whoever was asked

        if done % args.log_every == 0 or done in (1, args.steps):
            # Of this step alone. `norm` is that before --clip. Generator: a row of `features` is
            # [loss, scale, force_TAU...] of drift.chase; `scale` and `force_TAU` are rows' means.
            logs = mean_over_processes(logs)
            now = time.time()
            write_log(args, {
                "step": done, "seconds": round(now - began, 2), **logs,
                "seconds_a_step": (now - logged_at) / (done - logged),
                "waited_for_data": round(waited, 2), "memory_gb": memory_gb(args.device),
                "skipped": run.skipped[1].item(), "features": rounded(by_feature)})
            progress.set_postfix_str(f"loss {logs['loss']:.3f}")
            logged, logged_at = done, now
        if get_rank() == 0 and (done % args.sample_every == 0 or done in (1, args.steps)):
            try:
                with torch.no_grad():
                    images, columns, names = run.stage.preview(run.emas[0])
            except UsageError as error:  # the steps to come will not be finite, and say more
                say(f"step {done} has no picture: {error}")
            else:
                sample.save_grid(images, columns, out / f"samples_{done:08d}.png", names=names)
        # Before the checkpoint: where an evaluation is interrupted, the same command goes on from
        # the checkpoint before and makes it. The first is of few images, to fail at once if at all.
        if eval_every and (done % eval_every == 0 or done == 1):
            evaluator(run.emas[0], done, 100 if done % eval_every else args.eval_images)
        if done % args.save_every == 0 or done == args.steps or stopping:
            if run.skipped[0] == 0:
                compare_weights(run)
                on_all_ranks(save_checkpoint, run, done)
            elif done == args.steps:
                give_up(f"{out}: step {done} is not finite, and was not saved: lower --lr or raise "
                        "--warmup, and run the same command")
        if stopping:
            say(f"{out}: stopped after step {done}; the same command resumes from "
                f"{model.latest_checkpoint(out)}")
            raise SystemExit(0)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    if get_rank() == 0:
        save_strip(out)
    say(f"{out}: {args.steps} steps; weights in {model.latest_checkpoint(out)}, "
        f"pictures in {out}/samples_{args.steps:08d}.png, all of them in {out}/samples.gif")


def save_strip(out):
    """The run's pictures one after the other, at most 40 of them, as OUT/samples.gif."""
    files = sorted(out.glob("samples_*.png"))
    chosen = np.unique(np.linspace(0, len(files) - 1, 40).round().astype(int))
    pictures = [Image.open(files[i]) for i in chosen]
    # Those of the last one's size: before --show_reals they lack a row.
    frames = [picture for picture in pictures if picture.size == pictures[-1].size]
    for frame in frames:
        frame.thumbnail((1000, 1000))
    with model.whole_file(out / "samples.gif") as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=400, loop=0)


def explain_skip(args, step, by_feature, fault):
    """Say in which features a step was not finite, and on which ranks. fault: of `Run.update`."""
    faults = gather(fault.item())
    ranks = [rank for rank, fault in enumerate(faults) if fault == max(faults)]
    losses = {name: row[0] for name, row in rounded(by_feature).items()}
    worst = sorted(losses, key=lambda name: (math.isfinite(losses[name]), -losses[name]))[:3]
    write_log(args, {"step": step + 1, "skipped_on_ranks": ranks, "worst_features": worst})
    say(f"step {step + 1} skipped: loss or gradient is not finite, on rank(s) {ranks}; largest "
        "losses: " + ", ".join(f"{name} {losses[name]}" for name in worst))


def give_up(text):
    """Ends a run on all processes, which all came here, with one line of rank 0."""
    if get_rank() > 0:
        raise SystemExit(1)
    raise UsageError(text)


def learning_rate(step, args):
    """Linear from 1e-6 in the first --warmup steps, and to zero in the last --cooldown ones.

    The paper's runs have no cooldown: they are long, and averaged weights do the same for them. In
    a run of minutes the samples would stay noisy.
    """
    rate = 1e-6 + (args.lr - 1e-6) * min(1, (step + 1) / max(1, args.warmup))
    if args.cooldown:
        rate *= min(1, (args.steps - step) / args.cooldown)
    return rate


def all_reduce(sums):
    """The sum over all processes, in place: every one of them must come here, in this order."""
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums


def mean_over_processes(figures):
    """{name: number or tensor} -> {name: number or list of them}."""
    means = {}
    for name, value in figures.items():
        total = all_reduce(torch.as_tensor(value, dtype=torch.float64).clone())
        means[name] = (total / world_size()).tolist()
    return means


def resume(run, out):
    """Continue from the newest checkpoint, with rank 0's weights: the number of steps done."""
    # Rank 0 looks for all: while others looked, it might set a damaged checkpoint aside.
    folder = gather(on_all_ranks(whole_checkpoint, out))[0]
    start = on_all_ranks(load_checkpoint, run, folder) if folder else 0
    if world_size() > 1:
        for network in (run.net, *run.emas):
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)
    return start


def rounded(by_feature):
    """Means over processes, of four digits."""
    means = mean_over_processes(by_feature)
    return {name: [float(f"{value:.4g}") for value in row] for name, row in means.items()}


def compare_weights(run):
    """Before weights are saved: raises RuntimeError on all processes where one has others.

    Averaged gradients keep equal weights equal. Once they differ, by a faulty GPU or by a change
    here that draws something on one rank only, nothing else would show it: losses look as before.
    Ends the run where some are not finite: a finite gradient can still overflow them.
    """
    sums = torch.stack([p.double().sum() for p in run.params]).tolist()
    of_ranks = gather(sums)
    if not np.isfinite(of_ranks).all():
        give_up(f"{run.args.out}: weights are not finite, and were not saved: lower --lr and run "
                "the same command, which resumes from the last checkpoint")
    other = [str(rank) for rank, theirs in enumerate(of_ranks) if theirs != of_ranks[0]]
    if other:
        raise RuntimeError(f"rank {', '.join(other)} has other weights than rank 0; nothing was "
                           "saved")


def start_from(path, net):
    """Copy the weights of a checkpoint, whatever its source, into a network of the same sizes.

    What depends on the number of classes, where that is another, stays as it was initialised.
    """
    load = model.load_generator if isinstance(net, model.Generator) else model.load_encoder
    weights = load(path).state_dict()
    own = net.state_dict()
    for name in ("class_embed.weight", "fc.weight", "fc.bias"):
        if name in own and name in weights and len(weights[name]) != len(own[name]):
            say(f"{name} starts anew: {path} has {len(weights[name])} classes, --data "
                f"{len(own[name])}")
            weights[name] = own[name]
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"--init_from {path} is of another model than these options and --data "
                         f"build ({one_line(error)})") from error


def begin(run, start):
    """Say what is trained and with which options, all of which go to options.json."""
    if get_rank() > 0:
        return
    args = run.args
    data = run.stage.data
    out = Path(args.out)
    say(f"{args.out}: {args.stage} of {count_parameters(run.net)}, {len(data)} images "
        f"{list(data.shape)} of {data.num_classes} classes, {world_size()} process(es), from step "
        f"{start} to {args.steps}")
    defaults = vars(build_parser().parse_args([]))
    # What `fit` chose is said even where it is a default.
    fitted = [name for name, value in PRESETS.get(args.preset, {}).items() if value is None]
    changed = [f"--{name} {value}" for name, value in vars(args).items()
               if value != defaults[name] or name in fitted]
    say("options that are not the defaults: " + " ".join(changed))
    (out / "options.json").write_text(json.dumps(vars(args), indent=1))
    if args.warmup + args.cooldown > args.steps + 1:
        say(f"--warmup {args.warmup} and --cooldown {args.cooldown} are more than --steps "
            f"{args.steps}: the learning rate never reaches --lr")
    log = out / "log.jsonl"
    if log.exists():  # steps after the checkpoint are made again; the last line may be torn
        lines = [line for line in log.read_text().splitlines(keepends=True) if line[-2:] == "}\n"]
        before = [line for line in lines if json.loads(line).get("step", 0) <= start]
        log.write_text("".join(before))


def write_log(args, line):
    """Append a line to log.jsonl."""
    if get_rank() == 0:
        with open(Path(args.out) / "log.jsonl", "a") as log:
            log.write(fid.json_line(line) + "\n")


def memory_gb(device):
    """The most memory that this process has had: of the GPU, or of the process itself."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def count_parameters(net):
    """As a text, in millions."""
    return f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}M parameters"


def say(text):
    """A line of rank 0. A run outlives who reads its lines, as `| head` does not."""
    if get_rank() == 0:
        try:
            with tqdm.external_write_mode():  # above a progress bar, not into it
                print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------
# Evaluation while training

class Evaluator:
    """fid.py on all processes: figures go to log.jsonl, the best EMA weights to OUT/best."""

    def __init__(self, args, vae):
        self.args = args
        self.vae = vae
        self.best = Path(args.out) / "best"
        replaced = self.best.with_suffix(".old")
        if get_rank() == 0 and replaced.exists() and not self.best.exists():
            replaced.rename(self.best)  # killed between the two renames of `whole_folder`
        self.extractor = fid.load_extractor(args.eval_features, args.eval_resize,
                                            args.eval_inception, args.device)
        data = None if args.eval_ref else args.data
        self.reference = fid.open_reference(self.extractor, args.eval_ref, data)

    def __call__(self, ema, step, num_images):
        images = fid.generated(ema, seed=self.args.seed, vae=self.vae)
        row = fid.evaluate(images, num_images, self.extractor, self.reference)
        on_all_ranks(self.record, ema, step, row)

    def record(self, ema, step, row):
        """Rank 0's: best/ first, so that what a line of the log says has happened."""
        if get_rank() > 0:
            return
        row = {"step": step, "score": row.get("fid", row.get("fd")), **row}
        file = self.best / "score.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        # Figures of other images, features or references are no rivals.
        same = all(before.get(name) == row[name] for name in (
            "num_images", "features", "resize", "ref_sha256"))
        if step % self.args.eval_every == 0 and not (same and before["score"] <= row["score"]):
            with whole_folder(self.best) as folder:
                ema.save_pretrained(folder)
                (folder / "score.json").write_text(json.dumps(row))
        write_log(self.args, row)


# --------------------------------------------------------------------------------------------
# Checkpoints: OUT/step_N/ is config.json and model.safetensors (EMA weights, which load anywhere),
# ema_DECAY/ of further averages alike, train_state.safetensors (weights in training, AdamW's
# moments, skipped steps; as metadata step, options and digests of data and encoders; no random
# state, as draws follow from seed and step), and SHA256SUMS, for `sha256sum --check`. The newest
# two are kept: to look into a run that diverged, copy them and log.jsonl before it goes on

def save_checkpoint(run, step):
    """Written under a temporary name, synced, renamed: what is called step_N is whole."""
    if get_rank() > 0:
        return
    args = run.args
    out = Path(args.out)
    state = {"bad_steps": run.skipped}
    state |= {f"net.{name}": tensor for name, tensor in run.net.state_dict().items()}
    for i, slots in run.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{key}": tensor for key, tensor in slots.items()}
    metadata = {"step": str(step), "options": json.dumps(vars(args)),
                "data": run.stage.data.fingerprint(),
                "encoders": json.dumps(run.stage.encoder_digests)}
    with whole_folder(out / f"step_{step:08d}") as folder:
        for place, ema in zip(ema_folders(folder, args.ema_decay), run.emas):
            ema.save_pretrained(place)
        save_file(state, folder / "train_state.safetensors", metadata)
    for old in model.checkpoints(out)[2:]:
        shutil.rmtree(old)


@contextlib.contextmanager
def whole_folder(folder):
    """A folder to write into, which then gets its sums, is synced, and takes `folder`'s name."""
    partial = folder.with_suffix(".tmp")
    replaced = folder.with_suffix(".old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        write_sums(partial)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:  # each has its own way to say that a disk is full
        raise UsageError(f"{folder} could not be saved ({error}); the checkpoints before it are "
                         "untouched. Make room and run again: it resumes") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(run, folder):
    """Continue from a checkpoint. Returns the number of steps done.

    Other data, encoders or sizes would train on without a word, towards something else: refused.
    Other options, such as --lr or --steps, are what people resume for: they are said.
    """
    args = run.args
    file = folder / "train_state.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    if metadata["data"] != run.stage.data.fingerprint():
        raise UsageError(f"{folder} was trained on other data than {args.data}: remove "
                         f"{args.out}, or choose another --out")
    before = json.loads(metadata["options"])
    for name, value in sorted(vars(args).items()):
        if before.get(name, value) != value and name not in ("device", "out", "data"):
            say(f"resuming {args.out} with --{name} {value}, before {before.get(name)}")
    places = dict(zip(before["ema_decay"], ema_folders(folder, before["ema_decay"])))
    if not places.keys() >= set(args.ema_decay):
        raise UsageError(f"{folder} has no averages of --ema_decay {args.ema_decay}: resume with "
                         f"{before['ema_decay']}")
    state = load_file(file, device=args.device)
    net = {name[4:]: tensor for name, tensor in state.items() if name.startswith("net.")}
    try:
        run.net.load_state_dict(net)
        for decay, ema in zip(args.ema_decay, run.emas):
            ema.load_state_dict(load_file(places[decay] / "model.safetensors", args.device))
    except RuntimeError as error:
        raise UsageError(f"{folder} is of another model than these options build: remove "
                         f"{args.out}, or choose another --out ({one_line(error)})") from error
    encoders = json.loads(metadata.get("encoders", "null"))  # absent in older checkpoints
    if encoders is not None and encoders != run.stage.encoder_digests:
        raise UsageError(f"{folder} was trained with other weights than those of --encoder "
                         f"{' '.join(args.encoder)} now; choose another --out")
    optimizer = run.optimizer.state_dict()
    for i in range(len(run.params)):
        optimizer["state"][i] = {key: state[f"optimizer.{i}.{key}"].clone()  # not views of a file
                                 for key in ("step", "exp_avg", "exp_avg_sq")}
    run.optimizer.load_state_dict(optimizer)
    run.skipped.copy_(state["bad_steps"])
    return int(metadata["step"])


def whole_checkpoint(out):
    """The newest checkpoint that is as it was written, or None. A damaged one is set aside."""
    if get_rank() > 0:
        return None
    for folder in model.checkpoints(out):
        try:
            sums = read_sums(folder)
            names = {"model.safetensors", "train_state.safetensors", *sums}
            wrong = [name for name in names if sha256(folder / name) != sums.get(name)]
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        if not wrong:
            return folder
        damaged = folder.with_suffix(".damaged")
        say(f"{folder} is damaged ({', '.join(wrong)}): the checkpoint before it is used")
        shutil.rmtree(damaged, ignore_errors=True)
        folder.rename(damaged)
    if list(out.glob("step_*.damaged")):
        raise UsageError(f"{out} holds damaged checkpoints only: remove them, and the run starts "
                         "at step 0")
    return None


def ema_folders(folder, decays):
    """Where each average lies. The first is what sample.py and others load of a checkpoint."""
    return [folder, *(folder / f"ema_{decay}" for decay in decays[1:])]


def sync(path):
    """Wait until it is on the disk: else a power cut could leave a renamed file without content."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# --------------------------------------------------------------------------------------------
# The dry run: a recipe's step with nothing at hand

# What the presets' --data hold: kind, shape, classes.
SHAPES = {"imagenet_latents": ("latents", (4, 32, 32), 1000),
          "imagenet256": ("pixels", (3, 256, 256), 1000),
          "cifar10": ("pixels", (3, 32, 32), 10), "digits": ("pixels", (1, 8, 8), 10),
          "fashion-mnist": ("pixels", (1, 28, 28), 10)}


class RandomData(prepare_data.Dataset):
    """In place of --data: random samples, as many of a class as ImageNet has."""

    def __init__(self, folder):
        if Path(folder).name not in SHAPES:
            raise UsageError(f"--dry_run knows {', '.join(SHAPES)}, and not what {folder} holds: "
                             "give the one that is nearest as --data")
        kind, self.shape, classes = SHAPES[Path(folder).name]
        self.meta = {"kind": kind, "classes": [str(c) for c in range(classes)]}
        self.count = np.full(classes, 1281)
        self.index(np.repeat(np.arange(classes), 1281))

    def batch(self, ids, rng=None, flip=False, device="cpu"):
        return torch.randn(len(ids), *self.shape, device=device).clamp_(-1, 1)


def random_encoder(name, data, device):
    """An encoder of the sizes of a preset, of the published weights of that name, or ConvNeXt's."""
    name = name.removeprefix("hf://")
    if "convnextv2" in name:
        return model.ConvNeXtV2()
    if "resnet50" in name:
        return model.ResNet50()
    if name not in PRESETS:
        raise UsageError(f"--dry_run knows the sizes of the presets' encoders, not of {name}")
    args = parse(["--preset", name, "--dry_run", "--device", "cpu", "--crop_scale", "1"])
    args.device = device  # on which sizes may depend
    fit(args, data)
    with torch.device(device):  # two billion random numbers take a CPU a minute
        return EncoderStage(args, data).net


def random_vae(args):
    """Of the SD-VAE's sizes."""
    from diffusers import AutoencoderKL
    net = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                        down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)
    return model.VAE(net, args.vae_chunk)


def dry_run(args, data):
    """Two steps on random data: the first counts FLOPs, the second is timed.

    Nothing is predicted. Memory is what the process had in these steps, which is that of the run
    but for pictures, evaluations and, on a CPU, the pages of the data that have been read.
    """
    run = Run(args, data)
    nets = {args.stage: run.net}
    nets.update(zip(getattr(args, "encoder", []), getattr(run.stage, "encoders", [])))
    for name, net in nets.items():
        say(f"{name}: {count_parameters(net)}")
    # torch counts attention's FLOPs under the names that it has on a GPU.
    aten = torch.ops.aten
    name = "_scaled_dot_product_flash_attention"
    for end in ("", "_backward"):
        on_cpu = getattr(aten, f"{name}_for_cpu{end}")
        flop_registry[on_cpu] = flop_registry[getattr(aten, name + end)]
    counter = FlopCounterMode(display=False)
    with counter, torch.compiler.set_stance("force_eager"):
        run.update(run.stage.batch(0), 0)
    if args.compile:
        run.update(run.stage.batch(1), 1)
    began = time.time()
    run.update(run.stage.batch(2), 2)
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.time() - began
    flops = counter.get_total_flops()
    say(f"a step: {flops * world_size() / 1e12:.4g} TFLOP on {world_size()} process(es), "
        f"{seconds:.3g} s, {flops / seconds / 1e12:.3g} TFLOP/s of each; random data are drawn "
        "in it and reals encoded, as a run on few images does only once")
    say(f"memory of a process: {memory_gb(args.device):.2f} GB")
    say(f"{args.steps} steps: {seconds * args.steps / 3600:.2f} h, without pictures, evaluations "
        "and checkpoints")


if __name__ == "__main__":
    run_script(main)
