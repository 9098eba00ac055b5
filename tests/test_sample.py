"""sample.py: what an image depends on, and grids, folders and files of them."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import model
import sample
from conftest import FIXTURES, ROOT, published_generator, random_artifact, ranks, small_vae
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


# --------------------------------------------------------------------------------------------
# Images

def test_an_image_depends_on_seed_and_index_alone(generator):
    labels = np.arange(12) % 10
    images = sample.generate(generator, labels, np.arange(12), batch_size=12)
    one_by_one = sample.generate(generator, labels, np.arange(12), batch_size=1)
    assert (images - one_by_one).abs().max() < 1e-5  # of 2 / 255, a grey level
    part = sample.generate(generator, labels[[7, 3]], [7, 3])
    assert (part - images[[7, 3]]).abs().max() < 1e-5
    for change in (dict(seed=1, indices=np.arange(12)), dict(indices=np.arange(12) + 12)):
        other = sample.generate(generator, labels, **change)
        assert (other - images).abs().mean() > 0.01


def test_every_input_matters(generator):
    base = sample.generate(generator, [3], [0])
    for change in (dict(cfg_scale=3.0), dict(temperature=0.5), dict(labels=[4])):
        options = dict(labels=[3], indices=[0]) | change
        assert (sample.generate(generator, **options) - base).abs().mean() > 1e-3
    noise, style = sample.image_noise(generator, 0, 0)
    assert len(style.unique()) > 10  # drawn, not zeros
    with torch.no_grad():
        args = noise[None], torch.tensor([3]), torch.ones(1)
        change = generator(*args, style[None]) - generator(*args, style[None].roll(1))
    assert change.abs().mean() > 1e-3


def test_damaged_weights_are_told(folder):
    damaged = model.load_generator(folder)
    torch.nn.init.constant_(damaged.final_linear.bias, float("nan"))
    with pytest.raises(UsageError, match="NaN or Inf"):
        sample.generate(damaged, [0], [0])


def test_uint8_is_floor():
    x = torch.tensor([-1.0, 1.0, 0.0, -2.0, 2.0, np.nan, np.inf, 2 * (100.999 / 255) - 1])
    assert sample.to_uint8(x).tolist() == [0, 255, 127, 0, 255, 0, 255, 100]


# --------------------------------------------------------------------------------------------
# The command

def test_grids_folders_and_files(generator, folder, tmp_path):
    run("--ckpt", folder, "--out", tmp_path / "g.png", "--classes", 3, 7, "--num_images", 6)
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape == (3 * 66 - 2, 2 * 66 - 2, 3)
    tile = sample.to_uint8(sample.generate(generator, [7], [3]))[0]  # second row, second column
    tile = Image.fromarray(tile[0].numpy()).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.abs(grid[66:130, 66:130, 0].astype(int) - np.asarray(tile)).max() <= 1

    run("--ckpt", folder, "--out", tmp_path / "x.npz", "--num_images", 5)
    array = np.load(tmp_path / "x.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 1) and array.dtype == np.uint8
    run("--ckpt", folder, "--out", tmp_path / "one", "--num_images", 5)
    files = [f"00000{i}_{i}.png" for i in range(5)]
    assert sorted(os.listdir(tmp_path / "one")) == [*files, "samples.json"]
    for i, name in enumerate(files):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "one" / name)), array[i, :, :, 0])
    assert sorted(os.listdir(tmp_path)) == ["g.png", "one", "x.npz"]  # no scratch is left


def test_two_runs_into_one_file_do_not_mix(folder, tmp_path, monkeypatch):
    """While one is at work a second one starts and ends: the file is one's, then the other's."""
    command = ["--ckpt", folder, "--num_images", 20, "--batch_size", 10, "--out"]
    run(*command, tmp_path / "x.npz")
    first = np.load(tmp_path / "x.npz")["arr_0"]
    generate = sample.generate
    second = []

    def interrupted(*args):
        images = generate(*args)
        if args[2][0] == 10 and not second:  # in the middle
            line = [sys.executable, ROOT / "sample.py", *command, tmp_path / "x.npz", "--seed", 1]
            subprocess.run(list(map(str, line)), check=True, stderr=subprocess.DEVNULL)
            second.append(np.load(tmp_path / "x.npz")["arr_0"])
        return images
    monkeypatch.setattr(sample, "generate", interrupted)
    run(*command, tmp_path / "x.npz")
    assert np.array_equal(np.load(tmp_path / "x.npz")["arr_0"], first)
    assert second[0].shape == first.shape and not np.array_equal(second[0], first)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_many_images_are_of_all_classes_and_folders_are_not_mixed(tmp_path):
    torch.manual_seed(0)
    net = model.Generator(8, 3, None, 2, 32, 1, 2, num_classes=20, n_cls_tokens=1)
    net.save_pretrained(tmp_path / "g")
    command = ["--ckpt", tmp_path / "g", "--out", tmp_path / "folder", "--num_images"]
    for _ in range(2):  # the second run is the same
        run(*command, 40)
        files = [f"{i:06d}_{i % 20}.png" for i in range(40)]
        assert sorted(os.listdir(tmp_path / "folder")) == [*files, "samples.json"]
    run(*command, 41)  # more of them
    torch.nn.init.normal_(net.final_linear.weight)
    net.save_pretrained(tmp_path / "other")
    for options, what in {
            (39,): "000039_19.png", (40, "--classes", 3): "other classes",
            (41, "--seed", 1): "other seed", (41, "--cfg_scale", 2): "other cfg_scale",
            (41, "--ckpt", tmp_path / "other"): "other weights"}.items():
        with pytest.raises(UsageError, match=f"holds images of another run .{what}"):
            run(*command, *options)
    (tmp_path / "folder/samples.json").unlink()
    with pytest.raises(UsageError, match="holds files and no samples.json"):
        run(*command, 41)
    for text in ("[", "[]", "{}", "3"):
        (tmp_path / "folder/samples.json").write_text(text)
        with pytest.raises(UsageError, match="no samples.json"):
            run(*command, 41)


def test_labelled_rows_of_alphas_and_styles(vae_folder, tmp_path):
    """Row r, column i is image i at that alpha and style; what is held is held."""
    run("--ckpt", TINY, "--vae", vae_folder, "--classes", 3, "--num_images", 4, "--cfg_scale", 1, 3,
        "--style", "free", "fixed", "alone", "--out", tmp_path / "rows.png")
    grid = np.asarray(Image.open(tmp_path / "rows.png"))
    side = 66           # 64 pixels and a gap of 2
    height = side + 20  # and a line of text
    assert grid.shape == (6 * height - 2, 4 * side - 2, 3)
    generator = model.load_generator(TINY)
    vae = model.load_vae(vae_folder)
    noise, styles = zip(*(sample.image_noise(generator, 0, i) for i in range(4)))
    rows = []
    for row in ((noise, styles), (noise, styles[:1] * 4), (noise[:1] * 4, styles)):
        rows += [(*row, 1.0), (*row, 3.0)]
    for r, (noise, styles, alpha) in enumerate(rows):
        assert (grid[r * height:][:18] < 128).any()  # the label
        for i in range(4):
            with torch.no_grad():
                x = generator(noise[i][None], torch.tensor([3]), torch.tensor([alpha]),
                              styles[i][None])
                wanted = sample.to_uint8(vae.decode(x))[0].permute(1, 2, 0).numpy()
            tile = grid[r * height + 20:][:64, i * side:][:, :64]
            assert np.abs(tile.astype(int) - wanted).max() <= 1, (r, i)


def test_the_same_on_two_processes(folder, vae_folder, tmp_path):
    """A file of a block of a published B/2 with a VAE, and a folder of digits: every bit.

    A grid in other batches is the same but for one grey level.
    """
    artifact = random_artifact(tmp_path / "b2", "gen", **published_generator("B") | {"depth": 1})
    command = ["--ckpt", artifact, "--vae", vae_folder, "--classes", 22, 88, "--num_images", 2]
    run(*command, "--out", tmp_path / "grid.png", "--batch_size", 2)
    run(*command, "--out", tmp_path / "one.npz", "--batch_size", 1)
    digits = ["--ckpt", folder, "--num_images", 5, "--batch_size", 2]
    run(*digits, "--out", tmp_path / "one")
    lines = [[*command, "--batch_size", 1, "--out", tmp_path / "two.npz", "--device", "cpu"],
             [*digits, "--out", tmp_path / "two", "--device", "cpu"]]
    (tmp_path / "script.py").write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import model, sample

        def main():
            for line in {[[str(word) for word in line] for line in lines]}:
                sample.main(line)
        model.run_script(main)""")
    processes = ranks(2, tmp_path / "script.py")
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    files = sorted(os.listdir(tmp_path / "one"))
    assert sorted(os.listdir(tmp_path / "two")) == files and len(files) == 6
    for name in files:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    one = np.load(tmp_path / "one.npz")["arr_0"]
    assert one.shape == (2, 256, 256, 3) and one.dtype == np.uint8 and one.std() > 10
    assert np.array_equal(one, np.load(tmp_path / "two.npz")["arr_0"])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (256, 2 * 258 - 2, 3)
    for i, image in enumerate(one):
        assert np.abs(grid[:, i * 258:][:, :256].astype(int) - image).max() <= 1


