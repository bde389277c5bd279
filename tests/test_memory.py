"""Freed pages stay with the process where that is asked for, and only there."""

import platform
import resource

import pytest
import torch

from wandapp.memory import kept_pages

BLOCK = 8 << 20
PAGES = BLOCK // resource.getpagesize()

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these switches")


def page_faults_of_ten_forwards() -> int:
    """Six tensors that live together and are freed together, as a block's activations are."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        activations = [torch.ones(BLOCK // 4) for _ in range(6)]
        del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_tensors_serve_the_next_ones_without_page_faults():
    with kept_pages():
        page_faults_of_ten_forwards()  # what alignment splits off the first ones stays in the thread's cache
        assert page_faults_of_ten_forwards() < PAGES


def test_pages_go_back_when_the_body_ends():
    with kept_pages():
        held = torch.ones(BLOCK)
        before = resident_bytes()
        del held
    assert resident_bytes() < before - 3 * BLOCK


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
