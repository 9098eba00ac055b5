"""Train the encoder (ResNet-MAE, A.3) and the generator (drifting, A.8-A.9): one parser, one loop, two stages.

    python train.py --preset digits                                    # data, encoder, generator: minutes on a laptop
    torchrun --nproc_per_node 8 train.py --preset cifar10              # the same script on any number of processes
    python train.py --preset digits --gen 32 --out runs/more_samples   # a preset, changed
    python train.py --preset latent_L --dry_run                        # a step on random data: memory, FLOPs, hours

OUT/ gets step_*/ (EMA weights that sample.py and others load, and all that resuming needs), samples_*.png, log.jsonl and
options.json. The same command again resumes. What a step draws depends on (seed, step) alone, not on the processes.
"""
import argparse
import contextlib
import copy
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

import drift
import model
import prepare_data
import sample

# What the paper's recipes share (A.3, A.8, Table 8). They are as the release has them; where each of its 16 to 32 hosts
# pushes 64 to 128 samples a step, --push is the sum.
LATENT = dict(stage="generator", data="data/imagenet_latents", encoder=["hf://mae_latent_640"], flip=True)
PIXEL = dict(stage="generator", data="data/imagenet256", patch_size=16, attn_fp32=True, flip=True, crop_scale=0.2,
             encoder=["hf://mae_pixel_640", "hf://facebook/convnextv2-base-22k-224"])
MAE = dict(stage="encoder", data="data/imagenet256", crop_scale=0.2, batch_size=8192, lr=4e-3, warmup=4000,
           ema_decay=[0.9995])

# What differs from the defaults of the options below. A row ends with what it reached: the paper's FID (the release's).
PRESETS = {
    "latent_ablation": LATENT | dict(encoder=["hf://mae_latent_256"], attn_fp32=True,
        model="B", labels=64,  pos=64,  uncond=16, alpha_power=3, alpha_fixed=0.0, push=1024,
        lr=2e-4, weight_decay=0.01, warmup=5000,  steps=30000),                                                 # 8.46 (8.49)
    "latent_B": LATENT | dict(  # Table 8 has 128 positives
        model="B", labels=128, pos=64,  uncond=32, alpha_power=5, alpha_fixed=0.0, push=2048,
        lr=4e-4, weight_decay=0.0,  warmup=10000, steps=200000),                                                # 1.75 (1.74)
    "latent_L": LATENT | dict(
        model="L", labels=128, pos=64,  uncond=32, alpha_power=3, alpha_fixed=0.5, push=2048,
        lr=4e-4, weight_decay=0.01, warmup=10000, steps=200000),                                                # 1.54 (1.53)
    "pixel_B": PIXEL | dict(
        model="B", labels=128, pos=128, uncond=32, alpha_power=5, alpha_fixed=0.0, push=2048,
        lr=2e-4, weight_decay=0.01, warmup=10000, steps=100000),                                                # 1.76 (1.73)
    "pixel_L": PIXEL | dict(
        model="L", labels=128, pos=128, uncond=32, alpha_power=5, alpha_fixed=0.0, push=2048,
        lr=4e-4, weight_decay=0.01, warmup=10000, steps=100000),                                                # 1.61 (1.62)
    # Encoders. FID of a generator in their features: Table 3's (for pixels with ConvNeXt-V2), and the best row above.
    "mae_latent_256": MAE | dict(base_channels=256, steps=30000,  to_latents=True),                             # 8.46 (8.49)
    "mae_latent_640": MAE | dict(base_channels=640, steps=200000, to_latents=True, cls_steps=3000),             # 3.36 (1.53)
    "mae_pixel_640":  MAE | dict(base_channels=640, steps=200000, input_patch_size=8, cls_steps=3000),          # 3.70 (1.62)
    "digits_encoder": dict(stage="encoder", data="data/digits", input_patch_size=2, base_channels=64, layers=[1, 1, 1],
                           batch_size=128, steps=300, lr=2e-3, warmup=50, cls_steps=120, cls_ramp=50, ema_decay=[0.99],
                           sample_every=150, save_every=100),
    "digits": dict(stage="generator", data="data/digits", encoder=["digits_encoder"], model="XS", patch_size=4, labels=10,
                   gen=24, pos=48, uncond=12, alpha_power=2, steps=900, lr=2.5e-3, warmup=30, cooldown=620, ema_decay=[0.99],
                   reals="index", sample_every=100, save_every=150),
    # For one modern GPU and about an hour, by arithmetic; not run yet.
    "cifar10_encoder": dict(stage="encoder", data="data/cifar10", base_channels=64, batch_size=512, steps=8000, lr=1e-3,
                            warmup=500, crop_scale=0.2, cls_steps=3000, ema_decay=[0.999], save_every=2000),
    "cifar10": dict(stage="generator", data="data/cifar10", encoder=["cifar10_encoder"], model="S", labels=16, gen=64,
                    pos=64, uncond=16, steps=10000, lr=4e-4, warmup=500, flip=True, ema_decay=[0.999]),
    # For two CPU cores: shows progress, not more.
    "cifar10_cpu_encoder": dict(stage="encoder", data="data/cifar10", input_patch_size=2, base_channels=32, layers=[1, 1, 1],
                                batch_size=64, steps=400, lr=1e-3, warmup=50, cls_steps=200, cls_ramp=50, ema_decay=[0.99],
                                sample_every=200, save_every=200),
    "cifar10_cpu": dict(stage="generator", data="data/cifar10", encoder=["cifar10_cpu_encoder"], model="XS", patch_size=4,
                        labels=4, gen=16, pos=16, uncond=8, push=64, steps=1000, lr=1e-3, warmup=50, flip=True,
                        ema_decay=[0.99], sample_every=50, save_every=100),
}
# The same global batch on one node of eight GPUs and on one of 80 GB, 8 labels at a time: 36 and 33 GB by --dry_run.
PRESETS["latent_ablation_8gpu"] = PRESETS["latent_ablation"] | dict(checkpoint_blocks=True)                     # not run yet
PRESETS["latent_ablation_1gpu"] = PRESETS["latent_ablation"] | dict(checkpoint_blocks=True, micro_batches=8)    # not run yet


