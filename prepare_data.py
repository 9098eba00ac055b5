"""Images in class folders -> one memory-mapped array of pixels or latents, labels, and a json that says what they are.

    python prepare_data.py pixels --data cifar10.zip --out data/cifar10            # a folder, or a .zip, of class folders
    python prepare_data.py pixels --data imagenet/train --out data/imagenet256 --size 256
    torchrun --nproc_per_node 8 prepare_data.py latents --data imagenet/train --out data/latents
    torchrun --nproc_per_node 8 prepare_data.py latents --data imagenet/train --out data/crops --crops 4
    python prepare_data.py                     # 1,797 handwritten digits, embedded in assets/, as data/digits

The source holds CLASS/*.jpg, or splits {train,val,test}/CLASS/*.jpg. Written is OUT/SPLIT/ with
    images.bin    pixels: uint8 [N, C, H, W]; latents: float16 [N, views, mean and std of C channels, H, W], times 0.18215;
                  sorted by class, so that a class is one range of rows
    labels.npy    int64 [N]
    meta.json     kind, shape, dtype, class names (sorted), images per class, mean and std of each channel, source
After an interruption the same command, on any number of processes, goes on where it was. On a CPU the files have the same
bits on any number of processes. Transparent images are laid on white, 16 bits become 8, EXIF's turns are made.

Latents are the posterior's mean and std, of each image and its mirror image: every visit draws anew, or takes the mean. The
authors store one draw of each, whose noise then never changes: 21 GB of ImageNet, where this is 42. float16 is 2e-4 off the
latents, bfloat16, no smaller, 1.7e-3. An encoder of latents wants random crops from before the VAE: --crops K stores K of
each image instead (21 GB and the encoding of one image each); `random_resized_crop` makes endless ones, in every step.

The embedded digits (E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0) are 8x8 in 17 greys; every
fifth of a class is held out as the split `test`.
"""
import argparse
import errno
import hashlib
import io
import json
import math
import os
import shutil
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np

SPLITS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
DIGITS = Path(__file__).parent / "assets" / "digits.npz"
KINDS = {"pixels": "uint8", "latents": "float16"}


# ------------------------------------------------------------------------------------------------------------------
# What training reads

