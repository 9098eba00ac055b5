"""Speed, as ratios within one run: `python tests/bench.py [names]`, on two threads or as many as OMP_NUM_THREADS says.

drift    the loss with its gradient against the plain port of tests/reference.py: A B A B ..., medians of wall seconds
frechet  the trace term of fid.py at 2048 dimensions against scipy.linalg.sqrtm: CPU seconds
load     reading artifacts of the sizes of latent_B_sota and latent_L_sota (random weights, 3.7 GB in a temporary folder):
         seconds and peak of memory, authors' msgpack against the converted safetensors copy
load640  the same of mae_latent_640 (22 GB in a temporary folder; only when named)
"""
import statistics
import subprocess
import sys
import tempfile
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


LOAD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import model
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here (Linux)
memory = lambda: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, began = memory(), time.perf_counter()
net = (model.load_generator if sys.argv[2] == "gen" else model.load_encoder)(sys.argv[3])
for p in net.parameters():
    p.data.sum()  # so that every weight is in memory, mapped ones too
print(time.perf_counter() - began, memory() - before)
if len(sys.argv) > 4:
    net.save_pretrained(sys.argv[4])
"""


def bench_load(names=("latent_B_sota", "latent_L_sota"), runs=3):
    import conftest
    configs = {"latent_B_sota": ("gen", conftest.published_generator("B")),
               "latent_L_sota": ("gen", conftest.published_generator("L")),
               "mae_latent_640": ("mae", dict(base_channels=640, layers=[3, 4, 6, 3], num_classes=1000))}
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            kind, config = configs[name]
            artifact, copy = conftest.random_artifact(Path(temporary) / name, kind, **config), Path(temporary) / "copy"
            size = (artifact / "ema_params.msgpack").stat().st_size

            def load(folder, *save):  # in a fresh process
                command = [sys.executable, "-c", LOAD, str(Path(__file__).parent.parent), kind, str(folder), *map(str, save)]
                return tuple(map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))

            load(artifact, copy)
            (theirs, peak), (ours, peak_copy) = (map(statistics.median, zip(*(load(folder) for _ in range(runs))))
                                                 for folder in (artifact, copy))
            print(f"loading {name}, {size / 1e9:.2f} GB: msgpack {theirs:.1f} s, peak {peak / size:.2f} times its size; "
                  f"converted copy {ours:.1f} s, {peak_copy / size:.2f} times; ratio {theirs / ours:.1f}", flush=True)


if __name__ == "__main__":
    benches = {"drift": bench_drift, "frechet": bench_frechet, "load": bench_load}
    for name in sys.argv[1:] or benches:
        bench_load(["mae_latent_640"], 1) if name == "load640" else benches[name]()
