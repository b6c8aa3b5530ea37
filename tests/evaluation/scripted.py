"""A generate that says what a script tells it."""

from rac_modifier.sampling.generate import Generation


class Scripted:
    """Answers each key with its text, and with EOS unless the text ends in an ellipsis."""

    def __init__(self, script: dict[str, str]):
        self.script, self.batches, self.settings = script, [], []

    def __call__(self, model, tokenizer, prompts, settings, keys):
        self.batches.append([len(prompt) for prompt in prompts])
        self.settings.append(settings)
        return [self._answer(tokenizer, self.script[key]) for key in keys]

    @staticmethod
    def _answer(tokenizer, text: str) -> Generation:
        finished = not text.endswith("...")
        ids = tokenizer.encode(text.removesuffix("..."), add_special_tokens=False)
        return Generation(
            (*ids, tokenizer.eos_token_id) if finished else tuple(ids),
            "stop" if finished else "length",
        )
