"""Train the encoder (ResNet-MAE, A.3) and the generator (drifting, A.8-A.9): one parser, one loop, two stages.

    python train.py --preset digits                                    # data, encoder, generator: minutes on a laptop
    torchrun --nproc_per_node 8 train.py --preset cifar10              # the same script on any number of processes
    python train.py --preset digits --gen 32 --out runs/more_samples   # a preset, changed

OUT/ gets step_*/ (EMA weights that sample.py and others load, and all that resuming needs), samples_*.png, log.jsonl and
options.json. The same command again resumes. What a step draws depends on (seed, step) alone, not on the processes.
"""
import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange

import drift
import model
import prepare_data
import sample

# What differs from the defaults of the options below. A row ends with what it reached.
PRESETS = {
    "digits_encoder": dict(stage="encoder", data="data/digits", input_patch_size=2, base_channels=64, layers=[1, 1, 1],
                           batch_size=128, steps=400, lr=2e-3, warmup=50, cls_steps=150, cls_ramp=50, ema_decay=0.99,
                           sample_every=200, save_every=100),
    "digits": dict(stage="generator", data="data/digits", encoder=["digits_encoder"], model="XS", patch_size=4, labels=10,
                   gen=24, pos=48, uncond=12, alpha_power=2, steps=800, lr=2.5e-3, warmup=30, cooldown=550, ema_decay=0.99, reals="index",
                   sample_every=100, save_every=150),
    # For one modern GPU and about an hour, by arithmetic; not run yet.
    "cifar10_encoder": dict(stage="encoder", data="data/cifar10", base_channels=64, batch_size=512, steps=8000, lr=1e-3,
                            warmup=500, crop_scale=0.2, cls_steps=3000, ema_decay=0.999, save_every=2000),
    "cifar10": dict(stage="generator", data="data/cifar10", encoder=["cifar10_encoder"], model="S", labels=16, gen=64, pos=64,
                    uncond=16, steps=10000, lr=4e-4, warmup=500, flip=True, ema_decay=0.999),
    # For two CPU cores: shows progress, not more.
    "cifar10_cpu_encoder": dict(stage="encoder", data="data/cifar10", input_patch_size=2, base_channels=32, layers=[1, 1, 1],
                                batch_size=64, steps=400, lr=1e-3, warmup=50, cls_steps=200, cls_ramp=50, ema_decay=0.99,
                                sample_every=200, save_every=200),
    "cifar10_cpu": dict(stage="generator", data="data/cifar10", encoder=["cifar10_cpu_encoder"], model="XS", patch_size=4,
                        labels=4, gen=16, pos=16, uncond=8, push=64, steps=1000, lr=1e-3, warmup=50, flip=True, ema_decay=0.99,
                        sample_every=50, save_every=100),
}


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
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda computes in bfloat16")
    g.add_argument("--compile", action="store_true", help="torch.compile the networks")
    g.add_argument("--init_from", help="weights to start from: whatever --ckpt of sample.py takes, of the same sizes")
    g.add_argument("--no_converted_copy", action="store_true", help="keep no safetensors copy of published weights")
    g.add_argument("--log_every", type=int, default=10, help="steps between lines of log.jsonl")
    g.add_argument("--sample_every", type=int, default=1000, help="steps between pictures")
    g.add_argument("--save_every", type=int, default=1000, help="steps between checkpoints; the last two are kept")
    g = parser.add_argument_group("optimisation (Table 8)")
    g.add_argument("--steps", type=int, default=30000, help="length of the run")
    g.add_argument("--lr", type=float, default=2e-4, help="AdamW's rate, constant after the warm-up")
    g.add_argument("--warmup", type=int, default=5000, help="steps of linear warm-up from 1e-6")
    g.add_argument("--cooldown", type=int, default=0, help="last steps, in which the rate falls linearly to zero")
    g.add_argument("--weight_decay", type=float, default=0.01, help="on all parameters")
    g.add_argument("--clip", type=float, default=2.0, help="largest norm of the gradient")
    g.add_argument("--ema_decay", type=float, default=0.999, help="of the averaged weights, which are those used")
    g = parser.add_argument_group("stage encoder (A.3)")
    g.add_argument("--base_channels", type=int, default=256, help="width of the first stage; doubles at each stage")
    g.add_argument("--layers", type=int, nargs="+", default=[3, 4, 6, 3], help="residual blocks of each stage")
    g.add_argument("--input_patch_size", type=int, default=1, help="pixel models patchify first (256 pixels: 8)")
    g.add_argument("--batch_size", type=int, default=8192, help="images a step, over all processes")
    g.add_argument("--crop_scale", type=float, default=1.0, help="random resized crops of at least this area (paper: 0.2)")
    g.add_argument("--cls_steps", type=int, default=0, help="last steps, which fine-tune with a classifier")
    g.add_argument("--cls_weight", type=float, default=0.1, help="lam of loss = lam CE + (1 - lam) reconstruction")
    g.add_argument("--cls_ramp", type=int, default=1000, help="steps in which lam rises from 0")
    g = parser.add_argument_group("stage generator (A.8)")
    g.add_argument("--encoder", nargs="+", help="whose features samples drift in, one or several: a run, checkpoint or artifact "
                   "folder, hf://..., or a preset (then runs/PRESET, trained first where it is missing)")
    g.add_argument("--pixel_encoder", action="store_true", help="of a generator of latents: the encoder sees decoded samples, "
                   "gradients pass through the decoder (sec. 4)")
    g.add_argument("--vae", default="hf://stabilityai/sd-vae-ft-mse", help="decoder of latents, here or on the Hub")
    g.add_argument("--vae_chunk", type=int, default=16, help="images it decodes at a time: bounds its memory")
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
        parser.set_defaults(**PRESETS[preset])
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
    for key, value in vars(args).items():
        if key in ("steps", "log_every", "sample_every", "save_every", "batch_size", "labels", "gen", "pos", "push") and value < 1:
            parser.error(f"--{key} must be at least 1")
    if args.out is None:
        if args.preset is None:
            parser.error("--out is needed without a preset")
        args.out = f"runs/{args.preset}"
    if args.data is None or (args.stage == "generator" and args.encoder is None):
        parser.error("--data (and for the generator --encoder) is needed")
    return args


