import subprocess
import sys
from pathlib import Path


def test_schema_prints_the_published_file_and_nothing_else():
    """In a process of its own: llm-compressor logs to standard output while it is imported."""
    published = Path(__file__).parents[2] / "docs" / "recipe.schema.json"
    done = subprocess.run([sys.executable, "-m", "rac_modifier.cli", "schema"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, published.read_text())
