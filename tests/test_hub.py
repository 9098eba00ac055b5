"""hf:// addresses against a Hub on 127.0.0.1: what is fetched, kept, resumed, refused; our own
format there and back."""
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import model
import real_weights
from conftest import (FIXTURES, SMALL_GENERATOR, SMALL_MAE, convnext_of_transformers, old_vae,
                      random_artifact, relative_error, same_weights, small_vae)
from hub_server import HubServer

TINY = FIXTURES / "gen_latent_tiny"
FLAX = list(model.FLAX_FILES)
VAE = "stabilityai/sd-vae-ft-mse"
CONVNEXT = "facebook/convnextv2-base-22k-224"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server without repositories; huggingface_hub looks there, with an empty cache."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files(folder, prefix=""):
    return {f"{prefix}{path.name}": path.read_bytes()
            for path in folder.iterdir() if path.is_file() and path.name != "io.npz"}


def copies():
    """The folders of converted copies."""
    return [path.parent for path in Path(constants.HF_ASSETS_CACHE).rglob("model.safetensors")]


# --------------------------------------------------------------------------------------------
# The authors' weights

def test_published_weights_are_downloaded_once_and_converted_once(hub, monkeypatch):
    place = "models/gen/jax/ablation"
    others = {f"{place}/optimizer.msgpack": b"big", "README.md": b"# weights"}
    hub.add("Goodeat/drifting", {**files(TINY, f"{place}/"), **others})
    local = model.load_generator(TINY)
    first = model.load_generator("hf://ablation")
    assert same_weights(first, local)
    assert hub.fetched == [f"{place}/{name}" for name in FLAX]  # only what is needed

    reads, read = [], model.read_flax
    monkeypatch.setattr(model, "read_flax", lambda path: reads.append(path) or read(path))
    assert same_weights(model.load_generator("hf://ablation"), local)
    assert len(hub.fetched) == 2 and not reads  # from the converted copy
    assert same_weights(model.load_generator("hf://ablation", keep_converted=False), local)
    assert len(reads) == 1
    copy, = copies()
    assert same_weights(model.load_generator(copy), local)  # it is a model folder of ours

    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(model.UsageError, match=f"{weights}: damaged"):  # one knows what to remove
        model.load_generator("hf://ablation")
    shutil.rmtree(copy)
    model.load_generator("hf://ablation", keep_converted=False)
    assert not copies()

    hub.add("Goodeat/drifting", {**files(TINY, f"{place}/"), "README.md": b"another commit"})
    model.load_generator("hf://ablation")
    assert copies() != [copy] and len(copies()) == 1


@pytest.mark.parametrize("name, kind, sizes", [("ablation", "gen", SMALL_GENERATOR),
                                               ("mae_latent_256", "mae", SMALL_MAE)])
def test_the_real_files_form_loads_by_its_name(hub, tmp_path, name, kind, sizes):
    """Real metadata and the real tree of names, downloaded, converted, and read from the copy."""
    artifact = random_artifact(tmp_path / "artifact", kind, **sizes)
    hub.add("Goodeat/drifting", files(artifact, f"models/{kind}/jax/{name}/"))
    load = {"gen": model.load_generator, "mae": model.load_encoder}[kind]
    first, local = load(f"hf://{name}"), load(artifact)
    assert same_weights(first, local) and same_weights(load(f"hf://{name}"), local)
    x = torch.randn(2, 4, 32, 32)
    with torch.no_grad():
        if kind == "gen":
            args = torch.tensor([0, 999]), torch.ones(2), torch.zeros(2, 32, dtype=torch.long)
            assert relative_error(first(x, *args), local(x, *args)) < 1e-5
        else:
            for feature, same in zip(first.features(x).values(), local.features(x).values()):
                assert torch.allclose(feature, same, atol=1e-5)
    copy, = copies()
    assert same_weights(load(copy), local)


