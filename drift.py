"""The drifting field and its loss: "Generative Modeling via Drifting" (arXiv 2602.04770).

A generator x = f(noise) maps noise to samples. Its samples move along a field
    V(x) = V+(x) - V-(x)    attraction to real samples minus repulsion from generated ones  (3.2)
and training chases the moved samples: loss = |x - stopgrad(x + V(x))|^2                    (3.3)
V is anti-symmetric in the two distributions, so when they match, V = 0 and nothing moves.

    symbol    variable              shape       meaning
    x         gen                   [B, G, C]   generated samples, their own negatives too
    y+        pos                   [B, P, C]   real samples of the same label
    y-        neg                   [B, U, C]   real samples of any label: guidance, with a weight
    w         weight_neg            [B, U]      (alpha - 1)(G - 1) / U
    V         force                 [B, G, C]   the drifting field
    tau       temperatures          3 floats    kernel widths, in units of the mean distance
    k(x, y)   affinity(dist, tau)   [B, G, N]   N = G + U + P targets of each generated sample
    alpha     cfg_scale             [labels]    guidance scale; the generator is conditioned on it

A batch entry b is one label at one location of one feature map: samples are compared with those
of the same label at the same location, and with no others. Run this file for the paper's 2-D
experiment (5.1): `python drift.py`, or one target: `python drift.py swiss_roll`.
"""
import argparse
import functools
import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

TEMPERATURES = (0.02, 0.05, 0.2)  # A.6
KERNELS = ("both", "targets", "none")  # Table 11, see `affinity`


# --------------------------------------------------------------------------------------------
# The loss

def drift_loss(gen, pos, neg=None, weight_neg=None, temperatures=TEMPERATURES, kernel="both",
               attraction=1.0, repulsion=1.0, reduce=None):
    """The drifting loss of one feature (3.2-3.4, A.6), computed in float32.

    gen [B, G, C], pos [B, P, C], neg [B, U, C] with weight_neg [B, U].
    kernel: what affinities are normalised over, one of KERNELS (Table 11).
    attraction, repulsion: multipliers of V+ and V- (Table 1). Unequal ones break the
    anti-symmetry, and training: FID 8.46 becomes 41 at attraction 1.5.
    reduce: for a batch that lies in several processes or micro-batches. reduce(name, sums) gets
    sums over this part as a float64 vector, and returns those over the whole batch; it is called
    twice, with the names "distance" and "force".

    Returns (loss [B], differentiable in gen; info of scalars: `scale`, and `force_TAU`, the mean
    squared force before it is normalised. Watch the latter: normalisation pins the loss itself).
    Raises ValueError for shapes that do not fit together.
    """
    if neg is None:
        neg = gen[:, :0]
        weight_neg = gen.new_ones(neg.shape[:2])
    B, G, C = gen.shape
    U, P = neg.shape[1], pos.shape[1]
    if pos.shape != (B, P, C) or neg.shape != (B, U, C) or weight_neg.shape != (B, U):
        raise ValueError(f"drift_loss: gen {list(gen.shape)}, pos {list(pos.shape)}, neg "
                         f"{list(neg.shape)}, weight_neg {list(weight_neg.shape)} must be "
                         "[B, G, C], [B, P, C], [B, U, C], [B, U]")
    if reduce is None:
        reduce = this_batch_alone
    w = torch.cat([gen.new_ones(B, G), weight_neg, gen.new_ones(B, P)], 1)     # B N
    chunks = chunks_of_entries(B, G + U + P, G, C, gen.device)

    # Under bfloat16 autocast the softmax at tau = 0.02 would be noise.
    with torch.no_grad(), torch.autocast(gen.device.type, enabled=False):
        # 1. Distances, and one scale: their weighted mean over the whole batch. A scale for
        #    each label, or for each process, would train another loss.
        dist = []
        sums = gen.new_zeros(2, dtype=torch.float64)
        for b in chunks:
            y = all_targets(gen[b], neg[b], pos[b])                            # b N C
            d = pairwise_distance(y[:, :G], y)                                 # b G N
            sums[0] += (d.sum(1) * w[b]).sum(dtype=torch.float64)
            sums[1] += G * w[b].sum(dtype=torch.float64)
            dist.append(d)
        total, count = reduce("distance", sums)
        scale = (total / count).to(y.dtype)
        unit = (scale / math.sqrt(C)).clamp_min(1e-3)  # then coordinates have order 1

        # 2. The field at each temperature, in units of that scale. Filling, unlike copying
        #    numbers from the host, does not make a GPU wait.
        taus = torch.stack([y.new_full((1, 1), tau) for tau in temperatures])  # taus 1 1
        V = y.new_empty(B, len(temperatures), G, C)
        for b, d in zip(chunks, dist):
            y = all_targets(gen[b], neg[b], pos[b]).div_(unit)                 # b N C
            d = d.div_(scale.clamp_min(1e-3))                                  # b G N
            d[:, :, :G].diagonal(dim1=1, dim2=2).add_(100)  # a sample does not repel itself
            A = affinity(d[:, None], taus, kernel)                             # b taus G N
            A.mul_(w[b, None, None])  # inside the softmaxes a weight would act as its root
            A_neg, A_pos = A.split([G + U, P], 3)                              # views of A
            sum_neg = A_neg.sum(3, keepdim=True)
            sum_pos = A_pos.sum(3, keepdim=True)
            A_pos.mul_(attraction * sum_neg)
            A_neg.mul_(-repulsion * sum_pos)
            # Now V_i = sum_j A_ij (y_j - x_i), and x_i is target number i.
            A[..., :G].diagonal(dim1=2, dim2=3).sub_(A.sum(3))
            V[b] = torch.einsum("btgn,bnc->btgc", A, y)

        # 3. Each temperature's field gets unit mean square, again over the whole batch.
        sums = gen.new_full((len(temperatures) + 1,), B * G * C, dtype=torch.float64)
        sums[:-1] = V.norm(dim=3).square_().sum((0, 2), dtype=torch.float64)
        sums = reduce("force", sums)
        mean_square = (sums[:-1] / sums[-1]).to(y.dtype)                       # taus
        force = mean_square.clamp_min(1e-8).rsqrt() @ V.flatten(2)             # B G*C
        force = force.unflatten(1, (G, C))

    info = {"scale": scale}
    for tau, value in zip(temperatures, mean_square):
        info[f"force_{tau}"] = value
    return Chase.apply(gen, force, unit), info


