"""Images -> one memory-mapped array of pixels or latents, their labels, and what training reads.

    python prepare_data.py                     # the 1,797 digits of assets/, as data/digits
    python prepare_data.py pixels --data cifar10.zip --out data/cifar10
    python prepare_data.py pixels --data imagenet/train --out data/imagenet256 --size 256
    torchrun --nproc_per_node 8 prepare_data.py latents --data imagenet/train --out data/latents

--data is a folder or a .zip of CLASS/*.jpg, of {train,val,test}/CLASS/*.jpg, of *.jpg, which are
one class, or of images with the dataset.json that StyleGAN's, EDM's and EDM2's dataset_tool writes;
a folder of MNIST's idx files; or CIFAR-10's binary .tar.gz. OUT/SPLIT/ will hold
    images.bin    pixels: uint8 [N, C, H, W]; latents: float16 [N, views, mean and std of C
                  channels, H, W], times 0.18215; sorted by class: a class is a range of rows
    labels.npy    int64 [N]
    meta.json     kind, shape, dtype, names of the classes, images per class
After an interruption the same command, on any number of processes, goes on where it was.

Latents are the posterior's mean and std, of each image and its mirror image, so that every visit
draws anew. (The authors store one draw of each: 21 GB of ImageNet, where this is 42.)

The digits (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0) are 8x8 in 17
greys; every fifth of a class is in the split `test`.
"""
import argparse
import functools
import glob
import gzip
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from model import (SD_VAE, HelpFormat, UsageError, barrier, gather, get_rank, load_vae,
                   lock_folder, note, run_script, sync, world_size)

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val",
          "valid": "val", "validation": "val", "eval": "val"}
EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .bmp .webp .gif .tif .tiff .avif .ppm".split())
HIDDEN = re.compile("(^|/)([.@]|__MACOSX/)")  # of notebooks, of a NAS's thumbnails, of macOS
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
# Some programs store megabytes of text or colour profile in a PNG, which Pillow would refuse.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 30


# ---- What training reads -------------------------------------------------------------------------

class Dataset:
    """A prepared split: `images`, the memmap described above, `labels` [N], and `meta`, the json.

    `shape` [C, H, W] is a sample's; class c has the rows first[c] to first[c] + count[c] - 1.
    """

    def __init__(self, folder, split="train"):
        path = Path(folder) / split
        if not (path / "meta.json").is_file():
            raise UsageError(f"{path}: no prepared data there; prepare_data.py makes them")
        self.meta = json.loads((path / "meta.json").read_text())
        self.kind = self.meta["kind"]
        shape = tuple(self.meta["shape"])
        self.images = np.memmap(path / "images.bin", self.meta["dtype"], "r", shape=shape)
        self.shape = shape[1:] if self.kind == "pixels" else (shape[2] // 2, *shape[3:])
        self.labels = np.load(path / "labels.npy")
        self.num_classes = len(self.meta["classes"])
        self.count = np.bincount(self.labels, minlength=self.num_classes)
        self.first = np.cumsum(self.count) - self.count

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """Hash of meta.json, and so of its source: a run resumes on the data it began with."""
        return hashlib.sha256(json.dumps(self.meta).encode()).hexdigest()

    def batch(self, ids, rng=None, flip=False, device="cpu"):
        """Samples of these ids, float32 [n, C, H, W]: pixels in [-1, 1], or latents drawn anew.

        rng: numpy Generator, or a seed for each sample, on which alone its randomness depends;
        without it latents are the means of the first view. flip: mirror half of them.
        """
        ids = np.asarray(ids)
        seeds = rng
        if isinstance(rng, np.random.Generator):
            seeds = rng.integers(1 << 63, size=len(ids))
        if self.kind == "pixels":
            x = upload(self.images[ids], device).float() / 127.5 - 1
            if flip:
                mirrored = upload(seeds % 2 == 1, device)[:, None, None, None]
                x = torch.where(mirrored, x.flip(3), x)
            return x
        if seeds is None:
            return upload(self.images[ids, 0, :self.shape[0]], device).float()
        views = self.images.shape[1] if flip else 1
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
        """n ids of any class, without replacement unless there are fewer."""
        return rng.choice(len(self), n, replace=n > len(self), shuffle=False)

    def fresh(self, start, n, seed):
        """Ids number start to start + n - 1 of an endless row of shuffled epochs.

        It has no state, so resuming is free. Neighbouring pieces of it share no id in an epoch.
        """
        epoch, place = np.divmod(np.arange(start, start + n), len(self))
        return np.concatenate([shuffled(len(self), seed, e)[place[epoch == e]]
                               for e in np.unique(epoch).tolist()])


@functools.lru_cache(maxsize=2)  # shuffling a million takes longer than a batch
def shuffled(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def upload(array, device):
    """An array as a tensor on the device; on its way to a GPU neither waits for the other."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---- Where images come from ----------------------------------------------------------------------
# A source is a function that returns {split: [(class, item), ...]}, load: load(item) -> PIL image.
# Splits are train, val and test. A class is a name, a number, or (number, name). An item holds the
# image's name and its size in bytes or checksum, which say whether prepared data are of a source.
# A new data set is one function, most easily with from_arrays, and two lines in open_source.

def open_source(data):
    """(splits, load) of a folder, a .zip, CIFAR-10's archive, or `digits`."""
    path = Path(data)
    if path == DIGITS or (data == "digits" and not path.exists()):
        return from_arrays(embedded_digits())
    if path.is_dir():
        if any(path.glob("t*-images?idx3-ubyte*")):
            return idx_files(path)
        return class_folders(path)
    if path.name.endswith(".tar.gz"):
        return cifar(path)
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path}: no data there, neither a folder nor a whole .zip")
    return class_zip(path)


def from_arrays(splits, names=None):
    """A source of {split: (uint8 [N, H, W] or [N, H, W, 3], labels [N])}; names: of labels."""
    items = {}
    for split, (images, labels) in splits.items():
        sums = [(split, i, zlib.crc32(image.tobytes())) for i, image in enumerate(images)]
        classes = [(label, names[label]) if names else label for label in labels.tolist()]
        items[split] = list(zip(classes, sums, strict=True))
    return items, lambda item: Image.fromarray(splits[item[0]][0][item[1]])


def embedded_digits():
    """{split: (images uint8 [N, 8, 8], labels)}: every fifth image of a class is held out."""
    with np.load(DIGITS) as file:
        order = np.argsort(file["labels"], kind="stable")
        labels = file["labels"][order].astype(np.int64)
        images = np.round(file["images"][order] * (255 / 16)).astype(np.uint8)  # of 0 to 16
    test = (np.arange(len(labels)) - np.searchsorted(labels, labels)) % 5 == 4
    return {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])}


