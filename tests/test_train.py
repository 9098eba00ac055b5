"""train.py by running it: small runs that are stopped, killed, resumed, split up and edited."""
import glob
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import fid
import model
import prepare_data
import sample
import train
from conftest import ROOT, forked_ranks, needs_gpu, relative_error
from model import UsageError

ENCODER = dict(
    stage="encoder", data="data/digits", out="runs/e", base_channels=64, layers=[1, 1],
    batch_size=16, steps=6, lr=1e-3, warmup=2, cls_steps=3, log_every=1, save_every=3,
    sample_every=100)
GENERATOR = dict(
    data="data/digits", out="runs/g", encoder="runs/e", model="XS", labels=4, gen=4, pos=6,
    uncond=2, steps=6, lr=1e-3, warmup=2, cooldown=0.3, push=32, flip=True, log_every=1,
    save_every=3, sample_every=100)
INDEX = GENERATOR | dict(reals="index")
SINKHORN = GENERATOR | dict(field="sinkhorn")

SMALL = dict(hidden_size=32, depth=1, num_heads=2, n_cls_tokens=2)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The current folder of this module's tests, with prepared digits and a small encoder."""
    folder = tmp_path_factory.mktemp("home")
    before = os.getcwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.GENERATOR_SIZES, "XS", SMALL)
        prepare_data.prepare(prepare_data.DIGITS, "data/digits")
        start(ENCODER)
        start(GENERATOR)
        yield folder
    os.chdir(before)


