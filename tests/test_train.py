"""train.py and sample.py by running them: small runs that are stopped, resumed, split over processes and sampled."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

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
from conftest import ROOT, relative_error

ENCODER = ("--stage encoder --data data/digits --out runs/e --base_channels 64 --layers 1 1 --batch_size 16 --steps 6 --lr 1e-3 "
           "--warmup 2 --cls_steps 3 --cls_ramp 2 --log_every 1 --save_every 3 --sample_every 100").split()
GENERATOR = ("--data data/digits --out runs/g --encoder runs/e --model XS --labels 4 --gen 4 --pos 6 --uncond 2 --steps 6 "
             "--lr 1e-3 --warmup 2 --cooldown 2 --push 32 --log_every 1 --save_every 3 --sample_every 100").split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with prepared digits and a trained small encoder, which is the current folder for the module."""
    folder, before = tmp_path_factory.mktemp("home"), os.getcwd()
    os.chdir(folder)
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
    return {**load_file(f"{folder}/train_state.safetensors"), **load_file(f"{folder}/model.safetensors")}


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
    """A real process, SIGKILLed wherever it happens to be, ends with an undisturbed run's weights."""
    args = changed(GENERATOR, steps=16, save_every=2)
    train.main(changed(args, out="runs/calm"))
    command = [sys.executable, str(ROOT / "train.py"), *changed(args, out="runs/killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for wanted in (4, 10):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not os.path.exists(f"runs/killed/step_{wanted:08d}"):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    calm, killed = weights("runs/calm", 16), weights("runs/killed", 16)
    assert all(torch.equal(v, killed[k]) for k, v in calm.items())


@pytest.mark.parametrize("args, options", [(ENCODER, {}), (GENERATOR, {"reals": "queue"})])
def test_two_processes_train_what_one_does(home, args, options):
    """Same draws, same normalisers, same gradients: two gloo processes follow one process's run."""
    shutil.rmtree("runs/one", ignore_errors=True), shutil.rmtree("runs/two", ignore_errors=True)
    args = changed(args, steps=4, save_every=4, **options)
    train.main(changed(args, out="runs/one"))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    str(ROOT / "train.py"), *changed(args, out="runs/two")], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    for one, two in zip(log("runs/one"), log("runs/two"), strict=True):
        first = one["step"] == 1  # later, Adam has made rounding in the smallest gradients visible
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5 if first else 1e-3)
        assert one["norm"] == pytest.approx(two["norm"], rel=1e-4 if first else 1e-2)
    one, two = weights("runs/one", 4), weights("runs/two", 4)
    assert all(torch.equal(value, two[name]) for name, value in one.items() if name.startswith("queue."))
    flat = [torch.cat([v.flatten() for k, v in w.items() if k.startswith("net.")]) for w in (one, two)]
    assert relative_error(flat[1], flat[0]) < 1e-2


def test_a_checkpoint_needs_no_flags(home):
    train.main(GENERATOR)
    generator = model.load_generator("runs/g")  # the run's newest checkpoint
    ema = load_file("runs/g/step_00000006/model.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in generator.state_dict().items())
    assert set(os.listdir("runs/g/step_00000006")) == {"README.md", "config.json", "model.safetensors",
                                                       "train_state.safetensors"}
    with pytest.raises(ValueError, match="not a Generator"):
        model.load_generator("runs/e")


def test_only_the_last_two_checkpoints_are_kept(home):
    train.main(changed(GENERATOR, out="runs/many", save_every=1))
    assert sorted(p for p in os.listdir("runs/many") if p.startswith("step_")) == ["step_00000005", "step_00000006"]


def test_the_average_is_an_exponential_one(home):
    """EMA by hand over the raw weights of every step."""
    for steps in range(1, 5):
        train.main(changed(GENERATOR, out="runs/ema", steps=steps, save_every=1, cooldown=0, ema_decay=0.4))
        raw = {k[4:]: v for k, v in load_file(f"runs/ema/step_{steps:08d}/train_state.safetensors").items() if k[:4] == "net."}
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
    (["--data", "d", "--encoder", "e"], "--out is needed"),
])
def test_options_that_would_be_ignored_are_errors(args, message, capsys):
    with pytest.raises(SystemExit):
        train.parse(args)
    assert message in capsys.readouterr().err


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
        train.save_checkpoint = lambda *args: kept.append(args[4])
        train.main(changed(GENERATOR, out="runs/graph", steps=2))
    finally:
        train.save_checkpoint = save
    assert kept and all(not p.requires_grad and p.grad_fn is None for p in kept[0].parameters())


