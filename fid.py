"""FID, Inception Score, precision and recall of a generator's checkpoint or of image files.

    python fid.py ref  --data data/cifar10 --out cifar10_stats.npz        # reference statistics of real images
    python fid.py eval --ckpt runs/cifar10 --ref cifar10_stats.npz --cfg_scale 1.0 1.2 1.5
    python fid.py eval --images samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py eval --ckpt runs/digits --data data/digits --features encoder:runs/digits_encoder
    python fid.py neighbours --ckpt runs/cifar10 --data data/cifar10      # copies of training images would be seen
    torchrun --nproc_per_node 8 fid.py eval ...                           # the same numbers, sooner

Protocol (that of the field, and of the paper's Tables 4 and 5): 50,000 images with label i % classes, uint8 by
floor(255 x), the Inception-v3 of 2015-12-05 in float32, statistics in float64. Two families of reference files exist
and must not be mixed: those of ADM (resize `tf1`) and those of MeanFlow, which the paper's numbers use (`half`).
"""
import argparse
import hashlib
import json
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import load_encoder, load_generator
from prepare_data import EXTENSIONS, Dataset, decode
from sample import generate, save_grid, to_uint8

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
REAL_FOR_PRECISION = 10_000  # real images behind precision and recall, ADM's number; both figures depend on it


# ------------------------------------------------------------------------------------------------------------------
# The network

