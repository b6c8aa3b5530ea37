"""No text that a user or a download brings can run code."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rac_modifier"
RUNS_CODE = re.compile(
    r"import_module\(|__import__\(|(?<![.\w])eval\(|(?<![.\w])exec\(|(?<![.\w])compile\(|\bpickle\b|\bmarshal\b|\bshelve\b|\bdill\b|"
    r"joblib|torch\.load\b|weights_only|trust_remote_code(?!=False)|yaml\.(?:load|unsafe_load|full_load|Loader|UnsafeLoader)\b|"
    r"load_source|runpy|os\.system|os\.popen|shell=|subprocess|entry_points|spec_from_file"
)
# File, matched text, and why no untrusted text reaches it.
ALLOWED = {
    ("__init__.py", "import_module("): "one of the literals of _LAZY",
    ("runtime/import_hook.py", "import_module("): "the literals that __init__.py gives it",
    ("__main__.py", "runpy"): "the module that the user names on the command line",
    ("kernels/choose.py", "entry_points"): "names packages that the user installed, and loads one "
        "of them",
    ("cli/doctor.py", "entry_points"): "only looked at: is our plugin registered",
    ("checkpoint/hf_quantizer.py", "trust_remote_code"): "load_model's own argument, False unless "
        "the caller sets it",
    ("cli/models.py", "trust_remote_code"): "a word of transformers' error, by which it is told "
        "from others",
    ("sampling/server_watch.py", "subprocess"): "runs the words of its own command line, without a "
        "shell",
    ("sampling/own_server.py", "subprocess"): "the user's own vllm and the python next to it with "
        "lists of words, without a shell",
    ("pruning/solve.py", "import_module("): "the module of one of the literals of "
        "settings/solvers.py",
    ("problems/answer_checker.py", "import_module("): "one of two literals, imported before the "
        "first answer",
}  # fmt: skip


def found() -> set[tuple[str, str]]:
    return {
        (path.relative_to(PACKAGE).as_posix(), match[0])
        for path in PACKAGE.rglob("*.py")
        for match in RUNS_CODE.finditer(path.read_text())
    }


def test_code_is_run_at_known_places_only():
    unknown = found() - ALLOWED.keys()
    assert not unknown, f"say here why no untrusted text reaches it: {sorted(unknown)}"


def test_transformers_never_asks_whether_to_run_code():
    """Where trust_remote_code is not given, it asks at the prompt, and a user may say yes."""
    calls = [
        ast.unparse(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and re.match(r"Auto\w+\.from_pretrained$", ast.unparse(node.func))
    ]
    assert len(calls) >= 5
    # load_model passes the caller's own argument on
    assert not [
        call
        for call in calls
        if "trust_remote_code=False" not in call
        and "trust_remote_code=trust_remote_code" not in call
    ]


def test_allowed_places_exist():
    """The list holds what is there and no more. A room that is gone takes its line along."""
    assert not ALLOWED.keys() - found()
    assert all(len(reason) > 20 for reason in ALLOWED.values())
