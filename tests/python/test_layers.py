"""Widths of layers and refined keys: the budget, what is read back, what gradients say, and the file."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_model
from kv4 import Recipe
from kv4.bench.text import python_reference
from kv4.calibration import Calibration, identity_of, load
from kv4.evaluate import Candidate, measure_all, oscar
from kv4.evaluate.ablate import Calibrations, ablate, predict
from kv4.evaluate.fake import lightest, seal
from kv4.evaluate.layers import calibrate, from_rows, layer_widths, losses, smoothed
from kv4.evaluate.rotations import rotation
from kv4.evaluate.rows import select
from kv4.evaluate.sensitivity import SINKS, predicted, sensitivities
from kv4.evaluate.simulation import _Session, seal_layer, simulated
from kv4.evaluate.state import State
from kv4.evaluate.variant import SideVariant, Variant, by_layers
from kv4.evaluate.widths import WIDTHS, allocate
from kv4.evaluate.windows import cut


def test_widths_keep_the_budget_and_waste_none_of_it() -> None:
    random = torch.Generator().manual_seed(1)
    shares = torch.logspace(-4, 3, 40)[torch.randperm(40, generator=random)].tolist()
    parts = [[share * 4.0**-bits for bits in WIDTHS] for share in shares]
    last = float("inf")
    for budget in (80, 81, 82, 119.9, 160, 161, 240, 319, 320, 1000):
        found = allocate(parts, budget)
        assert sum(found) <= budget and set(found) <= set(WIDTHS)
        cheapest = [min((w - b for w in WIDTHS if w > b), default=1e9) for b in found]
        assert min(cheapest) > budget - sum(found)  # no part can be given more
        loss = sum(part[WIDTHS.index(bits)] for part, bits in zip(parts, found, strict=True))
        assert loss <= last
        last = loss
    order = sorted(zip(shares, allocate(parts, 160), strict=True))
    assert all(a[1] <= b[1] + 1 for a, b in pairwise(order))  # more to lose, no fewer bits


def test_widths_are_the_best_there_are() -> None:
    random = torch.Generator().manual_seed(2)
    for _ in range(20):
        shares = torch.rand(4, generator=random).pow(4).tolist()
        parts = [[share * 4.0**-bits for bits in WIDTHS] for share in shares]
        found = allocate(parts, 18)

        def loss(some: tuple[int, ...], parts: list = parts) -> float:
            return sum(part[WIDTHS.index(bits)] for part, bits in zip(parts, some, strict=True))

        # Among the choices of just as many bits none loses less: what lies on the hull is best for its own budget.
        best = min(loss(some) for some in product(WIDTHS, repeat=4) if sum(some) == sum(found))
        assert loss(tuple(found)) <= best * 1.5
    assert allocate([[4.0, 1.0], [8.0, 2.0]], 7, (2, 4)) == [2, 4]
    assert allocate([[4.0, 4.0], [8.0, 9.0]], 100, (2, 4)) == [2, 2]  # a bit that buys nothing is not bought


@pytest.mark.parametrize("wrong", [(), (3, 2), (2, 2)])
def test_widths_refuse(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="^widths: expected some, ascending; got"):
        allocate([[1.0] * len(wrong)], 10, wrong)
    with pytest.raises(ValueError, match="^budget: expected at least 6 bits; got 5"):
        allocate([[1.0] * len(WIDTHS)] * 3, 5)


def test_smoothing_takes_the_noise_of_one_draw_out() -> None:
    random = torch.Generator().manual_seed(3)
    share = torch.logspace(-3, 0, 12, dtype=torch.float64)[None, :, None] * torch.tensor([1.0, 0.2])[:, None, None]
    true = share * torch.tensor([4.0**-w for w in WIDTHS])
    noisy = true * (0.5 * torch.randn(true.shape, generator=random, dtype=torch.float64)).exp()
    torch.testing.assert_close(smoothed(true), true)
    logs = [(x / true).log() for x in (smoothed(noisy), noisy)]
    errors = [(x - x.mean(1, keepdim=True)).square().mean() for x in logs]  # of layers against one another
    assert errors[0] < 0.5 * errors[1]
    torch.testing.assert_close(smoothed(noisy).sum(1), noisy.sum(1))  # what a width costs altogether


def test_a_budget_counts_every_bit() -> None:
    table = torch.rand(2, 5, len(WIDTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    table = table.sort(-1, descending=True).values
    for refined, budget in ((0, 4.25), (1, 4.25), (1, 3.25), (2, 2.6)):
        variant = Variant(refined=refined)
        chosen = layer_widths(table, budget, variant, (128, 128))
        bits = variant.replace(widths=chosen).bits_per_value(128, 128)
        assert budget - 0.3 < bits <= budget
        # Codes; scales of both sides; the mean of keys; second rows with scales and places, in lines of 64 bytes.
        codes = sum(sum(pair) for pair in chosen) / 10
        beside = 16 / 128 + 16 / 64 / 2 + {0: 0, 1: 128, 2: 192}[refined] * 8 / 64 / 256
        assert bits == pytest.approx(codes + beside)
    with pytest.raises(ValueError, match=r"^bits: expected a budget of at least 2.250 bits a value; got 2.2"):
        layer_widths(table, 2.2, Variant(), (128, 128))
    with pytest.raises(ValueError, match="^head_dim: expected one for keys and values; got 64 and 128"):
        layer_widths(table, 4, Variant(), (64, 128))


def test_the_keys_of_the_lightest_values_are_refined() -> None:
    random = torch.Generator().manual_seed(9)
    q, k, v = (torch.randn(2, SINKS + 150, 32, generator=random, dtype=torch.float64) for _ in "qkv")
    v[0, SINKS + 70] *= 1e-3
    v[1, SINKS + 5] *= 1e-3
    places = lightest(v[:, SINKS:], 1)
    assert places.shape == (2, 2, 1) and places[0, 1, 0] == 6 and places[1, 0, 0] == 5
    read = [seal_layer(_Session(Variant(refined=n), None, None), 0, q, k, v) for n in (0, 1)]
    torch.testing.assert_close(read[0][1], read[1][1], rtol=0, atol=0)
    before, after = ((x[0] - k[:, SINKS:]).norm(dim=-1) for x in read)
    changed = before != after
    assert changed.sum() == 4 and changed[0, 70] and changed[1, 5]
    # Max 1960, table I: 16 levels leave .0095 of a Gaussian's energy; few channels, so that it varies.
    assert (after[changed] < 0.25 * before[changed]).all()


@pytest.mark.parametrize(("bits", "levels", "gain", "reach"), [
    (2, (38, 127), 84.0736, 0), (3, (14, 45, 79, 127), 59.0101, 0.41),
    (4, (6, 18, 31, 44, 58, 75, 96, 127), 46.48, 0.36), (8, None, 127 / 4.5, 1 / 4.5),
])  # fmt: skip
def test_a_refined_key_reads_as_the_format_s_page_says(
    bits: int, levels: tuple | None, gain: float, reach: float
) -> None:
    """docs/format.md by scalar loops: one head, one page, whose token 9 is refined; the other codes as they are."""
    random = torch.Generator().manual_seed(13)
    q, k, v = (torch.randn(1, SINKS + 64, 32, generator=random, dtype=torch.float64) for _ in "qkv")
    v[0, SINKS + 9] *= 0.01
    variant = Variant(refined=1).replace(key__lambda_="none", key__bits=bits)
    read = seal_layer(_Session(variant, None, None), 0, q, k, v)[0][0].numpy()
    rows, matrix = k[0, SINKS:].numpy(), rotation("srft", 32, variant.key.seed)
    stored = np.float16(matrix @ rows.mean(0)).astype(np.float64)
    signed = list(range(-127, 128)) if levels is None else sorted([*levels, *(-x for x in levels)])

    def sealed(x: np.ndarray, table: list, gain: float, reach: float) -> np.ndarray:
        """Step 3 of sealing: what the codes of x stand for."""
        size = reach * np.abs(x).max() if reach > 0 else np.sqrt(np.mean(x * x))
        wanted = gain * x / size
        level = np.array([min(table, key=lambda at: abs(at - y)) for y in wanted], dtype=np.float64)
        return level * float(np.float16(np.dot(x, level) / np.dot(level, level)))

    four = sorted([*(6, 18, 31, 44, 58, 75, 96, 127), *(-6, -18, -31, -44, -58, -75, -96, -127)])
    for token in (0, 9, 63):
        x = matrix @ rows[token] - stored
        held = sealed(x, signed, gain, reach)
        if token == 9:
            held = held + sealed(x - held, four, 46.48, 0.36)
        np.testing.assert_allclose(matrix @ read[token], held + stored, atol=1e-9)


def test_scales_and_means_in_bytes() -> None:
    random = torch.Generator().manual_seed(12)
    rows = torch.randn(2, 150, 64, generator=random, dtype=torch.float64) * torch.logspace(-3, 3, 150)[None, :, None]
    rows[0, 3] = 0
    eye = torch.eye(64, dtype=torch.float64)
    plain, small = (seal(rows, SideVariant(stored=kind), eye, eye) for kind in ("fp16", "bytes"))
    assert (small.scales[0, 0, 3], small.rows[0, 3].abs().max()) == (0, 0)
    for first in (0, 64, 128):
        some = small.scales[:, :, first : first + 64]
        place = 16 * (some.amax((1, 2), keepdim=True) / some.clamp(min=1e-30)).log2()
        kept = (some > 0) & (place < 254)
        assert kept.sum() > 0.9 * some.numel()
        torch.testing.assert_close(place[kept], place[kept].round(), atol=1e-9, rtol=0)
        ratio = (some / plain.scales[:, :, first : first + 64])[kept]
        assert (ratio.log2().abs() <= 0.5 / 16 + 1e-3).all()  # plain scales are fp16
    errors = [(x.rows - rows).square().sum(-1) for x in (plain, small)]
    assert float((errors[1] / errors[0].clamp(min=1e-30)).median()) < 1.05
    # Means: a bias on one channel takes its group's step, and leaves the others theirs.
    biased = torch.randn(1, 64, 64, generator=random, dtype=torch.float64)
    biased[:, :, 5] += 300
    mean = seal(biased, SideVariant(stored="bytes", mean="page"), eye, eye).mean[0, 0]
    apart = (mean - biased[0].mean(0)).abs()
    assert apart[:16].max() <= 0.51 * 301 / 127 and apart[16:].max() <= 0.51 * 0.6 / 127
    side = SideVariant(stored="bytes", mean="page")
    assert side.bits_per_value(128, 64) == 4 + 8 / 128 + 16 / 64 / 128 + 9 / 64


def test_layers_have_widths_of_their_own() -> None:
    random = torch.Generator().manual_seed(10)
    q, k, v = (torch.randn(2, SINKS + 128, 32, generator=random, dtype=torch.float64) for _ in "qkv")
    own = Variant(widths=((3, 16), (8, 2)))
    for layer, pair in enumerate(own.widths):
        found = seal_layer(_Session(own, None, None), layer, q, k, v)
        plain = Variant().replace(key__bits=pair[0], value__bits=pair[1])
        expected = seal_layer(_Session(plain, None, None), 0, q, k, v)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    model, tokenizer = tiny_model.load(folder)
    return model, cut(tokenizer, python_reference(), 2, 600), folder


@pytest.fixture(scope="module")
def measured(tiny: tuple) -> list:
    model, windows, _ = tiny
    return [sensitivities(model, ids, seed) for seed, ids in enumerate(windows)]


def test_gradients_predict_the_divergence(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small independent errors of all that is sealed: the KL divergence they cause, and the predicted one."""
    model, windows, _ = tiny
    ids, start = windows[0], SINKS + 128
    random = torch.Generator().manual_seed(11)

    def noisy(session: object, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple:
        parts = [x[:, SINKS:] for x in (key, value)]
        return tuple(x + 0.03 * x.std() * torch.randn(x.shape, generator=random) for x in parts)

    def log_p() -> torch.Tensor:
        with torch.inference_mode(), simulated(model, Variant()):
            return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, start:].double(), -1)

    with torch.inference_mode(), simulated(model, None):
        exact = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, start:].double(), -1)
    monkeypatch.setattr("kv4.evaluate.simulation.seal_layer", noisy)
    measured = [float((exact.exp() * (exact - log_p())).sum(-1).mean()) for _ in range(6)]
    draws = [sensitivities(model, ids, seed) for seed in range(12)]
    expected = sum(predicted(draws, lambda layer, x: noisy(None, layer, x.query, x.key, x.value)))
    assert min(measured) > 1e-7
    # Six noises and twelve draws of tokens: both means have errors of some per cent.
    assert expected == pytest.approx(sum(measured) / len(measured), rel=0.3)


