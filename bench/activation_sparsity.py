"""KL of skipping small inputs of the linear layers while decoding, by share of weight bytes.

python -m bench activation_sparsity
python -m bench activation_sparsity --weights int4 --shares 0 0.4 --rules fisher

While a model writes, column j of a weight is not read where the score of its input x_j is below a
threshold (TEAL, arXiv 2408.14690). Prompts run dense. Thresholds are calibrated on the model's own
traces, on bare prompts or on generic text; KL is along the dense model's answers to held-out
prompts. `--weights` names rows of `bench formats` that were compressed before. A finished row is
not run again.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from bench.common import save
from bench.formats import answers_of, folder_of, load
from bench.grid import CALIBRATIONS
from bench.models import SUBJECTS, Subject, float32_copy
from rac_modifier.calibration.mixture import generic_token_sequences
from rac_modifier.measure.divergence import token_divergence
from rac_modifier.measure.intervals import mean_over_tokens
from rac_modifier.measure.teacher_forcing import TokenSequence, batches_of_like_length, padded
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.generate import sample_sequences
from rac_modifier.settings.calibration import GenericText
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings

READERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
STEPS = 64  # candidate shares of a site
RULES = {  # weight of |x_j| in its score, and what decides the share of each site
    "uniform, magnitude": ("one", "uniform"),
    "uniform, column norm": ("norm", "uniform"),
    "output error, column norm": ("norm", "output"),
    "fisher, column norm": ("norm", "fisher"),
    "fisher": ("fisher", "fisher"),
    "fisher, one threshold": ("fisher", "one threshold"),
}
COLUMNS = {
    "weights": "",
    "rule": "",
    "calibrated on": "",
    "bytes skipped, %": ".1f",
    "predicted KL": ".4f",
    "KL": ".4f",
    "same first token, %": ".1f",
    **{f"{names[0]}, skipped %": ".0f" for names in READERS},
}
TINY = "--model reasoner --tokens 128 --answers 2 --cap 16 --shares 0.4 --rules fisher"


@dataclass
class Site:
    """Linear layers of a decoder layer that read the same x [tokens, d]."""

    kind: str
    column_norm: Tensor  # of all their weights together, [d]
    rows: int
    inputs: list[Tensor] = field(default_factory=list)  # x [tokens, d]
    gradients: list[Tensor] = field(default_factory=list)  # d log p(label) / d x
    weight: Tensor = field(default_factory=lambda: torch.empty(0))  # of |x| in the score, [d]
    threshold: float = 0.0
    kept: int = 0
    seen: int = 0

    @property
    def size(self) -> int:
        """Count the weights, which stands for their bytes."""
        return self.rows * len(self.column_norm)


def linears_of(model: Any) -> list[list[nn.Linear]]:
    """Return the linear layers of each site, in order."""
    parts = {"q_proj": "self_attn", "o_proj": "self_attn"}
    return [
        [getattr(getattr(layer, parts.get(names[0], "mlp")), name) for name in names]
        for layer in model.model.layers
        for names in READERS
    ]


def sites_of(model: Any) -> list[Site]:
    """Return the sites of a decoder without statistics."""
    sites = []
    for at, linears in enumerate(linears_of(model)):
        squares = [linear.weight.detach().float().square().sum(0) for linear in linears]
        rows = sum(linear.out_features for linear in linears)
        sites.append(Site(READERS[at % 4][0], torch.stack(squares).sum(0).sqrt(), rows))
    return sites


def collect(model: Any, sites: list[Site], sequences: Sequence[TokenSequence], tokens: int) -> None:
    """Store x and d log p(label) / d x of each site, at `tokens` completion tokens.

    With labels drawn from p, the KL of a small change delta of x is E[(g . delta)^2] / 2 (Fisher).
    """
    entered: dict[int, Tensor] = {}

    def remember(at: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            args[0].retain_grad()
            entered[at] = args[0]

        return hook

    hooks = [
        linears[0].register_forward_pre_hook(remember(at))
        for at, linears in enumerate(linears_of(model))
    ]
    model.requires_grad_(False)
    draw, seen = torch.Generator().manual_seed(0), 0
    for ids, start in sequences:
        if seen >= tokens:
            break
        embedded = model.get_input_embeddings()(torch.tensor([list(ids)])).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, start - 1 : -1]
        log_p = logits.float().log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        log_p.gather(1, labels).sum().backward()
        for at, site in enumerate(sites):
            x = entered.pop(at)
            site.inputs.append(x.detach()[0, start:].bfloat16())
            site.gradients.append(x.grad[0, start:].bfloat16())
        seen += len(ids) - start
    for handle in hooks:
        handle.remove()


def allocate(sites: list[Site], share: float, rule: str) -> float:
    """Set weight and threshold of each site; return the predicted KL at this share of the bytes."""
    score, decides = RULES[rule]
    curves = [_curve(site, score, decides) for site in sites]
    steps = _steps(sites, curves, share, decides)
    for site, (thresholds, _, _), step in zip(sites, curves, steps, strict=True):
        site.threshold = float(thresholds[step])
    return sum(float(fisher[step]) for (_, fisher, _), step in zip(curves, steps, strict=True))


def _curve(site: Site, score: str, decides: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return threshold, predicted KL and output error at each step of the skipped share."""
    x, g = (torch.cat(rows).float() for rows in (site.inputs, site.gradients))
    weights = {"one": torch.ones(x.shape[1]), "norm": site.column_norm}
    site.weight = weights[score] if score in weights else g.square().mean(0).sqrt()
    if decides == "one threshold":  # expected KL per byte, so that sites compare
        site.weight = site.weight / site.rows**0.5
    scores = x.abs() * site.weight
    shuffled = torch.randperm(scores.numel(), generator=torch.Generator().manual_seed(0))
    some = scores.flatten()[shuffled[:200_000]]
    thresholds = some.quantile(torch.arange(STEPS) / STEPS)
    bucket = torch.bucketize(scores, thresholds[1:], right=True)  # skipped from bucket + 1 on
    change = torch.zeros(len(x), STEPS).scatter_add_(1, bucket, x * g).cumsum(1)  # g . delta
    energy = (x * site.column_norm).square()
    output = torch.zeros(STEPS).scatter_add_(0, bucket.flatten(), energy.flatten()).cumsum(0)
    none = torch.zeros(1)
    fisher = torch.cat([none, change.square().mean(0) / 2])
    return thresholds, fisher[:STEPS], torch.cat([none, output / output[-1]])[:STEPS]


