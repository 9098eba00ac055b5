"""train.py and sample.py by running them: small runs that are stopped, killed, resumed, split over processes and sampled."""
import argparse
import glob
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

import drift
import fid
import model
import prepare_data
import sample
import train
from conftest import ROOT, ranks, relative_error

ENCODER = ("--stage encoder --data data/digits --out runs/e --base_channels 64 --layers 1 1 --batch_size 16 --steps 6 "
           "--lr 1e-3 --warmup 2 --cls_steps 3 --cls_ramp 2 --log_every 1 --save_every 3 --sample_every 100").split()
GENERATOR = ("--data data/digits --out runs/g --encoder runs/e --model XS --labels 4 --gen 4 --pos 6 --uncond 2 --steps 6 "
             "--lr 1e-3 --warmup 2 --cooldown 2 --push 32 --log_every 1 --save_every 3 --sample_every 100 --flip").split()


XS, SMALL = model.GENERATOR_SIZES["XS"], dict(hidden_size=64, depth=2, num_heads=2, n_cls_tokens=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with prepared digits and a trained small encoder, which is the current folder for the module."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.GENERATOR_SIZES, "XS", SMALL)
        prepare_data.prepare("digits", "data/digits")
        train.main(ENCODER)
        yield folder
    os.chdir(before)


def changed(args, **options):
    """The command line with options replaced or added."""
    args = list(args)
    for key, value in options.items():
        if f"--{key}" in args:
            args[args.index(f"--{key}") + 1] = str(value)
        else:
            args += [f"--{key}", str(value)]
    if options.get("reals") == "index":  # which does not push
        at = args.index("--push")
        del args[at:at + 2]
    return args


def weights(run, step=6):
    folder = f"{run}/step_{step:08d}"
    files = load_file(f"{folder}/train_state.safetensors"), load_file(f"{folder}/model.safetensors")
    return {name: p.clone() for file in files for name, p in file.items()}  # as they are now: the files are mapped


def log(run):
    return [json.loads(line) for line in open(f"{run}/log.jsonl")]


@pytest.mark.parametrize("args, options", [(ENCODER, {"crop_scale": 0.3}), (GENERATOR, {"reals": "queue"}),
                                           (GENERATOR, {"reals": "index"})])
def test_stopped_and_resumed_is_bit_equal(home, args, options):
    args = changed(args, **options)
    shutil.rmtree("runs/whole", ignore_errors=True), shutil.rmtree("runs/parts", ignore_errors=True)
    train.main(changed(args, out="runs/whole"))
    train.main(changed(args, out="runs/parts"))
    shutil.rmtree("runs/parts/step_00000006")  # as if it had been killed after the checkpoint of step 3
    (home / "runs/parts/step_00000005.tmp").mkdir()  # while writing another
    train.main(changed(args, out="runs/parts"))
    whole, parts = weights("runs/whole"), weights("runs/parts")
    assert whole.keys() == parts.keys() and all(torch.equal(v, parts[k]) for k, v in whole.items())
    assert any(k.startswith("queue.") for k in whole) == (options.get("reals") == "queue")
    steps = [line["step"] for line in log("runs/parts")]
    assert steps == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_killed_at_any_moment(home):
    """20 real SIGKILLs, some in the middle of a checkpoint: the run ends with an undisturbed run's weights, bit for bit."""
    found, errors = script("kill")
    assert found["kills"] == 20 and found["partial"] >= 4
    calm, killed = weights("runs/calm", 70), weights("runs/killed", 70)
    assert calm.keys() == killed.keys() and all(torch.equal(v, killed[k]) for k, v in calm.items())
    for average in ("ema_0.99/", ""):
        calm, killed = (load_file(f"runs/{run}/step_00000070/{average}model.safetensors") for run in ("calm", "killed"))
        assert all(torch.equal(v, killed[k]) for k, v in calm.items())


def test_sigterm_dead_ranks_and_bad_starts(home):
    found, errors = script("fault")
    calm = weights("runs/calm40", 40)
    for world in (1, 2):  # one process was told; all save the same step, within seconds, and end without an error
        codes, seconds = found[f"term{world}"]
        assert codes == [0] * world and seconds < 5
        assert len(found[f"saved{world}"]) == 1 and int(found[f"saved{world}"][0][-8:]) < 40
        resumed = weights(f"runs/term{world}", 40)  # on another number of processes
        flat = [torch.cat([v.flatten() for k, v in w.items() if k.startswith("net.")]) for w in (calm, resumed)]
        assert relative_error(flat[1], flat[0]) < 1e-2
        assert all(torch.equal(v, resumed[k]) for k, v in calm.items() if k.startswith("queue."))
    codes, seconds = found["orphan"]
    assert codes[0] not in (0, "late") and codes[1] == -9 and seconds < 20
    codes, seconds = found["bad_start"]
    assert codes == [1, 1] and seconds < 20
    assert errors.count("data/nowhere/train: no prepared data there") == 2  # both processes know why


def test_sigterm_during_an_evaluation_ends_at_once():
    """It takes minutes and follows a checkpoint; before and after it, the signal is only noted."""
    stop = train.Stop()
    with stop.saved():
        pass
    assert not stop.asked
    with pytest.raises(SystemExit), stop.saved():
        stop(signal.SIGTERM, None)
    stop = train.Stop()
    stop(signal.SIGTERM, None)
    assert stop.asked
    with pytest.raises(SystemExit), stop.saved():
        raise AssertionError("the evaluation began")


def test_processes_and_micro_batches_train_what_one_pass_does(home):
    """1, 2 and 4 gloo processes, each with 1, 2 and 4 micro-batches: the loss, its gradient, 20 steps."""
    script("equal")
    for name in ("g", "e"):
        whole = torch.load(f"runs/equal_{name}_1_1.pt")
        assert torch.tensor(whole["grad"]).norm() > 1e-3
        for world in (1, 2, 4):
            for parts in (1, 2, 4):
                found = torch.load(f"runs/equal_{name}_{world}_{parts}.pt")
                assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5), (name, world, parts)
                assert relative_error(found["grad"], whole["grad"]) < 1e-4, (name, world, parts)
                if name == "g" and (world, parts) in CURVES:
                    for a, b in zip(log("runs/equal_g_1_1"), log(f"runs/equal_g_{world}_{parts}"), strict=True):
                        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), (world, parts, a["step"])


