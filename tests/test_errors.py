"""Refusals keep their parts wherever they are raised."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from megatron_meco.errors import DataError, FlagError, MeCoError


def test_a_refusal_crosses_a_process_border_whole() -> None:
    error = DataError("is cut short", where="a.bin", remedy="Fetch it again.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert str(again) == str(error) == "a.bin: is cut short. Fetch it again."


def test_a_refusal_that_megatron_raises_anew_is_found_again() -> None:
    """Its module builder does this with every error of a constructor."""
    first = FlagError("not supported", where="--window-size 16,0", remedy="Drop it.")
    with pytest.raises(MeCoError) as caught:
        try:
            raise first
        except Exception as error:
            raise type(error)(f"{error} when instantiating Layer") from None
    assert caught.value.original() is first
    assert FlagError("alone").original().what == "alone"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_an_uncaught_refusal_is_one_line_on_rank_0(rank: str, lines: int) -> None:
    code = (
        "from megatron_meco.errors import FlagError, show_refusals_in_one_line as show; show(); "
        "raise FlagError('not supported', where='--x', remedy='Drop it.')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"RANK": rank}
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["meco: error: --x: not supported. Drop it."] * lines
