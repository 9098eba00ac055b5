"""The drifting field and its loss: "Generative Modeling via Drifting" (arXiv 2602.04770).

A generator x = f(noise) maps noise to samples. Its samples move along a field
    V(x) = V+(x) - V-(x)    attraction to real samples minus repulsion from generated ones  (3.2)
and training chases the moved samples: loss = |x - stopgrad(x + V(x))|^2                    (3.3)
V is anti-symmetric in the two distributions, so when they match, V = 0 and nothing moves.

    symbol    variable              shape       meaning
    x         gen                   [B, G, C]   generated samples, their own negatives too
    y+        pos                   [B, P, C]   real samples of the same label
    y-        neg                   [B, U, C]   real samples of any label: guidance, with a weight
    w         weight_neg            [B, U]      (alpha - 1)(G - 1) / U; other targets count as one
    tau       temperatures          3 floats    kernel widths, in units of the mean distance
    k(x, y)   affinity(dist, tau)   [B, G, N]   kernel: of each sample and its N = G + U + P targets
    A         what pull returns     [B, G, N]   what each target y does to each sample x:
    V         V at each tau         [B, G, C]   V_i = sum_j A_ij (y_j - x_i), the field;
                                                `force` is the sum over tau of normalised V
    alpha     cfg_scale             [labels]    guidance scale; the generator is conditioned on it

A batch entry b is one label at one location of one feature map: samples are compared with those
of the same label at the same location, and with no others. `drift_loss` is the paper's field,
`sinkhorn_loss` that of W-Flow (arXiv 2605.11755); what a field does not decide is `chase`.

The 2-D experiments (5.1): `python drift.py`, or `python drift.py swiss_roll --field sinkhorn`.
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
REPELLED_BY = ("independent", "own", "none")  # see `sinkhorn_loss`


# --------------------------------------------------------------------------------------------
# The loss

def drift_loss(gen, pos, neg=None, weight_neg=None, temperatures=TEMPERATURES, kernel="both",
               attraction=1.0, repulsion=1.0, reduce=None):
    """The drifting loss of one feature (3.2-3.4, A.6), computed in float32.

    gen [B, G, C], pos [B, P, C], neg [B, U, C] with weight_neg [B, U].
    kernel: one of KERNELS, what exp(-d / tau) is normalised over (Table 11), see `affinity`.
    attraction, repulsion: multipliers of V+ and V- (Table 1). Unequal ones break the
    anti-symmetry, and training: FID 8.46 becomes 41 at attraction 1.5.
    reduce, and what is returned: see `chase`.
    """
    B, G, C = gen.shape
    P = pos.shape[1]
    if neg is None:
        neg = gen[:, :0]
        weight_neg = gen.new_ones(B, 0)
    U = neg.shape[1]
    w = torch.cat([gen.new_ones(B, G), weight_neg, gen.new_ones(B, P)], 1)     # B N
    # Filling, unlike copying numbers from the host, does not make a GPU wait.
    taus = torch.stack([w.new_full((1, 1), tau) for tau in temperatures])      # taus 1 1

    def pull(dist, w, scale, unit):  # see `chase`, which calls it
        d = dist.div_(scale.clamp_min(1e-3))                                   # b G N
        d[:, :, :G].diagonal(dim1=1, dim2=2).add_(100)  # a sample does not repel itself
        A = affinity(d[:, None], taus, kernel)                                 # b taus G N
        A_neg, A_pos = A.split([G + U, P], 3)                                  # views of A
        # Weighted here: inside "both"'s root a weight would act as its root.
        A_neg[..., G:].mul_(w[:, None, None, G:G + U])
        # V_i = sum_jk A_ij A_ik (y_j - y_k), j of pos, k of neg: each gets the other side's sum.
        sum_neg = A_neg.sum(3, keepdim=True)
        sum_pos = A_pos.sum(3, keepdim=True)
        A_pos.mul_(attraction * sum_neg)
        A_neg.mul_(-repulsion * sum_pos)
        return A

    return chase(gen, [neg, pos], w, w, pull, temperatures, 1, reduce)


def sinkhorn_loss(gen, gen2, pos, uncond=None, cfg_scale=None, temperature=0.05, iterations=10,
                  repelled_by="independent", reduce=None):
    """The loss of the Sinkhorn divergence's gradient flow (W-Flow, arXiv 2605.11755, section 4).

    gen, gen2 [B, G, C], pos [B, P, C], uncond [B, U, C], cfg_scale alpha [B]. gen2 is a second,
    independent batch of generated samples of the same labels and alphas. For a sample x_i,
        V_i = T(pos)_i - T(gen2)_i + (alpha - 1) (T(pos)_i - T(uncond)_i)
        T(Y)_i = sum_j Pi_ij y_j / sum_j Pi_ij,  Pi_ij = u_i K_ij v_j,  j of the M samples Y
        K_ij = exp(-|x_i - y_j|^2 / (2 eps)),  eps = R mean |x_i - t_j|^2, t of gen, gen2, pos
        u_i = 1 / (G sum_j K_ij v_j),  v_j = 1 / (M sum_i u_i K_ij),  `iterations` times from v = 1
    temperature: entropic regularisation R. Without unconditional samples alpha does nothing.
    repelled_by: gen2 is replaced by gen without the sample itself ("own"), or by the sample alone
    ("none": V = T(pos) - x), to show what it is good for.
    reduce, and what is returned: see `chase`.

    W-Flow's release normalises in each process and micro-batch (two labels), and averages over
    features. Here sums are those of the whole batch and losses add up: a step does not depend on
    how it is split, and --clip sees a larger gradient.
    """
    B, G, C = gen.shape
    P = pos.shape[1]
    if repelled_by not in REPELLED_BY or iterations < 1:
        raise ValueError(f"repelled_by is '{repelled_by}': must be one of "
                         f"{', '.join(REPELLED_BY)}; iterations {iterations}: at least 1")
    if repelled_by != "independent":
        gen2 = gen[:, :0]
    if uncond is None:
        uncond = gen[:, :0]
    G2 = gen2.shape[1]
    U = uncond.shape[1]
    if U == 0:  # else alpha would multiply the attraction alone
        cfg_scale = gen.new_ones(B)
    # The scale is that of all targets but the unconditional ones.
    w = torch.cat([gen.new_ones(B, G + G2), gen.new_zeros(B, U), gen.new_ones(B, P)], 1)
    alpha = cfg_scale[:, None]
    factor = torch.cat([alpha.new_full((B, G + G2), -1), (1 - alpha).expand(-1, U),
                        alpha.expand(-1, P)], 1)                               # B N

    def pull(dist, factor, scale, unit):
        cost = dist.div_(2 * temperature * C * unit**2)                        # b G N
        own, *parts = cost.split([G, G2, U, P], 2)
        if repelled_by == "own":
            own.diagonal(dim1=1, dim2=2).add_(1e30)  # a sample is not its own target
            parts.append(own)
        else:
            own.zero_()
        for part in parts:
            part.copy_(transport(part, iterations))
        return cost.mul_(factor[:, None])[:, None]

    return chase(gen, [gen2, uncond, pos], w, factor, pull, [temperature], 2, reduce)


def chase(gen, others, w, factor, pull, temperatures, power, reduce=None):
    """The loss |x - stopgrad(x + V)|^2 of any field V_i = sum_j A_ij (y_j - x_i), in float32.

    gen [B, G, C]; others: further targets, each [B, n, C]; the N targets are gen's own samples
    and these, in this order. w [B, N]: their weights in the mean distance, which is the scale.
    power: 1 or 2; `dist` holds distances to this power, and the scale is the root of their mean.
    pull(dist [b, G, N], factor [b, N], scale, unit) -> A [b, temperatures, G, N] of some entries;
    it may overwrite dist. factor [B, N]: what it needs to know of each target. Coordinates divided
    by unit have order 1.
    temperatures: names of the fields that A holds, whose sum is V once each has unit mean square.
    reduce: for a batch that lies in several processes or micro-batches. reduce(name, sums) gets
    sums over this part as a float64 vector, and returns those over the whole batch; it is called
    twice, with the names "distance" and "force".

    Returns (loss [B], differentiable in gen; info of scalars: `scale`, and `force_TAU`, the mean
    squared force before it is normalised. Watch the latter: normalisation pins the loss itself).
    """
    B, G, C = gen.shape
    if any(len(x) != B for x in others):  # longer ones would pass unseen
        raise ValueError(f"gen has {B} entries, its targets {[len(x) for x in others]}")
    size = chunk_size(w.shape[1], G, C, gen.device)
    chunks = list(zip(*(x.split(size) for x in (w, factor, gen, *others))))

    # Under bfloat16 autocast the softmax at tau = 0.02 would be noise.
    with torch.no_grad(), torch.autocast(gen.device.type, enabled=False):
        # 1. Distances, and one scale: their weighted mean over the whole batch. A scale for
        #    each label, or for each process, would train another loss.
        targets = []
        sums = gen.new_zeros(2, dtype=torch.float64)
        for w_b, _, *samples in chunks:
            y = around_mean(samples)                                           # b N C
            dist = squared_distances(y[:, :G], y)                              # b G N
            if power == 1:
                dist.sqrt_()
            sums[0] += (dist.sum(1) * w_b).sum(dtype=torch.float64)
            sums[1] += G * w_b.sum(dtype=torch.float64)
            targets.append((dist, y))
        if reduce:
            sums = reduce("distance", sums)
        scale = (sums[0] / sums[1]).pow(1 / power).to(y.dtype)
        unit = (scale / math.sqrt(C)).clamp_min(1e-3)  # coordinates divided by it have order 1

        # 2. The field at each temperature. Fields take the memory of the targets that they used.
        fields = []
        squares = gen.new_zeros(len(temperatures), dtype=torch.float64)
        for _, factor_b, *_ in chunks:
            dist, y = targets.pop(0)
            A = pull(dist, factor_b, scale, unit)                              # b taus G N
            # sum_j A_ij (y_j - x_i) as one product with y: x_i is target number i.
            A[..., :G].diagonal(dim1=2, dim2=3).sub_(A.sum(3))
            V = (A.flatten(1, 2) @ y).unflatten(1, A.shape[1:3])               # b taus G C
            squares += V.norm(dim=3).square_().sum((0, 2), dtype=torch.float64)
            fields.append(V.flatten(2))

        # 3. Each temperature's field gets unit mean square, again over the whole batch, and they
        #    are added up.
        sums = torch.cat([squares, squares.new_full((1,), B * G * C)])
        if reduce:
            sums = reduce("force", sums)
        mean_square = (sums[:-1] / sums[-1]).to(y.dtype) / unit**2             # taus
        factors = mean_square.clamp_min(1e-8).rsqrt() / unit
        force = torch.cat([factors @ fields.pop(0) for _ in chunks])           # B G*C
        force = force.unflatten(1, (G, C))

    info = {f"force_{tau}": value for tau, value in zip(temperatures, mean_square)}
    return Chase.apply(gen, force, unit), {"scale": scale, **info}


class Chase(torch.autograd.Function):
    """The mean of |x - stopgrad(x + V)|^2 over coordinates, for x = gen / unit.

    Its value is mean V^2, its gradient in x is -2 V divided by the number of coordinates: neither
    a graph over the pairs nor a copy of x is kept.
    """

    @staticmethod
    def forward(ctx, gen, force, unit):
        ctx.save_for_backward(force.to(gen.dtype), unit)
        return force.norm(dim=2).square().sum(1) / force[0].numel()  # by norm: no copy of force

    @staticmethod
    def backward(ctx, grad_loss):
        force, unit = ctx.saved_tensors
        per_entry = -2 * grad_loss / (unit * force[0].numel())
        return (force * per_entry[:, None, None]).to(force.dtype), None, None


def affinity(dist, tau, kernel="both"):
    """Kernel k(x, y) [..., G, N] of distances [..., G, N] in units of their mean (A.6, Table 11).

    tau: a number, or a tensor that broadcasts. A new kernel is one more branch here, and its
    name in KERNELS: any A >= 0 that falls with distance, normalised or not.
    """
    logits = dist / -tau
    # The floor keeps far samples' forces alive: without it the gradient changes by 43%. Distances
    # are about 1: of a kernel that is below the floor there, only the floor's force is left.
    floor = 1e-3
    if kernel == "both":  # normalised over targets and over samples
        A = logits.softmax(-1).mul_(logits.softmax(-2))
        return A.clamp_min_(floor**2).sqrt_()  # a CPU takes long for roots of denormal numbers
    if kernel == "targets":
        A = logits.softmax(-1)
    elif kernel == "none":
        A = logits.exp()
    else:
        raise ValueError(f"kernel is '{kernel}': must be one of {', '.join(KERNELS)}")
    return A.clamp_min_(floor)


def transport(cost, iterations):
    """Entropic optimal transport [b, G, M] between uniform masses, each row divided by its sum.

    cost [b, G, M] in units of the regularisation. An iteration of Sinkhorn's divides rows by their
    sums, then columns. The first is made with logarithms, after which no sum is small. The others
    find factors only, as row vectors (on a CPU columns take thrice the time); those of the rows
    cancel in the last division. Columns have mass 1, so rows have M / G: were it another, factors
    would grow at each iteration, to NaN.
    """
    plan = cost.neg().log_softmax(2).softmax(1)
    _, G, M = cost.shape
    columns = plan.new_ones(len(plan), 1, M)
    for _ in range(iterations - 1):
        rows = (columns @ plan.mT).reciprocal().mul_(M / G)                    # b 1 G
        columns = (rows @ plan).reciprocal()                                   # b 1 M
    plan.mul_(columns)
    return plan.div_(plan.sum(2, keepdim=True))


def squared_distances(x, y):
    """|x_i - y_j|^2 [B, G, N] of x [B, G, C] and y [B, N, C], by the Gram identity."""
    squares = x.norm(dim=2).square()[:, :, None] + y.norm(dim=2).square()[:, None]
    return squares.baddbmm_(x, y.mT, alpha=-2).clamp_min_(1e-8)


def around_mean(samples):
    """Samples of all kinds, each [b, n, C], as one [b, N, C] around its mean, in float32 at least.

    Centring moves nothing, and the Gram identity then keeps two digits more.
    """
    y = float32_at_least(torch.cat(samples, 1))
    return y.sub_(y.mean(1, keepdim=True))


def float32_at_least(x):
    """x in float32; float64 stays, so that tests can ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# What a chunk's pairs and targets may take: they stay in a CPU's cache, and keep a GPU busy.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 29}


