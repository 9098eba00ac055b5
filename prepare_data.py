"""Images in class folders -> one memory-mapped array, labels, and a small json that says what they are.

    python prepare_data.py --data digits --out data/digits             # 1,797 handwritten digits, embedded in assets/
    python prepare_data.py --data cifar10.zip --out data/cifar10       # a folder, or a .zip, of class folders
    python prepare_data.py --data imagenet/train --out data/imagenet256 --size 256

The source holds CLASS/*.jpg, or splits {train,val,test}/CLASS/*.jpg. Written is OUT/SPLIT/ with
    images.bin    uint8 [N, C, H, W], sorted by class, so that a class is one range of rows
    labels.npy    int64 [N]
    meta.json     kind, shape, dtype, class names (sorted), images per class, source
The embedded digits (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0) are 8x8 in 17 greys; every
fifth of a class is held out as the split `test`.
"""
import argparse
import hashlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
DIGITS = Path(__file__).parent / "assets" / "digits.npz"


# ------------------------------------------------------------------------------------------------------------------
# What training reads

class Dataset:
    """A prepared split: images as a memmap, and ids drawn from a class, from all, or from shuffled epochs.

    `images` is the memmap: uint8 [N, C, H, W], or of kind `latents` float16 [N, 2, 2C, H, W], of the image and its mirror
    image the mean and the standard deviation of their latents. `shape` is [C, H, W], `labels` int64 [N], `meta` the json.
    Raises FileNotFoundError or ValueError, in one line, for a folder that is not there, not whole, or whose labels do not fit its classes.
    """

    def __init__(self, folder, split="train"):
        path = Path(folder) / split
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(f"{path}: no prepared data there; make it with: python prepare_data.py --data SOURCE "
                                    f"--out {folder}")
        self.meta = json.loads((path / "meta.json").read_text())
        shape, dtype, size = tuple(self.meta["shape"]), np.dtype(self.meta["dtype"]), (path / "images.bin").stat().st_size
        if size != np.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}/images.bin has {size} bytes, its meta.json says {np.prod(shape) * dtype.itemsize}: "
                             "prepare it again")
        self.images = np.memmap(path / "images.bin", dtype, "r", shape=shape)
        self.shape = (shape[2] // 2, *shape[3:]) if self.meta["kind"] == "latents" else shape[1:]
        self.labels = np.load(path / "labels.npy", allow_pickle=False)
        self.count = np.bincount(self.labels, minlength=self.num_classes)
        if len(self.labels) != shape[0] or len(self.count) > self.num_classes or (np.diff(self.labels) < 0).any():
            raise ValueError(f"{path}/labels.npy does not fit meta.json ({shape[0]} images sorted by class, "
                             f"{self.num_classes} classes): prepare it again")
        self.first = np.cumsum(self.count) - self.count  # a class is the rows first[c] ... first[c] + count[c] - 1
        self._epoch = None, None

    def __len__(self):
        return len(self.labels)

    @property
    def num_classes(self):
        return len(self.meta["classes"])

    def fingerprint(self):
        """Hash of the description, the labels and 64 of the images: a run resumes on the data that it began with."""
        spread = np.linspace(0, len(self) - 1, 64).astype(int)
        parts = json.dumps(self.meta).encode(), self.labels.tobytes(), self.images[spread].tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def batch(self, ids, rng=None, flip=False):
        """Samples of these ids, float32 [n, C, H, W]: pixels in [-1, 1]; latents drawn anew (without rng: their means).

        flip: mirror each with probability 1/2. rng: numpy Generator.
        """
        import torch
        ids, flips = np.asarray(ids), rng.random(len(ids)) < 0.5 if flip else np.zeros(len(ids), bool)
        if self.meta["kind"] == "latents":
            mean, std = torch.from_numpy(self.images[ids, flips.astype(int)]).float().chunk(2, 1)
            return mean if rng is None else mean + std * torch.from_numpy(rng.standard_normal(mean.shape, np.float32))
        x = torch.from_numpy(self.images[ids]).float().div_(127.5).sub_(1)
        return torch.where(torch.from_numpy(flips)[:, None, None, None], x.flip(3), x) if flip else x

    def draw(self, label, n, rng):
        """n ids of one class, without replacement (rng: numpy Generator)."""
        return self.first[label] + rng.choice(self.count[label], n, replace=False, shuffle=False)

    def draw_any(self, n, rng):
        """n ids of any class, without replacement."""
        return rng.choice(len(self), n, replace=False, shuffle=False)

    def fresh(self, start, n, seed):
        """Ids number start ... start + n - 1 of an endless row of shuffled epochs. It has no state: resuming is free."""
        ids = []
        while n > 0:
            epoch, offset = divmod(start, len(self))
            if self._epoch[0] != (seed, epoch):
                self._epoch = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self))
            ids.append(self._epoch[1][offset:offset + n])
            start, n = start + len(ids[-1]), n - len(ids[-1])
        return np.concatenate(ids)


# ------------------------------------------------------------------------------------------------------------------
# What is read to make it

