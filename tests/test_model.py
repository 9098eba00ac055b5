"""The networks give the authors' numbers with the authors' weights; what does not fit is refused in one line."""
import json

import msgpack
import numpy as np
import pytest
import torch

import drift
import model
from conftest import FIXTURES, flax_array, nchw, relative_error, write_flax


def test_generator_matches_the_release():
    io = np.load(FIXTURES / "gen_latent_tiny/io.npz")
    generator = model.load_generator(FIXTURES / "gen_latent_tiny")
    labels, alpha, style = (torch.from_numpy(io[k]) for k in ("class_labels", "cfg_scale", "style_indices"))
    with torch.no_grad():
        cond = generator.condition(labels, alpha, style)
        samples = generator(nchw(io["noise_bhwc"]), labels, alpha, style)
    assert relative_error(cond, io["cond"]) < 1e-5
    assert relative_error(samples, nchw(io["samples_bhwc"])) < 1e-5


def test_mae_matches_the_release(mae_artifact):
    io = np.load(FIXTURES / "mae_latent_tiny/io.npz")
    mae = model.load_encoder(mae_artifact)
    x, mask, labels = nchw(io["x_bhwc"]), torch.from_numpy(io["mask"]), torch.from_numpy(io["labels"]).long()
    with torch.no_grad():
        recon, logits, error, cross_entropy = mae(x, mask, labels)
        features = mae.features(x)
    assert relative_error(recon, nchw(io["recon_bhwc"])) < 1e-4
    assert relative_error(logits, io["logits"]) < 1e-4
    assert relative_error(error, io["recon_loss"]) < 1e-4
    assert relative_error(cross_entropy, io["cls_loss"]) < 1e-4
    expected = {k.removeprefix("act/"): io[k] for k in io.files if k.startswith("act/")}
    assert features.keys() == expected.keys()
    for name, feature in features.items():
        if feature.shape[1] > 16:
            feature = feature[:, ::13]  # the fixture keeps every 13th location
        assert relative_error(feature, expected[name]) < 1e-4, name


