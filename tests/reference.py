"""Both losses written down plainly, as their papers and releases have them.

Autograd goes through the loss, and not through V. This is the tests' independent reference and the
baseline of the benchmarks; nothing in the project imports it.
"""
import math

import torch


def squared_distances(x, y):
    """[B, G, N] of x [B, G, C] and y [B, N, C]."""
    squares = (x * x).sum(2)[:, :, None] + (y * y).sum(2)[:, None]
    return torch.clamp(squares - 2 * x @ y.transpose(1, 2), min=1e-8)


def normalised(V):
    return V / torch.sqrt(torch.clamp((V * V).mean(), min=1e-8))


def drift_loss(gen, pos, neg=None, weight_neg=None, temperatures=(0.02, 0.05, 0.2)):
    """gen [B, G, C], pos [B, P, C], neg [B, U, C], weight_neg [B, U] -> loss [B]."""
    B, G, C = gen.shape
    P = pos.shape[1]
    if neg is None:
        neg = gen.detach()[:, :0]
        weight_neg = gen.new_ones(B, 0)
    with torch.no_grad():
        y = torch.cat([gen, neg, pos], 1)
        w = torch.cat([gen.new_ones(B, G), weight_neg, gen.new_ones(B, P)], 1)[:, None]
        dist = torch.sqrt(squared_distances(gen, y))
        scale = (dist * w).mean() / w.mean()
        s = torch.clamp(scale / C**0.5, min=1e-3)
        itself = torch.eye(G, y.shape[1], dtype=dist.dtype, device=dist.device)
        d = dist / torch.clamp(scale, min=1e-3) + 100 * itself
        goal = gen / s
        for tau in temperatures:
            L = -d / tau
            A = torch.softmax(L, 2) * torch.softmax(L, 1)
            A = torch.sqrt(torch.clamp(A, min=1e-6)) * w
            A_neg = A[:, :, :-P]
            A_pos = A[:, :, -P:]
            pushes = -A_neg * A_pos.sum(2, keepdim=True)
            pulls = A_pos * A_neg.sum(2, keepdim=True)
            coeff = torch.cat([pushes, pulls], 2)
            goal = goal + normalised(coeff @ (y / s) - coeff.sum(2, keepdim=True) * (gen / s))
    return ((gen / s - goal) ** 2).mean((1, 2))


def sinkhorn_loss(gen, gen2, pos, uncond, cfg_scale, temperature=0.05, iterations=10):
    """gen, gen2 [B, G, C], pos [B, P, C], uncond [B, U, C], cfg_scale [B] -> loss [B]."""
    C = gen.shape[2]
    with torch.no_grad():
        scale = torch.sqrt(squared_distances(gen, torch.cat([gen, gen2, pos], 1)).mean())
        s = torch.clamp(scale / C**0.5, min=1e-3)

        def transported(y):
            """Sinkhorn's iterations with logarithms, and the barycentric map of the plan."""
            log_K = -squared_distances(gen / s, y / s) / 2 / (temperature * C)
            G, M = log_K.shape[1:]
            log_v = log_K.new_zeros(len(log_K), 1, M)
            for _ in range(iterations):
                log_u = -math.log(G) - torch.logsumexp(log_K + log_v, 2, keepdim=True)
                log_v = -math.log(M) - torch.logsumexp(log_K + log_u, 1, keepdim=True)
            plan = torch.exp(log_u + log_K + log_v)
            return plan @ (y / s) / plan.sum(2, keepdim=True)

        to_pos = transported(pos)
        V = to_pos - transported(gen2)
        V = V + (cfg_scale[:, None, None] - 1) * (to_pos - transported(uncond))
        goal = gen / s + normalised(V)
    return ((gen / s - goal) ** 2).mean((1, 2))
