"""Draw images from a trained generator, one forward pass each.

    python sample.py --ckpt runs/digits                                # a grid, one column a class: samples.png
    python sample.py --ckpt hf://latent_L_sota --classes 22 88 108     # the authors' weights: downloaded, converted, drawn
    python sample.py --ckpt hf://latent_B_sota --classes 22 --cfg_scale 1.0 1.5 2.0       # one labelled row an alpha
    python sample.py --ckpt hf://latent_B_sota --classes 22 --style free fixed alone      # what each of the two noises does
    torchrun --nproc_per_node 8 sample.py --ckpt hf://pixel_L_sota --num_images 50000 --out samples.npz   # or a folder of PNGs

Image i is of class classes[i % len(classes)] and depends on (seed, i) alone, not on the other images or processes.
"""
import argparse
import math
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model import load_generator, load_vae

STYLES = ("free", "fixed", "alone")


def generate(generator, labels, indices, cfg_scale=1.0, temperature=1.0, seed=0, batch_size=64, style="free", vae=None,
             seconds=None):
    """Images number `indices` of a seed, of classes `labels` (both [N] ints) -> float32 [N, C, H, W] on the CPU.

    cfg_scale is alpha of A.7, one number; temperature multiplies the noise. Every image's noise and style indices come
    from a random stream of its own; style "fixed" takes image 0's style indices for all, "alone" image 0's noise.
    vae: decodes latents. seconds: a dict, to which the time of "generator" and "decoder" is added.

    On a CPU images go through the networks one at a time, so that their bits do not depend on batch_size (in networks worth
    waiting for it costs nothing). A GPU computes in bfloat16, where another batch size moves some pixels by a grey level.
    """
    device = next(generator.parameters()).device
    size = 1 if device.type == "cpu" else batch_size
    images, clock = [], Clock(device, {} if seconds is None else seconds)
    with torch.inference_mode():
        for at in range(0, len(indices), size):
            noise, styles = zip(*(image_noise(generator, seed, int(i), style) for i in indices[at:at + size]))
            label = torch.as_tensor(labels[at:at + size], device=device)
            alpha = torch.full((len(label),), float(cfg_scale), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x = generator(torch.stack(noise).to(device) * temperature, label, alpha, torch.stack(styles).to(device)).float()
            clock("generator")
            if vae is not None:
                x = vae.decode(x)
                clock("decoder")
            images.append(x.cpu())
            if not images[-1].isfinite().all():
                raise ValueError("the generator or decoder gives numbers that are not finite: its weights are damaged")
    return torch.cat(images)


def image_noise(generator, seed, index, style="free"):
    """Noise [C, H, W] and style indices [S] of image `index`: the same on every machine."""
    if style != "free" and index > 0:
        noise, styles = image_noise(generator, seed, index)
        noise0, styles0 = image_noise(generator, seed, 0)
        return (noise, styles0) if style == "fixed" else (noise0, styles)
    stream = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]))
    size = generator.input_size
    noise = torch.randn(generator.in_channels, size, size, generator=stream)
    return noise, torch.randint(generator.noise_classes, (generator.noise_coords,), generator=stream)


class Clock:
    """Adds the seconds since its last call to an entry of a dict. On a GPU it waits for the work that has been queued."""

    def __init__(self, device, seconds):
        self.device, self.seconds, self.last = device, seconds, time.perf_counter()

    def __call__(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0) + now - self.last, now


def to_uint8(images):
    """[-1, 1] -> uint8 by floor(255 (y + 1) / 2), as the paper's evaluation quantises; NaN becomes black."""
    return ((images + 1) * 127.5).nan_to_num(0.0).clamp_(0, 255).to(torch.uint8)


