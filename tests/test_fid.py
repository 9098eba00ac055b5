"""fid.py against the reference tools' figures, and its commands on small networks.

tests/fixtures/inception holds random weights, images, and what the reference tools made of them.
"""
import hashlib
import importlib.util
import io
import json
import os
import shutil
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

@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("resize", ["tf1", "half"])
def test_features_and_logits(net, expected, size, resize):
    images = recipe.images(size)
    at = [0, 1, 2, 149, 150, 297, 298]
    prepared = fid.inception_input(images, resize)
    wanted = expected[f"resized_{resize}_{size}"]
    assert np.abs(prepared[:, :, at][..., at].numpy() - wanted).max() < 1e-6
    features = fid.inception_features(net, images, resize)
    assert features.dtype == torch.float32
    assert relative(features, expected[f"feat_{resize}_{size}"]) < 1e-5
    if resize == "tf1":
        assert relative(features @ net.fc.weight.T, expected[f"logits_tf1_{size}"]) < 1e-5
    else:
        resized = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
        assert torch.equal(prepared, (resized - 128) / 128)


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(net):
    images = recipe.images(64)[:2]
    one_by_one = [fid.inception_features(net, image[None]) for image in images]
    assert relative(torch.cat(one_by_one), fid.inception_features(net, images).numpy()) < 1e-6
    grey = images[:1, :1]
    rgb = grey.repeat(1, 3, 1, 1)
    assert torch.equal(fid.inception_features(net, grey), fid.inception_features(net, rgb))
    with pytest.raises(ValueError, match="wanted uint8 images"):
        fid.inception_features(net, images.float())


def test_features_are_computed_without_tf32(net, monkeypatch):
    """Which no CPU has: the switch that a GPU reads is off inside, and left as it was."""
    inside = []

    def forward(x):
        inside.append((torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")))
        return x
    monkeypatch.setattr(net, "forward", forward)
    with torch.autocast("cpu", torch.bfloat16):
        fid.inception_features(net, recipe.images(64)[:1])
    assert inside == [(False, False)] and torch.backends.cudnn.allow_tf32


def test_checkpoint_keys_and_refusals(net, expected, weights, tmp_path):
    ours = {key for key in net.state_dict() if not key.endswith("num_batches_tracked")}
    assert ours == set(expected["keys"].tolist())
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(1)}, tmp_path / "torchvision.pth")
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "pickled.pth")  # code would have to run
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("torchvision.pth", "pickled.pth", "text.pth", "missing.pth"):
        with pytest.raises(UsageError, match=f"{name}.*--inception") as error:
            fid.load_inception(tmp_path / name)
        assert "\n" not in str(error.value)