def _steps(sites: list[Site], curves: list[Any], share: float, decides: str) -> list[int]:
    """Return the step of each site: equal, below one level, or the least cost - level * bytes."""
    if decides == "uniform" or share == 0:
        return [round(share * STEPS)] * len(sites)
    total = sum(site.size for site in sites)
    gains = [torch.arange(STEPS) / STEPS * site.size / total for site in sites]

    def steps(level: float) -> list[int]:
        if decides == "one threshold":
            return [int((thresholds <= level).sum()) - 1 for thresholds, _, _ in curves]
        costs = [fisher if decides == "fisher" else output for _, fisher, output in curves]
        return [
            int((cost - level * gain).argmin()) for cost, gain in zip(costs, gains, strict=True)
        ]

    low, high = 1e-9, 1e9
    for _ in range(80):
        level = (low * high) ** 0.5
        got = sum(float(gain[step]) for gain, step in zip(gains, steps(level), strict=True))
        low, high = (level, high) if got < share else (low, level)
    return steps(high)


@contextmanager
def skipping(model: Any, sites: list[Site], completion: list[Tensor]) -> Iterator[None]:
    """Zero the inputs below the thresholds where `completion[0]` [rows, length] is true."""

    def skip(site: Site, first: nn.Linear) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            x, here = args[0], completion[0]
            kept = x.abs() * site.weight.to(x.dtype) >= site.threshold
            if module is first:
                site.kept += int(kept[here].sum())
                site.seen += kept[here].numel()
            return (x * (kept | ~here[..., None]),)

        return hook

    hooks = [
        linear.register_forward_pre_hook(skip(site, linears[0]))
        for site, linears in zip(sites, linears_of(model), strict=True)
        for linear in linears
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def divergence(
    dense: Sequence[Tensor],
    model: Any,
    sites: list[Site],
    sequences: Sequence[TokenSequence],
) -> dict[str, Any]:
    """Return KL along the sequences, top-1 agreement, and the skipped share of each kind."""
    kl, agrees = [], []
    completion = [torch.empty(0, dtype=torch.bool)]
    for site in sites:
        site.kept = site.seen = 0
    batches = batches_of_like_length(sequences, 1024)
    with skipping(model, sites, completion):
        for batch, p in zip(batches, dense, strict=True):
            ids, generated = padded(batch)
            completion[0] = generated[:, :-1]
            q = model(ids[:, :-1], use_cache=False).logits
            for of_p, of_q, predicts in zip(p, q, generated[:, 1:], strict=True):
                values = token_divergence(of_p[predicts], of_q[predicts])
                kl.append(values[0].tolist())
                agrees.append(values[1].tolist())
    skipped = {name: [site for site in sites if site.kind == name] for name, *_ in READERS}
    return {
        "skipped": _share(sites),
        "kl": mean_over_tokens(kl),
        "agrees": mean_over_tokens(agrees),
        "kinds": {name: _share(of_kind) for name, of_kind in skipped.items()},
    }


def _share(sites: list[Site]) -> float:
    sizes = [site.size for site in sites]
    read = sum(site.kept / site.seen * site.size for site in sites)
    return 1 - read / sum(sizes)


@torch.no_grad()
def logits_of(dense: Any, sequences: Sequence[TokenSequence]) -> list[Tensor]:
    """Return the dense model's logits, a tensor of half precision per batch of `divergence`."""
    batches = batches_of_like_length(sequences, 1024)
    return [dense(padded(batch)[0][:, :-1], use_cache=False).logits.half() for batch in batches]


def calibration(
    kind: str, dense: Any, tokenizer: Any, subject: Subject, options: argparse.Namespace
) -> list[TokenSequence]:
    """Return sequences to calibrate on; each token from the second number on is used."""
    path = options.work / f"activation-sparsity-{options.model}-{kind}.json"
    if not path.exists():
        if kind == "generic":
            texts = generic_token_sequences(tokenizer, GenericText(), 0)
            sequences = [(ids[:512], 1) for ids in islice(texts, 64) if len(ids) > 1]
        else:
            sequences = _traces(dense, tokenizer, subject, options)
            if kind == "prompts":
                sequences = [(ids[:start], 1) for ids, start in sequences]
        path.write_text(json.dumps(sequences))
    loaded: list[TokenSequence] = json.loads(path.read_text())
    return loaded


def _traces(
    dense: Any, tokenizer: Any, subject: Subject, options: argparse.Namespace
) -> list[TokenSequence]:
    written = subject.shared["traces"]
    parts = [part["problems"] for part in written.get("sources", {"": written}).values()]
    loaded = [load_problems(ProblemSource(**part), seed=0) for part in parts]
    problems = [
        problem for few in zip(*(islice(p, 16) for p in loaded), strict=True) for problem in few
    ]
    sampling = SamplingSettings(**written["sampling"] | {"max_new_tokens": options.cap})
    return list(sample_sequences(dense, tokenizer, problems, sampling))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="smollm2", choices=SUBJECTS)
    parser.add_argument("--weights", nargs="+", default=["dense"], help="or labels of formats.yaml")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.4, 0.5])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=["traces"])
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration")
    parser.add_argument("--answers", type=int, default=64, help="held-out prompts")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer or trace")


