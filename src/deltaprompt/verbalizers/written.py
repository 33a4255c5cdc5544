"""score(c) = (1/T) Σ_t log p(y_t | prompt, y_<t), y the text of c in this example (Brown et al. 2020).

What OpenPrompt's generation verbalizer asks for by generating and comparing is scored here for every label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from deltaprompt.errors import ConfigError
from deltaprompt.params import Param, Weights
from deltaprompt.types import AtMask
from deltaprompt.verbalizers._base import Phrased, Setting, Verbalizer, of_each


@dataclass(frozen=True)
class Written(Verbalizer, Phrased):
    """Labels as texts, which may have fields of the example: `{"0": "{choice1}", "1": "{choice2}"}`.

    Args:
        texts: of each label, in the template language; only text and fields.
        per_token: whether the likelihood is a mean over the text's tokens, so that long texts are not behind.
        longest: tokens of a text with fields at most, for which a prompt leaves room; a longer one is an error.
    """

    texts: Mapping[str, str]
    per_token: bool = True
    longest: int = 32

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise ConfigError(f"written: got longest={self.longest}; a text has 1 token or more")

    def phrases(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        of_each(self.texts, labels, "text")
        return tuple(self.texts[label] for label in labels)

    def answer_lengths(self, s: Setting) -> tuple[int, ...]:
        if s.kind not in ("causal", "seq2seq"):
            raise ConfigError(
                f"written answers are texts that a model goes on with, and this backbone is {s.kind}; use a causal "
                "model or an encoder-decoder, or label words"
            )
        return (self.longest,)

    def params(self, s: Setting) -> Mapping[str, Param]:
        return {}

    def scores(self, w: Weights, s: Setting, at: AtMask) -> Tensor:
        if at.continued is None or at.answers is None:
            raise ConfigError("written answers are scored for whole batches of one task's rows")
        ids, lengths = at.answers  # [b, c, t], [b, c]
        log_p = at.continued(ids, lengths)
        return log_p / lengths if self.per_token else log_p
