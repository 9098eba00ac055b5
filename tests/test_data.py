"""prepare_data.py: what goes in comes out, is drawn as promised, and nothing goes unsaid."""
import gzip
import io
import json
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import model
import prepare_data


def picture(size, seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data, size=None):
    return prepare_data.to_array(prepare_data.open_image(data), size)


def zipped(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """Three classes of PNGs, written in an order that is not the sorted one."""
    for c, n in (("zebra", 3), ("ant", 2), ("bee", 4)):
        (tmp_path / "src" / c).mkdir(parents=True)
        for i in range(n):
            picture((8, 8), 10 * n + i).save(tmp_path / "src" / c / f"{i}.png")
    return tmp_path / "src"


# --------------------------------------------------------------------------------------------
# The data set that training reads

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    prepare_data.prepare(prepare_data.DIGITS, out)
    return prepare_data.Dataset(out)


def test_embedded_digits(digits):
    splits = prepare_data.embedded_digits()
    (train, train_labels), (test, _) = splits["train"], splits["test"]
    assert train.shape == (1442, 8, 8) and test.shape == (355, 8, 8)
    assert train.min() == 0 and train.max() == 255 and len(np.unique(train)) == 17
    assert np.array_equal(digits.images[:, 0], train)
    assert np.array_equal(digits.labels, train_labels)


def test_draws(digits):
    rng = np.random.default_rng(0)
    for label in range(10):
        ids = digits.draw(label, 100, rng)
        assert len(set(ids.tolist())) == 100 and (digits.labels[ids] == label).all()
    assert len(set(digits.draw_any(len(digits), rng).tolist())) == len(digits)
    more = digits.draw(0, digits.count[0] + 1, rng)  # of a small class, some several times
    assert len(more) == digits.count[0] + 1
    plain = digits.batch([5, 5, 900])
    assert np.allclose(plain[2], digits.images[900] / 127.5 - 1, atol=1e-6)
    x = digits.batch([5, 5, 900], np.array([2, 3, 5]), flip=True)  # mirrored by an odd seed
    assert torch.equal(x, torch.stack([plain[0], plain[1].flip(2), plain[2].flip(2)]))


def test_fresh_ids_go_through_every_epoch_once(digits):
    """An epoch is a permutation, epochs differ, any place in the row can be started from."""
    n = len(digits)
    row = np.concatenate([digits.fresh(i * 100, 100, seed=3) for i in range(45)])
    for epoch in range(3):
        assert sorted(row[epoch * n:epoch * n + n].tolist()) == list(range(n))
    assert not np.array_equal(row[:n], row[n:2 * n])
    assert np.array_equal(digits.fresh(2000, 1500, seed=3), row[2000:3500])


# --------------------------------------------------------------------------------------------
# Sources

def test_folder_and_zip_give_the_same_array(tmp_path, folder):
    prepare_data.prepare(folder, tmp_path / "a")
    prepare_data.prepare(zipped(folder, tmp_path / "x.zip"), tmp_path / "b")
    a, b = prepare_data.Dataset(tmp_path / "a"), prepare_data.Dataset(tmp_path / "b")
    assert np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    assert a.meta["classes"] == b.meta["classes"] == ["ant", "bee", "zebra"]
    assert a.meta["images_per_class"] == [2, 4, 3]
    pixels = np.asarray(Image.open(folder / "zebra/1.png"))
    assert np.array_equal(a.images[7].transpose(1, 2, 0), pixels)


LAYOUTS = {  # files -> {split: class and number of images}, or what is said
    "Training/a/1.png Training/b/1.png TESTING/a/1.png": {"train": "a1 b1", "test": "a1"},
    "train/a/1.png valid/a/1.png test/a/1.png": {"train": "a1", "val": "a1", "test": "a1"},
    "train/a/1.png eval/a/1.png docs/1.png x.png":
        {"train": "a1", "val": "a1", "said": "beside the splits: docs, x.png"},
    "train/a/1.png training/b/1.png": {"train": "a1 b1"},
    "train/1.png bus/1.png": {"train": "bus1 train1"},
    "1.png 2.JPG": {"train": "images2"},
    "train/1.png test/1.png": {"train": "images1", "test": "images1"},
    "train/a/1.png test/1.png": {"train": "a1", "said": "test is left out"},
    "test/a/1.png": {"test": "a1"},
    "train/a/i/1.png train/b/i/1.png val/i/1.png": {"train": "a1 b1", "said": "val is left out"},
    "a/1.png 1.png": "give the folder of the classes",
    "p/a/1.png p/b/1.png p/1.png": "give the folder of the classes",
    "p/a/1.png q/b/1.png": "give the folder of the classes",
    "train/p/a/1.png train/p/b/1.png": "give the folder of the classes",
    "a/1.png a/.x/1.png .b/1.png @eaDir/1.png __MACOSX/a/1.png b/@x/1.png b/.y.png":
        {"train": "a1"},
    "a/1.jfif a/2.jpe a/3.avif a/4.ppm a/5.txt b/x.csv": {"train": "a4"},
    "a/1.txt": "no images there"}


@pytest.mark.parametrize("kind", ["folder", "zip", "zip of Windows"])
@pytest.mark.parametrize("files", LAYOUTS)
def test_layouts(tmp_path, files, kind, capsys):
    source = tmp_path / "x"
    for name in files.split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    if kind != "folder":
        zipped(source, tmp_path / "x.zip")
        source = tmp_path / "x.zip"
    if kind == "zip of Windows":
        source.write_bytes(source.read_bytes().replace(b"/", b"\\"))
    right = LAYOUTS[files]
    if isinstance(right, str):
        with pytest.raises(model.UsageError, match=right):
            prepare_data.open_source(source)
        return
    splits, _ = prepare_data.open_source(source)
    said = right.get("said", "")
    assert said in capsys.readouterr().err
    found = {"said": said}
    for split, items in splits.items():
        classes = [label for label, _ in items]
        found[split] = " ".join(f"{c}{classes.count(c)}" for c in sorted(set(classes)))
    assert found == {"said": said, **right}


@pytest.mark.parametrize("split", ["", "train/"])
@pytest.mark.parametrize("labelled", [True, False])
def test_dataset_json_has_the_labels(tmp_path, labelled, split):
    """As dataset_tool of StyleGAN, EDM and EDM2 writes it: its shards are no classes."""
    labels = []
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(24):
            name = f"{i // 8:05d}/img{i:08d}.png"
            archive.writestr(split + name, encoded(Image.new("RGB", (8, 8), (i % 12,) * 3)))
            labels.append([name, i % 12])
        text = json.dumps({"labels": labels[::-1] if labelled else None})
        archive.writestr(split + "dataset.json", text)
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out")
    if labelled:
        assert data.meta["classes"] == [str(c) for c in range(12)] and (data.count == 2).all()
        assert (data.images[:, 0, 0, 0] == data.labels).all()
    else:
        assert data.meta["classes"] == ["images"] and len(data) == 24


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("place", ["mnist", "FashionMNIST/raw"])
def test_idx_files(tmp_path, place, ending):
    source = tmp_path / "fashion/x" / place
    source.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 30), ("t10k", 12)):
        images = rng.integers(0, 256, (n, 5, 5), dtype=np.uint8)
        labels = 9 - np.arange(n, dtype=np.uint8) % 10
        for name, x in (("images-idx3", images), ("labels-idx1", labels)):
            data = struct.pack(f">{x.ndim + 1}I", 2048 + x.ndim, *x.shape) + x.tobytes()
            data = gzip.compress(data) if ending else data
            (source / f"{prefix}-{name}-ubyte{ending}").write_bytes(data)
    prepare_data.prepare(source, tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out", "test")
    assert np.array_equal(data.images[:, 0], images[np.argsort(labels, kind="stable")])
    assert np.array_equal(data.labels, np.sort(labels))
    names = prepare_data.FASHION if "Fashion" in place else "0123456789"
    assert data.meta["classes"] == list(names)
    assert len(prepare_data.Dataset(tmp_path / "out")) == 30


def test_cifar(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (6, 4, 3073), dtype=np.uint8)
    rows[:, :, 0] %= 2
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin", "batches.meta.txt"]
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        for name, data in zip(names, [*map(bytes, rows), b"frog\nship\n\n"]):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    prepare_data.prepare(tmp_path / "c.tar.gz", tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out")
    train = rows[:5].reshape(20, -1)
    order = np.argsort(train[:, 0], kind="stable")
    assert np.array_equal(data.images.reshape(20, -1), train[order, 1:])
    assert data.meta["classes"] == ["frog", "ship"]
    assert data.labels.tolist() == sorted(train[:, 0].tolist())
    assert len(prepare_data.Dataset(tmp_path / "out", "test")) == 4


def test_images_of_several_sizes_need_a_size(tmp_path, folder, capsys):
    for size in ((16, 16), (9, 8)):
        picture(size).save(folder / "ant" / "0.png")
        with pytest.raises(model.UsageError, match="--size"):
            prepare_data.prepare(folder, tmp_path / "out")
    prepare_data.prepare(folder, tmp_path / "out", size=12)
    assert capsys.readouterr().err.count("are enlarged") == 1


# --------------------------------------------------------------------------------------------
# One image

def test_centre_crop_keeps_the_centre():
    """Thirds of a wide picture in three colours: its crop is the middle one."""
    wide = Image.new("RGB", (96, 32))
    for i, colour in enumerate(["red", "lime", "blue"]):
        wide.paste(colour, (32 * i, 0, 32 * i + 32, 32))
    for image in (wide, wide.rotate(90, expand=True)):
        crop = decode(encoded(image), 16)
        inside = crop[:, 2:-2, 2:-2]
        assert crop.shape == (3, 16, 16)
        assert (inside[1] == 255).all() and (inside[[0, 2]] == 0).all()


def test_colours_survive_every_mode():
    """A dark and a bright half, stored so that careless conversion gives black, white or worse."""
    grey = np.repeat(np.array([[40] * 4 + [200] * 4], np.uint8), 8, 0)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([grey] * 3 + [np.full((8, 8), 255, np.uint8)]))
    clear.putpixel((0, 0), (9, 9, 9, 0))
    cmyk = Image.fromarray(grey).convert("RGB").convert("CMYK")
    files = [(deep, "PNG", 40), (deep, "TIFF", 40), (cmyk, "TIFF", 40),
             (clear, "PNG", 255), (clear.convert("LA"), "PNG", 255),  # transparent: white
             (Image.fromarray(grey).convert("P"), "GIF", 40)]
    for image, form, corner in files:
        x = decode(encoded(image, form))
        assert x.shape == (3, 8, 8)
        assert (x[:, 1:] == grey[1:]).all(), (image.mode, form)
        assert (x[:, 0, 0] == corner).all(), (image.mode, form)
    for dtype in (np.int32, np.float32):
        with pytest.raises(model.UsageError, match="unknown range"):
            decode(encoded(Image.fromarray(grey.astype(dtype)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_heeded(orientation):
    image = picture((8, 6))
    exif = Image.Exif()
    exif[0x112] = orientation
    right = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, exif=exif))))
    assert np.array_equal(decode(encoded(image, exif=exif)).transpose(1, 2, 0), right)