def build_parser(preset=None):
    """All options on one screen. Groups say which stage reads them; one given to the other stage is an error."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=type(
        "Formatter", (argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter), {}))
    g = parser.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, help="a row of PRESETS; other options override it")
    g.add_argument("--stage", choices=("encoder", "generator"), default="generator", help="what is trained")
    g.add_argument("--data", help="folder written by prepare_data.py; its split `train` is used")
    g.add_argument("--out", help="run folder (None: runs/PRESET)")
    g.add_argument("--seed", type=int, default=0, help="with the step, all that randomness depends on")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="networks compute "
                   "in bfloat16; master weights, statistics and the drift loss stay float32")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g.add_argument("--micro_batches", type=int, default=1, help="parts in which a process takes its share of a step: the "
                   "same loss and gradients in less memory; the generator then needs two more forward passes")
    g.add_argument("--dry_run", action="store_true", help="a few steps on random data of the recipe's shape, with random "
                   "encoders: prints parameters, FLOPs, memory and time; needs no data, writes nothing")
    g.add_argument("--init_from", help="weights to start from: whatever --ckpt of sample.py takes, of the same sizes")
    g.add_argument("--no_converted_copy", action="store_true", help="keep no safetensors copy of published weights")
    g.add_argument("--log_every", type=int, default=10, help="steps between lines of log.jsonl")
    g.add_argument("--sample_every", type=int, default=1000, help="steps between pictures")
    g.add_argument("--save_every", type=int, default=1000, help="steps between checkpoints; the last two are kept")
    g.add_argument("--tensorboard", action="store_true", help="log there too, in OUT/ (pip install tensorboard)")
    g.add_argument("--wandb", action="store_true", help="log there too (pip install wandb)")
    g = parser.add_argument_group("real images")
    g.add_argument("--crop_scale", type=float, default=1.0, help="random resized crops of at least this area (paper: 0.2)")
    g.add_argument("--vae", default="hf://stabilityai/sd-vae-ft-mse", help="between pixels and latents, here or on the Hub")
    g.add_argument("--vae_chunk", type=int, default=16, help="images in it at a time: bounds its memory")
    g = parser.add_argument_group("optimisation (Table 8)")
    g.add_argument("--steps", type=int, default=30000, help="length of the run")
    g.add_argument("--lr", type=float, default=2e-4, help="AdamW's rate, constant after the warm-up")
    g.add_argument("--warmup", type=int, default=5000, help="steps of linear warm-up from 1e-6")
    g.add_argument("--cooldown", type=int, default=0, help="last steps, in which the rate falls linearly to zero")
    g.add_argument("--weight_decay", type=float, default=0.01, help="on all parameters")
    g.add_argument("--clip", type=float, default=2.0, help="largest norm of the gradient")
    g.add_argument("--ema_decay", type=float, nargs="+", default=[0.999], help="of the averaged weights: the first are "
                   "those used, others are kept beside them in step_*/ema_DECAY")
    g.add_argument("--max_bad_steps", type=int, default=10, help="skipped steps in a row, for a loss or gradient that "
                   "is not finite, after which the run stops")
    g = parser.add_argument_group("stage encoder (A.3)")
    g.add_argument("--base_channels", type=int, default=256, help="width of the first stage; doubles at each stage")
    g.add_argument("--layers", type=int, nargs="+", default=[3, 4, 6, 3], help="residual blocks of each stage")
    g.add_argument("--input_patch_size", type=int, default=1, help="pixel models patchify first (256 pixels: 8)")
    g.add_argument("--batch_size", type=int, default=8192, help="images a step, over all processes")
    g.add_argument("--to_latents", action="store_true", help="encode crops of pixels by --vae: an encoder of latents")
    g.add_argument("--cls_steps", type=int, default=0, help="last steps, which fine-tune with a classifier")
    g.add_argument("--cls_weight", type=float, default=0.1, help="lam of loss = lam CE + (1 - lam) reconstruction")
    g.add_argument("--cls_ramp", type=int, default=1000, help="steps in which lam rises from 0")
    g = parser.add_argument_group("stage generator (A.8)")
    g.add_argument("--encoder", nargs="+", help="whose features samples drift in, one or several: a run, checkpoint or "
                   "artifact folder, hf://..., or a preset (then runs/PRESET, trained first where it is missing)")
    g.add_argument("--pixel_encoder", action="store_true", help="of a generator of latents: the encoder sees decoded "
                   "samples, gradients pass through the decoder (sec. 4)")
    g.add_argument("--model", choices=model.GENERATOR_SIZES, default="B", help="size of the generator")
    g.add_argument("--patch_size", type=int, default=2, help="of the generator's tokens")
    g.add_argument("--attn_fp32", action="store_true", help="attention in float32")
    g.add_argument("--checkpoint_blocks", action="store_true", help="recompute activations: 1/20 of the memory")
    g.add_argument("--labels", type=int, default=64, help="class labels a step, Nc, over all processes")
    g.add_argument("--gen", type=int, default=64, help="generated samples a label, G")
    g.add_argument("--pos", type=int, default=64, help="real samples a label, N_pos")
    g.add_argument("--uncond", type=int, default=16, help="real samples of any class a label, N_unc")
    g.add_argument("--alpha_power", type=float, default=3.0, help="k of p(alpha) ~ alpha^-k on [1, 4]")
    g.add_argument("--alpha_fixed", type=float, default=0.0, help="share of labels whose alpha is 1")
    g.add_argument("--reals", choices=("queue", "index"), default="queue", help="positives from queues of the latest "
                   "samples (the paper's), or from the whole class")
    g.add_argument("--push", type=int, default=1024, help="fresh samples pushed into the queues each step")
    g.add_argument("--flip", action="store_true", help="mirror real images at random")
    g.add_argument("--eval_every", type=int, default=0, help="steps between evaluations of the EMA weights; 0: none")
    g.add_argument("--eval_images", type=int, default=10000, help="generated images an evaluation")
    g.add_argument("--eval_features", default="inception", help="inception (FID), pixels or encoder:CKPT (FD)")
    g.add_argument("--eval_ref", help="statistics file, as --ref of fid.py (None: made of --data's images at the start)")
    g.add_argument("--eval_resize", choices=("tf1", "half"), default="tf1", help="of Inception's input: as ADM, as the paper")
    g.add_argument("--eval_inception", help="Inception's weights (None: downloaded)")
    g.add_argument("--kernel", choices=("both", "targets", "none"), default="both", help="Table 11: normalised over")
    g.add_argument("--attraction", type=float, default=1.0, help="Table 1: multiplies V+")
    g.add_argument("--repulsion", type=float, default=1.0, help="Table 1: multiplies V-")
    if preset:
        parser.set_defaults(**copy.deepcopy(PRESETS[preset]))
    return parser


def parse(argv):
    """default < preset < command line. An option that this stage would not read is an error, not a surprise."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    preset = first.parse_known_args(argv)[0].preset
    parser = build_parser(preset if preset in PRESETS else None)
    args = parser.parse_args(argv)
    for group in parser._action_groups:
        if (group.title or "").startswith("stage ") and group.title.split()[1] != args.stage:
            for action in group._group_actions:
                if any(word.split("=")[0] in action.option_strings for word in argv):
                    parser.error(f"{action.option_strings[0]} is not read in stage {args.stage}")
                delattr(args, action.dest)
    given = {word.split("=")[0] for word in argv}
    if args.stage == "generator":
        if args.reals == "index" and "--push" in given:
            parser.error("--push is read with --reals queue only")
        evaluation = given & {"--eval_images", "--eval_features", "--eval_ref", "--eval_resize", "--eval_inception"}
        if evaluation and not args.eval_every:
            parser.error(f"{', '.join(sorted(evaluation))} are read with --eval_every only")
        if args.eval_features != "inception" and given & {"--eval_resize", "--eval_inception"}:
            parser.error("--eval_resize and --eval_inception are read with --eval_features inception only")
    if args.stage == "encoder" and not args.cls_steps and given & {"--cls_weight", "--cls_ramp"}:
        parser.error("--cls_weight and --cls_ramp are read with --cls_steps only")
    ranges = {0: "uncond cooldown warmup eval_every cls_steps weight_decay seed", 1: "steps log_every sample_every save_every "
              "batch_size labels gen pos push micro_batches max_bad_steps vae_chunk eval_images base_channels input_patch_size "
              "patch_size cls_ramp layers"}
    for least, keys in ranges.items():
        for key in keys.split():
            value = getattr(args, key, least)
            if min(value if isinstance(value, list) else [value]) < least:
                parser.error(f"--{key} must be at least {least}")
    for key in ("crop_scale", "ema_decay", "alpha_fixed", "cls_weight"):
        value = getattr(args, key, 0.5)
        if not all(0 <= x <= 1 for x in (value if isinstance(value, list) else [value])) or key == "crop_scale" and value == 0:
            parser.error(f"--{key} is a share of 1")
    if args.lr <= 0 or args.clip <= 0:
        parser.error("--lr and --clip must be more than 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here")
    if args.out is None:
        if args.preset is None:
            parser.error("--out is needed without a preset")
        args.out = f"runs/{args.preset}"
    if args.data is None or (args.stage == "generator" and args.encoder is None):
        parser.error("--data (and for the generator --encoder) is needed")
    return args


