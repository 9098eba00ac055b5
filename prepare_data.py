"""Images -> one memory-mapped array of pixels or latents, their labels, and what training reads.

    python prepare_data.py                     # the 1,797 digits of assets/, as data/digits
    python prepare_data.py pixels --data cifar10.zip --out data/cifar10
    python prepare_data.py pixels --data imagenet/train --out data/imagenet256 --size 256
    torchrun --nproc_per_node 8 prepare_data.py latents --data imagenet/train --out data/latents

--data is a folder or a .zip of CLASS/*.jpg or {train,val,test}/CLASS/*.jpg, or of *.jpg, which are
one class; a folder of MNIST's idx files; CIFAR's binary .tar.gz; or a folder of cached latents,
train_moments.npy, train_moments_flip.npy and train_targets.npy. OUT/SPLIT/ will hold
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
import contextlib
import fcntl
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

from model import (LATENT_SCALE, SD_VAE, UsageError, barrier, gather, get_rank, load_vae, number,
                   on_all_ranks, one_line, positive_int, run_script, sha256, whole_file,
                   world_size)

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
          "valid": "val", "validation": "val", "eval": "val"}
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff",
              ".avif", ".ppm")
# A file of some kB can unpack to all of the memory. Larger images and files are refused.
MAX_PIXELS = 100_000_000
MAX_BYTES = 1_000_000_000
Image.MAX_IMAGE_PIXELS = None  # PIL's own limit is twice its warning's; ours says its name
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
            # As a map, which does not take memory by what a damaged header says.
            labels = np.array(np.load(path / "labels.npy", mmap_mode="r", allow_pickle=False))
            in_order = (np.diff(labels) >= 0).all()
            in_range = labels[0] >= 0 and labels[-1] < self.num_classes
            if labels.shape != shape[:1] or not in_order or not in_range:
                raise ValueError("labels.npy does not fit meta.json")
            self.index(labels)
        except Exception as error:
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
#     load.checksum(item) -> int      of what the item holds
# A new data set is such a function, and two lines in open_source.

def open_source(data):
    """Opens `digits`, a folder, a .zip, or CIFAR's archive: the only reader of images' folders.

    Returns ({split: [(class, item), ...]}, load), see above; splits are train, val and test, and a
    source without splits is all train. What is left out is said on stderr. Raises UsageError.
    """
    path = Path(data)
    if data == "digits":
        return digits()
    if path.is_dir():
        if (path / "train_moments.npy").is_file():
            return cached_latents(path)
        if any(path.glob("t*-images?idx3-ubyte*")):
            return idx_files(path)
        return class_folders(path)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return cifar(path)
    return class_zip(path)


def digits():
    return from_arrays({split: (pixels[:, 0], labels)
                        for split, (pixels, labels) in embedded_digits().items()})


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


def idx_files(path):
    """MNIST's four files: {train,t10k}-{images-idx3,labels-idx1}-ubyte, as they are or .gz."""
    splits = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        for file in path.glob(f"{prefix}-images?idx3-ubyte*"):
            name = file.name.replace("images", "labels").replace("idx3", "idx1")
            images = read_idx(file, 3)
            labels = read_idx(file.with_name(name), 1)
            if len(images) != len(labels):
                raise UsageError(f"{file}: {len(images)} images, but {name}: {len(labels)} labels")
            splits[split] = (images, labels)
    return from_arrays(splits)