def list_images(source):
    """{split: [(class name, file name)]} of a folder or .zip of class folders, sorted, and a function name -> bytes."""
    source = Path(source)
    if source.is_dir():
        names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        read = lambda name: (source / name).read_bytes()  # noqa: E731
    elif source.is_file():
        if not zipfile.is_zipfile(source):
            raise ValueError(f"{source}: neither a folder nor a .zip (a download cut short?)")
        archive = zipfile.ZipFile(source)
        names, read = archive.namelist(), archive.read
    else:
        raise FileNotFoundError(f"{source}: not found")
    names = sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not Path(n).name.startswith("."))
    folders = sorted({n.split("/")[0] for n in names})
    if len(folders) == 1 and folders[0] not in SPLITS and all(n.count("/") >= 2 for n in names):
        raise ValueError(f"{source}: everything is inside one folder {folders[0]}/; class folders must be at the top")
    splits = {}
    for name in names:
        *parents, _ = name.split("/")
        split = parents.pop(0) if set(folders) <= set(SPLITS) else "train"
        if not parents:
            raise ValueError(f"{source}: {name} is in no class folder (expected CLASS/*.jpg or train/CLASS/*.jpg)")
        splits.setdefault(split, []).append((parents[0], name))
    if not splits:
        raise ValueError(f"{source}: no images there (looked for {' '.join(EXTENSIONS)})")
    return splits, read


def decode(data, size, channels):
    """Encoded image -> uint8 [channels, size, size]: upright, centre crop as in ADM (size None: as it is)."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        while min(image.size) >= 2 * size:  # halving by averaging first: bicubic alone looks at too few pixels
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def embedded_digits():
    """{split: (images uint8 [N, 1, 8, 8], labels)}: every fifth image of a class is held out."""
    with np.load(DIGITS, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    images = np.round(images.astype(np.float32) * (255 / 16)).astype(np.uint8)[:, None]
    order = np.argsort(labels, kind="stable")
    images, labels = images[order], labels[order]
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # 0, 1, 2, ... within its class
    held_out = place % 5 == 4
    return {"train": (images[~held_out], labels[~held_out]), "test": (images[held_out], labels[held_out])}


# ------------------------------------------------------------------------------------------------------------------
# Making it

def prepare(source, out, size=None, channels=3, skip_broken=False):
    """Write OUT/SPLIT for every split of the source. A folder appears only when whole.

    `digits` is the embedded set; of it, what is there already is left as it is.
    """
    if source == "digits":
        classes = [str(c) for c in range(10)]
        for split, (images, labels) in embedded_digits().items():
            if not (Path(out) / split).exists():
                _write(Path(out) / split, iter(images), lambda: labels, classes, DIGITS.name)
        return
    from tqdm import tqdm
    splits, read = list_images(source)
    classes = sorted({name for files in splits.values() for name, _ in files})
    for split, files in splits.items():
        files.sort()  # by class
        labels = []

        def images():
            shape = None  # that of the first image that can be read
            for class_name, name in tqdm(files, desc=f"{out}/{split}", unit=" images"):
                try:
                    image = _decode_or_name(read, name, size, channels)
                except ValueError as error:
                    if not skip_broken:
                        raise
                    tqdm.write(f"skipped {error}")
                    continue
                shape = shape or image.shape
                if image.shape != shape:
                    raise ValueError(f"{name} is {list(image.shape)}, those before it {list(shape)}: give one --size")
                labels.append(classes.index(class_name))
                yield image

        _write(Path(out) / split, images(), lambda: np.array(labels, np.int64), classes, Path(source).name)
        if len(labels) < len(files):
            print(f"{out}/{split}: {len(files) - len(labels)} broken images skipped")


def _decode_or_name(read, name, size, channels):
    try:
        return decode(read(name), size, channels)
    except Exception as error:  # PIL and zipfile raise many kinds for a broken file
        raise ValueError(f"{name}: cannot be read ({error}); mend or remove it, or give --skip_broken") from None


def _write(folder, images, labels, classes, source):
    """images: uint8 arrays one by one; labels(): int64 [N], asked for after the last of them."""
    if folder.exists():
        raise ValueError(f"{folder} exists already: remove it, or choose another --out")
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "images.bin", "wb") as f:
        for image in images:
            f.write(image.tobytes())
            shape = list(image.shape)
        f.flush()
        os.fsync(f.fileno())
    labels = labels()
    if not len(labels):
        raise ValueError(f"{source}: none of its images can be read")
    np.save(partial / "labels.npy", labels)
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    meta = dict(kind="pixels", dtype="uint8", shape=[len(labels), *shape], classes=classes,
                images_per_class=counts, source=source)
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    partial.rename(folder)
    print(f"{folder}: {len(labels)} images {shape}, {len(classes)} classes of {min(counts)} to {max(counts)} images")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--data", default="digits", help="folder or .zip of class folders, or `digits` (default)")
    parser.add_argument("--out", help="folder to write (default of the digits: data/digits)")
    parser.add_argument("--size", type=int, help="centre crop and resize to SIZE x SIZE (default: images as they are)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: greyscale (default: %(default)s)")
    parser.add_argument("--skip_broken", action="store_true", help="name broken images and go on, instead of stopping")
    args = parser.parse_args(argv)
    if args.data == "digits":
        if args.size or args.channels != 3 or args.skip_broken:
            parser.error("the embedded digits are 8x8 and grey: --size, --channels and --skip_broken are for other data")
        args.out = args.out or "data/digits"
    if args.out is None:
        parser.error("--out is needed")
    return args


def main():
    args = parse()
    try:
        prepare(args.data, args.out, args.size, args.channels, args.skip_broken)
    except (OSError, ValueError) as error:
        raise SystemExit(f"prepare_data.py: {error}") from None


if __name__ == "__main__":
    main()