class Chase(torch.autograd.Function):
    """|x - stopgrad(x + V)|^2 for x = gen / unit: its value is mean V^2, its gradient -2 V.

    So no graph over the pairs is kept, and no copy of x.
    """

    @staticmethod
    def forward(ctx, gen, force, unit):
        ctx.save_for_backward(force.to(gen.dtype), unit)
        return force.square().mean((1, 2))

    @staticmethod
    def backward(ctx, grad_loss):
        force, unit = ctx.saved_tensors
        per_entry = -2 * grad_loss / (unit * force[0].numel())
        return (force * per_entry[:, None, None]).to(force.dtype), None, None


def affinity(dist, tau, kernel="both"):
    """Kernel k(x, y) [..., G, N] of distances [..., G, N] in units of their mean (A.6, Table 11).

    tau: a number, or a tensor that broadcasts. A new kernel is one more branch here, and its
    name in KERNELS.
    """
    logits = dist / -tau
    if kernel == "both":  # normalised over targets and over samples
        A = logits.softmax(-1).mul_(logits.softmax(-2)).sqrt_()
    elif kernel == "targets":
        A = logits.softmax(-1)
    elif kernel == "none":
        A = logits.exp()
    else:
        raise ValueError(f"kernel is '{kernel}': must be one of {', '.join(KERNELS)}")
    # The floor keeps far samples' forces alive: without it the gradient changes by 43%.
    return A.clamp_min_(1e-3)


def pairwise_distance(x, y):
    """Euclidean distances [B, G, N] of x [B, G, C] and y [B, N, C], by the Gram identity."""
    square = x.norm(dim=2).square()[:, :, None] + y.norm(dim=2).square()[:, None]
    return square.baddbmm_(x, y.transpose(1, 2), alpha=-2).clamp_min_(1e-8).sqrt_()


