"""sample.py: what an image depends on, and grids, folders and files of them."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model
import sample
from conftest import FIXTURES, ROOT, ranks, small_vae
from hub_server import HubServer
from model import UsageError

TINY = FIXTURES / "gen_latent_tiny"  # 8x8x4 latents, 7 classes


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a generator of digits."""
    torch.manual_seed(0)
    net = model.Generator(input_size=8, in_channels=1, num_classes=10, hidden_size=64, depth=2,
                          num_heads=2, n_cls_tokens=4)
    torch.nn.init.normal_(net.final_linear.weight, std=0.1)  # zero would hide everything
    for block in net.blocks:
        torch.nn.init.normal_(block.adaln.weight, std=0.5)
    path = tmp_path_factory.mktemp("generator")
    net.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def generator(folder):
    return model.load_generator(folder)


def run(*words):
    sample.main([*map(str, words), "--device", "cpu"])


def enlarged(tile):
    """[8, 8] -> [80, 80], as in a grid."""
    return np.asarray(Image.fromarray(np.asarray(tile)).resize((80, 80), Image.Resampling.BICUBIC))


# --------------------------------------------------------------------------------------------
# Images

def test_an_image_depends_on_seed_and_index_alone(generator):
    labels = np.arange(12) % 10
    images = sample.generate(generator, labels, np.arange(12), batch_size=12)
    one_by_one = sample.generate(generator, labels, np.arange(12), batch_size=1)
    assert (images - one_by_one).abs().max() < 1e-5  # of 2 / 255, a grey level
    part = sample.generate(generator, labels[[7, 3]], [7, 3])
    assert (part - images[[7, 3]]).abs().max() < 1e-5
    same = dict(labels=labels, indices=np.arange(12))
    for change in (dict(seed=1), dict(indices=np.arange(12) + 12), dict(cfg_scale=3.0),
                   dict(temperature=0.5), dict(labels=(labels + 1) % 10)):
        other = sample.generate(generator, **{**same, **change})
        assert (other - images).abs().mean() > 1e-3
    x = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, 2 * (100.999 / 255) - 1])
    assert sample.to_uint8(x).tolist() == [0, 255, 127, 0, 255, 100]  # by floor


def test_what_would_be_wrong_in_silence_is_refused(folder):
    net = model.load_generator(folder)
    with pytest.raises(AssertionError, match="one label for each"):
        sample.generate(net, [3], range(3))
    torch.nn.init.constant_(net.final_linear.bias, float("nan"))
    with pytest.raises(UsageError, match="NaN or Inf"):
        sample.generate(net, [0], [0])


# --------------------------------------------------------------------------------------------
# The command

def test_grids_folders_and_files(generator, folder, tmp_path):
    run("--ckpt", folder, "--out", tmp_path / "g.png", "--classes", 3, 7, "--num_images", 6)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (20 + 3 * 82 - 2, 2 * 82 - 2, 3)
    tile = sample.to_uint8(sample.generate(generator, [7], [3]))[0, 0]  # second row and column
    assert np.abs(grid[20 + 82:][:80, 82:162, 0].astype(int) - enlarged(tile)).max() <= 1

    run("--ckpt", folder, "--out", tmp_path / "x.npz", "--num_images", 5)
    array = np.load(tmp_path / "x.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 1) and array.dtype == np.uint8
    run("--ckpt", folder, "--out", tmp_path / "one", "--num_images", 5)
    files = [f"00000{i}_{i}.png" for i in range(5)]
    assert sorted(os.listdir(tmp_path / "one")) == files
    for i, name in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / name)), array[i, :, :, 0])
    assert sorted(os.listdir(tmp_path)) == ["g.png", "one", "x.npz"]  # no scratch is left


def test_labelled_rows_of_alphas(vae_folder, tmp_path):
    """Row r, column i is image i at that alpha, under a line of text."""
    run("--ckpt", TINY, "--vae", vae_folder, "--classes", 3, "--num_images", 4, "--cfg_scale", 1, 3,
        "--batch_size", 3, "--out", tmp_path / "rows.png")
    grid = np.asarray(Image.open(tmp_path / "rows.png"))
    side = 66  # 64 pixels and a gap of 2
    height = side + 20  # and a line of text
    assert grid.shape == (2 * height - 2, 4 * side - 2, 3)
    generator = model.load_generator(TINY)
    vae = model.load_vae(vae_folder)
    for row, alpha in enumerate([1.0, 3.0]):
        images = sample.generate(generator, [3] * 4, range(4), alpha, vae=vae)
        for i, wanted in enumerate(sample.to_uint8(images).permute(0, 2, 3, 1).numpy()):
            assert (grid[row * height:][:18, i * side:][:, :64] < 128).any()  # the text
            tile = grid[row * height + 20:][:64, i * side:][:, :64]
            assert np.abs(tile.astype(int) - wanted).max() <= 1, (row, i)


