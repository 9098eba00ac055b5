"""Losses, features, guidance and queue, against the authors' numbers, plain loops, closed forms."""
import functools
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import drift
import reference
from conftest import FIXTURES, needs_gpu, relative_error


def case(i, file, device="cpu"):
    data = np.load(FIXTURES / file)
    names = [name for name in data.files if name.startswith(f"case{i}/")]
    return {name.split("/")[1]: torch.from_numpy(data[name]).to(device) for name in names}


def loss_and_grad(function, gen, *args, **options):
    """(loss [B], gradient of its mean, info); the plain ports return the loss alone."""
    gen = gen.clone().requires_grad_()
    loss = function(gen, *args, **options)
    info = {}
    if isinstance(loss, tuple):
        loss, info = loss
    loss.mean().backward()
    return loss.detach(), gen.grad, info


@pytest.mark.parametrize("i", range(4))  # 1: no negatives; 3: a generated sample twice
def test_drift_loss_matches_the_release(i, device="cpu"):
    c = case(i, "drift_loss.npz", device)
    result = loss_and_grad(drift.drift_loss, c["gen"], c["pos"], c.get("neg"), c.get("weight_neg"))
    forces = {tau: c[f"info_loss_{tau}"] for tau in drift.TEMPERATURES}
    check(result, c, c["info_scale"], forces)


@pytest.mark.parametrize("i", range(5))  # 3: no unconditionals; 4: samples that are real too
def test_sinkhorn_loss_matches_the_release(i, device="cpu"):
    c = case(i, "sinkhorn_loss.npz", device)
    options = {name: c[name].item() for name in ("temperature", "iterations")}
    result = loss_and_grad(drift.sinkhorn_loss, c["gen"], c["gen2"], c["pos"], c.get("uncond"),
                           c["cfg_scale"], **options)
    check(result, c, c["scale"], {options["temperature"]: c["mean_square"]})


def check(result, c, scale, forces):
    loss, grad, info = result
    assert relative_error(loss, c["loss"]) < 1e-5
    assert relative_error(grad, c["grad_of_mean"]) < 1e-4
    assert info["scale"].item() == pytest.approx(scale.item(), rel=1e-5)
    for tau, force in forces.items():
        assert info[f"force_{tau}"].item() == pytest.approx(force.item(), rel=1e-4)


def random_case(B=3, G=6, P=5, U=4, C=8, offset=0.0, dtype=torch.float32):
    """gen, pos, neg and its weights."""
    stream = torch.Generator().manual_seed(0)
    gen, pos, neg = (torch.randn(B, n, C, generator=stream, dtype=torch.float64) for n in (G, P, U))
    weight = 3 * torch.rand(B, U, generator=stream, dtype=torch.float64)
    case = (gen + offset, pos * 0.7 + 0.5 + offset, neg + offset, weight)
    return [x.to(dtype) for x in case]


@needs_gpu
def test_losses_match_the_release_on_a_gpu():
    for i in range(4):
        test_drift_loss_matches_the_release(i, "cuda")
    for i in range(5):
        test_sinkhorn_loss_matches_the_release(i, "cuda")


def test_closed_form_gradient_is_autograds():
    """In float64 the two agree to rounding: V is a constant in the gradient."""
    gen, pos, neg, weight = random_case(dtype=torch.float64)
    own = loss_and_grad(drift.drift_loss, gen, pos, neg, weight)
    plain = loss_and_grad(reference.drift_loss, gen, pos, neg, weight)
    assert relative_error(own[0], plain[0]) < 1e-9 and relative_error(own[1], plain[1]) < 1e-9
    args = (gen, gen.flip(0), pos, neg, weight[:, 0])
    own = loss_and_grad(drift.sinkhorn_loss, *args, iterations=3)
    plain = loss_and_grad(reference.sinkhorn_loss, *args, iterations=3)
    assert relative_error(own[0], plain[0]) < 1e-9 and relative_error(own[1], plain[1]) < 1e-9


