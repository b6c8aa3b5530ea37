"""GPTQModel's own API, calibrated on the model's own traces.

    pip install rac-modifier[traces] gptqmodel         # in an environment of its own
    python examples/traces_in_gptqmodel.py [MODEL [OUTPUT [STORE]]]  # default: the reasoner

Rows are whole traces, one to a batch, so none is padded. With two cores GPTQModel 7.6 needs
GPTQMODEL_CPU_WORKERS=2.
"""

from __future__ import annotations

import sys

import rac_modifier


def main(
    model: str = "", output: str = "gptqmodel", store: str = "traces.jsonl", tokens: int = 32_768
) -> None:
    """Sample traces, or go on with the store, and quantize to int4."""
    from gptqmodel import GPTQModel, QuantizeConfig

    model = model or str(rac_modifier.reasoner_path())
    calibration = rows(model, store, tokens)
    quantizer = GPTQModel.load(model, QuantizeConfig(bits=4, group_size=64))
    quantizer.quantize(calibration, batch_size=1)
    quantizer.save(output)
    print(f"saved {output}")


def rows(model: str, store: str, tokens: int) -> list[dict[str, list[int]]]:
    """Return the traces as GPTQModel takes them."""
    traces = rac_modifier.trace_dataset(
        model, tokens=tokens, store=store, sampling={"max_new_tokens": 512}
    )
    print(f"{len(traces)} traces, {sum(map(len, traces['input_ids']))} tokens")
    return [{key: row[key] for key in ("input_ids", "attention_mask")} for row in traces]


if __name__ == "__main__":
    main(*sys.argv[1:])
