"""Whether two implementations did the same work: numbers that tell, and how far they may differ."""

from collections.abc import Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]
Answer = Mapping[str, float]
TINY = 1e-30  # in place of an update of zero
# How far a peer may be from mae_jax, by dtype. Measured on CPUs with transformers and the official
# code, of ViT-Ti and ViT-S, f32 and bf16: "flipped" 1e-7 and 3e-3, where other gradients have 0.5;
# and a step in bf16 that predicts 9 of 10 masked patches 2e-2; "update" 2e-5 and 8e-6, where no
# decay of matrices makes about 1e-3, and float32 rounds parameters of one to 1e-4 of a step;
# "grad_norm" 1e-5 and 1e-3; "tokens" of bf16 1e-2.
TOLERANCES = {
    "f32": {
        "loss": 1e-4,
        "grad_norm": 1e-3,
        "flipped": 1e-3,
        "update": 5e-4,
        "next_loss": 1e-3,
        "tokens": 1e-4,
    },
    "bf16": {
        "loss": 5e-3,
        "grad_norm": 5e-3,
        "flipped": 1e-2,
        "update": 5e-4,
        "next_loss": 5e-3,
        "tokens": 2e-2,
    },
}


def disagreements(dtype: str, ours: Answer, theirs: Answer, compared: Answer) -> list[str]:
    """What differs by more than it may, a line each; none where both did the same work.

    ours, theirs: what the two workers say of their check; compared: of both together.
    """
    lines = []
    if theirs["parameters"] != ours["parameters"]:
        lines.append(f"{theirs['parameters']:,} parameters instead of {ours['parameters']:,}")
    apart = dict(compared)
    for name in ("loss", "grad_norm", "next_loss"):
        if name in ours:
            apart[name] = abs(theirs[name] - ours[name]) / abs(ours[name])
    for name, difference in apart.items():
        most = TOLERANCES[dtype][name]
        if not difference <= most:  # nor is what is no number
            values = f" ({theirs[name]:.6g} against {ours[name]:.6g})" if name in ours else ""
            lines.append(
                f"{MEANINGS[name]} {difference:.2g} apart{values}; at most {most:g} may be"
            )
    return lines


MEANINGS = {
    "loss": "the loss is",
    "grad_norm": "the norm of the gradient is",
    "next_loss": "the loss after a step is",
    "flipped": "the signs of updates, in share, are",
    "update": "the updates are",
    "tokens": "the tokens are",
}


def compare_updates(before: Arrays, ours: Arrays, theirs: Arrays) -> dict[str, float]:
    """How much two first steps of AdamW differ.

    Such a step is the learning rate times the sign of the gradient, plus the decay. So rounding
    turns some updates around, those of gradients near zero: "flipped" is the share of them over all
    parameters. "update" tells another rate, decay or choice of what is decayed: the median
    difference over the median update, of the parameter where that is largest. Key biases, whose
    true gradient is zero, are left out.
    """
    count, flipped, differences = 0, 0, []
    for name, start in before.items():
        mine, other = (
            _without_key_bias(name, after[name].astype(np.float32) - start)
            for after in (ours, theirs)
        )
        count += mine.size
        flipped += int((np.sign(mine) != np.sign(other)).sum())
        mine, other = _some(mine), _some(other)
        difference = float(np.median(np.abs(mine - other)))
        differences.append(difference / max(float(np.median(np.abs(mine))), TINY))
    return {"flipped": flipped / count, "update": float(np.max(differences))}  # nan if one is


def _without_key_bias(name: str, update: np.ndarray) -> np.ndarray:
    if not name.endswith("attn/qkv/bias"):
        return update
    queries, _, values = np.split(update, 3, axis=-1)
    return np.concatenate([queries, values], axis=-1)


def _some(values: np.ndarray) -> np.ndarray:
    """A million of them, spread evenly: enough for a median."""
    return values.ravel()[:: max(1, values.size // 2**20)]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of the difference over that of what is expected."""
    expected = expected.astype(np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
