"""The conformance proof on forty architectures: every delta holds every law, or is refused with a reason."""

import pytest

from deltaprompt.conformance.check import check
from deltaprompt.conformance.choose import SPREAD, chosen_deltas, chosen_models

EVERYWHERE = {"lora", "adapter", "bitfit", "ia3", "soft_prompt"}
ODD = (  # beside the forty, for what their layers return or read
    "causal:deepseek_v4",  # a router that reads token ids
    "causal:llama4_text",  # experts that return [b * s, d]
    "causal:openai-gpt",  # a layer that returns a list
    "causal:xlstm",  # a named state beside the output
)


@pytest.mark.parametrize("name", [*SPREAD, *ODD])
def test_every_delta_holds_every_law_or_is_refused(name):
    checked = check(chosen_models(name)[0], chosen_deltas("all"))
    assert checked.problem == ""
    assert [(o.delta, o.reason) for o in checked.outcomes if o.state == "failed"] == []
    assert {o.delta for o in checked.outcomes if o.state == "passed"} >= EVERYWHERE
    assert all(o.reason for o in checked.outcomes if o.state == "refused")
