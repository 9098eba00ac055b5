"""Speed, as ratios within one run: `python tests/bench.py [names]`, on two threads, or as many as
OMP_NUM_THREADS says.

drift    the loss with its gradient against the plain port of tests/reference.py, as PyTorch runs it
         and with the scripts' setting of the allocator (model.keep_freed_memory): medians of the
         seconds, in turns, and the peak of memory, each in a process of its own
step     training steps by `train.py --dry_run`: eager, compiled, in micro-batches; seconds, FLOPs,
         their share of what a matrix product reaches, memory. On a GPU the paper's recipes, else
         digits
reals    a step of the digits run, whose reals pass the encoder once, against one that encodes them
sample   images a second of the generator and of the decoder, of latent_B_sota's and the SD-VAE's
         sizes with random weights, against float32 in torch's default memory format
frechet  the trace term of fid.py at 2048 dimensions against scipy.linalg.sqrtm: CPU seconds
load     files of the sizes of latent_B_sota, latent_L_sota and, with an optimizer's state, wflow_B,
         of random weights (3.7 GB in a temporary folder): seconds and peak of memory as a multiple
         of the network's size, the published form against the converted copy
load640  the same of mae_latent_640 (22 GB in a temporary folder)
read     a step's 4,096 latents from the prepared array against one .pt file for each
"""
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

THREADS = os.environ.get("OMP_NUM_THREADS", "2")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import conftest  # noqa: E402
import drift  # noqa: E402
import fid  # noqa: E402
import model  # noqa: E402
import prepare_data  # noqa: E402
import reference  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

os.environ["OMP_NUM_THREADS"] = THREADS  # of the processes started here; the tests have one thread
torch.set_num_threads(int(THREADS))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_turns(functions, runs, warm_up=1):
    """{name: function} -> {name: median seconds}, one after the other, again and again."""
    seconds = {name: [] for name in functions}
    for run in range(warm_up + runs):
        for name, function in functions.items():
            synchronize()
            began = time.perf_counter()
            function()
            synchronize()
            if run >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


# --------------------------------------------------------------------------------------------
# The drift loss

