"""The drifting field and its loss: "Generative Modeling via Drifting" (arXiv 2602.04770).

A generator x = f(noise) maps noise to samples. Its samples move along a field
    V(x) = V+(x) - V-(x)    attraction to real samples minus repulsion from generated ones  (3.2)
and training chases the moved samples: loss = |x - stopgrad(x + V(x))|^2                    (3.3)
V is anti-symmetric in the two distributions, so when they match, V = 0 and nothing moves.

    symbol    variable              shape       meaning
    x         gen                   [B, G, C]   generated samples, their own negatives too
    y+        pos                   [B, P, C]   real samples of the same label
    y-        neg                   [B, U, C]   real samples of any label, weighted, for guidance
    w         weight_neg            [B, U]      (alpha - 1)(G - 1) / U; other targets have weight 1
    tau       temperatures          3 floats    kernel widths, in units of the mean distance
    k(x, y)   affinity(dist, tau)   [B, G, N]   kernel of each sample with its N = G + U + P targets
    A         A                     [B, G, N]   signed weight of target y for sample x:
    V         force(A, y)           [B, G, C]   V_i = sum_j A_ij (y_j - x_i), the field
    alpha     cfg_scale             [labels]    guidance scale; the generator is conditioned on it

A batch entry b is one label at one location of one feature map: samples are compared only with
the targets of their own entry. `drift_loss` implements the paper's field, `sinkhorn_loss` that
of W-Flow (arXiv 2605.11755). Both process the entries in chunks.

The 2-D experiments (5.1): `python drift.py`, or `python drift.py swiss_roll --field sinkhorn`.
"""
import argparse
import functools
import math
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw

TEMPERATURES = (0.02, 0.05, 0.2)  # A.6
KERNELS = ("both", "targets", "none")  # Table 11, see `affinity`
# Bytes of a chunk's pairs and targets: few enough for a CPU's cache, enough to keep a GPU busy.
CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 1 << 29}


# ---- The loss ------------------------------------------------------------------------------------

def drift_loss(gen, pos, neg=None, weight_neg=None, temperatures=TEMPERATURES, kernel="both",
               attraction=1.0, repulsion=1.0, reduce=None):
    """The drifting loss of one feature (3.2-3.4, A.6), computed in float32 (float64 stays).

    gen [B, G, C], pos [B, P, C], neg [B, U, C] with weight_neg [B, U].
    kernel: one of KERNELS, what exp(-d / tau) is normalised over (Table 11), see `affinity`.
    attraction, repulsion: multipliers of V+ and V- (Table 1). Unequal ones break the
    anti-symmetry, and training: FID 8.46 becomes 41 at attraction 1.5.
    reduce: for a batch that lies in several processes or micro-batches. reduce(name, sums) gets
    sums over this part as a float64 vector, and returns those over the whole batch; it is called
    twice, with the names "distance" and "force".

    Returns (loss [B], differentiable in gen; info, a dict of scalars: `scale`, the mean distance,
    and `force_TAU`, the mean squared force before normalisation, which the loss hides).
    """
    B, G, C = gen.shape
    P = pos.shape[1]
    assert (neg is None) == (weight_neg is None), "neg and weight_neg belong together"
    if neg is None:
        neg = gen[:, :0]
        weight_neg = gen.new_ones(B, 0)
    U = neg.shape[1]
    w = torch.cat([gen.new_ones(B, G), weight_neg, gen.new_ones(B, P)], 1)     # B N
    w = float32_at_least(w)
    # Filling, unlike copying numbers from the host, does not make a GPU wait.
    taus = torch.stack([w.new_full((1, 1), tau) for tau in temperatures])      # taus 1 1

    # Under bfloat16 autocast the softmax at tau = 0.02 would be noise.
    with torch.no_grad(), torch.autocast(gen.device.type, enabled=False):
        # 1. Distances, and one scale: their weighted mean over the whole batch. A scale for each
        #    label, or for each process, would train another loss.
        chunks, scale, unit = distances([gen, neg, pos], w, reduce)

        # 2. The field at each temperature, V_i = sum_jk A_ij A_ik (y_j - y_k) with j of pos and k
        #    of neg: a positive's weight is A_ij times the sum over negatives, and the reverse.
        fields = []
        for w_b in w.split([len(y) for y, _ in chunks]):
            y, dist = chunks.pop(0)  # frees their memory for the field
            d = dist.div_(scale.clamp_min(1e-3))
            d[:, :, :G].diagonal(dim1=1, dim2=2).add_(100)  # a sample does not repel itself
            A = affinity(d[:, None], taus, kernel)                             # b taus G N
            A_neg, A_pos = A.split([G + U, P], 3)                              # views of A
            # Weighted only now: inside the root of "both" w would act as sqrt(w).
            A_neg[..., G:].mul_(w_b[:, None, None, G:G + U])
            sum_neg = A_neg.sum(3, keepdim=True)
            sum_pos = A_pos.sum(3, keepdim=True)
            A_pos.mul_(attraction * sum_neg)
            A_neg.mul_(-repulsion * sum_pos)
            fields.append(force(A, y))                                         # b taus G C

        # 3. Each temperature's field gets unit mean square, again over the whole batch.
        V, mean_square = normalised_sum(fields, unit, reduce)                  # B G C
    info = {f"force_{tau}": value for tau, value in zip(temperatures, mean_square)}
    return chase(gen, V, unit), {"scale": scale, **info}


