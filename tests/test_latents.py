"""Latents: prepared by any number of processes, killed or not, and training on them."""
import multiprocessing
import time

import numpy as np
import pytest
import torch
from PIL import Image

import drift
import model
import prepare_data
import train
from conftest import FIXTURES, forked_ranks, relative_error, small_vae

CONVNEXT = str(FIXTURES / "convnextv2_tiny")


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


def command(photos, vae, out):
    words = ["latents", "--data", photos, "--vae", vae, "--size", 64, "--out", out]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def prepared(photos, vae, tmp_path_factory):
    """By one process that nothing disturbs; all others must give the same bytes."""
    out = tmp_path_factory.mktemp("prepared")
    prepare_data.main(command(photos, vae, out))
    return out


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_latents_are_the_vaes_scaled_mean_and_std_of_both_views(prepared, photos, vae):
    data = prepare_data.Dataset(prepared)
    assert data.images.dtype == np.float16 and data.images.shape == (110, 2, 8, 8, 8)
    assert data.shape == (4, 8, 8) and data.kind == "latents"
    net = model.load_vae(vae, sha256=data.meta["vae"]).net
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


@pytest.fixture
def start():
    """Starts n processes of prepare_data.py: forks of one that has imported everything."""
    processes = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_latents", "diffusers.models.autoencoders.autoencoder_kl"])

    def start(n, words):
        processes[:0] = forked_ranks(context, n, prepare_data.main, words)
        return processes[:n]

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("n", [1, 2])
def test_killed_and_resumed_on_another_number_of_processes(prepared, photos, vae, start, tmp_path,
                                                           n):
    """SIGKILL after some blocks; others go on, with what was finished and nothing else."""
    part = tmp_path / "train.tmp"
    first = start(n, command(photos, vae, tmp_path))
    done = np.zeros(1)
    began = time.time()
    while np.count_nonzero(done) < 2:
        assert all(process.is_alive() for process in first) and time.time() - began < 60
        time.sleep(0.001)
        if (part / "done").exists():
            done = np.fromfile(part / "done", np.uint32)
    for process in first:
        process.kill()
        process.join()
    done = np.fromfile(part / "done", np.uint32)
    assert 2 <= np.count_nonzero(done) < len(done) and not (tmp_path / "train").exists()
    images = np.memmap(part / "images.bin", np.uint8, "r+").reshape(110, -1)
    for block in np.flatnonzero(done == 0):  # what has no mark is not trusted
        images[16 * block:16 * block + 16] = 255
    images.flush()
    written = (part / "images.bin").stat().st_ino
    for process in start(3 - n, command(photos, vae, tmp_path)):
        process.join(60)
        assert process.exitcode == 0
    assert files_of(tmp_path / "train") == files_of(prepared / "train")
    assert (tmp_path / "train/images.bin").stat().st_ino == written  # it was not begun anew


def test_a_pixel_encoder_drives_a_generator_of_latents(prepared, vae, tmp_path):
    """The step's gradient is that of features of decoded samples; a run makes decoded pictures."""
    words = (f"--data {prepared} --out {tmp_path} --vae {vae} --encoder {CONVNEXT} --model XS "
             "--labels 2 --gen 3 --pos 4 --uncond 2 --reals index --steps 1 --device cpu").split()
    torch.manual_seed(0)
    data = prepare_data.Dataset(prepared)
    stage = train.GeneratorStage(train.parse(words), data)
    torch.nn.init.normal_(stage.net.final_linear.weight, std=0.1)  # zero would hide everything
    batch = stage.batch(0)
    stage.backward(batch, 0, False)
    ours = stage.net.final_linear.weight.grad.clone()
    stage.net.zero_grad()

    from diffusers import AutoencoderKL
    net = AutoencoderKL.from_pretrained(vae).eval()
    encoder = model.load_encoder(CONVNEXT)

    def features(x):
        images = net.decode(x / 0.18215).sample
        rows = {"global": x.permute(0, 2, 3, 1).flatten(1)[:, None], **encoder.features(images)}
        return {name: f.unflatten(0, (2, -1)) for name, f in rows.items()}

    x = stage.net(batch["noise"].flatten(0, 1), batch["labels"].repeat_interleave(3),
                  batch["alpha"].repeat_interleave(3), batch["styles"].flatten(0, 1))
    pos, uncond = batch["reals"].split([4, 2], 1)
    loss = drift.feature_loss("drifting", features(x), None, features(pos.flatten(0, 1)),
                              features(uncond.flatten(0, 1)), batch["alpha"])[0]
    loss.backward()
    assert relative_error(ours, stage.net.final_linear.weight.grad) < 1e-3

    train.main(words)
    # Samples of 64x64 below names of 20 pixels, four classes.
    assert Image.open(tmp_path / "samples_00000001.png").size == (4 * 66 - 2, 20 + 8 * 66 - 2)
    data.meta["vae"] = "0" * 64
    with pytest.raises(model.UsageError, match="not the VAE that made the latents"):
        train.GeneratorStage(train.parse(words), data)
