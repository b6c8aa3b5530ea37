"""The versions that pyproject.toml allows contain those that the tests run with."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
REQUIREMENTS = [
    Requirement(r)
    for r in (*PYPROJECT["project"]["dependencies"], *EXTRAS["compress"], *EXTRAS["eval"])
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_seam_versions_in_pyproject_contain_what_is_installed(requirement):
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
