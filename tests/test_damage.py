"""Foreign and damaged files: refused by name in one line, or read as if nothing were wrong.

    pytest tests/test_damage.py                                # 150 mutations of each kind of file
    DAMAGE_MUTATIONS=5000 pytest tests/test_damage.py -k mutations
    python tests/test_damage.py 17 0.png                       # one of them again
"""
import contextlib
import io
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, random_artifact  # first: it says where the scripts are
import fid
import model
import prepare_data
import sample
from model import UsageError

MUTATIONS = int(os.environ.get("DAMAGE_MUTATIONS", 150))


# --------------------------------------------------------------------------------------------
# Inputs from other projects' bug reports, each with what is right. (Of fourteen two are elsewhere:
# a damaged EXIF with an orientation in test_data.py, .npz of other axes in test_fid.py.)

def pictures(root, words, size=(4, 4)):
    """"cat:3" -> root/cat/0.png to 2.png, all of a grey that follows from `cat`."""
    for word in words.split():
        name, count = word.split(":")
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(int(count)):
            grey = sum(Path(name).name.encode()) % 256
            Image.new("L", size, grey).save(root / name / f"{i}.png")
    return root


def read_by_both(source, out):
    """{split: {class: images}}. Every class has its pictures; fid.py reads the same as training."""
    prepare_data.prepare(source, out)
    splits = {}
    for folder in out.glob("[!.]*"):
        data = prepare_data.Dataset(out, folder.name)
        classes = data.meta["classes"]
        greys = np.array([sum(name.encode()) % 256 for name in classes])[data.labels]
        assert (data.images == greys[:, None, None, None]).all()
        splits[folder.name] = " ".join(f"{name}:{n}" for name, n in zip(classes, data.count))
    count, read = fid.open_images(source)
    images = prepare_data.Dataset(out).images
    assert sorted(map(bytes, images)) == sorted(map(bytes, read(range(count)).numpy()))
    return splits


NUMBERED = " ".join(f"{c}:2" for c in range(12))


@pytest.mark.parametrize("words, right, said", [
    ("training/0:3 training/1:3 testing/0:3", dict(train="0:3 1:3", test="0:3 1:0"), ""),
    ("train/a:3 valid/a:3 test/a:3", dict(train="a:3", val="a:3", test="a:3"), ""),
    ("train/a:3 train/b:3 test/a:3 docs:1", dict(train="a:3 b:3", test="a:3 b:0"), "splits: docs"),
    ("cat:3 dog:3 .ipynb_checkpoints:1 cat/.ipynb_checkpoints:1", dict(train="cat:3 dog:3"), ""),
    (NUMBERED, dict(train=NUMBERED), "9 9, 10 10, 11 11")])
def test_what_a_class_and_a_split_are(tmp_path, words, right, said, capsys):
    assert read_by_both(pictures(tmp_path / "x", words), tmp_path / "out") == right
    assert said in capsys.readouterr().err


def test_links_and_folders_of_folders(tmp_path):
    pictures(tmp_path / "linked", "dog:3")
    (tmp_path / "linked/cat").symlink_to(pictures(tmp_path / "far", "cat:3") / "cat")
    assert read_by_both(tmp_path / "linked", tmp_path / "out") == dict(train="cat:3 dog:3")
    nested = pictures(tmp_path / "nested", "animal/cat:3 animal/dog:3 vehicle/car:3 vehicle/bus:3")
    with zipfile.ZipFile(tmp_path / "top.zip", "w") as archive:
        for name in ("pets/cat/0.png", "pets/dog/0.png", "pets/preview.png"):
            archive.write(tmp_path / "far/cat/0.png", name)
    for source in (nested, tmp_path / "top.zip"):
        for read in (fid.open_images, prepare_data.open_source):
            with pytest.raises(UsageError, match=f"{source.name}: which folders are the classes"):
                read(source)


def test_images_that_are_something_else(tmp_path):
    with pytest.raises(UsageError, match="--size"):
        prepare_data.prepare(pictures(tmp_path / "wide", "a:4 b:4", (48, 32)), tmp_path / "o")
    images = {"int32.tiff": Image.fromarray(np.full((8, 8), 120, np.int32)),
              "float.tiff": Image.fromarray(np.full((8, 8), 0.5, np.float32)),
              "bomb.png": Image.new("1", (20000, 20000))}
    for name, image in images.items():
        folder = tmp_path / Path(name).stem
        folder.mkdir()
        image.save(folder / name)
        with pytest.raises(UsageError, match=f"{name}.* pixels"):
            fid.open_images(folder)
        with pytest.raises(UsageError, match=f"{name}.* pixels"):
            prepare_data.prepare(folder, tmp_path / "o")


