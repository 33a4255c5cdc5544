"""Adaptations in other libraries' formats: PEFT's adapter folders, read and written."""

from deltaprompt.interchange.peft_read import open_peft as open_peft
from deltaprompt.interchange.peft_write import save_peft as save_peft
