"""What Triton kernels are launched with."""

import pytest
import torch

from layerskip_kernels.triton import launch


@pytest.fixture
def capability(monkeypatch):
    """A GPU of compute capability `capability[0]` in the place of each."""
    found = [(9, 0)]
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[0])
    monkeypatch.delenv("LAYERSKIP_PDL", raising=False)
    launch._can_overlap.cache_clear()
    yield found
    launch._can_overlap.cache_clear()


@pytest.mark.parametrize(("version", "overlap"), [((8, 0), False), ((9, 0), True), ((10, 0), True)])
def test_kernels_of_a_round_overlap_from_hopper_on(capability, version, overlap):
    capability[0] = version
    options = launch.round_options(torch.ones(1))
    assert options["OVERLAP"] is overlap and options.get("launch_pdl", False) is overlap  # neither without the other


def test_overlap_is_turned_off_and_other_words_are_refused(capability, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_PDL", "0")
    assert launch.round_options(torch.ones(1)) == {"enable_fp_fusion": False, "OVERLAP": False}
    monkeypatch.setenv("LAYERSKIP_PDL", "yes")
    with pytest.raises(ValueError, match="LAYERSKIP_PDL=yes: choose 0 or 1"):
        launch.round_options(torch.ones(1))