# ------------------------------------------------------------------------------------------------------------------
# The two stages: a network, and `loss(step)`, the mean over this process's share of the step's global batch

class EncoderStage:
    """Masked autoencoding (A.3): half of the 2x2 patches hidden, L2 on them; at the end a little cross-entropy."""

    def __init__(self, args, data):
        self.args, self.data = args, data
        c, h, _ = data.shape
        factor = args.input_patch_size * 2 ** (len(args.layers) - 1)
        if args.batch_size % world_size() or h % factor or h // args.input_patch_size % 2:
            raise ValueError(f"--batch_size must be divisible by {world_size()} processes, and images of {h} pixels by "
                             f"{factor} and twice --input_patch_size")
        self.net = model.MAE(in_channels=c, base_channels=args.base_channels, layers=args.layers,
                             input_patch_size=args.input_patch_size, num_classes=data.num_classes)
        self.forward = torch.compile(self.net) if args.compile else self.net

    def batch(self, step):
        """This process's images, labels and masks of a step."""
        args, n = self.args, self.args.batch_size
        rng = np.random.default_rng([args.seed, step])
        ids = self.data.fresh(step * n, n, args.seed)
        crops, flips = random_crops(n, args.crop_scale, rng), rng.random(n) < (0.5 if args.crop_scale < 1 else 0)
        grid = self.data.images.shape[2] // args.input_patch_size // self.net.patch_size
        mask = torch.from_numpy((rng.random((n, grid, grid)) < 0.5).astype(np.float32))
        mine = slice(n // world_size() * get_rank(), n // world_size() * (get_rank() + 1))
        x = self.data.batch(ids[mine])
        if args.crop_scale < 1:
            x = crop_resize(x, crops[mine], flips[mine])
        return x, torch.from_numpy(self.data.labels[ids[mine]]), mask[mine]

    def loss(self, step):
        args = self.args
        x, labels, mask = (t.to(args.device) for t in self.batch(step))
        with autocast(args.device):
            _, logits, error, cross_entropy = self.forward(x, mask, labels)
        lam = args.cls_weight * min(1, max(0, step - (args.steps - args.cls_steps)) / args.cls_ramp)
        logs = {"reconstruction": error.mean(), "cross_entropy": cross_entropy.mean(),
                "accuracy": (logits.argmax(1) == labels).float().mean(), "lam": lam}
        return lam * cross_entropy.mean() + (1 - lam) * error.mean(), logs

    def preview(self, ema):
        """Pictures of a few images: as they are, with half hidden, and reconstructed. Returns uint8 images, columns."""
        x, labels, mask = (t[:10].to(self.args.device) for t in self.batch(0))
        recon = ema(x, mask, labels)[0]
        p = ema.input_patch_size
        recon = rearrange(recon, "n (p q c) h w -> n c (h p) (w q)", p=p, q=p)
        hidden = torch.nn.functional.interpolate(mask[:, None], x.shape[2:])
        rows = torch.cat([x, x * (1 - hidden), x * (1 - hidden) + recon * hidden])
        return sample.to_uint8(rows[:, :3].cpu()), len(x)


class GeneratorStage:
    """The drifting step (A.8): draw labels, guidance and reals; generate; compare in feature space; move the samples."""

    def __init__(self, args, data):
        self.args, self.data = args, data
        if args.labels % world_size():
            raise ValueError(f"--labels {args.labels} must be divisible by the number of processes, {world_size()}")
        if data.count.min() < args.pos or len(data) < args.uncond:
            raise ValueError(f"--pos {args.pos}: class {data.meta['classes'][data.count.argmin()]} of {args.data} has "
                             f"{data.count.min()} images")
        if args.reals == "queue" and args.pos > 128:
            raise ValueError(f"--pos {args.pos}: a class's queue holds 128; use --reals index")
        c, h, _ = data.shape
        self.net = model.Generator(input_size=h, in_channels=c, patch_size=args.patch_size, num_classes=data.num_classes,
                                   attn_fp32=args.attn_fp32, **model.GENERATOR_SIZES[args.model])
        self.net.checkpoint_blocks = args.checkpoint_blocks
        latents = data.meta["kind"] == "latents"
        if args.pixel_encoder and not latents:
            raise ValueError(f"--pixel_encoder is for generators of latents, and {args.data} holds pixels")
        self.vae = model.load_vae(args.vae, args.device, args.vae_chunk, args.compile) if latents else None
        for i, name in enumerate(args.encoder):
            if name in PRESETS:
                main(["--preset", name, "--data", args.data, "--device", args.device, "--seed", str(args.seed),
                      *(["--compile"] if args.compile else [])])
                args.encoder[i] = f"runs/{name}"
        self.encoders = torch.nn.ModuleList(model.load_encoder(name, not args.no_converted_copy) for name in args.encoder)
        self.encoders.requires_grad_(False).to(args.device)
        for name, encoder in zip(args.encoder, self.encoders):
            if encoder.in_channels != (3 if args.pixel_encoder else c):
                raise ValueError(f"--encoder {name} takes {encoder.in_channels} channels, the samples have {c}" + (
                    "; an encoder of pixels needs --pixel_encoder" if latents else ""))
        self.forward, self.encode = self.net, [encoder.features for encoder in self.encoders]
        if args.compile:
            self.forward, self.encode = torch.compile(self.net), [torch.compile(encode) for encode in self.encode]
        self.queue = self.filled_queue() if args.reals == "queue" else None

    def filled_queue(self):
        """Queues start full. They hold ids, and every process pushes the same ones: queues are equal everywhere."""
        queue, rng = drift.SampleQueue(self.data.num_classes), np.random.default_rng([self.args.seed, 1 << 32])
        for label, count in enumerate(self.data.count):
            self.push(queue, self.data.draw(label, min(count, queue.ids.shape[1]), rng))
        self.push(queue, self.data.fresh(0, queue.any_ids.shape[0], self.args.seed))
        return queue

    def push(self, queue, ids):
        queue.push(torch.from_numpy(ids), torch.from_numpy(self.data.labels[ids]))

    def batch(self, step):
        """This process's labels, alphas, noise, styles and real samples of a step, each label from its own stream."""
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
            reals = self.data.batch(ids, rng, args.flip)
            pos.append(reals[:args.pos]), uncond.append(reals[args.pos:])
        mine = torch.from_numpy(labels[per_process * get_rank():][:per_process])
        return mine, torch.cat(alpha), torch.cat(noise), torch.cat(style), torch.cat(pos), torch.cat(uncond)

    def features(self, x, labels):
        """Samples [labels * n, c, h, w] -> {name: [labels, n, T, C]}: the samples themselves and the encoders' features."""
        found = {"global": rearrange(x, "n c h w -> n 1 (h w c)")}
        if self.args.pixel_encoder:  # of reals too: their originals would differ from any latent's image
            x = self.vae.decode(x)
        for encode in self.encode:
            found.update(encode(x))
        return {name: f.unflatten(0, (labels, -1)) for name, f in found.items()}

    def loss(self, step):
        args = self.args
        labels, alpha, noise, style, pos, uncond = (t.to(args.device) for t in self.batch(step))
        n = len(labels)
        with autocast(args.device):
            x = self.forward(noise, labels.repeat_interleave(args.gen), alpha.repeat_interleave(args.gen), style)
            gen = self.features(x, n)
            with torch.no_grad():  # reals need no gradient, and no memory for one
                pos, uncond = self.features(pos, n), self.features(uncond, n) if args.uncond else None
        weight = drift.unconditional_weight(alpha, args.gen, args.uncond) if args.uncond else None
        loss, _, infos = drift.feature_drift_loss(
            gen, pos, uncond, weight, kernel=args.kernel, attraction=args.attraction, repulsion=args.repulsion,
            reduce=all_reduce if world_size() > 1 else None)
        logs = {key: torch.stack([info[key] for info in infos.values()]).mean() for key in infos["global"]}
        return loss, logs

    def preview(self, ema):
        """A grid with one column a class, always of the same noise. Returns uint8 images, columns."""
        columns = min(10, ema.num_classes)
        images = sample.generate(ema, np.arange(8 * columns) % columns, np.arange(8 * columns), vae=self.vae)
        return sample.to_uint8(images), columns


def autocast(device):
    """bfloat16 compute where it is fast; master weights and the drift loss stay float32."""
    device = torch.device(device).type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def random_crops(n, min_area, rng):
    """Random resized crops: [n, 4] of centre x, y and half-sizes in [-1, 1] coordinates; aspect ratios 3/4 to 4/3."""
    area, ratio = rng.uniform(min_area, 1, n), np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), n))
    half = np.minimum(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1), 1)
    centre = rng.uniform(-1, 1, (n, 2)) * (1 - half)
    return np.concatenate([centre, half], 1)


