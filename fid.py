"""FID, Inception Score, precision and recall of a generator's checkpoint or of image files.

    python fid.py ref --data data/cifar10 --out cifar10_stats.npz         # reference statistics of real images
    python fid.py eval --ckpt runs/cifar10 --ref cifar10_stats.npz --cfg_scale 1.0 1.2 1.5
    python fid.py eval --ckpt hf://latent_L_sota --ref imagenet_256_fid_stats.npz --resize half
    python fid.py eval --images samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py eval --ckpt runs/digits --data data/digits --features encoder:runs/digits_encoder
    python fid.py neighbours --ckpt runs/cifar10 --data data/cifar10      # copies of training images would be seen
    torchrun --nproc_per_node 8 fid.py eval ...                           # the same numbers, sooner

Protocol (that of the field, and of the paper's Tables 4 and 5): 50,000 images with label i % classes, latents decoded,
uint8 by floor(255 x), the Inception-v3 of 2015-12-05 in float32, statistics in float64. Two families of reference files
exist and must not be mixed: those of ADM (resize `tf1`) and those of MeanFlow, which the paper's numbers use (`half`).
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub.utils import WeakFileLock
from torch import nn
from tqdm import tqdm

from model import MAE, load_encoder, load_generator, load_vae
from prepare_data import EXTENSIONS, Dataset, decode
from sample import generate, save_grid, to_uint8

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
REAL_FOR_PRECISION = 10_000  # real images behind precision and recall, ADM's number; both figures depend on it


# ------------------------------------------------------------------------------------------------------------------
# The figures

def statistics(features):
    """[N, D] -> mean [D] and covariance [D, D] with divisor N - 1, float64 throughout."""
    features = features.double()
    return features.mean(0), features.T.cov()


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

    The release's split rule: rows permuted by RandomState(2020), since splits of images in class order would lack
    classes; then 10 splits of floor(N / 10), the remainder dropped. Logits are without the bias. ValueError for N < 10.
    """
    if len(logits) < 10:
        raise ValueError(f"the Inception Score needs at least 10 images, got {len(logits)}")
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits))[:len(logits) // 10 * 10])
    log_p = logits.double()[order.to(logits.device)].log_softmax(1).unflatten(0, (10, -1))               # 10 n classes
    log_mean = log_p.logsumexp(1, True) - math.log(log_p.shape[1])                                       # 10 1 classes
    scores = (log_p.exp() * (log_p - log_mean)).sum(2).mean(1).exp()                                     # 10
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real, fake, k=3):
    """[N, D], [M, D] -> (precision, recall), Kynkaanniemi et al. 2019, on Inception's pool features as ADM does.

    A sample's ball reaches to its k-th nearest other of its own set. Precision is the share of fake samples inside the
    ball of any real one, recall the share of real samples inside that of any fake one. ValueError for N or M <= k.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall need more than {k} images of a kind, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()  # also keeps TF32 out

    def share_inside(points, centres):  # 1000 rows at a time: 400 MB for 50,000 centres
        reach = torch.cat([torch.cdist(rows, centres).topk(k + 1, largest=False).values[:, k]  # the nearest is itself
                           for rows in centres.split(1000)])
        return sum(int((torch.cdist(rows, centres) <= reach).any(1).sum()) for rows in points.split(1000)) / len(points)
    return share_inside(fake, real), share_inside(real, fake)


# ------------------------------------------------------------------------------------------------------------------
# Features

def unit(width_in, width, kernel, stride=1, padding="same"):
    """Convolution without bias, BatchNorm with TensorFlow's eps, ReLU; the names are the checkpoint's."""
    conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width, eps=1e-3), relu=nn.ReLU()))


class Mixed(nn.Module):
    """Branches of units side by side on one input (`branch_pool`: on the pooled input), concatenated in the order given.

    A step of a branch is a unit (width, kernel[, stride, padding]), or a list of two, side by side on the same input.
    The unit of step j of branch `b` is named `b_j`, the two of a list `b_ja` and `b_jb`, a branch's only unit `b`.
    """

    def __init__(self, width_in, pool, **branches):
        super().__init__()
        self.pool, self.branches = pool, {}
        for branch, steps in branches.items():
            width, self.branches[branch] = width_in, []
            for j, step in enumerate(steps, 1):
                step, letters = (step, "ab") if isinstance(step, list) else ([step], [""])
                names = [(branch if len(steps) == 1 else f"{branch}_{j}") + letter for letter in letters]
                for name, arguments in zip(names, step):
                    self.add_module(name, unit(width, *arguments))
                width = sum(arguments[0] for arguments in step)
                self.branches[branch].append(names)

    def forward(self, x):
        outputs = []
        for branch, steps in self.branches.items():
            outputs.append(self.pool(x) if branch == "branch_pool" else x)
            for names in steps:
                outputs[-1] = torch.cat([self.get_submodule(name)(outputs[-1]) for name in names], 1)
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """Inception-v3 as in TensorFlow's graph of 2015-12-05: [N, 3, 299, 299] -> pool features [N, 2048].

    It is not torchvision's: 1008 outputs, average pools that leave out the padding, a max pool in Mixed_7c.
    """

    def __init__(self):
        super().__init__()
        average, maximum = nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1)
        row7, column7, fork = (1, 7), (7, 1), [(384, (1, 3)), (384, (3, 1))]

        def block_a(width, pooled):
            return Mixed(width, average, branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                         branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(pooled, 1)])

        def block_c(c):
            return Mixed(768, average, branch1x1=[(192, 1)], branch7x7=[(c, 1), (c, row7), (192, column7)],
                         branch7x7dbl=[(c, 1), (c, column7), (c, row7), (c, column7), (192, row7)], branch_pool=[(192, 1)])

        def block_e(width, pool):
            return Mixed(width, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), fork],
                         branch3x3dbl=[(448, 1), (384, 3), fork], branch_pool=[(192, 1)])

        self.Conv2d_1a_3x3 = unit(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = unit(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = unit(32, 64, 3)                                                                # 64 147 147
        self.pool1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = unit(64, 80, 1)
        self.Conv2d_4a_3x3 = unit(80, 192, 3, 1, 0)                                                         # 192 71 71
        self.pool2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)  # 288 35 35
        self.Mixed_6a = Mixed(288, nn.MaxPool2d(3, 2), branch3x3=[(384, 3, 2, 0)],
                              branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2, 0)], branch_pool=[])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(block_c, (128, 160, 160, 192))     # 768 17 17
        self.Mixed_7a = Mixed(768, nn.MaxPool2d(3, 2), branch3x3=[(192, 1), (320, 3, 2, 0)],
                              branch7x7x3=[(192, 1), (192, row7), (192, column7), (192, 3, 2, 0)], branch_pool=[])
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, maximum)                       # 2048 8 8
        self.fc = nn.Linear(2048, 1008)  # for the Inception Score, used without its bias

    def forward(self, x):
        for name, layer in self.named_children():
            x = x.mean((2, 3)) if name == "fc" else layer(x)
        return x


def load_inception(path=None):
    """The FID network with its trained weights, in eval mode, on the CPU.

    path: a state dict with the keys of pytorch-fid's release. Without it that release's file is downloaded and its hash
    checked. Raises ValueError, in one line, for weights that cannot be had or do not fit.
    """
    with torch.device("meta"):  # no initialisation, so no random numbers are drawn
        net = Inception()
    try:
        if path is None:
            folder = Path(torch.hub.get_dir())
            folder.mkdir(parents=True, exist_ok=True)
            # Of many processes one downloads; torch.hub says so on stdout, where only results belong.
            with WeakFileLock(folder / "inception.lock"), contextlib.redirect_stdout(sys.stderr):
                state = torch.hub.load_state_dict_from_url(INCEPTION_URL, None, "cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(path, "cpu", weights_only=True)
        net.load_state_dict({key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}, assign=True)
    except Exception as error:  # every format has errors of its own, and one remedy
        raise ValueError(f"cannot read the FID Inception-v3 from {path or 'the internet'} ({type(error).__name__}: "
                         f"{' '.join(str(error).split()):.150}); fetch {INCEPTION_URL} and give it as --inception") from None
    return net.eval().requires_grad_(False)


# Decorates what computes features: TF32 convolutions, torch's default on GPUs, would move them by 5e-4.
full_precision = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


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
            share = (position - low).view(-1, *[1] * (3 - dim))
            x = x.index_select(dim, low) * (1 - share) + x.index_select(dim, (low + 1).clamp(max=size - 1)) * share
    else:
        raise ValueError(f"resize is tf1 or half, not {resize}")
    return (x - 128) / 128


@torch.no_grad()
@full_precision
def inception_features(net, images_uint8, resize="tf1", batch_size=64):
    """uint8 [N, 1 or 3, H, W] -> pool features float32 [N, 2048] on the network's device; grey is repeated to RGB."""
    dtype, shape = images_uint8.dtype, list(images_uint8.shape)
    if dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3):
        raise ValueError(f"Inception takes uint8 images [N, 1 or 3, H, W], not {dtype} {shape}")
    device = net.fc.weight.device
    with torch.autocast(device.type, enabled=False):
        return torch.cat([net(prepare(batch.to(device).expand(-1, 3, -1, -1), resize))
                          for batch in images_uint8.split(batch_size)])


