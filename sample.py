"""Draw images from a trained generator, one forward pass each.

    python sample.py --ckpt runs/digits                                # a grid, one column a class: samples.png
    python sample.py --ckpt runs/digits --classes 3 7 --cfg_scale 2.0 --num_images 40 --out sevens.png
    python sample.py --ckpt runs/digits --num_images 1000 --out samples/      # a folder of PNGs;  --out x.npz: arr_0 uint8 NHWC
    torchrun --nproc_per_node 8 sample.py --ckpt ... --num_images 50000 --out samples/

Image i is of class classes[i % len(classes)] and depends on (seed, i) alone, not on the other images or processes.
"""
import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from model import load_generator


def generate(generator, labels, indices, cfg_scale=1.0, temperature=1.0, seed=0, batch_size=64):
    """Images number `indices` of a seed, of classes `labels` (both [N] ints) -> float32 [N, C, H, W] on the CPU.

    cfg_scale is alpha of A.7, one number; temperature multiplies the noise. Every image's noise and style indices come
    from a random stream of its own. Rounding differs with the batch's size: by 1e-6 on a CPU, where a pixel rarely moves by
    a grey level; a GPU computes in bfloat16, where some pixels do.
    """
    device = next(generator.parameters()).device
    images = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for at in range(0, len(indices), batch_size):
            noise, style = zip(*(image_noise(generator, seed, int(i)) for i in indices[at:at + batch_size]))
            label = torch.as_tensor(labels[at:at + batch_size], device=device)
            alpha = torch.full((len(label),), float(cfg_scale), device=device)
            x = generator(torch.stack(noise).to(device) * temperature, label, alpha, torch.stack(style).to(device))
            images.append(x.float().cpu())
    return torch.cat(images)


def image_noise(generator, seed, index):
    """Noise [C, H, W] and style indices [S] of image `index`: the same on every machine."""
    stream = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]))
    size = generator.input_size
    noise = torch.randn(generator.in_channels, size, size, generator=stream)
    return noise, torch.randint(generator.noise_classes, (generator.noise_coords,), generator=stream)


def to_uint8(images):
    """[-1, 1] -> uint8 by floor(255 (y + 1) / 2), as the paper's evaluation quantises; NaN becomes black."""
    return ((images + 1) * 127.5).nan_to_num(0.0).clamp_(0, 255).to(torch.uint8)


def save_grid(images, columns, path, tile=64):
    """uint8 [N, C, H, W] -> one picture, row by row; small images are enlarged to tiles of about `tile` pixels."""
    from PIL import Image
    n, c, h, w = images.shape
    rows, zoom, gap = -(-n // columns), max(1, tile // h), 2
    grid = Image.new("RGB", (columns * (w * zoom + gap) - gap, rows * (h * zoom + gap) - gap), "white")
    for i, image in enumerate(images):
        array = image.expand(3, h, w).permute(1, 2, 0).contiguous().numpy()
        tile_image = Image.fromarray(array).resize((w * zoom, h * zoom), Image.Resampling.BICUBIC)
        grid.paste(tile_image, (i % columns * (w * zoom + gap), i // columns * (h * zoom + gap)))
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    grid.save(partial, format="PNG")
    partial.replace(path)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint folder, or folder of the authors' artifact")
    parser.add_argument("--classes", type=int, nargs="+", help="class numbers (default: all, at most ten)")
    parser.add_argument("--cfg_scale", type=float, default=1.0, help="guidance alpha, 1 to 4 (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="multiplies the noise (default: %(default)s)")
    parser.add_argument("--num_images", type=int, help="images in all (default: 8 a class)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", default="samples.png", help="X.png: a grid; X.npz: arr_0 uint8 [N, H, W, C]; else a folder "
                        "of PNGs (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser.parse_args(argv)


def run(args):
    from PIL import Image
    from tqdm import tqdm
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(args.out)
    if world > 1 and out.suffix in (".png", ".npz"):
        raise ValueError("several processes write a folder of PNGs, each its own images: give --out a folder")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    generator = load_generator(args.ckpt).to(args.device)
    classes = args.classes or list(range(min(10, generator.num_classes)))
    if not all(0 <= c < generator.num_classes for c in classes):
        raise ValueError(f"--classes: this generator knows 0 to {generator.num_classes - 1}")
    if generator.out_channels not in (1, 3):
        raise ValueError(f"{args.ckpt} makes latents of {generator.out_channels} channels, which this script cannot decode yet")
    n = 8 * len(classes) if args.num_images is None else args.num_images
    if n < 1 or args.batch_size < 1:
        raise ValueError("--num_images and --batch_size must be at least 1")
    (out.parent if out.suffix in (".png", ".npz") else out).mkdir(parents=True, exist_ok=True)

    images, start = [], time.time()
    indices = np.arange(rank, n, world)
    for at in tqdm(range(0, len(indices), args.batch_size), disable=rank > 0, unit=" batches"):
        mine = indices[at:at + args.batch_size]
        labels = [classes[i % len(classes)] for i in mine]
        batch = to_uint8(generate(generator, labels, mine, args.cfg_scale, args.temperature, args.seed, args.batch_size))
        if out.suffix in (".png", ".npz"):
            images.append(batch)
        else:
            for i, label, image in zip(mine, labels, batch.permute(0, 2, 3, 1).numpy()):
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out / f"{i:06d}_{label}.png")
    if out.suffix == ".png":
        save_grid(torch.cat(images), len(classes), out)
    elif out.suffix == ".npz":
        np.savez(out, arr_0=torch.cat(images).permute(0, 2, 3, 1).numpy())
    if rank == 0:
        print(f"{out}: {n} images, {len(indices) / (time.time() - start):.1f} a second on this process")


def main():
    try:
        run(parse())
    except (OSError, ValueError) as error:
        raise SystemExit(f"sample.py: {error}") from None


if __name__ == "__main__":
    main()