@pytest.fixture(scope="module", autouse=True)
def background(home):
    """This file as a script, see its end, which works while the tests of one process run."""
    with open("findings", "w") as out, open("errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, __file__], stdout=out, stderr=errors, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)})
    yield process
    if process.poll() is None:  # nobody waited for it
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def found(background):
    """What it found, by name."""
    code = background.wait(180)
    assert code == 0, Path("errors").read_text()[-3000:]
    return json.loads(Path("findings").read_text().splitlines()[-1])


def words(options, **changes):
    """A command line. True is a switch, None leaves an option out, a list is several values."""
    line = []
    for name, value in {**options, **changes}.items():
        if value is None:
            continue
        line.append(f"--{name}" if value is not False else f"--no-{name}")
        if isinstance(value, list):
            line += map(str, value)
        elif not isinstance(value, bool):
            line.append(str(value))
    return line


def start(options, **changes):
    return train.main(words(options, **changes))


def parsed(options, **changes):
    return train.parse(words(options, device="cpu", **changes))


def digits():
    return prepare_data.Dataset("data/digits")


def weights(run, step=6):
    """All tensors of a checkpoint: in training, their average, the optimizer's."""
    folder = Path(f"{run}/step_{step:08d}")
    state = torch.load(folder / "train_state.pt", weights_only=True)
    averaged = load_file(folder / "model.safetensors")
    tensors = {f"ema.{name}": x.clone() for name, x in averaged.items()}
    tensors |= {f"net.{name}": x for name, x in state["net"].items()}
    for k, optimizer in enumerate(state["optimizers"]):
        for i, slots in optimizer["state"].items():
            tensors |= {f"optimizer.{k}.{i}.{name}": x for name, x in slots.items()}
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def write_images(folder, counts):
    """{class: images} as folder/CLASS/*.png of 12 x 12 pixels."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def log(run, key="loss"):
    """The lines of log.jsonl that have this figure."""
    lines = [json.loads(line) for line in open(f"{run}/log.jsonl")]
    return [line for line in lines if key in line]


def randomised(net):
    """As initialised the last layer is zero: all images are alike, and no gradient passes it."""
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return net


# --------------------------------------------------------------------------------------------
# Stopped and resumed, one run a folder

@pytest.mark.parametrize("options", [
    ENCODER | dict(crop_scale=0.3), GENERATOR, INDEX | dict(muon=True, head_channels=4), SINKHORN])
def test_stopped_and_resumed_is_bit_equal(home, options):
    for run in ("runs/whole", "runs/parts"):
        shutil.rmtree(run, ignore_errors=True)
    start(options, out="runs/whole")
    shutil.copytree("runs/whole", "runs/parts")
    shutil.rmtree("runs/parts/step_00000006")
    (home / "runs/parts/step_00000005.tmp").mkdir()  # of a run that was killed
    start(options, out="runs/parts")
    assert_same(weights("runs/whole"), weights("runs/parts"))
    assert [line["step"] for line in log("runs/parts")] == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_resuming_on_other_data_or_another_encoder_is_refused(home, capsys):
    start(GENERATOR, out="runs/other", steps=1)
    start(ENCODER, out="runs/e2", seed=1, steps=1)
    with pytest.raises(UsageError, match="with another encoder"):
        start(GENERATOR, out="runs/other", steps=2, encoder="runs/e2")
    write_images(home / "images", {"a": 9, "b": 9})
    prepare_data.prepare("images", "data/other", 8, 1)
    for steps in (1, 2):  # also of a run that has its steps
        with pytest.raises(UsageError, match="trained on other data"):
            start(GENERATOR, out="runs/other", steps=steps, data="data/other", labels=2)
    start(GENERATOR, out="runs/other", steps=2, lr=1e-4)  # what people resume for
    assert "was trained with --lr 0.001, now 0.0001" in capsys.readouterr().err


def test_one_run_a_folder(home):
    """While one process holds a folder another is told so; a finished run is not claimed."""
    os.makedirs("runs/locked", exist_ok=True)
    code = ("import fcntl, sys\n"
            "locks = [open(f'runs/{run}/.lock', 'w') for run in ('locked', 'g')]\n"
            "[fcntl.flock(lock, fcntl.LOCK_EX) for lock in locks]\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UsageError, match="another run writes to runs/locked"):
        start(GENERATOR, out="runs/locked")
    start(GENERATOR)  # has its steps already
    holder.communicate()
    start(GENERATOR, out="runs/locked", steps=1)


# --------------------------------------------------------------------------------------------
# What a step draws and computes

@pytest.mark.parametrize("options", [GENERATOR, INDEX, SINKHORN])
def test_draws_depend_on_seed_and_step_alone(home, monkeypatch, options):
    """A step's batch, put together from 1, 2 and 4 processes, has the same bits."""
    drawn = {}
    for world in (1, 2, 4):
        monkeypatch.setattr(train, "world_size", lambda: world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(train, "get_rank", lambda: rank)
            stage = train.GeneratorStage(parsed(options), digits())
            shares.append(stage.batch(3))
        drawn[world] = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    assert drawn[1].keys() == {"labels", "alpha", "noise", "styles", "reals", "ids"}
    assert drawn[1]["noise"].shape[1] == (8 if options is SINKHORN else 4)
    for name, one in drawn[1].items():
        assert torch.equal(one, drawn[2][name])
        assert torch.equal(one, drawn[4][name])
        assert one.float().std() > 0
    assert not torch.equal(shares[3]["noise"], stage.batch(4)["noise"])


def test_the_second_batch_is_independent(home):
    """The same labels and alphas, noise and styles of its own, no gradients."""
    stage = train.GeneratorStage(parsed(SINKHORN), digits())
    randomised(stage.net)
    batch = stage.batch(0)
    second = stage.generate_second(batch)
    others = {name: batch[name][:, 4:] for name in ("noise", "styles")}
    assert not second.requires_grad
    with torch.no_grad():
        assert relative_error(second, stage.generate({**batch, **others})) < 1e-6
        assert relative_error(second, stage.generate(batch)) > 0.1


def test_queues_follow_from_the_step(home):
    """A stage that is asked for step 5 at once draws what one does that went there step by step."""
    args = parsed(GENERATOR)
    stage = train.GeneratorStage(args, digits())
    steps = [stage.batch(step) for step in range(6)]
    assert_same(train.GeneratorStage(args, digits()).batch(5), steps[5])
    assert_same(stage.batch(2), steps[2])


def test_features_of_unchanging_reals_are_kept(home):
    """Loss and gradient are those of a step that encodes its images."""
    results = []
    for parts in (1, 2):
        torch.manual_seed(0)
        stage = train.GeneratorStage(parsed(INDEX, flip=None, micro_batches=parts), digits())
        randomised(stage.net)
        for kept in (stage.cached_reals, None):
            stage.cached_reals = kept
            stage.net.zero_grad()
            loss = stage.backward(stage.batch(0), 0, False)["loss"].item()
            grad = torch.cat([p.grad.flatten() for p in stage.net.parameters()])
            results.append((loss, grad))
    assert train.GeneratorStage(parsed(INDEX), digits()).cached_reals is None  # --flip
    assert results[1][1].norm() > 1e-3
    for loss, grad in results:
        assert loss == pytest.approx(results[1][0], rel=1e-5)
        assert relative_error(grad, results[1][1]) < 1e-4


def test_encoder_of_latents_from_pixels(home, monkeypatch):
    """What an image becomes (crop, mirror, draw of its latents) depends on seed and step alone."""
    def encode(x):
        mean = torch.nn.functional.avg_pool2d(x, 8)[:, [0, 0, 0, 0]]
        return mean, torch.full_like(mean, 0.1)

    load_batch = prepare_data.Dataset.batch

    def enlarged(*args, **options):
        return load_batch(*args, **options).repeat_interleave(4, 2).repeat_interleave(4, 3)

    monkeypatch.setattr(train, "open_vae", lambda args, data: SimpleNamespace(encode=encode))
    monkeypatch.setattr(prepare_data.Dataset, "batch", enlarged)
    data = digits()
    data.shape = (1, 32, 32)
    stage = train.EncoderStage(parsed(ENCODER, crop_scale=0.2, to_latents=True), data)
    whole = stage.batch(1)
    halves = []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "get_rank", lambda: rank)
        halves.append(stage.batch(1))
    assert whole["x"].shape == (16, 4, 4, 4)
    for name, x in whole.items():
        assert torch.equal(x, torch.cat([half[name] for half in halves]))
    noise = whole["x"][:, 0] - whole["x"][:, 1]  # of two channels with one mean
    assert noise.std() == pytest.approx(0.1 * 2**0.5, rel=0.2)
    mask = whole["mask"]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.5, abs=0.1)


