"""Random schedules of shards, kills and numbers of processes leave the result of one uninterrupted process."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from helpers import ShardWriter
from ranks import in_background
from test_interruption import SIZES, contents, make_inputs

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("shard_cases.py")
SCHEDULES, GROUPS = 20, 4
MOMENTS = (
    "in append 2",
    "before append 2",
    "before replace facts.json",
    "before rmtree parts",
    "before unlink protocol.json",
)


def drawn(chance: random.Random) -> list[dict[str, Any]]:
    """Two to four shards, of which each has up to two kills; every start has one or two processes."""
    parts: list[dict[str, Any]] = []
    count = chance.randint(2, 4)
    for _ in range(count):
        kills: list[list[Any]] = []
        for _ in range(chance.choice([0, 0, 1, 2])):
            from_outside = chance.random() < 0.5
            moment = f"{chance.uniform(0, 0.3) / count:.3f}" if from_outside else chance.choice(MOMENTS)
            kills.append([moment, chance.choice([1, 2]) if from_outside else 1])
        parts.append({"kills": kills, "processes": chance.choice([1, 1, 2])})
    return parts


@pytest.fixture(scope="module", params=range(GROUPS))
def folder(request: pytest.FixtureRequest, write_shards: ShardWriter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the results of a group of schedules; every fourth reads the data as a stream."""
    folder = tmp_path_factory.mktemp("shards")
    make_inputs(folder, write_shards)
    local = {"root": str(folder), "location": "", "workers": 0}
    streamed = {"root": str(folder), "location": f"file://{folder}/", "workers": 2}
    whole = [{"kills": [], "processes": 1}]
    schedules = {
        "whole": {"options": local, "parts": whole},
        "whole_two": {"options": local, "parts": [{"kills": [], "processes": 2}]},
        "streamed": {"options": streamed, "parts": whole},
    }
    chance = random.Random(request.param)
    for number in range(SCHEDULES // GROUPS):
        schedules[f"schedule_{number}"] = {"options": streamed if number % 4 == 3 else local, "parts": drawn(chance)}
    (folder / "schedules.json").write_text(json.dumps(schedules))
    with in_background(SCRIPT, folder):
        pass
    return folder


def comparable(case: Path) -> dict[str, Any]:
    found = contents(case)
    for name in ("result.json", "facts.json"):
        del found[name]["device"]
    return found


def test_the_reference_has_different_outcomes(folder: Path) -> None:
    found = comparable(folder / "whole" / "0")
    result = found["result.json"]
    assert {name: values["n"] for name, values in result["tasks"].items()} == SIZES | {"third": SIZES["third"] - 2}
    assert {"first@others", "unit-features@third"} <= {Path(name).stem for name in found}
    assert [name for name in found if name.startswith("examples")]
    assert 0 < result["tasks"]["first"]["pgd"]["correct"] < result["tasks"]["first"]["clean"]["correct"]


def test_the_schedules_have_kills_and_several_processes(folder: Path) -> None:
    struck = json.loads((folder / "struck.json").read_text())
    schedules = json.loads((folder / "schedules.json").read_text())
    assert sum(struck.values()) >= SCHEDULES // GROUPS
    assert any(part["processes"] == 2 for schedule in schedules.values() for part in schedule["parts"])


@pytest.mark.parametrize("number", range(SCHEDULES // GROUPS))
def test_a_schedule_leaves_the_files_of_one_process(folder: Path, number: int) -> None:
    ours = comparable(folder / f"schedule_{number}" / "joined")
    theirs = comparable(folder / ("streamed" if number % 4 == 3 else "whole") / "0")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name] == theirs[name], name
