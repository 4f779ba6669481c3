"""What a cache does to the model's next-token distributions, token by token, and its summary.

p is the exact cache's distribution, q the one under test. Per scored token: the KL divergence sum p (log p - log q) in
nats, whether both have the same likeliest token, and -log p and -log q of the text's own next token.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import exp, isinf, nan, sqrt
from typing import Any

import numpy as np
import torch

BLOCK = 128  # scored tokens of a block: the unit of standard errors where windows are few
FEW_WINDOWS = 4
_ROWS = 128  # distributions compared at a time


@dataclass
class TokenScores:
    """One window's scored tokens, float32 [n] each; `same` is 0 or 1."""

    kl: np.ndarray
    same: np.ndarray
    nll_exact: np.ndarray
    nll: np.ndarray

    def to_dict(self) -> dict[str, str]:
        """Base64 of little-endian float32."""
        return {name: base64.b64encode(np.asarray(x, dtype="<f4").tobytes()).decode() for name, x in vars(self).items()}

    @classmethod
    def from_dict(cls, data: dict[str, str]) -> TokenScores:
        return cls(**{name: np.frombuffer(base64.b64decode(x), dtype="<f4") for name, x in data.items()})


class Head:
    """logits = head(hidden): the model's own way from its decoder's output [n, hidden] to logits [n, vocabulary], with
    whatever caps and factors belong to it."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        output = BaseModelOutputWithPast(last_hidden_state=hidden[None])
        self.decoder.forward = lambda *args, **kwargs: output
        try:
            ids = torch.zeros((1, hidden.shape[0]), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            del self.decoder.forward


def score_many(
    head: Callable[[torch.Tensor], torch.Tensor],
    exact: torch.Tensor,
    others: Sequence[torch.Tensor],
    targets: torch.Tensor,
    progress: Callable[[int], None] = lambda _: None,
) -> list[TokenScores]:
    """Scores decoder outputs `others`, each [n, hidden], against `exact` [n, hidden]; targets int64 [n] are the tokens
    that come next. The exact distributions are computed once for all. Calls progress(tokens) for each of `others`.

    Logits less their maximum are compared in float32; the error of a KL is below 1e-6 nats (tests)."""
    n = exact.shape[0]
    targets = targets.to(exact.device)
    found = [TokenScores(*(np.empty(n, dtype=np.float32) for _ in range(4))) for _ in others]
    for lo in range(0, n, _ROWS):
        hi = min(lo + _ROWS, n)
        zp, top, log_total = _centred(head(exact[lo:hi]))
        p = zp.exp()
        p /= p.sum(-1, keepdim=True, dtype=torch.float32)
        target = targets[lo:hi, None]
        nll_exact = log_total - zp.gather(1, target)[:, 0].double()
        for scores, hidden in zip(found, others, strict=True):
            zq, other_top, other_total = _centred(head(hidden[lo:hi]))
            nll = other_total - zq.gather(1, target)[:, 0].double()
            difference = torch.sub(zp, zq, out=zq)
            kl = torch.linalg.vecdot(p, difference).double() - log_total + other_total
            scores.kl[lo:hi] = kl.clamp(min=0).cpu().numpy()
            scores.same[lo:hi] = (top == other_top).cpu().numpy()
            scores.nll_exact[lo:hi] = nll_exact.cpu().numpy()
            scores.nll[lo:hi] = nll.cpu().numpy()
            progress(hi - lo)
    return found


def _centred(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits less their maximum, its index, log of the sum of their exponentials in float64), per row."""
    z = logits.float()
    maximum, index = z.max(-1, keepdim=True)
    z -= maximum  # nobody else holds the logits, and copies of them are what scoring would wait for
    return z, index[:, 0], z.exp().sum(-1).double().log()


@dataclass(frozen=True)
class Summary:
    """Per scored token over all windows; `_se` is a standard error. se_over: "windows", or "blocks" of 128 scored
    tokens where there are fewer than four windows (nan where there is one block)."""

    windows: int
    tokens: int
    kl: float  # nats
    kl_se: float
    kl_median: float
    kl_p99: float
    kl_p999: float
    top1: float
    top1_se: float
    ppl_exact: float
    ppl: float
    dppl: float  # ppl / ppl_exact - 1
    dppl_se: float
    se_over: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired(windows: Sequence[TokenScores], base: Sequence[TokenScores]) -> tuple[float, float]:
    """(mean of the KL divergence less that of `base` on the same tokens, its standard error over blocks)."""
    parts = [
        (a.kl.astype(np.float64) - b.kl)[i : i + BLOCK]
        for a, b in zip(windows, base, strict=True)
        for i in range(0, len(a.kl), BLOCK)
    ]
    means = np.array([part.mean() for part in parts])
    error = float(means.std(ddof=1) / sqrt(len(means))) if len(means) > 1 else nan
    return float(np.concatenate(parts).mean()), error


def summarise(windows: Sequence[TokenScores]) -> Summary:
    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(w, name) for w in windows]).astype(np.float64)

    kl, same, exact, nll = (joined(name) for name in ("kl", "same", "nll_exact", "nll"))
    over = "windows" if len(windows) >= FEW_WINDOWS else "blocks"

    def error(per_token: Callable[[TokenScores], np.ndarray]) -> float:
        parts = [per_token(w).astype(np.float64) for w in windows]
        if over == "blocks":
            parts = [p[i : i + BLOCK] for p in parts for i in range(0, max(len(p) - BLOCK // 2, 1), BLOCK)]
        means = np.array([p.mean() for p in parts])
        return float(means.std(ddof=1) / sqrt(len(means))) if len(means) > 1 else nan

    change = float((nll - exact).mean())
    return Summary(
        windows=len(windows),
        tokens=len(kl),
        kl=float(kl.mean()),
        kl_se=error(lambda w: w.kl),
        kl_median=float(np.median(kl)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_p999=float(np.quantile(kl, 0.999)),
        top1=float(same.mean()),
        top1_se=error(lambda w: w.same),
        ppl_exact=_exp(float(exact.mean())),
        ppl=_exp(float(nll.mean())),
        dppl=_exp(change) - 1,
        dppl_se=_times(_exp(change), error(lambda w: w.nll.astype(np.float64) - w.nll_exact)),
        se_over=over,
    )


def _exp(x: float) -> float:
    return exp(x) if x < 700 else float("inf")


def _times(a: float, b: float) -> float:
    return nan if isinf(a) else a * b