@needs_gpu
def test_a_run_on_a_gpu(home):
    """The presets' defaults there, bfloat16 among them: encoder, generator, resumed, sampled."""
    train.main("--preset digits_encoder --steps 4 --out runs/gpu_e".split())
    line = "--preset digits --out runs/on_gpu --encoder runs/gpu_e --save_every 2".split()
    for steps in ("4", "6"):
        train.main([*line, "--steps", steps])
    assert log("runs/on_gpu")[-1]["step"] == 6
    sample.main("--ckpt runs/on_gpu --num_images 10 --out on_gpu.png".split())
    assert Path("on_gpu.png").is_file()


# --------------------------------------------------------------------------------------------
# The update: learning rate, average, steps that are not finite

def test_pixel_reals_are_cropped_and_mirrored(home):
    """--crop_scale gives other views of the same images, in [-1, 1], and changes nothing else."""
    plain, cropped = [
        train.GeneratorStage(parsed(GENERATOR, crop_scale=scale), digits()).batch(0)
        for scale in (1, 0.2)]
    for name in ("labels", "alpha", "noise", "styles"):
        assert torch.equal(plain[name], cropped[name])
    assert cropped["reals"].shape == plain["reals"].shape
    assert cropped["reals"].abs().max() <= 1
    distance = (cropped["reals"] - plain["reals"]).square().mean((2, 3, 4))
    assert (distance > 1e-3).float().mean() > 0.9


def test_networks_compile_without_graph_breaks():
    net = model.Generator(8, 1, patch_size=4, num_classes=10, **SMALL).train()
    net.checkpoint_blocks = True
    inputs = (torch.randn(4, 1, 8, 8), torch.arange(4), torch.ones(4),
              torch.zeros(4, 32, dtype=torch.long))
    mae = model.MAE(1, 16, (1,), num_classes=10).eval()
    convnext = model.ConvNeXtV2((1, 1), (8, 16)).eval()
    cases = [(net.forward, inputs), (mae.features, inputs[:1]),
             (convnext.features, (torch.randn(2, 3, 32, 32),))]
    for function, args in cases:
        torch._dynamo.reset()
        graphs = torch._dynamo.explain(function)(*args)
        assert (graphs.graph_count, graphs.graph_break_count) == (1, 0), graphs.break_reasons
    torch._dynamo.reset()