# ------------------------------------------------------------------------------------------------------------------
# The two stages: a network; `batch(step)`, this process's share of a step's global batch; and `backward(batch, step)`, which
# adds to the network's parameters the gradients of the mean loss over it, and returns (that loss, what to log)

class EncoderStage:
    """Masked autoencoding (A.3): half of the 2x2 patches hidden, L2 on them; at the end a little cross-entropy."""

    def __init__(self, args, data):
        self.args, self.data = args, data
        self.latents = data.meta["kind"] == "latents"
        self.online = args.to_latents and not self.latents  # images go through the VAE in every step
        self.cropped = args.crop_scale < 1 and not self.latents
        if self.latents and args.crop_scale < 1 and data.meta.get("views") != "crops":
            raise ValueError(f"{args.data} holds latents of whole images, and the crops of --crop_scale are taken before the VAE "
                             "(A.3): give the images, or latents prepared with --crops")
        parts, h = world_size() * args.micro_batches, data.shape[1] // (8 if self.online else 1)
        factor = args.input_patch_size * 2 ** (len(args.layers) - 1)
        if args.batch_size % parts or h % factor or h // args.input_patch_size % 2:
            raise ValueError(f"--batch_size must be divisible by {parts} (processes times --micro_batches), and images of "
                             f"{h} pixels by {factor} and twice --input_patch_size")
        self.net = self.network(args, data)
        self.forward = torch.compile(self.net) if args.compile else self.net
        self.vae = open_vae(args) if self.online else None

    @staticmethod
    def network(args, data):
        return model.MAE(in_channels=4 if args.to_latents else data.shape[0], base_channels=args.base_channels,
                         layers=args.layers, input_patch_size=args.input_patch_size, num_classes=data.num_classes)

    def batch(self, step, most=None):
        """This process's images, labels and masks of a step, or the first few. Latents are drawn, each from a stream."""
        args, n, share = self.args, self.args.batch_size, self.args.batch_size // world_size()
        rng = np.random.default_rng([args.seed, step])
        ids = self.data.fresh(step * n, n, args.seed)
        crops, flips = random_crops(n, args.crop_scale, rng), rng.random(n) < (0.5 if self.cropped else 0)
        grid = self.data.shape[1] // (8 if self.vae else 1) // args.input_patch_size // self.net.patch_size
        mask = (rng.random((n, grid, grid)) < 0.5).astype(np.float32)
        mine = np.arange(share * get_rank(), share * (get_rank() + 1))[:most]
        seeds = rng.integers(1 << 63, size=n)[mine]  # of latents, drawn anew at every visit
        x = self.data.batch(ids[mine], seeds, flip=self.latents, device=args.device)
        if self.cropped:
            x = crop_resize(x, crops[mine], flips[mine])
        if self.vae:
            mean, std = self.vae.encode(x)
            noise = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
            x = mean + std * torch.stack(noise).to(std)
        return x, prepare_data.upload(self.data.labels[ids[mine]], args.device), prepare_data.upload(mask[mine], args.device)

    def backward(self, batch, step):
        args, M = self.args, self.args.micro_batches
        lam, total, logs = args.cls_weight * min(1, max(0, step - (args.steps - args.cls_steps)) / args.cls_ramp), 0, {}
        for part in zip(*(t.tensor_split(M) for t in batch)):  # a plain mean: parts add up
            labels = part[1]
            with autocast(args):
                _, logits, error, cross_entropy = self.forward(part[0], part[2], labels)
            found = {"reconstruction": error.mean(), "cross_entropy": cross_entropy.mean(),
                     "accuracy": (logits.argmax(1) == labels).float().mean(), "lam": lam}
            loss = (lam * cross_entropy.mean() + (1 - lam) * error.mean()) / M
            loss.backward()
            total += loss.detach()
            logs = {key: logs.get(key, 0) + value / M for key, value in found.items()}
        return total, logs

    def preview(self, ema):
        """Pictures of a few images: as they are, with half hidden, and reconstructed. Returns uint8 images, columns."""
        x, labels, mask = self.batch(0, most=10)
        recon = ema(x, mask, labels)[0]
        p = ema.input_patch_size
        recon = rearrange(recon, "n (p q c) h w -> n c (h p) (w q)", p=p, q=p)
        hidden = F.interpolate(mask[:, None], x.shape[2:])
        rows = torch.cat([x, x * (1 - hidden), x * (1 - hidden) + recon * hidden])
        return sample.to_uint8((self.vae.decode(rows) if self.vae else rows[:, :3]).cpu()), len(x)


KNOWN_BYTES = 1 << 30  # what the features of all real images may take where they are kept


