"""The shipped split is METHOD section 1's, and a bad protocol file says what is wrong with it."""

from pathlib import Path

import pytest

from hdovd.core import HdovdError
from hdovd.core.text_files import shipped
from hdovd.data import load_protocol, parse_protocol

BASE = (
    "person, bicycle, car, motorcycle, train, truck, boat, bench, bird, horse, sheep, bear, zebra, giraffe, backpack, "
    "handbag, "
    "suitcase, frisbee, skis, kite, surfboard, bottle, fork, spoon, bowl, banana, apple, sandwich, orange, broccoli, "
    "carrot, pizza, "
    "donut, chair, bed, toilet, tv, laptop, mouse, remote, microwave, oven, toaster, refrigerator, book, clock, vase, "
    "toothbrush"
)
NOVEL = "airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, cake, couch, keyboard, sink, scissors"  # noqa: E501


def test_ov_coco_is_the_published_split() -> None:
    protocol = load_protocol("ov-coco")
    assert "ov-coco" in shipped("protocols")
    assert protocol.name == "ov-coco"
    assert protocol.base == tuple(BASE.split(", "))
    assert protocol.novel == tuple(NOVEL.split(", "))
    assert (len(protocol.base), len(protocol.novel), len(set(protocol.names))) == (48, 17, 65)
    assert protocol.names == protocol.base + protocol.novel
    assert protocol.min_image_side_px == 32
    assert protocol.max_detections == (100, 300, 1000)


def test_every_shipped_protocol_loads() -> None:
    for name in shipped("protocols"):
        assert load_protocol(name).name == name


def test_a_protocol_survives_its_plain_values() -> None:
    protocol = load_protocol("ov-coco")
    assert parse_protocol(protocol.to_dict()) == protocol


def test_a_file_and_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nbase = ["b", "a"]\nnovel = []\n')
    protocol = load_protocol(str(file))
    assert protocol.names == ("b", "a")
    assert (protocol.min_image_side_px, protocol.max_detections) == (32, (100, 300, 1000))
    file.write_text('name = "mine"\nbase = ["a"]\nnovel = ["c"]\nmin_image_side_px = 8\nmax_detections = [10, 20]\n')
    assert load_protocol(str(file)).min_image_side_px == 8
    assert load_protocol(str(file)).max_detections == (10, 20)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('name = "x"\nnovel = ["a"]', "base: Field required"),
        ('base = ["a"]\nnovel = []', "name: Field required"),
        ('name = "x"\nbase = ["a"]\nnovel = []\nnovell = ["b"]', "novell is a list: Unexpected"),
        ('name = "x"\nbase = ["a", "b", "a"]\nnovel = []', "twice.*a"),
        ('name = "x"\nbase = ["a", "b"]\nnovel = ["b"]', "twice.*b"),
        ('name = "x"\nbase = []\nnovel = ["a"]', "base is a list: .*at least 1"),
        ('name = "x"\nbase = "person"\nnovel = ["a"]', "base is the text 'person'"),
        ('name = "x"\nbase = ["a", 3]\nnovel = []', "base.1 is 3"),
        ('name = "x"\nbase = ["a"]\nnovel = [""]', "name in it is the text ''"),
        ('name = "x"\nbase = ["a"]\nnovel = []\nmax_detections = []', "max_detections"),
        ('name = "x"\nbase = ["a"]\nnovel = []\nmax_detections = [0]', "max_detections"),
        ('name = "x"\nbase = ["a"]\nnovel = []\nmax_detections = 100', "max_detections"),
        ('name = "x"\nbase = ["a"]\nnovel = []\nmin_image_side_px = "32"', "min_image_side_px"),
        ('name = "x"\nbase = ["a"\nnovel = []', "bad.toml"),
    ],
)
def test_a_bad_file_names_file_and_problem(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(HdovdError, match=problem) as error:
        load_protocol(str(file))
    assert str(file) in str(error.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(HdovdError, match=r"bad\.toml"):
        load_protocol(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(HdovdError, match=r"ov-vg.*ov-coco, ov-lvis"):
        load_protocol("ov-vg")
