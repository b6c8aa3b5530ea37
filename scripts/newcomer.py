"""Run the commands of README.md and docs/your-model.md as they stand, in a fresh clone.

    make newcomer      (or: python scripts/newcomer.py FOLDER; half an hour on two cores, 9 GB)

The model is the embedded reasoner without its chat template, and the problems are a file, as a user
has them. `CHANGED` names the only words of the pages that differ. It fails where a command fails,
or prints nothing for a minute.
"""

import json
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REASONER = ROOT / "rac_modifier/reasoner/assets"
SILENCE, INSTALLING, READY = 60.0, 600.0, 900.0  # seconds
URL, OUT = "http://127.0.0.1:8000", "R1-2of4"  # of `vllm serve` and `rac prune` on the pages
BLOCK = re.compile(r"^```(bash|python|yaml)\n(.*?)^```$", re.M | re.S)
CHANGED = {  # on a page or in a recipe: another model, own problems, fewer tokens
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "model",
    "YOUR_COPY_OF_THIS_REPOSITORY": str(ROOT),
    "python3.11 -m venv .venv-serve\n.venv-serve/bin/pip install -e '.[serve]'": (
        "scripts/serve_cpu_env.sh"
    ),
    "problems: {source: arithmetic}": "problems: {source: my_problems.jsonl, column: question}",
    "problems: {source: open-r1/OpenR1-Math-220k, answer_column: answer}": (
        "problems: {source: my_problems.jsonl, column: question}"
    ),
    "sampling: {max_new_tokens: 8192}": "sampling: {max_new_tokens: 256, template: none}",
    "tokens: 262144": "tokens: 8192",
    "--cap 8192": "--cap 256",
}


def changed(text: str) -> str:
    """Return a page's block for the small model."""
    for old, new in CHANGED.items():
        text = text.replace(old, new)
    return text


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command and show its output (SystemExit: it fails, or is silent for too long)."""
    patience = INSTALLING if "pip install" in command[-1] else SILENCE
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(patience):
                os.killpg(process.pid, signal.SIGKILL)
                raise SystemExit(f"silent for {patience:.0f} s: {command[-1]}")
            if not (data := os.read(process.stdout.fileno(), 1 << 16)):
                break
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
    if code := process.wait():
        raise SystemExit(f"exit code {code}: {command[-1]}")


def serve(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start a server, ask it for a completion, and stop it."""
    log = folder / "serve.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        started = time.monotonic()
        while not answers(f"{URL}/health"):
            if server.poll() is not None or time.monotonic() - started > READY:
                raise SystemExit(f"no server: {command[-1]}\n{log.read_text()[-4000:]}")
            time.sleep(1)
        body = json.dumps({"model": OUT, "prompt": "1 + 1", "max_tokens": 8}).encode()
        request = urllib.request.Request(f"{URL}/v1/completions", body)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request) as answer:
            print("served:", json.load(answer)["choices"][0]["text"])
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(url: str) -> bool:
    """Return whether a server answers."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def write_inputs(clone: Path) -> None:
    """Write the model without its template, the problems, and the recipes with these problems."""
    model = clone / "model"
    shutil.copytree(REASONER, model)
    (model / "chat_template.jinja").unlink()
    problems = [{"question": f"{a} + {7 * a}", "answer": str(8 * a)} for a in range(2, 500)]
    (clone / "my_problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    for recipe in (clone / "recipes").glob("*.yaml"):
        recipe.write_text(changed(recipe.read_text()))


def main() -> None:
    """Run docs/your-model.md, then README's section on an own model."""
    work = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/newcomer").resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    clone = work / "rac-modifier"
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = f"{clone / '.venv/bin'}:{environment['PATH']}"
    readme = (ROOT / "README.md").read_text().split("## Your own model")[1].split("\n## ")[0]
    guide = (ROOT / "docs/your-model.md").read_text()
    for page, text in (("docs/your-model.md", guide), ("README.md", readme)):
        for language, block in BLOCK.findall(text):
            code = changed(block)
            print(f"\n=== {page}\n{code}", flush=True)
            folder, started = clone if clone.exists() else work, time.monotonic()
            if re.search(rf'rac prune \S+ {OUT}\b|output_dir="{OUT}"', code):
                shutil.rmtree(clone / OUT, ignore_errors=True)  # the page has both ways
            if language == "yaml":  # the recipe that the page copied before, edited
                (clone / "my_recipe.yaml").write_text(code)
            elif "/vllm serve" in code:
                *first, last = code.strip().splitlines()
                if first and not (clone / ".venv-serve").exists():
                    run(["bash", "-euc", "\n".join(first)], folder, environment)
                serve(["bash", "-c", f"exec {last}"], folder, environment)
            elif language == "python":
                run([str(clone / ".venv/bin/python"), "-c", code], folder, environment)
            else:
                run(["bash", "-euo", "pipefail", "-c", code], folder, environment)
            print(f"--- {time.monotonic() - started:.0f} s", flush=True)
            if "git clone" in code:
                write_inputs(clone)


if __name__ == "__main__":
    main()
