"""Fixtures that every test may use: tiny models and data made here, and the real ones beside the project.

Slow imports wait until a fixture is asked for, since the process that shares out the tests runs none.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers import ShardWriter

for name in ("evaluation", "methods"):  # folders whose cases the tests of other folders use
    sys.path.append(str(Path(__file__).parent / name))
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models are tiny; more threads only slow each other down."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `pretrained`; see `helpers.tiny_clip`."""
    from helpers import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def write_shards() -> "ShardWriter":
    """Writes a data set; see `helpers.write_shards`."""
    from helpers import write_shards

    return write_shards


@pytest.fixture(scope="session")
def photographs() -> Path:
    """Real photographs beside the project, one folder per data set."""
    return _beside("data/wds", "photographs")


@pytest.fixture(scope="session")
def real_model() -> Path:
    """A small pre-trained image-text model beside the project."""
    return _beside("weights/lite0-minilm-lit", "pre-trained weights")


def _beside(path: str, what: str) -> Path:
    if not (SHARED / path).is_dir():
        pytest.skip(f"needs the {what} in {SHARED / path}, which is not here")
    return SHARED / path
