"""The README: its commands are accepted, and what it says to change can be changed."""
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import drift
import fid
import prepare_data
import sample
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMAND = r"(?:python|torchrun --nproc_per_node \d) (\w+\.py[^\n`#|]*)"
COMMANDS = sorted(set(re.findall(COMMAND, README)))
SCRIPTS = {"train.py": train, "sample.py": sample, "prepare_data.py": prepare_data, "fid.py": fid}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_are_accepted(command):
    script, *words = shlex.split(command)
    if script == "drift.py":
        assert set(words) <= set(drift.EXPERIMENTS)
    else:
        SCRIPTS[script].parse(words)


def test_the_readme_has_commands_for_every_script():
    assert {command.split()[0] for command in COMMANDS} == {*SCRIPTS, "drift.py"}
    for script in re.findall(r"python (tests/\w+\.py)", README):
        assert (ROOT / script).is_file()


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"^[A-Z_]+$", README, re.M)


def test_scripts_that_the_readme_names_are_all_there_is():
    named = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert {path.name for path in ROOT.glob("*.py")} == set(named)


def test_one_command_makes_data_encoder_and_generator(tmp_path, monkeypatch):
    """`train.py --preset digits`, shortened; a second start has nothing left to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train.PRESETS["digits_encoder"], "steps", 3)
    monkeypatch.setitem(train.PRESETS["digits_encoder"], "batch_size", 16)
    command = ["--preset", "digits", "--steps", "2", "--labels", "2"]
    train.main(command)
    assert (tmp_path / "runs/digits_encoder/step_00000003/model.safetensors").exists()
    assert (tmp_path / "runs/digits/samples_00000002.png").exists()
    before = (tmp_path / "runs/digits/log.jsonl").read_text()
    train.main(command)
    assert (tmp_path / "runs/digits/log.jsonl").read_text() == before


def blocks(section, language):
    text = README.split(f"## {section}")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_loss_alone_trains_a_table(tmp_path):
    """The energy distance falls by more than half."""
    [code] = blocks("The loss alone", "python")
    done = subprocess.run([sys.executable, "-c", "import torch; torch.manual_seed(0)\n" + code],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    distances = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(distances) == 4
    assert distances[-1] < 0.2 * distances[0]


# What a reader would do with the examples, one after the other.
USE = """
import json, sys, types
import numpy as np, torch
import drift, fid, model, prepare_data, sample, train

rows = []
wandb = types.SimpleNamespace(run=None, log=lambda row, step: rows.append((step, row["loss"])))
wandb.init = lambda **options: setattr(wandb, "run", options["config"]["out"])
sys.modules["wandb"] = wandb

dist = torch.rand(2, 3, 5)
wanted = (-(dist / 0.5) ** 2).exp()
assert torch.allclose(drift.affinity(dist, 0.5, "gaussian"), wanted.clamp_min(1e-3))

# The new field is the gradient of an energy distance, and it loses no mode.
x, pos, uncond = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
x.requires_grad_()
alpha = torch.tensor([1.0, 2.5])
drift.FIELDS["mmd"](x, None, pos, uncond, alpha)[0].sum().backward()
to_pos, to_uncond, to_x = (torch.cdist(x, y).mean((1, 2)) for y in (pos, uncond, x))
wanted = torch.autograd.grad((2 * (alpha * to_pos + (1 - alpha) * to_uncond) - to_x).sum(), x)[0]
assert torch.cosine_similarity(x.grad.flatten(), wanted.flatten(), 0) > 1 - 1e-6
frames, _ = drift.toy_experiment("two_modes_collapsed", 240, n=128, field="mmd")
right = (frames[-1][:, 0] > 0).float().mean()
assert 0.35 < right < 0.65

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
np.save("mine/images.npy", images)
np.save("mine/labels.npy", np.arange(40) % 4)
prepare_data.main("pixels --data mine --out data/mine".split())
data = prepare_data.Dataset("data/mine")
assert data.shape == (3, 8, 8) and data.count.tolist() == [10] * 4
assert (data.images[0].transpose(1, 2, 0) == images[data.labels[0]::4]).all((1, 2, 3)).any()

# The condition: twentieths of ink, and what lies between two of them.
prepare_data.prepare(prepare_data.DIGITS, "data/ink")
data = prepare_data.Dataset("data/ink")
ink = [data.images[data.labels == c].mean() for c in range(20)]
assert ink == sorted(ink) and data.num_classes == 20

model.Pyramid().save_pretrained("runs/pyramid")
model.Pyramid(1).save_pretrained("runs/pyramid_1")
line = "--encoder runs/pyramid --model XS --labels 4 --gen 4 --pos 4 --uncond 2 --push 8 --steps"
train.main(f"--data data/mine --out runs/mine --kernel gaussian {line} 2".split())
assert wandb.run == "runs/mine" and [step for step, _ in rows] == [1, 2]
train.main(f"--data data/mine --out runs/mmd --field mmd {line} 1".split())
train.main(f"--data data/ink --out runs/ink {line} 2 --encoder runs/pyramid_1".split())
fid.main("eval --ckpt runs/mine --data data/mine --features pixels --num_images 40".split())
net = model.load_generator("runs/ink")
torch.nn.init.normal_(net.final_linear.weight)
three, between, four = (net.embed_label(torch.tensor([c])) for c in (3, 3.5, 4))
assert torch.allclose(between, (three + four) / 2, atol=1e-6)
assert sample.generate(net, [3.5], [0]).isfinite().all()

# A stand-in for torchvision, and for MoCo's file.
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 8, 7, 2), torch.nn.BatchNorm2d(8)
        self.relu, self.maxpool = torch.nn.ReLU(), torch.nn.MaxPool2d(2)
        for i in range(1, 5):
            self.add_module(f"layer{i}", torch.nn.Conv2d(8, 8, 3, 2, 1))
        self.fc = torch.nn.Linear(8, 5)
models = types.ModuleType("torchvision.models")
models.resnet50 = Net
sys.modules["torchvision"] = types.ModuleType("torchvision")
sys.modules["torchvision.models"] = models
net = Net()
state = {f"module.encoder_{k}.{name}": x for k in "qk" for name, x in net.state_dict().items()}
torch.save({"state_dict": state, "epoch": 800}, "moco_v2_800ep_pretrain.pth.tar")
exec(open("moco.py").read())
loaded = model.load_encoder("runs/moco")
assert torch.equal(loaded.net.layer3.weight, net.layer3.weight)
assert loaded.features(torch.zeros(2, 3, 32, 32))["layer1"].shape == (2, 27 * 27, 8)
"""


def apply_changes(folder):
    """The README's diffs, without line numbers: a hunk's old lines stand once in their file."""
    diffs = blocks("Change something", "diff")
    for block in diffs:
        pieces = re.split("^--- (.*)\n", block, flags=re.M)[1:]
        for file, text in zip(pieces[::2], pieces[1::2]):
            path = folder / file
            for hunk in filter(None, re.split("^@@\n", text, flags=re.M)):
                lines = hunk.splitlines()
                old = "\n".join(line[1:] for line in lines if not line.startswith("+")) + "\n"
                new = "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n"
                source = path.read_text()
                assert source.count(old) == 1, f"{file}: {source.count(old)} times\n{old}"
                path.write_text(source.replace(old, new))
    return len(diffs)


def test_change_something(tmp_path):
    """All examples at once, in a copy of the scripts."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    assert apply_changes(tmp_path) == 6
    [moco] = blocks("Change something", "python")
    (tmp_path / "moco.py").write_text(moco)
    (tmp_path / "mine").mkdir()
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
