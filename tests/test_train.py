"""train.py by running it: small runs that are stopped, killed, resumed, split up and spoilt."""
import functools
import glob
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import fid
import model
import prepare_data
import sample
import train
from conftest import ROOT, needs_gpu, relative_error
from model import UsageError

ENCODER = dict(
    stage="encoder", data="data/digits", out="runs/e", base_channels=16, layers=[1, 1],
    batch_size=16, steps=6, lr=1e-3, warmup=2, cls_steps=3, cls_ramp=2, log_every=1, save_every=3,
    sample_every=100)
GENERATOR = dict(
    data="data/digits", out="runs/g", encoder="runs/e", model="XS", labels=4, gen=4, pos=6,
    uncond=2, steps=6, lr=1e-3, warmup=2, cooldown=2, push=32, flip=True, log_every=1,
    save_every=3, sample_every=100)
INDEX = GENERATOR | dict(reals="index", push=None)
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
        prepare_data.prepare("digits", "data/digits")
        start(ENCODER)
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
def processes(background):
    """What it found, by name, and what its processes wrote to stderr."""
    code = background.wait(180)
    errors = Path("errors").read_text()
    assert code == 0, errors[-3000:]
    return json.loads(Path("findings").read_text().splitlines()[-1]), errors


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
    train.main(words(options, **changes))


def parsed(options, **changes):
    return train.parse(words(options, **changes))


def weights(run, step=6):
    """All tensors of a checkpoint. Copies, since load_file only maps the files."""
    tensors = {}
    for name in ("train_state", "model"):
        tensors |= load_file(f"{run}/step_{step:08d}/{name}.safetensors")
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def log(run, key="loss"):
    """The lines of log.jsonl that have this figure."""
    lines = [json.loads(line) for line in open(f"{run}/log.jsonl")]
    return [line for line in lines if key in line]


def flat_gradient(params):
    return torch.cat([p.grad.flatten() for p in params])


