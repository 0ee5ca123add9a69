import pytest

from libs.errors import UserError
from libs.seeds import parse_labels, parse_seeds


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("7", [7]),
        ("0-63", list(range(64))),
        ("9, 0,4-6", [9, 0, 4, 5, 6]),  # the order given, not sorted
        ("3-3", [3]),
        (str(2**63 - 1), [2**63 - 1]),
    ],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "'' is no number or range"),
        ("1,,2", "'' is no number or range"),
        ("-5", "'-5' is no number or range"),
        ("3--1", "'3--1' is no number or range"),
        ("a", "'a' is no number or range"),
        ("1.5", "'1.5' is no number or range"),
        ("²", "is no number or range"),
        ("9-7", "reversed; write 7-9"),
        (str(2**63), "below 2^63"),
        ("0,5,5", "seed 5 is named twice"),
        ("4-9,0-4", "seed 4 is named twice"),
        ("0-9,2,20", "seed 2 is named twice"),
        ("0-99999999", "100,000,000 seeds; at most 10,000,000"),
        (f"0-{2**63 - 1}", "at most 10,000,000"),  # refused without being written out
    ],
)
def test_bad_seeds(text, problem):
    with pytest.raises(UserError) as caught:
        parse_seeds(text)
    assert str(caught.value).startswith(f"--seeds={text}: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_of_an_image_depends_on_its_seed_alone():
    labels = dict(zip(range(40), parse_labels("4,0,9", range(40), 10), strict=True))
    for seeds in ([5], [39, 2, 17], range(10, 30)):
        assert parse_labels("4,0,9", seeds, 10) == [labels[seed] for seed in seeds]


def test_labels():
    assert parse_labels("2-4,2", range(5), 10) == [2, 3, 4, 2, 2]
    assert parse_labels(None, range(4), 3) == [0, 1, 2, 0]
    assert parse_labels(None, range(4), 0) is None


@pytest.mark.parametrize(
    ("text", "num_classes", "problem"),
    [
        ("10", 10, "label 10 is out of range; this model's classes are 0 to 9"),
        ("0-10", 10, "label 10 is out of range"),
        (f"0-{10**20}", 10, "out of range"),
        ("cat", 10, "'cat' is no number or range"),
        ("5-2", 10, "reversed"),
        ("0", 0, "this model has no classes"),
    ],
)
def test_bad_labels(text, num_classes, problem):
    with pytest.raises(UserError) as caught:
        parse_labels(text, [0], num_classes)
    assert str(caught.value).startswith(f"--labels={text}: ")
    assert problem in str(caught.value)