def test_a_folder_with_other_images_is_refused(folder, tmp_path):
    """A score of 5 images over 8 earlier ones would count all of them."""
    for n in (5, 8):
        run("--ckpt", folder, "--out", tmp_path / "pngs", "--num_images", n)
    with pytest.raises(UsageError, match="holds other images"):
        run("--ckpt", folder, "--out", tmp_path / "pngs", "--num_images", 5)


def test_the_same_on_two_processes_and_refused_without_a_common_disk(folder, tmp_path):
    """A file, a folder and a grid, every bit; then each process has a working folder of its own."""
    words = ["--ckpt", str(folder), "--num_images", "5", "--batch_size", "2", "--device", "cpu"]
    ends = [".npz", "", ".png"]
    for end in ends:
        sample.main([*words, "--out", f"{tmp_path}/one{end}"])
    (tmp_path / "script.py").write_text(f"""if True:
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import model, sample

        def main():
            for end in {ends}:
                sample.main({words} + ["--out", "two" + end])
            sample.main({words} + ["--num_images", "1", "--out", "x.png"])  # none for rank 1
            model.time.time = iter(range(0, 9000, 100)).__next__  # the minute passes at once
            os.makedirs(os.environ["RANK"])
            os.chdir(os.environ["RANK"])
            sample.main({words} + ["--out", "x.npz"])
        model.run_script(main)""")
    processes = ranks(2, tmp_path / "script.py", cwd=tmp_path)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert all("not on a disk that all machines share" in text for text in said)
    assert all("Traceback" not in text for text in said) and (tmp_path / "x.png").is_file()
    files = sorted(os.listdir(tmp_path / "one"))
    assert sorted(os.listdir(tmp_path / "two")) == files and len(files) == 5
    for one in (tmp_path / "one.png", *(tmp_path / "one").iterdir()):
        assert Path(str(one).replace("one", "two")).read_bytes() == one.read_bytes()
    one, two = [np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two")]
    assert one.shape == (5, 8, 8, 1) and one.std() > 10 and np.array_equal(one, two)


def test_one_command_from_the_hub_to_a_grid(vae_folder, tmp_path):
    """As a user has it: published name, empty cache, VAE from the Hub."""
    place = "models/gen/jax/latent_L_sota"
    vae = {path.name: path.read_bytes() for path in vae_folder.iterdir()}
    artifact = {f"{place}/{path.name}": path.read_bytes() for path in TINY.iterdir()}
    with HubServer({"stabilityai/sd-vae-ft-mse": vae, "Goodeat/drifting": artifact}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, ROOT / "sample.py", "--ckpt", "hf://latent_L_sota", "--classes",
                   "2", "5", "--num_images", "4", "--cfg_scale", "1.0"]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True,
                              text=True, check=True).stdout
        assert f"{place}/ema_params.msgpack" in hub.fetched and f"{place}/io.npz" not in hub.fetched
    assert said == "samples.png: 4 images\n"
    assert Image.open(tmp_path / "samples.png").size == (2 * 66 - 2, 20 + 2 * 66 - 2)


def test_classes_have_names(folder, generator, tmp_path):
    """The generator of digits as one of animals, which has seen a class called 3."""
    named = tmp_path / "named"
    net = model.load_generator(folder)
    net.origin = {"classes": ["cat", "dog", "3", "ant", "bée", "猫", "eel", "fox", "gnu", "hen"]}
    net.save_pretrained(named)
    run("--ckpt", named, "--classes", "dog", 3, 9, "--num_images", 3, "--out", tmp_path / "x.png")
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (20 + 80, 3 * 82 - 2, 3)
    for column, label in enumerate([1, 2, 9]):  # a name goes before a number
        tile = sample.to_uint8(sample.generate(generator, [label], [column]))[0, 0]
        wanted = enlarged(tile).astype(int)
        assert np.abs(grid[20:, column * 82:][:, :80, 0] - wanted).max() <= 1
        assert (grid[:18, column * 82:][:, :80] < 128).any()
    with pytest.raises(UsageError, match="this generator knows 1, 2, 3"):  # is it 0 or 1?
        sample.class_numbers(["0"], ["1", "2", "3"])
