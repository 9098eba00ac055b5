"""Speed: `python tests/bench.py [SECTION]`, on two threads, or as many as OMP_NUM_THREADS says.

drift    the loss with its gradient against the plain port of tests/reference.py, as PyTorch runs it
         and with the scripts' setting of the allocator (model.keep_freed_memory): medians of the
         seconds, in turns, and the peak of memory, each in a process of its own
energy   what the energy distance adds at a logged step, over the digits' ten steps between two
reals    a step of the digits, whose reals pass the encoder once, against one that encodes them
sample   images a second of latent_B_sota's sizes and of the SD-VAE's decoder, with random weights
frechet  the trace term of fid.py at 2048 dimensions against scipy.linalg.sqrtm: CPU seconds
load     files of the sizes of latent_B_sota, latent_L_sota and, with an optimizer's state, wflow_B
         (3.7 GB in a temporary folder): seconds, and peak of memory over the network's size
load640  the same of mae_latent_640 (11 GB in a temporary folder)
read     a step's 4,096 latents from the prepared array against one .pt file for each

    python tests/bench.py step latent_L --labels 8 --checkpoint_blocks --compile
    python tests/bench.py step latent_B --labels 1 --gen 4 --pos 4 --uncond 2     # on a CPU

A preset's step with train.py's options, on random data with random encoders, so that nothing has
to be at hand: parameters, TFLOP, seconds, memory and the hours of --steps.
"""
import contextlib
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
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

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
    weight = (cfg_scale - 1) * (gen.shape[1] - 1) / uncond.shape[1]
    weight = weight[:, None].expand(-1, uncond.shape[1])
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
    if field == "drifting":  # which has no second samples
        samples[1] = None
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
# Steps of train.py with nothing at hand: random data, encoders and VAE

# What the presets' --data hold: kind, shape, classes, images of a class.
SHAPES = {"imagenet_latents": ("latents", (4, 32, 32), 1000, 1281),
          "imagenet256": ("pixels", (3, 256, 256), 1000, 1281),
          "cifar10": ("pixels", (3, 32, 32), 10, 5000), "digits": ("pixels", (1, 8, 8), 10, 144),
          "fashion-mnist": ("pixels", (1, 28, 28), 10, 6000)}


class RandomData(prepare_data.Dataset):
    """In place of prepare_data.Dataset: 1,440 random samples stand for all ids."""

    def __init__(self, folder):
        self.kind, self.shape, self.num_classes, count = SHAPES[Path(folder).name]
        self.meta = {"kind": self.kind, "classes": [str(c) for c in range(self.num_classes)]}
        self.labels = np.repeat(np.arange(self.num_classes), count)
        self.count = np.full(self.num_classes, count)
        self.first = np.cumsum(self.count) - count
        rng = np.random.default_rng(0)
        if self.kind == "pixels":
            self.images = rng.integers(0, 256, (1440, *self.shape), np.uint8)
        else:  # two views, each mean and standard deviation
            channels, *sides = self.shape
            images = rng.random((1440, 2, 2 * channels, *sides), np.float32)
            self.images = images.astype(np.float16)

    def batch(self, ids, *args, **options):
        return super().batch(np.asarray(ids) % len(self.images), *args, **options)


def random_encoder(name, args):
    """An encoder of the sizes of a preset, of the published weights of that name, or ConvNeXt's."""
    name = name.removeprefix("hf://")
    with torch.device(args.device):  # two billion random numbers take a CPU a minute
        if "convnextv2" in name:
            return model.ConvNeXtV2()
        if "dinov2" in name:
            sizes = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}
            return model.DINOv2(*sizes[name.split("-")[-1]])
        its_args = train.parse(["--preset", name, "--data", args.data, "--crop_scale", "1"])
        data = RandomData(args.data)
        return train.EncoderStage(its_args, data).net


