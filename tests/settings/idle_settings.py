"""The combinations in which a setting has no effect, and is refused."""

from __future__ import annotations

from tests.settings.every_setting import (
    ALONE,
    FILE,
    HELD_OUT,
    INT4,
    LIMIT,
    RECOVER,
    SOURCE,
    Row,
    mixture,
    recovered_text,
    sampling,
    select,
    traces,
)

NOWHERE = ["http://127.0.0.1:9/v1"]  # nothing listens there
ENGINE = traces(engine={"base_urls": NOWHERE})
MAGNITUDE = {"preset": "paper", "solver": "magnitude"}
PROMPTS, TEXT = mixture("prompts@1"), mixture("text@1")
BOTH = mixture("prompts@0.5, text@0.5")
NAMED = {"traces": {"sources": {"s": {**SOURCE, "select": {}}}}, **mixture("traces:s@1")}
NAMED_PROMPTS = {"traces": {"sources": {"s": {"problems": {}}}}, **mixture("prompts:s@1")}

REFUSED = [
    Row("sparsity", 0.5),
    Row("sparsity", 0.5, {"solver": "keep", "mask_structure": None}),
    *(
        Row(name, value, ALONE)
        for name, value in {
            "sparsity": 0.5, "mask_structure": "2:4", "refit": True, "refit_steps": 1, "storage": "dense", "block_size": 16,
            "iterations": 2, "allocation": {"re:.*q_proj": 0.4},
        }.items()
    ),
    Row("allocation", {"re:.*q_proj": 0.4}, {"solver": "keep", "mask_structure": None}),
    *(
        Row(LIMIT, 0.5, beside)
        for beside in (
            {"quantization": INT4},
            {"quantization": INT4, **PROMPTS},
            {"quantization": INT4, "storage": "dense", **HELD_OUT},
            {"quantization": {"scheme": "FP8_DYNAMIC"}, **HELD_OUT},
            {**ALONE, **HELD_OUT},
        )
    ),
    Row("block_size", 16),
    *(Row("block_size", 16, {"solver": solver}) for solver in ("wanda", "magnitude", "keep")),
    *(Row("iterations", 2, {"solver": solver}) for solver in ("sparsegpt", "wanda", "magnitude", "keep")),
    *(Row("refit", True, {"solver": solver}) for solver in ("alps", "keep")),
    Row("refit", False),
    *(Row("refit_steps", 1, {"preset": "paper", "solver": s}) for s in ("sparsegpt", "wanda", "magnitude")),
    *(Row("dampening_frac", 0.5, {"preset": "paper", "solver": s}) for s in ("wanda", "magnitude")),
    *(Row(name, value, {"preset": "paper"}) for name, value in {"experts": "all", "expert_floor": 64}.items()),
    *(Row(name, value, {"order": "auto", **MAGNITUDE}) for name, value in {"experts": "all", "expert_floor": 64}.items()),
    Row("expert_floor", 64, {"experts": "all"}),
    Row("calibration.prompt_weight", 0.5, MAGNITUDE),
    Row("preset", "fast", {"solver": "alps", "reconstruct": "dense", "order": "auto"}),
    Row("traces.store", "other.jsonl", PROMPTS),
    Row("traces.store", "other.jsonl", NAMED),
    Row("traces.sampling.seed", 1, TEXT),
    Row("traces.problems.limit", 3, NAMED),
    Row("traces.problems.split", "train"),
    Row("traces.problems.split", "train", traces(problems=FILE)),
    Row("traces.problems.max_prompt_tokens", 25, PROMPTS),
    Row("traces.problems.answer_column", "answer", {**PROMPTS, "traces": {"problems": FILE}}),
    *(
        Row(f"traces.sampling.{name}", value, PROMPTS)
        for name, value in {
            "temperature": 0.2, "top_p": 0.3, "top_k": 2, "max_new_tokens": 8, "samples_per_problem": 2, "batch_size": 2,
        }.items()
    ),
    Row("traces.sampling.top_p", 0.3, sampling(temperature=0)),
    Row("traces.sampling.top_k", 2, sampling(temperature=0)),
    Row("traces.sampling.temperature", 0.2, sampling(top_k=1, temperature=None)),
    Row("traces.sampling.top_p", 0.3, sampling(top_k=1, temperature=None)),
    Row("traces.sampling.thinking", False, sampling(template="none")),
    Row("traces.sampling.batch_size", 2, ENGINE),
    Row("traces.sampling.seed", 1, NAMED),
    Row("traces.select.finished", True, PROMPTS),
    Row("traces.select.finished", True, NAMED),
    Row("traces.select.repeated_tails", "keep", select(finished=True)),
    Row("traces.select.least_share", 0.5),
    Row("traces.select.per_problem", 1),
    Row("traces.select.max_tokens", 12),
    Row("traces.engine.base_urls", NOWHERE, PROMPTS),
    Row("traces.retry_failed", True),
    Row("traces.retry_failed", True, PROMPTS),
    Row("traces.allow_off_policy", True),
    Row("traces.allow_off_policy", True, PROMPTS),
    Row("traces.sources.*.problems.limit", 3),
    Row("traces.sources.*.store", "other.jsonl", NAMED_PROMPTS),
    Row("traces.sources.*.select.finished", True, NAMED_PROMPTS),
    Row("traces.sources.*.sampling.max_new_tokens", 8, NAMED_PROMPTS),
    Row("traces.sources.*.problems.max_prompt_tokens", 25, NAMED_PROMPTS),
    Row("traces.sources.*.allow_off_policy", True, NAMED),
    Row("calibration.prompt_weight", 0.5, PROMPTS),
    Row("calibration.trace_weight", 0.5, TEXT),
    Row("calibration.answer_weight", 3.0, BOTH),
    Row("calibration.trace_weighting", "correct", BOTH),
    Row("calibration.held_out_tokens", 50, PROMPTS),
    Row("recover.generic.sequence_tokens", 64, {"recover": RECOVER}),
    Row("recover.generic.column", "text", recovered_text({"source": "text.txt"})),
    Row("recover.generic.split", "test", recovered_text({"source": "text.jsonl", "column": "text"})),
    Row("recover.generic.config", "x", recovered_text({})),
    Row("calibration.generic.sequence_tokens", 64),
    Row("calibration.generic.column", "text", TEXT),
    Row("calibration.generic.split", "test", TEXT),
    Row("calibration.generic.config", "x", mixture("text@1", generic={"source": "text.txt"})),
    Row("calibration.texts.*.sequence_tokens", 64),
    Row("calibration.texts.*.column", "text", mixture("text:s@1", texts={"s": {}})),
]  # fmt: skip