@pytest.mark.parametrize("reals", ["queue", "index"])
def test_draws_depend_on_seed_and_step_alone(home, monkeypatch, reals):
    """Labels, alphas, noise, styles and reals of a step, put together from 1, 2 and 4 processes, are the same bits."""
    args, data = train.parse(changed(GENERATOR, reals=reals, device="cpu")), prepare_data.Dataset("data/digits")
    drawn = {}
    for world in (1, 2, 4):
        monkeypatch.setattr(train, "world_size", lambda: world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(train, "get_rank", lambda: rank)
            stage = train.GeneratorStage(args, data)
            shares.append([stage.batch(step) for step in (3, 4)])
        drawn[world] = [torch.cat([share[i][j] for share in shares]) for i in (0, 1) for j in range(6)]
    for one, two, four in zip(*drawn.values()):
        assert torch.equal(one, two) and torch.equal(one, four) and one.float().std() > 0
    assert not torch.equal(drawn[1][2], drawn[1][8])  # another step, other noise


@pytest.mark.parametrize("reals", ["queue", "index"])
def test_features_of_reals_are_made_once(home, monkeypatch, reals):
    """With all features known, a step's loss and gradient are those of a step that looks at its images."""
    data, steps = prepare_data.Dataset("data/digits"), []
    for limit, parts in ((0, 1), (1 << 30, 1), (1 << 30, 2)):
        monkeypatch.setattr(train, "KNOWN_BYTES", limit)
        args = train.parse([x for x in changed(GENERATOR, reals=reals, micro_batches=parts, device="cpu") if x != "--flip"])
        torch.manual_seed(0)
        stage = train.GeneratorStage(args, data)
        assert (stage.known is None) == (limit == 0)
        for weights in stage.net.parameters():  # the last layer begins at zero, and nothing before it would get a gradient
            torch.nn.init.normal_(weights, std=0.05)
        loss, _ = stage.backward(stage.batch(0), 0)
        steps.append((loss.item(), torch.cat([p.grad.flatten() for p in stage.net.parameters()])))
    for loss, grad in steps[1:]:
        assert loss == pytest.approx(steps[0][0], rel=1e-5) and relative_error(grad, steps[0][1]) < 1e-4 and grad.norm() > 1e-3


def test_torchrun(home, monkeypatch):
    """The command itself, on two processes; a SIGTERM to torchrun reaches them, and they save."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "train.py"), *changed(GENERATOR, out="runs/torchrun", steps=10000, save_every=10000, cooldown=0)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    wait_for("runs/torchrun/log.jsonl")
    process.send_signal(signal.SIGTERM)
    began, text = time.time(), process.communicate(timeout=30)[0]
    step = int(model.latest_checkpoint("runs/torchrun").name[5:])
    assert time.time() - began < 10 and f"stopped by SIGTERM after step {step}, which is saved" in text
    monkeypatch.setitem(model.GENERATOR_SIZES, "XS", XS)
    train.main(changed(GENERATOR, out="runs/torchrun_one", steps=1, save_every=1, cooldown=0))
    for one, two in zip(log("runs/torchrun_one"), log("runs/torchrun")):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5) and one["norm"] == pytest.approx(two["norm"], rel=1e-4)


def test_a_checkpoint_needs_no_flags(home):
    train.main(GENERATOR)
    generator = model.load_generator("runs/g")  # the run's newest checkpoint
    ema = load_file("runs/g/step_00000006/model.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in generator.state_dict().items())
    assert set(os.listdir("runs/g/step_00000006")) == {"README.md", "config.json", "model.safetensors", "SHA256SUMS",
                                                       "train_state.safetensors"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd="runs/g/step_00000006", check=True)
    with pytest.raises(ValueError, match="not a Generator"):
        model.load_generator("runs/e")


def test_only_the_last_two_checkpoints_are_kept(home):
    train.main(changed(GENERATOR, out="runs/many", save_every=1))
    assert sorted(p for p in os.listdir("runs/many") if p.startswith("step_")) == ["step_00000005", "step_00000006"]


def test_the_average_is_an_exponential_one(home):
    """EMA by hand over the raw weights of every step."""
    for steps in range(1, 5):
        train.main(changed(GENERATOR, out="runs/ema", steps=steps, save_every=1, cooldown=0, ema_decay=0.4))
        raw = {k[4:]: v for k, v in weights("runs/ema", steps).items() if k[:4] == "net."}
        if steps == 1:
            args = train.parse(changed(GENERATOR, out="runs/ema"))
            torch.manual_seed(args.seed)
            stage = train.GeneratorStage(args, prepare_data.Dataset("data/digits"))
            average = {k: v.clone() for k, v in stage.net.state_dict().items()}
        decay = min(0.4, steps / (steps + 9))
        average = {k: decay * v + (1 - decay) * raw[k] for k, v in average.items()}
    ema = load_file("runs/ema/step_00000004/model.safetensors")
    assert all(torch.allclose(v, average[k], atol=1e-6) for k, v in ema.items())


def test_evaluation_inside_training(home):
    """Its figures are those of fid.py afterwards, the best weights are kept, and the training goes on as without it."""
    evaluated = changed(GENERATOR, out="runs/evaluated", eval_every=3, eval_images=120, eval_features="encoder:runs/e")
    train.main(evaluated)
    train.main(changed(GENERATOR, out="runs/plain"))
    plain, found = weights("runs/plain"), weights("runs/evaluated")
    assert all(torch.equal(v, found[k]) for k, v in plain.items())
    rows = [line for line in log("runs/evaluated") if "fd" in line]
    assert [(row["step"], row["num_images"]) for row in rows] == [(1, 100), (3, 120), (6, 120)]
    extractor = fid.load_extractor("encoder:runs/e")
    reference = fid.open_reference(extractor, data="data/digits")
    again = fid.evaluate(fid.generated(model.load_generator("runs/evaluated")), 120, extractor, reference)
    assert again["fd"] == pytest.approx(rows[-1]["fd"], rel=1e-6)
    best = json.loads((home / "runs/evaluated/best/score.json").read_text())
    assert best["score"] == min(row["fd"] for row in rows[1:])
    model.load_generator("runs/evaluated/best")


def test_learning_rate():
    args = train.parse(changed(GENERATOR, steps=100, warmup=10, cooldown=20, lr=1.0))
    rates = [train.learning_rate(step, args) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=1e-5) and rates[9:80] == [pytest.approx(1.0)] * 71
    assert rates[80] == pytest.approx(1.0) and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize("args, message", [
    (["--preset", "digits", "--base_channels", "8"], "--base_channels is not read in stage generator"),
    (["--preset", "digits_encoder", "--gen=8"], "--gen is not read in stage encoder"),
    (["--preset", "digits", "--lable", "8"], "unrecognized arguments"),
    (["--preset", "nothing"], "invalid choice"),
    (["--preset", "digits", "--push", "8"], "--push is read with --reals queue only"),
    (["--preset", "digits", "--eval_images", "8"], "are read with --eval_every only"),
    (["--preset", "digits", "--labels", "0"], "--labels must be at least 1"),
    (["--preset", "digits", "--uncond", "-1"], "--uncond must be at least 0"),
    (["--preset", "digits", "--ema_decay", "1.5"], "--ema_decay is a share of 1"),
    (["--preset", "digits_encoder", "--crop_scale", "0"], "--crop_scale is a share of 1"),
    (["--preset", "digits_encoder", "--layers", "1", "0"], "--layers must be at least 1"),
    (["--preset", "digits_encoder", "--cls_steps", "0", "--cls_weight", "0.5"], "are read with --cls_steps only"),
    (["--preset", "digits", "--clip", "0"], "--lr and --clip must be more than 0"),
    (["--data", "d", "--encoder", "e"], "--out is needed"),
])
def test_options_that_would_be_ignored_are_errors(args, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(args)
    assert message in capsys.readouterr().err


# METHOD's table: model, labels, G, N_pos, N_unc, alpha's power and fixed share, lr, weight decay, warm-up, steps, float32
# attention, millions of parameters; then the encoders: width, stages, steps, classifier steps.
PAPER = {
    "latent_ablation": ("B", 64, 64, 64, 16, 3, 0, 2e-4, 0.01, 5000, 30000, True, 133),
    "latent_B": ("B", 128, 64, 64, 32, 5, 0, 4e-4, 0, 10000, 200000, False, 133),
    "latent_L": ("L", 128, 64, 64, 32, 3, 0.5, 4e-4, 0.01, 10000, 200000, False, 463),
    "pixel_B": ("B", 128, 64, 128, 32, 5, 0, 2e-4, 0.01, 10000, 100000, True, 134),
    "pixel_L": ("L", 128, 64, 128, 32, 5, 0, 4e-4, 0.01, 10000, 100000, True, 464),
}
PAPER_ENCODERS = {"mae_latent_256": (256, 30000, 0, 4), "mae_latent_640": (640, 200000, 3000, 4),
                  "mae_pixel_640": (640, 200000, 3000, 3)}


def test_presets_are_the_papers_recipes():
    for name, row in PAPER.items():
        args = train.parse(["--preset", name])
        assert (args.model, args.labels, args.gen, args.pos, args.uncond, args.alpha_power, args.alpha_fixed, args.lr,
                args.weight_decay, args.warmup, args.steps, args.attn_fp32) == row[:-1], name
        assert (args.clip, args.ema_decay, args.reals, args.flip) == (2.0, [0.999], "queue", True)
        assert args.crop_scale == (0.2 if name.startswith("pixel") else 1)
        with torch.device("meta"):
            net = train.GeneratorStage.network(args, train.RandomData(args.data))
        assert round(sum(p.numel() for p in net.parameters()) / 1e6) == row[-1]
        assert (net.input_size // net.patch_size) ** 2 == 256
        for encoder in args.encoder:  # what a dry run builds has the published sizes
            with torch.device("meta"):
                net = train.random_encoder(encoder, train.RandomData(args.data))
            if "mae" in encoder:
                del net.decoder, net.fc
            millions = {"hf://mae_latent_256": 340, "hf://mae_latent_640": 2126, "hf://mae_pixel_640": 2127}
            assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions.get(encoder, 87.7), abs=0.6)
    for name, row in PAPER_ENCODERS.items():
        args = train.parse(["--preset", name])
        with torch.device("meta"):
            net = train.EncoderStage.network(args, train.RandomData(args.data))
        assert (args.base_channels, args.steps, args.cls_steps, net.in_channels) == row and args.layers == [3, 4, 6, 3]
        assert (args.batch_size, args.lr, args.warmup, args.weight_decay, args.clip, args.ema_decay, args.crop_scale) == (
            8192, 4e-3, 4000, 0.01, 2.0, [0.9995], 0.2)
    for name, parts in (("latent_ablation_8gpu", 1), ("latent_ablation_1gpu", 8)):  # the recipe itself, differently cut
        args, recipe = (vars(train.parse(["--preset", preset])) for preset in (name, "latent_ablation"))
        assert {key for key in args if args[key] != recipe[key]} <= {"preset", "out", "micro_batches", "checkpoint_blocks"}
        assert args["micro_batches"] == parts and args["checkpoint_blocks"]


def test_dry_run(tmp_path, monkeypatch, capsys):
    """It needs no data and writes nothing; its FLOPs are those counted by hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.GENERATOR_SIZES, "XS", dict(hidden_size=32, depth=1, num_heads=2, n_cls_tokens=2))
    words = ["--preset", "digits", "--dry_run", "--device", "cpu", "--labels", "2", "--gen", "4"]
    flops = []
    for more in ([], ["--checkpoint_blocks"]):
        train.main([*words, *more])
        said = capsys.readouterr().out
        assert "parameters: generator 0." in said and "digits_encoder 1.2M" in said and "900 steps: 0." in said
        predicted, measured = (float(said.split(f"process, {what}: ")[1].split()[0]) for what in ("predicted", "measured"))
        assert 0 < predicted < 0.2 and measured < 2
        flops.append(float(said.split("a step: ")[1].split()[0]) * 1e12)
    args = train.parse(words)
    net = train.GeneratorStage.network(args, train.RandomData(args.data))
    counts = []
    for module in (net.blocks, net):  # every linear map: 2 FLOP a weight and token forward, 4 backward
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            x = (torch.randn(8, 6, 32), torch.randn(8, 32), net.rope) if module is net.blocks else (
                torch.randn(8, 1, 8, 8), torch.arange(8), torch.ones(8), torch.zeros(8, 32, dtype=torch.long))
            (net.blocks[0] if module is net.blocks else net)(*x)
        counts.append(counter.get_total_flops())
    assert flops[1] > flops[0] > 3 * counts[1] > 3 * counts[0]
    assert not list(tmp_path.iterdir())
    for bad, message in ((["--data", "data/mine"], "knows what is in"), (["--encoder", "mine"], "knows the sizes")):
        with pytest.raises(ValueError, match=message):
            train.main([*words, *bad])
    with pytest.raises(ValueError, match="holds latents: .*--crop_scale for pixels"):
        train.main(["--preset", "latent_B", "--dry_run", "--crop_scale", "0.5"])


