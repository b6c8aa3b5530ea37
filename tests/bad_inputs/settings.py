"""Settings of a recipe entry that make no sense, one by one."""

from functools import partial
from typing import Any

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()
SMALL = {"mask_structure": "2:4"}
PATTERN = {
    '`mask_structure: "2:4:8"`': ("2:4:8", 'not "N:M"; use "2:4"'),
    '`mask_structure: "0:4"`': ("0:4", "at least 1 and less than M"),
    '`mask_structure: "4:4"`': ("4:4", "at least 1 and less than M"),
}
# What is wrong, the settings, and what is said.
ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    **{did: ({"mask_structure": value}, says) for did, (value, says) in PATTERN.items()},
    "neither pattern nor sparsity": ({"mask_structure": "0:0"}, 'add "sparsity: 0.5"'),
    "a sparsity beside 2:4": ({"sparsity": 0.5}, "leave one out"),
    "`sparsity: .nan`": ({"mask_structure": None, "sparsity": float("nan")}, "finite number"),
    "`order: layer` alone": ({"order": "layer"}, "set reconstruct: pruned, or order: auto"),
    "a dampening of 0": ({"dampening_frac": 0}, "must be greater than 0 (value 0)"),
    "a list as preset": ({"preset": ["paper"]}, "'quality', 'fast' or 'paper'"),
    "quantization without a scheme": ({"quantization": {}}, "set scheme or config_groups"),
    "an unknown scheme": ({"quantization": {"scheme": "W4"}}, "no preset; use W4A16"),
    "a target that is no pattern": (
        {"quantization": {"scheme": {"W4A16": ["re:("]}}},
        "scheme.W4A16: 're:(' is no regular expression",
    ),
    "groups beside config_groups": (
        {"quantization": {"config_groups": {}, "group_size": 64}},
        "group_size: 64 has no effect beside config_groups",
    ),
    "10^18 bits": (
        {"quantization": {"config_groups": {"g": {"weights": {"num_bits": 10**18}}}}},
        "config_groups.g.weights.num_bits is 1000000000000000000; use a whole number",
    ),
    "an observer": (
        {"quantization": {"config_groups": {"g": {"weights": {"observer": "mse"}}}}},
        "config_groups.g.weights.observer: 'mse' has no effect here",
    ),
    "a type of zero points": (
        {"quantization": {"config_groups": {"g": {"weights": {"zp_dtype": "torch.int8"}}}}},
        "zero points have as many bits as the codes",
    ),
    "shares that do not sum to 1": (
        {"calibration": {"mixture": {"traces": 0.5, "prompts": 0.4}}},
        "sum to 0.9; make them sum to 1",
    ),
    "a share above 1": (
        {"calibration": {"mixture": {"traces": 1.5, "prompts": -0.5}}},
        "gives traces the share 1.5",
    ),
    "an unknown kind of a mixture": (
        {"calibration": {"mixture": {"thoughts": 1.0}}},
        "'thoughts'; the kinds are traces, prompts, generic",
    ),
    "generic text with a name": (
        {"calibration": {"mixture": {"traces": 0.7, "generic:a.txt": 0.3}}},
        "'generic:a.txt'; the kinds are",
    ),
    "a text as mixture": ({"calibration": {"mixture": "traces@1"}}, "is no valid dictionary"),
    "recovery without traces": (
        {"recover": {}, "calibration": {"mixture": {"generic": 1.0}}},
        "give traces a share of calibration.mixture, or leave recover out",
    ),
    "a column of generated problems": (
        {"traces": {"problems": {"column": "q"}}},
        "column: 'q' has no effect since source 'arithmetic' generates its problems",
    ),
    "a configuration of a file": (
        {"traces": {"problems": {"source": "a.json", "config": "en"}}},
        "config: 'en' has no effect since source 'a.json' is a file",
    ),
    "problems in a .csv file": ({"traces": {"problems": {"source": "a.csv"}}}, "save it as one of"),
    "greedy samples of one problem": (
        {"traces": {"sampling": {"temperature": 0, "samples_per_problem": 2}}},
        "2 samples per problem at temperature 0",
    ),
    "a system prompt without a template": (
        {"traces": {"sampling": {"template": "none", "system_prompt": "x"}}},
        "has no system_prompt; drop it or use template='chat'",
    ),
    "no address of a server": ({"traces": {"engine": {"base_urls": []}}}, "base_urls is empty"),
    "an address without http": (
        {"traces": {"engine": {"base_urls": ["127.0.0.1:8000"]}}},
        "'127.0.0.1:8000' is no address of a server",
    ),
    "an address with a query": (
        {"traces": {"engine": {"base_urls": ["http://a/v1?x=1"]}}},
        "'http://a/v1?x=1' is no address of a server",
    ),
    "an address with a password": (
        {"traces": {"engine": {"base_urls": ["http://me:secret@a"]}}},
        "name a variable with api_key_env",
    ),
    "3,000 unknown settings": ({f"k{i}": i for i in range(3000)}, "and 2,980 more"),
}


def check(b: Bench, settings: dict[str, Any]) -> None:
    b.check(**{**SMALL, **settings})


CASES += [
    Case(did, says, partial(check, settings=settings)) for did, (settings, says) in ENTRIES.items()
]
OVERRIDES = {
    "`--set sparsity`": ("sparsity", "is not key=value, as in calibration.tokens=32768"),
    "`--set sparsity=[`": ("sparsity=[", "the value is not YAML"),
    "`--set mask_structure.x=1`": ("mask_structure.x=1", "is not a group of settings"),
    "`--set` with a key of 2,000 parts": (".".join("a" * 2000) + "=1", "is not key=value"),
    "`--set` of a modifier that is not there": ("GPTQModifier.scheme=W8A8", "with a modifier of"),
    "`--set` of a modifier without a setting": ("GPTQModifier=1", "MODIFIER.setting=value"),
}


def override(b: Bench, text: str) -> None:
    b.rac("recipes", "check", "rac_2of4", "--set", text)


CASES += [Case(did, says, partial(override, text=t)) for did, (t, says) in OVERRIDES.items()]


@CASES.case("two modifiers of ours in a recipe", "leave one out: one calibrates the whole recipe")
def _(b: Bench) -> None:
    ours = "ReasoningAwareSparseGPTModifier: {sparsity: 0.5}, ReasoningAwareCalibrationModifier: {}"
    b.rac_prune(f"a_stage: {{a_modifiers: {{{ours}}}}}")