class Unit(nn.Module):
    """Convolution without bias, BatchNorm (eps 1e-3, as in TensorFlow), ReLU."""

    def __init__(self, width_in, width, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Parallel branches of units on one input, concatenated in the order given.

    A branch is a list of (width, kernel[, stride]); a list in its place means units side by side on the same input.
    Unit j of branch `b` is the attribute `b` if alone, else `b_j`, and `b_ja`, `b_jb` side by side: the checkpoint's
    names. `branch_pool` works on the pooled input.
    """

    def __init__(self, width_in, pool, **branches):
        super().__init__()
        self.pool, self.branches, self.width = pool, {}, 0
        for branch, steps in branches.items():
            width, self.branches[branch] = width_in, []
            for j, step in enumerate(steps, 1):
                units = step if isinstance(step, list) else [step]
                name = f"{branch}_{j}" if len(steps) > 1 else branch
                names = [name + letter for letter in "ab"] if len(units) > 1 else [name]
                for name, (unit_width, kernel, *stride) in zip(names, units):
                    self.add_module(name, Unit(width, unit_width, kernel, *(stride or [1, "same"])))
                width = sum(unit[0] for unit in units)
                self.branches[branch].append(names)
            self.width += width

    def forward(self, x):
        outputs = []
        for branch, steps in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """Inception-v3 as in TensorFlow's graph of 2015-12-05, with the names of the public PyTorch conversion.

    It is not torchvision's: 1008 outputs, average pools that leave out the padding, a max pool in Mixed_7c.
    """

    def __init__(self):
        super().__init__()
        average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        maximum = lambda x: F.max_pool2d(x, 3, 1, 1)
        halving = lambda x: F.max_pool2d(x, 3, 2)
        row7, column7, row3, column3 = (1, 7), (7, 1), (1, 3), (3, 1)

        def block_a(width, pool_width):
            return Mixed(width, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                         branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pool_width, 1)])

        def block_c(c):
            return Mixed(768, average, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row7), (192, column7)],
                         branch7x7dbl=[(c, 1), (c, column7), (c, row7), (c, column7), (192, row7)],
                         branch_pool=[(192, 1)])

        def block_e(width, pool):
            fork = [(384, row3), (384, column3)]
            return Mixed(width, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                         branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)])

        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, halving, branch3x3=[(384, 3, 2)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(block_c, (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, halving, branch3x3=[(192, 1), (320, 3, 2)],
                              branch7x7x3=[(192, 1), (192, row7), (192, column7), (192, 3, 2)], branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, maximum)
        self.fc = nn.Linear(2048, 1008)  # for the Inception Score, used without its bias

    def forward(self, x):                                                            # [N, 3, 299, 299]
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))            # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))            # [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))       # [N, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))   # [N, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                           # [N, 2048, 8, 8]
        return x.mean((2, 3))                                                        # [N, 2048]


def load_inception(path=None):
    """The FID network with its trained weights, in eval mode, on the CPU.

    path: a .pth, .pt or .safetensors state dict with the keys of pytorch-fid's release. Without it that release's file
    is downloaded, once a node, and its hash checked. Raises ValueError for weights that cannot be had or do not fit.
    """
    waits = path is None and dist.is_initialized()
    first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
    if waits and not first_of_node:
        dist.barrier()
    with torch.device("meta"):  # no initialisation, so no random numbers are drawn
        net = Inception()
    try:
        if path is None:
            state = torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        elif str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
                            assign=True)
    except Exception as error:  # every format has errors of its own, and one remedy
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot read the FID Inception-v3 from {path or 'the internet'} ({type(error).__name__}: "
                         f"{reason:.150}); fetch {INCEPTION_URL} and give it as --inception") from None
    if waits and first_of_node:
        dist.barrier()
    return net.eval().requires_grad_(False)


def prepare(images, resize):
    """uint8 [N, 3, H, W] -> float32 [N, 3, 299, 299], the network's input (v - 128) / 128, resized bilinearly.

    `half`: pixel centres at half-integers (torch's and MeanFlow's). `tf1`: output i reads from i * H / 299, without the
    half-pixel offset, as TensorFlow 1 did (ADM's). They differ by a constant shift, neither smooths when shrinking.
    """
    x = images.float()
    if resize == "half":
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    elif resize == "tf1":
        for dim in (2, 3):
            size = x.shape[dim]
            position = torch.arange(299, device=x.device) * (size / 299)
            low = position.long()
            high = (low + 1).clamp(max=size - 1)
            share = (position - low).view(-1, *[1] * (3 - dim))
            x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share
    else:
        raise ValueError(f"resize is tf1 or half, not {resize}")
    return (x - 128) / 128


@torch.no_grad()
def inception_features(net, images_uint8, resize="tf1", batch_size=64):
    """uint8 [N, 1 or 3, H, W] -> pool features float32 [N, 2048] on the network's device; grey is repeated to RGB.

    Always in full float32: TF32 convolutions, torch's default on GPUs, would move features by 5e-4.
    """
    if images_uint8.dtype != torch.uint8 or images_uint8.ndim != 4 or images_uint8.shape[1] not in (1, 3):
        raise ValueError(f"Inception takes uint8 images [N, 1 or 3, H, W], not {images_uint8.dtype} "
                         f"{list(images_uint8.shape)}")
    device = net.fc.weight.device
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), torch.autocast(device.type, enabled=False):
        return torch.cat([net(prepare(batch.to(device).expand(-1, 3, -1, -1), resize))
                          for batch in images_uint8.split(batch_size)])


# ------------------------------------------------------------------------------------------------------------------
# The figures

def statistics(features):
    """[N, D] -> mean [D] and covariance [D, D] with divisor N - 1, float64 throughout."""
    features = features.double()
    mu = features.mean(0)
    centred = features - mu
    return mu, centred.T @ centred / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Heusel et al. 2017; a float, not clamped at 0.

    [D], [D, D] twice, arrays or tensors; give the covariance of the smaller sample first. With sigma1 = R R^T the trace
    of the root is the sum of the roots of the eigenvalues of R^T sigma2 R. R keeps only the directions in which sigma1
    is not zero: the roots of rounding noise in the others are what costs scipy's sqrtm its fifth decimal.
    Raises ValueError for shapes that do not fit and for numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != mu1.shape * 2:
        raise ValueError(f"statistics of different features: mu {list(mu1.shape)} and {list(mu2.shape)}, "
                         f"sigma {list(sigma1.shape)} and {list(sigma2.shape)}")
    if not all(x.isfinite().all() for x in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics hold NaN or Inf")
    scale, axes = torch.linalg.eigh(sigma1)
    kept = scale > 1e-12 * scale.max()
    root = axes[:, kept] * scale[kept].sqrt()
    product = root.T @ sigma2 @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root)


def inception_score(logits):
    """[N, classes] -> (mean, std) over 10 splits of exp(mean KL(p(y|x) || p(y))), Salimans et al. 2016.

    The official split rule: rows permuted by RandomState(2020), since splits of images in class order would lack
    classes; then 10 splits of floor(N / 10), the remainder dropped. Logits are without the bias. ValueError for N < 10.
    """
    if len(logits) < 10:
        raise ValueError(f"the Inception Score needs at least 10 images, got {len(logits)}")
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits))).to(logits.device)
    log_p = logits.double()[order].log_softmax(1)
    log_p = log_p[:len(logits) // 10 * 10].unflatten(0, (10, -1))                                # 10 n classes
    log_mean = log_p.logsumexp(1, True) - math.log(log_p.shape[1])                               # 10 1 classes
    scores = (log_p.exp() * (log_p - log_mean)).sum(2).mean(1).exp()                             # 10
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """[N, D], [M, D] -> (precision, recall), Kynkaanniemi et al. 2019, on Inception's pool features as ADM does.

    A sample's ball reaches to its k-th nearest other of its own set. Precision is the share of fake samples inside the
    ball of any real one, recall the share of real samples inside that of any fake one. ValueError for N or M <= k.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of a kind, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()  # also keeps TF32 out

    def distances(points, centres):  # squared, 1000 points at a time: 400 MB for 50,000 centres
        for rows in points.split(1000):
            yield (rows.square().sum(1, True) - 2 * rows @ centres.T + centres.square().sum(1)).clamp(min=0)

    def radii(points):  # the nearest is the point itself, hence k + 1
        return torch.cat([d.topk(k + 1, largest=False).values[:, k] for d in distances(points, points)])

    def share_inside(points, centres):
        reach = radii(centres)
        return sum(int((d <= reach).any(1).sum()) for d in distances(points, centres)) / len(points)

    return share_inside(fake, real), share_inside(real, fake)


# ------------------------------------------------------------------------------------------------------------------
# Images, of files or of a generator, and their features on any number of processes

def open_images(path):
    """A prepared data set, an .npz with uint8 arr_0 [N, H, W, C], or a folder or .zip of images, sorted by name.

    Returns (N, read); read(indices) -> uint8 [n, C, H, W] takes from disk only what is asked for, since 50,000 images
    of 256x256 are 9.8 GB. Raises ValueError for what is none of these, empty, broken, or of several sizes.
    """
    path = Path(path)
    split = path / "train" if (path / "train" / "meta.json").is_file() else path
    if (split / "meta.json").is_file():
        data = Dataset(split.parent, split.name)
        return len(data), lambda indices: torch.from_numpy(data.images[indices])

    if path.suffix == ".npz":
        keys = open_npz(path).files
        if "arr_0" not in keys:
            raise ValueError(f"{path} holds no images: wanted arr_0, found {', '.join(keys)}")
        stream = zipfile.ZipFile(path).open("arr_0.npy")
        np.lib.format.read_magic(stream)
        (count, *hwc), fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype != np.uint8 or fortran_order or len(hwc) != 3:
            raise ValueError(f"{path}: arr_0 is {dtype} {[count, *hwc]}, wanted uint8 [N, H, W, C]")
        start, size = stream.tell(), math.prod(hwc)

        def image(i):
            stream.seek(start + i * size)  # rising indices make one pass over the file
            return np.frombuffer(stream.read(size), np.uint8).reshape(hwc).transpose(2, 0, 1)
    else:
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} does not exist, or is no prepared data set, folder, .zip or .npz of images")
        root = path if path.is_dir() else zipfile.Path(path)
        names = [str(p.relative_to(path)) for p in path.rglob("*")] if path.is_dir() else root.root.namelist()
        names = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
        count = len(names)

        def image(i):
            try:
                return decode((root / names[i]).read_bytes(), None, 3)
            except OSError as error:
                raise ValueError(f"{path}: {names[i]} cannot be read ({error})") from None
    if not count:
        raise ValueError(f"{path} holds no images")
    shape = image(0).shape

    def read(indices):
        images = [image(i) for i in indices]
        if any(x.shape != shape for x in images):
            raise ValueError(f"{path} holds images of several sizes; bring them to one with prepare_data.py")
        return torch.from_numpy(np.stack(images))
    return count, read


def open_npz(path):
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} does not exist, or is no .npz file")
    return np.load(path, allow_pickle=False)  # a pickle could run code