def test_published_weights_need_no_copy(hub, monkeypatch, capsys):
    """Where a file is in the way, as in a cache that others filled, and where there is no room."""
    hub.add("Goodeat/drifting", files(TINY, "models/gen/jax/ablation/"))
    local = model.load_generator(TINY)
    assets = Path(constants.HF_ASSETS_CACHE)
    assets.write_text("in the way")
    assert same_weights(model.load_generator("hf://ablation"), local)
    assert "no converted copy kept (NotADirectoryError" in capsys.readouterr().err
    assets.unlink()

    def full(self, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(model.Generator, "_save_pretrained", full)
    assert same_weights(model.load_generator("hf://ablation"), local)
    assert "no converted copy kept (OSError: [Errno 28] No space" in capsys.readouterr().err
    assert not list(assets.rglob("*.safetensors"))
    monkeypatch.undo()


def test_of_many_processes_one_writes_the_copy(hub, monkeypatch):
    hub.add("Goodeat/drifting", files(TINY, "models/gen/jax/ablation/"))
    monkeypatch.setattr(model, "get_rank", lambda: 1)
    other = model.load_generator("hf://ablation")
    assert not copies()
    monkeypatch.setattr(model, "get_rank", lambda: 0)
    assert same_weights(model.load_generator("hf://ablation"), other) and len(copies()) == 1


def test_two_files_of_a_folder_have_two_copies(hub, tmp_path):
    """W-Flow's folders hold one file, others' may hold more."""
    wflow = FIXTURES / "wflow_gen_tiny/state_00200000.pt"
    saved = torch.load(wflow, weights_only=True)
    saved["ema_model"]["class_embed.weight"] += 1
    torch.save(saved, tmp_path / "later.pt")
    hub.add("me/flow", {"a/state_00000001.pt": wflow.read_bytes(),
                        "a/state_00000002.pt": (tmp_path / "later.pt").read_bytes()})
    for _ in range(2):
        first, second = [model.load_generator(f"hf://me/flow/a/state_0000000{i}.pt")
                         for i in (1, 2)]
        assert same_weights(first, model.load_generator(wflow))
        assert torch.equal(second.class_embed.weight, first.class_embed.weight + 1)
    assert len(copies()) == 2


def test_every_published_name_has_its_place(hub):
    """METHOD of the release: five generators, three encoders."""
    names = {"gen": ("latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"),
             "mae": ("mae_latent_640", "mae_pixel_640", "mae_latent_256")}
    places = {name: f"models/{kind}/jax/{name}" for kind in names for name in names[kind]}
    hub.add("Goodeat/drifting", {f"{place}/{file}": name.encode()
                                 for name, place in places.items() for file in FLAX})
    wflow = {"ablation": "latent_ablation_ot/state_00030000.pt",
             "B": "latent_sota_B_ot/state_00200000.pt", "L": "latent_sota_L_ot/state_00200000.pt",
             "XL": "latent_sota_XL_ot/state_00180000.pt"}
    assert model.PUBLISHED.keys() == places.keys() | {f"wflow_{name}" for name in wflow}
    hub.add("jiaqihan99/W-Flow", {f"checkpoints/{file}": b"" for file in wflow.values()})
    for name, file in wflow.items():
        found = model.find_files(f"hf://wflow_{name}", model.MODEL_FILES)
        assert str(found[0]).endswith(f"W-Flow/snapshots/{found[0].parts[-4]}/checkpoints/{file}")
    for name, place in places.items():
        description, weights = model.find_files(f"hf://{name}", model.MODEL_FILES)
        assert str(weights.parent).endswith(place) and description.read_text() == name
        path = f"/Goodeat/drifting/resolve/main/{place}/ema_params.msgpack"
        assert hub.requests[-1].path == path


def test_real_weights_says_what_it_found(hub, tmp_path, monkeypatch, capsys):
    """The command for whoever has a network, on a small artifact; without a decoder, then with."""
    artifact = random_artifact(tmp_path / "artifact", "gen", **SMALL_GENERATOR)
    hub.add("Goodeat/drifting", files(artifact, "models/gen/jax/ablation/"))
    monkeypatch.setattr("sys.argv", ["real_weights.py", "--out", str(tmp_path / "grid.png")])
    real_weights.main()
    said = capsys.readouterr().out
    assert "tensors in the file  241 (" in said and "parameters           691,120 (" in said
    assert re.search(r"mean of latents +-?[0-9.]+, by channel( -?[0-9.]+){4}\n", said)
    assert re.search(r"std of latents +[0-9.]+, by channel( [0-9.]+){4} ", said)
    assert "images               none" in said and "Repository Not Found" in said
    hub.add(VAE, files(small_vae(tmp_path / "vae")))
    real_weights.main()
    assert "images               [8, 3, 256, 256]" in capsys.readouterr().out
    assert (tmp_path / "grid.png").stat().st_size > 10_000


# --------------------------------------------------------------------------------------------
# Other repositories

def test_addresses_subfolders_and_revisions(hub, tmp_path):
    generator = model.load_generator(TINY)
    generator.save_pretrained(tmp_path / "ours")
    ours = files(tmp_path / "ours")
    hub.add("me/nets", {"README.md": b"empty"})
    sha = hub.add("me/nets", {**ours, **files(tmp_path / "ours", "runs/a/")}, revision="v1")
    for address in ("hf://me/nets@v1", "hf://me/nets/runs/a/@v1", "hf://me/nets/runs/a@v1",
                    f"hf://me/nets/runs/a@{sha}"):
        assert same_weights(model.load_generator(address), generator)
    # The authors' format elsewhere, beside a file that is another's.
    hub.add("else/mirror", {**files(TINY, "deep/er/"), "deep/er/config.json": b"{}"})
    assert same_weights(model.load_generator("hf://else/mirror/deep/er"), generator)
    with pytest.raises(model.UsageError, match="hf://me/nets: no ema_params.msgpack or"):
        model.load_generator("hf://me/nets")
    with pytest.raises(model.UsageError, match="hf://ablatoin: neither hf://USER.*latent_L_sota"):
        model.load_generator("hf://ablatoin")


@pytest.mark.parametrize("safetensors", [True, False])
def test_convnext_and_the_vae_with_or_without_safetensors(hub, tmp_path, safetensors):
    """Where both files are there only safetensors are fetched."""
    (tmp_path / "convnext").mkdir()
    (tmp_path / "vae").mkdir()
    convnext = convnext_of_transformers(tmp_path / "convnext", safetensors)
    vae = old_vae(tmp_path / "vae", safetensors)
    hub.add(CONVNEXT, files(convnext))
    hub.add(VAE, files(vae))
    assert same_weights(model.load_encoder(f"hf://{CONVNEXT}"), model.load_encoder(convnext))
    assert same_weights(model.load_vae(), model.load_vae(vae))
    ours, theirs = "model.safetensors", "diffusion_pytorch_model.safetensors"
    if not safetensors:
        ours, theirs = "pytorch_model.bin", "diffusion_pytorch_model.bin"
    fetched = [name for name in hub.fetched if name != "config.json"]
    assert fetched == [ours, theirs]
    weights = model.load_vae().weights_file
    assert weights.name == theirs and weights.read_bytes() == (vae / theirs).read_bytes()


def test_a_connection_cut_half_way_is_resumed(hub, mae_artifact):
    """huggingface_hub keeps whole chunks of 10 MiB: cut at 11 MB of 12, it asks for what comes
    after them, and no more."""
    hub.add("Goodeat/drifting", files(mae_artifact, "models/mae/jax/mae_latent_256/"))
    hub.cut_after, hub.cut_times = 11_000_000, 2  # metadata.json is too short to be cut
    encoder = model.load_encoder("hf://mae_latent_256")
    ranges = [request.range for request in hub.requests if request.method == "GET"]
    assert ranges[-2:] == [None, f"bytes={10 << 20}-"]
    assert same_weights(encoder, model.load_encoder(mae_artifact))


def test_a_connection_that_is_always_cut_is_the_users_to_mend(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add("me/net", files(TINY))
    hub.cut_after, hub.cut_times = 1000, 100
    with pytest.raises(model.UsageError, match="hf://me/net: no .* downloaded.") as error:
        model.load_generator("hf://me/net")
    assert error.value.__cause__ is not None  # with the client's own traceback
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
    with pytest.raises(model.UsageError, match="hf://latent_B_sota: no .*traffic has been dis"):
        model.load_generator("hf://latent_B_sota")
    assert len(hub.requests) == requests


def test_a_hub_out_of_reach_is_waited_for_once(hub, tmp_path, monkeypatch):
    """huggingface_hub tries five times, for 23 seconds; and here are four forms of a model."""
    (tmp_path / "net").mkdir()
    convnext_of_transformers(tmp_path / "net", False)  # the third form
    hub.add("me/net", files(tmp_path / "net"))
    net = model.load_encoder("hf://me/net")
    hub.stop()
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert same_weights(model.load_encoder("hf://me/net"), net)
    assert 1 <= len(waits) <= 5
    with pytest.raises(model.UsageError, match="hf://me/other: no .* downloaded"):
        model.load_generator("hf://me/other")


@pytest.mark.parametrize("address, message", [
    ("hf://me/nothing", "(?s)no .*downloaded.*Repository Not Found.*authenticated"),
    ("hf://me/net@v9", "(?s)no .*downloaded.*Revision Not Found.*v9"),
    ("hf://me/net/sub", "(?s)no ema_params.*Entry Not Found"),
    ("hf://me/secret", "(?s)no .*downloaded.*Repository Not Found"),
    ("hf://me/n et", "(?s)no .*downloaded.*me/n et"),
])
def test_what_the_hub_does_not_have(hub, address, message):
    """A line of ours, then the words of huggingface_hub."""
    hub.add("me/net", files(TINY))
    hub.add("me/secret", files(TINY))
    hub.private["me/secret"] = "hf_key"
    with pytest.raises(model.UsageError, match=message) as error:
        model.load_generator(address)
    assert str(error.value).startswith(address)


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
    assert b'"model_type": "generator"' in commit["config.json"]
    card = huggingface_hub.ModelCard(commit["README.md"].decode())
    assert card.data.license == "mit" and "drifting" in card.data.tags
    assert "arxiv.org/abs/2602.04770" in card.text and "sample.py --ckpt hf://" in card.text
    assert same_weights(model.load_generator("hf://me/pushed"), generator)
    again = model.Generator.from_pretrained("me/pushed")
    assert same_weights(again, generator) and not again.training


def test_from_pretrained_is_strict(tmp_path):
    from safetensors.torch import load_file, save_file
    model.load_generator(TINY).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["class_embed.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="class_embed.weight"):
        model.Generator.from_pretrained(tmp_path)