def read_idx(path, axes):
    """A file's bytes as uint8 array; before them are its type (8), its axes, and their lengths."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            kind, *shape = np.frombuffer(file.read(4 + 4 * axes), ">u4").tolist()
            size = math.prod(shape)
            if kind != 8 * 256 + axes or not 0 < size < 1 << 32:
                raise ValueError(f"type {kind:#x}, shape {shape}")
            return np.frombuffer(file.read(size), np.uint8).reshape(shape)
    except Exception as error:
        raise UsageError(f"{path}: not an idx file of {axes} axes of bytes "
                         f"({one_line(error)})") from error


def cifar(path):
    """The binary archive of CIFAR-10 or CIFAR-100: rows of a label or two, then the pixels.

    The last label is the class. Classes are in alphabetical order there, as here.
    """
    splits = {}
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).name: member for member in archive}

            def read(name):
                return archive.extractfile(members[name]).read(1 << 28)
            parts = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)],
                     "test": ["test_batch.bin"]}
            names = "batches.meta.txt"
            width = 1 + 3 * 32 * 32
            if "fine_label_names.txt" in members:
                parts = {"train": ["train.bin"], "test": ["test.bin"]}
                names = "fine_label_names.txt"
                width += 1
            classes = read(names).decode().split()
            for split, part in parts.items():
                rows = np.frombuffer(b"".join(map(read, part)), np.uint8).reshape(-1, width)
                images = rows[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                splits[split] = (images, [classes[label] for label in rows[:, -3073]])
    except Exception as error:
        raise UsageError(f"{path}: no binary archive of CIFAR ({one_line(error)}); take "
                         "cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, the python ones are "
                         "pickles, which could run any program") from error
    return from_arrays(splits)


def from_arrays(splits):
    """A source of {split: (images uint8 [N, H, W] or [N, H, W, 3], labels [N])}."""
    items = {}
    images_by_name = {}
    for split, (images, labels) in splits.items():
        names = [f"{split} {i}" for i in range(len(labels))]
        items[split] = list(zip(np.asarray(labels).tolist(), names))
        images_by_name.update(zip(names, images))
    return items, ArrayImages(images_by_name)


class ArrayImages:
    """`load` of a source whose images are in memory."""

    def __init__(self, images):
        self.images = images

    def __call__(self, name):
        return Image.fromarray(np.ascontiguousarray(self.images[name]))

    def checksum(self, name):
        return zlib.crc32(self.images[name].tobytes())


def cached_latents(path):
    """Latents of another project: train_moments.npy, train_moments_flip.npy, train_targets.npy."""
    load = CachedLatents(path)
    labels = load.targets.tolist()
    return {"train": list(zip(labels, range(len(labels))))}, load


class CachedLatents:
    """`load` of cached latents, and what stands in place of `Latents`.

    The files hold float32 [N, H, W, 4], one draw of the posterior times 0.18215 of each image and
    its mirror image. It becomes the mean, with a std of 0: no visit draws anew.
    """

    def __init__(self, path):
        try:
            self.draws = [np.load(path / f"train_moments{view}.npy", mmap_mode="r")
                          for view in ("", "_flip")]
            self.targets = np.array(np.load(path / "train_targets.npy", mmap_mode="r"))
            shape = self.draws[0].shape
            if self.draws[1].shape != shape or len(shape) != 4 or shape[3] != 4:
                raise ValueError(f"shapes {shape} and {self.draws[1].shape}, not [N, H, W, 4]")
            if self.targets.shape != shape[:1] or self.targets.dtype.kind not in "iu":
                raise ValueError(f"targets {self.targets.dtype} {self.targets.shape}")
        except Exception as error:
            raise UsageError(f"{path}: no cache of latents ({one_line(error)})") from error
        std = self.draws[0][:1000].std()
        if not 0.2 < std < 3:
            raise UsageError(f"{path}: latents of std {std:.2f}, where 1 is usual: are they "
                             f"multiplied by {LATENT_SCALE}?")
        self.meta = {"kind": "latents", "views": "plain, mirrored", "size": 8 * shape[1],
                     "scale": LATENT_SCALE, "noise": "fixed"}
        note(f"{path}: one draw of each image's latents: their noise is fixed (std 0)")

    def __call__(self, i):
        return np.stack([draws[i] for draws in self.draws])

    def checksum(self, i):
        return zlib.crc32(self(i).tobytes())

    def views(self, draws, i):
        if not np.abs(draws).max() < 60000:  # also of NaN; float16 ends there
            raise BrokenImage("latents that are not finite in float16")
        mean = draws.transpose(0, 3, 1, 2).astype(np.float16)
        return np.concatenate([mean, np.zeros_like(mean)], 1)

    def encode(self, views):
        return np.stack(views)


# Folders and zips of image files

def class_folders(path):
    """Links to folders are followed, and each real folder is read once, by its own name first."""
    names = []
    read = {str(parent) for parent in path.resolve().parents}  # such a link would find us again
    folders = [""]
    links = []
    irregular = 0
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        real = os.path.realpath(path / folder)
        if real in read:
            continue
        read.add(real)
        try:
            entries = [entry for entry in os.scandir(path / folder) if not hidden(entry.name)]
        except OSError as error:
            raise UsageError(f"{path / folder}: cannot be read ({one_line(error)})") from error
        for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):
            name = folder + entry.name
            if entry.is_dir():
                names.append(name + "/")
                waiting = links if entry.is_symlink() else folders
                waiting.append(name + "/")
            elif entry.is_file():
                names.append(name)
            else:
                irregular += 1
    if irregular:
        note(f"{path}: {irregular} pipes, devices or links to nothing are left out")
    return by_class(path, names, lambda name: open(path / name, "rb"))


def class_zip(path):
    try:
        # Not by its name: then it would count its readers, which is not safe among threads.
        archive = zipfile.ZipFile(open(path, "rb"))
    except Exception as error:
        raise UsageError(f"{path}: neither a folder nor a whole .zip "
                         f"({one_line(error)})") from error
    members = {}
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/").lstrip("/")).as_posix()
        members[name + "/" if member.is_dir() else name] = member
    checksums = {name: member.CRC for name, member in members.items()}
    return by_class(path, members, lambda name: archive.open(members[name]), checksums)


def hidden(name):
    """Checkpoints of notebooks, thumbnails of a NAS, metadata of macOS: no data."""
    return any(part.startswith((".", "@")) or part == "__MACOSX" for part in name.split("/"))


class ImageFiles:
    """`load` of a source of files. open_file: name -> binary file; checksums: where listed."""

    def __init__(self, open_file, checksums):
        self.open_file = open_file
        self.checksums = checksums

    def read(self, name):
        try:
            with self.open_file(name) as file:
                data = file.read(MAX_BYTES + 1)
        except Exception as error:  # zip alone has six kinds, by its compressions and passwords
            raise BrokenImage(one_line(error)) from error
        if len(data) > MAX_BYTES:
            raise BrokenImage(f"more than MAX_BYTES = {MAX_BYTES:,} of prepare_data.py")
        return data

    def __call__(self, name):
        return open_image(self.read(name))

    def checksum(self, name):
        if self.checksums:
            return self.checksums[name]
        try:
            return zlib.crc32(self.read(name))
        except BrokenImage:
            return 0


def by_class(path, names, open_file, checksums=None):
    """A source of files named [SPLIT/]CLASS/*.jpg; the name of a folder ends with a slash.

    Classes are right above their images. What might be read in two ways is refused.
    """
    names = sorted(name for name in names if not hidden(name))
    images = [name for name in names if name.lower().endswith(EXTENSIONS)]
    if not images:
        raise UsageError(f"{path}: no images there (looked for {' '.join(EXTENSIONS)})")
    try:
        "\n".join(images).encode()
    except UnicodeError as error:
        raise UsageError(f"{path}: a name that is not UTF-8 ({one_line(error)})") from error
    others = set(names).difference(images)
    tell_of_others(path, images, others)

    tops = {name.split("/")[0] for name in images if "/" in name}
    of_folders = {name.split("/")[0] for name in images if name.count("/") > 1}
    # `train` beside other classes is a class of trains, unless it holds folders itself.
    if not all(top.lower() in SPLITS for top in tops):
        tops = {top for top in of_folders if top.lower() in SPLITS}
    groups = {"train": images}
    if tops:
        groups = {}
        for top in sorted(tops):
            split = SPLITS[top.lower()]
            if split in groups:
                raise UsageError(f"{path}: two folders are the split {split}, one is {top}")
            groups[split] = [name for name in images if name.startswith(top + "/")]
        beside = sorted({name.split("/")[0] for name in images} - tops)
        if beside and "train" not in groups:
            raise UsageError(f"{path}: {shortened(beside)} beside {shortened(sorted(tops))}, which "
                             "are splits: move it, or rename them")
        if beside:
            note(f"{path}: left out, since they are beside the splits: {shortened(beside)}")
    level = 1 if tops else 0
    splits = {split: with_class(path, group, level) for split, group in groups.items()}

    for split in sorted(splits.keys() - {"train"}):
        classes = {label for label, _ in splits[split]}
        strange = classes.difference(label for label, _ in splits.get("train", splits[split]))
        if strange:
            note(f"{path}: the split {split} is left out, since train lacks its classes "
                 f"{shortened(sorted(strange))}")
            del splits[split]
    return splits, ImageFiles(open_file, checksums)


def with_class(path, names, level):
    """[(class, name)] of a split's images; level: how many folders are above the classes."""
    rows = []
    below = set()
    for name in names:
        folders = name.split("/")[level:-1]
        rows.append((folders[0] if folders else None, name))
        below.add("/".join(folders[1:]))
    classes = {label for label, _ in rows}
    if classes == {None}:
        note(f"{path}: images without class folders: they are one class")
        return [("images", name) for name in names]
    if None in classes:
        name = next(name for label, name in rows if label is None)
        raise UsageError(f"{path}: {name} is in no class folder, others are")
    # Tiny ImageNet's train/CLASS/images/*.jpg can be meant in one way only.
    if below != {""} and (len(below) > 1 or level == 0):
        name = max(names, key=lambda name: name.count("/"))
        raise UsageError(f"{path}: which folders are the classes? They must be at the top, and "
                         f"hold images and no folders; {name} is deeper")
    return rows


def tell_of_others(path, images, others):
    """Notes what the source holds beside images: files of other kinds, folders without images."""
    kinds = {PurePosixPath(name).suffix or name for name in others if not name.endswith("/")}
    count = sum(not name.endswith("/") for name in others)
    if count:
        note(f"{path}: {count} files are no images and left out: {shortened(sorted(kinds))}")
    with_images = {f"{parent}/" for name in images for parent in PurePosixPath(name).parents}
    empty = {name for name in others if name.endswith("/")} - with_images
    if empty:
        note(f"{path}: {len(empty)} folders without images: {shortened(sorted(empty))}")


def shortened(names):
    if len(names) > 20:
        names = [*names[:20], f"{len(names) - 20} more"]
    return ", ".join(names)


def note(text):
    """On stderr, since fid.py's results are on stdout."""
    if get_rank() == 0:
        print(text, file=sys.stderr)


def natural(name):
    """Sorts class2 before class10."""
    parts = re.split("([0-9]+)", str(name))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


# --------------------------------------------------------------------------------------------
# One image

class BrokenImage(UsageError):
    """An image file that cannot be read or decoded, and why."""


# What a value of EXIF's orientation asks for.
ORIENTATIONS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
                6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}


def open_image(data):
    """Encoded image -> upright RGB image of PIL; what is transparent shows white.

    Raises BrokenImage for what PIL cannot decode, for more than MAX_PIXELS, and for numbers whose
    range is not known, as in TIFF's integers of 32 bits and floats.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than MAX_PIXELS = "
                             f"{MAX_PIXELS:,} of prepare_data.py")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("32-bit or float pixels, of unknown range: store 8 or 16 bits")
        # Not PIL's exif_transpose: it writes the other EXIF tags again, and fails at bad ones.
        turn = ORIENTATIONS.get(image.getexif().get(0x0112))
        if turn:
            image = image.transpose(Image.Transpose[turn])
        if image.mode.startswith("I"):  # 16 bits, which PIL's own conversion would clip to white
            greys = np.asarray(image).astype(np.float32) / 257
            image = Image.fromarray(greys.round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # PIL has many kinds for a damaged file
        raise BrokenImage(one_line(error)) from error


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
        if math.prod(shape) > MAX_PIXELS:
            raise BrokenImage(f"{image.width} x {image.height} pixels: too long for --size {size}")
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
#     done          for each block of images 0, or its checksum once it is written and synced
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
        self.meta = {"kind": "latents", "views": "crops" if crops else "plain, mirrored",
                     "size": size, "seed": seed, "scale": LATENT_SCALE,
                     "vae": sha256(self.vae.weights_file)}

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
    if isinstance(load, CachedLatents):
        latents = load
    classes = sorted({label for items in splits.values() for label, _ in items}, key=natural)
    number_of = {label: i for i, label in enumerate(classes)}
    meta = {"kind": "pixels", "classes": [str(label) for label in classes]}
    if latents is not None:
        meta.update(latents.meta)
    note("classes: " + shortened([f"{i} {label}" for label, i in number_of.items()]))
    if len(classes) == 1:
        note("one class: guidance and its alpha mean nothing")

    def view(item, i):
        image = load(item)
        if latents is not None:
            return latents.views(image, i)
        return to_array(image, size, channels)

    encode = np.stack if latents is None else latents.encode
    # Where all is there already, a folder that is shared and read-only will do.
    whole = gather(all((Path(out) / split).exists() for split in splits))[0]
    with contextlib.nullcontext() if whole else on_all_ranks(claim, out):
        for split, items in splits.items():
            items.sort(key=lambda pair: number_of[pair[0]])  # keeps the order within a class
            labels = np.array([number_of[label] for label, _ in items])
            items = [item for _, item in items]
            write_split(Path(out) / split, meta, items, labels, load.checksum, view, encode,
                        skip_broken, workers)


def claim(folder):
    """Hold a folder that rank 0 may write to: two writers would mix. Freed also by death."""
    if get_rank() > 0:
        return contextlib.nullcontext()
    folder = Path(folder)
    try:
        if folder.resolve() == folder.resolve().parent:
            raise OSError("the root of the file system")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise UsageError(f"{folder}: no place to write to ({one_line(error)})") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UsageError(f"another run writes to {folder}: wait for it, or end it") from error
    return lock


def write_split(folder, meta, items, labels, checksum, view, encode, skip_broken, workers):
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
    sums = checksums(blocks, items, checksum, workers)
    meta = {**meta, "files": hashlib.sha256("\n".join(names).encode()).hexdigest(),
            "content": hashlib.sha256(sums.tobytes()).hexdigest(),
            "dtype": str(row.dtype), "shape": [n, *row.shape]}
    if not on_all_ranks(begin, folder, partial, meta, n * row.nbytes, sums.nbytes):
        return
    broken = on_all_ranks(fill, partial, blocks, sums, names, view_or_reason, encode, first,
                          workers)
    for others in gather(broken):
        broken.update(others)
    on_all_ranks(finish, folder, partial, meta, names, labels, broken, skip_broken)


def first_view(folder, n, view_or_reason):
    """The first image that is not broken: all others have its shape."""
    for i in range(n):
        view = view_or_reason(i)
        if not isinstance(view, BrokenImage):
            if view.shape[-1] != view.shape[-2]:
                raise UsageError(f"images are {view.shape[-1]} x {view.shape[-2]} pixels, training "
                                 "needs squares: give --size")
            return view
    raise UsageError(f"{folder}: none of its images can be read ({view})")


def checksums(blocks, items, checksum, workers):
    """uint32 [blocks]: of what the images of each block hold, never 0.

    By content, since a copied folder has other times, and a changed .bmp the same size. A folder
    is read once more for it, which is a small part of the decoding's time; a .zip lists its sums.
    """
    sums = np.zeros(len(blocks), np.uint32)
    with ThreadPoolExecutor(workers) as pool:
        for b in range(get_rank(), len(blocks), world_size()):
            parts = list(pool.map(checksum, [items[i] for i in blocks[b]]))
            sums[b] = max(1, zlib.crc32(np.array(parts, np.uint32).tobytes()))
    return np.max(gather(sums), 0)


def begin(folder, partial, meta, size, done_size):
    """Makes the folder to fill, unless it is there. Returns False where the split is whole."""
    for file in (folder / "meta.json", partial / "meta.json"):
        if file.is_file():
            try:
                before = dict(json.loads(file.read_text()))
                shape = list(before["shape"])
            except Exception as error:
                raise UsageError(f"{file}: cannot be read ({one_line(error)}): remove "
                                 f"{file.parent}") from error
            # The number of images may be less by the broken ones. Blocks of changed images are
            # made again, whole splits are not; those of before had no checksums.
            exempt = ["shape", "content"] if file.parent == partial else ["shape"]
            before.setdefault("content", meta["content"])
            same = all(before.get(key) == meta[key] for key in meta if key not in exempt)
            if not same or shape[1:] != meta["shape"][1:]:
                raise UsageError(f"{file.parent} is of other images or options: remove it, or "
                                 "choose another --out")
    if folder.exists():
        return False
    images = partial / "images.bin"
    # It is smaller if a run was killed just after it took broken images out.
    wanted = {"images.bin": size, "done": done_size}
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
            f.write(bytes(done_size))
        with whole_file(partial / "meta.json") as f:
            f.write(json.dumps(meta).encode())
    return True


def fill(partial, blocks, sums, names, view_or_reason, encode, first, workers):
    """This process's part of the blocks that are not done. Returns {i: reason} of broken images.

    A block with broken images is never marked as done: they may be mended at the next start.
    """
    todo = np.flatnonzero(np.fromfile(partial / "done", np.uint32) != sums)
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
                done.seek(sums.itemsize * b)
                done.write(sums[b].tobytes())
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
    add("--data", default="digits", help="source of images, see above, or `digits` (default)")
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
    cached = (Path(args.data) / "train_moments.npy").is_file()
    if args.kind == "latents" and not cached:
        torch.set_num_threads(1)  # on a CPU the bits would depend on their number
        device = "cuda" if torch.cuda.is_available() else "cpu"
        latents = on_all_ranks(Latents, args.vae, args.size or 256, args.vae_chunk, args.crops,
                               args.seed, device)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the machine
    prepare(args.data, args.out, args.size, args.channels, args.skip_broken, latents,
            args.workers or max(1, os.cpu_count() // here))


if __name__ == "__main__":
    run_script(main)
