"""Draw images from a trained generator, one forward pass each.

    python sample.py --ckpt runs/digits                                # a grid: samples.png
    python sample.py --ckpt runs/pets --classes dog 3                  # by name or by number
    python sample.py --ckpt hf://latent_L_sota --classes 22 88 108     # the authors' weights
    python sample.py --ckpt hf://latent_B_sota --classes 22 --cfg_scale 1 2 --style free fixed
    torchrun --nproc_per_node 8 sample.py --ckpt hf://pixel_L_sota --num_images 50000 --out x.npz

Several --cfg_scale or --style give a labelled row of the grid each. Image i is of class
classes[i % len(classes)] and depends on (seed, i) alone, not on processes; another --batch_size
rounds otherwise, see `generate`.
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from model import (SD_VAE, HelpFormat, UsageError, barrier, check_shared, gather, get_rank,
                   load_generator, load_vae, note, run_script, whole, world_size)

STYLES = ("free", "fixed", "alone")  # see `image_noise`


def generate(generator, labels, indices, cfg_scale=1.0, temperature=1.0, seed=0, batch_size=64,
             style="free", vae=None):
    """Images number `indices` of a seed -> float32 [N, C, H, W] on the CPU, about in [-1, 1].

    labels: [N] classes, or whatever numbers `Generator.embed_label` takes. indices: [N] ints.
    cfg_scale: alpha of A.7. temperature: multiplies the noise. vae: decodes latents.

    The same batches give the same bits. In other ones sizes XXS, XS and B moved at most one value
    in 10,000 by one grey level in float32, as on a CPU, and in bfloat16, as on a GPU, XS by one
    and B by three.
    """
    assert len(labels) == len(indices), "a single label would be taken for all images"
    device = next(generator.parameters()).device
    labels = torch.as_tensor(labels, device=device)
    images = []
    with torch.inference_mode():
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            draws = zip(*[image_noise(generator, seed, int(i), style) for i in indices[batch]])
            noise, styles = [torch.stack(tensors).to(device) for tensors in draws]
            alpha = torch.full(noise.shape[:1], float(cfg_scale), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x = generator(noise * temperature, labels[batch], alpha, styles).float()
            if vae is not None:
                x = vae.decode(x)
            images.append(x.cpu())
    images = torch.cat(images)
    if not images.isfinite().all():  # which would become black
        raise UsageError("the generator or the VAE gives NaN or Inf: a run that diverged?")
    return images


def image_noise(generator, seed, index, style="free"):
    """Noise [C, H, W] and style indices [S] of image `index`, from a random stream of its own.

    style "fixed": the style indices are those of image 0; "alone": the noise is that of image 0.
    """
    assert style in STYLES, f"{style} is none of {STYLES}"
    entropy = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    stream = torch.Generator().manual_seed(int(entropy[0]))
    size = generator.input_size
    noise = torch.randn(generator.in_channels, size, size, generator=stream)
    styles = torch.randint(generator.noise_classes, (generator.noise_coords,), generator=stream)
    if style == "fixed":
        _, styles = image_noise(generator, seed, 0)
    if style == "alone":
        noise, _ = image_noise(generator, seed, 0)
    return noise, styles


def to_uint8(images):
    """[-1, 1] -> uint8 by floor(255 (y + 1) / 2), as the paper's evaluation; NaN becomes black."""
    return ((images + 1) * 127.5).nan_to_num(0.0).clamp_(0, 255).to(torch.uint8)