@pytest.mark.parametrize("options", [(), ("--micro_batches", "2", "--checkpoint_blocks"), ("--bf16",)])
def test_predicted_costs_are_those_of_real_tensors(monkeypatch, options):
    """And a step reads nothing back from its device: shapes alone, which have no values, would raise at once."""
    monkeypatch.setitem(model.GENERATOR_SIZES, "XS", dict(hidden_size=32, depth=2, num_heads=2, n_cls_tokens=2))
    monkeypatch.setitem(drift.CHUNK_BYTES, "cuda", drift.CHUNK_BYTES["cpu"])
    args = train.parse(["--preset", "digits", "--dry_run", "--device", "cpu", "--labels", "4", "--gen", "8", "--pos", "8",
                        *options])
    data = train.RandomData(args.data)
    predicted, kept = train.predict(args, data)
    weights = sum(p.nbytes for net in (kept["net"], *kept["emas"], kept["stage"].encoders) for p in net.parameters())
    moments = 2 * sum(p.nbytes for p in kept["net"].parameters())
    assert predicted.now == pytest.approx(weights + moments, rel=0.02)
    with train.Costs() as real:
        state, update = train.set_up(argparse.Namespace(**vars(args) | {"reals": "index"}), data, train.Stop())
        real.peak = real.now
        update(state["stage"].batch(0), 0)
    assert predicted.flops == real.flops > 1e8
    if args.bf16:  # a GPU's norms keep less than those of this CPU
        assert 0.5 * real.peak < predicted.peak < real.peak
    else:
        assert predicted.peak == pytest.approx(real.peak, rel=0.02) and real.peak > 1.2 * real.now > 1e6