def as_if_killed(run, copy):
    """A copy of a run of six steps as it was before its last checkpoint, of step 3."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    shutil.rmtree(f"{copy}/step_00000006")


def alter_checkpoint(folder, change):
    """Rewrite its training state after change(tensors), with a checksum that fits."""
    file = Path(folder) / "train_state.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata)
    sums = file.with_name("SHA256SUMS")
    fitting = f"{train.sha256(file)}  {file.name}"
    sums.write_text(re.sub(f".*  {file.name}", fitting, sums.read_text()))


# --------------------------------------------------------------------------------------------
# Stopped, killed, resumed

@pytest.mark.parametrize("options", [ENCODER | dict(crop_scale=0.3), GENERATOR, INDEX])
def test_stopped_and_resumed_is_bit_equal(home, options):
    shutil.rmtree("runs/whole", ignore_errors=True)
    start(options, out="runs/whole")
    as_if_killed("runs/whole", "runs/parts")
    (home / "runs/parts/step_00000005.tmp").mkdir()
    with open("runs/parts/log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    start(options, out="runs/parts")
    assert_same(weights("runs/whole"), weights("runs/parts"))
    assert [line["step"] for line in log("runs/parts")] == [1, 2, 3, 4, 5, 6]  # none twice


def test_checkpoints_of_before_resume(home):
    """Until October 2026 the queues were saved too: such a checkpoint goes on all the same."""
    start(GENERATOR)
    as_if_killed("runs/g", "runs/old")

    def add_queues(tensors):
        tensors["queue.of_class"] = torch.arange(1280).view(10, 128)
        tensors["queue.count"] = torch.full((10,), 128)

    alter_checkpoint("runs/old/step_00000003", add_queues)
    start(GENERATOR, out="runs/old")
    assert_same(weights("runs/g"), weights("runs/old"))
    assert not glob.glob("runs/old/*.damaged")


def test_torchrun(home):
    """The command itself, on two processes; a SIGTERM to torchrun reaches them, and they save."""
    line = words(GENERATOR, out="runs/torchrun", steps=10000, save_every=10000, cooldown=0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", str(ROOT / "train.py"), *line]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for("runs/torchrun/log.jsonl")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    step = int(model.latest_checkpoint("runs/torchrun").name[5:])
    assert f"stopped after step {step}; the same command resumes from" in said


def test_one_run_a_folder(home):
    """While one process holds the folder another is told so; a run's end or error frees it."""
    options = GENERATOR | dict(out="runs/locked", steps=2)
    code = ("import fcntl, os, sys\n"
            "os.makedirs('runs/locked')\n"
            "lock = open('runs/locked/.lock', 'w')\n"
            "fcntl.flock(lock, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(UsageError, match="another run writes to runs/locked"):
        start(options)
    holder.communicate()
    with pytest.raises(UsageError, match="is of another model"):
        start(options, out="runs/e")
    start(ENCODER)
    start(options)


# --------------------------------------------------------------------------------------------
# What a step draws and computes

@pytest.mark.parametrize("options", [GENERATOR, INDEX, SINKHORN])
def test_draws_depend_on_seed_and_step_alone(home, monkeypatch, options):
    """A step's batch, put together from 1, 2 and 4 processes, has the same bits."""
    args = parsed(options, device="cpu")
    data = prepare_data.Dataset("data/digits")
    drawn = {}
    for world in (1, 2, 4):
        monkeypatch.setattr(train, "world_size", lambda: world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(train, "get_rank", lambda: rank)
            stage = train.GeneratorStage(args, data)
            shares.append(stage.batch(3))
        drawn[world] = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    assert drawn[1].keys() == {"labels", "alpha", "noise", "styles", "reals", "ids"}
    assert drawn[1]["noise"].shape[1] == (8 if options is SINKHORN else 4)
    for name, one in drawn[1].items():
        assert torch.equal(one, drawn[2][name])
        assert torch.equal(one, drawn[4][name])
        assert one.float().std() > 0
    assert not torch.equal(shares[3]["noise"], stage.batch(4)["noise"])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_second_batch_is_independent(home, parts):
    """The same labels and alphas, noise and styles of its own, no gradients."""
    args = parsed(SINKHORN, micro_batches=parts, device="cpu", bf16=False)
    stage = train.GeneratorStage(args, prepare_data.Dataset("data/digits"))
    for p in stage.net.parameters():  # the last layer begins at zero
        torch.nn.init.normal_(p, std=0.05)
    seen = []
    loss = stage.loss

    def record(x, second, part, reduce):
        seen.append(second)
        return loss(x, second, part, reduce)

    stage.loss = record
    batch = stage.batch(0)
    stage.backward(batch, 0)
    others = {name: batch[name][:, 4:] for name in ("noise", "styles")}
    assert not any(second.requires_grad for second in seen)
    second = torch.cat(seen[-parts:])
    with torch.no_grad():
        assert relative_error(second, stage.generate({**batch, **others})) < 1e-6
        assert relative_error(second, stage.generate(batch)) > 0.1


def test_queues_follow_from_the_step(home):
    """A stage that is asked for step 5 at once draws what one does that went there step by step."""
    args = parsed(GENERATOR, device="cpu")
    data = prepare_data.Dataset("data/digits")
    stage = train.GeneratorStage(args, data)
    steps = [stage.batch(step) for step in range(6)]
    assert_same(train.GeneratorStage(args, data).batch(5), steps[5])
    assert_same(stage.batch(2), steps[2])
    queue = stage.queue_after(5, args.push)
    newest = data.fresh(5 * args.push, args.push, args.seed)
    assert list(queue.of_any)[-args.push:] == newest.tolist()


@pytest.mark.parametrize("options", [GENERATOR, INDEX])
def test_features_of_unchanging_reals_are_kept(home, options):
    """Loss and gradient are those of a step that looks at its images."""
    data = prepare_data.Dataset("data/digits")
    results = []
    for parts in (1, 2):
        args = parsed(options, flip=None, micro_batches=parts, device="cpu", bf16=False)
        torch.manual_seed(0)
        stage = train.GeneratorStage(args, data)
        for p in stage.net.parameters():  # the last layer begins at zero: no gradient before it
            torch.nn.init.normal_(p, std=0.05)
        for kept in (stage.kept, None):
            stage.kept = kept
            stage.net.zero_grad()
            logs, _, finite = stage.backward(stage.batch(0), 0)
            assert finite
            results.append((logs["loss"].item(), flat_gradient(stage.net.parameters())))
    assert train.GeneratorStage(parsed(options, device="cpu"), data).kept is None  # --flip
    assert results[1][1].norm() > 1e-3
    for loss, grad in results:
        assert loss == pytest.approx(results[1][0], rel=1e-5)
        assert relative_error(grad, results[1][1]) < 1e-4


def test_pixel_reals_are_cropped_and_mirrored(home):
    """--crop_scale gives other views of the same images, in [-1, 1], and changes nothing else."""
    data = prepare_data.Dataset("data/digits")
    plain, cropped = [
        train.GeneratorStage(parsed(GENERATOR, crop_scale=scale, device="cpu"), data).batch(0)
        for scale in (1, 0.2)]
    for name in ("labels", "alpha", "noise", "styles"):
        assert torch.equal(plain[name], cropped[name])
    assert cropped["reals"].shape == plain["reals"].shape
    assert cropped["reals"].abs().max() <= 1
    distance = (cropped["reals"] - plain["reals"]).square().mean((2, 3, 4))
    assert (distance > 1e-3).float().mean() > 0.9


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
    data = prepare_data.Dataset("data/digits")
    data.shape = (1, 32, 32)
    args = parsed(ENCODER, crop_scale=0.2, to_latents=True, device="cpu")
    stage = train.EncoderStage(args, data)
    whole = stage.batch(1)
    halves = []
    monkeypatch.setattr(train, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(train, "get_rank", lambda: rank)
        halves.append(train.EncoderStage(args, data).batch(1))
    assert stage.net.in_channels == 4
    assert whole["x"].shape == (16, 4, 4, 4)
    for name, x in whole.items():
        assert torch.equal(x, torch.cat([half[name] for half in halves]))
    noise = whole["x"][:, 0] - whole["x"][:, 1]  # of two channels with one mean
    assert noise.std() == pytest.approx(0.1 * 2**0.5, rel=0.2)
    stage.backward(whole, 1)


def test_mask_hides_half(home):
    stage = train.EncoderStage(parsed(ENCODER, batch_size=512), prepare_data.Dataset("data/digits"))
    mask = stage.batch(0)["mask"]
    assert mask.shape == (512, 4, 4)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.5, abs=0.03)


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


@needs_gpu
@pytest.mark.parametrize("preset", ["digits", "digits_encoder"])
def test_no_gradient_waits_for_the_gpu(preset):
    args = train.parse(["--preset", preset, "--dry_run"])
    run = train.Run(args, train.RandomData(args.data))
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            run.stage.backward(run.stage.batch(step), step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_run_on_a_gpu(home, device="cuda"):
    """The presets' defaults there, bfloat16 among them: encoder, generator, resumed, sampled."""
    words = ["--preset", "digits", "--device", device, "--out", "runs/on_gpu", "--save_every", "2"]
    encoder = ["--preset", "digits_encoder", "--device", device, "--steps", "4"]
    train.main([*encoder, "--out", "runs/on_gpu_encoder"])
    for steps in ("4", "6"):
        train.main([*words, "--encoder", "runs/on_gpu_encoder", "--steps", steps])
    lines = [json.loads(line) for line in open("runs/on_gpu/log.jsonl")]
    assert lines[-1]["step"] == 6 and lines[-1]["skipped"] == 0
    sample.main(["--ckpt", "runs/on_gpu", "--device", device, "--num_images", "10",
                 "--out", "on_gpu.png"])
    assert Path("on_gpu.png").is_file()


# --------------------------------------------------------------------------------------------
# The update: learning rate, averages, steps that are not finite

def test_learning_rate():
    args = parsed(GENERATOR, steps=100, warmup=10, cooldown=20, lr=1.0)
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=1e-5)
    assert rates[9:81] == [pytest.approx(1.0)] * 72
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)


def test_the_average_is_an_exponential_one(home):
    """By hand over the weights of every step. It is no part of a graph, which would grow."""
    run = train.Run(parsed(GENERATOR, ema_decay=0.4), prepare_data.Dataset("data/digits"))
    average = {name: p.clone() for name, p in run.net.state_dict().items()}
    for step in range(4):
        run.update(run.stage.batch(step), step)
        decay = min(0.4, (step + 1) / (step + 10))
        for name, p in run.net.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * p
    for name, p in run.emas[0].state_dict().items():
        assert torch.allclose(p, average[name], atol=1e-6)
    assert not any(p.requires_grad or p.grad_fn for p in run.emas[0].parameters())


def test_several_averages(home):
    """Each is what a run with that decay alone has, at every resume; others read the first."""
    options = GENERATOR | dict(cooldown=0)
    both = options | dict(out="runs/ema_both", ema_decay=[0.3, 0.4])
    start(options, out="runs/ema_0.3", ema_decay=0.3)
    start(options, out="runs/ema_0.4", ema_decay=0.4)
    start(both, steps=3)
    start(both)
    first = model.load_generator("runs/ema_both").state_dict()
    second = model.load_generator("runs/ema_both/step_00000006/ema_0.4").state_dict()
    assert_same(first, model.load_generator("runs/ema_0.3").state_dict())
    assert_same(second, model.load_generator("runs/ema_0.4").state_dict())
    assert not torch.equal(first["pos_embed"], second["pos_embed"])
    with pytest.raises(UsageError, match="has no averages of --ema_decay.*resume with"):
        start(both, steps=8, ema_decay=[0.3, 0.5])


def test_steps_that_are_not_finite_are_skipped(home, monkeypatch, capsys):
    """Such a step leaves no trace in the weights and is explained; ten in a row end the run."""
    backward = train.GeneratorStage.backward
    spoilt = {3}

    def spoil(self, batch, step):
        logs, by_feature, finite = backward(self, batch, step)
        if step in spoilt and step % 2:
            self.net.patch_embed.weight.grad[0, 0] = math.nan
        elif step in spoilt:
            logs["loss"] = logs["loss"] * math.inf
            by_feature["layer1_mean"][0] = math.inf
        return logs, by_feature, finite

    monkeypatch.setattr(train.GeneratorStage, "backward", spoil)
    options = GENERATOR | dict(out="runs/nan", save_every=1, cooldown=0)
    run = train.Run(parsed(options), prepare_data.Dataset("data/digits"))
    before = [x.clone() for x in (*run.params, *run.emas[0].parameters())]
    run.update(run.stage.batch(3), 3)
    for old, new in zip(before, (*run.params, *run.emas[0].parameters()), strict=True):
        assert torch.equal(old, new)
    run.update(run.stage.batch(4), 4)
    assert not torch.equal(before[0], run.params[0])

    # A run does not end well with such a step, and while bad steps last nothing is saved.
    with pytest.raises(UsageError, match="step 4 is not finite, and was not saved: lower --lr"):
        start(options, steps=4)
    said = capsys.readouterr().out
    assert "step 4 skipped: loss or gradient is not finite, on rank(s) [0]; largest loss" in said
    assert model.latest_checkpoint("runs/nan").name == "step_00000003"
    start(options)
    whole = weights("runs/nan")
    assert whole["bad_steps"].tolist() == [0, 1]
    assert log("runs/nan")[-1]["skipped"] == 1
    start(options, out="runs/nan_straight")  # that was not stopped after the skipped step
    assert_same(weights("runs/nan_straight"), whole)

    spoilt.update(range(6, 100))
    message = "step 16: 10 steps in a row were not finite.*lower --lr.*The last checkpoint: "
    with pytest.raises(UsageError, match=message):
        start(options, steps=30)
    last = model.latest_checkpoint("runs/nan")
    assert last.name == "step_00000006"
    assert {line["loss"] for line in log("runs/nan") if line["step"] in (7, 9)} == {None}
    skipped = log("runs/nan", "skipped_on_ranks")
    assert [line["step"] for line in skipped] == [4, *range(7, 17)]
    assert skipped[1]["worst_features"][0] == "layer1_mean"


def test_a_run_that_diverges_at_once(home, capsys):
    """Its averages give no picture: said, and explained by the steps after."""
    with pytest.raises(UsageError, match="10 steps in a row.*The last checkpoint: none yet"):
        start(GENERATOR, out="runs/diverged", lr=1e30, warmup=0, steps=30, save_every=100)
    said = capsys.readouterr().out
    assert "step 1 has no picture: the generator or decoder gives NaN" in said
    assert "step 2 skipped" in said


def test_the_log_explains_a_run(home):
    """Losses and forces by feature, seconds a step, memory."""
    start(GENERATOR, out="runs/logged", steps=2)
    line = log("runs/logged")[-1]
    losses = [row[0] for row in line["features"].values()]
    assert sum(losses) == pytest.approx(line["loss"], rel=1e-3)
    assert len(losses) > 10
    assert {len(row) for row in line["features"].values()} == {5}  # loss, scale, three forces
    assert line["seconds_a_step"] > 0
    assert line["memory_gb"] > 0.1


# --------------------------------------------------------------------------------------------
# Checkpoints

def test_a_checkpoint_needs_no_flags(home):
    start(GENERATOR)
    generator = model.load_generator("runs/g")  # the run's newest checkpoint
    folder = "runs/g/step_00000006"
    assert_same(generator.state_dict(), load_file(f"{folder}/model.safetensors"))
    assert set(os.listdir(folder)) == {"README.md", "config.json", "model.safetensors",
                                       "SHA256SUMS", "train_state.safetensors"}
    assert not any(name.startswith("queue.") for name in weights("runs/g"))
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    with pytest.raises(UsageError, match="mae"):
        model.load_generator("runs/e")


def test_only_the_last_two_checkpoints_are_kept(home):
    start(GENERATOR, out="runs/many", save_every=1)
    kept = [name for name in os.listdir("runs/many") if name.startswith("step_")]
    assert sorted(kept) == ["step_00000005", "step_00000006"]


def test_of_damaged_checkpoints_the_one_before_is_used(home, capsys):
    options = GENERATOR | dict(out="runs/damaged", save_every=2)
    start(options)
    wanted = weights("runs/damaged")

    def truncated(data):
        return data[:5000]

    def emptied(data):
        return b""

    def flipped(data):
        return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]

    last = home / "runs/damaged/step_00000006"
    for name, damage in [("model.safetensors", truncated), ("train_state.safetensors", flipped),
                         ("SHA256SUMS", flipped), ("SHA256SUMS", emptied)]:
        file = last / name
        file.write_bytes(damage(file.read_bytes()))
        start(options)
        said = capsys.readouterr().out
        assert "step_00000006 is damaged" in said
        assert "from step 4 to 6" in said
        assert last.with_suffix(".damaged").exists()
        assert_same(weights("runs/damaged"), wanted)
    for folder in glob.glob("runs/damaged/step_0000000[46]"):
        os.remove(f"{folder}/model.safetensors")
    with pytest.raises(UsageError, match="holds damaged checkpoints only"):
        start(options)


