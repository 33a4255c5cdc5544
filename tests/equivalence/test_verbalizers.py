"""Every verbalizer × calibration × kind of language model against brute force: full model, full vocabulary, loops."""

import math
from functools import cache

import pytest
import torch

from deltaprompt.backbone import load
from deltaprompt.calibrations.batch import BatchCalibration
from deltaprompt.calibrations.contextual import Contextual
from deltaprompt.calibrations.contextualised import Contextualised
from deltaprompt.calibrations.domain_pmi import DomainPMI
from deltaprompt.model import Model, Task
from deltaprompt.registry import variant, variants
from deltaprompt.types import Example
from deltaprompt.verbalizers._base import Started
from deltaprompt.verbalizers.automatic import Automatic
from deltaprompt.verbalizers.dect import DecT
from deltaprompt.verbalizers.hierarchical import Hierarchical
from deltaprompt.verbalizers.hyper_proto import HyperProto
from deltaprompt.verbalizers.knowledgeable import Knowledgeable
from deltaprompt.verbalizers.label_descriptions import LabelDescriptions
from deltaprompt.verbalizers.label_words import LabelWords
from deltaprompt.verbalizers.linear_probe import LinearProbe
from deltaprompt.verbalizers.nn_shot import NNShot
from deltaprompt.verbalizers.proto_net import ProtoNet
from deltaprompt.verbalizers.proto_verb import ProtoVerb
from deltaprompt.verbalizers.prototypes import Prototypes
from deltaprompt.verbalizers.rules import Rules
from deltaprompt.verbalizers.soft import SoftVerbalizer
from deltaprompt.verbalizers.spherical_prototypes import SphericalPrototypes
from deltaprompt.verbalizers.written import Written
from tests import backbones_zoo as zoo
from tests.equivalence.test_scoring import brute

