"""Fixtures for all tests. The helpers of tests/tiny.py come as fixtures: importlib mode has no importable `tests`."""

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("wandapp_tests_tiny", Path(__file__).with_name("tiny.py"))
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)


@pytest.fixture(scope="session")
def tiny_model():
    """tiny_model(family, seed=0, **config_fields) -> (model, config)."""
    return tiny.tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """tiny_tokenizer(add_bos=False) -> byte-level tokenizer."""
    return tiny.tiny_tokenizer


@pytest.fixture(params=sorted(tiny.FAMILIES))
def tiny_family(request) -> str:
    """The name of each supported family in turn."""
    return request.param