def test_download_is_hashed_and_kept(net, weights, tmp_path, monkeypatch):
    """From a file:// address: refused with another hash than its name's, fetched once."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(fid, "INCEPTION_URL", (tmp_path / "net-00000000.pth").as_uri())
    shutil.copy(weights, tmp_path / "net-00000000.pth")
    with pytest.raises(UsageError, match="invalid hash"):
        fid.load_inception()
    source = tmp_path / f"net-{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}.pth"
    monkeypatch.setattr(fid, "INCEPTION_URL", source.as_uri())
    shutil.copy(weights, source)
    assert torch.equal(fid.load_inception().fc.weight, net.fc.weight)
    source.unlink()
    assert torch.equal(fid.load_inception().fc.weight, net.fc.weight)


# --------------------------------------------------------------------------------------------
# The figures

def distance(a, b):
    return fid.frechet_distance(*fid.statistics(a), *fid.statistics(b))


def test_statistics_equal_numpy():
    x = recipe.fd_small()[0]
    mu, sigma = fid.statistics(x)
    assert np.abs(sigma.numpy() - np.cov(x.double().numpy(), rowvar=False)).max() < 1e-12
    assert np.abs(mu.numpy() - x.double().numpy().mean(0)).max() < 1e-14


def test_frechet_distance_of_the_fixture(expected):
    a, b = recipe.fd_small()
    assert abs(distance(a, b) - expected["fd_small"][0]) < 1e-8
    assert abs(distance(a, a)) < 1e-8
    a, b = recipe.fd_large()  # rank 999 in 2048 dimensions
    assert np.allclose([a.double().sum(), b.double().sum()], expected["fd_large_check"])
    assert abs(distance(a, b) - expected["fd_large"][0]) < 5e-5


def test_frechet_distance_of_gaussians():
    """Diagonal: |mu1 - mu2|^2 + sum (s1 - s2)^2. A point has s = 0; nothing is regularised."""
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.normal(size=(4, 50))
    s1 = np.abs(s1)
    s2 = np.abs(s2)
    truth = ((mu1 - mu2) ** 2 + (s1 - s2) ** 2).sum()
    measured = fid.frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2))
    assert abs(measured - truth) < 1e-10
    point = fid.frechet_distance(mu1, np.zeros((50, 50)), mu2, np.diag(s2**2))
    assert abs(point - ((mu1 - mu2) ** 2 + s2**2).sum()) < 1e-10
    with pytest.raises(ValueError, match="different features"):
        fid.frechet_distance(np.zeros(4), np.eye(4), np.zeros(5), np.eye(5))


@pytest.mark.parametrize("n", [200, 203])
def test_inception_score(expected, n):
    """203: splits of 20, the last 3 of the permuted rows dropped; other rules give 3.948."""
    logits = recipe.is_logits(n)
    score = fid.inception_score(logits)
    assert np.allclose(score, expected[f"is_official_{n}"], rtol=1e-6)

    x = logits.double().numpy()[np.random.RandomState(2020).permutation(n)]
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    scores = []
    for i in range(10):
        split = p[i * 20:(i + 1) * 20]
        divergences = [sum(row * np.log(row / split.mean(0))) for row in split]
        scores.append(np.exp(np.mean(divergences)))
    assert np.allclose(score, (np.mean(scores), np.std(scores)), rtol=1e-10)


def test_inception_score_of_probabilities_that_underflow():
    mean, std = fid.inception_score(5000.0 * torch.eye(10).repeat(100, 1))
    assert 8 < mean <= 10 and std >= 0


def test_precision_recall(expected):
    real, fake = recipe.pr_features()
    figures = fid.precision_recall(real, fake)
    assert figures == tuple(expected["pr_official"].tolist()) == (471 / 500, 55 / 300)

    def inside(points, centres):
        balls = []
        for c in centres:
            balls.append(sorted(((c - other) ** 2).sum() for other in centres)[3])  # [0] is itself
        count = 0
        for point in points:
            count += any(((point - c) ** 2).sum() <= ball for c, ball in zip(centres, balls))
        return count / len(points)
    real = real[:80].double()
    fake = fake[:120].double()
    by_hand = inside(fake.numpy(), real.numpy()), inside(real.numpy(), fake.numpy())
    assert fid.precision_recall(real, fake) == by_hand and 0 < by_hand[1] < by_hand[0] < 1
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # its balls have radius 1
    on_the_surface = torch.tensor([[4.0], [6.0]])
    assert fid.precision_recall(line, on_the_surface, k=1)[0] == 0.5


# --------------------------------------------------------------------------------------------
# Files

MU = np.arange(8, dtype=np.float32)
SIGMA = np.diag(np.arange(1.0, 9.0))
IMAGES = np.zeros((5, 4, 4, 3), np.uint8)
# What each tool writes or reads, by its code, and the resize it was made with, where that is plain.
FORMS = {
    "pytorch-fid": (dict(mu=MU, sigma=SIGMA), None),
    "jit": (dict(mu=MU.astype(float), sigma=SIGMA), None),
    "adm": (dict(mu=MU, sigma=SIGMA, mu_s=MU, sigma_s=SIGMA, arr_0=IMAGES), "tf1"),
    "meanflow": (dict(ref_mu=MU, ref_sigma=SIGMA), "half"),
    "ours": (dict(mu=MU, sigma=SIGMA, real=np.eye(8), features="inception-0", resize="half"),
             "half")}


def read_reference(path, features="inception-0", resize="tf1", fc=None):
    extractor = fid.Extractor(lambda images: images.flatten(1)[:, :8].float(), features, resize, fc)
    return fid.open_reference(extractor, path)


@pytest.mark.parametrize("tool", FORMS)
def test_reference_files(tmp_path, tool):
    """Read, and refused with other features and with the other family's resize."""
    arrays, resize = FORMS[tool]
    path = tmp_path / f"{tool}.npz"
    save = np.savez_compressed if tool == "pytorch-fid" else np.savez
    save(path, **arrays)
    reference = read_reference(path, resize=resize or "tf1")
    assert reference["mu"].dtype == reference["sigma"].dtype == torch.float64
    assert np.array_equal(reference["mu"], MU) and np.array_equal(reference["sigma"], SIGMA)
    assert (reference["real"] is not None) == (tool in ("adm", "ours"))
    assert reference["ref"] == path.name
    assert reference["ref_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    other = {"tf1": "half", "half": "tf1", None: "half"}[resize]
    if resize is None:  # mu and sigma can be either family's
        read_reference(path, resize=other)
    else:
        with pytest.raises(UsageError, match=f"made with resize {resize}, this run has {other}"):
            read_reference(path, resize=other)
    with pytest.raises(UsageError, match="made with features inception"):
        read_reference(path, "encoder-0", "none")
    if tool == "ours":
        with pytest.raises(UsageError, match="features inception-0, this run has inception-1"):
            read_reference(path, "inception-1", "half")
    with pytest.raises(UsageError, match="covariance of 2048 features"):
        read_reference(path, resize=resize or "tf1", fc=torch.zeros(1008, 2048))


@pytest.mark.parametrize("arrays, reason", [
    (dict(arr_0=IMAGES), "ref_mu and ref_sigma .KeyError"),
    (dict(mu=MU), "ref_mu and ref_sigma .KeyError"),
    (dict(mu=MU, sigma=np.array([{}], object)), "Object arrays"),
    (dict(mu=MU, sigma=np.array(["a"])), "ref_mu and ref_sigma .ValueError"),
    (dict(mu=MU, sigma=SIGMA[:4]), "no mean and covariance"),
    (dict(mu=MU, sigma=np.triu(np.ones((8, 8)))), "no mean and covariance"),
    (dict(mu=MU * np.nan, sigma=SIGMA), "hold NaN or Inf"),
    (dict(mu=MU, sigma=SIGMA * np.nan), "hold NaN or Inf"),
    (dict(mu=MU, sigma=-SIGMA), "holds negative variances"),
    (dict(mu=MU, sigma=2 - np.eye(8)), "holds negative variances"),
    (dict(mu=MU, sigma=SIGMA, real=np.ones((3, 8))), "of four images or more"),
    (dict(mu=MU, sigma=SIGMA + 0j), "they are complex"),
    (dict(mu=MU, sigma=SIGMA, real=np.eye(9)), "no finite features"),
    (dict(mu=MU, sigma=SIGMA, real=np.full((8, 8), np.inf)), "no finite features")])
def test_what_is_no_reference_is_refused(tmp_path, arrays, reason):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UsageError, match=f"x.npz: .*{reason}"):
        read_reference(tmp_path / "x.npz")