def test_gradients_leave_the_model_as_it_was(tiny: tuple) -> None:
    model, windows, _ = tiny
    before = model.config._attn_implementation
    rows = sensitivities(model, windows[0])
    assert model.config._attn_implementation == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert len(rows) == 3 and rows[0].key_gradient.shape == (2, 600 - SINKS, 64)
    assert rows[0].key_gradient[:, -60:].abs().max() == 0  # never sealed in this window
    assert rows[0].key_gradient[:, :64].abs().max() > 0
    assert rows[0].divergence(rows[0].key[:, SINKS:], rows[0].value[:, SINKS:]) == (0, 0)
    with pytest.raises(ValueError, match="^ids: expected more than 132 tokens, so that a page is sealed; got 132"):
        sensitivities(model, windows[0][:, :132])


def test_losses_are_those_of_one_side_of_one_layer(tiny: tuple, measured: list) -> None:
    table = losses(measured, Variant(), widths=(2, 4))
    assert table.shape == (2, 3, 2) and (table[:, :, 0] > table[:, :, 1]).all() and (table > 0).all()
    some = Variant(widths=((16, 16), (2, 4), (16, 16)))
    session = _Session(some, None, None)
    keys, values = predicted(measured, lambda layer, x: seal_layer(session, layer, x.query, x.key, x.value))
    assert keys == pytest.approx(float(table[0, 1, 0])) and values == pytest.approx(float(table[1, 1, 1]))


