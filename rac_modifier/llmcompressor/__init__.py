"""The one room that imports llm-compressor: our modifiers, and the calibration loops that run them.

This file imports nothing, so that `import rac_modifier` stays light. `register.py` makes the modifiers known to
llm-compressor's recipes.
"""
