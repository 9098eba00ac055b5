"""FID, Inception Score, precision and recall of a generator's checkpoint or of image files.

    python fid.py ref --data data/cifar10 --out cifar10_stats.npz      # statistics of real images
    python fid.py eval --ckpt runs/cifar10 --ref cifar10_stats.npz --cfg_scale 1.0 1.2 1.5
    python fid.py eval --ckpt hf://latent_L_sota --ref meanflow256     # downloads all it needs
    python fid.py eval --images samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    python fid.py eval --ckpt runs/digits --data data/digits --features encoder:runs/digits_encoder
    python fid.py eval --ckpt runs/cifar10 --data data/cifar10 --features dinov2     # FD-DINOv2
    python fid.py neighbours --ckpt runs/cifar10 --data data/cifar10   # copies would be seen
    torchrun --nproc_per_node 8 fid.py eval ...                        # the same numbers, sooner

Protocol (that of the field, and of the paper's Tables 4 and 5): 50,000 images with label
i % classes, latents decoded, uint8 by floor(255 x), the Inception-v3 of 2015-12-05 in float32,
statistics in float64. Two families of reference files exist and must not be mixed: those of ADM
and JiT (resize `tf1`) and those of MeanFlow, which the paper's numbers use (`half`).
"""
import argparse
import contextlib
import json
import math
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from torch import nn

from model import (HelpFormat, UsageError, all_reduce, atomic_write, barrier, digest, get_rank,
                   load_encoder, note, run_script)
from prepare_data import Dataset, natural, open_source, to_array
from sample import (add_sampling_options, generate, load_networks, own_batches, save_grid,
                    to_uint8)

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
# Statistics of ImageNet at 256 x 256 by name: where they are, and the resize they were made with.
REFERENCES = {
    "meanflow256": ("hf://he-vision-group/iMF/imagenet_256_fid_stats.npz", "half"),
    "jit256": ("hf://jiaqihan99/W-Flow/stats/jit_in256_stats.npz", "tf1"),
    "adm256": ("https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
               "256/VIRTUAL_imagenet256_labeled.npz", "tf1")}
# Real images behind precision and recall: ADM's number. Both figures depend on it.
REAL_FOR_PRECISION = 10_000


# ---- The figures; a new one is a function here and a line in `evaluate` --------------------------

def evaluate(read, num_images, extractor, reference, batch_size=64):
    """Score images 0 to num_images - 1 of `generated` or `open_images`. All processes call it.

    Returns num_images; fid, is and is_std, or fd_dinov2, or fd; precision and recall if there are
    real images; and how it was measured: features, resize, ref.
    """
    shape = np.array(read([0]).shape[1:])
    if (shape != reference.get("shape", shape)).any():
        note(f"channels, height, width: {shape} here, {reference['shape']} in the reference")
    fake = gather_features(read, range(num_images), extractor, batch_size)
    distance = frechet_distance(*statistics(fake), reference["mu"], reference["sigma"])
    result = {"num_images": num_images, extractor.key: distance}
    if extractor.kind == "inception":
        logits = fake.double() @ extractor.net.fc.double().T  # float64: never TF32
        result["is"], result["is_std"] = inception_score(logits)
    if "real" in reference:
        real = torch.as_tensor(reference["real"]).to(fake.device)
        result["precision"], result["recall"] = precision_recall(real, fake)
    return result | {"features": extractor.name, "resize": extractor.resize,
                     "ref": reference["ref"]}


def statistics(features):
    """[N, D] -> mean [D] and covariance [D, D] with divisor N - 1, float64 throughout."""
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
    variances, axes = torch.linalg.eigh(sigma1)
    # With fewer images than features the covariance is singular: only directions with nonzero
    # variance are kept, as the roots of rounding noise would spoil the fifth decimal.
    kept = variances > 1e-12 * variances.max()
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


# ---- The network ---------------------------------------------------------------------------------