def test_a_prediction_waits_for_no_other_process(monkeypatch):
    """One of two processes alone: it has half of the labels, and nobody to talk to."""
    def flops(labels):
        args = train.parse(["--preset", "digits", "--dry_run", "--labels", str(labels), "--gen", "4", "--pos", "4"])
        return train.predict(args, train.RandomData(args.data))[0].flops

    alone = flops(1)
    monkeypatch.setattr(train, "world_size", lambda: 2)
    assert flops(2) == alone


def test_memory_is_that_of_one_micro_batch():
    """Three times the labels, in three parts, take what they did; in one part, much more."""
    def activations(labels, parts):
        args = train.parse(["--preset", "digits", "--dry_run", "--labels", str(labels), "--micro_batches", str(parts),
                            "--gen", "8", "--pos", "8", "--uncond", "4"])
        costs, state = train.predict(args, train.RandomData(args.data))
        return costs.peak - costs.now

    one = activations(4, 1)
    assert activations(12, 3) < 1.2 * one and activations(12, 1) > 2 * one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("preset", ["digits", "digits_encoder"])
def test_no_step_waits_for_the_gpu(home, preset):
    args = train.parse(["--preset", preset, "--dry_run"])
    state, update = train.set_up(args, train.RandomData(args.data), train.Stop())
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            update(state["stage"].batch(step), step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_networks_compile_without_graph_breaks():
    net = model.Generator(8, 1, patch_size=4, num_classes=10, hidden_size=32, depth=1, num_heads=2, n_cls_tokens=2).train()
    inputs = torch.randn(4, 1, 8, 8), torch.arange(4), torch.ones(4), torch.zeros(4, 32, dtype=torch.long)
    mae, convnext = model.MAE(1, 16, (2, 1), num_classes=10).eval(), model.ConvNeXtV2((1, 1, 1, 1), (8, 16, 32, 64)).eval()
    image = torch.randn(2, 3, 32, 32)
    for function, args in ((net.forward, inputs), (mae.features, inputs[:1]), (convnext.features, (image,))):
        for checkpointed in (False, True) if function == net.forward else (False,):
            net.checkpoint_blocks = checkpointed
            torch._dynamo.reset()
            found = torch._dynamo.explain(function)(*args)
            assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    torch._dynamo.reset()


def test_several_averages(home):
    """Each is what a run with that decay alone has, at every resume; the first is what others read."""
    args = changed(GENERATOR, cooldown=0)
    for decay in ("0.3", "0.4"):
        train.main([*changed(args, out=f"runs/ema_{decay}"), "--ema_decay", decay])
    both = [*changed(args, out="runs/ema_both"), "--ema_decay", "0.3", "0.4"]
    train.main(changed(both, steps=3))
    train.main(both)
    for run, folder in (("ema_0.3", ""), ("ema_0.4", "/ema_0.4")):
        wanted = model.load_generator(f"runs/{run}").state_dict()
        found = model.load_generator(f"runs/ema_both/step_00000006{folder}").state_dict()
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert not torch.equal(wanted["pos_embed"], model.load_generator("runs/ema_both").state_dict()["pos_embed"])
    with pytest.raises(ValueError, match="has no averages of --ema_decay.*resume with"):
        train.main([*changed(both, steps=8), "--ema_decay", "0.3", "0.5"])


def test_logging_elsewhere_is_asked_for(home, monkeypatch):
    """A clear line without the package; with it, the figures of log.jsonl."""
    args, board = changed(GENERATOR, out="runs/logged", steps=2), []
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for flag in ("--wandb", "--tensorboard"):
        with pytest.raises(ValueError, match="need the packages of these names.*pip install"):
            train.main([*args, flag])
    run = types.SimpleNamespace(log=lambda figures, step: board.append((step, figures)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: run))
    writer = types.SimpleNamespace(add_scalar=lambda key, value, step: board.append((step, key, value)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=lambda folder: writer))
    train.main([*args, "--wandb", "--tensorboard"])
    for line in log("runs/logged"):
        step = line.pop("step")
        assert (step, line) in board and (step, "loss", line["loss"]) in board


def test_pixel_reals_are_cropped_and_mirrored(home):
    """--crop_scale in the generator's stage: other views of the same images, within [-1, 1], generated noise untouched."""
    data = prepare_data.Dataset("data/digits")
    drawn = {}
    for scale in (1, 0.2):
        args = train.parse([*changed(GENERATOR, crop_scale=scale, device="cpu"), "--flip"])
        drawn[scale] = train.GeneratorStage(args, data).batch(0)
    plain, cropped = drawn[1], drawn[0.2]
    assert all(torch.equal(a, b) for a, b in zip(plain[:4], cropped[:4]))
    assert cropped[4].shape == plain[4].shape and cropped[4].abs().max() <= 1
    distance = (cropped[4] - plain[4]).square().mean((1, 2, 3))
    assert (distance > 1e-3).float().mean() > 0.9  # nearly all differ


def test_encoder_of_latents_from_pixels(home, monkeypatch):
    """Cropped, mirrored, encoded, drawn: what an image becomes depends on (seed, step) alone; latents in, latents out."""
    def encode(x):
        return torch.nn.functional.avg_pool2d(x, 8)[:, [0, 0, 0, 0]], torch.full((len(x), 4, 4, 4), 0.1)

    monkeypatch.setattr(train, "open_vae", lambda args: types.SimpleNamespace(encode=encode))
    plain = prepare_data.Dataset.batch
    monkeypatch.setattr(prepare_data.Dataset, "batch",
                        lambda *args, **options: plain(*args, **options).repeat_interleave(4, 2).repeat_interleave(4, 3))
    data = prepare_data.Dataset("data/digits")
    data.shape = (1, 32, 32)
    args = train.parse([*changed(ENCODER, crop_scale=0.2, device="cpu"), "--to_latents"])
    shares = {}
    for world in (1, 2):
        monkeypatch.setattr(train, "world_size", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(train, "get_rank", lambda: rank)
            stage = train.EncoderStage(args, data)
            shares.setdefault(world, []).append(stage.batch(1))
    whole, halves = shares[1][0], [torch.cat(pair) for pair in zip(*shares[2])]
    assert whole[0].shape == (16, 4, 4, 4) and stage.net.in_channels == 4
    assert all(torch.equal(a, b) for a, b in zip(whole, halves))
    assert (whole[0][:, 0] - whole[0][:, 1]).std() == pytest.approx(0.1 * 2**0.5, rel=0.2)  # drawn with that std
    stage.backward(whole, 1)


def test_presets_are_made_of_options():
    for name, preset in train.PRESETS.items():
        args = vars(train.parse(["--preset", name]))
        assert preset.items() <= args.items()  # every key is read in its stage, and nothing is misspelt
        assert vars(train.parse(["--preset", name, "--steps", "7"]))["steps"] == 7


def test_the_average_keeps_no_graph(home):
    """What train.py's loop does to it must not make it part of autograd: a graph would grow with every step."""
    kept = []
    save = train.save_checkpoint
    try:
        train.save_checkpoint = lambda *args, **state: kept.append(state["emas"][0])
        train.main(changed(GENERATOR, out="runs/graph", steps=2))
    finally:
        train.save_checkpoint = save
    assert kept and all(not p.requires_grad and p.grad_fn is None for p in kept[0].parameters())


def test_damaged_checkpoints_are_recognised_and_the_one_before_is_used(home, capsys):
    args = changed(GENERATOR, out="runs/damaged", save_every=2)
    train.main(args)
    wanted = weights("runs/damaged")

    def truncated(data):
        return data[:5000]

    def emptied(data):
        return b""

    def flipped(data):
        return data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]

    for name, damage in (("model.safetensors", truncated), ("train_state.safetensors", flipped), ("SHA256SUMS", flipped),
                         ("SHA256SUMS", emptied)):
        file = home / "runs/damaged/step_00000006" / name
        file.write_bytes(damage(file.read_bytes()))
        train.main(args)
        assert "step_00000006 is damaged" in (said := capsys.readouterr().out) and "before it is used" in said
        assert all(torch.equal(v, weights("runs/damaged")[k]) for k, v in wanted.items())
        assert "resuming at step 4" in said and (home / "runs/damaged/step_00000006.damaged").exists()
    for folder in glob.glob("runs/damaged/step_0000000[46]"):
        os.remove(f"{folder}/model.safetensors")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        train.main(args)


def test_other_data_is_refused(home):
    train.main(changed(GENERATOR, out="runs/other", steps=2))
    shutil.copytree("data/digits", "data/inverted")
    images = np.fromfile("data/inverted/train/images.bin", np.uint8)
    (255 - images).tofile("data/inverted/train/images.bin")
    with pytest.raises(ValueError, match="other data"):
        train.main(changed(GENERATOR, out="runs/other", data="data/inverted"))
    labels = np.load("data/inverted/train/labels.npy")
    np.save("data/inverted/train/labels.npy", np.where(labels == 9, 10, labels))
    with pytest.raises(ValueError, match="labels.npy does not fit meta.json"):  # one label too high
        train.main(changed(GENERATOR, out="runs/labels", data="data/inverted"))
    (255 - images[:-1]).tofile("data/inverted/train/images.bin")
    with pytest.raises(ValueError, match="images.bin has 92287 bytes, its meta.json says 92288"):
        train.main(changed(GENERATOR, out="runs/labels", data="data/inverted"))


@pytest.mark.parametrize("options, message", [
    ({"pos": 145}, "class 8 of data/digits has 140 images"),
    ({"encoder": "runs/nowhere"}, "runs/nowhere: no model there"),
    ({"data": "data/nowhere"}, "no prepared data there"),
    ({"out": "runs/e"}, "is of another model"),
    ({"micro_batches": 3}, "must be divisible by 3"),
])
def test_bad_input_is_refused_at_the_start(home, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        train.main(changed(GENERATOR, reals="index", **options))


def test_a_loss_or_gradient_that_is_not_finite_skips_the_step(home, monkeypatch):
    """It is counted, leaves no trace in the weights, and the run goes on; too many in a row end it."""
    backward, spoilt = train.GeneratorStage.backward, {3}

    def spoil(self, batch, step):
        loss, logs = backward(self, batch, step)
        if step in spoilt and step % 2:
            self.net.patch_embed.weight.grad[0, 0] = float("nan")
        elif step in spoilt:
            loss = loss * float("inf")
        return loss, logs

    monkeypatch.setattr(train.GeneratorStage, "backward", spoil)
    args = changed(GENERATOR, out="runs/nan", save_every=1, cooldown=0)
    train.main(changed(args, steps=4))
    before, after, average = weights("runs/nan", 3), weights("runs/nan", 4), model.load_generator("runs/nan").state_dict()
    for key, value in after.items():  # the average goes on, towards the same weights
        changes = key == "bad_steps" or key.startswith("queue.") or key in average
        assert value.isfinite().all() and (changes or torch.equal(value, before[key])), key
    assert after["bad_steps"].tolist() == [1, 1]
    train.main(args)
    whole = weights("runs/nan")
    assert whole["bad_steps"].tolist() == [0, 1] and log("runs/nan")[-1]["skipped"] == 1
    assert not torch.equal(whole["net.pos_embed"], after["net.pos_embed"])
    train.main(changed(args, out="runs/nan_straight"))  # the same bits as one that was stopped after the skipped step
    assert all(torch.equal(v, whole[k]) for k, v in weights("runs/nan_straight").items())
    spoilt.update(range(6, 100))
    with pytest.raises(ValueError, match="step 9: loss or gradient was not finite 3 times in a row.*step_00000009"):
        train.main(changed(args, steps=20, max_bad_steps=3))
    stopped = weights("runs/nan", 9)
    assert all(torch.equal(v, whole[k]) for k, v in stopped.items() if k.startswith(("net.", "optimizer.")))
    assert all(v.isfinite().all() for v in stopped.values()) and log("runs/nan")[-1]["loss"] is None


def test_the_fused_optimizer_looks_at_found_inf():
    """What a GPU relies on instead of waiting: with found_inf the kernel leaves weights, moments and step counts alone."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], fused=True)
    for bad in (0.0, 1.0):
        p.grad = torch.full((3,), float("nan") if bad else 1.0)
        optimizer.found_inf = torch.tensor(bad)
        before = [t.clone() for t in (p, *optimizer.state[p].values())]
        optimizer.step()
        assert bad == all(torch.equal(a, b) for a, b in zip(before, (p, *optimizer.state[p].values())))


def test_a_full_disk_leaves_the_last_checkpoint(home):
    """No file may grow beyond 256 KB, as on a full disk: one clear line, and the run goes on once there is room."""
    args = changed(GENERATOR, out="runs/full", save_every=3, cooldown=0)
    train.main(changed(args, steps=3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
        with pytest.raises(OSError, match="step_00000006 could not be saved.*the checkpoints before it are untouched"):
            train.main(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p for p in os.listdir("runs/full") if p.startswith("step_")] == ["step_00000003"]
    train.main(args)
    assert model.latest_checkpoint("runs/full").name == "step_00000006"


def test_crop_resize():
    """The whole image is left as it is, a flip mirrors it, and a quarter's crop is that quarter, enlarged."""
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    whole = np.tile([0.0, 0, 1, 1], (3, 1))
    assert torch.allclose(train.crop_resize(x, whole, np.array([False, True, False]))[::2], x[::2], atol=1e-5)
    assert torch.allclose(train.crop_resize(x, whole, np.array([False, True, False]))[1], x[1].flip(2), atol=1e-5)
    quarter = train.crop_resize(x, np.tile([0.5, -0.5, 0.5, 0.5], (3, 1)), np.zeros(3, bool))  # right, upper
    enlarged = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic")[:, :, :8, 8:].clamp(-1, 1)
    assert torch.allclose(quarter[:, :, 3:-3, 3:-3], enlarged[:, :, 3:-3, 3:-3], atol=1e-5)
    crops = train.random_crops(10_000, 0.2, np.random.default_rng(0))
    assert (np.abs(crops[:, :2]) + crops[:, 2:] <= 1 + 1e-9).all() and (crops[:, 2] * crops[:, 3]).min() > 0.14
    assert np.ptp(crops[:, 0]) > 0.8


def test_mask_hides_half(home):
    args = train.parse(changed(ENCODER, batch_size=512))
    x, labels, mask = train.EncoderStage(args, prepare_data.Dataset("data/digits")).batch(0)
    assert mask.shape == (512, 4, 4) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.mean().item() == pytest.approx(0.5, abs=0.03)


# ------------------------------------------------------------------------------------------------------------------
# sample.py

@pytest.fixture(scope="module")
def generator(home):
    torch.manual_seed(0)
    net = model.Generator(input_size=8, in_channels=1, num_classes=10, **model.GENERATOR_SIZES["XS"])
    torch.nn.init.normal_(net.final_linear.weight, std=0.1)  # zero would hide everything
    for block in net.blocks:
        torch.nn.init.normal_(block.adaln.weight, std=0.5)
    net.save_pretrained("runs/random")
    return model.load_generator("runs/random")


def test_an_image_depends_on_seed_and_index_alone(generator):
    labels = np.arange(12) % 10
    whole = sample.generate(generator, labels, np.arange(12), batch_size=12)
    ones = sample.generate(generator, labels, np.arange(12), batch_size=1)
    assert (whole - ones).abs().max() < 1e-5
    part = sample.generate(generator, labels[[7, 3]], [7, 3])
    assert (part - whole[[7, 3]]).abs().max() < 1e-5
    assert (sample.generate(generator, labels, np.arange(12), seed=1) - whole).abs().mean() > 0.01
    assert (sample.generate(generator, labels, np.arange(12) + 12) - whole).abs().mean() > 0.01


def test_every_input_matters(generator):
    base = sample.generate(generator, [3], [0])
    for change in (dict(cfg_scale=3.0), dict(temperature=0.5)):
        assert (sample.generate(generator, [3], [0], **change) - base).abs().mean() > 1e-3
    assert (sample.generate(generator, [4], [0]) - base).abs().mean() > 1e-3
    noise, style = sample.image_noise(generator, 0, 0)
    assert len(style.unique()) > 10  # drawn, not zeros
    with torch.no_grad():
        args = noise[None], torch.tensor([3]), torch.ones(1)
        assert (generator(*args, style[None]) - generator(*args, style[None].roll(1))).abs().mean() > 1e-3


def test_uint8_is_floor():
    x = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, float("nan"), float("inf"), 2 * (100.999 / 255) - 1])
    assert sample.to_uint8(x.clone()).tolist() == [0, 255, 127, 0, 255, 0, 255, 100]