def test_weights_that_are_not_finite_are_not_saved(home):
    with pytest.raises(UsageError, match="not finite|NaN"):
        start(GENERATOR, out="runs/diverged", lr=1e30, warmup=0, steps=30, save_every=1)
    assert not glob.glob("runs/diverged/step_*")


def test_learning_rate():
    args = SimpleNamespace(steps=100, warmup=10, cooldown=0.2, lr=1.0)
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=1e-5)
    assert rates[9:81] == [pytest.approx(1.0)] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_the_average_is_an_exponential_one(home):
    """By hand over the weights of every step."""
    options = GENERATOR | dict(ema_decay=0.4, cooldown=0)
    torch.manual_seed(0)
    average = train.GeneratorStage(parsed(options), digits()).net.state_dict()
    average = {name: x.clone() for name, x in average.items()}
    for step in range(4):
        start(options, out="runs/ema", steps=step + 1)
        tensors = weights("runs/ema", step + 1)
        decay = min(0.4, (step + 1) / (step + 10))
        for name in average:
            average[name] = decay * average[name] + (1 - decay) * tensors[f"net.{name}"]
            assert torch.allclose(tensors[f"ema.{name}"], average[name], atol=1e-6)


def test_steps_that_are_not_finite_are_skipped(home, monkeypatch, capsys):
    """Such a step leaves no trace in the weights and is said; ten in a row end the run."""
    backward = train.GeneratorStage.backward
    spoilt = {3}

    def spoil(self, batch, step, log):
        logs = backward(self, batch, step, log)
        if step in spoilt:
            self.net.patch_embed.weight.grad[0, 0] = math.nan
        return logs

    monkeypatch.setattr(train.GeneratorStage, "backward", spoil)
    options = GENERATOR | dict(out="runs/nan", save_every=1, cooldown=0)
    start(options, steps=4)
    assert_same(weights("runs/nan", 3), weights("runs/nan", 4))
    assert "step 4 skipped" in capsys.readouterr().err
    start(options, steps=5)
    assert not torch.equal(weights("runs/nan", 4)["net.pos_embed"],
                           weights("runs/nan", 5)["net.pos_embed"])
    spoilt.update(range(6, 100))
    with pytest.raises(UsageError, match="10 steps in a row were not finite"):
        start(options, steps=30)
    with pytest.raises(UsageError, match="not finite|NaN"):  # weights, which are not saved
        start(GENERATOR, out="runs/diverged", lr=1e30, warmup=0, steps=30, save_every=1)
    assert not glob.glob("runs/diverged/step_*")


def test_evaluation_inside_training(home):
    """Its figures are those of fid.py afterwards, and training goes on as without it."""
    start(GENERATOR, out="runs/evaluated", eval_every=3, eval_images=120,
          eval_features="encoder:runs/e")
    assert_same(weights("runs/g"), weights("runs/evaluated"))
    rows = log("runs/evaluated", "fd")
    assert [(row["step"], row["num_images"]) for row in rows] == [(1, 100), (3, 120), (6, 120)]
    extractor = fid.Extractor("encoder:runs/e")
    reference = fid.open_reference(extractor, data="data/digits")
    images = fid.generated(model.load_generator("runs/evaluated"))
    again = fid.evaluate(images, 120, extractor, reference)
    assert again["fd"] == pytest.approx(rows[-1]["fd"], rel=1e-6)
    best = json.loads(Path("runs/evaluated/best/score.json").read_text())
    assert best["score"] == min(row["fd"] for row in rows[1:])


# --------------------------------------------------------------------------------------------
# Presets