def test_one_command_from_the_hub_to_a_grid(vae_folder, tmp_path):
    """As a user has it: published name, empty cache, VAE from the Hub."""
    place = "models/gen/jax/latent_L_sota"
    vae = {name: (vae_folder / name).read_bytes() for name in model.VAE_FILES}
    artifact = {f"{place}/{path.name}": path.read_bytes() for path in TINY.iterdir()}
    with HubServer({"stabilityai/sd-vae-ft-mse": vae, "Goodeat/drifting": artifact}) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, ROOT / "sample.py", "--ckpt", "hf://latent_L_sota", "--classes",
                   "2", "5", "--num_images", "4", "--cfg_scale", "1.0"]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True,
                              text=True, check=True).stdout
        assert hub.fetched == [f"{place}/{name}" for name in model.FLAX_FILES] + [*model.VAE_FILES]
    assert said == "samples.png: 4 images\n"
    assert Image.open(tmp_path / "samples.png").size == (2 * 66 - 2, 2 * 66 - 2)


def test_a_mistake_is_one_line_and_pixels_need_no_diffusers(folder, tmp_path):
    code = ("import sys; sys.argv[0] = 'sample.py'; sys.path.insert(0, sys.argv.pop(1)); "
            "import model, sample; model.run_script(sample.main); "
            "assert 'diffusers' not in sys.modules; print('pixels are done', file=sys.stderr); "
            "sys.argv[2] = 'nowhere'; model.run_script(sample.main)")
    command = [sys.executable, "-c", code, ROOT, "--ckpt", folder, "--num_images", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and (tmp_path / "samples.png").is_file(), result.stderr
    after = result.stderr.partition("pixels are done\n")[2]
    assert after.startswith("sample.py: nowhere") and after.count("\n") == 1


@pytest.mark.parametrize("words", [
    ["--out", "x.jpg"], ["--seed", "-1"], ["--cfg_scale", "nan"], ["--num_images", "0"],
    ["--temperature", "-1"], ["--cfg_scale", "1", "2", "--out", "folder"], ["--style", "other"],
    ["--seeds", "1"]])
def test_options_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit):
        sample.parse(["--ckpt", "g", *words])
    assert "error: " in capsys.readouterr().err