def random_vae(device="cpu"):
    """Of the SD-VAE's sizes."""
    from diffusers import AutoencoderKL
    net = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                        down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)
    return model.VAE(net.to(device))


def random_run(words):
    """train.py's Run of these options, with nothing at hand."""
    args = train.parse(words)
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
                (prepare_data, "Dataset", RandomData),
                (model, "load_encoder", lambda path: random_encoder(path, args)),
                (model, "load_vae", lambda path, device, sha256: random_vae(device))):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        data = prepare_data.Dataset(args.data)
        return train.Run(args, data)


def training_step(run, step=0):
    """What train.py's loop does in a step, but for log, picture and checkpoint."""
    run.stage.backward(run.stage.batch(step), step, False)
    torch.nn.utils.clip_grad_norm_(run.params, run.args.clip)
    for optimizer in run.optimizers:
        optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.parameters()), run.params, 0.001)
    run.net.zero_grad()


def matrix_product():
    """TFLOP/s of a matrix product, to know the machine by."""
    size, dtype = (8192, torch.bfloat16) if DEVICE == "cuda" else (4096, torch.float32)
    a = torch.randn(size, size, device=DEVICE, dtype=dtype)
    return 2 * size**3 / in_turns({"": lambda: a @ a}, 3)[""] / 1e12


def bench_step(preset, *options):
    """The first step counts FLOPs, the second compiles and warms up, the third is timed."""
    product = matrix_product()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    run = random_run(["--preset", preset, *options])
    args = run.args
    for name, net in (("trained", run.net), *zip(getattr(args, "encoder", []), run.stage.encoders)):
        print(f"{name}: {sum(p.numel() for p in net.parameters()) / 1e6:.1f}M parameters")

    # torch counts attention's FLOPs under the names that it has on a GPU.
    aten = torch.ops.aten
    name = "_scaled_dot_product_flash_attention"
    for end in ("", "_backward"):
        on_cpu = getattr(aten, f"{name}_for_cpu{end}")
        flop_registry[on_cpu] = flop_registry[getattr(aten, name + end)]
    counter = FlopCounterMode(display=False)
    with counter, torch.compiler.set_stance("force_eager"):
        training_step(run, 0)
    training_step(run, 1)
    seconds = in_turns({"": lambda: training_step(run, 2)}, 1, warm_up=0)[""]
    tflop = counter.get_total_flops() / 1e12
    if DEVICE == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resident("VmHWM")
    print(f"a step: {tflop:.4g} TFLOP, {seconds:.3g} s, {tflop / seconds:.3g} TFLOP/s, a matrix "
          f"product has {product:.3g}; memory {memory / 1e9:.2f} GB; {args.steps} steps: "
          f"{seconds * args.steps / 3600:.2f} h, without pictures, evaluations and checkpoints")


def bench_energy(runs=15):
    run = random_run(["--preset", "digits"])
    batch = run.stage.batch(0)
    with torch.no_grad():
        gen = run.stage.features(run.stage.generate(batch))
        ids = batch["ids"][:, :run.args.pos]
        pos = {name: f[ids, 0] for name, f in run.stage.cached_reals.items()}

    def figure():
        for name in gen:
            drift.energy_sums(drift.entries_of(gen[name]), drift.entries_of(pos[name]))

    figure_s, step_s = in_turns({"": figure, "step": lambda: training_step(run)}, runs).values()
    print(f"the energy distance of the digits {figure_s:.3g} s, a step {step_s:.3g} s, of ten "
          f"steps {figure_s / step_s / 10:.2%}")


def bench_reals(runs=9):
    run = random_run(["--preset", "digits"])
    kept = run.stage.cached_reals

    def step(features):
        run.stage.cached_reals = features
        training_step(run)

    each, once = in_turns({"each": lambda: step(None), "once": lambda: step(kept)}, runs).values()
    print(f"a step of digits, its reals encoded: {each:.3g} s, encoded once: {once:.3g} s, ratio "
          f"{each / once:.2f}")


