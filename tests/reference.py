"""The drifting loss written down plainly, as METHOD and the paper have it: autograd through the loss, none through V.

The tests' independent reference and the baseline of the benchmarks; nothing in the project imports it.
"""
import torch


def drift_loss(gen, pos, neg=None, weight_neg=None, temperatures=(0.02, 0.05, 0.2)):
    """gen [B, G, C], pos [B, P, C], neg [B, U, C], weight_neg [B, U] -> loss [B], in the inputs' precision."""
    (B, G, C), P = gen.shape, pos.shape[1]
    if neg is None:
        neg, weight_neg = gen.detach()[:, :0], gen.new_ones(B, 0)
    with torch.no_grad():
        targets = torch.cat([gen, neg, pos], 1)
        w = torch.cat([gen.new_ones(B, G), weight_neg, gen.new_ones(B, P)], 1)[:, None]
        square = (gen * gen).sum(2)[:, :, None] + (targets * targets).sum(2)[:, None] - 2 * gen @ targets.transpose(1, 2)
        dist = torch.sqrt(torch.clamp(square, min=1e-8))
        scale = (dist * w).mean() / w.mean()
        s = torch.clamp(scale / C**0.5, min=1e-3)
        d = dist / torch.clamp(scale, min=1e-3)
        d = d + 100 * torch.nn.functional.pad(torch.eye(G, dtype=d.dtype, device=d.device), (0, targets.shape[1] - G))
        goal = gen / s
        for tau in temperatures:
            L = -d / tau
            A = torch.sqrt(torch.clamp(torch.softmax(L, 2) * torch.softmax(L, 1), min=1e-6)) * w
            A_neg, A_pos = A[:, :, :-P], A[:, :, -P:]
            coeff = torch.cat([-A_neg * A_pos.sum(2, keepdim=True), A_pos * A_neg.sum(2, keepdim=True)], 2)
            V = coeff @ (targets / s) - coeff.sum(2, keepdim=True) * (gen / s)
            goal = goal + V / torch.sqrt(torch.clamp((V * V).mean(), min=1e-8))
    return ((gen / s - goal) ** 2).mean((1, 2))