def crop_resize(x, crops, flips):
    """Cut the crops out of x [n, c, h, w] and resize them to h x w, mirrored where flips says so."""
    cx, cy, hx, hy = torch.from_numpy(crops).to(x.dtype).unbind(1)
    hx = torch.where(torch.from_numpy(flips), -hx, hx)
    zero = torch.zeros_like(cx)
    theta = torch.stack([torch.stack([hx, zero, cx], 1), torch.stack([zero, hy, cy], 1)], 1)     # n 2 3
    grid = torch.nn.functional.affine_grid(theta, x.shape, align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)


# ------------------------------------------------------------------------------------------------------------------
# The loop

def main(argv):
    args = parse(argv)
    if get_rank() == 0 and Path(args.data).name == "digits":
        prepare_data.prepare("digits", args.data)
    barrier()
    data = prepare_data.Dataset(args.data)
    out, main_process = Path(args.out), get_rank() == 0

    torch.manual_seed(args.seed)  # initial weights; everything later is seeded by its step
    stage = (EncoderStage if args.stage == "encoder" else GeneratorStage)(args, data)
    if args.init_from and model.latest_checkpoint(out) is None:
        start_from(args.init_from, stage.net, args)
    net = stage.net.to(args.device).train()
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    params, ema_params = list(net.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay)
    start = load_checkpoint(out, args, net, ema, optimizer, stage)
    if start >= args.steps:
        log_line(f"{out} has its {args.steps} steps already")
        return
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        print_options(args, sum(p.numel() for p in params), data, start)

    evaluator = Evaluator(args, stage.vae) if args.stage == "generator" and args.eval_every else None
    from tqdm import tqdm
    progress = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.out, disable=not main_process,
                    mininterval=1)
    began = time.time()
    for step in progress:
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, logs = stage.loss(step)
        loss.backward()
        average_gradients(params)
        norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
        if not torch.isfinite(norm):
            raise ValueError(f"step {step}: the gradient is {norm.item()}; nothing of it was kept. The last checkpoint is "
                             f"{model.latest_checkpoint(out)}: lower --lr or raise --warmup, and run again")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The average's memory grows with the run, so that the first weights are forgotten in short runs too.
        with torch.no_grad():
            torch._foreach_lerp_(ema_params, params, 1 - min(args.ema_decay, (step + 1) / (step + 10)))

        done = step + 1
        if done % args.log_every == 0 or done in (1, args.steps):
            values = {key: mean_over_processes(value, args.device) for key, value in {"loss": loss, "norm": norm, **logs}.items()}
            if main_process:
                line = {"step": done, "seconds": round(time.time() - began, 2), "lr": lr, **values}
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
                progress.set_postfix_str(f"loss {values['loss']:.3f}")
        if evaluator and (done % args.eval_every == 0 or done == 1):  # at step 1 few images, so that it fails at once if at all
            evaluator(ema, done, args.eval_images if done % args.eval_every == 0 else 100)
        if main_process and (done % args.sample_every == 0 or done in (1, args.steps)):
            with torch.no_grad():
                sample.save_grid(*stage.preview(ema), out / f"samples_{done:08d}.png")
        if main_process and (done % args.save_every == 0 or done == args.steps):
            save_checkpoint(out, done, args, net, ema, optimizer, stage)
    barrier()
    log_line(f"{out}: {args.steps} steps; weights in {model.latest_checkpoint(out)}, "
             f"pictures in {out}/samples_{args.steps:08d}.png")