FAMILIES = ["bert", "gpt2", "t5"]
LABELS = ("up", "down", "so")
TEMPLATE = "{text} It was {mask}"
TWO = "{text} is {mask} , it was {mask}"
TEXTS = ["good", "a good film and a great plot", "not", "the cat sat on the mat ; it was bad", "no", "a film"]
EXAMPLES = [Example({"text": text}, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
SOME = [TEXTS[i] for i in (0, 1, 3, 4)]  # four of the six, evenly spaced
WRITTEN = {"up": "a good film", "down": "bad", "so": "not the plot"}
SENTENCES = {"up": "a good film", "down": "a bad film", "so": "maybe"}
CALIBRATIONS = {
    "none": None,
    "contextual": Contextual(("no", "not")),
    "contextualised": Contextualised(size=4),
    "probability": Contextualised(size=4, mean="probability"),
    "domain_pmi": DomainPMI("it was {mask}"),
    "batch": BatchCalibration(),
}
OF_TEXTS = ("contextualised", "probability", "batch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for each family's tiny random model."""
    where = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        built = zoo.build(family)
        built.model.save_pretrained(where / family)
        built.tokenizer.save_pretrained(where / family)
    return where


@cache
def loaded(path):
    return load(path, dtype="float64", device="cpu")


@cache
def words_of(path):
    """For each label a word of one, of two and of three tokens."""
    backbone = loaded(path)
    model = Model(backbone, Task(TEMPLATE, ["good", "bad"]), [])
    model.adapted.remove()
    sized = {1: [], 2: [], 3: []}
    known = ["good", "bad", "great", "was", "film", "plot", "movie", "cat", "not", "the", "a", "is", "of", "no", "mat"]
    longer = (f"{a} {b}" for a in known[:6] for b in known[6:12])
    for word in (*known, *longer, "a good film", "the bad plot", "no cat sat"):
        try:
            length = len(model.features.answer_ids(word))
        except Exception:
            continue
        if length in sized:
            sized[length].append(word)
    picked = {n: sized[n][:3] for n in sized}
    assert all(len(found) == 3 for found in picked.values()), sized
    return {label: tuple(picked[n][i] for n in sized) for i, label in enumerate(LABELS)}


VERBALIZERS = {
    "arithmetic": lambda words: LabelWords(words),
    "geometric": lambda words: LabelWords(words, mean="geometric"),
    "knowledgeable": lambda words: Knowledgeable(words, longest=3, frequency=0.2),
    "automatic": lambda words: Automatic(size=2),
    "soft": lambda words: SoftVerbalizer(words=words),
    "bare_soft": lambda words: SoftVerbalizer(),
    "dect": lambda words: DecT(words, dim=4, word_weight=0.7),
    "bare_dect": lambda words: DecT(dim=4, legacy=True),
    "proto_verb": lambda words: ProtoVerb(dim=4, words=words),
    "bare_proto_verb": lambda words: ProtoVerb(dim=4),
    "prototypes": lambda words: Prototypes(),
    "label_descriptions": lambda words: LabelDescriptions(SENTENCES),
    "hierarchical": lambda words: Hierarchical(words=words),
    "written": lambda words: Written(WRITTEN),
    "hyper_proto": lambda words: HyperProto(),
    "hyper_proto_cone": lambda words: HyperProto(metric="cone", radius="softplus", scale=5.0),
    "hyper_proto_gaussian": lambda words: HyperProto(metric="gaussian", radius="softplus", scale=0.01),
    "proto_net": lambda words: ProtoNet(scale=0.1),
    "proto_net_dot": lambda words: ProtoNet(metric="dot", scale=0.1),
    "nn_shot": lambda words: NNShot(each=4, scale=0.1, trains=True),
    "nn_shot_cosine": lambda words: NNShot(each=1, metric="cosine"),
    "linear_probe": lambda words: LinearProbe(penalty=0.1),
    "spherical_prototypes": lambda words: SphericalPrototypes(),
    "rules": lambda words: Rules({"up": ("good", "bad"), "down": (("bad", "not"), "film"), "so": ("not", "film")}),
}


def made(path, name, calibration):
    """A model whose verbalizer has started, whose tensors are not those of its start, and which is calibrated."""
    template = TWO if name == "rules" else TEMPLATE
    verbalizer = VERBALIZERS[name](words_of(path))
    given = CALIBRATIONS[calibration]
    if name == "rules" and calibration == "domain_pmi":
        given = DomainPMI("is {mask} , it was {mask}")
    model = Model(loaded(path), Task(template, LABELS, verbalizer, calibration=given), [])
    if isinstance(verbalizer, Started):
        model.start(EXAMPLES)
    with torch.no_grad():
        for i, (_, p) in enumerate(model.parts()):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    if given is not None:
        model.calibrate(EXAMPLES if calibration in OF_TEXTS else ())
    return model


# The same by hand


def state(model, text, features):
    """The mean of the last hidden states at the answer positions, of the plain model."""
    row = features.encode([Example({"text": text})])[0].variants[0]
    ids = torch.tensor([row.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.backbone.kind == "seq2seq":
        out = model.backbone.model(**inputs, decoder_input_ids=torch.tensor([row.decoder]), output_hidden_states=True)
        hidden = out.decoder_hidden_states[-1]
    else:
        hidden = model.backbone.model(**inputs, output_hidden_states=True).hidden_states[-1]
    return hidden[0, row.at].mean(0)


def vocabulary(model, text, mask, features):
    """log p of every token at one mask."""
    row = features.encode([Example({"text": text})])[0].variants[0]
    ids = torch.tensor([row.ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.backbone.kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([row.decoder])
    return model.backbone.model(**inputs).logits[0, row.at[mask]].log_softmax(-1).tolist()


def log_mean(values):
    return math.log(sum(math.exp(v) for v in values) / len(values))


def log_softmax(values):
    total = max(values) + math.log(sum(math.exp(v - max(values)) for v in values))
    return [v - total for v in values]


def cos(a, b):
    return float(a @ b / a.norm() / b.norm())


class Reference:
    """A verbalizer by hand: the words' log-probabilities, and from them and a prior the classes' scores."""

    def __init__(self, model, name):
        self.model, self.name, self.words = model, name, {}
        self.w = {n: t[0].detach() for n, t in model.scorer.tensors.items()}
        given = vars(model.verbalizer).get("words") or {}
        self.words = [(c, word) for c, label in enumerate(LABELS) for word in given.get(label, ())]
        self.features = model.features

    def word_scores(self, text, features):
        """log p of each word, normalised over the words; nothing for what reads states alone."""
        if self.name == "automatic":
            every = vocabulary(self.model, text, 0, features)
            return log_softmax([every[int(i)] for own in self.w["ids"] for i in own])
        if not self.words:
            return None
        return log_softmax([float(self.brute(text, word, features)) for _, word in self.words])

    def brute(self, text, word, features):
        kept = self.model.reader().reading
        if features is self.features:
            return brute(self.model, text, word)
        object.__setattr__(kept, "features", features)
        try:
            return brute(self.model, text, word)
        finally:
            object.__setattr__(kept, "features", self.features)

    def scores(self, text, features, prior=None):
        words = self.word_scores(text, features)
        if words is not None and prior is not None:
            words = log_softmax([a - b for a, b in zip(words, prior, strict=True)])
        h, w = state(self.model, text, features), self.w
        if self.name == "written":
            texts = [WRITTEN[label] for label in LABELS]
            return [float(self.brute(text, y, features)) / len(features.answer_ids(y)) for y in texts]
        if self.name in ("arithmetic", "geometric", "hierarchical"):
            how = "arithmetic" if self.name == "arithmetic" else "geometric"
            return log_softmax([self.mean(words, c, how) for c in range(3)])
        if self.name == "automatic":
            return [log_mean(words[2 * c : 2 * c + 2]) for c in range(3)]
        if self.name == "knowledgeable":
            return [self.weighted(words, c) for c in range(3)]
        if self.name == "rules":
            return self.rules(text, features)
        if self.name in ("prototypes", "label_descriptions", "spherical_prototypes"):
            return [self.model.verbalizer.scale * cos(z, h) for z in w["z"]]
        if self.name.startswith(("hyper_proto", "proto_net", "nn_shot")):
            return [self.model.verbalizer.scale * self.near(h, c) for c in range(3)]
        linear = {"soft": "weight", "linear_probe": "weight", "dect": "w", "proto_verb": "w"}
        v = w[linear[self.name.removeprefix("bare_")]] @ (h / h.norm() if self.name == "linear_probe" else h)
        if self.name.endswith(("soft", "linear_probe")):
            own = [float(a + b) for a, b in zip(v, w["bias"], strict=True)]
            return [a + self.mean(words, c, "geometric") for c, a in enumerate(own)] if words else own
        if self.name.endswith("proto_verb"):
            own = [10.0 * cos(z, v) for z in w["z"]]
            if words is None:
                return own
            said = [self.mean(words, c, "arithmetic") for c in range(3)]
            return [(a + b) / 2 for a, b in zip(log_softmax(own), log_softmax(said), strict=True)]
        x = v / v.norm()
        own = [float(r - (x - z).norm()) for r, z in zip(w["r"], w["z"], strict=True)]
        said = log_softmax([self.mean(words, c, "arithmetic") for c in range(3)]) if words else [0.0] * 3
        return [a + 0.7 * b for a, b in zip(own, said, strict=True)]

    def near(self, h, c):
        """How near a state is to a class, by the geometry of the verbalizer."""
        if self.name.startswith("nn_shot"):
            own = [x for x, has in zip(self.w["s"][c], self.w["has"][c], strict=True) if has]
            assert len(own) == (1 if self.name == "nn_shot_cosine" else 2)
            return max(cos(x, h) if self.name == "nn_shot_cosine" else -(float((h - x).norm()) ** 2) for x in own)
        z = self.w["z"][c]
        if self.name.startswith("proto_net"):
            return float(h @ z) if self.name == "proto_net_dot" else -(float((h - z).norm()) ** 2)
        r = float(self.w["r"][c])
        if self.name == "hyper_proto":
            return r - float((h - z).norm())
        e = math.log(1 + math.exp(r))
        if self.name == "hyper_proto_cone":
            return math.cos(max(0.0, math.acos(cos(z, h)) - e))
        return -(float((h - z).norm()) ** 2) / (2 * e**2) - len(h) * math.log(e)

    def mean(self, words, c, how):
        own = [words[i] for i, (of, _) in enumerate(self.words) if of == c]
        return log_mean(own) if how == "arithmetic" else sum(own) / len(own)

    def weighted(self, words, c):
        each = [i for i, (of, _) in enumerate(self.words) if of == c and self.w["kept"][i] > 0]
        alpha = [math.exp(float(self.w["alpha"][i])) for i in each]
        return math.log(sum(a / sum(alpha) * math.exp(words[i]) for a, i in zip(alpha, each, strict=True)))

    def rules(self, text, features):
        found = [0.0] * 3
        for m in range(2):
            every = vocabulary(self.model, text, m, features)
            own = [
                [features.answer_ids(word)[0] for word in ((said,) if isinstance(said, str) else said)]
                for said in (self.model.verbalizer.rules[label][m] for label in LABELS)
            ]
            total = math.log(sum(math.exp(every[i]) for i in {i for ids in own for i in ids}))
            for c, ids in enumerate(own):
                found[c] += math.log(sum(math.exp(every[i]) for i in ids)) - total
        return found

    def prior(self, how, texts, features):
        """The prior of a calibration, over the words where there are some; and whether it is over classes."""
        of_words = self.word_scores(texts[0], features) is not None and how != "batch"
        each = [
            self.word_scores(text, features) if of_words else log_softmax(self.scores(text, features)) for text in texts
        ]
        columns = list(zip(*each, strict=True))
        if how == "contextualised":
            return of_words, log_softmax([sum(column) / len(column) for column in columns])
        return of_words, [log_mean(column) for column in columns]

    def probabilities(self, text, how):
        prior = None
        if how != "none":
            features, texts = self.features, {"contextual": ["no", "not"], "batch": TEXTS}.get(how, SOME)
            if how == "domain_pmi":
                from dataclasses import replace

                from deltaprompt.templates import parse

                features, texts = replace(features, template=parse(self.model.task.calibration.domain)), [""]
            of_words, prior = self.prior(how, texts, features)
            if not of_words:
                scores = log_softmax(self.scores(text, self.features))
                return [math.exp(v) for v in log_softmax([a - b for a, b in zip(scores, prior, strict=True)])]
        return [math.exp(v) for v in log_softmax(self.scores(text, self.features, prior))]


def test_every_verbalizer_is_tried_here():
    words = dict.fromkeys(LABELS, ("a",))
    tried = {type(make(words)) for make in VERBALIZERS.values()}
    assert tried == {variant("verbalizers", name) for name in variants("verbalizers")}


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("name", VERBALIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_class_probabilities_are_those_of_brute_force(folder, family, name, calibration):
    if name == "rules" and family != "bert":
        pytest.skip("rules read several masks, which a masked model has")
    if name == "written" and family == "bert":
        pytest.skip("a masked model does not go on with a text")
    model = made(str(folder / family), name, calibration)
    try:
        found = model.probabilities(EXAMPLES)
        with torch.no_grad():
            want = [Reference(model, name).probabilities(text, calibration) for text in TEXTS]
    finally:
        model.adapted.remove()
    torch.testing.assert_close(found.double(), torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)
    assert len({tuple(row) for row in found.tolist()}) > 1
