"""hf:// addresses against a Hub on 127.0.0.1: what is fetched, kept, resumed, refused; our own format there and back."""
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import model
from conftest import FIXTURES
from hub_server import HubServer

TINY = FIXTURES / "gen_latent_tiny"
FLAX = ["metadata.json", "ema_params.msgpack"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server without repositories; huggingface_hub looks there, with an empty cache."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files(folder, prefix=""):
    return {f"{prefix}{name}": (folder / name).read_bytes() for name in FLAX}


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


def test_published_weights_are_downloaded_once_and_converted_once(hub, monkeypatch):
    hub.add("Goodeat/drifting", {**files(TINY, "models/gen/jax/ablation/"), "models/gen/jax/ablation/optimizer.msgpack": b"big",
                                 "README.md": b"# weights"})
    local = model.load_generator(TINY)
    assert same_weights(model.load_generator("hf://ablation"), local)
    assert hub.fetched == [f"models/gen/jax/ablation/{name}" for name in FLAX]  # only what is needed

    reads, read = [], model.read_flax
    monkeypatch.setattr(model, "read_flax", lambda path: reads.append(path) or read(path))
    assert same_weights(model.load_generator("hf://ablation"), local)
    assert len(hub.fetched) == 2 and not reads  # from the converted copy
    model.load_generator("hf://ablation", keep_converted=False)
    assert len(reads) == 1
    copy, = (path.parent for path in (Path(constants.HF_HUB_CACHE).parent / "assets").rglob("model.safetensors"))
    assert same_weights(model.load_generator(copy), local)  # it is a model folder of ours
    damaged = (copy / "model.safetensors").read_bytes()[:-1000]
    (copy / "model.safetensors").write_bytes(damaged)
    assert same_weights(model.load_generator("hf://ablation"), local) and len(reads) == 2  # converted anew

    hub.add("Goodeat/drifting", {"README.md": b"moved", **files(TINY, "models/gen/jax/ablation/")})
    shutil.rmtree(copy)
    model.load_generator("hf://ablation", keep_converted=False)
    assert not copy.exists()


def test_a_converted_copy_of_other_parameters_is_made_anew(hub):
    from safetensors.torch import load_file, save_file
    hub.add("Goodeat/drifting", files(TINY, "models/gen/jax/ablation/"))
    local = model.load_generator("hf://ablation")
    copy, = (Path(constants.HF_HUB_CACHE).parent / "assets").rglob("model.safetensors")
    state = load_file(copy)
    del state["class_embed.weight"]
    save_file(state, copy)
    assert same_weights(model.load_generator("hf://ablation"), local) and "class_embed.weight" in load_file(copy)


@pytest.mark.parametrize("obstacle", ["file in place of the assets folder", "folder in place of the copy"])
def test_published_weights_need_no_copy(hub, obstacle):
    """As on a cluster whose cache others filled: where no copy can be kept, msgpack is decoded."""
    hub.add("Goodeat/drifting", files(TINY, "models/gen/jax/ablation/"))
    assets = Path(constants.HF_HUB_CACHE).parent / "assets"
    if obstacle.startswith("file"):
        assets.write_text("in the way")
    else:
        model.load_generator("hf://ablation")
        copy, = assets.rglob("model.safetensors")
        copy.unlink()
        copy.mkdir()
    assert same_weights(model.load_generator("hf://ablation"), model.load_generator(TINY))


def test_a_converted_copy_that_finds_no_room_is_no_error(hub, monkeypatch, capsys):
    hub.add("Goodeat/drifting", files(TINY, "models/gen/jax/ablation/"))

    def full(*args):
        raise OSError("No space left on device")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert same_weights(model.load_generator("hf://ablation"), model.load_generator(TINY))
    assert "no converted copy kept (OSError: No space left" in capsys.readouterr().err


def test_every_published_name_has_its_place(hub):
    """METHOD of the release: five generators, three encoders."""
    names = {"gen": ("latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"),
             "mae": ("mae_latent_640", "mae_pixel_640", "mae_latent_256")}
    places = {name: f"models/{kind}/jax/{name}" for kind in names for name in names[kind]}
    hub.add("Goodeat/drifting", {f"{place}/{file}": name.encode() for name, place in places.items() for file in FLAX})
    assert model.PUBLISHED.keys() == places.keys()
    for name, place in places.items():
        folder = model.resolve(f"hf://{name}", model.OUR_FILES, model.FLAX_FILES)
        assert str(folder).endswith(place) and (folder / "metadata.json").read_text() == name
        assert hub.requests[-1].path == f"/Goodeat/drifting/resolve/main/{place}/ema_params.msgpack"


def test_addresses_subfolders_and_revisions(hub, tmp_path):
    generator = model.load_generator(TINY)
    generator.save_pretrained(tmp_path / "ours")
    ours = {name: (tmp_path / "ours" / name).read_bytes() for name in model.OUR_FILES}
    hub.add("me/nets", {"README.md": b"empty"})
    sha = hub.add("me/nets", {**ours, **{f"runs/a/{name}": data for name, data in ours.items()}}, revision="v1")
    for address in ("hf://me/nets@v1", "hf://me/nets/runs/a/@v1", "hf://me/nets/runs/a@v1", f"hf://me/nets/runs/a@{sha}"):
        assert same_weights(model.load_generator(address), generator)
    hub.add("else/mirror", {**files(TINY, "deep/er/"), "deep/er/config.json": b"{}"})  # the authors' format elsewhere
    assert same_weights(model.load_generator("hf://else/mirror/deep/er"), generator)
    with pytest.raises(FileNotFoundError, match="hf://me/nets: the repository holds no metadata.json there; wanted config.json"):
        model.load_generator("hf://me/nets")
    with pytest.raises(ValueError, match="hf://ablatoin: not one of latent_L_sota, .*and no hf://USER/REPO"):
        model.load_generator("hf://ablatoin")


def test_a_connection_cut_half_way_is_resumed(hub, mae_artifact):
    """huggingface_hub keeps whole chunks of 10 MiB: cut at 11 MB of 12, it asks for what comes after them, and no more."""
    hub.add("Goodeat/drifting", files(mae_artifact, "models/mae/jax/mae_latent_256/"))
    hub.cut_after, hub.cut_times = 11_000_000, 2  # metadata.json is too short to be cut
    encoder = model.load_encoder("hf://mae_latent_256")
    assert [r.range for r in hub.requests if r.method == "GET"][-2:] == [None, f"bytes={10 << 20}-"]
    assert same_weights(encoder, model.load_encoder(mae_artifact))


def test_a_connection_that_is_always_cut_gives_one_line(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/net", files(TINY))
    hub.cut_after, hub.cut_times = 1000, 100
    with pytest.raises(OSError, match="hf://me/net: ema_params.msgpack could not be downloaded .*run again") as error:
        model.load_generator("hf://me/net")
    assert "\n" not in str(error.value)
    hub.cut_after = None
    model.load_generator("hf://me/net")


def test_offline(hub, monkeypatch):
    hub.add("Goodeat/drifting", files(TINY, "models/gen/jax/ablation/"))
    hub.add("me/net", files(TINY))
    first, second = model.load_generator("hf://ablation"), model.load_generator("hf://me/net")
    requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same_weights(model.load_generator("hf://ablation"), first)
    assert same_weights(model.load_generator("hf://me/net"), second)
    with pytest.raises(OSError, match="hf://latent_B_sota: metadata.json is not in the cache, and the Hub cannot be reached"):
        model.load_generator("hf://latent_B_sota")
    assert len(hub.requests) == requests


@pytest.mark.parametrize("address, message", [
    ("hf://me/nothing", "no repository me/nothing on the Hub, or a private one: `hf auth login`"),
    ("hf://me/net@v9", "me/net has no revision v9"),
    ("hf://me/net/sub", "the repository holds no metadata.json there"),
    ("hf://me/secret", "no repository me/secret on the Hub, or a private one"),
    ("hf://me/n et", "could not be downloaded"),
])
def test_what_the_hub_does_not_have(hub, address, message):
    hub.add("me/net", files(TINY))
    hub.add("me/secret", files(TINY))
    hub.private["me/secret"] = "hf_key"
    with pytest.raises(OSError, match=message) as error:
        model.load_generator(address)
    assert str(error.value).startswith(address) and "\n" not in str(error.value)


def test_a_token_opens_a_private_repository(hub, monkeypatch):
    hub.add("me/secret", files(TINY))
    hub.private["me/secret"] = "hf_key"
    monkeypatch.setenv("HF_TOKEN", "hf_key")
    model.load_generator("hf://me/secret")
    assert hub.requests[-1].authorization == "Bearer hf_key"


def test_pushed_to_the_hub_and_back(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_key")
    generator = model.load_generator(TINY)
    generator.push_to_hub("me/pushed")
    commit = hub.commits["me/pushed"][hub.refs["me/pushed"]["main"]]
    assert {"config.json", "model.safetensors", "README.md"} <= commit.keys()
    card = huggingface_hub.ModelCard(commit["README.md"].decode())
    assert card.data.license == "mit" and "drifting" in card.data.tags and "arxiv.org/abs/2602.04770" in card.text
    assert same_weights(model.load_generator("hf://me/pushed"), generator)
    assert same_weights(model.Generator.from_pretrained("me/pushed"), generator)
    assert not model.Generator.from_pretrained("me/pushed").training


def test_from_pretrained_is_strict(tmp_path):
    from safetensors.torch import load_file, save_file
    model.load_generator(TINY).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["class_embed.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="class_embed.weight"):
        model.Generator.from_pretrained(tmp_path)


def test_convnext_from_the_hub(hub):
    source = FIXTURES / "convnextv2_tiny"
    hub.add("facebook/convnextv2-base-22k-224", {p.name: p.read_bytes() for p in source.iterdir()} | {"pytorch_model.bin": b"?"})
    encoder = model.load_encoder("hf://facebook/convnextv2-base-22k-224")
    assert same_weights(encoder, model.load_encoder(source))
    assert hub.fetched == ["config.json", "model.safetensors"]
    assert os.path.islink(model.resolve("hf://facebook/convnextv2-base-22k-224", model.OUR_FILES) / "config.json")