def test_what_would_end_as_a_traceback_or_be_silent(tmp_path):
    """A link to itself, a TIFF that its own reader turns, EPS, two members of a name, devices."""
    source = pictures(tmp_path / "x", "cat:2 dog:2")
    (source / "self").symlink_to("self")
    assert read_by_both(source, tmp_path / "out") == dict(train="cat:2 dog:2")
    file = io.BytesIO()
    halves = np.repeat(np.uint8([[255, 0]]), 4, 1).repeat(8, 0)  # white on the left
    Image.fromarray(halves).save(file, "TIFF", tiffinfo={274: 6})
    assert (np.asarray(prepare_data.open_image(file.getvalue()))[..., 0] == halves.T).all()
    with pytest.raises(UsageError, match="cannot identify"):
        prepare_data.open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        for name in ("cat/0.png", r"cat\0.png"):
            archive.write(source / "cat/0.png", name)
    with pytest.raises(UsageError, match="two members are cat/0.png"):
        prepare_data.open_source(tmp_path / "twice.zip")
    with pytest.raises(UsageError, match="device"):
        sample.check_out(Path("/dev/zero"))
    for words in ("--seed 1" + 400 * "0", "--temperature 1e39", "--device tpu"):
        with pytest.raises(SystemExit):
            sample.parse(["--ckpt", "x", *words.split()])


def test_statistics_of_the_other_byte_order(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.arange(2, dtype=">f8"), sigma=np.eye(2, dtype=">f4"),
             features="pixels", resize="none")
    reference = fid.open_reference(fid.load_extractor("pixels"), tmp_path / "x.npz")
    assert reference["mu"].tolist() == [0, 1] and (reference["sigma"] == torch.eye(2)).all()


# --------------------------------------------------------------------------------------------
# Mutations of files of eight kinds, which are called by their names

VALUES = rb'1000000000 1e400 -1 0 1 2 4096 1.5 NaN Infinity "12" "" null true [] {} [1] {"a":1}'
JSON = [rb'"[^"]*"|[\w.+-]+', rb"\[[^][]*\]|\{[^{}]*\}", rb'"\w+": [^,]*,\s*']  # its parts


def make(folder):
    """Whole files."""
    rng = np.random.default_rng(0)
    sizes = dict(input_size=4, cond_dim=8, hidden_size=8, depth=1, num_heads=1, num_classes=3,
                 noise_classes=2, noise_coords=2, n_cls_tokens=1)
    random_artifact(folder / "flax", "gen", **sizes)
    net = model.Generator(in_channels=1, **sizes)
    net.origin = {"classes": ["cat", "dog", "eel"]}
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    net.save_pretrained(folder / "ours")
    rows = rng.standard_normal((9, 4))
    np.savez_compressed(folder / "ref.npz", mu=rows.mean(0), sigma=np.cov(rows.T), size=[2, 2],
                        real=np.float32(rows), features="pixels", resize="none")
    images = rng.integers(0, 256, (12, 4, 4, 3), np.uint8)
    np.savez(folder / "images.npz", arr_0=images)
    pictures(folder / "source", "cat:1 dog:2")
    Image.fromarray(images[0]).save(folder / "source/cat/0.png")
    shutil.make_archive(folder / "source", "zip", folder / "source")
    prepare_data.prepare(folder / "source", folder / "data")
    return [folder / name for name in (
        "flax/ema_params.msgpack", "ours/model.safetensors", "ours/config.json", "ref.npz",
        "images.npz", "source.zip", "source/cat/0.png", "data/train/meta.json")]