class Evaluator:
    """fid.py inside training, on all processes: figures go to log.jsonl, the best EMA weights to OUT/best."""

    def __init__(self, args, vae):
        import fid
        self.fid, self.args, self.vae, self.best = fid, args, vae, Path(args.out) / "best"
        self.extractor = fid.load_extractor(args.eval_features, args.eval_resize, args.eval_inception, args.device,
                                            not args.no_converted_copy)
        self.reference = fid.open_reference(self.extractor, args.eval_ref, None if args.eval_ref else args.data)

    def __call__(self, ema, step, num_images):
        row = self.fid.evaluate(self.fid.generated(ema, seed=self.args.seed, vae=self.vae), num_images, self.extractor, self.reference)
        if get_rank() > 0:
            return
        with open(Path(self.args.out) / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **row}) + "\n")
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


def average_gradients(params):
    """Data parallelism in one line a parameter: every process has the mean over its share, the step needs their mean."""
    if world_size() > 1:
        work = [dist.all_reduce(p.grad.div_(world_size()), async_op=True) for p in params]
        for w in work:
            w.wait()


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/step_N/ is config.json + model.safetensors (EMA, loads anywhere) + train_state.safetensors (the rest)

def save_checkpoint(out, step, args, net, ema, optimizer, stage):
    """Written under a temporary name, synced, renamed: a folder called step_N is whole. The last two are kept."""
    from safetensors.torch import save_file
    folder = out / f"step_{step:08d}"
    partial = folder.with_suffix(".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    state = {f"net.{name}": p for name, p in net.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{i}.{key}": value for key, value in slots.items()})
    if getattr(stage, "queue", None):
        state.update({f"queue.{name}": value for name, value in stage.queue.state_dict().items()})
    try:
        ema.save_pretrained(partial)
        save_file({name: t.contiguous() for name, t in state.items()}, partial / "train_state.safetensors",
                  metadata={"step": str(step), "options": json.dumps(vars(args)), "data": stage.data.fingerprint()})
        for path in [*partial.iterdir(), partial]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        partial.rename(folder)
    except Exception as error:  # safetensors has an error of its own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder} could not be saved ({error}); the checkpoints before it are untouched. Make room and run "
                      "again: it resumes") from None
    for old in sorted(out.glob("step_" + "[0-9]" * 8))[:-2]:
        shutil.rmtree(old)


