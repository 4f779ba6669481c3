"""How the command's threads wait for each other.

torch and kv4 share GNU's OpenMP threads. By default a thread that has nothing to do, or waits for the others at the end
of a loop, spins 300,000 times, some milliseconds, before it sleeps. On an idle machine that costs nothing. Where other
programs want the CPUs, the spinning thread takes the time that the one it waits for would need, and a token of a small
model, which is some 150 such loops, takes several times as long. The command bounds the spin to what separates the
loops of a step: a thread that sleeps between them has to be woken for each.
"""

from __future__ import annotations

from collections.abc import MutableMapping

# Either says how long threads spin. The runtime reads them once, when it is loaded.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SPINS = 10_000  # 0.1 to 0.5 ms


def bound_spin(environment: MutableMapping[str, str]) -> None:
    """Bounds the spin for this process and its children, unless the user has said how threads wait. Counts only before
    kv4's compiled module or torch is imported."""
    if not any(environment.get(name) for name in VARIABLES):
        environment["GOMP_SPINCOUNT"] = str(SPINS)
