"""fid.py against the reference tools' figures (tests/fixtures/inception: random weights, images and what came out)."""
import hashlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import fid
import model
import prepare_data
import sample
import train
from conftest import FIXTURES, ROOT, ranks

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
    """The stand-in checkpoint, with the num_batches_tracked that some files of this network carry."""
    shapes = {key: json.loads(shape) for key, shape in zip(expected["keys"].tolist(), expected["shapes"].tolist())}
    state = recipe.random_state_dict(shapes)
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


# ------------------------------------------------------------------------------------------------------------------
# The network

@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("resize", ["tf1", "half"])
def test_features_and_logits(net, expected, size, resize):
    images = recipe.images(size)
    at = [0, 1, 2, 149, 150, 297, 298]
    prepared = fid.prepare(images, resize)
    assert np.abs(prepared[:, :, at][..., at].numpy() - expected[f"resized_{resize}_{size}"]).max() < 1e-6
    features = fid.inception_features(net, images, resize)
    assert features.dtype == torch.float32 and relative(features, expected[f"feat_{resize}_{size}"]) < 1e-5
    if resize == "tf1":
        assert relative(features @ net.fc.weight.T, expected[f"logits_tf1_{size}"]) < 1e-5
    else:
        resized = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
        assert torch.equal(prepared, (resized - 128) / 128)


def test_features_do_not_depend_on_the_batch_and_grey_is_repeated(net):
    images = recipe.images(64)[:2]
    together, alone = fid.inception_features(net, images), fid.inception_features(net, images, batch_size=1)
    assert relative(alone, together.numpy()) < 1e-6
    grey = images[:1, :1]
    assert torch.equal(fid.inception_features(net, grey), fid.inception_features(net, grey.repeat(1, 3, 1, 1)))
    for wrong in (images.float(), images[0], images[:, :2]):
        with pytest.raises(ValueError, match="uint8 images"):
            fid.inception_features(net, wrong)
    with pytest.raises(ValueError, match="tf1 or half"):
        fid.inception_features(net, images, "bicubic")


def test_features_are_computed_without_tf32(net, monkeypatch):
    """Which no CPU has: the switch that a GPU reads is off inside and left as it was, and autocast is off."""
    inside = []
    monkeypatch.setattr(net, "forward", lambda x: inside.append(
        (torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu"))) or x)
    with torch.autocast("cpu", torch.bfloat16):
        fid.inception_features(net, recipe.images(64)[:1])
    assert inside == [(False, False)] and torch.backends.cudnn.allow_tf32


def test_checkpoint_keys_and_refusals(net, expected, weights, tmp_path):
    ours = {key for key in net.state_dict() if not key.endswith("num_batches_tracked")}
    assert ours == set(expected["keys"].tolist())
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(1)}, tmp_path / "torchvision.pth")
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "pickled.pth")  # would need code to be run
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("torchvision.pth", "pickled.pth", "text.pth", "missing.pth"):
        with pytest.raises(ValueError, match="--inception") as error:
            fid.load_inception(tmp_path / name)
        assert "\n" not in str(error.value)


