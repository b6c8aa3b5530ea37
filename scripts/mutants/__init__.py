"""Mutation tests: wrong versions of single lines, and whether a test notices them. `python -m scripts.mutants --help`.

operators.py lists the mutants of a source file. plugin.py is a pytest plugin: it records which test reaches which line,
and runs a given list of tests. reach.py keeps the recordings and chooses the tests of a mutant. trial.py runs them in a
copy of the tree. __main__.py draws the sample and prints what survived.

Why not an existing tool: mutmut 3 mutates undecorated functions alone, in one environment and chooses tests per
function; the constants of a module and a class (schedules, defaults, formats) and functions under a decorator are never
changed. cosmic-ray runs one fixed test command for all mutants.
"""