def run(options: argparse.Namespace) -> None:
    """Measure the rows that are missing, and write the table of all."""
    subject = float32_copy(options.model, options.work, options.cap)
    path = options.work / f"activation-sparsity-{options.model}.json"
    finished = json.loads(path.read_text()) if path.exists() else {}
    dense = load(Path(subject.model), Path(subject.model))
    tokenizer = AutoTokenizer.from_pretrained(subject.model)
    sequences = answers_of(dense, tokenizer, subject, options, "sampled")[: options.answers]
    logits: list[Tensor] = []
    for kind in options.calibrations:
        sites = sites_of(dense)
        collected = False
        for weights in options.weights:
            model = dense
            for rule in options.rules:
                for share in options.shares:
                    key = f"{weights} | {rule} | {kind} | {share}"
                    if key in finished:
                        continue
                    if not collected:
                        texts = calibration(kind, dense, tokenizer, subject, options)
                        collect(dense, sites, texts, options.tokens)
                        collected = True
                    logits = logits or logits_of(dense, sequences)
                    if weights != "dense" and model is dense:
                        model = load(folder_of(options, weights), Path(subject.model))
                    predicted = allocate(sites, share, rule)
                    result = divergence(logits, model, sites, sequences)
                    finished[key] = {"predicted": predicted, **result}
                    path.write_text(json.dumps(finished, indent=1))
                    print(key, finished[key], flush=True)
    table = []
    for key, result in finished.items():
        weights, rule, kind, _ = key.split(" | ")
        kinds = [100 * result["kinds"][names[0]] for names in READERS]
        agrees = [100 * n for n in result["agrees"] if n is not None]
        kl = [n for n in result["kl"] if n is not None]
        share = 100 * result["skipped"]
        table.append([weights, rule, kind, share, result["predicted"], kl, agrees, *kinds])
    save(options.out, f"activation_sparsity_{options.model}", subject.name, COLUMNS, table)
