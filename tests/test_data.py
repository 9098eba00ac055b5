"""prepare_data.py: what goes in comes out, is drawn as promised, and what is broken is named."""
import errno
import gzip
import io
import json
import multiprocessing
import os
import shutil
import socket
import struct
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import model
import prepare_data
from conftest import relative_error, small_vae


def picture(size, mode="RGB", seed=0):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def decode(data, size, channels):
    return prepare_data.to_array(prepare_data.open_image(data), size, channels)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    """Three classes of PNGs, written in an order that is not the sorted one."""
    for c, n in (("zebra", 3), ("ant", 2), ("bee", 4)):
        (tmp_path / "src" / c).mkdir(parents=True)
        for i in range(n):
            picture((8, 8), seed=10 * n + i).save(tmp_path / "src" / c / f"{i}.png")
    return tmp_path / "src"


@pytest.fixture(scope="module")
def prepared_digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    prepare_data.prepare("digits", out)
    return out


@pytest.fixture(scope="module")
def digits(prepared_digits):
    return prepare_data.Dataset(prepared_digits)


def test_folder_and_zip_give_the_same_array(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for p in sorted(folder.rglob("*.png"), reverse=True):
            z.write(p, p.relative_to(folder))
    prepare_data.prepare(folder, tmp_path / "a")
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "b")
    a = prepare_data.Dataset(tmp_path / "a")
    assert files_of(tmp_path / "a/train") == files_of(tmp_path / "b/train")
    assert a.meta["classes"] == ["ant", "bee", "zebra"]
    assert a.meta["images_per_class"] == [2, 4, 3]
    assert a.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    pixels = np.asarray(Image.open(folder / "zebra/1.png"))
    assert np.array_equal(a.images[7].transpose(1, 2, 0), pixels)
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
    before = (tmp_path / "out/train/images.bin").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out/test")  # as after an interruption between the two
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "out")
    assert len(prepare_data.Dataset(tmp_path / "out", "test")) == 3
    assert before == (tmp_path / "out/train/images.bin").stat().st_mtime_ns


def test_embedded_digits():
    splits = prepare_data.embedded_digits()
    (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
    assert train.shape == (1442, 8, 8) and test.shape == (355, 8, 8)
    assert train.min() == 0 and train.max() == 255 and len(np.unique(train)) == 17
    count = np.bincount(np.concatenate([train_labels, test_labels]))
    assert count.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not {x.tobytes() for x in test} & {x.tobytes() for x in train}


def test_centre_crop_keeps_the_centre():
    """Thirds of a wide picture in three colours: its crop is the middle one."""
    wide = Image.new("RGB", (96, 32))
    for i, colour in enumerate(["red", "lime", "blue"]):
        wide.paste(colour, (32 * i, 0, 32 * i + 32, 32))
    for image in (wide, wide.rotate(90, expand=True)):
        crop = decode(encoded(image), 16, 3)
        inside = crop[:, 2:-2, 2:-2]
        assert crop.shape == (3, 16, 16)
        assert (inside[1] == 255).all() and (inside[[0, 2]] == 0).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_mode_becomes_rgb(mode):
    data = encoded(picture((10, 12), mode), "TIFF" if mode == "CMYK" else "PNG")
    assert decode(data, 8, 3).shape == (3, 8, 8)
    assert decode(data, 8, 1).shape == (1, 8, 8)


def test_colours_survive_every_mode():
    """A dark and a bright half, stored so that careless conversion gives black, white or worse."""
    grey = np.repeat(np.array([[40] * 4 + [200] * 4], np.uint8), 8, 0)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([grey] * 3 + [np.full((8, 8), 255, np.uint8)]))
    clear.putpixel((0, 0), (9, 9, 9, 0))
    cmyk = Image.fromarray(grey).convert("RGB").convert("CMYK")
    files = [(deep, "PNG", 40), (deep, "TIFF", 40), (deep, "PPM", 40), (cmyk, "TIFF", 40),
             (Image.fromarray(grey), "PNG", 40), (clear, "PNG", 255),
             (clear.convert("LA"), "PNG", 255)]  # what is transparent is white
    for image, form, corner in files:
        x = decode(encoded(image, form), None, 3)
        assert (x[:, 1:] == grey[1:]).all(), (image.mode, form)
        assert (x[:, 0, 0] == corner).all(), (image.mode, form)


