"""The README's commands: every one is accepted by its script, and the main job's chain of stages runs."""
import re
import shlex

import pytest

import drift
import fid
import prepare_data
import sample
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun --nproc_per_node \d) (\w+\.py[^\n`#]*)", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_readme_are_accepted(command):
    script, *words = shlex.split(command)
    if script == "drift.py":
        assert set(words) <= set(drift.EXPERIMENTS)
    else:
        {"train.py": train, "sample.py": sample, "prepare_data.py": prepare_data, "fid.py": fid}[script].parse(words)


def test_the_readme_has_commands_for_every_script():
    assert {c.split()[0] for c in COMMANDS} == {"train.py", "sample.py", "prepare_data.py", "fid.py", "drift.py"}


def test_scripts_that_the_readme_names_are_all_there_is():
    assert {p.name for p in ROOT.glob("*.py")} == set(re.findall(r"^\| `(\w+\.py)` \|", README, re.M))


def test_one_command_makes_data_encoder_and_generator(tmp_path, monkeypatch):
    """`train.py --preset digits`, shortened: from nothing to a picture; a second start has nothing left to do."""
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
