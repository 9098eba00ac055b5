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
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF", "PPM")
# A file of some kB can unpack to all of the memory. Larger images and files are refused.
MAX_PIXELS = 100_000_000
MAX_BYTES = 1_000_000_000
Image.MAX_IMAGE_PIXELS = None  # PIL's own limit is twice its warning's; ours says its name
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
KINDS = {"pixels": ("uint8", 4), "latents": ("float16", 5)}  # dtype and axes of images.bin


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
        with reading(path, "cannot be read, prepare it again"):
            self.meta = json.loads((path / "meta.json").read_text())
            dtype, axes = KINDS[self.meta["kind"]]
            shape = tuple(self.meta["shape"])
            self.images = np.memmap(path / "images.bin", dtype, "r", shape=shape)
            # As a map, which does not take memory by what a damaged header says.
            self.index(np.array(np.load(path / "labels.npy", mmap_mode="r")))
            count = self.count.tolist()
            if ((path / "images.bin").stat().st_size != self.images.nbytes or len(shape) != axes
                    or self.labels.shape != shape[:1] or (np.diff(self.labels) < 0).any()
                    or not isinstance(self.meta["classes"], list)
                    or len(count) != self.num_classes
                    or self.meta.get("images_per_class", count) != count):
                raise ValueError("images.bin, labels.npy and meta.json do not fit each other")
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
        """n ids of one class, without replacement unless it has fewer; rng: numpy Generator."""
        count = self.count[label]
        return self.first[label] + rng.choice(count, n, replace=n > count, shuffle=False)

    def draw_any(self, n, rng):
        """n ids of any class, without replacement."""
        return rng.choice(len(self), n, replace=False, shuffle=False)

    def fresh(self, start, n, seed):
        """Ids number start to start + n - 1 of an endless row of shuffled epochs.

        It has no state, so resuming is free; and processes that take neighbouring pieces of a
        step's n ids never read the same sample in an epoch.
        """
        epoch, place = np.divmod(np.arange(start, start + n), len(self))
        return np.concatenate([shuffled(len(self), seed, e)[place[epoch == e]]
                               for e in np.unique(epoch).tolist()])


@functools.lru_cache(maxsize=2)  # of a million ids it takes longer than a batch
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def upload(array, device):
    """An array as a tensor on the device; on its way to a GPU neither waits for the other."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def prefetch(thread, function, steps):
    """function(step) of each step, in order, while a background thread computes the next one.

    It is one call ahead, never more, and what it raises is raised here. thread: an executor of the
    caller's, who ends it. A generator may end at any time, even while another thread starts.
    """
    ahead = None
    for step in steps:
        following = thread.submit(function, step)
        if ahead:
            yield ahead.result()
        ahead = following
    if ahead:
        yield ahead.result()


@contextlib.contextmanager
def reading(path, problem):
    """Around the reading of a foreign file, where every error is the file's fault: a UsageError."""
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ValueError("a pipe or a device")  # which would be waited for
        yield
    except Exception as error:
        raise UsageError(f"{path}: {problem} ({one_line(error)})") from error


# --------------------------------------------------------------------------------------------
# Where images come from. A source is a function that returns
#     {split: [(class, item), ...]}   a class is a name or a number, an item what `load` takes
#     load, an `Images`               load(item) -> PIL image; raises BrokenImage for bad files
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
            load = CachedLatents(path)
            return {"train": load.items}, load
        if any(path.glob("t*-*?idx[13]-ubyte*")):
            return idx_files(path)
        return class_folders(path)
    if path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return cifar(path)
    return class_zip(path)


class Images:
    """`load` of a source, for several threads. read(item): bytes of a file, or array of pixels."""

    def __init__(self, read):
        self.read = read

    def __call__(self, item):
        data = self.read(item)
        if isinstance(data, bytes):
            return open_image(data)
        return Image.fromarray(data)

    def checksum(self, item):
        """Of what the item holds, whatever its name and time; 0 where it cannot be read."""
        try:
            return zlib.crc32(bytes(self.read(item)))
        except BrokenImage:
            return 0


def from_arrays(splits):
    """A source of {split: (images uint8 [N, H, W] or [N, H, W, 3], labels [N])}."""
    items = {}
    pixels = {}
    for split, (images, labels) in splits.items():
        names = [f"{split} {i}" for i in range(len(labels))]
        items[split] = list(zip(np.asarray(labels).tolist(), names))
        pixels.update(zip(names, images))
    return items, Images(pixels.__getitem__)