def save_grid(images, columns, path, titles=(), names=()):
    """uint8 [N, 1 or 3, H, W] -> one PNG, row by row; small images are enlarged to 64 pixels.

    titles: a text for each row, written above it. names: a text for each column, at the top.
    """
    _, _, height, width = images.shape
    zoom = max(1, 64 // height)
    top = 20 if names else 0
    title_height = 20 if titles else 0
    step_x = width * zoom + 2  # a gap of two pixels between images
    step_y = height * zoom + 2 + title_height
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * step_x - 2, top + rows * step_y - 2), "white")
    for i, image in enumerate(images):
        pixels = image.expand(3, height, width).permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.BICUBIC)
        grid.paste(tile, (i % columns * step_x, top + i // columns * step_y + title_height))
    write = ImageDraw.Draw(grid).text
    for row, title in enumerate(titles):
        write((2, top + row * step_y + 4), title, "black")
    for column, name in enumerate(names):
        write((column * step_x + 2, 4), name[:step_x // 6], "black")  # 6 pixels a letter, about
    with whole(path) as partial:
        grid.save(partial, format="PNG")


# --------------------------------------------------------------------------------------------
# The command

def draw(generator, vae, labels, rows, scratch, args):
    """Images [rows * N, H, W, C], uint8, of all processes, in a file: 50,000 need no memory.

    rows: (alpha, style) each, of the same noise and labels. Processes share out whole batches, so
    that their number does not change a bit.
    """
    size = args.batch_size
    shape = None
    scratch.touch()
    with open(scratch, "r+b") as file:
        for row, (alpha, style) in enumerate(rows):
            starts = range(get_rank() * size, len(labels), world_size() * size)
            for start in tqdm(starts, unit=" batches", disable=get_rank() > 0):
                batch = slice(start, start + size)
                images = generate(generator, labels[batch], range(len(labels))[batch], alpha,
                                  args.temperature, args.seed, size, style, vae)
                pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
                shape = pixels.shape[1:]
                file.seek((row * len(labels) + start) * pixels[0].nbytes)
                file.write(pixels.tobytes())
    shape = (len(rows) * len(labels), *gather(shape)[0])  # when all have closed the file
    return np.memmap(scratch, np.uint8, "r+", shape=shape)


def add_sampling_options(parser, required):
    """What draws from a generator, here and in fid.py. required: whether --ckpt is."""
    add = parser.add_argument
    add("--ckpt", required=required, help="run or checkpoint folder, folder of the authors' "
        "artifact, or on the Hub hf://NAME or hf://USER/REPO[/SUBFOLDER][@REVISION]")
    add("--cfg_scale", type=float, nargs="+", default=[1.0], help="guidance alpha, 1 to 4")
    add("--temperature", type=float, default=1.0, help="what multiplies the noise")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--vae", default=SD_VAE, help="folder or hf:// address of the decoder of latents")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")


def load_networks(args):
    """The generator of --ckpt, and the decoder of --vae if it makes latents, else None."""
    if min(args.cfg_scale) < 1 or max(args.cfg_scale) > 4:
        note(f"training saw guidance of 1 to 4 alone, not all of --cfg_scale {args.cfg_scale}")
    generator = load_generator(args.ckpt).to(args.device)
    vae = None
    if generator.out_channels not in (1, 3):
        vae = load_vae(args.vae, args.device, generator.origin.get("vae"))
    return generator, vae


def class_numbers(words, names):
    """--classes as numbers. A name counts before a number; of folders 1 to 10 names alone do."""
    numbers = {name: i for i, name in enumerate(names)}
    if not all(name.isdecimal() for name in names):
        numbers = {str(i): i for i in range(len(names))} | numbers
    for word in words:
        if word not in numbers:
            raise UsageError(f"--classes {word}: this generator knows {', '.join(names):.300}")
    return [numbers[word] for word in words]


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormat,
                                     allow_abbrev=False)
    add_sampling_options(parser, required=True)
    add = parser.add_argument
    add("--classes", nargs="+", help="names or numbers (None: all; of a grid 10)")
    add("--style", choices=STYLES, nargs="+", default=["free"], help="fixed: all images have the "
        "first one's style indices; alone: all have its noise; free: neither")
    add("--num_images", type=int, help="images in all (None: 8 a class), or of each labelled row "
        "(None: one a class, at least 8)")
    add("--out", default="samples.png", help="X.png: a grid; X.npz: arr_0 uint8 [N, H, W, C]; "
        "any other name: a folder of PNGs")
    add("--compile", action="store_true", help="torch.compile both networks")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    folder = out.parent if out.suffix in (".png", ".npz") else out
    check_shared(folder)
    generator, vae = load_networks(args)
    names = generator.origin.get("classes") or [str(c) for c in range(generator.num_classes)]
    classes = list(range(len(names)))
    if args.classes:
        classes = class_numbers(args.classes, names)
    elif out.suffix == ".png":
        classes = classes[:10]
    if args.compile:
        generator.compile()
        if vae is not None:
            vae.net.decoder.compile()

    rows = [(alpha, style) for style in args.style for alpha in args.cfg_scale]
    columns = len(classes)
    n = 8 * columns
    titles = []
    if len(rows) > 1:  # the same images in each, not a column a class
        n = columns = args.num_images or max(8, columns)
        titles = [f"alpha {alpha:g}, style {style}" for alpha, style in rows]
    labels = [classes[i % len(classes)] for i in range(args.num_images or n)]
    scratch = folder / f"{out.name}.scratch"
    images = draw(generator, vae, labels, rows, scratch, args)
    if folder == out:
        for i in range(get_rank(), len(images), world_size()):
            with whole(out / f"{i:06d}_{labels[i % len(labels)]}.png") as partial:
                Image.fromarray(images[i].squeeze()).save(partial, format="PNG")
    elif get_rank() == 0 and out.suffix == ".png":
        heads = [names[label] for label in labels[:columns]]
        save_grid(torch.from_numpy(images).permute(0, 3, 1, 2), columns, out, titles, heads)
    elif get_rank() == 0:
        with whole(out) as partial, open(partial, "wb") as file:
            np.savez(file, arr_0=images)
    barrier()
    if get_rank() == 0:
        scratch.unlink()
        print(f"{out}: {len(images)} images of {', '.join(names[c] for c in classes):.300}")


if __name__ == "__main__":
    run_script(main)
