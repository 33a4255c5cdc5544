"""Language models trained on text: masked, causal and span objectives, by deltas on a frozen backbone or all of it."""

from deltaprompt.pretrain.fresh import byte_level, new_backbone
from deltaprompt.pretrain.keep import Pretrained
from deltaprompt.pretrain.pretraining import Pretraining
from deltaprompt.pretrain.running import Tuned, pretrain
from deltaprompt.pretrain.text import Texts, training_documents

__all__ = [
    "Pretrained",
    "Pretraining",
    "Texts",
    "Tuned",
    "byte_level",
    "new_backbone",
    "pretrain",
    "training_documents",
]