class GeneratorStage:
    """The drifting step (A.8): draw labels, guidance and reals; generate; compare in feature space; move the samples."""

    def __init__(self, args, data):
        self.args, self.data = args, data
        if args.labels % (world_size() * args.micro_batches):
            raise ValueError(f"--labels {args.labels} must be divisible by {world_size() * args.micro_batches}, the number "
                             "of processes times --micro_batches")
        if args.uncond > (1000 if args.reals == "queue" else len(data)):
            raise ValueError(f"--uncond {args.uncond}: the queue of all classes holds 1000, {args.data} {len(data)} images")
        if data.count.min() < args.pos:
            raise ValueError(f"--pos {args.pos}: class {data.meta['classes'][data.count.argmin()]} of {args.data} has "
                             f"{data.count.min()} images")
        if args.reals == "queue" and args.pos > 128:
            raise ValueError(f"--pos {args.pos}: a class's queue holds 128; use --reals index")
        c, latents = data.shape[0], data.meta["kind"] == "latents"
        if (args.pixel_encoder and not latents) or (args.crop_scale < 1 and latents):
            raise ValueError(f"{args.data} holds {data.meta['kind']}: --pixel_encoder is for latents, --crop_scale for "
                             "pixels")
        if data.meta.get("views") == "crops":
            raise ValueError(f"{args.data} holds random crops, which are for encoders: prepare latents without --crops")
        self.net = self.network(args, data)
        self.net.checkpoint_blocks = args.checkpoint_blocks
        self.vae = open_vae(args) if latents and (args.pixel_encoder or not args.dry_run) else None
        self.encoders = torch.nn.ModuleList(random_encoder(name, data) if args.dry_run else
                                            model.load_encoder(name, not args.no_converted_copy) for name in args.encoder)
        for encoder in self.encoders:
            if isinstance(encoder, model.MAE):
                del encoder.decoder, encoder.fc  # a fifth of it, and not looked through
        self.encoders.eval().requires_grad_(False).to(args.device, torch.bfloat16 if args.bf16 else torch.float32,
                                                      memory_format=torch.channels_last)
        for name, encoder in zip(args.encoder, self.encoders):
            if encoder.in_channels != (3 if args.pixel_encoder else c):
                raise ValueError(f"--encoder {name} takes {encoder.in_channels} channels, the samples have {c}" + (
                    "; an encoder of pixels needs --pixel_encoder" if latents else ""))
        self.forward, self.encode = self.net, [encoder.features for encoder in self.encoders]
        self.known = self.features_of_all() if not (latents or args.flip or args.crop_scale < 1 or args.dry_run) else None
        if args.compile:
            self.forward, self.encode = torch.compile(self.net), [torch.compile(encode) for encode in self.encode]
        self.queue = self.filled_queue() if args.reals == "queue" else None

    @staticmethod
    def network(args, data):
        return model.Generator(input_size=data.shape[1], in_channels=data.shape[0], patch_size=args.patch_size,
                               num_classes=data.num_classes, attn_fp32=args.attn_fp32, **model.GENERATOR_SIZES[args.model])

    def filled_queue(self):
        """Queues start full. They hold ids, and every process pushes the same ones: queues are equal everywhere.

        So a step is the same on any number of processes, and a queue is as fresh as --push makes it. The release has a
        queue of its own on each host, which takes the pushes of that host alone: as old as --push / hosts, and a label's
        positives depend on the host that it falls on.
        """
        queue, rng = drift.SampleQueue(self.data.num_classes), np.random.default_rng([self.args.seed, 1 << 32])
        for label, count in enumerate(self.data.count):
            self.push(queue, self.data.draw(label, min(count, queue.ids.shape[1]), rng))
        self.push(queue, self.data.fresh(0, queue.any_ids.shape[0], self.args.seed))
        return queue

    def push(self, queue, ids):
        queue.push(torch.from_numpy(ids), torch.from_numpy(self.data.labels[ids]))

    def batch(self, step):
        """This process's labels, alphas, noise, styles and real samples of a step (their ids, where all features are known),
        each label from its own stream; and the queue's state then, for a checkpoint: the next batch is being made while
        this one is trained on."""
        args, net = self.args, self.net
        n = max(args.push, args.labels) if self.queue else args.labels
        fresh = self.data.fresh(step * n, n, args.seed)
        if self.queue:
            self.push(self.queue, fresh)
        labels = self.data.labels[fresh[:args.labels]]  # those of random images: in proportion to the data
        per_process = args.labels // world_size()
        alpha, noise, style, pos, uncond = [], [], [], [], []
        for slot in range(per_process * get_rank(), per_process * (get_rank() + 1)):
            rng = np.random.default_rng([args.seed, step, slot])
            stream = torch.Generator(args.device).manual_seed(int(rng.integers(1 << 63)))
            alpha.append(drift.sample_alpha(1, args.alpha_power, args.alpha_fixed, rng))
            noise.append(torch.randn(args.gen, net.in_channels, net.input_size, net.input_size, generator=stream,
                                     device=args.device))
            style.append(torch.randint(net.noise_classes, (args.gen, net.noise_coords), generator=stream,
                                       device=args.device))
            source = self.queue or self.data
            ids = np.concatenate([source.draw(labels[slot], args.pos, rng), source.draw_any(args.uncond, rng)])
            reals = (prepare_data.upload(ids, args.device) if self.known else
                     self.data.batch(ids, rng, args.flip, args.device))
            if args.crop_scale < 1:
                reals = crop_resize(reals, random_crops(len(ids), args.crop_scale, rng), np.zeros(len(ids), bool))
            pos.append(reals[:args.pos]), uncond.append(reals[args.pos:])
        mine = prepare_data.upload(labels[per_process * get_rank():][:per_process], args.device)
        state = {name: value.clone() for name, value in self.queue.state_dict().items()} if self.queue else {}
        alpha = prepare_data.upload(np.concatenate(alpha), args.device)
        return mine, alpha, torch.cat(noise), torch.cat(style), torch.cat(pos), torch.cat(uncond), state

    def features(self, x, labels):
        """Samples [labels * n, c, h, w] -> {name: [labels, n, T, C]}: the samples themselves and the encoders' features."""
        found = {"global": rearrange(x, "n c h w -> n 1 (h w c)")}
        if self.args.pixel_encoder:  # of reals too: their originals would differ from any latent's image
            x = self.vae.decode(x)
        for encode in self.encode:
            found.update(encode(x))
        return {name: f.unflatten(0, (labels, -1)) for name, f in found.items()}

    @torch.no_grad()
    def features_of_all(self):
        """Where images stay as they are, the encoders need see each only once, not in every step: {name: [N, T, C]}, or
        None where that would take more than KNOWN_BYTES."""
        def features(ids):
            return {name: f[0] for name, f in self.features(self.data.batch(ids, device=self.args.device), 1).items()}
        if len(self.data) * sum(f.nbytes for f in features([0]).values()) > KNOWN_BYTES:
            return None
        parts = [features(ids) for ids in np.split(np.arange(len(self.data)), range(256, len(self.data), 256))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def features_of_reals(self, reals, labels):
        """Of images [labels * n, c, h, w], or of ids [labels * n] where all features are known."""
        if self.known is None:
            return self.features(reals, labels)
        return {name: f[reals].unflatten(0, (labels, -1)) for name, f in self.known.items()}

    def generate(self, labels, alpha, noise, style):
        with autocast(self.args):
            return self.forward(noise, labels.repeat_interleave(self.args.gen), alpha.repeat_interleave(self.args.gen), style)

    def loss(self, x, labels, alpha, pos, uncond, reduce):
        """Mean loss of some labels' samples, whose normalisers are those of `reduce`, and the infos of drift_loss."""
        args, n = self.args, len(labels)
        gen = self.features(x, n)
        with torch.no_grad():  # reals need no gradient, and no memory for one
            pos, uncond = self.features_of_reals(pos, n), self.features_of_reals(uncond, n) if args.uncond else None
        weight = drift.unconditional_weight(alpha, args.gen, args.uncond) if args.uncond else None
        loss, _, infos = drift.feature_drift_loss(gen, pos, uncond, weight, kernel=args.kernel, attraction=args.attraction,
                                                  repulsion=args.repulsion, reduce=reduce)
        return loss, infos

    def backward(self, batch, step):
        """One pass; with micro-batches in phases, so that the loss stays that of the whole global batch.

        A feature's loss needs two sums over that batch, the second scaled by the first (A.6). Passes without gradients
        collect them; then each part's gradient goes through the encoder to its samples, and from these through the
        generator. So memory is that of one micro-batch, and of one network at a time, however many labels there are. To keep
        the features instead would spare two passes through the encoder, and take 63 GB for the ablation's 64 labels.
        """
        M, total = self.args.micro_batches, 0
        *batch, self.queue_state = batch
        if M == 1:
            labels, alpha, noise, style, pos, uncond = batch
            loss, infos = self.loss(self.generate(labels, alpha, noise, style), labels, alpha, pos, uncond, all_reduce)
            loss.backward()
            return loss.detach(), self.mean_of(infos)
        parts, sums = list(zip(*(t.tensor_split(M) for t in batch))), BatchSums()
        with torch.no_grad():
            samples = [self.generate(*part[:4]) for part in parts]
            for _ in range(2):
                for x, (labels, alpha, _, _, pos, uncond) in zip(samples, parts):
                    self.loss(x, labels, alpha, pos, uncond, sums.next_part())
                sums.complete()
        for x, (labels, alpha, noise, style, pos, uncond) in zip(samples, parts):
            loss, infos = self.loss(x.requires_grad_(), labels, alpha, pos, uncond, sums.next_part())
            (loss / M).backward()
            self.generate(labels, alpha, noise, style).backward(x.grad)
            total += loss.detach() / M
        return total, self.mean_of(infos)

    @staticmethod
    def mean_of(infos):
        return {key: torch.stack([info[key] for info in infos.values()]).mean() for key in infos["global"]}

    def preview(self, ema):
        """A grid with one column a class, always of the same noise. Returns uint8 images, columns."""
        columns = min(10, ema.num_classes)
        images = sample.generate(ema, np.arange(8 * columns) % columns, np.arange(8 * columns), vae=self.vae)
        return sample.to_uint8(images), columns


class BatchSums:
    """`reduce` of drift_loss for a global batch that is never in memory as a whole: two calls a feature, in their order."""

    def __init__(self):
        self.known, self.found, self.calls = [], {}, 0  # of the first calls, then of the second: each feature's sums

    def next_part(self):
        self.calls = 0
        return self

    def __call__(self, sums):
        feature, which = divmod(self.calls, 2)
        self.calls += 1
        if which < len(self.known):
            return self.known[which][feature]
        if which == len(self.known):
            self.found[feature] = self.found.get(feature, 0) + sums
        return sums  # of this part alone: what follows from them is not used

    def complete(self):
        """All parts were seen: add up over the processes, all features at once."""
        whole = all_reduce(torch.cat(list(self.found.values())))
        self.known.append(whole.split([len(sums) for sums in self.found.values()]))
        self.found = {}


def autocast(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def random_crops(n, min_area, rng):
    """Random resized crops: [n, 4] of centre x, y and half-sizes in [-1, 1] coordinates; aspect ratios 3/4 to 4/3."""
    area, ratio = rng.uniform(min_area, 1, n), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), n))
    half = np.minimum(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1), 1)
    centre = rng.uniform(-1, 1, (n, 2)) * (1 - half)
    return np.concatenate([centre, half], 1)


