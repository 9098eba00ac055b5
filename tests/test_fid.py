"""fid.py against the reference tools' figures, and its commands on small networks.

tests/fixtures/inception holds random weights, images, and what the reference tools made of them.
"""
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import model
import prepare_data
import sample
from conftest import FIXTURES, ROOT, ranks
from hub_server import HubServer
from model import UsageError

FIXTURE = FIXTURES / "inception"
spec = importlib.util.spec_from_file_location("inception_recipe", FIXTURE / "recipe.py")
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURE / "expected.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(expected, tmp_path_factory):
    """The stand-in checkpoint, with the num_batches_tracked that some files of this net carry."""
    shapes = zip(expected["keys"].tolist(), expected["shapes"].tolist())
    state = recipe.random_state_dict({key: json.loads(shape) for key, shape in shapes})
    for key in [key for key in state if key.endswith("bn.weight")]:
        state[key.replace("weight", "num_batches_tracked")] = torch.tensor(7)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def net(weights):
    return fid.load_inception(weights)


def relative(a, b):
    """Worst relative error of a row."""
    return (np.linalg.norm(np.asarray(a) - b, axis=1) / np.linalg.norm(b, axis=1)).max()


# --------------------------------------------------------------------------------------------
# The network

@pytest.fixture
def seen(monkeypatch):
    """What the network gets, and whether a GPU would compute it in TF32."""
    calls = []
    network = fid.Inception.__call__

    def watched(net, x):
        calls.append((x, torch.backends.cudnn.allow_tf32))
        return network(net, x)

    monkeypatch.setattr(fid.Inception, "__call__", watched)
    return calls


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("resize", ["tf1", "half"])
def test_features_and_logits(net, expected, size, resize, seen):
    images = recipe.images(size)
    features = fid.inception_features(net, images, resize)
    [(prepared, tf32)] = seen
    assert not tf32 and torch.backends.cudnn.allow_tf32 and features.dtype == torch.float32
    at = [0, 1, 2, 149, 150, 297, 298]
    wanted = expected[f"resized_{resize}_{size}"]
    assert np.abs(prepared[:, :, at][..., at].numpy() - wanted).max() < 1e-6
    assert relative(features, expected[f"feat_{resize}_{size}"]) < 1e-5
    if resize == "tf1":
        assert relative(features @ net.fc.T, expected[f"logits_tf1_{size}"]) < 1e-5
    else:
        resized = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
        assert torch.equal(prepared, (resized - 128) / 128)


