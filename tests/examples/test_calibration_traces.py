"""The version for llm-compressor itself: its own tests, which need no package of ours."""

from examples.upstream.test_calibration_traces import *  # noqa: F403