def all_targets(gen, neg, pos):
    """Generated, negative and positive samples as one float32 tensor [B, N, C] around its mean.

    Centring moves nothing, and the Gram identity then keeps two digits more.
    """
    y = float32_at_least(torch.cat([gen, neg, pos], 1))
    return y.sub_(y.mean(1, keepdim=True))


# What a chunk's pairs and targets may take: they stay in a CPU's cache, and keep a GPU busy.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 29}


def chunks_of_entries(B, N, G, C, device):
    """Slices of the B entries, each of which takes about CHUNK_BYTES in `drift_loss`."""
    entry = 4 * (N * C + 3 * G * (N + C))
    size = max(1, CHUNK_BYTES.get(device.type, 1 << 29) // entry)
    return [slice(at, at + size) for at in range(0, B, size)]


def this_batch_alone(name, sums):
    """`reduce` of `drift_loss` where one process holds the whole batch."""
    return sums


def float32_at_least(x):
    """x in float32; float64 stays, so that tests can ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def feature_drift_loss(gen, pos, neg=None, weight_neg=None, reduce=None, **options):
    """Sum over features of the mean drifting loss (A.5).

    gen, pos, neg: {name: [labels, samples, T, C]}; weight_neg [labels, U]. The T locations of a
    map become batch entries. reduce(feature, name, sums) and the other options: see `drift_loss`.
    Returns (total loss, losses {feature: scalar}, infos {feature: info}).
    """
    losses = {}
    infos = {}
    for name in gen:
        options["reduce"] = None if reduce is None else functools.partial(reduce, name)
        features = [entries_of(gen[name]), entries_of(pos[name])]
        if neg is not None:
            weights = weight_neg.repeat_interleave(neg[name].shape[2], 0)
            features += [entries_of(neg[name]), weights]
        loss, infos[name] = drift_loss(*features, **options)
        losses[name] = loss.mean()
    return sum(losses.values()), losses, infos


def entries_of(feature):
    """[labels, samples, T, C] -> [labels * T, samples, C]."""
    return feature.transpose(1, 2).flatten(0, 1)



# --------------------------------------------------------------------------------------------
# Features

def multi_scale_features(maps):
    """Features (a)-(d) of A.5 of each map: {name: [N, C, H, W]} -> {name: [N, T, C]}.

    `F` itself (T = H W), `F_mean` and `F_std` over the whole map (T = 1), and for s in 2, 4,
    where s divides H and W, `F_mean_s` and `F_std_s` over s x s patches (T = H W / s^2).
    Statistics are float32, std = sqrt(biased variance + 1e-6).
    """
    features = {}
    for name, x in maps.items():
        H, W = x.shape[2:]
        features[name] = rearrange(x, "n c h w -> n (h w) c")
        # Each scale comes from the one before, so that the map is read once: the variance of a
        # patch is the mean variance of its parts plus the variance of their means.
        mean = float32_at_least(x)
        variance = torch.zeros_like(mean)
        for size, suffix in ((2, "_2"), (4, "_4"), (None, "")):
            if size and (H % size or W % size):
                continue
            h, w = (2, 2) if size else mean.shape[2:]
            parts = rearrange(mean, "n c (y h) (x w) -> n c y h x w", h=h, w=w)
            mean = F.avg_pool2d(mean, (h, w))                                  # n c y x
            deviation = parts - mean[:, :, :, None, :, None]
            square = rearrange(deviation.square(), "n c y h x w -> n c (y h) (x w)")
            variance = F.avg_pool2d(variance + square, (h, w))                 # n c y x
            std = (variance + 1e-6).sqrt()
            features[f"{name}_mean{suffix}"] = rearrange(mean, "n c y x -> n (y x) c")
            features[f"{name}_std{suffix}"] = rearrange(std, "n c y x -> n (y x) c")
    return features


# --------------------------------------------------------------------------------------------
# Guidance (A.7) and the queue of real samples (A.8)

def sample_alpha(n, power, fixed_share, rng):
    """n guidance scales in [1, 4] with density ~ alpha^-power; a share of them is 1 (A.7).

    rng: numpy Generator. Returns a float32 array [n].
    """
    u, fixed = rng.random((2, n))
    if power == 1:
        alpha = 4.0**u  # inverse of the cumulative distribution
    else:
        alpha = (1 + u * (4.0 ** (1 - power) - 1)) ** (1 / (1 - power))
    alpha[fixed < fixed_share] = 1
    return alpha.astype(np.float32)


def unconditional_weight(alpha, G, U):
    """Weight [n, U] of each of U unconditional negatives: (alpha - 1)(G - 1) / U (A.7)."""
    return ((alpha - 1) * (G - 1) / U)[:, None].expand(-1, U)


class SampleQueue:
    """Ids of the latest real samples: `per_class` of each class, `overall` of any class (A.8).

    `draw` and `draw_any` are those of `prepare_data.Dataset`, which draws from all samples.
    """

    def __init__(self, num_classes, per_class=128, overall=1000):
        self.per_class = per_class
        self.overall = overall
        self.of_class = [deque(maxlen=per_class) for _ in range(num_classes)]
        self.of_any = deque(maxlen=overall)

    def push(self, ids, labels):
        """ids [n], labels [n]: the newest take the places of the oldest."""
        for sample, label in zip(ids.tolist(), labels.tolist()):
            self.of_class[label].append(sample)
        self.of_any.extend(ids.tolist())

    def draw(self, label, n, rng):
        """n ids of one class, without replacement; rng: numpy Generator."""
        return rng.choice(np.array(self.of_class[label]), n, replace=False)

    def draw_any(self, n, rng):
        """n ids of any class, without replacement."""
        return rng.choice(np.array(self.of_any), n, replace=False)


# --------------------------------------------------------------------------------------------
# The 2-D experiment (5.1): no encoder, the plane is the feature, and a small MLP generates

BOARD = 4  # the checkerboard has BOARD x BOARD squares of side 1 around the origin

# name: where the generator's first samples lie, the target, options of toy_experiment
EXPERIMENTS = {
    "two_modes_between": ((0.0, 0.0), "two_modes", dict(steps=1500, n=128, real=256)),
    "two_modes_far": ((0.0, 6.0), "two_modes", dict(steps=1500, n=128, real=256)),
    "two_modes_collapsed": ((-1.5, 0.0), "two_modes", dict(steps=1500, n=128, real=256)),
    "checkerboard": ((0.0, 0.0), "checkerboard", dict(steps=5000)),
    "swiss_roll": ((0.0, 0.0), "swiss_roll", dict(steps=3000)),
}


def draw_target(name, n, stream):
    """n points [n, 2] of a target: two_modes at x = -1.5 and 1.5, checkerboard, swiss_roll."""
    u = torch.rand(n, 3, generator=stream)
    if name == "two_modes":
        side = torch.where(u[:, :1] < 0.5, -1.5, 1.5)
        noise = 0.2 * torch.randn(n, 2, generator=stream)
        return torch.cat([side, torch.zeros(n, 1)], 1) + noise
    if name == "checkerboard":
        row = (u[:, 0] * BOARD).floor()
        column = 2 * (u[:, 1] * BOARD / 2).floor() + row % 2  # row + column is even when dark
        corner = torch.stack([column, row], 1) - BOARD / 2
        return corner + torch.rand(n, 2, generator=stream)
    angle = 1.5 * math.pi * (1 + 2 * u[:, :1].sqrt())  # denser outside, where a turn is longer
    roll = angle / (4.5 * math.pi) * 2 * torch.cat([angle.cos(), angle.sin()], 1)
    return roll + 0.04 * torch.randn(n, 2, generator=stream)


def describe(name, x):
    """What a reader of the picture would count: {text: share} for samples x [n, 2]."""
    if name == "two_modes":
        left, right = (x - torch.tensor([[[-1.5, 0.0]], [[1.5, 0.0]]])).norm(dim=2) < 1
        return {"left": left.float().mean().item(), "right": right.float().mean().item()}
    if name == "checkerboard":
        column, row = (x + BOARD / 2).floor().long().T
        on_board = (column >= 0) & (column < BOARD) & (row >= 0) & (row < BOARD)
        dark = on_board & ((column + row) % 2 == 0)
        count = (row * BOARD + column)[dark].bincount(minlength=BOARD**2).view(BOARD, BOARD)
        squares = [count[i, j].item() for i in range(BOARD) for j in range(i % 2, BOARD, 2)]
        return {"in dark squares": dark.float().mean().item(),
                "emptiest of them": min(squares) / len(x)}
    target = draw_target(name, 20_000, torch.Generator().manual_seed(1))
    nearest = torch.cdist(x, target).min(1).values
    return {"within 0.1 of the roll": (nearest < 0.1).float().mean().item()}


def toy_experiment(experiment, steps, n=256, real=1024, lr=1e-3, seed=0,
                   temperatures=(0.05, 0.1, 0.2, 1.0)):
    """Train on one entry of EXPERIMENTS: n generated against `real` real points a step.

    Returns (samples [frames, 2048, 2], mean squared force at tau = 0.2 of every frame).
    The widest temperature sees across the plane. Without it, samples that start as one blob far
    from their reals would feel only the floor of the affinities, which pulls to all sides alike.
    """
    start, target, _ = EXPERIMENTS[experiment]
    torch.manual_seed(seed)
    layers = []
    for width in (10, 256, 256):
        layers += [torch.nn.Linear(width, 256), torch.nn.SiLU()]
    generator = torch.nn.Sequential(*layers, torch.nn.Linear(256, 2))

    def noise(n):
        # Two normal numbers and eight coin tosses, like the style indices of the image
        # generator: coins let modes lie apart, without a bridge of samples between them.
        return torch.cat([torch.randn(n, 2), torch.randint(2, (n, 8)) * 2.0 - 1], 1)

    with torch.no_grad():  # the first samples are a small blob at the start
        generator[-1].weight.mul_(0.3 / generator(noise(n)).std(0).mean())
        generator[-1].bias.copy_(torch.tensor(start))
    optimizer = torch.optim.Adam(generator.parameters())
    fixed_noise = noise(2048)
    stream = torch.Generator().manual_seed(seed)
    frames = []
    forces = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * (1 - step / steps)
        gen = generator(noise(n))[None]
        pos = draw_target(target, real, stream)[None]
        loss, info = drift_loss(gen, pos, temperatures=temperatures)
        if step % (steps // 48) == 0 or step == steps - 1:
            forces.append(info["force_0.2"].item())
            with torch.no_grad():
                frames.append(generator(fixed_noise))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return torch.stack(frames), forces


def save_animation(experiment, frames, forces, path, size=240):
    """GIF: the target in grey, the samples in orange, the mean squared force as a number."""
    from PIL import Image, ImageDraw
    target = draw_target(EXPERIMENTS[experiment][1], 2048, torch.Generator().manual_seed(2))
    reach = max(target.abs().max().item(), 2.4) * 1.1
    images = []
    for samples, force in zip(frames, forces):
        image = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(image)
        for points, colour in ((target, "#cccccc"), (samples[:1024], "#e66100")):
            pixels = points * torch.tensor([1.0, -1.0]) / reach * size / 2 + size / 2
            for x, y in pixels.tolist():
                draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)
        draw.text((4, 2), f"mean squared force {force:.1e}", fill="black")
        images.append(image.quantize(8))
    durations = [80] * (len(images) - 1) + [2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def main():
    parser = argparse.ArgumentParser(description="The 2-D experiment (5.1).", allow_abbrev=False)
    parser.add_argument("experiment", nargs="*", default=list(EXPERIMENTS),
                        help=f"some of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--out", default="runs/2d", help="folder for the GIFs")
    args = parser.parse_args()
    for name in args.experiment:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name}: choose from {', '.join(EXPERIMENTS)}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.experiment:
        began = time.time()
        frames, forces = toy_experiment(name, **EXPERIMENTS[name][2])
        shares = describe(EXPERIMENTS[name][1], frames[-1])
        path = f"{args.out}/{name}.gif"
        save_animation(name, frames, forces, path)
        print(f"{name}: {', '.join(f'{text} {share:.1%}' for text, share in shares.items())}; "
              f"mean squared force {forces[0]:.2g} -> {forces[-1]:.2g}; "
              f"{time.time() - began:.0f} s; {path}")


if __name__ == "__main__":
    main()
