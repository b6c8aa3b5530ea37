"""Compare the stable Python API with that of the newest version tag.

    make api      (or: python scripts/api.py [tag])

Stable is what `rac_modifier.__all__` names (docs/support.md). griffe reads both sources without
importing them. The exit code is 1 where a name is gone or a call of it would break.
"""

import ast
import subprocess
import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "rac_modifier"


def stable(package: griffe.Object | griffe.Alias) -> dict[str, str]:
    """Return the stable names and the paths of their definitions."""
    modules = ast.literal_eval(str(package["_LAZY"].value))
    return {name: f"{module}.{name}" for name, module in modules.items()} | {
        "RacError": f"{PACKAGE}.errors.RacError"
    }


def broken(tag: str, root: Path = ROOT) -> list[str]:
    """List what would break in code that was written for `tag`."""
    old = griffe.load_git(PACKAGE, ref=tag, repo=root, resolve_aliases=True)
    new = griffe.load(
        PACKAGE, search_paths=[str(root)], resolve_aliases=True, allow_inspection=False
    )
    before, now = stable(old), stable(new)
    # A name that moved is compared by eye: griffe compares what has one path.
    gone = [
        f"{PACKAGE}.{name}: {'moved to ' + now[name] if name in now else 'removed'}"
        for name, path in before.items()
        if now.get(name) != path
    ]
    kept = tuple(f"{path}." for path in before.values())
    found = [
        change.explain(griffe.ExplanationStyle.ONE_LINE)
        for change in griffe.find_breaking_changes(old, new)
        if f"{change.obj.canonical_path}.".startswith(kept)
    ]
    return gone + list(dict.fromkeys(found))


def main() -> None:
    """Print what breaks; exit code 1 if anything does."""
    listed = ["git", "-C", str(ROOT), "tag", "--list", "v*", "--sort=-v:refname"]
    tags = sys.argv[1:] or subprocess.check_output(listed, text=True).split()
    if not tags:
        print("make api: there is no version tag (v*) yet, so there is nothing to compare with")
        return
    found = broken(tags[0])
    print(*found, sep="\n") if found else print(f"the stable API is that of {tags[0]}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