def test_a_reference_that_is_no_npz_is_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=MU, sigma=SIGMA)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("cut.npz", "text.npz", "missing.npz"):
        with pytest.raises(UsageError, match=f"{name}: no statistics") as error:
            read_reference(tmp_path / name)
        assert "\n" not in str(error.value)


def test_images_from_everywhere(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), np.uint8)
    for folder in ("flat", "folder/class"):
        (tmp_path / folder).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "flat/samples.json").write_text("{}")
    shutil.make_archive(tmp_path / "files", "zip", tmp_path / "folder")
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    for source in ("flat", "folder", "files.zip", "images.npz", "small.npz"):
        count, read = fid.open_images(tmp_path / source)
        assert count == 12, source
        for indices in ([0, 2, 11], [5, 1], range(2, 4)):  # 2.png before 11.png
            assert np.array_equal(read(indices).permute(0, 2, 3, 1), images[indices]), source
    prepare_data.prepare(tmp_path / "folder", tmp_path / "prepared")
    for source in ("prepared", "prepared/train"):
        count, read = fid.open_images(tmp_path / source)
        rows = read(range(count)).permute(0, 2, 3, 1).numpy()
        assert sorted(map(bytes, rows)) == sorted(map(bytes, images))

    folder = tmp_path / "folder/class"
    Image.fromarray(images[0, :5]).save(folder / "12.png")
    (folder / "13.png").write_bytes((folder / "0.png").read_bytes()[:60])
    count, read = fid.open_images(tmp_path / "folder")
    with pytest.raises(UsageError, match="several sizes"):
        read(range(13))
    with pytest.raises(UsageError, match="class/13.png: .*Error"):
        read([13])
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.jsonl").write_text("")
    Image.fromarray(images[0]).save(tmp_path / "run/samples_00000100.png")
    os.mkfifo(tmp_path / "pipe.npz")
    for source, reason in {
            "statistics.npz": "KeyError", "empty": "no images", "missing.npz": "FileNotFoundError",
            "missing": "missing", "folder/class/0.png": "neither a folder",
            "pipe.npz": "a pipe",
            "run": "give it as --ckpt"}.items():
        with pytest.raises(UsageError, match=reason):
            fid.open_images(tmp_path / source)