def sinkhorn_loss(gen, gen2, pos, uncond=None, cfg_scale=None, temperature=0.05, iterations=10,
                  reduce=None):
    """The loss of the Sinkhorn divergence's gradient flow (W-Flow, arXiv 2605.11755, section 4).

    gen, gen2 [B, G, C], pos [B, P, C], uncond [B, U, C], cfg_scale alpha [B]. gen2 is a second,
    independent batch of generated samples of the same labels and alphas. For a sample x_i,
        V_i = T(pos)_i - T(gen2)_i + (alpha - 1) (T(pos)_i - T(uncond)_i)
        T(Y)_i = sum_j Pi_ij y_j / sum_j Pi_ij,  Pi_ij = u_i K_ij v_j,  j of the M samples Y
        K_ij = exp(-|x_i - y_j|^2 / (2 eps)),  eps = R mean |x_i - t_j|^2, t of gen, gen2, pos
        u_i = 1 / (G sum_j K_ij v_j),  v_j = 1 / (M sum_i u_i K_ij),  `iterations` times from v = 1
    temperature: entropic regularisation R. Without unconditional samples alpha does nothing.
    reduce, and what is returned: see `drift_loss`; the scale is the root of the mean |x - t|^2.

    W-Flow's release normalises in each process and micro-batch (two labels), and averages over
    features. Here sums are those of the whole batch and losses add up: a step does not depend on
    how it is split, and --clip sees a larger gradient.
    """
    assert iterations >= 1
    B, G, C = gen.shape
    if uncond is None or uncond.shape[1] == 0:  # else alpha would multiply the attraction alone
        uncond = gen[:, :0]
        cfg_scale = gen.new_ones(B)
    samples = [gen, gen2, pos, uncond]
    sizes = [x.shape[1] for x in samples]
    w = torch.cat([gen.new_ones(B, sum(sizes[:3])), gen.new_zeros(B, sizes[3])], 1)

    with torch.no_grad(), torch.autocast(gen.device.type, enabled=False):
        # 1. Squared distances, and one scale for the whole batch, the root of their mean.
        chunks, scale, unit = distances(samples, w, reduce, power=2, keep=False)

        # 2. Transport plans to each kind of targets; `gen` itself has no weight.
        fields = []
        alphas = cfg_scale[:, None, None].split([len(squares) for _, squares in chunks])
        for y, alpha in zip(in_chunks(*samples), alphas):
            _, squares = chunks.pop(0)  # frees its memory for the field
            A = squares.div_(-2 * temperature * C * unit**2)                   # b G N
            own, *others = A.split(sizes, 2)
            own.zero_()
            for logits, factor in zip(others, (-1, alpha, 1 - alpha)):  # views of A
                logits.copy_(transport(logits, iterations)).mul_(factor)
            fields.append(force(A[:, None], y))                                # b 1 G C

        # 3. Unit mean square over the whole batch.
        V, mean_square = normalised_sum(fields, unit, reduce)                  # B G C
    return chase(gen, V, unit), {"scale": scale, f"force_{temperature}": mean_square[0]}


def chase(gen, V, unit):
    """|x - stopgrad(x + V)|^2 (3.3), the mean over coordinates in units of `unit`: [B].

    Its value is the mean of V^2, its gradient -2 V over the number of coordinates.
    """
    x = float32_at_least(gen)
    target = V.add_(x.detach())  # V is a constant here, so this one is too
    squares = (x - target).norm(dim=2).square()  # B G; by norm: no further copy
    return squares.mean(1) / (unit**2 * x.shape[2])