def test_weights_of_another_inception_are_refused(net, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    plain = {key: x for key, x in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(plain, tmp_path / "plain.pth")
    assert torch.equal(fid.load_inception(tmp_path / "plain.pth").fc, net.fc)
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(AssertionError, match="not the Inception"):
        fid.load_inception(tmp_path / "torchvision.pth")


# --------------------------------------------------------------------------------------------
# The figures

def distance(a, b):
    return fid.frechet_distance(*fid.statistics(a), *fid.statistics(b))


def test_inception_is_downloaded_and_its_hash_checked(net, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    right = shutil.copy(weights, tmp_path / f"inception-{digest[:8]}.pth")
    wrong = shutil.copy(weights, tmp_path / "inception-01234567.pth")
    monkeypatch.setattr(fid, "INCEPTION_URL", right.as_uri())
    assert torch.equal(fid.load_inception().fc, net.fc)
    monkeypatch.setattr(fid, "INCEPTION_URL", wrong.as_uri())
    with pytest.raises(RuntimeError, match="hash"):
        fid.load_inception()


def test_frechet_distance_of_the_fixture(expected):
    a, b = recipe.fd_small()
    mu, sigma = fid.statistics(a)
    assert np.abs(sigma.numpy() - np.cov(a.double().numpy(), rowvar=False)).max() < 1e-12
    assert np.abs(mu.numpy() - a.double().numpy().mean(0)).max() < 1e-14
    assert abs(distance(a, b) - expected["fd_small"][0]) < 1e-8
    assert abs(distance(a, a)) < 1e-8
    a, b = recipe.fd_large()  # rank 999 in 2048 dimensions
    assert np.allclose([a.double().sum(), b.double().sum()], expected["fd_large_check"])
    assert abs(distance(a, b) - expected["fd_large"][0]) < 5e-5


def test_frechet_distance_of_gaussians():
    """Diagonal: |mu1 - mu2|^2 + sum (s1 - s2)^2. A point has s = 0; nothing is regularised."""
    mu1, mu2, s1, s2 = np.random.default_rng(0).random((4, 50))
    for s in (s1, 0 * s1):
        measured = fid.frechet_distance(mu1, np.diag(s**2), mu2, np.diag(s2**2))
        assert abs(measured - ((mu1 - mu2) ** 2 + (s - s2) ** 2).sum()) < 1e-10


@pytest.mark.parametrize("n", [200, 203])
def test_inception_score(expected, n):
    """203: splits of 20, the last 3 of the permuted rows dropped; other rules give 3.948."""
    score = fid.inception_score(recipe.is_logits(n))
    assert np.allclose(score, expected[f"is_official_{n}"], rtol=1e-6)


def test_precision_recall(expected):
    real, fake = recipe.pr_features()
    figures = fid.precision_recall(real, fake)
    assert figures == tuple(expected["pr_official"].tolist()) == (471 / 500, 55 / 300)
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # its balls have radius 1
    on_the_surface = torch.tensor([[4.0], [6.0]])
    assert fid.precision_recall(line, on_the_surface, k=1)[0] == 0.5


# --------------------------------------------------------------------------------------------
# References: files, names and addresses

MU = np.arange(8, dtype=np.float32)
SIGMA = np.diag(np.arange(1.0, 9.0))
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
# What each tool writes or reads, by its code, and the resize it was made with, where that is plain.
FORMS = {
    "pytorch-fid": (dict(mu=MU, sigma=SIGMA), None),
    "adm": (dict(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA, arr_0=IMAGES), "tf1"),
    "meanflow": (dict(ref_mu=MU, ref_sigma=SIGMA), "half"),
    "ours": (dict(mu=MU, sigma=SIGMA, real=np.eye(8), features="inception-0", resize="half"),
             "half")}


def stand_in(resize=None, name="inception-0"):
    """An extractor whose features are the first eight values of an image."""
    extractor = fid.Extractor("pixels")
    extractor.kind, extractor.name, extractor.resize = "stand-in", name, resize
    extractor.net = None
    return extractor


@pytest.fixture
def eight_values(monkeypatch):
    monkeypatch.setattr(fid.Extractor, "__call__", lambda _, x: x.flatten(1)[:, :8].float())


@pytest.mark.parametrize("tool", FORMS)
def test_reference_files(tmp_path, eight_values, tool):
    """Read with their own resize, and refused with other features and with another resize."""
    arrays, resize = FORMS[tool]
    path = tmp_path / f"{tool}.npz"
    np.savez(path, **arrays)
    if resize is None:  # mu and sigma can be either family's
        with pytest.raises(UsageError, match="say --resize tf1"):
            fid.open_reference(stand_in(), path)
    extractor = stand_in(None if resize else "half")
    reference = fid.open_reference(extractor, path)
    assert extractor.resize == (resize or "half")
    assert np.array_equal(reference["mu"], MU) and np.array_equal(reference["sigma"], SIGMA)
    assert ("real" in reference) == (tool in ("adm", "ours"))
    others = [stand_in("none", "encoder-0")]
    if resize:
        others.append(stand_in({"tf1": "half", "half": "tf1"}[resize]))
    if tool == "ours":  # of other weights
        others.append(stand_in("half", "inception-1"))
    for other in others:
        with pytest.raises(UsageError, match="was made with features inception"):
            fid.open_reference(other, path)


def test_references_that_are_downloaded(run, tmp_path, monkeypatch):
    """Once, from the web by a name that says their resize, and from the Hub."""
    np.savez(tmp_path / "s.npz", mu=MU, sigma=SIGMA)
    file = (tmp_path / "s.npz").read_bytes()
    np.savez(tmp_path / "ours.npz", mu=np.zeros(64), sigma=np.eye(64), features="pixels",
             resize="none")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with HubServer({"me/mine": {"s.npz": file[:300]}}) as hub:
        url = f"{hub.url}/me/mine/resolve/main/s.npz"
        monkeypatch.setitem(fid.REFERENCES, "jit256", (url, "tf1"))
        with pytest.raises(zipfile.BadZipFile):  # and is not kept
            fid.open_reference(stand_in(), "jit256")
        hub.add("me/mine", {"s.npz": file, "stats/s.npz": (tmp_path / "ours.npz").read_bytes()})
        for _ in range(2):
            extractor = stand_in()
            reference = fid.open_reference(extractor, "jit256")
            assert extractor.resize == "tf1" and np.array_equal(reference["mu"], MU)
        assert hub.fetched == ["s.npz"] * 2
        with pytest.raises(UsageError, match="resize tf1; this run has .* resize half"):
            fid.open_reference(stand_in("half"), "jit256")

        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, ROOT / "fid.py", "eval", "--images", "one.npz", "--features",
                   "pixels", "--ref", "hf://me/mine/stats/s.npz"]
        said = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True)
    assert json.loads(said.stdout)["ref"] == "s.npz", said.stderr


# --------------------------------------------------------------------------------------------
# Images

def test_images_from_everywhere(tmp_path):
    for folder in ("flat", "folder/class"):
        (tmp_path / folder).mkdir(parents=True)
        for i, image in enumerate(IMAGES):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    shutil.make_archive(tmp_path / "files", "zip", tmp_path / "folder")
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    np.savez_compressed(tmp_path / "small.npz", arr_0=IMAGES)
    for source in ("flat", "folder", "files.zip", "images.npz", "small.npz"):
        count, read = fid.open_images(tmp_path / source)
        assert count == 12, source
        for indices in ([0, 2, 11], [5, 1], range(2, 4)):  # 2.png before 11.png
            assert np.array_equal(read(indices).permute(0, 2, 3, 1), IMAGES[indices]), source
    prepare_data.prepare(tmp_path / "folder", tmp_path / "prepared")
    for source in ("prepared", "prepared/train"):
        count, read = fid.open_images(tmp_path / source)
        rows = read(range(count)).permute(0, 2, 3, 1).numpy()
        assert sorted(map(bytes, rows)) == sorted(map(bytes, IMAGES))


@pytest.mark.parametrize("array", [
    np.zeros((4, 1, 8, 8), np.uint8), np.zeros((4, 8, 8, 3)),
    np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8))])
