"""The drifting field and its loss: "Generative Modeling via Drifting" (arXiv 2602.04770), from equation to line.

A generator x = f(noise) maps noise to samples. Its samples move along a field
    V(x) = V+(x) - V-(x)        attraction to real samples minus repulsion from generated ones          (sec. 3.2)
and training chases the moved samples: loss = |x - stopgrad(x + V(x))|^2                                (sec. 3.3)
V is anti-symmetric in the two distributions, so when they match, V = 0 and nothing moves.

    symbol    variable              shape       meaning
    x         gen                   [B, G, C]   generated samples of one label (they are their own negatives)
    y+        pos                   [B, P, C]   real samples of that label
    y-        neg                   [B, U, C]   real samples of any label: guidance, weighted by weight_neg [B, U]
    V         force                 [B, G, C]   the drifting field, for one temperature
    tau       temperatures          3 floats    kernel widths, in units of the mean distance
    k(x, y)   exp(-dist / tau)      [B, G, N]   N = G + U + P targets of each generated sample
    alpha     cfg_scale             [labels]    guidance scale; the generator is conditioned on it

A batch entry b is one label at one location of one feature map; every sum over samples stays inside its entry.
All is computed in chunks, for speed and memory; tests/reference.py has the same loss in twenty plain lines.
Run this file for the paper's 2-D experiment (sec. 5.1): `python drift.py`, or one target: `python drift.py swiss_roll`.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

TEMPERATURES = (0.02, 0.05, 0.2)  # A.6


# ------------------------------------------------------------------------------------------------------------------
# The loss

def drift_loss(gen, pos, neg=None, weight_neg=None, **options):
    """The drifting loss of one feature (sec. 3.2-3.4, A.6): value |V|^2, gradient -2 V / numel, nothing through V.

    gen [B, G, C], pos [B, P, C], neg [B, U, C] with weight_neg [B, U]; computed in float32 at least.
    options: those of `drifting_field`.
    Returns (loss [B], differentiable in gen; info of scalars: `scale`, and `force_TAU`, the mean squared force before
    it is normalised. Watch the latter: the loss itself is pinned near its start by that normalisation).
    Raises ValueError on shapes that do not fit together.
    """
    if neg is None:
        neg, weight_neg = gen[:, :0], gen.new_ones(len(gen), 0)
    if gen.shape[::2] != pos.shape[::2] or gen.shape[::2] != neg.shape[::2] or weight_neg.shape != neg.shape[:2]:
        raise ValueError(f"drift_loss: gen {list(gen.shape)}, pos {list(pos.shape)}, neg {list(neg.shape)}, weight_neg "
                         f"{list(weight_neg.shape)} must be [B, G, C], [B, P, C], [B, U, C], [B, U]")
    loss, info = _loss_of_alike([gen[:, :, None]], [pos[:, :, None]], [neg[:, :, None]], weight_neg, **options)
    return loss[0], {name: value[0] for name, value in info.items()}


def feature_drift_loss(gen, pos, neg=None, weight_neg=None, **options):
    """Sum over features of the mean drifting loss (A.5); the locations of a map are batch entries of their own.

    gen, pos, neg: {name: [labels, samples, T, C]}; weight_neg [labels, U]; options: those of `drifting_field`.
    Returns (total loss, losses {name: scalar}, infos {name: info}).
    """
    if neg is None:
        neg = {name: x[:, :0] for name, x in gen.items()}
        weight_neg = next(iter(gen.values()))[:, :0, 0, 0]
    alike = {}  # features of one shape are computed together: the sixty small ones would be lost time one by one
    for name, x in gen.items():
        alike.setdefault((x.shape, x.dtype), []).append(name)
    losses, infos = {}, {}
    for names in alike.values():
        loss, info = _loss_of_alike(*([features[name] for name in names] for features in (gen, pos, neg)), weight_neg, **options)
        losses.update({name: x.mean() for name, x in zip(names, loss)})
        infos.update({name: {key: value[i] for key, value in info.items()} for i, name in enumerate(names)})
    return sum(losses.values()), {name: losses[name] for name in gen}, {name: infos[name] for name in gen}


def _loss_of_alike(gen, pos, neg, weight_neg, **options):
    """Lists of features of one shape [labels, samples, T, C] -> list of losses [labels * T], info of vectors [features]."""
    with torch.no_grad(), torch.autocast(gen[0].device.type, enabled=False):  # in bf16 the softmax at tau = 0.02 is noise
        force, unit, info = drifting_field(gen, pos, neg, weight_neg, **options)                 # f b G C, [features]
        value = torch.linalg.vector_norm(force, dim=3).square_().mean(2).div_(force.shape[3])    # f b
        to_grad = -2 / (unit * force[0, 0].numel())
        force = force.to(gen[0].dtype)  # the gradient's, which waits for the backward pass
    return [_ValueAndGradient.apply(*x) for x in zip(gen, value, force, to_grad)], info


class _ValueAndGradient(torch.autograd.Function):
    """The identity that hands autograd a loss already computed and its closed-form gradient: no graph over the pairs."""

    @staticmethod
    def forward(ctx, gen, value, force, to_grad):
        labels, _, T, _ = gen.shape
        ctx.save_for_backward(force.unflatten(0, (labels, T)).transpose(1, 2), to_grad)          # of gen's shape
        ctx.dtype = gen.dtype
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value):
        force, to_grad = ctx.saved_tensors
        out = torch.empty(force.shape, dtype=ctx.dtype, device=force.device)                     # in gen's order
        return torch.mul(force, (grad_value * to_grad).view(len(force), 1, -1, 1), out=out), None, None, None


# ------------------------------------------------------------------------------------------------------------------
# The field

# What a chunk's targets, coefficients and forces take: on a CPU they stay in its cache, on a GPU they keep it busy.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 29}


def drifting_field(gen, pos, neg, weight_neg, temperatures=TEMPERATURES, kernel="both", attraction=1.0, repulsion=1.0,
                   reduce=None):
    """V of sec. 3.2 summed over the temperatures (A.6), for features scaled to a mean distance of 1. Float32, no autograd.

    gen, pos, neg: lists of f features of one shape, [labels, G or P or U, T, C]; weight_neg [labels, U].
    kernel       what the affinities are normalised over (Table 11): "both" axes (the method), "targets" only, or "none"
    attraction,  multipliers of V+ and V- (Table 1). Unequal ones break the anti-symmetry, and training: FID 8.46 -> 41
    repulsion    at attraction 1.5.
    reduce       makes the field of a batch in pieces equal to that of the whole. It takes a float64 vector of sums over
                 this piece and returns the sums over all pieces (under torchrun: an all-reduce). Two calls a shape.
    Returns (force [f, labels * T, G, C] in the scaled space, the size `unit` [f] of that space's unit, info of [f] each).

    All is done in chunks of entries (labels and locations). Of the whole batch only the distances are kept, and of each
    temperature the forces or their coefficients, whichever are smaller.
    """
    (labels, G, T, C), U, N = gen[0].shape, neg[0].shape[1], gen[0].shape[1] + neg[0].shape[1] + pos[0].shape[1]
    like = float32_at_least(gen[0][:0])
    numbers = N * C + len(temperatures) * G * (N + C)
    chunks = list(_chunks(len(gen), labels, T, max(1, CHUNK_BYTES.get(gen[0].device.type, 1 << 29) // (4 * numbers))))
    newest = {}                        # the chunk made last, which the next pass begins with
    centre, dist, kept = {}, {}, {}    # of every chunk; the latter two until they have been used

    def targets(entries, features, label, t):
        """[b, N, C], around its mean: that moves nothing, and the Gram identity loses 100 times fewer digits."""
        if entries.start not in newest:
            newest.clear()
            y = like.new_empty(len(features), label.stop - label.start, t.stop - t.start, N, C)
            for part, f in zip(y, features):
                gen_, neg_, pos_ = (x[f][label, :, t].transpose(1, 2) for x in (gen, neg, pos))
                part[:, :, :G], part[:, :, G:G + U], part[:, :, G + U:] = gen_, neg_, pos_
            y = y.flatten(0, 2)
            if entries.start not in centre:
                centre[entries.start] = y.mean(1, keepdim=True)
            newest[entries.start] = y.sub_(centre[entries.start])
        return newest[entries.start]

    def over_the_batch(sums):  # [n, entries] -> [n, features]
        sums = sums.unflatten(1, (len(gen), -1)).sum(2)
        return sums if reduce is None else reduce(sums.flatten()).view_as(sums)

    def spread(values):  # [features] -> [entries, 1, 1]
        return values.repeat_interleave(labels * T)[:, None, None]

    weight = weight_neg.to(like.dtype)[:, None].expand(len(gen), labels, T, U).flatten(0, 2)[:, None]  # [entries, 1, U]
    sums = like.new_zeros(2, len(weight), dtype=torch.float64)
    for chunk in chunks:
        entries = chunk[0]
        dist[entries.start] = pairwise_distance(targets(*chunk), G)
        total = dist[entries.start].sum(1)                                                       # [b, N]
        total[:, G:G + U] *= weight[entries, 0]
        sums[0, entries] = total.sum(1, dtype=torch.float64)
    sums[1] = G * (N - U + weight.sum((1, 2)))

    # One scale for the whole feature, over every label and location of the global batch (A.6): mean(dist w) / mean(w).
    # Scales per label, or per process, would train another loss.
    sums = over_the_batch(sums)
    scale = (sums[0] / sums[1]).to(like.dtype)                                                   # [features]
    unit = (scale / math.sqrt(C)).clamp_min(1e-3)     # a feature's coordinates, in these units, have order 1
    scale_ = spread(scale.clamp_min(1e-3))

    sharpness = torch.cat([like.new_full((1, 1, 1), -1 / tau) for tau in temperatures])  # made there: nothing is uploaded
    sums = like.new_zeros(len(temperatures) + 1, len(weight), dtype=torch.float64)
    for chunk in reversed(chunks):  # back, from the one still at hand
        entries = chunk[0]
        d = dist.pop(entries.start).div_(scale_[entries])
        A = coefficients(d, weight[entries], sharpness, kernel, attraction, repulsion)           # [b, taus, G, N]
        V = torch.bmm(A.flatten(1, 2), targets(*chunk)).unflatten(1, (-1, G))                    # [b, taus, G, C]
        kept[entries.start] = V if C <= N else A
        sums[:-1, entries] = torch.linalg.vector_norm(V, dim=3).square_().sum(2, dtype=torch.float64).T
    sums[-1] = G * C

    # Each temperature's force gets unit mean square, again one scalar over the whole global batch (A.6).
    sums = over_the_batch(sums)
    mean_square = (sums[:-1] / sums[-1] / unit.square()).to(like.dtype)                          # [taus, features]
    share = (mean_square.clamp_min(1e-8).rsqrt() / unit).T.repeat_interleave(labels * T, 0)[:, None]  # [entries, 1, taus]
    del d, A, V
    force = like.new_empty(len(share), G, C)
    for chunk in chunks:
        entries = chunk[0]
        out, all_taus = force[entries], kept.pop(entries.start).flatten(2)
        if C <= N:
            torch.bmm(share[entries], all_taus, out=out.flatten(1)[:, None])
        else:
            torch.bmm(torch.bmm(share[entries], all_taus).view(-1, G, N), targets(*chunk), out=out)
    info = {"scale": scale, **{f"force_{tau}": m for tau, m in zip(temperatures, mean_square)}}
    return force.unflatten(0, (len(gen), -1)), unit, info


def coefficients(dist, weight_neg, sharpness, kernel, attraction, repulsion):
    """What V is made of: V_i = sum_j c_ij y_j, with sum_j c_ij = 0. dist [b, G, N], in units of its mean, is written to.

    weight_neg [b, 1, U], sharpness [taus, 1, 1] = -1 / tau. Returns c [b, taus, G, N]: over V+ and V- of sec. 3.2 it is
    -A(gen) sum A(pos) for negatives and A(pos) sum A(neg) for positives, A the affinities.
    """
    G, U = dist.shape[1], weight_neg.shape[2]
    dist[:, :, :G].diagonal(dim1=1, dim2=2).add_(100)  # a sample does not repel itself (A.6)
    A = affinity(dist[:, None] * sharpness, kernel)                                              # b taus G N
    A_neg, A_pos = A[..., :G + U], A[..., G + U:]                                                # views
    A_neg[..., G:].mul_(weight_neg[:, None])  # after the softmaxes: inside, a weight would act as its root
    sum_neg, sum_pos = A_neg.sum(3, keepdim=True), A_pos.sum(3, keepdim=True)                    # b taus G 1
    A_neg.mul_(-repulsion * sum_pos), A_pos.mul_(attraction * sum_neg)
    if attraction != repulsion:  # else coefficients add up to 0, and where a sample itself is does not matter
        A[..., :G].diagonal(dim1=2, dim2=3).sub_(((attraction - repulsion) * sum_neg * sum_pos)[..., 0])
    return A


def _chunks(features, labels, T, size):
    """Parts of at most `size` of the features * labels * T entries, in order: (slice of the entries, range of features,
    slices of labels and T)."""
    f, label, t = max(1, size // (labels * T)), min(labels, max(1, size // T)), min(T, size)
    for i in range(0, features, f):
        for j in range(0, labels, label):
            for k in range(0, T, t):
                place = range(i, min(i + f, features)), slice(j, min(j + label, labels)), slice(k, min(k + t, T))
                count = len(place[0]) * (place[1].stop - j) * (place[2].stop - k)
                start = (i * labels + j) * T + k
                yield slice(start, start + count), *place


def pairwise_distance(y, G):
    """Euclidean distances of the first G of y [b, N, C] to all, [b, G, N], by the Gram identity: one matrix product."""
    square = torch.linalg.vector_norm(y, dim=2).square_()
    return (square[:, :G, None] + square[:, None]).baddbmm_(y[:, :G], y.transpose(1, 2), alpha=-2).clamp_min_(1e-8).sqrt_()


def affinity(logits, kernel):
    """Normalised kernel exp(logits) [..., G, N] (A.6, Table 11): the root of a softmax over targets times one over samples."""
    if kernel == "both":
        square = logits.softmax(-1).mul_(logits.softmax(-2))
    elif kernel == "targets":
        square = logits.softmax(-1).square_()
    elif kernel == "none":
        square = (2 * logits).exp()
    else:
        raise ValueError(f"kernel is '{kernel}': must be both, targets or none")
    return square.clamp_min_(1e-6).sqrt_()  # the floor keeps a far sample's force alive: without it gradients change 43%


def float32_at_least(x):
    """x in float32; float64 stays, so that tests can ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------------
# Features

def multi_scale_features(maps):
    """Features (a)-(d) of A.5 of each map: {name: [N, C, H, W]} -> {name: [N, T, C]}, statistics in float32.

    `F` itself (T = H W), `F_mean` and `F_std` over the whole map (T = 1), and for s in 2, 4, where s divides H and W,
    `F_mean_s` and `F_std_s` over s x s patches (T = H W / s^2). std = sqrt(biased variance + 1e-6).
    """
    features = {}
    for name, x in maps.items():
        H, W = x.shape[2:]
        features[name] = rearrange(x, "n c h w -> n (h w) c")
        # Each scale from the one before, so that the map is read once: the variance of a patch is the mean variance of its
        # parts plus the variance of their means.
        mean, variance = float32_at_least(x), None
        for size, suffix in ((2, "_2"), (4, "_4"), (None, "")):
            if size and (H % size or W % size):
                continue
            h, w = patch = (2, 2) if size else mean.shape[2:]
            parts = rearrange(mean, "n c (y h) (x w) -> n c y h x w", h=h, w=w)                  # a view
            mean = F.avg_pool2d(mean, patch)                                                     # n c y x
            spread = rearrange((parts - mean[:, :, :, None, :, None]).square(), "n c y h x w -> n c (y h) (x w)")
            variance = F.avg_pool2d(spread if variance is None else spread + variance, patch)
            features[f"{name}_mean{suffix}"] = rearrange(mean, "n c y x -> n (y x) c")
            features[f"{name}_std{suffix}"] = rearrange((variance + 1e-6).sqrt(), "n c y x -> n (y x) c")
    return features


# ------------------------------------------------------------------------------------------------------------------
# Guidance (A.7) and the queue of real samples (A.8)

def sample_alpha(n, power, fixed_share, rng):
    """n guidance scales in [1, 4] with density ~ alpha^-power, by the inverse CDF; a share of them fixed at 1 (A.7).

    rng: numpy Generator. Returns a float32 array [n].
    """
    u, fixed = rng.random((2, n))
    edge = 4.0 ** (1 - power)
    alpha = 4.0**u if power == 1 else (1 + u * (edge - 1)) ** (1 / (1 - power))
    alpha[fixed < fixed_share] = 1
    return alpha.astype(np.float32)


def unconditional_weight(alpha, G, U):
    """Weight of each of U unconditional negatives beside the G - 1 generated ones: (alpha - 1)(G - 1) / U (A.7)."""
    return ((alpha - 1) * (G - 1) / U)[:, None].expand(-1, U)


class SampleQueue:
    """The latest real samples: `per_class` of each class, and `overall` of any class (A.8). It holds sample ids.

    An id is 8 bytes where a latent is 16 KB, so a thousand classes' queues go into a checkpoint with the weights.
    `draw` and `draw_any` are those of `prepare_data.Dataset`, which draws from the whole class instead.
    """

    def __init__(self, num_classes, per_class=128, overall=1000):
        self.ids = torch.full((num_classes, per_class), -1)                # a ring for each class; -1: not filled yet
        self.pushed = torch.zeros(num_classes, dtype=torch.long)           # how many have ever been pushed
        self.any_ids = torch.full((overall,), -1)
        self.any_pushed = torch.zeros((), dtype=torch.long)

    def push(self, ids, labels):
        """ids [n], labels [n]: the newest replace the oldest, of their class and of all."""
        size = self.ids.shape[1]
        order = labels.argsort(stable=True)
        ids_sorted, labels_sorted = ids[order], labels[order]
        count = labels.bincount(minlength=len(self.ids))
        place = torch.arange(len(ids)) - (count.cumsum(0) - count)[labels_sorted]   # 0, 1, ... within its class
        last = place >= count[labels_sorted] - size                                # more than a ring: the oldest fall out
        slot = (self.pushed[labels_sorted] + place) % size
        self.ids[labels_sorted[last], slot[last]] = ids_sorted[last]
        self.pushed += count

        overall = len(self.any_ids)
        self.any_ids[(self.any_pushed + torch.arange(len(ids))[-overall:]) % overall] = ids[-overall:]
        self.any_pushed += len(ids)

    def draw(self, label, n, rng):
        """n ids of one class, without replacement; rng: numpy Generator. ValueError if the class holds fewer."""
        return self._draw(self.ids[label], n, rng, f"class {label}")

    def draw_any(self, n, rng):
        """n ids of any class, without replacement."""
        return self._draw(self.any_ids, n, rng, "all classes")

    @staticmethod
    def _draw(ring, n, rng, what):
        filled = ring[ring >= 0]
        if len(filled) < n:
            raise ValueError(f"the queue of {what} holds {len(filled)} samples and {n} are to be drawn: push more first")
        return filled[torch.from_numpy(rng.choice(len(filled), n, replace=False))]

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        for name, value in state.items():
            getattr(self, name).copy_(value)


# ------------------------------------------------------------------------------------------------------------------
# The 2-D experiment (sec. 5.1): no encoder, the plane is the feature. A small MLP learns each target in seconds.

BOARD = 4  # the checkerboard has BOARD x BOARD squares of side 1 around the origin

# name: where the generator's first samples lie, what it has to reach, and options of toy_experiment
EXPERIMENTS = {"two_modes_between": ((0.0, 0.0), "two_modes", dict(steps=1500, n=128, real=256)),
               "two_modes_far": ((0.0, 6.0), "two_modes", dict(steps=1500, n=128, real=256)),
               "two_modes_collapsed": ((-1.5, 0.0), "two_modes", dict(steps=1500, n=128, real=256)),
               "checkerboard": ((0.0, 0.0), "checkerboard", dict(steps=5000)),
               "swiss_roll": ((0.0, 0.0), "swiss_roll", {})}


def draw_target(name, n, generator):
    """n points [n, 2] of a 2-D target: two_modes (at x = -1.5 and 1.5), checkerboard (its dark squares), swiss_roll."""
    u = torch.rand(n, 3, generator=generator)
    if name == "two_modes":
        side = torch.where(u[:, :1] < 0.5, -1.5, 1.5)
        return torch.cat([side, torch.zeros(n, 1)], 1) + 0.2 * torch.randn(n, 2, generator=generator)
    if name == "checkerboard":
        row = (u[:, 0] * BOARD).floor()
        column = 2 * (u[:, 1] * BOARD / 2).floor() + row % 2                 # row + column is even in a dark square
        return torch.stack([column, row], 1) - BOARD / 2 + torch.rand(n, 2, generator=generator)
    angle = 1.5 * math.pi * (1 + 2 * u[:, :1].sqrt())                        # denser outside, where the turn is longer
    roll = angle / (4.5 * math.pi) * 2 * torch.cat([angle.cos(), angle.sin()], 1)
    return roll + 0.04 * torch.randn(n, 2, generator=generator)


def describe(name, x):
    """What a reader of the picture would count: {text: number} for samples x [n, 2]."""
    if name == "two_modes":
        near = (x - torch.tensor([[[-1.5, 0.0]], [[1.5, 0.0]]])).norm(dim=2) < 1                 # 2 n
        return {"left": near[0].float().mean().item(), "right": near[1].float().mean().item()}
    if name == "checkerboard":
        square = (x + BOARD / 2).floor().long()                                                  # n 2
        square = square[((square >= 0) & (square < BOARD)).all(1) & (square.sum(1) % 2 == 0)]    # the samples in dark ones
        count = torch.zeros(BOARD, BOARD).index_put_(tuple(square.T), torch.ones(len(square)), accumulate=True)
        is_dark = torch.arange(BOARD)[:, None].add(torch.arange(BOARD)) % 2 == 0
        return {"in dark squares": len(square) / len(x), "emptiest of them": count[is_dark].min().item() / len(x)}
    nearest = torch.cdist(x, draw_target(name, 20_000, torch.Generator().manual_seed(1))).min(1).values
    return {"within 0.1 of the roll": (nearest < 0.1).float().mean().item()}


def toy_experiment(experiment, steps=3000, n=256, real=1024, lr=1e-3, seed=0, temperatures=(0.05, 0.1, 0.2, 1.0)):
    """Train on one entry of EXPERIMENTS. Returns (samples [frames, 2048, 2], losses, mean squared forces at tau = 0.2).

    The widest temperature sees across the plane: samples that start as one blob, with their reals far away, would
    otherwise feel only the floor of the affinities, which pulls equally to all sides.
    """
    start, target, _ = EXPERIMENTS[experiment]
    torch.manual_seed(seed)
    generator = torch.nn.Sequential(torch.nn.Linear(10, 256), torch.nn.SiLU(), torch.nn.Linear(256, 256), torch.nn.SiLU(),
                                    torch.nn.Linear(256, 256), torch.nn.SiLU(), torch.nn.Linear(256, 2))

    def noise(n):  # two normal numbers and eight coin tosses: like the image generator's style indices, the coins
        return torch.cat([torch.randn(n, 2), torch.randint(2, (n, 8)) * 2.0 - 1], 1)  # let modes be apart, no bridge

    with torch.no_grad():  # the first samples are a blob of this size at the start
        generator[-1].weight.mul_(0.3 / generator(noise(n)).std(0).mean())
        generator[-1].bias.copy_(torch.tensor(start))
    optimizer = torch.optim.Adam(generator.parameters())
    fixed_noise, frames, losses, forces = noise(2048), [], [], []
    stream = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % (steps // 48) == 0 or step == steps - 1:
            with torch.no_grad():
                frames.append(generator(fixed_noise))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * (1 - step / steps)
        loss, info = drift_loss(generator(noise(n))[None], draw_target(target, real, stream)[None], temperatures=temperatures)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.item()), forces.append(info["force_0.2"].item())
    return torch.stack(frames), losses, forces


def save_animation(experiment, frames, losses, forces, path, size=480, strip=120):
    """GIF: the target in grey, the samples in orange, and below them the loss (grey) and the mean squared force (blue)."""
    from PIL import Image, ImageDraw
    target = draw_target(EXPERIMENTS[experiment][1], 2048, torch.Generator().manual_seed(2))
    reach = max(target.abs().max().item(), 2.4) * 1.1

    def dots(draw, points, colour):
        for x, y in (points * torch.tensor([1.0, -1.0]) / reach * size / 2 + size / 2).tolist():
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill=colour)

    def curve(draw, values, colour, text, row):
        logs = torch.tensor(values).clamp_min(1e-12).log10()
        low, high = logs.min(), logs.max() + 1e-6
        points = [(10 + (size - 20) * i / len(frames_steps), size + strip - 10 - (strip - 40) * ((v - low) / (high - low)).item())
                  for i, v in enumerate(logs[frames_steps[:shown]])]
        draw.line(points, fill=colour, width=2)
        draw.text((10, size + 4 + 12 * row), f"{text} {values[frames_steps[shown - 1]]:.3g}", fill=colour)

    frames_steps = torch.linspace(0, len(losses) - 1, len(frames)).long()
    images = []
    for shown, samples in enumerate(frames, 1):
        image = Image.new("RGB", (size, size + strip), "white")
        draw = ImageDraw.Draw(image)
        dots(draw, target, "#cccccc")
        dots(draw, samples, "#e66100")
        curve(draw, losses, "#888888", "loss (pinned by the normalisation)", 0)
        curve(draw, forces, "#1a5fb4", "mean squared force, tau 0.2 (log)", 1)
        images.append(image.quantize(32))
    images[0].save(path, save_all=True, append_images=images[1:], duration=[80] * (len(images) - 1) + [2000], loop=0)


def main():
    import argparse
    import time
    from pathlib import Path
    parser = argparse.ArgumentParser(description="The 2-D experiment (sec. 5.1) of the drifting field.", allow_abbrev=False)
    parser.add_argument("experiment", nargs="*", default=list(EXPERIMENTS), help=f"of {', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--out", default="runs/2d", help="folder for the GIFs (default: %(default)s)")
    args = parser.parse_args()
    unknown = [name for name in args.experiment if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {unknown[0]}: choose from {', '.join(EXPERIMENTS)}")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.experiment:
        began, path = time.time(), f"{args.out}/{name}.gif"
        frames, losses, forces = toy_experiment(name, **EXPERIMENTS[name][2])
        numbers = ", ".join(f"{k} {v:.1%}" for k, v in describe(EXPERIMENTS[name][1], frames[-1]).items())
        save_animation(name, frames, losses, forces, path)
        print(f"{name}: {numbers}; mean squared force {forces[0]:.2g} -> {forces[-1]:.2g}; {time.time() - began:.0f} s; {path}")


if __name__ == "__main__":
    main()