@torch.no_grad()
@full_precision
def encoder_features(net, images_uint8):
    """uint8 [N, C, H, W] -> float32 [N, D]: the last map of our ResNet-MAE, ReLU, averaged over positions.

    The ReLU matters: the plain average of a map that comes from a group norm is nearly the same for every image.
    """
    wanted, given = net.in_channels, images_uint8.shape[1]
    if wanted != given:
        if wanted not in (1, 3) or not (images_uint8 == images_uint8[:, :1]).all():
            raise ValueError(f"the encoder takes {wanted} channels, the images have {given}")
        images_uint8 = images_uint8[:, :1].expand(-1, wanted, -1, -1)  # grey in another form
    x = images_uint8.to(next(net.parameters()).device) / 127.5 - 1
    return net.features(x)[f"layer{net.encoder.num_stages}"].float().relu().mean(1)                      # N T D -> N D


class Extractor(NamedTuple):
    """What turns images into the rows that are compared, and what identifies it."""
    extract: Callable  # uint8 [n, C, H, W] -> float32 [n, D]
    features: str      # "pixels", or "inception-", "encoder-" and a hash of the weights
    resize: str        # tf1 or half; "none" without Inception
    fc: torch.Tensor   # [1008, 2048], for the Inception Score's logits; None without Inception