def test_damaged_checkpoints_and_other_data_are_refused(home):
    train.main(changed(GENERATOR, out="runs/damaged", steps=4, save_every=2))
    args = changed(GENERATOR, out="runs/damaged")
    for name in ("model.safetensors", "train_state.safetensors"):
        file = home / "runs/damaged/step_00000004" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:5000])
        with pytest.raises(ValueError, match="step_00000004 is damaged.*the one before"):
            train.main(args)
        file.write_bytes(whole)
    shutil.copytree("data/digits", "data/inverted")
    images = np.fromfile("data/inverted/train/images.bin", np.uint8)
    (255 - images).tofile("data/inverted/train/images.bin")
    with pytest.raises(ValueError, match="other data"):
        train.main(changed(args, data="data/inverted"))


@pytest.mark.parametrize("options, message", [
    ({"pos": 145}, "class 8 of data/digits has 140 images"),
    ({"encoder": "runs/nowhere"}, "runs/nowhere: no model there"),
    ({"data": "data/nowhere"}, "no prepared data there"),
    ({"out": "runs/e"}, "is of another model"),
])
def test_bad_input_is_refused_at_the_start(home, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        train.main(changed(GENERATOR, reals="index", **options))


def test_a_gradient_that_is_not_finite_stops_the_run_and_spoils_nothing(home):
    args = changed(GENERATOR, out="runs/nan", save_every=1, steps=3)
    train.main(args)
    stage_loss = train.GeneratorStage.loss
    try:
        train.GeneratorStage.loss = lambda self, step: (stage_loss(self, step)[0] * (float("nan") if step == 4 else 1), {})
        with pytest.raises(ValueError, match="step 4: the gradient is nan.*step_00000004"):
            train.main(changed(args, steps=6))
    finally:
        train.GeneratorStage.loss = stage_loss
    assert all(v.isfinite().all() for v in weights("runs/nan", 4).values())


def test_a_full_disk_leaves_the_last_checkpoint(home):
    """No file may grow beyond 1 MB, as on a full disk: one clear line, and the run goes on once there is room."""
    args = changed(GENERATOR, out="runs/full", save_every=3)
    train.main(changed(args, steps=3, cooldown=0))
    limited = subprocess.run([sys.executable, str(ROOT / "train.py"), *changed(args, cooldown=0)], capture_output=True, text=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)))
    assert limited.returncode == 1 and "step_00000006 could not be saved" in limited.stderr.splitlines()[-1]
    assert [p for p in os.listdir("runs/full") if p.startswith("step_")] == ["step_00000003"]
    train.main(changed(args, cooldown=0))
    assert model.latest_checkpoint("runs/full").name == "step_00000006"


def test_crop_resize():
    """The whole image is left as it is, a flip mirrors it, and a quarter's crop is that quarter, enlarged."""
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = np.tile([0.0, 0, 1, 1], (3, 1))
    assert torch.allclose(train.crop_resize(x, whole, np.array([False, True, False]))[::2], x[::2], atol=1e-5)
    assert torch.allclose(train.crop_resize(x, whole, np.array([False, True, False]))[1], x[1].flip(2), atol=1e-5)
    quarter = train.crop_resize(x, np.tile([0.5, -0.5, 0.5, 0.5], (3, 1)), np.zeros(3, bool))  # right, upper
    enlarged = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")[:, :, :8, 8:]
    assert torch.allclose(quarter[:, :, 1:-1, 1:-1], enlarged[:, :, 1:-1, 1:-1], atol=1e-5)
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


def test_commands_write_what_they_say(generator, capsys):
    def run(*words):
        subprocess.run([sys.executable, str(ROOT / "sample.py"), "--ckpt", "runs/random", *words], check=True,
                       capture_output=True)

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
        assert np.abs(np.asarray(Image.open(f"folder/{name}")).astype(int) - array[i, :, :, 0]).max() <= 1
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                    str(ROOT / "sample.py"), "--ckpt", "runs/random", "--out", "folder2", "--num_images", "5"], check=True,
                   capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert sorted(os.listdir("folder2")) == files


@pytest.mark.parametrize("words, message", [
    (["--ckpt", "nowhere"], "sample.py: nowhere: no model there"),
    (["--ckpt", "runs/random", "--classes", "10"], "this generator knows 0 to 9"),
    (["--ckpt", "runs/e"], "not a Generator"),
])
def test_bad_input_to_sample_is_one_line(generator, words, message):
    result = subprocess.run([sys.executable, str(ROOT / "sample.py"), *words], capture_output=True, text=True)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1