def test_an_array_that_is_no_images_is_refused(tmp_path, array):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UsageError, match="x.npz: arr_0 is .* not uint8 .N, H, W, 1 or 3"):
        fid.open_images(tmp_path / "x.npz")


# --------------------------------------------------------------------------------------------
# The commands, on untrained networks

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with `digits`, eighths of them, noise, a generator `gen` and an encoder `enc`."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    prepare_data.prepare("digits", folder / "digits")
    images = prepare_data.Dataset(folder / "digits").images.transpose(0, 2, 3, 1)
    noise = np.random.default_rng(0).integers(0, 256, (181, 8, 8, 1), np.uint8)
    np.savez(folder / "one.npz", arr_0=images[::8])
    np.savez(folder / "other.npz", arr_0=images[1::8])
    np.savez(folder / "noise.npz", arr_0=noise)
    generator = model.Generator(input_size=8, in_channels=1, patch_size=2, hidden_size=32, depth=1,
                                num_heads=2, num_classes=10, n_cls_tokens=2)
    torch.nn.init.normal_(generator.final_linear.weight, std=0.3)
    torch.nn.init.normal_(generator.final_adaln.weight, std=0.3)  # else alpha would do nothing
    generator.save_pretrained(folder / "gen")
    encoder = model.MAE(in_channels=1, base_channels=16, layers=[1, 1], num_classes=10)
    encoder.save_pretrained(folder / "enc")
    return folder


@pytest.fixture
def command(run, monkeypatch, capsys):
    """Runs `fid.py ...` in the folder of `run`; returns its JSON lines, and keeps what it says."""
    def call(line):
        monkeypatch.chdir(run)
        fid.main(line.split())
        call.stdout, call.stderr = capsys.readouterr()
        return [json.loads(row) for row in call.stdout.splitlines() if row.startswith("{")]
    return call


def test_inception_scores(command, run, weights, monkeypatch):
    """The whole path, but that the network's features are pixels: an image would cost 0.3 s."""
    monkeypatch.setattr(fid.Inception, "__call__", lambda net, x: x.flatten(1)[:, ::130][:, :2048])
    np.savez(run / "real.npz", arr_0=IMAGES)
    command(f"ref --data real.npz --out stats.npz --resize half --inception {weights}")
    [row] = command(f"eval --ckpt gen --num_images 10 --inception {weights} --ref stats.npz")
    assert row["fid"] > 0 and row["is"] >= 1 and 0 <= row["recall"] <= 1
    assert row["resize"] == "half"  # as the reference says itself