def test_far_from_the_origin_no_digits_are_lost():
    """Features share offsets many times their spread: a plain float32 Gram product loses digits."""
    args = random_case(offset=100.0)
    exact = loss_and_grad(reference.drift_loss, *(a.double() for a in args))[1]
    ours = relative_error(loss_and_grad(drift.drift_loss, *args)[1], exact)
    plain = relative_error(loss_and_grad(reference.drift_loss, *args)[1], exact)
    assert ours < 1e-5 and plain > 20 * ours


def test_computed_in_float32_under_bfloat16():
    args = random_case()
    half, pos, neg, weight = args[0].bfloat16(), *args[1:]
    for function, targets in [
            (drift.drift_loss, (pos, neg, weight)),
            (drift.sinkhorn_loss, (half.flip(0), pos, neg, 1 + weight[:, 0]))]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, grad, _ = loss_and_grad(function, half, *targets)
        assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
        assert torch.equal(loss, loss_and_grad(function, half.float(), *targets)[0])


def test_attraction_and_repulsion_are_multipliers_of_their_terms():
    """A loop over samples: V = a sum_pos c (y - x) - r sum_neg c (y - x), for each kernel."""
    gen, pos, neg, weight = random_case(B=2, dtype=torch.float64)
    for kernel in drift.KERNELS:
        _, grad, info = loss_and_grad(drift.drift_loss, gen, pos, neg, weight, temperatures=(0.2,),
                                      kernel=kernel, attraction=1.5, repulsion=0.5)
        step = (info["scale"] / gen.shape[2] ** 0.5).item()
        force = -grad * step * gen.numel() / 2  # the gradient of the mean loss is -2 V / numel
        expected = torch.zeros_like(gen)
        targets = torch.cat([gen, neg, pos], 1)
        B, G, _ = gen.shape
        N = targets.shape[1]
        first_pos = N - pos.shape[1]
        for b in range(B):
            w = torch.cat([gen.new_ones(G), weight[b], gen.new_ones(pos.shape[1])])
            k = torch.zeros(G, N, dtype=torch.float64)
            for i in range(G):
                for j in range(N):
                    if i != j:
                        distance = (gen[b, i] - targets[b, j]).norm() / info["scale"]
                        k[i, j] = (-distance / 0.2).exp()
            targets_share = k / k.sum(1, keepdim=True)
            samples_share = k / k.sum(0)
            A = {"both": (targets_share * samples_share).sqrt(), "targets": targets_share,
                 "none": k}[kernel].clamp_min(1e-3) * w
            for i in range(G):
                plus = A[i, first_pos:].sum()
                minus = A[i, :first_pos].sum()
                for j in range(N):
                    c = 1.5 * A[i, j] * minus if j >= first_pos else -0.5 * A[i, j] * plus
                    expected[b, i] += c * (targets[b, j] - gen[b, i]) / step
        expected /= expected.square().mean().sqrt()
        assert relative_error(force, expected) < 1e-9, kernel


def test_what_would_be_wrong_in_silence_is_refused():
    gen, pos, neg, weight = random_case()
    wrong = [(gen, pos[:2]), (gen, torch.cat([pos, pos])), (gen, pos, neg, weight[:, :2]),
             (gen, pos, neg[:1], weight), (gen.long(), pos), (gen, pos, neg),
             (gen, pos, None, weight)]
    for args in wrong:
        with pytest.raises((AssertionError, RuntimeError)):
            drift.drift_loss(*args)
    alpha = weight[:, 0]
    for gen2, alpha in [(gen[:2], alpha), (gen, alpha[:1]), (gen, alpha[:2])]:
        with pytest.raises((AssertionError, RuntimeError)):
            drift.sinkhorn_loss(gen, gen2, pos, neg, alpha)
    with pytest.raises(AssertionError):
        drift.sinkhorn_loss(gen, gen, pos, iterations=0)