def load_extractor(features="inception", resize="tf1", inception=None, device="cpu", keep_converted=True):
    """`inception` (weights from the path `inception`, or downloaded), `pixels` in [-1, 1], or `encoder:CKPT`: our own
    encoder, for data of which Inception knows nothing. Raises ValueError or OSError for weights that cannot be had.
    """
    kind, _, ckpt = features.partition(":")
    if features == "pixels":
        return Extractor(lambda images: images.to(device).flatten(1) / 127.5 - 1, "pixels", "none", None)
    if features == "inception":
        net = load_inception(inception).to(device)
        extract, fc = functools.partial(inception_features, net, resize=resize), net.fc.weight
    elif kind == "encoder" and ckpt:
        net = load_encoder(ckpt, keep_converted).to(device)
        extract, fc, resize = functools.partial(encoder_features, net), None, "none"
        if not isinstance(net, MAE):
            raise ValueError(f"--features {features} is a {type(net).__name__}, and only a ResNet-MAE has these features")
    else:
        raise ValueError(f"--features is inception, pixels or encoder:CKPT, not {features}")
    weights = b"".join(tensor.cpu().numpy().tobytes() for tensor in net.state_dict().values())
    return Extractor(extract, f"{kind}-{hashlib.sha256(weights).hexdigest()[:12]}", resize, fc)