def test_download_is_hashed_and_kept(net, weights, tmp_path, monkeypatch):
    """From a file:// address: downloaded on first use, refused with another hash than its name's, not fetched again."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:8]
    for hash_in_name in ("0" * 8, digest):
        source = tmp_path / f"inception-2015-12-05-{hash_in_name}.pth"
        shutil.copy(weights, source)
        monkeypatch.setattr(fid, "INCEPTION_URL", source.as_uri())
        if hash_in_name == digest:
            assert torch.equal(fid.load_inception().fc.weight, net.fc.weight)
            source.unlink()
            assert torch.equal(fid.load_inception().fc.weight, net.fc.weight)
        else:
            with pytest.raises(ValueError, match="the internet .*invalid hash.*--inception"):
                fid.load_inception()


def test_names_that_others_rely_on():
    for name, parameters in dict(load_inception="(path=None)",
                                 inception_features="(net, images_uint8, resize='tf1', batch_size=64)",
                                 frechet_distance="(mu1, sigma1, mu2, sigma2)", inception_score="(logits)",
                                 precision_recall="(real, fake, k=3)").items():
        assert str(inspect.signature(getattr(fid, name))) == parameters


# ------------------------------------------------------------------------------------------------------------------
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
    """Diagonal: |mu1 - mu2|^2 + sum (s1 - s2)^2. A point has s = 0; nothing is clamped or regularised."""
    rng = np.random.default_rng(0)
    mu1, mu2, s1, s2 = rng.normal(size=(4, 50))
    s1, s2 = np.abs(s1), np.abs(s2)
    truth = ((mu1 - mu2) ** 2 + (s1 - s2) ** 2).sum()
    assert abs(fid.frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) - truth) < 1e-10
    point = fid.frechet_distance(mu1, np.zeros((50, 50)), mu2, np.diag(s2**2))
    assert abs(point - ((mu1 - mu2) ** 2 + s2**2).sum()) < 1e-10


def test_frechet_distance_refuses():
    eye = np.eye(4)
    with pytest.raises(ValueError, match="different features"):
        fid.frechet_distance(np.zeros(4), eye, np.zeros(5), np.eye(5))
    with pytest.raises(ValueError, match="NaN"):
        fid.frechet_distance(np.zeros(4), eye * np.nan, np.zeros(4), eye)


@pytest.mark.parametrize("n", [200, 203])
def test_inception_score(expected, n):
    """203: splits of 20, the last 3 of the permuted rows dropped (official); other rules give 3.948, not 3.925."""
    logits = recipe.is_logits(n)
    score = fid.inception_score(logits)
    assert np.allclose(score, expected[f"is_official_{n}"], rtol=1e-6)

    x = logits.double().numpy()[np.random.RandomState(2020).permutation(n)]
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    splits = [p[i * 20:(i + 1) * 20] for i in range(10)]
    scores = [np.exp(np.mean([sum(row * np.log(row / split.mean(0))) for row in split])) for split in splits]
    assert np.allclose(score, (np.mean(scores), np.std(scores)), rtol=1e-10)


def test_inception_score_of_certain_and_of_few_images():
    certain = 5000.0 * torch.eye(10).repeat(100, 1)  # probabilities that underflow to 0
    mean, std = fid.inception_score(certain)
    assert 8 < mean <= 10 and std >= 0
    with pytest.raises(ValueError, match="at least 10"):
        fid.inception_score(certain[:9])


def test_precision_recall(expected):
    real, fake = recipe.pr_features()
    assert fid.precision_recall(real, fake) == tuple(expected["pr_official"].tolist()) == (471 / 500, 55 / 300)

    def inside(points, centres):
        count = 0
        balls = [sorted(((c - other) ** 2).sum() for other in centres)[3] for c in centres]  # [0] is itself
        for point in points:
            count += any(((point - c) ** 2).sum() <= ball for c, ball in zip(centres, balls))
        return count / len(points)
    real, fake = real[:80].double(), fake[:120].double()
    loops = inside(fake.numpy(), real.numpy()), inside(real.numpy(), fake.numpy())
    assert fid.precision_recall(real, fake) == loops and 0 < loops[1] < loops[0] < 1
    with pytest.raises(ValueError, match="more than 3"):
        fid.precision_recall(real[:3], fake)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_gather_restores_the_order(count, world, monkeypatch):
    """Processes one after another, whose sums arrive at rank 0: rows come in the order of the indices, each from its image."""
    indices, total = [10 * i for i in range(count)], 0
    extractor = fid.Extractor(lambda images: images.flatten(1).float(), "", "", None)
    for rank in reversed(range(world)):
        def reduce(rows, to):
            nonlocal total
            total = rows.add_(total)
        monkeypatch.setattr(fid, "dist", SimpleNamespace(is_initialized=lambda: world > 1, get_rank=lambda: rank,
                                                         get_world_size=lambda: world, reduce=reduce))
        read = lambda some: torch.tensor(some)[:, None, None, None].expand(-1, 1, 2, 2)  # noqa: E731
        rows = fid.gather_features(read, indices, extractor, batch_size=2)
        assert (rows is None) == (rank > 0)
    assert rows[:, 0].tolist() == indices and rows.shape == (count, 4)


# ------------------------------------------------------------------------------------------------------------------
# Files

def test_reference_files(tmp_path):
    """Every kind of file that exists, refused with the other family's resize and with other features."""
    mu, sigma = np.arange(8, dtype=np.float32), np.diag(np.arange(1.0, 9.0))
    images = np.zeros((5, 4, 4, 3), np.uint8)
    adm = dict(mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=images)

    def read(name, features="inception-0", resize="tf1", fc=None):
        extractor = fid.Extractor(lambda images: images.flatten(1)[:, :8].float(), features, resize, fc)
        return fid.open_reference(extractor, ref=tmp_path / f"{name}.npz")
    for name, arrays, resize in (("pytorch-fid", dict(mu=mu, sigma=sigma), ""), ("adm", adm, "tf1"),
                                 ("meanflow", dict(ref_mu=mu, ref_sigma=sigma), "half"),
                                 ("own", dict(mu=mu, sigma=sigma, features="inception-0", resize="half"), "half")):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        reference = read(name, resize=resize or "tf1")
        assert reference["mu"].dtype == reference["sigma"].dtype == torch.float64
        assert np.array_equal(reference["mu"], mu) and np.array_equal(reference["sigma"], sigma)
        assert (reference["real"] is not None) == (name == "adm") and reference["ref"] == f"{name}.npz"
        assert reference["ref_sha256"] == hashlib.sha256((tmp_path / f"{name}.npz").read_bytes()).hexdigest()

        for other in {"tf1", "half"} - {resize} if resize else ():  # the other family's features
            with pytest.raises(ValueError, match=f"made with resize {resize}, this run has {other}"):
                read(name, resize=other)
        if not resize:  # mu and sigma alone can be either family's
            assert read(name, resize="half")["ref"] == f"{name}.npz"
        with pytest.raises(ValueError, match="made with features inception"):
            read(name, "encoder-0", "none")
    with pytest.raises(ValueError, match="made with features inception-0, this run has inception-1"):
        read("own", "inception-1", "half")
    with pytest.raises(ValueError, match="no features' mean"):  # of 8 features: known before 50,000 images are made
        read("pytorch-fid", fc=torch.zeros(1008, 2048))

    (tmp_path / "text.npz").write_text("no archive")
    bad = dict(images=dict(arr_0=images), only=dict(mu=mu), shape=dict(mu=mu, sigma=sigma[:4]),
               skew=dict(mu=mu, sigma=np.triu(np.ones((8, 8)))), objects=dict(mu=mu, sigma=np.array([{}], object)),
               nan_mu=dict(mu=mu * np.nan, sigma=sigma), nan_sigma=dict(mu=mu, sigma=sigma * np.nan))
    for name, arrays in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for name, reason in dict(text="no .npz", missing="does not exist", images="found arr_0", only="found mu",
                             objects="Object arrays", shape="no features' mean", skew="no features' mean", nan_mu="no features' mean",
                             nan_sigma="no features' mean").items():
        with pytest.raises(ValueError, match=reason):
            read(name)