def mae_256_shapes():
    """(T, C) of the 86 features on MAE-256: 12 maps with 7 each, `global` and `norm_x` (A.5)."""
    maps = [(1024, 256)] * 3 + [(256, 512)] * 3 + [(64, 1024)] * 4 + [(16, 2048)] * 2
    shapes = [(1, 4096), (1, 4)]
    for T, C in maps:
        shapes += [(T // part, C) for part in (1, T, T, 4, 4, 16, 16)]
    return shapes


MAPS = [(1024, 64), (256, 64), (64, 128), (16, 256), (1, 512)]
SINKHORN_10 = ("sinkhorn", dict(iterations=10))
SINKHORN_1 = ("sinkhorn", dict(iterations=1))

# name: field, its options, shapes (T, C) of the features, and how many labels, generated,
# positive and unconditional samples of a label
DRIFT = {
    "drifting, [256, 64, 144, 128]": ("drifting", {}, [(1, 128)], 256, 64, 64, 16),
    "drifting, [256, 64, 144, 640]": ("drifting", {}, [(1, 640)], 256, 64, 64, 16),
    "drifting, five maps, 2 labels": ("drifting", {}, MAPS, 2, 64, 64, 16),
    "drifting, 86 features of MAE-256": ("drifting", {}, mae_256_shapes(), 1, 16, 16, 4),
    "Sinkhorn, 10 iterations, five maps": (*SINKHORN_10, MAPS, 2, 64, 64, 16),
    "Sinkhorn, 1 iteration, five maps": (*SINKHORN_1, MAPS, 2, 64, 64, 16),
}


def plain_drifting(gen, gen2, pos, uncond, cfg_scale):
    weight = drift.unconditional_weight(cfg_scale, gen.shape[1], uncond.shape[1])
    return reference.drift_loss(gen, pos, uncond, weight), {}


def plain_sinkhorn(*args, **options):
    return reference.sinkhorn_loss(*args, **options), {}


# The plain ports as fields of drift.py: what is around the fields is the same.
drift.FIELDS |= {"plain drifting": plain_drifting, "plain sinkhorn": plain_sinkhorn}


def drift_case(name, T=None, labels=None):
    """feature_loss's arguments, for at most T locations and so many labels."""
    field, options, shapes, all_labels, G, P, U = DRIFT[name]
    labels = labels or all_labels
    stream = torch.Generator(DEVICE).manual_seed(0)
    samples = []
    for n in (G, G, P, U):
        samples.append({f"{i}": torch.randn(labels, n, min(t, T or t), C, generator=stream,
                                            device=DEVICE) for i, (t, C) in enumerate(shapes)})
    alpha = 1 + 3 * torch.rand(labels, generator=stream, device=DEVICE)
    return field, options, [*samples, alpha]


def drift_step(prefix, field, options, case):
    """The loss and its gradient at the features; prefix: "" or "plain "."""
    gen = {name: x.detach().requires_grad_() for name, x in case[0].items()}
    drift.feature_loss(prefix + field, gen, *case[1:], **options)[0].backward()


DRIFT_ALONE = """
import sys
sys.path[:0] = {path}
import bench
bench.{function}{arguments}
"""


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def print_seconds(name, prefix, keep_freed, runs=7):
    """The median of several calls. keep_freed: whether glibc is told what all scripts tell it."""
    if keep_freed:
        model.keep_freed_memory()
    step = functools.partial(drift_step, prefix, *drift_case(name))
    print(in_turns({"": step}, runs, warm_up=2)[""])


def print_memory(name, prefix):
    """The peak of bytes beyond the inputs."""
    case = drift_case(name)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        drift_step(prefix, *case)
        print(torch.cuda.max_memory_allocated() - before)
        return
    # Once at one label and one location: pages of code and threads are not the loss's.
    drift_step(prefix, *drift_case(name, T=1, labels=1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here (Linux)
    before = resident("VmRSS")
    drift_step(prefix, *case)
    print(resident("VmHWM") - before)


def alone(function, *arguments):
    """What print_seconds or print_memory prints in a process of its own."""
    environment = dict(os.environ)
    if function is print_memory:  # freed pages go back at once: the peak is of tensors, not glibc's
        environment["MALLOC_TRIM_THRESHOLD_"] = "131072"
    code = DRIFT_ALONE.format(path=sys.path[:2], function=function.__name__, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          env=environment)
    return float(done.stdout)


def bench_drift(rounds=3):
    ways = [("plain ", False), ("plain ", True), ("", True)]  # whose loss, keep_freed
    for name in DRIFT:
        seconds = {way: [] for way in ways}
        for _ in range(rounds):  # in turns
            for way in ways:
                seconds[way].append(alone(print_seconds, name, *way))
        port, keeping, ours = [1e3 * statistics.median(seconds[way]) for way in ways]
        memory, our_memory = [alone(print_memory, name, prefix) / 1e6 for prefix in ("plain ", "")]
        print(f"{name}: plain port {port:.0f} ms, keeping freed memory {keeping:.0f} ms, drift.py "
              f"{ours:.0f} ms, ratios {port / ours:.2f} and {keeping / ours:.2f}; memory beyond "
              f"the inputs {memory:.0f} MB, {our_memory:.0f} MB, ratio {memory / our_memory:.2f}",
              flush=True)


# --------------------------------------------------------------------------------------------
# Training

# Presets and options; a GPU of 140 GB has no room for latent_L without --checkpoint_blocks.
CPU_STEPS = ["digits"]
GPU_STEPS = ["latent_ablation --labels 8", "latent_ablation --labels 8 --no-attn_fp32",
             "wflow_ablation --labels 8", "latent_L --labels 4 --checkpoint_blocks",
             "latent_L --labels 8 --checkpoint_blocks", "mae_latent_256 --batch_size 256"]


def bench_step():
    on_gpu = DEVICE == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (4096, torch.float32)
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    product = 2 * size**3 / in_turns({"": lambda: a @ a}, 3)[""] / 1e12
    print(f"a matrix product of {size} in {dtype}: {product:.3g} TFLOP/s", flush=True)
    del a
    torch.cuda.empty_cache()
    for case in GPU_STEPS if on_gpu else CPU_STEPS:
        for way in ("", " --compile", " --micro_batches 2"):
            command = [sys.executable, train.__file__, "--dry_run", "--preset",
                       *(case + way).split()]
            # A shell in between: Linux counts the peak of the process that starts another as the
            # other's own, and this one has had matrices.
            done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command],
                                  capture_output=True, text=True)
            lines = (done.stdout if done.returncode == 0 else done.stderr).splitlines()
            wanted = ("a step", "memory") if done.returncode == 0 else lines[-1:]
            said = [line for line in lines if line.startswith(tuple(wanted))]
            for rate in re.findall(r"([\d.e+-]+) TFLOP/s of each", done.stdout):
                said.append(f"{float(rate) / product:.0%} of the matrix product's TFLOP/s")
            print(f"{case}{way}: {'; '.join(said)}", flush=True)


def bench_reals(runs=9):
    with tempfile.TemporaryDirectory() as folder:
        prepare_data.prepare("digits", f"{folder}/data")
        data = prepare_data.Dataset(f"{folder}/data")
        encoder = train.EncoderStage(train.parse(["--preset", "digits_encoder"]), data).net
        encoder.save_pretrained(f"{folder}/encoder")
        run = train.Run(train.parse(["--preset", "digits", "--encoder", f"{folder}/encoder"]), data)
        kept = run.stage.kept

        def step(features):
            run.stage.kept = features
            run.update(run.stage.batch(0), 0)

        seconds = in_turns({"each": lambda: step(None), "once": lambda: step(kept)}, runs)
        each, once = seconds.values()
        print(f"a step of digits, its reals encoded: {each:.3g} s, encoded once: {once:.3g} s, "
              f"ratio {each / once:.2f}", flush=True)


# --------------------------------------------------------------------------------------------
# Sampling and evaluation

def bench_sample():
    n = 128 if DEVICE == "cuda" else 4
    generator = model.Generator(**conftest.published_generator("B")).eval().to(DEVICE)
    words = ["--preset", "latent_ablation", "--dry_run"]
    as_sampled = train.open_vae(train.parse(words), None)
    plain = train.open_vae(train.parse(words), None)
    plain.net.float().to(memory_format=torch.contiguous_format)
    functions = {"latents": lambda: sample.generate(generator, np.arange(n), np.arange(n))}
    latents = functions["latents"]().to(DEVICE)
    functions |= {"float32 decoder": lambda: plain.decode(latents),
                  "decoder as sample.py has it": lambda: as_sampled.decode(latents)}
    if DEVICE == "cuda":
        compiled = train.open_vae(train.parse([*words, "--compile"]), None)
        functions["the same compiled"] = lambda: compiled.decode(latents)
    with torch.no_grad():
        for name, seconds in in_turns(functions, 3).items():
            print(f"{name}: {n / seconds:.3g} images/s", flush=True)


def bench_frechet(d=2048):
    import scipy.linalg
    rng = np.random.default_rng(0)
    moments = []
    for shift in (0, 0.1):
        features = np.maximum(rng.standard_normal((4 * d, d)) + shift, 0)
        moments.append(fid.statistics(torch.from_numpy(features)))
    (mu1, sigma1), (mu2, sigma2) = moments
    began = time.process_time()
    mine = fid.frechet_distance(mu1, sigma1, mu2, sigma2)
    middle = time.process_time()
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())
    theirs = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * np.trace(root).real
    end = time.process_time()
    print(f"Frechet distance, {d} dimensions: scipy sqrtm {end - middle:.1f} CPU s, fid.py "
          f"{middle - began:.1f} CPU s, ratio {(end - middle) / (middle - began):.1f}, difference "
          f"{abs(mine - float(theirs)):.1e}")


# --------------------------------------------------------------------------------------------
# Reading

LOAD = """
import sys, time
sys.path[:0] = {path}
import bench, model
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here (Linux)
before = bench.resident("VmHWM")
began = time.perf_counter()
net = model.load_{kind}({folder!r})
for p in net.parameters():
    p.data.sum()  # so that every weight is in memory, mapped ones too
print(time.perf_counter() - began, bench.resident("VmHWM") - before)
if {copy!r}:
    net.save_pretrained({copy!r})
"""


def load(kind, folder, copy=None):
    """Seconds and peak of memory, in a process of its own."""
    code = LOAD.format(path=sys.path[:2], kind=kind, folder=str(folder), copy=copy and str(copy))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def wflow_checkpoint(folder, size):
    """A state_*.pt of W-Flow: weights, their average, and the optimizer's two averages."""
    example = torch.load(conftest.FIXTURES / "wflow_gen_tiny/state_00200000.pt", weights_only=True)
    their_names = {model.our_name(name, model.WFLOW_NAMES): name for name in example["ema_model"]}
    state = model.Generator(**conftest.published_generator(size)).state_dict()
    for i, table in enumerate(state.pop("style_embed")):
        state[f"style_embed.{i}"] = table.clone()
    weights = {}
    for name, tensor in state.items():
        # The example's first block and first table stand for all.
        first, number = re.subn(r"^(blocks|style_embed)\.\d+", r"\1.0", name)
        theirs = their_names[first]
        if number:
            theirs = theirs.replace(".0.", f".{name.split('.')[1]}.")
        weights[theirs] = tensor
    zeros = [{name: torch.zeros_like(x) for name, x in weights.items()} for _ in range(3)]
    averages = {name: {"exp_avg": zeros[1][name], "exp_avg_sq": zeros[2][name]} for name in weights}
    folder.mkdir()
    torch.save({"step": 1, "model": zeros[0], "ema_model": weights,
                "optimizer": {"state": averages, "param_groups": []}}, folder / "state_00000001.pt")


def bench_load(names=("latent_B_sota", "latent_L_sota", "wflow_B"), runs=3):
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            published = Path(temporary) / name
            copy = Path(temporary) / "copy"
            kind = "generator"
            if name == "mae_latent_640":
                kind = "encoder"
                conftest.random_artifact(published, "mae", base_channels=640)
            elif name == "wflow_B":
                wflow_checkpoint(published, "B")
            else:
                size = conftest.published_generator(name.split("_")[1])
                conftest.random_artifact(published, "gen", **size)
            load(kind, published, copy)
            size = (copy / "model.safetensors").stat().st_size
            figures = []
            for folder in (published, copy):
                columns = zip(*(load(kind, folder) for _ in range(runs)))
                figures.append([statistics.median(column) for column in columns])
            (theirs, peak), (mine, peak_copy) = figures
            print(f"loading {name}, {size / 1e9:.2f} GB: published form {theirs:.1f} s, peak "
                  f"{peak / size:.2f} times its size; converted copy {mine:.1f} s, "
                  f"{peak_copy / size:.2f} times; ratio {theirs / mine:.1f}", flush=True)


def bench_read(n=4096, runs=7):
    """Files hold mean and std, 16 KB; read are the means, and then draws with their noise."""
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "train"
        split.mkdir()
        rng = np.random.default_rng(0)
        array = rng.standard_normal((n, 2, 8, 32, 32), np.float32).astype(np.float16)
        array.tofile(split / "images.bin")
        np.save(split / "labels.npy", np.zeros(n, np.int64))
        meta = dict(kind="latents", dtype="float16", shape=array.shape, classes=["a"])
        (split / "meta.json").write_text(json.dumps(meta))
        for i, row in enumerate(array):
            mean, std = torch.from_numpy(row[0].copy()).split(4)
            torch.save({"mean": mean, "std": std}, split / f"{i}.pt")
        data = prepare_data.Dataset(folder)
        ids = rng.permutation(n)

        def files(rng=None):
            loaded = [torch.load(split / f"{i}.pt", weights_only=True) for i in ids]
            mean, std = (torch.stack([x[key] for x in loaded]).float() for key in ("mean", "std"))
            if rng is None:
                return mean
            return mean + std * torch.from_numpy(rng.standard_normal(mean.shape, np.float32))

        assert torch.equal(files(), data.batch(ids))
        for what, stream in (("means", None), ("drawn, on the CPU", rng)):
            seconds = in_turns({"files": lambda: files(stream),
                                "array": lambda: data.batch(ids, stream)}, runs, warm_up=0)
            theirs, mine = seconds.values()
            print(f"{n} latents ({what}): one .pt file each {theirs * 1e3:.0f} ms, the array "
                  f"{mine * 1e3:.0f} ms, ratio {theirs / mine:.1f}")


BENCHES = {"drift": bench_drift, "step": bench_step, "reals": bench_reals, "sample": bench_sample,
           "frechet": bench_frechet, "load": bench_load, "read": bench_read}

if __name__ == "__main__":
    for name in sys.argv[1:] or BENCHES:
        if name == "load640":
            bench_load(["mae_latent_640"], 1)
        else:
            BENCHES[name]()