def idx_files(path):
    """MNIST's files: {train,t10k}-{images-idx3,labels-idx1}-ubyte, as they are or .gz."""
    def read(name):
        file = sorted(path.glob(name))[0]
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as opened:
            data = opened.read()
        shape = np.frombuffer(data, ">u4", data[3], offset=4)  # the fourth byte: how many axes
        return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)

    splits = {split: (read(f"{prefix}-images*"), read(f"{prefix}-labels*"))
              for split, prefix in {"train": "train", "test": "t10k"}.items()}
    fashion = "fashion" in str(path.absolute().parts[-2:]).lower()  # such as FashionMNIST/raw
    return from_arrays(splits, FASHION if fashion else None)


def cifar(path):
    """CIFAR-10's binary archive: rows of a label and the pixels. (The python one is a pickle.)"""
    with tarfile.open(path) as archive:
        files = {Path(member.name).name: archive.extractfile(member).read()
                 for member in archive if member.isfile()}
    splits = {}
    for split, prefix in (("train", "data_batch"), ("test", "test_batch")):
        parts = [files[name] for name in sorted(files) if name.startswith(prefix)]
        rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 3073)
        splits[split] = (rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0])
    return from_arrays(splits, files["batches.meta.txt"].decode().split())


def class_folders(path):
    files = {}
    for name in glob.iglob("**/*.*", root_dir=path, recursive=True):  # follows links
        file = path / name
        files[Path(name).as_posix()] = (file.exists() and file.stat().st_size,)
    return by_class(path, files, lambda name: (path / name).read_bytes())


def class_zip(path):
    archive = zipfile.ZipFile(open(path, "rb"))  # opened by its name, it is not safe for threads
    files = {info.filename.replace("\\", "/"): (info.file_size, info.CRC, info.filename)
             for info in archive.infolist()}
    return by_class(path, files, lambda name: archive.read(files[name][-1]))


