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
COMMAND = r"(?:python|torchrun --nproc_per_node \d) (\w+\.py[^\n`#]*)"
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


def test_scripts_that_the_readme_names_are_all_there_is():
    named = re.findall(r"^\| `(\w+\.py)` \|", README, re.M)
    assert {path.name for path in ROOT.glob("*.py")} == set(named)


def test_the_readme_is_short():
    assert len(README.split()) <= 1600


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


# What a reader would do with the seven examples, one after the other.
USE = """
import json, math
import numpy as np, torch
import drift, fid, model, prepare_data, train

dist = torch.rand(2, 3, 5)
wanted = (-(dist / 0.5) ** 2).exp()
assert torch.allclose(drift.affinity(dist, 0.5, "gaussian"), wanted)

# The new field is the gradient of an energy distance, and it loses no mode.
x, pos, uncond = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
x.requires_grad_()
alpha = torch.tensor([1.0, 2.5])
drift.FIELDS["mmd"](x, None, pos, uncond, alpha)[0].sum().backward()
to_pos, to_uncond, to_x = (torch.cdist(x, y).mean((1, 2)) for y in (pos, uncond, x))
wanted = torch.autograd.grad((2 * (alpha * to_pos + (1 - alpha) * to_uncond) - to_x).sum(), x)[0]
assert torch.cosine_similarity(x.grad.flatten(), wanted.flatten(), 0) > 1 - 1e-6
frames, _ = drift.toy_experiment("two_modes_collapsed", 240, n=128, real=256, field="mmd")
assert min(drift.describe("two_modes", frames[-1]).values()) > 0.4

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
np.save("mine/images.npy", images)
np.save("mine/labels.npy", np.arange(40) % 4)
prepare_data.main("pixels --data mine --out data/mine".split())
data = prepare_data.Dataset("data/mine")
assert data.shape == (3, 8, 8) and data.count.tolist() == [10] * 4
assert (data.images[0].transpose(1, 2, 0) == images[data.labels[0]::4]).all((1, 2, 3)).any()

model.Pyramid().save_pretrained("runs/pyramid")
net = model.Generator(8, 3, num_classes=10, **model.GENERATOR_SIZES["M"])
net.class_embed.weight.data.copy_(torch.eye(10, 192))
condition = net.condition(torch.tensor([0, 5]), torch.ones(2), torch.zeros(2, 32, dtype=torch.long))
change = (condition[1] - condition[0])[:4].detach()
assert torch.allclose(change, torch.tensor([1.0, 0, 1, 0]), atol=1e-5)  # 5: first and third bit

train.main("--data data/mine --out runs/mine --encoder runs/pyramid --model M --kernel gaussian "
           "--steps 2 --labels 4 --gen 4 --pos 4 --uncond 2 --push 8".split())
train.main("--data data/mine --out runs/mmd --encoder runs/pyramid --model M --field mmd "
           "--steps 1 --labels 4 --gen 4 --pos 4 --uncond 2 --push 8".split())
fid.main("eval --ckpt runs/mine --data data/mine --features pixels --num_images 40".split())
"""


def apply_changes(folder):
    """The README's diffs, without line numbers: a hunk's old lines stand once in their file."""
    section = README.split("## Change something")[1].split("\n## ")[0]
    blocks = re.findall(r"```diff\n(.*?)```", section, re.S)
    for block in blocks:
        file, *hunks = re.split("^--- (.*)\n|^@@\n", block, flags=re.M)[1:]
        path = folder / file
        for hunk in filter(None, hunks):
            lines = hunk.splitlines()
            old = "\n".join(line[1:] for line in lines if not line.startswith("+")) + "\n"
            new = "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n"
            source = path.read_text()
            assert source.count(old) == 1, f"{file}: {source.count(old)} times\n{old}"
            path.write_text(source.replace(old, new))
    return len(blocks)


def test_change_something(tmp_path):
    """All seven examples at once, in a copy of the scripts."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    assert apply_changes(tmp_path) == 7
    (tmp_path / "mine").mkdir()
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"mean_shift": ' in done.stdout
