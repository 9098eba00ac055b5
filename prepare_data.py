"""Images -> one memory-mapped array of pixels or latents, their labels, and what training reads.

    python prepare_data.py                     # the 1,797 digits of assets/, as data/digits
    python prepare_data.py pixels --data cifar10.zip --out data/cifar10
    python prepare_data.py pixels --data imagenet/train --out data/imagenet256 --size 256
    torchrun --nproc_per_node 8 prepare_data.py latents --data imagenet/train --out data/latents

--data is a folder or a .zip of CLASS/*.jpg or {train,val,test}/CLASS/*.jpg. OUT/SPLIT/ will hold
    images.bin    pixels: uint8 [N, C, H, W]; latents: float16 [N, views, mean and std of C
                  channels, H, W], times 0.18215; sorted by class: a class is a range of rows
    labels.npy    int64 [N]
    meta.json     kind, shape, dtype, names of the classes, images per class
After an interruption the same command, on any number of processes, goes on where it was. On a CPU
the files have the same bits on any number of processes.

Latents are the posterior's mean and std, of each image and its mirror image, so that every visit
draws anew. (The authors store one draw of each: 21 GB of ImageNet, where this is 42.) Encoders of
latents want random crops from before the VAE: --crops K stores K of each image instead.

The digits (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0) are 8x8 in 17
greys; every fifth of a class is in the split `test`.
"""
import argparse
import functools
import hashlib
import io
import json
import math
import os
import shutil
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from model import (LATENT_SCALE, SD_VAE, UsageError, barrier, gather, get_rank, load_vae, number,
                   on_all_ranks, one_line, positive_int, run_script, whole_file, world_size)

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
KINDS = {"pixels": "uint8", "latents": "float16"}


# --------------------------------------------------------------------------------------------
# What training reads