def test_commands_write_what_they_say(generator, home):
    def run(*words):
        sample.run(sample.parse(["--ckpt", "runs/random", "--device", "cpu", *words]))

    run("--out", "grid.png", "--classes", "3", "7", "--num_images", "6")
    grid = np.asarray(Image.open("grid.png"))
    assert grid.shape == (3 * 66 - 2, 2 * 66 - 2, 3)
    tile = sample.to_uint8(sample.generate(generator, [7], [3]))[0]  # second row, second column
    enlarged = np.asarray(Image.fromarray(tile[0].numpy()).resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(grid[66:130, 66:130, 0].astype(int) - enlarged).max() <= 1
    run("--out", "x.npz", "--num_images", "5")
    array = np.load("x.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 1) and array.dtype == np.uint8
    run("--out", "folder", "--num_images", "5", "--batch_size", "2")
    files = sorted(os.listdir("folder"))
    assert files == [f"00000{i}_{i}.png" for i in range(5)]
    for i, name in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(f"folder/{name}")), array[i, :, :, 0])
    for process in ranks(2, ROOT / "sample.py", "--ckpt", "runs/random", "--out", "folder2", "--num_images", 5):
        said = process.communicate(timeout=100)[0]
        assert process.returncode == 0, said
    assert sorted(os.listdir("folder2")) == files
    assert all((home / "folder2" / name).read_bytes() == (home / "folder" / name).read_bytes() for name in files)


