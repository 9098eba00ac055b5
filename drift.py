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
Run this file for the paper's 2-D experiment (sec. 5.1): `python drift.py`, or one target: `python drift.py swiss_roll`.
"""
import math

import torch
import torch.nn.functional as F
from einops import rearrange

TEMPERATURES = (0.02, 0.05, 0.2)  # A.6


# ------------------------------------------------------------------------------------------------------------------
# The loss of one feature

def drift_loss(gen, pos, neg=None, weight_neg=None, *, temperatures=TEMPERATURES, kernel="both",
               attraction=1.0, repulsion=1.0, reduce=None):
    """The drifting loss of one feature (sec. 3.2-3.4, A.6): value |V|^2, gradient -2 V / numel, nothing through V.

    gen [B, G, C], pos [B, P, C], neg [B, U, C] with weight_neg [B, U]; computed in float32 whatever comes in.
    kernel       what the affinities are normalised over (Table 11): "both" axes (the method), "targets" only, or "none"
    attraction,  multipliers of V+ and V- (Table 1). Unequal ones break the anti-symmetry, and training: FID 8.46 -> 41
    repulsion    at attraction 1.5.
    reduce       makes the loss of a batch in pieces equal to the loss of the whole. It takes a float64 vector of sums
                 over this piece and returns the sums over all pieces (under torchrun: an all-reduce). Two calls a loss.
    Returns (loss [B], differentiable in gen; info of scalars: `scale`, and `force_TAU`, the mean squared force before
    it is normalised. Watch the latter: the loss itself is pinned near its start by that normalisation).
    Raises ValueError on shapes that do not fit together.
    """
    if neg is None:
        neg, weight_neg = gen[:, :0], gen.new_ones(len(gen), 0)
    if gen.shape[::2] != pos.shape[::2] or gen.shape[::2] != neg.shape[::2] or weight_neg.shape != neg.shape[:2]:
        raise ValueError(f"drift_loss: gen {list(gen.shape)}, pos {list(pos.shape)}, neg {list(neg.shape)}, weight_neg "
                         f"{list(weight_neg.shape)} must be [B, G, C], [B, P, C], [B, U, C], [B, U]")
    with torch.no_grad(), torch.autocast(gen.device.type, enabled=False):  # in bf16 the softmax at tau = 0.02 is noise
        force, step, info = drifting_field(*map(full, (gen, pos, neg, weight_neg)), temperatures, kernel, attraction,
                                           repulsion, reduce or (lambda sums: sums))
        value = force.square().mean((1, 2))                                                      # [B]
        grad = force * (-2 / (step * force[0].numel()))                                          # [B, G, C]
    return _ValueAndGradient.apply(gen, value, grad), info


def drifting_field(gen, pos, neg, weight_neg, temperatures, kernel, attraction, repulsion, reduce):
    """V of eq. 8-11 summed over the temperatures, for features scaled to a mean distance of 1. Float32, no autograd.

    Returns (force [B, G, C] in the scaled space, the size `step` of that space's unit in feature units, info).
    """
    (B, G, C), U = gen.shape, neg.shape[1]
    targets = torch.cat([gen, neg, pos], 1)                                                      # [B, N, C]
    targets -= targets.mean(1, keepdim=True)          # moves nothing, and the Gram identity loses 100 times fewer digits
    gen = targets[:, :G]
    weight = torch.cat([gen.new_ones(B, G), weight_neg, gen.new_ones(B, pos.shape[1])], 1)[:, None]  # [B, 1, N]
    dist = pairwise_distance(gen, targets)                                                       # [B, G, N]

    # One scale for the whole feature, over every label and location of the global batch (A.5): mean(dist w) / mean(w).
    # Scales per label, or per process, would train another loss.
    sums = reduce(torch.stack([(dist * weight).sum(dtype=torch.float64), G * weight.sum(dtype=torch.float64)]))
    scale = (sums[0] / sums[1]).to(gen.dtype)
    step = (scale / math.sqrt(C)).clamp_min(1e-3)     # the feature's coordinates, in these units, have order 1
    dist /= scale.clamp_min(1e-3)
    dist[:, :, :G].diagonal(dim1=1, dim2=2).add_(100)  # a sample does not repel itself (A.6)

    forces = []
    for tau in temperatures:
        A = affinity(-dist / tau, kernel) * weight    # after the softmaxes: inside, a weight would act as its root
        A_neg, A_pos = A.split([G + U, pos.shape[1]], 2)
        coeff = torch.cat([-repulsion * A_neg * A_pos.sum(2, keepdim=True),                      # eq. 11
                           attraction * A_pos * A_neg.sum(2, keepdim=True)], 2)                  # [B, G, N]
        forces.append((coeff @ targets - coeff.sum(2, keepdim=True) * gen) / step)               # [B, G, C]

    # Each temperature's force gets unit mean square, again one scalar over the whole global batch (A.6).
    sums = reduce(torch.stack([*(f.square().sum(dtype=torch.float64) for f in forces),
                               torch.tensor(float(gen.numel()), dtype=torch.float64, device=gen.device)]))
    mean_square = (sums[:-1] / sums[-1]).to(gen.dtype)
    force = sum(f / m.clamp_min(1e-8).sqrt() for f, m in zip(forces, mean_square))
    info = {"scale": scale, **{f"force_{tau}": m for tau, m in zip(temperatures, mean_square)}}
    return force, step, info


def pairwise_distance(x, y):
    """Euclidean distances of x [B, G, C] to y [B, N, C] -> [B, G, N] by the Gram identity: one matrix product."""
    square = torch.baddbmm(y.square().sum(2)[:, None], x, y.transpose(1, 2), alpha=-2) + x.square().sum(2)[:, :, None]
    return square.clamp_min_(1e-8).sqrt_()


def affinity(logits, kernel):
    """Normalised kernel exp(logits) [B, G, N]: Z of eq. 11 by a softmax over targets and one over samples (A.6)."""
    if kernel == "both":
        square = logits.softmax(2) * logits.softmax(1)
    elif kernel == "targets":
        square = logits.softmax(2).square()
    elif kernel == "none":
        square = (2 * logits).exp()
    else:
        raise ValueError(f"kernel is '{kernel}': must be both, targets or none")
    return square.clamp_min_(1e-6).sqrt_()  # the floor keeps a far sample's force alive: without it gradients change 43%


class _ValueAndGradient(torch.autograd.Function):
    """The identity that hands autograd a loss already computed and its closed-form gradient: no graph over the pairs."""

    @staticmethod
    def forward(ctx, gen, value, grad):
        ctx.save_for_backward(grad.to(gen.dtype))
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value):
        return ctx.saved_tensors[0] * grad_value[:, None, None].to(ctx.saved_tensors[0].dtype), None, None


def full(x):
    """x in float32; float64 stays, so that tests can ask for more digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------------
# Many features of many labels

def feature_drift_loss(gen, pos, neg=None, weight_neg=None, **options):
    """Sum over features of the mean drifting loss (A.5); the locations of a map are batch entries of their own.

    gen, pos, neg: {name: [labels, samples, T, C]}; weight_neg [labels, U]; options as for `drift_loss`.
    Returns (total loss, losses {name: scalar}, infos {name: info}).
    """
    def entries(feature):  # the kernel compares the same location across samples of the same label only
        return rearrange(feature, "label sample t c -> (label t) sample c")

    losses, infos = {}, {}
    for name in gen:
        T = gen[name].shape[2]
        weighted = {} if neg is None else dict(neg=entries(neg[name]), weight_neg=weight_neg.repeat_interleave(T, 0))
        loss, infos[name] = drift_loss(entries(gen[name]), entries(pos[name]), **weighted, **options)
        losses[name] = loss.mean()
    return sum(losses.values()), losses, infos


def multi_scale_features(maps):
    """Features (a)-(d) of A.5 of each map: {name: [N, C, H, W]} -> {name: [N, T, C]}, statistics in float32.

    `F` itself (T = H W), `F_mean` and `F_std` over the whole map (T = 1), and for s in 2, 4, where s divides H and W,
    `F_mean_s` and `F_std_s` over s x s patches (T = H W / s^2). std = sqrt(biased variance + 1e-6).
    """
    features = {}
    for name, x in maps.items():
        H, W = x.shape[2:]
        features[name] = rearrange(x, "n c h w -> n (h w) c")
        for size, suffix in ((None, ""), (2, "_2"), (4, "_4")):
            if size and (H % size or W % size):
                continue
            h, w = (size, size) if size else (H, W)
            patches = rearrange(full(x), "n c (y h) (x w) -> n (y x) c (h w)", h=h, w=w)
            variance, mean = torch.var_mean(patches, -1, correction=0)                           # [N, T, C]
            features[f"{name}_mean{suffix}"] = mean
            features[f"{name}_std{suffix}"] = (variance + 1e-6).sqrt()
    return features


# ------------------------------------------------------------------------------------------------------------------
# Guidance (A.7) and the queue of real samples (A.8)

def sample_alpha(n, power, fixed_share, rng):
    """n guidance scales in [1, 4] with density ~ alpha^-power, by the inverse CDF; a share of them fixed at 1 (A.7).

    rng: numpy Generator. Returns float32 tensor [n].
    """
    u, fixed = rng.random((2, n))
    edge = 4.0 ** (1 - power)
    alpha = 4.0**u if power == 1 else (1 + u * (edge - 1)) ** (1 / (1 - power))
    alpha[fixed < fixed_share] = 1
    return torch.from_numpy(alpha).float()


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