# The paper's table: model, labels, G, P, U, alpha's power and share of ones, learning rate, weight
# decay, warm-up, steps, float32 attention.
PAPER = {
    "latent_ablation": ("B", 64, 64, 64, 16, 3, 0, 2e-4, 0.01, 5000, 30000, True),
    "latent_B": ("B", 128, 64, 64, 32, 5, 0, 4e-4, 0, 10000, 200000, False),
    "latent_L": ("L", 128, 64, 64, 32, 3, 0.5, 4e-4, 0.01, 10000, 200000, False),
    "pixel_B": ("B", 128, 64, 128, 32, 5, 0, 2e-4, 0.01, 10000, 100000, True),
    "pixel_L": ("L", 128, 64, 128, 32, 5, 0, 4e-4, 0.01, 10000, 100000, True),
    "wflow_ablation": ("B", 64, 64, 64, 16, 3, 0, 2e-4, 0.01, 5000, 30000, True),
    "wflow_B": ("B", 128, 64, 64, 32, 5, 0, 4e-4, 0, 10000, 200000, False),
    "wflow_L": ("L", 128, 64, 64, 32, 3, 0.5, 4e-4, 0.01, 10000, 200000, False),
    "wflow_XL": ("XL", 128, 64, 128, 32, 4, 0.2, 3e-4, 0.01, 10000, 200000, False),
}
# Of W-Flow's: regularisation, iterations, samples pushed by 8 and 64 hosts together.
WFLOW = {
    "wflow_ablation": (0.05, 10, 64 * 8), "wflow_B": (0.05, 10, 128 * 64),
    "wflow_L": (0.05, 1, 128 * 64), "wflow_XL": (0.01, 1, 128 * 64)}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_recipes(name):
    args = train.parse(["--preset", name, "--device", "cpu"])
    row = (args.model, args.labels, args.gen, args.pos, args.uncond, args.alpha_power,
           args.alpha_fixed, args.lr, args.weight_decay, args.warmup, args.steps, args.attn_fp32)
    assert row == PAPER[name]
    shared = (args.clip, args.ema_decay, args.reals, args.flip, args.cooldown)
    assert shared == (2.0, 0.999, "queue", True, 0)
    assert args.field == ("sinkhorn" if name.startswith("wflow") else "drifting")
    pixels = name.startswith("pixel")
    assert args.crop_scale == (0.2 if pixels else 1)
    width = 256 if name.endswith("ablation") else 640
    convnext = ["hf://facebook/convnextv2-base-22k-224"] if pixels else []
    assert args.encoder == [f"hf://mae_{'pixel' if pixels else 'latent'}_{width}", *convnext]
    assert args.patch_size == (16 if pixels else 2)
    if name.startswith("wflow"):
        assert (args.entropic_reg, args.iterations, args.push) == WFLOW[name]
    else:
        assert args.push == (1024 if name == "latent_ablation" else 2048)


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets_are_made_of_options(name):
    """None is misspelt, and the command line overrides it."""
    preset = train.PRESETS[name]
    line = ["--preset", name] + ([] if "data" in preset else ["--data", "mine.zip"])
    assert preset.items() <= vars(train.parse(line)).items()
    assert preset.keys() <= vars(train.build_parser().parse_args([])).keys()
    assert train.parse([*line, "--steps", "7"]).steps == 7


# --------------------------------------------------------------------------------------------
# From images to grids in one command, and other classes

@pytest.mark.parametrize("counts", [
    {"cat": 5, "dog": 1, "emu": 9}, {"only": 5}, {f"c{i}": 1 + i % 2 for i in range(200)}],
    ids=["unbalanced", "one class", "200 classes"])
