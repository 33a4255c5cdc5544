"""scikit-learn's estimators: as the Python API and the command line, on one backbone, small, and by the conventions."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.ensemble import VotingClassifier
from sklearn.exceptions import DataConversionWarning, NotFittedError, SkipTestWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

import deltaprompt as dp
from deltaprompt.data import hold_out, split
from deltaprompt.data.tags import spans_of, tags_of
from deltaprompt.defaults import deltas_for, task_for
from deltaprompt.errors import ConfigError, DataError, StoreError
from deltaprompt.estimators import FewShotClassifier, FewShotTagger, _adaptation, release
from deltaprompt.estimators._sentences import Form, unanswered
from deltaprompt.types import Example, Span
from tests import backbones_zoo as zoo
from tests import command, files

ROOT = Path(__file__).parents[2]
GOOD = ["a great movie", "it was great", "great plot", "a good film", "the review is good", "good acting"]
BAD = ["a terrible movie", "it was terrible", "terrible plot", "a bad film", "the review is bad", "bad acting"]
X, Y = [*GOOD, *BAD], ["good"] * 6 + ["bad"] * 6
NEW = ["the film was great", "a bad plot", "the cat sat on the mat"]
WORDS = [
    ["the", "cat", "saw", "the", "good", "film", "."],
    ["a", "dog", "was", "not", "bad"],
    ["the", "plot", "of", "the", "great", "film"],
    ["the", "dog", "the", "cat"],
    ["it", "was", "terrible"],
]
TAGS = [
    ["B-animal", "I-animal", "O", "B-film", "I-film", "I-film", "O"],
    ["B-animal", "I-animal", "O", "O", "O"],
    ["O", "O", "O", "B-film", "I-film", "I-film"],
    ["B-animal", "I-animal", "B-animal", "I-animal"],
    ["O", "O", "O"],
]
TEXTS = ["the cat saw the good film .", "a dog was not bad", "it was terrible"]
SPANS = [[(0, 7, "animal"), (12, 25, "film")], [(0, 5, "animal")], []]
HARD = {"learning_rate": 0.02, "steps": 200, "deltas": "lora:rank=4", "device": "cpu"}


def saved(folder: Path, family: str) -> str:
    with zoo.quiet():
        backbone = zoo.build(family, torch.float32)
        backbone.model.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """The folder of a tiny masked language model."""
    return saved(tmp_path_factory.mktemp("masked"), "bert")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny encoder."""
    return saved(tmp_path_factory.mktemp("encoder"), "bert-encoder")


@pytest.fixture
def quick(masked):
    """A classifier that trains in a moment."""
    return FewShotClassifier(masked, steps=3, learning_rate=0.01, device="cpu")