def test_a_calibration_keeps_its_budgets_and_is_read_back(tiny: tuple, tmp_path: Path) -> None:
    model, windows, folder = tiny
    bits = (2.5, 3.25, 4.25)
    made = calibrate(model, windows, bits=bits, variant=by_layers(), identity=identity_of(folder), text="a text")
    assert made.budgets == bits and made.refined == 1 and made.tokens == 1200
    variants = [by_layers().replace(widths=made.widths_of(budget)) for budget in bits]
    for variant, budget in zip(variants, bits, strict=True):
        assert budget - 1 / 6 - 1e-9 < variant.bits_per_value(64, 64) <= budget  # less than a bit of one side is left
    file = tmp_path / "layers.safetensors"
    made.save(file)
    back = load(file, folder)
    assert (back.budgets, back.refined, back.method) == (made.budgets, 1, "layers")
    assert [back.widths_of(b) for b in bits] == [v.widths for v in variants]
    found = measure_all(model, windows, [Candidate(f"{b:g}", v, back) for b, v in zip(bits, variants, strict=True)])
    assert found["2.5"].kl > found["3.25"].kl > found["4.25"].kl > 0
    with pytest.raises(ValueError, match=r"^bits: expected a budget of the calibration, 2.5, 3.25, 4.25; got 3"):
        back.widths_of(3)
    back.refined = 3
    with pytest.raises(
        ValueError, match="^calibration: expected what the packed cache has; got 3 refined tokens a page"
    ):
        back.arguments(2.5)
    with pytest.raises(ValueError, match="^windows: expected at least 1; got 0"):
        calibrate(model, [])