@pytest.mark.parametrize("words, message", [
    (["--ckpt", "nowhere"], "sample.py: nowhere: no model there"),
    (["--ckpt", "runs/random", "--classes", "10"], "this generator knows 0 to 9"),
    (["--ckpt", "runs/e"], "not a Generator"),
])
def test_bad_input_to_sample_is_one_line(generator, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["sample.py", *words])
    with pytest.raises(SystemExit, match=message) as error:
        sample.main()
    assert "\n" not in str(error.value)


def test_one_run_a_folder(home):
    """While one process holds the folder another is told so; an error in a run, or its end, lets it go."""
    args = changed(GENERATOR, out="runs/locked", steps=2)
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, os, sys; os.makedirs('runs/locked'); f = open('runs/locked/.lock', 'w');"
                               "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(ValueError, match="another run writes to runs/locked"):
        train.main(args)
    holder.communicate()
    with pytest.raises(ValueError, match="is of another model"):
        train.main(changed(args, out="runs/e"))
    train.main(args)
    train.main(args)


def test_an_evaluation_that_was_interrupted_is_made(home):
    """The checkpoint is saved first; if the evaluation that follows does not end, the same command makes it."""
    args = changed(GENERATOR, out="runs/cut", eval_every=3, eval_images=20, eval_features="pixels")
    call = train.Evaluator.__call__

    def cut(self, ema, step, num_images):
        if step == 6:
            raise SystemExit(0)
        call(self, ema, step, num_images)
    try:
        train.Evaluator.__call__ = cut
        with pytest.raises(SystemExit):
            train.main(args)
    finally:
        train.Evaluator.__call__ = call
    assert [line["step"] for line in log("runs/cut") if "fd" in line] == [1, 3]
    train.main(args)
    train.main(args)
    assert [line["step"] for line in log("runs/cut") if "fd" in line] == [1, 3, 6]
    assert (home / "runs/cut/best/score.json").is_file()