def by_class(path, files, read):
    """A source of files {[SPLIT/]CLASS/*.jpg: (size, ...)}; read(name) -> bytes."""
    images = sorted(name for name in files
                    if name.lower().endswith(EXTENSIONS) and not HIDDEN.search(name))
    if not images:
        raise UsageError(f"{path}: no images there")
    if len(images) < len(files):
        others = sorted(files.keys() - set(images))
        note(f"{path}: {len(others)} hidden or non-image files, e.g. {others[0]}")
    folders = {name.split("/")[0] for name in images if "/" in name}
    if not SPLITS.keys() >= {folder.lower() for folder in folders}:
        # `train` beside other classes is a class of trains, unless it holds folders itself.
        folders = {name.split("/")[0] for name in images if name.count("/") > 1}
    split_of = {f"{folder}/": SPLITS[folder.lower()] for folder in sorted(folders)
                if folder.lower() in SPLITS} or {"": "train"}
    beside = {name.split("/")[0] for name in images if not name.startswith(tuple(split_of))}
    if beside:
        note(f"left out, since they are beside the splits: {shortened(beside)}")

    splits = {}
    for prefix, split in split_of.items():
        names = [name.removeprefix(prefix) for name in images if name.startswith(prefix)]
        if prefix + "dataset.json" in files:
            # [[name, class], ...], or null. The folders 00000, 00001, ... beside it are no classes.
            labels = json.loads(read(prefix + "dataset.json"))["labels"]
            class_of = dict(labels or [(name, "images") for name in names])
            classes = [class_of[name] for name in names]
        else:
            classes = by_folder(names, path / prefix, prefix)
        items = [(prefix + name, *files[prefix + name]) for name in names]
        splits[split] = splits.get(split, []) + list(zip(classes, items))
    known = {label for label, _ in splits.get("train", ())}
    for split in [*splits]:
        strange = {label for label, _ in splits[split]} - known
        if strange and known:
            note(f"{split} is left out, since train lacks its classes {shortened(strange)}")
            del splits[split]

    def load(item):
        try:
            return open_image(read(item[0]))
        except (UsageError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise UsageError(f"{path}/{item[0]}: {error}") from error
    return splits, load


def by_folder(names, path, prefix):
    """The folders that images are in. What may mean two things is refused."""
    folders = [name.split("/")[:-1] for name in names]
    if not any(folders):
        return ["images"] * len(names)
    # Tiny ImageNet's train/CLASS/images/*.jpg can be meant in one way only.
    below = {tuple(parents[1:]) for parents in folders}
    if not all(folders) or len(below) > 1 or (below != {()} and not prefix):
        raise UsageError(f"{path}: give the folder of the classes, one folder of images each")
    return [parents[0] for parents in folders]


def shortened(names):
    names = sorted(names, key=natural)
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


def natural(name):
    """Sorts class2 before class10."""
    parts = re.split("([0-9]+)", str(name))
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], str(name)


# ---- One image -----------------------------------------------------------------------------------

def open_image(data):
    """Encoded image -> upright RGB image of PIL; what is transparent shows white."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    except Exception as error:  # PIL has many kinds for a damaged file, and one for a bomb
        raise UsageError(f"cannot be read ({error})") from error
    if image.mode in ("I", "F"):
        raise UsageError("32-bit or float pixels, of unknown range: store 8 or 16 bits")
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip it to white
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_array(image, size=None):
    """PIL image -> uint8 [C, size, size], its centre crop as in ADM. None: as the image is."""
    if size and image.size != (size, size):
        while min(image.size) >= 2 * size:  # averages first: bicubic alone looks at too few pixels
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        shape = (round(image.width * scale), round(image.height * scale))
        image = image.resize(shape, Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def crop(x, min_area, rngs, mirror=False):
    """A random crop of each image at the image's size, half of them mirrored if that is wanted."""
    boxes = [random_crop(x.shape[3], x.shape[2], min_area, rng) for rng in rngs]
    flips = [mirror and rng.random() < 0.5 for rng in rngs]
    return crop_resize(x, np.array(boxes), np.array(flips))


