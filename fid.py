"""FID, Inception Score, precision and recall of a generator's checkpoint or of image files.

    python fid.py ref --data data/cifar10 --out cifar10_stats.npz      # statistics of real images
    python fid.py eval --ckpt runs/cifar10 --ref cifar10_stats.npz --cfg_scale 1.0 1.2 1.5
    python fid.py eval --ckpt hf://latent_L_sota --ref imagenet_256_fid_stats.npz --resize half
    python fid.py eval --images samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py eval --ckpt runs/digits --data data/digits --features encoder:runs/digits_encoder
    python fid.py neighbours --ckpt runs/cifar10 --data data/cifar10   # copies would be seen
    torchrun --nproc_per_node 8 fid.py eval ...                        # the same numbers, sooner

Protocol (that of the field, and of the paper's Tables 4 and 5): 50,000 images with label
i % classes, latents decoded, uint8 by floor(255 x), the Inception-v3 of 2015-12-05 in float32,
statistics in float64. Two families of reference files exist and must not be mixed: those of ADM
(resize `tf1`) and those of MeanFlow, which the paper's numbers use (`half`).
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import (MAE, UsageError, barrier, digest, get_rank, load_encoder, number, on_all_ranks,
                   run_script, sha256, whole_file, world_size)
from prepare_data import (MAX_PIXELS, BrokenImage, CachedLatents, Dataset, natural, note,
                          open_source, reading, shortened, to_array)
from sample import (HelpFormat, add_sampling_options, check_out, generate, load_networks, save_grid,
                    to_uint8)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
# Real images behind precision and recall: ADM's number. Both figures depend on it.
REAL_FOR_PRECISION = 10_000
# The widest features whose covariance is computed or read: it takes 2 GB, and their eigenvalues
# half an hour. Pixels of 64x64x3 are 12,288.
MAX_WIDTH = 16_384


# --------------------------------------------------------------------------------------------
# The figures. A new one is a function here and a line in `evaluate`.

def evaluate(read, num_images, extractor, reference, batch_size=64):
    """Score images 0 to num_images - 1 of `generated` or `open_images`. All processes call it.

    Returns on rank 0, and None elsewhere: num_images; fid, is and is_std, or without Inception fd;
    precision and recall if there are real images; how: features, resize, ref, ref_sha256.
    """
    on_all_ranks(check_comparable, read, extractor, reference)
    fake = gather_features(read, range(num_images), extractor, batch_size)
    if fake is None:
        return None
    result = {"num_images": num_images}
    distance = frechet_distance(*statistics(fake), reference["mu"], reference["sigma"])
    if extractor.fc is None:
        result["fd"] = distance
    else:
        result["fid"] = distance
        logits = fake.double() @ extractor.fc.double().T  # in double: a GPU would take TF32
        result["is"], result["is_std"] = inception_score(logits)
    if reference["real"] is not None:
        real = reference["real"].to(fake.device)
        result["precision"], result["recall"] = precision_recall(real, fake)
    return result | {"features": extractor.features, "resize": extractor.resize,
                     "ref": reference["ref"], "ref_sha256": reference["ref_sha256"]}


def check_comparable(read, extractor, reference):
    """Looks at the first image before all are made; rank 0, where the reference is."""
    if get_rank() > 0:
        return
    image = read([0])
    width = extractor.extract(image).shape[1]
    size = list(image.shape[2:])
    where = f"{reference['ref']}: of {reference['size'] or 'other'} images, these are {size}"
    for x in (reference["mu"], reference["real"]):
        if x is not None and x.shape[-1] != width:
            raise UsageError(f"{where}; {extractor.features} features cannot compare them")
    if reference["size"] not in (None, size):
        note(f"warning: {where}: the figures compare sizes too")


def statistics(features):
    """[N, D] -> mean [D] and covariance [D, D] with divisor N - 1, float64 throughout."""
    if features.shape[1] > MAX_WIDTH:
        raise UsageError(f"features of {features.shape[1]:,} numbers an image are too many for a "
                         f"covariance, which takes {MAX_WIDTH:,} at most")
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)), Heusel et al. 2017.

    mu [D], sigma [D, D], arrays or tensors; the covariance of the smaller sample comes first.
    Returns a float, not clamped at 0. With sigma1 = R R^T the trace of the root is the sum of the
    roots of the eigenvalues of R^T sigma2 R.
    """
    mu1 = torch.as_tensor(mu1, dtype=torch.float64)
    sigma1, mu2, sigma2 = (torch.as_tensor(x).to(mu1) for x in (sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError(f"statistics of different features: mu {list(mu1.shape)} and "
                         f"{list(mu2.shape)}, sigma {list(sigma1.shape)} and {list(sigma2.shape)}")
    root, failed = torch.linalg.cholesky_ex(sigma1)
    least = 1e-12 * sigma1.diagonal().max()
    if failed or root.diagonal().square().min() <= least:
        # A singular covariance, as of fewer images than features. Only the directions in which it
        # is not zero are kept: the roots of rounding noise in the others cost scipy's sqrtm its
        # fifth decimal.
        variances, axes = torch.linalg.eigh(sigma1)
        kept = variances > least
        root = axes[:, kept] * variances[kept].sqrt()
    product = root.T @ sigma2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    trace_root = eigenvalues.clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root)


def inception_score(logits):
    """[N, classes] -> (mean, std) of exp(mean KL(p(y|x) || p(y))) of 10 splits, Salimans 2016.

    The release's split rule: rows permuted, since splits of images in the order of their classes
    would lack classes; 10 splits of floor(N / 10), the rest dropped. Logits are without the bias.
    """
    order = np.random.RandomState(2020).permutation(len(logits))[:len(logits) // 10 * 10]
    logits = logits.double()[torch.from_numpy(order).to(logits.device)]
    log_p = logits.log_softmax(1).unflatten(0, (10, -1))                         # 10 n classes
    log_mean = log_p.logsumexp(1, True) - math.log(log_p.shape[1])               # 10 1 classes
    scores = (log_p.exp() * (log_p - log_mean)).sum(2).mean(1).exp()             # 10
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """[N, D], [M, D] -> (precision, recall), Kynkaanniemi et al. 2019.

    Precision is the part of the fake samples in the ball of any real one, recall the reverse.
    """
    real = real.double()  # which also keeps TF32 out
    fake = fake.double()
    return part_in_balls(fake, real, k), part_in_balls(real, fake, k)


def part_in_balls(points, centres, k):
    """A centre's ball reaches to its k-th nearest other centre. Its surface counts as inside."""
    radii = []
    for rows in centres.split(1000):  # 1000 rows of distances to 50,000 centres are 400 MB
        nearest = torch.cdist(rows, centres).topk(k + 1, largest=False).values
        radii.append(nearest[:, k])  # nearest[:, 0] is the centre itself
    radii = torch.cat(radii)
    count = 0
    for rows in points.split(1000):
        inside = torch.cdist(rows, centres) <= radii
        count += int(inside.any(1).sum())
    return count / len(points)


# --------------------------------------------------------------------------------------------
# The network: Inception-v3, its parts named as the keys of pytorch-fid's checkpoint

def unit(width_in, width, kernel, stride=1, padding="same"):
    """Convolution without bias, BatchNorm with TensorFlow's eps, ReLU."""
    conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
    bn = nn.BatchNorm2d(width, eps=1e-3)
    return nn.Sequential(OrderedDict(conv=conv, bn=bn, relu=nn.ReLU()))


class Mixed(nn.Module):
    """Branches side by side on one input, the last of them a pool; their outputs concatenated.

    branches: {name: steps}, a step the arguments of `unit` after the first. Step j of branch b is
    called b_j, an only one b. A step that is a list has two units, b_ja and b_jb, on one input.
    """

    def __init__(self, width_in, pool, pool_width, **branches):
        super().__init__()
        self.branches = []  # for each branch and step the names of its units
        for branch, steps in branches.items():
            self.branches.append([])
            width = width_in
            for j, step in enumerate(steps, 1):
                name = f"{branch}_{j}" if len(steps) > 1 else branch
                units = {name: step}
                if isinstance(step, list):
                    units = {name + "a": step[0], name + "b": step[1]}
                for key, arguments in units.items():
                    self.add_module(key, unit(width, *arguments))
                width = arguments[0]
                self.branches[-1].append(list(units))
        self.pool = pool
        self.branch_pool = unit(width_in, pool_width, 1) if pool_width else nn.Identity()

    def forward(self, x):
        outputs = []
        for steps in self.branches:
            y = x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """Inception-v3 as in TensorFlow's graph of 2015-12-05: [N, 3, 299, 299] -> [N, 2048].

    Not torchvision's: 1008 outputs, average pools that leave out the padding, Mixed_7c's max pool.
    """

    def __init__(self):
        super().__init__()
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        row = (1, 7)
        column = (7, 1)
        fork = [(384, (1, 3)), (384, (3, 1))]
        self.Conv2d_1a_3x3 = unit(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = unit(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = unit(32, 64, 3)
        self.pool1 = nn.MaxPool2d(3, 2)                                          # 64 73 73
        self.Conv2d_3b_1x1 = unit(64, 80, 1)
        self.Conv2d_4a_3x3 = unit(80, 192, 3, 1, 0)
        self.pool2 = nn.MaxPool2d(3, 2)                                          # 192 35 35
        for name, width, pool_width in [("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)]:
            self.add_module(f"Mixed_{name}", Mixed(                              # 288 35 35
                width, average, pool_width, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                branch3x3dbl=[(64, 1), (96, 3), (96, 3)]))
        self.Mixed_6a = Mixed(                                                   # 768 17 17
            288, nn.MaxPool2d(3, 2), 0, branch3x3=[(384, 3, 2, 0)],
            branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)])
        for name, c in [("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)]:
            self.add_module(f"Mixed_{name}", Mixed(                              # 768 17 17
                768, average, 192, branch1x1=[(192, 1)],
                branch7x7=[(c, 1), (c, row), (192, column)],
                branch7x7dbl=[(c, 1), (c, column), (c, row), (c, column), (192, row)]))
        self.Mixed_7a = Mixed(                                                   # 1280 8 8
            768, nn.MaxPool2d(3, 2), 0, branch3x3=[(192, 1), (320, 3, 2, 0)],
            branch7x7x3=[(192, 1), (192, row), (192, column), (192, 3, 2, 0)])
        for name, width, pool in [("7b", 1280, average), ("7c", 2048, nn.MaxPool2d(3, 1, 1))]:
            self.add_module(f"Mixed_{name}", Mixed(                              # 2048 8 8
                width, pool, 192, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                branch3x3dbl=[(448, 1), (384, 3), fork]))
        self.fc = nn.Linear(2048, 1008)  # for the Inception Score, without its bias

    def forward(self, x):
        *layers, _ = self.children()  # in the order above, without fc
        for layer in layers:
            x = layer(x)
        return x.mean((2, 3))


def load_inception(path=None):
    """The FID network with its trained weights of `path`, a state dict as pytorch-fid releases it.

    Without a path that release is downloaded into torch.hub's cache and its hash checked. Raises
    UsageError for weights that do not fit.
    """
    with torch.device("meta"):  # without initialisation, which would draw random numbers
        net = Inception()
    with reading(path or "download", f"no FID Inception-v3; --inception takes {INCEPTION_URL}"):
        if path is None:
            # torch.hub speaks on stdout, where only results belong.
            with contextlib.redirect_stdout(sys.stderr):
                state = torch.hub.load_state_dict_from_url(
                    INCEPTION_URL, None, "cpu", get_rank() == 0, check_hash=True, weights_only=True)
        else:
            state = torch.load(path, "cpu", weights_only=True)
        # The release's file was not at hand: its keys are those of the code that loads it. If it
        # counts batches too, as torch's BatchNorm does, these are left out.
        state = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
        net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------
# Features

class Extractor(NamedTuple):
    """What turns images into the rows that are compared, and what identifies it."""
    extract: Callable  # uint8 [n, C, H, W] -> float32 [n, D]
    features: str      # "pixels", or "inception-", "encoder-" and a hash of the weights
    resize: str        # tf1 or half; "none" without Inception
    fc: torch.Tensor   # [1008, 2048], for the Inception Score; None without Inception


def load_extractor(features="inception", resize="tf1", inception=None, device="cpu",
                   keep_converted=True):
    """The Extractor of --features; inception: path of its weights, or None. All processes call it.

    Our own encoder is for data of which Inception knows nothing. keep_converted: as of
    `load_encoder`. Raises UsageError for weights that cannot be had.
    """
    kind, _, ckpt = features.partition(":")
    if features == "pixels":
        extract = functools.partial(pixel_features, device)
        return Extractor(extract, "pixels", "none", None)
    if features == "inception":
        net = on_all_ranks(load_inception, inception).to(device)
        extract = functools.partial(inception_features, net, resize=resize)
        fc = net.fc.weight
    elif kind == "encoder":
        net = load_encoder(ckpt, keep_converted).to(device)
        if not isinstance(net, MAE):
            raise UsageError(f"--features {features} is a {type(net).__name__}, no ResNet-MAE")
        extract = functools.partial(encoder_features, net)
        resize = "none"
        fc = None
    else:
        raise UsageError(f"--features is inception, pixels or encoder:CKPT, not {features}")
    return Extractor(extract, f"{kind}-{digest(net):.12}", resize, fc)


# TF32, which cuDNN's convolutions take by default on a GPU, moves features by 5e-4.
exact_convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def pixel_features(device, images_uint8):
    return images_uint8.to(device).flatten(1) / 127.5 - 1


@torch.no_grad()
@exact_convolutions
def inception_features(net, images_uint8, resize="tf1"):
    """uint8 [N, 1 or 3, H, W] -> pool features float32 [N, 2048] on the network's device."""
    if images_uint8.dtype != torch.uint8:
        raise ValueError(f"wanted uint8 images [N, C, H, W], not {images_uint8.dtype}")
    device = net.fc.weight.device
    rgb = images_uint8.to(device).expand(-1, 3, -1, -1)  # grey is repeated
    with torch.autocast(device.type, enabled=False):
        return net(inception_input(rgb, resize))


def inception_input(images, resize):
    """uint8 [N, 3, H, W] -> float32 [N, 3, 299, 299], (v - 128) / 128, resized bilinearly.

    half: pixel centres at half-integers, as torch and MeanFlow. tf1: output i is read at
    i * H / 299, as TensorFlow 1 and ADM. They differ by a shift; neither smooths when shrinking.
    """
    x = images.float()
    if resize == "half":
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    else:
        x = resize_tf1(resize_tf1(x.mT).mT)
    return (x - 128) / 128


def resize_tf1(x):
    """The last axis -> 299."""
    size = x.shape[-1]
    position = torch.arange(299, device=x.device) * (size / 299)
    low = position.long()
    high = (low + 1).clamp(max=size - 1)
    weight = position - low
    return x[..., low] * (1 - weight) + x[..., high] * weight


@torch.no_grad()
@exact_convolutions
def encoder_features(net, images_uint8):
    """uint8 [N, C, H, W] -> float32 [N, D]: the last map of our ResNet-MAE, ReLU, averaged.

    The ReLU matters: the plain average of a map after a group norm hardly depends on the image.
    """
    grey = images_uint8[:, :1]
    if net.in_channels in (1, 3) and (images_uint8 == grey).all():
        images_uint8 = grey.expand(-1, net.in_channels, -1, -1)
    channels, *size = images_uint8.shape[1:]
    if channels != net.in_channels or any(side % net.input_patch_size for side in size):
        raise UsageError(f"the encoder of --features reads {net.in_channels} channels, sides that "
                         f"{net.input_patch_size} divides; the images are {channels} x {size}")
    x = images_uint8.to(next(net.parameters()).device) / 127.5 - 1
    last = net.features(x)[f"layer{net.encoder.num_stages}"]                     # N T D
    return last.float().relu().mean(1)


def gather_features(read, indices, extractor, batch_size=64):
    """Features of the images read(indices), made by all processes: [N, D] in order on rank 0.

    The other ranks get None. Processes share out whole batches, so that their number does not
    change a bit; another batch_size changes the last ones.
    """
    starts = range(get_rank() * batch_size, len(indices), world_size() * batch_size)
    # A process without a batch makes the first one all the same: then it knows its width.
    parts = on_all_ranks(extract_rows, read, indices, starts or [0], extractor, batch_size)
    if world_size() == 1:
        return torch.cat(parts)
    rows = parts[0].new_zeros(len(indices), parts[0].shape[1])
    for start, part in zip(starts, parts):
        rows[start:start + batch_size] = part
    dist.reduce(rows, 0)  # every row is that of one process plus zeros: the same bits
    return rows if get_rank() == 0 else None


def extract_rows(read, indices, starts, extractor, batch_size):
    parts = []
    for start in tqdm(starts, unit=" batches", leave=False, disable=get_rank() > 0):
        parts.append(extractor.extract(read(indices[start:start + batch_size])))
        if not parts[-1].isfinite().all():
            raise UsageError(f"{extractor.features}: features are NaN or Inf: damaged weights?")
    return parts


# --------------------------------------------------------------------------------------------
# What is compared: references, images

def open_reference(extractor, ref=None, data=None, batch_size=64):
    """What images are compared with, a dict, complete on rank 0. All processes call it together.

    ref: a statistics file. data: real images, as `open_images` takes them, in place of ref, or
    beside it for precision and recall. In the dict: mu [D] and sigma [D, D] in float64; real [n, D]
    or None; size [H, W] of the images or None; ref and ref_sha256, the file's name and hash, or of
    data its path and a hash of the number of images and 64 of them; of data alone num_images.
    """
    if ref is not None:
        reference, images = on_all_ranks(read_statistics, ref, extractor)
        data = data or images
        if data is None:
            return reference
    count, read = on_all_ranks(open_images, data)
    if count < 4:
        raise UsageError(f"{data} holds {count} images, too few to compare with")
    chosen = evenly_spaced(min(count, REAL_FOR_PRECISION), count)
    size = list(on_all_ranks(read, [0]).shape[2:])
    if ref is not None:
        reference["real"] = gather_features(read, chosen, extractor, batch_size)
        reference["size"] = reference["size"] or size
        return reference
    some = read(evenly_spaced(64, count)).numpy().tobytes()
    digest = hashlib.sha256(str(count).encode() + some).hexdigest()
    reference = {"ref": str(data), "ref_sha256": digest, "num_images": count, "size": size}
    rows = gather_features(read, range(count), extractor, batch_size)
    if rows is not None:
        reference["mu"], reference["sigma"] = statistics(rows)
        reference["real"] = rows[chosen]
    return reference


def evenly_spaced(n, count):
    """n of the numbers 0 to count - 1. The first n would be images of few classes."""
    return [i * count // n for i in range(n)]


def read_statistics(path, extractor):
    """A reference of an .npz, and the path where images for precision and recall are, or None.

    Its keys are mu and sigma (pytorch-fid, JiT), with them mu_s and sigma_s of sFID and arr_0,
    images (ADM), or ref_mu and ref_sigma (MeanFlow): so their code says, no published file was at
    hand. Ours has `real`, features of images, and says how it was made.
    """
    real = None
    size = None
    with reading(path, "no statistics: mu and sigma, or ref_mu and ref_sigma"):
        file = np.load(path, allow_pickle=False)  # a pickle could run code
        for member in file.zip.infolist():
            if member.filename != "arr_0.npy" and member.file_size > 9 * MAX_WIDTH**2:
                raise ValueError(f"{member.filename} is {member.file_size / 1e9:.1f} GB")
            # As in prepare_data.class_zip: a damaged name would be taken as a missing array.
            if b"PK\1\2" in member.extra + member.comment:
                raise ValueError(f"the directory is damaged at {member.filename}")
            file.zip.open(member).close()
        prefix = "ref_" if "ref_mu" in file else ""
        arrays = [file[prefix + "mu"], file[prefix + "sigma"]]
        if any(np.iscomplexobj(array) for array in arrays):
            raise ValueError("they are complex")
        # By numpy: torch reads no numbers of the other byte order.
        mu, sigma = [torch.from_numpy(array.astype(np.float64)) for array in arrays]
        if "real" in file:
            real = torch.from_numpy(file["real"].astype(np.float32))
        if "size" in file:
            size = [int(side) for side in file["size"]]
        made_with = {"features": "inception", "resize": ""}  # mu and sigma can be either family's
        if prefix:
            made_with["resize"] = "half"
        elif "mu_s" in file:
            made_with["resize"] = "tf1"
        made_with |= {key: str(file[key]) for key in made_with if key in file}
        ref_sha256 = sha256(path)
    for key, value in made_with.items():
        mine = getattr(extractor, key)
        if not mine.startswith(value):
            raise UsageError(f"{path} was made with {key} {value}, this run has {mine}: give the "
                             f"same --{key} (in training --eval_{key}), or another reference")
    if not made_with["resize"]:
        note(f"{path} does not say how its images were resized: taken as {extractor.resize}. "
             "--resize tf1 (ADM) or half (MeanFlow, the paper) says otherwise")
    width = mu.numel() if extractor.fc is None else extractor.fc.shape[1]
    problem = None
    if mu.shape != (width,) or sigma.shape != (width, width):
        problem = f"mu and sigma are no mean and covariance of {width} features"
    elif not (mu.isfinite().all() and sigma.isfinite().all()):
        problem = "mu or sigma hold NaN or Inf"
    elif not torch.allclose(sigma, sigma.T):
        problem = "mu and sigma are no mean and covariance, which is symmetric"
    elif has_negative_variances(sigma):
        problem = "sigma holds negative variances"
    elif real is not None and not (real.shape[1:] == mu.shape and real.isfinite().all()
                                   and len(real) > 3):
        problem = f"real are no finite features of {width} numbers, of four images or more"
    if problem:
        raise UsageError(f"{path}: {problem}")
    reference = {"mu": mu, "sigma": sigma, "real": real, "size": size, "ref": Path(path).name,
                 "ref_sha256": ref_sha256}
    return reference, path if "arr_0" in file else None


def has_negative_variances(sigma):
    """In any direction, by more than rounding. Much sooner known than the eigenvalues."""
    rounding = 1e-4 * sigma.diagonal().abs().max() + 1e-12
    return bool(torch.linalg.cholesky_ex(sigma + rounding * torch.eye(len(sigma)))[1])


def generated(generator, cfg_scale=1.0, seed=0, temperature=1.0, vae=None):
    """read(indices) -> uint8 [n, C, H, W] of a generator: image i has label i % classes.

    No other random numbers are drawn: a training run that evaluates goes on as if it had not.
    """
    def read(indices):
        labels = [i % generator.num_classes for i in indices]
        return to_uint8(generate(generator, labels, indices, cfg_scale, temperature, seed,
                                 len(indices), vae=vae))
    return read


def open_images(source):
    """(N, read) of a prepared data set, an .npz of images, or any source of prepare_data.py.

    read(indices) -> uint8 [n, C, H, W], files in natural order. Of a source with splits `train` is
    taken. Raises UsageError for what is none of these, broken, of several sizes, or latents.
    """
    path = Path(source)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return open_npz(path)
    if (path / "log.jsonl").is_file():
        raise UsageError(f"{path} is a run's folder, its pictures are grids: give it as --ckpt")
    if (path / "train/meta.json").is_file():
        path = path / "train"
    if (path / "meta.json").is_file():
        data = Dataset(path.parent, path.name)
        if data.meta["kind"] != "latents":
            return len(data), lambda indices: torch.from_numpy(data.images[indices])
        raise UsageError(f"{path} holds latents, no images: give their images or statistics "
                         "(--ref, in training --eval_ref)")
    splits, load = open_source(source)
    if isinstance(load, CachedLatents):
        raise UsageError(f"{path} holds latents, no images")
    split = "train" if "train" in splits else min(splits)
    if len(splits) > 1:
        note(f"{path}: of its splits {', '.join(splits)}, {split} is taken")
    names = sorted((name for _, name in splits[split]), key=natural)

    def image(i):
        try:
            return to_array(load(names[i]))
        except BrokenImage as error:
            raise UsageError(f"{path / names[i]}: {error}") from error
    shape = image(0).shape

    def read(indices):
        images = [image(i) for i in indices]
        if any(x.shape != shape for x in images):
            raise UsageError(f"{path} holds images of several sizes: prepare_data.py makes it one")
        return torch.from_numpy(np.stack(images))
    return len(names), read


def open_npz(path):
    """An .npz with arr_0 uint8 [N, H, W, C], as ADM and sample.py write it.

    It is never in memory whole: 50,000 images of 256x256 are 9.8 GB.
    """
    with reading(path, "no .npz with images arr_0"):
        archive = zipfile.ZipFile(path)
        member = archive.open("arr_0.npy")
        np.lib.format.read_magic(member)  # 1.0, since the header is short
        shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        first = member.tell()
        size = math.prod(shape[1:])
        if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or in_fortran_order or (
                size * shape[0] == 0
                or first + size * shape[0] != archive.getinfo("arr_0.npy").file_size):
            raise ValueError(f"arr_0 is {dtype} {list(shape)}, wanted uint8 [N, H, W, 1 or 3]")
        if size > MAX_PIXELS:
            raise ValueError(f"images of {shape[1]} x {shape[2]} pixels")
        while member.read(1 << 24):  # to the end, where zip has a checksum
            pass

    def read(indices):
        images = []
        with reading(path, "no whole .npz"):
            for i in indices:
                member.seek(first + i * size)
                images.append(np.frombuffer(member.read(size), np.uint8).reshape(shape[1:]))
        return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2))
    if read(evenly_spaced(min(64, shape[0]), shape[0])).max() <= 1:
        note(f"warning: {path}: its values are 0 and 1, where images have 0 to 255")
    return shape[0], read


# --------------------------------------------------------------------------------------------
# The commands

def command_ref(args, extractor):
    reference = open_reference(extractor, None, args.data, args.batch_size)
    if get_rank() > 0:
        return
    arrays = {key: reference[key].cpu().numpy() for key in ("mu", "sigma", "real")}
    with whole_file(args.out) as file:
        np.savez(file, **arrays, source=args.data, num_images=reference["num_images"],
                 size=reference["size"], features=extractor.features, resize=extractor.resize)
    print(f"{args.out}: {reference['num_images']:,} images, features {extractor.features}")


def command_eval(args, extractor):
    """One JSON line an alpha: what was scored, the figures, and what they were measured with."""
    if args.images:
        available, read = on_all_ranks(open_images, args.images)
        num_images = args.num_images or available
        if num_images > available:
            raise UsageError(f"{args.images} holds {available} images, asked for are {num_images}")
        sources = [({"images": args.images}, read)]
    else:
        generator, vae = load_networks(args)
        num_images = args.num_images or 50_000
        names = ["ckpt", "seed", "temperature"] + (["vae"] if vae is not None else [])
        made_with = {name: getattr(args, name) for name in names}
        sources = [({"cfg_scale": alpha, **made_with},
                    generated(generator, alpha, args.seed, args.temperature, vae))
                   for alpha in args.cfg_scale]
    if num_images < 10:
        raise UsageError(f"{num_images} images are too few: the Inception Score takes ten parts")
    reference = open_reference(extractor, args.ref, args.data, args.batch_size)
    if get_rank() == 0 and num_images <= len(reference["mu"]):
        note(f"warning: {num_images} images are fewer than the features: the distance is too "
             "high, and only comparable with those of equally many images")
    for source, read in sources:
        result = evaluate(read, num_images, extractor, reference, args.batch_size)
        if args.ref and args.data:
            source["real"] = args.data
        if get_rank() == 0:
            print(json_line(source | result), flush=True)


def json_line(row):
    """JSON, in which a number that is not finite is null: readers stop at NaN and Infinity."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None))


def command_neighbours(args, extractor):
    """Paper B.4: generated images, each beside the training images nearest to it; three figures.

    Copies would be nearer to training images than held-out ones (split `test`) are, noise farther.
    Wrong classes have neighbours of another class; collapse brings images of a class together.
    """
    train = Dataset(args.data)
    generator, vae = load_networks(args)
    fake = generated(generator, args.cfg_scale[0], args.seed, args.temperature, vae)
    shape = fake([0]).shape[1:]
    if shape != train.shape or generator.num_classes != train.num_classes:
        raise UsageError(f"{args.ckpt} makes {list(shape)} of {generator.num_classes} classes, "
                         f"{args.data} has {list(train.shape)} of {train.num_classes}")
    names = generator.origin.get("classes")
    if names and names != train.meta["classes"]:
        raise UsageError(f"{args.ckpt} makes the classes {shortened(names)}, {args.data} has "
                         f"{shortened(train.meta['classes'])}")
    sets = {"training": (open_images(args.data)[1], train.labels),
            "generated": (fake, np.arange(args.num_images or 1000) % train.num_classes)}
    test = Path(args.data, "test")
    if test.is_dir():
        held_out = Dataset(args.data, "test")
        if held_out.shape != train.shape:
            raise UsageError(f"{test} holds {list(held_out.shape)}, not {list(train.shape)} as "
                             "the images to train on: remove it, or prepare both anew")
        sets["held out"] = (open_images(test)[1], held_out.labels)
    rows = {}
    for name, (read, labels) in sets.items():
        rows[name] = gather_features(read, range(len(labels)), extractor, args.batch_size)
    if get_rank() > 0:
        return

    real = rows["training"]
    means = {}
    for name in list(sets)[1:]:
        labels = sets[name][1]
        distance, index = nearest(rows[name], real, 1)
        means[name] = distance.mean()
        same = train.labels[index[:, 0]] == labels
        worst = min(same[labels == c].mean() for c in np.unique(labels))
        print(f"{name:10} nearest training image of the same class {same.mean():6.1%} (worst class "
              f"{worst:.1%}), at distance {means[name]:.3f}")
    if "held out" in means:
        within = [within_class_distance(rows[name], sets[name][1]) for name in list(sets)[:2]]
        print(f"distance to the training images {means['generated'] / means['held out']:.3f} of "
              f"the held-out images'; distance within a class {within[1] / within[0]:.3f} of the "
              "training images'")
    images = []
    index = nearest(rows["generated"][:20], real, min(8, len(real)))[1]
    for i, neighbours in enumerate(index):
        images += [fake([i]), torch.from_numpy(train.images[neighbours])]
    save_grid(torch.cat(images), 1 + index.shape[1], args.out)
    print(f"{args.out}: in each row a generated image, then the training images nearest to it")


def nearest(x, real, k):
    """Distances [n, k] and indices [n, k] of the k rows of `real` nearest to each row of x."""
    real = real.double()  # in float32 a copy would not be at distance 0
    parts = [torch.cdist(part, real).topk(k, largest=False) for part in x.double().split(500)]
    values = torch.cat([part.values for part in parts])
    return values, torch.cat([part.indices for part in parts]).cpu().numpy()


def within_class_distance(rows, labels):
    """Mean distance between two images of a class, averaged over the classes."""
    means = []
    for c in np.unique(labels):
        members = rows[torch.from_numpy(labels == c)][:1000]
        means.append(torch.pdist(members.double()).mean().item())
    return np.mean(means)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormat,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("command", choices=("ref", "eval", "neighbours"), help="ref: write statistics of --data; "
        "eval: score --ckpt or --images against --ref, --data or both; neighbours: show generated "
        "images beside the nearest of --data")
    add_sampling_options(parser, required=False)
    add("--images", help="images to score, in place of --ckpt: as --data")
    add("--ref", help="statistics: the .npz of `fid.py ref`, ADM, MeanFlow, JiT or pytorch-fid")
    add("--data", help="real images: prepared data set, or but for neighbours a folder, .zip or "
        ".npz with arr_0; beside --ref for precision and recall alone")
    add("--num_images", type=number(int, least=10), help="images to score (None: 50000, "
        "or all of --images, or 1000 for neighbours); figures of fewer are worse")
    add("--features", default="inception", help="inception (FID), pixels, or encoder:CKPT of a "
        "ResNet-MAE (FD)")
    add("--inception", help="file of Inception's weights (None: downloaded)")
    add("--resize", choices=("tf1", "half"), default="tf1", help="tf1: as ADM; half: as the paper")
    add("--out", help="the .npz of ref or the picture of neighbours (None: neighbours.png)")
    args = parser.parse_args(argv)

    # What is missing is an error, and so is an option that this run would ignore.
    sampling = ["ckpt", "cfg_scale", "seed", "temperature", "vae", "vae_chunk"]
    needed = {"ref": ["data", "out"], "eval": [], "neighbours": ["ckpt", "data"]}
    ignored = {"ref": [*sampling, "images", "ref", "num_images"], "eval": ["out"],
               "neighbours": ["images", "ref"]}[args.command]
    if args.images:
        ignored += sampling
    if args.features != "inception":
        ignored += ["inception", "resize"]
    given = [name for name, x in vars(args).items() if x != parser.get_default(name)]
    for name in sorted(set(needed[args.command]) - set(given)):
        parser.error(f"{args.command} needs --{name}")
    for name in sorted(set(ignored) & set(given)):
        parser.error(f"--{name} would be ignored here")
    if args.command == "eval" and not ((args.ckpt or args.images) and (args.ref or args.data)):
        parser.error("eval needs --ckpt or --images, and --ref or --data to compare with")
    if args.command == "neighbours" and len(args.cfg_scale) > 1:
        parser.error("neighbours takes one --cfg_scale")
    return args


def main(argv=None):
    args = parse(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.command != "eval":
        args.out = Path("neighbours.png" if args.out is None else args.out)
        on_all_ranks(check_out, args.out)
    extractor = load_extractor(args.features, args.resize, args.inception, args.device,
                               not args.no_converted_copy)
    run = {"ref": command_ref, "eval": command_eval, "neighbours": command_neighbours}
    run[args.command](args, extractor)
    barrier()  # the others wait for rank 0, which computes the figures


if __name__ == "__main__":
    run_script(main)
