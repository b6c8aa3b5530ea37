"""DeepSeek-R1-Distill-Qwen-1.5B on a GPU: sample its own chain of thought, prune 2:4 or 50 %, save packed.

    python examples/deepseek_r1_distill_1_5b.py --pattern 2:4
    python examples/deepseek_r1_distill_1_5b.py --pattern 50% --problems openr1

Downloads the model (3.6 GB) from the Hugging Face hub, and with --problems openr1 the prompts of OpenR1-Math-220k. Sampling
dominates the time: a million tokens of traces. It is kept in a store, so a second run prunes at once, and a killed one goes on.
"""

import argparse
from pathlib import Path

from llmcompressor import oneshot

import rac_modifier

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", choices=("2:4", "50%"), default="2:4")
    parser.add_argument("--problems", choices=("arithmetic", "openr1"), default="arithmetic")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("DeepSeek-R1-Distill-Qwen-1.5B-sparse"))
    args = parser.parse_args()
    problems = (
        {"source": "open-r1/OpenR1-Math-220k", "column": "problem", "answer_column": "answer"}
        if args.problems == "openr1"
        else {"source": "arithmetic"}
    )
    recipe = rac_modifier.ReasoningAwareSparseGPTModifier(
        **({"mask_structure": "2:4"} if args.pattern == "2:4" else {"sparsity": 0.5}),
        traces={"problems": problems, "sampling": {"max_new_tokens": 8192, "batch_size": 64}},
        calibration={"tokens": args.tokens},
    )
    oneshot(model=MODEL, recipe=recipe, output_dir=str(args.out))


if __name__ == "__main__":
    main()