def test_random_crop_is_inside_and_of_the_sizes_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array([prepare_data.random_crop(250, 200, 0.2, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 250).all() and (bottom <= 200).all()
    area = (right - left) * (bottom - top) / 50000
    ratio = (right - left) / (bottom - top)
    assert 0.2 <= area.min() < 0.21 and area.max() > 0.95
    assert 0.75 <= ratio.min() < 0.77 and 1.3 < ratio.max() <= 4 / 3 + 1e-9
    assert np.ptp(left) > 100 and np.ptp(top) > 100


def test_crop_resize():
    """The whole image stays, a flip mirrors it, and a quarter is that quarter, enlarged."""
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    whole = np.tile([0.0, 0, 8, 8], (3, 1))
    same = prepare_data.crop_resize(x, whole, np.array([False, True, False]))
    assert torch.allclose(same[::2], x[::2], atol=1e-5)
    assert torch.allclose(same[1], x[1].flip(2), atol=1e-5)
    right_upper = np.tile([4.0, 0, 8, 4], (3, 1))
    quarter = prepare_data.crop_resize(x, right_upper, np.zeros(3, bool))
    enlarged = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic").clamp(-1, 1)
    inside = slice(3, -3)
    wanted = enlarged[:, :, :8, 8:][:, :, inside, inside]
    assert torch.allclose(quarter[:, :, inside, inside], wanted, atol=1e-5)


# --------------------------------------------------------------------------------------------
# Broken images, other images, interruptions

@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_broken_image_is_named_and_skipped_only_by_flag(tmp_path, folder, kind, capsys):
    for name in ("ant/0.png", "bee/2.png"):  # the very first, and one amidst
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    source = folder if kind == "folder" else zipped(folder, tmp_path / "x.zip")
    with pytest.raises(model.UsageError, match="mend these.*--skip_broken"):
        prepare_data.prepare(source, tmp_path / "out")
    assert "bee/2.png: cannot be read (" in capsys.readouterr().err
    assert not (tmp_path / "out/train").exists()

    prepare_data.prepare(source, tmp_path / "out", skip_broken=True)
    data = prepare_data.Dataset(tmp_path / "out")
    assert data.count.tolist() == data.meta["images_per_class"] == [1, 3, 3]
    assert data.meta["skipped"] == ["ant/0.png", "bee/2.png"]
    good = [p for p in sorted(folder.rglob("*.png")) if p.stat().st_size > 60]
    assert np.array_equal(data.images, [decode(p.read_bytes()) for p in good])


def test_a_bug_in_a_loader_shows_its_traceback(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(prepare_data, "open_image", lambda data: data.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        prepare_data.prepare(folder, tmp_path / "out", skip_broken=True)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_prepared_data_of_other_images_are_not_taken(tmp_path, folder, kind, monkeypatch):
    def source():
        return folder if kind == "folder" else zipped(folder, tmp_path / "x.zip")

    def stop(*args):
        raise KeyboardInterrupt
    prepare_data.prepare(source(), tmp_path / "out")
    with model.lock_folder(tmp_path / "out"):  # it is left as it is, so that nobody is in the way
        prepare_data.prepare(source(), tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_data.prepare(source(), tmp_path / "half")
    with pytest.raises(model.UsageError, match="other images or options"):
        prepare_data.prepare(source(), tmp_path / "out", size=4)

    picture((8, 8), 77).save(folder / "bee/1.png")
    if kind == "folder":  # which knows a file by its size, a zip by its checksum
        (folder / "bee/1.png").write_bytes((folder / "bee/1.png").read_bytes() + b"longer")
    with pytest.raises(model.UsageError, match="other images or options"):
        prepare_data.prepare(source(), tmp_path / "out")
    prepare_data.prepare(source(), tmp_path / "half")  # what is not whole is made again
    prepare_data.prepare(source(), tmp_path / "at_once")
    assert files_of(tmp_path / "half/train") == files_of(tmp_path / "at_once/train")
