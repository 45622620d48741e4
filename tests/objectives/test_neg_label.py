"""NegLabel and CSP: the worked numbers of their authors, mining from files of words, and a test clean and attacked."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_test
from torch import Tensor
from torch.nn import functional as F

from robustclip.attacks import PGD
from robustclip.data import CLIPDataModule, DataSource
from robustclip.evaluation import OODDetection, ResultsWriter, RobustEvaluation
from robustclip.methods import ZeroShot
from robustclip.objectives.neg_label import CSP, NegLabel, group_odds
from robustclip.objectives.scores import Score, score_of
from robustclip.objectives.word_lists import mined, read_words
from robustclip.results.run import Run
from robustclip.tools.compare import unlike_unknown
from robustclip.types import Task

ONE = torch.tensor(1.0)
POSITIVES, NEGATIVES = [[31.0, 24.0]], [[27.0, 29.0, 18.0, 30.0, 25.0]]
CANDIDATES = [
    [1, 0, 0, 0.1], [0.2, 0.2, 0.2, 1], [0, 0, 0.1, 1], [0.5, 0.5, 0, 0.5], [0, 0.9, 0.1, 0.2], [0.1, 0, 0, 1]
]  # fmt: skip
WORDNET = """  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 002 @ 02083346 n 0000 | a member
09613191 18 n 0a cook 0 b1 0 b2 0 b3 0 b4 0 b5 0 b6 0 b7 0 b8 0 last_cook 0 000 | ten words
"""
ADJECTIVES = """00001740 00 a 01 able 0 005 = 05200169 n 0000 | having means
00003700 44 s 01 born(p) 0 002 & 00003553 a 0000 | ready
"""


def score_at(groups: int) -> float:
    positives, negatives = torch.tensor(POSITIVES), torch.tensor(NEGATIVES)
    size = negatives.shape[1] // groups
    odds = group_odds(positives, negatives[:, : groups * size].unflatten(1, (groups, size)))
    return float(NegLabel.value(of_words(), odds, ONE))


def of_words() -> Any:
    return object.__new__(NegLabel)


@pytest.mark.parametrize(("groups", "expected"), [(1, 0.656368691), (2, 0.799077531), (5, 0.918337547)])
def test_the_score_is_that_of_its_authors(groups: int, expected: float) -> None:
    assert score_at(groups) == pytest.approx(expected, abs=1e-8)


def test_one_group_is_the_share_in_a_softmax_and_more_negatives_never_raise_it() -> None:
    logits = 100 * torch.rand(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = [
        NegLabel.value(of_words(), group_odds(logits[:, :4], logits[:, None, 4:end]), ONE) for end in range(5, 13)
    ]
    expected = logits.softmax(-1)[:, :4].sum(-1)
    torch.testing.assert_close(shares[-1], expected, rtol=1e-12, atol=1e-15)
    assert all((more <= fewer).all() for fewer, more in pairwise(shares))


def test_the_attacked_quantity_is_the_logit_of_the_score() -> None:
    odds = torch.tensor([[2.0, -1.0, 60.0]], dtype=torch.float64, requires_grad=True)
    evidence = NegLabel.evidence(of_words(), odds, ONE)
    assert float(evidence.detach()) == pytest.approx(0.927557536, abs=1e-8)
    value = NegLabel.value(of_words(), odds, ONE)
    torch.testing.assert_close(evidence, value.logit(), rtol=1e-12, atol=0)
    certain = torch.full((1, 3), 80.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(NegLabel.evidence(of_words(), certain, ONE).sum(), certain)
    torch.testing.assert_close(gradient, torch.full((1, 3), 1 / 3, dtype=torch.float64))


def test_mining_is_that_of_the_authors() -> None:
    cosines = F.normalize(torch.tensor(CANDIDATES, dtype=torch.float64), dim=1)[:, :3]
    kept, nearness = mined(cosines, 0.95, 0.5)
    assert nearness.tolist() == pytest.approx([0.895533, 0.188982, 0.089553, 0.577350, 0.884229, 0.089553], abs=1e-6)
    assert kept == [2, 5, 1]
    _, highest = mined(cosines, 1, 0.5)
    assert highest.tolist() == pytest.approx([0.995037, 0.188982, 0.099504, 0.577350, 0.970495, 0.099504], abs=1e-6)
    kept, limited = mined(cosines, 0.95, 1, limit=0.95)
    assert limited[[0, 4]].tolist() == [1, 1]
    assert kept == [2, 5, 1, 3]
    assert mined(cosines, 0.95, 0.49)[0] == [2, 5]  # 2.94 words, rounded down


def test_mining_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cosines = torch.rand(37, 9, generator=torch.Generator().manual_seed(1))
    whole = mined(cosines, 0.9, 0.3)
    monkeypatch.setattr("robustclip.objectives.word_lists.COSINES_PER_PIECE", 40)
    pieces = mined(cosines, 0.9, 0.3)
    assert whole[0] == pieces[0]
    assert torch.equal(whole[1], pieces[1])


def test_words_are_sorted_once_each_from_any_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfzebra\r\nice_cream\r\n\r\n  apple \r\n")
    (tmp_path / "b.txt").write_text("apple\nice cream\nmoon")
    paths = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    assert read_words(paths, "nouns") == read_words(paths[::-1], "nouns") == ["apple", "ice cream", "moon", "zebra"]


def test_wordnets_files_are_read_without_lexicographer_files(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(WORDNET)
    (tmp_path / "data.adj").write_text(ADJECTIVES)
    nouns, adjectives = ([str(tmp_path / f"data.{kind}")] for kind in ("noun", "adj"))
    assert read_words(nouns, "nouns", ["noun.person"]) == ["Canis familiaris", "dog", "domestic dog", "entity"]
    assert len(read_words(nouns, "nouns")) == 4 + 10  # numbers of words are hexadecimal
    assert read_words(adjectives, "adjectives") == ["able", "born"]
    assert CSP(nouns, adjectives).settings["words"]["nouns"]["count"] == 1  # animals and persons are left out
    with pytest.raises(ValueError, match=r"left_out names 'noun.people'; WordNet has adj.all"):
        read_words(nouns, "nouns", ["noun.people"])
    (tmp_path / "data.noun").write_text("a dog\n")
    with pytest.raises(ValueError, match=r"data.noun line 1 is no synset of WordNet: 'a dog'"):
        read_words(nouns, "nouns")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "nouns of neg_label: .* cannot be read"), ("\n \n", "has no word"), ("a\x07b\n", "control character")],
)
def test_bad_files_of_words_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_text(content)
    with pytest.raises(ValueError, match=words):
        NegLabel([str(tmp_path / "words.txt")])


def test_a_score_without_words_is_refused() -> None:
    for make in (NegLabel, lambda: OODDetection(scores=["mcm", "neg_label"])):
        with pytest.raises(ValueError, match="nouns of neg_label must list a file of words"):
            make()


class Stub:
    """A model whose names have features that depend on their texts alone."""

    class clip:  # noqa: N801
        logit_scale = torch.tensor(100.0)

    def __init__(self) -> None:
        self.texts: list[str] = []

    def image_features(self, images: Tensor) -> Tensor:
        return F.normalize(images.flatten(1)[:, :8], dim=1)

    def class_features(self, task: Task) -> Tensor:
        self.texts += [prompt for prompts in task.prompts for prompt in prompts]
        draws = [torch.Generator().manual_seed(sum(name.encode())) for name in task.class_names]
        return F.normalize(torch.stack([torch.randn(8, generator=draw) for draw in draws]), dim=1)

    def logits(self, images: Tensor, task: str) -> Tensor:
        raise NotImplementedError


TASK = Task("pets", ("cat", "sea lion"), ("a photo of a {}",))


def word_files(folder: Path, nouns: list[str], adjectives: list[str]) -> list[list[str]]:
    folder.mkdir(exist_ok=True)
    (folder / "nouns.txt").write_text("\n".join(nouns))
    (folder / "adjectives.txt").write_text("\n".join(adjectives))
    return [[str(folder / "nouns.txt")], [str(folder / "adjectives.txt")]]


def prepared(score: NegLabel, model: Any = None) -> NegLabel:
    score.setup(CLIPDataModule(), [TASK])
    score.prepare(model or Stub(), TASK)
    return score


def test_class_names_and_dropped_words_are_never_negatives(tmp_path: Path) -> None:
    nouns = ["Cat", "sea_lion", *(f"noun {number}" for number in range(18))]
    paths = word_files(tmp_path, nouns, ["able", "noun 3"])
    full = prepared(NegLabel(*paths, share=1.0)).further_names("pets")
    assert sorted(full) == sorted([f"noun {number}" for number in range(18)] + ["able"])
    (tmp_path / "dropped.txt").write_text("NOUN_3\nable\n")
    fewer = prepared(NegLabel(*paths, share=1.0, dropped=[str(tmp_path / "dropped.txt")])).further_names("pets")
    assert [name for name in full if name not in fewer] == ["noun 3", "able"]
    few = prepared(NegLabel(*paths, share=0.15)).further_names("pets")
    assert len(few) <= 3
    assert list(few) == [name for name in full if name in few]
    (tmp_path / "dropped.txt").write_text("\n".join(full))
    with pytest.raises(ValueError, match=r"neg_label has no negative for pets: share 1 keeps no word"):
        prepared(NegLabel(*paths, share=1.0, dropped=[str(tmp_path / "dropped.txt")]))


def test_names_are_encoded_with_the_templates_of_the_paper(tmp_path: Path) -> None:
    paths, model = word_files(tmp_path, ["moon", "tree"], ["able"]), Stub()
    prepared(NegLabel(*paths, share=1.0), model)
    expected = ["the nice moon", "the nice tree", "This is a able photo", "the nice cat", "the nice sea lion"]
    assert model.texts == expected
    model = Stub()
    score = prepared(CSP(*paths, share=1.0), model)
    (composed,) = [name for name in score.further_names("pets") if name.startswith("able ")]
    assert composed.split()[1] in CSP.superclasses
    assert len(model.texts) == 8 * 2 + 4 + 8 * 2
    assert f"a nice photo of {composed}" in model.texts
    assert [prepared(CSP(*paths, share=1.0, seed=seed)).phrases(["able"]) for seed in (0, 0)] == [[composed]] * 2


def test_the_score_of_images_is_the_formula_over_seeded_groups(tmp_path: Path) -> None:
    paths = word_files(tmp_path, [f"word{number}" for number in range(23)], [])
    score, model = prepared(NegLabel(paths[0], share=1.0, groups=4, seed=3)), Stub()
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    features = [
        model.class_features(Task("names", tuple(names))) for names in (TASK.class_names, score.further_names("pets"))
    ]
    positives, negatives = (100 * (model.image_features(images) @ part.T).double() for part in features)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(3))[:20].view(4, 5)
    masses = [positives.exp().sum(1) / (positives.exp().sum(1) + negatives[:, group].exp().sum(1)) for group in order]
    found = score.value(score.forward(model, images, "pets"), ONE)
    torch.testing.assert_close(found, torch.stack(masses).mean(0), rtol=1e-4, atol=1e-6)  # products in fp32
    alone = torch.cat([score.value(score.forward(model, image[None], "pets"), ONE) for image in images])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)
    cold = prepared(NegLabel(paths[0], share=1.0, groups=4, seed=3, temperature=0.01))
    torch.testing.assert_close(cold.value(cold.forward(model, images, "pets"), ONE), found)
    permuted = prepared(NegLabel(paths[0], share=1.0, groups=4, seed=3))
    permuted.prepare(model, replace(TASK, class_names=TASK.class_names[::-1]))
    torch.testing.assert_close(
        permuted.value(permuted.forward(model, images, "pets"), ONE), found, rtol=1e-4, atol=1e-6
    )


COLOURS = [DataSource("shapes:colours", classes="0-5")]


def detect(folder: Path, score: Score, **options: Any) -> Run:
    data = CLIPDataModule(test=COLOURS, unknown=COLOURS, image_size=32, batch_size=36)
    detection = OODDetection(scores=["mcm", score], headline=score.name, **options)
    run_test(
        ZeroShot(), data, detection, RobustEvaluation(max_samples=12), ResultsWriter(str(folder.parent), folder.name)
    )
    return Run.open(folder)


def test_a_test_detects_with_negatives_clean_and_attacked_and_keeps_them(tmp_path: Path) -> None:
    names = CLIPDataModule(test=COLOURS, unknown=COLOURS)
    names.setup("test")
    unknown = sorted({*names.unknown_class_names("colours_unknown")} - {*names.test_tasks[0].class_names})
    assert len(unknown) == 6
    nouns = [*unknown[:2], *names.test_tasks[0].class_names, *(f"a {size} star" for size in ("small", "large"))]
    paths = word_files(tmp_path / "words", nouns, ["dotted", "striped"])
    attack = PGD(eps="4/255", alpha="1/255", steps=3, keep="best")
    run = detect(tmp_path / "run", NegLabel(*paths, share=0.9, groups=2), attack=attack)
    part = run.result["detection"]["tasks"]["colours"]
    names_of = part["further_names"]["neg_label"]
    written = (run.folder / "further_names" / "colours@neg_label.txt").read_text().split("\n")[:-1]
    assert names_of == {"count": len(written), "of_unknown": {"colours_unknown": sorted({*unknown[:2]} & {*written})}}
    assert len(names_of["of_unknown"]["colours_unknown"]) > 0
    values = part["unknown"]["colours_unknown"]["scores"]["neg_label"]
    assert 0.5 < values["auroc"] <= 1
    assert values["attacked"]["auroc"] < values["auroc"]
    settings = run.result["detection"]["scores"]["neg_label"]
    assert (settings["class"], settings["groups"], settings["words"]["nouns"]["count"]) == ("NegLabel", 2, len(nouns))
    assert json.dumps(settings).count(str(tmp_path)) == 0  # the same words elsewhere are the same score
    other = detect(tmp_path / "other", NegLabel(paths[0], share=0.9, groups=2))
    (line,) = unlike_unknown(run, other)
    assert line.startswith("score neg_label differs")


def test_further_scores_have_names() -> None:
    with pytest.raises(ValueError, match="there is no score 'neg_labels'; ours are mcm,"):
        score_of("neg_labels", {"neg_label": NegLabel})