def in_a_new_process(code: str, *arguments: object) -> str:
    """What it prints last."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


# The same as by hand


@pytest.mark.parametrize("kind", ["masked", "encoder"])
@pytest.mark.parametrize("share", [None, 0.34])
def test_a_classifier_is_the_model_that_one_fits_by_hand(request, kind, share):
    folder = request.getfixturevalue(kind)
    fitted = FewShotClassifier(folder, epochs=3, batch_size=4, learning_rate=0.01, dev_share=share, random_state=5)
    fitted.fit(X, Y)

    backbone = dp.load(folder)
    rows = [Example({"text": text}, label) for text, label in zip(X, Y, strict=True)]
    train, dev = (rows, None) if share is None else split(rows, share, 5)
    model = dp.Model(backbone, task_for(backbone, ("bad", "good")), deltas_for(backbone), [5])
    run = dp.fit(model, train, dev, training=dp.Training(epochs=3, batch_size=4, learning_rate=0.01), seed=5)
    told = model.predict(NEW)
    assert fitted.predict_proba(NEW).tolist() == [list(one["scores"].values()) for one in told]
    assert fitted.predict(NEW).tolist() == [one["label"] for one in told]
    assert fitted.adaptation_.record["training"]["run"]["steps"] == run.steps
    assert bool(fitted.adaptation_.record["metrics"]["dev"]) == (share is not None)


@pytest.mark.parametrize("share", [None, 0.4])
def test_a_tagger_is_the_model_that_one_fits_by_hand(encoder, share):
    options = {"steps": 12, "batch_size": 2, "learning_rate": 0.02}
    fitted = FewShotTagger(encoder, deltas=dp.LoRA(rank=2), dev_share=share, random_state=3, **options)
    fitted.fit(TEXTS, SPANS)

    backbone = dp.load(encoder)
    spans = [tuple(Span(*one) for one in each) for each in SPANS]
    rows = [Example({"text": text}, spans=own) for text, own in zip(TEXTS, spans, strict=True)]
    train, dev = (rows, None) if share is None else hold_out(rows, share, 3)
    model = dp.Tagger(backbone, dp.Tagging(("animal", "film")), [dp.LoRA(rank=2)], [3])
    dp.fit(model, train, dev, training=dp.Training(**options), seed=3)
    own = {name: tensor[at] for name, tensor, at in model.slot_parts()}
    assert fitted.adaptation_.tensors.keys() == own.keys()
    assert all((fitted.adaptation_.tensors[name] == tensor.detach().numpy()).all() for name, tensor in own.items())
    told = [[(e["start"], e["end"], e["label"]) for e in one["entities"]] for one in model.predict(TEXTS)]
    assert fitted.predict(TEXTS) == told


@pytest.mark.parametrize(
    ("kind", "labels"), [("masked", ("bad", "good")), ("encoder", ("bad", "good")), ("encoder", (0, 1))]
)
def test_what_is_left_open_is_chosen_as_at_the_command_line(request, tmp_path, kind, labels):
    folder = request.getfixturevalue(kind)
    y = [labels[text in GOOD] for text in X]
    data = files.rows(tmp_path / "x.jsonl", *({"text": t, "label": one} for t, one in zip(X, y, strict=True)))
    recipe = files.written(tmp_path / "x.toml", "[data]\nhold_out = false\n")
    given = ("--data", data, "--backbone", folder, "--steps", 4, "--device", "cpu", "--out", tmp_path / "out")
    command.succeeds("fit", recipe, *given)
    fitted = FewShotClassifier(folder, steps=4, device="cpu").fit(X, y)
    told = [list(one["scores"].values()) for one in dp.open(tmp_path / "out").predict(NEW)]
    assert fitted.predict_proba(NEW).tolist() == told


def test_the_demo_is_a_sentence_encoder_where_the_template_has_no_mask():
    fitted = FewShotClassifier(steps=2, device="cpu").fit(X, Y)
    assert fitted.adaptation_.record["backbone"]["kind"] == "encoder"
    assert fitted.score(X, Y) > 0.9
    asked = FewShotClassifier(template="{text} It was {mask}.", deltas="bitfit", steps=2, device="cpu").fit(X, Y)
    assert asked.adaptation_.record["backbone"]["kind"] == "masked"


# Labels, samples and parameters


@pytest.mark.parametrize(
    ("y", "expected", "names"),
    [
        (Y, np.array(["bad", "good"]), ["bad", "good"]),
        (np.array(Y, dtype=object), np.array(["bad", "good"], dtype=object), ["bad", "good"]),
        ([3] * 6 + [-1] * 6, np.array([-1, 3]), ["-1", "3"]),
        (np.array([1.0] * 6 + [0.0] * 6), np.array([0.0, 1.0]), ["0", "1"]),
        ([True] * 6 + [False] * 6, np.array([False, True]), ["false", "true"]),
        (tuple(Y), np.array(["bad", "good"]), ["bad", "good"]),
    ],
    ids=["texts", "objects", "ints", "floats", "bools", "tuple"],
)
def test_classes_keep_their_type_and_order(encoder, y, expected, names):
    fitted = FewShotClassifier(encoder, steps=2).fit(X, y)
    assert fitted.classes_.dtype == expected.dtype
    assert fitted.classes_.tolist() == expected.tolist()
    assert list(fitted.adaptation_.record["labels"]) == names
    assert fitted.predict(NEW).dtype == expected.dtype
    p = fitted.predict_proba(NEW)
    assert p.shape == (3, 2)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-6)
    assert (fitted.predict(NEW) == fitted.classes_[p.argmax(1)]).all()
    assert 0 <= fitted.score(X, y) <= 1


@pytest.mark.parametrize(
    "given",
    [
        tuple(X),
        np.array(X),
        np.array(X, dtype=object),
        [{"text": text, "stars": 3} for text in X],
    ],
    ids=["tuple", "array", "objects", "mappings"],
)
def test_samples_come_in_many_forms(quick, given):
    expected = clone(quick).fit(X, Y).predict_proba(X)
    assert (quick.fit(given, Y).predict_proba(given) == expected).all()


def test_what_pandas_has_is_taken(quick, encoder):
    pd = pytest.importorskip("pandas")
    expected = clone(quick).fit(X, Y).predict_proba(X)
    for texts in (pd.Series(X, index=range(7, 19)), pd.Series(X, dtype=object), pd.Series(X, dtype="string")):
        for y in (pd.Series(Y, index=range(50, 62)), pd.Series(Y, dtype="category"), pd.array(Y)):
            fitted = quick.fit(texts, y)
            assert (fitted.predict_proba(texts) == expected).all()
            assert fitted.classes_.tolist() == ["bad", "good"]
    flags = FewShotClassifier(encoder, steps=1).fit(X, pd.Series([one == "good" for one in Y], dtype="boolean"))
    assert (flags.classes_.dtype, flags.classes_.tolist()) == (np.dtype(bool), [False, True])
    cross_val_score(quick, pd.Series(X, index=range(7, 19)), pd.Series(Y), cv=2, error_score="raise")
    frame = pd.DataFrame({"text": X})
    rows = frame.to_dict("records")
    assert (quick.fit(rows, Y).predict_proba(rows) == expected).all()
    missing = pd.Series([*Y[:-1], None], dtype="string")
    for x, y, message in (
        (frame, Y, r"X has 2 dimensions.*a column, frame\['text'\]"),
        (pd.Series([], dtype=object), [], "X is empty"),
        (missing, Y, r"X\[11\] is <NA> \(NAType\) and no text; fill"),
        (X, missing, r"y\[11\] is <NA> \(NAType\) and no label"),
        (X, pd.Series([1.0] * 11 + [None]), r"y\[11\] is nan \(float\) and no label"),
        (X, pd.Series([1] * 11 + [None], dtype="Int64"), r"y\[11\] is (nan|<NA>) .*and no label"),
    ):
        with pytest.raises(DataError, match=message):
            quick.fit(x, y)
    tagger = FewShotTagger(encoder, steps=1)
    assert tagger.fit(pd.Series(WORDS), pd.Series(TAGS)).predict(pd.Series(WORDS)) == tagger.predict(WORDS)


def test_a_template_of_several_fields_takes_mappings(masked):
    fitted = FewShotClassifier(masked, template="{a} it was {mask} : {b}", steps=2, device="cpu")
    rows = [{"a": text, "b": "the film"} for text in X]
    fitted.fit(rows, Y)
    by_hand = dp.load(masked)
    model = fitted.adaptation_
    assert model.record["template"] == "{a} it was {mask} : {b}"
    assert by_hand.kind == model.record["backbone"]["kind"]
    swapped = fitted.predict_proba([{"a": row["b"], "b": row["a"]} for row in rows])
    assert not np.array_equal(swapped, fitted.predict_proba(rows))
    with pytest.raises(ValueError, match=r"X\[0\] has no field 'b', which the template has; possible: a"):
        fitted.predict([{"a": "good"}])
    with pytest.raises(ValueError, match=r"X\[1\]\['b'\] is nan \(float\) and no text; fill what is missing"):
        fitted.predict([rows[0], {"a": "good", "b": float("nan")}])
    with pytest.raises(ValueError, match="the template has the fields a, b; give mappings, {'a': …, 'b': …}"):
        fitted.predict(X)


def test_one_field_may_have_any_name(masked):
    named = FewShotClassifier(masked, template="{review} it was {mask}", steps=2).fit(X, Y)
    usual = FewShotClassifier(masked, template="{text} it was {mask}", steps=2).fit(X, Y)
    assert (named.predict_proba(NEW) == usual.predict_proba(NEW)).all()


def test_label_words_are_by_class(masked):
    template, y = "{text} it was {mask} .", [1] * 6 + [0] * 6
    words = {0: ["bad", "terrible"], 1: "great", 2: "not needed"}
    fitted = FewShotClassifier(masked, template=template, label_words=words, steps=3, device="cpu").fit(X, y)
    backbone = dp.load(masked)
    task = dp.Task(template, {"0": ["bad", "terrible"], "1": "great"})
    model = dp.Model(backbone, task, deltas_for(backbone))
    rows = [Example({"text": t}, str(label)) for t, label in zip(X, y, strict=True)]
    dp.fit(model, rows, training=dp.Training(steps=3))
    assert fitted.predict_proba(NEW).tolist() == [list(one["scores"].values()) for one in model.predict(NEW)]
    with pytest.raises(ConfigError, match="label_words has none for the class 1"):
        fitted.set_params(label_words={0: "bad"}).fit(X, y)
    with pytest.raises(ConfigError, match="label_words is 'great' \\(str\\); give a mapping"):
        fitted.set_params(label_words="great").fit(X, y)


@pytest.mark.parametrize(
    ("parameter", "text", "value"),
    [
        ("deltas", "lora:rank=2,at=attn.q+attn.v", dp.LoRA(rank=2, at=("attn.q", "attn.v"))),
        ("deltas", ["bitfit", "prefix:length=2"], (dp.BitFit(), dp.Prefix(length=2))),
        ("deltas", {"kind": "lora", "rank": 2}, [dp.LoRA(rank=2)]),
        ("deltas", "none", []),
        ("verbalizer", "soft", dp.SoftVerbalizer(words={"bad": ("bad",), "good": ("good",)})),
        ("verbalizer", "prototypes:scale=5", dp.Prototypes(5.0, {"bad": "bad", "good": "good"})),
        ("calibration", "contextualised", dp.Contextualised()),
    ],
)
def test_a_method_is_an_object_or_its_text(masked, parameter, text, value):
    learns = {} if parameter == "verbalizer" else {"verbalizer": "soft"}
    made = FewShotClassifier(masked, steps=2, **learns)
    by_text = clone(made).set_params(**{parameter: text}).fit(X, Y)
    by_object = clone(made).set_params(**{parameter: value}).fit(X, Y)
    assert (by_text.predict_proba(NEW) == by_object.predict_proba(NEW)).all()
    kept = by_text.adaptation_.record[parameter]
    assert kept == by_object.adaptation_.record[parameter]
    assert kept != clone(made).fit(X, Y).adaptation_.record[parameter]


def test_numbers_may_be_of_numpy(quick):
    numbers = {"steps": np.int64(3), "batch_size": np.int32(4), "learning_rate": np.float32(0.01)}
    fitted = clone(quick).set_params(**numbers, max_length=np.int64(30), random_state=np.int64(0)).fit(X, Y)
    assert fitted.adaptation_.record["training"]["run"]["steps"] == 3


def test_an_answer_is_where_its_sample_is(quick):
    order = np.random.default_rng(0).permutation(len(X))
    fitted = quick.fit(X, Y)
    mixed = [X[i] for i in order]
    np.testing.assert_allclose(fitted.predict_proba(mixed), fitted.predict_proba(X)[order], rtol=1e-5)


def test_random_state_decides(masked):
    def proba(state):
        made = FewShotClassifier(masked, steps=3, random_state=state, learning_rate=0.01)
        return made.fit(X, Y).predict_proba(X)

    assert (proba(1) == proba(1)).all()
    assert not (proba(1) == proba(2)).all()
    drawn = np.random.RandomState(0)
    first, second = proba(drawn), proba(drawn)
    assert not (first == second).all()
    assert (first == proba(np.random.RandomState(0))).all()
    np.random.seed(3)
    first, second = proba(None), proba(None)
    assert not (first == second).all()


# One backbone


def test_estimators_share_a_backbone_and_answer_in_turn_as_each_alone(masked, monkeypatch):
    release()
    loads, looks = [], []
    load, identity = _adaptation.load, _adaptation.identity
    monkeypatch.setattr(_adaptation, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(_adaptation, "identity", lambda *a: looks.append(a) or identity(*a))
    made = [
        FewShotClassifier(masked, steps=3, learning_rate=0.01),
        FewShotClassifier(masked, steps=3, deltas="prefix:length=2", verbalizer="soft", device="cpu"),
        FewShotClassifier(masked, steps=3, deltas=["said:dimension=20", "bitfit"]),
        FewShotClassifier(masked, deltas="none", verbalizer="proto_net"),
    ]
    alone = []
    for estimator in made:
        alone.append(estimator.fit(X, Y).predict_proba(NEW))
    for _ in range(2):
        for estimator, own in zip(made, alone, strict=True):
            assert (estimator.predict_proba(NEW) == own).all()
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert (len(loads), len(looks)) == (1, 1)


def test_a_fit_that_fails_leaves_the_backbone_to_the_others(quick, monkeypatch):
    own = quick.fit(X, Y).predict_proba(NEW)
    for broken in (
        {"deltas": "lora:at=nowhere"},
        {"template": "{text} {mask}", "label_words": {"bad": "", "good": ""}},
    ):
        with pytest.raises(dp.DeltaPromptError):
            clone(quick).set_params(**broken).fit(X, Y)
        assert (quick.predict_proba(NEW) == own).all()

    def breaks(*_args, **_options):
        raise KeyboardInterrupt

    backbone = _adaptation.place_of(quick.backbone, "masked", "cpu").backbone
    for place in ("deltaprompt.estimators._adaptation.fit", "deltaprompt.model.model.begin_from_words"):
        with monkeypatch.context() as patched:
            patched.setattr(place, breaks)  # while it trains, and while a model is made
            with pytest.raises(KeyboardInterrupt):
                clone(quick).fit(X, Y)
        same = _adaptation.place_of(quick.backbone, "masked", "cpu").backbone is backbone
        assert same == place.endswith("fit")  # what broke while it was made cannot be taken off, and is loaded again
        assert (quick.predict_proba(NEW) == own).all()


def test_threads_take_turns(quick):
    two = [clone(quick).set_params(random_state=n).fit(X, Y) for n in range(2)]
    alone = [estimator.predict_proba(NEW) for estimator in two]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: two[n % 2].predict_proba(NEW), range(12)))
        refitted = list(pool.map(lambda n: clone(two[n % 2]).fit(X, Y).predict_proba(NEW), range(4)))
    assert all((own == alone[n % 2]).all() for n, own in enumerate(answers))
    assert all((own == alone[n % 2]).all() for n, own in enumerate(refitted))


# Kept


def test_a_pickle_is_small_and_answers_the_same_in_a_new_process(masked, tmp_path):
    words = {0: "good", 1: "bad", 2: "great"}
    made = FewShotClassifier(masked, deltas="lora:rank=2", template="{soft:2} {text} it was {mask}", steps=3)
    pickled = pickle.dumps(made.set_params(label_words=words).fit(X, [n % 3 for n in range(12)]))
    (tmp_path / "made").write_bytes(pickled)
    assert len(pickled) < 20_000
    code = """