@pytest.mark.parametrize("power", [1, 3, 5])
def test_alpha_has_the_density_of_the_paper(power):
    alpha = drift.sample_alpha(200_000, power, 0.0, np.random.default_rng(0))
    alpha = torch.from_numpy(alpha).double()
    assert alpha.min() >= 1 and alpha.max() <= 4
    x = torch.linspace(1, 4, 100_001, dtype=torch.float64)
    density = x**-power / torch.trapezoid(x**-power, x)
    for bound in (1.1, 1.5, 2.0, 3.0):
        expected = torch.trapezoid(density[x <= bound], x[x <= bound]).item()
        assert (alpha <= bound).double().mean().item() == pytest.approx(expected, abs=0.005)
    fixed = torch.from_numpy(drift.sample_alpha(100_000, power, 0.5, np.random.default_rng(0)))
    assert (fixed == 1).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_queue_keeps_the_latest_of_each_class():
    """Against slices of lists, with pushes of more than a class's queue holds."""
    rng = np.random.default_rng(0)
    queue = drift.SampleQueue(3, per_class=4, overall=7)
    ids = np.arange(100)
    labels = rng.integers(0, 3, 100)
    for at in range(0, 100, 20):
        queue.push(ids[at:at + 20], labels[at:at + 20])
        for label in range(3):
            latest = ids[:at + 20][labels[:at + 20] == label][-4:]
            assert sorted(queue.draw(label, len(latest), rng)) == latest.tolist()
        assert sorted(queue.draw_any(7, rng)) == ids[at + 13:at + 20].tolist()
    assert len(queue.draw(2, 5, rng)) == 5  # of four: some twice


def energy_by_loops(x, y):
    """(E, mean |x - y|) of one entry, pair by pair."""
    def mean(a, b, other):
        return np.mean([np.linalg.norm(p - q) for i, p in enumerate(a) for j, q in enumerate(b)
                        if i != j or not other])
    between = mean(x, y, False)
    return 2 * between - mean(x, x, True) - mean(y, y, True), between


def test_energy_distance_by_loops(monkeypatch):
    """Also in chunks, and as a sum over parts of a batch."""
    gen, pos, _, _ = random_case(B=5, G=4, P=6)
    pairs = np.array([energy_by_loops(x, y) for x, y in zip(gen.numpy(), pos.numpy())])
    expected = pairs[:, 0].sum() / pairs[:, 1].sum()
    assert drift.energy_distance(gen, pos).item() == pytest.approx(expected, rel=1e-5)
    parts = drift.energy_sums(gen[:2], pos[:2]) + drift.energy_sums(gen[2:], pos[2:])
    assert (parts[0] / parts[1]).item() == pytest.approx(expected, rel=1e-5)
    monkeypatch.setitem(drift.CHUNK_BYTES, "cpu", 100)  # an entry a chunk
    assert drift.energy_distance(gen, pos).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("experiment, field", [
    ("two_modes_far", "drifting"), ("two_modes_collapsed", "drifting"),
    ("two_modes_collapsed", "sinkhorn")])
def test_no_mode_is_lost(experiment, field):
    """Sec. 5.1, shortened: wherever the samples start, each mode ends with half of them."""
    frames, distances = drift.toy_experiment(experiment, steps=160, n=128, field=field)
    for mode in (-1.5, 1.5):
        near = (frames - torch.tensor([mode, 0.0])).norm(dim=2) < 1
        share = near.float().mean(1)
        assert 0.4 < share[-1] < 0.6
    assert share[0] < 0.2  # the right one
    assert np.mean(distances[-4:]) < 0.1 * distances[0]


def test_the_swiss_roll_is_drawn(tmp_path, monkeypatch, capsys):
    short = functools.partial(drift.toy_experiment, steps=96, n=64)
    monkeypatch.setattr(drift, "toy_experiment", short)
    monkeypatch.setattr(sys, "argv", ["drift.py", "swiss_roll", "--out", str(tmp_path)])
    drift.main()
    with Image.open(tmp_path / "swiss_roll.gif") as gif:
        assert gif.n_frames > 40
    first, last = re.findall(r"-?\d\.\d+", capsys.readouterr().out.split("distance")[1])
    assert float(last) < 0.5 * float(first)