def crop_resize(x, crops, flips):
    """Cut the crops out of x [n, c, h, w] in [-1, 1] and resize them to h x w (bicubic), mirrored where flips says so."""
    cx, cy, hx, hy = prepare_data.upload(crops, x.device).to(x.dtype).unbind(1)
    hx = torch.where(prepare_data.upload(flips, x.device), -hx, hx)
    zero = torch.zeros_like(cx)
    theta = torch.stack([torch.stack([hx, zero, cx], 1), torch.stack([zero, hy, cy], 1)], 1)     # n 2 3
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, "bicubic", "border", align_corners=False).clamp_(-1, 1)


# ------------------------------------------------------------------------------------------------------------------
# The loop

def main(argv):
    args = parse(argv)
    if args.device == "cuda":  # by its number, since the thread that makes batches has a current device of its own
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if args.dry_run:
        return dry_run(args)
    if args.data == "data/digits":
        together(lambda: get_rank() == 0 and prepare_data.prepare("digits", args.data))
    for i, name in enumerate(getattr(args, "encoder", ())):
        if name in PRESETS:  # train it first; one of latents on pixels, not on this stage's data
            own = PRESETS[name]["data"] if PRESETS[name].get("to_latents") else args.data
            main(["--preset", name, "--data", own, "--device", args.device, "--seed", str(args.seed),
                  "--bf16" if args.bf16 else "--no-bf16", *(["--vae", args.vae] if PRESETS[name].get("to_latents") else []),
                  *(["--compile"] if args.compile else [])])
            args.encoder[i] = f"runs/{name}"
    with together(claim, Path(args.out)):
        run(args)


def set_up(args, data, stop):
    """Returns what a checkpoint holds (weights, averages, optimizer, counts, the stage's queues), and what makes a step."""
    torch.manual_seed(args.seed)  # initial weights; everything later is seeded by its step
    stage = together(EncoderStage if args.stage == "encoder" else GeneratorStage, args, data)
    if args.init_from and not args.dry_run and model.latest_checkpoint(args.out) is None:
        together(start_from, args.init_from, stage.net, args)
    net = stage.net.to(args.device).train()
    emas = [stage.network(args, data).to(args.device).eval().requires_grad_(False) for _ in args.ema_decay]
    for ema in emas:
        ema.load_state_dict(net.state_dict())
    params, ema_params = list(net.parameters()), [list(ema.parameters()) for ema in emas]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay, fused=True)
    bad_steps = torch.zeros(2, dtype=torch.long, device=args.device)  # in a row, in all

    def update(batch, step):
        """One step: gradients of all micro-batches and processes, clipped, AdamW, averages. It waits for no GPU."""
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, logs = stage.backward(batch, step)
        loss, stopping = average(params, loss, stop.asked)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
        bad = ~torch.isfinite(loss + norm)  # the same on every process
        bad_steps.add_(bad)[0].mul_(bad)
        optimizer.found_inf = bad.float()  # the fused kernel then leaves weights and moments as they are
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The average's memory grows with the run, so that the first weights are forgotten in short runs too.
        with torch.no_grad():
            for decay, average_params in zip(args.ema_decay, ema_params):
                torch._foreach_lerp_(average_params, params, 1 - min(decay, (step + 1) / (step + 10)))
        return {"lr": lr, "loss": loss, "norm": norm, **logs}, read_later(torch.stack([stopping, bad_steps[0]]))

    return dict(net=net, emas=emas, optimizer=optimizer, bad_steps=bad_steps, stage=stage), update