def digits():
    return from_arrays(embedded_digits())


def embedded_digits():
    """{split: (images uint8 [N, 8, 8], labels)}: every fifth image of a class is held out."""
    with np.load(DIGITS) as file:
        order = np.argsort(file["labels"], kind="stable")
        labels = file["labels"][order].astype(np.int64)
        greys = file["images"][order].astype(np.float32)  # 0 to 16
    images = np.round(greys * (255 / 16)).astype(np.uint8)
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # 0, 1, ... within its class
    test = place % 5 == 4
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def idx_files(path):
    """MNIST's four files: {train,t10k}-{images-idx3,labels-idx1}-ubyte, as they are or .gz."""
    splits = {}
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        names = [f"{prefix}-images?idx3-ubyte", f"{prefix}-labels?idx1-ubyte"]
        files = [[*path.glob(name), *path.glob(name + ".gz")] for name in names]
        if not any(files):
            continue
        if not all(files):
            raise UsageError(f"{path}: lacks {names[files.index([])].replace('?', '-')}, as it is "
                             "or .gz")
        images = read_idx(files[0][0], 3)
        labels = read_idx(files[1][0], 1)
        if len(images) != len(labels):
            raise UsageError(f"{files[0][0]}: {len(images)} images, but {files[1][0].name}: "
                             f"{len(labels)} labels")
        splits[split] = (images, labels)
    return from_arrays(splits)


def read_idx(path, axes):
    """A file's bytes as uint8 array; before them are its type (8), its axes, and their lengths."""
    with reading(path, f"not an idx file of {axes} axes of bytes"):
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            kind, *shape = np.frombuffer(file.read(4 + 4 * axes), ">u4").tolist()
            size = math.prod(shape)
            if kind != 8 * 256 + axes or not 0 < size < 1 << 32:
                raise ValueError(f"type {kind:#x}, shape {shape}")
            return np.frombuffer(file.read(size), np.uint8).reshape(shape)