def test_a_run_changes_no_preset_and_tells_of_another_encoder(home, capsys):
    before = json.dumps(train.PRESETS)
    args = train.parse(["--preset", "digits"])
    args.encoder[0] = "elsewhere"
    assert json.dumps(train.PRESETS) == before
    shutil.copytree(model.latest_checkpoint("runs/e"), "runs/e2", dirs_exist_ok=True)
    train.main(changed(GENERATOR, out="runs/another", steps=1, ema_decay="0.3"))
    train.main(changed(GENERATOR, out="runs/another", steps=2, encoder="runs/e2", ema_decay="0.3"))
    assert "with --encoder ['runs/e2'], before ['runs/e']" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------------
# Many processes. This file as a script forks them from one that has imported everything (an import takes seconds) and has
# computed nothing, so each is as fresh as a started one. It prints a dict of findings, which the tests look at.

TINY = ("--data data/digits --encoder runs/tiny_encoder --init_from runs/tiny --model XS --patch_size 4 --labels 8 --gen 4 "
        "--pos 6 --uncond 2 --lr 1e-3 --warmup 2 --push 32 --log_every 1 --sample_every 10000 --save_every 10000 "
        "--device cpu").split()


CURVES = ((1, 1), (2, 2), (4, 1))  # (processes, micro-batches) that are followed for 20 steps


def script(mode):
    result = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def fork(function, *args, world=1, **different):
    """Process ids of `world` gloo processes; `different` maps a rank to arguments of its own."""
    children, meeting = [], tempfile.mktemp()
    for rank in range(world):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if world > 1:
                    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
                function(*different.get(f"rank{rank}", args))
                code = 0
            except SystemExit as error:
                code = error.code or 0
            except (OSError, ValueError) as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
    return children