def test_small_goes_from_images_to_grids(home, tmp_path, monkeypatch, counts):
    """--preset small: data, encoder, generator and pictures."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "mine", counts)
    shutil.make_archive("mine", "zip", "mine")
    for name, value in dict(batch_size=4, base_channels=16, steps=2).items():
        monkeypatch.setitem(train.PRESETS["small_encoder"], name, value)
    line = "--preset small --data mine.zip --size 8 --steps 2 --gen 4 --pos 6 --device cpu".split()
    train.main(line)
    assert prepare_data.Dataset("data/mine").meta["classes"] == list(counts)
    assert [row["step"] for row in log("runs/mine_encoder")] == [1, 2]
    state = torch.load("runs/mine/step_00000002/train_state.pt", weights_only=True)
    assert len(state["net"]["class_embed.weight"]) == len(counts)
    with Image.open("runs/mine/samples_00000002.png") as grid:
        assert grid.width == min(len(counts), 10) * 82 - 2


def test_a_source_is_not_prepared_into_somebodys_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data/mine", {"cat": 2})
    shutil.make_archive("mine", "zip", "data/mine")
    for source in ("mine.zip", "data/mine"):
        assert prepare_data.prepared(source, 8) == "data/mine_prepared"
        assert os.listdir("data/mine") == ["cat"]
        shutil.rmtree("data/mine_prepared")
    prepare_data.prepare("mine.zip", "data/digits", 8)
    with pytest.raises(UsageError, match="other images"):  # they are not taken for digits
        prepare_data.prepared("data/digits", None)


@pytest.mark.parametrize("names", [["3", "new", "9"], list("1234567890"), list("0123456789")])
def test_init_from_starts_other_classes_anew(home, capsys, names):
    """In another order they are other ones, even if they are as many."""
    same = names == list("0123456789")
    for run, load in (("runs/e", model.load_encoder), ("runs/g", model.load_generator)):
        source = load(run)
        net = type(source)(**{**source._hub_mixin_config, "num_classes": len(names)})
        net.origin = {"classes": names}
        before = {name: x.clone() for name, x in net.state_dict().items()}
        train.start_from(run, net)
        assert ("these start anew" in capsys.readouterr().err) is not same
        theirs = source.state_dict()
        for name, own in net.state_dict().items():
            anew = name in ("class_embed.weight", "fc.weight", "fc.bias") and not same
            assert torch.equal(own, (before if anew else theirs)[name]), name


# --------------------------------------------------------------------------------------------
# Editing: nothing here stands against the person who changes the scripts

EDITS = {  # name: file, old line, new lines
    "a number": ("model.py", "attn_fp32=False, ", "attn_fp32=False, dropout=0.0, "),
    "a switch": ("model.py", "attn_fp32=False, ", "attn_fp32=False, mirrored=False, "),
    "a text": ("model.py", "attn_fp32=False, ", "attn_fp32=False, norm='rms', "),
    "a buffer": ("model.py", "        self._initialise()\n", """        self._initialise()
        self.register_buffer("ramp", torch.linspace(0, 1, 8), persistent=False)
        self.register_buffer("count", torch.zeros(()))

        def count(net, args):
            net.count += net.training
        self.register_forward_pre_hook(count)
        self.unused = nn.Parameter(torch.ones(3))
"""),
    "an encoder": ("model.py", "ENCODERS = {", """class Mean(nn.Module, Pretrained):
    def __init__(self, in_channels=1):
        super().__init__()
        self.in_channels = in_channels

    def features(self, x):
        return {"mean": x.mean((2, 3))[:, None]}


