"""Options of `rac recover` with which the tiny model is trained in seconds."""

SETTINGS = [
    "tokens=3000",
    "held_out_tokens=150",
    "step_tokens=100",
    "batch_tokens=400",
    "learning_rate=0.001",
]
OPTIONS = ["--max-new-tokens", "40", *(part for setting in SETTINGS for part in ("--set", setting))]
