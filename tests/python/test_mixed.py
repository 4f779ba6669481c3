"""Mixed widths in a calibrated basis: the budget, the basis, what is read back, what gradients say, and its file."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_model
from kv4 import Recipe
from kv4.bench.text import python_reference
from kv4.calibration import Calibration, identity_of, load
from kv4.evaluate import Candidate, measure_all, oscar
from kv4.evaluate.ablate import Calibrations, ablate, predict
from kv4.evaluate.design import Design, bits_per_value, design, design_from, share_of_lightest
from kv4.evaluate.fake import seal
from kv4.evaluate.laboratory import laboratory
from kv4.evaluate.mixed import Basis, lightest, make_basis, put_back, seal_mixed, set_aside
from kv4.evaluate.rows import select
from kv4.evaluate.sensitivity import SINKS, predicted, sensitivities
from kv4.evaluate.state import State
from kv4.evaluate.variant import SideVariant, Variant
from kv4.evaluate.widths import WIDTHS, Group, allocate, distortion, overhead
from kv4.evaluate.windows import cut


def _spd(heads: int, d: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(heads, d, 3 * d, generator=random, dtype=torch.float64)
    x = x * torch.logspace(0, -2, d, dtype=torch.float64)[:, None]
    return x @ x.mT / x.shape[-1]


def test_distortions_are_those_of_the_tables() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4000, 128, generator=random, dtype=torch.float64)
    eye, one = torch.eye(128, dtype=torch.float64)[None], torch.ones(1, 1, dtype=torch.float64)
    for bits in WIDTHS[1:]:
        read = seal_mixed(x, Basis(eye, eye, one, one), torch.full((1, 1), bits), mean=False)
        # A scale of its own helps a token a little, and its rounding costs a little.
        assert float((read - x).square().mean()) == pytest.approx(distortion(bits), rel=0.1), bits
    assert distortion(0) == 1
    assert all(distortion(a) > distortion(b) for a, b in pairwise(WIDTHS))


def test_widths_keep_the_budget_and_waste_none_of_it() -> None:
    random = torch.Generator().manual_seed(1)
    groups = [Group(float(x), 1.2 * float(x)) for x in torch.logspace(-4, 3, 40)[torch.randperm(40, generator=random)]]
    last = float("inf")
    for budget in (0, 1, 2, 39.9, 80, 120, 161, 240, 319, 320, 1000):
        found, loss = allocate(groups, budget)
        assert sum(found) <= budget and set(found) <= set(WIDTHS)
        left = budget - sum(found)
        cheapest = [min((w - b for w in WIDTHS if w > b), default=1e9) for b in found]
        assert min(cheapest) > left  # no group can be given more
        assert loss <= last
        last = loss
    for a, b in pairwise(sorted(zip(groups, allocate(groups, 120)[0], strict=True), key=lambda x: x[0].loss)):
        assert a[1] <= b[1] + 1  # more to lose, no fewer bits, but for what the last step left over


def test_widths_are_the_best_there_are() -> None:
    random = torch.Generator().manual_seed(2)
    for _ in range(20):
        losses = torch.rand(4, generator=random).pow(4).tolist()
        groups = [Group(x, x) for x in losses]
        found, loss = allocate(groups, 14)
        # Among the choices of just as many bits none loses less: what lies on the hull is best for its own budget.
        best = min(
            sum(g.at(w) for g, w in zip(groups, some, strict=True))
            for some in product(WIDTHS, repeat=4)
            if sum(some) <= 14
        )
        assert loss <= best * 3 and sum(found) <= 14
        assert loss == pytest.approx(sum(g.at(w) for g, w in zip(groups, found, strict=True)))


def test_widths_refuse() -> None:
    with pytest.raises(ValueError, match=r"^budget: expected at least 8 bits; got 7"):
        allocate([Group(1, 1)] * 2, 7, (4, 6))
    for widths in ((4, 2), (5,), (2, 2)):
        with pytest.raises(ValueError, match="^widths: expected some of"):
            allocate([Group(1, 1)], 8, widths)


def test_a_page_s_bits_are_counted() -> None:
    # 64 tokens of d 128: two scales of 8 bits a token, a mean of 8 bits a channel with 8 steps of 16 bits.
    assert overhead(128, 128, 16, 0) == 64 * 16 + 128 * 8 + 8 * 16
    assert overhead(128, 128, 16, 1) - overhead(128, 128, 16, 0) == 8 * 256 + 2 * 16 + 6


@pytest.mark.parametrize("group", [8, 16, 64])
def test_a_basis_has_an_inverse_and_channels_that_cost_alike(group: int) -> None:
    cost, energy = _spd(2, 64, 3), _spd(2, 64, 4).flip(-1).flip(-2)
    basis, groups = make_basis(cost, energy, group)
    eye = torch.eye(64, dtype=torch.float64).expand(2, 64, 64)
    torch.testing.assert_close(basis.forward @ basis.inverse, eye, atol=1e-9, rtol=0)
    stored = basis.forward @ energy @ basis.forward.mT
    weighed = basis.inverse.mT @ cost @ basis.inverse
    for h in range(2):
        for i in range(64 // group):
            part = slice(i * group, (i + 1) * group)
            # Energies and costs of a group, summed, are what sigma and weight say.
            assert stored[h, part, part].trace() == pytest.approx(group * float(basis.sigma[h, i]) ** 2, rel=1e-9)
            assert weighed[h, part, part].trace() == pytest.approx(group * float(basis.weight[h, i]), rel=1e-9)
            other = torch.cat([stored[h, part, : part.start], stored[h, part, part.stop :]], 1)
            assert other.abs().max() < 1e-9 * stored[h].abs().max() if other.numel() else True
    loss = [g.loss for g in groups[: 64 // group]]
    assert loss == sorted(loss, reverse=True)
    # All that no group stores is all that there is to lose.
    total = float(torch.einsum("hij,hji->", cost, energy)) / 2
    assert sum(g.energy for g in groups) == pytest.approx(total, rel=1e-9)
    for wrong in (5, 48, 1, 0):
        with pytest.raises(ValueError, match="^group: expected an even divisor of the head dim 64"):
            make_basis(cost, energy, wrong)


def test_one_width_in_a_plain_rotation_is_today_s_recipe() -> None:
    """All channels 4 bits and no weights: kv4's values, of the same levels and as near."""
    from kv4.evaluate.levels import levels
    from kv4.evaluate.rotations import rotation

    random = torch.Generator().manual_seed(5)
    rows = torch.randn(2, 192, 64, generator=random, dtype=torch.float64) * torch.linspace(0.3, 2, 64)
    matrix, side = torch.from_numpy(rotation("srft", 64, 7)), SideVariant(seed=7)
    # Rows whose least-squares scale is a whole sixteenth of an octave, which mixed pages store as it is.
    gain = levels("lloyd_max", 4).gain
    scale = seal(rows, side, matrix, matrix.mT).scales.mT * gain
    unit = torch.exp2((16 * scale.log2()).round() / 16)
    rows = rows * unit / scale
    today = seal(rows, side, matrix, matrix.mT)
    one = torch.ones(2, 1, dtype=torch.float64)
    basis = Basis(matrix.expand(2, 64, 64), matrix.mT.expand(2, 64, 64), one, one)
    mixed = seal_mixed(rows, basis, torch.full((2, 1), 4), mean=False)
    level = mixed @ matrix.mT / unit * gain
    magnitude = torch.tensor(levels("lloyd_max", 4).magnitude, dtype=torch.float64)
    held = magnitude[torch.where(today.codes < 0, -1 - today.codes, today.codes).long()]
    same = (level.abs() - held).abs() < 1e-6
    assert same.float().mean() > 0.8  # all but those near a boundary, under a scale that is not the rms
    nearest = (level.abs()[..., None] - magnitude).abs().amin(-1)
    whole = nearest.amax(-1) < 1e-6  # the same scale too
    assert whole.float().mean() > 0.8
    errors = [(x - rows).norm(dim=-1)[whole] for x in (mixed, today.rows)]
    assert (errors[0] <= errors[1] * 1.001).all()  # codes nearest under the scale as stored