def generated(generator, cfg_scale=1.0, seed=0, temperature=1.0, vae=None):
    """read(indices) as of `open_images`, of a generator: image i has label i % classes and noise from (seed, i).

    No other random numbers are drawn: a training run that evaluates goes on as if it had not.
    """
    def read(indices):
        indices = torch.tensor(indices)
        return to_uint8(generate(generator, indices % generator.num_classes, indices, cfg_scale, temperature, seed,
                                 batch_size=len(indices), vae=vae))
    return read


class Extractor(NamedTuple):
    """What turns images into the rows that are compared, and what identifies it."""
    extract: Callable  # uint8 [n, C, H, W] -> float32 [n, D]
    features: str      # "pixels", or "inception-", "encoder-" and a hash of the weights
    resize: str        # tf1 or half; "none" for an encoder
    fc: torch.Tensor   # [1008, 2048], for the Inception Score's logits; None for an encoder


def load_extractor(features="inception", resize="tf1", inception=None, device="cpu"):
    """`inception` (weights from the path `inception`, or downloaded), `pixels` in [-1, 1], or `encoder:CKPT`.

    The last is our own encoder, for data of which Inception knows nothing: its last stage's map, ReLU, averaged over
    positions. (The ReLU matters: the plain average of a map that comes from a group norm is nearly the same for every
    image.) Raises ValueError or OSError for weights that cannot be had.
    """
    kind, _, ckpt = features.partition(":")
    if features == "pixels":
        return Extractor(lambda images: images.to(device).flatten(1) / 127.5 - 1, "pixels", "none", None)
    if features == "inception":
        net = load_inception(inception).to(device)
    elif kind == "encoder" and ckpt:
        net = load_encoder(ckpt).to(device)
    else:
        raise ValueError(f"--features is inception, pixels or encoder:CKPT, not {features}")
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().numpy())
    name = f"{kind}-{digest.hexdigest()[:12]}"
    if kind == "inception":
        return Extractor(lambda images: inception_features(net, images, resize), name, resize, net.fc.weight)

    @torch.no_grad()
    def extract(images):
        if images.shape[1] != net.in_channels:
            if not (images == images[:, :1]).all():
                raise ValueError(f"the encoder takes {net.in_channels} channels, the images have {images.shape[1]}")
            images = images[:, :1].expand(-1, net.in_channels, -1, -1)  # grey in another form
        last = net.features(images.to(device) / 127.5 - 1)[f"layer{net.encoder.num_stages}"]     # n T C
        return last.float().relu().mean(1)
    return Extractor(extract, name, "none", None)