def test_convnext_matches_the_release():
    """Features of images in [0, 1]; the gradient at the input is that of finite differences."""
    io = np.load(FIXTURES / "convnextv2_tiny/io.npz")
    encoder = model.load_encoder(FIXTURES / "convnextv2_tiny")
    x = nchw(io["images01_bhwc"]) * 2 - 1
    features = encoder.features(x)
    expected = {k.removeprefix("act/"): io[k] for k in io.files if k.startswith("act/")}
    assert features.keys() == expected.keys() and not encoder.training
    for name, feature in features.items():
        if feature.shape[1] > 64:
            feature = feature[:, ::7]  # the fixture keeps every 7th location
        assert relative_error(feature.detach(), expected[name]) < 1e-5, name

    encoder, x = encoder.double(), x[:1, :, ::2, ::2].double().requires_grad_()
    weigh = {name: torch.randn(1, *f.shape[1:], generator=torch.Generator().manual_seed(0)) for name, f in features.items()}
    value = lambda x: sum((f * weigh[name]).sum() for name, f in encoder.features(x).items())  # noqa: E731
    gradient, = torch.autograd.grad(value(x), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        slope = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def whole_step(mae_artifact, dtype):
    """Generator -> features -> summed losses -> gradients of the generator's weights, on `step_gen`."""
    io = np.load(FIXTURES / "step_gen/io.npz")
    generator = model.load_generator(FIXTURES / "step_gen").to(dtype)
    mae = model.load_encoder(mae_artifact).requires_grad_(False).to(dtype)
    labels, alpha = torch.from_numpy(io["labels"]).long(), torch.from_numpy(io["cfg_scale"])
    G = len(io["noise_bhwc"]) // len(labels)
    samples = generator(nchw(io["noise_bhwc"]).to(dtype), labels.repeat_interleave(G), alpha.repeat_interleave(G),
                        torch.from_numpy(io["style_indices"]))
    assert relative_error(samples.detach(), nchw(io["samples_bhwc"])) < 1e-5

    def features(x):
        found = {"global": x.permute(0, 2, 3, 1).flatten(1)[:, None], **mae.features(x)}
        return {name: f.unflatten(0, (len(labels), -1)) for name, f in found.items()}

    with torch.no_grad():
        pos, neg = (features(nchw(io[k]).flatten(0, 1).to(dtype)) for k in ("pos_bhwc", "uncond_bhwc"))
    weight = drift.unconditional_weight(alpha, G, io["uncond_bhwc"].shape[1])
    total, losses, _ = drift.feature_drift_loss(features(samples), pos, neg, weight)
    total.backward()
    return io, losses, {name: p.grad for name, p in generator.named_parameters()}


def test_whole_step_matches_the_release(mae_artifact):
    """Each feature's loss and the weights' gradients.

    The fixture's encoder has 32 channels in 32 groups, so the mean and std of layer1 (a GroupNorm's output) are
    constants, and those of conv1 nearly so: their distances are float32 rounding noise, the release's own included. Hence
    layer1's two losses are left out, and gradients are compared twice: with the release's, whose distance from the exact
    gradient is 1.4e-3, and with the same step computed in float64.
    """
    io, losses, grads = whole_step(mae_artifact, torch.float32)
    _, exact_losses, exact_grads = whole_step(mae_artifact, torch.float64)
    assert losses.keys() == {k.removeprefix("loss/") for k in io.files if k.startswith("loss/")}
    for name, loss in losses.items():
        if name not in ("layer1_mean", "layer1_std"):
            tolerance = 2e-4 if name == "conv1_std" else 1e-4
            assert loss.item() == pytest.approx(io[f"loss/{name}"].item(), rel=tolerance), name
            assert loss.item() == pytest.approx(exact_losses[name].item(), rel=1e-5), name

    whole = lambda grads: torch.cat([grads[name].double().flatten() for name in theirs])  # noqa: E731
    theirs = {k.removeprefix("grad/"): torch.from_numpy(io[k]) for k in io.files if k.startswith("grad/")}
    theirs = model._flax_state_dict(theirs, model.FLAX_GENERATOR_NAMES)
    assert len(theirs) == 24
    assert relative_error(whole(grads), whole(exact_grads)) < 1e-4
    assert relative_error(whole(grads), whole(theirs)) < 2e-3
    norm = torch.stack([g.double().norm() for g in grads.values()]).norm()
    assert norm.item() == pytest.approx(io["grad_global_norm"].item(), rel=2e-4)


def test_encoders_in_bfloat16_give_the_same_features():
    """Whatever the weights' type and format: norm_x, which is of the input, in float32, the others to bfloat16's digits."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32).clamp(-1, 1)
    for net in (model.MAE(3, 64, (2, 1), input_patch_size=2, num_classes=10), model.ConvNeXtV2((1, 1, 2, 1), (8, 16, 32, 64))):
        exact = net.eval().features(x)
        half = net.to(torch.bfloat16, memory_format=torch.channels_last).features(x)
        assert half.keys() == exact.keys()
        for name, feature in half.items():
            assert relative_error(feature, exact[name]) < (1e-7 if name == "norm_x" else 2e-2), name
            is_map = isinstance(net, model.MAE) and name in ("conv1", "layer1", "layer1_blk2", "layer2")
            assert feature.dtype == (torch.bfloat16 if is_map else torch.float32), name


@pytest.mark.parametrize("size, millions", [("B", 133), ("L", 463)])
def test_parameter_counts(size, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in model.Generator(**model.GENERATOR_SIZES[size]).parameters())
    assert round(count / 1e6) == millions


def test_fresh_generator_starts_at_zero_and_learns_everywhere():
    """adaLN-zero: the first output is 0; after a step on the zeroed layers, every parameter receives a gradient."""
    torch.manual_seed(0)
    generator = model.Generator(input_size=8, in_channels=3, patch_size=2, hidden_size=32, depth=2, num_heads=2,
                                num_classes=5, noise_classes=4, noise_coords=3, n_cls_tokens=2)
    args = (torch.randn(6, 3, 8, 8), torch.arange(6) % 5, torch.linspace(1, 4, 6), torch.randint(4, (6, 3)))
    assert generator(*args).abs().max() == 0
    for _ in range(2):  # first the output layer moves, then everything before it
        generator.zero_grad()
        (generator(*args) - torch.randn(6, 3, 8, 8)).square().mean().backward()
        with torch.no_grad():
            for p in generator.parameters():
                p -= 0.5 * p.grad
    generator.zero_grad()
    generator(*args).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())


def test_checkpointed_blocks_change_nothing():
    torch.manual_seed(0)
    generator = model.load_generator(FIXTURES / "gen_latent_tiny").train()
    args = (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([1.0, 2.0]), torch.zeros(2, 3, dtype=torch.long))
    grads = []
    for flag in (False, True):
        generator.checkpoint_blocks = flag
        generator.zero_grad()
        generator(*args).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in generator.parameters()]))
    assert torch.equal(*grads)


def test_encoder_takes_any_size_and_depth():
    """Pixel models patchify; small images take fewer stages; every skip and the decoder follow."""
    mae = model.MAE(in_channels=3, base_channels=8, layers=(1, 2), input_patch_size=2, num_classes=4)
    x = torch.randn(2, 3, 16, 16)
    mask = (torch.rand(2, 4, 4) < 0.5).float()
    recon, logits, _, _ = mae(x, mask, torch.tensor([0, 3]))
    assert recon.shape == (2, 12, 8, 8) and logits.shape == (2, 4)
    features = mae.features(x)
    assert features["norm_x"].shape == (2, 1, 12)
    assert features["layer2"].shape == (2, 16, 16) and features["layer2_blk2_mean_2"].shape == (2, 4, 16)
    # (h w c) order inside a patch: channel 1 of the second row, first column is number (1 * 2 + 0) * 3 + 1
    assert torch.equal(mae.patchify(x)[:, 7], x[:, 1, 1::2, 0::2])


def test_masked_positions_alone_count():
    torch.manual_seed(0)
    mae = model.MAE(in_channels=1, base_channels=8, layers=(1, 1), num_classes=2)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 1])
    mask = torch.zeros(3, 4, 4)
    mask[:, 1, 2] = 1
    recon, _, error, _ = mae(x, mask, labels)
    assert torch.allclose(error, (recon - x)[:, :, 2:4, 4:6].square().sum((1, 2, 3)) / 4)
    changed = x.clone()
    changed[:, :, 2:4, 4:6] += 1  # what is hidden cannot be seen
    assert torch.equal(mae(changed, mask, labels)[0], recon)


def test_own_checkpoint_round_trip(tmp_path):
    torch.manual_seed(0)
    mae = model.MAE(in_channels=1, base_channels=8, layers=(1, 1), num_classes=2).eval()
    mae.save_pretrained(tmp_path / "mae")
    x = torch.randn(2, 1, 8, 8)
    again = model.load_encoder(tmp_path / "mae").features(x)
    assert all(torch.equal(a, again[name]) for name, a in mae.features(x).items())
    generator = model.load_generator(FIXTURES / "gen_latent_tiny")
    generator.save_pretrained(tmp_path / "gen")
    args = (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.ones(2), torch.zeros(2, 3, dtype=torch.long))
    assert torch.equal(generator(*args), model.load_generator(tmp_path / "gen")(*args))
    assert torch.equal(generator(*args), model.Generator.from_pretrained(tmp_path / "gen")(*args))


def test_flax_reader_knows_every_kind_of_leaf(tmp_path):
    """bfloat16, other dtypes, scalars, and arrays in chunks (flax cuts those of over 2^30 bytes)."""
    big = np.arange(12, dtype=np.float32).reshape(3, 4)
    half = torch.tensor([1.5, -2.25, 3e38], dtype=torch.bfloat16)
    tree = {"a": {"bf16": msgpack.ExtType(1, msgpack.packb(((3,), "bfloat16", half.view(torch.int16).numpy().tobytes()))),
                  "int": flax_array(np.array([[1, 2]], dtype=np.int8)),
                  "scalar": msgpack.ExtType(3, msgpack.packb(((), "float64", np.float64(0.1).tobytes()))),
                  "old bf16": msgpack.ExtType(1, msgpack.packb(((3,), "V2", half.view(torch.int16).numpy().tobytes()))),
                  "empty": flax_array(np.zeros((0, 3), np.float32)), "number": 7},
            "big": {"__msgpack_chunked_array__": True, "shape": {"0": 3, "1": 4},
                    "chunks": {str(i): flax_array(c) for i, c in enumerate(np.split(big.ravel(), 3))}}}
    (tmp_path / "x.msgpack").write_bytes(msgpack.packb(tree))
    read = model.read_flax(tmp_path / "x.msgpack")
    assert torch.equal(read["a/old bf16"], half) and read["a/empty"].shape == (0, 3) and read["a/number"].item() == 7
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"):
        array = np.array([[0, 1, 1], [1, 0, 0]]).astype(name)
        (tmp_path / "y.msgpack").write_bytes(msgpack.packb({"x": flax_array(array)}))
        assert np.array_equal(model.read_flax(tmp_path / "y.msgpack")["x"].numpy(), array)
    assert torch.equal(read["a/bf16"], half) and read["a/int"].tolist() == [[1, 2]]
    assert read["a/scalar"].dtype == torch.float64 and read["a/scalar"].item() == 0.1
    assert np.array_equal(read["big"], big)


def artifact(tmp_path, change_config=lambda c: None, change_params=lambda p: None):
    """A copy of gen_latent_tiny with something changed."""
    source = FIXTURES / "gen_latent_tiny"
    metadata = json.loads((source / "metadata.json").read_text())
    params = {k: v.numpy() for k, v in model.read_flax(source / "ema_params.msgpack").items()}
    change_config(metadata["model_config"]), change_params(params)
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    write_flax(tmp_path / "ema_params.msgpack", params)
    return tmp_path


@pytest.mark.parametrize("config, params, message", [
    (lambda c: c.update(use_rope=False), lambda p: None, "use_rope = False"),
    (lambda c: c.update(shiny=1), lambda p: None, "config keys shiny"),
    (lambda c: None, lambda p: p.update(extra=np.zeros(3, np.float32)), r"extra is \[3\], should be absent"),
    (lambda c: None, lambda p: p.pop("Embed_0/embedding"), "class_embed.weight is missing"),
    (lambda c: c.update(num_classes=8), lambda p: None, r"class_embed.weight is \[7, 48\], should be \[8, 48\]"),
    (lambda c: None, lambda p: p.update(note="text"), "note holds a str"),
    (lambda c: None, lambda p: p.update(code=msgpack.ExtType(5, b"x")), "ext type 5"),
    (lambda c: None, lambda p: p.update(code=flax_array(np.zeros(2, np.float32), "object")), "not a flax msgpack"),
    (lambda c: None, lambda p: p.update(code=flax_array(np.zeros(2, np.float32), "float64")), "8 bytes for an array"),
    (lambda c: None, lambda p: p.update(code=flax_array(np.zeros(2, np.float32), "qint8")), "of qint8"),  # torch would crash
    (lambda c: None, lambda p: p.update(code=msgpack.ExtType(1, msgpack.packb(((7, 48), "float32", b"")))), "0 bytes for an"),
    (lambda c: None, lambda p: p.update({"noise_embeds_9/embedding": p.pop("noise_embeds_2/embedding")}), "style_embed is missing"),
    (lambda c: None, lambda p: p.update({"noise_embeds_1/embedding": np.zeros((5, 47), np.float32)}), "style_embed is missing"),
    (lambda c: None, lambda p: p.update({"foo/kernel": np.zeros(7, np.float32)}), "foo/weight is .7., should be absent"),
    (lambda c: None, lambda p: p.update({"class_embed.weight": np.zeros(7, np.float32)}), "a second array for class_embed.weight"),
    (lambda c: c.update(num_heads=0), lambda p: None, "does not build a Generator"),
])
def test_what_does_not_fit_is_named(tmp_path, config, params, message):
    with pytest.raises(ValueError, match=message):
        model.load_generator(artifact(tmp_path, config, params))


@pytest.mark.parametrize("name, text", [("metadata.json", "[]"), ("metadata.json", "null"), ("metadata.json", "{"),
                                        ("metadata.json", '{"kind": ["gen"], "format": "flax.msgpack", "model_config": {}}'),
                                        ("metadata.json", '{"kind": "gen", "format": "flax.msgpack"}'),
                                        ("config.json", "[" * 10**5)])
def test_json_that_says_nothing_is_one_line(tmp_path, name, text):
    folder = artifact(tmp_path)
    if name == "config.json":
        model.load_generator(folder).save_pretrained(folder)
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match="damaged|metadata.json says") as error:
        model.load_generator(folder)
    assert "\n" not in str(error.value)


def test_sixteen_bit_weights_are_used_in_float32(tmp_path):
    generator = model.load_generator(FIXTURES / "gen_latent_tiny")
    generator.bfloat16().save_pretrained(tmp_path)
    assert {p.dtype for p in model.load_generator(tmp_path).parameters()} == {torch.float32}


def test_damaged_or_foreign_files_give_one_line(tmp_path, mae_artifact):
    with pytest.raises(FileNotFoundError, match="no model there"):
        model.load_generator(tmp_path)
    with pytest.raises(ValueError, match="metadata.json says kind mae, .*wanted is gen"):
        model.load_generator(mae_artifact)
    with pytest.raises(ValueError, match="not a Generator .*hidden_sizes"):
        model.load_generator(FIXTURES / "convnextv2_tiny")
    with pytest.raises(ValueError, match="wanted is mae or convnextv2"):
        model.load_encoder(FIXTURES / "gen_latent_tiny")
    folder = artifact(tmp_path)
    whole = (folder / "ema_params.msgpack").read_bytes()
    for bad in (whole[:-100], b"PK\x03\x04" + whole, b"", whole + whole):
        (folder / "ema_params.msgpack").write_bytes(bad)
        with pytest.raises(ValueError, match="truncated, or not a flax msgpack file"):
            model.load_generator(folder)
    model.load_generator(FIXTURES / "gen_latent_tiny").save_pretrained(tmp_path / "own")
    file = tmp_path / "own" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="missing or damaged"):
        model.load_generator(tmp_path / "own")