@pytest.mark.parametrize("array", [
    np.zeros((4, 3, 8, 8), np.uint8), np.zeros((4, 8, 8, 4), np.uint8), np.zeros((4, 8, 8, 3)),
    np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8),
    np.asfortranarray(np.zeros((4, 8, 8, 3), np.uint8))])
def test_an_array_that_is_no_images_is_refused(tmp_path, array):
    np.savez(tmp_path / "x.npz", arr_0=array)
    with pytest.raises(UsageError, match="x.npz: .* wanted uint8 .N, H, W, 1 or 3"):
        fid.open_images(tmp_path / "x.npz")


def test_sizes_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    """A header that promises 3 TB, images and statistics larger than what is taken; damage."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {
        "shape": (10**6, 1000, 1000, 3), "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(UsageError, match="huge.npz: .*1000000, 1000, 1000, 3"):
        fid.open_images(tmp_path / "huge.npz")
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((2, 50, 50, 3), np.uint8))
    monkeypatch.setattr(fid, "MAX_PIXELS", 2000)
    with pytest.raises(UsageError, match="50 x 50 pixels"):
        fid.open_images(tmp_path / "large.npz")
    monkeypatch.setattr(fid, "MAX_WIDTH", 4)
    np.savez(tmp_path / "wide.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(UsageError, match="wide.npz: .*is 0.0 GB"):
        read_reference(tmp_path / "wide.npz")
    with pytest.raises(UsageError, match="too many for a covariance"):
        fid.statistics(torch.zeros(10, 5))
    np.savez(tmp_path / "x.npz", arr_0=IMAGES)
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[250] ^= 1  # a pixel
    (tmp_path / "x.npz").write_bytes(data)
    with pytest.raises(UsageError, match="x.npz: .*CRC"):
        fid.open_images(tmp_path / "x.npz")


def test_of_splits_train_is_taken(tmp_path, capsys):
    for i, name in enumerate(("Training/b", "Training/a", "testing/a", "testing/b")):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / name / "0.png")
    count, read = fid.open_images(tmp_path)
    assert count == 2 and read([0, 1])[:, 0, 0, 0].tolist() == [1, 0]
    assert "train is taken" in capsys.readouterr().err


def test_a_loaders_bug_is_no_broken_image(tmp_path, monkeypatch):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")

    def buggy(image):
        raise NameError("name 'imag' is not defined")
    monkeypatch.setattr(fid, "to_array", buggy)
    with pytest.raises(NameError):
        fid.open_images(tmp_path)


# --------------------------------------------------------------------------------------------
# The commands, on untrained networks

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with `digits`, eighths of them, noise, a generator `gen` and encoders `enc`, `nan`.

    `latents` is a data set of latents.
    """
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
    torch.nn.init.constant_(encoder.encoder.conv1.weight, float("nan"))
    encoder.save_pretrained(folder / "nan")
    shutil.copytree(folder / "digits", folder / "latents")
    meta = json.loads((folder / "latents/train/meta.json").read_text())
    meta.update(kind="latents", dtype="float16", shape=[meta["shape"][0], 2, 8, 8, 8])
    (folder / "latents/train/meta.json").write_text(json.dumps(meta))
    np.zeros(meta["shape"], np.float16).tofile(folder / "latents/train/images.bin")
    return folder


@pytest.fixture
def command(run, monkeypatch, capsys):
    """Runs `fid.py ...` in the folder of `run`; returns its JSON lines, and keeps its stderr."""
    def call(line):
        monkeypatch.chdir(run)
        fid.main(line.split())
        rows, call.stderr = capsys.readouterr()
        rows = rows.splitlines()
        return [json.loads(row) for row in rows if row.startswith("{")]
    return call