def test_images_from_everywhere(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 6, 9, 3), np.uint8)
    folder = tmp_path / "folder" / "class"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{i}.png")
            archive.write(folder / f"{i}.png", f"class/{i}.png")
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    prepare_data.prepare(tmp_path / "folder", tmp_path / "prepared")
    for source in ("folder", "images.zip", "images.npz", "small.npz", "prepared", "prepared/train"):
        count, read = fid.open_images(tmp_path / source)
        assert count == 7, source
        for indices in ([0, 2, 6], [5, 1]):
            assert np.array_equal(read(indices).permute(0, 2, 3, 1), images[indices]), source

    Image.fromarray(images[0, :5]).save(folder / "8.png")
    (folder / "9.png").write_bytes((folder / "0.png").read_bytes()[:60])
    count, read = fid.open_images(tmp_path / "folder")
    with pytest.raises(ValueError, match="several sizes"):
        read(range(8))
    with pytest.raises(ValueError, match="9.png"):
        read([8])
    np.savez(tmp_path / "float.npz", arr_0=images / 255)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(8))
    (tmp_path / "empty").mkdir()
    for source, reason in (("float.npz", "float64"), ("statistics.npz", "found mu"), ("empty", "no images"),
                           ("missing", "does not exist"), ("folder/class/0.png", "folder, .zip or .npz")):
        with pytest.raises(ValueError, match=reason):
            fid.open_images(tmp_path / source)


# ------------------------------------------------------------------------------------------------------------------
# The commands, on untrained networks