ENCODERS = {"mean": Mean, """),
}
FAULTS = {  # name: file, old, new, what the traceback must show
    "in features": ("model.py", "        x = self.patchify(x)\n        norm_x",
                    "        x = self.patchify(x).q\n        norm_x", "x = self.patchify(x).q"),
    "in the kernel": ("drift.py", "    logits = dist / -tau", "    logits = dist / -tau / none",
                      "logits = dist / -tau / none"),
    "in the loader": ("prepare_data.py", "        ids = np.asarray(ids)",
                      "        ids = np.array(ids.id)", "ids.id"),
}
USE_EDITS = """
import model, sample, train
line = ("--data data/digits --out runs/edited --encoder runs/e runs/mean --model XS --labels 2 "
        "--gen 4 --pos 4 --uncond 2 --push 8 --device cpu --steps ").split()
model.Mean().save_pretrained("runs/mean")
model.GENERATOR_SIZES["XS"] = dict(hidden_size=32, depth=1, num_heads=2, n_cls_tokens=2)
train.main([*line, "2"])
train.main([*line, "3"])
net = model.load_generator("runs/edited")
assert net.ramp[-1] == 1 and net.ramp.device.type == "cpu"
assert net.count == 3 and (net.unused == 1).all()
sample.main("--ckpt runs/edited --num_images 4 --out edited.png".split())
"""


def copy_of_the_scripts(folder):
    folder.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "assets").symlink_to(ROOT / "assets")


def edit(folder, file, old, new):
    source = (folder / file).read_text()
    assert source.count(old) == 1, old
    (folder / file).write_text(source.replace(old, new))


def test_what_is_added_trains_saves_resumes_and_samples(home, tmp_path):
    """Arguments of one's own (0.0, False, a text), computed and counting buffers, a parameter that
    nothing uses, an encoder of no weights."""
    copy_of_the_scripts(tmp_path / "edited")
    for file, old, new in EDITS.values():
        edit(tmp_path / "edited", file, old, new)
    done = subprocess.run([sys.executable, "-c", USE_EDITS], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "edited")})
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads(Path("runs/edited/step_00000003/config.json").read_text())
    assert (config["dropout"], config["mirrored"], config["norm"]) == (0.0, False, "rms")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bug_shows_the_line_that_is_wrong(home, tmp_path, fault):
    """On two processes too: the other one is ended."""
    file, old, new, line = FAULTS[fault]
    copy_of_the_scripts(tmp_path / "bug")
    edit(tmp_path / "bug", file, old, new)
    launch = [sys.executable]
    if fault == "in the kernel":
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(tmp_path / "bug/train.py"),
                           *words(GENERATOR, out="runs/bug", device="cpu")],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert line in done.stderr


# --------------------------------------------------------------------------------------------
# Several processes: what the script in the background found

def test_killed_at_any_moment(found):
    """20 SIGKILLs, some within a checkpoint: the weights are an undisturbed run's, bit for bit."""
    assert found["kills"] == 20
    assert found["partial"] >= 4
    assert_same(weights("runs/calm", 70), weights("runs/killed", 70))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "two processes"])
def test_a_signal_saves_and_ends(found, name):
    """One process is asked; all save the same step within seconds. The exit code says: not done."""
    codes, seconds, saved = found[name]
    assert set(codes) == {1}
    assert seconds < 5
    assert len(saved) == 1


def test_an_ignored_hangup_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.signals_to_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_and_micro_batches_train_what_one_pass_does(found):
    """1, 2, 4 processes, each with 1, 2, 4 micro-batches: loss, energy, gradient, 10 steps."""
    for stage in ("g", "s", "e"):
        one = torch.load(f"runs/equal_{stage}_1_1.pt")
        first = log(f"runs/equal_{stage}_1_1")[0]
        assert one.norm() > 1e-3
        for world in (1, 2, 4):
            for parts in (1, 2, 4):
                run = f"runs/equal_{stage}_{world}_{parts}"
                row = log(run)[0]
                assert row["loss"] == pytest.approx(first["loss"], rel=1e-5), run
                if stage != "e":
                    assert row["energy"] == pytest.approx(first["energy"], rel=1e-3, abs=1e-4), run
                assert relative_error(torch.load(f"{run}.pt"), one) < 1e-4, run
    losses = [row["loss"] for row in log("runs/equal_g_1_1")]
    assert len(losses) == 10
    for world, parts in CURVES:
        split = [row["loss"] for row in log(f"runs/equal_g_{world}_{parts}")]
        assert split == pytest.approx(losses, rel=1e-3)


# --------------------------------------------------------------------------------------------
# This file as a script forks many processes from one that has imported everything, which takes
# seconds, and has computed nothing: each is as fresh as a started one.

TINY = dict(
    data="data/digits", encoder="runs/tiny_encoder", init_from="runs/tiny", model="XS",
    patch_size=4, labels=8, gen=4, pos=6, uncond=2, lr=1e-3, warmup=2, push=32, log_every=1,
    sample_every=10000, save_every=10000, device="cpu")
CURVES = ((1, 1), (2, 2), (4, 1))  # (processes, micro-batches) that are followed for 10 steps


def fork(function, *args, world=1):
    """Processes of a script whose main function is function(*args)."""
    return forked_ranks(multiprocessing.get_context("fork"), world, function, *args)


