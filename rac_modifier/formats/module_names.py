"""What a module is for, by its name in a checkpoint."""

import re
from enum import Enum


class Role(Enum):
    """What a weight is used for; linear layers outside of experts are `LINEAR`."""

    LINEAR = "linear"
    EXPERT = "expert"
    ROUTER = "router"
    HEAD = "head"
    EMBEDDING = "embedding"

    @classmethod
    def of(cls, module: str) -> "Role":
        """Return the role of a module of this name."""
        roles = (role for role, pattern in _PATTERNS.items() if pattern.search(module))
        return next(roles, cls.LINEAR)

    @property
    def of_vocabulary(self) -> bool:
        """Return whether the weight has a row per token of the vocabulary."""
        return self in (Role.HEAD, Role.EMBEDDING)


_PATTERNS = {
    Role.EMBEDDING: re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|wpe)$"),
    Role.HEAD: re.compile(r"(^|\.)(lm_head|embed_out)$|^output$"),
    Role.ROUTER: re.compile(r"(^|\.)(gate|router|shared_expert_gate)$"),
    Role.EXPERT: re.compile(r"\.experts\.\d+\."),
}
_TARGETS = re.compile("lm_head|embed", re.IGNORECASE)


def targets_vocabulary(target: str) -> bool:
    """Return whether a target (a name, a pattern or a class) means a head or an embedding."""
    return bool(_TARGETS.search(target))