def save(network, folder, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a data set `digits`, two quarters of it, noise, a generator `gen` and an encoder `enc`."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    prepare_data.prepare("digits", folder / "digits")
    images = prepare_data.Dataset(folder / "digits").images.transpose(0, 2, 3, 1)
    np.savez(folder / "one.npz", arr_0=images[::4]), np.savez(folder / "other.npz", arr_0=images[1::4])
    np.savez(folder / "noise.npz", arr_0=np.random.default_rng(0).integers(0, 256, (361, 8, 8, 1), np.uint8))
    config = dict(input_size=8, in_channels=1, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10, n_cls_tokens=2)
    generator = model.Generator(**config)
    torch.nn.init.normal_(generator.final_linear.weight, std=0.3)
    torch.nn.init.normal_(generator.final_adaln.weight, std=0.3)  # else alpha and class would do nothing
    save(generator, folder / "gen", config)
    config = dict(in_channels=1, base_channels=16, layers=[1, 1], num_classes=10)
    encoder = model.MAE(**config)
    save(encoder, folder / "enc", config)
    torch.nn.init.constant_(encoder.encoder.conv1.weight, float("nan"))
    save(encoder, folder / "nan", config)
    shutil.copytree(folder / "digits", folder / "latents")
    meta = json.loads((folder / "latents/train/meta.json").read_text())
    meta.update(kind="latents", dtype="float16", shape=[meta["shape"][0], 2, 8, 8, 8])
    (folder / "latents/train/meta.json").write_text(json.dumps(meta))
    np.zeros(meta["shape"], np.float16).tofile(folder / "latents/train/images.bin")
    return folder


@pytest.fixture
def command(run, monkeypatch, capsys):
    """Runs `fid.py ...` in the folder of `run`; returns its JSON lines and its standard error."""
    def call(line):
        monkeypatch.chdir(run)
        monkeypatch.setattr(sys, "argv", ["fid.py", *line.split()])
        fid.main()
        out, err = capsys.readouterr()
        return [json.loads(row) for row in out.splitlines() if row.startswith("{")], err
    return call


@pytest.mark.parametrize("features", ["encoder:enc", "pixels"])
def test_itself_other_images_and_noise(command, features):
    """FD is 0 of a set against itself, small of other images of the kind, larger of noise, and never called FID."""
    command(f"ref --data one.npz --features {features} --out one_stats.npz")
    figures, texts = zip(*(command(f"eval --images {name}.npz --ref one_stats.npz --features {features}")
                           for name in ("one", "other", "noise")))
    [itself], [other], [noise] = figures
    assert abs(itself["fd"]) < 1e-6 and itself["precision"] == itself["recall"] == 1 and itself["num_images"] == 361
    assert 1e-6 < other["fd"] < {"pixels": 0.1, "encoder:enc": 0.7}[features] * noise["fd"]
    assert noise["precision"] < other["precision"]
    for row, text in zip((itself, other, noise), texts):
        assert "fid" not in row and "is" not in row and "FID" not in text and "FD-361 " in text and row["resize"] == "none"


def test_sweep(command, run, weights):
    """One JSON line and one readable line an alpha, each complete; one alpha alone gives the same; the picture of Fig. 5."""
    rows, text = command("eval --ckpt gen --data one.npz --features encoder:enc --num_images 50 --seed 3 --temperature 0.9 "
                         "--cfg_scale 1 3 2 --out sub/a.png")
    assert [row["cfg_scale"] for row in rows] == [1, 3, 2] and len({row["fd"] for row in rows}) == 3
    for row, line in zip(rows, [line for line in text.splitlines() if "FD-" in line], strict=True):
        assert row.keys() == {"ckpt", "cfg_scale", "seed", "temperature", "num_images", "fd", "precision", "recall", "features",
                              "resize", "ref", "ref_sha256"}
        assert (row["ckpt"], row["seed"], row["temperature"], row["num_images"], row["ref"]) == ("gen", 3, 0.9, 50, "one.npz")
        for part in (f"FD-50 {row['fd']:.3f}", f"precision {row['precision']:.4f}  recall {row['recall']:.4f}", "50 images",
                     f"alpha {row['cfg_scale']:g}, seed 3", row["features"], f"one.npz {row['ref_sha256'][:12]}"):
            assert part in line, part
    assert Image.open(run / "sub/a.png").size == (480, 480)
    [again], _ = command("eval --ckpt gen --data one.npz --features encoder:enc --num_images 50 --seed 3 --temperature 0.9 "
                         "--cfg_scale 3 --batch_size 7")
    assert again == rows[1]

    # Two panels, alpha to the right, a larger value higher up; the lowest FID and the highest score are red.
    sweep = (1, 5.0, 10.0), (3, 9.0, 30.0), (2, 1.0, 20.0)
    fid.draw_sweep([{"cfg_scale": alpha, "fid": f, "is": s} for alpha, f, s in sweep], run / "b.png")
    picture = np.asarray(Image.open(run / "b.png")).astype(int)
    places = [(60, 240), (240, 420), (420, 60), (540, 420), (720, 240), (900, 60)]  # (x, y) of alpha 1, 2, 3 twice
    black, red = (0, 0, 0), (255, 0, 0)
    assert [tuple(picture[y, x]) for x, y in places] == [black, red, black, black, black, red]


def test_default_number_of_images(command, monkeypatch):
    asked = []
    monkeypatch.setattr(fid, "evaluate", lambda read, number, *rest: asked.append(number))
    command("eval --ckpt gen --data one.npz --features pixels")
    command("eval --images noise.npz --data one.npz --features pixels")
    command("eval --images noise.npz --data one.npz --features pixels --num_images 20")
    assert asked == [50_000, 361, 20]


@pytest.mark.parametrize("options, reason", [
    ("--ref missing.npz", "missing.npz does not exist"), ("--ref one.npz", "found arr_0"), ("--data missing", "does not exist"),
    ("--data latents", "latents holds latents, no images.*--ref, in training --eval_ref"),
    ("--ref half.npz", "made with features inception")])
def test_reference_is_read_before_anything_is_generated(command, run, monkeypatch, options, reason):
    np.savez(run / "half.npz", ref_mu=np.zeros(64), ref_sigma=np.eye(64))
    monkeypatch.setattr(fid, "generate", lambda *args, **kwargs: pytest.fail("generated before the reference was read"))
    with pytest.raises(SystemExit, match=reason):
        command(f"eval --ckpt gen {options} --features pixels")


def test_a_reference_of_images_is_named_and_hashed(command, run):
    """The hash is of the number of images and 64 of them: the same of a folder, an .npz and a prepared set, else another."""
    extractor = fid.load_extractor("pixels")
    opened = lambda path: fid.open_reference(extractor, data=path)  # noqa: E731
    digits = opened(run / "digits/test")
    images = prepare_data.Dataset(run / "digits", "test").images
    np.savez(run / "same.npz", arr_0=images.transpose(0, 2, 3, 1))
    np.savez(run / "fewer.npz", arr_0=images[:-1].transpose(0, 2, 3, 1))
    wanted = hashlib.sha256(b"355" + images[[i * 355 // 64 for i in range(64)]].tobytes()).hexdigest()
    assert digits["ref"] == str(run / "digits/test") and digits["ref_sha256"] == wanted == opened(run / "same.npz")["ref_sha256"]
    assert opened(run / "fewer.npz")["ref_sha256"] != wanted != opened(run / "digits")["ref_sha256"]


def test_where_precision_and_recall_come_from(command, run, monkeypatch):
    """Features in our own file, images in ADM's, or --data beside it; at most 10,000, spread over the classes; else none."""
    command("ref --data one.npz --features pixels --out own.npz")
    own = dict(np.load(run / "own.npz"))
    assert own["real"].shape == (361, 64) and own["num_images"] == 361 and str(own["source"]) == "one.npz"
    bare = dict(mu=own["mu"], sigma=own["sigma"], features="pixels", resize="none")
    np.savez(run / "bare.npz", **bare)
    np.savez(run / "adm.npz", **bare, arr_0=np.load(run / "one.npz")["arr_0"])
    line = "eval --images other.npz --features pixels --ref "
    rows = [command(line + rest)[0][0] for rest in ("own.npz", "adm.npz", "bare.npz --data one.npz", "bare.npz")]
    assert all(row["fd"] == rows[0]["fd"] for row in rows) and rows[0]["ref"] == "own.npz" and "real" not in rows[0]
    assert rows[2]["ref"] == "bare.npz" and rows[2]["real"] == "one.npz"
    assert len({(row["precision"], row["recall"]) for row in rows[:3]}) == 1 and 0.5 < rows[0]["recall"] < 1
    assert "precision" not in rows[3] and "precision" not in command(line + "bare.npz")[1]
    monkeypatch.setattr(fid, "REAL_FOR_PRECISION", 20)
    real = fid.open_reference(fid.load_extractor("pixels"), data=run / "digits")["real"] * 127.5 + 127.5
    assert torch.equal(real.round().byte().reshape(-1, 1, 8, 8), torch.from_numpy(
        prepare_data.Dataset(run / "digits").images[[i * 1442 // 20 for i in range(20)]]))


def test_inception_scores(command, run, weights):
    """The whole path with Inception, on few and small images: they cost 0.15 s each."""
    real = np.random.default_rng(0).integers(0, 256, (11, 16, 16, 3), np.uint8)
    np.savez(run / "real.npz", arr_0=real)
    command(f"ref --data real.npz --out stats.npz --inception {weights}")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    [row], text = command(f"eval --ckpt gen --ref stats.npz --num_images 10 --inception {weights}")
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert row["fid"] > 0 and row["is"] >= 1 and 0 <= row["recall"] <= 1 and row["resize"] == "tf1"
    assert "FID-10 " in text and f"IS {row['is']:.2f} +- " in text and "resize tf1" in text and "singular" in text
    assert row["ref"] == "stats.npz" and row["ref_sha256"] == hashlib.sha256((run / "stats.npz").read_bytes()).hexdigest()
    with pytest.raises(SystemExit, match="made with resize tf1, this run has half"):
        command(f"eval --ckpt gen --ref stats.npz --num_images 10 --inception {weights} --resize half")


def test_several_processes(command, run, tmp_path, monkeypatch):
    """Two gloo processes, another batch size; a generator, files, and inside training: one process's figures to the bit."""
    lines = ["eval --ckpt gen --data other.npz --features encoder:enc --num_images 31 --cfg_scale 1 2",
             "eval --images noise.npz --ref two.npz --features encoder:enc --num_images 31"]
    command("ref --data one.npz --features encoder:enc --out two.npz")
    options = SimpleNamespace(out="OUT", eval_every=1, eval_features="encoder:enc", eval_resize="tf1", eval_inception=None,
                              eval_ref="two.npz", data=None, device="cpu", seed=0, no_converted_copy=False)
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import json, sys
        from types import SimpleNamespace
        sys.path.insert(0, {str(ROOT)!r})
        import fid, model, train
        destroy, fid.dist.destroy_process_group = fid.dist.destroy_process_group, lambda: None
        for line in {lines}:
            sys.argv = ["fid.py", *line.split(), "--batch_size", "5"]
            fid.main()
            fid.dist.init_process_group = lambda backend: None  # the first call's serves them all
        train.Evaluator({options}, None, lambda row: print(json.dumps(row)))(model.load_generator("gen"), 1, 21)
        destroy()
        import os  # a thread that outlives the group may want the interpreter when it is gone, and abort
        assert not any("gloo" in open(f"/proc/self/task/{{t}}/comm").read() for t in os.listdir("/proc/self/task"))""".replace("namespace(", "SimpleNamespace(").replace("OUT", str(tmp_path / "two")))
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
    processes = ranks(2, script, cwd=run)
    texts = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    two = [json.loads(line) for line in texts[0].splitlines() if line.startswith("{")]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [row for line in lines for row in command(line)[0]]
        options.out = str(tmp_path / "one")
        train.Evaluator(options, None, one.append)(model.load_generator("gen"), 1, 21)
    finally:
        torch.set_num_threads(threads)
    assert two == one and len(two) == 4


def test_training_keeps_the_best_and_its_random_numbers(run, tmp_path, monkeypatch):
    """best/ holds the weights of the lowest figure, over a restart too; step 1's small trial is logged, but does not count."""
    monkeypatch.chdir(run)
    args = SimpleNamespace(out=str(tmp_path), eval_every=10, eval_features="pixels", eval_resize="tf1", eval_inception=None,
                           eval_ref=None, data="digits", device="cpu", seed=0, no_converted_copy=False)
    log = []
    evaluator, generator = train.Evaluator(args, None, log.append), model.load_generator("gen")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluator(generator, 1, 10)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert not (tmp_path / "best").exists() and evaluator.reference["ref"] == "digits"
    for step, figure in ((10, 5.0), (20, 3.0), (30, 4.0), (40, 2.0), (50, 2.5)):
        monkeypatch.setattr(fid, "evaluate", lambda *rest: {"fd": figure})
        torch.nn.init.constant_(generator.final_linear.bias, step)
        if step == 30:
            evaluator = train.Evaluator(args, None, log.append)
        evaluator(generator, step, 10)
        best = model.load_generator(tmp_path / "best").final_linear.bias[0]
        assert best == {10: 10, 20: 20, 30: 20, 40: 40, 50: 40}[step]
    assert [row["step"] for row in log] == [1, 10, 20, 30, 40, 50]
    assert log[0]["num_images"] == 10 and len(log[0]["ref_sha256"]) == 64
    args.data = "latents"
    with pytest.raises(ValueError, match="in training --eval_ref"):
        train.Evaluator(args, None, log.append)


@pytest.mark.parametrize("real", [np.zeros((9, 3), np.float32), np.zeros(9, np.float32), np.array(["a"] * 9),
                                  np.full((9, 32), np.nan, np.float32)])
def test_a_reference_with_strange_real_features_is_refused(command, run, real):
    command("ref --data one.npz --features encoder:enc --out fine.npz")
    with np.load(run / "fine.npz") as file:
        np.savez(run / "strange.npz", **{**file, "real": real})
    with pytest.raises(SystemExit, match="strange.npz: (real .* are no features|no numbers)"):
        command("eval --images noise.npz --ref strange.npz --features encoder:enc --num_images 31")


def test_generated_images_are_those_of_the_protocol(run):
    """Label i % classes, noise of (seed, i), floor(255 x): whatever else is in the batch."""
    generator = model.load_generator(run / "gen")
    read = fid.generated(generator, 2.0, seed=3)
    wanted = sample.to_uint8(sample.generate(generator, [3, 2], [3, 12], cfg_scale=2.0, seed=3))
    assert torch.equal(read([3, 12]), wanted) and wanted.dtype == torch.uint8
    assert torch.equal(read([12, 0, 3])[[2, 0]], wanted)


def test_latents_are_decoded(command, run, monkeypatch):
    """The authors' artifact of a latent generator and a small VAE: what is scored is what the VAE makes of its latents."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4, layers_per_block=1,
                  up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4).save_pretrained(run / "vae")
    images, labels = np.random.default_rng(0).integers(0, 256, (21, 3, 16, 16), np.uint8), np.repeat(np.arange(7), 3)
    for i, (image, label) in enumerate(zip(images, labels)):
        (run / f"rgb_files/{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(run / f"rgb_files/{label}/{i:02d}.png")
    prepare_data.prepare(run / "rgb_files", run / "rgb")
    artifact, keep = FIXTURES / "gen_latent_tiny", []
    monkeypatch.setattr(fid, "load_generator", lambda path, k: (keep.append(k), model.load_generator(path))[1])

    line = f"--ckpt {artifact} --data rgb --features pixels --vae vae --seed 2 --temperature 1.1 --num_images 14 "
    [row], _ = command("eval " + line + "--cfg_scale 1.5 --vae_chunk 3 --no_converted_copy")
    generator, indices = model.load_generator(artifact), np.arange(14)
    latents = sample.generate(generator, indices % 7, indices, 1.5, 1.1, 2)
    decoded = sample.to_uint8(model.load_vae(run / "vae").decode(latents))
    assert decoded.shape == (14, 3, 16, 16)
    flat = lambda images: torch.as_tensor(images).flatten(1) / 127.5 - 1  # noqa: E731
    assert row["fd"] == pytest.approx(distance(flat(decoded), flat(images)), rel=1e-9) and row["vae"] == "vae"

    command("neighbours " + line + "--cfg_scale 1.5 --out latent_near.png")
    picture = np.asarray(Image.open(run / "latent_near.png"))
    assert picture.shape == (14 * 66 - 2, 9 * 66 - 2, 3) and keep == [False, True]
    nearest = images[((flat(decoded[5:6]).double() - flat(images)) ** 2).sum(1).argmin()]
    for image, left in ((decoded[5].numpy(), 0), (nearest, 66)):  # row 5: the sample, then its nearest image
        tile = Image.fromarray(image.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BICUBIC)
        assert np.array_equal(picture[5 * 66:5 * 66 + 64, left:left + 64], np.asarray(tile))

    with pytest.raises(SystemExit, match="latents holds latents, no images"):
        command(f"neighbours --ckpt {artifact} --data latents --features pixels --vae vae")
    with pytest.raises(SystemExit, match="makes .3, 16, 16. of 7 classes, digits has .1, 8, 8. of 10"):
        command(f"neighbours --ckpt {artifact} --data digits --features pixels --vae vae")


def test_neighbours_figures_by_hand(run, monkeypatch, capsys):
    """The three figures in pixel space, written out as loops in NumPy."""
    monkeypatch.chdir(run)
    monkeypatch.setattr(sys, "argv", "fid.py neighbours --ckpt gen --data digits --features pixels --num_images 60".split())
    fid.main()
    text = capsys.readouterr().out
    flat = lambda images: np.asarray(images, np.float64).reshape(len(images), -1) / 127.5 - 1
    train, test = prepare_data.Dataset("digits"), prepare_data.Dataset("digits", "test")
    made = flat(fid.generated(model.load_generator("gen"))(range(60)))
    real, other = flat(train.images), flat(test.images)

    def nearest(rows):
        pairs = [np.sqrt(((row - real) ** 2).sum(1)) for row in rows]
        return np.array([d.min() for d in pairs]), train.labels[[d.argmin() for d in pairs]]

    def spread(rows, labels):
        return np.mean([np.mean([np.linalg.norm(a - b) for i, a in enumerate(rows[labels == c]) for b in rows[labels == c][:i]])
                        for c in range(10)])

    distance, label = nearest(made)
    yardstick, label_held_out = nearest(other)
    assert f"the same class {(label == np.arange(60) % 10).mean():6.1%} (worst class" in text.splitlines()[0]
    assert f"the same class {(label_held_out == test.labels).mean():6.1%} (worst class" in text.splitlines()[1]
    assert f"training images {distance.mean() / yardstick.mean():.3f} of the held-out" in text
    assert f"within a class {spread(made, np.arange(60) % 10) / spread(real, train.labels):.3f} of the training" in text


@pytest.mark.parametrize("line, reason", [
    ("eval --ckpt gen --ref missing.npz --features encoder:enc", "missing.npz does not exist"),
    ("eval --ckpt missing --data digits --features encoder:enc", "missing: no model"),
    ("eval --ckpt gen --data digits --features encoder:gen", "not a MAE"),
    ("eval --ckpt gen --data digits --features resnet", "pixels or encoder:CKPT"),
    ("eval --images one.npz --data one.npz --features encoder:nan", "statistics hold NaN"),
    ("eval --images digits/test --num_images 50000 --data digits --features encoder:enc", "holds 355 images"),
    ("eval --ckpt gen --num_images 3 --data digits --features encoder:enc", "too few"),
    ("neighbours --ckpt gen --data digits --features pixels --num_images 5", "at least two of each"),
    ("ref --data missing --out x.npz --features encoder:enc", "missing does not exist"),
    ("ref --data digits --out x.npz --inception missing.pth", "missing.pth"),
])
def test_bad_input_gives_one_clear_line(command, line, reason):
    with pytest.raises(SystemExit) as error:
        command(line)
    assert reason in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("fid.py: ")


@pytest.mark.parametrize("line", [
    "eval --ckpt gen", "eval --ref x.npz", "eval --ckpt gen --images digits --data digits",
    "eval --images digits --data digits --seed 1", "eval --images digits --data digits --cfg_scale 1.5",
    "eval --images digits --data digits --temperature 0.9", "eval --images digits --data digits --vae vae",
    "eval --ckpt gen --data digits --features encoder:enc --resize half", "eval --ckpt gen --data digits --num_image 20",
    "ref --data digits --out x.npz --features pixels --inception x.pth", "ref --data digits --out x.npz --batch_size 0"])
def test_flags_that_would_be_ignored_are_refused(command, line, capsys):
    with pytest.raises(SystemExit):
        command(line)
    assert "error: " in capsys.readouterr().err
