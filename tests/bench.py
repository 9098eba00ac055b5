"""Speed, as ratios within one run: `python tests/bench.py [drift] [frechet]`, on two threads or as many as OMP_NUM_THREADS says.

drift    the loss with its gradient against the plain port of tests/reference.py: A B A B ..., medians of wall seconds
frechet  the trace term of fid.py at 2048 dimensions against scipy.linalg.sqrtm: CPU seconds
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import drift  # noqa: E402
import fid  # noqa: E402
import reference  # noqa: E402


def bench_drift(runs=7):
    for C in (128, 640):
        g = torch.Generator().manual_seed(0)
        gen, pos, neg = (torch.randn(256, n, C, generator=g) for n in (64, 64, 16))
        weight, seconds = torch.rand(256, 16, generator=g), {"plain port": [], "drift.py": []}
        for run in range(runs + 1):
            for name, function in (("plain port", reference.drift_loss), ("drift.py", drift.drift_loss)):
                x, began = gen.clone().requires_grad_(), time.perf_counter()
                loss = function(x, pos, neg, weight)
                (loss[0] if isinstance(loss, tuple) else loss).mean().backward()
                seconds[name].append(time.perf_counter() - began)
        plain, ours = (statistics.median(s[1:]) for s in seconds.values())  # the first is a warm-up
        print(f"drift loss [256, 64, 144, {C}]: plain port {plain * 1e3:.0f} ms, drift.py {ours * 1e3:.0f} ms, "
              f"ratio {plain / ours:.2f}")


def bench_frechet(d=2048):
    import scipy.linalg
    rng = np.random.default_rng(0)
    (mu1, a), (mu2, b) = (fid.statistics(torch.from_numpy(np.maximum(rng.standard_normal((4 * d, d)) + s, 0))) for s in (0, 0.1))
    began = time.process_time()
    ours = fid.frechet_distance(mu1, a, mu2, b)
    middle = time.process_time()
    root = scipy.linalg.sqrtm((a @ b).numpy())
    end = time.process_time()
    theirs = float((mu1 - mu2).square().sum() + a.trace() + b.trace() - 2 * np.trace(root).real)
    print(f"Frechet distance, {d} dimensions: scipy sqrtm {end - middle:.1f} CPU s, fid.py {middle - began:.1f} CPU s, "
          f"ratio {(end - middle) / (middle - began):.1f}, difference {abs(ours - theirs):.1e}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["drift", "frechet"]:
        {"drift": bench_drift, "frechet": bench_frechet}[name]()
