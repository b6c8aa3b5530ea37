"""Results of a frontier that nothing was run for, with texts that try to be more than text."""

from pathlib import Path
from typing import Any

from rac_modifier.frontier.folder import FrontierFolder

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=http://127.0.0.1:9/x "
    "onerror=\"document.title='owned'\"><!--"
)
ABOUT: dict[str, Any] = {
    "model": "tiny",
    "fingerprint": "f" * 12,
    "evaluation": {"source": "arithmetic", "problems": 4, "cap": 50, "temperature": 0.0},
    "prompt": {},
}
# label, group, megabytes, accuracy, KL
ROWS: list[tuple[str, str, float, float, float | None]] = [
    ("dense", "dense", 8.0, 0.9, None),
    ("50 %", "sparse", 5.0, 0.85, 0.01),
    ("2:4", "sparse", 4.5, 0.7, 0.05),
    ("50 % + int4", "sparse + quantized", 2.0, 0.8, 0.03),
    ("GPTQ int4", "dense quantized", 2.5, 0.88, 0.004),
    (f"GPTQ int2 {HOSTILE}", "dense quantized", 1.5, 0.2, 1.5),
]


def row(
    label: str, group: str, megabytes: float, accuracy: float, kl: float | None
) -> dict[str, Any]:
    total = int(megabytes * 1e6)
    sizes = {"matrices": total - 500_000, "total": total}
    kinds = ["right", "looping"] if group == "sparse" else ["right", "wrong"]
    endings = {f"p{i}": [{"kind": kind}] for i, kind in enumerate(kinds)}
    interval = {"accuracy": accuracy, "ci_low": accuracy - 0.05, "ci_high": accuracy + 0.05}
    divergence = {"kl": kl, "kl_stderr": (kl or 0) / 10, "agreement": 0.9, "agreement_stderr": 0.01}
    return {
        "label": label,
        "row": label,
        "group": group,
        "seed": None,
        "recipe": None if group == "dense" else {"stage": {"note": HOSTILE, "label": label}},
        "bytes": {**sizes, "bits_per_weight": megabytes},
        "accuracy": {**interval, "endings": endings},
        "divergence": None if kl is None else divergence,
        "paired": None,
        "thinking": 20.0,
        "truncated": 0.25,
        "served": {"tokens_per_second": 100.0 * megabytes} if group == "sparse" else None,
    }


def dense_trace(number: int) -> dict[str, Any]:
    pieces = ["<think>", "ünd ", "🙂", "one ", "two", "</think>", HOSTILE, f"{number}"]
    return {
        "id": f"p{number}",
        "ids": list(range(len(pieces))),
        "text": "".join(pieces),
        "pieces": [len(piece) for piece in pieces],
        "correct": number != 3,
        "finish": "stop",
        "kind": "right" if number != 3 else "wrong",
        "loop": None,
        "question": f"question {number} {HOSTILE}",
        "answer": f"{number}",
    }


def own_trace(number: int, equal: bool) -> dict[str, Any]:
    dense = dense_trace(number)
    same = 8 if equal else 3
    characters = sum(dense["pieces"][:same])
    return {
        "id": f"p{number}",
        "ids": list(range(same)) + ([] if equal else [99]),
        "text": dense["text"][:characters] + ("" if equal else HOSTILE),
        "correct": number in (1, 3),
        "finish": "stop" if equal else "length",
        "kind": "right" if equal else "looping",
        "loop": None if equal else 12,
        "same_tokens": same,
        "same_characters": characters,
        "kl": [0.0, 0.0005, 0.001, 0.9, 20.0, 0.0, 0.0, 0.0],
    }


def write_sample(
    path: Path, about: dict[str, Any] = ABOUT, rows: Any = ROWS, problems: int = 4
) -> Path:
    """A folder of results; problem 1 is answered alike by all, the others are not."""
    with FrontierFolder(path) as folder:
        folder.begin(about)
        for values in rows:
            dense = values[1] == "dense"
            traces = [
                dense_trace(i) if dense else own_trace(i, equal=i == 1)
                for i in range(1, problems + 1)
            ]
            folder.add(row(*values), traces)
    return path