def run(args):
    out, main_process, stop = Path(args.out), get_rank() == 0, Stop()
    data = together(prepare_data.Dataset, args.data)
    state, update = set_up(args, data, stop)
    stage, emas, bad_steps = state["stage"], state["emas"], state["bad_steps"]
    folder = gather(together(whole_checkpoint, out))[0]  # one process looks for all
    start = together(load_checkpoint, folder, args, **state) if folder else 0
    evaluates = args.stage == "generator" and args.eval_every
    missed = evaluates and start and start % args.eval_every == 0 and not gather(evaluated(out, start))[0]
    if start >= args.steps and not missed:
        log_line(f"{out} has its {args.steps} steps already")
        return
    log = together(open_log, args, sum(p.numel() for p in stage.net.parameters()), data, start)
    evaluator = Evaluator(args, stage.vae, log) if evaluates else None
    if missed:  # what this checkpoint was saved for was interrupted
        evaluator(emas[0], start, args.eval_images)
    from tqdm import tqdm
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.out, disable=not main_process,
                    mininterval=1)
    batches = prepare_data.prefetch(stage.batch, range(start, args.steps))
    began, waited, before = time.time(), 0, lambda: (0, 0)
    signal.signal(signal.SIGTERM, stop)
    for step in progress:
        asked = time.time()
        batch = next(batches)
        waited += time.time() - asked
        values, status = update(batch, step)
        done, (stopping, bad_in_row), before = step + 1, before(), status  # of the step before, which is over by now
        if bad_in_row >= args.max_bad_steps:
            raise Shared(f"step {step}: loss or gradient was not finite {bad_in_row:.0f} times in a row; nothing of it was "
                         f"kept. The last checkpoint is {model.latest_checkpoint(out)}: lower --lr or raise --warmup, and "
                         "run again")
        if done % args.log_every == 0 or done in (1, args.steps):
            values = {key: mean_over_processes(value, args.device) for key, value in values.items()}
            if main_process:
                log({"step": done, "seconds": round(time.time() - began, 2), "waited_for_data": round(waited, 2), **values,
                     "skipped": bad_steps[1].item()})
                progress.set_postfix_str(f"loss {values['loss']:.3f}")
        if main_process and (done % args.sample_every == 0 or done in (1, args.steps)):
            with torch.no_grad():
                sample.save_grid(*stage.preview(emas[0]), out / f"samples_{done:08d}.png")
        evaluate = evaluator and (done % args.eval_every == 0 or done == 1)
        if main_process and (done % args.save_every == 0 or done == args.steps or stopping or evaluate and done > 1):
            save_checkpoint(out, done, args, **state)
        if stopping:
            barrier()
            log_line(f"{out}: stopped by SIGTERM after step {done}, which is saved; the same command resumes")
            raise SystemExit(0)
        if evaluate:  # at step 1 few images, so that it fails at once if at all
            with stop.saved():
                evaluator(emas[0], done, args.eval_images if done % args.eval_every == 0 else 100)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    barrier()
    log_line(f"{out}: {args.steps} steps; weights in {model.latest_checkpoint(out)}, "
             f"pictures in {out}/samples_{args.steps:08d}.png")


class Evaluator:
    """fid.py inside training, on all processes: figures go to log.jsonl, the best EMA weights to OUT/best."""

    def __init__(self, args, vae, log):
        import fid
        self.fid, self.args, self.vae, self.log, self.best = fid, args, vae, log, Path(args.out) / "best"
        old = self.best.with_suffix(".old")
        if get_rank() == 0 and old.exists() and not self.best.exists():  # killed between two renames
            old.rename(self.best)
        self.extractor = fid.load_extractor(args.eval_features, args.eval_resize, args.eval_inception, args.device,
                                            not args.no_converted_copy)
        self.reference = fid.open_reference(self.extractor, args.eval_ref, None if args.eval_ref else args.data)

    def __call__(self, ema, step, num_images):
        images = self.fid.generated(ema, seed=self.args.seed, vae=self.vae)
        row = self.fid.evaluate(images, num_images, self.extractor, self.reference)
        if get_rank() > 0:
            return
        self.log({"step": step, **row})
        score, score_file = row.get("fid", row.get("fd")), self.best / "score.json"
        if step % self.args.eval_every or score_file.is_file() and json.loads(score_file.read_text())["score"] <= score:
            return
        partial = self.best.with_suffix(".tmp")
        ema.save_pretrained(partial)
        (partial / "score.json").write_text(json.dumps({"score": score, "step": step, **row}))
        old = self.best.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        if self.best.exists():
            self.best.rename(old)
        partial.rename(self.best)
        shutil.rmtree(old, ignore_errors=True)


def evaluated(out, step):
    """Whether the log has an evaluation of this step."""
    log = out / "log.jsonl"
    return log.is_file() and any(f'"step": {step},' in line and '"ref"' in line for line in log.read_text().splitlines())


def start_from(path, net, args):
    """Copy the weights of a checkpoint of any source into a network of the same sizes."""
    load = model.load_generator if args.stage == "generator" else model.load_encoder
    try:
        net.load_state_dict(load(path, not args.no_converted_copy).state_dict())
    except RuntimeError as error:
        raise ValueError(f"--init_from {path} is of another model than these options and --data build "
                         f"({str(error).splitlines()[1].strip():.150}...)") from None


def learning_rate(step, args):
    rate = 1e-6 + (args.lr - 1e-6) * min(1, (step + 1) / max(1, args.warmup))
    return rate * min(1, (args.steps - step) / args.cooldown) if args.cooldown else rate


def average(params, loss, stopping):
    """Data parallelism: every process has the mean over its share, the step needs the mean of those.

    Gradients are averaged in place, once a step, after its last micro-batch. Returns the means of loss and flag.
    """
    status = torch.stack([loss.double(), torch.full_like(loss, float(stopping), dtype=torch.float64)])
    if world_size() > 1:
        work = [dist.all_reduce(x.div_(world_size()), async_op=True) for x in (*(p.grad for p in params), status)]
        for w in work:
            w.wait()
    return status.unbind()


def read_later(values):
    """A function that returns these numbers; it waits for the GPU to compute them, not for what was queued later."""
    copy = values.to("cpu", non_blocking=True)
    if not values.is_cuda:
        return copy.tolist
    ready = torch.cuda.Event()
    ready.record()
    return lambda: ready.synchronize() or copy.tolist()


class Stop:
    """Handler of SIGTERM, by which a cluster says that it will take the machine: the run saves and ends.

    Processes hear of it at different moments and must stop at the same step: `average` tells all what one has heard.
    """

    asked = nothing_to_save = False

    def __call__(self, *_):
        self.asked = True
        if self.nothing_to_save:
            log_line("stopped by SIGTERM during an evaluation, which the same command makes first")
            raise SystemExit(0)

    @contextlib.contextmanager
    def saved(self):
        """Around what takes long (an evaluation) and follows a checkpoint: there the signal ends the process at once."""
        self.nothing_to_save = True
        if self.asked:
            self()
        yield
        self.nothing_to_save = False


