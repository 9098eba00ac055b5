"""Latents: the VAE between them and pixels, sampling at 256x256, and training a generator of latents on a pixel encoder."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import prepare_data
import sample
import train
from conftest import FIXTURES, ROOT, published_generator, random_artifact, ranks, relative_error, small_vae
from hub_server import HubServer

TINY = FIXTURES / "gen_latent_tiny"  # 8x8x4 latents, 7 classes


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def b2(tmp_path_factory):
    """An artifact of the published latent_B_sota's sizes, but for three of its twelve blocks, in the authors' format."""
    return random_artifact(tmp_path_factory.mktemp("b2"), "gen", **published_generator("B") | {"depth": 3})


# ------------------------------------------------------------------------------------------------------------------
# The VAE

def test_vae_is_diffusers_with_one_scale(vae_folder):
    from diffusers import AutoencoderKL
    theirs, ours = AutoencoderKL.from_pretrained(vae_folder).eval(), model.load_vae(vae_folder)
    latents, images = torch.randn(3, 4, 4, 4), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert relative_error(ours.decode(latents), theirs.decode(latents / 0.18215).sample) < 1e-5
        posterior = theirs.encode(images).latent_dist
        mean, std = ours.encode(images)
    assert relative_error(mean, posterior.mean * 0.18215) < 1e-5 and relative_error(std, posterior.std * 0.18215) < 1e-5
    assert ours.downsampling == 8


def test_gradients_pass_through_the_decoder_a_chunk_at_a_time(vae_folder):
    from diffusers import AutoencoderKL
    theirs, ours = AutoencoderKL.from_pretrained(vae_folder).eval(), model.load_vae(vae_folder)
    weigh, gradients = torch.randn(3, 3, 32, 32), []
    for decode in (ours.decode, lambda z: theirs.decode(z / 0.18215).sample):
        z = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        (decode(z) * weigh).sum().backward()
        gradients.append(z.grad)
    assert relative_error(*gradients) < 1e-5
    assert all(p.grad is None for p in ours.parameters())


def test_never_more_than_a_chunk_is_decoded(vae_folder):
    """On any device but a CPU, where it is one; the meta device has shapes and nothing else."""
    vae, sizes = model.load_vae(vae_folder, chunk=4), []
    vae.net.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    vae.decode(torch.zeros(3, 4, 2, 2))
    assert sizes == [1, 1, 1]
    sizes.clear()
    assert vae.to("meta").decode(torch.zeros(10, 4, 2, 2, device="meta")).shape == (10, 3, 16, 16)
    assert sizes == [4, 4, 2]


def test_what_is_no_vae_is_refused(vae_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model there .wanted config.json . diffusion_pytorch_model.safetensors"):
        model.load_vae(tmp_path)
    for name in model.VAE_FILES:
        (tmp_path / name).write_bytes((vae_folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    with pytest.raises(ValueError, match="scaled by 0.13025, these models' by 0.18215"):
        model.load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(vae_folder / model.VAE_FILES[1])
    del weights["decoder.conv_in.weight"]
    save_file(weights, tmp_path / model.VAE_FILES[1])
    with pytest.raises(ValueError, match="weights missing decoder.conv_in.weight"):  # else random numbers in its place
        model.load_vae(tmp_path)
    (tmp_path / model.VAE_FILES[1]).write_bytes((vae_folder / model.VAE_FILES[1]).read_bytes()[:-100])
    with pytest.raises(ValueError, match="no AutoencoderKL in diffusers' format"):
        model.load_vae(tmp_path)


# ------------------------------------------------------------------------------------------------------------------
# sample.py

def run_sample(*words):
    sample.run(sample.parse([str(word) for word in words]))


def test_a_whole_256_run_is_the_same_at_any_batch_size_and_on_two_processes(b2, vae_folder, tmp_path):
    """B/2, three blocks of it, and a VAE: the grid's size, and every pixel at batch sizes 1 and 4 and from two processes (equal threads)."""
    command = ["--ckpt", b2, "--vae", vae_folder, "--classes", 22, 88, "--device", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_sample(*command, "--num_images", 4, "--out", tmp_path / "grid.png", "--batch_size", 4)
        run_sample(*command, "--num_images", 4, "--out", tmp_path / "one.npz", "--batch_size", 1)
    finally:
        torch.set_num_threads(threads)
    for process in ranks(2, ROOT / "sample.py", *command, "--num_images", 4, "--out", tmp_path / "two.npz", "--batch_size", 3):
        said = process.communicate(timeout=100)[0]
        assert process.returncode == 0, said
    one, two = (np.load(tmp_path / name)["arr_0"] for name in ("one.npz", "two.npz"))
    assert one.shape == (4, 256, 256, 3) and one.dtype == np.uint8 and one.std() > 10
    assert np.array_equal(one, two)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 * 258 - 2, 2 * 258 - 2, 3)
    for i, image in enumerate(one):
        assert np.array_equal(grid[i // 2 * 258:][:256, i % 2 * 258:][:, :256], image)
    assert sorted(os.listdir(tmp_path)) == ["grid.png", "one.npz", "two.npz"]  # no scratch file is left


def test_labelled_rows_of_alphas_and_styles(vae_folder, tmp_path):
    """Row r, column i is image i at that alpha and style; what is held is held."""
    run_sample("--ckpt", TINY, "--vae", vae_folder, "--classes", 3, "--num_images", 4, "--cfg_scale", 1.0, 3.0, "--style", "free",
               "fixed", "alone", "--out", tmp_path / "rows.png", "--device", "cpu")
    grid = np.asarray(Image.open(tmp_path / "rows.png"))
    side, height = 66, 66 + 20  # 64 pixels, a gap of 2, a line of text
    assert grid.shape == (6 * height - 2, 4 * side - 2, 3)
    generator, vae = model.load_generator(TINY), model.load_vae(vae_folder)
    noise, styles = zip(*(sample.image_noise(generator, 0, i) for i in range(4)))
    held = {"free": (noise, styles), "fixed": (noise, styles[:1] * 4), "alone": (noise[:1] * 4, styles)}
    for r, (style, alpha) in enumerate((style, alpha) for style in held for alpha in (1.0, 3.0)):
        assert (grid[r * height:][:18] < 128).any()  # the label
        for i in range(4):
            with torch.no_grad():
                x = generator(held[style][0][i][None], torch.tensor([3]), torch.tensor([alpha]), held[style][1][i][None])
                expected = sample.to_uint8(vae.decode(x))[0].permute(1, 2, 0).numpy()
            tile = grid[r * height + 20:][:64, i * side:][:, :64]
            assert np.abs(tile.astype(int) - expected).max() <= 1, (style, alpha, i)
    with pytest.raises(SystemExit):
        sample.parse(["--ckpt", "x", "--cfg_scale", "1", "2", "--out", "folder"])


def test_many_images_are_of_all_classes_and_folders_are_not_mixed(tmp_path):
    torch.manual_seed(0)
    model.Generator(8, 3, None, 2, 32, 1, 2, num_classes=20, n_cls_tokens=1).save_pretrained(tmp_path / "g")
    run_sample("--ckpt", tmp_path / "g", "--num_images", 40, "--out", tmp_path / "folder", "--device", "cpu")
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06d}_{i % 20}.png" for i in range(40)]
    run_sample("--ckpt", tmp_path / "g", "--num_images", 40, "--out", tmp_path / "folder", "--device", "cpu")  # again
    for options in (["--num_images", 39], ["--num_images", 40, "--classes", 3]):
        with pytest.raises(ValueError, match="holds images of another run"):
            run_sample("--ckpt", tmp_path / "g", *options, "--out", tmp_path / "folder", "--device", "cpu")
    for wrong in (["--out", "x.jpg"], ["--seed", "-1"], ["--cfg_scale", "nan"]):
        with pytest.raises(SystemExit):
            sample.parse(["--ckpt", "g", *wrong])
    damaged = model.load_generator(tmp_path / "g")
    torch.nn.init.constant_(damaged.final_linear.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        sample.generate(damaged, [0], [0])


def test_one_command_from_the_hub_to_a_grid(vae_folder, tmp_path):
    """As a user has it: HF_ENDPOINT, an empty HF_HOME, published name, VAE from the Hub; then once more without network."""
    with HubServer({"stabilityai/sd-vae-ft-mse": {name: (vae_folder / name).read_bytes() for name in model.VAE_FILES}}) as hub:
        hub.add("Goodeat/drifting", {f"models/gen/jax/latent_L_sota/{p.name}": p.read_bytes() for p in TINY.iterdir()})
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, str(ROOT / "sample.py"), "--ckpt", "hf://latent_L_sota", "--classes", "2", "5", "--num_images", "4",
                   "--cfg_scale", "1.0"]
        first = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert hub.fetched == [f"models/gen/jax/latent_L_sota/{name}" for name in model.FLAX_FILES] + list(model.VAE_FILES)
    assert "samples.png: 4 images" in first.stdout and "generator" in first.stdout and "decoder" in first.stdout
    picture = (tmp_path / "samples.png").read_bytes()
    subprocess.run(command, cwd=tmp_path, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, check=True)
    assert (tmp_path / "samples.png").read_bytes() == picture
    assert Image.open(tmp_path / "samples.png").size == (2 * 66 - 2, 2 * 66 - 2)


def test_pixels_need_no_diffusers(tmp_path):
    torch.manual_seed(0)
    model.Generator(input_size=16, in_channels=3, num_classes=2, **model.GENERATOR_SIZES["XS"]).save_pretrained(tmp_path / "g")
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sample; sample.run(sample.parse(['--ckpt', 'g', '--out', 'x.png']));"
            "assert 'diffusers' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------------------------
# train.py

@pytest.fixture
def latents(tmp_path, monkeypatch):
    """A prepared set of 8x8x4 latents, as prepare_data.py writes it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng, shape = np.random.default_rng(0), (24, 2, 8, 8, 8)
    (tmp_path / "data/train").mkdir(parents=True)
    moments = rng.standard_normal(shape)
    moments[:, :, 4:] = 0.1
    moments.astype(np.float16).tofile("data/train/images.bin")
    np.save("data/train/labels.npy", np.repeat([0, 1], 12))
    (tmp_path / "data/train/meta.json").write_text(json.dumps(dict(
        kind="latents", dtype="float16", shape=shape, classes=["a", "b"], images_per_class=[12, 12], source="test")))
    return tmp_path


def test_a_pixel_encoder_drives_a_generator_of_latents(latents, vae_folder):
    """The step's gradient is that of features of decoded samples, written out here; and a run makes decoded pictures."""
    command = ["--data", "data", "--out", "run", "--encoder", str(FIXTURES / "convnextv2_tiny"), "--pixel_encoder", "--vae",
               str(vae_folder), "--model", "XS", "--labels", "2", "--gen", "3", "--pos", "4", "--uncond", "2", "--reals", "index",
               "--steps", "2", "--warmup", "1", "--device", "cpu"]
    args = train.parse(command)
    torch.manual_seed(0)
    stage = train.GeneratorStage(args, prepare_data.Dataset("data"))
    torch.nn.init.normal_(stage.net.final_linear.weight, std=0.1)  # zero would hide everything
    stage.backward(stage.batch(0), 0)
    ours = stage.net.final_linear.weight.grad.clone()
    stage.net.zero_grad()

    from diffusers import AutoencoderKL
    vae, encoder = AutoencoderKL.from_pretrained(vae_folder).eval(), model.load_encoder(FIXTURES / "convnextv2_tiny")
    labels, alpha, noise, style, pos, uncond, _ = stage.batch(0)

    def features(x):
        found = {"global": x.permute(0, 2, 3, 1).flatten(1)[:, None], **encoder.features(vae.decode(x / 0.18215).sample)}
        return {name: f.unflatten(0, (2, -1)) for name, f in found.items()}

    x = stage.net(noise, labels.repeat_interleave(3), alpha.repeat_interleave(3), style)
    weight = train.drift.unconditional_weight(alpha, 3, 2)
    train.drift.feature_drift_loss(features(x), features(pos), features(uncond), weight)[0].backward()
    assert relative_error(ours, stage.net.final_linear.weight.grad) < 1e-3
    assert all(p.grad is None for p in stage.encoders.parameters())

    train.main(command)
    assert Image.open("run/samples_00000002.png").size == (2 * 66 - 2, 8 * 66 - 2)  # 64x64 pixels


@pytest.mark.parametrize("change, message", [
    (["--encoder", str(FIXTURES / "convnextv2_tiny")], "takes 3 channels, the samples have 4; .*needs --pixel_encoder"),
    (["--vae", "nowhere"], "nowhere: no model there"),
    (["--init_from", str(TINY)], "--init_from .*gen_latent_tiny is of another model than these options and --data build"),
])
def test_what_does_not_go_together_is_refused_at_the_start(latents, vae_folder, mae_artifact, change, message):
    command = ["--data", "data", "--out", "run", "--encoder", str(mae_artifact), "--vae", str(vae_folder), "--model", "XS", "--labels",
               "2", "--pos", "4", "--steps", "1", "--device", "cpu", *change]
    with pytest.raises((OSError, ValueError), match=message):
        train.main(command)


def test_init_from_starts_from_a_checkpoint(latents, vae_folder, mae_artifact):
    """Its weights are the first ones; a run that is resumed goes on from its own instead."""
    command = ["--data", "data", "--encoder", str(mae_artifact), "--vae", str(vae_folder), "--model", "XS", "--labels", "2", "--gen",
               "2", "--pos", "4", "--uncond", "0", "--reals", "index", "--device", "cpu", "--lr", "1e-5", "--warmup", "0"]
    torch.manual_seed(5)
    start = model.Generator(input_size=8, in_channels=4, num_classes=2, **model.GENERATOR_SIZES["XS"])
    start.save_pretrained("start")
    train.main([*command, "--out", "run", "--steps", "1", "--init_from", "start"])
    first = model.load_generator("run").state_dict()
    assert all((p - start.state_dict()[name]).abs().max() < 1e-4 for name, p in first.items())
    train.main([*command, "--out", "run", "--steps", "2", "--init_from", "start"])
    assert model.latest_checkpoint("run").name == "step_00000002"
    assert not all((p - start.state_dict()[name]).abs().max() < 1.2e-5 for name, p in model.load_generator("run").state_dict().items())


def test_an_encoder_of_latents_learns_from_cached_crops(latents):
    """Views of one image take turns; latents of whole images are refused where the recipe crops before the VAE."""
    command = ["--stage", "encoder", "--data", "data", "--out", "e", "--to_latents", "--crop_scale", "0.2", "--base_channels", "8",
               "--layers", "1", "1", "--batch_size", "24", "--steps", "1", "--device", "cpu"]
    with pytest.raises(ValueError, match="latents of whole images.*--crops"):
        train.main(command)
    meta = json.loads((latents / "data/train/meta.json").read_text())
    (latents / "data/train/meta.json").write_text(json.dumps({**meta, "views": "crops"}))
    data = prepare_data.Dataset("data")
    stage = train.EncoderStage(train.parse(command), data)
    (x, labels, _), ids = stage.batch(0), data.fresh(0, 24, 0)
    assert x.shape == (24, 4, 8, 8) and labels.tolist() == data.labels[ids].tolist()
    views = torch.from_numpy(data.images[ids, :, :4]).float()                                    # n views c h w
    nearest = (x[:, None] - views).square().mean((2, 3, 4))
    assert nearest.min(1).values.max() < 0.05  # drawn with the posterior's std of 0.1
    assert 4 < nearest.argmin(1).sum() < 20    # of 24, from either view
    train.main(command)
