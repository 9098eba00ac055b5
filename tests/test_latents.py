"""Latents: the VAE between them and pixels, and training on them."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import drift
import model
import prepare_data
import train
from conftest import FIXTURES, relative_error, small_vae
from model import UsageError

TINY = FIXTURES / "gen_latent_tiny"  # 8x8x4 latents, 7 classes
CONVNEXT = str(FIXTURES / "convnextv2_tiny")


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"))


# --------------------------------------------------------------------------------------------
# The VAE

def test_vae_is_diffusers_with_one_scale(vae_folder):
    from diffusers import AutoencoderKL
    theirs = AutoencoderKL.from_pretrained(vae_folder).eval()
    ours = model.load_vae(vae_folder)
    latents = torch.randn(3, 4, 4, 4)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        decoded = theirs.decode(latents / 0.18215).sample
        assert relative_error(ours.decode(latents), decoded) < 1e-5
        posterior = theirs.encode(images).latent_dist
        mean, std = ours.encode(images)
    assert relative_error(mean, posterior.mean * 0.18215) < 1e-5
    assert relative_error(std, posterior.std * 0.18215) < 1e-5
    assert ours.downsampling == 8


def test_gradients_pass_through_the_decoder_a_chunk_at_a_time(vae_folder):
    from diffusers import AutoencoderKL
    theirs = AutoencoderKL.from_pretrained(vae_folder).eval()
    ours = model.load_vae(vae_folder)
    weights = torch.randn(3, 3, 32, 32)
    gradients = []
    for decode in (ours.decode, lambda z: theirs.decode(z / 0.18215).sample):
        z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (decode(z) * weights).sum().backward()
        gradients.append(z.grad)
    assert relative_error(*gradients) < 1e-5
    assert all(p.grad is None for p in ours.parameters())


def test_never_more_than_a_chunk_is_decoded(vae_folder):
    """On a CPU one at a time. The meta device, which has shapes and nothing else, is any other."""
    vae = model.load_vae(vae_folder, chunk=4)
    sizes = []

    def hook(module, args):
        sizes.append(len(args[0]))
    vae.net.decoder.register_forward_pre_hook(hook)
    vae.decode(torch.zeros(3, 4, 2, 2))
    assert sizes == [1, 1, 1]
    sizes.clear()
    images = vae.to("meta").decode(torch.zeros(10, 4, 2, 2, device="meta"))
    assert images.shape == (10, 3, 16, 16) and sizes == [4, 4, 2]


# --------------------------------------------------------------------------------------------
# Training

@pytest.fixture
def latents(tmp_path, monkeypatch):
    """A prepared set of 8x8x4 latents, as prepare_data.py writes it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shape = (24, 2, 8, 8, 8)
    (tmp_path / "data/train").mkdir(parents=True)
    moments = np.random.default_rng(0).standard_normal(shape)
    moments[:, :, 4:] = 0.1
    moments.astype(np.float16).tofile("data/train/images.bin")
    np.save("data/train/labels.npy", np.repeat([0, 1], 12))
    meta = dict(kind="latents", dtype="float16", shape=shape, classes=["a", "b"],
                images_per_class=[12, 12], source="test")
    (tmp_path / "data/train/meta.json").write_text(json.dumps(meta))
    return tmp_path


def command(**options):
    options = dict(data="data", out="run", model="XS", labels=2, gen=2, pos=4, uncond=0,
                   reals="index", steps=1, warmup=1, device="cpu") | options
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_a_pixel_encoder_drives_a_generator_of_latents(latents, vae_folder):
    """The step's gradient is that of features of decoded samples; a run makes decoded pictures."""
    words = [*command(vae=vae_folder, encoder=CONVNEXT, gen=3, uncond=2), "--pixel_encoder"]
    torch.manual_seed(0)
    stage = train.GeneratorStage(train.parse(words), prepare_data.Dataset("data"))
    torch.nn.init.normal_(stage.net.final_linear.weight, std=0.1)  # zero would hide everything
    batch = stage.batch(0)
    stage.backward(batch, 0)
    ours = stage.net.final_linear.weight.grad.clone()
    stage.net.zero_grad()

    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    encoder = model.load_encoder(CONVNEXT)

    def features(x):
        images = vae.decode(x / 0.18215).sample
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
    # Samples of 64x64 below names of 20 pixels.
    assert Image.open("run/samples_00000001.png").size == (2 * 66 - 2, 20 + 8 * 66 - 2)


@pytest.mark.parametrize("options, message", [
    (dict(encoder=CONVNEXT), "takes 3 channels.* 4 .*--pixel_encoder"),
    (dict(vae="nowhere"), "nowhere"),
    (dict(init_from=TINY), "gen_latent_tiny")])
def test_what_does_not_go_together_is_refused_at_the_start(latents, vae_folder, mae_artifact,
                                                           options, message):
    with pytest.raises(UsageError, match=message):
        train.main(command(**dict(vae=vae_folder, encoder=mae_artifact) | options))
    assert not list(latents.glob("run/step_*"))


def test_init_from_starts_from_a_checkpoint(latents, vae_folder, mae_artifact):
    """Its weights are the first ones; a run that is resumed goes on from its own instead."""
    torch.manual_seed(5)
    start = model.Generator(input_size=8, in_channels=4, num_classes=2,
                            **model.GENERATOR_SIZES["XS"])
    start.save_pretrained("start")

    def change(steps):
        train.main(command(vae=vae_folder, encoder=mae_artifact, lr=1e-5, warmup=0,
                           init_from="start", steps=steps))
        after = model.load_generator("run").state_dict()
        return max((after[name] - p).abs().max() for name, p in start.state_dict().items())
    assert change(1) < 1.2e-5 < change(2)
    assert model.latest_checkpoint("run").name == "step_00000002"


def test_an_encoder_of_latents_learns_from_cached_crops(latents):
    """Views take turns; latents of whole images are refused where the recipe crops before."""
    words = ("--stage encoder --data data --out e --to_latents --crop_scale 0.2 --base_channels 8 "
             "--layers 1 1 --batch_size 24 --steps 1 --device cpu").split()
    with pytest.raises(UsageError, match="latents of whole images.*--crops"):
        train.main(words)
    meta = latents / "data/train/meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"views": "crops"}))
    data = prepare_data.Dataset("data")
    x = train.EncoderStage(train.parse(words), data).batch(0)["x"]
    ids = data.fresh(0, 24, 0)
    assert x.shape == (24, 4, 8, 8)
    views = torch.from_numpy(data.images[ids, :, :4]).float()                    # n views c h w
    distance = (x[:, None] - views).square().mean((2, 3, 4))
    assert distance.min(1).values.max() < 0.05  # drawn with the posterior's std of 0.1
    assert 4 < distance.argmin(1).sum() < 20    # of 24, from either view
    train.main(words)