def test_the_thousand_wnids_are_numbered_in_their_order(tmp_path):
    wnids = [f"n{w:08d}" for w in np.random.default_rng(0).choice(10**8, 1000, replace=False)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        for i, wnid in enumerate(wnids):
            z.writestr(f"{wnid}/{wnid}_{i}.PNG", encoded(Image.new("L", (2, 2), i % 256)))
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out")
    assert data.meta["classes"] == sorted(wnids) and (data.labels == np.arange(1000)).all()
    assert (data.images[:, 0, 0, 0] == np.argsort(wnids) % 256).all()


def test_bad_sources_get_one_line(tmp_path, folder):
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(model.UsageError, match="neither a folder nor a whole .zip"):
        prepare_data.prepare(tmp_path / "cut.zip", tmp_path / "o")
    with pytest.raises(model.UsageError, match="nowhere: neither a folder nor a whole .zip"):
        prepare_data.prepare(tmp_path / "nowhere", tmp_path / "o")
    with pytest.raises(model.UsageError, match="which folders are the classes.*src/ant/0.png is"):
        prepare_data.prepare(folder.parent, tmp_path / "o")
    picture((9, 8)).save(folder / "bee" / "9.png")
    with pytest.raises(model.UsageError, match="give one --size"):
        prepare_data.prepare(folder, tmp_path / "o")
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(model.UsageError, match="a pipe or a device"):
        prepare_data.prepare(tmp_path / "pipe.zip", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(model.UsageError, match="no images"):
        prepare_data.prepare(tmp_path / "empty", tmp_path / "o")
    (folder / "bee" / "9.png").unlink()
    with pytest.raises(model.UsageError, match="o/train.tmp is of other images or options"):
        prepare_data.prepare(folder, tmp_path / "o")
    shutil.rmtree(tmp_path / "o")
    prepare_data.prepare(folder, tmp_path / "d")
    for change in (dict(size=4), dict(channels=1)):
        with pytest.raises(model.UsageError, match="is of other images or options"):
            prepare_data.prepare(folder, tmp_path / "d", **change)
    for p in folder.rglob("*.png"):
        p.write_bytes(b"not an image")
    with pytest.raises(model.UsageError, match="none of the images"):
        prepare_data.prepare(folder, tmp_path / "o", skip_broken=True)


def test_damaged_prepared_data_is_refused(tmp_path, prepared_digits):
    with pytest.raises(model.UsageError, match="no prepared data"):
        prepare_data.Dataset(tmp_path)
    shutil.copytree(prepared_digits / "train", tmp_path / "train")

    def refused(name, write):
        whole = (tmp_path / "train" / name).read_bytes()
        write(tmp_path / "train" / name)
        with pytest.raises(model.UsageError, match="train: cannot be read, prepare it again"):
            prepare_data.Dataset(tmp_path)
        (tmp_path / "train" / name).write_bytes(whole)

    labels = np.load(tmp_path / "train/labels.npy")
    for bad in (labels[:-1], labels + 1, labels - 1, labels[::-1], np.maximum(labels, 1)):
        refused("labels.npy", lambda path: np.save(path, bad))
    for size in (1000, 1442 * 64 + 1):
        refused("images.bin", lambda path: os.truncate(path, size))
    meta = json.loads((tmp_path / "train/meta.json").read_text())
    for change in (dict(kind="sounds"), dict(kind="latents"), dict(shape=[1442, 64]), dict(shape=7),
                   dict(classes=meta["classes"][1:]), dict(classes="0123456789")):
        refused("meta.json", lambda path: path.write_text(json.dumps(meta | change)))
    for content in (b"", b"[]", b'{"kind": "pixels"}'):
        refused("meta.json", lambda path: path.write_bytes(content))
    for content in (b"", b"\x93NUMPY\x01\x00v\x00"):
        refused("labels.npy", lambda path: path.write_bytes(content))
    prepare_data.Dataset(tmp_path)


def test_draws(digits):
    rng = np.random.default_rng(0)
    for label in range(10):
        ids = digits.draw(label, 100, rng)
        assert len(set(ids.tolist())) == 100 and (digits.labels[ids] == label).all()
    assert len(set(digits.draw_any(len(digits), rng).tolist())) == len(digits)
    more = digits.draw(0, digits.count[0] + 1, rng)  # of a small class, some several times
    assert len(more) == digits.count[0] + 1 and (digits.labels[more] == 0).all()
    x = digits.batch([5, 5, 900], np.array([2, 3, 5]), flip=True)  # mirrored by an odd seed
    plain = digits.batch([5, 5, 900])
    assert torch.equal(x, torch.stack([plain[0], plain[1].flip(2), plain[2].flip(2)]))


def test_fresh_ids_go_through_every_epoch_once(prepared_digits, digits):
    """An epoch is a permutation, epochs differ, any place in the row can be started from."""
    n = len(digits)
    row = np.concatenate([digits.fresh(i * 100, 100, seed=3) for i in range(45)])
    for epoch in range(3):
        assert sorted(row[epoch * n:epoch * n + n].tolist()) == list(range(n))
    assert not np.array_equal(row[:n], row[n:2 * n])
    again = prepare_data.Dataset(prepared_digits)
    assert np.array_equal(again.fresh(2000, 3500 - 2000, seed=3), row[2000:3500])
    assert np.array_equal(again.fresh(0, 3 * n, seed=3), row[:3 * n])  # more than one epoch
    assert not np.array_equal(again.fresh(0, n, seed=4), row[:n])


def test_prefetch_is_one_ahead_in_order_and_raises_what_was_raised():
    computed = []
    ahead = threading.Event()

    def function(step):
        computed.append(step)
        if step == 4:
            ahead.set()
        if step == 7:
            raise ValueError("step 7")
        return step * 10

    with ThreadPoolExecutor(1) as thread:
        steps = prepare_data.prefetch(thread, function, range(3, 10))
        assert next(steps) == 30 and ahead.wait(5)  # 4 is computed while its user works on 3
        time.sleep(0.05)
        assert computed == [3, 4]                   # and 5 is not: nothing gets lost but one
        assert [next(steps) for _ in range(3)] == [40, 50, 60]
        with pytest.raises(ValueError, match="step 7"):
            next(steps)
        assert list(prepare_data.prefetch(thread, str, [])) == []
        assert list(prepare_data.prefetch(thread, str, [1])) == ["1"]


# --------------------------------------------------------------------------------------------
# Latents, with a VAE of SD's kind that is small and untrained

@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """110 smooth pictures of 80x64 in four classes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(110):
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        path = folder / f"class{i % 4}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        small.resize((80, 64), Image.Resampling.BICUBIC).save(path)
    return folder


def test_threads_read_a_zip_together(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for p in photos.rglob("*.png"):
            z.write(p, p.relative_to(photos))
    prepare_data.prepare(tmp_path / "x.zip", tmp_path / "zip", 64)
    prepare_data.prepare(photos, tmp_path / "folder", 64)
    assert files_of(tmp_path / "zip/train") == files_of(tmp_path / "folder/train")


def command(photos, vae, out):
    return ["latents", "--data", str(photos), "--out", str(out), "--vae", str(vae), "--size", "64"]


def prepare_as_rank(rank, n, port, words):
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=n, RANK=rank,
                 LOCAL_RANK=rank, LOCAL_WORLD_SIZE=n)
    os.environ.update({key: str(value) for key, value in place.items()})
    model.start_processes()
    prepare_data.main(words)
    torch.distributed.destroy_process_group()


@pytest.fixture
def start():
    """Starts n processes of prepare_data.py, as torchrun does.

    They are forks of a process that has imported everything and computed nothing. Forks of this
    one would share tqdm's lock with it, and be killed while they hold it.
    """
    processes = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_data", "diffusers.models.autoencoders.autoencoder_kl"])

    def start(n, words):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(n):
            process = context.Process(target=prepare_as_rank, args=(rank, n, port, words))
            process.start()
            processes.append(process)
        return processes

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def prepared(photos, vae, tmp_path_factory):
    """By one process that nothing disturbs; all others must give the same bytes."""
    out = tmp_path_factory.mktemp("prepared")
    prepare_data.main(command(photos, vae, out))
    return out


def test_latents_are_the_vaes_scaled_mean_and_std_of_both_views(prepared, photos, vae):
    data = prepare_data.Dataset(prepared)
    assert data.images.dtype == np.float16 and data.images.shape == (110, 2, 8, 8, 8)
    assert data.shape == (4, 8, 8)
    net = model.load_vae(vae).net
    image = Image.open(photos / "class1/005.png").crop((8, 0, 72, 64))  # the second of its class
    x = torch.from_numpy(np.asarray(image).transpose(2, 0, 1)[None] / np.float32(127.5) - 1)
    for view, pixels in enumerate((x, x.flip(3))):
        with torch.no_grad():
            posterior = net.encode(pixels).latent_dist
        stored = torch.from_numpy(data.images[28 + 1, view].astype(np.float32))
        assert relative_error(stored[:4], posterior.mean[0] * 0.18215) < 3e-4
        assert relative_error(stored[4:], posterior.std[0] * 0.18215) < 3e-4


def test_latents_are_drawn_anew_and_each_from_its_own_seed(prepared):
    data = prepare_data.Dataset(prepared)
    ids = np.array([3, 50, 3, 77])
    mean, std = torch.from_numpy(data.images[ids]).float().chunk(2, 2)
    assert torch.equal(data.batch(ids), mean[:, 0])
    x = data.batch(ids, np.random.default_rng(0))
    assert torch.equal(x, data.batch(ids, np.random.default_rng(0)))
    assert not torch.equal(x[0], x[2])
    draws = torch.stack([data.batch(ids, np.random.default_rng(i)) for i in range(400)])
    z = (draws - mean[:, 0]) / std[:, 0]
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01

    seeds = np.random.default_rng(1).integers(1 << 63, size=4)
    flipped = data.batch(ids, seeds, flip=True)
    alone = data.batch(ids[2:3], seeds[2:3], flip=True)
    assert torch.equal(alone[0], flipped[2])  # whatever else is in the batch
    for i, seed in enumerate(seeds):
        noise = (flipped[i] - mean[i, seed % 2]) / std[i, seed % 2]
        stream = torch.Generator().manual_seed(int(seed))
        assert torch.allclose(noise, torch.randn(4, 8, 8, generator=stream), atol=1e-2)


def test_two_processes_make_the_same_latents_as_one(prepared, photos, vae, start, tmp_path):
    for process in start(2, command(photos, vae, tmp_path)):
        process.join(60)
        assert process.exitcode == 0
    assert files_of(tmp_path / "train") == files_of(prepared / "train")


def test_broken_images_leave_no_trace_in_latents(prepared, photos, vae, tmp_path):
    shutil.copytree(photos / "class0", tmp_path / "src/class0")
    (tmp_path / "src/class0/008.png").write_bytes(b"broken")
    prepare_data.prepare(tmp_path / "src", tmp_path / "out", skip_broken=True,
                         latents=prepare_data.Latents(vae, 64))
    data = prepare_data.Dataset(tmp_path / "out")
    assert np.array_equal(data.images, np.delete(prepare_data.Dataset(prepared).images[:28], 2, 0))


def test_crops_depend_on_seed_image_and_number_alone(photos, vae, tmp_path):
    shutil.copytree(photos / "class0", tmp_path / "src/class0")
    stored = {}
    for crops, seed in ((1, 0), (3, 0), (1, 1)):
        latents = prepare_data.Latents(vae, 64, crops=crops, seed=seed)
        prepare_data.prepare(tmp_path / "src", tmp_path / f"{crops}{seed}", latents=latents)
        stored[crops, seed] = prepare_data.Dataset(tmp_path / f"{crops}{seed}")
    data = stored[3, 0]
    assert data.images.shape == (28, 3, 8, 8, 8) and data.meta["views"] == "crops"
    assert np.array_equal(stored[1, 0].images[:, 0], data.images[:, 0])
    assert not np.array_equal(stored[1, 1].images, stored[1, 0].images)
    latents = prepare_data.Latents(vae, 64, crops=1)
    photo = Image.open(photos / "class0/000.png")
    assert not np.array_equal(latents.views(photo, 0), latents.views(photo, 1))
    x = data.batch(np.zeros(300, np.int64), np.random.default_rng(0))
    mean = torch.from_numpy(data.images[0, :, :4].astype(np.float32))
    nearest = torch.cdist(x.flatten(1), mean.flatten(1)).argmin(1).bincount(minlength=3)
    assert (nearest > 70).all()


def test_bad_latents_and_options_get_one_line(photos, vae, tmp_path):
    with pytest.raises(model.UsageError, match="--size 60 must be divisible by 8"):
        prepare_data.Latents(vae, 60)
    latents = prepare_data.Latents(vae, 64)
    latents.vae.net.encoder.conv_in.bias.data.fill_(float("nan"))
    with pytest.raises(model.UsageError, match="not finite"):
        prepare_data.prepare(photos, tmp_path, latents=latents)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(model.UsageError, match="no place to write"):  # before the VAE is read
        prepare_data.main(command(photos, "no_such_vae", tmp_path / "file"))
    for words in ("latents", "latents --data x --out y --channels 1", "--data x",
                  "pixels --data x --out y --crops 2", "latents --data x --out y --crops -1"):
        with pytest.raises(SystemExit):
            prepare_data.parse(words.split())
    assert prepare_data.parse(["--data", "x", "--out", "y"]).kind == "pixels"


# --------------------------------------------------------------------------------------------
# Interruptions and mistakes

def test_a_broken_image_is_named_and_skipped_only_by_flag(tmp_path, folder, capsys):
    whole = (folder / "ant/0.png").read_bytes()
    for name in ("ant/0.png", "bee/2.png"):  # the very first, and one amidst
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    with pytest.raises(model.UsageError, match="2 broken images.*--skip_broken"):
        prepare_data.prepare(folder, tmp_path / "out")
    said = capsys.readouterr().out
    assert "ant/0.png: cannot be read (" in said and "bee/2.png: cannot be read (" in said
    assert not (tmp_path / "out/train").exists()
    shutil.copytree(tmp_path / "out", tmp_path / "mended")

    prepare_data.prepare(folder, tmp_path / "out", skip_broken=True)
    assert "2 broken ones left out" in capsys.readouterr().out
    data = prepare_data.Dataset(tmp_path / "out")
    assert data.count.tolist() == [1, 3, 3]
    assert data.meta["skipped"] == ["ant/0.png", "bee/2.png"]
    good = [p for p in sorted(folder.rglob("*.png")) if p.stat().st_size > 60]
    wanted = [decode(p.read_bytes(), None, 3) for p in good]
    assert np.array_equal(data.images, wanted)

    (folder / "ant/0.png").write_bytes(whole)
    prepare_data.prepare(folder, tmp_path / "mended", skip_broken=True)
    assert prepare_data.Dataset(tmp_path / "mended").count.tolist() == [2, 3, 3]


def test_interrupted_before_the_folder_gets_its_name(tmp_path, folder, monkeypatch):
    (folder / "bee/1.png").write_bytes(b"broken")
    prepare_data.prepare(folder, tmp_path / "whole", skip_broken=True)
    rename = prepare_data.Path.rename

    def stop(path, target):
        if path.name == "train.tmp":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(prepare_data.Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.prepare(folder, tmp_path / "out", skip_broken=True)
    monkeypatch.undo()
    prepare_data.prepare(folder, tmp_path / "out", skip_broken=True)
    assert files_of(tmp_path / "out/train") == files_of(tmp_path / "whole/train")


def test_a_full_disk_keeps_what_is_done(tmp_path, folder, monkeypatch):
    for i in range(40):
        path = tmp_path / f"many/{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture((64, 64), seed=i).save(path)
    fsync = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == 4:  # meta.json, done, the first block, and then the second
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):  # run_script makes one line of it
        prepare_data.prepare(tmp_path / "many", tmp_path / "out")
    monkeypatch.undo()
    done = tmp_path / "out/train.tmp/done"
    assert [mark > 0 for mark in np.fromfile(done, np.uint32)] == [True, False, False]
    shutil.copytree(tmp_path / "out", tmp_path / "torn")
    (tmp_path / "torn/train.tmp/done").write_bytes(b"")  # says of no block that it is missing
    prepare_data.prepare(tmp_path / "many", tmp_path / "torn")
    prepare_data.prepare(tmp_path / "many", tmp_path / "out")
    prepare_data.prepare(tmp_path / "many", tmp_path / "at_once")
    assert files_of(tmp_path / "torn/train") == files_of(tmp_path / "at_once/train")
    assert files_of(tmp_path / "out/train") == files_of(tmp_path / "at_once/train")

def test_killed_and_resumed_on_another_number_of_processes(prepared, photos, vae, start, tmp_path):
    """SIGKILL both after some blocks; one goes on, with what they had finished and nothing else."""
    partial = tmp_path / "train.tmp"
    two = start(2, command(photos, vae, tmp_path))
    done = np.zeros(1)
    began = time.time()
    while np.count_nonzero(done) < 2:
        assert all(process.is_alive() for process in two) and time.time() - began < 60
        time.sleep(0.001)
        if (partial / "done").exists():
            done = np.fromfile(partial / "done", np.uint32)
    for process in two:
        process.kill()
        process.join()
    done = np.fromfile(partial / "done", np.uint32)
    assert 2 <= np.count_nonzero(done) < len(done) and not (tmp_path / "train").exists()
    images = np.memmap(partial / "images.bin", np.uint8, "r+").reshape(110, -1)
    for block in np.flatnonzero(done == 0):  # what has no mark is not trusted
        images[16 * block:16 * block + 16] = 255
    images.flush()
    written = (partial / "images.bin").stat().st_ino
    prepare_data.main(command(photos, vae, tmp_path))
    assert files_of(tmp_path / "train") == files_of(prepared / "train")
    assert (tmp_path / "train/images.bin").stat().st_ino == written  # it was not begun anew


def test_a_bug_in_a_loader_is_not_a_broken_image(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(prepare_data, "open_image", lambda data: data.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        prepare_data.prepare(folder, tmp_path / "out", skip_broken=True)


def test_changed_images_are_not_taken_for_those_of_before(tmp_path, folder, monkeypatch):
    """The size stays, as in a .bmp, and the time goes back; a copy has another name."""
    for path in folder.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    prepare_data.prepare(folder, tmp_path / "out")
    before = files_of(tmp_path / "out/train")
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    prepare_data.prepare(tmp_path / "copy", tmp_path / "out")
    changed = folder / "bee/1.bmp"
    times = changed.stat()
    picture((8, 8), seed=77).save(changed)
    os.utime(changed, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(model.UsageError, match="of other images or options"):
        prepare_data.prepare(folder, tmp_path / "out")
    assert files_of(tmp_path / "out/train") == before
    meta = json.loads(before["meta.json"])
    del meta["content"]  # data of before it was kept are accepted
    (tmp_path / "out/train/meta.json").write_text(json.dumps(meta))
    prepare_data.prepare(folder, tmp_path / "out")

    # Of an unfinished split the block is made again.
    monkeypatch.setattr(prepare_data, "finish", lambda *args: None)
    prepare_data.prepare(tmp_path / "copy", tmp_path / "half")
    monkeypatch.undo()
    prepare_data.prepare(folder, tmp_path / "half")
    prepare_data.prepare(folder, tmp_path / "at_once")
    assert files_of(tmp_path / "half/train") == files_of(tmp_path / "at_once/train")


@pytest.mark.parametrize("place", ["train", "train.tmp"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"kind": "pixels"}', b"[" * 100000, b"\xff"])
def test_damaged_meta_of_the_output_gets_one_line(tmp_path, folder, place, content):
    (tmp_path / "out" / place).mkdir(parents=True)
    (tmp_path / "out" / place / "meta.json").write_bytes(content)
    with pytest.raises(model.UsageError, match=f"{place}/meta.json: cannot be read, remove"):
        prepare_data.prepare(folder, tmp_path / "out")


def test_two_at_once_and_places_that_cannot_be_written_to(tmp_path, folder):
    with prepare_data.claim(tmp_path / "out"):
        with pytest.raises(model.UsageError, match="another run writes to .*out"):
            prepare_data.prepare(folder, tmp_path / "out")
    prepare_data.prepare(folder, tmp_path / "out")
    with prepare_data.claim(tmp_path / "out"):
        prepare_data.prepare(folder, tmp_path / "out")  # writes nothing
    (tmp_path / "file").write_bytes(b"")
    for out in ("/", "/proc/x", tmp_path / "file", tmp_path / "file/x"):
        with pytest.raises(model.UsageError, match="no place to write to"):
            prepare_data.prepare(folder, out)


# --------------------------------------------------------------------------------------------
# Sources

LAYOUTS = {  # files -> {split: {class: images}}, or what is said
    "Training/a/1.png Training/b/1.png TESTING/a/1.png": {"train": "a1 b1", "test": "a1"},
    "train/a/1.png valid/a/1.png test/a/1.png": {"train": "a1", "val": "a1", "test": "a1"},
    "train/a/1.png eval/a/1.png docs/1.png x.png":
        {"train": "a1", "val": "a1", "out": "docs, x.png"},
    "test/a/1.png a/1.png": "neither splits nor classes",
    "train/a/1.png training/a/1.png": "two folders are the split train",
    "train/1.png bus/1.png": {"train": "bus1 train1"},
    "1.png 2.JPG": {"train": "images2", "out": "without class folders"},
    "train/1.png test/1.png": {"train": "images1", "test": "images1"},
    "train/a/1.png test/1.png": {"train": "a1", "out": "test is left out"},
    "train/a/i/1.png train/b/i/1.png val/i/1.png": {"train": "a1 b1", "out": "val is left out"},
    "a/1.png 1.png": "which folders are the classes.* 1.png is elsewhere",
    "p/a/1.png p/b/1.png p/1.png": "which folders are the classes",
    "p/a/1.png q/b/1.png": "which folders are the classes",
    "train/p/a/1.png train/p/b/1.png": "which folders are the classes",
    "a/1.png a/.x/1.png .b/1.png @eaDir/1.png __MACOSX/a/1.png b/@x/1.png b/.y.png":
        {"train": "a1"},
    "a/1.jfif a/2.jpe a/3.avif a/4.ppm a/5.txt a/6.md b/ c/x.csv":
        {"train": "a4", "out": "3 files are no images and left out: .csv, .md, .txt"},
    "a/1.png b/ c/d/": {"train": "a1", "out": "folders without images: b/, c/"}}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("files", LAYOUTS)
def test_layouts(tmp_path, files, kind, capsys):
    source = tmp_path / ("x.zip" if kind == "zip" else "x")
    for name in files.split():
        if kind == "zip":
            with zipfile.ZipFile(source, "a") as archive:
                archive.writestr(name, b"")
        elif name.endswith("/"):
            (source / name).mkdir(parents=True)
        else:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(b"")
    right = LAYOUTS[files]
    if isinstance(right, str):
        with pytest.raises(model.UsageError, match=right):
            prepare_data.open_source(source)
        return
    splits, _ = prepare_data.open_source(source)
    found = {}
    for split, items in splits.items():
        classes = [label for label, _ in items]
        found[split] = " ".join(f"{label}{classes.count(label)}" for label in sorted(set(classes)))
    said = capsys.readouterr().err
    right = dict(right)
    assert right.pop("out", "") in said
    assert found == right


def test_links_pipes_and_names(tmp_path, folder, capsys):
    (folder / "cat").symlink_to(folder / "bee")       # bee is read by its own name
    (folder / "up").symlink_to(folder.parent)
    (folder / "ant/here").symlink_to(folder)
    (folder / "ant/nothing.png").symlink_to("nowhere")
    (tmp_path / "far").mkdir()
    picture((8, 8)).save(tmp_path / "far/0.png")
    (folder / "far").symlink_to(tmp_path / "far")
    os.mkfifo(folder / "ant/pipe.png")
    splits, _ = prepare_data.open_source(folder)
    classes = [label for label, _ in splits["train"]]
    assert {c: classes.count(c) for c in classes} == {"ant": 2, "bee": 4, "far": 1, "zebra": 3}
    said = capsys.readouterr().err
    assert "2 files are no images and left out: .png (a pipe, a device or a link to no" in said
    assert "without images: ant/here/, cat/, up/" in said
    (folder / "bee" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(model.UsageError, match="not UTF-8"):
        prepare_data.open_source(folder)


def test_numbered_classes_are_in_natural_order(tmp_path, capsys):
    for c in range(12):
        (tmp_path / "src" / f"c{c}").mkdir(parents=True)
        Image.new("L", (2, 2), c).save(tmp_path / "src" / f"c{c}" / "0.png")
    prepare_data.prepare(tmp_path / "src", tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out")
    assert data.images[:, 0, 0, 0].tolist() == data.labels.tolist() == list(range(12))
    assert data.meta["classes"] == [f"c{c}" for c in range(12)]
    assert "10 c10, 11 c11" in capsys.readouterr().err


def test_images_that_are_refused_by_a_reason(monkeypatch):
    grey = np.full((8, 8), 100)
    for dtype in (np.int32, np.float32):
        with pytest.raises(prepare_data.BrokenImage, match="unknown range"):
            decode(encoded(Image.fromarray(grey.astype(dtype)), "TIFF"), None, 3)
    with pytest.raises(prepare_data.BrokenImage, match="too long for --size 256"):
        decode(encoded(Image.new("L", (1, 10000)), "PNG"), 256, 3)
    monkeypatch.setattr(prepare_data, "MAX_PIXELS", 1000)
    with pytest.raises(prepare_data.BrokenImage, match="40 x 30 pixels, more than MAX_PIXELS"):
        decode(encoded(Image.new("1", (40, 30))), 256, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_heeded_whatever_else_is_wrong(orientation):
    """Against PIL's own turning, which fails at a resolution of -1/0."""
    tags = struct.pack("<HHIIHHII", 0x112, 3, 1, orientation, 0x11A, 10, 1, 38)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4) + struct.pack("<iI", -1, 0)
    image = picture((8, 6))
    whole = Image.Exif()
    whole[0x112] = orientation
    right = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, "PNG", exif=whole))))
    x = decode(encoded(image, "PNG", exif=exif), None, 3)
    assert np.array_equal(x.transpose(1, 2, 0), np.asarray(right))