def test_a_full_disk_leaves_the_last_checkpoint(home):
    """No file may grow beyond 256 KB: one clear line, and the run goes on once there is room."""
    options = GENERATOR | dict(out="runs/full", cooldown=0)
    start(options, steps=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
        with pytest.raises(UsageError, match="step_00000006 could not be saved.*are untouched"):
            start(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [name for name in os.listdir("runs/full") if "step_" in name] == ["step_00000003"]
    start(options)
    assert model.latest_checkpoint("runs/full").name == "step_00000006"


# --------------------------------------------------------------------------------------------
# Evaluation inside training

def test_evaluation_inside_training(home):
    """Its figures are those of fid.py afterwards, and training goes on as without it."""
    start(GENERATOR, out="runs/evaluated", eval_every=3, eval_images=120,
          eval_features="encoder:runs/e")
    start(GENERATOR)
    assert_same(weights("runs/g"), weights("runs/evaluated"))
    rows = log("runs/evaluated", "fd")
    assert [(row["step"], row["num_images"]) for row in rows] == [(1, 100), (3, 120), (6, 120)]
    extractor = fid.load_extractor("encoder:runs/e")
    reference = fid.open_reference(extractor, data="data/digits")
    images = fid.generated(model.load_generator("runs/evaluated"))
    again = fid.evaluate(images, 120, extractor, reference)
    assert again["fd"] == pytest.approx(rows[-1]["fd"], rel=1e-6)
    best = json.loads((home / "runs/evaluated/best/score.json").read_text())
    assert best["score"] == min(row["fd"] for row in rows[1:])
    model.load_generator("runs/evaluated/best")


def test_an_evaluation_that_was_interrupted_is_made(home, monkeypatch):
    """By the same command; a run that has ended makes no more."""
    options = GENERATOR | dict(out="runs/cut", eval_every=3, eval_images=20, eval_features="pixels")
    evaluate = train.Evaluator.__call__

    def interrupted(self, ema, step, num_images):
        if step == 6:
            raise SystemExit(0)
        evaluate(self, ema, step, num_images)

    with monkeypatch.context() as patch:
        patch.setattr(train.Evaluator, "__call__", interrupted)
        with pytest.raises(SystemExit):
            start(options)
    assert [line["step"] for line in log("runs/cut", "fd")] == [1, 3]
    start(options)
    start(options)
    assert [line["step"] for line in log("runs/cut", "fd")] == [1, 3, 6]
    assert (home / "runs/cut/best/score.json").is_file()


def test_the_best_weights_are_those_of_like_figures(home):
    """Figures of other features are no rivals: the better number is not the better network."""
    options = GENERATOR | dict(out="runs/best", eval_every=3, eval_images=20, steps=3)
    start(options, eval_features="pixels")
    score = home / "runs/best/best/score.json"
    assert json.loads(score.read_text())["features"] == "pixels"
    for features, last, taken in (("pixels", 3, False), ("encoder:runs/e", 6, True)):
        better = json.loads(score.read_text()) | {"score": -1.0, "step": 0}
        score.write_text(json.dumps(better))
        start(options, eval_features=features, steps=6 if taken else 4)
        assert json.loads(score.read_text())["step"] == (6 if taken else 0)


# --------------------------------------------------------------------------------------------
# Options and presets

@pytest.mark.parametrize("line, message", [
    ("--preset digits --base_channels 8", "--base_channels is read with --stage encoder only"),
    ("--preset digits_encoder --gen=8", "--gen is read with --stage generator only"),
    ("--preset digits_encoder --no-attn_fp32",
     "--no-attn_fp32 is read with --stage generator only"),
    ("--preset digits --lable 8", "unrecognized arguments"),
    ("--preset nothing", "invalid choice"),
    ("--preset digits --push 8", "--push is read with --reals queue only"),
    ("--preset digits --eval_images 8", "--eval_images is read with --eval_every only"),
    ("--preset digits --labels 0", "argument --labels: must be at least 1"),
    ("--preset digits --uncond -1", "argument --uncond: must be at least 0"),
    ("--preset digits --ema_decay 1.5", "argument --ema_decay: must be at least 0 and at most 1"),
    ("--preset digits_encoder --crop_scale 0", "argument --crop_scale: must be"),
    ("--preset digits_encoder --layers 1 0", "argument --layers: must be at least 1"),
    ("--preset digits_encoder --cls_steps 0 --cls_weight 0.5",
     "--cls_weight is read with --cls_steps only"),
    ("--preset digits --clip 0", "argument --clip: must be more than 0"),
    ("--data d --encoder e", "--out is needed"),
    ("--out o --data d", "--data (and for the generator --encoder) is needed"),
])
def test_options_that_would_be_ignored_are_errors(line, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(line.split())
    assert message in capsys.readouterr().err


def test_an_evaluation_can_be_switched_off():
    assert train.parse("--preset digits --eval_every 0".split()).eval_every == 0


# The paper's table: model, labels, G, P, U, alpha's power and share of ones, learning rate, weight
# decay, warm-up, steps, float32 attention, millions of parameters.
PAPER = {
    "latent_ablation": ("B", 64, 64, 64, 16, 3, 0, 2e-4, 0.01, 5000, 30000, True, 133),
    "latent_B": ("B", 128, 64, 64, 32, 5, 0, 4e-4, 0, 10000, 200000, False, 133),
    "latent_L": ("L", 128, 64, 64, 32, 3, 0.5, 4e-4, 0.01, 10000, 200000, False, 463),
    "pixel_B": ("B", 128, 64, 128, 32, 5, 0, 2e-4, 0.01, 10000, 100000, True, 134),
    "pixel_L": ("L", 128, 64, 128, 32, 5, 0, 4e-4, 0.01, 10000, 100000, True, 464),
    "wflow_ablation": ("B", 64, 64, 64, 16, 3, 0, 2e-4, 0.01, 5000, 30000, True, 133),
    "wflow_B": ("B", 128, 64, 64, 32, 5, 0, 4e-4, 0, 10000, 200000, False, 133),
    "wflow_L": ("L", 128, 64, 64, 32, 3, 0.5, 4e-4, 0.01, 10000, 200000, False, 463),
    "wflow_XL": ("XL", 128, 64, 128, 32, 4, 0.2, 3e-4, 0.01, 10000, 200000, False, 679),
}
# The other field's: regularisation, iterations, samples pushed a step by all of its hosts.
WFLOW = {"ablation": (0.05, 10, 512), "B": (0.05, 10, 8192), "L": (0.05, 1, 8192),
         "XL": (0.01, 1, 8192)}
# Width, steps, steps with a classifier, channels.
PAPER_ENCODERS = {
    "mae_latent_256": (256, 30000, 0, 4),
    "mae_latent_640": (640, 200000, 3000, 4),
    "mae_pixel_640": (640, 200000, 3000, 3),
}
# Millions of parameters of what generators look through: a MAE without its decoder.
ENCODER_SIZES = {
    "hf://mae_latent_256": 340, "hf://mae_latent_640": 2126, "hf://mae_pixel_640": 2127,
    "hf://facebook/convnextv2-base-22k-224": 87.7,
}


def stage_without_memory(preset):
    """The stage that a dry run of a preset builds, on the meta device."""
    args = train.parse(["--preset", preset, "--dry_run", "--device", "cpu"])
    args.device = "meta"
    with torch.device("meta"):
        return train.STAGES[args.stage](args, train.RandomData(args.data))


def millions(net):
    return sum(p.numel() for p in net.parameters()) / 1e6


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_recipes(name):
    args = train.parse(["--preset", name])
    row = (args.model, args.labels, args.gen, args.pos, args.uncond, args.alpha_power,
           args.alpha_fixed, args.lr, args.weight_decay, args.warmup, args.steps, args.attn_fp32)
    assert row == PAPER[name][:-1]
    shared = (args.clip, args.ema_decay, args.reals, args.flip)
    assert shared == (2.0, [0.999], "queue", True)
    if name.startswith("wflow"):
        row = (args.temperature, args.iterations, args.push)
        assert (args.field, args.repelled_by, row) == ("sinkhorn", "independent", WFLOW[name[6:]])
    else:
        row = (args.field, args.kernel, args.attraction, args.repulsion)
        assert row == ("drifting", "both", 1, 1)
    assert args.crop_scale == (0.2 if name.startswith("pixel") else 1)
    kind = "pixel" if name.startswith("pixel") else "latent"
    width = 256 if name.endswith("ablation") else 640
    convnext = ["hf://facebook/convnextv2-base-22k-224"] if kind == "pixel" else []
    assert args.encoder == [f"hf://mae_{kind}_{width}", *convnext]
    stage = stage_without_memory(name)
    assert round(millions(stage.net)) == PAPER[name][-1]
    assert (stage.net.input_size // stage.net.patch_size) ** 2 == 256
    for encoder, net in zip(args.encoder, stage.encoders, strict=True):
        assert millions(net) == pytest.approx(ENCODER_SIZES[encoder], abs=0.6)


@pytest.mark.parametrize("name", PAPER_ENCODERS)
def test_presets_are_the_papers_encoders(name):
    args = train.parse(["--preset", name])
    net = stage_without_memory(name).net
    row = (args.base_channels, args.steps, args.cls_steps, net.in_channels)
    assert row == PAPER_ENCODERS[name]
    assert args.layers == [3, 4, 6, 3]
    shared = (args.batch_size, args.lr, args.warmup, args.weight_decay, args.clip,
              args.ema_decay, args.crop_scale)
    assert shared == (8192, 4e-3, 4000, 0.01, 2.0, [0.9995], 0.2)


@pytest.mark.parametrize("name, parts", [("latent_ablation_8gpu", 1), ("latent_ablation_1gpu", 8)])
def test_smaller_machines_train_the_ablation_itself(name, parts):
    args = vars(train.parse(["--preset", name]))
    recipe = vars(train.parse(["--preset", "latent_ablation"]))
    different = {key for key in args if args[key] != recipe[key]}
    assert different <= {"preset", "out", "micro_batches", "checkpoint_blocks"}
    assert args["micro_batches"] == parts
    assert args["checkpoint_blocks"]


@pytest.mark.parametrize("name", train.PRESETS)
def test_presets_are_made_of_options(name):
    """Every key is read in its stage, none is misspelt, and the command line overrides it."""
    preset = train.PRESETS[name]
    words = ["--preset", name] + ([] if "data" in preset else ["--data", "mine.zip"])
    assert preset.items() <= vars(train.parse(words)).items()
    assert train.parse([*words, "--steps", "7"]).steps == 7


def test_a_run_changes_no_preset_and_tells_of_another_encoder(home, capsys):
    before = json.dumps(train.PRESETS)
    args = train.parse(["--preset", "digits"])
    args.encoder[0] = "elsewhere"
    assert json.dumps(train.PRESETS) == before
    shutil.copytree(model.latest_checkpoint("runs/e"), "runs/e2", dirs_exist_ok=True)
    start(GENERATOR, out="runs/another", steps=1)
    start(GENERATOR, out="runs/another", steps=2, encoder="runs/e2")
    assert "with --encoder ['runs/e2'], before ['runs/e']" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------
# From images to grids in one command, and other classes

def write_images(folder, counts):
    """{class: images} as folder/CLASS/*.png of 12 x 12 pixels."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.parametrize("counts", [
    {"cat": 5, "dog": 1, "emu": 9}, {"only": 5}, {f"c{i}": 1 + i % 2 for i in range(200)}],
    ids=["unbalanced", "one class", "200 classes"])
def test_small_goes_from_images_to_grids(home, tmp_path, monkeypatch, capsys, counts):
    """--preset small: data, encoder, generator and pictures; sizes follow from the images."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "mine", counts)
    shutil.make_archive("mine", "zip", "mine")
    for name, value in dict(batch_size=4, base_channels=16, steps=2).items():
        monkeypatch.setitem(train.PRESETS["small_encoder"], name, value)
    train.main("--preset small --data mine.zip --size 8 --steps 2 --gen 4 --pos 6 --show_reals "
               "--device cpu".split())
    assert prepare_data.Dataset("data/mine").meta["classes"] == list(counts)
    assert [line["step"] for line in log("runs/mine_encoder")] == [1, 2]
    options = json.loads(Path("runs/mine/options.json").read_text())
    single = len(counts) == 1
    assert options["patch_size"] == 1 and options["uncond"] == (0 if single else 8)
    # Nine rows of pictures, the first of which are real ones; and one GIF of all grids.
    with Image.open("runs/mine/samples_00000002.png") as grid:
        assert grid.height > 9 * 8 and grid.width >= min(len(counts), 10) * 8
    with Image.open("runs/mine/samples.gif") as strip:
        assert strip.n_frames == 2
    said = capsys.readouterr().out
    assert "fewer than --pos 6" in said
    train.main("--preset small --data mine.zip --size 8 --steps 2 --device cpu --gen 4 --pos 6 "
               "--show_reals".split())
    assert "runs/mine has 2 steps already" in capsys.readouterr().out


def test_a_source_is_not_prepared_into_somebodys_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data/mine", {"cat": 2})
    shutil.make_archive("mine", "zip", "data/mine")
    for source in ("mine.zip", "data/mine"):
        assert train.prepared(SimpleNamespace(data=source, size=8)) == "data/mine_prepared"
        assert os.listdir("data/mine") == ["cat"]
    write_images(tmp_path / "v1.5/test", {"cat": 2})
    with pytest.raises(UsageError, match="v1.5 has no images to train on, but test alone"):
        train.prepared(SimpleNamespace(data="v1.5", size=8))
    assert os.path.isdir("data/v1.5/test")
    assert train.prepared(SimpleNamespace(data="digits", size=None)) == "data/digits"


def test_a_strip_of_pictures_of_several_sizes(tmp_path):
    """Those of before --show_reals, which lack a row, are left out."""
    for i, height in enumerate((10, 30, 30)):
        Image.new("RGB", (20, height), (100 * i, 0, 0)).save(tmp_path / f"samples_{i:08d}.png")
    train.save_strip(tmp_path)
    with Image.open(tmp_path / "samples.gif") as strip:
        assert (strip.n_frames, strip.size) == (2, (20, 30))


@pytest.mark.parametrize("side, encoder, generator", [
    (8, 1, 1), (28, 2, 4), (32, 2, 4), (64, 4, 8), (44, 11, 11)])
def test_sizes_follow_from_the_images(side, encoder, generator):
    """At most 16 x 16 positions of an encoder, of which masks hide 2 x 2; 8 x 8 tokens."""
    data = SimpleNamespace(shape=(1, side, side), num_classes=10, count=np.full(10, 9))
    args = train.parse(["--preset", "small_encoder", "--data", "x", "--device", "cpu"])
    train.fit(args, data)
    assert (args.input_patch_size, args.steps, args.cls_steps) == (encoder, 400, 200)
    args = train.parse("--preset small --data x --device cpu --gen 5 --steps 40".split())
    assert args.out == "runs/x"
    train.fit(args, data)
    assert (args.patch_size, args.gen, args.steps, args.cooldown) == (generator, 5, 40, 28)


@pytest.mark.parametrize("side, better", [(1, 16), (7, 16), (25, 32), (62, 64)])
def test_sides_that_do_not_divide_are_refused(side, better):
    """An odd one leaves no pairs to mask, 62 only 2 x 2 patches of 31 x 31 pixels."""
    data = SimpleNamespace(shape=(1, side, side), num_classes=10, count=np.full(10, 9))
    args = train.parse(["--preset", "small_encoder", "--data", "x", "--device", "cpu"])
    with pytest.raises(UsageError, match=f"do not divide .* --size {better}$"):
        train.fit(args, data)


def test_steps_follow_from_processes_and_micro_batches(monkeypatch):
    data = SimpleNamespace(shape=(1, 8, 8), num_classes=10, count=np.full(10, 9))
    monkeypatch.setattr(train, "world_size", lambda: 3)
    args = train.parse("--preset small --data x --device cpu --micro_batches 2".split())
    train.fit(args, data)
    assert args.labels == 6
    args = train.parse("--preset small_encoder --data x --device cpu".split())
    train.fit(args, data)
    assert args.batch_size == 129


def test_init_from_a_model_of_other_classes(home, tmp_path, capsys):
    """All but the class table, or an encoder's classifier, which start anew and say so."""
    write_images(tmp_path / "two", {"a": 9, "b": 9})
    prepare_data.prepare(tmp_path / "two", tmp_path / "data", 8, 1)
    for kind, options, anew in (("e", ENCODER, "fc."), ("g", GENERATOR, "class_embed.")):
        if not os.path.exists(f"runs/{kind}"):
            start(options)
        source = load_file(model.latest_checkpoint(f"runs/{kind}") / "model.safetensors")
        args = parsed(options, data=str(tmp_path / "data"), init_from=f"runs/{kind}",
                      out=str(tmp_path / kind))
        run = train.Run(args, prepare_data.Dataset(args.data))
        for name, tensor in run.net.state_dict().items():
            if name.startswith(anew):
                assert len(tensor) == len(source[name]) - 8 and tensor.abs().sum() >= 0
            else:
                assert torch.equal(tensor, source[name]), name
        assert f"{anew}weight starts anew: runs/{kind} has" in capsys.readouterr().out

    # A resumed run has its own weights, and needs those no more.
    shutil.copytree("runs/g", "runs/source")
    tuned = GENERATOR | dict(init_from="runs/source", out="runs/tuned", cooldown=0)
    start(tuned, steps=3)
    shutil.rmtree("runs/source")
    start(tuned, steps=4)
    with pytest.raises(UsageError, match="runs/source"):
        start(tuned, out="runs/tuned_again")


# --------------------------------------------------------------------------------------------
# The dry run

DRY = ("--preset digits --dry_run --device cpu --model XS --patch_size 4 --labels 2 --gen 4 "
       "--pos 48").split()


def test_dry_run(tmp_path, monkeypatch, capsys):
    """It needs no data, writes nothing, and its FLOPs are those counted by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.GENERATOR_SIZES, "XS", SMALL)
    counted = []
    for more in ([], ["--checkpoint_blocks"]):
        train.main([*DRY, *more])
        said = capsys.readouterr().out
        assert "generator: 0.1M parameters" in said
        assert "digits_encoder: 0.3M parameters" in said
        assert re.search(r"memory of a process: \d+\.\d\d GB", said)
        assert re.search(r"800 steps: \d+\.\d\d h", said)
        tera, seconds = re.search(r"a step: (\S+) TFLOP on 1 process\(es\), (\S+) s", said).groups()
        assert float(seconds) > 0
        counted.append(float(tera) * 1e12)
    assert not list(tmp_path.iterdir())

    args = train.parse(DRY)
    stage = train.GeneratorStage(args, train.RandomData(args.data))
    # A linear map is 2 FLOP a weight and token; of a block 6 tokens pass, and 1 condition. What is
    # recomputed is one forward pass of the block by all 8 samples.
    block = 2 * 6 * 6 * 32  # attention: queries with keys, probabilities with values
    for name, p in stage.net.blocks[0].named_parameters():
        if p.ndim == 2:
            block += p.numel() * (1 if "adaln" in name else 6)
    assert counted[1] - counted[0] == pytest.approx(2 * 8 * block, abs=1.1e5)  # of four digits
    # Forward and backward (to weights and to inputs) of 8 samples through the generator; forward
    # of them and of 2 x 60 reals through the encoder, and backward of the samples to their pixels.
    with FlopCounterMode(display=False) as counter:
        stage.generate(stage.batch(0))
    generator = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        stage.encoders[0].features(torch.zeros(1, 1, 8, 8))
    encoder = counter.get_total_flops()
    by_hand = 3 * generator + (8 + 8 + 120) * encoder
    assert by_hand < counted[0] < 1.2 * by_hand  # the loss itself comes on top


def test_dry_run_where_a_preset_leaves_sizes_open(monkeypatch, capsys):
    monkeypatch.setitem(model.GENERATOR_SIZES, "XS", SMALL)
    train.main("--preset fashion --dry_run --device cpu --labels 1 --gen 2 --pos 2 --uncond 1 "
               "--patch_size 28".split())
    assert "fashion_encoder: 0.3M parameters" in capsys.readouterr().out


def test_dry_run_of_what_it_does_not_know_is_one_line():
    with pytest.raises(UsageError, match="--dry_run knows .*, and not what data/mine holds"):
        train.main([*DRY, "--data", "data/mine"])
    with pytest.raises(UsageError, match="--dry_run knows the sizes .*, not of mine"):
        train.main([*DRY, "--encoder", "mine"])
    with pytest.raises(UsageError, match="holds latents: .*--crop_scale for pixels"):
        train.main("--preset latent_B --dry_run --crop_scale 0.5".split())


# --------------------------------------------------------------------------------------------
# The user's mistakes are one line, bugs keep their traceback

@pytest.mark.parametrize("changes, message", [
    (dict(reals="queue", push=64, pos=129), "--pos can be at most 128 with --reals queue: .* of "
     "data/digits has 140 images, and a queue 128"),
    (dict(encoder="runs/nowhere"), "runs/nowhere: there is no"),
    (dict(data="data/nowhere"), "no prepared data there"),
    (dict(data="nowhere.zip"), "--data nowhere.zip: there is no such file"),
    (dict(size=16), "data.digits.train is of other images or options, by their shape"),
    (dict(encoder="runs/patch_3", out="runs/of_3"), "takes images of a side that 3 divides, not 8"),
    (dict(out="runs/e"), "is of another model"),
    (dict(micro_batches=3), "must be divisible by"),
    (dict(encoder=["runs/e", "runs/e"], out="runs/twice"),
     "two of --encoder runs/e runs/e name features alike"),
    (dict(pixel_encoder=True), "--pixel_encoder is for latents"),
    (dict(init_from="runs/g", out="runs/wide", patch_size=4), "--init_from .* another model"),
])
def test_bad_input_is_refused_at_the_start(home, changes, message):
    if not os.path.exists("runs/patch_3"):
        start(GENERATOR)
        model.MAE(1, 16, (1,), input_patch_size=3).save_pretrained("runs/patch_3")
    with pytest.raises(UsageError, match=message):
        start(INDEX, **changes)


@pytest.mark.parametrize("changes, message", [
    (dict(pos=129), "--pos can be at most 128"), (dict(init_from="runs/nope"), "runs/nope: there"),
    (dict(encoder=["digits_encoder", "runs/nope"]), "runs/nope: there"),
    (dict(patch_size=3), "--patch_size 3 does not divide"),
    (dict(micro_batches=3), "must be divisible by")])
def test_mistakes_are_said_before_an_encoder_is_trained(home, monkeypatch, changes, message):
    monkeypatch.setattr(train, "train", None)
    with pytest.raises(UsageError, match=message):
        start(GENERATOR | dict(encoder="digits_encoder", out="runs/soon") | changes)


def test_other_data_is_refused(home):
    start(GENERATOR, out="runs/other", steps=2)
    shutil.copytree("data/digits", "data/inverted")
    images = np.fromfile("data/inverted/train/images.bin", np.uint8)
    (255 - images).tofile("data/inverted/train/images.bin")
    with pytest.raises(UsageError, match="other data"):
        start(GENERATOR, out="runs/other", data="data/inverted")


def test_images_that_are_not_square_are_refused(home):
    shutil.copytree("data/digits", "data/wide")
    meta = home / "data/wide/train/meta.json"
    described = json.loads(meta.read_text())
    assert described["shape"][1:] == [1, 8, 8]
    described["shape"][1:] = [1, 4, 16]
    meta.write_text(json.dumps(described))
    for options in (ENCODER, GENERATOR):
        with pytest.raises(UsageError, match="data/wide holds images of 16 x 4 pixels"):
            start(options, out="runs/wide", data="data/wide")


NEW_ENCODER = '''

class Mean(nn.Module, Pretrained):
    def __init__(self, in_channels=1):
        super().__init__()
        self.in_channels = in_channels
        self.scale = nn.Parameter(torch.ones(1))

    def features(self, x):
        return {"mean": self.scale * mean_of_pixels(x)}


ENCODERS["mean"] = Mean
'''
# Script, old text, new text, which is wrong; what is run, and how its traceback ends.
PLANTED = {
    "encoder": ("model.py", None, 'return {"mean": self.scale * mean_of_pixels(x)}',
                "NameError: name 'mean_of_pixels' is not defined"),
    "constructor": ("model.py", "RMSNorm(cond_dim)", "RMSNorm(cond_dim, epsilon=1)",
                    "TypeError: RMSNorm.__init__() got an unexpected keyword argument 'epsilon'"),
    "kernel": ("drift.py", "A = logits.exp()", "A = logits.exp() @ logits.exp()",
               "RuntimeError: Expected size for first two dimensions of batch2 tensor"),
    "loader": ("prepare_data.py", "array.transpose(2, 0, 1)", "array.transpose(2, 0)",
               "ValueError: axes don't match array"),
}


def planted_command(fault, out):
    if fault == "loader":
        return ["prepare_data.py", "pixels", "--data", "images", "--out", out, "--skip_broken"]
    options = GENERATOR | dict(out=out, patch_size=4, steps=2)
    if fault == "encoder":
        options["encoder"] = "runs/mean"
    if fault == "kernel":
        options["kernel"] = "none"
    return ["train.py", *words(options)]


def plant(fault, name):
    """A copy of the scripts with this fault, and what it needs to be met: its folder."""
    Path("runs/mean").mkdir(parents=True, exist_ok=True)
    save_file({"scale": torch.ones(1)}, "runs/mean/model.safetensors")
    Path("runs/mean/config.json").write_text('{"model_type": "mean", "in_channels": 1}')
    Path("images/cat").mkdir(parents=True, exist_ok=True)
    for i in range(3):
        Image.new("RGB", (8, 8)).save(f"images/cat/{i}.png")
    folder = Path("planted", name)
    folder.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    script, old, new, _ = PLANTED[fault]
    source = (folder / script).read_text()
    if old is None:
        source += NEW_ENCODER
    else:
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / script).write_text(source)
    return folder


@pytest.mark.parametrize("fault", PLANTED)
def test_a_bug_shows_the_line_that_is_wrong(processes, fault):
    _, _, line, end = PLANTED[fault]
    assert processes[0]["planted"][fault] == [1]
    said = Path("planted", fault, "stderr_0").read_text()
    assert "Traceback (most recent call last)" in said
    assert line in said
    assert said.splitlines()[-1].startswith(end)


def test_a_bug_names_its_process(processes):
    assert processes[0]["planted"]["on two processes"] == [1, 1]
    _, _, line, end = PLANTED["encoder"]
    for rank in (0, 1):
        said = Path("planted", "on two processes", f"stderr_{rank}").read_text()
        assert line in said
        assert said.endswith(f"{end}\non rank {rank} of 2\n")


# --------------------------------------------------------------------------------------------
# Several processes: what the script in the background found

def test_killed_at_any_moment(processes):
    """20 SIGKILLs, some within a checkpoint: the weights are an undisturbed run's, bit for bit."""
    found = processes[0]
    assert found["kills"] == 20
    assert found["partial"] >= 4
    assert_same(weights("runs/calm", 70), weights("runs/killed", 70))
    further = [load_file(f"runs/{run}/step_00000070/ema_0.99/model.safetensors")
               for run in ("calm", "killed")]
    assert_same(*further)


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_and_ends(processes, world):
    """One process is told; all save the same step within seconds, and end without an error."""
    found = processes[0]
    codes, seconds = found[f"term{world}"]
    assert codes == [0] * world
    assert seconds < 5
    saved = [int(folder[-8:]) for folder in found[f"saved{world}"]]
    assert len(saved) == 1 and saved[0] < 20
    resumed = weights(f"runs/term{world}", 20)  # on another number of processes
    calm = weights("runs/calm20", 20)
    nets = [torch.cat([state[name].flatten() for name in calm if name.startswith("net.")])
            for state in (resumed, calm)]
    assert relative_error(*nets) < 1e-2


def test_a_dead_process_ends_the_others(processes):
    codes, seconds = processes[0]["orphan"]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, "late")
    assert seconds < 20


def test_a_bad_start_is_said_once(processes):
    """Rank 1 finds no encoder: it says so in one line, and nobody waits for it."""
    found, errors = processes
    codes, seconds = found["bad_start"]
    assert codes == [1, 1]
    assert seconds < 20
    assert len(re.findall("^train.py: .*runs/nowhere.*$", errors, re.M)) == 1
    assert errors.count("runs/nowhere") == 1


def test_a_process_with_other_weights_stops_the_run(processes):
    """Rank 1 starts with other weights, which rank 0's replace, and gets others in step 6."""
    found, errors = processes
    codes, _ = found["other_weights"]
    assert codes == [1, 1]
    assert os.listdir("runs/other_weights").count("step_00000004") == 1
    assert not glob.glob("runs/other_weights/step_00000008*")
    said = "RuntimeError: rank 1 has other weights than rank 0; nothing was saved"
    assert errors.count(said) == 2  # both processes write at once: lines can be interleaved


def test_a_skipped_step_names_its_process(processes):
    """Noise of rank 1 is not finite. So are then all forces, by the sums over both processes."""
    assert processes[0]["spoilt"][0] == [0, 0]
    line, = log("runs/spoilt", "skipped_on_ranks")
    assert line["step"] == 4
    assert line["skipped_on_ranks"] == [1]
    assert len(line["worst_features"]) == 3
    assert log("runs/spoilt")[-1]["skipped"] == 1


def test_processes_and_micro_batches_train_what_one_pass_does(processes):
    """1, 2 and 4 processes, each with 1, 2 and 4 micro-batches: loss, gradient, 10 steps."""
    for stage in ("g", "s", "e"):
        whole = torch.load(f"runs/equal_{stage}_1_1.pt")
        assert whole["grad"].norm() > 1e-3
        for world in (1, 2, 4):
            for parts in (1, 2, 4):
                split = torch.load(f"runs/equal_{stage}_{world}_{parts}.pt")
                assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5), (world, parts)
                assert relative_error(split["grad"], whole["grad"]) < 1e-4, (world, parts)
    whole = [line["loss"] for line in log("runs/equal_g_1_1")]
    assert len(whole) == 10
    for world, parts in CURVES:
        split = [line["loss"] for line in log(f"runs/equal_g_{world}_{parts}")]
        assert split == pytest.approx(whole, rel=1e-3)


# --------------------------------------------------------------------------------------------
# This file as a script forks many processes from one that has imported everything, which takes
# seconds, and has computed nothing: each is as fresh as a started one.

TINY = dict(
    data="data/digits", encoder="runs/tiny_encoder", init_from="runs/tiny", model="XS",
    patch_size=4, labels=8, gen=4, pos=6, uncond=2, lr=1e-3, warmup=2, push=32, log_every=1,
    sample_every=10000, save_every=10000, device="cpu")
CURVES = ((1, 1), (2, 2), (4, 1))  # (processes, micro-batches) that are followed for 10 steps


def fork(function, *args, world=1):
    """Process ids of `world` processes of a script whose main function is function(*args)."""
    main = functools.partial(function, *args)
    return fork_script(functools.partial(model.run_script, main), world)


def fork_script(script, world):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            if world > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                                  MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            run_and_exit(script)
        children.append(child)
    return children


def run_and_exit(main):
    """What Python does with a script's end."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv[0] = "train.py"
        main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def ended(children, seconds=60):
    """Exit codes (-9: killed) of processes, or "late"; and the seconds waited."""
    began = time.time()
    codes = {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            if time.time() - began > seconds:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = "late"
            pid, status = os.waitpid(child, os.WNOHANG) if child not in codes else (0, 0)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return [codes[child] for child in children], time.time() - began


def wait_for(pattern, seconds=90):
    """Until a file of this pattern exists."""
    began = time.time()
    while not glob.glob(pattern):
        assert time.time() - began < seconds, f"{pattern} did not appear"
        time.sleep(0.001)


def tiny_networks():
    """runs/tiny_encoder and runs/tiny, by a process of its own: threads would outlast no fork."""
    model.GENERATOR_SIZES["XS"] = SMALL
    if os.fork() == 0:
        torch.manual_seed(0)
        encoder = model.MAE(1, 64, (1,), input_patch_size=2, num_classes=10)
        encoder.save_pretrained("runs/tiny_encoder")
        net = model.Generator(8, 1, patch_size=4, num_classes=10, **SMALL)
        for p in net.parameters():  # as initialised, it makes one and the same image
            p.data += 0.05 * torch.randn(p.shape)
        net.save_pretrained("runs/tiny")
        os._exit(0)
    os.wait()


def equal():
    """Losses and gradients on 1, 2 and 4 processes in 1, 2 and 4 micro-batches; three curves."""
    assert ended(fork(all_parts, 1) + fork(all_parts, 2, world=2), 120)[0] == [0] * 3
    assert ended(fork(all_parts, 4, world=4), 120)[0] == [0] * 4


def all_parts(world):
    generator = TINY | dict(reals="index", push=None, labels=16, gen=3, steps=10)
    encoder = ENCODER | dict(base_channels=8, device="cpu")
    sinkhorn = generator | dict(field="sinkhorn", iterations=2)
    for parts in (1, 2, 4):
        for name, options in (("g", generator), ("s", sinkhorn), ("e", encoder)):
            out = f"runs/equal_{name}_{world}_{parts}"
            line = words(options, out=out, micro_batches=parts)
            one_step(train.parse(line), f"{out}.pt")
            if name == "g" and (world, parts) in CURVES:
                train.main(line)


def one_step(args, path):
    """The loss of step 0 and the gradient that would be clipped, of all processes."""
    clip = torch.nn.utils.clip_grad_norm_
    gradients = []

    def record(params, limit):
        gradients.append(flat_gradient(params))
        return clip(params, limit)

    run = train.Run(args, prepare_data.Dataset(args.data))
    torch.nn.utils.clip_grad_norm_ = record
    logs, _, _ = run.update(run.stage.batch(0), 0)
    torch.nn.utils.clip_grad_norm_ = clip
    if train.get_rank() == 0:
        torch.save({"loss": logs["loss"].item(), "grad": gradients[0]}, path)
    if args.stage == "generator":
        encoders = run.stage.encoders
        assert not any(p.requires_grad or p.grad is not None for p in encoders.parameters())
        assert not any(module.training for module in encoders.modules())


def killed():
    """A run killed 20 times, often within a checkpoint, then left to end; and one left alone."""
    options = TINY | dict(steps=70, save_every=1, ema_decay=[0.9, 0.99])
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
        os.kill(children[0], signal.SIGKILL)
        kills += ended(children)[0] == [-signal.SIGKILL]
        partial += bool(glob.glob("runs/killed/step_*.tmp"))
    assert ended(fork(start, options) + calm)[0] == [0, 0]
    return dict(kills=kills, partial=partial)


def faults():
    """SIGTERM to one process and to one of two; ranks that die, cannot start or are spoilt."""
    found = {}
    options = TINY | dict(steps=20)
    calm = fork(start, options | dict(out="runs/calm20"))
    for world in (1, 2):
        out = f"runs/term{world}"
        children = fork(start, options | dict(out=out, steps=10000), world=world)
        wait_for(f"{out}/log.jsonl")
        os.kill(children[-1], signal.SIGTERM)
        found[f"term{world}"] = ended(children)
        found[f"saved{world}"] = glob.glob(f"{out}/step_*")
    for world in (1, 2):  # each goes on on the other number of processes
        children = fork(start, options | dict(out=f"runs/term{world}"), world=3 - world)
        assert ended(children)[0] == [0] * (3 - world)
    children = fork(start, options | dict(out="runs/orphan", steps=10000), world=2)
    wait_for("runs/orphan/log.jsonl")
    os.kill(children[1], signal.SIGKILL)
    found["orphan"] = ended(children)
    assert ended(calm)[0] == [0]
    for function in (bad_start, other_weights, spoilt):
        line = options | dict(out=f"runs/{function.__name__}", steps=8, save_every=4)
        found[function.__name__] = ended(fork(function, line, world=2))
    return found


def bad_start(options):
    if train.get_rank() == 1:
        options["encoder"] = "runs/nowhere"
    start(options)


def other_weights(options):
    """Rank 1 has other weights at the start, and again from its sixth step."""
    resume = train.resume
    update = train.Run.update

    def resume_otherwise(run, out):
        torch._foreach_add_([p.data for p in run.params], 1.0)
        return resume(run, out)

    def update_otherwise(run, batch, step):
        if step == 5:
            run.params[3].data += 1e-3
        return update(run, batch, step)

    if train.get_rank() == 1:
        train.resume = resume_otherwise
        train.Run.update = update_otherwise
    start(options)


def spoilt(options):
    """Rank 1 draws a noise that is not finite in its fourth step."""
    draw = train.GeneratorStage.batch

    def draw_otherwise(stage, step):
        batch = draw(stage, step)
        if step == 3:
            batch["noise"][0, 0] = math.nan
        return batch

    if train.get_rank() == 1:
        train.GeneratorStage.batch = draw_otherwise
    start(options)


def planted():
    """Every planted fault at once, each in a process that imports the scripts of its folder."""
    cases = [(fault, fault, 1) for fault in PLANTED] + [("on two processes", "encoder", 2)]
    children = {}
    for name, fault, world in cases:
        line = planted_command(fault, f"runs/planted {name}")
        script = functools.partial(run_copy, plant(fault, name).resolve(), *line)
        children[name] = fork_script(script, world)
    return {name: ended(processes)[0] for name, processes in children.items()}


def run_copy(folder, script, *line):
    for path in ROOT.glob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.path.insert(0, str(folder))
    sys.argv[1:] = line
    stderr = folder / f"stderr_{os.environ.get('RANK', 0)}"
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    runpy.run_path(folder / script, run_name="__main__")


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401, which building a model on the meta device imports
    tiny_networks()
    findings = {"planted": planted(), **faults(), **killed()}
    equal()
    print(json.dumps(findings))