def test_nothing_moves_when_the_distributions_match():
    """Two draws of one distribution; a multiplier breaks the anti-symmetry, and makes a force."""
    g = torch.Generator().manual_seed(0)
    gen, pos = torch.randn(2, 1, 2000, 2, generator=g)

    def force(pos, attraction=1.0):
        info = drift.drift_loss(gen, pos, temperatures=(0.2,), attraction=attraction)[1]
        return info["force_0.2"].item()

    matched = force(pos)
    assert matched < 0.02 * force(pos + 0.5) and matched < 0.05 * force(pos, attraction=1.5)


@pytest.mark.parametrize("field, options", [("drifting", {}), ("sinkhorn", {"iterations": 2})])
def test_the_loss_compiles_without_graph_breaks(monkeypatch, field, options):
    monkeypatch.setitem(drift.CHUNK_BYTES, "cpu", 5000)  # some chunks
    stream = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 8), "b": (1, 32)}
    gen, pos, uncond = ({name: torch.randn(2, n, *shape, generator=stream)
                         for name, shape in shapes.items()} for n in (6, 5, 4))
    args = (field, gen, gen, pos, uncond, torch.tensor([1.0, 2.0]))
    compiled = torch.compile(drift.feature_loss, fullgraph=True, backend="eager")
    total = compiled(*args, **options)[0]
    assert total.item() == pytest.approx(drift.feature_loss(*args, **options)[0].item(), rel=1e-6)
    torch._dynamo.reset()


def test_locations_are_entries_of_their_own():
    """Sum over features of the mean over labels and locations: as a loop over locations gives."""
    g = torch.Generator().manual_seed(0)
    gen, pos, neg = ({"a": torch.randn(2, n, 3, 5, generator=g),
                      "b": torch.randn(2, n, 1, 4, generator=g)} for n in (4, 6, 2))
    alpha = torch.rand(2, generator=g) + 1
    total, infos = drift.feature_loss("drifting", gen, None, pos, neg, alpha)
    losses = {name: info["loss"] for name, info in infos.items()}
    weight = (3 * (alpha - 1) / 2)[:, None].expand(-1, 2)
    assert total.item() == pytest.approx(sum(losses.values()).item())
    for name, f in gen.items():
        places = [(label, t) for label in range(2) for t in range(f.shape[2])]
        entries = [torch.stack([x[name][label, :, t] for label, t in places])
                   for x in (gen, pos, neg)]
        weights = torch.stack([weight[label] for label, _ in places])
        expected = reference.drift_loss(*entries, weights).mean()
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_multi_scale_features_by_hand():
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    features = drift.multi_scale_features({"m": x})
    assert set(features) == {"m", "m_mean", "m_std", "m_mean_2", "m_std_2"}  # 4 does not divide 6
    a = x.numpy()
    assert np.allclose(features["m"][1, 2 * 6 + 5], a[1, :, 2, 5])
    assert np.allclose(features["m_mean"][0, 0], a[0].mean((1, 2)), atol=1e-6)
    assert np.allclose(features["m_std"][0, 0], np.sqrt(a[0].var((1, 2)) + 1e-6), atol=1e-6)
    patch = a[1, :, 2:4, 4:6]  # second row, third column of 2 x 2 patches
    assert np.allclose(features["m_mean_2"][1, 1 * 3 + 2], patch.mean((1, 2)), atol=1e-6)
    std = np.sqrt(patch.var((1, 2)) + 1e-6)
    assert np.allclose(features["m_std_2"][1, 1 * 3 + 2], std, atol=1e-6)


def test_a_step_is_measured_with_nothing_at_hand(monkeypatch, capsys):
    """`bench.py step`: train.py's own step on random data, with random encoders and their sizes."""
    monkeypatch.setattr(bench, "matrix_product", lambda: 1.0)
    bench.bench_step("digits", *"--labels 2 --gen 4 --pos 4 --uncond 2".split())
    out = capsys.readouterr().out
    assert "digits_encoder: 0.3M parameters" in out
    tflop = float(re.search(r"a step: ([\d.e-]+) TFLOP", out)[1])
    assert 1e-5 < tflop < 1e-2