def load_checkpoint(out, args, net, ema, optimizer, stage):
    """Continue from the newest checkpoint of the run folder, if there is one. Returns the number of steps done."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file
    folder = model.latest_checkpoint(out)
    if folder is None:
        return 0
    try:
        with safe_open(folder / "train_state.safetensors", "pt") as f:
            metadata = f.metadata()
        state = load_file(folder / "train_state.safetensors", device=args.device)
        ema_state = load_file(folder / "model.safetensors", device=args.device)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged ({error}); remove it, and the run resumes from the one before") from None
    if metadata["data"] != stage.data.fingerprint():
        raise ValueError(f"{out} was trained on other data than {args.data}; choose another --out")
    before, now = json.loads(metadata["options"]), vars(args)
    for key in sorted(now):
        if before.get(key) != now[key] and key not in ("device", "out", "data", "encoder"):
            log_line(f"resuming {out} with --{key} {now[key]}, before {before.get(key)}")
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}  # noqa: E731
    try:
        net.load_state_dict(part("net."))
        ema.load_state_dict(ema_state)
    except RuntimeError as error:
        raise ValueError(f"{folder} is of another model than these options build; choose another --out "
                         f"({str(error).splitlines()[1].strip():.100}...)") from None
    slots = {}
    for name, value in part("optimizer.").items():
        i, key = name.split(".")
        slots.setdefault(int(i), {})[key] = value.cpu() if key == "step" else value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
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
    dist.all_reduce(sums)
    return sums


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
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