def random_crop(width, height, min_area, rng):
    """A random part of an image: (left, top, right, bottom) in pixels, not rounded.

    At least min_area of its area (A.3: 0.2), with sides in ratios of 3:4 to 4:3. rng: numpy's.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    w, h = min(w, width), min(h, height)  # of a very long image, as much as there is
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def crop_resize(x, boxes, flips):
    """Boxes [n, 4] of x [n, C, H, W] in [-1, 1], resized to H x W; flips [n]: which to mirror."""
    height, width = x.shape[2:]
    boxes = boxes / np.tile([width, height], 2) * 2 - 1  # the image becomes [-1, 1] each way
    left, top, right, bottom = upload(boxes, x.device).to(x).unbind(1)
    mirror = torch.where(upload(flips, x.device), -1, 1)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = mirror * (right - left) / 2
    theta[:, 0, 2] = (left + right) / 2
    theta[:, 1, 1] = (bottom - top) / 2
    theta[:, 1, 2] = (top + bottom) / 2
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, "bicubic", "border", align_corners=False).clamp(-1, 1)


# ---- Writing, by any number of processes ---------------------------------------------------------
# A split that is not whole yet is the folder OUT/SPLIT.tmp:
#     images.bin    from the start a place for each image
#     done          for each block of images 0, or its checksum once it is written and synced

class Latents:
    """Images of a list, uint8 [3, H, W] -> float16 [n, plain and mirrored, mean and std, h, w]."""

    def __init__(self, vae, device="cpu"):
        self.vae = load_vae(vae, device)
        self.vae.net.float()  # once for all training: bfloat16 is coarser than what is stored

    def __call__(self, images):
        x = torch.from_numpy(np.stack(images)).to(self.vae.net.device).float() / 127.5 - 1
        views = torch.stack([x, x.flip(3)], 1)
        moments = torch.cat(self.vae.encode(views.flatten(0, 1)), 1).half()
        return moments.unflatten(0, (-1, 2)).cpu().numpy()


def prepare(source, out, size=None, skip_broken=False, latents=None):
    """Write OUT/SPLIT for every split of a source; one that is there already is left as it is.

    All processes call it and share the work. size: as of `to_array`. latents: `Latents`, in place
    of pixels. Broken images are a UsageError, unless they are to be left out.
    """
    splits, load = open_source(source)
    classes = sorted({label for items in splits.values() for label, _ in items}, key=natural)
    number_of = {label: i for i, label in enumerate(classes)}
    meta = {"kind": "latents", "vae": latents.vae.sha256} if latents else {"kind": "pixels"}
    meta["classes"] = [str(label[1] if isinstance(label, tuple) else label) for label in classes]
    for split, items in splits.items():
        items.sort(key=lambda pair: number_of[pair[0]])  # keeps the order within a class
        labels = np.array([number_of[label] for label, _ in items])
        encode = latents or np.stack
        write_split(Path(out, split), meta, items, labels, load, size, encode, skip_broken)
        barrier()


def write_split(folder, meta, items, labels, load, size, encode, skip_broken):
    """Rows encode([array of an item, ...]) of items [(class, item), ...] -> the folder."""
    n = len(items)
    count = zip(meta["classes"], np.bincount(labels))
    note(f"{folder}: {n} images, by class " + shortened(
        f"{i} {name} ({many})" for i, (name, many) in enumerate(count)))
    broken = {}
    enlarged = []

    def view(i):
        """Image i. In place of a broken one stands the first that is not, until it is taken out."""
        try:
            image = load(items[i][1])
        except UsageError as error:
            broken[i] = str(error)
            return first
        if size and min(image.size) < size:
            enlarged.append(i)
        return to_array(image, size)

    first = None
    first = next((x for x in map(view, range(n)) if x is not None), None)
    if first is None:
        raise UsageError(f"no image can be read: {broken[0]}")
    if first.shape[1] != first.shape[2]:
        raise UsageError("training needs square images: give --size")
    row = encode([first])[0]
    meta = {**meta, "dtype": row.dtype.name, "shape": [n, *row.shape]}
    # A 64th of all, so that every process has its part, but no more than memory holds.
    many = min(max(n // 64, 16), 256)
    blocks = [range(n)[start:start + many] for start in range(0, n, many)]
    sums = np.array([max(1, zlib.crc32(repr((meta, items[block.start:block.stop])).encode()))
                     for block in blocks], np.uint32)
    meta["source"] = hashlib.sha256(sums).hexdigest()
    if folder.exists():
        before = json.loads((folder / "meta.json").read_text())
        if before.get("source", meta["source"]) != meta["source"]:  # older data have none
            raise UsageError(f"{folder} was made of other images or options: choose another --out")
        return

    partial = folder.with_suffix(".tmp")
    with lock_folder(folder.parent):
        todo = None
        if get_rank() == 0:
            partial.mkdir(exist_ok=True)
            open(partial / "images.bin", "ab").truncate(n * row.nbytes)  # what is there stays
            open(partial / "done", "ab").truncate(sums.nbytes)
            right = np.fromfile(partial / "done", np.uint32) == sums
            (sums * right).tofile(partial / "done")  # marks of other images or sizes are cleared
            todo = np.flatnonzero(~right)
        todo = gather(todo)[0][get_rank()::world_size()]
        progress = tqdm(todo, str(partial), unit=" blocks", disable=get_rank() > 0)
        with (ThreadPoolExecutor() as pool, open(partial / "images.bin", "r+b") as images,
              open(partial / "done", "r+b", 0) as done):
            for b, views in zip(progress, ahead(pool, view, [blocks[b] for b in todo])):
                if any(x.shape != first.shape for x in views):
                    raise UsageError("the images have several sizes: give one --size")
                images.seek(blocks[b].start * row.nbytes)
                images.write(encode(views).tobytes())
                images.flush()
                os.fsync(images.fileno())
                if broken.keys().isdisjoint(blocks[b]):  # they may be mended at the next start
                    done.seek(b * 4)
                    done.write(sums[b])
        broken = dict(sorted(pair for part in gather(broken) for pair in part.items()))
        if enlarged:
            note(f"{folder}: images smaller than --size {size} are enlarged")
        if broken:
            note("broken images:\n" + "\n".join(broken.values()))
            if not skip_broken:
                raise UsageError("mend these, or give --skip_broken; all others are kept")
        if get_rank() == 0:
            finish(partial, meta, items, labels, list(broken))
            partial.rename(folder)
            sync(folder.parent)


def ahead(pool, function, blocks):
    """Yield each block's [function(i), ...] while threads compute the next block's."""
    coming = None
    for block in [*blocks, ()]:
        following = pool.map(function, block)  # starts at once
        if coming:
            yield list(coming)
        coming = following


def finish(partial, meta, items, labels, broken):
    """Add labels and meta.json, and take out the rows of the numbers `broken`."""
    rows = np.memmap(partial / "images.bin", meta["dtype"], "r", shape=tuple(meta["shape"]))
    keep = np.delete(np.arange(len(rows)), broken)
    count = np.bincount(labels[keep], minlength=len(meta["classes"])).tolist()
    np.save(partial / "labels.npy", labels[keep])
    meta |= {"shape": [len(keep), *rows.shape[1:]], "images_per_class": count,
             "skipped": [items[i][1][0] for i in broken]}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    if broken:
        with open(partial / "rest.bin", "wb") as file:
            for i in keep:
                file.write(rows[i])
    for file in partial.iterdir():
        sync(file)
    (partial / "done").unlink()  # without it, a next start would not go on with images.bin
    if broken:
        (partial / "rest.bin").replace(partial / "images.bin")


def name_of(data):
    """data/my.zip -> my; a dot -> the name of the folder where we are"""
    return Path(data).resolve().name.split(".")[0]


def prepared(data, size):
    """The folder of train.py's --data: itself, or data/NAME, which is made of the source first."""
    source = Path(data)
    out = Path("data", name_of(data))
    if data == "data/digits":  # they come with the code; other images there are refused
        source = DIGITS
    elif (source / "train/meta.json").exists():
        return data
    elif not source.exists():
        kind = "latents" if "latents" in source.name else "pixels"
        raise UsageError(f"{source}: no data there; make it with: python prepare_data.py {kind} "
                         f"--data SOURCE --size 256 --out {source}")
    # A folder of that name may be somebody's images, perhaps those that are read.
    elif out.exists() and not ((out / ".lock").exists() or (out / "train/meta.json").exists()):
        out = Path(f"{out}_prepared")
    prepare(source, out, size)
    return str(out)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=HelpFormat)
    add = parser.add_argument
    add("kind", nargs="?", choices=("pixels", "latents"), default="pixels", help="what is stored")
    add("--data", default=DIGITS, help="source of images, see above")
    add("--out", default="data/digits", help="folder to write")
    add("--size", type=int, help="side of centre crops (None: none; latents: 256)")
    add("--skip_broken", action="store_true", help="leave broken images out, in place of an error")
    add("--vae", default=SD_VAE, help="folder or hf:// of the VAE")
    args = parser.parse_args(argv)
    if args.data not in (DIGITS, "digits") and args.out == parser.get_default("out"):
        parser.error("--out is needed")
    return args


def main(argv=None):
    args = parse(argv)
    latents = None
    if args.kind == "latents":
        torch.set_num_threads(1)  # on a CPU the bits would depend on their number
        latents = Latents(args.vae, "cuda" if torch.cuda.is_available() else "cpu")
        args.size = args.size or 256
    prepare(args.data, args.out, args.size, args.skip_broken, latents)


if __name__ == "__main__":
    run_script(main)
