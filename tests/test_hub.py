"""hf:// addresses against a Hub on 127.0.0.1: what is fetched, kept, refused."""
from pathlib import Path

import pytest
from huggingface_hub import constants, errors

import model
import real_weights
from conftest import (FIXTURES, SMALL_GENERATOR, SMALL_MAE, convnext_of_transformers,
                      random_artifact, same_weights, small_vae)
from hub_server import HubServer

TINY = FIXTURES / "gen_latent_tiny"
FLAX = list(model.MODEL_FILES[0])
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
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def files(folder, prefix=""):
    return {f"{prefix}{path.name}": path.read_bytes()
            for path in folder.iterdir() if path.is_file() and path.suffix != ".npz"}


@pytest.mark.parametrize("name, kind, sizes", [("ablation", "gen", SMALL_GENERATOR),
                                               ("mae_latent_256", "mae", SMALL_MAE)])
def test_the_real_files_form_loads_by_its_name(hub, tmp_path, name, kind, sizes):
    """Real metadata and the real tree of names; downloaded once, and only what is needed."""
    artifact = random_artifact(tmp_path / "artifact", kind, **sizes)
    place = f"models/{kind}/jax/{name}"
    hub.add("Goodeat/drifting", {**files(artifact, f"{place}/"), "README.md": b"# weights",
                                 f"{place}/optimizer.msgpack": b"big"})
    load = {"gen": model.load_generator, "mae": model.load_encoder}[kind]
    for _ in range(2):
        assert same_weights(load(f"hf://{name}"), load(artifact))
    assert hub.fetched == [f"{place}/{file}" for file in FLAX]


def test_every_published_name_has_its_place(hub):
    """Of the release five generators and three encoders, and W-Flow's single files."""
    names = {"gen": ("latent_L_sota", "latent_B_sota", "pixel_L_sota", "pixel_B_sota", "ablation"),
             "mae": ("mae_latent_640", "mae_pixel_640", "mae_latent_256")}
    places = {name: f"models/{kind}/jax/{name}/ema_params.msgpack"
              for kind in names for name in names[kind]}
    flow = {"wflow_ablation": "checkpoints/latent_ablation_ot/state_00030000.pt",
            "wflow_B": "checkpoints/latent_sota_B_ot/state_00200000.pt",
            "wflow_L": "checkpoints/latent_sota_L_ot/state_00200000.pt",
            "wflow_XL": "checkpoints/latent_sota_XL_ot/state_00180000.pt"}
    assert model.PUBLISHED.keys() == places.keys() | flow.keys()
    for repo, files in (("Goodeat/drifting", places), ("jiaqihan99/W-Flow", flow)):
        hub.add(repo, {f"{Path(file).parent}/metadata.json": b"" for file in files.values()}
                | {file: b"" for file in files.values()})
        for name, file in files.items():
            weights = model.find_files(f"hf://{name}", model.MODEL_FILES)[1]
            assert str(weights).endswith(file)
            assert hub.requests[-1].path == f"/{repo}/resolve/main/{file}"


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
    wflow = FIXTURES / "wflow_gen_tiny/state_00200000.pt"
    hub.add("me/flow", {"a/state_00000001.pt": wflow.read_bytes()})
    flow = model.load_generator("hf://me/flow/a/state_00000001.pt")
    assert same_weights(flow, model.load_generator(wflow))
    with pytest.raises(model.UsageError, match="hf://me/nets: no weights downloaded"):
        model.load_generator("hf://me/nets")
    with pytest.raises(errors.RevisionNotFoundError):
        model.load_generator("hf://me/nets@v9")


def test_where_safetensors_are_nothing_pickled_is_fetched(hub, tmp_path):
    convnext = convnext_of_transformers(tmp_path, True)
    hub.add(CONVNEXT, files(convnext))
    assert same_weights(model.load_encoder(f"hf://{CONVNEXT}"), model.load_encoder(convnext))
    assert "model.safetensors" in hub.fetched and "pytorch_model.bin" not in hub.fetched


def test_real_weights_says_what_it_found(hub, tmp_path, monkeypatch, capsys):
    """The command for whoever has a network, on a small artifact."""
    artifact = random_artifact(tmp_path / "artifact", "gen", **SMALL_GENERATOR)
    hub.add("Goodeat/drifting", files(artifact, "models/gen/jax/ablation/"))
    hub.add(VAE, files(small_vae(tmp_path / "vae")))
    monkeypatch.setattr("sys.argv", ["real_weights.py", "--out", str(tmp_path / "grid.png")])
    real_weights.main()
    said = capsys.readouterr().out
    assert "tensors in the file  241 (" in said and "parameters           691,120 (" in said
    assert "std of latents" in said and (tmp_path / "grid.png").stat().st_size > 10_000