def read(file):
    """What the scripts go on with."""
    if file.name == "ref.npz":
        reference = fid.open_reference(fid.load_extractor("pixels"), file)
        return [reference[key] for key in ("mu", "sigma", "real", "size")]
    if file.parent.name in ("flax", "ours"):
        net = model.load_generator(file.parent)
        return [sample.generate(net, [0, 2], [0, 1], 1.5), len(net.origin.get("classes", []))]
    if file.name == "meta.json":
        data = prepare_data.Dataset(file.parent.parent)
        with contextlib.suppress(UsageError):  # of other images
            prepare_data.prepare(file.parents[2] / "source", file.parent.parent)
        return [data.images, data.labels, data.shape, data.num_classes, data.batch([0, 2])]
    source = file.parent.parent if file.suffix == ".png" else file
    images = None
    with contextlib.suppress(() if file.suffix == ".npz" else UsageError):  # prepare says the same
        count, read_images = fid.open_images(source)
        images = read_images(range(count))
    if file.suffix == ".npz":
        return [images]
    out = source.with_name("new")
    shutil.rmtree(out, ignore_errors=True)
    prepare_data.prepare(source, out)
    data = prepare_data.Dataset(out)
    return [data.images, data.labels, data.meta["classes"], images]


def change_bytes(data, rng):
    # Half of all damage is near names and headers, which are few of the bytes.
    places = np.arange(len(data))
    names = [range(m.start() - 12, m.end() + 12) for m in re.finditer(rb"[ -~]{4,}", data)]
    if names and rng.random() < 0.5:
        places = np.unique(np.concatenate(names).clip(0, len(data) - 1))
    start, other = rng.choice(places, 2).tolist()
    length = int(2 ** rng.uniform(0, np.log2(len(data))))
    flipped = bytes([data[start] ^ 1 << int(rng.integers(8))])
    words = [flipped, flipped, data[other:other + length], bytes(4), b"\xff" * 4,
             b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b""]
    new = words[rng.integers(len(words))]
    gone = [len(new), len(new), 0, length, len(data)][rng.integers(5)]
    return data[:start] + new + data[start + gone:]


def change_json(data, rng):
    """A value, a name, a list or a map becomes something else, or is put in twice, or left out."""
    parts = list(re.finditer(JSON[rng.integers(3)], data))
    start, end = parts[rng.integers(len(parts))].span()
    part = data[start:end]
    values = [*VALUES.split(), b"[" + part + b"]", part + b", " + part, b"", b""]
    return data[:start] + values[rng.integers(len(values))] + data[end:]


def change_member(data, rng):
    """Damage within a member of a zip or a chunk of a PNG; the checksum is that of the damage."""
    if data.startswith(b"PK"):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(out, "w") as after:
            names = [name for name in before.namelist() if not name.endswith("/")]
            damaged = rng.choice(names)
            for name in names:
                content = before.read(name)
                after.writestr(name, change_bytes(content, rng) if name == damaged else content)
        return out.getvalue()
    start = [m.start() for m in re.finditer(b"IHDR|IDAT|IEND", data)][rng.integers(3)]
    length, = struct.unpack(">I", data[start - 4:start])
    chunk = change_bytes(data[start:start + 4 + length], rng)
    size, crc = [struct.pack(">I", n) for n in (max(len(chunk) - 4, 0), zlib.crc32(chunk))]
    return data[:start - 4] + size + chunk + crc + data[start + 8 + length:]


def fault(file, rng, right):
    """Damages a file. What is wrong with the reading of it, or None."""
    checked = file.suffix not in (".msgpack", ".safetensors")  # there a number is a number
    change = change_bytes
    if file.suffix == ".json" and rng.random() < 0.7:
        change = change_json
    elif file.suffix in (".npz", ".zip", ".png") and rng.random() < 0.3:
        change = change_member
        checked = False
    file.write_bytes(change(file.read_bytes(), rng))
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result = read(file)
    except UsageError as error:
        if not re.search(f"{file.name}|{file.parent}|cat/|dog/|damaged weights",
                         f"{error}{said.getvalue()}"):
            return f"does not name the file: {error}"
        if re.search("MemoryError|allocate", f"{error}{error.__cause__!r}"):
            return f"takes all of the memory: {error}"
        return None
    except BaseException:
        return traceback.format_exc()
    if file.name == "config.json" and result[1] == 0:
        del result[1]  # checkpoints of before have no classes: nothing says that they were there
    if checked and not all(map(np.array_equal, result, right)):
        return f"a silent change by {file.read_bytes()}"


