"""Draw images from a trained generator, one forward pass each.

    python sample.py --ckpt runs/digits                                # a grid: samples.png
    python sample.py --ckpt runs/pets --classes dog 3                  # by name or by number
    python sample.py --ckpt hf://latent_L_sota --classes 22 88 108     # the authors' weights
    python sample.py --ckpt hf://latent_B_sota --classes 22 --cfg_scale 1 1.5 2
    torchrun --nproc_per_node 8 sample.py --ckpt hf://pixel_L_sota --num_images 50000 --out x.npz

Several --cfg_scale give a labelled row of the grid each. Image i is of class
classes[i % len(classes)] and depends on (seed, i) alone, not on the number of processes; another
--batch_size changes the rounding, see `generate`.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import (SD_VAE, HelpFormat, UsageError, atomic_write, barrier, check_shared, get_rank,
                   load_generator, load_vae, note, run_script, world_size)


def generate(generator, labels, indices, cfg_scale=1.0, temperature=1.0, seed=0, batch_size=64,
             vae=None):
    """Images number `indices` of a seed -> float32 [N, C, H, W] on the CPU, about in [-1, 1].

    labels: [N] classes, or whatever numbers `Generator.embed_label` takes. indices: [N] ints.
    cfg_scale: alpha of A.7, one or [N]. temperature: multiplies the noise. vae: decodes latents.

    The same batches give the same bits. In others at most one value in 10,000 moved by one grey
    level in float32 (XXS, XS, B); in bfloat16, as on a GPU, they moved by one (XS) or three (B).
    """
    assert len(labels) == len(indices), "one label for each image"
    device = next(generator.parameters()).device
    labels = torch.as_tensor(labels, device=device)
    alphas = torch.as_tensor(cfg_scale, dtype=torch.float32, device=device).expand(len(labels))
    images = []
    with torch.inference_mode():
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            draws = zip(*[image_noise(generator, seed, int(i)) for i in indices[batch]])
            noise, styles = [torch.stack(tensors).to(device) for tensors in draws]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x = generator(noise * temperature, labels[batch], alphas[batch], styles).float()
            if vae is not None:
                x = vae.decode(x)
            images.append(x.cpu())
    images = torch.cat(images)
    if not images.isfinite().all():  # which would become black
        raise UsageError("the generator or the VAE gives NaN or Inf: a run that diverged?")
    return images


def image_noise(generator, seed, index):
    """Noise [C, H, W] and style indices [S] of image `index`, from a random stream of its own."""
    entropy = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    stream = torch.Generator().manual_seed(int(entropy[0]))
    size = generator.input_size
    noise = torch.randn(generator.in_channels, size, size, generator=stream)
    styles = torch.randint(generator.noise_classes, (generator.noise_coords,), generator=stream)
    return noise, styles


def to_uint8(images):
    """[-1, 1] -> uint8 by floor(255 (y + 1) / 2), as the paper's evaluation; NaN becomes black."""
    return ((images + 1) * 127.5).nan_to_num(0.0).clamp_(0, 255).to(torch.uint8)