class Dataset:
    """A prepared split: images as a memmap, and ids drawn from a class, from all, or from shuffled epochs.

    `images` is the memmap: uint8 [N, C, H, W], or of kind `latents` float16 [N, V, 2C, H, W], of each of V views (an image
    and its mirror image, or random crops) the mean and the standard deviation of its latents. `shape` is [C, H, W], `labels`
    int64 [N], `meta` the json. Raises FileNotFoundError or ValueError, in one line, for a folder that is not there, not
    whole, of an unknown kind, or whose labels do not fit its classes.
    """

    def __init__(self, folder, split="train"):
        path = Path(folder) / split
        if not (path / "meta.json").is_file():
            raise FileNotFoundError(f"{path}: no prepared data there; make it with: python prepare_data.py --data SOURCE "
                                    f"--out {folder}")
        try:
            self.meta = dict(json.loads((path / "meta.json").read_text()))
            kind, dtype, shape = (self.meta[key] for key in ("kind", "dtype", "shape"))
            self.num_classes, math.prod(shape), len(shape)  # noqa: B018  (there, and what they should be)
            self.labels = np.load(path / "labels.npy", allow_pickle=False)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}): prepare it again") from None
        if dtype is None or KINDS.get(kind) != dtype or len(shape) != (5 if kind == "latents" else 4):
            raise ValueError(f"{path}/meta.json: {kind} as {dtype} {shape} is nothing that is written here: prepare again")
        expected, size = math.prod(shape) * np.dtype(dtype).itemsize, (path / "images.bin").stat().st_size
        if size != expected:
            raise ValueError(f"{path}/images.bin has {size} bytes, its meta.json says {expected}: prepare it again")
        self.images = np.memmap(path / "images.bin", dtype, "r", shape=tuple(shape))
        self.shape = (shape[2] // 2, *shape[3:]) if kind == "latents" else tuple(shape[1:])
        labels = self.labels
        if labels.dtype != np.int64 or labels.shape != (shape[0],) or not len(labels) or (np.diff(labels) < 0).any() or not (
                0 <= labels[0] <= labels[-1] < self.num_classes):
            raise ValueError(f"{path}/labels.npy does not fit meta.json ({shape[0]} images sorted by class, "
                             f"{self.num_classes} classes): prepare it again")
        self.count = np.bincount(self.labels, minlength=self.num_classes)
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

    def batch(self, ids, rng=None, flip=False, device="cpu"):
        """Samples of these ids, float32 [n, C, H, W] on the device: pixels in [-1, 1]; latents drawn anew.

        rng: numpy Generator, or a seed for each sample, from which its randomness comes, whatever else is in the batch.
        Without it latents are the means, of the first view. flip: mirror with probability 1/2; crops are mirrored already.
        """
        import torch
        ids = np.asarray(ids)
        seeds = rng.integers(1 << 63, size=len(ids)) if isinstance(rng, np.random.Generator) else rng
        if self.meta["kind"] == "pixels":
            x = upload(self.images[ids], device).float().div_(127.5).sub_(1)
            mirrored = upload(seeds % 2 == 1, device)[:, None, None, None] if flip else None
            return torch.where(mirrored, x.flip(3), x) if flip else x
        if rng is None:
            return upload(self.images[ids, 0, :self.shape[0]], device).float()
        views = self.images.shape[1] if flip or self.meta.get("views") == "crops" else 1
        mean, std = upload(self.images[ids, seeds % views], device).chunk(2, 1)
        x, stream = torch.empty(mean.shape, device=device), torch.Generator(device)
        for at in range(0, len(ids), 32):  # few enough for the CPU's cache: 0.12 s for 5,120 of 4x32x32, else 0.18
            part = slice(at, at + 32)
            for row, seed in zip(x[part], seeds[part].tolist()):  # torch's normal numbers take half the time of numpy's
                row.normal_(generator=stream.manual_seed(seed))
            x[part].mul_(std[part]).add_(mean[part])
        return x

    def draw(self, label, n, rng):
        """n ids of one class, without replacement (rng: numpy Generator)."""
        return self.first[label] + rng.choice(self.count[label], n, replace=False, shuffle=False)

    def draw_any(self, n, rng):
        """n ids of any class, without replacement."""
        return rng.choice(len(self), n, replace=False, shuffle=False)

    def fresh(self, start, n, seed):
        """Ids number start ... start + n - 1 of an endless row of shuffled epochs. It has no state: resuming is free.

        Processes take neighbouring pieces of a step's n: then no two read the same sample in an epoch.
        """
        ids = []
        while n > 0:
            epoch, offset = divmod(start, len(self))
            known, order = self._epoch  # both at once: another thread may draw from another epoch
            if known != (seed, epoch):
                order = np.random.default_rng([seed, epoch]).permutation(len(self))
                self._epoch = (seed, epoch), order
            ids.append(order[offset:offset + n])
            start, n = start + len(ids[-1]), n - len(ids[-1])
        return np.concatenate(ids)


def upload(array, device):
    """An array as a tensor on the device; on its way to a GPU neither waits for the other."""
    import torch
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor.to(device)


def prefetch(function, steps):
    """function(step) of each step, in order, while a background thread makes the next one; what it raises is raised here.

    It is one call ahead, never more: state that `function` changes is that of the next step as soon as a step is given out.
    """
    with ThreadPoolExecutor(1) as thread:
        ahead = deque()
        for step in steps:
            ahead.append(thread.submit(function, step))
            if len(ahead) == 2:
                yield ahead.popleft().result()
        if ahead:
            yield ahead.popleft().result()


# ------------------------------------------------------------------------------------------------------------------
# What is read to make it

def list_images(source):
    """{split: [(class name, file name)]} of a folder or .zip of class folders, sorted, and a function name -> bytes."""
    source = Path(source)
    if source.is_dir():
        walk = os.walk(source, followlinks=True)  # subsets of ImageNet are often made of links
        names = [(Path(root).relative_to(source) / name).as_posix() for root, _, files in walk for name in files]
        read = lambda name: (source / name).read_bytes()  # noqa: E731
    elif source.is_file():
        if not zipfile.is_zipfile(source):
            raise ValueError(f"{source}: neither a folder nor a .zip (a download cut short?)")
        archive = zipfile.ZipFile(open(source, "rb"))  # not by name: then it would count readers, which is not thread-safe
        names, read = archive.namelist(), archive.read
    else:
        raise FileNotFoundError(f"{source}: not found")
    names = sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not Path(n).name.startswith("."))
    folders = sorted({n.split("/")[0] for n in names})
    if len(folders) == 1 and folders[0] not in SPLITS and all(n.count("/") >= 2 for n in names):
        raise ValueError(f"{source}: everything is inside one folder {folders[0]}/; class folders must be at the top")
    splits, split_folders = {}, set(folders) <= set(SPLITS)
    for name in names:
        *parents, _ = name.split("/")
        split = parents.pop(0) if split_folders else "train"
        if not parents:
            raise ValueError(f"{source}: {name} is in no class folder (expected CLASS/*.jpg or train/CLASS/*.jpg)")
        splits.setdefault(split, []).append((parents[0], name))
    if not splits:
        raise ValueError(f"{source}: no images there (looked for {' '.join(EXTENSIONS)})")
    return {split: sorted(files) for split, files in splits.items()}, read