def shard(indices, rank, world):
    """One process's indices: every world-th; the last one fills up, so that all processes have equally many."""
    return [indices[min(i, len(indices) - 1)] for i in range(rank, -(-len(indices) // world) * world, world)]


def interleave(parts, count):
    """The rows of all shards, each [n, D] -> [count, D] in the order before sharding, whatever the number of shards."""
    return torch.stack(parts, 1).flatten(0, 1)[:count]


def gather_features(read, indices, extractor, batch_size=64, title=None):
    """Features of read(indices), computed by all processes -> [N, D] in order on rank 0, None on the others.

    An image's row depends on its index alone, so the result is the same on any number of processes, but for the
    rounding of convolutions in batches of another size (1e-7).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = shard(indices, rank, world)
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    rows = torch.cat([extractor.extract(read(batch)) for batch in tqdm(batches, title, leave=False, disable=rank > 0)])
    if world == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world)] if rank == 0 else None
    dist.gather(rows, parts)
    return interleave(parts, len(indices)) if rank == 0 else None


# ------------------------------------------------------------------------------------------------------------------
# The reference, and a score against it

def load_reference(path):
    """Statistics files, ours and others': `mu`, `sigma` (ADM, JiT, pytorch-fid) or `ref_mu`, `ref_sigma` (MeanFlow).

    Returns a dict: mu [D], sigma [D, D] float64; features and resize, as far as the file tells or its keys betray;
    real, features [n, D] of real images for precision and recall, or None; has_images, whether it has those images
    instead (ADM's arr_0); ref and ref_sha256, to print. Raises ValueError, naming the keys found.
    """
    file = open_npz(path)
    prefix = "ref_" if "ref_mu" in file else ""
    if prefix + "mu" not in file or prefix + "sigma" not in file:
        raise ValueError(f"{path} holds no statistics: wanted mu and sigma, or ref_mu and ref_sigma, found "
                         f"{', '.join(file.files)}; `fid.py ref --data IMAGES` makes them")
    mu, sigma = (torch.tensor(file[prefix + key], dtype=torch.float64) for key in ("mu", "sigma"))
    if mu.ndim != 1 or sigma.shape != mu.shape * 2 or not torch.allclose(sigma, sigma.T):
        raise ValueError(f"{path}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are no mean and covariance")
    with open(path, "rb") as raw:
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    # The prefix is MeanFlow's; sFID statistics (mu_s) are in ADM's files only; mu and sigma alone can be either's.
    resize = "half" if prefix else "tf1" if "mu_s" in file else ""
    return {"mu": mu, "sigma": sigma, "features": str(file["features"]) if "features" in file else "inception",
            "resize": str(file["resize"]) if "resize" in file else resize,
            "real": torch.tensor(file["real"]) if "real" in file else None,
            "has_images": "arr_0" in file, "ref": Path(path).name, "ref_sha256": sha256}


def open_reference(extractor, ref=None, data=None, batch_size=64):
    """`load_reference`'s dict, with `real` filled in where possible, from a statistics file, real images, or both.

    data alone: all of them make the statistics. Beside ref they serve precision and recall only. All ranks call it
    together; complete on rank 0. Raises ValueError if the file was made with other features than the extractor's.
    """
    reference = load_reference(ref) if ref else {"ref": str(data), "ref_sha256": None}
    for key, mine in (("features", extractor.features), ("resize", extractor.resize)):
        if not mine.startswith(reference.setdefault(key, mine)):
            raise ValueError(f"{ref} was made with {key} {reference[key]}, this run has {mine}: the number would mean "
                             f"nothing. Change --{key}, or make a reference with `fid.py ref`")
    source = data or (ref if reference["has_images"] else None)
    if source:
        count, read = open_images(source)
        few = min(count, REAL_FOR_PRECISION)
        spread = [i * count // few for i in range(few)]  # the first ones would miss classes where they come in order
        rows = gather_features(read, spread if ref else range(count), extractor, batch_size, "real images")
        if rows is not None and not ref:
            reference["mu"], reference["sigma"] = statistics(rows)
            reference["num_images"], rows = count, rows[spread]
        reference["real"] = rows
    return reference


def evaluate(read, num_images, extractor, reference, batch_size=64, title=None):
    """Scores images 0..num_images-1 of `generated` or `open_images`. All ranks call it together.

    Returns, on rank 0: num_images; fid, is, is_std, or fd alone with an encoder; precision and recall where the
    reference has real images. None on the other ranks.
    """
    features = gather_features(read, range(num_images), extractor, batch_size, title)
    if features is None:
        return None
    real, device = reference["real"], features.device
    row = {"num_images": num_images, "fd" if extractor.fc is None else "fid": frechet_distance(
        *statistics(features), reference["mu"].to(device), reference["sigma"].to(device))}
    if extractor.fc is not None:
        row["is"], row["is_std"] = inception_score(features.double() @ extractor.fc.double().T)  # double: no TF32
    if real is not None:
        row["precision"], row["recall"] = precision_recall(real.to(device), features)
    return row


# ------------------------------------------------------------------------------------------------------------------
# The commands

def command_ref(args, extractor):
    reference = open_reference(extractor, data=args.data, batch_size=args.batch_size)
    if reference["real"] is None:  # not rank 0
        return
    with open(args.out, "wb") as file:
        np.savez(file, **{key: reference[key].cpu().numpy() for key in ("mu", "sigma", "real")},
                 **{key: reference[key] for key in ("features", "resize", "num_images")}, source=args.data)
    print(f"{args.out}: {reference['num_images']:,} images of {args.data}, {extractor.features}, resize "
          f"{extractor.resize}")


def command_eval(args, extractor):
    """JSON lines go to stdout, one an alpha; what people read goes to stderr."""
    if args.ckpt:
        generator = load_generator(args.ckpt).to(args.device)
        num_images = args.num_images or 50_000
        sources = {scale: generated(generator, scale, args.seed, args.temperature) for scale in args.cfg_scale}
    else:
        available, read = open_images(args.images)
        num_images, sources = args.num_images or available, {None: read}
        if num_images > available:
            raise ValueError(f"{args.images} holds {available:,} images, --num_images asks for {num_images:,}")
    if num_images < 10:
        raise ValueError(f"{num_images} images are too few: the protocol has 50,000, and 10 are the least")
    reference = open_reference(extractor, args.ref, args.data, args.batch_size)
    rows = []
    for scale, read in sources.items():
        title = "images" if scale is None else f"alpha {scale}"
        row = evaluate(read, num_images, extractor, reference, args.batch_size, title)
        if row is not None:
            rows.append({"images": args.ckpt or args.images, "seed": args.seed, "cfg_scale": scale,
                         "temperature": args.temperature, **row,
                         "features": extractor.features, "resize": extractor.resize,
                         "ref": reference["ref"], "ref_sha256": reference["ref_sha256"]})
            print(json.dumps(rows[-1]), flush=True)
    for row in rows:
        print(readable(row), file=sys.stderr)
    if rows and num_images <= len(reference["mu"]):
        print(f"warning: {num_images} images, {len(reference['mu'])} features: the covariance is singular and the "
              "distance too high; compare it only with those of equally many images", file=sys.stderr)
    if len(rows) > 1:
        draw_sweep(rows, args.out)
        print(f"{args.out}: the figures over alpha", file=sys.stderr)


def readable(row):
    """A result as one line for people: FID-5k 12.345  IS ...  precision ...  recall ...  (how it was measured)."""
    n, distance = row["num_images"], "fid" if "fid" in row else "fd"
    size = "" if n == 50_000 else f"-{n // 1000}k" if n % 1000 == 0 else f"-{n}"  # fewer make it higher
    text = f"{distance.upper()}{size} {row[distance]:.3f}"
    if "is" in row:
        text += f"  IS {row['is']:.2f} +- {row['is_std']:.2f}"
    if "precision" in row:
        text += f"  precision {row['precision']:.4f}  recall {row['recall']:.4f}"
    source = f"alpha {row['cfg_scale']}, seed {row['seed']}" if row["cfg_scale"] is not None else row["images"]
    return (f"{text}  ({n:,} images, {source}, {row['features']}, resize {row['resize']}, reference {row['ref']} "
            f"{(row['ref_sha256'] or '')[:12]})")


def draw_sweep(rows, path):
    """Paper Fig. 5: the distance over alpha and the Inception Score over alpha, the best point in red."""
    from PIL import Image, ImageDraw, ImageFont
    panels = [key for key in ("fid", "fd", "is") if key in rows[0]]
    side, margin, font = 360, 60, ImageFont.load_default(15)
    width = side + 2 * margin
    picture = Image.new("RGB", (width * len(panels), width), "white")
    draw = ImageDraw.Draw(picture)
    for panel, key in enumerate(panels):
        values = np.array(sorted((row["cfg_scale"], row[key]) for row in rows))                  # alphas 2
        low, high = values.min(0), values.max(0)
        x, y = (((values - low) / np.maximum(high - low, 1e-9) * [1, -1] + [0, 1]) * side + margin).T
        x += panel * width
        best = values[:, 1].argmax() if key == "is" else values[:, 1].argmin()
        draw.line(list(zip(x, y)), "gray", 2)
        for i, (alpha, value) in enumerate(values):
            draw.circle((x[i], y[i]), 4, "red" if i == best else "black")
            draw.text((x[i], y[i] - 8), f"{value:.4g}", "black", font, "mb", stroke_width=3, stroke_fill="white")
            draw.text((x[i], width - margin + 16), f"{alpha:g}", "black", font, "mt")
        draw.text((width * (panel + 0.5), width - 6), f"{key.upper()} over alpha", "black", font, "mb")
    picture.save(path)


def command_neighbours(args, extractor):
    """Paper B.4: generated images, each beside the training images nearest to it, and three figures over all of them.

    Copies would be nearer to training images than held-out ones (split `test`) are; noise farther; wrong classes have
    neighbours of another class; collapse brings the images of a class together.
    """
    train, fake = Dataset(args.data), generated(load_generator(args.ckpt).to(args.device), args.cfg_scale, args.seed,
                                              args.temperature)
    shapes = [list(x.shape[1:]) for x in (fake([0]), train.images)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{args.ckpt} makes images {shapes[0]}, those in {args.data} are {shapes[1]}")
    if args.num_images < 2 * train.num_classes:
        raise ValueError(f"--num_images {args.num_images}: at least two of each of the {train.num_classes} classes are needed")
    held_out = Dataset(args.data, "test") if (Path(args.data) / "test").is_dir() else None

    def features(count, read, title):
        rows = gather_features(read, range(count), extractor, args.batch_size, title)
        return None if rows is None else rows.double()  # in float32 a copy's distance would not be 0
    real = features(*open_images(args.data), "training images")
    made = features(args.num_images, fake, "generated images")
    other = features(*open_images(Path(args.data) / "test"), "held-out images") if held_out else None
    if real is None:  # not rank 0
        return

    def spread(rows, labels):
        return np.mean([torch.pdist(rows[torch.from_numpy(labels == c)][:1000]).mean().item() for c in np.unique(labels)])

    def compare(name, rows, labels):
        distance, index = map(torch.cat, zip(*(torch.cdist(part, real).min(1) for part in rows.split(500))))
        same = train.labels[index.cpu()] == labels
        print(f"{name:10} nearest training image of the same class {same.mean():6.1%} (worst class "
              f"{min(same[labels == c].mean() for c in np.unique(labels)):.1%}), at distance {distance.mean():.3f}")
        return distance.mean()

    asked = np.arange(args.num_images) % train.num_classes
    distance = compare("generated", made, asked)
    if held_out:
        print(f"distance to the training images {distance / compare('held out', other, held_out.labels):.3f} of the held-out "
              f"images'; distance within a class {spread(made, asked) / spread(real, train.labels):.3f} of the training images'")
    nearest = torch.cdist(made[:20], real).topk(min(8, len(train)), largest=False).indices
    pictures = [picture for i, near in enumerate(nearest.cpu().numpy())
                for picture in (fake([i]), torch.from_numpy(train.images[near]))]
    save_grid(torch.cat(pictures), 1 + nearest.shape[1], args.out)
    print(f"{args.out}: in each row a generated image, then the training images nearest to it")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ref | eval | neighbours")
    ref = commands.add_parser("ref", help="statistics of real images, for --ref", allow_abbrev=False)
    ref.add_argument("--data", required=True, help="prepared data set, folder, .zip, or .npz with arr_0")
    ref.add_argument("--out", required=True, help="the .npz to write")

    score = commands.add_parser("eval", help="score a checkpoint or image files", allow_abbrev=False)
    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="generator: a run folder or a checkpoint")
    what.add_argument("--images", help="prepared data set, folder, .zip, or .npz with arr_0")
    score.add_argument("--ref", help="statistics file: ours, ADM's, MeanFlow's, JiT's, pytorch-fid's")
    score.add_argument("--data", help="real images: in place of --ref, or beside it for precision and recall")
    score.add_argument("--num_images", type=int, help="default: 50000 of a checkpoint, all of --images")
    score.add_argument("--cfg_scale", type=float, nargs="+", help="alpha, 1.0 by default; several make a sweep")
    score.add_argument("--seed", type=int, help="of the noise, 0 by default")
    score.add_argument("--temperature", type=float, help="multiplies the noise, 1.0 by default")
    score.add_argument("--out", default="alpha_sweep.png", help="picture of a sweep (default: %(default)s)")

    near = commands.add_parser("neighbours", help="generated images beside the nearest real ones", allow_abbrev=False)
    near.add_argument("--ckpt", required=True, help="generator: a run folder or a checkpoint")
    near.add_argument("--data", required=True, help="prepared data set: its training images, and held-out ones if any")
    near.add_argument("--num_images", type=int, default=1000, help="generated images to compare (default: %(default)s)")
    near.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    near.add_argument("--cfg_scale", type=float, default=1.0, help="alpha (default: %(default)s)")
    near.add_argument("--temperature", type=float, default=1.0, help="multiplies the noise (default: %(default)s)")
    near.add_argument("--out", default="neighbours.png", help="default: %(default)s")

    for command in (ref, score, near):
        command.add_argument("--features", default="inception", help="inception (default), pixels, encoder:CKPT (then FD)")
        command.add_argument("--inception", help="Inception's weights (default: downloaded)")
        command.add_argument("--resize", choices=("tf1", "half"), help="tf1 (default): as ADM; half: as the paper")
        command.add_argument("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    args = parser.parse_args(argv)
    # A flag that would be ignored is an error.
    if args.features != "inception" and (args.inception or args.resize):
        parser.error("--inception and --resize belong to --features inception")
    args.resize = args.resize or "tf1"
    if args.command == "eval":
        if not (args.ref or args.data):
            parser.error("give --ref STATISTICS or --data REAL_IMAGES to compare with")
        if args.images and (args.cfg_scale or args.seed is not None or args.temperature is not None):
            parser.error("--cfg_scale, --seed and --temperature belong to --ckpt")
        if args.ckpt:
            args.cfg_scale, args.seed = args.cfg_scale or [1.0], args.seed or 0
            args.temperature = 1.0 if args.temperature is None else args.temperature
    return args


def main():
    args = parse()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        extractor = load_extractor(args.features, args.resize, args.inception, args.device)
        {"ref": command_ref, "eval": command_eval, "neighbours": command_neighbours}[args.command](args, extractor)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"fid.py: {error}")
    if dist.is_initialized():
        dist.barrier()  # rank 0 computes, the others wait
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