@pytest.mark.parametrize("features, ratio", [("encoder:enc", 0.8), ("pixels", 0.2)])
def test_itself_other_images_and_noise(command, features, ratio):
    """FD is 0 of a set against itself, less of images of the kind than of noise; never a FID."""
    command(f"ref --data one.npz --features {features} --out one_stats.npz")
    rows = {}
    for name in ("one", "other", "noise"):
        line = f"eval --images {name}.npz --ref one_stats.npz --features {features}"
        [rows[name]] = command(line)
        assert not {"fid", "is"} & rows[name].keys() and rows[name]["resize"] == "none"
    assert abs(rows["one"]["fd"]) < 1e-6 and rows["one"]["num_images"] == 181
    assert rows["one"]["precision"] == rows["one"]["recall"] == 1
    assert 1e-6 < rows["other"]["fd"] < ratio * rows["noise"]["fd"]
    assert rows["noise"]["precision"] < rows["other"]["precision"]


def test_sweep(command):
    """One JSON line an alpha, each complete; one alpha alone, in other batches, gives the like."""
    line = ("eval --ckpt gen --data one.npz --features encoder:enc --num_images 50 --seed 3 "
            "--temperature 0.9 --cfg_scale ")
    rows = command(line + "1 3 2")
    assert [row["cfg_scale"] for row in rows] == [1, 3, 2]
    assert len({row["fd"] for row in rows}) == 3
    for row in rows:
        assert row.keys() == {"ckpt", "cfg_scale", "seed", "temperature", "num_images", "fd",
                              "precision", "recall", "features", "resize", "ref", "ref_sha256"}
        assert (row["ckpt"], row["seed"], row["temperature"], row["num_images"], row["ref"]) == (
            "gen", 3, 0.9, 50, "one.npz")
    [row] = command(line + "3 --batch_size 7")
    assert row.pop("fd") == pytest.approx(rows[1].pop("fd"), rel=1e-6) and row == rows[1]


def test_default_number_of_images(command, monkeypatch):
    asked = []

    def evaluate(read, num_images, *rest):
        asked.append(num_images)
        return {}
    monkeypatch.setattr(fid, "evaluate", evaluate)
    command("eval --ckpt gen --data one.npz --features pixels")
    command("eval --images noise.npz --data one.npz --features pixels")
    command("eval --images noise.npz --data one.npz --features pixels --num_images 20")
    assert asked == [50_000, 181, 20]


@pytest.mark.parametrize("options, reason", [
    ("--ref missing.npz", "missing.npz"), ("--ref one.npz", "mu is not a file"),
    ("--data missing", "missing"), ("--data latents", "latents.* holds latents, no images.*--ref"),
    ("--ref half.npz", "made with features inception")])
def test_reference_is_read_before_anything_is_generated(command, run, monkeypatch, options, reason):
    np.savez(run / "half.npz", ref_mu=np.zeros(64), ref_sigma=np.eye(64))
    monkeypatch.setattr(fid, "generate", lambda *args, **options: pytest.fail("generated"))
    with pytest.raises(UsageError, match=reason):
        command(f"eval --ckpt gen {options} --features pixels")