def gather_features(read, indices, extractor, batch_size=64, title=None):
    """Features of the images read(indices), computed by all processes -> [N, D] in order on rank 0, None on the others.

    A row depends on its image's index alone. On a CPU images go through the network one at a time, as in `generate`, so
    that its bits depend neither on the number of processes nor on batch_size; on a GPU they do, by a convolution's
    rounding in batches of another size (1e-7).
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = indices[rank::world] or indices[:1]  # with more processes than images: one, for a row's width
    size = batch_size if torch.cuda.is_available() else 1
    rows = torch.cat([extractor.extract(read(mine[at:at + size]))
                      for at in tqdm(range(0, len(mine), size), title, leave=False, disable=rank > 0)])
    if world > 1:
        mine, rows = rows, rows.new_zeros(len(indices), rows.shape[1])
        rows[rank::world] = mine
        dist.reduce(rows, 0)  # a row and zeros: their sum is that row, to the bit
    return rows if rank == 0 else None


# ------------------------------------------------------------------------------------------------------------------
# Scoring

def open_reference(extractor, ref=None, data=None, batch_size=64):
    """What images are compared with: a statistics file, real images, or both. All processes call it together.

    ref: an .npz with `mu`, `sigma` (ours, ADM's, JiT's, pytorch-fid's) or `ref_mu`, `ref_sigma` (MeanFlow's). Ours also
    has features of real images for precision and recall (`real`), ADM's has images for them (`arr_0`). data: as
    `open_images` takes it; alone it gives everything, beside ref precision and recall.

    Returns a dict, complete on rank 0: mu [D], sigma [D, D] float64; real [n, D], or None; num_images of data; ref and
    ref_sha256, name and hash of the file, or of data with a hash of the number of images and 64 of them. ValueError for
    a file without what is asked, naming the keys found, and for one made with other features or another resize.
    """
    reference, source = {"ref": str(data)}, data
    if ref:
        file = open_npz(ref)
        prefix = "ref_" if "ref_mu" in file else ""
        if prefix + "mu" not in file or prefix + "sigma" not in file:
            raise ValueError(f"{ref} holds no statistics: wanted mu and sigma, or ref_mu and ref_sigma, found "
                             f"{', '.join(file.files)}; `fid.py ref --data IMAGES` makes them")
        try:
            mu, sigma = (torch.tensor(file[prefix + name], dtype=torch.float64) for name in ("mu", "sigma"))
            real = torch.tensor(file["real"], dtype=torch.float32) if "real" in file else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{ref}: no numbers ({error})") from None
        wanted = mu.shape[:1] if extractor.fc is None else extractor.fc.shape[1:]
        if mu.shape != wanted or sigma.shape != wanted * 2 or not mu.isfinite().all() or not torch.allclose(sigma, sigma.T):
            raise ValueError(f"{ref}: mu {list(mu.shape)} and sigma {list(sigma.shape)} are no features' mean, covariance")
        if real is not None and (real.shape[1:] != wanted or len(real) < 4 or not real.isfinite().all()):
            raise ValueError(f"{ref}: real {list(real.shape)} are no features of real images")
        # The prefix is MeanFlow's; sFID statistics (mu_s) are in ADM's files only; mu and sigma alone can be either's.
        known = {"features": "inception", "resize": "half" if prefix else "tf1" if "mu_s" in file else ""}
        for key, made in known.items():
            made, mine = str(file[key]) if key in file else made, getattr(extractor, key)
            if not mine.startswith(made):
                raise ValueError(f"{ref} was made with {key} {made}, this run has {mine}: the number would mean nothing. "
                                 f"Change --{key} (in training --eval_{key}), or make a reference with `fid.py ref`")
        with open(ref, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        reference = {"mu": mu, "sigma": sigma, "real": real,
                     "ref": Path(ref).name, "ref_sha256": digest}
        source = data or (ref if "arr_0" in file else None)
    if source:
        count, read = open_images(source)
        spread = lambda n: [i * count // n for i in range(n)]  # noqa: E731  (the first ones would be of few classes)
        chosen = spread(min(count, REAL_FOR_PRECISION))
        if count < 4:
            raise ValueError(f"{source} holds {count} images, too few to compare with")
        rows = gather_features(read, chosen if ref else range(count), extractor, batch_size, "real images")
        if not ref:
            some = str(count).encode() + read(spread(64)).numpy().tobytes()
            reference.update(num_images=count, ref_sha256=hashlib.sha256(some).hexdigest())
            if rows is not None:
                if len(rows[0]) > 8192:
                    raise ValueError(f"--features {extractor.features}: {len(rows[0])} numbers an image are too many for a "
                                     "covariance; take an encoder's or Inception's")
                reference["mu"], reference["sigma"] = statistics(rows)
                rows = rows[chosen]
        reference["real"] = rows
    return reference


def evaluate(read, num_images, extractor, reference, batch_size=64, title=None):
    """Scores images 0..num_images-1 of `generated` or `open_images`. All processes call it together.

    Returns, on rank 0: num_images; fid, is, is_std, or fd alone without Inception; precision and recall where the
    reference has real images; features, resize, ref, ref_sha256: what all this was measured with. None on other ranks.
    """
    rows = gather_features(read, range(num_images), extractor, batch_size, title)
    if rows is None:
        return None
    distance = frechet_distance(*statistics(rows), reference["mu"].to(rows.device), reference["sigma"].to(rows.device))
    result = {"num_images": num_images, "fd" if extractor.fc is None else "fid": distance}
    if extractor.fc is not None:
        result["is"], result["is_std"] = inception_score(rows.double() @ extractor.fc.double().T)  # double: no TF32
    if reference["real"] is not None:
        result["precision"], result["recall"] = precision_recall(reference["real"].to(rows.device), rows)
    return {**result, "features": extractor.features, "resize": extractor.resize,
            "ref": reference["ref"], "ref_sha256": reference["ref_sha256"]}


def generated(generator, cfg_scale=1.0, seed=0, temperature=1.0, vae=None):
    """read(indices) as of `open_images`, of a generator: image i has label i % classes and noise from (seed, i).

    No other random numbers are drawn: a training run that evaluates goes on as if it had not.
    """
    def read(indices):
        labels = [i % generator.num_classes for i in indices]
        return to_uint8(generate(generator, labels, indices, cfg_scale, temperature, seed, len(indices), vae=vae))
    return read


def open_images(path):
    """A prepared data set, an .npz with uint8 arr_0 [N, H, W, C], or a folder or .zip of images, sorted by name.

    Returns (N, read); read(indices) -> uint8 [n, C, H, W] takes from disk only what is asked for, since 50,000 images
    of 256x256 are 9.8 GB. Raises ValueError for what is none of these, empty, broken, of several sizes, or latents.
    """
    path = Path(path)
    split = path / "train" if (path / "train" / "meta.json").is_file() else path
    if (split / "meta.json").is_file():
        data = Dataset(split.parent, split.name)
        if data.meta["kind"] == "latents":
            raise ValueError(f"{path} holds latents, no images: give the images that they were made of, or statistics of "
                             "those by `fid.py ref` (--ref, in training --eval_ref)")
        return len(data), lambda indices: torch.from_numpy(data.images[indices])

    if path.suffix == ".npz":
        if "arr_0" not in (keys := open_npz(path).files):
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
        names = sorted(n for n in names if n.lower().endswith(EXTENSIONS) and not Path(n).name.startswith("."))
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


# ------------------------------------------------------------------------------------------------------------------
# The commands

def command_ref(args, extractor):
    reference = open_reference(extractor, data=args.data, batch_size=args.batch_size)
    if reference["real"] is not None:  # rank 0
        with open(args.out, "wb") as file:
            np.savez(file, **{key: reference[key].cpu().numpy() for key in ("mu", "sigma", "real")}, source=args.data,
                     num_images=reference["num_images"], features=extractor.features, resize=extractor.resize)
        print(f"{args.out}: {reference['num_images']:,} images, {extractor.features}, resize {extractor.resize}")
        if reference["num_images"] <= len(reference["mu"]):
            print(f"warning: with {len(reference['mu'])} features their covariance is singular", file=sys.stderr)


def load(args):
    """The generator of --ckpt, and the decoder of --vae if it makes latents."""
    generator = load_generator(args.ckpt, not args.no_converted_copy).to(args.device)
    return generator, None if generator.out_channels in (1, 3) else load_vae(args.vae, args.device, args.vae_chunk)


def command_eval(args, extractor):
    """JSON lines go to stdout, one an alpha; what people read goes to stderr."""
    if args.ckpt:
        generator, vae = load(args)
        num_images = args.num_images or 50_000
        how = dict(ckpt=args.ckpt, seed=args.seed, temperature=args.temperature, **({"vae": args.vae} if vae else {}))
        sources = [({"cfg_scale": alpha, **how}, generated(generator, alpha, args.seed, args.temperature, vae))
                   for alpha in args.cfg_scale]
    else:
        available, read = open_images(args.images)
        num_images, sources = args.num_images or available, [({"images": args.images}, read)]
        if num_images > available:
            raise ValueError(f"{args.images} holds {available:,} images, --num_images asks for {num_images:,}")
    if num_images < 10:
        raise ValueError(f"{num_images} images are too few: the protocol has 50,000, and 10 are the least")
    reference, rows = open_reference(extractor, args.ref, args.data, args.batch_size), []
    for how, read in sources:
        title = args.images or f"alpha {how['cfg_scale']:g}"
        row = evaluate(read, num_images, extractor, reference, args.batch_size, title)
        if row is not None:  # rank 0
            rows.append({**how, **({"real": args.data} if args.ref and args.data else {}), **row})
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
    """A result as one line for people: FID-5k 12.345  IS 67.8 +- 0.9  precision ...  recall ...  (how it was measured)."""
    n = row["num_images"]
    size = "" if n == 50_000 else f"-{n // 1000}k" if n % 1000 == 0 else f"-{n}"  # fewer make it higher
    text = {"fid": "FID{size} {fid:z.3f}", "fd": "FD{size} {fd:z.3f}", "is": "IS {is:.2f} +- {is_std:.2f}",
            "precision": "precision {precision:.4f}  recall {recall:.4f}"}
    how = "alpha {cfg_scale:g}, seed {seed}" if "ckpt" in row else "{images}"
    text = "  ".join(part for key, part in text.items() if key in row) + (
        f"  ({n:,} images, {how}, {{features}}, resize {{resize}}, reference {{ref}} {{ref_sha256:.12}})")
    return text.format(size=size, **row)


def draw_sweep(rows, path):
    """Paper Fig. 5: the distance over alpha and the Inception Score over alpha, the best point in red."""
    from PIL import Image, ImageDraw, ImageFont
    panels = [key for key in ("fid", "fd", "is") if key in rows[0]]
    side, margin, font = 360, 60, ImageFont.load_default(15)
    width = side + 2 * margin
    picture = Image.new("RGB", (width * len(panels), width), "white")
    draw = ImageDraw.Draw(picture)
    for panel, key in enumerate(panels):
        values = np.array(sorted((row["cfg_scale"], row[key]) for row in rows))                          # alphas 2
        low, high = values.min(0), values.max(0)
        points = ((values - low) / np.maximum(high - low, 1e-9) * [1, -1] + [0, 1]) * side + margin + [panel * width, 0]
        best = values[:, 1].argmax() if key == "is" else values[:, 1].argmin()
        draw.line(points.flatten().tolist(), "gray", 2)
        for i, ((x, y), (alpha, value)) in enumerate(zip(points, values)):
            draw.circle((x, y), 4, "red" if i == best else "black")
            draw.text((x, y - 8), f"{value:.4g}", "black", font, "mb", stroke_width=3, stroke_fill="white")
            draw.text((x, width - margin + 16), f"{alpha:g}", "black", font, "mt")
        draw.text((width * (panel + 0.5), width - 6), f"{key.upper()} over alpha", "black", font, "mb")
    picture.save(path)


def command_neighbours(args, extractor):
    """Paper B.4: generated images, each beside the training images nearest to it, and three figures over all of them.

    Copies would be nearer to training images than held-out ones (split `test`) are; noise farther; wrong classes have
    neighbours of another class; collapse brings the images of a class together.
    """
    images, train, test = open_images(args.data), Dataset(args.data), Path(args.data) / "test"
    generator, vae = load(args)
    fake = generated(generator, args.cfg_scale, args.seed, args.temperature, vae)
    classes, makes = train.num_classes, [*fake([0]).shape[1:]]
    if (makes, generator.num_classes) != ([*train.shape], classes):
        raise ValueError(f"{args.ckpt} makes {makes} of {generator.num_classes} classes, "
                         f"{args.data} has {[*train.shape]} of {classes}")
    if args.num_images < 2 * classes:
        raise ValueError(f"--num_images {args.num_images}: at least two of each of the {classes} classes are needed")

    def features(count, read, title):
        rows = gather_features(read, range(count), extractor, args.batch_size, title)
        return None if rows is None else rows.double()  # in float32 a copy's distance would not be 0
    real, made = features(*images, "training images"), features(args.num_images, fake, "generated images")
    held_out = features(*open_images(test), "held-out images") if test.is_dir() else None
    if real is None:  # not rank 0
        return

    def compare(name, rows, labels):
        distance, index = map(torch.cat, zip(*(torch.cdist(part, real).min(1) for part in rows.split(500))))
        same = train.labels[index.cpu()] == labels
        print(f"{name:10} nearest training image of the same class {same.mean():6.1%} (worst class "
              f"{min(same[labels == c].mean() for c in np.unique(labels)):.1%}), at distance {distance.mean():.3f}")
        return distance.mean()

    def spread(rows, labels):
        return np.mean([torch.pdist(rows[torch.from_numpy(labels == c)][:1000]).mean().item() for c in np.unique(labels)])

    asked = np.arange(args.num_images) % classes
    distance = compare("generated", made, asked)
    if held_out is not None:
        yardstick = compare("held out", held_out, Dataset(args.data, "test").labels)
        print(f"distance to the training images {distance / yardstick:.3f} of the held-out images'; "
              f"distance within a class {spread(made, asked) / spread(real, train.labels):.3f} of the training images'")
    nearest = torch.cdist(made[:20], real).topk(min(8, len(train)), largest=False).indices.cpu().numpy()
    rows = [torch.cat([fake([i]), torch.from_numpy(train.images[near])]) for i, near in enumerate(nearest)]
    save_grid(torch.cat(rows), len(rows[0]), args.out)
    print(f"{args.out}: in each row a generated image, then the training images nearest to it")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="ref | eval | neighbours")
    add = functools.partial(commands.add_parser, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    ref, score, near = (add(name, help=text) for name, text in (
        ("ref", "statistics of real images, for --ref"), ("eval", "score a checkpoint or image files"),
        ("neighbours", "generated images beside the nearest real ones")))
    ref.add_argument("--data", required=True, help="prepared data set, folder, .zip, or .npz with arr_0")
    ref.add_argument("--out", required=True, help="the .npz to write")

    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", help="generator: whatever --ckpt of sample.py takes")
    what.add_argument("--images", help="prepared data set, folder, .zip, or .npz with arr_0")
    score.add_argument("--ref", help="statistics file: ours, ADM's, MeanFlow's, JiT's, pytorch-fid's")
    score.add_argument("--data", help="real images: in place of --ref, or beside it for precision and recall")
    score.add_argument("--num_images", type=int, help="None: 50000 of a checkpoint, all of --images")
    score.add_argument("--cfg_scale", type=float, nargs="+", default=[1.0], help="alpha; several make a sweep")
    score.add_argument("--out", default="alpha_sweep.png", help="picture of a sweep")

    near.add_argument("--ckpt", required=True, help="generator: whatever --ckpt of sample.py takes")
    near.add_argument("--data", required=True, help="prepared data set: its training images, and held-out ones if any")
    near.add_argument("--num_images", type=int, default=1000, help="generated images to compare")
    near.add_argument("--cfg_scale", type=float, default=1.0, help="alpha")
    near.add_argument("--out", default="neighbours.png", help="the picture to write")

    for command in (ref, score, near):
        option = command.add_argument
        if command is not ref:
            option("--seed", type=int, default=0, help="of the noise")
            option("--temperature", type=float, default=1.0, help="multiplies the noise")
            option("--vae", default="hf://stabilityai/sd-vae-ft-mse", help="decoder of latents, a folder or on the Hub")
            option("--vae_chunk", type=int, default=16, help="images it decodes at a time on a GPU: bounds its memory")
        option("--features", default="inception", help="inception (FID), pixels or encoder:CKPT (FD)")
        option("--inception", help="Inception's weights (None: downloaded)")
        option("--resize", choices=("tf1", "half"), default="tf1", help="tf1: as ADM; half: as the paper")
        option("--batch_size", type=int, default=64, help="images at a time, on a GPU")
        option("--no_converted_copy", action="store_true", help="keep no safetensors copy of published weights")
    args = parser.parse_args(argv)

    if args.command == "eval" and not (args.ref or args.data):
        parser.error("give --ref STATISTICS or --data REAL_IMAGES to compare with")
    unread = {"--features inception": ["inception", "resize"] if args.features != "inception" else [],
              "--ckpt": ["cfg_scale", "seed", "temperature", "vae", "vae_chunk"] if getattr(args, "images", None) else []}
    for owner, names in unread.items():
        if any(getattr(args, name) != score.get_default(name) for name in names):
            parser.error(f"--{', --'.join(names)} belong to {owner}")  # a flag that would be ignored is an error
    for name in ("num_images", "batch_size", "vae_chunk"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main():
    args = parse()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:  # started by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        from torch.distributed.nn import functional  # noqa: F401  imported later, its defaults would keep the group alive
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        extractor = load_extractor(args.features, args.resize, args.inception, args.device, not args.no_converted_copy)
        {"ref": command_ref, "eval": command_eval, "neighbours": command_neighbours}[args.command](args, extractor)
        if dist.is_initialized():
            dist.barrier()  # rank 0 computes, the others wait
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"fid.py: {error}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