import pickle, sys
from pathlib import Path
made = pickle.loads(Path(sys.argv[1]).read_bytes())
assert made.predict(sys.argv[2:]).dtype.kind == "i"
print(made.predict_proba(sys.argv[2:]).tobytes().hex())
"""
    assert in_a_new_process(code, tmp_path / "made", *NEW) == made.predict_proba(NEW).tobytes().hex()


def test_a_pickled_tagger_answers_the_same(encoder):
    made = FewShotTagger(encoder, steps=3).fit(WORDS, TAGS)
    again = pickle.loads(pickle.dumps(made))
    release()
    assert again.predict(WORDS) == made.predict(WORDS)


def test_other_weights_are_refused(tmp_path):
    folder = saved(tmp_path, "bert")
    fitted = FewShotClassifier(folder, steps=2).fit(X, Y)
    pickled = pickle.dumps(fitted)
    with zoo.quiet():
        other = zoo.build("bert", torch.float32).model
        other.get_input_embeddings().weight.data[5, 5] += 1
        other.save_pretrained(folder)
    release()
    with pytest.raises(StoreError, match="this FewShotClassifier was made on the backbone .* differ in their fingerp"):
        pickle.loads(pickled).predict(NEW)


def test_another_backbone_is_refused_by_a_fitted_estimator(quick, tmp_path):
    other = saved(tmp_path, "distilbert")
    with pytest.raises(StoreError, match="FewShotClassifier was made on the backbone .* differ in their model_type"):
        quick.fit(X, Y).set_params(backbone=other).predict(NEW)


def test_what_was_learned_is_saved_as_any_adaptation(quick, encoder, tmp_path):
    fitted = quick.fit(X, Y)
    assert fitted.adaptation_.save(tmp_path / "a") > 1000
    opened = dp.open(tmp_path / "a", device="cpu")
    assert [list(one["scores"].values()) for one in opened.predict(NEW)] == fitted.predict_proba(NEW).tolist()
    tagger = FewShotTagger(encoder, steps=2).fit(TEXTS, SPANS)
    tagger.adaptation_.save(tmp_path / "b")
    found = dp.open(tmp_path / "b").predict(TEXTS)
    assert [[(e["start"], e["end"], e["label"]) for e in one["entities"]] for one in found] == tagger.predict(TEXTS)


def test_a_clone_is_not_fitted_and_a_copy_is(quick):
    quick.set_params(deltas=[dp.LoRA(rank=2), "bitfit"], label_words={"good": "great", "bad": ["bad"]})
    fitted = quick.fit(X, Y)
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError, match="This FewShotClassifier instance is not fitted yet"):
        fresh.predict(X)
    with pytest.raises(NotFittedError):
        fresh.score(X, Y)
    assert (copy.deepcopy(fitted).predict_proba(NEW) == fitted.predict_proba(NEW)).all()
    with pytest.raises(NotFittedError, match="This FewShotTagger instance is not fitted yet"):
        FewShotTagger().predict(TEXTS)
    with pytest.raises(NotFittedError):
        FewShotTagger().score(TEXTS, SPANS)


# With scikit-learn's own


def test_a_grid_over_methods_and_rates(quick):
    grid = {"deltas": ["lora:rank=2", "bitfit", "none"], "learning_rate": [1e-3, 0.02], "verbalizer": ["soft"]}
    search = GridSearchCV(quick, grid, cv=2, error_score="raise").fit(X, Y)
    assert len(search.cv_results_["params"]) == 6
    best = clone(quick).set_params(**search.best_params_).fit(X, Y)
    assert (search.predict_proba(NEW) == best.predict_proba(NEW)).all()
    rates = search.cv_results_["param_learning_rate"]
    assert sorted(set(rates.tolist())) == [1e-3, 0.02]


def test_a_pipeline_cleans_texts_first(quick):
    def cleaned(texts):
        return [text.strip("!").lower() for text in texts]

    piped = make_pipeline(FunctionTransformer(cleaned), clone(quick))
    loud = [f"{text.upper()}!!!" for text in X]
    assert (piped.fit(loud, Y).predict_proba(loud) == quick.fit(X, Y).predict_proba(X)).all()
    piped.set_params(fewshotclassifier__steps=1).fit(loud, Y)
    assert piped[-1].adaptation_.record["training"]["run"]["steps"] == 1


def test_processes_give_what_one_gives(quick):
    one = cross_val_score(quick, X, Y, cv=2, scoring="neg_log_loss", error_score="raise")
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        two = cross_val_score(quick, X, Y, cv=2, scoring="neg_log_loss", n_jobs=2, error_score="raise")
    np.testing.assert_array_equal(one, two)


def test_estimators_vote(encoder):
    quick = FewShotClassifier(encoder, steps=2)  # the vote calls the classes 0 and 1
    two = [("one", quick), ("two", clone(quick).set_params(deltas="bitfit", random_state=1))]
    vote = VotingClassifier(two, voting="soft").fit(X, Y)
    each = [estimator.predict_proba(NEW) for estimator in vote.estimators_]
    np.testing.assert_allclose(vote.predict_proba(NEW), (each[0] + each[1]) / 2)


def test_probabilities_are_right_for_scikit_learns_losses(quick):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of probabilities that do not sum to one
        loss = cross_val_score(quick, X, Y, cv=2, scoring="neg_log_loss", error_score="raise")
        area = cross_val_score(quick, X, Y, cv=2, scoring="roc_auc", error_score="raise")
    assert np.isfinite(loss).all()
    assert (loss < 0).all()
    assert ((area >= 0) & (area <= 1)).all()


# Spans


def test_words_and_tags_come_back_as_words_and_tags(encoder):
    fitted = FewShotTagger(encoder, **HARD).fit(WORDS, TAGS)
    assert fitted.types_ == ("animal", "film")
    assert fitted.predict(WORDS) == TAGS
    assert fitted.score(WORDS, TAGS) == 1.0
    assert fitted.predict([tuple(WORDS[0]), WORDS[1], []]) == [TAGS[0], TAGS[1], []]


def test_texts_and_spans_come_back_as_texts_and_spans(encoder):
    fitted = FewShotTagger(encoder, **HARD)
    given = [[{"start": np.int64(0), "end": 7, "label": "animal"}, Span(12, 25, "film")], ((0, 5, "animal"),), []]
    assert fitted.fit(np.array(TEXTS), given).predict(np.array(TEXTS)) == SPANS
    assert fitted.score(TEXTS, SPANS) == 1.0
    assert fitted.score(TEXTS, [SPANS[0][:1], [], []]) == pytest.approx(2 * 1 / (3 + 1))
    assert fitted.predict([WORDS[0], WORDS[1]]) == TAGS[:2]  # what is given decides what comes back
    assert fitted.score([WORDS[0], WORDS[4]], [TAGS[0], TAGS[4]]) == 1.0


@pytest.mark.parametrize(
    ("scheme", "learned"), [("io", "io"), ("bio", "bmes"), ("bmes", "bio"), ("bioes", "bio"), ("bilou", "bioes")]
)
def test_tags_come_back_in_the_scheme_that_they_had(encoder, scheme, learned):
    sentences, tags = [*WORDS[:3], ["the", "great", "good", "film"], ["dog"]], [*TAGS[:3], ["B-film", *["I-film"] * 3]]
    given = [tags_of(spans_of(own, "bio"), len(own), scheme) for own in [*tags, ["B-animal"]]]
    fitted = FewShotTagger(encoder, scheme=learned, **HARD).fit(sentences, given)
    assert fitted.predict(sentences) == given
    assert fitted.score(sentences, given) == 1.0


def test_the_score_is_the_f1_of_exact_spans(encoder):
    fitted = FewShotTagger(encoder, steps=1, device="cpu").fit(WORDS, TAGS)
    found = [[(0, 3, "animal"), (4, 9, "film")], [(1, 2, "film")]]

    def finds(examples):
        assert not any(one.spans for one in examples)  # which would cut words where they begin and end
        return [Example({}, spans=tuple(Span(*span) for span in own)) for own in found]

    fitted._found = finds
    right = [[(0, 3, "animal"), (4, 8, "film")], [(1, 2, "animal"), (3, 4, "film")]]
    assert fitted.score(["abcdefghij", "abcdefghij"], right) == pytest.approx(2 * 1 / (3 + 4))


def test_types_may_be_given(encoder):
    fitted = FewShotTagger(encoder, types=["film", "animal", "place"], steps=2).fit(WORDS, TAGS)
    assert fitted.types_ == ("film", "animal", "place")
    with pytest.raises(ConfigError, match=r"types is 'film' \(str\); give a list"):
        fitted.set_params(types="film").fit(WORDS, TAGS)
    with pytest.raises(DataError, match="the type 'animal'; did you mean|the type 'animal'; possible: film"):
        fitted.set_params(types=["film"]).fit(WORDS, TAGS)


def test_characters_are_joined_by_nothing(encoder):
    words = [list("电影很好看。"), list("不好看。")]
    tags = [["B-film", "I-film", "O", "O", "O", "O"], ["O"] * 4]
    fitted = FewShotTagger(encoder, steps=2).fit(words, tags)
    assert fitted._form.joiner == ""
    assert [len(own) for own in fitted.predict(words)] == [6, 4]
    for form, text in ((fitted._form, "电影ok"), (Form(), "电影 ok")):  # as when it was fitted, whatever is given now
        ((example,), in_words) = unanswered([["电影", "ok"]], form)
        assert (example.fields["text"], in_words) == (text, True)


def test_a_grid_over_a_tagger(encoder):
    made = FewShotTagger(encoder, steps=2, device="cpu")
    grid = {"verbalizer": [None, "prototypes"], "scheme": ["io"], "learning_rate": [1e-3, 0.02]}
    search = GridSearchCV(made, grid, cv=2, error_score="raise").fit([*WORDS[:4]], [*TAGS[:4]])
    assert len(search.cv_results_["params"]) == 4
    assert [len(own) for own in search.predict(WORDS)] == [len(own) for own in TAGS]


# What is wrong


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (None, Y, r"X is None; give texts or mappings of fields, one a sample: a list, a tuple"),
        ("a good film", Y, r"X is 'a good film' \(str\); give texts"),
        (5, Y, r"X is 5 \(int\); give texts"),
        ((text for text in X), Y, r"X is <generator .*\(generator\); give texts"),
        (dict.fromkeys(X), Y, r"X is \{'a great movie.* \(dict\); give texts"),
        ([], [], "X is empty, it has 0 samples"),
        (np.array([]), [], "X is empty"),
        ([*X[:-1], None], Y, r"X\[11\] is None and no text; fill what is missing with a text, or leave the sample out"),
        ([float("nan"), *X[1:]], Y, r"X\[0\] is nan \(float\) and no text; fill"),
        ([*X[:-1], 5], Y, r"X\[11\] is 5 \(int\) and no text; write numbers as texts"),
        (np.arange(12), Y, r"X\[0\] is np.int64\(0\) \(int64\) and no text; write numbers as texts"),
        (np.zeros((12, 3)), Y, r"X has 2 dimensions, its shape is \(12, 3\)"),
        ([[text] for text in X], Y, r"X\[0\] is \['a great movie'\] \(list\) and no text"),
        ([b"good", *X[1:]], Y, r"X\[0\] is b'good' \(bytes\) and no text"),
        (["a\0b", *X[1:]], Y, r"X\[0\]: holds a NUL character"),
        (["\ud800", *X[1:]], Y, r"X\[0\]: character 1 is half of a surrogate pair"),
        (X, Y[:-1], "X has 12 samples and y has 11; each sample of X has one in y"),
        (X, None, "requires y to be passed, but the target y is None"),
        (X, "good", r"y is 'good' \(str\); give labels"),
        (X, ["good"] * 12, "y has one class only, 'good'; there must be two or more"),
        (X, [*Y[:-1], None], r"y\[11\] is None and no label"),
        (X, [*Y[:-1], float("nan")], r"y\[11\] is nan \(float\) and no label.*Leave samples out"),
        (X, [*Y[:-1], 1], r"y\[0\] is 'good' \(str\) and y\[11\] is 1 \(int\); labels are all texts, or all numbers"),
        (X, [0.5] * 6 + [1.5] * 6, r"Unknown label type: y\[0\] is 0.5, and a continuous target"),
        (X, [["good"]] * 12, r"y\[0\] is \['good'\] \(list\) and no label"),
        (X, np.zeros((12, 2)), r"y has 2 dimensions, its shape is \(12, 2\)"),
    ],
)
def test_wrong_samples_and_labels(quick, x, y, message):
    with pytest.raises(DataError, match=message) as raised:
        quick.fit(x, y)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("x", [None, "good", [], [None], [3], np.zeros((3, 2))])
def test_wrong_samples_to_predict(quick, x):
    fitted = quick.fit(X, Y)
    for ask in (fitted.predict, fitted.predict_proba):
        with pytest.raises(DataError, match="X"):
            ask(x)


def test_a_column_of_labels_is_flattened_with_a_warning(quick):
    with pytest.warns(DataConversionWarning, match="A column-vector y was passed"):
        fitted = clone(quick).fit(X, np.array(Y)[:, None])
    assert (fitted.predict_proba(NEW) == quick.fit(X, Y).predict_proba(NEW)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"backbone": 5}, r"backbone is 5 \(int\); give its name"),
        ({"backbone": "nowhere/at-all"}, "no backbone 'nowhere/at-all'"),
        ({"template": 5}, r"template is 5 \(int\); give a text"),
        ({"template": "{text} {mask"}, "this '{' is never closed"),
        ({"deltas": 5}, r"delta 5 \(int\) is none; give an object such as dp.LoRA\(rank=16\), or a text"),
        ({"deltas": dp.LoRA}, r"delta <class .* \(ABCMeta\) is none; give an object"),
        ({"deltas": "lorra"}, "no delta 'lorra'; did you mean 'lora'"),
        ({"deltas": "lora:rnk=4"}, "delta 'lora' has no option 'rnk'; did you mean 'rank'"),
        ({"deltas": np.array([1.0])}, "is none; give an object"),
        ({"verbalizer": 5}, r"verbalizer 5 \(int\) is none; give an object such as dp.Prototypes\(scale=20\)"),
        ({"verbalizer": dp.LoRA()}, r"verbalizer LoRA\(.* is none; give an object"),
        ({"calibration": 5}, r"calibration 5 \(int\) is none; give an object such as dp.Contextualised\(\)"),
        ({"max_length": 0}, r"max_length is 0 \(int\); it is a whole number of tokens"),
        ({"epochs": 1, "steps": 1}, "epochs = 1 and steps = 1 were both given"),
        ({"steps": 2.5}, r"steps = 2.5 is not possible: it is a whole number, 1 or more"),
        ({"batch_size": 0}, "batch_size = 0 is not possible"),
        ({"learning_rate": "fast"}, "learning_rate = 'fast' is not possible"),
        ({"dev_share": 1.5}, r"dev_share is 1.5 \(float\); it is a share between 0 and 1"),
        ({"device": "toaster"}, r"device = 'toaster' cannot be used here .*; possible: "),
        ({"random_state": "lucky"}, r"random_state is 'lucky' \(str\); give a whole number"),
        ({"random_state": -1}, r"random_state is -1 \(int\)"),
        ({"deltas": "none"}, "nothing in this model trains"),
    ],
)
def test_wrong_parameters(quick, given, message):
    template = {} if "template" in given else {"template": "{text} it was {mask}"}
    with pytest.raises(dp.DeltaPromptError, match=message) as raised:
        quick.set_params(**{"steps": None, **template, **given}).fit(X, Y)
    assert isinstance(raised.value, ValueError) or not isinstance(raised.value, ConfigError)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (TEXTS, None, "requires y to be passed"),
        ("a good film", SPANS, r"X is 'a good film' \(str\); give texts or lists of words"),
        ([], [], "X is empty"),
        (TEXTS, SPANS[:2], "X has 3 samples and y has 2"),
        ([TEXTS[0], WORDS[0]], SPANS[:2], r"X\[1\] is a list and X\[0\] is none; give texts only, or lists of words"),
        ([TEXTS[0], None, TEXTS[2]], SPANS, r"X\[1\] is None and no text"),
        ([["the", None]], [["O", "O"]], r"X\[0\]\[1\] is None and no text"),
        ([["the", " "]], [["O", "O"]], r"X\[0\]\[1\] is a blank word; leave it out, and its tag"),
        (WORDS, [*TAGS[:4], ["O"]], r"X\[4\] has 3 words and y\[4\] has 1 tags; each word has one"),
        (WORDS, [*TAGS[:4], "O O O"], r"y\[4\] is 'O O O' \(str\); a list of tags is possible"),
        (WORDS, [*TAGS[:4], ["O", "O", 3]], r"y\[4\]\[2\] is 3 \(int\); a tag is a text"),
        (WORDS, [*TAGS[:4], ["O", "O", "film"]], r"y\[4\]\[2\]: 'film' is no tag of the scheme bio"),
        (WORDS[:1], [["the"] * 7], r"no tag of y is 'O' and none begins with B- or I-; are these tags\? y\[0\] is"),
        (WORDS[:1], [["O"] * 7], "there is no span in y to learn a type from"),
        (TEXTS, [[], [], []], "there is no span in y to learn a type from"),
        (TEXTS, [None, [], []], r"y\[0\] is None; a text has a list of its spans"),
        (TEXTS, [{"start": 0}, [], []], r"y\[0\] is \{'start': 0\} \(dict\); a text has a list of its spans"),
        (TEXTS, [[(0, 70, "film")], [], []], r"y\[0\]\[0\]: its end holds 70"),
        (TEXTS, [[(5, 2, "film")], [], []], r"y\[0\]: the span 5 to 2"),
        (TEXTS, [[(0, 3)], [], []], r"y\[0\]\[0\] is \[0, 3\]; possible"),
        (TEXTS, [[(0, 3, None)], [], []], r"y\[0\]\[0\] has the label None"),
        (TEXTS, [[(0, 7, "film"), (4, 9, "film")], [], []], r"y\[0\]: the spans 0 to 7, 'film', and 4 to 9"),
        (np.zeros((3, 2)), SPANS, "X has 2 dimensions"),
        (np.arange(3), SPANS, r"X\[0\] is np.int64\(0\) \(int64\) and no text"),
    ],
)
def test_wrong_sentences(encoder, x, y, message):
    with pytest.raises(DataError, match=message) as raised:
        FewShotTagger(encoder, steps=1).fit(x, y)
    assert isinstance(raised.value, ValueError)


def test_wrong_sentences_to_predict(encoder):
    fitted = FewShotTagger(encoder, steps=1).fit(WORDS, TAGS)
    with pytest.raises(DataError, match=r"X\[1\] is None and no text"):
        fitted.predict(["good", None])
    with pytest.raises(ConfigError, match="scheme='bioo' is no scheme of tags"):
        fitted.set_params(scheme="bioo").fit(WORDS, TAGS)


# scikit-learn's checks, which feed matrices of numbers: here a number is a word


def written(rows):
    return [[("bad", "good")[int(number > 0)] for number in row] for row in rows]


class Sorter(FewShotClassifier):
    """The classifier on matrices."""

    def fit(self, X, y):
        return super().fit([" ".join(words) for words in written(validate_data(self, X))], y)

    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba([" ".join(words) for words in written(validate_data(self, X, reset=False))])

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


class Finder(FewShotTagger):
    """The tagger on matrices: the target is the label of a row's first word."""

    def fit(self, X, y):
        X, y = validate_data(self, X, y)
        return super().fit(
            written(X), [[f"B-{number}", *["O"] * (len(row) - 1)] for number, row in zip(y, X, strict=True)]
        )

    def predict(self, X):
        check_is_fitted(self)
        found = super().predict(written(validate_data(self, X, reset=False)))
        return np.array([float(tags[0][2:] or -1) for tags in found])

    def score(self, X, y):
        return float((self.predict(X) == y).mean())

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


@pytest.fixture(scope="module")
def at_home(encoder):
    """Within the folder of the encoder, which is the backbone `.`."""
    before = Path.cwd()
    os.chdir(encoder)
    yield
    os.chdir(before)


@pytest.mark.usefixtures("at_home")
@parametrize_with_checks([Sorter(".", steps=1, device="cpu"), Finder(".", steps=1, device="cpu")])
def test_scikit_learns_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("cls", [FewShotClassifier, FewShotTagger])
def test_scikit_learn_has_no_check_for_texts_but_cloning(cls):
    with pytest.warns(SkipTestWarning, match="requires input  of type"):
        done = check_estimator(cls())
    assert [one["status"] for one in done] == ["passed"]
    tags = cls().__sklearn_tags__()
    assert (tags.input_tags.string, tags.input_tags.two_d_array, tags.target_tags.required) == (True, False, True)
