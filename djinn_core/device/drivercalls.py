"""What the driver answered, as an error that says so."""

from __future__ import annotations

from typing import Any

from cuda.bindings import driver

from djinn_core.errors import DeviceError


def describe(call: str, code: driver.CUresult) -> str:
    """What the driver says about a failed call, in one line."""
    found, text = driver.cuGetErrorString(code)
    return f"{call} failed: {code.name}, {'no description' if found else text.decode()}"


def checked(call: str, result: tuple[Any, ...]) -> Any:
    """The value of a driver call's `result`. Raises DeviceError with the call's name and the driver's words."""
    if result[0]:
        raise DeviceError(describe(call, result[0]))
    return result[1] if len(result) == 2 else None