def test_files_of_the_first_version_are_read_and_bad_ones_refused(measured: list, tmp_path: Path) -> None:
    old = tmp_path / "old.safetensors"
    Calibration({"layer.0.key.lambda": torch.ones(2, 4)}, Recipe(), {"digest": "x"}).save(old)
    from safetensors import safe_open

    with safe_open(str(old), "pt") as file:
        assert file.metadata()["version"] == "1" and "budgets" not in file.metadata()
    assert load(old).budgets == ()

    file = tmp_path / "new.safetensors"

    def refused(message: str, **changed: object) -> None:
        made = from_rows(measured[:1], (3.25,), Variant(refined=1), 64, (2, 4))
        made.tensors |= {f"layer.1.{name}": x for name, x in changed.items() if isinstance(x, torch.Tensor)}
        made.refined = changed.get("refined", made.refined)
        made.save(file)
        with pytest.raises(ValueError, match=message):
            load(file)

    refused("^calibration: expected widths of 2 to 8 bits; got others in layer.1", widths=torch.tensor([[4.0, 9.0]]))
    refused("^calibration: expected widths of 2 to 8 bits; got others in layer.1", widths=torch.tensor([[4.0, 2.5]]))
    refused(r"^calibration: expected layer.1.widths \[1, 2\]; got \[2, 2\]", widths=torch.full((2, 2), 4.0))
    refused("^calibration: expected finite numbers", widths=torch.full((1, 2), float("nan")))
    refused("^calibration: expected 0 to 4 refined tokens; got 5", refined=5)
    tensors = load_file(old) | {"layer.0.widths": torch.zeros(1, 2)}
    meta = {"format": "kv4-calibration", "version": "2", "recipe": json.dumps(Recipe().to_dict()), "model": "{}"}
    save_file(tensors, str(file), meta)
    with pytest.raises(ValueError, match="^calibration: expected budgets beside layer.0.widths; got none"):
        load(file)
    save_file(load_file(old), str(file), meta | {"version": "3"})
    with pytest.raises(ValueError, match="^calibration: expected version 1 or 2; got '3'"):
        load(file)