def test_members_of_a_zip_that_cannot_be_read_are_broken_images(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("good", "locked", "strange"):
            archive.writestr(f"a/{name}.png", encoded(picture((8, 8))))
        archive.writestr("a/bomb.png", bytes(10**6))
    data = bytearray(path.read_bytes())
    for name, flag, value in ((b"locked", 6, 1), (b"strange", 8, 99)):
        data[data.index(b"a/" + name) - 30 + flag] = value       # in the member's header
        data[data.rindex(b"a/" + name) - 46 + flag + 2] = value  # in the directory
    path.write_bytes(data)
    monkeypatch.setattr(prepare_data, "MAX_BYTES", 10**5)
    _, load = prepare_data.open_source(path)
    assert load("a/good.png").size == (8, 8)
    for name, reason in dict(locked="encrypted", strange="compression", bomb="MAX_BYTES").items():
        with pytest.raises(prepare_data.BrokenImage, match=reason):
            load(f"a/{name}.png")


def write_idx(path, array):
    data = struct.pack(f">{array.ndim + 1}I", 2048 + array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_files(tmp_path, ending):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 30), ("t10k", 7)):
        images = rng.integers(0, 256, (n, 5, 5), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8) % 3
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{ending}", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{ending}", labels)
    prepare_data.prepare(tmp_path, tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out", "test")
    assert np.array_equal(data.images[:, 0], images[np.argsort(labels, kind="stable")])
    assert data.meta["classes"] == ["0", "1", "2"]
    assert len(prepare_data.Dataset(tmp_path / "out")) == 30
    (tmp_path / f"t10k-labels-idx1-ubyte{ending}").unlink()
    with pytest.raises(model.UsageError, match="lacks t10k-labels-idx1-ubyte"):
        prepare_data.open_source(tmp_path)
    (tmp_path / f"t10k-images-idx3-ubyte{ending}").unlink()
    assert prepare_data.open_source(tmp_path)[0].keys() == {"train"}
    file = tmp_path / f"train-labels-idx1-ubyte{ending}"
    write_idx(file, np.zeros(29, np.uint8))
    with pytest.raises(model.UsageError, match="30 images, but .*29 labels"):
        prepare_data.open_source(tmp_path)
    for damage in (b"", file.read_bytes()[:20]):
        file.write_bytes(damage)
        with pytest.raises(model.UsageError, match="train-labels-idx1.*not an idx file"):
            prepare_data.open_source(tmp_path)


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("fine", [False, True])
def test_cifar(tmp_path, fine):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 4, 3073 + fine), dtype=np.uint8)
    rows[:, :, int(fine)] = rng.integers(0, 2, (6, 4))
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files = {name: x.tobytes() for name, x in zip(names, rows)}
    files["batches.meta.txt"] = b"frog\nship\n\n"
    if fine:
        files = {"train.bin": rows[:5].tobytes(), "test.bin": rows[5].tobytes(),
                 "fine_label_names.txt": b"frog\nship\n", "coarse_label_names.txt": b"x\n"}
    write_tar(tmp_path / "c.tar.gz", files)
    prepare_data.prepare(tmp_path / "c.tar.gz", tmp_path / "out")
    data = prepare_data.Dataset(tmp_path / "out")
    train = rows[:5].reshape(20, -1)
    order = np.argsort(train[:, int(fine)], kind="stable")
    assert np.array_equal(data.images.reshape(20, -1), train[order, 1 + fine:])
    assert data.meta["classes"] == ["frog", "ship"]
    assert data.labels.tolist() == sorted(train[:, int(fine)].tolist())
    assert len(prepare_data.Dataset(tmp_path / "out", "test")) == 4
    name = "test.bin" if fine else "test_batch.bin"
    write_tar(tmp_path / "c.tar.gz", files | {name: files[name][:-1]})
    with pytest.raises(model.UsageError, match="no whole binary archive of CIFAR"):
        prepare_data.open_source(tmp_path / "c.tar.gz")