class Dataset:
    """A prepared split: `images`, the memmap described above, `labels` [N], and `meta`, the json.

    `shape` [C, H, W] is a sample's. Raises UsageError for a folder that is not there, or not whole.
    """

    def __init__(self, folder, split="train"):
        path = Path(folder) / split
        if not (path / "meta.json").is_file():
            raise UsageError(f"{path}: no prepared data there; make it with: python "
                             f"prepare_data.py --data SOURCE --out {folder}")
        try:
            self.meta = json.loads((path / "meta.json").read_text())
            shape = tuple(self.meta["shape"])
            dtype = np.dtype(KINDS[self.meta["kind"]])
            expected = math.prod(shape) * dtype.itemsize
            size = (path / "images.bin").stat().st_size
            if len(shape) != {"pixels": 4, "latents": 5}[self.meta["kind"]]:
                raise ValueError(f"shape {list(shape)} of {self.meta['kind']}")
            if size != expected:
                raise ValueError(f"images.bin has {size} bytes, its meta.json says {expected}")
            self.images = np.memmap(path / "images.bin", dtype, "r", shape=shape)
            self.index(np.load(path / "labels.npy", allow_pickle=False))
            in_order = (np.diff(self.labels) >= 0).all()
            if len(self) != shape[0] or len(self.count) != self.num_classes or not in_order:
                raise ValueError("labels.npy does not fit meta.json")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path}: cannot be read ({one_line(error)}): prepare it "
                             "again") from error
        self.shape = shape[1:]
        if self.meta["kind"] == "latents":
            self.shape = (shape[2] // 2, *shape[3:])

    def index(self, labels):
        """Labels, sorted: class c has the rows first[c] to first[c] + count[c] - 1."""
        self.labels = labels
        self.count = np.bincount(labels, minlength=self.num_classes)
        self.first = np.cumsum(self.count) - self.count

    def __len__(self):
        return len(self.labels)

    @property
    def num_classes(self):
        return len(self.meta["classes"])

    def fingerprint(self):
        """Hash of meta.json, the labels and 64 images: a run resumes on the data it began with."""
        some = np.linspace(0, len(self) - 1, 64).astype(int)
        parts = [json.dumps(self.meta).encode(), self.labels.tobytes(), self.images[some].tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def batch(self, ids, rng=None, flip=False, device="cpu"):
        """Samples of these ids, float32 [n, C, H, W]: pixels in [-1, 1], or latents drawn anew.

        rng: numpy Generator, or a seed for each sample, whose randomness depends on it alone.
        Without it latents are the means of the first view. flip: mirror half of them; crops were
        mirrored when they were made.
        """
        ids = np.asarray(ids)
        seeds = rng
        if isinstance(rng, np.random.Generator):
            seeds = rng.integers(1 << 63, size=len(ids))
        if self.meta["kind"] == "pixels":
            x = upload(self.images[ids], device).float() / 127.5 - 1
            if flip:
                mirrored = upload(seeds % 2 == 1, device)[:, None, None, None]
                x = torch.where(mirrored, x.flip(3), x)
            return x
        if seeds is None:
            return upload(self.images[ids, 0, :self.shape[0]], device).float()
        views = self.images.shape[1] if flip or self.meta.get("views") == "crops" else 1
        mean, std = upload(self.images[ids, seeds % views], device).chunk(2, 1)
        noise = torch.empty(mean.shape, device=device)
        stream = torch.Generator(device)
        for row, seed in zip(noise, seeds.tolist()):
            row.normal_(generator=stream.manual_seed(seed))
        return mean + std * noise

    def draw(self, label, n, rng):
        """n ids of one class, without replacement; rng: numpy Generator."""
        return self.first[label] + rng.choice(self.count[label], n, replace=False, shuffle=False)

    def draw_any(self, n, rng):
        """n ids of any class, without replacement."""
        return rng.choice(len(self), n, replace=False, shuffle=False)

    def fresh(self, start, n, seed):
        """Ids number start to start + n - 1 of an endless row of shuffled epochs.

        It has no state, so resuming is free; and processes that take neighbouring pieces of a
        step's n ids never read the same sample in an epoch.
        """
        pieces = []
        while n > 0:
            epoch, offset = divmod(start, len(self))
            piece = shuffled(len(self), seed, epoch)[offset:offset + n]
            pieces.append(piece)
            start += len(piece)
            n -= len(piece)
        return np.concatenate(pieces)


@functools.lru_cache(maxsize=2)  # of a million ids it takes longer than a batch
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def upload(array, device):
    """An array as a tensor on the device; on its way to a GPU neither waits for the other."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prefetch(function, steps):
    """function(step) of each step, in order, while a background thread computes the next one.

    It is one call ahead, never more, and what it raises is raised here.
    """
    ahead = None
    with ThreadPoolExecutor(1) as thread:
        for step in steps:
            following = thread.submit(function, step)
            if ahead:
                yield ahead.result()
            ahead = following
        if ahead:
            yield ahead.result()


# --------------------------------------------------------------------------------------------
# Where images come from. A source is a function that returns
#     {split: [(class, item), ...]}   a class is a name or a number, an item what `load` takes
#     load(item) -> PIL image         called by several threads; raises BrokenImage for bad files
# A new data set (MNIST's files, CIFAR's, images without classes) is such a function, and two lines
# in open_source.

def open_source(data):
    path = Path(data)
    if data == "digits":
        return digits()
    if path.is_dir():
        return class_folders(path)
    return class_zip(path)


def digits():
    splits = {}
    images = {}
    for split, (pixels, labels) in embedded_digits().items():
        names = [f"{split} {i}" for i in range(len(labels))]
        splits[split] = list(zip(labels.tolist(), names))
        images.update(zip(names, pixels[:, 0]))
    return splits, lambda name: Image.fromarray(images[name])


def embedded_digits():
    """{split: (images uint8 [N, 1, 8, 8], labels)}: every fifth image of a class is held out."""
    with np.load(DIGITS, allow_pickle=False) as file:
        order = np.argsort(file["labels"], kind="stable")
        labels = file["labels"][order].astype(np.int64)
        greys = file["images"][order].astype(np.float32)  # 0 to 16
    images = np.round(greys * (255 / 16)).astype(np.uint8)[:, None]
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # 0, 1, ... within its class
    test = place % 5 == 4
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def class_folders(path):
    names = []
    for root, _, files in os.walk(path, followlinks=True):  # subsets of ImageNet are often links
        folder = Path(root).relative_to(path)
        names += [(folder / file).as_posix() for file in files]
    return by_class(path, names, lambda name: (path / name).read_bytes())


def class_zip(path):
    try:
        # Not by its name: then it would count its readers, which is not safe among threads.
        archive = zipfile.ZipFile(open(path, "rb"))
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: neither a folder nor a whole .zip "
                         f"({one_line(error)})") from error
    return by_class(path, archive.namelist(), archive.read)


def by_class(path, names, read):
    """A source of files named CLASS/*.jpg or SPLIT/CLASS/*.jpg; read(name) gives their bytes."""
    names = sorted(name for name in names if name.lower().endswith(EXTENSIONS)
                   and not Path(name).name.startswith("."))
    top = {name.split("/")[0] for name in names}
    has_splits = top <= set(SPLITS)
    if len(top) == 1 and not has_splits and all(name.count("/") > 1 for name in names):
        raise UsageError(f"{path}: all is inside one folder; class folders must be at the top")
    splits = {}
    for name in names:
        folders = name.split("/")[:-1]
        split = folders.pop(0) if has_splits else "train"
        if not folders:
            raise UsageError(f"{path}: {name} is in no class folder")
        splits.setdefault(split, []).append((folders[0], name))
    if not splits:
        raise UsageError(f"{path}: no images there (looked for {' '.join(EXTENSIONS)})")

    def load(name):
        try:
            data = read(name)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise BrokenImage(one_line(error)) from error
        return open_image(data)
    return splits, load


# --------------------------------------------------------------------------------------------
# One image

class BrokenImage(UsageError):
    """An image file that cannot be read or decoded, and why."""


def open_image(data):
    """Encoded image -> upright RGB image of PIL; what is transparent shows white.

    Raises BrokenImage for what PIL cannot decode.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        image.load()
    except Exception as error:  # PIL has many kinds for a damaged file
        raise BrokenImage(one_line(error)) from error
    if image.mode.startswith("I"):  # 16 bits, which PIL's own conversion would clip to white
        greys = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(greys.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def decode(data, size, channels):
    """Encoded image -> uint8 [channels, size, size], see `open_image` and `to_array`."""
    return to_array(open_image(data), size, channels)


def to_array(image, size=None, channels=None):
    """PIL image -> uint8 [C, size, size], its centre crop as in ADM. None: as the image is."""
    if channels:
        image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != (size, size):
        while min(image.size) >= 2 * size:  # averages first: bicubic alone looks at too few pixels
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        shape = (round(image.width * scale), round(image.height * scale))
        image = image.resize(shape, Image.Resampling.BICUBIC)
        left = (image.width - size) // 2
        top = (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def random_crop(width, height, min_area, rng):
    """A random part of an image: (left, top, right, bottom) in pixels, not rounded.

    At least min_area of its area (A.3: 0.2), with sides in ratios of 3:4 to 4:3. rng: numpy's.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w = math.sqrt(area * ratio)
        h = math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    w = min(w, width)  # of a very long image, as much as there is
    h = min(h, height)
    left = rng.uniform(0, width - w)
    top = rng.uniform(0, height - h)
    return left, top, left + w, top + h


def crop_resize(x, boxes, flips):
    """Boxes [n, 4] of `random_crop`, cut out of x [n, C, H, W] in [-1, 1] and resized to H x W.

    flips [n]: which of them are mirrored.
    """
    height, width = x.shape[2:]
    # To coordinates in which the image is [-1, 1] each way.
    boxes = boxes / [width / 2, height / 2, width / 2, height / 2] - 1
    left, top, right, bottom = upload(boxes, x.device).to(x.dtype).unbind(1)
    mirror = torch.where(upload(flips, x.device), -1, 1)
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = mirror * (right - left) / 2
    theta[:, 0, 2] = (left + right) / 2
    theta[:, 1, 1] = (bottom - top) / 2
    theta[:, 1, 2] = (top + bottom) / 2
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, "bicubic", "border", align_corners=False).clamp(-1, 1)


# --------------------------------------------------------------------------------------------
# Writing, by any number of processes. A split that is not whole yet is the folder OUT/SPLIT.tmp:
#     images.bin    from the start a place for each image
#     done          a byte for each block of images: 1 once it is written and synced
#     meta.json     what it is made of, so that other images or options are refused

class Latents:
    """Images through the VAE: plain and mirrored, or random crops.

    Crop k of image i depends on (seed, i, k) alone.
    """

    def __init__(self, vae, size=256, chunk=16, crops=0, seed=0, device="cpu"):
        self.vae = load_vae(vae, device, chunk)
        self.vae.net.float()  # once for all training: bfloat16 is coarser than what is stored
        if size % self.vae.downsampling:
            raise UsageError(f"--size {size} must be divisible by {self.vae.downsampling}")
        self.size = size
        self.crops = crops
        self.seed = seed
        self.device = device
        with open(self.vae.weights_file, "rb") as f:
            weights = hashlib.file_digest(f, "sha256").hexdigest()
        self.meta = {"kind": "latents", "views": "crops" if crops else "plain, mirrored",
                     "size": size, "seed": seed, "scale": LATENT_SCALE, "vae": weights}

    def views(self, image, i):
        """PIL image number i -> uint8 [1 or crops, 3, size, size]."""
        if not self.crops:
            return to_array(image, self.size, 3)[None]
        views = []
        for k in range(self.crops):
            rng = np.random.default_rng([self.seed, i, k])
            box = random_crop(*image.size, 0.2, rng)
            view = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
            if rng.random() < 0.5:
                view = ImageOps.mirror(view)
            views.append(to_array(view, channels=3))
        return np.stack(views)

    def encode(self, views):
        """A list of views -> float16 [n, views, mean and std, h, w]."""
        x = torch.from_numpy(np.stack(views)).to(self.device)
        if not self.crops:
            x = torch.cat([x, x.flip(4)], 1)
        mean, std = self.vae.encode(x.flatten(0, 1).float() / 127.5 - 1)
        moments = torch.cat([mean, std], 1).half()
        if not moments.isfinite().all():
            raise UsageError("the VAE's latents are not finite in float16: damaged weights?")
        return moments.unflatten(0, x.shape[:2]).cpu().numpy()


def prepare(source, out, size=None, channels=None, skip_broken=False, latents=None, workers=1):
    """Write OUT/SPLIT for every split of the source; one that is there already is left as it is.

    All processes call it and share the work. size: of centre crops; channels: 1 or 3 (None: as the
    images are). latents: Latents, in place of pixels. workers: threads of a process that decode.
    Raises UsageError for a broken image, unless skip_broken leaves it out.
    """
    splits, load = on_all_ranks(open_source, source)
    classes = sorted({label for items in splits.values() for label, _ in items})
    number_of = {label: i for i, label in enumerate(classes)}
    meta = {"kind": "pixels", "classes": [str(label) for label in classes]}
    if latents is not None:
        meta.update(latents.meta)

    def view(item, i):
        image = load(item)
        if latents is not None:
            return latents.views(image, i)
        return to_array(image, size, channels)

    encode = np.stack if latents is None else latents.encode
    for split, items in splits.items():
        items.sort(key=lambda pair: pair[0])  # keeps the order within a class
        labels = np.array([number_of[label] for label, _ in items])
        items = [item for _, item in items]
        write_split(Path(out) / split, meta, items, labels, view, encode, skip_broken, workers)


def write_split(folder, meta, items, labels, view, encode, skip_broken, workers):
    """Rows encode([view(items[0], 0), view(items[1], 1), ...]) -> the folder."""
    partial = folder.with_name(folder.name + ".tmp")
    names = [str(item) for item in items]
    n = len(items)
    # A 64th of all, so that every process has its part, but no more than memory holds.
    size = min(max(n // 64, 16), 256)
    blocks = [range(start, min(start + size, n)) for start in range(0, n, size)]

    def view_or_reason(i):
        try:
            return view(items[i], i)
        except BrokenImage as error:
            return error

    first = on_all_ranks(first_view, folder, n, view_or_reason)
    row = on_all_ranks(encode, [first])[0]
    meta = {**meta, "files": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "dtype": str(row.dtype), "shape": [n, *row.shape]}
    if not on_all_ranks(begin, folder, partial, meta, n * row.nbytes, len(blocks)):
        return
    broken = on_all_ranks(fill, partial, blocks, names, view_or_reason, encode, first, workers)
    for others in gather(broken):
        broken.update(others)
    on_all_ranks(finish, folder, partial, meta, names, labels, broken, skip_broken)


def first_view(folder, n, view_or_reason):
    """The first image that is not broken: all others have its shape."""
    for i in range(n):
        view = view_or_reason(i)
        if not isinstance(view, BrokenImage):
            return view
    raise UsageError(f"{folder}: none of its images can be read ({view})")


def begin(folder, partial, meta, size, blocks):
    """Makes the folder to fill, unless it is there. Returns False where the split is whole."""
    for file in (folder / "meta.json", partial / "meta.json"):
        if file.is_file():
            before = json.loads(file.read_text())
            same = all(before.get(key) == meta[key] for key in meta if key != "shape")
            # The number of images may be less by the broken ones.
            if not same or before["shape"][1:] != meta["shape"][1:]:
                raise UsageError(f"{file.parent} is of other images or options: remove it, or "
                                 "choose another --out")
    if folder.exists():
        return False
    images = partial / "images.bin"
    # It is smaller if a run was killed just after it took broken images out.
    wanted = {"images.bin": size, "done": blocks}
    there = (partial / "meta.json").is_file() and all(
        (partial / name).is_file() and (partial / name).stat().st_size == size
        for name, size in wanted.items())
    if get_rank() == 0 and not there:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < size:
            raise UsageError(f"{partial} needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f}")
        images.touch()
        os.truncate(images, size)
        with whole_file(partial / "done") as f:
            f.write(bytes(blocks))
        with whole_file(partial / "meta.json") as f:
            f.write(json.dumps(meta).encode())
    return True


def fill(partial, blocks, names, view_or_reason, encode, first, workers):
    """This process's part of the blocks that are not done. Returns {i: reason} of broken images.

    A block with broken images is never marked as done: they may be mended at the next start.
    """
    todo = np.flatnonzero(np.fromfile(partial / "done", np.uint8) == 0)
    barrier()  # all have looked before the first marks something
    todo = todo[get_rank()::world_size()]
    broken = {}
    with (ThreadPoolExecutor(workers) as pool, open(partial / "images.bin", "r+b") as images,
          open(partial / "done", "r+b") as done):
        batches = prefetch(lambda b: list(pool.map(view_or_reason, blocks[b])), todo)
        for b in tqdm(todo, str(partial), unit=" blocks", disable=get_rank() > 0):
            views = next(batches)
            for k, i in enumerate(blocks[b]):
                if isinstance(views[k], BrokenImage):
                    broken[i] = views[k]
                    views[k] = first  # stands there until it is taken out
                elif views[k].shape != first.shape:
                    raise UsageError(f"{names[i]} is {list(views[k].shape)}, the first image "
                                     f"{list(first.shape)}: give one --size")
            rows = encode(views)
            images.seek(blocks[b][0] * rows[0].nbytes)
            images.write(rows.tobytes())
            images.flush()
            os.fsync(images.fileno())
            if broken.keys().isdisjoint(blocks[b]):
                done.seek(b)
                done.write(b"\1")
                done.flush()
    return broken


def finish(folder, partial, meta, names, labels, broken, skip_broken):
    """Rank 0 takes broken images out, adds labels and meta.json, and gives the folder its name."""
    if get_rank() > 0:
        return
    for i in sorted(broken):
        print(f"{names[i]}: cannot be read ({broken[i]})")
    if broken and not skip_broken:
        raise UsageError(f"{len(broken)} broken images: mend them, or leave them out with "
                         "--skip_broken; all others are kept for the next start")
    if broken:
        images = np.memmap(partial / "images.bin", meta["dtype"], "r", shape=tuple(meta["shape"]))
        with whole_file(partial / "images.bin") as f:
            for i in range(len(images)):
                if i not in broken:
                    f.write(images[i].tobytes())
        labels = np.delete(labels, list(broken))
    with whole_file(partial / "labels.npy") as f:
        np.save(f, labels)
    count = np.bincount(labels, minlength=len(meta["classes"]))
    meta.update(shape=[len(labels), *meta["shape"][1:]], images_per_class=count.tolist(),
                skipped=[names[i] for i in sorted(broken)])
    with whole_file(partial / "meta.json") as f:
        f.write(json.dumps(meta, indent=1).encode())
    partial.rename(folder)
    for path in folder.iterdir():
        if path.name not in ("images.bin", "labels.npy", "meta.json"):
            path.unlink()
    print(f"{folder}: {meta['dtype']} {meta['shape']}, {len(count)} classes of {count.min()} to "
          f"{count.max()} images, {len(broken)} broken ones left out")


# --------------------------------------------------------------------------------------------
# The command

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", nargs="?", choices=KINDS, default="pixels", help="what is stored")
    add("--data", default="digits", help="folder or .zip of class folders, or `digits` (default)")
    add("--out", help="folder to write (the digits' default: data/digits)")
    add("--size", type=positive_int, help="side of centre crops (None: none; latents: 256)")
    add("--channels", type=int, choices=(1, 3), help="1: greyscale (None: 3, the digits' 1)")
    add("--skip_broken", action="store_true", help="leave broken images out, in place of an error")
    add("--workers", type=positive_int, help="decoding threads of a process (None: its cores)")
    add("--vae", default=SD_VAE, help="folder or hf:// of the VAE (default: %(default)s)")
    add("--vae_chunk", type=positive_int, default=16, help="images that a GPU encodes at a time")
    add("--crops", type=number(int, least=0), default=0, help="random crops of each image, in "
        "place of the plain and the mirrored image")
    add("--seed", type=number(int, least=0), default=0, help="seed of the crops")
    args = parser.parse_args(argv)
    if args.out is None:
        if args.data != "digits" or args.kind == "latents":
            parser.error("--out is needed")
        args.out = "data/digits"
    others = ["channels"] if args.kind == "latents" else ["vae", "vae_chunk", "crops", "seed"]
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is not an option of {args.kind}")
    return args


def main(argv=None):
    args = parse(argv)
    latents = None
    if args.kind == "latents":
        torch.set_num_threads(1)  # on a CPU the bits would depend on their number
        device = "cuda" if torch.cuda.is_available() else "cpu"
        latents = on_all_ranks(Latents, args.vae, args.size or 256, args.vae_chunk, args.crops,
                               args.seed, device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the machine
    prepare(args.data, args.out, args.size, args.channels, args.skip_broken, latents,
            args.workers or max(1, os.cpu_count() // here))


if __name__ == "__main__":
    run_script(main)