def cifar(path):
    """The binary archive of CIFAR-10 or CIFAR-100: rows of a label or two, then the pixels.

    The last label is the class. Classes are in alphabetical order there, as here.
    """
    names = "batches.meta.txt"
    parts = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    splits = {}
    with reading(path, "no whole binary archive of CIFAR: take cifar-10-binary.tar.gz or "
                 "cifar-100-binary.tar.gz (the python ones are pickles, which could run any "
                 "program); of images of your own a .zip"), tarfile.open(path) as archive:
        files = {Path(member.name).name: archive.extractfile(member) for member in archive}
        width = 1 + 3 * 32 * 32
        if "fine_label_names.txt" in files:
            names = "fine_label_names.txt"
            parts = {"train": ["train.bin"], "test": ["test.bin"]}
            width += 1
        classes = files[names].read(10_000).decode().split()
        for split, part in parts.items():
            data = b"".join(files[name].read(1 << 28) for name in part)
            rows = np.frombuffer(data, np.uint8).reshape(-1, width)
            images = rows[:, -3072:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            splits[split] = (images, [classes[label] for label in rows[:, -3073]])
    return from_arrays(splits)


class CachedLatents(Images):
    """`load` of another project's latents, and what stands in place of `Latents`.

    The files hold float32 [N, H, W, 4], one draw of the posterior times 0.18215 of each image and
    its mirror image. It becomes the mean, with a std of 0: no visit draws anew.
    """

    def __init__(self, path):
        with reading(path, "no cache of latents"):
            self.draws = [np.load(path / f"train_moments{view}.npy", mmap_mode="r")
                          for view in ("", "_flip")]
            targets = np.load(path / "train_targets.npy", mmap_mode="r")
            shapes = [array.shape for array in (*self.draws, targets)]
            n, height, _, channels = shapes[0]
            if shapes != [shapes[0], shapes[0], (n,)] or channels != 4:
                raise ValueError(f"shapes {shapes}, not twice [N, H, W, 4] and [N]")
            if targets.dtype.kind not in "iu":
                raise ValueError(f"targets are {targets.dtype}")
            self.items = list(zip(targets.tolist(), range(n)))
        std = self.draws[0][:1000].std()
        if not 0.2 < std < 3:
            raise UsageError(f"{path}: latents of std {std:.2f}, where 1 is usual: are they "
                             f"multiplied by {LATENT_SCALE}?")
        self.meta = {"kind": "latents", "views": "plain, mirrored", "size": 8 * height,
                     "scale": LATENT_SCALE, "noise": "fixed"}
        note(f"{path}: one draw of each image's latents: their noise is fixed (std 0)")

    def read(self, i):
        draws = np.stack([draws[i] for draws in self.draws])
        if not np.abs(draws).max() < 60000:  # also of NaN; float16 ends there
            raise BrokenImage("latents that are not finite in float16")
        mean = draws.transpose(0, 3, 1, 2).astype(np.float16)
        return np.concatenate([mean, np.zeros_like(mean)], 1)

    __call__ = read

    def views(self, array, i):
        return array

    encode = staticmethod(np.stack)


# Folders and zips of image files

def class_folders(path):
    """Links to folders are followed, and each real folder is read once, by its own name first."""
    names = []
    visited = {str(parent) for parent in path.resolve().parents}  # such a link would find us again
    folders = [""]
    links = []
    while folders or links:
        folder = (folders or links).pop()
        real = os.path.realpath(path / folder)
        if real in visited:
            continue
        visited.add(real)
        with reading(path / folder, "cannot be read"), os.scandir(path / folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in entries:
            name = folder + entry.name
            try:
                is_folder = entry.is_dir()
                is_file = entry.is_file()
            except OSError:  # a link to itself, or to where we may not look
                is_folder = is_file = False
            if is_folder:
                name += "/"
                if not hidden(name):
                    waiting = links if entry.is_symlink() else folders
                    waiting.append(name)
            elif not is_file:
                name += " (a pipe, a device or a link to nothing)"
            names.append(name)
    return by_class(path, names, lambda name: open(path / name, "rb"))


def class_zip(path):
    members = {}
    with reading(path, "neither a folder nor a whole .zip"):
        # Not by its name: then it would count its readers, which is not safe among threads.
        archive = zipfile.ZipFile(open(path, "rb"))
        for member in archive.infolist():
            name = PurePosixPath(member.filename.replace("\\", "/").lstrip("/")).as_posix()
            if name in members:
                raise zipfile.BadZipFile(f"two members are {name}")
            members[name + "/" if member.is_dir() else name] = member
            # A damaged directory: an entry that swallows the next one, or a name that is not the
            # one beside the member, which opening compares. An image is opened when it is read.
            if b"PK\1\2" in member.extra + member.comment:
                raise zipfile.BadZipFile(f"the directory is damaged at {name}")
            if hidden(name) or not name.lower().endswith(EXTENSIONS):
                archive.open(member).close()
    return by_class(path, members, lambda name: archive.open(members[name]))


def hidden(name):
    """Checkpoints of notebooks, thumbnails of a NAS, metadata of macOS: no data."""
    return any(part.startswith((".", "@")) or part == "__MACOSX" for part in name.split("/"))


def by_class(path, names, open_file):
    """A source of files named [SPLIT/]CLASS/*.jpg; the name of a folder ends with a slash.

    Classes are right above their images. What might be read in two ways is refused.
    """
    names = sorted(name for name in names if not hidden(name))
    images = [name for name in names if name.lower().endswith(EXTENSIONS)]
    if not images:
        raise UsageError(f"{path}: no images there (looked for {' '.join(EXTENSIONS)})")
    with reading(path, "a name that is not UTF-8"):
        "\n".join(images).encode()
    tell_of_others(path, images, sorted(set(names).difference(images)))

    folders = {name.partition("/")[0] for name in images if "/" in name}
    if not all(folder.lower() in SPLITS for folder in folders):
        # `train` beside other classes is a class of trains, unless it holds folders itself.
        folders = {name.partition("/")[0] for name in images if name.count("/") > 1}
    prefixes = {f"{folder}/": SPLITS[folder.lower()] for folder in sorted(folders)
                if folder.lower() in SPLITS}
    prefixes = prefixes or {"": "train"}
    splits = {}
    for prefix, split in prefixes.items():
        if split in splits:
            raise UsageError(f"{path}: two folders are the split {split}, one is {prefix}")
        splits[split] = with_class(path, prefix, [n for n in images if n.startswith(prefix)])
    beside = {name.partition("/")[0] for name in images if not name.startswith(tuple(prefixes))}
    if beside:
        note(f"{path}: left out, since they are beside the splits: {shortened(sorted(beside))}")
    if beside and "train" not in splits:
        raise UsageError(f"{path}: its folders are neither splits nor classes: rename them")
    for split in sorted(splits.keys() - {"train"}):
        classes = {label for label, _ in splits[split]}
        strange = classes.difference(label for label, _ in splits.get("train", splits[split]))
        if strange:
            note(f"{path}: the split {split} is left out, since train lacks its classes "
                 f"{shortened(sorted(strange))}")
            del splits[split]

    def read(name):
        try:
            with open_file(name) as file:
                data = file.read(MAX_BYTES + 1)
        except Exception as error:  # zip alone has six kinds, by its compressions and passwords
            raise BrokenImage(one_line(error)) from error
        if len(data) > MAX_BYTES:
            raise BrokenImage(f"more than MAX_BYTES = {MAX_BYTES:,} of prepare_data.py")
        return data
    return splits, Images(read)


def with_class(path, prefix, names):
    """[(class, name)] of a split's images, whose names begin with the prefix."""
    folders = {name: name.removeprefix(prefix).split("/")[:-1] for name in names}
    if not any(folders.values()):
        note(f"{path}: images without class folders: they are one class")
        return [("images", name) for name in names]
    # Tiny ImageNet's train/CLASS/images/*.jpg can be meant in one way only.
    below = {tuple(parents[1:]) for parents in folders.values()}
    if not all(folders.values()) or len(below) > 1 or (below != {()} and not prefix):
        name = next(name for name, parents in folders.items() if len(parents) != 1)
        raise UsageError(f"{path}: which folders are the classes? They must be at the top, and "
                         f"hold images and no folders; {name} is elsewhere. Give, or zip, the "
                         "folder that holds the classes")
    return [(parents[0], name) for name, parents in folders.items()]


def tell_of_others(path, images, others):
    """Notes what the source holds beside images: files of other kinds, folders without images."""
    files = [name for name in others if not name.endswith("/")]
    if files:
        kinds = sorted({PurePosixPath(name).suffix or name for name in files})
        note(f"{path}: {len(files)} files are no images and left out: {shortened(kinds)}")
    filled = {f"{folder}/" for name in images for folder in PurePosixPath(name).parents}
    empty = [name for name in others if name.endswith("/") and name not in filled]
    if empty:
        note(f"{path}: {len(empty)} folders without images: {shortened(empty)}")


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
        # EPS would start a program, whatever the file's name.
        Image.open(io.BytesIO(data), formats=FORMATS).verify()  # PNG's checksums, which load skips
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than MAX_PIXELS = "
                             f"{MAX_PIXELS:,} of prepare_data.py")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("32-bit or float pixels, of unknown range: store 8 or 16 bits")
        image.load()  # which turns a TIFF, and takes its orientation away
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
    zero = torch.zeros_like(left)
    theta = torch.stack([mirror * (right - left) / 2, zero, (left + right) / 2,
                         zero, (bottom - top) / 2, (top + bottom) / 2], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, "bicubic", "border", align_corners=False).clamp(-1, 1)


# --------------------------------------------------------------------------------------------
# Writing, by any number of processes. A split that is not whole yet is the folder OUT/SPLIT.tmp:
#     images.bin    from the start a place for each image
#     meta.json     what it is made of, so that other images or options are refused
#     done          for each block of images 0, or its checksum once it is written and synced

class Pixels:
    """Images as they are, or centre crops of `size`; channels: 1, 3, or None, as they are."""

    meta = {"kind": "pixels"}
    encode = staticmethod(np.stack)

    def __init__(self, size=None, channels=None):
        self.size = size
        self.channels = channels

    def views(self, image, i):
        return to_array(image, self.size, self.channels)


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


def prepare(source, out, size=None, channels=None, skip_broken=False, latents=None):
    """Write OUT/SPLIT for every split of the source; one that is there already is left as it is.

    All processes call it and share the work. size, channels: see `Pixels`. latents: `Latents`, in
    place of pixels. Raises UsageError for a broken image, unless skip_broken leaves it out.
    """
    splits, load = on_all_ranks(open_source, source)
    classes = sorted({label for items in splits.values() for label, _ in items}, key=natural)
    number_of = {label: i for i, label in enumerate(classes)}
    note("classes: " + shortened([f"{i} {label}" for label, i in number_of.items()]))
    if len(classes) == 1:
        note("one class: guidance and its alpha mean nothing")
    # Where all is there already, a folder that is shared and read-only will do.
    whole = gather(all((Path(out) / split).exists() for split in splits))[0]
    with contextlib.nullcontext() if whole else on_all_ranks(claim, out):
        form = latents or Pixels(size, channels)
        if isinstance(load, CachedLatents):
            form = load
            if size or channels:
                raise UsageError(f"{source} holds latents: --size and --channels are of images")
        # Always in the same order, since a Dataset's fingerprint is of the file's text.
        meta = {"kind": form.meta["kind"], "classes": [str(label) for label in classes]}
        meta |= form.meta
        for split, items in splits.items():
            items.sort(key=lambda item: number_of[item[0]])  # keeps the order within a class
            labels = np.array([number_of[label] for label, _ in items])
            write_split(Path(out) / split, meta, [item for _, item in items], labels, load, form,
                        skip_broken)


def claim(folder):
    """Hold a folder that rank 0 may write to: two writers would mix. Freed also by death."""
    if get_rank() > 0:
        return contextlib.nullcontext()
    folder = Path(folder)
    try:
        if not folder.resolve().name:
            raise OSError("the root of the file system")
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"another run writes to {folder}: wait for it, or end it") from error
    except OSError as error:
        raise UsageError(f"{folder}: no place to write to ({one_line(error)})") from error
    return lock


