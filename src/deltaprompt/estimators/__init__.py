"""scikit-learn's estimators over texts: `fit`, `predict`, `score`, pipelines, cross-validation, pickles."""

from deltaprompt.estimators._adaptation import release
from deltaprompt.estimators.classifier import FewShotClassifier
from deltaprompt.estimators.tagger import FewShotTagger

__all__ = ["FewShotClassifier", "FewShotTagger", "release"]