def open_image(data, channels=3):
    """Encoded image -> upright PIL image of 8 bits, grey (channels 1) or RGB; what is transparent shows white."""
    from PIL import Image, ImageOps
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):  # 16 bits a pixel, which PIL's own conversion would clip to white
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if channels == 1 else "RGB")


def decode(data, size, channels):
    """Encoded image -> uint8 [channels, size, size]: upright, centre crop as in ADM (size None: as it is)."""
    from PIL import Image
    image = open_image(data, channels)
    if size is not None and image.size != (size, size):
        while min(image.size) >= 2 * size:  # halving by averaging first: bicubic alone looks at too few pixels
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def random_resized_crop(image, size, rng, min_area=0.2):
    """PIL image -> uint8 [3, size, size]: a random part of it, of at least this share of its area and 3:4 to 4:3 sides,
    resized (bicubic) and mirrored half of the time. What encoders of latents are trained on, before the VAE."""
    from PIL import Image
    for _ in range(10):
        area, ratio = image.width * image.height * rng.uniform(min_area, 1), math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= image.width and height <= image.height:
            break
    else:  # a very long image: as much of it as these sides allow
        width, height = min(image.width, image.height * 4 / 3), min(image.height, image.width * 4 / 3)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + width, top + height)))
    return (array[:, ::-1] if rng.random() < 0.5 else array).transpose(2, 0, 1)


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

def prepare(source, out, size=None, channels=3, skip_broken=False, latents=None, workers=1, rank=0, world=1):
    """Write OUT/SPLIT for every split of the source; one that is there already, made in the same way, is left as it is.

    latents: what turns images into latents (None: pixels are stored). workers: threads that decode.
    """
    if source == "digits":
        meta = dict(kind="pixels", classes=[str(c) for c in range(10)], source=DIGITS.name)
        for split, (images, labels) in embedded_digits().items():
            if not (Path(out) / split).exists():
                names = [f"{split} {i}" for i in range(len(labels))]
                write(Path(out) / split, meta, names, labels, images.__getitem__, np.stack)
        return
    splits, read = list_images(source)
    classes = sorted({name for files in splits.values() for name, _ in files})
    number = {name: c for c, name in enumerate(classes)}
    meta = dict(kind="pixels", classes=classes, source=Path(source).name, size=size, channels=channels)
    if latents:
        meta.update(kind="latents", **latents.meta)
    for split, files in splits.items():
        names, labels = [name for _, name in files], np.array([number[c] for c, _ in files], np.int64)
        load, encode = (lambda i: decode(read(names[i]), size, channels)), np.stack  # noqa: B023
        if latents:
            load, encode = (lambda i: latents.load(read(names[i]), i)), latents.encode  # noqa: B023
        write(Path(out) / split, meta, names, labels, load, encode, skip_broken, workers, rank, world)