def test_classes_and_models_that_are_not_there(folder, mae_artifact, tmp_path):
    with pytest.raises(UsageError, match="this generator knows 0 to 9"):
        run("--ckpt", folder, "--classes", 10, "--out", tmp_path / "x.png")
    with pytest.raises(UsageError, match="generator"):
        run("--ckpt", mae_artifact, "--out", tmp_path / "x.png")
    with pytest.raises(UsageError, match="--classes dog: .* 0 to 9, by name .none"):
        run("--ckpt", folder, "--classes", "dog", "--out", tmp_path / "x.png")


def test_out_is_checked_before_the_work(tmp_path):
    """The checkpoint is not there: what is said first was looked at first."""
    (tmp_path / "x.npz").mkdir()
    (tmp_path / "file").write_text("")
    for out, reason in {"x.npz": "is a folder", "file": "cannot be written",
                        "file/x.png": "cannot be written"}.items():
        with pytest.raises(UsageError, match=f"{out}.* {reason}"):
            run("--ckpt", tmp_path / "nowhere", "--out", tmp_path / out)


def test_a_folder_of_other_things_is_no_folder_of_samples(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files and no samples.json"):
        run("--ckpt", folder, "--num_images", 1, "--out", tmp_path)


@pytest.fixture
def named(folder, tmp_path):
    """The generator of digits as one of animals, which has seen a class called 3."""
    net = model.load_generator(folder)
    net.origin = {"classes": ["cat", "dog", "3", "ant", "bee", "cow", "eel", "fox", "gnu", "hen"],
                  "vae": "0" * 64}
    net.save_pretrained(tmp_path / "named")
    return tmp_path / "named"


def test_classes_have_names(named, generator, tmp_path, capsys):
    run("--ckpt", named, "--classes", "dog", 3, 9, "--num_images", 3, "--out", tmp_path / "x.png")
    assert "classes: 1 dog, 2 3, 9 hen" in capsys.readouterr().out  # a name before a number
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    assert grid.shape == (20 + 64, 3 * 66 - 2, 3)
    tile = sample.to_uint8(sample.generate(generator, [9], [2]))[0]
    tile = Image.fromarray(tile[0].numpy()).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(grid[20:, 2 * 66:, 0], np.asarray(tile))
    for column in range(3):
        assert (grid[:18, column * 66:][:, :64] < 128).any()
    with pytest.raises(UsageError, match="--classes lynx: .*by name cat, dog, 3, ant"):
        run("--ckpt", named, "--classes", "lynx", "--out", tmp_path / "x.png")
    numbers = [str(number) for number in range(1, 11)]  # here 0 could only be the class called 1
    assert sample.class_numbers(["1", "10"], numbers, 10) == [0, 9]
    with pytest.raises(UsageError, match="--classes 0: this generator knows 1, 2, 3"):
        sample.class_numbers(["0"], numbers, 10)


def test_another_vae_than_that_of_training_is_refused(vae_folder, tmp_path):
    net = model.load_generator(TINY)
    command = ["--ckpt", tmp_path / "g", "--vae", vae_folder, "--num_images", 1, "--out",
               tmp_path / "x.png"]
    net.origin = {"vae": model.sha256(vae_folder / model.VAE_FILES[1])}
    net.save_pretrained(tmp_path / "g")
    run(*command)
    net.origin = {"vae": "0" * 64}
    net.save_pretrained(tmp_path / "g")
    with pytest.raises(UsageError, match="VAE that made the latents.* of theirs 0000"):
        run(*command)


def test_an_alpha_that_training_never_saw_is_warned_of(folder, tmp_path, capsys):
    run("--ckpt", folder, "--num_images", 1, "--cfg_scale", 1, 4, "--out", tmp_path / "x.png")
    assert "warning" not in capsys.readouterr().err
    run("--ckpt", folder, "--num_images", 1, "--cfg_scale", 4.25, "--out", tmp_path / "x.png")
    assert "not --cfg_scale 4.25" in capsys.readouterr().err