def test_a_better_basis_and_more_bits_lose_less() -> None:
    random = torch.Generator().manual_seed(6)
    cost, energy = _spd(1, 64, 7), _spd(1, 64, 8)
    rows = torch.randn(1, 640, 64, generator=random, dtype=torch.float64) @ torch.linalg.cholesky(energy)[0].mT
    basis, groups = make_basis(cost, energy, 16)

    def loss(widths: list[int]) -> float:
        error = seal_mixed(rows, basis, torch.tensor([widths]), mean=True) - rows
        return float(torch.einsum("hti,hij,htj->", error, cost, error)) / 640 / 2

    found, expected = allocate(groups, 16)
    assert found != [4, 4, 4, 4] and loss(found) < loss([4, 4, 4, 4])
    assert loss(found) == pytest.approx(expected, rel=0.3)
    assert loss([8, 8, 8, 8]) < loss(found)
    assert loss([0, 0, 0, 0]) == pytest.approx(sum(g.energy for g in groups), rel=0.1)


def test_the_lightest_token_of_a_page_is_set_aside_and_comes_back_in_8_bits() -> None:
    random = torch.Generator().manual_seed(9)
    k, v = (torch.randn(2, 150, 32, generator=random, dtype=torch.float64) for _ in "kv")
    v[0, 70] *= 1e-3
    v[1, 5] *= 1e-3
    places = lightest(v, 1)
    assert places.shape == (2, 2, 1) and places[0, 1, 0] == 6 and places[1, 0, 0] == 5
    k[1, 5] += 1000
    aside = set_aside(k, places)
    others = torch.cat([k[1, :5], k[1, 6:64]])
    torch.testing.assert_close(aside[1, :64].mean(0), others.mean(0))
    torch.testing.assert_close(aside[:, 128:], k[:, 128:])
    read = put_back(torch.zeros_like(k), k, aside, places)
    step = (k[1, 5] - others.mean(0)).abs().max() / 127
    assert (read[1, 5] - k[1, 5]).abs().max() <= 0.51 * step
    assert read[1, 6].abs().max() == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    folder = tiny_model.save(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, cut(tokenizer, python_reference(), 2, 600), folder


@pytest.fixture(scope="module")
def measured(tiny: tuple) -> list:
    model, windows, _ = tiny
    return [sensitivities(model, ids, seed) for seed, ids in enumerate(windows)]


def test_gradients_foretell_the_divergence(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small independent errors of all that is sealed: the KL divergence they cause, and the one foretold."""
    model, windows, _ = tiny
    ids, start = windows[0], SINKS + 128
    random = torch.Generator().manual_seed(11)

    def noisy(session: object, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple:
        parts = [x[:, SINKS:] for x in (key, value)]
        return tuple(x + 0.03 * x.std() * torch.randn(x.shape, generator=random) for x in parts)

    def log_p() -> torch.Tensor:
        with torch.inference_mode(), laboratory(model, Variant()):
            return torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, start:].double(), -1)

    with torch.inference_mode(), laboratory(model, None):
        exact = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, start:].double(), -1)
    monkeypatch.setattr("kv4.evaluate.laboratory.seal_layer", noisy)
    measured = [float((exact.exp() * (exact - log_p())).sum(-1).mean()) for _ in range(6)]
    draws = [sensitivities(model, ids, seed) for seed in range(12)]
    foretold = sum(predicted(draws, lambda layer, x: noisy(None, layer, x.query, x.key, x.value)))
    assert min(measured) > 1e-7
    # Six noises and twelve draws of tokens: both means have errors of some per cent.
    assert foretold == pytest.approx(sum(measured) / len(measured), rel=0.3)


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


def test_a_design_keeps_its_budgets_and_is_read_back(tiny: tuple, measured: list, tmp_path: Path) -> None:
    model, windows, folder = tiny
    made = design(model, windows, identity=identity_of(folder), text="a text")
    assert made.budgets == (2.5, 3.25, 4.25) and made.escapes in (0, 1) and made.tokens == 1200
    for budget in made.budgets:
        bits = bits_per_value(made, budget)
        assert budget - 16 * 2 / (64 * 2 * 3 * 2) < bits <= budget  # less than one step of one group is left
    file = tmp_path / "mixed.safetensors"
    made.save(file)
    back = load(file, folder)
    assert (back.budgets, back.escapes, back.method) == (made.budgets, made.escapes, "mixed")
    for name, tensor in made.tensors.items():
        torch.testing.assert_close(back.tensors[name], tensor, rtol=0, atol=0)
    variants = [Candidate(f"{b:g}", Variant(mixed=b, escapes=back.escapes), back) for b in back.budgets]
    found = measure_all(model, windows, variants)
    assert found["2.5"].kl > found["3.25"].kl > found["4.25"].kl > 0
    with pytest.raises(ValueError, match=r"^bits: expected a budget of the calibration, 2.5, 3.25, 4.25; got 3"):
        back.mixed_of("key", 0, 3)
    with pytest.raises(ValueError, match="^calibration: expected lambda or matrices, for the packed cache; got mixed"):
        back.arguments()
    with (
        pytest.raises(ValueError, match="^calibration: expected one for the variant's mixed widths; got none"),
        laboratory(model, Variant(mixed=2.5)),
    ):
        pass
    with pytest.raises(ValueError, match=r"^bits: expected a budget for such groups; got 0.1 \("):
        design_from(measured, bits=(0.1,))
    again = design_from(measured, bits=(4.25,), identity=identity_of(folder))
    torch.testing.assert_close(again.tensors["layer.1.key.basis"], made.tensors["layer.1.key.basis"])


def test_files_of_the_first_version_are_read_and_bad_ones_refused(tmp_path: Path, measured: list) -> None:
    old = tmp_path / "old.safetensors"
    Calibration({"layer.0.key.lambda": torch.ones(2, 4)}, Recipe(), {"digest": "x"}).save(old)
    from safetensors import safe_open

    with safe_open(str(old), "pt") as file:
        assert file.metadata()["version"] == "1" and "budgets" not in file.metadata()
    assert load(old).budgets == ()

    made = design_from(measured, bits=(3.25,))
    file = tmp_path / "new.safetensors"

    def refused(message: str, **changed: torch.Tensor) -> None:
        kept = dict(made.tensors)
        for name, tensor in changed.items():
            made.tensors[f"layer.0.key.{name}"] = tensor
        made.save(file)
        made.tensors = kept
        with pytest.raises(ValueError, match=message):
            load(file)

    refused(r"^calibration: expected widths of \(0, 2, 3, 4, 6, 8\); got others", widths=torch.full((1, 2, 4), 5.0))
    refused(r"^calibration: expected layer.0.key.widths \[1, 2, 4\]; got \[2, 2, 4\]", widths=torch.zeros(2, 2, 4))
    refused(r"^calibration: expected positive layer.0.key.sigma and weight", sigma=torch.zeros(2, 4))
    refused(r"^calibration: expected layer.0.key.basis \[heads, d, d\]; got \[2, 3\]", basis=torch.zeros(2, 3))
    refused("^calibration: expected finite numbers", weight=torch.full((2, 4), float("nan")))
    tensors = load_file(old) | {"layer.0.key.widths": torch.zeros(1, 2, 1)}
    meta = {"format": "kv4-calibration", "version": "2", "recipe": json.dumps(Recipe().to_dict()), "model": "{}"}
    save_file(tensors, str(file), meta)
    with pytest.raises(ValueError, match="^calibration: expected budgets beside layer.0.key.widths; got none"):
        load(file)
    save_file(load_file(old), str(file), meta | {"version": "3"})
    with pytest.raises(ValueError, match="^calibration: expected version 1 or 2; got '3'"):
        load(file)


@pytest.mark.parametrize(
    "wrong", [{"cost": "none"}, {"share": "all"}, {"heads": "some"}, {"damping": 2.0}, {"escapes": 3}]
)
def test_designs_refuse(wrong: dict) -> None:
    name = next(iter(wrong))
    with pytest.raises(ValueError, match=f"^{name}: expected .*; got "):
        Design(**wrong)


def test_escapes_are_chosen_where_light_tokens_count(measured: list) -> None:
    assert 0 < share_of_lightest(measured) < 1
    forced = [design_from(measured, bits=(4.25,), options=Design(escapes=n)) for n in (0, 1)]
    assert [f.escapes for f in forced] == [0, 1]
    codes = [sum(float(x.sum()) for name, x in f.tensors.items() if name.endswith("widths")) for f in forced]
    assert codes[0] > codes[1]  # what escapes take is not there for codes


def test_rows_are_predicted_and_measured(tiny: tuple) -> None:
    model, windows, folder = tiny
    rows = select("kv4,escape-1,mixed-4.25,mixed-2.5,mixed-4.25-query,mixed-4.25-pooled", 64)
    needed = Calibrations(model, windows[1:], identity_of(folder), folder / "scratch", "a text")
    found = {p.row.name: p for p in predict(model, windows[:1], rows, needed)}
    few, many = found["mixed-2.5"], found["mixed-4.25"]
    # How much more depends on how the one budget is divided between the sides, and on tokens unlike the calibration's.
    assert few.key > many.key > 0 and few.value > many.value > 0
    assert found["mixed-2.5"].bits_per_value <= 2.5
    assert found["escape-1"].bits_per_value > found["kv4"].bits_per_value
    measured = ablate(model, windows[:1], rows[:2], needed, state=State(None), identity=identity_of(folder))
    assert all(r.quality.kl > 0 for r in measured)
    with pytest.raises(ValueError, match="^--predict: expected rows that seal what kv4 seals; got sinks-16"):
        predict(model, windows[:1], select("sinks-16", 64), needed)


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
    with pytest.raises(ValueError, match="^calibration: expected lambda or matrices, .*; got rotations of OSCAR's"):
        made.arguments()
    found = measure_all(model, windows[1:], [Candidate("oscar", oscar.variant(64), made)])
    assert found["oscar"].kl > 0