# --------------------------------------------------------------------------------------------
# Sampling and evaluation

def bench_sample():
    n = 128 if DEVICE == "cuda" else 4
    generator = model.Generator(**conftest.published_generator("B")).eval().to(DEVICE)
    args = train.parse(["--preset", "latent_ablation"])
    as_sampled = train.frozen(random_vae(), args)
    plain = random_vae().to(DEVICE)
    plain.net.to(memory_format=torch.contiguous_format)
    functions = {"latents": lambda: sample.generate(generator, np.arange(n), np.arange(n))}
    latents = functions["latents"]().to(DEVICE)
    functions |= {"float32 decoder": lambda: plain.decode(latents),
                  "decoder as sample.py has it": lambda: as_sampled.decode(latents)}
    if DEVICE == "cuda":
        compiled = train.frozen(random_vae(), args)
        compiled.net.decoder.compile()
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
before = bench.resident("VmRSS")
began = time.perf_counter()
net = model.load_{kind}({folder!r})
for p in net.parameters():
    p.data.sum()  # so that every weight is in memory, mapped ones too
size = sum(p.numel() * p.element_size() for p in net.parameters())
print(time.perf_counter() - began, bench.resident("VmHWM") - before, size)
"""


def load(kind, folder):
    """Seconds, peak of memory and the network's size, in a process of its own."""
    code = LOAD.format(path=sys.path[:2], kind=kind, folder=str(folder))
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
    for name, tensor in state.items():  # the example's first block and table stand for all
        first, number = re.subn(r"^(blocks|style_embed)\.\d+", r"\1.0", name)
        theirs = their_names[first]
        if number:
            theirs = theirs.replace(".0.", f".{name.split('.')[1]}.")
        weights[theirs] = tensor
    zeros = [{name: torch.zeros_like(x) for name, x in weights.items()} for _ in range(3)]
    folder.mkdir()
    torch.save({"step": 1, "model": zeros[0], "ema_model": weights, "optimizer": zeros[1:]},
               folder / "state_00000001.pt")


def bench_load(names=("latent_B_sota", "latent_L_sota", "wflow_B"), runs=3):
    for name in names:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            kind = "generator"
            if name == "mae_latent_640":
                kind = "encoder"
                conftest.random_artifact(folder, "mae", base_channels=640)
            elif name == "wflow_B":
                wflow_checkpoint(folder, "B")
                folder = folder / "state_00000001.pt"
            else:
                size = conftest.published_generator(name.split("_")[1])
                conftest.random_artifact(folder, "gen", **size)
            columns = zip(*(load(kind, folder) for _ in range(runs)))
            seconds, peak, size = [statistics.median(column) for column in columns]
            print(f"loading {name}, {size / 1e9:.2f} GB: {seconds:.1f} s, peak {peak / size:.2f} "
                  "times its size", flush=True)


def bench_read(n=4096, runs=7):
    """Files hold mean and std, 16 KB; read are the means."""
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

        def files():
            loaded = [torch.load(split / f"{i}.pt", weights_only=True) for i in ids]
            return torch.stack([x["mean"] for x in loaded]).float()

        assert torch.equal(files(), data.batch(ids))
        theirs, mine = in_turns({"": files, "array": lambda: data.batch(ids)}, runs).values()
        print(f"{n} latents: one .pt file each {theirs * 1e3:.0f} ms, the array {mine * 1e3:.0f} "
              f"ms, ratio {theirs / mine:.1f}")


BENCHES = {"drift": bench_drift, "energy": bench_energy, "reals": bench_reals,
           "sample": bench_sample, "frechet": bench_frechet, "load": bench_load,
           "load640": lambda: bench_load(["mae_latent_640"], 1), "read": bench_read}

if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        bench_step(*sys.argv[2:])
    else:
        for name in sys.argv[1:] or [name for name in BENCHES if name != "load640"]:
            BENCHES[name]()