def test_cifars_pickles_are_refused(tmp_path):
    write_tar(tmp_path / "c.tar.gz", {"data_batch_1": b"pickle", "batches.meta": b"pickle"})
    with pytest.raises(model.UsageError, match="take cifar-10-binary.tar.gz"):
        prepare_data.open_source(tmp_path / "c.tar.gz")


def test_images_in_the_folder_to_write_are_no_prepared_data(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "1.png")
    with pytest.raises(model.UsageError, match="train is there, and is no prepared data"):
        prepare_data.prepare(tmp_path, tmp_path)


def test_cached_latents_become_ours_without_a_vae(tmp_path, capsys):
    draws = np.random.default_rng(0).standard_normal((2, 10, 8, 8, 4)).astype(np.float32)
    np.save(tmp_path / "train_moments.npy", draws[0])
    np.save(tmp_path / "train_moments_flip.npy", draws[1])
    np.save(tmp_path / "train_targets.npy", np.arange(10)[::-1] % 2)
    prepare_data.main(["latents", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "noise is fixed" in capsys.readouterr().err
    data = prepare_data.Dataset(tmp_path / "out")
    right = torch.from_numpy(draws[:, 1]).permute(0, 3, 1, 2)  # the first of class 0
    x = data.batch([0, 0], np.array([2, 3]), flip=True)
    assert relative_error(x, right) < 1e-3
    with pytest.raises(model.UsageError, match="--size and --channels are of images"):
        prepare_data.prepare(tmp_path, tmp_path / "sized", size=64)
    with pytest.raises(SystemExit):
        prepare_data.parse(["latents", "--data", str(tmp_path), "--out", "x", "--crops", "2"])
    assert data.shape == (4, 8, 8) and data.count.tolist() == [5, 5]
    np.save(tmp_path / "train_moments.npy", draws[0] / 0.18215)
    with pytest.raises(model.UsageError, match="are they multiplied by 0.18215"):
        prepare_data.open_source(tmp_path)


# --------------------------------------------------------------------------------------------
# Random crops

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
    left, top, right, bottom = prepare_data.random_crop(250, 20, 0.9, rng)  # too long for the ratio
    assert 0 <= left < right <= 250 and 0 <= top < bottom <= 20


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