def ended(processes, seconds=60):
    """Exit codes (-9: killed, None: late) of processes, and the seconds waited."""
    began = time.time()
    for process in processes:
        process.join(max(0, began + seconds - time.time()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes, time.time() - began


def wait_for(pattern, seconds=90):
    """Until a file of this pattern exists."""
    began = time.time()
    while not glob.glob(pattern):
        assert time.time() - began < seconds, f"{pattern} did not appear"
        time.sleep(0.001)


def tiny_networks():
    """runs/tiny_encoder and runs/tiny."""
    torch.manual_seed(0)
    encoder = model.MAE(1, 64, (1,), input_patch_size=2, num_classes=10)
    encoder.save_pretrained("runs/tiny_encoder")
    net = model.Generator(8, 1, patch_size=4, num_classes=10, **SMALL)
    randomised(net).save_pretrained("runs/tiny")


def equal():
    """Losses and gradients on 1, 2 and 4 processes in 1, 2 and 4 micro-batches; three curves."""
    assert ended(fork(all_parts, 1) + fork(all_parts, 2, world=2), 120)[0] == [0] * 3
    assert ended(fork(all_parts, 4, world=4), 120)[0] == [0] * 4


def all_parts(world):
    generator = TINY | dict(reals="index", labels=16, gen=3)
    encoder = ENCODER | dict(base_channels=8, device="cpu", save_every=10000)
    sinkhorn = generator | dict(field="sinkhorn", iterations=2)
    for parts in (1, 2, 4):
        for name, options in (("g", generator), ("s", sinkhorn), ("e", encoder)):
            out = f"runs/equal_{name}_{world}_{parts}"
            steps = 10 if name == "g" and (world, parts) in CURVES else 1
            record_gradient(f"{out}.pt")
            start(options, out=out, micro_batches=parts, steps=steps, warmup=2)


def record_gradient(path):
    """Of the first step, as it is before it would be clipped."""
    clip = torch.nn.utils.clip_grad_norm_

    def record(params, limit):
        if train.get_rank() == 0:
            torch.save(torch.cat([p.grad.flatten() for p in params]), path)
        torch.nn.utils.clip_grad_norm_ = clip
        return clip(params, limit)

    torch.nn.utils.clip_grad_norm_ = record


def killed():
    """A run killed 20 times, often within a checkpoint, then left to end; and one left alone."""
    options = TINY | dict(steps=70, save_every=1)
    saved = "runs/killed/step_" + "[0-9]" * 8
    calm = fork(start, options | dict(out="runs/calm"))
    options["out"] = "runs/killed"
    kills = 0
    partial = 0
    rng = random.Random(0)
    for i in range(20):
        before = max(glob.glob(saved), default="")
        for path in glob.glob("runs/killed/step_*.tmp"):
            shutil.rmtree(path)
        children = fork(start, options)
        if i % 4 == 0:
            wait_for("runs/killed/step_*.tmp")
        elif i % 4 == 1:
            time.sleep(rng.uniform(0, 0.5))  # perhaps at its start
        else:
            while max(glob.glob(saved), default="") == before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        children[0].kill()
        kills += ended(children)[0] == [-signal.SIGKILL]
        partial += bool(glob.glob("runs/killed/step_*.tmp"))
    assert ended(fork(start, options) + calm)[0] == [0, 0]
    return dict(kills=kills, partial=partial)


def signals():
    """To one process, and to one of two."""
    results = {}
    options = TINY | dict(steps=10000)
    for name, world in (("SIGTERM", 1), ("SIGUSR1", 1), ("SIGHUP", 1), ("two processes", 2)):
        out = f"runs/{name.replace(' ', '_')}"
        children = fork(start, options | dict(out=out), world=world)
        first = f"{out}/step_00000001"  # which every run saves
        wait_for(first)
        os.kill(children[-1].pid, getattr(signal, name, signal.SIGTERM))
        results[name] = (*ended(children), list(set(glob.glob(f"{out}/step_*")) - {first}))
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    model.GENERATOR_SIZES["XS"] = SMALL
    assert ended(fork(tiny_networks))[0] == [0]  # a process with threads could not fork
    findings = {**signals(), **killed()}
    equal()
    print(json.dumps(findings))