def test_a_reference_of_images_is_named_and_hashed(run):
    """The hash is of the number of images and 64 of them, wherever they come from."""
    pixels = fid.load_extractor("pixels")
    images = prepare_data.Dataset(run / "digits", "test").images
    np.savez(run / "same.npz", arr_0=images.transpose(0, 2, 3, 1))
    np.savez(run / "fewer.npz", arr_0=images[:-1].transpose(0, 2, 3, 1))
    some = images[[i * 355 // 64 for i in range(64)]]
    wanted = hashlib.sha256(b"355" + some.tobytes()).hexdigest()
    hashes = {}
    for name in ("digits/test", "same.npz", "fewer.npz", "digits"):
        reference = fid.open_reference(pixels, data=run / name)
        assert reference["ref"] == str(run / name)
        hashes[name] = reference["ref_sha256"]
    assert hashes["digits/test"] == hashes["same.npz"] == wanted
    assert wanted not in (hashes["fewer.npz"], hashes["digits"])


def test_where_precision_and_recall_come_from(command, run, monkeypatch):
    """Features in our own file, images in ADM's, or --data beside it; else there are none."""
    command("ref --data one.npz --features pixels --out own.npz")
    own = dict(np.load(run / "own.npz"))
    assert own["real"].shape == (181, 64) and own["num_images"] == 181
    bare = dict(mu=own["mu"], sigma=own["sigma"], features="pixels", resize="none")
    np.savez(run / "bare.npz", **bare)
    np.savez(run / "adm.npz", **bare, arr_0=np.load(run / "one.npz")["arr_0"])
    rows = {}
    for ref in ("own.npz", "adm.npz", "bare.npz --data one.npz", "bare.npz"):
        [rows[ref]] = command(f"eval --images other.npz --features pixels --ref {ref}")
        assert rows[ref]["fd"] == rows["own.npz"]["fd"] and rows[ref]["ref"] == ref.split()[0]
    assert "precision" not in rows.pop("bare.npz")
    assert len({(row["precision"], row["recall"]) for row in rows.values()}) == 1
    assert 0.5 < rows["own.npz"]["recall"] < 1
    assert rows["bare.npz --data one.npz"]["real"] == "one.npz" and "real" not in rows["own.npz"]

    # No more than these, and of all classes.
    monkeypatch.setattr(fid, "REAL_FOR_PRECISION", 20)
    real = fid.open_reference(fid.load_extractor("pixels"), data=run / "digits")["real"]
    chosen = prepare_data.Dataset(run / "digits").images[[i * 1442 // 20 for i in range(20)]]
    assert torch.equal(real, torch.from_numpy(chosen).flatten(1) / 127.5 - 1)


def test_inception_scores(command, run, weights, monkeypatch):
    """The whole path, but that the network's features are pixels: an image would cost 0.3 s."""
    monkeypatch.setattr(fid.Inception, "forward", lambda net, x: x.flatten(1)[:, ::130][:, :2048])
    real = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    np.savez(run / "real.npz", arr_0=real)
    command(f"ref --data real.npz --out stats.npz --inception {weights}")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    line = f"eval --ckpt gen --ref stats.npz --num_images 10 --inception {weights}"
    [row] = command(line)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert row["fid"] > 0 and row["is"] >= 1 and 0 <= row["recall"] <= 1
    assert row["resize"] == "tf1" and row["ref"] == "stats.npz"
    assert row["ref_sha256"] == hashlib.sha256((run / "stats.npz").read_bytes()).hexdigest()

def test_several_processes(command, run, tmp_path):
    """Two: the rows' order, and the figures of one process, to the bit.

    At last rank 1 alone meets a broken file: nobody waits for it or shows a traceback.
    """
    (run / "broken").mkdir()
    for i in range(12):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(run / f"broken/{i:02d}.png")
    (run / "broken/11.png").write_bytes((run / "broken/10.png").read_bytes()[:40])
    command("ref --data one.npz --features encoder:enc --out two.npz")
    lines = ["eval --ckpt gen --data other.npz --num_images 31 --cfg_scale 1 2",
             "eval --images noise.npz --ref two.npz --num_images 31"]
    lines = [line + " --features encoder:enc --batch_size 5" for line in lines]
    counts = (1, 2, 5)  # fewer images than processes, as many, more
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import torch, fid, model

        def read(indices):
            return torch.tensor(list(indices))[:, None, None, None].expand(-1, 1, 2, 2)

        def main():
            for line in {lines}:
                fid.main(line.split())
            pixels = fid.Extractor(lambda images: images.flatten(1).float(), "", "", None)
            for count in {counts}:
                rows = fid.gather_features(read, [10 * i for i in range(count)], pixels, 2)
                print("rows", None if rows is None else rows.tolist())
            fid.main("eval --images broken --data one.npz --features encoder:enc "
                     "--batch_size 11".split())
        model.run_script(main)""")
    processes = ranks(2, script, cwd=run)
    said = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    two = [json.loads(text) for text in said[0].splitlines() if text.startswith("{")]
    assert two == [row for line in lines for row in command(line)] and len(two) == 3
    assert "{" not in said[1] and "Traceback" not in said[0] + said[1]
    assert "script.py: broken/11.png: " in said[1] and "11.png" not in said[0]
    for rank, text in enumerate(said):
        rows = [[[10.0 * i] * 4 for i in range(count)] if rank == 0 else None for count in counts]
        assert [x for x in text.splitlines() if x.startswith("rows")] == [f"rows {x}" for x in rows]


def test_generated_images_are_those_of_the_protocol(run):
    """Label i % classes, noise of (seed, i), floor(255 x); another batch moves one grey level."""
    generator = model.load_generator(run / "gen")
    read = fid.generated(generator, 2.0, seed=3)
    images = sample.generate(generator, [3, 2], [3, 12], cfg_scale=2.0, seed=3)
    wanted = sample.to_uint8(images)
    assert torch.equal(read([3, 12]), wanted) and wanted.dtype == torch.uint8
    assert (read([12, 0, 3])[[2, 0]].int() - wanted.int()).abs().max() <= 1


def flat(images):
    return torch.as_tensor(images).flatten(1).double() / 127.5 - 1


def test_latents_are_decoded(command, run, monkeypatch):
    """A latent generator and a small VAE: scored is what the VAE makes of its latents."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=4)
    vae.save_pretrained(run / "vae")
    images = np.random.default_rng(0).integers(0, 256, (21, 3, 16, 16), np.uint8)
    for i, image in enumerate(images):
        folder = run / f"rgb_files/{i // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{i:02d}.png")
    prepare_data.prepare(run / "rgb_files", run / "rgb")
    artifact = FIXTURES / "gen_latent_tiny"
    keep = []

    def load_generator(path, keep_converted):
        keep.append(keep_converted)
        return model.load_generator(path)
    monkeypatch.setattr(sample, "load_generator", load_generator)

    line = (f"--ckpt {artifact} --data rgb --features pixels --vae vae --seed 2 --temperature 1.1 "
            "--num_images 14 --cfg_scale 1.5 ")
    [row] = command("eval " + line + "--vae_chunk 3 --no_converted_copy")
    generator = model.load_generator(artifact)
    index = np.arange(14)
    latents = sample.generate(generator, index % 7, index, 1.5, 1.1, 2)
    decoded = sample.to_uint8(model.load_vae(run / "vae").decode(latents))
    assert decoded.shape == (14, 3, 16, 16) and row["vae"] == "vae"
    assert row["fd"] == pytest.approx(distance(flat(decoded), flat(images)), rel=1e-6)

    command("neighbours " + line + "--out latent_near.png")
    assert keep == [False, True]
    picture = np.asarray(Image.open(run / "latent_near.png"))
    assert picture.shape == (14 * 66 - 2, 9 * 66 - 2, 3)
    nearest = images[((flat(decoded[5:6]) - flat(images)) ** 2).sum(1).argmin()]
    for image, left in ((decoded[5].numpy(), 0), (nearest, 66)):  # row 5: the sample, the nearest
        tile = Image.fromarray(image.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(picture[5 * 66:5 * 66 + 64, left:left + 64], np.asarray(tile))
    with pytest.raises(UsageError, match="makes .3, 16, 16. of 7 classes, digits has .1, 8, 8. of"):
        command(f"neighbours --ckpt {artifact} --data digits --features pixels --vae vae")
    generator = model.load_generator(run / "gen")
    generator.origin = {"classes": [f"animal {i}" for i in range(10)]}
    generator.save_pretrained(run / "animals")
    with pytest.raises(UsageError, match="makes the classes animal 0, .*, digits has 0, 1, 2"):
        command("neighbours --ckpt animals --data digits --features pixels")


def test_neighbours_of_splits_of_two_sizes(run, tmp_path):
    prepare_data.prepare("digits", tmp_path / "small", 4)
    shutil.copytree(run / "digits/train", tmp_path / "mixed/train")
    shutil.copytree(tmp_path / "small/test", tmp_path / "mixed/test")
    with pytest.raises(model.UsageError, match="mixed/test holds .1, 4, 4., not .1, 8, 8. as the"):
        fid.main(f"neighbours --ckpt {run}/gen --data {tmp_path}/mixed --features pixels".split())


def test_neighbours_figures_by_hand(run, monkeypatch, capsys):
    """The three figures in pixel space, written out as loops in NumPy."""
    monkeypatch.chdir(run)
    fid.main("neighbours --ckpt gen --data digits --features pixels --num_images 60".split())
    lines = capsys.readouterr().out.splitlines()
    train = prepare_data.Dataset("digits")
    test = prepare_data.Dataset("digits", "test")
    real = flat(np.array(train.images)).numpy()
    generated = flat(fid.generated(model.load_generator("gen"))(range(60))).numpy()
    asked = np.arange(60) % 10

    def nearest(rows, labels):
        pairs = [np.sqrt(((row - real) ** 2).sum(1)) for row in rows]
        same = train.labels[[d.argmin() for d in pairs]] == labels
        return np.mean([d.min() for d in pairs]), same, min(
            same[labels == c].mean() for c in range(10))

    def within(rows, labels):
        means = []
        for c in range(10):
            members = rows[labels == c]
            pairs = [np.linalg.norm(a - b) for i, a in enumerate(members) for b in members[:i]]
            means.append(np.mean(pairs))
        return np.mean(means)

    distance, same, worst = nearest(generated, asked)
    assert lines[0].endswith(f"the same class {same.mean():6.1%} (worst class {worst:.1%}), at "
                             f"distance {distance:.3f}")
    yardstick, same, worst = nearest(flat(np.array(test.images)).numpy(), test.labels)
    assert lines[1].startswith("held out") and lines[1].endswith(
        f"the same class {same.mean():6.1%} (worst class {worst:.1%}), at distance {yardstick:.3f}")
    ratio = within(generated, asked) / within(real, train.labels)
    assert f"training images {distance / yardstick:.3f} of the held-out" in lines[2]
    assert f"within a class {ratio:.3f} of the training" in lines[2]


def test_other_sizes_and_values_are_told(command, run):
    """Features that can compare them: a warning; pixels: one line; and of a file that says it."""
    rng = np.random.default_rng(0)
    np.savez(run / "size.npz", arr_0=rng.integers(0, 256, (30, 16, 16, 1), np.uint8))
    np.savez(run / "rgb.npz", arr_0=rng.integers(0, 256, (30, 8, 8, 3), np.uint8))
    np.savez(run / "bits.npz", arr_0=rng.integers(0, 2, (30, 8, 8, 1), np.uint8))
    command("ref --data one.npz --features encoder:enc --out size_ref.npz")
    told = {}
    for name in ("size", "bits", "other"):
        for ref in ("--data one.npz", "--ref size_ref.npz"):
            command(f"eval --images {name}.npz {ref} --features encoder:enc")
            told[name, ref] = command.stderr
    for (name, _), text in told.items():
        assert ("these are [16, 16]" in text) == (name == "size")
        assert ("values are 0 and 1" in text) == (name == "bits")
    for name in ("size", "rgb"):
        with pytest.raises(UsageError, match="one.npz: of .8, 8. images.*cannot compare"):
            command(f"eval --images {name}.npz --data one.npz --features pixels")
    with pytest.raises(UsageError, match="reads 1 channels.* images are 3 x"):
        command("eval --images rgb.npz --data one.npz --features encoder:enc")


def test_json_lines_are_json():
    row = fid.json_line({"fd": float("nan"), "is": float("-inf"), "n": 3, "ref": "x"})
    assert json.loads(row, parse_constant=pytest.fail) == {"fd": None, "is": None, "n": 3,
                                                           "ref": "x"}


def test_out_is_checked_before_the_work(command, run):
    (run / "folder.npz").mkdir()
    for out in ("folder.npz", "one.npz/x.npz", "."):
        with pytest.raises(UsageError, match="is a folder|cannot be written"):
            command(f"ref --data digits --features encoder:missing --out {out}")


@pytest.mark.parametrize("line, reason", [
    ("eval --ckpt missing --data digits --features encoder:enc", "missing"),
    ("eval --ckpt gen --data digits --features encoder:gen", "encoder|mae"),
    ("eval --ckpt gen --data digits --features resnet", "pixels or encoder:CKPT"),
    ("eval --images one.npz --data one.npz --features encoder:nan", "NaN or Inf"),
    ("eval --images digits/test --num_images 500 --data digits --features pixels", "355 images"),
    ("ref --data missing --out x.npz --features pixels", "missing"),
    ("ref --data digits --out x.npz --inception missing.pth", "missing.pth")])
def test_bad_input_gives_one_clear_line(command, line, reason):
    with pytest.raises(UsageError, match=reason) as error:
        command(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", [
    "eval --ckpt gen", "eval --ref x.npz", "eval --ckpt gen --images digits --data digits",
    "eval --images digits --data digits --seed 1", "ref --data digits", "ref --out x.npz",
    "eval --images digits --data digits --cfg_scale 1.5", "neighbours --ckpt gen",
    "eval --images digits --data digits --temperature 0.9", "neighbours --data digits",
    "neighbours --ckpt gen --data digits --ref x.npz", "eval --ckpt gen --data digits --out x.png",
    "neighbours --ckpt gen --data digits --cfg_scale 1 2", "ref --data digits --out x --seed 1",
    "eval --images digits --data digits --vae vae", "eval --ckpt gen --data digits --num_images 9",
    "eval --ckpt gen --data digits --features encoder:enc --resize half",
    "eval --ckpt gen --data digits --num_image 20",  # no abbreviations
    "ref --data digits --out x.npz --features pixels --inception x.pth",
    "ref --data digits --out x.npz --batch_size 0"])
def test_options_that_are_missing_or_would_be_ignored(command, line, capsys):
    with pytest.raises(SystemExit):
        command(line)
    assert "error: " in capsys.readouterr().err