def save_grid(images, columns, path, tile=64, labels=None):
    """uint8 [N, C, H, W] -> one picture, row by row; small images are enlarged to tiles of about `tile` pixels.

    labels: a text for each row, written above it.
    """
    from PIL import Image, ImageDraw, ImageFont
    n, c, h, w = images.shape
    rows, zoom, gap, line = -(-n // columns), max(1, tile // h), 2, 20 if labels else 0
    height = h * zoom + gap + line
    grid = Image.new("RGB", (columns * (w * zoom + gap) - gap, rows * height - gap), "white")
    for i, image in enumerate(images):
        array = image.expand(3, h, w).permute(1, 2, 0).contiguous().numpy()
        tile_image = Image.fromarray(array).resize((w * zoom, h * zoom), Image.Resampling.BICUBIC)
        grid.paste(tile_image, (i % columns * (w * zoom + gap), i // columns * height + line))
    for row, text in enumerate(labels or []):
        ImageDraw.Draw(grid).text((2, row * height + 2), text, "black", ImageFont.load_default(14))
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    grid.save(partial, format="PNG")
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------------------
# The command

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="run or checkpoint folder, folder of the authors' artifact, or on the Hub "
                        "hf://NAME or hf://USER/REPO[/SUBFOLDER][@REVISION]")
    parser.add_argument("--classes", type=int, nargs="+", help="class numbers (default: all; of a grid the first ten)")
    parser.add_argument("--cfg_scale", type=float, nargs="+", default=[1.0], help="guidance alpha, 1 to 4; several give a "
                        "grid of one labelled row each (default: 1.0)")
    parser.add_argument("--style", choices=STYLES, nargs="+", default=["free"], help="free: every image its own noise and style "
                        "indices; fixed: all have the first one's style indices; alone: all have its noise, and style indices of "
                        "their own. Several give one labelled row each (default: free)")
    parser.add_argument("--temperature", type=float, default=1.0, help="multiplies the noise (default: %(default)s)")
    parser.add_argument("--num_images", type=int, help="images in all (default: 8 a class), or in a labelled row (one a class, "
                        "at least 8)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", default="samples.png", help="X.png: a grid; X.npz: arr_0 uint8 [N, H, W, C]; else a folder "
                        "of PNGs (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="of the generator, on a GPU (default: %(default)s)")
    parser.add_argument("--vae", default="hf://stabilityai/sd-vae-ft-mse", help="decoder of latents, a folder or on the Hub "
                        "(default: %(default)s)")
    parser.add_argument("--vae_chunk", type=int, default=16, help="images it decodes at a time on a GPU: bounds its memory "
                        "(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile both networks")
    parser.add_argument("--no_converted_copy", action="store_true", help="keep no safetensors copy of published weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in ("", ".png", ".npz"):
        parser.error(f"--out {args.out}: X.png, X.npz, or a folder, whose name has no dot")
    if len(args.cfg_scale) * len(args.style) > 1 and not args.out.endswith(".png"):
        parser.error("several --cfg_scale or --style are rows of a grid: --out X.png")
    if not all(map(math.isfinite, [*args.cfg_scale, args.temperature])) or args.seed < 0:
        parser.error("--cfg_scale and --temperature must be finite, --seed not negative")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here")
    for name in ("num_images", "batch_size", "vae_chunk"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def run(args):
    from tqdm import tqdm
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        from torch.distributed.nn import functional  # noqa: F401  imported later, its defaults would keep the group alive
        dist.init_process_group("gloo")  # the processes only wait for each other
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    generator = load_generator(args.ckpt, not args.no_converted_copy).to(args.device)
    classes = args.classes or list(range(min(10, generator.num_classes) if args.out.endswith(".png") else generator.num_classes))
    if not all(0 <= c < generator.num_classes for c in classes):
        raise ValueError(f"--classes: this generator knows 0 to {generator.num_classes - 1}")
    latents, channels, size = generator.out_channels not in (1, 3), generator.out_channels, generator.input_size
    vae = None
    if latents:
        vae = load_vae(args.vae, args.device, args.vae_chunk, args.compile)
        channels, size = 3, size * vae.downsampling
    if args.compile:
        generator.compile()

    # Rows of a grid that differ in alpha or style have the same images, otherwise all is one row.
    rows = [(alpha, style) for style in args.style for alpha in args.cfg_scale]
    n = args.num_images or (8 * len(classes) if len(rows) == 1 else -(-8 // len(classes)) * len(classes))
    work = [(row, i) for row in range(len(rows)) for i in range(n)][rank::world]
    names = [name(i, classes[i % len(classes)]) for i in range(n)]
    output, seconds, began = Output(args.out, (len(rows) * n, size, size, channels), names, rank), {}, time.time()
    with tqdm(total=len(work), disable=rank > 0, unit=" images") as progress:
        while work:
            row = work[0][0]
            indices = [i for r, i in work[:args.batch_size] if r == row]
            work = work[len(indices):]
            labels = [classes[i % len(classes)] for i in indices]
            images = to_uint8(generate(generator, labels, indices, rows[row][0], args.temperature, args.seed, args.batch_size,
                                       rows[row][1], vae, seconds))
            output.write([row * n + i for i in indices], labels, images.permute(0, 2, 3, 1).numpy())
            progress.update(len(indices))
    mine = progress.n
    labels = [", ".join([f"alpha {alpha:g}"] * (len(args.cfg_scale) > 1) + [f"style {style}"] * (len(args.style) > 1))
              for alpha, style in rows]
    output.finish(len(classes) if len(rows) == 1 else n, labels if len(rows) > 1 else None)
    if rank == 0:
        apart = ", ".join(f"{name} {mine / s:.1f} a second" for name, s in seconds.items())
        print(f"{args.out}: {len(rows) * n} images in {time.time() - began:.1f} s on {world} process(es); on each {apart}")


class Output:
    """Where images go: PNGs of a folder, or one file, which all processes fill through a memmap: 50,000 need no memory."""

    def __init__(self, path, shape, names, rank):
        self.path, self.rank, self.images = Path(path), rank, None
        self.scratch = self.path.with_name(self.path.name + ".tmp.npy")
        if self.path.suffix:
            if rank == 0:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                np.lib.format.open_memmap(self.scratch, "w+", np.uint8, shape)
                if hasattr(os, "posix_fallocate"):  # a full disk is noticed now, not by a signal while images are written
                    with open(self.scratch, "r+b") as f:
                        os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
            barrier()
            self.images = np.lib.format.open_memmap(self.scratch, "r+")
        else:
            others = sorted({p.name for p in self.path.glob("*.png")} - set(names))
            if others:
                raise ValueError(f"{path} holds images of another run ({others[0]}): another --out, or remove them")
            self.path.mkdir(parents=True, exist_ok=True)

    def write(self, places, labels, images):
        """uint8 [n, H, W, C] to the places of their numbers."""
        from PIL import Image
        if self.images is not None:
            self.images[places] = images
            return
        for place, label, image in zip(places, labels, images):
            partial = self.path / f"{place}.tmp"
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(partial, format="PNG")
            partial.replace(self.path / name(place, label))

    def finish(self, columns, labels):
        if self.images is not None:
            self.images.flush()
        barrier()
        if self.rank > 0 or self.images is None:
            return
        if self.path.suffix == ".npz":  # an .npz is a .zip of .npy files
            partial = self.path.with_name(self.path.name + ".tmp")
            with zipfile.ZipFile(partial, "w") as archive:
                archive.write(self.scratch, "arr_0.npy")
            partial.replace(self.path)
        else:
            save_grid(torch.from_numpy(np.asarray(self.images)).permute(0, 3, 1, 2), columns, self.path, labels=labels)
        self.scratch.unlink()


def name(place, label):
    """Of image number `place`, of class `label`, in a folder."""
    return f"{place:06d}_{label}.png"


def barrier():
    if dist.is_initialized():
        dist.barrier()


def main():
    args = parse()
    try:
        run(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"sample.py: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