class Latents:
    """Images through the VAE: plain and mirrored, or random crops; number k of image i depends on (seed, i, k) alone."""

    def __init__(self, path, size=256, chunk=16, crops=0, seed=0, device="cpu"):
        import model
        self.vae, self.size, self.device = model.load_vae(path, device, chunk), size, device
        self.crops, self.seed = crops, seed
        self.vae.net.float()  # sampling's bfloat16 is coarser than what is stored, and this is done once for all training
        if size % self.vae.downsampling:
            raise ValueError(f"--size {size} must be divisible by {self.vae.downsampling}, by which the VAE shrinks")
        with open(model.resolve(path, model.VAE_FILES) / model.VAE_FILES[1], "rb") as f:
            self.meta = dict(views="crops" if crops else "plain, mirrored", size=size, seed=seed, scale=model.LATENT_SCALE,
                             vae=hashlib.file_digest(f, "sha256").hexdigest())

    def load(self, data, i):
        """Encoded image number i -> uint8 [1 or crops, 3, size, size]."""
        if not self.crops:
            return decode(data, self.size, 3)[None]
        image, streams = open_image(data), (np.random.default_rng([self.seed, i, k]) for k in range(self.crops))
        return np.stack([random_resized_crop(image, self.size, rng) for rng in streams])

    def encode(self, images):
        """Loaded images -> float16 [n, views, mean and std, h, w]."""
        import torch
        x = torch.from_numpy(np.stack(images)).to(self.device)
        x = x if self.crops else torch.cat([x, x.flip(-1)], 1)
        moments = torch.cat(self.vae.encode(x.flatten(0, 1).float() / 127.5 - 1), 1).half()
        if not moments.isfinite().all():
            raise ValueError("the VAE's latents are not finite in float16: is it damaged?")
        return moments.unflatten(0, x.shape[:2]).cpu().numpy()