def save_grid(images, columns, path, names=()):
    """uint8 [N, 1 or 3, H, W] -> one PNG, row by row; small images are enlarged to about 80 pixels.

    names: texts above the first images. Those of one row head the columns.
    """
    _, _, height, width = images.shape
    zoom = max(1, round(80 / height))
    step_x = width * zoom + 2  # a gap of two pixels between images
    step_y = height * zoom + 2
    rows = math.ceil(len(images) / columns)
    named_rows = math.ceil(len(names) / columns)
    grid = Image.new("RGB", (columns * step_x - 2, rows * step_y + named_rows * 20 - 2), "white")
    write = ImageDraw.Draw(grid).text
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x = column * step_x
        y = row * step_y + min(row + 1, named_rows) * 20
        pixels = image.expand(3, height, width).permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.BICUBIC)
        grid.paste(tile, (x, y))
        if i < len(names):
            write((x + 2, y - 16), names[i][:step_x // 6], "black")  # 6 pixels a letter, about
    with atomic_write(path) as partial:
        grid.save(partial, format="PNG")


def own_batches(count, size):
    """The slices of 0 to count - 1 that this process makes.

    Processes share out whole batches, so that their number does not change a bit.
    """
    starts = range(get_rank() * size, count, world_size() * size)
    for start in tqdm(starts, unit=" batches", leave=False, disable=get_rank() > 0):
        yield slice(start, start + size)


# ---- The command ---------------------------------------------------------------------------------

def add_sampling_options(parser, required):
    """Sampling options, shared with fid.py. required: whether --ckpt is mandatory."""
    add = parser.add_argument
    add("--ckpt", required=required, help="run or checkpoint folder, folder of the authors' "
        "artifact, or on the Hub hf://NAME or hf://USER/REPO[/SUBFOLDER][@REVISION]")
    add("--cfg_scale", type=float, nargs="+", default=[1.0], help="guidance alpha, of 1 to 4")
    add("--temperature", type=float, default=1.0, help="what multiplies the noise")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--vae", default=SD_VAE, help="folder or hf:// address of the decoder of latents")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")


def load_networks(args):
    """The generator of --ckpt, and the decoder of --vae if it makes latents, else None."""
    if min(args.cfg_scale) < 1 or max(args.cfg_scale) > 4:
        note("training saw guidance of 1 to 4 alone")
    generator = load_generator(args.ckpt).to(args.device)
    vae = None
    if generator.out_channels not in (1, 3):
        vae = load_vae(args.vae, args.device, generator.origin.get("vae"))
    return generator, vae


def class_numbers(words, names):
    """--classes as numbers. A word is a name or, unless all names are numbers, a number."""
    numbers = {name: i for i, name in enumerate(names)}
    if not all(name.isdecimal() for name in names):
        numbers = {str(i): i for i in range(len(names))} | numbers
    for word in words:
        if word not in numbers:
            raise UsageError(f"--classes {word}: this generator knows {', '.join(names):.300}")
    return [numbers[word] for word in words]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormat)
    add_sampling_options(parser, required=True)
    add = parser.add_argument
    add("--classes", nargs="+", help="names or numbers (None: all; of a grid 10)")
    add("--num_images", type=int, help="images in all (None: 8 a class), or of each labelled row "
        "(None: one a class, at least 8)")
    add("--out", default="samples.png", help="X.png: a grid; X.npz: arr_0 uint8 [N, H, W, C]; "
        "any other name: a folder of PNGs")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    folder = out.parent if out.suffix in (".png", ".npz") else out
    check_shared(folder)
    generator, vae = load_networks(args)
    names = generator.origin.get("classes") or [str(c) for c in range(generator.num_classes)]
    classes = class_numbers(args.classes or names, names)
    if out.suffix == ".png" and not args.classes:
        classes = classes[:10]

    rows = len(args.cfg_scale)
    columns = len(classes)
    n = args.num_images or 8 * columns
    if rows > 1:  # the same images in each row, not a column a class
        n = columns = args.num_images or max(8, columns)
    labels = [classes[i % len(classes)] for i in range(n)] * rows
    indices = list(range(n)) * rows
    alphas = np.repeat(args.cfg_scale, n)
    files = [out / f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    scratch = folder / f"{out.name}.scratch"  # 50,000 images need no memory
    if folder != out:
        scratch.touch()
    elif set(out.rglob("*.png")) - set(files):
        raise UsageError(f"{out} holds other images, which a score of this folder would count")
    for batch in own_batches(len(labels), args.batch_size):
        images = generate(generator, labels[batch], indices[batch], alphas[batch],
                          args.temperature, args.seed, args.batch_size, vae)
        pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
        if folder == out:
            for file, image in zip(files[batch], pixels):
                with atomic_write(file) as partial:
                    Image.fromarray(image.squeeze()).save(partial, format="PNG")
        else:
            with open(scratch, "r+b") as file:
                file.seek(batch.start * pixels[0].nbytes)
                file.write(pixels.tobytes())
    barrier()
    if get_rank() > 0:
        return
    if folder != out:
        images = np.memmap(scratch, np.uint8, "r+", shape=(len(files), *pixels.shape[1:]))
        if out.suffix == ".png":
            heads = [names[label] for label in labels[:columns]]
            if rows > 1:
                heads = [f"{alpha:g} {names[label]}" for alpha, label in zip(alphas, labels)]
            save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), columns, out, heads)
        else:
            with atomic_write(out) as partial, open(partial, "wb") as file:
                np.savez(file, arr_0=images)
        scratch.unlink()
    print(f"{out}: {len(files)} images")


if __name__ == "__main__":
    run_script(main)
