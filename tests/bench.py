"""Speed, as ratios within one run: `python tests/bench.py [drift] [frechet] [read]`, on OMP_NUM_THREADS threads.

drift    the loss with its gradient against the plain port of tests/reference.py: A B A B ..., medians of wall seconds
frechet  the trace term of fid.py at 2048 dimensions against scipy.linalg.sqrtm: CPU seconds
read     a step's 4,096 latents from the prepared array against one .pt file for each, A B A B ..., medians of wall seconds
"""
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import drift  # noqa: E402
import fid  # noqa: E402
import prepare_data  # noqa: E402
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


def bench_read(n=4096, runs=7):
    """float32 [n, 4, 32, 32] of files that hold mean and std, 16 KB in all: the means, and then draws with their noise."""
    with tempfile.TemporaryDirectory() as folder:
        split, rng = Path(folder) / "train", np.random.default_rng(0)
        split.mkdir()
        array = rng.standard_normal((n, 2, 8, 32, 32), np.float32).astype(np.float16)
        array.tofile(split / "images.bin")
        np.save(split / "labels.npy", np.zeros(n, np.int64))
        (split / "meta.json").write_text(json.dumps(dict(kind="latents", dtype="float16", shape=array.shape, classes=["a"])))
        for i, row in enumerate(array):
            torch.save(dict(zip(("mean", "std"), torch.from_numpy(row[0].copy()).split(4))), split / f"{i}.pt")
        data, ids = prepare_data.Dataset(folder), rng.permutation(n)

        def files(rng=None):
            loaded = [torch.load(split / f"{i}.pt", weights_only=True) for i in ids]
            mean, std = (torch.stack([x[key] for x in loaded]).float() for key in ("mean", "std"))
            return mean if rng is None else mean + std * torch.from_numpy(rng.standard_normal(mean.shape, np.float32))

        assert torch.equal(files(), data.batch(ids))
        for what, stream in (("means", None), ("drawn, on the CPU", rng)):
            seconds = {"files": [], "array": []}
            for _ in range(runs):
                for name, function in (("files", files), ("array", lambda rng: data.batch(ids, rng))):
                    began = time.perf_counter()
                    function(stream)
                    seconds[name].append(time.perf_counter() - began)
            theirs, ours = (statistics.median(s) for s in seconds.values())
            print(f"{n} latents ({what}): one .pt file each {theirs * 1e3:.0f} ms, the array {ours * 1e3:.0f} ms, "
                  f"ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    for name in sys.argv[1:] or ["drift", "frechet", "read"]:
        {"drift": bench_drift, "frechet": bench_frechet, "read": bench_read}[name]()