def write(folder, meta, names, labels, load, encode, skip_broken=False, workers=1, rank=0, world=1):
    """Rows encode([load(0), load(1), ...]) -> FOLDER, which has that name only when whole.

    Until then it is FOLDER.tmp. Its images.bin has all rows from the start; once a block of them is written and synced, it
    gets a mark, blocks/NUMBER.json. What has a mark is never made again, and what has none always.
    """
    from tqdm import tqdm
    meta = dict(meta, files=hashlib.sha256("\n".join(names).encode()).hexdigest())
    if folder.exists():
        found = json.loads((folder / "meta.json").read_text()) if (folder / "meta.json").is_file() else {}
        if any(found.get(key) != meta[key] for key in meta):
            raise ValueError(f"{folder} exists already, of other images or options: remove it, or choose another --out")
        if rank == 0:
            print(f"{folder} is there already")
        return
    n, partial, marks = len(names), folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".tmp") / "blocks"
    first = next((x for i in range(n) if not isinstance(x := _load_or_why(load, i), str)), None)
    if first is None:
        raise ValueError(f"{meta['source']}: none of its images can be read")
    row = encode([first])[0]
    # A 64th of all, so that every process has its share, within limits: a block needs memory, a mark some milliseconds.
    size = max(1, min(max(n * first.nbytes // 64, 1 << 16), 1 << 25) // first.nbytes)
    meta = dict(meta, dtype=str(row.dtype), shape=[n, *row.shape])
    if rank == 0:
        _begin(partial, dict(meta, block=size), n * row.nbytes)
    barrier(world)
    blocks = [range(n)[at:at + size] for at in range(0, n, size) if not (marks / f"{at // size}.json").exists()]
    barrier(world)  # all have looked before the first makes a mark
    began, made, blocks = time.time(), sum(map(len, blocks)), blocks[rank::world]
    workers = workers if first.nbytes > 1 << 13 else 1  # with small images it is Python that works, and one thread at a time
    with ThreadPoolExecutor(workers) as pool, open(partial / "images.bin", "r+b") as f, \
            tqdm(total=sum(map(len, blocks)), desc=str(folder), unit=" images", disable=rank > 0) as progress:
        def load_block(ids):
            parts = [ids[k:k + 16] for k in range(0, len(ids), 16)]  # one small image is less work than handing it out
            return [x for part in pool.map(lambda part: [_load_or_why(load, i) for i in part], parts) for x in part]

        for ids, images in zip(blocks, prefetch(load_block, blocks)):
            broken = {i: x for i, x in zip(ids, images) if isinstance(x, str)}
            for i, image in zip(ids, images):
                if i in broken:
                    progress.write(f"{names[i]}: cannot be read ({image})")
                elif image.shape != first.shape:
                    raise ValueError(f"{names[i]} is {list(image.shape)}, the first {list(first.shape)}: give one --size")
            images = [np.zeros_like(first) if i in broken else image for i, image in zip(ids, images)]
            rows = np.ascontiguousarray(encode(images))
            f.seek(ids[0] * row.nbytes)
            f.write(rows)
            f.flush()
            os.fsync(f.fileno())
            sums = _sums(np.delete(rows, [i - ids[0] for i in broken], 0), meta["kind"])
            _save(marks / f"{ids[0] // size}.json", json.dumps([broken, sums.tolist()]).encode())
            progress.update(len(ids))
    barrier(world)
    if rank == 0:
        _finish(folder, partial, meta, names, labels, skip_broken)
        seconds = time.time() - began
        print(f"  {made / seconds:.1f} images a second: {made} in {seconds:.1f} s on {world} process(es)"
              + f"; {n - made} had been done before" * (made < n))


def _load_or_why(load, i):
    try:
        return load(i)
    except Exception as error:  # PIL and zipfile raise many kinds for a broken file
        return f"{type(error).__name__}: {error}"


def _save(path, data):
    """Written under another name, synced, renamed: whole or not there."""
    partial = path.with_name(path.name + ".new")
    with open(partial, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def _begin(partial, plan, size):
    if (partial / "blocks/plan").exists():
        if json.loads((partial / "blocks/plan").read_text()) != plan:
            raise ValueError(f"{partial} was begun with other images or options: give those again, or remove it")
        return
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "blocks").mkdir(parents=True)
    if (free := shutil.disk_usage(partial).free) < size:
        raise ValueError(f"{partial} needs {size / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} left")
    with open(partial / "images.bin", "wb") as f:
        f.truncate(size)
    _save(partial / "blocks/plan", json.dumps(plan).encode())


def _sums(rows, kind):
    """[3, C]: sums of a channel's values, of their squares, and of the squares that the posterior's std adds."""
    sums = np.zeros((3, rows.shape[-3] // (2 if kind == "latents" else 1)))
    for part in np.array_split(rows, rows.nbytes // (1 << 20) + 1):
        x = part.reshape(-1, *rows.shape[-3:]).astype(np.float32)
        mean, std = np.split(x, 2, 1) if kind == "latents" else (x, np.zeros_like(x[:1]))
        sums += [values.sum((0, 2, 3), dtype=np.float64) for values in (mean, mean * mean, std * std)]
    return sums


def _finish(folder, partial, meta, names, labels, skip_broken):
    """Take broken images out, add labels and meta.json, give the folder its name, and say what is in it."""
    marks = sorted((partial / "blocks").glob("*.json"), key=lambda p: int(p.stem))
    found = [json.loads(p.read_text()) for p in marks]
    broken = {int(i): why for images, _ in found for i, why in images.items()}
    images, shape = np.memmap(partial / "images.bin", meta["dtype"], "r").reshape(-1, *meta["shape"][1:]), meta["shape"][1:]
    if broken and len(images) == len(labels):  # else it was interrupted after they were taken out
        if not skip_broken:
            for mark, (why, _) in zip(marks, found):
                if why:
                    mark.unlink()  # tried again once they are mended
            i = min(broken)
            raise ValueError(f"{names[i]}: cannot be read ({broken[i]}), and {len(broken) - 1} more: mend them, or give "
                             "--skip_broken. The others are done, and kept for the next start")
        with open(partial / "kept.bin", "wb") as f:
            for i in range(len(images)):
                f.write(b"" if i in broken else images[i])
            f.flush()
            os.fsync(f.fileno())
        (partial / "kept.bin").replace(partial / "images.bin")
    labels = np.delete(labels, list(broken))
    counts, (total, square, noise) = np.bincount(labels, minlength=len(meta["classes"])), sum(np.array(s) for _, s in found)
    values = len(labels) * math.prod(shape) // shape[-3]  # of each channel
    mean, std = total / values, np.sqrt((square + noise) / values - (total / values) ** 2)
    if meta["kind"] == "pixels":  # as training sees them
        mean, std = mean / 127.5 - 1, std / 127.5
    meta.update(shape=[len(labels), *shape], images_per_class=counts.tolist(), mean=mean.tolist(), std=std.tolist(),
                skipped=[names[i] for i in sorted(broken)])
    np.save(buffer := io.BytesIO(), labels)
    _save(partial / "labels.npy", buffer.getvalue())
    _save(partial / "meta.json", json.dumps(meta, indent=1).encode())
    partial.rename(folder)
    shutil.rmtree(folder / "blocks")  # not before: without its marks the folder would be filled again
    row = lambda values: " ".join(f"{x:.3f}" for x in values)  # noqa: E731
    print(f"{folder}: {len(labels)} images {shape} {meta['dtype']}, {(folder / 'images.bin').stat().st_size / 1e6:.1f} MB; "
          f"{len(counts)} classes of {counts.min()} to {counts.max()} images"
          + f"; {len(broken)} broken, skipped" * bool(broken))
    print(f"  each channel's mean {row(mean)}, std {row(std)}"
          + (f", the posterior's alone {row(np.sqrt(noise / values))}" if meta["kind"] == "latents" else ""))


def barrier(world):
    if world > 1:
        import torch.distributed
        torch.distributed.barrier()


# ------------------------------------------------------------------------------------------------------------------
# The command

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("kind", nargs="?", choices=KINDS, default="pixels", help="what is stored (default: %(default)s)")
    parser.add_argument("--data", default="digits", help="folder or .zip of class folders, or `digits` (default)")
    parser.add_argument("--out", help="folder to write (default of the digits: data/digits)")
    parser.add_argument("--size", type=int, help="centre crop, resized to SIZE x SIZE (default: as they are; latents: 256)")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3, help="1: greyscale (default: %(default)s)")
    parser.add_argument("--skip_broken", action="store_true", help="leave broken images out, instead of stopping at the end")
    parser.add_argument("--workers", type=int, help="threads of each process that decode (default: its share of the cores)")
    latents = parser.add_argument_group("latents")
    latents.add_argument("--vae", default="hf://stabilityai/sd-vae-ft-mse", help="folder or hf:// (default: %(default)s)")
    latents.add_argument("--vae_chunk", type=int, default=16, help="images at a time on a GPU (default: %(default)s)")
    latents.add_argument("--crops", type=int, default=0, help="random crops of each image instead of plain and mirrored")
    latents.add_argument("--seed", type=int, default=0, help="of the crops (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.data == "digits":
        if args.kind == "latents" or args.size or args.channels != 3 or args.skip_broken:
            parser.error("the embedded digits are grey and 8x8: latents, --size, --channels, --skip_broken are for others")
        args.out = args.out or "data/digits"
    if args.out is None:
        parser.error("--out is needed")
    if args.kind == "pixels" and any(getattr(args, a.dest) != a.default for a in latents._group_actions):
        parser.error("--vae, --vae_chunk, --crops and --seed are options of latents")
    if args.kind == "latents" and args.channels != 3:
        parser.error("latents are of RGB images: --channels 1 is for pixels")
    for name, least in (("size", 1), ("workers", 1), ("vae_chunk", 1), ("crops", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return args


def main():
    args = parse()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    latents = None
    if world > 1:
        # The processes only wait for each other, but for rank 0 perhaps long.
        import torch.distributed
        from torch.distributed.nn import functional  # noqa: F401  imported later, its defaults would keep the group alive
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        if args.kind == "latents":
            import torch
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
            torch.set_num_threads(1)  # on a CPU the bits depend on the number; there --nproc_per_node is quicker anyhow
            latents = Latents(args.vae, args.size or 256, args.vae_chunk, args.crops, args.seed, device)
        workers = args.workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        prepare(args.data, args.out, args.size, args.channels, args.skip_broken, latents, workers, rank, world)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            error = f"no room left for {args.out}. What is done is kept: make room, and run the same command again"
        raise SystemExit(f"prepare_data.py: {error}") from None
    finally:
        if world > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
