"""Speed, as ratios within one run: `python tests/bench.py [names]`, on two threads or as many as OMP_NUM_THREADS says.

drift    the loss with its gradient against the plain port of tests/reference.py: A A B B A A ..., medians of the wall seconds
         of each second run (the allocator then has what it needs, as in training); bytes that must be read and written at
         least (features in, gradient out), by the second; and the peak of memory of each
step     training steps by `train.py --dry_run`: eager, compiled, in micro-batches; seconds, images and FLOPs by the second,
         these against a large matrix product's, memory. On a GPU latent_ablation and latent_L, else digits
reals    a step of the digits run, whose reals the encoder sees once, against one that encodes its reals: A B A B ..., medians
sample   images by the second of generator and decoder apart, random weights of latent_B_sota's and the SD-VAE's sizes: as
         sample.py has them, against float32 in torch's default memory format; on a GPU compiled too
frechet  the trace term of fid.py at 2048 dimensions against scipy.linalg.sqrtm: CPU seconds
load     reading artifacts of the sizes of latent_B_sota and latent_L_sota (random weights, 3.7 GB in a temporary folder):
         seconds and peak of memory, authors' msgpack against the converted safetensors copy
load640  the same of mae_latent_640 (22 GB in a temporary folder; only when named)
read     a step's 4,096 latents from the prepared array against one .pt file for each, A B A B ..., medians of wall seconds
"""
import json
import os
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
import model  # noqa: E402
import prepare_data  # noqa: E402
import reference  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402


