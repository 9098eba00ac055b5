"""fid.py against the reference tools' figures (tests/fixtures/inception: random weights, images and what came out)."""
import hashlib
import importlib.util
import json
import subprocess
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
from conftest import FIXTURES, ROOT

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
        read = lambda some: torch.tensor(some)[:, None, None, None].expand(-1, 1, 2, 2)
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

    def read(name, features="inception-0", resize="tf1"):
        extractor = fid.Extractor(lambda images: images.flatten(1)[:, :8].float(), features, resize, None)
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

    (tmp_path / "text.npz").write_text("no archive")
    bad = dict(images=dict(arr_0=images), only=dict(mu=mu), shape=dict(mu=mu, sigma=sigma[:4]),
               skew=dict(mu=mu, sigma=np.triu(np.ones((8, 8)))), objects=dict(mu=mu, sigma=np.array([{}], object)),
               nan_mu=dict(mu=mu * np.nan, sigma=sigma), nan_sigma=dict(mu=mu, sigma=sigma * np.nan))
    for name, arrays in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for name, reason in dict(text="no .npz", missing="does not exist", images="found arr_0", only="found mu", objects="Object arrays",
                             shape="no mean", skew="no mean", nan_mu="no mean", nan_sigma="no mean").items():
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

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a data set `digits`, a generator `gen` and an encoder `enc`."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    prepare_data.prepare("digits", folder / "digits")
    configs = {"gen": (model.Generator, dict(input_size=8, in_channels=1, patch_size=2, hidden_size=32, depth=1,
                                             num_heads=2, num_classes=10, n_cls_tokens=2)),
               "enc": (model.MAE, dict(in_channels=1, base_channels=16, layers=[1, 1], num_classes=10))}
    for name, (cls, config) in configs.items():
        network = cls(**config)
        if name == "gen":
            torch.nn.init.normal_(network.final_linear.weight, std=0.3)
            torch.nn.init.normal_(network.final_adaln.weight, std=0.3)  # else alpha and class would do nothing
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, folder / name / "model.safetensors")
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


def test_encoder_distance(command, run):
    command("ref --data digits --features encoder:enc --out digits.npz")
    [itself], text = command("eval --images digits --ref digits.npz --features encoder:enc")
    assert abs(itself["fd"]) < 1e-6 and itself["precision"] == itself["recall"] == 1 and itself["num_images"] == 1442
    assert "fid" not in itself and "is" not in itself and "FID" not in text and "FD-1442 " in text
    [held_out], _ = command("eval --images digits/test --ref digits.npz --features encoder:enc")
    [on_the_fly], _ = command("eval --images digits/test --data digits --features encoder:enc")
    noise, text = command("eval --ckpt gen --ref digits.npz --features encoder:enc --num_images 1000 --cfg_scale 1 3 "
                          "--out a.png")
    assert abs(held_out["fd"] - on_the_fly["fd"]) < 1e-12 and held_out["precision"] == on_the_fly["precision"]
    assert 1e-6 < held_out["fd"] < min(row["fd"] for row in noise) and noise[0]["fd"] != noise[1]["fd"]
    assert [row["cfg_scale"] for row in noise] == [1, 3] and noise[0]["seed"] == 0 and text.count("FD-1k ") == 2
    assert noise[0]["ref"] == "digits.npz" and len(noise[0]["ref_sha256"]) == 64
    assert Image.open(run / "a.png").size[0] > 100
    again, _ = command("eval --ckpt gen --ref digits.npz --features encoder:enc --num_images 1000 --batch_size 37")
    assert abs(again[0]["fd"] / noise[0]["fd"] - 1) < 1e-3  # float rounding moves a few pixels by one grey level


def test_inception_scores(command, run, weights):
    """The whole path with Inception, on few and small images: they cost 0.15 s each."""
    real = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    np.savez(run / "real.npz", arr_0=real)
    command(f"ref --data real.npz --out stats.npz --inception {weights}")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    [row], text = command(f"eval --ckpt gen --ref stats.npz --num_images 11 --inception {weights}")
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert row["fid"] > 0 and row["is"] >= 1 and 0 <= row["recall"] <= 1 and row["resize"] == "tf1"
    assert "FID-11 " in text and "IS " in text and row["ref_sha256"][:12] in text and "singular" in text
    with pytest.raises(SystemExit, match="made with resize tf1, this run has half"):
        command(f"eval --ckpt gen --ref stats.npz --num_images 11 --inception {weights} --resize half")

    # A file of others: statistics, and the images of precision and recall, as ADM's.
    statistics = dict(np.load(run / "stats.npz"))
    np.savez(run / "adm.npz", mu=statistics["mu"], sigma=statistics["sigma"], mu_s=np.zeros(1), arr_0=real)
    [adm], _ = command(f"eval --images real.npz --ref adm.npz --inception {weights}")
    assert abs(adm["fid"]) < 1e-6 and adm["precision"] == adm["recall"] == 1


def test_any_number_of_processes(run):
    """Two processes, an odd number of images, generated ones and files: the figures of one process."""
    lines = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        line = "eval --ckpt gen --data digits/test --features encoder:enc --num_images 201 --batch_size 32"
        out = subprocess.run([sys.executable, *launcher, ROOT / "fid.py", *line.split()], cwd=run, capture_output=True,
                             text=True)
        assert out.returncode == 0, out.stderr
        lines.append(json.loads(out.stdout))
    for key, value in lines[0].items():
        assert lines[1][key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), key


def test_generated_images_are_those_of_the_protocol(run):
    """Label i % classes, noise of (seed, i), floor(255 x): whatever else is in the batch."""
    generator = model.load_generator(run / "gen")
    read = fid.generated(generator, 2.0, seed=3)
    wanted = sample.to_uint8(sample.generate(generator, [3, 2], [3, 12], cfg_scale=2.0, seed=3))
    assert torch.equal(read([3, 12]), wanted) and wanted.dtype == torch.uint8
    assert (read([12, 0, 3])[[2, 0]].int() - wanted.int()).abs().max() <= 1


def test_neighbours_picture(command, run):
    command("neighbours --ckpt gen --data digits --features encoder:enc --num_images 20 --out near.png")
    assert Image.open(run / "near.png").size == (9 * 66 - 2, 20 * 66 - 2)


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


def test_halves_of_one_set_are_near_and_noise_is_far(run, monkeypatch):
    monkeypatch.chdir(run)
    count, read = fid.open_images("digits")
    extractor = fid.load_extractor("pixels")
    rows = extractor.extract(read(np.arange(count)))
    noise = torch.rand(count // 2, rows.shape[1], generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = lambda a, b: fid.frechet_distance(*fid.statistics(a), *fid.statistics(b))
    halves, far = distance(rows[::2], rows[1::2]), distance(rows[::2], noise)
    assert abs(distance(rows, rows)) < 1e-6 and 0 < halves < 0.02 * far


@pytest.mark.parametrize("line, reason", [
    ("eval --ckpt gen --ref missing.npz --features encoder:enc", "missing.npz does not exist"),
    ("eval --ckpt missing --data digits --features encoder:enc", "missing: no model"),
    ("eval --ckpt gen --data digits --features encoder:gen", "not a MAE"),
    ("eval --ckpt gen --data digits --features resnet", "pixels or encoder:CKPT"),
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
    "eval --ckpt gen", "eval --ref x.npz", "eval --images digits --data digits --seed 1",
    "eval --ckpt gen --data digits --features encoder:enc --resize half"])
def test_flags_that_would_be_ignored_are_refused(command, line, capsys):
    with pytest.raises(SystemExit):
        command(line)
    assert "error: " in capsys.readouterr().err
