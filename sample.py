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
import contextlib
import json
import math
import os
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from model import (SD_VAE, UsageError, barrier, digest, gather, get_rank, load_generator, load_vae,
                   number, on_all_ranks, one_line, positive_int, run_script, sha256,
                   usable_device, whole_file, world_size)
from prepare_data import EXTENSIONS, note


def generate(generator, labels, indices, cfg_scale=1.0, temperature=1.0, seed=0, batch_size=64,
             style="free", vae=None):
    """Images number `indices` of a seed -> float32 [N, C, H, W] on the CPU, about in [-1, 1].

    labels, indices: the images' classes and numbers, [N] ints each. cfg_scale: alpha of A.7.
    temperature: multiplies the noise. style: see `image_noise`. vae: decodes latents.
    Raises UsageError for networks that give NaN or Inf.

    The same batches give the same bits. In other ones sizes XXS, XS and B moved at most one value
    in 10,000 by one grey level in float32, as on a CPU, and in bfloat16, as on a GPU, XS by one
    and B by three.
    """
    device = next(generator.parameters()).device
    images = []
    with torch.inference_mode():
        for start in range(0, len(indices), batch_size):
            batch = slice(start, start + batch_size)
            draws = zip(*[image_noise(generator, seed, int(i), style) for i in indices[batch]])
            noise, styles = [torch.stack(tensors).to(device) for tensors in draws]
            label = torch.as_tensor(labels[batch], device=device)
            alpha = torch.full((len(label),), float(cfg_scale), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                x = generator(noise * temperature, label, alpha, styles).float()
            if vae is not None:
                x = vae.decode(x)
            images.append(x.cpu())
            if not images[-1].isfinite().all():
                raise UsageError("the generator or decoder gives NaN or Inf: damaged weights, or "
                                 "a run that diverged")
    return torch.cat(images)


def image_noise(generator, seed, index, style="free"):
    """Noise [C, H, W] and style indices [S] of image `index`, from a random stream of its own.

    style "fixed": the style indices are those of image 0; "alone": the noise is that of image 0.
    """
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


def save_grid(images, columns, path, titles=None, names=None):
    """uint8 [N, 1 or 3, H, W] -> one PNG, row by row; small images are enlarged to 64 pixels.

    titles: a text for each row, written above it. names: a text for each column, at the top.
    """
    count, _, height, width = images.shape
    zoom = max(1, 64 // height)
    top = 20 if names else 0
    title_height = 20 if titles else 0
    step_x = width * zoom + 2  # a gap of two pixels between images
    step_y = height * zoom + 2 + title_height
    rows = math.ceil(count / columns)
    grid = Image.new("RGB", (columns * step_x - 2, top + rows * step_y - 2), "white")
    for i, image in enumerate(images):
        pixels = image.expand(3, height, width).permute(1, 2, 0).numpy()
        tile = Image.fromarray(pixels).resize((width * zoom, height * zoom), Image.BICUBIC)
        grid.paste(tile, (i % columns * step_x, top + i // columns * step_y + title_height))
    for row, title in enumerate(titles or []):
        grid.paste(text_image(title, grid.width), (0, top + row * step_y))
    for column, name in enumerate(names or []):
        grid.paste(text_image(name, width * zoom), (column * step_x, 0))
    with whole_file(path) as file:
        grid.save(file, format="PNG")


def text_image(text, width):
    """One line of text, smaller where it is too long; what does not fit even so is cut off.

    PIL's font has the letters of ASCII: accents are left out, other letters become question marks.
    """
    letters = unicodedata.normalize("NFKD", text)
    letters = "".join(letter for letter in letters if not unicodedata.combining(letter))
    text = letters.encode("ascii", "replace").decode()
    image = Image.new("RGB", (width, 18), "white")
    size = 14
    while size > 9 and ImageFont.load_default(size).getlength(text) > width - 3:
        size -= 1
    ImageDraw.Draw(image).text((2, 2), text, "black", ImageFont.load_default(size))
    return image


# --------------------------------------------------------------------------------------------
# The command

def draw(generator, vae, classes, rows, n, args):
    """This process's images, one after another, as (place, uint8 [H, W, C]).

    rows: (alpha, style) each, all of images 0 to n - 1: that of row r and image i is at r * n + i.
    Processes share out whole batches, so that their number does not change a bit.
    """
    batches = [(row, start) for row in range(len(rows)) for start in range(0, n, args.batch_size)]
    mine = batches[get_rank()::world_size()]
    for row, start in tqdm(mine, unit=" batches", disable=get_rank() > 0):
        alpha, style = rows[row]
        indices = range(start, min(start + args.batch_size, n))
        labels = [classes[i % len(classes)] for i in indices]
        images = generate(generator, labels, indices, alpha, args.temperature, args.seed,
                          args.batch_size, style, vae)
        for i, image in zip(indices, to_uint8(images).permute(0, 2, 3, 1).numpy()):
            yield row * n + i, image


def write_folder(folder, images, files, origin):
    """A folder of PNGs of one run alone. files: the name of each place; origin: what made them."""
    on_all_ranks(begin_folder, folder, files, origin)
    for place, image in images:
        with whole_file(folder / files[place]) as file:
            Image.fromarray(image.squeeze()).save(file, format="PNG")
    barrier()


def begin_folder(folder, files, origin):
    """samples.json holds the origin: other weights or settings do not go on there."""
    if get_rank() > 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "samples.json"
    if not any(folder.glob("[!.]*")):
        # Of two runs that start at once the second finds the first one's file.
        with contextlib.suppress(FileExistsError), open(record, "x") as file:
            json.dump(origin, file)
    try:
        before = json.loads(record.read_text())
        other = [f"other {key}" for key in origin if before[key] != origin[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} holds files and no samples.json that says what made them: "
                         "choose an empty folder") from error
    images = {path.name for path in folder.glob("[!.]*") if path.suffix.lower() in EXTENSIONS}
    other += sorted(images.difference(files))
    if other:
        raise UsageError(f"{folder} holds images of another run ({other[0]}): choose another")


def check_out(path):
    """Raises UsageError where no file `path` can be written: before the work, not after it."""
    try:
        if path.exists() and not path.is_file():  # of /dev/null a file would take the place
            raise OSError("it is a folder or a device")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({one_line(error)})") from error


def write_file(path, images, count, columns, titles, names):
    """One .npz (arr_0 uint8 [N, H, W, C]) or .png (a grid) of the images of all processes.

    They fill a scratch file together, so that 50,000 images need no memory.
    """
    # Named after rank 0's process: all ranks agree on that, and no other run has it.
    scratch = path.with_name(f"{path.name}.{gather(os.getpid())[0]}.scratch")
    try:
        scratch.touch()
        with open(scratch, "r+b") as file:
            for place, image in images:
                file.seek(place * image.nbytes)
                file.write(image.tobytes())
        barrier()
        if get_rank() > 0:
            return
        pixels = np.memmap(scratch, np.uint8, "r+", shape=(count, *image.shape))
        if path.suffix == ".png":
            save_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), columns, path, titles, names)
        else:
            with whole_file(path) as file:
                np.savez(file, arr_0=pixels)
    finally:
        if get_rank() == 0:
            scratch.unlink(missing_ok=True)


class HelpFormat(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A script's text as it stands, and every option with its default."""


def add_sampling_options(parser, required):
    """What draws from a generator, here and in fid.py. required: whether --ckpt is."""
    add = parser.add_argument
    add("--ckpt", required=required, help="run or checkpoint folder, folder of the authors' "
        "artifact, or on the Hub hf://NAME or hf://USER/REPO[/SUBFOLDER][@REVISION]")
    add("--cfg_scale", type=number(float), nargs="+", default=[1.0], help="guidance alpha, 1 to 4")
    add("--temperature", type=number(float, least=0), default=1.0, help="what multiplies the noise")
    add("--seed", type=number(int, least=0), default=0, help="seed of the noise")
    add("--batch_size", type=positive_int, default=64, help="images at a time")
    add("--vae", default=SD_VAE, help="folder or hf:// address of the decoder of latents")
    add("--vae_chunk", type=positive_int, default=16, help="images decoded at a time on a GPU")
    add("--no_converted_copy", action="store_true", help="keep no copy of converted weights")


def load_networks(args):
    """The generator of --ckpt, and the decoder of --vae if it makes latents, else None."""
    for alpha in args.cfg_scale:
        if not 1 <= alpha <= 4:
            note(f"warning: training saw guidance of 1 to 4 alone, not --cfg_scale {alpha:g}")
    generator = load_generator(args.ckpt, not args.no_converted_copy).to(args.device)
    if generator.num_classes == 1 and args.cfg_scale != [1.0]:
        note("warning: a generator of one class: guidance means nothing")
    vae = None
    if generator.out_channels not in (1, 3):
        vae = load_vae(args.vae, args.device, args.vae_chunk, generator.origin.get("vae"))
    return generator, vae


def class_numbers(words, names, num_classes):
    """--classes as numbers. A name counts before a number; of folders 1 to 10 names alone do."""
    numbers = []
    only_names = bool(names) and all(name.isdecimal() for name in names)
    for word in words:
        if word in names:
            numbers.append(names.index(word))
        elif word.isdecimal() and int(word) < num_classes and not only_names:
            numbers.append(int(word))
        else:
            known = ", ".join(names)
            if not only_names:
                known = f"0 to {num_classes - 1}, by name {known or '(none)'}"
            raise UsageError(f"--classes {word}: this generator knows {known:.300}")
    return numbers


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormat,
                                     allow_abbrev=False)
    add_sampling_options(parser, required=True)
    add = parser.add_argument
    add("--classes", nargs="+", help="names or numbers (None: all; of a grid 10)")
    add("--style", choices=("free", "fixed", "alone"), nargs="+", default=["free"], help="fixed: "
        "all images have the first one's style indices; alone: all have its noise; free: neither")
    add("--num_images", type=positive_int, help="images in all (None: 8 a class), or of a labelled "
        "row (None: one a class, at least 8)")
    add("--out", default="samples.png", help="X.png: a grid; X.npz: arr_0 uint8 [N, H, W, C]; a "
        "name without a dot: a folder of PNGs")
    add("--compile", action="store_true", help="torch.compile both networks")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda or cpu")
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in ("", ".png", ".npz"):
        parser.error(f"--out {args.out}: X.png, X.npz, or a folder, whose name has no dot")
    if len(args.cfg_scale) * len(args.style) > 1 and not args.out.endswith(".png"):
        parser.error("several --cfg_scale or --style are rows of a grid: --out X.png")
    return args


def main(argv=None):
    args = parse(argv)
    out = Path(args.out)
    on_all_ranks(check_out, out if out.suffix else out / "samples")
    generator, vae = load_networks(args)
    names = generator.origin.get("classes", [])  # of older checkpoints and the authors' none
    classes = list(range(generator.num_classes))
    if args.classes:
        classes = on_all_ranks(class_numbers, args.classes, names, generator.num_classes)
    elif out.suffix == ".png":
        classes = classes[:10]
    if args.compile:
        generator.compile()
        if vae is not None:
            vae.net.decoder.compile()

    rows = [(alpha, style) for style in args.style for alpha in args.cfg_scale]
    columns = len(classes)
    n = args.num_images or 8 * columns
    titles = None
    if len(rows) > 1:  # the same images in each, not a column a class
        n = args.num_images or max(8, columns)
        columns = n
        titles = [f"alpha {alpha:g}, style {style}" for alpha, style in rows]
    images = draw(generator, vae, classes, rows, n, args)
    if out.suffix:
        heads = [names[classes[i % len(classes)]] for i in range(columns)] if names else None
        write_file(out, images, len(rows) * n, columns, titles, heads)
    else:
        origin = {"seed": args.seed, "cfg_scale": args.cfg_scale, "style": args.style,
                  "temperature": args.temperature, "classes": classes,
                  "weights": digest(generator), "vae": sha256(vae.weights_file) if vae else None}
        files = [f"{i:06d}_{classes[i % len(classes)]}.png" for i in range(n)]
        write_folder(out, images, files, origin)
    if get_rank() == 0:
        print(f"{out}: {len(rows) * n} images")
        if names and len(classes) <= 100:
            print("classes:", ", ".join(f"{c} {names[c]}" for c in classes))


if __name__ == "__main__":
    run_script(main)