def mae_256_shapes():
    """(T, C) of the 86 features of a step on MAE-256: 12 maps with 7 each, `global` and `norm_x` (A.5)."""
    maps = [(1024, 256)] * 3 + [(256, 512)] * 3 + [(64, 1024)] * 4 + [(16, 2048)] * 2
    return [(T // part, C) for T, C in maps for part in (1, T, T, 4, 4, 16, 16)] + [(1, 4096), (1, 4)]


# name: shapes (T, C) of the features, labels, and generated, positive, unconditional samples of a label
DRIFT = {"[256, 64, 144, 128]": ([(1, 128)], 256, 64, 64, 16), "[256, 64, 144, 640]": ([(1, 640)], 256, 64, 64, 16),
         "five maps, 2 labels": ([(1024, 64), (256, 64), (64, 128), (16, 256), (1, 512)], 2, 64, 64, 16),
         "86 features of MAE-256": (mae_256_shapes(), 1, 16, 16, 4)}


def drift_case(name, device):
    shapes, labels, G, P, U = DRIFT[name]
    g = torch.Generator(device).manual_seed(0)
    gen, pos, neg = ({str(i): torch.randn(labels, n, T, C, generator=g, device=device) for i, (T, C) in enumerate(shapes)}
                     for n in (G, P, U))
    return gen, pos, neg, torch.rand(labels, U, generator=g, device=device)


def plain_port(gen, pos, neg, weight):
    entries = lambda f: f.transpose(1, 2).flatten(0, 1)  # noqa: E731
    return sum(reference.drift_loss(entries(gen[k]), entries(pos[k]), entries(neg[k]),
                                    weight.repeat_interleave(gen[k].shape[2], 0)).mean() for k in gen)


def drift_step(function, gen, *rest):
    """The loss and its gradient at the features."""
    gen = {name: x.detach().requires_grad_() for name, x in gen.items()}
    loss = function(gen, *rest)
    (loss[0] if isinstance(loss, tuple) else loss).backward()


def peak_memory(name, which, device):
    """Bytes beyond the inputs, in a process of its own (Linux: the most that was resident)."""
    if device == "cuda":
        case = drift_case(name, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        drift_step(DRIFT_FUNCTIONS[which], *case)
        return torch.cuda.max_memory_allocated() - before
    code = (f"import sys; sys.path[:0] = {sys.path[:2]}\nimport bench\nfunction = bench.DRIFT_FUNCTIONS[{which!r}]\n"
            f"*features, weight = case = bench.drift_case({name!r}, 'cpu')\n"
            # once at one label and one location: pages of code and threads are not the loss's
            "bench.drift_step(function, *({k: x[:1, :, :1] for k, x in f.items()} for f in features), weight[:1])\n"
            "status = lambda key: 1024 * next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith(key))\n"
            "open('/proc/self/clear_refs', 'w').write('5')\nbefore = status('VmRSS')\n"
            "bench.drift_step(function, *case)\nprint(status('VmHWM') - before)")
    # a fixed threshold: what is freed goes back to the system, so that the peak is of tensors, not of glibc's fragments
    environment = dict(os.environ, MALLOC_TRIM_THRESHOLD_="131072")
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment).stdout)


DRIFT_FUNCTIONS = {"plain port": plain_port, "drift.py": drift.feature_drift_loss}


def bench_drift(runs=7):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in DRIFT:
        case, seconds = drift_case(name, device), {which: [] for which in DRIFT_FUNCTIONS}
        for _ in range(runs):
            for which, function in DRIFT_FUNCTIONS.items():
                for _ in range(2):
                    began = time.perf_counter()
                    drift_step(function, *case)
                    synchronize(device)
                    last = time.perf_counter() - began
                seconds[which].append(last)
        plain, ours = (statistics.median(s) for s in seconds.values())
        least = 4 * sum(x.numel() for features in (case[0], *case[:3]) for x in features.values())  # gen's gradient too
        del case
        memory = [peak_memory(name, which, device) / 1e6 for which in DRIFT_FUNCTIONS]
        print(f"drift loss, {name}: plain port {plain * 1e3:.0f} ms, drift.py {ours * 1e3:.0f} ms, ratio {plain / ours:.2f}; "
              f"{least / 1e6:.0f} MB at least, {least / ours / 1e9:.1f} GB/s; memory beyond the inputs {memory[0]:.0f} MB, "
              f"{memory[1]:.0f} MB, ratio {memory[0] / memory[1]:.2f}", flush=True)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def rate(function, device, runs=3):
    """Calls by the second: the median of some, after one to warm up."""
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 1 / statistics.median(seconds[1:])


def bench_step():
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    matmul = rate(lambda: a @ a, device) * 2 * 4096**3
    print(f"a matrix product of 4096 in {dtype}: {matmul / 1e12:.3g} TFLOP/s", flush=True)
    ways = {"eager": [], "compiled": ["--compile"], "micro-batches": ["--micro_batches", "2"]}
    big = [("latent_ablation", 8), ("latent_L", 4), ("latent_L", 8), ("latent_L", 16)]
    for preset, labels in big if device == "cuda" else [("digits", 10)]:
        baseline = None
        for way, options in ways.items():
            command = [sys.executable, train.__file__, "--preset", preset, "--dry_run", "--labels", str(labels)]
            done = subprocess.run([*command, *options], capture_output=True, text=True)
            said, figure = done.stdout, lambda text: float(done.stdout.split(text)[1].split()[0])  # noqa: B023
            if "a step, measured" not in said:
                print(f"{preset}, {labels} labels, {way}: {(said + done.stderr).strip().splitlines()[-1]}", flush=True)
                continue
            seconds, flops = figure("a step, measured: "), figure("a step: ") * 1e12
            baseline = baseline or seconds
            images = labels * getattr(train.parse(["--preset", preset]), "gen")
            print(f"{preset}, {labels} labels, {way}: {seconds:.3g} s, ratio {baseline / seconds:.2f}, {images / seconds:.4g} "
                  f"images/s, {flops / seconds / 1e12:.3g} TFLOP/s, {flops / seconds / matmul:.0%} of the product's; memory "
                  f"predicted {figure('process, predicted: ')} GB, measured {figure('process, measured: ')} GB", flush=True)


def bench_reals(runs=9):
    with tempfile.TemporaryDirectory() as folder:
        prepare_data.prepare("digits", f"{folder}/data")
        data = prepare_data.Dataset(f"{folder}/data")
        train.EncoderStage.network(train.parse(["--preset", "digits_encoder"]), data).save_pretrained(f"{folder}/encoder")
        args = train.parse(["--preset", "digits", "--encoder", f"{folder}/encoder"])
        ways, seconds = {}, {}
        for way, train.KNOWN_BYTES in (("encoded in every step", 0), ("known", train.KNOWN_BYTES)):
            state, update = train.set_up(args, data, train.Stop())
            ways[way] = lambda step, stage=state["stage"], update=update: update(stage.batch(step), step)[1]()
        for step in range(runs + 1):  # the first warms up
            for way, function in ways.items():
                began = time.perf_counter()
                function(step)
                seconds.setdefault(way, []).append(time.perf_counter() - began)
        each, once = (statistics.median(s[1:]) for s in seconds.values())
        print(f"a step of digits, its reals encoded: {each:.3g} s, known: {once:.3g} s, ratio {each / once:.2f}", flush=True)


def bench_sample():
    import conftest
    device, n = ("cuda", 128) if torch.cuda.is_available() else ("cpu", 4)
    generator = model.Generator(**conftest.published_generator("B")).eval().to(device)
    baseline = None
    for way in ("float32, default format", "as sample.py has it", "the same compiled")[:3 if device == "cuda" else 2]:
        options = ["--compile"] if way.endswith("compiled") else []
        vae = train.open_vae(train.parse(["--preset", "latent_ablation", "--dry_run", *options]))  # random, of the SD-VAE's sizes
        if way.startswith("float32"):
            vae.net.float().to(memory_format=torch.contiguous_format)
        if options:
            generator.compile()
        for _ in range(2):  # the first warms up
            seconds = {}
            sample.generate(generator, np.arange(n), np.arange(n), batch_size=32, vae=vae, seconds=seconds)
        baseline = baseline or seconds["decoder"]
        print(f"generator B/2: {n / seconds['generator']:.3g} images/s; decoder, {way}: {n / seconds['decoder']:.3g} images/s, "
              f"ratio {baseline / seconds['decoder']:.2f}", flush=True)


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
    benches = {"drift": bench_drift, "step": bench_step, "reals": bench_reals, "sample": bench_sample, "frechet": bench_frechet,
               "load": bench_load, "read": bench_read}
    for name in sys.argv[1:] or benches:
        bench_load(["mae_latent_640"], 1) if name == "load640" else benches[name]()