def ended(children, seconds=60):
    """Exit codes (-9: killed) of processes, or "late"; and the seconds waited."""
    began, codes = time.time(), dict.fromkeys(children)
    while None in codes.values() and time.time() - began < seconds:
        for child in [c for c, code in codes.items() if code is None]:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    for child in [c for c, code in codes.items() if code is None]:
        os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
        codes[child] = "late"
    return list(codes.values()), time.time() - began


def wait_for(pattern, seconds=30):
    """Until a file of this pattern exists."""
    began = time.time()
    while not glob.glob(pattern):
        assert time.time() - began < seconds, f"{pattern} did not appear"
        time.sleep(0.001)


def tiny_networks():
    model.GENERATOR_SIZES["XS"] = dict(hidden_size=32, depth=1, num_heads=2, n_cls_tokens=2)
    if os.fork() == 0:  # computing would start threads, which a fork does not take along
        torch.manual_seed(0)
        model.MAE(1, 64, (1,), input_patch_size=2, num_classes=10).save_pretrained("runs/tiny_encoder")
        net = model.Generator(8, 1, patch_size=4, num_classes=10, **model.GENERATOR_SIZES["XS"])
        for p in net.parameters():  # as initialised, it makes one and the same image
            p.data += 0.05 * torch.randn(p.shape)
        net.save_pretrained("runs/tiny")
        os._exit(0)
    os.wait()


def one_step(args, path):
    """Loss and averaged gradient of step 0, and what the step drew."""
    args = train.parse(args)
    torch.manual_seed(0)
    data = prepare_data.Dataset(args.data)
    stage = (train.EncoderStage if args.stage == "encoder" else train.GeneratorStage)(args, data)
    if args.stage == "generator":
        stage.net.load_state_dict(load_file("runs/tiny/model.safetensors"))
    loss, _ = stage.backward(stage.batch(0), 0)
    params = list(stage.net.parameters())
    loss, stopping = train.average(params, loss, False)
    if train.get_rank() == 0:
        torch.save({"loss": loss.item(), "grad": torch.cat([p.grad.flatten() for p in params]).tolist()}, path)
    if args.stage == "generator":
        assert all(p.grad is None and not p.requires_grad for p in stage.encoders.parameters())
        assert not any(m.training for m in stage.encoders.modules())


def equal_mode():
    """Losses and gradients on 1, 2 and 4 processes in 1, 2 and 4 micro-batches; curves of 20 steps."""
    def all_parts(world):
        for parts in (1, 2, 4):
            for name, args in (("g", changed(TINY, reals="index", labels=16, gen=3, steps=20)), ("e", encoder)):
                out = f"runs/equal_{name}_{world}_{parts}"
                args = changed(args, out=out, micro_batches=parts)
                one_step(args, f"{out}.pt")
                if name == "g" and (world, parts) in CURVES:
                    train.main(args)

    tiny_networks()
    encoder = changed(ENCODER, base_channels=8, device="cpu")
    assert ended(fork(all_parts, 1) + fork(all_parts, 2, world=2), 120)[0] == [0] * 3
    assert ended(fork(all_parts, 4, world=4), 120)[0] == [0] * 4
    return {}


def kill_mode():
    """A run killed 20 times, every fourth time in the middle of a checkpoint, then left to end; and one left alone."""
    tiny_networks()
    args = [*changed(TINY, steps=70, save_every=1), "--ema_decay", "0.9", "0.99"]
    calm = fork(train.main, changed(args, out="runs/calm"))
    kills, partial, rng = 0, 0, random.Random(0)
    for i in range(20):
        before = max(glob.glob("runs/killed/step_" + "[0-9]" * 8), default="")
        for path in glob.glob("runs/killed/step_*.tmp"):
            shutil.rmtree(path)
        children = fork(train.main, changed(args, out="runs/killed"))
        if i % 4 == 0:
            wait_for("runs/killed/step_*.tmp")
        elif i % 4 == 1:
            time.sleep(rng.uniform(0, 0.5))  # perhaps at its start
        else:
            while max(glob.glob("runs/killed/step_" + "[0-9]" * 8), default="") == before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
        os.kill(children[0], signal.SIGKILL)
        kills += ended(children)[0] == [-9]
        partial += bool(glob.glob("runs/killed/step_*.tmp"))
    assert ended(fork(train.main, changed(args, out="runs/killed")) + calm)[0] == [0, 0]
    return dict(kills=kills, partial=partial)


def fault_mode():
    """SIGTERM to one process and to one of two; a rank that dies; a rank that cannot start."""
    tiny_networks()
    found, args = {}, changed(TINY, steps=40)
    calm = fork(train.main, changed(args, out="runs/calm40"))
    for world in (1, 2):
        children = fork(train.main, changed(args, out=f"runs/term{world}", steps=10000), world=world)
        wait_for(f"runs/term{world}/log.jsonl")
        os.kill(children[-1], signal.SIGTERM)
        found[f"term{world}"] = ended(children)
        found[f"saved{world}"] = sorted(glob.glob(f"runs/term{world}/step_*"))
    for world in (1, 2):  # each goes on on the other number of processes
        assert ended(fork(train.main, changed(args, out=f"runs/term{world}"), world=3 - world))[0] == [0] * (3 - world)
    children = fork(train.main, changed(args, out="runs/orphan", steps=10000), world=2)
    wait_for("runs/orphan/log.jsonl")
    os.kill(children[1], signal.SIGKILL)
    found["orphan"] = ended(children)
    assert ended(calm)[0] == [0]
    bad = changed(args, out="runs/bad_start", data="data/nowhere")
    found["bad_start"] = ended(fork(train.main, changed(args, out="runs/bad_start"), world=2, rank1=[bad]))
    return found


if __name__ == "__main__":
    import torch._dynamo  # noqa: F401, which building a model on the meta device imports: once for all
    print(json.dumps({"equal": equal_mode, "kill": kill_mode, "fault": fault_mode}[sys.argv[1]]()))