def chunk_size(N, G, C, device):
    """How many entries take about CHUNK_BYTES in `chase`."""
    entry = 4 * (N * C + 3 * G * (N + C))
    return max(1, CHUNK_BYTES.get(device.type, 1 << 29) // entry)


def drifting(gen, gen2, pos, uncond, cfg_scale, **options):
    """`drift_loss` in the form of FIELDS."""
    weight = unconditional_weight(cfg_scale, gen.shape[1], uncond.shape[1])
    return drift_loss(gen, pos, uncond, weight, **options)


# name: loss of (gen, gen2, pos, uncond, cfg_scale, reduce=..., options); gen2 may be None.
FIELDS = {"drifting": drifting, "sinkhorn": sinkhorn_loss}


def feature_loss(field, gen, gen2, pos, uncond, cfg_scale, reduce=None, **options):
    """Sum over features of the mean loss of a field, one of FIELDS (A.5).

    gen, gen2, pos, uncond: {name: [labels, samples, T, C]}; gen2 may be None; cfg_scale [labels].
    The T locations of a map become batch entries. reduce(feature, name, sums): see `chase`.
    Returns (total loss, losses {feature: scalar}, infos {feature: info}).
    """
    losses = {}
    infos = {}
    for name, feature in gen.items():
        if reduce:
            options["reduce"] = functools.partial(reduce, name)
        second = entries_of(gen2[name]) if gen2 else None
        alpha = cfg_scale.repeat_interleave(feature.shape[2], 0)
        loss, infos[name] = FIELDS[field](entries_of(feature), second, entries_of(pos[name]),
                                          entries_of(uncond[name]), alpha, **options)
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
        return F.pad(side, (0, 1)) + 0.2 * torch.randn(n, 2, generator=stream)
    if name == "checkerboard":
        row = (u[:, 0] * BOARD).floor()
        column = 2 * (u[:, 1] * BOARD / 2).floor() + row % 2  # row + column is even when dark
        return torch.stack([column, row], 1) - BOARD / 2 + torch.rand(n, 2, generator=stream)
    angle = 1.5 * math.pi * (1 + 2 * u[:, :1].sqrt())  # denser outside, where a turn is longer
    roll = angle / (4.5 * math.pi) * 2 * torch.cat([angle.cos(), angle.sin()], 1)
    return roll + 0.04 * torch.randn(n, 2, generator=stream)


def describe(name, x):
    """What a reader of the picture would count: {text: share} for samples x [n, 2]."""
    if name == "two_modes":
        left, right = (x - torch.tensor([[[-1.5, 0.0]], [[1.5, 0.0]]])).norm(dim=2) < 1
        return {"left": left.float().mean().item(), "right": right.float().mean().item()}
    if name == "checkerboard":
        square = (x + BOARD / 2).floor().long()  # column, row
        on_board = ((square >= 0) & (square < BOARD)).all(1)
        dark = on_board & (square.sum(1) % 2 == 0)
        number = square[dark] @ torch.tensor([1, BOARD])
        count = number.bincount(minlength=BOARD**2).view(BOARD, BOARD)
        emptiest = torch.cat([count[::2, ::2], count[1::2, 1::2]]).min()
        return {"in dark squares": dark.float().mean().item(),
                "emptiest of them": emptiest.item() / len(x)}
    target = draw_target(name, 20_000, torch.Generator().manual_seed(1))
    nearest = torch.cdist(x, target).min(1).values
    return {"within 0.1 of the roll": (nearest < 0.1).float().mean().item()}


def toy_experiment(experiment, steps, n=256, real=1024, seed=0, field="drifting"):
    """Train on one entry of EXPERIMENTS: n generated against `real` real points a step.

    Returns (samples [frames, 2048, 2], mean squared force of every frame, at the last temperature).
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
    options = {}
    if field == "drifting":
        # The widest temperature sees across the plane: without it samples that start far from
        # their reals would feel only the floor of the affinities, which pulls to all sides alike.
        options = dict(temperatures=(0.05, 0.1, 0.2, 1.0))
    fixed_noise = noise(2048)
    stream = torch.Generator().manual_seed(seed)
    frames = []
    forces = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 200) * (1 - step / steps)
        gen = generator(noise(n))[None]
        with torch.no_grad():  # drawn for all fields alike
            gen2 = generator(noise(n))[None]
        pos = draw_target(target, real, stream)[None]
        loss, info = FIELDS[field](gen, gen2, pos, gen[:, :0], torch.ones(1), **options)
        if step % (steps // 48) == 0 or step == steps - 1:
            forces.append(list(info.values())[-1].item())
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
    durations = [80] * len(images[1:]) + [2000]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def main():
    parser = argparse.ArgumentParser(description="The 2-D experiment (5.1).", allow_abbrev=False)
    parser.add_argument("experiment", nargs="*", default=list(EXPERIMENTS),
                        help=f"some of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--field", choices=FIELDS, default="drifting", help="what moves samples")
    parser.add_argument("--out", default="runs/2d", help="folder for the GIFs")
    args = parser.parse_args()
    for name in args.experiment:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name}: see --help")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.experiment:
        began = time.time()
        frames, forces = toy_experiment(name, field=args.field, **EXPERIMENTS[name][2])
        shares = describe(EXPERIMENTS[name][1], frames[-1])
        path = f"{args.out}/{name}.gif"
        save_animation(name, frames, forces, path)
        print(f"{name}: {', '.join(f'{text} {share:.1%}' for text, share in shares.items())}; "
              f"mean squared force {forces[0]:.2g} -> {forces[-1]:.2g}; "
              f"{time.time() - began:.0f} s; {path}")


if __name__ == "__main__":
    main()