def test_rows_are_predicted_and_measured(tiny: tuple) -> None:
    model, windows, folder = tiny
    rows = select("kv4,refined-1,layers-4.25,layers-3.25-refined,layers-4.25-even", 64)
    needed = Calibrations(model, windows[1:], identity_of(folder), folder / "scratch", "a text")
    found = {p.row.name: p for p in predict(model, windows[:1], rows, needed)}
    total = {name: p.key + p.value for name, p in found.items()}
    assert total["layers-3.25-refined"] > 2 * total["layers-4.25"] > 0
    assert found["layers-4.25"].bits_per_value <= 4.25 and found["layers-3.25-refined"].bits_per_value <= 3.25
    assert found["refined-1"].bits_per_value > found["kv4"].bits_per_value
    assert found["refined-1"].key < found["kv4"].key and found["refined-1"].value == found["kv4"].value
    even = needed.variant(next(row for row in rows if row.name == "layers-4.25-even"))
    assert {w for pair in even.widths for w in pair} <= {2, 4, 8}
    measured = ablate(model, windows[:1], rows[:3], needed, state=State(None), identity=identity_of(folder))
    assert all(r.quality.kl > 0 for r in measured)
    assert measured[2].bits_per_value <= 4.25
    with pytest.raises(ValueError, match="^--predict: expected rows that seal what kv4 seals; got sinks-16"):
        predict(model, windows[:1], select("sinks-16", 64), needed)


def _spd(heads: int, d: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, d, 3 * d, generator=random, dtype=torch.float64)
    x = x * torch.logspace(0, -2, d, dtype=torch.float64)[:, None]
    return x @ x.mT / x.shape[-1]


def test_oscar_s_rotation_and_codes(tiny: tuple) -> None:
    moments = _spd(2, 64, 12)
    turn = oscar.turned(moments)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(64, dtype=torch.float64).expand(2, 64, 64))
    stored = turn @ moments @ turn.mT
    diagonal = stored.diagonal(dim1=1, dim2=2)
    # The Hadamard matrix leaves every channel the mean of the eigenvalues.
    torch.testing.assert_close(diagonal, diagonal.mean(-1, keepdim=True).expand_as(diagonal))
    with pytest.raises(ValueError, match="^head_dim: expected a power of two for OSCAR's Hadamard matrix; got 48"):
        oscar.turned(_spd(1, 48, 1))
    rows = torch.randn(2, 100, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eye = torch.eye(128, dtype=torch.float64)
    side = oscar.variant(128).key
    read = seal(rows, side, eye, eye)
    assert set(read.codes.unique().tolist()) == {0, 1, 2, 3}
    assert all(len(read.rows[0, t].unique()) <= 4 for t in range(100))
    # Max 1960, table II: four even levels of a Gaussian at their best step lose .1188; a fit to 128 values, less.
    assert float((read.rows - rows).square().mean()) == pytest.approx(0.1188, rel=0.15)
    assert oscar.variant(128).bits_per_value(128, 128) == 2.25

    model, windows, folder = tiny
    made = oscar.calibrate(model, windows[:1], identity=identity_of(folder))
    with pytest.raises(ValueError, match="^calibration: expected what the packed cache has; got rotations of OSCAR's"):
        made.arguments()
    found = measure_all(model, windows[1:], [Candidate("oscar", oscar.variant(64), made)])
    assert found["oscar"].kl > 0
