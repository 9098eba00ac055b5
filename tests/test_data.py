"""prepare_data.py: what goes in comes out, is drawn as promised, and what is broken is named."""
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import prepare_data


def picture(size, mode="RGB", seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Three classes of PNGs, written in an order that is not the sorted one."""
    for c, n in (("zebra", 3), ("ant", 2), ("bee", 4)):
        (tmp_path / "src" / c).mkdir(parents=True)
        for i in range(n):
            picture((8, 8), seed=hash((n, i)) % 1000).save(tmp_path / "src" / c / f"{i}.png")
    return tmp_path / "src"


def test_folder_and_zip_give_the_same_array(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for p in sorted(folder.rglob("*.png"), reverse=True):
            z.write(p, p.relative_to(folder))
    prepare_data.prepare(folder, tmp_path / "a")
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "b")
    a, b = prepare_data.Dataset(tmp_path / "a"), prepare_data.Dataset(tmp_path / "b")
    assert np.array_equal(a.images, b.images) and np.array_equal(a.labels, b.labels)
    assert a.meta["classes"] == ["ant", "bee", "zebra"] and a.meta["images_per_class"] == [2, 4, 3]
    assert a.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(a.images[7].transpose(1, 2, 0), np.asarray(Image.open(folder / "zebra/1.png")))
    x = a.batch([7])
    assert x.shape == (1, 3, 8, 8) and np.allclose(x[0].numpy(), a.images[7] / 127.5 - 1, atol=1e-6)


def test_splits_are_found(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for split in ("train", "test"):
            for p in folder.rglob("*.png"):
                if split == "train" or p.name == "0.png":
                    z.write(p, f"{split}/{p.relative_to(folder)}")
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "out")
    assert len(prepare_data.Dataset(tmp_path / "out")) == 9
    assert prepare_data.Dataset(tmp_path / "out", "test").labels.tolist() == [0, 1, 2]


def test_embedded_digits():
    digits = prepare_data.embedded_digits()
    (train, train_labels), (test, test_labels) = digits["train"], digits["test"]
    assert train.shape == (1442, 1, 8, 8) and test.shape == (355, 1, 8, 8)
    assert train.min() == 0 and train.max() == 255 and len(np.unique(train)) == 17
    assert np.bincount(np.concatenate([train_labels, test_labels])).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    held_out = {x.tobytes() for x in test}
    assert not any(x.tobytes() in held_out for x in train)
    assert prepare_data.DIGITS.stat().st_size < 100_000


def test_centre_crop_keeps_the_centre():
    """Left, middle and right third in three colours: the crop of a wide picture is the middle one."""
    wide = Image.new("RGB", (96, 32))
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        wide.paste(colour, (32 * i, 0, 32 * i + 32, 32))
    for image in (wide, wide.rotate(90, expand=True)):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        crop = prepare_data.decode(buffer.getvalue(), 16, 3)
        assert crop.shape == (3, 16, 16) and (crop[1, 2:-2, 2:-2] == 255).all() and (crop[[0, 2], 2:-2, 2:-2] == 0).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_mode_becomes_rgb(mode):
    buffer = io.BytesIO()
    picture((10, 12), mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert prepare_data.decode(buffer.getvalue(), 8, 3).shape == (3, 8, 8)
    assert prepare_data.decode(buffer.getvalue(), 8, 1).shape == (1, 8, 8)


def test_rotated_by_its_exif():
    image = Image.new("RGB", (16, 16), "white")
    image.paste("red", (0, 0, 16, 4))  # a red bar on top; orientation 3 says: turn by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert (prepare_data.decode(buffer.getvalue(), None, 3)[1, -4:] == 0).all()


def test_a_broken_image_is_named_and_skipped_only_by_flag(tmp_path, folder, capsys):
    (folder / "ant" / "0.png").write_bytes((folder / "ant" / "0.png").read_bytes()[:60])  # the very first
    with pytest.raises(ValueError, match=r"ant/0\.png: cannot be read .*--skip_broken"):
        prepare_data.prepare(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    prepare_data.prepare(folder, tmp_path / "out", skip_broken=True)
    assert "1 broken" in capsys.readouterr().out
    assert prepare_data.Dataset(tmp_path / "out").count.tolist() == [1, 4, 3]


def test_bad_sources_get_one_line(tmp_path, folder):
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(ValueError, match="neither a folder nor a .zip"):
        prepare_data.prepare(tmp_path / "cut.zip", tmp_path / "o")
    with pytest.raises(FileNotFoundError, match="not found"):
        prepare_data.prepare(tmp_path / "nowhere", tmp_path / "o")
    with pytest.raises(ValueError, match="in no class folder"):
        prepare_data.prepare(folder / "ant", tmp_path / "o")
    with pytest.raises(ValueError, match="inside one folder"):
        prepare_data.prepare(folder.parent, tmp_path / "o")
    picture((9, 8)).save(folder / "bee" / "9.png")
    with pytest.raises(ValueError, match="give one --size"):
        prepare_data.prepare(folder, tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        prepare_data.prepare(tmp_path / "empty", tmp_path / "o")
    (folder / "bee" / "9.png").unlink()
    prepare_data.prepare(folder, tmp_path / "d")
    with pytest.raises(ValueError, match="exists already"):
        prepare_data.prepare(folder, tmp_path / "d")
    for p in folder.rglob("*.png"):
        p.write_bytes(b"not an image")
    with pytest.raises(ValueError, match="none of its images"):
        prepare_data.prepare(folder, tmp_path / "o", skip_broken=True)


def test_damaged_prepared_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        prepare_data.Dataset(tmp_path)
    prepare_data.prepare("digits", tmp_path)
    labels = np.load(tmp_path / "train/labels.npy")
    for bad in (labels[:-1], labels + 1, labels[::-1]):
        np.save(tmp_path / "train/labels.npy", bad)
        with pytest.raises(ValueError, match="does not fit meta.json"):
            prepare_data.Dataset(tmp_path)
    np.save(tmp_path / "train/labels.npy", labels)
    with open(tmp_path / "train/images.bin", "r+b") as f:
        f.truncate(1000)
    with pytest.raises(ValueError, match="has 1000 bytes, its meta.json says 92288"):
        prepare_data.Dataset(tmp_path)


def test_interrupted_preparation_of_the_digits_goes_on(tmp_path):
    (tmp_path / "train.tmp").mkdir()
    prepare_data.prepare("digits", tmp_path)
    before = (tmp_path / "train/images.bin").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "test")
    prepare_data.prepare("digits", tmp_path)
    assert len(prepare_data.Dataset(tmp_path, "test")) == 355 and before == (tmp_path / "train/images.bin").stat().st_mtime_ns


def test_draws(tmp_path):
    prepare_data.prepare("digits", tmp_path)
    data, rng = prepare_data.Dataset(tmp_path), np.random.default_rng(0)
    for label in range(10):
        ids = data.draw(label, 100, rng)
        assert len(set(ids.tolist())) == 100 and (data.labels[ids] == label).all()
    assert len(set(data.draw_any(len(data), rng).tolist())) == len(data)
    with pytest.raises(ValueError):
        data.draw(0, data.count[0] + 1, rng)


def test_fresh_ids_go_through_every_epoch_once(tmp_path):
    """Whatever the batch, an epoch is a permutation, epochs differ, and any place in the row can be started from."""
    prepare_data.prepare("digits", tmp_path)
    data = prepare_data.Dataset(tmp_path)
    n = len(data)
    row = np.concatenate([data.fresh(i * 100, 100, seed=3) for i in range(45)])
    for epoch in range(3):
        assert sorted(row[epoch * n:epoch * n + n].tolist()) == list(range(n))
    assert not np.array_equal(row[:n], row[n:2 * n])
    again = prepare_data.Dataset(tmp_path)
    assert np.array_equal(again.fresh(2000, 1500, seed=3), row[2000:3500])
    assert not np.array_equal(again.fresh(0, n, seed=4), row[:n])


def test_meta_describes_the_array(tmp_path):
    prepare_data.prepare("digits", tmp_path)
    meta = json.loads((tmp_path / "test/meta.json").read_text())
    assert meta["kind"] == "pixels" and meta["shape"] == [355, 1, 8, 8] and meta["dtype"] == "uint8"
    assert meta["classes"] == [str(c) for c in range(10)] and sum(meta["images_per_class"]) == 355
    assert meta["source"] == "digits.npz"