def write_split(folder, meta, items, labels, load, form, skip_broken):
    """Rows form.encode([form.views(load(items[0]), 0), ...]) -> the folder."""
    partial = folder.with_name(folder.name + ".tmp")
    n = len(items)
    # A 64th of all, so that every process has its part, but no more than memory holds.
    size = min(max(n // 64, 16), 256)
    blocks = [range(start, min(start + size, n)) for start in range(0, n, size)]
    first = on_all_ranks(first_view, items, load, form)
    row = on_all_ranks(form.encode, [first])[0]
    files = hashlib.sha256("\n".join(map(str, items)).encode()).hexdigest()
    broken = {}

    def view(i):
        """Of image i. In place of a broken one stands the first one, until it is taken out."""
        try:
            views = form.views(load(items[i]), i)
        except BrokenImage as error:
            broken[i] = str(error)
            return first
        if views.shape != first.shape:
            raise UsageError(f"{items[i]} is {list(views.shape)}, the first image "
                             f"{list(first.shape)}: give one --size")
        return views

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share the machine
    with ThreadPoolExecutor(max(1, os.cpu_count() // here)) as pool:
        sums = checksums(blocks, items, load, pool)
        meta = {**meta, "files": files, "content": hashlib.sha256(sums.tobytes()).hexdigest(),
                "dtype": str(row.dtype), "shape": [n, *row.shape]}
        on_all_ranks(check_meta, folder, meta)
        if folder.exists():
            return
        on_all_ranks(begin, partial, meta, n * row.nbytes, sums)
        on_all_ranks(fill, partial, blocks, sums, view, form.encode, broken, pool)
    broken = dict(sorted(pair for part in gather(broken) for pair in part.items()))
    on_all_ranks(finish, folder, partial, meta, items, labels, broken, skip_broken)


def first_view(items, load, form):
    """The first image that is not broken: all others have its shape."""
    for i, item in enumerate(items):
        try:
            view = form.views(load(item), i)
        except BrokenImage as error:
            reason = error
            continue
        if view.shape[-1] != view.shape[-2]:
            raise UsageError(f"{item} has {view.shape[-1]} x {view.shape[-2]} pixels, training "
                             "needs squares: give --size")
        return view
    raise UsageError(f"none of the images can be read ({item}: {reason})")


def checksums(blocks, items, load, pool):
    """uint32 [blocks]: of what the images of each block hold, never 0.

    By content, since a copied folder has other times, and a changed .bmp the same size. The source
    is read once more for it, which is a small part of the decoding's time.
    """
    sums = np.zeros(len(blocks), np.uint32)
    for b in range(get_rank(), len(blocks), world_size()):
        parts = list(pool.map(load.checksum, [items[i] for i in blocks[b]]))
        sums[b] = max(1, zlib.crc32(np.array(parts, np.uint32)))
    return np.max(gather(sums), 0)


def check_meta(folder, meta):
    """Raises UsageError where a folder is there and was made of something else."""
    file = folder / "meta.json"
    if not file.is_file():
        if folder.exists() and folder.suffix != ".tmp":  # as of images that are to be read
            raise UsageError(f"{folder} is there, and is no prepared data: choose another folder "
                             "(--out of prepare_data.py)")
        return
    with reading(file, f"cannot be read, remove {folder}"):
        before = json.loads(file.read_text())
        # The number of images may be less by the broken ones. Older data lack some keys.
        before["shape"][0] = meta["shape"][0]
        other = [key for key in meta if before.get(key, meta[key]) != meta[key]]
    if other:
        raise UsageError(f"{folder} is of other images or options, by their {', '.join(other)}: "
                         f"remove {folder.parent}, or choose another folder (--out of "
                         "prepare_data.py)")


def begin(partial, meta, size, sums):
    """Rank 0 makes the folder to fill, unless it is there.

    Its meta.json does not say what the images hold: blocks whose images changed are made again.
    """
    meta = {key: value for key, value in meta.items() if key != "content"}
    check_meta(partial, meta)
    images = partial / "images.bin"
    done = partial / "done"
    # images.bin is smaller if a run was killed just after it took broken images out.
    there = done.is_file() and (images.stat().st_size, done.stat().st_size) == (size, sums.nbytes)
    barrier()  # all have looked before it is made
    if get_rank() > 0 or there:
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(images, "wb") as f:
        f.truncate(size)
    with whole_file(partial / "meta.json") as f:
        f.write(json.dumps(meta).encode())
    with whole_file(done) as f:
        f.write(bytes(sums.nbytes))


def fill(partial, blocks, sums, view, encode, broken, pool):
    """This process's part of the blocks that are not done.

    A block with broken images is never marked as done: they may be mended at the next start.
    """
    done = np.memmap(partial / "done", np.uint32, "r+")
    todo = np.flatnonzero(done != sums)
    barrier()  # all have looked before the first marks something
    todo = todo[get_rank()::world_size()]
    progress = tqdm(todo, str(partial), unit=" blocks", disable=get_rank() > 0)
    with ThreadPoolExecutor(1) as thread, open(partial / "images.bin", "r+b") as images:
        batches = prefetch(thread, lambda b: list(pool.map(view, blocks[b])), todo)
        for b, views in zip(progress, batches):
            rows = encode(views)
            images.seek(blocks[b][0] * rows[0].nbytes)
            images.write(rows.tobytes())
            images.flush()
            os.fsync(images.fileno())
            if broken.keys().isdisjoint(blocks[b]):
                done[b] = sums[b]


def finish(folder, partial, meta, items, labels, broken, skip_broken):
    """Rank 0 takes broken images out, adds labels and meta.json, and gives the folder its name."""
    if get_rank() > 0:
        return
    for i, reason in broken.items():
        print(f"{items[i]}: cannot be read ({reason})")
    if broken and not skip_broken:
        raise UsageError(f"{len(broken)} broken images: mend them, or leave them out with "
                         "--skip_broken; all others are kept for the next start")
    if broken:
        images = np.memmap(partial / "images.bin", meta["dtype"], "r", shape=tuple(meta["shape"]))
        with whole_file(partial / "images.bin") as f:
            for i in np.delete(np.arange(len(images)), list(broken)):
                f.write(images[i].tobytes())
        labels = np.delete(labels, list(broken))
    with whole_file(partial / "labels.npy") as f:
        np.save(f, labels)
    count = np.bincount(labels, minlength=len(meta["classes"]))
    meta.update(shape=[len(labels), *meta["shape"][1:]], images_per_class=count.tolist(),
                skipped=[items[i] for i in broken])
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
    others = ["channels"] if args.kind == "latents" else []
    if args.kind == "pixels" or (Path(args.data) / "train_moments.npy").is_file():
        others += ["vae", "vae_chunk", "crops", "seed"]
    for name in others:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is not read for {args.kind} of {args.data}")
    return args


def main(argv=None):
    args = parse(argv)
    latents = None
    if args.kind == "latents" and not (Path(args.data) / "train_moments.npy").is_file():
        with on_all_ranks(claim, args.out):  # before the VAE, which takes a while
            torch.set_num_threads(1)  # on a CPU the bits would depend on their number
            device = "cuda" if torch.cuda.is_available() else "cpu"
            latents = on_all_ranks(Latents, args.vae, args.size or 256, args.vae_chunk,
                                   args.crops, args.seed, device)
    prepare(args.data, args.out, args.size, args.channels, args.skip_broken, latents)


if __name__ == "__main__":
    run_script(main)