class Inception:
    """Inception-v3 as in TensorFlow's graph of 2015-12-05: [N, 3, 299, 299] -> [N, 2048].

    weights: pytorch-fid's, {name: tensor}; layers have the sizes of their tensors.
    Not torchvision's: 1008 outputs, average pools that leave out the padding, Mixed_7c's max pool.
    """

    def __init__(self, weights, device="cpu"):
        self.weights = {name: tensor.to(device) for name, tensor in weights.items()}
        self.fc = self.weights["fc.weight"]  # for the Inception Score, without its bias
        assert self.fc.shape == (1008, 2048), "not the Inception-v3 of 2015-12-05"

    def __call__(self, x):
        average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        shrink = nn.MaxPool2d(3, 2)
        x = self.unit(x, "Conv2d_1a_3x3", 2, 0)
        x = self.unit(x, "Conv2d_2a_3x3", 1, 0)
        x = shrink(self.unit(x, "Conv2d_2b_3x3"))                                # 64 73 73
        x = self.unit(x, "Conv2d_3b_1x1")
        x = shrink(self.unit(x, "Conv2d_4a_3x3", 1, 0))                          # 192 35 35
        triple = "3x3dbl_1 3x3dbl_2 3x3dbl_3"
        for name in ("5b", "5c", "5d"):                                          # 288 35 35
            x = self.mixed(x, name, f"1x1, 5x5_1 5x5_2, {triple}", average)
        x = self.mixed(x, "6a", f"3x3, {triple}", shrink)                        # 768 17 17
        for name in ("6b", "6c", "6d", "6e"):
            x = self.mixed(x, name, "1x1, 7x7_1 7x7_2 7x7_3, "
                           "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5", average)
        x = self.mixed(x, "7a", "3x3_1 3x3_2, 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4", shrink)
        for name, pool in (("7b", average), ("7c", nn.MaxPool2d(3, 1, 1))):      # 2048 8 8
            x = self.mixed(x, name, "1x1, 3x3_1 3x3_2a|3x3_2b, "
                           "3x3dbl_1 3x3dbl_2 3x3dbl_3a|3x3dbl_3b", pool)
        return x.mean((2, 3))

    def unit(self, x, name, stride=1, padding="same"):
        """Convolution without bias, BatchNorm with TensorFlow's eps, ReLU."""
        x = F.conv2d(x, self.weights[f"{name}.conv.weight"], None, stride, padding)
        mean, variance, weight, bias = (self.weights[f"{name}.bn.{key}"] for key in (
            "running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, eps=1e-3).relu_()

    def mixed(self, x, name, branches, pool):
        """Branches side by side on one input, and a pool, concatenated.

        branches: "1x1, 3x3_1 3x3_2a|3x3_2b": one unit; and a unit before two on its output.
        """
        pooled = pool(x)
        shrinks = pooled.shape != x.shape  # then last units have stride 2, and the pool no unit
        outputs = []
        for branch in branches.split(", "):
            *steps, last = branch.split()
            y = x
            for step in steps:
                y = self.unit(y, f"Mixed_{name}.branch{step}")
            for step in last.split("|"):
                how = (2, 0) if shrinks else ()
                outputs.append(self.unit(y, f"Mixed_{name}.branch{step}", *how))
        if not shrinks:
            pooled = self.unit(pooled, f"Mixed_{name}.branch_pool")
        return torch.cat([*outputs, pooled], 1)


def load_inception(path=None, device="cpu"):
    """The FID network with the weights of `path`, a state dict as pytorch-fid releases it.

    Without a path that release is downloaded into torch.hub's cache and its hash checked.
    """
    if path:
        weights = torch.load(path, "cpu", weights_only=True)
    else:
        # torch.hub speaks on stdout, where only results belong.
        with contextlib.redirect_stdout(sys.stderr):
            weights = torch.hub.load_state_dict_from_url(
                INCEPTION_URL, None, "cpu", get_rank() == 0, check_hash=True, weights_only=True)
    return Inception(weights, device)


# ---- Features ------------------------------------------------------------------------------------

# TF32, which cuDNN's convolutions take by default on a GPU, moves features by 5e-4.
exact_convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


class Extractor:
    """Turns images into the feature rows that are compared: uint8 [n, C, H, W] -> float32 [n, D].

    features: inception (FID), pixels, encoder:CKPT, a ResNet-MAE of ours, for data of which
    Inception knows nothing, or dinov2[:PATH] (FD-DINOv2). resize, Inception only: tf1, half, or
    None, which `open_reference` sets to the reference's. inception: file of its weights.
    """

    def __init__(self, features="inception", resize=None, inception=None, device="cpu"):
        self.kind, _, path = features.partition(":")
        kinds = {"inception": "fid", "dinov2": "fd_dinov2", "encoder": "fd", "pixels": "fd"}
        self.key = kinds[self.kind]
        self.name = self.kind  # and a hash of the weights
        self.resize = resize if self.kind == "inception" else "none"
        self.device = device
        if self.kind == "pixels":
            return
        if self.kind == "inception":
            self.net = load_inception(inception, device)
            weights = self.net.weights
        else:
            self.net = load_encoder(path or "hf://facebook/dinov2-large").to(device)
            weights = self.net.state_dict()
        self.name += f"-{digest(weights):.12}"

    @torch.no_grad()
    @exact_convolutions
    def __call__(self, images):
        if self.kind == "inception":
            return inception_features(self.net, images, self.resize)
        x = images.to(self.device) / 127.5 - 1
        if self.kind == "pixels":
            return x.flatten(1)
        if self.kind == "dinov2":  # EDM2's protocol; grey is repeated
            return self.net.features(x.expand(-1, 3, -1, -1))["dinov2_cls"][:, 0]
        # The ReLU matters: the plain mean of a map after a group norm hardly depends on the image.
        last = self.net.features(x)[f"layer{self.net.encoder.num_stages}"]       # n T D
        return last.relu().mean(1)


@torch.no_grad()
@exact_convolutions
def inception_features(net, images, resize="tf1"):
    """uint8 [N, 1 or 3, H, W] -> pool features float32 [N, 2048] on the network's device.

    resize, bilinear to 299 x 299: half has pixel centres at half-integers, as torch and MeanFlow;
    tf1 reads output i at i * H / 299, as TensorFlow 1 and ADM. Neither smooths when shrinking.
    """
    assert images.dtype == torch.uint8, f"no images of 0 to 255: {images.dtype}"
    x = images.to(net.fc.device).float()
    if resize == "half":
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
    else:
        x = resize_tf1(resize_tf1(x.mT).mT)
    return net((x.expand(-1, 3, -1, -1) - 128) / 128)  # grey is repeated


def resize_tf1(x):
    """The last axis -> 299."""
    size = x.shape[-1]
    position = torch.arange(299, device=x.device) * (size / 299)
    low = position.long()
    high = (low + 1).clamp(max=size - 1)
    weight = position - low
    return x[..., low] * (1 - weight) + x[..., high] * weight


def gather_features(read, indices, extractor, batch_size=64):
    """Features [N, D] of the images read(indices), in order, made by all processes."""
    width = extractor(read(indices[:1])).shape[1]
    rows = torch.zeros(len(indices), width, device=extractor.device)
    for batch in own_batches(len(indices), batch_size):
        rows[batch] = extractor(read(indices[batch]))
    return all_reduce(rows)  # every row is that of one process plus zeros: the same bits


# ---- What is compared: references, images --------------------------------------------------------

def open_reference(extractor, ref=None, data=None, batch_size=64):
    """What images are compared with, a dict. All processes call it together.

    ref: a statistics file, or its name or address. data: real images, as `open_images` takes them,
    in place of ref, or beside it for precision and recall. In the dict: mu [D] and sigma [D, D];
    real [n, D] if there are images; their shape [C, H, W] if known; ref, their name; of data alone
    num_images. An extractor without a resize gets that of the reference.
    """
    reference = {"ref": str(data)}
    if ref:
        path, resize = find_reference(ref)
        reference = read_statistics(path, resize, extractor)
        if data is None and "arr_0" in np.load(path):  # ADM's images for precision and recall
            data = path
    extractor.resize = extractor.resize or "tf1"
    if data is None:
        return reference
    count, read = open_images(data)
    n = min(count, REAL_FOR_PRECISION)
    chosen = [i * count // n for i in range(n)]  # the first n would be images of few classes
    reference["shape"] = np.array(read([0]).shape[1:])
    if ref:
        reference["real"] = gather_features(read, chosen, extractor, batch_size)
        return reference
    rows = gather_features(read, range(count), extractor, batch_size)
    mu, sigma = statistics(rows)
    return reference | {"mu": mu, "sigma": sigma, "real": rows[chosen], "num_images": count}


def find_reference(ref):
    """Path of the statistics --ref, downloaded if need be, and their resize if the name says it."""
    if Path(ref).exists():
        return ref, None
    url, resize = REFERENCES.get(ref, (ref, None))
    if url.startswith("hf://"):
        user, repo, file = url.removeprefix("hf://").split("/", 2)
        return hf_hub_download(f"{user}/{repo}", file), resize
    if "://" not in url:
        raise UsageError(f"--ref {ref}: no such file, nor one of {', '.join(REFERENCES)}")
    path = Path(torch.hub.get_dir(), "checkpoints", url.partition("://")[2])
    if os.environ.get("LOCAL_RANK", "0") == "0" and not path.is_file():
        note(f"downloading {url} to {path} (adm256: 2 GB)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            torch.hub.download_url_to_file(url, partial, progress=get_rank() == 0)
            zipfile.ZipFile(partial).close()  # raises if the download was cut short
    barrier()  # the first process of a machine downloads, the others find the file
    return path, resize


def read_statistics(path, resize, extractor):
    """The dict of `open_reference` of an .npz; resize: what its name says of it.

    Keys are mu and sigma (pytorch-fid, JiT), with them mu_s and sigma_s of sFID and arr_0, images
    (ADM), or ref_mu and ref_sigma (MeanFlow). Ours say how they were made.
    """
    file = np.load(path)
    features = str(file.get("features", "inception"))
    prefix = ""
    if "ref_mu" in file:
        prefix = "ref_"
        resize = "half"
    elif "mu_s" in file:
        resize = "tf1"
    elif "resize" in file:
        resize = str(file["resize"])
    extractor.resize = extractor.resize or resize
    if extractor.resize is None:
        raise UsageError(f"{path}: say --resize tf1 (ADM, JiT) or half (MeanFlow, the paper)")
    if resize not in (None, extractor.resize) or not extractor.name.startswith(features):
        raise UsageError(f"{path} was made with features {features}, resize {resize}; this run has "
                         f"features {extractor.name}, resize {extractor.resize}")
    return {"mu": file[prefix + "mu"], "sigma": file[prefix + "sigma"], "ref": Path(path).name,
            **{key: file[key] for key in ("real", "shape") if key in file}}


def generated(generator, cfg_scale=1.0, seed=0, temperature=1.0, vae=None):
    """read(indices) -> uint8 [n, C, H, W] of a generator: image i has label i % classes.

    No other random numbers are drawn: a training run that evaluates goes on as if it had not.
    """
    def read(indices):
        labels = [i % generator.num_classes for i in indices]
        n = len(indices)
        return to_uint8(generate(generator, labels, indices, cfg_scale, temperature, seed, n, vae))
    return read


def open_images(source):
    """(N, read) of a prepared data set, an .npz of images, or any source of prepare_data.py.

    read(indices) -> uint8 [n, C, H, W], files in natural order. Of splits `train` is taken.
    """
    if str(source).endswith(".npz"):
        return open_npz(source)
    data = open_prepared(source)
    if data:
        return len(data), lambda indices: torch.from_numpy(data.images[indices])
    splits, load = open_source(source)
    split = "train" if "train" in splits else min(splits)
    items = sorted((item for _, item in splits[split]), key=natural)
    note(f"{source}: {len(items):,} images of {split}")
    return len(items), lambda indices: torch.from_numpy(
        np.stack([to_array(load(items[i])) for i in indices]))


def open_prepared(folder):
    """The Dataset of a folder OUT or OUT/SPLIT of prepare_data.py, or None."""
    for split in (Path(folder, "train"), Path(folder)):
        if (split / "meta.json").is_file():
            return Dataset(split.parent, split.name)


def open_npz(path):
    """Of arr_0 uint8 [N, H, W, C], which is never in memory whole: 50,000 of 256x256 are 9.8 GB."""
    member = zipfile.ZipFile(path).open("arr_0.npy")
    np.lib.format.read_magic(member)  # 1.0, since the header is short
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    if dtype != np.uint8 or shape[-1] not in (1, 3) or fortran:
        raise UsageError(f"{path}: arr_0 is {dtype} {list(shape)}, not uint8 [N, H, W, 1 or 3]")
    start = member.tell()

    def read(indices):
        images = np.empty((len(indices), *shape[1:]), np.uint8)
        for image, i in zip(images, indices):
            member.seek(start + i * image.nbytes)
            member.readinto(image)
        return torch.from_numpy(images.transpose(0, 3, 1, 2))
    return shape[0], read


# ---- The commands --------------------------------------------------------------------------------

def command_ref(args, extractor):
    reference = open_reference(extractor, None, args.data, args.batch_size)
    if get_rank() == 0:
        reference |= {key: reference[key].cpu() for key in ("mu", "sigma", "real")}
        reference |= {"features": extractor.name, "resize": extractor.resize}
        with atomic_write(args.out) as partial, open(partial, "wb") as file:
            np.savez(file, **reference)
        print(f"{args.out}: {reference['num_images']:,} images, features {extractor.name}")


def command_eval(args, extractor):
    """One JSON line an alpha: what was scored, the figures, and what they were measured with."""
    if args.images:
        num_images, read = open_images(args.images)
        sources = [({"images": args.images}, read)]
    else:
        num_images = 50_000
        generator, vae = load_networks(args)
        sources = [({"ckpt": args.ckpt, "cfg_scale": alpha, "seed": args.seed,
                     "temperature": args.temperature},
                    generated(generator, alpha, args.seed, args.temperature, vae))
                   for alpha in args.cfg_scale]
    num_images = args.num_images or num_images
    reference = open_reference(extractor, args.ref, args.data, args.batch_size)
    if num_images <= len(reference["mu"]):
        note(f"{num_images} images are fewer than the features: the distance is too high")
    for source, read in sources:
        result = evaluate(read, num_images, extractor, reference, args.batch_size)
        if get_rank() == 0:
            print(json_line(source | result), flush=True)


def json_line(row):
    """JSON, in which a number that is not finite is null: readers stop at NaN and Infinity."""
    return json.dumps(json.loads(json.dumps(row), parse_constant=lambda name: None))


def command_neighbours(args, extractor):
    """Paper B.4: generated images, each beside the training images nearest to it; two figures.

    Copies would be nearer to training images than held-out ones (split `test`) are, noise farther.
    Images of a wrong class have neighbours of another class.
    """
    extractor.resize = extractor.resize or "tf1"
    train = Dataset(args.data)
    generator, vae = load_networks(args)
    classes = generator.origin.get("classes", train.meta["classes"])
    assert classes == train.meta["classes"], f"{args.ckpt} makes other classes: {classes}"
    [alpha] = args.cfg_scale
    fake = generated(generator, alpha, args.seed, args.temperature, vae)
    sets = [("generated", fake, np.arange(args.num_images or 1000) % train.num_classes)]
    test = Path(args.data, "test")
    if test.is_dir():
        sets.insert(0, ("held out", open_images(test)[1], Dataset(args.data, "test").labels))
    _, read = open_images(args.data)
    real = gather_features(read, range(len(train)), extractor, args.batch_size)
    real = real.double()  # in float32 a copy would not be at distance 0
    k = min(8, len(real))
    means = []
    for name, read, labels in sets:
        rows = gather_features(read, range(len(labels)), extractor, args.batch_size).double()
        parts = [torch.cdist(part, real).topk(k, largest=False) for part in rows.split(500)]
        distance = torch.cat([part.values for part in parts])                   # n k
        index = torch.cat([part.indices for part in parts]).cpu().numpy()       # n k
        means.append(distance[:, 0].mean())
        same = train.labels[index[:, 0]] == labels
        worst = min(same[labels == c].mean() for c in np.unique(labels))
        if get_rank() == 0:
            print(f"{name:10} nearest training image of the same class {same.mean():6.1%} (worst "
                  f"class {worst:.1%}), at distance {means[-1]:.3f}")
    if get_rank() > 0:
        return
    if test.is_dir():
        print(f"distance to the training images {means[1] / means[0]:.3f} of the held-out images'")
    images = []
    for i, neighbours in enumerate(index[:20]):  # of the generated images, the last set
        images += [fake([i]), torch.from_numpy(train.images[neighbours])]
    save_grid(torch.cat(images), 1 + k, args.out)
    print(f"{args.out}: in each row a generated image, then the training images nearest to it")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormat)
    add = parser.add_argument
    add("command", choices=("ref", "eval", "neighbours"), help="ref: write statistics of --data; "
        "eval: score --ckpt or --images against --ref, --data or both; neighbours: show generated "
        "images beside the nearest of --data")
    add_sampling_options(parser, required=False)
    add("--images", help="images to score, in place of --ckpt: as --data")
    add("--ref", help=f"statistics: {', '.join(REFERENCES)}, an .npz of `fid.py ref`, ADM, "
        "MeanFlow, JiT or pytorch-fid, hf://USER/REPO/FILE.npz or https://...")
    add("--data", help="real images: prepared data, or (not for neighbours) a folder, .zip or "
        ".npz with arr_0; with --ref only for precision and recall")
    add("--num_images", type=int, help="images to score (None: 50000, or all of --images, or 1000 "
        "for neighbours); figures of fewer are worse")
    add("--features", default="inception", help="inception (FID), dinov2[:PATH] (FD-DINOv2), "
        "pixels, or encoder:CKPT of a ResNet-MAE (FD)")
    add("--inception", help="file of Inception's weights (None: downloaded)")
    add("--resize", choices=("tf1", "half"), help="for Inception, tf1: as ADM; half: as the paper "
        "(None: the reference's, tf1 for --data)")
    add("--out", help="what ref or neighbours write (None: ref.npz, neighbours.png)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.out = args.out or {"ref": "ref.npz"}.get(args.command, "neighbours.png")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    extractor = Extractor(args.features, args.resize, args.inception, args.device)
    {"ref": command_ref, "eval": command_eval, "neighbours": command_neighbours}[args.command](
        args, extractor)


if __name__ == "__main__":
    run_script(main)