def work(numbers, kind=""):
    """Prints what is wrong with these mutations. The last line, if it is killed, says by which."""
    # Beyond what is mapped already: libraries of a CUDA build of torch take more than 4 GB.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (3 << 30), mapped + (3 << 30)))
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            files = make(Path(folder))
        for k, file in enumerate(files):
            whole = file.read_bytes()
            with contextlib.redirect_stdout(sys.stderr):
                right = read(file)
            for number in numbers if kind in file.name else ():
                print(file.name, number, flush=True)
                signal.alarm(20)
                wrong = fault(file, np.random.default_rng([k, number]), right)
                signal.alarm(0)
                file.write_bytes(whole)
                if wrong:
                    print(f"FAULT {file.name} {number}: {wrong}", flush=True)


def test_mutations():
    """On two processes, each of every other mutation, since imports take seconds."""
    workers = [subprocess.Popen([sys.executable, __file__, str(i)], stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, text=True) for i in range(2)]
    outputs = [worker.communicate()[0] for worker in workers]
    faults = re.findall("^FAULT.*$", "\n".join(outputs), re.M)
    for worker, output in zip(workers, outputs):
        if worker.returncode:
            faults.append(f"{output[-100:]}: ended with {worker.returncode}")
    assert not faults, "\n".join(["python tests/test_damage.py NUMBER FILE shows one", *faults])


# --------------------------------------------------------------------------------------------
# Two at once, and signals

def test_two_references_into_one_file_do_not_mix(tmp_path, monkeypatch):
    """While one is half-written another is begun and finished: each file was whole."""
    out = tmp_path / "ref.npz"
    words = {}
    for grey in (10, 200):
        data = f"{tmp_path}/{grey}.npz"
        np.savez(data, arr_0=np.full((8, 4, 4, 1), grey, np.uint8))
        words[grey] = ["ref", "--data", data, "--out", str(out), "--features", "pixels"]
    savez = np.savez

    def interrupted(file, **arrays):
        file.write(b"begun")
        subprocess.run([sys.executable, ROOT / "fid.py", *words[200]], check=True)
        assert np.allclose(np.load(out)["mu"], 200 / 127.5 - 1)
        file.seek(0)
        savez(file, **arrays)
    monkeypatch.setattr(np, "savez", interrupted)
    fid.main(words[10])
    assert np.allclose(np.load(out)["mu"], 10 / 127.5 - 1)
    assert sorted(os.listdir(tmp_path)) == ["10.npz", "200.npz", "ref.npz"]


# train.py, which waits in one of its functions.
WAITING = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import train
def wait(*args):
    print("WAITING", flush=True)
    time.sleep(60)
setattr(train, sys.argv.pop(1), wait)
sys.argv[0] = "train.py"
train.run_script(train.main)
"""
OPTIONS = ("--stage encoder --data data --base_channels 16 --layers 1 1 --batch_size 8 --warmup 2 "
           "--sample_every 100000 --save_every 100000 --device cpu").split()


def test_ctrl_c_and_head(tmp_path):
    prepare_data.prepare("digits", tmp_path / "data")
    processes = []

    def start(where, steps):
        """where: the function that waits, and the name of the run."""
        line = [*OPTIONS, "--out", where, "--steps", steps]
        processes.append(subprocess.Popen(
            [sys.executable, "-c", WAITING, ROOT, where, *line], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]

    def press(process, code):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code and "Traceback" not in err, err
        return out

    def wait_for_log(process, run):
        while not (tmp_path / run / "log.jsonl").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    try:
        head = start("head", "3")
        head.stdout.close()  # nobody reads its lines, as behind `| head`
        free, saving, early = [start(f, "100000") for f in ("no", "save_checkpoint", "resume")]
        wait_for_log(saving, "save_checkpoint")
        saving.send_signal(signal.SIGINT)
        wait_for_log(free, "no")
        said = re.findall("^no: stopped after step .* resumes from (.*)$", press(free, 0), re.M)
        assert (tmp_path / said[0] / "model.safetensors").is_file()
        for process in (early, saving):  # before training starts; a second press, while it saves
            assert "WAITING\n" in iter(process.stdout.readline, "")
            press(process, 130)
        assert not list(tmp_path.glob("save_checkpoint/step_*"))
        assert head.stderr.read() and head.wait(60) == 0
        assert (tmp_path / "head/step_00000003/model.safetensors").is_file()
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work([int(sys.argv[1])], sys.argv[2])
    else:
        work(range(int(sys.argv[1]), MUTATIONS, 2))