def affinity(dist, tau, kernel="both"):
    """Kernel k(x, y) [..., G, N] of distances [..., G, N] in units of their mean (A.6, Table 11).

    tau: a number, or a tensor that broadcasts. A new kernel is one more branch here, and its name
    in KERNELS: any A >= 0 that falls with distance, normalised or not. The floor does not scale.
    """
    logits = dist / -tau
    # The floor keeps forces on far samples alive: without it the gradient changes by 43%. Where a
    # kernel is below the floor it is constant, and pulls to all targets alike.
    floor = 1e-3
    assert kernel in KERNELS, kernel
    if kernel == "both":  # normalised over targets and over samples
        A = logits.softmax(-1).mul_(logits.softmax(-2))
        return A.clamp_min_(floor**2).sqrt_()  # a CPU takes long for roots of denormal numbers
    if kernel == "targets":
        A = logits.softmax(-1)
    elif kernel == "none":
        A = logits.exp()
    return A.clamp_min_(floor)


def distances(samples, w, reduce, power=1, keep=True):
    """Distances of generated samples from all targets to a power, 1 or 2, and their scale.

    samples: gen [B, G, C] and further targets, each [B, n, C]; w [B, N]: their weights in the
    mean. Returns chunks, a list of (targets [b, N, C], powers [b, G, N]); the scale, the mean over
    the whole batch as a distance; and the unit, in which coordinates are of order 1. keep=False
    drops the targets, half of the memory, where recomputing them is cheap.
    """
    _, G, C = samples[0].shape
    chunks = []
    sums = []
    for y in in_chunks(*samples):
        dist = squared_distances(y[:, :G], y)
        if power == 1:
            dist.sqrt_()
        chunks.append((y if keep else None, dist))
        sums.append(dist.sum(1))
    total = (torch.cat(sums) * w).sum(dtype=torch.float64)
    count = G * w.sum(dtype=torch.float64)
    totals = torch.stack([total, count])
    if reduce:
        totals = reduce("distance", totals)
    scale = (totals[0] / totals[1]).pow(1 / power).to(y.dtype)
    return chunks, scale, (scale / math.sqrt(C)).clamp_min(1e-3)


