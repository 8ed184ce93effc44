"""The client of the Hub, set to a stand-in and to an empty cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import jasper_store as js
from tests.builders import build_pt_dataset
from tests.cli.conftest import refused, run, run_json  # noqa: F401 - fixtures of the commands' tests
from tests.hub.server import TOKEN, StandIn

constants = pytest.importorskip(
    "huggingface_hub.constants", reason="needs huggingface_hub: pip install 'jasper_store[hub]'"
)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in; the client is logged in."""
    server = StandIn()
    # The client reads its environment once, when it is imported.
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield server
    server.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A JASPER dataset as a conversion writes it: with a manifest."""
    path = tmp_path / "data"
    js.convert(build_pt_dataset(tmp_path / "pt", n_pairs=120, config={"license": "mit"}), path)
    return path


@pytest.fixture
def pushed(hub: StandIn, data: Path) -> str:
    """A dataset on the stand-in, as a path."""
    js.push(data, "owner/name")
    return "hf://owner/name"