def open_log(args, num_params, data, start):
    """Writes options.json. Returns a function that writes figures {name: number}: to log.jsonl, and where flags say so."""
    if get_rank() > 0:
        return None
    board, run, out = None, None, Path(args.out)
    try:
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(args.out)
        if args.wandb:
            import wandb
            name = args.out.strip("/.").replace("/", "-")
            run = wandb.init(project="drifting", id=name, resume="allow", config=vars(args))
    except ImportError as error:
        raise ValueError(f"--tensorboard and --wandb need the packages of these names ({error}): pip install them, or leave "
                         "the option away") from None
    print_options(args, num_params, data, start)
    if (out / "log.jsonl").exists():  # the last line may be torn, if the disk was full
        with open(out / "log.jsonl", "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)

    def log(line):
        line = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        figures = {key: value for key, value in line.items() if key != "step" and isinstance(value, (int, float))}
        for key, value in figures.items() if board else ():
            board.add_scalar(key, value, line["step"])
        if run:
            run.log(figures, step=line["step"])

    return log


# ------------------------------------------------------------------------------------------------------------------
# The dry run: a recipe's step with nothing at hand

# What the presets' --data holds: kind, shape, classes.
SHAPES = {"imagenet_latents": ("latents", (4, 32, 32), 1000), "imagenet256": ("pixels", (3, 256, 256), 1000),
          "cifar10": ("pixels", (3, 32, 32), 10), "digits": ("pixels", (1, 8, 8), 10)}


class RandomData(prepare_data.Dataset):
    """In place of --data: random samples, as many of a class as ImageNet has."""

    def __init__(self, folder):
        if Path(folder).name not in SHAPES:
            raise ValueError(f"--dry_run knows what is in {', '.join(SHAPES)}, and not in {folder}")
        kind, self.shape, classes = SHAPES[Path(folder).name]
        self.meta = {"kind": kind, "classes": [str(c) for c in range(classes)]}
        self.labels, self.count = np.repeat(np.arange(classes), 1281), np.full(classes, 1281)
        self.first, self._epoch = np.arange(classes) * 1281, (None, None)

    def batch(self, ids, rng=None, flip=False, device="cpu"):
        return torch.randn(len(ids), *self.shape, device=device).clamp_(-1, 1)


def random_encoder(name, data):
    """An encoder of the sizes of a preset, of the published weights of that name, or of ConvNeXt-V2-B."""
    if "convnextv2" in name:
        return model.ConvNeXtV2()
    if name.removeprefix("hf://") not in PRESETS:
        raise ValueError(f"--dry_run knows the sizes of the presets' encoders, and not of {name}")
    return EncoderStage.network(parse(["--preset", name.removeprefix("hf://")]), data)


def open_vae(args):
    if not args.dry_run:
        return model.load_vae(args.vae, args.device, args.vae_chunk, args.compile).to(args.device, bf16=args.bf16)
    from diffusers import AutoencoderKL
    net = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,  # the SD-VAE's sizes
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return model.VAE(net, args.vae_chunk, args.compile).to(args.device, bf16=args.bf16)


def dry_run(args):
    """Predicts a step's FLOPs and memory, then makes some on random data, where they fit, and measures."""
    import resource
    cuda, millions = torch.device(args.device).type == "cuda", lambda net: sum(p.numel() for p in net.parameters()) / 1e6
    data = RandomData(args.data)
    costs, state = predict(args, data)  # as long as the state is there, `now` counts it
    stage = state["stage"]
    log_line(f"parameters: {args.stage} {millions(stage.net):.1f}M" + "".join(
        f", {name} {millions(net):.1f}M" for name, net in zip(getattr(args, "encoder", ()), getattr(stage, "encoders", ()))))
    log_line(f"a step: {costs.flops * world_size() / 1e12:.4g} TFLOP over {world_size()} process(es)")
    log_line(f"memory of a process, predicted: {costs.peak / 1e9:.2f} GB in {'bfloat16' if args.bf16 else 'float32'}, not "
             f"compiled ({costs.now / 1e9:.2f} GB between steps)")
    here = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world_size()
    if costs.peak > here:
        log_line(f"not measured: {here / 1e9:.1f} GB are here. --micro_batches and --checkpoint_blocks need less")
        return
    log_line("three steps are measured; who only wants the prediction may stop here")
    resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # noqa: E731
    before = resident()
    state, update = set_up(args, data, Stop())
    for step in range(3):  # the first may compile
        if cuda and step:
            torch.cuda.reset_peak_memory_stats()
        began = time.time()
        update(state["stage"].batch(step), step)[1]()
    seconds = time.time() - began
    memory = torch.cuda.max_memory_allocated() if cuda else resident() - before
    log_line(f"memory of a process, measured: {memory / 1e9:.2f} GB " + ("on the GPU" if cuda else "beside Python and torch"))
    log_line(f"a step, measured: {seconds:.3g} s, {costs.flops / seconds / 1e12:.3g} TFLOP/s of each process; random reals are "
             "drawn in it, real ones are not read")
    log_line(f"{args.steps} steps: {seconds * args.steps / 3600:.2f} h, without pictures, evaluations and checkpoints")


def predict(args, data):
    """Costs of a step by shapes alone: in no memory, and a GPU need not be here. Returns (Costs, the state)."""
    from types import SimpleNamespace
    from unittest import mock
    from torch._subclasses.fake_tensor import FakeTensorMode
    as_on_a_gpu = args.bf16 or args.device.startswith("cuda")
    stand_ins = [(dist, "all_reduce", lambda *_, **__: SimpleNamespace(wait=lambda: None)),  # no values: nothing to tell others
                 (dist, "all_gather_object", lambda values, value: values.__setitem__(slice(None), [value] * len(values))),
                 *([(F, "rms_norm", FusedNorm.apply), (drift, "CHUNK_BYTES", {"cpu": drift.CHUNK_BYTES["cuda"]})] * as_on_a_gpu)]
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    memo = shapes.fake_tensor_converter.meta_converter
    with contextlib.ExitStack() as stack:
        for place, name, value in stand_ins:
            stack.enter_context(mock.patch.object(place, name, value))
        costs = [stack.enter_context(mode) for mode in (shapes, Costs(), torch.compiler.set_stance("force_eager"))][1]
        weak, memo.tensor_memo = memo.tensor_memo, {}  # its weak references would stop Module.to (torch 2.13)
        # Shapes have no device, and no values, which a queue of ids needs.
        state, update = set_up(argparse.Namespace(**vars(args) | {"device": "cpu", "reals": "index"}), data, Stop())
        memo.tensor_memo = weak
        costs.peak = costs.now
        update(state["stage"].batch(0), 0)
    return costs, state


class FusedNorm(torch.autograd.Function):
    """The shapes of a GPU's rms_norm, which keeps its input and a number a row; a CPU's keeps more, in float32."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


class Costs(TorchDispatchMode):
    """Counts FLOPs, and the bytes of the tensors that are alive: `now`, and `peak` at most."""

    def __init__(self):
        super().__init__()
        self.flops, self.now, self.peak, self.seen = 0, 0, 0, WeakIdKeyDictionary()
        aten, flash = torch.ops.aten, "_scaled_dot_product_flash_attention"
        self.formulas = flop_registry | {getattr(aten, f"{flash}_for_cpu{end}"): flop_registry[getattr(aten, flash + end)]
                                         for end in ("", "_backward")}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function.overloadpacket in self.formulas:
            self.flops += self.formulas[function.overloadpacket](*args, **kwargs or {}, out_val=out)
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
                self.seen[storage] = size
                weakref.finalize(storage, self.count, -size)
                self.count(size)
        return out

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/step_N/ is config.json + model.safetensors (EMA, loads anywhere), ema_DECAY/ of the other averages alike,
# train_state.safetensors (the rest), and SHA256SUMS (for `sha256sum --check`)

def save_checkpoint(out, step, args, net, emas, optimizer, bad_steps, stage):
    """Written under a temporary name, synced, renamed: a folder called step_N is whole. The last two are kept."""
    from safetensors.torch import save_file
    folder = out / f"step_{step:08d}"
    partial = folder.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    state = {"bad_steps": bad_steps, **{f"net.{name}": p for name, p in net.state_dict().items()}}
    for i, slots in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{i}.{key}": value for key, value in slots.items()})
    state.update({f"queue.{name}": value for name, value in getattr(stage, "queue_state", {}).items()})
    try:
        for place, ema in zip(ema_folders(partial, args.ema_decay), emas):
            ema.save_pretrained(place)
        save_file({name: t.contiguous() for name, t in state.items()}, partial / "train_state.safetensors",
                  metadata={"step": str(step), "options": json.dumps(vars(args)), "data": stage.data.fingerprint()})
        sums = {path.relative_to(partial): sha256(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        (partial / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(folder)
        sync(out)
    except Exception as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be saved ({error}); the checkpoints before it are untouched. Make room and run "
                      "again: it resumes") from None
    for old in checkpoints(out)[2:]:
        shutil.rmtree(old)


def checkpoints(out):
    """Newest first."""
    return sorted(out.glob("step_" + "[0-9]" * 8), reverse=True)


def ema_folders(folder, decays):
    return [folder, *(folder / f"ema_{decay}" for decay in decays[1:])]


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def whole_checkpoint(out):
    """The newest checkpoint whose files are those that were written, or None. A damaged one is renamed, and named."""
    for folder in checkpoints(out) if get_rank() == 0 else ():
        try:
            sums = {line[66:]: line[:64] for line in (folder / "SHA256SUMS").read_text().splitlines()}
            wrong = [name for name in {"model.safetensors", "train_state.safetensors", *sums}  # they too may be cut short
                     if sha256(folder / name) != sums.get(name)]
        except (OSError, ValueError) as error:
            wrong = [str(error)]
        if not wrong:
            return folder
        log_line(f"{folder} is damaged ({', '.join(wrong)}): the checkpoint before it is used")
        shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
        folder.rename(folder.with_suffix(".damaged"))
    if list(out.glob("step_*.damaged")):
        raise ValueError(f"{out} holds no whole checkpoint, only damaged ones: remove them, and the run starts at step 0")


def load_checkpoint(folder, args, net, emas, optimizer, bad_steps, stage):
    """Continue from a checkpoint. Returns the number of steps done."""
    from safetensors import safe_open
    from safetensors.torch import load_file
    with safe_open(folder / "train_state.safetensors", "pt") as f:
        metadata = f.metadata()
    if metadata["data"] != stage.data.fingerprint():
        raise ValueError(f"{folder} was trained on other data than {args.data}; choose another --out")
    before, now = json.loads(metadata["options"]), vars(args)
    for key in sorted(now):
        if before.get(key) != now[key] and key not in ("device", "out", "data"):
            log_line(f"resuming {args.out} with --{key} {now[key]}, before {before.get(key)}")
    found = dict(zip(before.get("ema_decay", []), ema_folders(folder, before.get("ema_decay", []))))
    places = [found.get(decay) for decay in args.ema_decay]
    if not all(places):
        raise ValueError(f"{folder} has no averages of --ema_decay {args.ema_decay}: resume with {before.get('ema_decay')}")
    state = load_file(folder / "train_state.safetensors", device=args.device)
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}  # noqa: E731
    try:
        net.load_state_dict(part("net."))
        for ema, place in zip(emas, places):
            ema.load_state_dict(load_file(place / "model.safetensors", device=args.device))
    except RuntimeError as error:
        raise ValueError(f"{folder} is of another model than these options build; choose another --out "
                         f"({str(error).splitlines()[1].strip():.100}...)") from None
    slots = {}
    for name, value in part("optimizer.").items():
        i, key = name.split(".")
        slots.setdefault(int(i), {})[key] = value.cpu() if key == "step" else value.clone()  # not a view of the file
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    bad_steps.copy_(state["bad_steps"])
    if getattr(stage, "queue", None):
        stage.queue.load_state_dict({k: v.cpu() for k, v in part("queue.").items()})
    return int(metadata["step"])


def print_options(args, num_params, data, start):
    """The run's options, those that differ from the defaults marked; also kept in options.json."""
    defaults = build_parser().parse_args([])
    print(f"{args.stage}: {num_params / 1e6:.1f}M parameters, {len(data)} images {list(data.shape)} of "
          f"{data.num_classes} classes, {world_size()} process(es)" + (f", resuming at step {start}" if start else ""))
    for key, value in vars(args).items():
        print(f"  {'*' if value != getattr(defaults, key) else ' '} {key} {value}")
    (Path(args.out) / "options.json").write_text(json.dumps(vars(args), indent=1))


# ------------------------------------------------------------------------------------------------------------------
# Processes (torchrun sets RANK, LOCAL_RANK, WORLD_SIZE)

def get_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(sums):
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums


def gather(value):
    """Every process's value (pickled: only what the processes of this run made)."""
    values = [value]
    if world_size() > 1:
        dist.all_gather_object(values := [None] * world_size(), value)
    return values


def together(function, *args, **kwargs):
    """function(...) on every process. Where it fails on one, all stop with that one's line, instead of waiting for it."""
    try:
        result, error = function(*args, **kwargs), None
    except (OSError, ValueError) as caught:
        result, error = None, caught
    errors = [text for text in gather(error and str(error)) if text]
    if errors:
        raise Shared(errors[0]) if world_size() > 1 else error
    return result


def claim(out):
    """The run folder, for one run at a time: two would remove each other's checkpoints. Held until closed, or until death."""
    if get_rank() > 0:
        return contextlib.nullcontext()
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ValueError(f"another run writes to {out}: wait for it, or end it") from None
    return lock


class Shared(ValueError):
    """An error that all processes have heard of: one of them prints it."""


def mean_over_processes(value, device):
    value = torch.as_tensor(value, dtype=torch.float64, device=device).detach().clone()
    return (all_reduce(value) / world_size() if world_size() > 1 else value).item()


def log_line(text):
    if get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        from torch.distributed.nn import functional  # noqa: F401  imported later, its defaults would keep the group alive
        # The timeout bounds how long others wait for a process that is lost; a checkpoint is written within it.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=10))
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            error = f"{error}: make room, and run again: it resumes from the last checkpoint, which is untouched"
        raise SystemExit(1 if isinstance(error, Shared) and get_rank() > 0 else f"train.py: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