def in_chunks(gen, *others):
    """Samples of all kinds, each [B, n, C], in chunks of their entries [b, N, C].

    They are centred: distances do not change, and the Gram identity gains two digits.
    """
    B, G, C = gen.shape
    assert gen.is_floating_point() and all(len(x) == B for x in others), "floats, B entries each"
    N = G + sum(x.shape[1] for x in others)
    entry = 4 * (N * C + 3 * G * (N + C))
    size = max(1, CHUNK_BYTES.get(gen.device.type, 1 << 29) // entry)
    for parts in zip(*(x.split(size) for x in (gen, *others))):
        y = float32_at_least(torch.cat(parts, 1))
        yield y.sub_(y.mean(1, keepdim=True))


def float32_at_least(x):
    """x in float32; float64 stays, so that tests can ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squared_distances(x, y):
    """|x_i - y_j|^2 [B, G, N] of x [B, G, C] and y [B, N, C], by the Gram identity."""
    squares = x.norm(dim=2).square()[:, :, None] + y.norm(dim=2).square()[:, None]
    return squares.baddbmm_(x, y.mT, alpha=-2).clamp_min_(1e-8)


def force(A, y):
    """V_i = sum_j A_ij (y_j - x_i) [b, taus, G, C] of A [b, taus, G, N] and targets y [b, N, C].

    Also its sum of squares [taus], while it is in the cache. A is overwritten: x_i is target
    number i, so that one product with y does it all.
    """
    A[..., :A.shape[2]].diagonal(dim1=2, dim2=3).sub_(A.sum(3))
    V = (A.flatten(1, 2) @ y).unflatten(1, A.shape[1:3])
    return V, V.norm(dim=3).square_().sum((0, 2), dtype=torch.float64)  # by norm: no copy of V


def normalised_sum(fields, unit, reduce):
    """V [B, G, C], the sum over temperatures of fields that each have unit mean square.

    fields: a list of what `force` returns for each chunk, emptied on the way. Mean squares are
    over the whole batch and in units of `unit`, V is in those of the samples. Also returns the
    mean squares [taus] from before.
    """
    squares = sum(square for _, square in fields)                              # taus
    count = sum(V[:, 0].numel() for V, _ in fields)
    sums = torch.cat([squares, squares.new_full((1,), count)])
    if reduce:
        sums = reduce("force", sums)
    mean_square = (sums[:-1] / sums[-1]).to(unit.dtype) / unit**2              # taus
    factors = mean_square.clamp_min(1e-8).rsqrt()
    parts = []
    while fields:
        V, _ = fields.pop(0)
        parts.append((factors @ V.flatten(2)).unflatten(1, V.shape[2:]))
    return torch.cat(parts), mean_square


def transport(logits, iterations):
    """Entropic optimal transport [b, G, M] between uniform masses, each row divided by its sum.

    logits [b, G, M]: log K, the negative cost in units of the regularisation. A Sinkhorn iteration
    divides rows by their sums, then columns. The first runs in log space, after which no sum is
    small. The others only update factors, kept as row vectors (columns take 3 times as long on a
    CPU); the rows' factors cancel in the last division. Columns have mass 1, so rows have
    M / G: with any other mass factors would grow at each iteration, to NaN.
    """
    plan = logits.log_softmax(2).softmax(1)
    _, G, M = logits.shape
    columns = plan.new_ones(len(plan), 1, M)
    for _ in range(iterations - 1):
        rows = (columns @ plan.mT).reciprocal().mul_(M / G)                    # b 1 G
        columns = (rows @ plan).reciprocal()                                   # b 1 M
    row_sums = (columns @ plan.mT).mT                                          # b G 1
    return plan.mul_(columns).div_(row_sums)


# ---- A figure that shows progress, which normalisation hides in the loss and in the forces -------

def energy_distance(gen, pos):
    """How far generated samples are from real ones: 0 in expectation when they are distributed
    alike, whatever the loss says (Székely and Rizzo).

    gen [B, G, C], pos [B, P, C]. Per entry, E = 2 mean |x - y| - mean |x - x'| - mean |y - y'|
    over pairs of distinct samples. Returns the mean of E divided by that of mean |x - y|.
    """
    sums = energy_sums(gen, pos)
    return sums[0] / sums[1]


@torch.no_grad()
def energy_sums(gen, pos):
    """The sums over entries of E and of mean |x - y|: of several parts of a batch they add up."""
    G = gen.shape[1]
    P = pos.shape[1]
    total = 0  # over entries, of every pair's distance
    with torch.autocast(gen.device.type, enabled=False):
        for y in in_chunks(gen, pos):
            total = total + squared_distances(y, y).sqrt_().sum(0).double()    # G+P G+P
    total.diagonal().zero_()
    between = total[:G, G:].mean()
    within_gen = total[:G, :G].sum() / (G * max(1, G - 1))  # one sample has no pair: 0
    within_pos = total[G:, G:].sum() / (P * max(1, P - 1))
    return torch.stack([2 * between - within_gen - within_pos, between])


# ---- The loss over many features -----------------------------------------------------------------

def drifting(gen, gen2, pos, uncond, cfg_scale, **options):
    """`drift_loss` in the form of FIELDS."""
    G, U = gen.shape[1], uncond.shape[1]
    weight = ((cfg_scale - 1) * (G - 1) / U)[:, None].expand(-1, U)  # (A.7)
    return drift_loss(gen, pos, uncond, weight, **options)


# name: loss of (gen, gen2, pos, uncond, cfg_scale, reduce=..., options); gen2 may be None.
FIELDS = {"drifting": drifting, "sinkhorn": sinkhorn_loss}


def feature_loss(field, gen, gen2, pos, uncond, cfg_scale, reduce=None, **options):
    """Sum over features of the mean loss of a field, one of FIELDS (A.5).

    gen, gen2, pos, uncond: {name: [labels, samples, T, C]}; gen2 may be None; cfg_scale [labels].
    The T locations of a map become batch entries. reduce(feature, name, sums): see `drift_loss`.
    Returns (total loss, {feature: its loss and the info of the field, scalars}).
    """
    infos = {}
    for name, feature in gen.items():
        if reduce:
            options["reduce"] = functools.partial(reduce, name)
        second = entries_of(gen2[name]) if gen2 else None
        alpha = cfg_scale.repeat_interleave(feature.shape[2], 0)
        loss, info = FIELDS[field](entries_of(feature), second, entries_of(pos[name]),
                                   entries_of(uncond[name]), alpha, **options)
        infos[name] = {"loss": loss.mean(), **info}
    return sum(info["loss"] for info in infos.values()), infos


def entries_of(feature):
    """[labels, samples, T, C] -> [labels * T, samples, C]."""
    return feature.transpose(1, 2).flatten(0, 1)


# ---- Features ------------------------------------------------------------------------------------

def multi_scale_features(maps):
    """Features (a)-(d) of A.5 of each map: {name: [N, C, H, W]} -> {name: [N, T, C]}.

    `F` itself (T = H W), `F_mean` and `F_std` over the whole map (T = 1), and for s in 2, 4,
    where s divides H and W, `F_mean_s` and `F_std_s` over s x s patches (T = H W / s^2). On a map
    of 4 x 4 a patch of 4 is the whole map: such features are there twice (6 of the 20 of the
    digits' encoder, 4 of the release's 86). Statistics are float32, std = sqrt(biased variance +
    1e-6).
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


# ---- Guidance (A.7) and the queue of real samples (A.8) ------------------------------------------

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
        """n ids of one class, without replacement unless it has fewer; rng: numpy Generator."""
        queue = np.array(self.of_class[label])
        return rng.choice(queue, n, replace=n > len(queue))

    def draw_any(self, n, rng):
        """n ids of any class, without replacement unless there are fewer."""
        return rng.choice(np.array(self.of_any), n, replace=n > len(self.of_any))


# ---- The 2-D experiments (5.1): no encoder, the plane is the feature, and a small MLP generates --

def two_modes(n):
    sides = torch.randint(2, (n, 1)) * 3 - 1.5
    return F.pad(sides, (0, 1)) + 0.2 * torch.randn(n, 2)


def swiss_roll(n):
    angle = 1.5 * math.pi * (1 + 2 * torch.rand(n, 1).sqrt())  # denser outside
    roll = angle / (4.5 * math.pi) * 2 * torch.cat([angle.cos(), angle.sin()], 1)
    return roll + 0.04 * torch.randn(n, 2)


# name: where the generator's first samples lie, the target
EXPERIMENTS = {
    "two_modes_between": ((0.0, 0.0), two_modes),
    "two_modes_far": ((0.0, 6.0), two_modes),
    "two_modes_collapsed": ((-1.5, 0.0), two_modes),
    "swiss_roll": ((0.0, 0.0), swiss_roll),
}


def toy_experiment(experiment, steps=2000, n=256, seed=0, field="drifting"):
    """Train on one of EXPERIMENTS, with n generated against 4 n real points a step.

    Returns (samples [frames, 2048, 2], the energy distance at every frame).
    """
    start, target = EXPERIMENTS[experiment]
    torch.manual_seed(seed)
    nn = torch.nn
    generator = nn.Sequential(nn.Linear(10, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(),
                              nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 2))

    def noise(n):
        # Two normal numbers and eight coin tosses, like the style indices of the image
        # generator: coins let modes lie apart, without a bridge of samples between them.
        return torch.cat([torch.randn(n, 2), torch.randint(2, (n, 8)) * 2.0 - 1], 1)

    with torch.no_grad():  # the first samples are a small blob at the start
        generator[-1].weight.mul_(0.3 / generator(noise(n)).std(0).mean())
        generator[-1].bias.copy_(torch.tensor(start))
    optimizer = torch.optim.Adam(generator.parameters())
    # The widest temperature sees across the plane: samples that start far from their reals would
    # else feel only the floor of the affinities, which pulls to all sides alike.
    options = dict(temperatures=(0.05, 0.1, 0.2, 1.0)) if field == "drifting" else {}
    fixed_noise = noise(2048)
    frames = []
    distances = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 200) * (1 - step / steps)
        gen = generator(noise(n))[None]
        gen2 = generator(noise(n))[None].detach()
        pos = target(4 * n)[None]
        loss, _ = FIELDS[field](gen, gen2, pos, gen[:, :0], torch.ones(1), **options)
        if step % (steps // 48) == 0 or step == steps - 1:
            distances.append(energy_distance(gen, pos).item())
            frames.append(generator(fixed_noise).detach())
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return torch.stack(frames), distances


def draw_points(target, samples, title):
    """A picture: the target in grey, the samples in orange."""
    image = Image.new("RGB", (240, 240), "white")
    draw = ImageDraw.Draw(image)
    for points, colour in ((target, "#cccccc"), (samples, "#e66100")):
        for x, y in (points[:1500] * torch.tensor([45.0, -45.0]) + 120).tolist():
            draw.circle((x, y), 1, fill=colour)
    draw.text((4, 2), title, fill="black")
    return image.quantize(8)


def main():
    parser = argparse.ArgumentParser(description="The 2-D experiments (5.1).")
    parser.add_argument("experiment", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--field", choices=FIELDS, default="drifting", help="what moves samples")
    parser.add_argument("--out", default="runs/2d", help="folder for the GIFs")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.experiment:
        frames, distances = toy_experiment(name, field=args.field)
        target = EXPERIMENTS[name][1](2048)
        images = [draw_points(target, samples, f"energy distance {distance:.3f}")
                  for samples, distance in zip(frames, distances)]
        path = f"{args.out}/{name}.gif"
        images[0].save(path, save_all=True, append_images=images[1:], duration=80, loop=0)
        print(f"{path}: energy distance {distances[0]:.3f} -> {distances[-1]:.3f}")


if __name__ == "__main__":
    main()