def test_fd_dinov2(command, run):
    """Statistics of the class tokens, of images in [-1, 1], which the network resizes itself."""
    tiny = FIXTURES / "dinov2_tiny"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 9, 40, 40, 3), np.uint8)
    for name, array in zip(("fake", "real"), images):
        np.savez(run / f"{name}_rgb.npz", arr_0=array)
    command(f"ref --data real_rgb.npz --features dinov2:{tiny} --out dinov2.npz")
    [row] = command(f"eval --images fake_rgb.npz --ref dinov2.npz --features dinov2:{tiny}")

    x = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        cls = model.load_encoder(tiny).features(x)["dinov2_cls"][:, 0]
    fake, real = cls.double().numpy().reshape(2, 9, -1)
    wanted = fid.frechet_distance(fake.mean(0), np.cov(fake.T), real.mean(0), np.cov(real.T))
    assert row["fd_dinov2"] == pytest.approx(wanted, rel=1e-4)


def test_several_processes(command, run, tmp_path):
    """The figures of one process, to the bit; also with fewer batches than processes."""
    command("ref --data one.npz --features encoder:enc --out two.npz")
    lines = ["eval --ckpt gen --data other.npz --num_images 31 --cfg_scale 1 2",
             "eval --images noise.npz --ref two.npz --num_images 31",
             "eval --images noise.npz --ref two.npz --data other.npz --num_images 5"]
    lines = [line + " --features encoder:enc --batch_size 5" for line in lines]
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import fid, model

        def main():
            for line in {lines}:
                fid.main(line.split())
        model.run_script(main)""")
    processes = ranks(2, script, cwd=run)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    two = [json.loads(text) for text in said[0].splitlines() if text.startswith("{")]
    assert two == [row for line in lines for row in command(line)] and len(two) == 4
    assert "{" not in said[1]


def test_generated_images_are_those_of_the_protocol(run):
    """Label i % classes, noise of (seed, i), floor(255 x); another batch moves one grey level."""
    generator = model.load_generator(run / "gen")
    read = fid.generated(generator, 2.0, seed=3)
    images = sample.generate(generator, [3, 2], [3, 12], cfg_scale=2.0, seed=3)
    wanted = sample.to_uint8(images)
    assert torch.equal(read([3, 12]), wanted) and wanted.dtype == torch.uint8
    assert (read([12, 0, 3])[[2, 0]].int() - wanted.int()).abs().max() <= 1


def flat(images):
    return np.asarray(images).reshape(len(images), -1) / 127.5 - 1


def test_neighbours_figures_by_hand(run, command):
    """The figures in pixel space, written out as loops in NumPy, and the picture."""
    command("neighbours --ckpt gen --data digits --features pixels --num_images 60 --out n.png")
    said = {line.split()[0]: line for line in command.stdout.splitlines()}
    train = prepare_data.Dataset(run / "digits")
    test = prepare_data.Dataset(run / "digits", "test")
    real = flat(np.array(train.images))
    samples = fid.generated(model.load_generator(run / "gen"))(range(60))
    distances = []
    for name, rows, labels in (("generated", flat(samples), np.arange(60) % 10),
                               ("held", flat(np.array(test.images)), test.labels)):
        pairs = [np.sqrt(((row - real) ** 2).sum(1)) for row in rows]
        distances.append(np.mean([d.min() for d in pairs]))
        same = train.labels[[d.argmin() for d in pairs]] == labels
        worst = min(same[labels == c].mean() for c in range(10))
        assert said[name].endswith(f"the same class {same.mean():6.1%} (worst class {worst:.1%}), "
                                   f"at distance {distances[-1]:.3f}")
    ratio = distances[0] / distances[1]
    assert f"training images {ratio:.3f} of the held-out images'" in said["distance"]

    picture = np.asarray(Image.open(run / "n.png"))
    nearest = train.images[((flat(samples)[5] - real) ** 2).sum(1).argmin()]
    tile = Image.fromarray(nearest[0]).resize((80, 80), Image.Resampling.BICUBIC)
    assert np.array_equal(picture[5 * 82:5 * 82 + 80, 82:162, 0], np.asarray(tile))
